// The links between ranks: rendezvous, set-up exchanges, messages; ranks as threads.
#include <gmock/gmock.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <atomic>
#include <thread>

#include "bootstrap/frames.h"
#include "bootstrap/memfd.h"
#include "tests/unit/control_world.h"
#include "tests/unit/thrown.h"

namespace anyep {
namespace {

using namespace test;
using bootstrap::UniqueFd;
using control::Control;
using control::Message;
using testing::ElementsAre;
using testing::HasSubstr;

// Runs the body with a connected control on every rank; threads. The recorder outlives the control.
void with_controls(int num_ranks, const std::function<void(Control&, Recorder&)>& body) {
  const LocalGroup group(num_ranks);
  LocalGroup::run_threads(num_ranks, [&](int rank) {
    Recorder recorder;
    body(*connect(group, rank), recorder);
  });
}

void with_controls(int num_ranks, const std::function<void(Control&)>& body) {
  with_controls(num_ranks, [&](Control& control, Recorder&) { body(control); });
}

std::vector<std::byte> payload(int rank, std::size_t bytes) {
  std::vector<std::byte> made(bytes);
  for (std::size_t at = 0; at < bytes; ++at)
    made[at] = static_cast<std::byte>((at * 7 + static_cast<std::size_t>(rank)) % 251);
  return made;
}

TEST(Control, AnyNumberOfRanksConnects) {
  for (const int num_ranks : {1, 2, 3, 6}) {
    std::vector<std::uint64_t> generations(static_cast<std::size_t>(num_ranks));
    std::atomic<int> ranks = 0;
    with_controls(num_ranks, [&](Control& control) {
      EXPECT_EQ(control.num_ranks(), num_ranks);
      ranks += 1 << control.rank();
      generations[static_cast<std::size_t>(control.rank())] = control.generation();
      for (int peer = 0; peer < num_ranks; ++peer) {
        EXPECT_TRUE(control.same_process(peer));
        EXPECT_EQ(control.pid(peer), ::getpid());
      }
      EXPECT_EQ(control.num_strangers(), 0U);
    });
    EXPECT_EQ(ranks, (1 << num_ranks) - 1);
    for (const std::uint64_t generation : generations) {
      EXPECT_EQ(generation, generations[0]);
      EXPECT_GT(generation, 0U);
      EXPECT_LE(generation, 0xffffU);
    }
  }
}

TEST(Control, GathersAnySizeInRankOrder) {
  with_controls(3, [](Control& control) {
    for (const std::size_t bytes : {0, 1, 100, 24 * 1024, 24 * 1024 + 1, 1'000'000}) {
      const auto mine = payload(control.rank(), bytes);
      std::vector<std::byte> all(3 * bytes);
      control.all_gather(mine, all, in(20s));
      for (int rank = 0; rank < 3; ++rank) {
        const auto begin = all.begin() + static_cast<std::ptrdiff_t>(bytes) * rank;
        EXPECT_TRUE(std::equal(begin, begin + static_cast<std::ptrdiff_t>(bytes), payload(rank, bytes).begin()));
      }
    }
    std::array<std::byte, 1> odd{};
    EXPECT_EQ(thrown([&] { control.all_gather({}, odd, in(1s)); }).code, ErrorCode::kArgument);
  });
}

TEST(Control, DescriptorsReachEveryRank) {
  with_controls(3, [](Control& control) {
    for (const std::size_t count : {0, 1, 3, 150}) {
      std::vector<UniqueFd> owned;
      std::vector<int> mine;
      for (std::size_t at = 0; at < count; ++at) {
        owned.push_back(bootstrap::make_memfd("anyep-test", 4096));
        mine.push_back(owned.back().get());
        const int tag = control.rank() * 1000 + static_cast<int>(at);
        ASSERT_EQ(::pwrite(mine.back(), &tag, sizeof tag, 0), static_cast<ssize_t>(sizeof tag));
      }
      const auto all = control.exchange_fds(mine, in(20s));
      ASSERT_EQ(all.size(), 3U);
      for (int rank = 0; rank < 3; ++rank) {
        const auto& theirs = all[static_cast<std::size_t>(rank)];
        ASSERT_EQ(theirs.size(), count);
        for (std::size_t at = 0; at < count; ++at) {
          if (rank == control.rank()) {
            EXPECT_FALSE(theirs[at]);
            continue;
          }
          int tag = -1;
          ASSERT_EQ(::pread(theirs[at].get(), &tag, sizeof tag, 0), static_cast<ssize_t>(sizeof tag));
          EXPECT_EQ(tag, rank * 1000 + static_cast<int>(at));
          EXPECT_NO_THROW(bootstrap::check_memfd(theirs[at].get(), 4096));
        }
      }
    }
  });
}

TEST(Control, DifferentCountsOfDescriptorsAreAMismatchOnAllRanks) {
  with_controls(2, [](Control& control) {
    const UniqueFd memory = bootstrap::make_memfd("anyep-test", 4096);
    const std::vector<int> mine(control.rank() == 0 ? 1 : 2, memory.get());
    EXPECT_EQ(thrown([&] { control.exchange_fds(mine, in(20s)); }).code, ErrorCode::kMismatch);
    EXPECT_EQ(thrown([&] { control.exchange_fds(mine, in(20s)); }).code, ErrorCode::kState);
  });
}

TEST(Control, DifferentSizesAreAMismatchOnAllRanks) {
  with_controls(3, [](Control& control) {
    const std::vector<std::byte> mine(control.rank() == 1 ? 100'000 : 50'000);
    std::vector<std::byte> all(3 * mine.size());
    EXPECT_EQ(thrown([&] { control.all_gather(mine, all, in(20s)); }).code, ErrorCode::kMismatch);
  });
}

TEST(Control, AVoteOfSuccessesThrowsNothing) {
  with_controls(4, [](Control& control) { EXPECT_NO_THROW(control.vote(nullptr, "create", in(20s))); });
}

TEST(Control, OneFailedRankFailsTheVoteOnAllWithItsCause) {
  with_controls(4, [](Control& control) {
    Error mine(ErrorCode::kResource, "create: mmap failed: no memory");
    mine.need = 100;
    mine.have = 7;
    const Error error = thrown([&] { control.vote(control.rank() == 2 ? &mine : nullptr, "create", in(20s)); });
    EXPECT_EQ(error.code, ErrorCode::kResource);
    EXPECT_STREQ(error.what(), "create: failed on 1 of 4 ranks: rank 2: mmap failed: no memory");
    EXPECT_THAT(error.peers, ElementsAre(2));
    EXPECT_EQ(error.rank, control.rank());
    EXPECT_EQ(error.need, 100U);
    EXPECT_EQ(error.have, 7U);
  });
}

TEST(Control, AVoteListsAllCausesAndKeepsTheOwnCode) {
  with_controls(3, [](Control& control) {
    const Error first(ErrorCode::kArgument, "create: a"), last(ErrorCode::kDevice, "b");
    const Error* const mine = control.rank() == 0 ? &first : control.rank() == 2 ? &last : nullptr;
    const Error error = thrown([&] { control.vote(mine, "create", in(20s)); });
    EXPECT_STREQ(error.what(), "create: failed on 2 of 3 ranks: rank 0: a; rank 2: b");
    EXPECT_EQ(error.code, control.rank() == 2 ? ErrorCode::kDevice : ErrorCode::kArgument);
    EXPECT_THAT(error.peers, ElementsAre(0, 2));
  });
}

TEST(Control, ATimeoutNamesWhoIsMissing) {
  with_controls(4, [](Control& control) {
    if (control.rank() == 1) {
      std::this_thread::sleep_for(400ms);
      return;
    }
    const std::vector<std::byte> mine(8);
    std::vector<std::byte> all(32);
    const auto start = Clock::now();
    const Error error = thrown([&] { control.all_gather(mine, all, in(100ms)); });
    EXPECT_EQ(error.code, ErrorCode::kTimeout) << error.what();
    EXPECT_THAT(error.peers, ElementsAre(1));
    EXPECT_LT(since(start), 350ms);
  });
}

TEST(Control, ARankThatFailsInSetUpTellsTheOthersWhy) {
  with_controls(3, [](Control& control) {
    if (control.rank() == 2) {
      const UniqueFd memory = bootstrap::make_memfd("anyep-test", 4096);
      const std::array<int, 1> mine = {memory.get()};
      EXPECT_EQ(thrown([&] { control.exchange_fds(mine, in(20s)); }).code, ErrorCode::kMismatch);
      return;
    }
    // Ranks 0 and 1 agree with each other, and hear from rank 2 or see for themselves.
    const Error error = thrown([&] { control.vote(nullptr, "create", in(20s)); });
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << error.what();
  });
}

TEST(Control, ARankThatLeavesDuringSetUpIsAborted) {
  with_controls(3, [](Control& control) {
    if (control.rank() == 0) return;
    const Error error = thrown([&] { meet_at(control); });
    EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
    EXPECT_THAT(error.peers, ElementsAre(0));
  });
}

TEST(Control, MessagesArriveWholeAndInOrder) {
  constexpr std::uint64_t kCount = 3000;
  with_controls(3, [](Control& control, Recorder& recorder) {
    control.start(recorder);
    for (std::uint64_t number = 0; number < kCount; ++number) {
      Message sent = message(7, "number " + std::to_string(number));
      sent.a = number;
      sent.b = static_cast<std::uint64_t>(control.rank());
      for (int peer = 0; peer < 3; ++peer) {
        while (peer != control.rank() && !control.tell(peer, sent)) std::this_thread::yield();
      }
    }
    for (int peer = 0; peer < 3; ++peer) {
      if (peer == control.rank()) continue;
      ASSERT_TRUE(recorder.wait_messages(peer, kCount, 30s));
      const auto got = recorder.messages(peer);
      for (std::uint64_t number = 0; number < kCount; ++number) {
        EXPECT_EQ(got[number].kind, 7U);
        EXPECT_EQ(got[number].a, number);
        EXPECT_EQ(got[number].b, static_cast<std::uint64_t>(peer));
        EXPECT_EQ(got[number].text, "number " + std::to_string(number));
      }
    }
    // Nobody leaves before all have read.
    control.tell_all(message(8));
    for (int peer = 0; peer < 3; ++peer) {
      EXPECT_TRUE(peer == control.rank() || recorder.wait_messages(peer, kCount + 1));
    }
  });
}

TEST(Control, TextWithoutAnEndIsCut) {
  with_controls(2, [](Control& control, Recorder& recorder) {
    control.start(recorder);
    Message sent;
    std::memset(sent.text, 'x', sizeof sent.text);
    EXPECT_TRUE(control.tell(1 - control.rank(), sent));
    ASSERT_TRUE(recorder.wait_messages(1 - control.rank(), 1));
    EXPECT_EQ(std::strlen(recorder.messages(1 - control.rank())[0].text), sizeof sent.text - 1);
    control.tell_all(message(8));  // nobody leaves before both have read
    EXPECT_TRUE(recorder.wait_messages(1 - control.rank(), 2));
  });
}

TEST(Control, AFullLinkRefusesInsteadOfWaiting) {
  std::atomic<bool> done = false;
  with_controls(2, [&](Control& control) {
    meet_at(control);
    if (control.rank() == 0) {
      const auto start = Clock::now();
      int taken = 0;
      while (taken < 100'000 && control.tell(1, message(1))) ++taken;
      EXPECT_GT(taken, 50);
      EXPECT_LT(taken, 100'000);
      EXPECT_LT(since(start), 2s);
      done = true;
    }
    while (!done) std::this_thread::sleep_for(1ms);  // rank 1 reads nothing
  });
}

TEST(Control, TellRefusesItselfStrangersAndAStoppedControl) {
  with_controls(2, [](Control& control) {
    EXPECT_FALSE(control.tell(control.rank(), message(1)));
    EXPECT_FALSE(control.tell(-1, message(1)));
    EXPECT_FALSE(control.tell(2, message(1)));
    meet_at(control);
    control.stop();
    control.stop();
    EXPECT_FALSE(control.tell(1 - control.rank(), message(1)));
    EXPECT_TRUE(control.same_process(0));
  });
}

TEST(Control, AMessageThenAHangUpIsNoDeath) {
  with_controls(2, [](Control& control, Recorder& recorder) {
    control.start(recorder);
    if (control.rank() == 0) {
      control.tell_all(message(9, "leaving"));
      control.stop();
      return;
    }
    ASSERT_TRUE(recorder.wait_hangup(0));
    std::this_thread::sleep_for(50ms);
    EXPECT_THAT(recorder.order(0), ElementsAre("message", "hang-up"));
    EXPECT_STREQ(recorder.messages(0)[0].text, "leaving");
    EXPECT_FALSE(control.tell(0, message(1)));
  });
}

TEST(Control, AMessageToldBeforeStopArrivesEvenIfTheTellerDidNotRead) {
  with_controls(2, [](Control& control, Recorder& recorder) {
    if (control.rank() == 0) {
      meet_at(control);
      std::this_thread::sleep_for(100ms);  // rank 1's messages stay unread: its link is reset at our stop()
      for (int number = 0; number < 20; ++number) EXPECT_TRUE(control.tell(1, message(9)));
      return;
    }
    meet_at(control);
    for (int number = 0; number < 20; ++number) EXPECT_TRUE(control.tell(0, message(1)));
    std::this_thread::sleep_for(300ms);
    control.start(recorder);
    ASSERT_TRUE(recorder.wait_hangup(0));
    EXPECT_EQ(recorder.messages(0).size(), 20U);
  });
}

TEST(Control, ManyThreadsMayTellWhileTheControlStops) {
  for (int repeat = 0; repeat < 5; ++repeat) {
    with_controls(2, [](Control& control, Recorder& recorder) {
      control.start(recorder);
      std::atomic<bool> end = false;
      std::vector<std::thread> tellers;
      for (int teller = 0; teller < 2; ++teller) {
        tellers.emplace_back([&] {
          while (!end) control.tell_all(message(1));
        });
      }
      std::this_thread::sleep_for(20ms);
      control.stop();
      end = true;
      for (std::thread& teller : tellers) teller.join();
    });
  }
}

// A wrong rank through a callback: every rank refuses, with both processes.
TEST(Control, TwoThatClaimOneRankAreAMismatchOnAllRanks) {
  const LocalGroup group(3);
  LocalGroup::run_threads(3, [&](int rank) {
    const auto inner = group.member(rank);
    CallbackBootstrap bootstrap(
        rank == 2 ? 1 : rank, 3,
        [&](std::span<const std::byte> mine, std::span<std::byte> all) { inner->all_gather(mine, all, in(20s)); });
    const Error error = thrown([&] { Control::connect(bootstrap, "create", in(20s)); });
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("claims rank 1, which is process " + std::to_string(::getpid())));
    EXPECT_THAT(error.peers, ElementsAre(2));
  });
}

TEST(Control, DifferentNumbersOfRanksAreAMismatchOnAllRanks) {
  const LocalGroup group(2);
  LocalGroup::run_threads(2, [&](int rank) {
    const auto inner = group.member(rank);
    CallbackBootstrap bootstrap(rank, rank == 1 ? 3 : 2,
                                [&](std::span<const std::byte> mine, std::span<std::byte> all) {
                                  inner->all_gather(mine, all.first(2 * mine.size()), in(20s));
                                });
    const Error error = thrown([&] { Control::connect(bootstrap, "create", in(20s)); });
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("ranks, not"));
  });
}

TEST(Control, GarbageFromTheBootstrapIsCorrupt) {
  CallbackBootstrap bootstrap(
      0, 2, [](std::span<const std::byte>, std::span<std::byte> all) { std::ranges::fill(all, std::byte{0x5a}); });
  EXPECT_EQ(thrown([&] { Control::connect(bootstrap, "create", in(1s)); }).code, ErrorCode::kCorrupt);
}

TEST(Control, ARankThatFailsAfterTheCardsAbortsTheOthers) {
  const LocalGroup group(3);
  LocalGroup::run_threads(3, [&](int rank) {
    Interrupted bootstrap(group.member(rank), [&] {
      if (rank == 1) throw std::runtime_error("on purpose");
    });
    if (rank == 1) {
      EXPECT_THROW(Control::connect(bootstrap, "create", in(20s)), std::runtime_error);
      return;
    }
    // Rank 2 finds rank 1's door gone and tells rank 0.
    const Error error = thrown([&] { Control::connect(bootstrap, "create", in(20s)); });
    EXPECT_EQ(error.code, ErrorCode::kAborted) << error.what();
    EXPECT_THAT(error.peers, ElementsAre(1));
  });
}

TEST(Control, ARankThatNeverConnectsIsNamedAtTheLimit) {
  const LocalGroup group(3);
  LocalGroup::run_threads(3, [&](int rank) {
    Interrupted bootstrap(group.member(rank), [&] {
      if (rank == 2) std::this_thread::sleep_for(500ms);
    });
    const Error error = thrown([&] { Control::connect(bootstrap, "create", in(rank == 2 ? 20s : 150ms)); });
    if (rank == 2) return;
    EXPECT_EQ(error.code, ErrorCode::kTimeout) << error.what();
    EXPECT_THAT(error.peers, ElementsAre(2));
    EXPECT_EQ(error.phase, "connect");
  });
}

// Anybody with our user id who finds the door: silent, garbage, a hello with another key, one who leaves at once.
class Stranger {
 public:
  explicit Stranger(const std::filesystem::path& door) : socket_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    door.string().copy(address.sun_path, sizeof address.sun_path - 1);
    if (::connect(socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) socket_.reset();
  }
  bool connected() const { return static_cast<bool>(socket_); }
  void send(std::span<const std::byte> bytes) { ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL); }

