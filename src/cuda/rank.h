// One CUDA rank: its membership in the group, every rank's window, the heap, the counters of its kernels, and the order of
// its ops on the caller's streams.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/config.h>
#include <anyep/topology.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/backend.h"
#include "core/gpu_low_latency.h"
#include "cuda/kernels/low_latency.h"
#include "cuda/kernels/notify.h"
#include "cuda/kernels/team.h"
#include "cuda/memory/heap.h"
#include "cuda/memory/pinned.h"
#include "cuda/memory/windows.h"
#include "cuda/runtime/event.h"
#include "cuda/window.h"
#include "host/group.h"
#include "host/op_run.h"
#include "protocol/fault.h"

namespace anyep::cuda {

class Rank;

/// A range of a rank's heap, given back when this is gone and the op that was last put on a stream by then is done.
class Block {
 public:
  Block() = default;
  Block(std::shared_ptr<Rank> rank, std::uint64_t offset, std::uint64_t bytes)
      : rank_(std::move(rank)), offset_(offset), bytes_(bytes) {}
  Block(Block&& other) noexcept = default;
  Block& operator=(Block&& other) noexcept;
  ~Block();
  explicit operator bool() const { return rank_ != nullptr; }
  std::uint64_t offset() const { return offset_; }
  std::uint64_t bytes() const { return bytes_; }
  std::byte* data() const;
  /// Gives back what lies behind the first `bytes`, which nobody has used, at once.
  void keep_front(std::uint64_t bytes);

 private:
  std::shared_ptr<Rank> rank_;
  std::uint64_t offset_ = 0, bytes_ = 0;
};

/// A page of counts, taken back when nobody holds it.
using PagePointer = std::shared_ptr<CountsPage>;

class Rank : public std::enable_shared_from_this<Rank> {
 public:
  /// Collective, all or none.
  static std::shared_ptr<Rank> create(const Budget&, const Topology&, const Tuning&, Bootstrap&);
  ~Rank();

  host::Group& group() const { return *group_; }
  int device() const { return device_; }
  int num_sms() const { return num_sms_; }
  /// This rank's share of its GPU: ranks on one GPU must all be able to run at a time.
  int sms_of_rank() const { return std::max(1, num_sms_ / ranks_on_gpu_); }
  bool has_gpu_alone() const { return ranks_on_gpu_ == 1; }
  int rank() const { return group_->rank(); }
  int num_ranks() const { return group_->num_ranks(); }
  const WindowLayout& layout() const { return layout_; }
  std::byte* own(std::uint64_t offset) const { return windows_->base(rank()) + offset; }
  std::shared_ptr<const void> memory() const { return windows_; }
  State* state() const { return state_; }
  std::int32_t* partial_counts() const { return partial_; }
  std::byte* combine_buffer(std::uint64_t bytes);
  low_latency::Progress* low_latency_progress() const { return progress_; }
  const low_latency::Layout& low_latency_layout() const { return low_latency_layout_; }
  /// Counts the sends of low latency in the order in which they are put on streams.
  std::uint32_t next_low_latency_send() { return ++low_latency_sends_; }
  int sends_behind(std::uint32_t send) const { return static_cast<int>(low_latency_sends_ - send); }

  // ---- memory ----
  /// Which part of the own window: rows may be shown to the caller (memory()) and cleared by him, handles not.
  enum class Store : std::uint8_t { kRows, kHandles };
  /// @throws Error kCapacity naming `what`, need and have
  Block allocate(std::uint64_t bytes, const char* op, const char* what, Store store = Store::kRows);
  /// What is free now; none: that would take growth or a wait, or a capture is going on.
  Block allocate_free(std::uint64_t bytes);
  /// What is allocated before the next op begins belongs to this stream's work, which may be in a capture.
  void allocate_for(cudaStream_t stream);
  void release(std::uint64_t offset) noexcept;
  void keep_front(std::uint64_t offset, std::uint64_t bytes) noexcept { heap_->keep_front(offset, bytes); }
  /// Offset of [data, data + bytes) in the own window's heap; Grant::kNone = it lies elsewhere.
  std::uint64_t offset_of(const void* data, std::uint64_t bytes) const;
  PagePointer take_page();
  /// A kernel that touched memory of another kind would cost the process its context. @throws Error kArgument
  void must_be_on_device(const char* op, const char* name, const TensorView& view);

