// What lets a function be compiled for the CPU and for the GPU from one header.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HISTOSEG_HD __host__ __device__
#define HISTOSEG_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define HISTOSEG_HD
#define HISTOSEG_INLINE __forceinline
#else
#define HISTOSEG_HD
#define HISTOSEG_INLINE inline __attribute__((always_inline))
#endif

#if defined(_MSC_VER)
#define HISTOSEG_RESTRICT __restrict
#else
#define HISTOSEG_RESTRICT __restrict__
#endif

// Arrays that live in a GPU's registers are indexed by unrolled loops only.
#if defined(__CUDA_ARCH__)
#define HISTOSEG_UNROLL _Pragma("unroll")
#else
#define HISTOSEG_UNROLL
#endif

namespace histoseg {

HISTOSEG_INLINE std::uint32_t float_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

HISTOSEG_INLINE float bits_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace histoseg
