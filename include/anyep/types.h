// Values that every call speaks in: element types, tensor views, rows and slabs.
// Views are trivially copyable, own nothing and must not outlive what they show.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#if defined(_WIN32)
#define ANYEP_API
#else
#define ANYEP_API __attribute__((visibility("default")))
#endif

namespace anyep {

/// Element type of a tensor. kU8 also stands for opaque bytes.
enum class DType : std::uint8_t { kBool, kU8, kI8, kI16, kI32, kI64, kF8E4M3, kBF16, kF16, kF32, kF64 };

/// Bytes of one element.
ANYEP_API std::size_t size_of(DType dtype) noexcept;
/// "bfloat16", "float8_e4m3fn", ...: the names that array libraries use.
ANYEP_API const char* name_of(DType dtype) noexcept;

/// Up to four extents or strides.
struct Extents {
  static constexpr int kMaxDims = 4;
  int dims = 0;
  std::array<std::int64_t, kMaxDims> at{};

  Extents() = default;
  Extents(std::initializer_list<std::int64_t> values) {
    for (const std::int64_t value : values) {
      if (dims < kMaxDims) at[static_cast<std::size_t>(dims++)] = value;
    }
  }
  std::int64_t operator[](int dim) const { return at[static_cast<std::size_t>(dim)]; }
  std::int64_t& operator[](int dim) { return at[static_cast<std::size_t>(dim)]; }
  friend bool operator==(const Extents&, const Extents&) = default;
};

/// The caller's memory. Inputs are never written, though `data` is not const. A view with no dimensions is "not given".
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kU8;
  Extents shape;
  Extents strides;  ///< in elements

  /// A row-major view without gaps.
  static TensorView dense(const void* data, DType dtype, const Extents& shape) {
    TensorView view{const_cast<void*>(data), dtype, shape, shape};
    std::int64_t stride = 1;
    for (int dim = shape.dims - 1; dim >= 0; --dim) {
      view.strides[dim] = stride;
      if (__builtin_mul_overflow(stride, shape[dim], &stride)) stride = INT64_MAX;
    }
    return view;
  }
  bool given() const { return shape.dims > 0; }
  /// Stays at the largest number where the product would exceed it; 0 without dimensions.
  std::int64_t num_elements() const {
    std::int64_t count = shape.dims > 0 ? 1 : 0;
    for (int dim = 0; dim < shape.dims; ++dim) {
      if (__builtin_mul_overflow(count, shape[dim], &count)) return INT64_MAX;
    }
    return count;
  }
  /// Row-major without gaps; strides of extents <= 1 do not matter.
  ANYEP_API bool is_dense() const noexcept;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// A cudaStream_t; null on CPU ranks, where the engine's queue is the stream.
struct StreamRef {
  void* native = nullptr;
};

/// n rows of one rank. A view that is not needed stays empty.
struct Rows {
  TensorView x;       ///< [n, hidden]
  TensorView scales;  ///< [n, num_scales], float32 or int32; any strides in, dense out
  TensorView
      experts;  ///< in: [n, top_k] global ids, int32 or int64, -1 = unused; out: local ids, -1 = hosted elsewhere
  TensorView weights;             ///< [n, top_k] float32; out of dispatch: 0 where experts is -1
  std::vector<TensorView> extra;  ///< [n, any] opaque bytes that travel with the row
};

/// Rows in an engine's window, where peers can write them and gather from them. Moves only; may outlive the engine.
class ANYEP_API OwnedRows {
 public:
  struct State;
  OwnedRows();
  explicit OwnedRows(std::unique_ptr<State> state);
  OwnedRows(OwnedRows&&) noexcept;
  OwnedRows& operator=(OwnedRows&&) noexcept;
  ~OwnedRows();

  /// x, scales and extra lie in the window; experts and weights are ordinary memory of this object.
  const Rows& view() const;
  std::int64_t num_rows() const;
  /// Only the first rows are needed: the views end there. On a GPU what lies behind them goes back to the window at once;
  /// no op that is on its stream may use it. @throws Error kArgument: more than there are
  void keep_front(std::int64_t num_rows);

 private:
  std::unique_ptr<State> state_;
};

/// Input of a high-throughput combine.
struct CombineInput {
  TensorView x;        ///< [num_rows, hidden] bfloat16, float16 or float32; rows beyond the handle's are ignored
  TensorView weights;  ///< [num_rows, any] float32, summed like x; or not given
  std::array<TensorView, 2> bias;  ///< [num_tokens, hidden] of x's type each; or not given
};

/// The packed per-expert form of low latency. S = num_ranks * max_tokens.
struct ExpertSlabs {
  TensorView x;  ///< [local_experts, S, hidden] bfloat16 or float8_e4m3fn
  TensorView
      scales;  ///< FP8: logical [local_experts, S, ceil(hidden/128)] float32, strides (P*S, 1, S): token fastest;
               ///< UE8M0: [local_experts, S, ceil(hidden/512)] int32, likewise
  TensorView counts;  ///< [local_experts] int32: valid leading rows of each expert; the rest is garbage
  TensorView source;  ///< [local_experts, S] int32: token on its source rank
  TensorView range;   ///< [local_experts, num_ranks] int64: (begin << 32) | count of each source's rows
  /// Optional, [num_ranks, max_tokens, top_k] int32: where each choice of each rank's tokens lies, (local expert << 16) | row
  /// of its slab, -1 = not on this rank. Dispatch on GPUs fills it; combine there is a kernel shorter with it than without.
  /// Ranks on CPUs neither write nor read it.
  TensorView rows;
};

/// The four arrays a handle consists of (see handle.h). adopt() takes vectors of any stride: a matrix's column, say.
struct HandleArrays {
  TensorView rows_until;  ///< [num_ranks] int32
  TensorView place;       ///< [num_tokens, num_ranks] int32
  TensorView source;      ///< [num_rows] int32
  TensorView tokens;      ///< [num_ranks] int32
};

/// What a rank's own routing says, without any exchange.
struct Layout {
  std::vector<std::int32_t> tokens_per_rank;   ///< [num_ranks] tokens with at least one expert there, each once
  std::vector<std::int32_t> pairs_per_expert;  ///< [num_experts] (token, choice) pairs
  std::vector<std::uint8_t> token_in_rank;     ///< [num_tokens, num_ranks] 1 = the token goes there
};

/// The same in arrays of the caller, on a GPU.
struct LayoutArrays {
  TensorView tokens_per_rank;   ///< [num_ranks] int32
  TensorView pairs_per_expert;  ///< [num_experts] int32
  TensorView token_in_rank;     ///< [num_tokens, num_ranks] bool
};

}  // namespace anyep
