"""Reading of rasters (PNG, JPEG, TIFF) and writing of masks, overlays, probabilities and what slides get."""

from .overview import OverviewWriter
from .pyramid import PyramidWriter
from .reading import SUFFIXES, open_image
from .source import ImageSource
from .whole import read_image, write_png
from .writing import MaskWriter, OverlayWriter, ProbabilityWriter

__all__ = ["SUFFIXES", "ImageSource", "MaskWriter", "OverlayWriter", "ProbabilityWriter", "open_image"]
__all__ += ["OverviewWriter", "PyramidWriter", "read_image", "write_png"]
