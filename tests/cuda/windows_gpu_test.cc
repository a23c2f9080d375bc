// Windows of ranks on GPUs: what one rank writes, every rank reads, in each way of sharing; how they grow; who may die.
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>
#include <vector>

#include "tests/cuda/gpu_world.h"
#include "tests/cuda/touch.h"

namespace anyep::cuda {
namespace {

using test::GpuRank;
using test::Setting;
using namespace std::chrono_literals;

constexpr std::uint64_t kSlice = 256 << 10;  ///< words that each rank writes into each window

std::uint32_t seed_of(int writer, int window) {
  return static_cast<std::uint32_t>(1000003 * (writer + 1) + 17 * window);
}

std::uint32_t* slice(const Windows& windows, std::uint64_t begin, int window, int writer) {
  return reinterpret_cast<std::uint32_t*>(windows.base(window) + begin) + kSlice * static_cast<std::uint64_t>(writer);
}

void write_all(GpuRank& self, const Windows& windows, std::uint64_t begin, int window) {
  test::fill(slice(windows, begin, window, self.rank), kSlice, seed_of(self.rank, window), self.stream);
}

void expect_all(GpuRank& self, const Windows& windows, std::uint64_t begin, int window) {
  for (int writer = 0; writer < windows.num_ranks(); ++writer) {
    self.words()[0] = 0;
    test::count_different(slice(windows, begin, window, writer), kSlice, seed_of(writer, window), self.words(),
                          self.stream);
    self.sync();
    EXPECT_EQ(self.words()[0], 0u) << "rank " << self.rank << " reads what rank " << writer << " wrote at " << window;
  }
}

class CudaWindows : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    if (test::num_gpus() < GetParam().num_gpus) GTEST_SKIP() << "needs " << GetParam().num_gpus << " GPUs";
  }
};

INSTANTIATE_TEST_SUITE_P(
    Ways, CudaWindows,
    ::testing::Values(Setting{"ProcessesOnTwoGpus", "auto", "1", false, 2, 2, Sharing::kDescriptors},
                      Setting{"ThreadsOnTwoGpus", "auto", "1", true, 2, 2, Sharing::kDescriptors},
                      Setting{"FourProcessesOnTwoGpus", "vmm", "1", false, 4, 2, Sharing::kDescriptors},
                      Setting{"EightThreadsOnOneGpu", "auto", "1", true, 8, 1, Sharing::kDescriptors},
                      Setting{"OneRank", "auto", "1", false, 1, 1, Sharing::kDescriptors},
                      Setting{"ProcessesByIpc", "ipc", "1", false, 2, 2, Sharing::kIpc},
                      Setting{"ThreadsByIpc", "ipc", "1", true, 2, 2, Sharing::kIpc},
                      Setting{"ProcessesByHostMemory", "auto", "0", false, 2, 2, Sharing::kHostMemory},
                      Setting{"ThreadsByHostMemory", "auto", "0", true, 3, 2, Sharing::kHostMemory}),
    [](const auto& one) { return std::string(one.param.name); });

TEST_P(CudaWindows, EveryRankReadsWhatEveryRankWrote) {
  test::run_ranks(GetParam(), [&](GpuRank& self) {
    const auto windows = self.share();
    EXPECT_EQ(windows->sharing(), GetParam().expected);
    EXPECT_GE(windows->bytes(), self.layout.bytes);
    std::vector<std::byte> head(self.layout.heap);
    for (int window = 0; window < windows->num_ranks(); ++window) {  // all but heaps is zero at every rank by now
      check(cudaMemcpy(head.data(), windows->base(window), head.size(), cudaMemcpyDefault), "cudaMemcpy");
      EXPECT_EQ(std::count(head.begin(), head.end(), std::byte{0}), static_cast<std::ptrdiff_t>(head.size()));
    }
    self.meet();
    for (int window = 0; window < windows->num_ranks(); ++window) {
      write_all(self, *windows, self.layout.heap, window);
    }
    self.sync();
    self.meet();
    for (int window = 0; window < windows->num_ranks(); ++window) {
      expect_all(self, *windows, self.layout.heap, window);
    }
    self.meet();
  });
}

