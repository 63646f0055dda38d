// Which instruction sets the fast paths may use, decided at run time.
//
// A kernel is written once as a plain loop (HISTOSEG_INLINE) and compiled again under each target below, or
// written by hand with intrinsics where the compiler does not find the shuffle. Every level gives the same bytes:
// floating-point contraction is off, so no level fuses a multiply and an add that another keeps apart.
#pragma once

#include <string>

#include "host_device.h"

// macOS builds may hold two architectures in one file and run on machines without AVX-512: they keep the baseline.
#if defined(__GNUC__) && defined(__x86_64__) && !defined(__APPLE__)
#define HISTOSEG_MULTIVERSION 1
#define HISTOSEG_AVX2 __attribute__((target("avx2")))
#define HISTOSEG_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))
#else
#define HISTOSEG_MULTIVERSION 0
#endif

namespace histoseg {

enum class SimdLevel { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level that this machine and this build have. AVX-512 means all five sets above (Ice Lake, Zen 4 and later).
SimdLevel best_simd_level();

// The level in use: the best one, until a test asks for another.
SimdLevel simd_level();
void set_simd_level(SimdLevel level);

// "baseline", "avx2" or "avx512", and back; `parse_simd_level` returns false for any other text.
const char* simd_level_name(SimdLevel level);
bool parse_simd_level(const std::string& name, SimdLevel& level);

}  // namespace histoseg
