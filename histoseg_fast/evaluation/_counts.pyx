# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Counting loops of the scores: one pass over labels and logits, without the GIL."""

from libc.math cimport exp, fabs, log
from libc.stdint cimport int64_t, uint8_t


def score_logits(
    const float[:, :, :] logits,
    const uint8_t[:, :] labels,
    const double[:, ::1] colours,
    int64_t[:, ::1] confusion,
    double[:, ::1] reliability,
):
    """Add one image to `confusion` (rows true, columns predicted); its summed cross entropy, L1 and L2.

    logits : float32 (C, H, W); labels : uint8 (H, W), where ids of C and above (255: ignore) are not counted;
    colours : float64 (C, 3), the palette in 0..1; confusion : int64 (C, C), added to. Ties of the argmax go to
    the lower class. With p = softmax(logits), summed over counted pixels in double precision (paper, section
    4.3): the cross entropy -log p[label]; |d| and d^2, summed over RGB, of the difference d between predicted
    image (sum over c of p[c] colours[c]) and label image. reliability : float64 (B, 3), added to: row b holds, of
    the pixels whose highest p lies from b / B to (b + 1) / B, how many there are, their summed highest p, and how
    many are right. Raises ValueError if the shapes do not fit.
    """
    cdef Py_ssize_t classes = logits.shape[0], height = logits.shape[1], width = logits.shape[2]
    cdef Py_ssize_t bins = reliability.shape[0], y, x, c, k, best, row
    cdef uint8_t label
    cdef double entropy = 0.0, absolute = 0.0, square = 0.0, row_entropy, row_absolute, row_square
    cdef double exponents, peak, weight, difference
    cdef double predicted[3]
    if labels.shape[0] != height or labels.shape[1] != width:
        raise ValueError(f"labels are {labels.shape[0]}x{labels.shape[1]}, logits {height}x{width}")
    if confusion.shape[0] != classes or confusion.shape[1] != classes:
        raise ValueError("confusion must be (C, C)")
    if colours.shape[0] != classes or colours.shape[1] != 3:
        raise ValueError("colours must be (C, 3)")
    if bins < 1 or reliability.shape[1] != 3:
        raise ValueError("reliability must be (B, 3)")
    with nogil:
        for y in range(height):
            row_entropy = row_absolute = row_square = 0.0
            for x in range(width):
                label = labels[y, x]
                if label >= classes:
                    continue
                best = 0
                for c in range(1, classes):
                    if logits[c, y, x] > logits[best, y, x]:
                        best = c
                peak = logits[best, y, x]
                exponents = predicted[0] = predicted[1] = predicted[2] = 0.0
                for c in range(classes):
                    weight = exp(logits[c, y, x] - peak)
                    exponents = exponents + weight
                    for k in range(3):
                        predicted[k] = predicted[k] + weight * colours[c, k]
                for k in range(3):
                    difference = predicted[k] / exponents - colours[label, k]
                    row_absolute += fabs(difference)
                    row_square += difference * difference
                row_entropy += log(exponents) + peak - logits[label, y, x]
                confusion[label, best] += 1
                # Logits that are not finite make exponents NaN, which has no row of its own.
                row = min(<Py_ssize_t> (bins / exponents), bins - 1) if exponents >= 1 else 0
                reliability[row, 0] += 1
                reliability[row, 1] += 1 / exponents
                reliability[row, 2] += label == best
            entropy += row_entropy
            absolute += row_absolute
            square += row_square
    return entropy, absolute, square
