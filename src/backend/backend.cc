#include "backend/backend.h"

#include <algorithm>

#include "core/check.h"
#include "core/routing.h"

namespace anyep::backend {
namespace {

[[noreturn]] void needs_device(const char* op) {
  core::throw_error(ErrorCode::kUnsupported, op,
                    "arrays in device memory need an engine on a GPU; this one is of CPU ranks");
}

}  // namespace

std::shared_ptr<Handle::State> Backend::adopt(const HandleArrays&, std::shared_ptr<const void>, StreamRef) {
  needs_device("adopt");
}

Layout Backend::layout(const Shape& shape, const Routing& routing, StreamRef) {
  return core::count_layout(core::ExpertIds(routing.experts, shape.num_experts), shape.num_experts,
                            static_cast<int>(masks().size()));
}

void Backend::layout_into(const Shape&, const Routing&, const LayoutArrays&, StreamRef) {
  needs_device("layout");
}

void Backend::route_and_dispatch(const Call&, const RouteCall&, const Call& call, const DispatchLater&) {
  needs_device(call.op);
}

void Backend::copy_masks(const TensorView& out, StreamRef) const {
  const std::vector<int> now = masks();
  std::copy(now.begin(), now.end(), out.as<std::int32_t>());
}

}  // namespace anyep::backend
