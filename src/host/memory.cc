#include "host/memory.h"

#include <anyep/error.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "protocol/word.h"

namespace anyep::host {
namespace {

constexpr const char* kOp = "create";
/// Ends with the kernel's headers of Linux 5.1; older C libraries lack it.
constexpr int kSealFutureWrite = 0x0010;

/// Own memories of this process, for peers that are threads of it.
struct Registry {
  std::mutex mutex;
  std::unordered_map<std::uint64_t, std::weak_ptr<RankMemory>> memories;
  std::uint64_t next_token = 1;
};
Registry& registry() {
  static Registry* const one = new Registry;  // never destroyed: engines may outlive static destruction
  return *one;
}

bootstrap::UniqueFd make_sealed_memfd(const char* name, std::uint64_t bytes) {
  bootstrap::UniqueFd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) core::throw_resource(kOp, "memfd_create", errno, bytes);
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) core::throw_resource(kOp, "ftruncate", errno, bytes);
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) core::throw_resource(kOp, "F_ADD_SEALS", errno);
  return fd;
}

[[noreturn]] void refuse_import(int peer, const std::string& text) {
  Error error(ErrorCode::kCorrupt, fmt::format("{}: rank {} {}", kOp, peer, text));
  error.op = kOp;
  error.peers = {peer};
  throw error;
}

void check_sealed_memfd(int fd, std::uint64_t bytes, int peer) {
  struct stat info {};
  const int seals = ::fcntl(fd, F_GET_SEALS);
  const bool whole = ::fstat(fd, &info) == 0 && static_cast<std::uint64_t>(info.st_size) == bytes;
  if (whole && seals >= 0 && (seals & F_SEAL_SHRINK) != 0 && (seals & F_SEAL_GROW) != 0) return;
  refuse_import(peer, fmt::format("sent a descriptor that is no sealed memfd of {} bytes (size {}, seals {:#x})", bytes,
                                  static_cast<std::int64_t>(info.st_size), seals));
}

/// Rings start with `kRegions` turns granted; the dispatch stream is granted when an op starts.
void format(const RankMemory& memory, const core::WindowLayout& layout, int rank, std::uint16_t generation) {
  auto* const header = reinterpret_cast<core::WindowHeader*>(memory.at(layout.header));
  *header = {core::kWindowMagic,
             core::kWindowVersion,
             static_cast<std::uint32_t>(layout.num_ranks),
             static_cast<std::uint32_t>(rank),
             generation,
             layout.bytes};
  std::uint32_t granted = protocol::kFirstEpoch;
  for (std::uint32_t turn = 0; turn < core::kRegions; ++turn) granted = protocol::next_epoch(granted);
  for (const int stream : {core::kStreamLists, core::kStreamCombine}) {
    for (int peer = 0; peer < layout.num_ranks; ++peer) {
      auto* const word = reinterpret_cast<std::uint64_t*>(memory.at(layout.word(layout.credit[stream], peer)));
      *word = protocol::make_mark(generation, granted, protocol::make_code(static_cast<unsigned>(stream), 0));
    }
  }
}

std::uint64_t read_number(const char* path) {
  std::ifstream file(path);
  std::string text;
  file >> text;
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos) return UINT64_MAX;
  return std::strtoull(text.c_str(), nullptr, 10);
}

}  // namespace

Mapping Mapping::map(int fd, std::uint64_t bytes, Access access) {
  Mapping mapping;
  if (bytes == 0) return mapping;
  const int protection = access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* const data = ::mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) core::throw_resource(kOp, "mmap", errno, bytes);
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.bytes_ = bytes;
  return mapping;
}

Mapping Mapping::reserve(std::uint64_t bytes) {
  Mapping mapping;
  if (bytes == 0) return mapping;
  void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) core::throw_resource(kOp, "mmap", errno, bytes);
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.bytes_ = bytes;
  return mapping;
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

Heap::Heap(std::uint64_t offset, std::uint64_t bytes) {
  if (bytes > 0) free_.emplace(offset, bytes);
}

std::optional<std::uint64_t> Heap::allocate(std::uint64_t bytes) {
  const std::uint64_t wanted = core::round_up(std::max<std::uint64_t>(bytes, 1), core::kArrayAlignment);
  const std::lock_guard lock(mutex_);
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    const auto [offset, free_bytes] = *range;
    if (free_bytes < wanted) continue;
    free_.erase(range);
    if (free_bytes > wanted) free_.emplace(offset + wanted, free_bytes - wanted);
    used_.emplace(offset, wanted);
    return offset;
  }
  return std::nullopt;
}

