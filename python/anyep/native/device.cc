// GPUs: an engine's window's heap as memory of torch's own allocator. torch calls the two functions below for a
// torch.cuda.MemPool; what it keeps and hands out again is its own business.
#include <anyep/engine.h>
#include <anyep/error.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "native.h"

namespace anyep::python {
namespace {

// ---- the heap as an allocator ----

struct Blocks {
  std::mutex mutex;
  std::unordered_map<void*, OwnedRows> held;
  std::atomic<std::uint64_t> num_freed = 0;
};

/// Never destroyed: torch may free when the process ends.
Blocks& blocks() {
  static Blocks* const instance = new Blocks;
  return *instance;
}

// torch hands over a device and no more; a process may have several engines on one. So the thread says whose heap it means,
// around every allocation.
thread_local Engine* allocating_engine = nullptr;
thread_local bool allocating_ahead = false;  // a guess of what is needed: from what is free, and without growth
thread_local std::string refusal;

void* allocate(std::int64_t bytes, void* stream) noexcept {
  try {
    refusal.clear();
    if (allocating_engine == nullptr || bytes <= 0) {
      refusal = "no engine allocates on this thread";
      return nullptr;
    }
    Shape shape;
    shape.hidden = bytes;
    shape.dtype = DType::kU8;
    const StreamRef on = stream_ref(reinterpret_cast<std::uintptr_t>(stream));
    OwnedRows rows = allocating_ahead ? allocating_engine->make_rows_ahead(1, shape, on)
                                      : allocating_engine->make_rows(1, shape, on);
    if (rows.num_rows() == 0) {
      refusal = "no free room for rows made ahead";
      return nullptr;
    }
    void* const data = rows.view().x.data;
    const std::lock_guard lock(blocks().mutex);
    blocks().held.emplace(data, std::move(rows));
    return data;
  } catch (const std::exception& error) {
    try {
      refusal = error.what();
    } catch (...) {  // no memory for the text
    }
    return nullptr;
  }
}

void release(void* data) noexcept {
  OwnedRows rows;  // goes back outside the lock
  {
    const std::lock_guard lock(blocks().mutex);
    const auto found = blocks().held.find(data);
    if (found == blocks().held.end()) return;
    rows = std::move(found->second);
    blocks().held.erase(found);
  }
  ++blocks().num_freed;
}

}  // namespace

void bind_device(nb::module_& module) {
  module.def(
      "allocate_from",
      [](Engine* engine, bool ahead) {
        allocating_engine = engine;
        allocating_ahead = ahead;
      },
      nb::arg("engine").none(), nb::arg("ahead") = false,
      "Whose window this thread's allocations come from (ahead: only from what is free); None afterwards.");
  module.def(
      "refusal", [] { return refusal; }, "Why this thread's last allocation failed; empty: it did not.");
  module.def(
      "num_freed", [] { return blocks().num_freed.load(); }, "Allocations given back so far.");
  module.attr("ALLOCATE") = "anyep_window_allocate";
  module.attr("FREE") = "anyep_window_free";
}

}  // namespace anyep::python

extern "C" {

/// What torch.cuda.memory.CUDAPluggableAllocator calls.
__attribute__((visibility("default"))) void* anyep_window_allocate(std::int64_t bytes, int, void* stream) {
  return anyep::python::allocate(bytes, stream);
}

__attribute__((visibility("default"))) void anyep_window_free(void* data, std::int64_t, int, void*) {
  anyep::python::release(data);
}
}
