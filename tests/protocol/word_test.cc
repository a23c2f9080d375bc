#include "protocol/word.h"

#include <gtest/gtest.h>

#include <set>

namespace anyep::protocol {
namespace {

constexpr std::uint16_t kGeneration = 0xBEEF;
std::uint64_t mark(std::uint32_t epoch) {
  return make_mark(kGeneration, epoch, 0x1234);
}

TEST(Word, KeepsItsThreeParts) {
  const std::uint64_t word = make_mark(0xBEEF, 0xDEADC0DE, 0x1234);
  EXPECT_EQ(word, 0xBEEFDEADC0DE1234u);
  EXPECT_EQ(generation_of(word), 0xBEEF);
  EXPECT_EQ(epoch_of(word), 0xDEADC0DEu);
  EXPECT_EQ(code_of(word), 0x1234);
}

TEST(Word, CountKeepsEpochAndValue) {
  const std::uint64_t word = make_count(0xFFFFFFFF, 0x80000001);
  EXPECT_EQ(count_epoch(word), 0xFFFFFFFFu);
  EXPECT_EQ(count_value(word), 0x80000001u);
}

TEST(Word, CodeHoldsKindAndEveryPartOfTheDigest) {
  EXPECT_EQ(kind_of(make_code(9, 0x123456789ABCDEF0u)), 9u);
  for (int bit = 0; bit < 64; ++bit) {
    EXPECT_NE(make_code(1, std::uint64_t{1} << bit), make_code(1, 0)) << "bit " << bit;
  }
}

TEST(Word, DigestTellsOrderAndValueApart) {
  std::set<std::uint64_t> seen;
  for (std::uint64_t a = 0; a < 20; ++a) {
    for (std::uint64_t b = 0; b < 20; ++b) seen.insert(digest(digest(kDigestSeed, a), b));
  }
  EXPECT_EQ(seen.size(), 400u);
}

TEST(Word, ReachedIsNotBefore) {
  EXPECT_TRUE(reached(mark(7), mark(7)));
  EXPECT_TRUE(reached(mark(8), mark(7)));
  EXPECT_FALSE(reached(mark(6), mark(7)));
  EXPECT_TRUE(reached(mark(7 + 0x7FFFFFFFu), mark(7)));
}

TEST(Word, ReachedGoesOverTheWrap) {
  const std::uint32_t last = 0xFFFFFFFFu, after = next_epoch(last);
  EXPECT_TRUE(reached(mark(after), mark(last)));
  EXPECT_TRUE(reached(mark(next_epoch(after)), mark(last - 3)));
  EXPECT_FALSE(reached(mark(last), mark(after)));
}

TEST(Word, ReachedWantsTheSameGeneration) {
  EXPECT_FALSE(reached(make_mark(kGeneration + 1, 9, 0), make_mark(kGeneration, 7, 0)));
  EXPECT_FALSE(reached(make_mark(kGeneration - 1, 9, 0), make_mark(kGeneration, 7, 0)));
}

TEST(Word, FreshMemoryHasReachedNothing) {
  EXPECT_FALSE(reached(0, make_mark(0, 0xFFFFFFFFu, 0)));
  EXPECT_FALSE(reached(0, make_mark(0, 0x80000001u, 0)));
}

TEST(Word, OnlyTheSameEpochContradicts) {
  EXPECT_TRUE(contradicts(make_mark(1, 5, 6), make_mark(1, 5, 7)));
  EXPECT_FALSE(contradicts(make_mark(1, 5, 7), make_mark(1, 5, 7)));
  EXPECT_FALSE(contradicts(make_mark(1, 6, 6), make_mark(1, 5, 7)));
  EXPECT_FALSE(contradicts(make_mark(2, 5, 6), make_mark(1, 5, 7)));
}

TEST(Word, EpochsGoOnInOrderModuloTwoAndFour) {
  std::uint32_t epoch = 0xFFFFFFFFu - 10;
  for (int turn = 0; turn < 20; ++turn) {
    const std::uint32_t next = next_epoch(epoch);
    EXPECT_NE(next, 0u);
    EXPECT_EQ(next % 2, (epoch + 1) % 2) << epoch;
    EXPECT_EQ(next % 4, (epoch + 1) % 4) << epoch;
    epoch = next;
  }
}

TEST(Word, EverySequencePassesTheWrapEarly) {
  EXPECT_LE(0xFFFFFFFFu - kFirstEpoch, 1000u);
}

}  // namespace
}  // namespace anyep::protocol
