"""Made-up whole slides: pyramids of noise, and formats that only OpenSlide reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

SHARED_SLIDES = Path(os.environ.get("HISTOSEG_DATA", Path(__file__).parents[2] / "shared" / "data")) / "slides"
"""Real slides, where they are at hand."""


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """RGB uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def halves(height: int, width: int, levels: int, seed: int = 0) -> list[np.ndarray]:
    """`levels` pictures, each of half the one before (rounded down), with unrelated pixels: none stands for another."""
    return [noise(height >> i, width >> i, seed + i) for i in range(levels)]


def write_pyramid(path: Path, levels: Sequence[np.ndarray], mpp: float | None = 0.5, **options: object) -> Path:
    """A pyramidal TIFF of tiles of 64 pixels: every level a page, the smaller ones marked as reduced."""
    options = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb", "metadata": None, **options}
    if mpp is not None:
        options |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        for i, level in enumerate(levels):
            file.write(level, subfiletype=min(i, 1), **options)
    return path


def write_ome(path: Path, levels: Sequence[np.ndarray], mpp: float = 0.5) -> Path:
    """A pyramidal OME-TIFF: the smaller levels hang below the first."""
    metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp}
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            file.write(level, subfiletype=1, **options)
    return path


def write_svs(path: Path, levels: Sequence[np.ndarray], mpp: float | None = 0.5) -> Path:
    """What Aperio writes: the first level, a thumbnail in strips, the further levels, a label."""
    said = "Aperio Image Library v12\r\n|AppMag = 20" + ("" if mpp is None else f"|MPP = {mpp}")
    options = {"compression": "deflate", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(levels[0], tile=(64, 64), description=said, **options)
        file.write(levels[0][::8, ::8].copy(), rowsperstrip=16, description="Aperio thumbnail", **options)
        for level in levels[1:]:
            file.write(level, tile=(64, 64), description="Aperio level", **options)
        file.write(noise(31, 40), rowsperstrip=16, description="Aperio label", subfiletype=1, **options)
    return path


def write_philips(path: Path, level: np.ndarray, mpp: float = 0.5) -> Path:
    """One level as Philips writes it; only OpenSlide reads it."""
    spacing = f"&quot;{mpp / 1000}&quot; &quot;{mpp / 1000}&quot;"
    spacing = f'<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">{spacing}'
    spacing += "</Attribute>"
    said = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array>'
        f'<DataObject ObjectType="DPScannedImage">{spacing}'
        '<Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01" '
        'PMSVR="IDataObjectArray"><Array>'
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing}</DataObject>'
        "</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    options = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, level, description=said, software="Philips DP v1.0", **options)
    return path
