"""H&E histology images to cancer / stroma / background maps: a tiled inference engine."""

__version__ = "0.1.0"
