// Work for a CUDA stream that takes microseconds to queue: called with the interpreter's lock held, since to get it back
// takes longer where many threads want it.
#pragma once

#include <cstdint>

namespace histoseg {

// `stream` is a cudaStream_t, `event` a cudaEvent_t; host memory is page-locked. Each returns null, or CUDA's own words
// for what failed.
const char* queue_copy(void* to, const void* from, std::int64_t bytes, void* stream);
const char* queue_record(void* event, void* stream);
const char* queue_wait(void* stream, void* event);

}  // namespace histoseg
