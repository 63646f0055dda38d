"""Reading of rasters (PNG, JPEG, TIFF) and slides, and writing of all that `infer` gives."""

from .geojson import GeojsonWriter, OutlineOptions
from .overview import OverviewWriter
from .pyramid import PyramidWriter
from .reading import SLIDE_SUFFIXES, SUFFIXES, open_image
from .slide import NATIVE, Resolution
from .source import ImageSource
from .whole import read_image, write_png
from .writing import MaskWriter, OverlayWriter, ProbabilityWriter

__all__ = ["NATIVE", "SLIDE_SUFFIXES", "SUFFIXES", "GeojsonWriter", "ImageSource", "MaskWriter", "OutlineOptions"]
__all__ += ["OverlayWriter", "OverviewWriter", "ProbabilityWriter", "PyramidWriter", "Resolution", "open_image"]
__all__ += ["read_image", "write_png"]
