// CUDA's status as this project passes it on. For .cu files only.
#pragma once

#include <cuda_runtime.h>

namespace histoseg {

// Null, or CUDA's own words for what failed.
inline const char* error_text(cudaError_t status) {
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace histoseg
