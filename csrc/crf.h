// A dense conditional random field over class scores: P. Kraehenbuehl, V. Koltun, "Efficient Inference in Fully
// Connected CRFs with Gaussian Edge Potentials", NIPS 2011, as used by L.-C. Chen et al., "DeepLab", 2014 to 2017.
#pragma once

#include <cstdint>

#include "labels.h"
#include "stitch.h"

namespace histoseg {

// Larger images are done by tiles. Memory: with 4 classes or fewer 88 bytes a pixel, and while it is built at most some
// 150 a vertex of the appearance kernel's lattice. Measured: 95 to 175 bytes a pixel on stained tissue under the usual
// widths, 700 on noise under the narrowest (6 vertices a pixel). So the limit means 0.7 GB as a rule, 4 GB at worst.
constexpr std::int64_t kMaxCrfPixels = std::int64_t{1} << 22;
constexpr int kMaxCrfIterations = 100;
constexpr float kMaxCrfWeight = 1000.0f;
// Narrower kernels see no neighbour, wider ones the whole image; beyond, float32 has too few digits for the lattice.
constexpr float kMinCrfSigma = 0.5f, kMaxCrfSigma = 10000.0f;

// Weights from 0 (leaves the kernel out) to kMaxCrfWeight, sigmas from kMinCrfSigma to kMaxCrfSigma.
struct CrfOptions {
    int iterations;
    float smooth_weight, smooth_sigma;  // in pixels
    float appearance_weight, appearance_sigma_xy, appearance_sigma_rgb;  // in pixels and in grey levels of 255
};

// The mean field of E(x) = sum_i -log softmax(logits)_i(x_i) + sum_{i<j} [x_i != x_j] k(i, j), where
//   k(i, j) = smooth_weight * K1(i, j) + appearance_weight * K2(i, j),
// K1 a Gaussian of the positions, K2 one of positions and colours, each normalised symmetrically: D^-1/2 K D^-1/2 with
// D the row sums of K. As in the authors' program a pixel also hears itself, and all pixels are updated at once.
// Probabilities below 1e-20 become 0. Gaussians are filtered on the permutohedral lattice (lattice.h), which is
// approximate. The answer does not depend on `threads` (0 chooses).
// `probabilities`: classes x height x width, C-contiguous. rgb has the logits' height and width, at most kMaxCrfPixels
// pixels and kMaxClasses classes. Returns false, with nothing done, if a logit is NaN or infinite.
bool dense_crf(const RgbView& rgb, const LogitsView& logits, const CrfOptions& options, int threads,
               float* probabilities);

}  // namespace histoseg