 private:
  UniqueFd socket_;
};

TEST(Control, StrangersAtTheDoorAreDroppedAndCounted) {
  const TemporaryFolder folder;
  const LocalGroup group(2);
  std::vector<Stranger> silent;
  const auto disturb = [&](const std::filesystem::path& door) {
    silent.emplace_back(door);
    Stranger without_keys(door), long_winded(door), short_spoken(door), gone(door);
    EXPECT_TRUE(silent.back().connected() && without_keys.connected() && long_winded.connected() &&
                short_spoken.connected() && gone.connected());
    control::Greeting hello;
    hello.rank = 1;
    hello.to = 0;
    without_keys.send(control::bytes_of(hello));
    long_winded.send(std::vector<std::byte>(64 * 1024, std::byte{1}));
    short_spoken.send(std::vector<std::byte>(1));
  };
  std::array<std::uint64_t, 2> counted{};
  LocalGroup::run_threads(2, [&](int rank) {
    Interrupted bootstrap(group.member(rank), [&] {
      if (rank == 0) return;
      for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
        EXPECT_EQ(entry.status().permissions(), std::filesystem::perms::owner_all);
        disturb(entry.path() / "door");
      }
      EXPECT_EQ(silent.size(), 2U);
      std::this_thread::sleep_for(100ms);
    });
    const auto control = Control::connect(bootstrap, "create", in(20s));
    meet_at(*control);
    counted[static_cast<std::size_t>(rank)] = control->num_strangers();
  });
  EXPECT_EQ(counted[0], 4U);  // rank 1 is called by nobody and opens to nobody
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Control, ATooLongTemporaryFolderIsReplaced) {
  const TemporaryFolder folder;
  const auto deep = folder.path() / std::string(120, 'd');
  std::filesystem::create_directory(deep);
  ::setenv("TMPDIR", deep.c_str(), 1);
  with_controls(2, [](Control& control) { meet_at(control); });
  EXPECT_TRUE(std::filesystem::is_empty(deep));
}

