#include "workload/rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <utility>

#include "core/check.h"
#include "workload/eplb.h"
#include "workload/gate.h"
#include "workload/math.h"
#include "workload/random.h"
#include "workload/sampler.h"

namespace anyep::workload {
namespace {

constexpr int kMostTopK = 32;

std::vector<double> even(std::size_t size) {
  return std::vector<double>(size, 1.0);
}

/// What most makers share: choices from a stream of the token, weights from another.
class StreamMaker : public RowMaker {
 public:
  explicit StreamMaker(const Keys& keys) : keys_(keys) {}
  void make(std::uint64_t token, std::span<std::int64_t> ids, std::span<float> weights) override {
    Stream stream(keys_.stepwise, Purpose::kChoices, token);
    choose(stream, token, ids);
    draw_weights(keys_.stepwise, token, ids, weights);
  }

 protected:
  virtual void choose(Stream& stream, std::uint64_t token, std::span<std::int64_t> ids) = 0;
  const Keys keys_;
};

class PopularMaker final : public StreamMaker {
 public:
  PopularMaker(const Request& request, const Keys& keys) : StreamMaker(keys), sampler_(popularity_of(request, keys)) {}

 private:
  void choose(Stream& stream, std::uint64_t, std::span<std::int64_t> ids) override {
    sampler_.draw_distinct(stream, ids);
  }
  Sampler sampler_;
};

class DuplicateMaker final : public StreamMaker {
 public:
  DuplicateMaker(const Request& request, const Keys& keys)
      : StreamMaker(keys), sampler_(even(static_cast<std::size_t>(request.num_experts))) {}

 private:
  void choose(Stream& stream, std::uint64_t, std::span<std::int64_t> ids) override {
    for (std::int64_t& id : ids) id = sampler_.draw(stream);
  }
  Sampler sampler_;
};

class BalancedMaker final : public StreamMaker {
 public:
  BalancedMaker(const Request& request, const Keys& keys) : StreamMaker(keys), num_experts_(request.num_experts) {
    Stream stream(keys.stepwise, Purpose::kShuffle, 0);
    offset_ = stream.below(static_cast<std::uint32_t>(num_experts_));
  }

 private:
  void choose(Stream&, std::uint64_t token, std::span<std::int64_t> ids) override {
    const auto experts = static_cast<std::uint64_t>(num_experts_);
    const std::uint64_t rotation = (token % experts + offset_) % experts;
    for (std::size_t choice = 0; choice < ids.size(); ++choice) {
      ids[choice] = static_cast<std::int64_t>((choice * experts / ids.size() + rotation) % experts);
    }
  }
  std::int64_t num_experts_;
  std::uint64_t offset_ = 0;
};

class HotExpertsMaker final : public StreamMaker {
 public:
  HotExpertsMaker(const Request& request, const Keys& keys)
      : StreamMaker(keys),
        num_experts_(request.num_experts),
        num_hot_(request.profile.count),
        share_(request.profile.value),
        hot_(even(static_cast<std::size_t>(num_hot_))),
        cold_(even(static_cast<std::size_t>(std::max<std::int64_t>(1, num_experts_ - num_hot_)))) {
    first_ = static_cast<std::int64_t>(request.seed % static_cast<std::uint64_t>(num_experts_ / num_hot_)) * num_hot_;
  }

 private:
  void choose(Stream& stream, std::uint64_t, std::span<std::int64_t> ids) override {
    const double wanted = share_ * static_cast<double>(ids.size());
    auto hits = static_cast<std::int64_t>(wanted);
    if (stream.uniform() < wanted - static_cast<double>(hits)) ++hits;
    const auto top_k = static_cast<std::int64_t>(ids.size());
    hits = std::clamp<std::int64_t>(hits, std::max<std::int64_t>(0, top_k - (num_experts_ - num_hot_)),
                                    std::min<std::int64_t>(num_hot_, top_k));
    const auto hot = ids.first(static_cast<std::size_t>(hits));
    const auto cold = ids.subspan(static_cast<std::size_t>(hits));
    hot_.draw_distinct(stream, hot);
    for (std::int64_t& id : hot) id += first_;
    cold_.draw_distinct(stream, cold);
    for (std::int64_t& id : cold) id += id < first_ ? 0 : num_hot_;
  }
  std::int64_t num_experts_, num_hot_;
  double share_;
  Sampler hot_, cold_;
  std::int64_t first_ = 0;
};

class GroupedMaker final : public RowMaker {
 public:
  GroupedMaker(const Request& request, const Gate& gate, const Keys& keys)
      : keys_(keys), chooser_(gate, biases(request, keys)), scores_(static_cast<std::size_t>(gate.num_experts)) {}

