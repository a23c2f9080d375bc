#include "bootstrap/board.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>
#include <memory>

#include "core/check.h"

namespace anyep::bootstrap {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

constexpr std::uint64_t pack(std::uint64_t high, std::uint64_t low) {
  return high << 32 | (low & 0xffffffffU);
}
constexpr std::uint32_t high(std::uint64_t word) {
  return static_cast<std::uint32_t>(word >> 32);
}
constexpr std::uint32_t low(std::uint64_t word) {
  return static_cast<std::uint32_t>(word);
}
std::uint64_t mark_of(Turn turn) {
  return pack(turn.attempt, turn.round);
}

}  // namespace

Board::Board(int num_ranks) : num_ranks_(num_ranks) {
  void* const memory =
      ::mmap(nullptr, mapped_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) core::throw_resource("bootstrap", "mmap of shared memory", errno, mapped_bytes());
  // Not initialised word by word: fresh pages are zero, and touching them would make every slot resident.
  shared_ = static_cast<Shared*>(memory);
  slots_ = reinterpret_cast<Slot*>(static_cast<std::byte*>(memory) + sizeof(Shared));
}

Board::~Board() {
  ::munmap(shared_, mapped_bytes());
}

std::size_t Board::mapped_bytes() const noexcept {
  return sizeof(Shared) + static_cast<std::size_t>(num_ranks_) * sizeof(Slot);
}

bool Board::claim(int rank, pid_t* other) noexcept {
  Slot& mine = slot(rank);
  const ProcessId self = ProcessId::of_this_process();
  std::uint64_t seen = mine.claim.load(kAcquire);
  while (true) {
    const auto holder = static_cast<pid_t>(high(seen));
    std::uint32_t count = 1;
    if (seen != 0 && holder == self.pid) {
      count = low(seen) + 1;
    } else if (seen != 0) {
      ProcessId last = process(rank);
      if (last.pid != holder) last = {holder, 0};  // another one since `seen`
      UniqueFd pidfd;
      if (look_up(last, pidfd) != Life::kDead) {
        *other = holder;
        return false;
      }
    }
    if (mine.claim.compare_exchange_weak(seen, pack(static_cast<std::uint64_t>(self.pid), count))) break;
  }
  mine.pid.store(0, kRelaxed);  // so that nobody pairs the pid of one process with the start of another
  mine.start.store(self.start_ticks, kRelease);
  mine.pid.store(static_cast<std::uint64_t>(self.pid), kRelease);
  return true;
}

void Board::give_back(int rank) noexcept {
  Slot& mine = slot(rank);
  std::uint64_t seen = mine.claim.load(kAcquire);
  const auto self = static_cast<std::uint64_t>(::getpid());
  while (high(seen) == self) {
    if (mine.claim.compare_exchange_weak(seen, low(seen) <= 1 ? 0 : seen - 1)) return;
  }
}

ProcessId Board::process(int rank) const noexcept {
  const Slot& other = slot(rank);
  const std::uint64_t pid = other.pid.load(kAcquire);
  const std::uint64_t start = other.start.load(kAcquire);
  const std::uint64_t holder = high(other.claim.load(kAcquire));
  if (holder != 0 && holder != pid) return {static_cast<pid_t>(holder), 0};  // claimed a moment ago, not signed yet
  if (other.pid.load(kRelaxed) != pid) return {};
  return {static_cast<pid_t>(pid), start};
}

bool Board::is_claimed_by(int rank, pid_t pid) const noexcept {
  return high(slot(rank).claim.load(kAcquire)) == static_cast<std::uint32_t>(pid);
}

void Board::report_conflict(int rank, pid_t second) noexcept {
  const std::uint64_t spoilt = last_attempt(rank) + 1U;
  slot(rank).conflict.store(pack(spoilt, static_cast<std::uint64_t>(second)), kRelease);
  ring();
}

pid_t Board::conflict(int rank, std::uint32_t attempt) const noexcept {
  const std::uint64_t word = slot(rank).conflict.load(kAcquire);
  return high(word) >= attempt ? static_cast<pid_t>(low(word)) : 0;
}

std::uint32_t Board::last_attempt(int rank) const noexcept {
  return static_cast<std::uint32_t>(slot(rank).attempt.load(kRelaxed));
}

