// Checks of what the caller passed, before anything is queued or sent. Each throws Error naming argument, value and
// rule.
#pragma once

#include <anyep/config.h>
#include <anyep/topology.h>
#include <anyep/types.h>

#include <cstdint>
#include <span>
#include <string_view>

#include "backend/backend.h"
#include "core/buffers.h"

namespace anyep::backend {

/// What checks need to know of the engine.
struct Limits {
  int num_ranks = 1, rank = 0;
  Budget budget;
  core::WindowLayout layout;
  bool checked = false;
  bool on_device = false;  ///< tensors lie in a device's memory: the host reads none of them
};

std::string shape_text(const Extents& shape);

/// One argument of one op.
struct Argument {
  std::string_view op, name;
  const TensorView& view;

  void must_have_dtype(std::initializer_list<DType> allowed) const;
  void must_have_shape(const Extents& shape) const;  ///< -1 = any extent
  void must_be_dense() const;
  void must_have_dense_elements() const;  ///< rows may lie apart, their elements not
  void must_have_memory() const;          ///< a null pointer only with no elements; aligned to its elements
};

void check_routing(std::string_view op, const Shape&, const Routing&, const Limits&);
void check_options(std::string_view op, const Options&);
void check_num_experts(std::string_view op, int num_experts, const Limits&);

/// Fills fields, top_k and room. The handle's arrays are checked by check_handle once they are there.
DispatchCall check_dispatch(const Rows& x, const Rows& out, const std::shared_ptr<Handle::State>&, const Limits&);
CombineCall check_combine(const CombineInput&, const Rows& out, const std::shared_ptr<Handle::State>&, const Limits&);
void check_handle(std::string_view op, const Handle::State*, const Limits&);
/// Once the route has ended: rows of x. @throws Error kState when it failed.
void check_rows(std::string_view op, const Handle::State&, const TensorView& x);

void check_low_latency_dispatch(const Shape&, const TensorView& x, const Routing&, const ExpertSlabs& out,
                                const LowLatencyOptions&, const Limits&);
void check_low_latency_combine(const Shape&, const ExpertSlabs& in, const Routing&, const TensorView& out,
                               const LowLatencyOptions&, bool exact, const Limits&);

/// Bytes of a low-latency region for one call: dispatch and combine, whatever its form. Equal on every rank.
std::uint64_t low_latency_region_bytes(const Shape&, int num_ranks);

}  // namespace anyep::backend
