// How a window grows while ranks run: its owner adds a piece, every peer maps it, and only then may rows lie there.
//
// A sender that touches what it has not mapped kills its own context, so no piece is granted before all peers have answered.
// A thread of each rank answers: the rank itself may be waiting in a kernel for the very peer that asks. The watcher of the
// control links must not do it, since it makes no CUDA call.
#pragma once

#include <anyep/bootstrap.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "bootstrap/unique_fd.h"
#include "cuda/memory/window.h"

namespace anyep::cuda {

/// A range of the own window that all ranks have mapped.
struct Piece {
  std::uint64_t offset = 0, bytes = 0;
};

class Growth {
 public:
  /// Everybody writes into everybody's inbox.
  struct Links {
    bootstrap::UniqueFd inbox;                  ///< this rank reads
    std::vector<bootstrap::UniqueFd> outboxes;  ///< [ranks]; empty for ranks of this process, which share the windows
  };
  /// Starts the thread that answers. @throws Error kResource
  Growth(int rank, std::vector<std::shared_ptr<Window>> windows, const WindowShape& shape, Links links);
  ~Growth();  ///< waits for no peer

  /// What one piece can have at most now.
  std::uint64_t room() const;
  /// At least `bytes` more for the own window. Waits for the answers of the peers, but not of those that are `gone`.
  /// Never while a graph is captured. @throws Error kCapacity (addresses), kResource (memory, here or at a peer), kDevice,
  /// kTimeout naming who has not answered
  Piece grow(std::uint64_t bytes, Deadline deadline, const std::function<bool(int)>& gone);

 private:
  struct Packet;
  void answer();
  void take(Packet& packet, bootstrap::UniqueFd fd);
  void take_piece(const Packet& packet, bootstrap::UniqueFd fd);
  bool send(int peer, const Packet& packet, int fd) const;

  const int rank_;
  const std::int64_t process_;
  const std::vector<std::shared_ptr<Window>> windows_;
  const WindowShape shape_;
  Links links_;
  bootstrap::UniqueFd stop_;

  mutable std::mutex mutex_;  ///< guards what follows
  std::condition_variable answered_;
  std::uint64_t next_ = 0;          ///< offset of the next piece
  std::uint64_t asked_ = 0;         ///< offset of the piece that answers are awaited for
  std::vector<std::uint8_t> said_;  ///< [ranks] Answer
  std::mutex one_at_a_time_;
  std::unique_ptr<std::thread> thread_;
};

/// Own end and peers' end of an inbox. @throws Error kResource
std::pair<bootstrap::UniqueFd, bootstrap::UniqueFd> make_inbox();

}  // namespace anyep::cuda
