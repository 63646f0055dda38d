// What one core can multiply and add at most: independent products in registers, nothing loaded, nothing stored.
// Built and called by profile_engine.py. Each function does `rounds` x 12 instructions and returns the operations
// (two a multiply-add) of one instruction, or 0 where this CPU lacks it.
#include <cstdint>

#define TWELVE(instruction)                                                                                       \
    instruction " %%zmm12, %%zmm13, %%zmm0\n\t" instruction " %%zmm12, %%zmm13, %%zmm1\n\t"                       \
    instruction " %%zmm12, %%zmm13, %%zmm2\n\t" instruction " %%zmm12, %%zmm13, %%zmm3\n\t"                       \
    instruction " %%zmm12, %%zmm13, %%zmm4\n\t" instruction " %%zmm12, %%zmm13, %%zmm5\n\t"                       \
    instruction " %%zmm12, %%zmm13, %%zmm6\n\t" instruction " %%zmm12, %%zmm13, %%zmm7\n\t"                       \
    instruction " %%zmm12, %%zmm13, %%zmm8\n\t" instruction " %%zmm12, %%zmm13, %%zmm9\n\t"                       \
    instruction " %%zmm12, %%zmm13, %%zmm10\n\t" instruction " %%zmm12, %%zmm13, %%zmm11\n\t"

// Zeros in every register: no denormal, no overflow, and a multiplier takes as long for them.
#define REGISTERS                                                                                                 \
    "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13"
#define PEAK(name, ability, operations, instruction)                                                              \
    extern "C" __attribute__((target("avx512f"))) int peak_##name(std::int64_t rounds) {                          \
        if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports(ability)) return 0;                     \
        asm volatile("vpxorq %%zmm12, %%zmm12, %%zmm12\n\tvpxorq %%zmm13, %%zmm13, %%zmm13\n\t"                   \
                     "vpxorq %%zmm0, %%zmm0, %%zmm0\n\tvpxorq %%zmm1, %%zmm1, %%zmm1\n\t"                         \
                     "vpxorq %%zmm2, %%zmm2, %%zmm2\n\tvpxorq %%zmm3, %%zmm3, %%zmm3\n\t"                         \
                     "vpxorq %%zmm4, %%zmm4, %%zmm4\n\tvpxorq %%zmm5, %%zmm5, %%zmm5\n\t"                         \
                     "vpxorq %%zmm6, %%zmm6, %%zmm6\n\tvpxorq %%zmm7, %%zmm7, %%zmm7\n\t"                         \
                     "vpxorq %%zmm8, %%zmm8, %%zmm8\n\tvpxorq %%zmm9, %%zmm9, %%zmm9\n\t"                         \
                     "vpxorq %%zmm10, %%zmm10, %%zmm10\n\tvpxorq %%zmm11, %%zmm11, %%zmm11\n\t" ::                \
                         : REGISTERS);                                                                            \
        for (std::int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE(instruction)::: REGISTERS);                 \
        return operations;                                                                                        \
    }

PEAK(int8, "avx512vnni", 128, "vpdpbusd")
PEAK(bf16, "avx512bf16", 64, "vdpbf16ps")
PEAK(fp32, "avx512f", 32, "vfmadd231ps")
