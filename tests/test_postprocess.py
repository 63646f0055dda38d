"""Options of post-processing: text and JSON there and back, refusals, and that apply() chains the core's steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast import _core, postprocess
from histoseg_fast.errors import PlanError, UsageError
from histoseg_fast.postprocess import CrfOptions, PostProcessing, classify

sigmas = st.floats(0.5, 1e4)
weights = st.floats(0, 1000)
crfs = st.builds(CrfOptions, st.integers(0, 100), weights, sigmas, weights, sigmas, sigmas)
options = st.builds(PostProcessing, st.integers(0, 2**28), st.integers(0, 1024), st.none() | crfs)


@pytest.fixture(scope="module")
def image():
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (24, 30, 3)).astype(np.uint8)
    logits = random.normal(size=(3, 24, 30)).astype(np.float32)
    logits[0, :, :15] += 1
    logits[1, :, 15:] += 1
    return rgb, logits


@given(options)
def test_json_there_and_back(wanted):
    assert PostProcessing.from_json(json.loads(json.dumps(wanted.as_json()))) == wanted


@given(options)
def test_text_there_and_back(wanted):
    parts = [f"min_island={wanted.min_island}", f" majority_radius={wanted.majority_radius} "]
    if wanted.crf:
        parts += [f"crf.{name}={value!r}" for name, value in wanted.as_json()["crf"].items()]
    assert PostProcessing.parse(",".join(parts)) == wanted


@given(options)
def test_shown_text_there_and_back(wanted):
    assert PostProcessing.parse(str(wanted)) == wanted


def test_short_texts():
    crf = "crf,crf.iterations=3,crf.smooth_weight=2,crf.appearance_sigma_xy=0.7"
    for text in ("none", "min_island=9", "majority_radius=2", "crf", f"{crf},majority_radius=2,min_island=9"):
        assert str(PostProcessing.parse(text)) == text
    assert PostProcessing.parse("none") == PostProcessing()
    assert PostProcessing.parse("crf") == PostProcessing(crf=CrfOptions())
    for text in ("crf,crf.iterations=3,min_island=9", "crf.iterations=3,min_island=9,crf"):
        assert PostProcessing.parse(text) == PostProcessing(9, 0, CrfOptions(iterations=3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no post-processing"),
        ("median=3", "known are none, min_island"),
        ("crf.sigma=3", "crf.smooth_sigma"),
        ("crf=3", "no post-processing"),
        ("min_island", "no whole number"),
        ("min_island=2.5", "no whole number"),
        ("min_island=-1", "from 0 to 268435456"),
        ("majority_radius=1025", "from 0 to 1024"),
        ("crf.smooth_weight=nan", "no number"),
        ("crf.smooth_weight=inf", "no number"),
        ("crf.smooth_sigma=0", "from 0.5 to 10000"),
        ("min_island=3,min_island=4", "twice"),
        ("crf,crf", "twice"),
        ("crf.iterations=3,crf.iterations=4", "twice"),
        ("none,crf", "'none' is no"),
    ],
)
def test_texts_that_are_refused(text, words):
    with pytest.raises(UsageError, match=words):
        PostProcessing.parse(text)


GOOD = PostProcessing(5, 2, CrfOptions()).as_json()


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {**GOOD, "more": 1},
        {name: value for name, value in GOOD.items() if name != "crf"},
        {**GOOD, "min_island": True},
        {**GOOD, "min_island": 5.0},
        {**GOOD, "min_island": 2**60},
        {**GOOD, "majority_radius": "2"},
        {**GOOD, "crf": 7},
        {**GOOD, "crf": {}},
        {**GOOD, "crf": {**GOOD["crf"], "iterations": 2.0}},
        {**GOOD, "crf": {**GOOD["crf"], "smooth_weight": float("nan")}},
        {**GOOD, "crf": {**GOOD["crf"], "smooth_sigma": None}},
    ],
)
def test_json_that_is_refused(values):
    with pytest.raises(PlanError, match=r"post-processing|crf"):
        PostProcessing.from_json(values)


def test_options_are_checked_and_frozen():
    with pytest.raises(UsageError, match="min_island"):
        PostProcessing(min_island=-1)
    with pytest.raises(UsageError, match="crf"):
        PostProcessing(crf={"iterations": 3})
    with pytest.raises(UsageError, match="appearance_sigma_rgb"):
        CrfOptions(appearance_sigma_rgb=0.1)
    with pytest.raises(AttributeError):
        PostProcessing().min_island = 3
    assert len({PostProcessing(), PostProcessing(), replace(PostProcessing(), min_island=2)}) == 2


def test_no_step_is_the_argmax(image):
    ids, probabilities = PostProcessing().apply(*image)
    assert probabilities is None
    np.testing.assert_array_equal(ids, image[1].argmax(0))


def test_steps_follow_each_other(image):
    crf = CrfOptions(iterations=2, appearance_sigma_xy=20, appearance_sigma_rgb=30)
    ids, probabilities = PostProcessing(min_island=20, majority_radius=1, crf=crf).apply(*image)
    np.testing.assert_array_equal(probabilities, _core.dense_crf(*image, 2, 3, 3, 5, 20, 30))
    by_hand = _core.majority(probabilities.argmax(0).astype(np.uint8), 1, 3)
    np.testing.assert_array_equal(ids, _core.remove_islands(by_hand, 20)[0])
    without = PostProcessing(min_island=20, majority_radius=1)
    kept = without.apply(*image)
    assert kept.probabilities is None
    np.testing.assert_array_equal(kept.ids, without.clean(image[1].argmax(0).astype(np.uint8), 3))
    assert (kept.ids != image[1].argmax(0)).any()


def test_scores_that_are_not_finite(image):
    rgb, logits = image[0], image[1].copy()
    logits[1, 3, 4] = np.nan
    assert PostProcessing().apply(rgb, logits).ids[3, 4] == 0
    with pytest.raises(UsageError, match="not finite"):
        PostProcessing(crf=CrfOptions()).apply(rgb, logits)


def test_wrong_arrays(image):
    rgb, logits = image
    with pytest.raises(UsageError, match="float32"):
        PostProcessing().apply(rgb, logits.astype(np.float64))
    with pytest.raises(UsageError, match="shape"):
        classify(logits[0])
    for wrong in (rgb[:-1], rgb[..., 0]):
        with pytest.raises(UsageError, match="rgb"):
            PostProcessing(crf=CrfOptions()).apply(wrong, logits)
    with pytest.raises(UsageError, match="ids"):
        PostProcessing(majority_radius=1).clean(np.full((3, 3), 7, np.uint8), 3)
    large = np.broadcast_to(np.zeros(4096, np.float32), (3, 1025, 4096))
    with pytest.raises(UsageError, match=f"up to {postprocess.MAX_CRF_PIXELS}"):
        PostProcessing(crf=CrfOptions()).apply(rgb, large)
