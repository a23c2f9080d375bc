#include "cuda/rank.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <thread>
#include <utility>

#include "core/check.h"
#include "core/log.h"
#include "core/tuning.h"
#include "cuda/kernels/barrier.h"
#include "cuda/runtime/architectures.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "cuda/runtime/event.h"
#include "cuda/runtime/launch.h"
#include "protocol/wait.h"
#include "protocol/word.h"

namespace anyep::cuda {
namespace {

constexpr const char* kCreate = "create";
/// Calls that a record may name: more than fit the queues of two streams before the host waits (1024 launches each).
constexpr std::uint32_t kRecentCalls = 2048;
/// Captured calls that it may name, as long as the engine lives; what comes behind them goes by the last one's name.
constexpr std::size_t kCapturedCalls = 4096;
/// Host events that streams may be waiting for at a time.
constexpr std::uint32_t kGates = 4096;
/// Pages of counts that are taken at a time; each handle holds one.
constexpr std::size_t kPages = 256;
/// How long a failed rank's kernels may take to leave: a look around every 1000 polls, microseconds on an idle GPU; another
/// stream's kernels may hold its SMs meanwhile.
constexpr std::uint64_t kLeaveNs = 2'000'000'000;

}  // namespace

// ---- events of ops ------------------------------------------------------------------------------------------------

/// Done when the stream has passed it; then throws what the op's kernels have left behind.
class StreamEvent final : public anyep::Event::State {
 public:
  StreamEvent(std::shared_ptr<Rank> rank, std::shared_ptr<EventHandle> end, const char* name, std::uint64_t op_limit_ns,
              std::function<void()> verify)
      : rank_(std::move(rank)), end_(std::move(end)), limit_(op_limit_ns), verify_(std::move(verify)) {
    op = name;
  }

  bool ends_on_stream() const override { return true; }
  bool done() const noexcept override { return end_->done(); }

