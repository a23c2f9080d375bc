// A handle of CUDA ranks: its arrays lie on the GPU, its counts come to a page of host memory.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "backend/state.h"
#include "cuda/kernels/places.h"
#include "cuda/rank.h"

namespace anyep::cuda {

class DeviceHandle final : public DeviceArrays {
 public:
  /// For a route; the arrays lie in one block of the window's heap.
  DeviceHandle(std::shared_ptr<Rank> rank, std::int64_t num_tokens, int ranges);
  /// Over arrays of the caller's.
  DeviceHandle(std::shared_ptr<Rank> rank, const HandleArrays& arrays, std::shared_ptr<const void> owner);

  TensorView rows_until() override;
  TensorView place() override;   ///< waits, where no dispatch has filled it
  TensorView source() override;  ///< @throws Error kState before the first dispatch
  TensorView tokens() override;

  Places places() const;
  std::int32_t* final_place() const { return final_place_; }
  /// Whether the array of final rows is, or is on its way to be, filled.
  bool has_final_place = false;
  /// Where peers write `rows` source indices, in the window of the rank that dispatches: a handle serves other engines too.
  std::uint64_t source_for(const std::shared_ptr<Rank>& rank, std::int64_t rows);
  /// A dispatch that was to bring all rows or none has brought `rows`, or none: then the next one fills what it would have.
  void settle(std::optional<std::int64_t> rows);
  const std::int32_t* source_data() const { return source_; }
  bool has_source() const { return has_source_; }
  std::int64_t source_rows() const { return source_rows_; }

  // What the kernels of notify fill.
  std::int32_t *rows_until_data = nullptr, *tokens_data = nullptr, *place_data = nullptr, *before_data = nullptr;
  PagePointer page;
  const anyep::Event::State* routed = nullptr;  ///< of the state that owns this; null = adopted
  int tokens_per_range = 1;

 private:
  std::shared_ptr<Rank> rank_;
  std::int64_t num_tokens_ = 0;
  Block arrays_, source_block_;
  const Rank* source_rank_ = nullptr;
  std::shared_ptr<const void> owner_;
  std::int32_t* final_place_ = nullptr;
  const std::int32_t* source_ = nullptr;
  bool has_source_ = false;
  std::int64_t source_rows_ = 0;
};

/// Of an adopted handle: its counts are copied to a page; done when they are there.
class CopiedCounts final : public anyep::Event::State {
 public:
  CopiedCounts(std::shared_ptr<Rank> rank, Handle::State& handle, cudaStream_t stream);
  bool done() const noexcept override;
  bool wait_for(std::uint64_t limit) const override;
  void wait() const override;

 private:
  std::shared_ptr<Rank> rank_;
  Handle::State& handle_;  ///< which owns this
  PagePointer page_;
  std::shared_ptr<EventHandle> copied_;
  mutable bool filled_ = false;
};

/// Done when notify has written the page of counts; then they are in the state's vectors.
class CountsEvent final : public anyep::Event::State {
 public:
  CountsEvent(std::shared_ptr<Rank> rank, Handle::State& handle, std::uint64_t op_limit_ns, int local_experts);
  bool done() const noexcept override;
  bool wait_for(std::uint64_t limit) const override;
  void wait() const override;

 private:
  void fill() const;
  std::shared_ptr<Rank> rank_;
  Handle::State& handle_;  ///< which owns this
  PagePointer page_;
  std::uint64_t limit_;
  int local_experts_;
  mutable bool filled_ = false;
};

}  // namespace anyep::cuda
