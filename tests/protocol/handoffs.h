// Rows over handoffs between threads: every row read must be the row of its op and turn.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "protocol/handoff.h"
#include "protocol/team.h"

namespace anyep::test {

enum class Rows {
  kRing,    ///< push into a ring of regions at the consumer, granted ahead for good
  kMoving,  ///< push to where the consumer's grant says, anew in every op
  kOffered  ///< pull from where the producer's offer says; the producer overwrites its rows between ops
};

class Handoffs {
 public:
  Handoffs(Team& team, Rows rows) : team_(team), load_(team.load()), rows_(rows) {
    const auto ranks = static_cast<std::size_t>(load_.ranks);
    for (std::size_t pair = 0; pair < ranks * ranks; ++pair) pairs_.push_back(std::make_unique<Pair>());
    const std::uint32_t granted = protocol::Producer::advance(load_.first_epoch, load_.regions);
    for (const auto& pair : pairs_) {
      pair->sent = pair->taken = load_.first_epoch;
      if (rows_ != Rows::kMoving) pair->credit = protocol::make_mark(kGeneration, granted, kCode);
      pair->cells.resize(rows_ == Rows::kRing ? load_.regions : 2 * load_.turns);
    }
  }

  /// One thread per rank, as CPU ranks play it.
  void play() {
    team_.run(1, [this](int rank, int) {
      Actor actor(team_, rank, 0);
      for (std::uint32_t op = 0; op < load_.ops; ++op) {
        if (!play_op(actor, op)) return;
      }
    });
  }

  /// Sending and collecting in two threads per rank, which share its doorbell.
  void play_side_by_side() {
    team_.run(2, [this](int rank, int role) {
      Actor actor(team_, rank, role);
      for (std::uint64_t turn = 0; turn < std::uint64_t{load_.ops} * load_.turns; ++turn) {
        const auto op = static_cast<std::uint32_t>(turn / load_.turns),
                   in_op = static_cast<std::uint32_t>(turn % load_.turns);
        const bool good = for_peers(
            rank, [&](int peer) { return role == 0 ? send(actor, peer, op, in_op) : collect(actor, peer, op, in_op); });
        if (!good) return;
      }
    });
  }

 private:
  static constexpr std::uint16_t kCode = protocol::make_code(2, 0);
  static constexpr std::size_t kWords = 12;  ///< of a row: more than a cache line
  static constexpr std::size_t kMaxRegions = 4;

  struct Record {
    std::uint32_t op = 0, place = 0;
  };
  struct Cell {
    std::uint64_t word[kWords] = {};
  };
  /// Everything of one handoff; plain where the protocol says plain.
  struct Pair {
    alignas(128) std::uint64_t credit = 0;
    alignas(128) std::uint64_t arrived = 0;
    alignas(128) Record grant;
    alignas(128) Record offer[kMaxRegions];
    alignas(128) std::uint32_t sent = 0;
    alignas(128) std::uint32_t taken = 0;
    std::vector<Cell> cells;
  };

  Pair& pair(int source, int destination) {
    return *pairs_[static_cast<std::size_t>(source * load_.ranks + destination)];
  }
  protocol::Producer producer(int source, int destination) {
    Pair& p = pair(source, destination);
    return {{&p.credit, &p.arrived, &p.sent, &team_.bell(destination)}, kGeneration, kCode};
  }
  protocol::Consumer consumer(int source, int destination) {
    Pair& p = pair(source, destination);
    return {{&p.credit, &p.arrived, &p.taken, &team_.bell(source)}, kGeneration, kCode};
  }
  static std::uint64_t payload(int source, int destination, std::uint64_t serial, std::size_t word) {
    return mix(static_cast<std::uint64_t>(source * 64 + destination), serial, word);
  }
  std::uint64_t serial(std::uint32_t op, std::uint32_t turn) const {
    return std::uint64_t{op} * load_.turns + turn + 1;
  }
  std::uint32_t offer_at(std::uint32_t epoch) const { return rows_ == Rows::kRing ? epoch % load_.regions : 0; }
  /// Where a turn's row lies: `place` alternates from op to op where rows move.
  Cell& cell(Pair& p, std::uint32_t epoch, std::uint32_t place, std::uint32_t turn) {
    return p.cells[rows_ == Rows::kRing ? epoch % load_.regions : place * load_.turns + turn];
  }

  template <class F>
  bool for_peers(int rank, F&& f) {
    for (int step = 1; step < load_.ranks; ++step) {
      if (!f((rank + step) % load_.ranks)) return false;
    }
    return true;
  }

