#include "bootstrap/door.h"

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
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

// The folder's name; empty with errno.
std::string make_folder() {
  std::error_code none;
  std::vector<std::string> places = {"/tmp"};
  const std::filesystem::path wanted = std::filesystem::temp_directory_path(none);  // reads TMPDIR
  if (!none) places.insert(places.begin(), wanted.string());
  for (const std::string& place : places) {
    std::string name = place + "/anyep-XXXXXX";
    errno = ENAMETOOLONG;
    if (fits(name + "/door") && ::mkdtemp(name.data()) != nullptr) return name;
  }
  return {};
}

}  // namespace

void Door::open(int num_callers) {
  folder_ = make_folder();
  if (folder_.empty()) core::throw_resource("create", "making a folder for a socket (TMPDIR, /tmp)", errno);
  path_ = folder_ + "/door";
  socket_ = UniqueFd(::socket(AF_UNIX, kType, 0));
  if (!socket_) core::throw_resource("create", "socket", errno);
  const sockaddr_un address = address_of(path_);
  if (::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    core::throw_resource("create", "bind to " + path_, errno);
  }
  if (::listen(socket_.get(), num_callers + kSpareCallers) != 0) core::throw_resource("create", "listen", errno);
}

void Door::close() noexcept {
  socket_.reset();
  if (!path_.empty()) ::unlink(path_.c_str());
  if (!folder_.empty()) ::rmdir(folder_.c_str());
  path_.clear();
  folder_.clear();
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
