#include "bootstrap/life.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <memory>
#include <utility>

#include "bootstrap/memfd.h"
#include "core/check.h"

namespace anyep::control {

struct LifePage {
  static constexpr std::uint64_t kMagic = 0x314546494c594e41;  // "ANYLIFE1"
  std::uint64_t magic = kMagic;
  std::atomic<LifeStage> stage = LifeStage::kSetUp;
  alignas(64) pthread_mutex_t alive;
};

namespace {

constexpr std::size_t kPageBytes = sizeof(LifePage);

// The futex word comes first in glibc's mutex; begin() checks that.
std::uint32_t word_of(const LifePage& page) noexcept {
  return __atomic_load_n(reinterpret_cast<const std::uint32_t*>(&page.alive), __ATOMIC_ACQUIRE);
}

void make_robust(pthread_mutex_t* mutex) {
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  const int failed = pthread_mutex_init(mutex, &attributes);
  pthread_mutexattr_destroy(&attributes);
  if (failed != 0) core::throw_resource("create", "a robust mutex", failed);
}

}  // namespace

OwnLife::OwnLife() : memory_(bootstrap::make_memfd("anyep-life", kPageBytes, bootstrap::Seals::kSizeKeepOpen)) {
  void* const at = ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_.get(), 0);
  if (at == MAP_FAILED) core::throw_resource("create", "mmap", errno, kPageBytes);
  page_ = std::construct_at(static_cast<LifePage*>(at));
  bootstrap::seal_future_writes(memory_.get());  // where the kernel can: ranks trust each other with memory
  try {
    make_robust(&page_->alive);
  } catch (...) {
    ::munmap(page_, kPageBytes);
    throw;
  }
}

OwnLife::~OwnLife() {
  if (owner_) pthread_mutex_destroy(&page_->alive);
  ::munmap(page_, kPageBytes);
}

bool OwnLife::begin() noexcept {
  if (pthread_mutex_lock(&page_->alive) != 0) return false;
  const bool seen = (word_of(*page_) & FUTEX_TID_MASK) == static_cast<std::uint32_t>(::gettid());
  page_->stage.store(LifeStage::kWatched, std::memory_order_release);
  return seen;
}

void OwnLife::end() noexcept {
  page_->stage.store(LifeStage::kStopped, std::memory_order_release);
  pthread_mutex_unlock(&page_->alive);
}

PeerLife::PeerLife(int fd) {
  bootstrap::check_memfd(fd, kPageBytes);
  void* const at = ::mmap(nullptr, kPageBytes, PROT_READ, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) core::throw_resource("create", "mmap", errno, kPageBytes);
  page_ = static_cast<const LifePage*>(at);
  if (page_->magic == LifePage::kMagic) return;
  ::munmap(at, kPageBytes);
  page_ = nullptr;
  core::throw_error(ErrorCode::kCorrupt, "import", "a peer's life page has another format");
}

PeerLife::~PeerLife() {
  if (page_ != nullptr) ::munmap(const_cast<LifePage*>(page_), kPageBytes);
}

PeerLife::PeerLife(PeerLife&& other) noexcept : page_(std::exchange(other.page_, nullptr)) {}

PeerLife& PeerLife::operator=(PeerLife&& other) noexcept {
  std::swap(page_, other.page_);
  return *this;
}

bool PeerLife::died() const noexcept {
  return (word_of(*page_) & FUTEX_OWNER_DIED) != 0;
}

LifeStage PeerLife::stage() const noexcept {
  return page_->stage.load(std::memory_order_acquire);
}

}  // namespace anyep::control
