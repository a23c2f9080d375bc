// What `anyep doctor` finds out about the machine: one probe per need of the library.
#pragma once

#include <string>
#include <vector>

namespace anyep::cli {

enum class Verdict {
  kUsed,     ///< there, and used
  kFine,     ///< a fact, nothing to do about it
  kWarning,  ///< works, but slower or with less safety; `advice` says what helps
  kMissing,  ///< not there; `advice` says what that costs
};

struct Finding {
  std::string topic;
  Verdict verdict = Verdict::kFine;
  std::string found;
  std::string advice;
};

/// Everything about this machine but its GPUs.
std::vector<Finding> probe_machine();
/// The GPUs that this process sees, how they reach each other, and what ranks on them would use. Starts no context.
std::vector<Finding> probe_gpus();
/// Every variable of ours: its value or default, and what is wrong with it.
std::vector<Finding> probe_environment();

}  // namespace anyep::cli
