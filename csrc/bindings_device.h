// What the bindings of CUDA kernels share: memory is handed over by its address, so that only numbers can be checked.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace histoseg {

constexpr const char* kNotBuilt =
    "this build of histoseg-fast has no CUDA kernels; install the CUDA toolkit and build again with HISTOSEG_CUDA=1";

using Address = std::uintptr_t;

inline void check_launch(const char* name, const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string(name) + ": " + error);
}

inline std::int64_t checked_number(std::int64_t value, const char* name, std::int64_t least, std::int64_t most) {
    if (value < least || value > most) {
        fail(name, "expected " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                       std::to_string(value));
    }
    return value;
}

// `address` as a pointer; 0 only where nothing `needed` lies there.
template <typename T>
T* checked_address(Address address, const char* name, bool needed) {
    if (address == 0 && needed) fail(name, "is 0, which is no address");
    if (address % alignof(T) != 0) fail(name, "is not aligned to " + std::to_string(alignof(T)) + " bytes");
    return reinterpret_cast<T*>(address);
}

}  // namespace histoseg
