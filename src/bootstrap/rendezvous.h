// How ranks of one host come to hold a socket to each other.
#pragma once

#include <anyep/bootstrap.h>

#include <cstdint>
#include <vector>

#include "bootstrap/frames.h"

namespace anyep::control {

/// Sockets between all ranks, whose ends have proven to belong to this job.
struct Mesh {
  std::vector<Link> links;  ///< by rank
  std::uint64_t generation = 0;
  std::uint64_t num_strangers = 0;
};

/// Collective. Every rank opens a *door*: a listening socket in a folder of mode 0700. Where it is and a key to it go
/// through the bootstrap; rank i then connects to all below it. Door and folder are gone when this returns or throws.
/// @throws Error kMismatch, kTimeout, kPeerDead, kAborted, kResource
Mesh meet(Bootstrap& bootstrap, const Step& step);

}  // namespace anyep::control
