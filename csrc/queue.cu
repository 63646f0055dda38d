#include "queue.h"

#include "cuda_error.h"

namespace histoseg {

const char* queue_copy(void* to, const void* from, std::int64_t bytes, void* stream) {
    const auto size = static_cast<std::size_t>(bytes);
    return error_text(cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

const char* queue_record(void* event, void* stream) {
    return error_text(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
}

const char* queue_wait(void* stream, void* event) {
    return error_text(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
}

}  // namespace histoseg
