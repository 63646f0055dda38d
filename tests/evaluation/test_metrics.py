"""Scores against NumPy, SciPy and scikit-learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from histoseg_fast.evaluation.metrics import CALIBRATION_BINS, Scores, score_logits
from histoseg_fast.labels import Palette

NAMES = ("background", "cancer", "stroma")
SETTINGS = settings(deadline=None, max_examples=150)


@st.composite
def scored(draw):
    """Logits (C, H, W) in any layout and labels with unlabelled pixels."""
    classes, height, width = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0, 0.1, 3, 1e3, 1e30]))
    logits = random.normal(0, spread, (height, width, classes)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    logits = logits.transpose(2, 0, 1)
    if draw(st.booleans()):
        logits = np.ascontiguousarray(logits)
    labels = random.integers(0, classes, (height, width), np.uint8)
    labels[random.random(labels.shape) < draw(st.sampled_from([0, 0.3, 1]))] = draw(st.sampled_from([classes, 255]))
    return logits, labels


@SETTINGS
@given(scored())
def test_confusion_and_cross_entropy(pair):
    logits, labels = pair
    classes, counted = len(logits), labels < len(logits)
    confusion = np.full((classes, classes), 5, np.int64)
    colours = np.random.default_rng(1).random((classes, 3))
    total, absolute, square = score_logits(logits, labels, colours, confusion, np.zeros((4, 3)))
    truth, predicted = labels[counted], logits.argmax(0)[counted]
    expected = np.zeros((classes, classes), np.int64)
    np.add.at(expected, (truth, predicted), 1)
    np.testing.assert_array_equal(confusion - 5, expected)
    exact = logits.astype(np.float64)
    peak = exact.max(0)
    log_softmax = exact - peak - np.log(np.exp(exact - peak).sum(0))
    picked = np.take_along_axis(log_softmax, np.where(counted, labels, 0)[None].astype(int), 0)[0]
    np.testing.assert_allclose(total, -picked[counted].sum(), rtol=1e-10, atol=1e-9)
    difference = np.einsum("chw,ck->hwk", np.exp(log_softmax), colours)[counted] - colours[labels[counted]]
    np.testing.assert_allclose(absolute, np.abs(difference).sum(), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(square, (difference**2).sum(), rtol=1e-10, atol=1e-9)


@SETTINGS
@given(scored(), st.integers(1, 20))
def test_reliability_and_calibration_error(pair, bins):
    logits, labels = pair
    classes, counted = len(logits), labels < len(logits)
    reliability = np.full((bins, 3), 2.0)
    score_logits(logits, labels, np.zeros((classes, 3)), np.zeros((classes, classes), np.int64), reliability)
    exact = logits.astype(np.float64) - logits.max(0)
    confidence = (1 / np.exp(exact).sum(0))[counted]
    right = (logits.argmax(0) == labels)[counted]
    edges = np.round(confidence * bins)
    assume(not ((np.abs(confidence * bins - edges) < 1e-9) & (edges < bins)).any())  # either row would do
    rows = np.minimum((confidence * bins).astype(int), bins - 1)
    for row in range(bins):
        here = rows == row
        expected = [here.sum(), confidence[here].sum(), right[here].sum()]
        np.testing.assert_allclose(reliability[row] - 2, expected, rtol=1e-9, atol=1e-9)


def calibration_error(confidence, right, bins):
    """Guo et al., 2017, equations 2 to 5, a bin at a time."""
    total = 0.0
    for b in range(bins):
        here = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        if here.any():
            total += here.mean() * abs(confidence[here].mean() - right[here].mean())
    return total


@SETTINGS
@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([0.3, 1, 5, 50]), st.sampled_from([0, 0.4]))
def test_expected_calibration_error(seed, images, spread, unlabelled):
    """Pooled over the images, so not the mean of theirs."""
    random = np.random.default_rng(seed)
    scores, confidences, rights = Scores(), [], []
    for _ in range(images):
        logits = random.normal(0, spread, (3, 9, 11)).astype(np.float32)
        labels = random.integers(0, 3, (9, 11), np.uint8)
        labels[random.random(labels.shape) < unlabelled] = 255
        scores.add(logits, labels)
        exact = logits.astype(np.float64) - logits.max(0)
        confidences.append((1 / np.exp(exact).sum(0))[labels < 3])
        rights.append((logits.argmax(0) == labels)[labels < 3])
    expected = calibration_error(np.concatenate(confidences), np.concatenate(rights), CALIBRATION_BINS)
    assert scores.calibration_error == pytest.approx(expected, abs=1e-9)
    assert scores.as_json()["calibration_error"] == pytest.approx(expected, abs=1e-6)


def test_a_network_that_is_as_sure_as_it_is_right():
    """Logits log p give p; labels of every class, as often as p says."""
    scores = Scores()
    p = np.array([0.7, 0.2, 0.1])
    logits = np.log(p).astype(np.float32)[:, None, None].repeat(10, 2)
    scores.add(logits, np.array([[0] * 7 + [1] * 2 + [2]], np.uint8))
    assert scores.calibration_error == pytest.approx(0, abs=1e-6)
    scores.add(logits, np.zeros((1, 10), np.uint8))
    assert scores.calibration_error == pytest.approx(0.15, abs=1e-6)  # 0.7 sure, 17 of 20 right


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_logits_that_are_not_finite(value, everywhere):
    """They have no scores, and write nowhere that they should not."""
    logits, labels = np.zeros((3, 4, 5), np.float32), np.zeros((4, 5), np.uint8)
    logits[...] = value if everywhere else 0
    logits[0, 2, 2] = value
    reliability = np.zeros((7, 3))
    room = np.zeros((40, 7, 3))
    room[20] = reliability
    score_logits(logits, labels, np.zeros((3, 3)), np.zeros((3, 3), np.int64), room[20])
    assert not room[:20].any() and not room[21:].any() and room[20, :, 0].sum() == 20
    scores = Scores()
    scores.add(logits, labels)
    found = json.loads(json.dumps(scores.as_json(), allow_nan=False))
    if value == -np.inf and not everywhere:  # the probability is 0: the wrong class, for certain
        assert found["calibration_error"] is not None
    else:
        assert found["cross_entropy"] is None and found["calibration_error"] is None


def test_cross_entropy_is_torchs():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(4)
    logits = random.normal(0, 4, (3, 50, 60)).astype(np.float32)
    labels = random.integers(0, 3, (50, 60), np.uint8)
    labels[:5] = 255
    scores = Scores()
    scores.add(logits, labels)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double()[None], torch.from_numpy(labels).long()[None], ignore_index=255
    )
    assert scores.cross_entropy == pytest.approx(float(expected), rel=1e-12)


@SETTINGS
@given(st.integers(0, 2**32), st.lists(st.sampled_from([0, 1, 2]), min_size=1, unique=True))
def test_scores_are_scikit_learns(seed, present):
    """Two images pooled, some classes in neither labels nor prediction."""
    random = np.random.default_rng(seed)
    scores, truths, guesses = Scores(), [], []
    for _ in range(2):
        labels = random.choice(np.array(present, np.uint8), (6, 7))
        logits = random.normal(0, 1, (3, 6, 7)).astype(np.float32)
        logits[[c for c in range(3) if c not in present]] = -9
        scores.add(logits, labels)
        truths.append(labels.ravel())
        guesses.append(logits.argmax(0).ravel())
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(truth, guess, labels=[0, 1, 2]))
    assert scores.pixel_accuracy == pytest.approx(accuracy_score(truth, guess))
    iou = jaccard_score(truth, guess, labels=present, average=None)
    np.testing.assert_allclose(scores.iou[present], iou)
    np.testing.assert_allclose(scores.dice[present], f1_score(truth, guess, labels=present, average=None))
    absent = [c for c in range(3) if c not in present]
    assert np.isnan(scores.iou[absent]).all() and np.isnan(scores.dice[absent]).all()
    assert scores.mean_iou == pytest.approx(iou.mean())
    assert (scores.images, scores.pixels) == (2, 84)


@SETTINGS
@given(scored(), st.integers(0, 2**32))
def test_given_classes_count_in_place_of_the_highest(pair, seed):
    logits, labels = pair
    classes, known = len(logits), labels < len(logits)
    assume(classes > 1)  # a palette has two or more
    palette = Palette(tuple(map(str, range(classes))), tuple((c, 0, 0) for c in range(classes)))
    predicted = np.random.default_rng(seed).integers(0, classes, labels.shape, np.uint8)
    plain, scores = Scores(palette), Scores(palette)
    plain.add(logits, labels)
    scores.add(logits, labels, predicted)
    scores.add(logits, labels, logits.argmax(0).astype(np.uint8))
    np.testing.assert_array_equal(scores.sums, np.concatenate([plain.sums] * 2))
    expected = np.zeros((classes, classes), np.int64)
    np.add.at(expected, (labels[known], predicted[known]), 1)
    np.testing.assert_array_equal(scores.confusions, [expected, plain.confusion])


def test_a_class_that_is_only_predicted_counts_as_missed():
    scores = Scores()
    scores.confusions = np.array([[[6, 0, 2], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 4, 0], [0, 0, 0]]])
    assert scores.iou.tolist() == [6 / 8, 1.0, 0.0] and scores.dice.tolist() == [12 / 14, 1.0, 0.0]
    assert scores.mean_iou == pytest.approx(1.75 / 3)


def test_json_of_nothing_and_of_absent_classes():
    scores = Scores()
    empty = scores.as_json()
    assert empty["pixels"] == 0 and empty["images"] == 0
    assert [empty[key] for key in ("cross_entropy", "pixel_accuracy", "mean_iou", "calibration_error")] == [None] * 4
    scores.add(np.zeros((3, 2, 2), np.float32), np.array([[0, 0], [0, 255]], np.uint8))
    filled = json.loads(json.dumps(scores.as_json(), allow_nan=False))
    assert filled["iou"] == {"background": 1.0, "cancer": None, "stroma": None} == filled["dice"]
    assert filled["cross_entropy"] == pytest.approx(math.log(3), abs=1e-6)
    assert filled["confusion"] == [[3, 0, 0], [0, 0, 0], [0, 0, 0]] and filled["pixels"] == 3


def test_shapes_that_do_not_fit():
    logits, labels, confusion = np.zeros((3, 4, 5), np.float32), np.zeros((4, 5), np.uint8), np.zeros((3, 3), np.int64)
    colours, bins = np.zeros((3, 3)), np.zeros((5, 3))
    wrong = [(logits, labels[:3], colours, confusion, bins), (logits, labels, colours, confusion[:2], bins)]
    wrong += [(logits[:2], labels, colours, confusion, bins), (logits, labels, colours[:2], confusion, bins)]
    wrong += [(logits, labels, colours, confusion, bins[:0]), (logits, labels, colours, confusion, bins[:, :2])]
    for arguments in wrong:
        with pytest.raises(ValueError):
            score_logits(*(np.ascontiguousarray(a) for a in arguments))


def random_scores(images: int) -> Scores:
    random = np.random.default_rng(7)
    scores = Scores()
    for _ in range(images):
        height, width = random.integers(3, 12, 2)
        labels = random.integers(0, 3, (height, width), np.uint8)
        logits = random.normal(0, 1, (3, height, width)).astype(np.float32)
        np.put_along_axis(logits, labels[None].astype(int), 1.5, 0)
        scores.add(logits, labels)
    return scores


def test_averages_over_images_and_intervals():
    scores = random_scores(9)
    json_values = scores.as_json()
    alone = []
    for i in range(9):
        one = Scores()
        one.confusions, one.sums = scores.confusions[i : i + 1], scores.sums[i : i + 1]
        alone.append(one.as_json())
    for key in ("cross_entropy", "l1", "l2", "pixel_accuracy", "mean_iou", "mean_dice"):
        low, high = json_values["ci95"][key]
        assert min(a[key] for a in alone) <= low < json_values[key] < high <= max(a[key] for a in alone)
        assert json_values["per_image"][key] == pytest.approx(np.mean([a[key] for a in alone]), abs=2e-6)
    one = alone[0]
    assert one["ci95"]["mean_iou"] == [one["mean_iou"], one["mean_iou"]]


def test_precision_recall_and_tumour_stroma_ratio_error():
    scores = Scores()
    scores.confusions = np.array([[[1, 0, 0], [0, 6, 2], [1, 0, 8]], [[5, 0, 0], [0, 3, 0], [0, 0, 0]]])
    scores.sums = np.zeros((2, 3))
    values = scores.as_json()
    assert values["class_precision"] == pytest.approx({"background": 6 / 7, "cancer": 1.0, "stroma": 0.8}, abs=1e-6)
    assert values["class_recall"] == pytest.approx({"background": 1.0, "cancer": 9 / 11, "stroma": 8 / 9}, abs=1e-6)
    assert values["tumour_stroma_ratio_error"] == pytest.approx((abs(8 / 17 - 6 / 16) + 0) / 2, abs=1e-6)


def test_rows_that_several_processes_counted_join_in_order():
    scores, parts = random_scores(5), [Scores(), Scores()]
    for rank, part in enumerate(parts):
        part.confusions, part.sums = scores.confusions[rank::2], scores.sums[rank::2]
        part.reliability = scores.reliability[rank::2]

    def gather(rows):
        whole = np.zeros((5, *rows.shape[1:]), rows.dtype)
        (name,) = (name for name, value in vars(parts[0]).items() if value is rows)
        for rank, part in enumerate(parts):
            whole[rank::2] = getattr(part, name)
        return whole

    joined = Scores()
    joined.confusions, joined.sums, joined.reliability = parts[0].confusions, parts[0].sums, parts[0].reliability
    joined.join(gather)
    assert joined.as_json() == scores.as_json()