  void make(std::uint64_t token, std::span<std::int64_t> ids, std::span<float> weights) override {
    Stream stream(keys_.stepwise, Purpose::kChoices, token);
    for (float& score : scores_) score = static_cast<float>(sigmoid(stream.gaussian()));
    chooser_.choose(scores_, ids, weights);
  }

 private:
  static std::vector<float> biases(const Request& request, const Keys& keys) {
    constexpr double kBiasSpread = 0.02;  // against scores whose deviation is about 0.2: mild, as a trained gate's is
    std::vector<float> bias(static_cast<std::size_t>(request.num_experts));
    Stream stream(keys.lasting, Purpose::kGateBias, 0);
    for (float& value : bias) value = static_cast<float>(kBiasSpread * stream.gaussian());
    return bias;
  }
  Keys keys_;
  GateChooser chooser_;
  std::vector<float> scores_;
};

class HashMaker final : public StreamMaker {
 public:
  HashMaker(const Request& request, const Keys& keys)
      : StreamMaker(keys),
        words_(zipf_popularity(kVocabulary, kExponent)),
        experts_(even(static_cast<std::size_t>(request.num_experts))) {}

 private:
  static constexpr int kVocabulary = 129280;  // DeepSeek-V3's
  static constexpr double kExponent = 1.1;
  void choose(Stream& stream, std::uint64_t, std::span<std::int64_t> ids) override {
    Stream of_word(keys_.lasting, Purpose::kWord, static_cast<std::uint64_t>(words_.draw(stream)));
    experts_.draw_distinct(of_word, ids);
  }
  Sampler words_, experts_;
};

class DomainMaker final : public StreamMaker {
 public:
  DomainMaker(const Request& request, const Keys& keys)
      : StreamMaker(keys), previous_(static_cast<std::size_t>(request.top_k)) {
    for (int domain = 0; domain < request.profile.count; ++domain) {
      domains_.emplace_back(
          lognormal_popularity(request.num_experts, kSigma, keys.lasting, static_cast<std::uint64_t>(domain)));
    }
    Stream stream(keys.lasting, Purpose::kShuffle, 0);
    stay_.resize(static_cast<std::size_t>(request.num_experts));
    for (double& value : stay_) value = kLeastStay + (kMostStay - kLeastStay) * stream.uniform();
  }

 private:
  static constexpr std::uint64_t kRequestTokens = 256;
  static constexpr double kSigma = 1.1, kLeastStay = 0.3, kMostStay = 0.5;
  void choose(Stream& stream, std::uint64_t token, std::span<std::int64_t> ids) override {
    if (token % kRequestTokens == 0) {
      Stream of_request(keys_.stepwise, Purpose::kRequest, token / kRequestTokens);
      domain_ = of_request.below(static_cast<std::uint32_t>(domains_.size()));
    }
    std::size_t filled = 0;
    if (token % kRequestTokens != 0) {
      for (const std::int64_t id : previous_) {
        if (stream.uniform() < stay_[static_cast<std::size_t>(id)]) ids[filled++] = id;
      }
    }
    domains_[domain_].draw_distinct(stream, ids, filled);
    std::copy(ids.begin(), ids.end(), previous_.begin());
  }
  std::vector<Sampler> domains_;
  std::vector<double> stay_;
  std::vector<std::int64_t> previous_;
  std::size_t domain_ = 0;
};

class DropMaker final : public StreamMaker {
 public:
  DropMaker(const Request& request, const Keys& keys)
      : StreamMaker(keys), sampler_(even(static_cast<std::size_t>(request.num_experts))) {
    const double share = request.profile.value;
    whole_ = kWholeShare * share;
    single_ = (share - whole_) / (1 - whole_);
  }

