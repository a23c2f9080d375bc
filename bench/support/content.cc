#include "bench/support/content.h"

namespace anyep::bench {

RandomContent::RandomContent(std::int64_t hidden, int num_ranks, std::int64_t most_tokens_per_rank, std::uint64_t seed)
    : num_ranks_(num_ranks), most_tokens_(most_tokens_per_rank), payload_(hidden, seed) {}

RowContent::Row RandomContent::row(int source, std::int64_t token, std::int64_t kind) const {
  return payload_.row(static_cast<std::uint64_t>((kind * num_ranks_ + source) * most_tokens_ + token));
}

RowContent::Row RandomContent::token(int source, std::int64_t token, Scratch) const {
  return row(source, token, 0);
}

RowContent::Row RandomContent::answer_of_rank(int source, std::int64_t token, int reader, Scratch) const {
  return row(source, token, 1 + reader);
}

RowContent::Row RandomContent::answer_of_expert(int source, std::int64_t token, int expert, Scratch) const {
  return row(source, token, 1 + expert);
}

}  // namespace anyep::bench
