// The production shapes. Sources: published configurations; "configuration string" marks shapes seen only in other
// projects' configurations, "unverified" those that still need a look at the model's own.
#include <anyep/workload.h>
#include <fmt/format.h>

#include <array>
#include <string>

#include "core/check.h"
#include "core/parse.h"

namespace anyep::workload {
namespace {

constexpr std::string_view kSeen = "seen as a configuration string only";
constexpr std::string_view kUnverified = "unverified";

constexpr std::array kModels{
    ModelPreset{"deepseek-v3", 7168, 256, 8, 2048, 8, 4, "also R1, V3.1, V3.2; sigmoid gate with bias"},
    ModelPreset{"deepseek-v4-pro", 7168, 384, 6, 3072, 1, 1, "first 3 layers hash-routed"},
    ModelPreset{"deepseek-v4-flash", 4096, 256, 6, 2048, 1, 1, "first 3 layers hash-routed"},
    ModelPreset{"deepseek-v4.1-flash", 5120, 384, 6, 2304, 1, 1,
                "448 slots with replicated experts; seen as a configuration string only"},
    ModelPreset{"deepseek-v2", 5120, 160, 6, 1536, 1, 1, kUnverified},
    ModelPreset{"deepseek-v2-lite", 2048, 64, 6, 1408, 1, 1, kUnverified},
    ModelPreset{"kimi-k2", 7168, 384, 8, 2048, 1, 1, "to K2.7; sigmoid gate, one group"},
    ModelPreset{"kimi-k3", 3584, 896, 16, 3072, 1, 1,
                "latent rows, model hidden 7168; seen as a configuration string only"},
    ModelPreset{"kimi-linear-48b", 2304, 256, 8, 1024, 1, 1, kSeen},
    ModelPreset{"qwen3-30b", 2048, 128, 8, 768, 1, 1, "A3B, VL too; softmax gate"},
    ModelPreset{"qwen3-235b", 4096, 128, 8, 1536, 1, 1, "A22B, VL too; softmax gate, the most skewed"},
    ModelPreset{"qwen3-coder-480b", 6144, 160, 8, 2560, 1, 1, ""},
    ModelPreset{"qwen3-next-80b", 2048, 512, 10, 512, 1, 1, kUnverified},
    ModelPreset{"qwen3.5-397b", 4096, 512, 10, 1024, 1, 1, ""},
    ModelPreset{"qwen3.5-122b", 3072, 256, 8, 1024, 1, 1, ""},
    ModelPreset{"qwen3.5-35b", 2048, 256, 8, 512, 1, 1, "also 3.6-35B"},
    ModelPreset{"qwen3.8-2.4t", 8192, 512, 10, 0, 1, 1, "BF16 on the wire; expert width not known; unverified"},
    ModelPreset{"glm-4.5", 5120, 160, 8, 1536, 1, 1, kSeen},
    ModelPreset{"glm-4.5-air", 4096, 128, 8, 1408, 1, 1, kSeen},
    ModelPreset{"glm-5", 6144, 256, 8, 2048, 1, 1, "also 5.1, 5.2"},
    ModelPreset{"minimax-m2.5", 3072, 256, 8, 1536, 1, 1, "also M2.7"},
    ModelPreset{"minimax-m3", 6144, 128, 4, 3072, 1, 1, ""},
    ModelPreset{"gpt-oss-120b", 2880, 128, 4, 2880, 1, 1, "MXFP8 activations"},
    ModelPreset{"gpt-oss-20b", 2880, 32, 4, 2880, 1, 1, "MXFP8 activations"},
    ModelPreset{"llama-4-scout", 5120, 16, 1, 8192, 1, 1, "weight applied to the input"},
    ModelPreset{"llama-4-maverick", 5120, 128, 1, 8192, 1, 1, "weight applied to the input"},
    ModelPreset{"mixtral-8x7b", 4096, 8, 2, 14336, 1, 1, "few experts per rank"},
    ModelPreset{"mixtral-8x22b", 6144, 8, 2, 16384, 1, 1, "few experts per rank"},
    ModelPreset{"mimo-v2-flash", 4096, 256, 8, 2048, 1, 1, kSeen},
    ModelPreset{"mimo-v2.6-pro", 6144, 384, 8, 2048, 1, 1, kSeen},
    ModelPreset{"step-3.7-flash", 4096, 288, 8, 1280, 1, 1, kUnverified},
    ModelPreset{"step-3", 7168, 48, 3, 5120, 1, 1, kUnverified},
    ModelPreset{"nemotron-3-nano", 2688, 128, 6, 1856, 1, 1, "also 3.5-Lightning"},
    ModelPreset{"nemotron-3-super", 1024, 512, 22, 2688, 1, 1, "latent rows, model hidden 4096"},
    ModelPreset{"nemotron-3-ultra", 2048, 512, 22, 5120, 1, 1, "latent rows, model hidden 8192"},
    ModelPreset{"gemma-4-26b", 2816, 128, 8, 704, 1, 1, "A4B"},
    ModelPreset{
        "longcat-flash", 6144, 512, 12, 2048, 1, 1,
        "besides 256 zero-experts, whose choices stay local (-1); configuration string only, hidden unverified"},
    ModelPreset{"hunyuan-a13b", 4096, 64, 8, 3072, 1, 1, kSeen},
    ModelPreset{"hunyuan-large", 6400, 16, 1, 18304, 1, 1, kUnverified},
    ModelPreset{"ling-lite-1.5", 2048, 64, 6, 1408, 1, 1, kSeen},
    ModelPreset{"ling-mini-2.0", 2048, 256, 8, 512, 8, 4, kSeen},
    ModelPreset{"ling-flash-2.0", 4096, 256, 8, 1024, 8, 4, kUnverified},
    ModelPreset{"ling-1t", 8192, 256, 8, 2048, 8, 4, kUnverified},
    ModelPreset{"ernie-4.5-21b", 2560, 64, 6, 1536, 1, 1, kSeen},
    ModelPreset{"ernie-4.5-300b", 8192, 64, 8, 3584, 1, 1, kUnverified},
    ModelPreset{"laguna-s-2.1", 3072, 256, 10, 1024, 1, 1, "NVFP4; seen as a configuration string only"},
    ModelPreset{"olmoe", 2048, 64, 8, 1024, 1, 1, kUnverified},
    ModelPreset{"mistral-large-3", 7168, 128, 4, 4096, 1, 1, kUnverified},
    ModelPreset{"dots.llm1", 4096, 128, 6, 1408, 1, 1, kUnverified},
};

}  // namespace

std::span<const ModelPreset> models() {
  return kModels;
}

const ModelPreset& find_model(std::string_view name) {
  std::string names;
  for (const ModelPreset& model : kModels) {
    if (model.name == name) return model;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", model.name);
  }
  core::throw_argument("find_model", "model", core::quoted(name), names);
}

Gate gate_of(const ModelPreset& model) {
  constexpr float kScaling = 2.5F;  // DeepSeek-V3's routed scaling factor; grouped gates follow it
  return {model.num_experts, model.top_k, model.groups, model.groups_kept, model.groups > 1 ? kScaling : 1.0F};
}

}  // namespace anyep::workload