TEST(Control, TwoHundredRoundsLeaveNothingBehind) {
  const TemporaryFolder folder;
  const auto round = [] {
    with_controls(3, [](Control& control, Recorder& recorder) {
      meet_at(control);
      control.start(recorder);
      control.tell_all(message(1));
    });
  };
  round();
  const Holdings before;
  for (int repeat = 0; repeat < 200; ++repeat) round();
  EXPECT_EQ(Holdings(), before);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Control, FailedRoundsLeaveNothingBehind) {
  const TemporaryFolder folder;
  const auto round = [](int kind) {
    const LocalGroup group(3);
    LocalGroup::run_threads(3, [&](int rank) {
      Interrupted bootstrap(group.member(rank), [&] {
        if (kind == 0 && rank == 1) throw std::runtime_error("on purpose");
      });
      try {
        const auto control = Control::connect(bootstrap, "create", in(20s));
        const Error mine(ErrorCode::kResource, "on purpose");
        control->vote(rank == 2 ? &mine : nullptr, "create", in(20s));
      } catch (const std::runtime_error&) {
        return;
      }
      ADD_FAILURE() << "rank " << rank << " did not fail";
    });
  };
  round(0);
  round(1);
  const Holdings before;
  for (int repeat = 0; repeat < 40; ++repeat) round(repeat % 2);
  EXPECT_EQ(Holdings(), before);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace anyep