  // ---- ops ----
  /// One op is put on its stream: announced to the peers, ordered behind the op before it.
  struct Launch {
    cudaStream_t stream = nullptr;
    bool captured = false;
    Team team;
  };
  /// The second half of a low-latency op with a hook resumes what the first has announced. An op that follows the one just
  /// begun in the same breath has waited for all that it must wait for, and one end() serves both.
  enum class Half { kFirst, kSecond, kRightBehind };
  Launch begin(const backend::Call& call, Half half = Half::kFirst);
  /// What comes next on the call's stream waits, within the call's limit, for an event that a host ends.
  void hold_back(const backend::Call& call, const anyep::Event::State& event);
  /// Its event, after everything was launched; `verify` runs once it is done and may throw.
  std::shared_ptr<anyep::Event::State> end(const backend::Call& call, std::function<void()> verify = {});
  /// The work that `stream` holds now.
  std::shared_ptr<EventHandle> mark(cudaStream_t stream) { return events_.record(stream); }
  /// Blocks that the op being put on its stream uses, and nobody else.
  void keep_until_done(Block block) { temporary_.push_back(std::move(block)); }

  /// Throws what a kernel has left behind, or what the watcher has found, if anything. Never waits.
  void look(const char* op, const char* phase);
  /// The first error of the group, after a look at the kernels' record.
  std::optional<Error> first_error();
  /// Waits until everything that was put on streams is done; false at the limit.
  bool drain(std::uint64_t limit_ns) noexcept;
  /// @throws Error kTimeout at the op limit
  void must_drain(const char* op);
  /// Says goodbye and waits for the peers' words. Frees nothing: views may be held.
  std::vector<int> close();

 private:
  friend class StreamEvent;
  Rank() = default;
  void take_device_memory();
  void fill_team();
  void add_pages();
  void count_ranks_on_gpu(control::Control& control, Deadline deadline);
  std::optional<std::uint64_t> find_room(Heap& heap, std::uint64_t bytes);
  std::uint32_t note(const backend::Call& call, bool captured);

  std::unique_ptr<host::Group> group_;
  int device_ = 0, num_sms_ = 0, ranks_on_gpu_ = 1;
  WindowLayout layout_;
  std::shared_ptr<Windows> windows_;
  std::unique_ptr<Heap> heap_, handles_;
  PinnedPages pinned_;                             ///< the record, then gates
  std::shared_ptr<host::RankMemory> host_memory_;  ///< stays mapped as long as it is registered
  PinnedRange failure_words_, host_window_;
  Team team_;  ///< what is the same in every op
  State* state_ = nullptr;
  std::int32_t* partial_ = nullptr;
  low_latency::Progress* progress_ = nullptr;
  low_latency::Layout low_latency_layout_;
  std::uint32_t low_latency_sends_ = 0;
  std::byte* combine_buffer_ = nullptr;
  std::uint64_t combine_buffer_bytes_ = 0;
  EventPool events_;

  std::uint64_t window_end_ = 0;  ///< what is backed of the own window

  mutable std::recursive_mutex mutex_;  ///< guards what follows: blocks and pages come back from any thread
  struct IdlePage {
    CountsPage* page;
    std::shared_ptr<EventHandle> after;  ///< free once it is done; null = at once
  };
  std::vector<PinnedPages> pages_;
  std::deque<IdlePage> free_pages_;
  std::array<std::uintptr_t, 256> known_{};       ///< granules of addresses that were found to be this GPU's
  std::vector<backend::Call> recent_, captured_;  ///< whom the record may name; `recent_` goes round
  std::vector<Block> temporary_;
  protocol::FaultRecord* record_ = nullptr;
  std::uint32_t next_recent_ = 0;
  std::uint64_t* gates_ = nullptr;
  std::uint32_t next_gate_ = 0;
  cudaStream_t last_stream_ = nullptr;
  std::shared_ptr<EventHandle> last_;  ///< of the op put on a stream last
  bool capturing_ = false;             ///< the op being put on its stream is captured
};

}  // namespace anyep::cuda
