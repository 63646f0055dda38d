"""Ranges, temperature and what each precision loses, against plain NumPy."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from data_folders import easy_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import folded, noise, plan_of
from sklearn.metrics import jaccard_score
from torch import nn

from histoseg_fast.compiling import calibrate
from histoseg_fast.compiling.calibrate import (
    MAX_IMAGES,
    TEMPERATURES,
    Calibration,
    candidate_ranges,
    choose_ranges,
    fit_temperature,
    load_calibration,
    measure_precisions,
    scale_logits,
)
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import PlanError
from histoseg_fast.images import write_png
from histoseg_fast.labels import PAPER_PALETTE
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.plan import MODEL, Ranges, pack, unpack
from histoseg_fast.synthetic import make_field

# -- images ----------------------------------------------------------------------------------------


def test_without_a_folder_synthetic_fields_measure():
    found = load_calibration(None, PAPER_PALETTE)
    assert len(found.measuring) == 2 and not found.ranging and not found.labelled
    assert found.source == "synthetic fields"


def test_a_data_folder_gives_its_train_and_val_splits(tmp_path):
    root = easy_folder(tmp_path / "easy", train=3, val=2, side=16)
    found = load_calibration(root, PAPER_PALETTE)
    assert (len(found.ranging), len(found.measuring), found.labelled) == (3, 2, True)
    assert found.source == "2 image(s), the val split of easy"
    assert all(rgb.shape == (16, 16, 3) and ids.shape == (16, 16) for rgb, ids in (*found.ranging, *found.measuring))


def test_a_folder_of_images_is_shared_out(tmp_path):
    for i in range(5):
        write_png(tmp_path / f"{i}.png", noise(1 + i, 3, i))
    (tmp_path / "masks").mkdir()
    write_png(tmp_path / "masks" / "0.png", noise(9, 9))  # a result of `infer`
    found = load_calibration(tmp_path, PAPER_PALETTE)
    assert [len(rgb) for rgb, _ in found.ranging] == [1, 3, 5] and [len(rgb) for rgb, _ in found.measuring] == [2, 4]
    assert not found.labelled and all(labels is None for _, labels in found.ranging)


def test_large_images_are_cut_and_do_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "MAX_SIDE", 8)
    root = easy_folder(tmp_path / "easy", train=1, val=1, side=16)
    for rgb, ids in (*load_calibration(root, PAPER_PALETTE).ranging, *load_calibration(root, PAPER_PALETTE).measuring):
        assert rgb.shape == (8, 8, 3) and ids.shape == (8, 8) and rgb.base is None and ids.base is None


@given(st.integers(1, 500))
def test_many_images_are_thinned_evenly(count):
    chosen = calibrate._thin(range(count))
    assert 1 <= len(chosen) <= MAX_IMAGES and chosen[0] == 0 and len(set(np.diff(chosen))) <= 1
    assert chosen == list(range(count)) or count > MAX_IMAGES
    assert count - 1 - chosen[-1] < (chosen[1] if len(chosen) > 1 else count)


# -- ranges ----------------------------------------------------------------------------------------


class Small(nn.Module):
    """Four convolutions; the third sees values of both signs, the second's output is joined."""

    joined = ("b",)
    stride = 1

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.last(torch.relu(self.c(self.b(torch.relu(self.a(x))))))


IMAGES = [(noise(20, 30, i), None) for i in range(3)]


def test_ranges_are_positive_and_of_layers_without_a_sign():
    found = candidate_ranges(Small().eval(), IMAGES)[0]
    assert set(found.inputs) == {"b", "last"} and set(found.outputs) == {"b"}
    assert all(limit > 0 for limit in (*found.inputs.values(), *found.outputs.values()))


@pytest.mark.parametrize("grey", [0, 255])
def test_ranges_from_images_without_contrast(grey):
    """All-white images are positive after normalisation too: yet the first layer is left alone."""
    found = candidate_ranges(Small().eval(), [(np.full((9, 7, 3), grey, np.uint8), None)])[0]
    assert set(found.inputs) == {"b", "last"}


def test_ranges_of_a_single_pixel():
    found = candidate_ranges(folded("fast"), [(noise(1, 1), None)])[0]
    assert len(found.inputs) == 22 and min(found.inputs.values()) > 0


