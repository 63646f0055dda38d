// IEEE halves, on the host and on the device alike.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace histoseg {

// Bits only.
struct Half {
    std::uint16_t bits;
};

HISTOSEG_INLINE float to_float(float x) { return x; }

HISTOSEG_INLINE float to_float(Half x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
    if (rest < 0x0400u) return bits_float(sign | float_bits(static_cast<float>(rest) * 0x1p-24f));
    return bits_float(sign | ((rest << 13) + (rest < 0x7C00u ? 0x38000000u : 0x70000000u)));
#endif
}

// The nearest half, of two the even one; any NaN becomes the one without a sign.
HISTOSEG_INLINE Half to_half(float x) {
#if defined(__CUDA_ARCH__)
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const std::uint32_t sign = float_bits(x) >> 16 & 0x8000u, size = float_bits(x) & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return {0x7FFF};
    std::uint32_t bits = 0x7C00u;
    if (size < 0x38800000u) {
        bits = float_bits(bits_float(size) + 0.5f) - 0x3F000000u;  // subnormal: the sum rounds to steps of 2^-24
    } else if (size < 0x477FF000u) {
        bits = (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13;
    }
    return {static_cast<std::uint16_t>(sign | bits)};
#endif
}

}  // namespace histoseg