  bool play_op(Actor& actor, std::uint32_t op) {
    const int me = actor.rank();
    if (rows_ == Rows::kMoving) for_peers(me, [&](int peer) { return grant(actor, peer, op); });
    for (std::uint32_t turn = 0; turn < load_.turns; ++turn) {
      if (!for_peers(me, [&](int peer) { return send(actor, peer, op, turn); })) return false;
      if (!for_peers(me, [&](int peer) { return collect(actor, peer, op, turn); })) return false;
    }
    return for_peers(me, [&](int peer) { return end_op(actor, peer, op); });
  }

  bool grant(Actor& actor, int source, std::uint32_t op) {
    pair(source, actor.rank()).grant = {op, op % 2};
    consumer(source, actor.rank()).grant(1);
    actor.step();
    return true;
  }

  bool send(Actor& actor, int peer, std::uint32_t op, std::uint32_t turn) {
    Pair& p = pair(actor.rank(), peer);
    protocol::Producer out = producer(actor.rank(), peer);
    const bool there = actor.random() % 2 == 0 && out.has_credit();  // a look may take the place of the wait
    if (!there && !actor.must("credit", peer, [&](auto& w, auto who) { return out.wait_for_credit(w, who); }))
      return false;
    std::uint32_t place = op % 2;
    if (rows_ == Rows::kMoving) {
      if (p.grant.op != op) actor.team().fail("rank %d read the grant of op %u in op %u", actor.rank(), p.grant.op, op);
      place = p.grant.place;
    }
    Cell& row = cell(p, out.turn(), place, turn);
    for (std::size_t word = 0; word < kWords; ++word) {
      row.word[word] = payload(actor.rank(), peer, serial(op, turn), word);
      if (word == kWords / 2) actor.step();
    }
    if (turn == 0) p.offer[offer_at(out.turn())] = {op, place};
    out.publish();
    actor.step();
    return true;
  }

  bool collect(Actor& actor, int peer, std::uint32_t op, std::uint32_t turn) {
    const int me = actor.rank();
    Pair& p = pair(peer, me);
    protocol::Consumer in = consumer(peer, me);
    const bool there = actor.random() % 2 == 0 && in.has_arrived();
    if (!there && !actor.must("arrival", peer, [&](auto& w, auto who) { return in.wait_for_arrival(w, who); }))
      return false;
    std::uint32_t place = op % 2;
    if (turn == 0) {
      const Record offer = p.offer[offer_at(in.turn())];
      if (offer.op != op) actor.team().fail("rank %d read the offer of op %u in op %u", me, offer.op, op);
      if (rows_ == Rows::kOffered) place = offer.place;
      if (rows_ == Rows::kMoving && load_.turns > 1)
        in.grant(load_.regions < load_.turns ? load_.regions : load_.turns);
    }
    actor.step();
    if (!check(actor, cell(p, in.turn(), place, turn), peer, serial(op, turn))) return false;
    in.take();
    const std::uint32_t left = load_.turns - 1 - turn;
    if (rows_ != Rows::kMoving) {
      in.grant(load_.regions);
    } else if (left > 0) {
      in.grant(load_.regions < left ? load_.regions : left);  // never beyond the op: the next grant is another
    }
    actor.step();
    return true;
  }

  bool check(Actor& actor, const Cell& row, int source, std::uint64_t serial) {
    for (std::size_t word = 0; word < kWords; ++word) {
      if (row.word[word] == payload(source, actor.rank(), serial, word)) continue;
      actor.team().fail("rank %d: word %zu of the row of rank %d, turn %llu, is another", actor.rank(), word, source,
                        static_cast<unsigned long long>(serial));
      return false;
    }
    return true;
  }

  /// Between ops the rows are the caller's: it reads what it received, and overwrites what it offered.
  bool end_op(Actor& actor, int peer, std::uint32_t op) {
    const int me = actor.rank();
    if (rows_ == Rows::kMoving) {
      for (std::uint32_t turn = 0; turn < load_.turns; ++turn) {
        if (!check(actor, cell(pair(peer, me), 0, op % 2, turn), peer, serial(op, turn))) return false;
      }
    } else if (rows_ == Rows::kOffered) {
      const protocol::Producer out = producer(me, peer);
      if (!actor.must("give-back", peer,
                      [&](auto& w, auto who) { return out.wait_until_taken(w, who, load_.regions); })) {
        return false;
      }
      for (std::uint32_t turn = 0; turn < load_.turns; ++turn) cell(pair(me, peer), 0, op % 2, turn) = {};
    }
    actor.step();
    return true;
  }

  Team& team_;
  const Load& load_;
  const Rows rows_;
  std::vector<std::unique_ptr<Pair>> pairs_;
};

}  // namespace anyep::test
