// CUDA ranks of one host: the plan of each call becomes Params and launches on the caller's stream.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "backend/backend.h"
#include "cuda/rank.h"

namespace anyep::cuda {

class CudaBackend final : public backend::Backend {
 public:
  explicit CudaBackend(std::shared_ptr<Rank> rank) : rank_(std::move(rank)) {}

  bool runs_on_stream() const override { return true; }
  void hold_back(const backend::Call&, const anyep::Event::State&) override;
  std::shared_ptr<anyep::Event::State> record(const backend::Call&) override;
  std::shared_ptr<Handle::State> adopt(const HandleArrays&, std::shared_ptr<const void> owner, StreamRef) override;
  Layout layout(const Shape&, const Routing&, StreamRef) override;
  void layout_into(const Shape&, const Routing&, const LayoutArrays&, StreamRef) override;

  void route(const backend::Call&, const backend::RouteCall&) override;
  void dispatch(const backend::Call&, const backend::DispatchCall&) override;
  void route_and_dispatch(const backend::Call&, const backend::RouteCall&, const backend::Call&,
                          const DispatchLater&) override;
  void settle(const backend::DispatchCall&) override;
  void combine(const backend::Call&, const backend::CombineCall&) override;
  void low_latency_dispatch_send(backend::LowLatencyCall&) override;
  void low_latency_dispatch_receive(backend::LowLatencyCall&) override;
  void low_latency_combine_send(backend::LowLatencyCall&) override;
  void low_latency_combine_receive(backend::LowLatencyCall&) override;
  void barrier(const backend::Call&) override;

  std::unique_ptr<OwnedRows::State> make_rows(std::int64_t num_rows, const Shape&) override;
  std::unique_ptr<OwnedRows::State> make_rows_on(std::int64_t num_rows, const Shape&, StreamRef) override;
  std::unique_ptr<OwnedRows::State> make_rows_if_free(std::int64_t num_rows, const Shape&, StreamRef) override;
  TensorView combine_buffer(const Shape&) override;
  TensorView memory(Mode, std::size_t offset, std::size_t bytes) override;
  std::shared_ptr<const void> hold_memory() override;
  std::vector<int> masks() const override;
  void copy_masks(const TensorView& out, StreamRef) const override;
  void mask(int rank) override;
  void unmask(int rank) override;

  void fail(const Error&) noexcept override;
  std::optional<Error> first_error() const override;
  void refused(std::uint32_t call, const Error&) noexcept override;
  std::vector<int> close() override;
  std::uint64_t ids_out_of_range() const override;

 private:
  /// A notify and a dispatch on their way to the stream.
  struct Routed;
  struct Sent;
  void check_arguments(const backend::Call& call, const backend::RouteCall& route) const;
  /// Takes the handle's memory; nothing is launched. @throws Error kCapacity
  Routed prepare(const backend::Call& call, const backend::RouteCall& route);
  void launch(const backend::Call& call, const backend::RouteCall& route, const Routed& routed, cudaStream_t stream);
  /// Takes what rows need beside `out`; likewise.
  Sent prepare(const backend::Call& call, const backend::DispatchCall& dispatch);
  void launch(const backend::Call& call, const backend::DispatchCall& dispatch, const Sent& sent, cudaStream_t stream);
  int sms(const backend::Call& call) const;
  int sms(const backend::Call& call, int unless_limited) const;
  /// Counts the send; the halves that its launch plays.
  int halves_of_send(backend::LowLatencyCall& op);
  void launch_low_latency_dispatch(backend::LowLatencyCall& op, int halves, Rank::Half half);
  void launch_low_latency_combine(backend::LowLatencyCall& op, int halves, Rank::Half half);
  const std::int32_t* find_rows(const backend::LowLatencyCall& op, int num_sms, cudaStream_t stream);

  std::shared_ptr<Rank> rank_;
  std::function<void()> verify_;              ///< of the op being put on its stream
  std::uint64_t notifies_with_dispatch_ = 0;  ///< launched with dispatch_behind
};

/// Collective. @throws Error kUnsupported without a driver or a GPU of that number
std::unique_ptr<backend::Backend> make_backend(const Budget&, const Topology&, const Tuning&, Bootstrap&);

}  // namespace anyep::cuda
