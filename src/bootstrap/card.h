// What ranks learn of each other through the bootstrap before they connect.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "bootstrap/frames.h"

namespace anyep::control {

/// What the ranks gather through the bootstrap.
struct Card {
  static constexpr std::uint64_t kMagic = 0x3144524359454e41;  // "ANEYCRD1"
  std::uint64_t magic = kMagic;
  std::uint32_t version = FrameStart::kVersion;
  std::int32_t rank = -1, num_ranks = 0;
  std::int32_t failed = 0;  ///< 1: this rank has no door, for the reason in `text`
  std::int64_t pid = 0;
  std::uint64_t start_ticks = 0, pid_namespace = 0;
  Key job{};            ///< rank 0's counts
  Key door{};           ///< key to this rank's door
  char text[128] = {};  ///< where the door is, or why there is none

  std::string_view words() const;
};
static_assert(sizeof(Card) == 208);

/// Same cards, same verdict: on every rank.
/// @throws Error kCorrupt, kMismatch, kResource
void check_cards(const Step& step, std::span<const Card> cards);

}  // namespace anyep::control