void Heap::release(std::uint64_t offset) {
  const std::lock_guard lock(mutex_);
  const auto used = used_.find(offset);
  if (used == used_.end()) return;
  std::uint64_t begin = offset, end = offset + used->second;
  used_.erase(used);
  const auto after = free_.lower_bound(begin);
  if (after != free_.end() && after->first == end) end += after->second;
  auto before = after;
  const bool joins_before = before != free_.begin() && (--before)->first + before->second == begin;
  if (joins_before) begin = before->first;
  if (after != free_.end() && after->first < end) free_.erase(after);
  free_[begin] = end - begin;
}

std::uint64_t Heap::largest_free() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t largest = 0;
  for (const auto& [offset, bytes] : free_) largest = std::max(largest, bytes);
  return largest;
}

std::shared_ptr<RankMemory> make_memory(const core::WindowLayout& layout, int rank, std::uint16_t generation) {
  auto memory = std::make_shared<RankMemory>();
  memory->window_fd = make_sealed_memfd("anyep-window", layout.bytes);
  memory->window = Mapping::map(memory->window_fd.get(), layout.bytes, Mapping::Access::kReadWrite);
  // One page at least, so that an engine without high throughput has a descriptor to send too.
  const std::uint64_t staging_bytes = std::max(layout.staging_bytes(), core::kPageBytes);
  memory->staging_fd = make_sealed_memfd("anyep-staging", staging_bytes);
  memory->staging = Mapping::map(memory->staging_fd.get(), staging_bytes, Mapping::Access::kReadWrite);
  // Later mappings are read-only from here on; a kernel older than 5.1 refuses the seal and peers map read-only anyway.
  (void)::fcntl(memory->staging_fd.get(), F_ADD_SEALS, kSealFutureWrite);
  memory->heap = std::make_unique<Heap>(layout.heap, layout.heap_bytes);
  format(*memory, layout, rank, generation);

  Registry& known = registry();
  const std::lock_guard lock(known.mutex);
  memory->token = known.next_token++;
  std::erase_if(known.memories, [](const auto& entry) { return entry.second.expired(); });
  known.memories[memory->token] = memory;
  return memory;
}

std::shared_ptr<RankMemory> map_memory(const core::WindowLayout& layout, int peer, std::uint16_t generation,
                                       int window_fd, int staging_fd) {
  const std::uint64_t staging_bytes = std::max(layout.staging_bytes(), core::kPageBytes);
  check_sealed_memfd(window_fd, layout.bytes, peer);
  check_sealed_memfd(staging_fd, staging_bytes, peer);
  auto memory = std::make_shared<RankMemory>();
  memory->window = Mapping::map(window_fd, layout.bytes, Mapping::Access::kReadWrite);
  memory->staging = Mapping::map(staging_fd, staging_bytes, Mapping::Access::kRead);
  const auto header = *reinterpret_cast<const core::WindowHeader*>(memory->at(layout.header));
  const bool right = header.magic == core::kWindowMagic && header.version == core::kWindowVersion &&
                     header.num_ranks == static_cast<std::uint32_t>(layout.num_ranks) &&
                     header.rank == static_cast<std::uint32_t>(peer) && header.generation == generation &&
                     header.bytes == layout.bytes;
  if (!right) {
    refuse_import(peer, fmt::format("has a wrong header in its window (magic {:#x}, version {}, rank {} of {}, "
                                    "generation {}, {} bytes)",
                                    header.magic, header.version, header.rank, header.num_ranks, header.generation,
                                    header.bytes));
  }
  return memory;
}

std::shared_ptr<RankMemory> find_memory(std::uint64_t token) {
  Registry& known = registry();
  const std::lock_guard lock(known.mutex);
  const auto found = known.memories.find(token);
  return found == known.memories.end() ? nullptr : found->second.lock();
}

std::uint64_t available_in(std::istream& meminfo) {
  for (std::string name, unit; meminfo >> name;) {
    std::uint64_t kib = 0;
    meminfo >> kib;
    std::getline(meminfo, unit);
    if (name == "MemAvailable:" && kib != 0) return kib * 1024;
  }
  return UINT64_MAX;
}

std::uint64_t available_memory_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  const std::uint64_t available = available_in(meminfo);
  const std::uint64_t limit = read_number("/sys/fs/cgroup/memory.max");
  const std::uint64_t used = read_number("/sys/fs/cgroup/memory.current");
  if (limit == UINT64_MAX || used == UINT64_MAX) return available;
  // The page cache counts as used and is given back when memory is asked for.
  std::uint64_t cache = 0;
  std::ifstream statistics("/sys/fs/cgroup/memory.stat");
  for (std::string name; statistics >> name;) {
    std::uint64_t bytes = 0;
    statistics >> bytes;
    if (name == "inactive_file" || name == "active_file") cache += bytes;
  }
  const std::uint64_t held = used - std::min(used, cache);
  return std::min(available, limit > held ? limit - held : 0);
}

}  // namespace anyep::host
