#include "bootstrap/card.h"

#include <fmt/format.h>

#include <cstring>
#include <string>

namespace anyep::control {

std::string_view Card::words() const {
  return {text, ::strnlen(text, sizeof text)};
}

void check_cards(const Step& step, std::span<const Card> cards) {
  const auto refuse = [&](ErrorCode code, std::size_t peer, std::string_view text) {
    bootstrap::throw_about(step, code, {static_cast<int>(peer)}, text);
  };
  for (std::size_t peer = 0; peer < cards.size(); ++peer) {
    const Card& card = cards[peer];
    if (card.magic != Card::kMagic) {
      refuse(ErrorCode::kCorrupt, peer, fmt::format("rank {} sent no card of an AnyEP rank", peer));
    }
    if (card.version != FrameStart::kVersion) {
      refuse(ErrorCode::kMismatch, peer,
             fmt::format("rank {} speaks version {} of the links, rank 0 version {}", peer, card.version,
                         cards[0].version));
    }
    if (card.num_ranks != static_cast<std::int32_t>(cards.size())) {
      refuse(ErrorCode::kMismatch, peer,
             fmt::format("process {} at place {} says that there are {} ranks, not {}", card.pid, peer, card.num_ranks,
                         cards.size()));
    }
    if (card.rank == static_cast<std::int32_t>(peer)) continue;
    const bool known = card.rank >= 0 && card.rank < card.num_ranks;
    const std::string owner =
        known ? fmt::format(", which is process {}'s place", cards[static_cast<std::size_t>(card.rank)].pid) : "";
    refuse(ErrorCode::kMismatch, peer,
           fmt::format("process {} at place {} claims rank {}{}", card.pid, peer, card.rank, owner));
  }
  for (std::size_t peer = 0; peer < cards.size(); ++peer) {
    if (cards[peer].failed == 0) continue;
    refuse(ErrorCode::kResource, peer, fmt::format("rank {}: {}", peer, cards[peer].words()));
  }
}

}  // namespace anyep::control
