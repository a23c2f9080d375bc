// A listening Unix socket in a folder that only this user can enter.
#pragma once

#include <string>
#include <string_view>

#include "bootstrap/unique_fd.h"

namespace anyep::control {

class Door {
 public:
  Door() = default;
  ~Door() { close(); }
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;

  /// In TMPDIR, or in /tmp where that is missing, not writable or too long a name for a socket.
  /// @throws Error kResource
  void open(int num_callers);
  /// Removes socket and folder.
  void close() noexcept;

  /// -1 when it is closed.
  int socket() const noexcept { return socket_.get(); }
  const std::string& path() const noexcept { return path_; }

  /// Removes the folders of doors whose owners were killed, as far as this user made them. For those who outlive one.
  static void sweep() noexcept;

  /// A new connection to the socket at `path`; empty with errno, EAGAIN if its queue is full now.
  static bootstrap::UniqueFd call(std::string_view path) noexcept;
  /// The next caller; empty with errno, EAGAIN if there is none.
  bootstrap::UniqueFd answer() noexcept;

 private:
  bool try_open(int num_callers);

  bootstrap::UniqueFd socket_;
  bootstrap::UniqueFd lock_;  ///< on the folder, for as long as its owner lives
  std::string folder_, path_;
};

}  // namespace anyep::control