  bool wait_for(std::uint64_t limit) const override {
    const std::uint64_t begin = protocol::now_ns();
    std::uint64_t failed_at = 0;
    for (unsigned looks = 0; !end_->done(); ++looks) {
      const std::uint64_t now = protocol::now_ns();
      if (looks % 64 == 63) {
        const bool failed = rank_->first_error().has_value();
        if (failed && failed_at == 0) failed_at = now;
        if (failed_at != 0 && now - failed_at > kLeaveNs)
          rank_->look(op, "in_recv");  // it does not leave: say why all the same
      }
      if (now - begin > limit) return false;
      if (now - begin > 200'000) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    rank_->look(op, "in_recv");
    if (verify_) verify_();
    return true;
  }

  void wait() const override {
    while (!wait_for(limit_)) {  // what stands before it on the stream is the caller's, and has no limit of ours
    }
  }

  void make_wait(StreamRef stream) const override { end_->make_wait(static_cast<cudaStream_t>(stream.native)); }

 private:
  std::shared_ptr<Rank> rank_;
  std::shared_ptr<EventHandle> end_;
  std::uint64_t limit_;
  std::function<void()> verify_;
};

// ---- blocks -------------------------------------------------------------------------------------------------------

Block& Block::operator=(Block&& other) noexcept {
  Block old(std::move(*this));
  rank_ = std::move(other.rank_);
  offset_ = other.offset_;
  bytes_ = other.bytes_;
  return *this;
}

Block::~Block() {
  if (rank_ != nullptr) rank_->release(offset_);
}

std::byte* Block::data() const {
  return rank_->own(offset_);
}

void Block::keep_front(std::uint64_t bytes) {
  if (rank_ == nullptr || bytes >= bytes_) return;
  rank_->keep_front(offset_, bytes);
  bytes_ = bytes;
}

// ---- life ---------------------------------------------------------------------------------------------------------

std::shared_ptr<Rank> Rank::create(const Budget& budget, const Topology& topology, const Tuning& tuning,
                                   Bootstrap& bootstrap) {
  std::shared_ptr<Rank> rank(new Rank);
  rank->device_ = topology.device;
  rank->layout_ = WindowLayout::make(budget, topology.num_ranks());
  rank->group_ = host::Group::create(
      budget, topology, tuning, bootstrap, host::Group::Payload::kElsewhere,
      [&](control::Control& control, const host::Group& group, Deadline deadline) {
        std::optional<Error> mine;
        try {
          if (topology.num_ranks() > kMaxRanks) {
            core::throw_error(ErrorCode::kUnsupported, kCreate,
                              fmt::format("{} ranks on GPUs of one host; this version serves 1..{}",
                                          topology.num_ranks(), kMaxRanks));
          }
          const DeviceGuard guard(rank->device_);
          rank->take_device_memory();
          rank->failure_words_ = PinnedRange::of(group.failure_words());
          rank->host_memory_ = group.own_memory();
          rank->host_window_ = PinnedRange::of(group.own_window());
          check_code(rank->device_);
          load_kernels();
        } catch (const Error& error) {
          mine = error;
        }
        control.vote(mine ? &*mine : nullptr, kCreate, deadline);
        rank->count_ranks_on_gpu(control, deadline);
        rank->windows_ = Windows::share(rank->layout_, rank->device_, group.rank(), control, deadline);
      });
  const WindowLayout& layout = rank->layout_;
  rank->window_end_ = rank->windows_->bytes();
  rank->heap_ = std::make_unique<Heap>(layout.heap, layout.heap_bytes);
  rank->handles_ = std::make_unique<Heap>(layout.handles, rank->window_end_ - layout.handles);  // rounded up
  rank->fill_team();
  return rank;
}

void Rank::count_ranks_on_gpu(control::Control& control, Deadline deadline) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties");
  std::vector<cudaUUID_t> all(static_cast<std::size_t>(layout_.num_ranks));
  control.all_gather(std::as_bytes(std::span(&properties.uuid, 1)), std::as_writable_bytes(std::span(all)), deadline);
  ranks_on_gpu_ = static_cast<int>(std::count_if(all.begin(), all.end(), [&](const cudaUUID_t& one) {
    return std::memcmp(&one, &properties.uuid, sizeof(one)) == 0;
  }));
}

void Rank::fill_team() {
  const DeviceGuard guard(device_);
  for (int rank = 0; rank < num_ranks(); ++rank) team_.window[rank] = windows_->base(rank);
  team_.layout = layout_;
  team_.rank = rank();
  team_.num_ranks = num_ranks();
  team_.generation = group_->generation();
  team_.state = state_;
  team_.record = record_;
  team_.abort = failure_words_.on_device(group_->abort_word());
  team_.gone = failure_words_.on_device(group_->gone());
  if (group_->budget().masks) team_.masked = failure_words_.on_device(group_->masked());
  team_.announced = host_window_.on_device(&group_->word(rank(), group_->layout().announced, 0));
  team_.announced_stride = core::kWordBytes / sizeof(std::uint64_t);
}

void Rank::take_device_memory() {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties");
  num_sms_ = properties.multiProcessorCount;
  void* memory = nullptr;
  check(cudaMalloc(&memory, sizeof(State)), "cudaMalloc");
  state_ = static_cast<State*>(memory);
  State fresh{};
  for (std::uint32_t& turn : fresh.turn) turn = protocol::kFirstEpoch;
  check(cudaMemcpy(state_, &fresh, sizeof(fresh), cudaMemcpyHostToDevice), "cudaMemcpy");
  const std::uint64_t partial = static_cast<std::uint64_t>(num_sms_) *
                                (layout_.count_width * static_cast<std::uint64_t>(layout_.num_ranks) + kMaxRanks);
  check(cudaMalloc(&memory, partial * sizeof(std::int32_t)), "cudaMalloc");
  partial_ = static_cast<std::int32_t*>(memory);

  check(cudaMalloc(&memory, sizeof(low_latency::Progress)), "cudaMalloc");
  progress_ = static_cast<low_latency::Progress*>(memory);
  check(cudaMemset(progress_, 0, sizeof(low_latency::Progress)), "cudaMemset");
  low_latency_layout_ = low_latency::Layout::make(layout_.low_latency_bytes, layout_.num_ranks);

  core::Cursor at(64);
  const std::uint64_t record_at = at.take(sizeof(protocol::FaultRecord));
  const std::uint64_t gates_at = at.take(kGates * sizeof(std::uint64_t));
  pinned_ = PinnedPages(at.bytes());
  gates_ = reinterpret_cast<std::uint64_t*>(pinned_.data() + gates_at);
  record_ = reinterpret_cast<protocol::FaultRecord*>(pinned_.data() + record_at);
  recent_.resize(kRecentCalls);
  add_pages();
}

Rank::~Rank() {
  const DeviceGuard guard(device_, std::nothrow);  // create may have failed for want of a driver
  if (group_ != nullptr) group_->stop();
  if (state_ != nullptr) (void)cudaFree(state_);
  if (partial_ != nullptr) (void)cudaFree(partial_);
  if (progress_ != nullptr) (void)cudaFree(progress_);
  if (combine_buffer_ != nullptr) (void)cudaFree(combine_buffer_);
}

std::byte* Rank::combine_buffer(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (combine_buffer_ == nullptr) {
    const DeviceGuard guard(device_);
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<std::uint64_t>(bytes, layout_.low_latency_bytes)), "cudaMalloc");
    combine_buffer_ = static_cast<std::byte*>(memory);
    combine_buffer_bytes_ = std::max<std::uint64_t>(bytes, layout_.low_latency_bytes);
  }
  if (bytes > combine_buffer_bytes_) {
    core::throw_capacity("combine_buffer", "the zero-copy buffer", bytes, combine_buffer_bytes_,
                         "Ask for the largest shape first: its address stays for the engine's life.");
  }
  return combine_buffer_;
}

