// The membership of one rank in its group, whatever moves its rows: the windows by which hosts tell each other what they
// do (and, of CPU ranks, the rows too), the watcher's ear, and how the group fails.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/config.h>
#include <anyep/error.h>
#include <anyep/topology.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bootstrap/control.h"
#include "core/buffers.h"
#include "host/memory.h"
#include "protocol/doorbell.h"
#include "protocol/handoff.h"

namespace anyep::host {

/// Message::kind on the control links.
enum MessageKind : std::uint32_t {
  kMessageClosing = 1,  ///< orderly close
  kMessageLeaving,      ///< an error's code (a), its peers as a bit mask of ranks < 64 (b), its text
  kMessageRefused,      ///< call number (a) was refused locally; code (b); its text
  // Two ranks agree to count each other in again; b is the question's number throughout, which says who asks.
  kMessageUnmask,         ///< asks; a = my next low-latency turn
  kMessageUnmaskOffer,    ///< answers; a = a turn that I have not begun
  kMessageUnmaskConfirm,  ///< to the offer; a = that turn, or a later one if I have begun it
  kMessageUnmaskDone,     ///< to the confirmation: it came before I began that turn, a; else there is another offer
  kMessageUnmaskOff,      ///< of either: that question is closed, for its answerer's or its asker's caller has masked
};

control::Message message_of(std::uint32_t kind, std::uint16_t generation, std::uint64_t a, std::uint64_t b,
                            std::string_view text);

/// What a rank knows of a peer that will write nothing more.
enum Gone : std::uint32_t { kHere = 0, kDead, kLeft };

class Group final : public control::Listener {
 public:
  /// Where rows, slots and low-latency regions lie: in this rank's host window, or in memory that a backend of its own
  /// shares; then the host window holds words only.
  enum class Payload : std::uint8_t { kHost, kElsewhere };
  /// A step of create() between the exchange of host windows and the last vote: shares what the backend has.
  using Share = std::function<void(control::Control&, const Group&, Deadline)>;
  /// Collective, all or none. `share` runs on every rank; what it throws is every rank's failure.
  static std::unique_ptr<Group> create(const Budget&, const Topology&, const Tuning&, Bootstrap&,
                                       Payload = Payload::kHost, const Share& share = {});
  ~Group() override;

  int rank() const { return rank_; }
  int num_ranks() const { return layout_.num_ranks; }
  std::uint16_t generation() const { return generation_; }
  const core::WindowLayout& layout() const { return layout_; }
  const Budget& budget() const { return budget_; }
  const Tuning& tuning() const { return tuning_; }
  const Topology& topology() const { return topology_; }

  RankMemory& memory(int rank) const { return *memories_[static_cast<std::size_t>(rank)]; }
  const std::shared_ptr<RankMemory>& own_memory() const { return memories_[static_cast<std::size_t>(rank_)]; }
  std::span<std::byte> own_window() const { return {memory(rank_).window.data(), memory(rank_).window.bytes()}; }
  std::byte* own(std::uint64_t offset) const { return memory(rank_).at(offset); }
  std::byte* peer(int rank, std::uint64_t offset) const { return memory(rank).at(offset); }
  /// The word of `array` at `holder`'s window that belongs to the pair with `other`.
  std::uint64_t& word(int holder, std::uint64_t array, int other) const;
  protocol::Doorbell& doorbell(int rank) const;

  /// This rank's ends of a stream: as producer to, as consumer from, `peer`.
  protocol::HandoffEnd producer_end(core::Stream stream, int peer);
  protocol::HandoffEnd consumer_end(core::Stream stream, int peer);

  // ---- failure ----
  std::uint64_t* abort_word() const { return failure_words_at<std::uint64_t>(0); }
  std::uint32_t* gone() const { return failure_words_at<std::uint32_t>(core::kWordBytes); }  ///< [ranks] Gone
  std::uint32_t* masked() const {  ///< [ranks] 1 = masked in low latency
    return failure_words_at<std::uint32_t>(core::kWordBytes + core::round_up(4 * memories_.size(), core::kWordBytes));
  }
  /// The pages that hold these three, for a backend whose waits run on a device.
  std::span<std::byte> failure_words() const { return {failure_words_.data(), failure_words_.bytes()}; }
  /// Keeps the first error, sets the abort word and tells the peers why this rank leaves. Later calls keep the first.
  void fail(const Error& error) noexcept;
  void refused(std::uint32_t call,
               const Error& error) noexcept;  ///< tells the peers that this rank will not run a call
  /// This rank refused call `call` itself: peers' refusals of it mean nothing.
  void forget_refusals(std::uint32_t call) noexcept;
  /// This rank starts to run `call`: if a peer has refused it, or does so later, the group fails with the peer's
  /// reason.
  void begin_call(std::uint32_t call) noexcept;
  /// Likewise; the call that was begun before it goes on too.
  void begin_call_right_behind(std::uint32_t call) noexcept;
  std::optional<Error> first_error() const;
  bool failed() const;
  /// Waits until the group has failed, at most `limit_ns`: for the reason of something seen in a window first.
  bool wait_until_failed(std::uint64_t limit_ns) const;

