// An exp() of plain float operations: vectorisable, and the same bits at every SIMD level, in every compiler and on
// GPUs. That holds while no compiler fuses a multiply and an add: -ffp-contract=off, and -fmad=false for nvcc.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace histoseg {

// exp(x) for x <= 0 with a relative error below 1e-6; exp(0) is exactly 1. Below -87, and for NaN, it is exp(-87).
HISTOSEG_INLINE float exp_not_positive(float x) {
    constexpr float kLog2E = 1.44269504f;
    // ln 2 in two parts, the first short enough that n * kLn2High is exact.
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    // Adding 1.5 * 2^23 rounds to an integer, which then is the low bits: no conversion that NaN could make undefined.
    constexpr float kRound = 12582912.0f;
    constexpr std::uint32_t kRoundBits = 0x4B400000u;
    x = x > -87.0f ? x : -87.0f;
    const float shifted = x * kLog2E + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    // 1 + r + r^2 * (cubic): the least worst relative error on |r| <= ln(2) / 2, which is 1.1e-7.
    float p = 8.312379010e-3f;
    p = p * r + 4.189126194e-2f;
    p = p * r + 1.666712016e-1f;
    p = p * r + 4.999922514e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n by its exponent bits; n is -126 or more.
    return p * bits_float((float_bits(shifted) - kRoundBits + 127u) << 23);
}

}  // namespace histoseg
