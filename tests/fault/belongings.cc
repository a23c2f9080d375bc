#include "fault/belongings.h"

#include <fmt/format.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

namespace anyep::test {
namespace {

namespace fs = std::filesystem;

}  // namespace

Belongings Belongings::now() {
  Belongings all;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd", none)) {
    ++all.descriptors;
    all.list += fmt::format("{} -> {}\n", entry.path().filename().string(), fs::read_symlink(entry, none).string());
  }
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator("/proc/self/task", none)) ++all.threads;
  for (const auto& entry : fs::directory_iterator(fs::temp_directory_path(), none)) {
    all.names += entry.path().filename().string().starts_with("anyep-") ? 1 : 0;
  }
  std::ifstream maps("/proc/self/maps");
  std::size_t bytes = 0;
  for (std::string line; std::getline(maps, line);) {
    const std::size_t dash = line.find('-'), space = line.find(' ');
    bytes += std::stoull(line.substr(dash + 1, space - dash - 1), nullptr, 16) -
             std::stoull(line.substr(0, dash), nullptr, 16);
    if (line.size() <= space + 4 || line[space + 4] != 's') continue;
    ++all.mappings;
    all.list += line + '\n';
  }
  all.address_space_mib = bytes >> 20;
  return all;
}

Belongings Belongings::settled(const Belongings& expected) {
  Belongings all = now();
  for (int tries = 0; tries < 200 && all.threads > expected.threads; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    all = now();
  }
  return all;
}

std::string Belongings::more_than(const Belongings& before) const {
  std::string text;
  const auto compare = [&](const char* what, std::size_t then, std::size_t later, std::size_t tolerance) {
    if (later > then + tolerance) text += fmt::format("{}: {} before, {} now\n", what, then, later);
  };
  compare("descriptors", before.descriptors, descriptors, 0);
  compare("shared mappings", before.mappings, mappings, 0);
  compare("threads", before.threads, threads, 0);
  compare("names in the temporary folder", before.names, names, 0);
  // Arenas of the allocator come and go, 64 MiB of address space each and one per thread that allocates at once.
  compare("MiB of address space", before.address_space_mib, address_space_mib, 1024);
  return text.empty() ? text : text + "now:\n" + list + "before:\n" + before.list;
}

}  // namespace anyep::test
