// The handoff: permission and arrival of rows between one producer and one consumer.
//
// An op takes the same number of turns at both ends, at least one, also for zero rows. The region of a turn lies at the
// consumer (push) or at the producer (pull); the words are the same.
//
//   word     lives on  written by  read by   order               meaning
//   grant    producer  consumer    producer  under credit        plain record: where rows go, room for how many
//   credit   producer  consumer    producer  release -> acquire  turns up to this one may be written
//   arrived  consumer  producer    consumer  release -> acquire  turns up to this one have landed whole
//   offer    consumer  producer    consumer  under arrived       plain record: where the turn's rows lie
//   sent     producer  producer    producer  plain               last turn published: where the next op resumes
//   taken    consumer  consumer    consumer  plain               last turn taken; likewise
//
// Invariant   taken <= arrived <= credit <= taken + regions. Several regions make a ring.
// Grant       where rows move from op to op: when the op starts, and never beyond the op's last turn.
//             Ring regions: after take(), always `regions` ahead; formatted so before the first op.
// Op          credits run on from op to op, so the marks carry only the stream's code;
//             grant, offer and announcement name the op.
// Lifetime    zeroed before the window is exported, then only forward: a fast rank may be one turn ahead.
// Model       handoff.pml
#pragma once

#include <cstdint>

#include "protocol/doorbell.h"
#include "protocol/platform.h"
#include "protocol/wait.h"
#include "protocol/word.h"

namespace anyep::protocol {

/// One end's view of one handoff. `credit` and `arrived` are shared words; `last` is this end's own count of turns.
struct HandoffEnd {
  std::uint64_t* credit = nullptr;
  std::uint64_t* arrived = nullptr;
  std::uint32_t* last = nullptr;  ///< producer: sent; consumer: taken
  Doorbell* peer_bell = nullptr;  ///< of the rank that waits for what this end writes
};

/// The producer's end.
class Producer {
 public:
  Producer(const HandoffEnd& end, std::uint16_t generation, std::uint16_t code)
      : end_(end), generation_(generation), code_(code) {}

  /// The turn that publish() will end.
  std::uint32_t turn() const { return next_epoch(*end_.last); }

  /// Waits until the next turn may be written. The grant may be read afterwards.
  [[nodiscard]] Ended wait_for_credit(const Waiter& w, const Who& who) const {
    return wait(w, who, *end_.credit, make_mark(generation_, turn(), code_));
  }
  [[nodiscard]] bool has_credit() const { return is_reached(*end_.credit, make_mark(generation_, turn(), code_)); }

  /// The turn's rows and the offer come before this, in program order.
  void publish() {
    *end_.last = turn();
    Shared(*end_.arrived).store(make_mark(generation_, *end_.last, code_), kRelease);  // pattern A, litmus mp-sys
    ring(*end_.peer_bell);
  }

  /// Pull: waits until the consumer has taken every turn so far, `regions` being what it grants ahead.
  [[nodiscard]] Ended wait_until_taken(const Waiter& w, const Who& who, std::uint32_t regions) const {
    return wait(w, who, *end_.credit, make_mark(generation_, advance(*end_.last, regions), code_));
  }

  /// `turns` epochs after `epoch`, past the unused 0.
  static std::uint32_t advance(std::uint32_t epoch, std::uint32_t turns) {
    for (std::uint32_t turn = 0; turn < turns; ++turn) epoch = next_epoch(epoch);
    return epoch;
  }

 private:
  HandoffEnd end_;
  std::uint16_t generation_, code_;
};

/// The consumer's end.
class Consumer {
 public:
  Consumer(const HandoffEnd& end, std::uint16_t generation, std::uint16_t code)
      : end_(end), generation_(generation), code_(code) {}

  /// The turn that take() will end.
  std::uint32_t turn() const { return next_epoch(*end_.last); }

  /// Lets the producer write `regions` turns beyond the last one taken. The grant, and this end's reads of the region
  /// that is given back, come before this (pattern F, litmus slot-reuse).
  void grant(std::uint32_t regions) {
    const std::uint32_t until = Producer::advance(*end_.last, regions);
    Shared(*end_.credit).store(make_mark(generation_, until, code_), kRelease);
    ring(*end_.peer_bell);
  }

  /// Waits until the next turn has landed. Rows and offer may be read afterwards.
  [[nodiscard]] Ended wait_for_arrival(const Waiter& w, const Who& who) const {
    return wait(w, who, *end_.arrived, make_mark(generation_, turn(), code_));
  }
  [[nodiscard]] bool has_arrived() const { return is_reached(*end_.arrived, make_mark(generation_, turn(), code_)); }

  /// Ends a turn; a ring gives the region back by grant(regions) afterwards.
  void take() { *end_.last = turn(); }

 private:
  HandoffEnd end_;
  std::uint16_t generation_, code_;
};

}  // namespace anyep::protocol
