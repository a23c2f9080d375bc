// What route() learned: where each token goes, and what this rank receives.
#pragma once

#include <anyep/types.h>

#include <cstdint>
#include <memory>
#include <span>

namespace anyep {

/// Where this rank's tokens go.
struct Routing {
  TensorView experts;           ///< [num_tokens, top_k] int32 or int64 global experts, -1 = unused; or not given
  TensorView ranks;             ///< [num_tokens, num_ranks] bool: where a token goes; not given = derived from experts
  TensorView pairs_per_expert;  ///< [num_experts] int32, this rank's (token, choice) pairs; not given = counted
  TensorView weights;           ///< [num_tokens, top_k] float32, or not given
};

/// Serves any number of calls, at any later time, in any order, also in another engine of the same group size and rank.
/// Values and shapes only. Moves only.
class ANYEP_API Handle {
 public:
  struct State;
  Handle();
  explicit Handle(std::shared_ptr<State> state);
  Handle(Handle&&) noexcept;
  Handle& operator=(Handle&&) noexcept;
  ~Handle();

  /// From arrays that a caller kept; copies them. @throws Error kArgument: malformed or inconsistent arrays.
  static Handle adopt(int num_ranks, int rank, const HandleArrays&);

  std::int64_t num_rows() const;     ///< rows this rank receives; the host waits for the counts, kTimeout says for whom
  bool has_counts() const noexcept;  ///< num_rows() would not wait
  std::int64_t num_tokens() const;   ///< of this rank; never waits
  int num_ranks() const;
  int rank() const;
  /// Pairs received per local expert; waits likewise. Empty for an adopted handle.
  std::span<const std::int64_t> pairs_per_expert() const;
  /// The same, each rounded up to `alignment` >= 1.
  std::vector<std::int64_t> aligned_pairs_per_expert(std::int64_t alignment) const;

  // On a GPU these lie in its memory and live as long as the handle; the host does not wait: what fills them may still be on
  // the stream.
  TensorView rows_until() const;  ///< int32 [num_ranks]: rows received from ranks 0..s, inclusive; waits
  TensorView place() const;       ///< int32 [num_tokens, num_ranks]: row at that rank, -1 = not sent there; waits
  /// int32 [num_rows]: token on its source rank; waits. On a GPU it arrives with the rows and has as many entries as the
  /// dispatch had room for. @throws Error kState there before the first dispatch
  TensorView source() const;
  TensorView tokens() const;  ///< int32 [num_ranks]: every source's number of tokens; waits

 private:
  friend class Engine;
  std::shared_ptr<State> state_;
};

}  // namespace anyep
