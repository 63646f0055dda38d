#include "crf.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "exp.h"
#include "lattice.h"
#include "threads.h"

namespace histoseg {

namespace {

// A pixel costs here what some 64 cost in a decoder, for which threads are chosen.
constexpr std::int64_t kDecodesPerPixel = 64;
// Pixels a step of the softmax: their classes stay in the L1 cache.
constexpr int kStep = 64;
// Less than this is no probability but slow arithmetic: products with it leave the range of normal floats.
constexpr float kLeastProbability = 1e-20f;

bool all_finite(const LogitsView& logits) {
    bool finite = true;
    for (std::int64_t c = 0; c < logits.classes; ++c) {
        for (std::int64_t y = 0; y < logits.height; ++y) {
            const char* plane = reinterpret_cast<const char*>(logits.data) + c * logits.stride_class;
            const float* row = reinterpret_cast<const float*>(plane + y * logits.stride_y);
            // Infinities less themselves are NaN too.
            for (std::int64_t x = 0; x < logits.width; ++x) finite &= row[x] - row[x] == 0.0f;
        }
    }
    return finite;
}

class MeanField {
public:
    MeanField(const LogitsView& logits, int threads)
        : logits_(logits),
          pixels_(logits.height * logits.width),
          threads_(choose_threads(threads, logits.height, pixels_ * kDecodesPerPixel)),
          beliefs_(static_cast<std::size_t>((logits.classes + kLanes - 1) / kLanes * kLanes * pixels_)) {}

    void add_smoothness(float weight, float sigma) {
        smooth_.emplace(pixels_);
        std::vector<float> features(static_cast<std::size_t>(logits_.width * 2));
        for (std::int64_t y = 0; y < logits_.height; ++y) {
            for (std::int64_t x = 0; x < logits_.width; ++x) place(y, x, sigma, features.data() + x * 2);
            smooth_->add(features.data(), logits_.width);
        }
        finish(*smooth_, weight);
    }

    void add_appearance(const RgbView& rgb, float weight, float sigma_xy, float sigma_rgb) {
        appearance_.emplace(pixels_);
        std::vector<float> features(static_cast<std::size_t>(rgb.width * 5));
        for (std::int64_t y = 0; y < rgb.height; ++y) {
            for (std::int64_t x = 0; x < rgb.width; ++x) {
                float* feature = features.data() + x * 5;
                place(y, x, sigma_xy, feature);
                const std::uint8_t* pixel = rgb.data + y * rgb.stride_y + x * rgb.stride_x;
                for (int c = 0; c < 3; ++c) feature[2 + c] = static_cast<float>(pixel[c * rgb.stride_c]) / sigma_rgb;
            }
            appearance_->add(features.data(), rgb.width);
        }
        finish(*appearance_, weight);
    }

    void run(int iterations) {
        update();
        for (int i = 0; i < iterations && (smooth_ || appearance_); ++i) {
            for (std::int64_t c = 0; c < logits_.classes; c += kLanes) exchange(lane(c));
            update();
        }
    }

    void write(float* probabilities) const {
        for (std::int64_t c = 0; c < logits_.classes; ++c) {
            const float* from = lane(c);
            for (std::int64_t i = 0; i < pixels_; ++i) *probabilities++ = from[i * kLanes];
        }
    }

private:
    static void place(std::int64_t y, std::int64_t x, float sigma, float* feature) {
        feature[0] = static_cast<float>(x) / sigma;
        feature[1] = static_cast<float>(y) / sigma;
    }

    const float* lane(std::int64_t c) const { return beliefs_.data() + (c / kLanes) * pixels_ * kLanes + c % kLanes; }
    float* lane(std::int64_t c) { return const_cast<float*>(std::as_const(*this).lane(c)); }

