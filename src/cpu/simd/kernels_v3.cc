#define ANYEP_SIMD_ISA v3
#include "cpu/simd/table.h"
#include "cpu/simd/variants.h"

namespace anyep::cpu::simd {

const Kernels& kernels_v3() noexcept {
  return v3::kTable;
}

}  // namespace anyep::cpu::simd
