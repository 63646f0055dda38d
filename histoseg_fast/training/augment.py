"""What training does to a crop: mirroring, turns, scale, stain and colour jitter, noise. Labels follow exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# Optical-density vectors of haematoxylin, eosin and DAB (Ruifrok and Johnston, 2001), rows of unit length.
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=np.float32)
HED_INVERSE = np.linalg.inv(HED).astype(np.float32)


@dataclass(frozen=True)
class Augmentation:
    """Which augmentations a crop gets; the defaults are the paper's (mirroring is the dataset's own).

    noise : Gaussian noise of a standard deviation up to this, in grey levels of 255 (paper, section 3.2).
    turns : turn by a random multiple of 90 degrees.
    scale : the crop is taken from an area between 1/(1+scale) and 1+scale times its side.
    stain : haematoxylin and eosin are each multiplied by up to 1 +- stain, and shifted by a fifth of it.
    colour : brightness and contrast vary by up to +- colour.
    """

    noise: float = 0.0
    turns: bool = False
    scale: float = 0.0
    stain: float = 0.0
    colour: float = 0.0

    def __call__(
        self, rgb: np.ndarray, ids: np.ndarray, mirror: int, crop: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A crop, RGB uint8 (crop, crop, 3) and ids uint8 (crop, crop).

        mirror : 0 not, 1 about x (up-down), 2 about y (left-right).
        """
        side = crop if not self.scale else round(crop * float(np.exp(rng.uniform(-1, 1) * np.log1p(self.scale))))
        rgb, ids = random_crop(rgb, ids, side, rng)
        if side != crop:
            rgb, ids = resize(rgb, ids, crop, crop)
        if mirror:
            rgb, ids = np.flip(rgb, mirror - 1), np.flip(ids, mirror - 1)
        if self.turns:
            quarter = int(rng.integers(4))
            rgb, ids = np.rot90(rgb, quarter), np.rot90(ids, quarter)
        if self.stain:
            rgb = jitter_stain(rgb, self.stain, rng)
        if self.colour or self.noise:
            rgb = jitter_colour(rgb, self.colour, self.noise, rng)
        return np.ascontiguousarray(rgb), np.ascontiguousarray(ids)


def random_crop(rgb: np.ndarray, ids: np.ndarray, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A square of `side` pixels at a random place; an image that is smaller is reflected to that size first."""
    height, width = ids.shape
    if height < side or width < side:
        pad = ((0, max(0, side - height)), (0, max(0, side - width)))
        rgb, ids = np.pad(rgb, (*pad, (0, 0)), mode="reflect"), np.pad(ids, pad, mode="reflect")
        height, width = ids.shape
    y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    return rgb[y : y + side, x : x + side], ids[y : y + side, x : x + side]


def resize(rgb: np.ndarray, ids: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB uint8 and ids uint8 to `height` x `width`: the image by antialiased bilinear, the ids by nearest."""
    size = (height, width)
    image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)
    labels = torch.from_numpy(np.ascontiguousarray(ids))[None, None]
    labels = F.interpolate(labels, size=size, mode="nearest-exact")
    return image[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy(), labels[0, 0].numpy()


def jitter_stain(rgb: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Vary the amounts of haematoxylin and eosin (the third vector a little) in optical density; uint8 (H, W, 3)."""
    limits = strength * np.array([1.0, 1.0, 0.3], dtype=np.float32)
    gain = 1 + rng.uniform(-limits, limits).astype(np.float32)
    shift = 0.2 * rng.uniform(-limits, limits).astype(np.float32)
    density = -np.log((rgb.astype(np.float32) + 1) / 256)
    stains = density.reshape(-1, 3) @ HED_INVERSE
    # Glass has no stain to shift: the shift fades in with what is there.
    stains = stains * gain + shift * np.minimum(np.abs(stains) * 5, 1)
    shifted: np.ndarray = np.clip(np.exp(-(stains @ HED)) * 256 - 1 + 0.5, 0, 255)
    return shifted.astype(np.uint8).reshape(rgb.shape)


def jitter_colour(rgb: np.ndarray, colour: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Contrast about the mean, brightness by channel, then Gaussian noise; uint8 (H, W, 3)."""
    image = rgb.astype(np.float32)
    if colour:
        contrast = 1 + rng.uniform(-colour, colour)
        brightness = rng.uniform(-colour, colour) + rng.uniform(-colour, colour, 3) * 0.3
        mean = image.mean()
        image = (image - mean) * contrast + mean + 255 * 0.5 * brightness.astype(np.float32)
    if noise:
        image = image + rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0, noise)
    jittered: np.ndarray = np.clip(image + 0.5, 0, 255)
    return jittered.astype(np.uint8)
