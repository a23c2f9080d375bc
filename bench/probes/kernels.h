// Traffic of expert parallelism without its protocol: places are known beforehand, nobody waits for a peer. What a whole
// operation is compared with. METRICS.md says how.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace anyep::bench::probes {

inline constexpr int kMaxRanks = 8;

/// The same block of every rank, as this rank reaches it.
struct Peers {
  std::byte* base[kMaxRanks] = {};
};

/// How rows are shared out among warps: drawn one step ahead from a counter, or at equal distances.
enum class Order : std::uint8_t { kTickets, kStrides };

/// Where a rank's tokens go, in the form that an operation's handle has: row [token][rank] counts from the first row of
/// the token's range at that rank, before [range][rank]; -1 = nowhere.
struct Places {
  static constexpr int kRanges = 16;
  const std::int32_t *row = nullptr, *before = nullptr;
  int num_tokens = 0, tokens_per_range = 1, num_ranks = 1, rank = 0;
};

/// Device words of one rank, zero at the start; a launch leaves them so.
struct Counters {
  std::uint32_t ticket, finished;
};

/// Each token's row is loaded once and stored to its place at every rank that it goes to, its own included.
struct Push {
  Places places;
  const std::byte* x = nullptr;
  Peers out;
  int row_bytes = 0;  ///< a multiple of 16
  Counters* counters = nullptr;
};
void push(const Push& push, Order order, int sms, cudaStream_t stream);

/// Each token's rows are fetched from the ranks that it went to, added in float32 by ascending rank and written once, as
/// bfloat16.
struct Gather {
  Places places;
  Peers in;
  std::byte* out = nullptr;
  int row_bytes = 0;
  int segment_bytes = 0;  ///< what a warp handles at a time; set by gather()
  Counters* counters = nullptr;
};
void gather(Gather gather, Order order, int sms, cudaStream_t stream);

/// Rows to (or from) all other ranks in turn, nothing else: what the links carry.
struct Copy {
  Peers from, to;
  int rank = 0, num_ranks = 1;
  int num_rows = 0, row_bytes = 0;
};
enum class Direction : std::uint8_t { kPush, kPull };
void copy(const Copy& copy, Direction direction, int sms, cudaStream_t stream);

/// One step of decoding without its work: rows by ordinary stores to every other rank, then a flag to each and a wait for
/// each one's.
struct Step {
  static constexpr int kMostRows = 512, kThreads = 512;
  /// Of all ranks on a GPU: two an SM of Hopper, which registers leave room for whatever the form. All wait for each other.
  static constexpr int kMostBlocks = 256;
  Peers base;
  std::size_t flags_at = 0;  ///< of every rank's block: [block][rank] words
  std::size_t data_at = 0;   ///< likewise: [rank][kMostRows] rows
  const std::byte* x = nullptr;
  std::uint32_t* epoch = nullptr;   ///< [block], of this rank
  std::uint32_t* failed = nullptr;  ///< becomes 1 when a peer has not come for seconds
  int rank = 0, num_ranks = 1;
  int num_rows = 0, row_bytes = 0;
};
/// Two ways to write the same: see step.cu.
enum class StepForm : std::uint8_t { kCopied, kTight };
void step(const Step& step, StepForm form, int blocks, cudaStream_t stream);
void empty_step(cudaStream_t stream);

// ---- contents ----

/// Normal bfloat16 numbers, or random bytes where `bits`; a function of (seed, index).
void fill(std::byte* to, std::size_t bytes, std::uint64_t seed, bool bits, cudaStream_t stream);
/// Counts 4-byte words of received rows that differ from what fill() gave their source: row i came from rank source[i] and
/// is that rank's row token[i].
struct RowCheck {
  const std::byte* rows = nullptr;
  const std::int32_t *source = nullptr, *token = nullptr;
  int num_rows = 0, row_bytes = 0;
  std::uint64_t seed = 0;  ///< of rank 0; rank r filled with seed + r
  bool bits = false;
  unsigned long long* wrong = nullptr;
};
void count_wrong_rows(const RowCheck& check, cudaStream_t stream);
/// Counts elements of a gather's sums that differ from those of rows filled with seed + rank.
void count_wrong_sums(const Gather& gather, std::uint64_t seed, unsigned long long* wrong, cudaStream_t stream);

// ---- company ----

/// Sums = A x B, matrices of edge x edge bfloat16, B by columns, sums in float32; edge a multiple of 128.
struct Product {
  const std::byte *a = nullptr, *b = nullptr;
  float* sums = nullptr;
  int edge = 0;
};
void multiply_matrices(const Product& product, cudaStream_t stream);

}  // namespace anyep::bench::probes