TEST_P(CudaWindows, GrowWhileEveryRankIsInAKernel) {
  if (GetParam().expected == Sharing::kIpc) GTEST_SKIP() << "memory by cudaIpc does not grow";
  test::run_ranks(GetParam(), [&](GpuRank& self) {
    const auto windows = self.share();
    const std::uint64_t where = windows->bytes();  // of the piece to come
    std::uint32_t* const go = self.words() + 64;
    std::uint32_t* const started = self.words() + 128;
    // Launched before the memory is there, as a sender that waits for its grant is.
    test::fill_when_told(slice(*windows, where, 0, self.rank), kSlice, seed_of(self.rank, 0), go, started,
                         10'000'000'000, self.stream);
    while (*static_cast<volatile std::uint32_t*>(started) == 0) std::this_thread::yield();
    self.meet();
    if (self.rank == 0) {
      const auto begin = test::Clock::now();
      const Piece piece = windows->grow(80 << 20, test::in(10s), [](int) { return false; });
      EXPECT_EQ(piece.offset, where);
      EXPECT_GE(piece.bytes, 80u << 20);
      EXPECT_LT(test::since(begin), 2s);
      std::printf("%s: grown by %llu MiB in %.2f ms\n", GetParam().name,
                  static_cast<unsigned long long>(piece.bytes >> 20),
                  std::chrono::duration<double, std::milli>(test::Clock::now() - begin).count());
    }
    self.meet();
    *static_cast<volatile std::uint32_t*>(go) = 1;
    self.sync();
    EXPECT_EQ(started[1], 0u) << "the kernel waited to its limit";
    self.meet();
    expect_all(self, *windows, where, 0);
    self.meet();
  });
}

class CudaDeath : public CudaWindows {};

INSTANTIATE_TEST_SUITE_P(Ways, CudaDeath,
                         ::testing::Values(Setting{"VmmTwoGpus", "vmm", "1", false, 2, 2, Sharing::kDescriptors},
                                           Setting{"VmmOneGpu", "vmm", "1", false, 2, 1, Sharing::kDescriptors},
                                           Setting{"IpcTwoGpus", "ipc", "1", false, 2, 2, Sharing::kIpc},
                                           Setting{"HostMemory", "auto", "0", false, 2, 2, Sharing::kHostMemory}),
                         [](const auto& one) { return std::string(one.param.name); });

TEST_P(CudaDeath, OfTheOwnerHurtsNoKernelOfTheSurvivor) {
  test::run_ranks(GetParam(),
                  [&](GpuRank& self) {
                    const auto windows = self.share();
                    for (int window = 0; window < 2; ++window) write_all(self, *windows, self.layout.heap, window);
                    self.sync();
                    self.meet();
                    const int peer = 1 - self.rank;
                    // Each in the other's window, in own slices.
                    test::keep_touching(slice(*windows, self.layout.heap, peer, self.rank), kSlice,
                                        seed_of(self.rank, peer), self.words() + 64, 700'000'000, self.stream);
                    self.meet();
                    if (self.rank == 0) {
                      std::this_thread::sleep_for(100ms);
                      ::kill(::getpid(), SIGKILL);
                    }
                    self.sync();
                    EXPECT_EQ(self.words()[64], 0u);
                    for (int window = 0; window < 2; ++window) expect_all(self, *windows, self.layout.heap, window);
                    write_all(self, *windows, self.layout.heap, 0);
                    self.sync();
                  },
                  {0});
}

TEST(CudaWindowsEnd, NothingStaysBehind) {
  if (test::num_gpus() < 1) GTEST_SKIP() << "needs a GPU";
  const Setting setting{"", "auto", "1", false, 2, std::min(test::num_gpus(), 2), Sharing::kDescriptors};
  test::run_ranks(setting, [&](GpuRank& self) {
    const auto round = [&] {
      const auto windows = self.share();
      windows->grow(1, test::in(10s), [](int) { return false; });
      self.meet();
    };
    for (int warm_up = 0; warm_up < 3; ++warm_up) round();
    self.meet();
    std::size_t free_before = 0, free_after = 0, total = 0;
    check(cudaMemGetInfo(&free_before, &total), "cudaMemGetInfo");
    const test::Holdings before;
    self.meet();
    for (int one = 0; one < 30; ++one) round();
    self.meet();
    const test::Holdings after;
    check(cudaMemGetInfo(&free_after, &total), "cudaMemGetInfo");
    self.meet();
    EXPECT_EQ(after, before);
    EXPECT_EQ(free_after, free_before);
  });
}

TEST(CudaWindowsCreate, WithoutMemoryFailsOnEveryRankAndSaysHowMuch) {
  if (test::num_gpus() < 1) GTEST_SKIP() << "needs a GPU";
  const Setting setting{"", "auto", "1", false, 2, 1, Sharing::kDescriptors};
  test::run_ranks(setting, [&](GpuRank& self) {
    Budget budget;
    budget.rows_bytes = (std::int64_t{self.rank} << 42) + (1 << 20);  // one rank asks for 4 TiB
    const WindowLayout layout = WindowLayout::make(budget, 2);
    try {
      Windows::share(layout, self.device, self.rank, self.control, test::in(20s));
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kResource) << error.what();
      EXPECT_NE(std::string(error.what()).find("cuMemCreate"), std::string::npos) << error.what();
    }
  });
}

}  // namespace
}  // namespace anyep::cuda
