// What an engine owns, what a call asks, and how an operation is tuned.
#pragma once

#include <anyep/event.h>
#include <anyep/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace anyep {

enum class Mode : std::uint8_t { kHighThroughput, kLowLatency };
enum class Op : std::uint8_t { kRoute, kDispatch, kCombine, kLowLatencyDispatch, kLowLatencyCombine, kBarrier };
/// "route", "dispatch", ...
ANYEP_API const char* name_of(Op op) noexcept;

/// How low-latency rows travel. Dispatch: kBF16, kFP8, kUE8M0 (FP8 whose scales are powers of two, packed as bytes).
/// Combine: kBF16, kLogFMT (10 bits; specification 10.4).
enum class Wire : std::uint8_t { kBF16, kFP8, kUE8M0, kLogFMT };

/// What an engine owns; equal on every rank, else create() throws kMismatch. Address space, backed when it is touched.
struct Budget {
  std::int64_t rows_bytes = 0;         ///< high throughput: window memory for rows and slots; never a limit on tokens
  std::int64_t low_latency_bytes = 0;  ///< low latency: memory for the regions; a call beyond it is kCapacity
  int max_experts = 1024;              ///< sizes the count words
  bool masks = false;                  ///< low latency may mask a silent peer and go on
};

/// What one call asks; may change from call to call; ranks that differ get kMismatch, all of them.
struct Shape {
  int num_experts = 0;          ///< global; ranks host contiguous blocks whose sizes differ by at most one
  int top_k = 0;                ///< 1..32
  std::int64_t hidden = 0;      ///< elements per row; row bytes a multiple of 16
  std::int64_t max_tokens = 0;  ///< low latency: most tokens one rank brings; a rank may bring fewer, or none
  DType dtype = DType::kBF16;   ///< element type of the rows
  int num_scales = 0;           ///< high throughput: 4-byte scale columns per row
};

/// Limits and switches of an engine. Zero or negative limits are kArgument.
struct ANYEP_API Tuning {
  std::chrono::nanoseconds timeout = std::chrono::seconds(30);  ///< per op; ANYEP_TIMEOUT_S
  std::chrono::nanoseconds startup_timeout =
      std::chrono::seconds(600);  ///< create and first op, not captured; ANYEP_STARTUP_TIMEOUT_S
  std::chrono::nanoseconds close_timeout = std::chrono::seconds(5);  ///< ANYEP_CLOSE_TIMEOUT_S
  double time_scale = 1.0;     ///< multiplies every limit, for sanitizers; ANYEP_TIME_SCALE
  bool checked = false;        ///< digests, id checks, poison and red zones on every op; ANYEP_CHECK
  bool exact_combine = false;  ///< low-latency combine rounds once; rows travel per choice; ANYEP_COMBINE=exact
  /// The defaults, changed by ANYEP_* variables. @throws Error kArgument on garbage, naming variable and text.
  static Tuning from_environment();
};

/// The last argument of every op.
struct Options {
  std::optional<std::chrono::nanoseconds> timeout;  ///< of this op; default Tuning::timeout
  int num_sms = 0;                                  ///< most SMs (threads on CPU ranks); 0 = the plan chooses
  std::vector<Event> after;                         ///< awaited by the queue or stream, not by the caller
  bool wait = false;                                ///< return when done; throws what went wrong
};

struct LowLatencyOptions : Options {
  bool hook = false;         ///< return when data is on its way; Pending::receive() does the rest
  bool round_scale = false;  ///< FP8 scales are powers of two; implied by Wire::kUE8M0
  bool zero_copy = false;    ///< combine: the rows lie in combine_buffer(); `in.x.data` is ignored
  Wire wire = Wire::kBF16;
  TensorView received;  ///< [local_experts] int32: received rows are added (dispatch)
  TensorView waited;    ///< [num_ranks] int64: nanoseconds waited for each source are added
};

/// Where the library's log lines go. Levels: 0 debug, 1 info, 2 warning, 3 error. Silent until a callback is set.
using LogCallback = std::function<void(int level, std::string_view line)>;
/// Process-wide; an empty callback silences. ANYEP_LOG sets the least level that reaches the callback (default: warning).
ANYEP_API void set_log_callback(LogCallback callback);

/// "0.1.0+<git revision>".
ANYEP_API const char* version() noexcept;

/// DeepEP V1's size hints, to the byte (specification 4.3, 4.5). @throws Error kArgument when 64 bits overflow.
namespace v1 {
struct Config {
  int num_sms = 20, nvl_send = 6, nvl_recv = 256, rdma_send = 6, rdma_recv = 256;
};
/// Checks the five numbers and rounds rdma_recv up to a multiple of rdma_send. @throws Error kArgument.
ANYEP_API Config make_config(int num_sms, int nvl_send, int nvl_recv, int rdma_send, int rdma_recv);
/// V1's default tables; an unlisted number of ranks takes the entry of the largest listed one below it.
ANYEP_API Config dispatch_config(int num_ranks, int num_sms = 20);
ANYEP_API Config combine_config(int num_ranks, int num_sms = 20);
ANYEP_API std::int64_t nvl_size_hint(const Config&, std::int64_t hidden_bytes, int num_ranks, int topk_idx_bytes = 8);
ANYEP_API std::int64_t rdma_size_hint(const Config&, std::int64_t hidden_bytes, int num_ranks, int topk_idx_bytes = 8);
ANYEP_API std::int64_t low_latency_size_hint(std::int64_t max_tokens, std::int64_t hidden, int num_ranks,
                                             std::int64_t num_experts);
}  // namespace v1

}  // namespace anyep
