// Routing inputs: generator profiles, traces, text behind a gate, model presets, and what a batch realised.
// The numbers depend on (profile, seed, step, global token id) and on nothing else: not on the platform, not on how
// many ranks the tokens are cut over. Exceptions are named where they are declared.
#pragma once

#include <anyep/types.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace anyep::workload {

/// How experts are chosen. The form of parse_profile() is in parentheses; [ ] may be left out.
enum class Kind : std::uint8_t {
  kUniform,     ///< (uniform) every expert alike
  kBalanced,    ///< (balanced) choices spread evenly over the experts, rotated by one per token: exactly even
  kLognormal,   ///< (lognormal:S) popularity exp(N(0, S)), drawn once per seed
  kMaxVio,      ///< (maxvio:V) lognormal whose S gives max/mean - 1 = V of the pairs per rank; looks at num_ranks
  kSorted,      ///< (sorted:S) lognormal with the most popular experts first: the worst placement
  kPowerLaw,    ///< (powerlaw:A) popularity from the density x^-A on [1, 0.8 * 4096]
  kZipf,        ///< (zipf:S) popularity rank^-S, shuffled
  kHotRank,     ///< (hot-rank:R) rank seed % num_ranks receives R times the rows of any other; looks at num_ranks
  kHotExperts,  ///< (khot:N:F) the share F of all choices, or all that distinct choices allow, on N neighbours
  kGrouped,     ///< (grouped:G:K) sigmoid gate with bias: K of G groups by the sum of their top 2, then top-k
  kHash,        ///< (hash) experts are a function of a word id, word ids follow Zipf(1.1)
  kDomain,      ///< (domain:D) requests of 256 tokens, D popularities, choices that stay from token to token
  kDrop,        ///< (drop:P) uniform with the share P of choices unused (-1), whole tokens among them
  kRagged,      ///< (ragged) uniform; tokens per rank log-normal up to tokens_per_rank, one rank or more without any
  kEplb,        ///< (eplb:SLOTS) lognormal:1.1 on replicated experts; ids are slots; looks at num_ranks
  kRotating,    ///< (rotating[:N]) lognormal:1.1 that moves on every N steps (16)
  kBurst,       ///< (burst[:N]) lognormal:0.4; every N-th step (8) a few experts are 10 times as popular
  kDuplicates,  ///< (duplicates) drawn with replacement; the only profile with equal ids in a row
};

struct Profile {
  Kind kind = Kind::kUniform;
  double value = 0;  ///< S, V, A, R, F or P
  int count = 0;     ///< N, G, D or SLOTS
  int kept = 0;      ///< K
  friend bool operator==(const Profile&, const Profile&) = default;
};

/// @throws Error kArgument listing the forms.
ANYEP_API Profile parse_profile(std::string_view text);
/// parse_profile(to_text(p)) == p.
ANYEP_API std::string to_text(const Profile& profile);
/// One line per form with its meaning, for a help text.
ANYEP_API std::string profile_help();

struct Request {
  Profile profile;
  std::uint64_t seed = 1;
  std::uint64_t step = 0;  ///< batches of one seed differ by it
  int num_experts = 256;
  int top_k = 8;  ///< 1..32, at most num_experts
  int num_ranks = 1;
  std::int64_t tokens_per_rank = 4096;
};

/// The choices of every rank's tokens. Global token ids go up from rank 0's first token.
struct ANYEP_API Batch {
  int top_k = 0;
  int num_experts = 0;                        ///< ids are below it: Request::num_experts, or the slots of eplb
  std::vector<std::int64_t> tokens_per_rank;  ///< [num_ranks]
  std::vector<std::int64_t> experts;          ///< [tokens of all ranks, top_k], -1 = unused
  /// Same shape. Positive and 0 where experts is -1; a token's weights sum up to about 1 (gates of text: to
  /// Gate::scaling).
  std::vector<float> weights;

  int num_ranks() const { return static_cast<int>(tokens_per_rank.size()); }
  std::int64_t num_tokens(int rank) const { return tokens_per_rank[static_cast<std::size_t>(rank)]; }
  std::int64_t num_tokens() const;           ///< of all ranks
  std::int64_t first_token(int rank) const;  ///< global id of the rank's first token
  std::span<const std::int64_t> experts_of(int rank) const;
  std::span<const float> weights_of(int rank) const;
  friend bool operator==(const Batch&, const Batch&) = default;
};

/// @throws Error kArgument: a number out of range, or a profile that cannot be met with these experts and ranks.
ANYEP_API Batch generate(const Request& request);
/// The same tokens cut anew: the first `num_tokens % num_ranks` ranks take one more than the others.
ANYEP_API Batch split(const Batch& batch, int num_ranks);