def test_ranges_of_layers_that_are_dead(tiny_plan):
    """Nothing but zeros comes out of them: the ranges are positive all the same, and make a plan."""
    network = Small().eval()
    for layer in (network.a, network.b):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    found = candidate_ranges(network, IMAGES)[0]
    assert min(found.inputs["b"], found.outputs["b"]) > 0
    manifest = {k: v for k, v in tiny_plan.manifest.items() if k not in ("format", "version", "members")}
    packed = pack(manifest | {"int8": {"inputs": found.inputs, "outputs": found.outputs}}, tiny_plan.members)
    assert unpack(packed).ranges == found


def test_ranges_repeat_and_leave_no_hooks():
    network = Small().eval()
    assert candidate_ranges(network, IMAGES) == candidate_ranges(network, IMAGES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@settings(deadline=None)
@given(st.integers(0, 999), st.floats(1e-3, 1e3), st.booleans())
def test_the_limit_has_the_least_rounding_error(seed, scale, signed):
    values = np.random.default_rng(seed).standard_normal(500) ** 3 * scale
    values = (values if signed else np.abs(values)).astype(np.float32)
    highest = np.abs(values).max()
    limits = calibrate._best_limits(torch.from_numpy(values), signed)
    assert all(0.049 * highest < limit < 1.001 * highest for limit in limits)

    def error(limit, exponent):
        """Of eight bits from 0 to the limit, or from minus the limit to the step below it."""
        levels = np.linspace(-limit, limit * 127 / 128, 256) if signed else np.linspace(0, limit, 256)
        return (np.abs(levels[np.abs(values[:, None] - levels).argmin(1)] - values) ** exponent).mean()

    for exponent, found in zip(calibrate.EXPONENTS, limits, strict=True):
        least = min(error(highest * share, exponent) for share in np.geomspace(0.05, 1, 61))
        assert error(found, exponent) == pytest.approx(least, rel=1e-3, abs=1e-12)


def test_rare_large_values_count_less_with_a_small_exponent():
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(20_000).astype(np.float32)).abs()
    values[:3] = 60
    limits = calibrate._best_limits(values, signed=False)
    assert limits == sorted(limits, reverse=True) and limits[0] > 10 > limits[-1]


def test_the_ranges_that_agree_most_are_chosen():
    """Whatever their place, on the images that are given."""
    plan, lines = plan_of("fast"), []
    images = [(make_field(seed, 96, 64)[0], None) for seed in range(2)]
    good = candidate_ranges(folded("fast"), images)
    bad = Ranges({name: limit / 50 for name, limit in good[0].inputs.items()}, good[0].outputs)
    assert choose_ranges(plan, [bad, good[1], bad], images, lines.append) == good[1]
    assert len(lines) == 1 and lines[0].startswith("int8 ranges of least error^1.5: 9") and "as fp32" in lines[0]


# -- temperature -----------------------------------------------------------------------------------


@pytest.fixture
def answer(monkeypatch, tiny_plan):
    """`answer(logits, labels)`: the temperature for images on which the plan's network gives these."""

    def fit(*pairs):
        given = iter(pairs)
        monkeypatch.setattr(calibrate, "open_engine", lambda *_, **__: contextlib.nullcontext())
        monkeypatch.setattr(calibrate, "run_tiled", lambda *_: next(given)[0])
        return fit_temperature(tiny_plan, [(noise(*labels.shape), labels) for _, labels in pairs])

    return fit


def drawn(temperature, seed, height=250, width=200, unlabelled=0.0):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (3, height, width)).astype(np.float32)
    sharpened = logits / temperature + random.gumbel(size=logits.shape)
    labels = sharpened.argmax(0).astype(np.uint8)
    wrong = random.random(labels.shape) < unlabelled
    labels[wrong] = 255
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found(answer, temperature):
    pairs = [drawn(temperature, seed, unlabelled=0.3) for seed in range(2)]
    assert answer(*pairs) == pytest.approx(temperature, rel=0.05)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.floats(0.2, 5))
