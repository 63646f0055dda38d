// Row chunks over a few std::threads. Results are merged in row order, so they do not depend on the thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace histoseg {

constexpr int kMaxThreads = 64;
// A thread costs tens of microseconds to start; this many pixels take about a millisecond to decode.
constexpr std::int64_t kPixelsPerThread = std::int64_t{1} << 22;

// `asked` threads, or (0) one per kPixelsPerThread up to the machine's cores; never more than rows.
inline int choose_threads(int asked, std::int64_t rows, std::int64_t pixels) {
    std::int64_t count = asked;
    if (asked <= 0) {
        const std::int64_t cores = std::max(1u, std::thread::hardware_concurrency());
        count = std::min(cores, pixels / kPixelsPerThread);
    }
    return static_cast<int>(std::clamp<std::int64_t>(std::min<std::int64_t>(count, rows), 1, kMaxThreads));
}

// Calls work(chunk, first_row, last_row) once for each of `threads` chunks. `work` must not throw.
template <typename Work>
void for_row_chunks(std::int64_t rows, int threads, Work work) {
    const auto edge = [&](int chunk) { return rows * chunk / threads; };
    std::vector<std::thread> started;
    started.reserve(static_cast<std::size_t>(threads));
    int next = 1;
    try {
        for (; next < threads; ++next) started.emplace_back(work, next, edge(next), edge(next + 1));
    } catch (const std::system_error&) {
        // The system has no more threads to give: the caller's own does the rest below.
    }
    work(0, edge(0), edge(1));
    for (int chunk = next; chunk < threads; ++chunk) work(chunk, edge(chunk), edge(chunk + 1));
    for (std::thread& thread : started) thread.join();
}

}  // namespace histoseg
