"""The losses, alone or as a weighted sum: p is softmax(logits), y the label, mean over labelled pixels.

Every term but distillation takes logits float (N, C, H, W) and ids int64 (N, H, W), 255 where a pixel has no label,
and gives a scalar tensor that is 0 where nothing is labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from histoseg_fast.errors import UsageError
from histoseg_fast.labels import PAPER_PALETTE, UNMATCHED, Palette

DICE_SMOOTHING = 1.0
"""Pixels added to both halves of the Dice quotient, so that a class absent from a batch costs nothing."""


def cross_entropy(
    logits: torch.Tensor, ids: torch.Tensor, class_weights: Sequence[float] = (), smoothing: float = 0.0
) -> torch.Tensor:
    """Softmax cross entropy, mean of -w_y log p_y (paper, section 4.3), divided by the sum of the weights w_y.

    With `smoothing` s the target is (1 - s) onehot(y) + s / C (Szegedy et al., 2016).
    """
    weights = torch.as_tensor(class_weights, dtype=logits.dtype, device=logits.device) if class_weights else None
    if not (ids != UNMATCHED).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits, ids, weights, ignore_index=UNMATCHED, label_smoothing=smoothing)


def _images(
    logits: torch.Tensor, ids: torch.Tensor, palette: Palette
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predicted and label image in 0..1, (N, 3, H, W), and which pixels are labelled, (N, 1, H, W).

    The predicted image is the expected colour, sum over c of p_c colour_c: the palette's when p is certain.
    """
    colours = torch.tensor(palette.colours, dtype=logits.dtype, device=logits.device) / 255
    labelled = ids != UNMATCHED
    predicted = torch.einsum("nchw,ck->nkhw", logits.softmax(1), colours)
    return predicted, colours[ids.where(labelled, 0)].permute(0, 3, 1, 2), labelled[:, None].to(logits.dtype)


def l1(logits: torch.Tensor, ids: torch.Tensor, palette: Palette = PAPER_PALETTE) -> torch.Tensor:
    """Mean over pixels of |predicted image - label image|, summed over RGB; its weight is lambda1 (section 4.3)."""
    predicted, label, labelled = _images(logits, ids, palette)
    return ((predicted - label).abs() * labelled).sum() / labelled.sum().clamp(min=1)


def l2(logits: torch.Tensor, ids: torch.Tensor, palette: Palette = PAPER_PALETTE) -> torch.Tensor:
    """Mean over pixels of (predicted image - label image)^2, summed over RGB; its weight is lambda2 (section 4.3)."""
    predicted, label, labelled = _images(logits, ids, palette)
    return ((predicted - label).square() * labelled).sum() / labelled.sum().clamp(min=1)


def smoothness(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of 4-neighbours with the same label of ||p_i - p_j||^2: the noise penalty of section 6.2.

    Pairs across a label edge, or with an unlabelled pixel, are left out: there the prediction should change.
    """
    p = logits.softmax(1)
    total, pairs = logits.new_zeros(()), ids.new_zeros(())
    for axis in (2, 3):
        length = p.shape[axis] - 1
        if length < 1:
            continue
        first, second = p.narrow(axis, 0, length), p.narrow(axis, 1, length)
        a, b = ids.narrow(axis - 1, 0, length), ids.narrow(axis - 1, 1, length)
        same = (a == b) & (a != UNMATCHED)
        total = total + ((first - second).square().sum(1) * same).sum()
        pairs = pairs + same.sum()
    return total / pairs.clamp(min=1)


def dice(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """1 - mean over classes of (2 sum p g + s) / (sum p + sum g + s), over the batch (Milletari et al., 2016)."""
    labelled = (ids != UNMATCHED)[:, None].to(logits.dtype)
    p = logits.softmax(1) * labelled
    truth = F.one_hot(ids.where(ids != UNMATCHED, 0), logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype) * labelled
    hit, size = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    return 1 - ((2 * hit + DICE_SMOOTHING) / (size + DICE_SMOOTHING)).mean()


def distillation(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over all pixels, labelled or not, of KL(softmax(teacher) || p) (Hinton et al., 2015, at temperature 1).

    teacher : the logits of another network for the same pixels, float (N, C, H, W).
    """
    divergence = F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    return divergence.sum(1).mean()


TERMS: Mapping[str, Callable[..., torch.Tensor]] = {
    "ce": cross_entropy,
    "l1": l1,
    "l2": l2,
    "smooth": smoothness,
    "dice": dice,
    "distil": distillation,
}
"""Names of the terms on the command line."""


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms. class_weights and label_smoothing act on the cross entropy, palette on L1 and L2."""

    weights: Mapping[str, float]
    palette: Palette = PAPER_PALETTE
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    def __call__(self, logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of a batch; `teacher` holds the teacher's logits where there is a term "distil"."""
        total = logits.new_zeros(())
        for name, weight in self.weights.items():
            if name == "ce":
                term = cross_entropy(logits, ids, self.class_weights, self.label_smoothing)
            elif name in ("l1", "l2"):
                term = TERMS[name](logits, ids, self.palette)
            elif name == "distil":
                assert teacher is not None
                term = distillation(logits, teacher)
            else:
                term = TERMS[name](logits, ids)
            total = total + weight * term
        return total


def parse_loss(text: str) -> dict[str, float]:
    """Terms and weights from "ce=1,l1=0.5,l2=0.5"; a term without a weight counts once. Raises UsageError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in TERMS or name in weights:
            raise UsageError(f"--loss: {name!r} is no term, or stands twice", fix="terms: " + ", ".join(TERMS))
        try:
            weights[name] = float(number or 1)
        except ValueError:
            raise UsageError(f"--loss: {number!r} is no weight for {name}") from None
        if not 0 < weights[name] < float("inf"):
            raise UsageError(f"--loss: the weight of {name} must be a positive number, not {number}")
    return weights
