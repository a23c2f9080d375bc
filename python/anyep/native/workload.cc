// anyep.workload: the C++ generators. Batches own their numbers; Python sees them through the buffer protocol.
#include <anyep/workload.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>

#include "native.h"

namespace anyep::python {
namespace {

using workload::Batch;
using workload::TextWorkload;

Batch generate(const std::string& profile, std::uint64_t seed, std::uint64_t step, int num_experts, int top_k,
               int num_ranks, std::int64_t tokens_per_rank) {
  return workload::generate(
      {workload::parse_profile(profile), seed, step, num_experts, top_k, num_ranks, tokens_per_rank});
}

Batch batch_of(const std::vector<std::int64_t>& tokens_per_rank, const TensorView& experts, const TensorView& weights,
               int num_experts) {
  if (experts.dtype != DType::kI64 || !experts.is_dense() || experts.shape.dims != 2) {
    throw nb::value_error("experts: dense int64 [tokens of all ranks, top_k] is needed");
  }
  if (weights.dtype != DType::kF32 || !weights.is_dense() || weights.shape != experts.shape) {
    throw nb::value_error("weights: dense float32 of the shape of experts is needed");
  }
  Batch batch;
  batch.top_k = static_cast<int>(experts.shape[1]);
  batch.num_experts = num_experts;
  batch.tokens_per_rank = tokens_per_rank;
  batch.experts.assign(experts.as<std::int64_t>(), experts.as<std::int64_t>() + experts.num_elements());
  batch.weights.assign(weights.as<float>(), weights.as<float>() + weights.num_elements());
  return batch;
}

template <class T>
Memory memory_of(const std::shared_ptr<Batch>& batch, std::vector<T>& values) {
  return {batch, values.data(), values.size() * sizeof(T)};
}

void bind_batch(nb::module_& module) {
  // Held by shared_ptr-like copies: the arrays of a Memory belong to a copy that it owns.
  nb::class_<Batch>(module, "Batch", "The choices of every rank's tokens.")
      .def_ro("top_k", &Batch::top_k)
      .def_ro("num_experts", &Batch::num_experts)
      .def_ro("tokens_per_rank", &Batch::tokens_per_rank)
      .def_prop_ro("memories", [](const Batch& batch) {
        const auto copy = std::make_shared<Batch>(batch);
        return nb::make_tuple(memory_of(copy, copy->experts), memory_of(copy, copy->weights));
      });
  module.def("generate", &generate, nb::arg("profile"), nb::arg("seed"), nb::arg("step"), nb::arg("num_experts"),
             nb::arg("top_k"), nb::arg("num_ranks"), nb::arg("tokens_per_rank"), WithoutGil());
  module.def("make_batch", &batch_of, nb::arg("tokens_per_rank"), nb::arg("experts"), nb::arg("weights"),
             nb::arg("num_experts"));
  module.def("split", &workload::split, nb::arg("batch"), nb::arg("num_ranks"));
  module.def("write_trace", &workload::write_trace, nb::arg("path"), nb::arg("batch"), WithoutGil());
  module.def("read_trace", &workload::read_trace, nb::arg("path"), WithoutGil());
  module.def("profile_help", &workload::profile_help);
  module.def("profile_text", [](const std::string& text) { return workload::to_text(workload::parse_profile(text)); });
}

void bind_statistics(nb::module_& module) {
  using workload::Statistics;
  nb::class_<Statistics>(module, "Statistics", "What a batch realised; str() is two lines.")
      .def_ro("tokens", &Statistics::tokens)
      .def_ro("pairs", &Statistics::pairs)
      .def_ro("rows", &Statistics::rows)
      .def_ro("unused_share", &Statistics::unused_share)
      .def_ro("unrouted_share", &Statistics::unrouted_share)
      .def_ro("rank_rows_max_over_mean", &Statistics::rank_rows_max_over_mean)
      .def_ro("rank_pairs_max_over_mean", &Statistics::rank_pairs_max_over_mean)
      .def_ro("expert_max_over_mean", &Statistics::expert_max_over_mean)
      .def_ro("gini", &Statistics::gini)
      .def_ro("entropy_bits", &Statistics::entropy_bits)
      .def_ro("top_fifth_share", &Statistics::top_fifth_share)
      .def_ro("distinct_ranks_per_token", &Statistics::distinct_ranks_per_token)
      .def_ro("duplicate_pairs", &Statistics::duplicate_pairs)
      .def_ro("pairs_per_expert", &Statistics::pairs_per_expert)
      .def_ro("pairs_per_rank", &Statistics::pairs_per_rank)
      .def_ro("rows_per_rank", &Statistics::rows_per_rank)
      .def("__str__", &Statistics::to_text);
  module.def("measure", &workload::measure, nb::arg("batch"), nb::arg("num_experts"), nb::arg("num_ranks"),
             WithoutGil());
}

void bind_models(nb::module_& module) {
  using workload::ModelPreset;
  nb::class_<ModelPreset>(module, "ModelPreset", "Shape of a published model's routed experts.")
      .def_ro("name", &ModelPreset::name)
      .def_ro("hidden", &ModelPreset::hidden)
      .def_ro("num_experts", &ModelPreset::num_experts)
      .def_ro("top_k", &ModelPreset::top_k)
      .def_ro("expert_width", &ModelPreset::expert_width)
      .def_ro("groups", &ModelPreset::groups)
      .def_ro("groups_kept", &ModelPreset::groups_kept)
      .def_ro("note", &ModelPreset::note);
  module.def("models", [] {
    const auto models = workload::models();
    return std::vector<ModelPreset>(models.begin(), models.end());
  });
  module.def("find_model", &workload::find_model, nb::arg("name"));
}

void bind_text(nb::module_& module) {
  const auto options_of = [](std::int64_t hidden, const std::string& model, int num_experts, int top_k, int groups,
                             int groups_kept, float scaling, std::uint64_t seed) {
    TextWorkload::Options options;
    options.hidden = hidden;
    options.gate = model.empty() ? workload::Gate{num_experts, top_k, groups, groups_kept, scaling}
                                 : workload::gate_of(workload::find_model(model));
    options.seed = seed;
    return options;
  };
  nb::class_<TextWorkload>(module, "TextWorkload", "Words of a text as tokens, with embeddings and a gate.")
      .def_prop_ro("num_words", &TextWorkload::num_words)
      .def_prop_ro("hidden", &TextWorkload::hidden)
      .def_prop_ro("num_experts", [](const TextWorkload& text) { return text.gate().num_experts; })
      .def_prop_ro("top_k", [](const TextWorkload& text) { return text.gate().top_k; })
      .def("word", &TextWorkload::word, nb::arg("token"))
      .def(
          "embed",
          [](const TextWorkload& text, std::int64_t first_token, const TensorView& out) {
            if (out.dtype != DType::kBF16 || !out.is_dense() || out.shape.dims != 2 || out.shape[1] != text.hidden()) {
              throw nb::value_error("out: dense bfloat16 [tokens, hidden] is needed");
            }
            const auto hidden = static_cast<std::size_t>(text.hidden());
            for (std::int64_t token = 0; token < out.shape[0]; ++token) {
              text.embed(first_token + token,
                         {out.as<std::uint16_t>() + static_cast<std::size_t>(token) * hidden, hidden});
            }
          },
          nb::arg("first_token"), nb::arg("out"), WithoutGil())
      .def(
          "route",
          [](const TextWorkload& text, std::int64_t first_token, const std::vector<std::int64_t>& tokens_per_rank) {
            return text.route(first_token, tokens_per_rank);
          },
          nb::arg("first_token"), nb::arg("tokens_per_rank"), WithoutGil());
  module.def(
      "load_text",
      [options_of](const std::vector<std::string>& paths, std::int64_t hidden, const std::string& model,
                   int num_experts, int top_k, int groups, int groups_kept, float scaling, std::uint64_t seed) {
        return TextWorkload::load(paths,
                                  options_of(hidden, model, num_experts, top_k, groups, groups_kept, scaling, seed));
      },
      nb::arg("paths"), nb::arg("hidden"), nb::arg("model"), nb::arg("num_experts"), nb::arg("top_k"),
      nb::arg("groups"), nb::arg("groups_kept"), nb::arg("scaling"), nb::arg("seed"), WithoutGil());
  module.def(
      "text_of",
      [options_of](const std::string& text, std::int64_t hidden, const std::string& model, int num_experts, int top_k,
                   int groups, int groups_kept, float scaling, std::uint64_t seed) {
        return TextWorkload::from_text(
            text, options_of(hidden, model, num_experts, top_k, groups, groups_kept, scaling, seed));
      },
      nb::arg("text"), nb::arg("hidden"), nb::arg("model"), nb::arg("num_experts"), nb::arg("top_k"), nb::arg("groups"),
      nb::arg("groups_kept"), nb::arg("scaling"), nb::arg("seed"), WithoutGil());
}

}  // namespace

void bind_workload(nb::module_& module) {
  bind_batch(module);
  bind_statistics(module);
  bind_models(module);
  bind_text(module);
}

}  // namespace anyep::python
