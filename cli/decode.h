// The decode loop of the main job: two micro-batches in flight, receive hooks, FP8 out and BF16 back.
#pragma once

#include <anyep/engine.h>

#include "cli/job.h"

namespace anyep::cli {

Shape decode_shape(const Job& job);
void run_decode(const Job& job, int rank, Engine& engine, Board& board);

}  // namespace anyep::cli
