// Nameless shared memory that is passed by descriptor.
#pragma once

#include "bootstrap/unique_fd.h"

#include <cstddef>

namespace anyep::bootstrap {

/// What may no longer happen to a memfd.
enum class Seals {
  kNone,          ///< add_seals() later
  kSize,          ///< neither shrink nor grow, and no further seals: a mapping never meets SIGBUS for lack of file
  kSizeKeepOpen,  ///< neither shrink nor grow; further seals (against writing by others) may follow
};

/// `bytes` of zeroes, close-on-exec. Nothing is backed until touched.
/// @throws Error kResource
UniqueFd make_memfd(const char* name, std::size_t bytes, Seals seals = Seals::kSize);

/// No further mapping may write (F_SEAL_FUTURE_WRITE; existing ones go on). Needs kSizeKeepOpen. False: the kernel has
/// no such seal.
bool seal_future_writes(int fd) noexcept;

/// Of a descriptor that came from a peer, before it is mapped.
/// @throws Error kCorrupt unless it is a memfd of at least `bytes`, sealed against shrinking.
void check_memfd(int fd, std::size_t bytes);

}  // namespace anyep::bootstrap
