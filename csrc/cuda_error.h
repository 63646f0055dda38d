// CUDA's status as this project passes it on. For .cu files only.
#pragma once

#include <cuda_runtime.h>

namespace histoseg {

// Null, or CUDA's own words for what failed. It is told once: the next launch must not find it as the "last error".
inline const char* error_text(cudaError_t status) {
    if (status == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(status);
}

}  // namespace histoseg
