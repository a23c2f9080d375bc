// CPU ranks: processes over shared memory, or threads; one thread per rank moves the rows.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "backend/backend.h"
#include "core/check.h"
#include "host/group.h"

namespace anyep::cpu {

using namespace host;  // CPU ranks live wholly in the memory of their host

class CpuBackend final : public backend::Backend {
 public:
  explicit CpuBackend(std::unique_ptr<Group> group);

  void route(const backend::Call&, const backend::RouteCall&) override;
  void dispatch(const backend::Call&, const backend::DispatchCall&) override;
  void combine(const backend::Call&, const backend::CombineCall&) override;
  void low_latency_dispatch_send(backend::LowLatencyCall&) override;
  void low_latency_dispatch_receive(backend::LowLatencyCall&) override;
  void low_latency_combine_send(backend::LowLatencyCall&) override;
  void low_latency_combine_receive(backend::LowLatencyCall&) override;
  void barrier(const backend::Call&) override;

  std::unique_ptr<OwnedRows::State> make_rows(std::int64_t num_rows, const Shape&) override;
  TensorView combine_buffer(const Shape&) override;
  TensorView memory(Mode, std::size_t offset, std::size_t bytes) override;
  std::shared_ptr<const void> hold_memory() override { return group_->hold_memory(); }
  std::vector<int> masks() const override;
  void mask(int rank) override;
  void unmask(int rank) override;

  void fail(const Error&) noexcept override;
  std::optional<Error> first_error() const override;
  void refused(std::uint32_t call, const Error&) noexcept override;
  std::vector<int> close() override;
  std::uint64_t ids_out_of_range() const override { return ids_out_of_range_; }

 private:
  /// Low latency and barriers go on without a peer that passes the limit, where the budget allows masks.
  void mask_silent(int peer, const char* op);

  std::unique_ptr<Group> group_;
  std::uint32_t notify_turn_ = protocol::kFirstEpoch;
  std::uint32_t barrier_turn_ = protocol::kFirstEpoch;
  std::atomic<std::uint64_t> ids_out_of_range_ = 0;
};

}  // namespace anyep::cpu
