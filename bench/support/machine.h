// What a record says about the machine that it was measured on.
#pragma once

#include <cstdint>
#include <string>

namespace anyep::bench {

struct Machine {
  std::string cpu_model;               ///< "AMD EPYC", from /proc/cpuinfo; "unknown" where it does not say
  int cores = 1;                       ///< that this process may use
  std::string kernel;                  ///< "Linux 6.1.0"
  std::int64_t memory_bytes = 0;       ///< MemTotal
  std::int64_t memory_free_bytes = 0;  ///< MemAvailable
  std::int64_t last_cache_bytes = 0;   ///< of the last level that this processor sees, 0 = unknown
  // Where GPU ranks were measured; else empty.
  std::string gpu;     ///< "NVIDIA H100 80GB HBM3"
  int gpus = 0;        ///< used
  std::string driver;  ///< "580.95.05"
  std::string cuda;    ///< of the driver: "13.0"
};

Machine this_machine();
/// "2026-11-25", UTC.
std::string today();

}  // namespace anyep::bench