// ---- memory -------------------------------------------------------------------------------------------------------

Block Rank::allocate(std::uint64_t bytes, const char* op, const char* what, Store store) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t wanted = std::max<std::uint64_t>(bytes, 1);
  Heap& heap = store == Store::kRows ? *heap_ : *handles_;
  const std::optional<std::uint64_t> offset = find_room(heap, wanted);
  if (!offset) {
    core::throw_capacity(
        op, fmt::format("bytes of the window for {}{}", what, capturing_ ? ", in a capture, where it cannot grow" : ""),
        wanted, heap.largest_free(), "Release rows and handles, or create the engine with a larger budget.rows_bytes.");
  }
  return Block(shared_from_this(), *offset, wanted);
}

Block Rank::allocate_free(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (capturing_) return {};
  const std::optional<std::uint64_t> offset = heap_->allocate(bytes);
  return offset ? Block(shared_from_this(), *offset, bytes) : Block();
}

/// What is free; more than the budget; what has been given back and is still in use, in this order.
std::optional<std::uint64_t> Rank::find_room(Heap& heap, std::uint64_t bytes) {
  const Lifetime lifetime = capturing_ ? Lifetime::kGraph : Lifetime::kCall;
  if (const auto offset = heap.allocate(bytes, lifetime)) return offset;
  if (capturing_) return std::nullopt;
  const DeviceGuard guard(device_);
  const auto limit = core::scaled(group_->tuning().timeout, group_->tuning());
  if (windows_->room() >= bytes) {
    const std::uint64_t have = heap.statistics().bytes;
    const std::uint64_t least_growth = &heap == heap_.get() ? have / 4 : kHandleBytes;
    const std::uint64_t more = std::min(windows_->room(), std::max(bytes, least_growth));
    core::log_info(
        fmt::format("rank {}: what is held exceeds {} bytes of the window, which grows by {}", rank(), have, more));
    const Piece piece = windows_->grow(more, std::chrono::steady_clock::now() + limit, [this](int peer) {
      return protocol::Shared(group_->gone()[peer]).load(protocol::kAcquire) != host::kHere;
    });
    heap.add(piece.offset, piece.bytes);
    window_end_ = std::max(window_end_, piece.offset + piece.bytes);
    if (const auto offset = heap.allocate(bytes, lifetime)) return offset;
  }
  if (!heap.has_pending() || !drain(static_cast<std::uint64_t>(limit.count()))) return std::nullopt;
  return heap.allocate(bytes, lifetime);
}