 private:
  static constexpr double kWholeShare = 0.25;  // of what is dropped, in tokens that lose every choice
  void choose(Stream& stream, std::uint64_t token, std::span<std::int64_t> ids) override {
    sampler_.draw_distinct(stream, ids);
    Stream drops(keys_.stepwise, Purpose::kDrop, token);
    const bool all = drops.uniform() < whole_;
    for (std::int64_t& id : ids) {
      if (all || drops.uniform() < single_) id = -1;
    }
  }
  Sampler sampler_;
  double whole_ = 0, single_ = 0;
};

class EplbMaker final : public StreamMaker {
 public:
  EplbMaker(const Request& request, const Keys& keys) : StreamMaker(keys) {
    std::vector<double> popularity = popularity_of(request, keys);
    slots_ = place_replicas(expected_load(popularity, request.top_k), {request.profile.count, request.num_ranks});
    sampler_.emplace(std::move(popularity));
  }

 private:
  void choose(Stream& stream, std::uint64_t token, std::span<std::int64_t> ids) override {
    sampler_->draw_distinct(stream, ids);
    for (std::int64_t& id : ids) {
      const std::vector<int>& slots = slots_[static_cast<std::size_t>(id)];
      id = slots[(token + static_cast<std::uint64_t>(id)) % slots.size()];
    }
  }
  std::optional<Sampler> sampler_;
  std::vector<std::vector<int>> slots_;
};

void require_at_most(const Request& request, std::string_view what, int got, int most) {
  if (got <= most) return;
  core::throw_argument("generate", "profile", to_text(request.profile),
                       fmt::format("{} at most {} with {} experts", what, most, request.num_experts));
}

}  // namespace

void draw_weights(std::uint64_t key, std::uint64_t token, std::span<const std::int64_t> ids, std::span<float> weights) {
  Stream stream(key, Purpose::kWeights, token);
  std::array<double, kMostTopK> raw{};
  std::size_t used = 0;
  double sum = 0;
  for (const std::int64_t id : ids) {
    if (id >= 0) sum += raw[used++] = 0.1 + stream.uniform();
  }
  std::sort(raw.begin(), raw.begin() + static_cast<std::ptrdiff_t>(used), std::greater<>());
  std::size_t next = 0;
  for (std::size_t choice = 0; choice < ids.size(); ++choice) {
    weights[choice] = ids[choice] >= 0 ? static_cast<float>(raw[next++] / sum) : 0.0F;
  }
}

std::unique_ptr<RowMaker> make_row_maker(const Request& request, const Keys& keys) {
  const Profile& profile = request.profile;
  switch (profile.kind) {
    case Kind::kBalanced:
      return std::make_unique<BalancedMaker>(request, keys);
    case Kind::kHotExperts:
      require_at_most(request, "N", profile.count, request.num_experts);
      return std::make_unique<HotExpertsMaker>(request, keys);
    case Kind::kGrouped: {
      const Gate gate{request.num_experts, request.top_k, profile.count, profile.kept, 1.0F};
      check_gate("generate", gate);
      return std::make_unique<GroupedMaker>(request, gate, keys);
    }
    case Kind::kHash:
      return std::make_unique<HashMaker>(request, keys);
    case Kind::kDomain:
      return std::make_unique<DomainMaker>(request, keys);
    case Kind::kDrop:
      return std::make_unique<DropMaker>(request, keys);
    case Kind::kEplb:
      if (profile.count < request.num_experts) {
        core::throw_argument("generate", "profile", to_text(profile),
                             fmt::format("SLOTS at least {}, one per expert", request.num_experts));
      }
      return std::make_unique<EplbMaker>(request, keys);
    case Kind::kDuplicates:
      return std::make_unique<DuplicateMaker>(request, keys);
    default:
      return std::make_unique<PopularMaker>(request, keys);
  }
}

}  // namespace anyep::workload