/// What a batch realised. Pairs are (token, choice) assignments: the experts' load. Rows are copies, one per token and
/// rank that it goes to: the network's load. Ratios are 0 where nothing was routed.
struct ANYEP_API Statistics {
  std::int64_t tokens = 0;
  std::int64_t pairs = 0;     ///< choices that are not -1
  std::int64_t rows = 0;      ///< de-duplicated copies
  double unused_share = 0;    ///< of the choices, -1
  double unrouted_share = 0;  ///< of the tokens, every choice -1
  double rank_rows_max_over_mean = 0;
  double rank_pairs_max_over_mean = 0;
  double expert_max_over_mean = 0;
  double gini = 0;             ///< of pairs per expert
  double entropy_bits = 0;     ///< of pairs per expert; log2(num_experts) is even
  double top_fifth_share = 0;  ///< of the pairs, on the most popular 20 % of the experts
  double distinct_ranks_per_token = 0;
  std::int64_t duplicate_pairs = 0;  ///< pairs whose expert stands earlier in the same token
  std::vector<std::int64_t> pairs_per_expert, pairs_per_rank, rows_per_rank;

  /// Two lines, without a line end after the second.
  std::string to_text() const;
};

/// Experts lie on ranks in contiguous blocks whose sizes differ by at most one, larger ones first.
/// @throws Error kArgument: an id that is not below num_experts, or a batch whose sizes do not fit together.
ANYEP_API Statistics measure(const Batch& batch, int num_experts, int num_ranks);

/// A text file of ids and weights (docs/trace_format.md). Weights survive to the bit.
/// @throws Error kArgument (a batch that is malformed), kResource (the file cannot be written).
ANYEP_API void write_trace(const std::string& path, const Batch& batch);
/// @throws Error kArgument naming the file and the key or line; a file that cannot be opened too.
ANYEP_API Batch read_trace(const std::string& path);

/// Shape of a published model's routed experts. Unverified numbers say so in `note`.
struct ModelPreset {
  std::string_view name;    ///< lower case with dashes: "deepseek-v3", "gpt-oss-120b"
  std::int64_t hidden = 0;  ///< of the rows on the wire
  int num_experts = 0;
  int top_k = 0;
  std::int64_t expert_width = 0;  ///< intermediate size of one expert; 0 = not known
  int groups = 1, groups_kept = 1;
  std::string_view note;
};

ANYEP_API std::span<const ModelPreset> models();
/// @throws Error kArgument listing the names.
ANYEP_API const ModelPreset& find_model(std::string_view name);

/// A gate in DeepSeek-V3's manner. Scores are sigmoids of the logits; a bias is added for the choice only; a group
/// counts the sum of its best two; the best `groups_kept` groups are kept and the best `top_k` experts inside them
/// chosen. Weights are the chosen scores over their sum, times `scaling`. One group = no groups.
struct Gate {
  int num_experts = 256;
  int top_k = 8;
  int groups = 8;       ///< a divisor of num_experts
  int groups_kept = 4;  ///< holds top_k experts or more
  float scaling = 2.5F;
};
ANYEP_API Gate gate_of(const ModelPreset& model);

/// Words of a text as tokens. Every word has 64 seeded features, mixed with those of its neighbours, so that equal
/// words differ in context. Embedding and gate logits both derive from the 64 mixed features: the embedding by a sparse
/// seeded projection (three features per element), the logits by a dense one. That makes both cheap without a trained
/// model. Token ids past the last word start again at the first. Copies share the text; all members may run
/// concurrently.
class ANYEP_API TextWorkload {
 public:
  struct Options {
    std::int64_t hidden = 7168;
    Gate gate;
    std::uint64_t seed = 1;
  };
  /// The files' words one after another. @throws Error kArgument: a file that is missing, or no words in any.
  static TextWorkload load(std::span<const std::string> paths, const Options& options);
  static TextWorkload from_text(std::string text, const Options& options);

  std::int64_t num_words() const;
  std::int64_t hidden() const;
  const Gate& gate() const;
  std::string_view word(std::int64_t token) const;
  /// Bits of `hidden` bfloat16 elements, about standard normal. @throws Error kArgument: another size of `out`.
  void embed(std::int64_t token, std::span<std::uint16_t> out) const;
  /// Choices of the tokens from `first_token` on, cut over ranks as told.
  Batch route(std::int64_t first_token, std::span<const std::int64_t> tokens_per_rank) const;

 private:
  struct State;
  explicit TextWorkload(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

}  // namespace anyep::workload
