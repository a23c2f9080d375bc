#include <anyep/workload.h>
#include <fmt/format.h>

#include <cmath>
#include <utility>

#include "core/check.h"
#include "workload/file.h"
#include "workload/gate.h"
#include "workload/math.h"
#include "workload/random.h"
#include "workload/text.h"

namespace anyep::workload {
namespace {

constexpr std::int64_t kMostHidden = 1 << 20;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 32;

// How much of a token's neighbours its features take: the word itself, the one before, two before, the one behind.
struct Neighbour {
  std::int64_t distance;
  float share;
};
constexpr Neighbour kContext[] = {{0, 1.0F}, {-1, 0.5F}, {-2, 0.25F}, {1, 0.25F}};

std::vector<float> gate_bias(const Gate& gate, std::uint64_t seed) {
  constexpr double kSpread = 0.02;  // against scores whose deviation is about 0.2: mild, as a trained gate's is
  std::vector<float> bias(static_cast<std::size_t>(gate.num_experts));
  Stream stream(seed, Purpose::kGateBias, 0);
  for (float& value : bias) value = static_cast<float>(kSpread * stream.gaussian());
  return bias;
}

}  // namespace

struct TextWorkload::State {
  State(std::string text, const Options& given)
      : options(given),
        key(mix(given.seed, kText)),
        words(std::move(text)),
        projection(static_cast<std::size_t>(given.hidden), key),
        matrix(static_cast<std::size_t>(given.gate.num_experts), key),
        bias(gate_bias(given.gate, key)) {
    for (const std::string_view word : words.distinct()) features.push_back(features_of(word, key));
  }

  std::size_t index_of(std::int64_t token) const {
    if (token < 0) core::throw_argument("text", "token", fmt::format("{}", token), "0 or more");
    return static_cast<std::size_t>(token) % words.size();
  }

  /// Mixed with the neighbours', scaled so that their mean square is 1. The text is a ring.
  Features mixed(std::int64_t token) const {
    const auto size = static_cast<std::int64_t>(words.size());
    const auto index = static_cast<std::int64_t>(index_of(token));
    Features sum{};
    for (const auto& [distance, share] : kContext) {
      const std::int64_t neighbour = ((index + distance) % size + size) % size;
      const Features& of_word = features[words.number_of(static_cast<std::size_t>(neighbour))];
      for (std::size_t feature = 0; feature < kNumFeatures; ++feature) sum[feature] += share * of_word[feature];
    }
    double square = 0;
    for (const float value : sum) square += static_cast<double>(value) * static_cast<double>(value);
    const auto scale = static_cast<float>(std::sqrt(static_cast<double>(kNumFeatures) / square));
    for (float& value : sum) value *= scale;
    return sum;
  }

  static constexpr std::uint64_t kText = 1000;  // apart from every Kind
  Options options;
  std::uint64_t key;
  Words words;
  Projection projection;
  GateMatrix matrix;
  std::vector<float> bias;
  std::vector<Features> features;  ///< per distinct word
};

TextWorkload::TextWorkload(std::shared_ptr<const State> state) : state_(std::move(state)) {}

TextWorkload TextWorkload::from_text(std::string text, const Options& options) {
  check_gate("text", options.gate);
  if (options.hidden < 1 || options.hidden > kMostHidden) {
    core::throw_argument("text", "hidden", fmt::format("{}", options.hidden), fmt::format("1..{}", kMostHidden));
  }
  auto state = std::make_shared<const State>(std::move(text), options);
  if (state->words.size() == 0) core::throw_argument("text", "text", "no words", "at least one word");
  return TextWorkload(std::move(state));
}

TextWorkload TextWorkload::load(std::span<const std::string> paths, const Options& options) {
  std::string text;
  std::string names;
  for (const std::string& path : paths) {
    text += read_file("text", path);
    text += '\n';
    names += fmt::format("{}{}", names.empty() ? "" : ", ", path);
  }
  if (text.find_first_not_of(std::string_view(" \t\n\v\f\r\0", 7)) == std::string::npos) {
    core::throw_argument("text", "paths", names.empty() ? "none" : names, "files with at least one word");
  }
  return from_text(std::move(text), options);
}

std::int64_t TextWorkload::num_words() const {
  return static_cast<std::int64_t>(state_->words.size());
}
std::int64_t TextWorkload::hidden() const {
  return state_->options.hidden;
}
const Gate& TextWorkload::gate() const {
  return state_->options.gate;
}

std::string_view TextWorkload::word(std::int64_t token) const {
  return state_->words.at(state_->index_of(token));
}

void TextWorkload::embed(std::int64_t token, std::span<std::uint16_t> out) const {
  if (out.size() != static_cast<std::size_t>(hidden())) {
    core::throw_argument("text", "out.size()", fmt::format("{}", out.size()), fmt::format("{}, hidden", hidden()));
  }
  state_->projection.apply(state_->mixed(token), out);
}

Batch TextWorkload::route(std::int64_t first_token, std::span<const std::int64_t> tokens_per_rank) const {
  Batch batch;
  batch.top_k = gate().top_k;
  batch.num_experts = gate().num_experts;
  std::int64_t num_tokens = 0;
  for (const std::int64_t count : tokens_per_rank) {
    if (count < 0 || count > kMostTokens - num_tokens) {
      core::throw_argument("text", "tokens_per_rank", fmt::format("{}", count),
                           fmt::format("0 or more, together at most {}", kMostTokens));
    }
    batch.tokens_per_rank.push_back(count);
    num_tokens += count;
  }
  const auto top_k = static_cast<std::size_t>(batch.top_k);
  batch.experts.resize(static_cast<std::size_t>(num_tokens) * top_k);
  batch.weights.resize(batch.experts.size());
  const auto first = static_cast<std::int64_t>(state_->index_of(first_token));
  GateChooser chooser(gate(), state_->bias);
  std::vector<float> scores(static_cast<std::size_t>(batch.num_experts));
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    state_->matrix.apply(state_->mixed(first + token), scores);
    for (float& score : scores) score = static_cast<float>(sigmoid(static_cast<double>(score)));
    const std::size_t slot = static_cast<std::size_t>(token) * top_k;
    chooser.choose(scores, std::span(batch.experts).subspan(slot, top_k),
                   std::span(batch.weights).subspan(slot, top_k));
  }
  return batch;
}

}  // namespace anyep::workload
