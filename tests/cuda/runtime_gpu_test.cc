// The runtime layer on a GPU: guards, events, pinned pages, what a capture forbids, what doctor finds.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <thread>

#include "cuda/memory/heap.h"
#include "cuda/runtime/driver.h"
#include "cuda/runtime/event.h"
#include "tests/cuda/gpu_world.h"
#include "tests/cuda/touch.h"
#include "tests/unit/thrown.h"

namespace anyep::cuda {
namespace {

class CudaRuntime : public ::testing::Test {
 protected:
  void SetUp() override {
    if (test::num_gpus() < 1) GTEST_SKIP() << "needs a GPU";
  }
};

TEST_F(CudaRuntime, AGuardLeavesAThreadAsItWas) {
  test::in_a_child([] {
    const int last = test::num_gpus() - 1;
    CUcontext current = nullptr;
    {
      const DeviceGuard guard(last);
      EXPECT_EQ(current_device(), last);
      {
        const DeviceGuard inner(0);
        EXPECT_EQ(current_device(), 0);
      }
      EXPECT_EQ(current_device(), last);
    }
    check(driver().ctx_get_current(&current), "cuCtxGetCurrent");
    EXPECT_EQ(current, nullptr);
    EXPECT_EQ(test::thrown([] { const DeviceGuard guard(-1); }).code, ErrorCode::kArgument);
    EXPECT_EQ(test::thrown([] { const DeviceGuard guard(99); }).code, ErrorCode::kDevice);
  });
}

TEST_F(CudaRuntime, EventsAreDoneWhenTheirWorkIsAndAreUsedAgain) {
  test::in_a_child([] {
    const DeviceGuard guard(0);
    EventPool pool;
    PinnedPages pages(4096);
    auto* const words = reinterpret_cast<std::uint32_t*>(pages.data());
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    test::fill_when_told(words + 512, 4, 5, words, words + 64, 5'000'000'000, stream);
    auto event = pool.record(stream);
    EXPECT_FALSE(event->done());
    Heap heap(0, 4096);
    heap.release(*heap.allocate(4096), event);
    EXPECT_FALSE(heap.allocate(4096));
    *static_cast<volatile std::uint32_t*>(words) = 1;
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    EXPECT_TRUE(event->done());
    EXPECT_TRUE(heap.allocate(4096));
    const cudaEvent_t first = event->get();
    event.reset();
    EXPECT_EQ(pool.record(stream)->get(), first);
  });
}

TEST_F(CudaRuntime, AskingEventsDoesNotSpoilACapture) {
  test::in_a_child([] {
    const DeviceGuard guard(0);
    EventPool pool;
    PinnedPages pages(4096);
    auto* const words = reinterpret_cast<std::uint32_t*>(pages.data());
    cudaStream_t captured = nullptr, other = nullptr;
    check(cudaStreamCreateWithFlags(&captured, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    check(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    const auto event = pool.record(other);
    check(cudaStreamBeginCapture(captured, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    EXPECT_TRUE(is_capturing(captured));
    EXPECT_FALSE(is_capturing(other));
    test::fill(words, 16, 3, captured);
    (void)event->done();
    std::thread([&] {
      const DeviceGuard on_device(0);
      (void)event->done();
      (void)pool.record(other);
      const PinnedPages more(4096);
      PhysicalMemory::create(0, granularity(0));
    }).join();
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(captured, &graph), "cudaStreamEndCapture");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  });
}

TEST_F(CudaRuntime, KernelsSeePagesOfTheHost) {
  test::in_a_child([] {
    const DeviceGuard guard(0);
    void* const pages = ::mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(pages, MAP_FAILED);
    const std::span<std::byte> span(static_cast<std::byte*>(pages), 1 << 20);
    auto* const words = static_cast<std::uint32_t*>(pages);
    {
      const PinnedRange range = PinnedRange::of(span);
      const PinnedRange again = PinnedRange::of(span);  // as another rank of the process does
      EXPECT_EQ(again.pages().data(), span.data());
      test::fill(range.on_device(words + 100), 1000, 7, nullptr);
      check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      EXPECT_EQ(words[100], 7u);
      EXPECT_EQ(words[1099], 1006u);
    }
    const PinnedRange after = PinnedRange::of(span);  // its registration had ended
    EXPECT_EQ(after.on_device(words), words);
  });
}

}  // namespace
}  // namespace anyep::cuda
