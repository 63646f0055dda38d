"""Reading of rasters (PNG, JPEG, TIFF) and writing of masks, overlays, outlines and probabilities."""

from .geojson import GeojsonWriter, OutlineOptions
from .reading import SUFFIXES, open_image
from .source import ImageSource
from .whole import read_image, write_png
from .writing import MaskWriter, OverlayWriter, ProbabilityWriter

__all__ = ["SUFFIXES", "ImageSource", "MaskWriter", "OverlayWriter", "ProbabilityWriter", "open_image"]
__all__ += ["GeojsonWriter", "OutlineOptions", "read_image", "write_png"]
