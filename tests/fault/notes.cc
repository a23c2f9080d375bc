#include "fault/notes.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <random>
#include <stdexcept>
#include <string_view>

#include "core/env.h"
#include "core/fault_point.h"

namespace anyep::test {
namespace {

template <std::size_t kBytes>
void copy_text(char (&to)[kBytes], std::string_view text) {
  const std::size_t length = std::min(text.size(), kBytes - 1);
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}

std::atomic<const Notes*> noted = nullptr;

}  // namespace

std::int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

void Note::put(const Error& error) {
  if (error_ns != 0) return;
  error_ns = now_ns();
  code = static_cast<std::int32_t>(error.code);
  for (const int peer : error.peers) peers |= std::uint64_t{1} << peer;
  elapsed_ns = static_cast<std::int64_t>(error.elapsed_ns);
  copy_text(op, error.op);
  copy_text(phase, error.phase);
  copy_text(text, error.what());
}

std::string Note::describe() const {
  if (error_ns == 0) return "no error";
  return fmt::format("{} op '{}' phase '{}' peers {:#x}: {}", name_of(static_cast<ErrorCode>(code)), op, phase, peers,
                     text);
}

Notes::Notes() {
  void* const memory = ::mmap(nullptr, sizeof *notes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no shared memory");
  notes_ = new (memory) std::array<Note, kMaxRanks>;
}

Notes::~Notes() {
  ::munmap(notes_, sizeof *notes_);
}

void note_points(const Notes& notes) {
  noted = &notes;
  if constexpr (core::kFaultPoints) {
    core::set_fault_hook([](const char*, int rank, std::uint64_t) {
      const Notes* const to = noted;
      if (to != nullptr && rank >= 0 && rank < Notes::kMaxRanks) (*to)[rank].fault_ns = now_ns();
    });
  }
}

std::string Times::describe() const {
  if (all_.empty()) return "none";
  std::vector<std::int64_t> sorted = all_;
  std::ranges::sort(sorted);
  return fmt::format("median {:.2f} ms, max {:.2f} ms, n = {}", static_cast<double>(sorted[sorted.size() / 2]) * 1e-6,
                     static_cast<double>(sorted.back()) * 1e-6, sorted.size());
}

std::int64_t Times::max() const {
  return all_.empty() ? 0 : *std::ranges::max_element(all_);
}

std::int64_t scaled_ns(double seconds) {
  return static_cast<std::int64_t>(seconds * 1e9 * core::env_factor("ANYEP_TIME_SCALE").value_or(1.0));
}

void end_after(double seconds) {
  ::alarm(static_cast<unsigned>(std::ceil(static_cast<double>(scaled_ns(seconds)) * 1e-9)));
}

int times_soak(int long_form) {
  const auto soak = core::env_factor("ANYEP_SOAK");
  return soak ? static_cast<int>(long_form * *soak) : 1;
}

std::uint64_t seed_of_test() {
  const auto wanted = core::env_integer("ANYEP_SEED");
  const std::uint64_t seed = wanted                           ? static_cast<std::uint64_t>(*wanted)
                             : core::env_factor("ANYEP_SOAK") ? std::random_device()()
                                                              : 1;
  fmt::print("seed {} (ANYEP_SEED)\n", seed);
  return seed;
}

}  // namespace anyep::test
