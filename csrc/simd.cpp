#include "simd.h"

#include <atomic>

namespace histoseg {

namespace {

SimdLevel detect() {
#if HISTOSEG_MULTIVERSION
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi")) {
        return SimdLevel::avx512;
    }
    if (__builtin_cpu_supports("avx2")) return SimdLevel::avx2;
#endif
    return SimdLevel::baseline;
}

std::atomic<SimdLevel>& current() {
    static std::atomic<SimdLevel> level{best_simd_level()};
    return level;
}

}  // namespace

SimdLevel best_simd_level() {
    static const SimdLevel level = detect();
    return level;
}

SimdLevel simd_level() { return current().load(std::memory_order_relaxed); }

void set_simd_level(SimdLevel level) { current().store(level, std::memory_order_relaxed); }

const char* simd_level_name(SimdLevel level) {
    switch (level) {
        case SimdLevel::avx512: return "avx512";
        case SimdLevel::avx2: return "avx2";
        default: return "baseline";
    }
}

bool parse_simd_level(const std::string& name, SimdLevel& level) {
    for (SimdLevel known : {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
        if (name == simd_level_name(known)) {
            level = known;
            return true;
        }
    }
    return false;
}

}  // namespace histoseg