void Rank::allocate_for(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  capturing_ = is_capturing(stream);
}

void Rank::release(std::uint64_t offset) noexcept {
  const std::lock_guard lock(mutex_);
  heap_->release(offset, last_);
  handles_->release(offset, last_);  // whose it is not ignores it
}

std::uint64_t Rank::offset_of(const void* data, std::uint64_t bytes) const {
  const auto* const at = static_cast<const std::byte*>(data);
  const std::byte* const heap = windows_->base(rank()) + layout_.heap;
  if (at < heap || at + bytes > windows_->base(rank()) + window_end_) return Grant::kNone;
  return static_cast<std::uint64_t>(at - windows_->base(rank()));
}

PagePointer Rank::take_page() {
  const std::lock_guard lock(mutex_);
  // A page serves again once the op that was put on a stream last by then is done: kernels of a dropped handle may still
  // have been on their way.
  if (free_pages_.empty() || (free_pages_.front().after != nullptr && !free_pages_.front().after->done())) add_pages();
  CountsPage* const page = free_pages_.front().page;
  free_pages_.pop_front();
  *page = CountsPage{};
  return PagePointer(page, [rank = shared_from_this()](CountsPage* used) {
    const std::lock_guard back(rank->mutex_);
    rank->free_pages_.push_back({used, rank->last_});
  });
}

/// In front: what has been given back stays in the order in which its ops end.
void Rank::add_pages() {
  const DeviceGuard guard(device_);
  const OutsideCapture outside;
  const std::uint64_t stride = core::round_up(sizeof(CountsPage), 64);
  const PinnedPages& more = pages_.emplace_back(kPages * stride);
  for (std::size_t page = 0; page < kPages; ++page) {
    free_pages_.push_front({reinterpret_cast<CountsPage*>(more.data() + page * stride), nullptr});
  }
}

void Rank::must_be_on_device(const char* op, const char* name, const TensorView& view) {
  if (view.data == nullptr || view.num_elements() == 0) return;
  if (offset_of(view.data, 0) != Grant::kNone) return;  // the own window
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  const std::uintptr_t granule = address >> 21;  // 2 MiB: device memory of different kinds shares none
  std::uintptr_t& known = known_[granule % known_.size()];
  if (known == granule) return;
  const OutsideCapture outside;
  cudaPointerAttributes attributes{};
  const cudaError_t status = cudaPointerGetAttributes(&attributes, view.data);
  if (status != cudaSuccess) (void)cudaGetLastError();
  const bool host = status != cudaSuccess || attributes.type == cudaMemoryTypeUnregistered;
  const bool reachable = !host && (attributes.type != cudaMemoryTypeDevice || attributes.device == device_);
  if (!reachable) {
    core::throw_argument(op, name,
                         host ? fmt::format("host memory at {}", view.data)
                              : fmt::format("memory of GPU {} at {}", attributes.device, view.data),
                         fmt::format("memory of GPU {}, this rank's", device_));
  }
  if (attributes.type == cudaMemoryTypeDevice) known = granule;
}

// ---- ops ----------------------------------------------------------------------------------------------------------

/// Under which number kernels of this call leave a record.
std::uint32_t Rank::note(const backend::Call& call, bool captured) {
  if (!captured) {
    const std::uint32_t at = next_recent_++ % kRecentCalls;
    recent_[at] = call;
    return at;
  }
  if (captured_.size() < kCapturedCalls) captured_.push_back(call);
  return kRecentCalls + static_cast<std::uint32_t>(captured_.size()) - 1;
}

