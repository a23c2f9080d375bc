#include "bench/support/machine.h"

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <fstream>
#include <sstream>

namespace anyep::bench {
namespace {

/// The text after the colon of the first line that starts with `key`.
std::string value_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, key.size(), key) != 0) continue;
    const std::size_t first = line.find_first_not_of(" \t", colon + 1);
    return first == std::string::npos ? std::string() : line.substr(first);
  }
  return {};
}

std::int64_t kilobytes_of(const char* path, const std::string& key) {
  std::istringstream text(value_of(path, key));
  std::int64_t value = 0;
  return text >> value ? value * 1024 : 0;
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

/// From the kernel: on virtual machines the C library counts caches that belong to others.
std::int64_t last_cache() {
  std::int64_t bytes = 0;
  for (int index = 0;; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    std::int64_t value = 0;
    char unit = 0;
    if (!(file >> value)) return bytes;
    file >> unit;
    bytes = std::max(bytes, unit == 'M' ? value << 20 : unit == 'K' ? value << 10 : value);
  }
}

}  // namespace

Machine this_machine() {
  Machine machine;
  machine.cpu_model = value_of("/proc/cpuinfo", "model name");
  if (machine.cpu_model.empty()) machine.cpu_model = "unknown";
  machine.cores = usable_cores();
  utsname name{};
  if (uname(&name) == 0) machine.kernel = std::string(name.sysname) + " " + name.release;
  machine.memory_bytes = kilobytes_of("/proc/meminfo", "MemTotal");
  machine.memory_free_bytes = kilobytes_of("/proc/meminfo", "MemAvailable");
  machine.last_cache_bytes = last_cache();
  return machine;
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[16];
  std::strftime(text, sizeof text, "%Y-%m-%d", &parts);
  return text;
}

}  // namespace anyep::bench
