#include "cpu/simd/kernels.h"

#include "core/check.h"
#include "core/env.h"
#include "cpu/simd/variants.h"

#include <optional>
#include <string>

namespace anyep::cpu::simd {

namespace {

constexpr Isa kBestFirst[] = {Isa::kV4, Isa::kV3, Isa::kBaseline};

const Kernels& choose() {
  const std::optional<std::string> name = core::env_choice("ANYEP_CPU_ISA");
  std::string present;
  for (const Isa isa : kBestFirst) {
    const Kernels* const found = kernels_of(isa);
    if (found == nullptr) continue;
    if (!name.has_value() || *name == found->name) return *found;
    present += present.empty() ? found->name : std::string(", ") + found->name;
  }
  core::throw_argument("environment", "ANYEP_CPU_ISA", *name, present + " on this processor",
                       "Leave it unset for the best one.");
}

}  // namespace

const Kernels* kernels_of(Isa isa) noexcept {
  switch (isa) {
#if ANYEP_X86_LEVELS
    // The compiler's run-time library asks the CPU, and the operating system for its consent to wide registers.
    case Isa::kV4:
      return __builtin_cpu_supports("x86-64-v4") ? &kernels_v4() : nullptr;
    case Isa::kV3:
      return __builtin_cpu_supports("x86-64-v3") ? &kernels_v3() : nullptr;
#endif
    case Isa::kBaseline:
      return &kernels_baseline();
    default:
      return nullptr;
  }
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace anyep::cpu::simd
