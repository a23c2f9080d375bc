// Counts, barriers, low-latency regions and sleeping at a doorbell, between threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "protocol/barrier.h"
#include "protocol/counts.h"
#include "protocol/team.h"

namespace anyep::test {

/// Counts of op after op; each must be the one of its turn.
class CountExchange {
 public:
  explicit CountExchange(Team& team) : team_(team), load_(team.load()) {
    const auto ranks = static_cast<std::size_t>(load_.ranks);
    boards_.assign(ranks, std::vector<std::uint64_t>(2 * ranks * kWidth, 0));
  }

  void play() {
    team_.run(1, [this](int rank, int) {
      Actor actor(team_, rank, 0);
      std::uint32_t epoch = load_.first_epoch;
      for (std::uint32_t op = 0; op < load_.ops; ++op) {
        epoch = protocol::next_epoch(epoch);
        for (int peer = 0; peer < load_.ranks; ++peer) put(actor, peer, epoch, op);
        for (int peer = 0; peer < load_.ranks; ++peer) {
          if (!get(actor, peer, epoch, op)) return;
        }
      }
    });
  }

 private:
  static constexpr std::size_t kWidth = 5;

  std::uint64_t* slot(int holder, int source, std::uint32_t epoch) {
    return boards_[static_cast<std::size_t>(holder)].data() +
           protocol::count_slot(epoch, static_cast<std::uint64_t>(load_.ranks), static_cast<std::uint64_t>(source),
                                kWidth);
  }
  static std::uint32_t value(int source, int holder, std::uint32_t op, std::size_t at) {
    return static_cast<std::uint32_t>(mix(static_cast<std::uint64_t>(source * 64 + holder), op, at));
  }

  void put(Actor& actor, int peer, std::uint32_t epoch, std::uint32_t op) {
    std::uint64_t* const words = slot(peer, actor.rank(), epoch);
    for (std::size_t at = 0; at < kWidth; ++at) {
      protocol::put_count(words[at], epoch, value(actor.rank(), peer, op, at));
      if (at == kWidth / 2) actor.step();
    }
    protocol::ring(team_.bell(peer));
  }

  bool get(Actor& actor, int peer, std::uint32_t epoch, std::uint32_t op) {
    std::uint64_t* const words = slot(actor.rank(), peer, epoch);
    for (std::size_t at = 0; at < kWidth; ++at) {
      std::uint32_t got = 0;
      const bool there = actor.must(
          "count", peer, [&](auto& w, auto who) { return protocol::get_count(w, who, words[at], epoch, got); });
      if (!there) return false;
      if (got != value(peer, actor.rank(), op, at)) {
        team_.fail("rank %d: count %zu of rank %d in op %u is another", actor.rank(), at, peer, op);
        return false;
      }
    }
    actor.step();
    return true;
  }

  Team& team_;
  const Load& load_;
  std::vector<std::vector<std::uint64_t>> boards_;
};

/// Behind a barrier everybody sees what everybody did before it.
class BarrierRounds {
 public:
  explicit BarrierRounds(Team& team) : team_(team), load_(team.load()) {
    const auto ranks = static_cast<std::size_t>(load_.ranks);
    words_.resize(ranks * ranks);
    notes_.resize(2 * ranks);
  }

  void play() {
    team_.run(1, [this](int rank, int) {
      Actor actor(team_, rank, 0);
      std::uint32_t epoch = load_.first_epoch;
      for (std::uint32_t round = 1; round <= load_.ops; ++round) {
        epoch = protocol::next_epoch(epoch);
        if (!play_round(actor, round, protocol::make_mark(kGeneration, epoch, 7))) return;
      }
    });
  }

 private:
  struct alignas(128) Word {
    std::uint64_t value = 0;
  };

  bool play_round(Actor& actor, std::uint32_t round, std::uint64_t mark) {
    const int me = actor.rank();
    const auto ranks = static_cast<std::size_t>(load_.ranks);
    note(round, me) = round;
    for (int peer = 0; peer < load_.ranks; ++peer) {
      protocol::enter_barrier(words_[static_cast<std::size_t>(peer) * ranks + static_cast<std::size_t>(me)].value,
                              team_.bell(peer), mark);
      actor.step();
    }
    for (int peer = 0; peer < load_.ranks; ++peer) {
      std::uint64_t& word = words_[static_cast<std::size_t>(me) * ranks + static_cast<std::size_t>(peer)].value;
      if (!actor.must("barrier", peer, [&](auto& w, auto who) { return protocol::wait_barrier(w, who, word, mark); }))
        return false;
    }
    for (int peer = 0; peer < load_.ranks; ++peer) {
      if (note(round, peer) == round) continue;
      team_.fail("rank %d left round %u before rank %d had entered it", me, round, peer);
      return false;
    }
    return true;
  }
  /// Two notes per rank, by parity: a fast rank may be in the next round.
  std::uint64_t& note(std::uint32_t round, int rank) {
    return notes_[static_cast<std::size_t>(round % 2) * static_cast<std::size_t>(load_.ranks) +
                  static_cast<std::size_t>(rank)]
        .value;
  }

