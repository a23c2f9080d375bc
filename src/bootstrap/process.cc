#include "bootstrap/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <string_view>

namespace anyep::bootstrap {
namespace {

// Fields of /proc/<pid>/stat after the command's closing bracket: state is the first, starttime (field 22) the 20th.
constexpr int kFieldsBeforeStart = 19;

std::uint64_t start_of(std::string_view stat) noexcept {
  const std::size_t bracket = stat.rfind(')');  // the command may hold brackets and spaces itself
  if (bracket == std::string_view::npos || bracket + 2 > stat.size()) return 0;
  stat.remove_prefix(bracket + 2);
  for (int field = 0; field < kFieldsBeforeStart; ++field) {
    const std::size_t space = stat.find(' ');
    if (space == std::string_view::npos) return 0;
    stat.remove_prefix(space + 1);
  }
  std::uint64_t ticks = 0;
  std::from_chars(stat.data(), stat.data() + stat.size(), ticks);
  return ticks;
}

}  // namespace

UniqueFd open_process(pid_t pid) noexcept {
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0U)));  // always close-on-exec
}

bool has_exited(int pidfd, std::chrono::milliseconds wait) noexcept {
  pollfd entry{pidfd, POLLIN, 0};
  const auto until = std::chrono::steady_clock::now() + wait;
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
    const int ready = ::poll(&entry, 1, left.count() > 0 ? static_cast<int>(left.count()) : 0);
    if (ready >= 0 || errno != EINTR) return ready > 0 && (entry.revents & POLLIN) != 0;
  }
}

std::uint64_t start_ticks(pid_t pid) noexcept {
  char path[32];
  std::snprintf(path, sizeof path, "/proc/%d/stat", static_cast<int>(pid));
  const UniqueFd file(::open(path, O_RDONLY | O_CLOEXEC));
  if (!file) return 0;
  char text[1024];
  const ssize_t size = ::read(file.get(), text, sizeof text);
  return size > 0 ? start_of(std::string_view(text, static_cast<std::size_t>(size))) : 0;
}

std::uint64_t pid_namespace() noexcept {
  struct stat status {};
  return ::stat("/proc/self/ns/pid", &status) == 0 ? status.st_ino : 0;
}

ProcessId ProcessId::of_this_process() noexcept {
  const pid_t pid = ::getpid();
  return {pid, bootstrap::start_ticks(pid)};
}

Life look_up(const ProcessId& which, UniqueFd& pidfd) noexcept {
  pidfd = open_process(which.pid);
  if (!pidfd) return errno == ESRCH ? Life::kDead : Life::kUnknown;
  if (has_exited(pidfd.get())) return Life::kDead;
  const std::uint64_t now = start_ticks(which.pid);
  if (now != 0 && which.start_ticks != 0 && now != which.start_ticks) return Life::kDead;
  return Life::kAlive;
}

}  // namespace anyep::bootstrap