    // Turns the bare filter K into weight * D^-1/2 K D^-1/2, by factors on the way in and out.
    template <int D>
    void finish(Lattice<D>& lattice, float weight) {
        lattice.connect();
        std::fill(beliefs_.begin(), beliefs_.begin() + pixels_ * kLanes, 1.0f);
        lattice.splat(beliefs_.data());
        lattice.blur(threads_);
        std::fill(beliefs_.begin(), beliefs_.end(), 0.0f);
        lattice.slice(0, pixels_, beliefs_.data());
        for (std::int64_t i = 0; i < pixels_; ++i) lattice.scale(i, std::sqrt(weight / beliefs_[i * kLanes]));
        std::fill(beliefs_.begin(), beliefs_.end(), 0.0f);
    }

    // Puts the messages that its pixels get in place of the beliefs of a group of classes.
    void exchange(float* group) {
        if (smooth_) smooth_->splat(group);
        if (appearance_) appearance_->splat(group);
        if (smooth_) smooth_->blur(threads_);
        if (appearance_) appearance_->blur(threads_);
        for_row_chunks(pixels_, threads_, [&](int, std::int64_t first, std::int64_t last) {
            std::fill(group + first * kLanes, group + last * kLanes, 0.0f);
            if (smooth_) smooth_->slice(first, last, group);
            if (appearance_) appearance_->slice(first, last, group);
        });
    }

    // Puts softmax(logits + messages) in place of the messages: with Potts compatibility what a class loses to the
    // others' beliefs is, up to a constant of the pixel, what it gains from its own.
    void update() {
        for_row_chunks(logits_.height, threads_, [this](int, std::int64_t first, std::int64_t last) {
            for (std::int64_t y = first; y < last; ++y) {
                for (std::int64_t x = 0; x < logits_.width; x += kStep) {
                    update_step(y, x, static_cast<int>(std::min<std::int64_t>(kStep, logits_.width - x)));
                }
            }
        });
    }

    void update_step(std::int64_t y, std::int64_t x, int count) {
        float scores[kMaxClasses][kStep], top[kStep], sum[kStep];
        const std::int64_t at = (y * logits_.width + x) * kLanes;
        for (std::int64_t c = 0; c < logits_.classes; ++c) {
            const char* plane = reinterpret_cast<const char*>(logits_.data) + c * logits_.stride_class;
            const float* row = reinterpret_cast<const float*>(plane + y * logits_.stride_y) + x;
            const float* messages = lane(c) + at;
            for (int i = 0; i < count; ++i) {
                scores[c][i] = row[i] + messages[i * kLanes];
                top[i] = c == 0 || scores[c][i] > top[i] ? scores[c][i] : top[i];
            }
        }
        std::fill(sum, sum + kStep, 0.0f);
        for (std::int64_t c = 0; c < logits_.classes; ++c) {
            for (int i = 0; i < count; ++i) sum[i] += scores[c][i] = exp_not_positive(scores[c][i] - top[i]);
        }
        for (std::int64_t c = 0; c < logits_.classes; ++c) {
            float* beliefs = lane(c) + at;
            for (int i = 0; i < count; ++i) {
                const float p = scores[c][i] / sum[i];
                beliefs[i * kLanes] = p > kLeastProbability ? p : 0.0f;
            }
        }
    }

    LogitsView logits_;
    std::int64_t pixels_;
    int threads_;
    std::vector<float> beliefs_;  // by group of kLanes classes, pixel and lane; between updates the messages
    std::optional<Lattice<2>> smooth_;
    std::optional<Lattice<5>> appearance_;
};

}  // namespace

bool dense_crf(const RgbView& rgb, const LogitsView& logits, const CrfOptions& options, int threads,
               float* probabilities) {
    if (!all_finite(logits)) return false;
    if (logits.height == 0 || logits.width == 0) return true;
    MeanField field(logits, threads);
    if (options.smooth_weight > 0 && options.iterations > 0) {
        field.add_smoothness(options.smooth_weight, options.smooth_sigma);
    }
    if (options.appearance_weight > 0 && options.iterations > 0) {
        field.add_appearance(rgb, options.appearance_weight, options.appearance_sigma_xy, options.appearance_sigma_rgb);
    }
    field.run(options.iterations);
    field.write(probabilities);
    return true;
}

}  // namespace histoseg