  Team& team_;
  const Load& load_;
  std::vector<Word> words_, notes_;
};

/// Low latency: `regions` per pair and no credit, at most two turns sent and not received, received in order.
class RegionExchange {
 public:
  explicit RegionExchange(Team& team) : team_(team), load_(team.load()) {
    const auto pairs = static_cast<std::size_t>(load_.ranks * load_.ranks);
    arrived_.resize(pairs);
    rows_.resize(pairs * load_.regions);
  }

  void play() {
    team_.run(1, [this](int rank, int) {
      Actor actor(team_, rank, 0);
      std::uint32_t sent = 0, received = 0, send_epoch = load_.first_epoch, receive_epoch = load_.first_epoch;
      while (received < load_.ops) {
        const bool can_send = sent < load_.ops && sent - received < 2;
        if (can_send && (sent == received || actor.random() % 2 == 0)) {
          send(actor, send_epoch = protocol::next_epoch(send_epoch), ++sent);
        } else if (!receive(actor, receive_epoch = protocol::next_epoch(receive_epoch), ++received)) {
          return;
        }
      }
    });
  }

 private:
  static constexpr std::size_t kWords = 12;
  struct alignas(128) Word {
    std::uint64_t value = 0;
  };
  struct Row {
    std::uint64_t word[kWords] = {};
  };

  std::size_t pair(int source, int holder) const { return static_cast<std::size_t>(holder * load_.ranks + source); }
  Row& row(int source, int holder, std::uint32_t epoch) {
    return rows_[pair(source, holder) * load_.regions + epoch % load_.regions];
  }
  static std::uint64_t mark(std::uint32_t epoch) { return protocol::make_mark(kGeneration, epoch, 5); }

  void send(Actor& actor, std::uint32_t epoch, std::uint32_t turn) {
    const int me = actor.rank();
    for (int step = 1; step < load_.ranks; ++step) {
      const int peer = (me + step) % load_.ranks;
      Row& to = row(me, peer, epoch);
      for (std::size_t word = 0; word < kWords; ++word) to.word[word] = mix(static_cast<std::uint64_t>(me), turn, word);
      actor.step();
      protocol::Shared(arrived_[pair(me, peer)].value).store(mark(epoch), protocol::kRelease);
      protocol::ring(team_.bell(peer));
    }
  }

  bool receive(Actor& actor, std::uint32_t epoch, std::uint32_t turn) {
    const int me = actor.rank();
    for (int step = 1; step < load_.ranks; ++step) {
      const int peer = (me + step) % load_.ranks;
      std::uint64_t& word = arrived_[pair(peer, me)].value;
      if (!actor.must("rows", peer, [&](auto& w, auto who) { return protocol::wait(w, who, word, mark(epoch)); }))
        return false;
      actor.step();
      const Row& from = row(peer, me, epoch);
      for (std::size_t at = 0; at < kWords; ++at) {
        if (from.word[at] == mix(static_cast<std::uint64_t>(peer), turn, at)) continue;
        team_.fail("rank %d: word %zu of rank %d in turn %u is another", me, at, peer, turn);
        return false;
      }
    }
    return true;
  }

  Team& team_;
  const Load& load_;
  std::vector<Word> arrived_;
  std::vector<Row> rows_;
};

/// Two threads of rank 0 answer two threads of rank 1, all asleep between words: a lost wake-up lasts as long as the
/// limit of a sleep, here far too long.
class Sleepers {
 public:
  explicit Sleepers(Team& team) : team_(team), load_(team.load()), words_(4) {}

  void play() {
    team_.run(2, [this](int rank, int role) {
      std::uint64_t& own = words_[static_cast<std::size_t>(rank * 2 + role)].value;
      std::uint64_t& theirs = words_[static_cast<std::size_t>((1 - rank) * 2 + role)].value;
      for (std::uint64_t turn = 1; turn <= load_.ops; ++turn) {
        if (rank == 0) publish(theirs, turn);
        if (!sleep_until(own, rank, turn)) return;
        if (rank == 1) publish(theirs, turn);
      }
    });
  }

 private:
  struct alignas(128) Word {
    std::uint64_t value = 0;
  };
  static constexpr std::uint64_t kSleepNs = 3 * kSecond;

  void publish(std::uint64_t& word, std::uint64_t turn) {
    const bool mine_is_rank_1 = &word >= &words_[2].value;
    protocol::Shared(word).store(turn, protocol::kRelease);
    protocol::ring(team_.bell(mine_is_rank_1 ? 1 : 0));
  }

  bool sleep_until(std::uint64_t& word, int rank, std::uint64_t turn) {
    const auto is_there = [&] { return protocol::Shared(word).load(protocol::kSequential) >= turn; };
    while (!is_there()) {
      const std::uint64_t from_ns = protocol::now_ns();
      protocol::sleep_unless(team_.bell(rank), kSleepNs, is_there);
      if (protocol::now_ns() - from_ns > kSleepNs / 2) {
        team_.fail("rank %d slept %.1f s for turn %llu: a wake-up was lost", rank,
                   static_cast<double>(protocol::now_ns() - from_ns) * 1e-9, static_cast<unsigned long long>(turn));
        return false;
      }
      if (protocol::Shared(team_.abort_word(rank)).load(protocol::kRelaxed) != 0) return false;
    }
    return true;
  }

  Team& team_;
  const Load& load_;
  std::vector<Word> words_;
};

}  // namespace anyep::test
