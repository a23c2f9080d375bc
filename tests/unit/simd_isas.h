// The variants of the hot loops as test parameters; those that the processor lacks are skipped.
#pragma once

#include "cpu/simd/kernels.h"

#include <gtest/gtest.h>

#include <string>

namespace anyep::cpu::simd {

class SimdTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (kernels_of(GetParam()) == nullptr) GTEST_SKIP() << "not on this processor";
  }
  static const Kernels& variant() { return *kernels_of(GetParam()); }
};

inline auto every_isa() {
  return testing::Values(Isa::kBaseline, Isa::kV3, Isa::kV4);
}

inline std::string isa_name(const testing::TestParamInfo<Isa>& info) {
  return info.param == Isa::kBaseline ? "Baseline" : info.param == Isa::kV3 ? "V3" : "V4";
}

}  // namespace anyep::cpu::simd