def test_no_other_temperature_has_less_cross_entropy(tiny_plan, seed, temperature):
    logits, labels = drawn(temperature, seed, 12, 15, 0.2)
    known = labels < 3

    def cross_entropy(t):
        scaled = logits[:, known].astype(float) / t
        return (
            np.log(np.exp(scaled).sum(0)) - np.take_along_axis(scaled, labels[known][None].astype(int), 0)[0]
        ).mean()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "open_engine", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(calibrate, "run_tiled", lambda *_: logits)
        found = fit_temperature(tiny_plan, [(noise(12, 15), labels)])
    assert (
        cross_entropy(found) <= min(map(cross_entropy, np.geomspace(*TEMPERATURES, 200))) + 1e-6
    )  # what bisection leaves


def test_always_right_and_always_wrong_stay_within_bounds(answer):
    logits, _ = drawn(1, 0, 20, 20)
    right, wrong = logits.argmax(0).astype(np.uint8), logits.argmin(0).astype(np.uint8)
    assert answer((logits, right)) == pytest.approx(TEMPERATURES[0], rel=1e-4)
    assert answer((logits, wrong)) == pytest.approx(TEMPERATURES[1], rel=1e-4)
    assert answer((logits[:, :1, :1], right[:1, :1])) == pytest.approx(TEMPERATURES[0], rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(answer, value):
    logits, labels = drawn(1, 0, 5, 5)
    logits[1, 2, 3] = value
    with pytest.raises(PlanError, match="not finite"):
        answer((logits, labels))


@pytest.mark.parametrize("arch", ["one", "fast"])
@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_scaling_leaves_the_classes_alone(arch, temperature):
    network = copy.deepcopy(folded(arch)).double()
    side = max(16, network.stride)
    image = torch.randn(1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = network(image)
        scale_logits(network, 1 / temperature)
        after = network(image)
    torch.testing.assert_close(after * temperature, before, rtol=1e-9, atol=1e-9)
    assert torch.equal(after.argmax(1), before.argmax(1))


# -- what each precision loses ---------------------------------------------------------------------


def with_ranges(plan):
    manifest = {k: v for k, v in plan.manifest.items() if k not in ("format", "version", "members")}
    ranges = {"inputs": {"b": 4.0, "up": 9.0}, "outputs": {}}
    return unpack(pack(manifest | {"int8": ranges}, {MODEL: plan.members[MODEL]}))


@pytest.mark.parametrize("labelled", [False, True])
def test_what_each_precision_gives(tiny_plan, monkeypatch, labelled):
    monkeypatch.setattr(calibrate, "_speed", lambda engine, plan: 2.0)
    plan, random = with_ranges(tiny_plan), np.random.default_rng(4)
    images = [noise(1, 1), noise(37, 50, 1)]
    labels = [random.integers(0, 3, image.shape[:2], np.uint8) for image in images]
    labels[1][3:9] = 255
    pairs = [(image, ids if labelled else None) for image, ids in zip(images, labels, strict=True)]
    lines = []
    found = measure_precisions(plan, cpu_precisions(), Calibration((), pairs, "x"), lines.append)
    assert list(found) == list(cpu_precisions()) and len(lines) == len(found)
    exact = None
    for precision, values in found.items():
        with open_engine(plan, device="cpu", precision=precision) as engine:
            guess = np.concatenate([run_tiled(engine, plan, image).argmax(0).ravel() for image in images])
        exact = guess if exact is None else exact
        assert values["agreement"] == round((guess == exact).mean(), 6)
        assert ("measured_on" in values) == (precision != "fp32") and "megapixels_per_second" not in values
        assert ("mean_iou" in values) == ("cross_entropy" in values) == labelled
        if labelled:
            truth = np.concatenate([ids.ravel() for ids in labels])
            expected = jaccard_score(truth[truth < 3], guess[truth < 3], average="macro")
            assert values["mean_iou"] == pytest.approx(expected, abs=1e-6)
    assert lines[0].startswith("fp32: 100.000% of pixels as fp32") and ("mIoU" in lines[0]) == labelled
    ranged = measure_precisions(plan, ["fp32"], Calibration(pairs, pairs, "x"), lines.append)
    assert ranged["fp32"]["megapixels_per_second"] == 2.0 and lines[-1].endswith("; 2.00 megapixels/s here")
