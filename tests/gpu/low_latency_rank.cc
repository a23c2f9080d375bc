#include "low_latency_rank.h"

#include <algorithm>

#include "replay.h"

namespace anyep::test {
namespace {

constexpr std::uint32_t kBetweenHalvesOfDispatch = 2, kBetweenHalvesOfCombine = 3;  ///< beside those of the kernels

}  // namespace

LowLatencyRank::LowLatencyRank(Bootstrap& bootstrap, int num_gpus, const std::vector<PairDraw>& pairs,
                               std::int64_t low_latency_bytes) {
  Topology topology = Topology::discover(bootstrap);
  topology.device = topology.rank % num_gpus;
  rank_ = topology.rank;
  must(cudaSetDevice(topology.device));
  must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  load_pair_kernels();
  load_replay_kernel();
  for (const PairDraw& pair : pairs) bytes_ = std::max(bytes_, PairPlaces(call_of(pair), nullptr).bytes());
  void* memory = nullptr;
  must(cudaMalloc(&memory, kSets * bytes_ + sizeof(Findings) + sizeof(std::uint32_t)));
  base_ = static_cast<std::byte*>(memory);
  must(cudaMemsetAsync(base_, 0xFF, kSets * bytes_, stream_));
  must(cudaMemsetAsync(findings(), 0, sizeof(Findings) + sizeof(std::uint32_t), stream_));
  must(cudaStreamSynchronize(stream_));
  // Last: from here on kernels of other ranks on this GPU may wait for this one, and so would calls that wait for the GPU.
  Budget budget;
  budget.rows_bytes = std::int64_t{8} << 20;
  budget.low_latency_bytes = low_latency_bytes;
  Tuning tuning = Tuning::from_environment();
  tuning.timeout = std::chrono::seconds(20);
  engine_.emplace(Engine::create(budget, topology, tuning, bootstrap));
}

LowLatencyRank::~LowLatencyRank() {
  open_.reset();
  engine_.reset();
  (void)cudaFree(base_);
  (void)cudaStreamDestroy(stream_);
}

PairCall LowLatencyRank::call_of(const PairDraw& pair) const {
  PairCall call = pair.call;
  call.rank = rank_;
  return call;
}

LowLatencyRank::One LowLatencyRank::place(const PairDraw& pair, std::size_t set) const {
  One one{&pair, call_of(pair), {}, {}};
  one.memory = PairPlaces(one.call, base_ + set * bytes_).memory();
  one.memory.findings = findings();
  one.memory.replay = replay();
  return one;
}

void LowLatencyRank::dispatch(One& one) {
  LowLatencyOptions options;
  options.hook = one.pair->dispatch_hook;
  options.num_sms = one.pair->dispatch_sms;
  options.wire = one.call.wire;
  options.round_scale = one.call.round_scale;
  Routing routing = routing_view(one.call, one.memory);
  routing.weights = {};
  one.pending = engine_->low_latency_dispatch(one.pair->shape(), x_view(one.call, one.memory), routing,
                                              slabs_view(one.call, one.memory), {stream_}, options);
}

void LowLatencyRank::combine(One& one) {
  LowLatencyOptions options;
  options.hook = one.pair->combine_hook;
  options.num_sms = one.pair->combine_sms;
  one.pending = engine_->low_latency_combine(one.pair->shape(), answers_view(one.call, one.memory),
                                             routing_view(one.call, one.memory), out_view(one.call, one.memory),
                                             {stream_}, options);
}

void LowLatencyRank::receive(One& one, bool hook, std::uint32_t place, cudaStream_t stream) {
  if (hook) {
    linger(one.call, one.memory, place, stream);
    (void)one.pending->receive({stream});
  }
  one.pending.reset();
}

void LowLatencyRank::send_dispatch(const PairDraw& pair) {
  open_ = place(pair, 0);
  prepare_pair(open_->call, open_->memory, stream_);
  dispatch(*open_);
}

void LowLatencyRank::receive_dispatch(cudaStream_t stream) {
  receive(*open_, open_->pair->dispatch_hook, kBetweenHalvesOfDispatch, stream);
  check_dispatched(open_->call, open_->memory, stream);
}

void LowLatencyRank::send_combine() {
  combine(*open_);
}

void LowLatencyRank::receive_combine(cudaStream_t stream) {
  receive(*open_, open_->pair->combine_hook, kBetweenHalvesOfCombine, stream);
  check_combined(open_->call, open_->memory, stream);
  open_.reset();
}

int LowLatencyRank::put(const PairDraw* pairs, int count) {
  const auto has_hooks = [](const PairDraw& pair) { return pair.dispatch_hook && pair.combine_hook; };
  if (count > 1 && has_hooks(pairs[0]) && has_hooks(pairs[1])) {
    put_two(pairs[0], pairs[1]);
    return 2;
  }
  send_dispatch(pairs[0]);
  receive_dispatch();
  send_combine();
  receive_combine();
  return 1;
}

void LowLatencyRank::put_two(const PairDraw& first, const PairDraw& second) {
  One a = place(first, 0), b = place(second, 1);
  prepare_pair(a.call, a.memory, stream_);
  prepare_pair(b.call, b.memory, stream_);
  dispatch(a);
  dispatch(b);
  receive(a, true, kBetweenHalvesOfDispatch, stream_);
  check_dispatched(a.call, a.memory, stream_);
  combine(a);
  receive(b, true, kBetweenHalvesOfDispatch, stream_);
  check_dispatched(b.call, b.memory, stream_);
  combine(b);
  receive(a, true, kBetweenHalvesOfCombine, stream_);
  check_combined(a.call, a.memory, stream_);
  receive(b, true, kBetweenHalvesOfCombine, stream_);
  check_combined(b.call, b.memory, stream_);
}

std::unique_ptr<StreamGraph> LowLatencyRank::capture(const PairDraw* pairs, int count) {
  return std::make_unique<StreamGraph>(stream_, [&] {
    next_replay(replay(), stream_);
    for (int i = 0; i < count;) i += put(pairs + i, count - i);
  });
}

void LowLatencyRank::put_damaged(const PairDraw& pair, Field field) {
  One one = place(pair, 0);
  const bool of_sums = field == Field::kOut;
  const bool mended = field != Field::kRow && field != Field::kScale;  // those the check overwrites
  prepare_pair(one.call, one.memory, stream_);
  dispatch(one);
  receive(one, pair.dispatch_hook, kBetweenHalvesOfDispatch, stream_);
  if (!of_sums) damage(one.call, one.memory, field, stream_);
  check_dispatched(one.call, one.memory, stream_);
  if (!of_sums && mended) damage(one.call, one.memory, field, stream_);
  combine(one);
  receive(one, pair.combine_hook, kBetweenHalvesOfCombine, stream_);
  if (of_sums) damage(one.call, one.memory, field, stream_);
  check_combined(one.call, one.memory, stream_);
}

Findings LowLatencyRank::look() {
  finish(stream_);
  Findings found;
  must(cudaMemcpyAsync(&found, findings(), sizeof found, cudaMemcpyDeviceToHost, stream_));
  finish(stream_);
  engine_->check();
  return found;
}

}  // namespace anyep::test
