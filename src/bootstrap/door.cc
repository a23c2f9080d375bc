#include "bootstrap/door.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <filesystem>
#include <system_error>
#include <vector>

#include "core/check.h"

namespace anyep::control {
namespace {

using bootstrap::UniqueFd;

constexpr int kType = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK;
// Strangers may stand in the queue before the ranks.
constexpr int kSpareCallers = 64;

bool fits(std::string_view path) {
  return path.size() < sizeof(sockaddr_un::sun_path);
}

sockaddr_un address_of(std::string_view path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

// Where doors may be: the first that works is taken.
std::vector<std::string> places() {
  std::error_code none;
  std::vector<std::string> all = {"/tmp"};
  const std::filesystem::path wanted = std::filesystem::temp_directory_path(none);  // reads TMPDIR
  if (!none && wanted != all.front()) all.insert(all.begin(), wanted.string());
  return all;
}

constexpr std::string_view kPrefix = "anyep-", kPattern = "XXXXXX";

// The folder's name; empty with errno.
std::string make_folder() {
  for (const std::string& place : places()) {
    std::string name = place + '/' + std::string(kPrefix) + std::string(kPattern);
    errno = ENAMETOOLONG;
    if (fits(name + "/door") && ::mkdtemp(name.data()) != nullptr) return name;
  }
  return {};
}

// Holds a lock that ends with this process. Empty with errno; EWOULDBLOCK: somebody else holds it.
UniqueFd lock_folder(const std::string& name) {
  UniqueFd folder(::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!folder || ::flock(folder.get(), LOCK_EX | LOCK_NB) == 0) return folder;
  const int error = errno;
  if (error == EWOULDBLOCK) folder.reset();  // file systems without locks: nobody sweeps there
  errno = error;
  return folder;
}

void remove_if_left(const std::filesystem::path& name) {
  struct stat info {};
  if (::lstat(name.c_str(), &info) != 0 || !S_ISDIR(info.st_mode) || info.st_uid != ::geteuid()) return;
  const UniqueFd folder = lock_folder(name);
  if (!folder) return;
  ::unlinkat(folder.get(), "door", 0);
  ::rmdir(name.c_str());  // only if nothing else is there
}

}  // namespace

// A sweeper may take a folder for a dead rank's until it is locked: then there is another one.
void Door::open(int num_callers) {
  for (int tries = 0; tries < 4; ++tries) {
    if (try_open(num_callers)) return;
    close();
  }
  core::throw_resource("create", "keeping a folder for a socket", ENOENT);
}

bool Door::try_open(int num_callers) {
  folder_ = make_folder();
  if (folder_.empty()) core::throw_resource("create", "making a folder for a socket (TMPDIR, /tmp)", errno);
  lock_ = lock_folder(folder_);
  if (!lock_ && (errno == EWOULDBLOCK || errno == ENOENT)) return false;
  if (!lock_) core::throw_resource("create", "opening " + folder_, errno);
  path_ = folder_ + "/door";
  socket_ = UniqueFd(::socket(AF_UNIX, kType, 0));
  if (!socket_) core::throw_resource("create", "socket", errno);
  const sockaddr_un address = address_of(path_);
  if (::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    if (errno == ENOENT) return false;
    core::throw_resource("create", "bind to " + path_, errno);
  }
  if (::listen(socket_.get(), num_callers + kSpareCallers) != 0) core::throw_resource("create", "listen", errno);
  return true;
}

void Door::close() noexcept {
  socket_.reset();
  if (!path_.empty()) ::unlink(path_.c_str());
  if (!folder_.empty()) ::rmdir(folder_.c_str());
  lock_.reset();
  path_.clear();
  folder_.clear();
}

void Door::sweep() noexcept {
  try {
    for (const std::string& place : places()) {
      std::error_code none;
      for (const auto& entry : std::filesystem::directory_iterator(place, none)) {
        const std::string name = entry.path().filename().string();
        if (name.starts_with(kPrefix) && name.size() == kPrefix.size() + kPattern.size()) remove_if_left(entry.path());
      }
    }
  } catch (const std::exception&) {  // out of memory, or a folder that vanished: it is no duty
  }
}

UniqueFd Door::call(std::string_view path) noexcept {
  if (!fits(path)) {
    errno = ENAMETOOLONG;
    return {};
  }
  UniqueFd socket(::socket(AF_UNIX, kType, 0));
  if (!socket) return {};
  const sockaddr_un address = address_of(path);
  while (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    if (errno != EINTR) return {};
  }
  return socket;
}

UniqueFd Door::answer() noexcept {
  while (true) {
    UniqueFd caller(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    // ECONNABORTED: that caller has left again.
    if (caller || (errno != EINTR && errno != ECONNABORTED)) return caller;
  }
}

}  // namespace anyep::control
