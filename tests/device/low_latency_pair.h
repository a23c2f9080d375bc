// A random pair of low-latency ops: what it is, in a line of text too.
#pragma once

#include <anyep/config.h>
#include <anyep/types.h>

#include <cstdio>
#include <string>
#include <vector>

namespace anyep::test {

/// How one op of a pair runs.
struct Options {
  Wire wire = Wire::kBF16;
  bool round_scale = false, hook = false, exact = false, early = false;
  bool find_rows = false;  ///< combine: without dispatch's table
  bool far_slabs = false;  ///< combine: experts' slabs more than 64 GiB apart, where a rank has but one
  int num_sms = 0;
};

/// One pair: inputs and outputs of all ranks. Memory is given by an Arena and reused.
struct Pair {
  Shape shape;
  std::vector<int> tokens;
  bool wide_ids = true;
  Options dispatch, combine;
};

inline std::string text_of(const Pair& p) {
  char text[160];
  std::snprintf(text, sizeof text,
                "E %d K %d hidden %lld M %lld wire %d/%d hook %d/%d exact %d far %d early %d/%d sms %d/%d T",
                p.shape.num_experts, p.shape.top_k, static_cast<long long>(p.shape.hidden),
                static_cast<long long>(p.shape.max_tokens), static_cast<int>(p.dispatch.wire),
                static_cast<int>(p.combine.wire), p.dispatch.hook, p.combine.hook, p.combine.exact, p.combine.far_slabs,
                p.dispatch.early, p.combine.early, p.dispatch.num_sms, p.combine.num_sms);
  std::string all = text;
  for (const int tokens : p.tokens) (all += ' ') += std::to_string(tokens);
  return all;
}

}  // namespace anyep::test