Rank::Launch Rank::begin(const backend::Call& call, Half half) {
  const std::lock_guard lock(mutex_);
  const DeviceGuard guard(device_);
  Launch launch;
  launch.stream = static_cast<cudaStream_t>(call.stream.native);
  launch.captured = half == Half::kRightBehind ? capturing_ : is_capturing(launch.stream);
  if (half != Half::kRightBehind) look(call.op, "before_send");
  constexpr host::OpRun::Start kStarts[] = {host::OpRun::Start::kAnnounce, host::OpRun::Start::kResume,
                                            host::OpRun::Start::kRightBehind};  // in the order of Half
  host::OpRun run(*group_, call, kStarts[static_cast<int>(half)]);
  run.at(host::kBeforeSend);
  if (!launch.captured && half != Half::kRightBehind && last_ != nullptr && last_stream_ != launch.stream) {
    last_->make_wait(launch.stream);
  }
  capturing_ = launch.captured;
  Team& team = launch.team;
  team = team_;
  team.code = run.code;
  team.op = note(call, launch.captured);
  if (launch.captured) {
    team.announced = nullptr;  // a replayed graph announces nothing
  } else {
    team.announcement = run.waiter.announcement;
  }
  team.limit_ns = launch.captured ? call.graph_limit_ns : call.limit_ns;
  return launch;
}

void Rank::hold_back(const backend::Call& call, const anyep::Event::State& event) {
  const std::lock_guard lock(mutex_);
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(call.stream.native);
  if (is_capturing(stream)) {
    core::throw_error(ErrorCode::kUnsupported, call.op, "a host's event cannot be awaited in a captured graph");
  }
  GateParams params;
  params.team = team_;
  params.team.announced = nullptr;  // no peer has to do with it
  params.team.op = note(call, false);
  params.team.limit_ns = call.limit_ns;
  params.open = gates_ + next_gate_++ % kGates;
  *params.open = 0;
  event.when_done([rank = shared_from_this(), open = params.open] {
    protocol::Shared(*open).store(1, protocol::kRelease);  // pattern Q
  });
  launch_gate(params, stream);
}

std::shared_ptr<anyep::Event::State> Rank::end(const backend::Call& call, std::function<void()> verify) {
  const std::lock_guard lock(mutex_);
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(call.stream.native);
  const std::shared_ptr<EventHandle> done = events_.record(stream);
  if (!is_capturing(stream)) {
    last_ = done;
    last_stream_ = stream;
  }
  temporary_.clear();
  return std::make_shared<StreamEvent>(shared_from_this(), done, call.op, call.limit_ns, std::move(verify));
}

std::optional<Error> Rank::first_error() {
  const std::lock_guard lock(mutex_);
  if (protocol::Shared(record_->ready).load(protocol::kAcquire) != 0 && !group_->failed()) {  // pattern Q
    const std::uint32_t op = record_->op;
    try {
      host::OpRun run(*group_, op < kRecentCalls ? recent_[op] : captured_[op - kRecentCalls],
                      host::OpRun::Start::kResume);
      run.fail_with(*record_);
    } catch (const Error&) {
      // The group has it as its first error now.
    }
  }
  return group_->first_error();
}

void Rank::look(const char* op, const char* phase) {
  const std::optional<Error> first = first_error();
  if (!first) return;
  throw core::met_in(*first, op, phase);
}

void Rank::must_drain(const char* op) {
  const auto limit = core::scaled(group_->tuning().timeout, group_->tuning());
  if (drain(static_cast<std::uint64_t>(limit.count()))) return;
  look(op, "between");
  core::throw_error(ErrorCode::kTimeout, op, "an operation is still on its stream at the limit");
}

bool Rank::drain(std::uint64_t limit_ns) noexcept {
  const std::uint64_t begin = protocol::now_ns();
  while (last_ != nullptr && !last_->done()) {
    if (protocol::now_ns() - begin > limit_ns) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

std::vector<int> Rank::close() {
  const auto limit = core::scaled(group_->tuning().timeout, group_->tuning());
  if (!drain(static_cast<std::uint64_t>(limit.count()))) {
    group_->fail(Error(ErrorCode::kTimeout, "close: an operation was still on its stream at the limit"));
    (void)drain(kLeaveNs);
  }
  return group_->close();
}

}  // namespace anyep::cuda
