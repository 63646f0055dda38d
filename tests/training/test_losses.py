"""The losses: gradients against finite differences, values against plain loops, ignored pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histoseg_fast.errors import UsageError
from histoseg_fast.training import losses
from histoseg_fast.training.losses import TERMS, Loss, parse_loss


def batch(seed: int = 0, size: tuple[int, int] = (5, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 3, (2, *size), generator=generator)
    ids[0, 0, 0] = 255
    return logits, ids


LABELLED = [term for term in TERMS if term != "distil"]
"""Terms that compare with labels, not with a teacher."""


@pytest.mark.parametrize("term", LABELLED)
def test_gradients_equal_finite_differences(term):
    logits, ids = batch()
    assert torch.autograd.gradcheck(lambda x: TERMS[term](x, ids), logits.requires_grad_())


def test_gradient_of_a_weighted_sum_with_class_weights_and_smoothing():
    logits, ids = batch(1)
    terms = {"ce": 1.0, "l1": 0.3, "l2": 0.7, "smooth": 0.2, "dice": 0.5}
    loss = Loss(terms, class_weights=(1.0, 2.0, 0.5), label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x, ids), logits.requires_grad_())
    parts = 0.3 * losses.l1(logits, ids) + 0.7 * losses.l2(logits, ids) + 0.2 * losses.smoothness(logits, ids)
    parts = parts + 0.5 * losses.dice(logits, ids) + losses.cross_entropy(logits, ids, (1.0, 2.0, 0.5), 0.1)
    assert loss(logits, ids).item() == pytest.approx(parts.item(), abs=1e-12)


def test_values_equal_plain_loops():
    logits, ids = batch(2)
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    colours = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], float)
    entropy = absolute = square = count = 0.0
    smooth = pairs = 0.0
    for n, y, x in np.ndindex(ids.shape):
        label = int(ids[n, y, x])
        if label == 255:
            continue
        count += 1
        difference = p[n, :, y, x] @ colours - colours[label]
        entropy -= np.log(p[n, label, y, x])
        absolute += np.abs(difference).sum()
        square += (difference**2).sum()
        for other in ((y + 1, x), (y, x + 1)):
            if other[0] < ids.shape[1] and other[1] < ids.shape[2] and ids[(n, *other)] == label:
                smooth += ((p[n, :, y, x] - p[(n, slice(None), *other)]) ** 2).sum()
                pairs += 1
    assert losses.cross_entropy(logits, ids).item() == pytest.approx(entropy / count)
    assert losses.l1(logits, ids).item() == pytest.approx(absolute / count)
    assert losses.l2(logits, ids).item() == pytest.approx(square / count)
    assert losses.smoothness(logits, ids).item() == pytest.approx(smooth / pairs)


def test_a_certain_right_answer_costs_nothing_and_a_wrong_one_does():
    ids = torch.tensor([[[0, 1], [2, 1]]])
    right = torch.nn.functional.one_hot(ids, 3).permute(0, 3, 1, 2).double() * 100
    for term in ("ce", "l1", "l2"):
        assert TERMS[term](right, ids).item() == pytest.approx(0, abs=1e-9)
        assert TERMS[term](right.roll(1, dims=1), ids).item() > 0.9
    assert losses.dice(right, ids).item() < losses.dice(right.roll(1, dims=1), ids).item()
    assert losses.smoothness(right, ids).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("term", LABELLED)
def test_unlabelled_pixels_do_not_count(term):
    logits, ids = batch(3)
    changed = logits.clone()
    changed[0, :, 0, 0] += torch.tensor([5.0, -3.0, 1.0], dtype=torch.float64)
    assert TERMS[term](logits, ids).item() == pytest.approx(TERMS[term](changed, ids).item(), abs=1e-12)
    assert TERMS[term](logits, torch.full_like(ids, 255)).isfinite()


def test_distillation():
    """Gradient, value against plain NumPy, and nothing to learn from an equal network."""
    logits, ids = batch(4)
    teacher, _ = batch(5)
    loss = Loss({"distil": 0.5, "ce": 2.0})
    assert torch.autograd.gradcheck(lambda x: losses.distillation(x, teacher), logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: loss(x, ids, teacher), logits)
    p, q = (np.exp(x.detach().numpy()) for x in (logits, teacher))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    value = losses.distillation(logits, teacher).item()
    assert value == pytest.approx((q * np.log(q / p)).sum(1).mean())
    expected = 0.5 * value + 2 * losses.cross_entropy(logits, ids).item()
    assert loss(logits, ids, teacher).item() == pytest.approx(expected, abs=1e-12)
    same = losses.distillation(logits, logits.detach() + 7.0)  # softmax does not see a constant
    assert same.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(same, logits)
    assert gradient.abs().max() < 1e-12


@given(st.integers(0, 999), st.floats(0, 100))
@settings(deadline=None, max_examples=30)
def test_distillation_is_a_divergence(seed, spread):
    """Never negative; unlabelled pixels count, because a teacher has an opinion on them."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (spread * torch.randn(1, 4, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    nothing = torch.full((1, 3, 2), 255)
    value = Loss({"distil": 1.0})(logits, nothing, teacher)
    assert value.isfinite() and value >= -1e-12
    assert value.item() == pytest.approx(losses.distillation(logits, teacher).item())


def test_smoothness_leaves_label_edges_alone():
    ids = torch.tensor([[[0, 0, 1, 1]]])
    step = torch.nn.functional.one_hot(ids, 3).permute(0, 3, 1, 2).double() * 50
    assert losses.smoothness(step, ids).item() == pytest.approx(0, abs=1e-9)
    assert losses.smoothness(step, torch.zeros_like(ids)).item() > 0.5


def test_parse_loss():
    assert parse_loss("ce") == {"ce": 1.0}
    assert parse_loss("ce=1, l1=0.5,l2 = 2") == {"ce": 1.0, "l1": 0.5, "l2": 2.0}
    assert parse_loss("ce=0.5,distil=0.5") == {"ce": 0.5, "distil": 0.5}
    for bad in ("", "mse", "ce=x", "ce=-1", "ce=nan", "ce=inf", "ce,ce"):
        with pytest.raises(UsageError):
            parse_loss(bad)
