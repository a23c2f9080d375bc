#include "bench/support/parallel.h"

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

namespace anyep::bench {

std::int64_t parallel_sum(std::int64_t count, int num_ranks,
                          const std::function<std::int64_t(std::int64_t, std::int64_t)>& part) {
  constexpr std::int64_t kMostThreads = 8, kFewestRows = 64;
  const std::int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::int64_t parts =
      std::clamp<std::int64_t>(std::min(cores / num_ranks, count / kFewestRows), 1, kMostThreads);
  if (parts == 1) return part(0, count);
  std::vector<std::int64_t> sums(static_cast<std::size_t>(parts), 0);
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < parts; ++i) {
    threads.emplace_back(
        [&, i] { sums[static_cast<std::size_t>(i)] = part(count * i / parts, count * (i + 1) / parts); });
  }
  for (std::thread& thread : threads) thread.join();
  std::int64_t sum = 0;
  for (const std::int64_t of_part : sums) sum += of_part;
  return sum;
}

}  // namespace anyep::bench
