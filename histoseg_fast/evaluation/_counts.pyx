# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Counting loops of the scores: one pass over labels and logits, without the GIL."""

from libc.math cimport exp, log
from libc.stdint cimport int64_t, uint8_t


def score_logits(const float[:, :, :] logits, const uint8_t[:, :] labels, int64_t[:, ::1] confusion):
    """Add one image to `confusion` (rows true, columns predicted) and return its summed cross entropy.

    logits : float32 (C, H, W); labels : uint8 (H, W), where ids of C and above (255: ignore) are not counted;
    confusion : int64 (C, C), added to. Ties of the argmax go to the lower class. The cross entropy is
    -sum over counted pixels of log softmax(logits)[label] (paper, section 4.3), in double precision.
    Raises ValueError if the shapes do not fit.
    """
    cdef Py_ssize_t classes = logits.shape[0], height = logits.shape[1], width = logits.shape[2]
    cdef Py_ssize_t y, x, c, best
    cdef uint8_t label
    cdef double total = 0.0, row_total, exponents, peak
    if labels.shape[0] != height or labels.shape[1] != width:
        raise ValueError(f"labels are {labels.shape[0]}x{labels.shape[1]}, logits {height}x{width}")
    if confusion.shape[0] != classes or confusion.shape[1] != classes:
        raise ValueError("confusion must be (C, C)")
    with nogil:
        for y in range(height):
            row_total = 0.0
            for x in range(width):
                label = labels[y, x]
                if label >= classes:
                    continue
                best = 0
                for c in range(1, classes):
                    if logits[c, y, x] > logits[best, y, x]:
                        best = c
                peak = logits[best, y, x]
                exponents = 0.0
                for c in range(classes):
                    exponents = exponents + exp(logits[c, y, x] - peak)
                row_total += log(exponents) + peak - logits[label, y, x]
                confusion[label, best] += 1
            total += row_total
    return total


def count_pairs(const uint8_t[:, :] labels, const uint8_t[:, :] predicted, int64_t[:, ::1] confusion):
    """Add one image to `confusion` (rows true, columns predicted) from two class maps, uint8 (H, W).

    Ids of C and above, in either map, are not counted. Raises ValueError if the shapes do not fit.
    """
    cdef Py_ssize_t classes = confusion.shape[0], y, x
    if labels.shape[0] != predicted.shape[0] or labels.shape[1] != predicted.shape[1]:
        raise ValueError("labels and prediction differ in size")
    if confusion.shape[1] != classes:
        raise ValueError("confusion must be (C, C)")
    with nogil:
        for y in range(labels.shape[0]):
            for x in range(labels.shape[1]):
                if labels[y, x] < classes and predicted[y, x] < classes:
                    confusion[labels[y, x], predicted[y, x]] += 1
