// The main job: text through gate, dispatch, experts and combine on every rank, checked element by element.
#pragma once

#include <anyep/workload.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cli/experts.h"
#include "cli/team.h"

namespace anyep::cli {

/// What the ranks measure, one series each. Times are microseconds of one call on one rank.
enum Series : int {
  // High throughput, per chunk.
  kPrepare,
  kRoute,
  kDispatch,
  kExperts,
  kCombine,
  kOwnRows,
  kSentRows,
  kReceivedRows,
  // Decode, per step of two micro-batches.
  kDispatchSend,
  kDispatchReceive,
  kDecodeExperts,
  kCombineSend,
  kCombineReceive,
  kDecodeStep,
  kDecodeWireRows,
  // The rest.
  kMemcpy,
  kStreaming,
  kPairs,     ///< (token, choice) pairs that this rank's experts worked on
  kCompared,  ///< elements compared
  kWrong,     ///< elements that differ
  kNumSeries,
};

struct JobOptions {
  TeamOptions team;
  workload::ModelPreset model;
  std::uint64_t seed = 1;
  std::int64_t tokens = 0;        ///< of all ranks: words that pass through high throughput
  std::int64_t chunk_tokens = 0;  ///< tokens per rank and call
  int decode_steps = 0;
  std::int64_t decode_tokens = 0;                    ///< per rank and micro-batch
  std::int64_t copy_bytes = std::int64_t{64} << 20;  ///< per copy of the memory-copy ceiling
  bool show_progress = true;
};

/// Made before the ranks start; forked ranks share the pages.
struct Job {
  JobOptions options;
  workload::TextWorkload text;
  Experts experts;

  Job(JobOptions job_options, workload::TextWorkload job_text);
  std::int64_t num_chunks() const;
  /// How many tokens each rank takes of chunk `chunk`.
  std::vector<std::int64_t> tokens_of_chunk(std::int64_t chunk) const;
  std::int64_t first_token(std::int64_t chunk) const;
  /// What the gate did with all tokens of high throughput.
  workload::Statistics routing() const;
};

/// Runs on every rank; fills `board` with kNumSeries series. One line per rank that failed.
std::vector<std::string> run_job(const Job& job, Board& board);

}  // namespace anyep::cli