  // ---- masks and turns of low latency ----
  /// Begins one half of a low-latency op. The send half of a dispatch lifts masks whose agreed turn has come; a rank that
  /// has asked may wait for the last word about it, at most `limit_ns`.
  enum class Half { kDispatchSend, kCombineSend, kReceive };
  void begin_half(Half half, std::uint64_t limit_ns, std::uint32_t* turn);
  /// Ends it; between halves peers' questions are answered.
  void end_half() noexcept;
  /// Is the peer left out of this turn? A turn that was sent without it is received without it.
  bool is_masked(int peer, std::uint32_t turn) const;
  void set_mask(int peer, bool mask) noexcept;
  /// By the caller: also takes back what was asked or agreed about a later turn.
  void mask(int peer) noexcept;
  /// Asks a masked peer over the control link to count this rank in again, from a turn that both agree on and neither has
  /// begun. Waits for nobody. Not during a half.
  void ask_unmask(int peer) noexcept;

  /// Says goodbye; waits for everyone's, at most the close limit; releases everything. Ranks that did not come.
  std::vector<int> close();
  void stop() noexcept;  ///< local: stops the watcher

  /// Zero-copy combine input, private to this rank.
  std::byte* combine_buffer(std::uint64_t bytes);
  /// Keeps this rank's window and zero-copy buffer mapped.
  std::shared_ptr<const void> hold_memory();

 private:
  struct Readmission {
    std::uint64_t question = 0;    ///< open, of either: modulo the number of ranks it is the asker's rank; 0 = none
    std::uint32_t their_turn = 0;  ///< of the peer's question, until it is answered
    std::uint32_t turn = 0;        ///< from which both count each other in; 0 = none
    std::uint32_t margin = 2;      ///< turns between an offer and what it is about; doubled when that was too few
    bool settled = false;          ///< both know the turn
    bool wanted = false;           ///< this rank asks where the peer's question is closed
    std::uint32_t since = 0;       ///< the turn in which the mask was lifted; 0 = long ago
  };

  Group() = default;
  void on_message(int peer, const control::Message& message) noexcept override;
  void on_death(int peer, const char* how) noexcept override;
  void on_hangup(int peer) noexcept override;
  void take_error(const Error& error, bool tell) noexcept;
  void take_death(int peer, const char* how) noexcept;
  void set_gone(int peer, Gone how) noexcept;
  void wake_own() noexcept;
  void on_readmission(int peer, const control::Message& message) noexcept;
  bool asks(const Readmission& readmission) const noexcept;  ///< is its question this rank's?
  void ask(int peer, Readmission& readmission) noexcept;
  void answer(int peer, Readmission& readmission) noexcept;
  void tell_of_readmission(int peer, std::uint32_t kind, std::uint32_t turn, std::uint64_t question) noexcept;
  std::uint32_t turn_not_begun(std::uint32_t at_least, Readmission& readmission) const;

  template <class T>
  T* failure_words_at(std::uint64_t offset) const {
    return reinterpret_cast<T*>(failure_words_.data() + offset);
  }

  void connect(const Error* mine, Bootstrap&, Deadline);
  void compare(Deadline);
  void share_memory(const Share& share, Deadline);

  int rank_ = 0;
  std::uint16_t generation_ = 0;
  Budget budget_;
  Payload payload_ = Payload::kHost;
  Tuning tuning_;
  Topology topology_;
  core::WindowLayout layout_;
  std::unique_ptr<control::Control> control_;
  std::vector<std::shared_ptr<RankMemory>> memories_;
  std::vector<std::uint32_t> sent_, taken_;  ///< [streams * ranks] last turns of this rank's ends
  std::shared_ptr<Mapping> combine_buffer_ = std::make_shared<Mapping>();

  Mapping failure_words_;     ///< abort word, gone, masked
  mutable std::mutex mutex_;  ///< guards what follows
  mutable std::condition_variable changed_;
  std::optional<Error> first_error_;
  struct Refusal {
    std::uint32_t call;
    Error error;
  };
  std::vector<Refusal> refusals_;
  std::optional<std::uint32_t> refused_call_;  ///< the last one that this rank refused itself: peers' news of it is old
  std::uint32_t running_since_ = 0, running_call_ = 0;  ///< calls that run, first and last; 0 = none
  std::vector<std::uint8_t> closing_, ended_;           ///< [ranks] said goodbye; will say nothing more
  std::vector<Readmission> readmissions_;               ///< [ranks]
  std::uint64_t num_questions_ = 0;
  int num_halves_ = 0;  ///< going on
  std::uint32_t low_latency_turn_ = protocol::kFirstEpoch;
  bool stopped_ = false;
};

}  // namespace anyep::host