void Board::begin_attempt(int rank, std::uint32_t attempt) noexcept {
  slot(rank).attempt.store(attempt, kRelaxed);
}

void Board::post(int rank, std::uint64_t group, Turn turn, std::uint64_t size,
                 std::span<const std::byte> chunk) noexcept {
  Lane& lane = lane_of(slot(rank), group);
  const std::uint64_t number = lane.posted.load(kRelaxed);
  lane.posted.store(number + 1, kRelaxed);
  Post& post = lane.posts[number % 2];
  // Release from here on: whoever sees one of the new values also sees that the old mark is gone.
  post.mark.store(0, kRelaxed);
  post.group.store(group, kRelease);
  post.size.store(size, kRelease);
  for (std::size_t from = 0; from < chunk.size(); from += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, chunk.data() + from, std::min(sizeof word, chunk.size() - from));
    post.at[from / sizeof word].store(word, kRelease);
  }
  post.mark.store(mark_of(turn), kRelease);
  ring();
}

Board::Lane& Board::lane_of(Slot& slot, std::uint64_t group) noexcept {
  const std::uint64_t number = slot.num_posts.load(kRelaxed) + 1;
  slot.num_posts.store(number, kRelaxed);
  auto lane = std::ranges::find_if(slot.lanes, [&](const Lane& one) { return one.group.load(kRelaxed) == group; });
  if (lane == slot.lanes.end()) {
    lane = std::ranges::min_element(slot.lanes, {}, [](const Lane& one) { return one.used.load(kRelaxed); });
    lane->group.store(group, kRelaxed);
  }
  lane->used.store(number, kRelaxed);
  return *lane;
}

bool Board::holds(const Post& post, std::uint64_t group, Turn turn) noexcept {
  return post.mark.load(kAcquire) == mark_of(turn) && post.group.load(kAcquire) == group;
}

const Board::Post* Board::find(const Slot& slot, std::uint64_t group, Turn turn) noexcept {
  for (const Lane& lane : slot.lanes) {
    for (const Post& post : lane.posts) {
      if (holds(post, group, turn)) return &post;
    }
  }
  return nullptr;
}

void Board::withdraw(int rank, std::uint64_t group, Turn turn) noexcept {
  for (Post& post : lane_of(slot(rank), group).posts) {
    if (holds(post, group, turn)) post.mark.store(0, kRelaxed);
  }
}

bool Board::read(int rank, std::uint64_t group, Turn turn, std::uint64_t* size,
                 std::span<std::byte> chunk) const noexcept {
  const Post* const post = find(slot(rank), group, turn);
  if (post == nullptr) return false;
  *size = post->size.load(kAcquire);
  for (std::size_t to = 0; to < chunk.size(); to += sizeof(std::uint64_t)) {
    const std::uint64_t word = post->at[to / sizeof(std::uint64_t)].load(kAcquire);
    std::memcpy(chunk.data() + to, &word, std::min(sizeof word, chunk.size() - to));
  }
  return holds(*post, group, turn);
}

std::uint32_t Board::posted_attempt(int rank, std::uint64_t group) const noexcept {
  std::uint32_t latest = 0;
  for (const Lane& lane : slot(rank).lanes) {
    for (const Post& post : lane.posts) {
      const std::uint64_t mark = post.mark.load(kAcquire);
      const bool ours = post.group.load(kAcquire) == group && post.mark.load(kAcquire) == mark;
      if (ours) latest = std::max(latest, high(mark));
    }
  }
  return latest;
}

void Board::ring() noexcept {
  shared_->bell.fetch_add(1, std::memory_order_acq_rel);
  ::syscall(SYS_futex, &shared_->bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Board::sleep(std::uint32_t seen, std::chrono::nanoseconds limit) const noexcept {
  if (limit.count() <= 0) return;
  const timespec time{static_cast<time_t>(limit.count() / 1'000'000'000),
                      static_cast<long>(limit.count() % 1'000'000'000)};
  ::syscall(SYS_futex, &shared_->bell, FUTEX_WAIT, seen, &time, nullptr, 0);
}

}  // namespace anyep::bootstrap
