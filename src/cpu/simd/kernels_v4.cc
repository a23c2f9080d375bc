#define ANYEP_SIMD_ISA v4
#include "cpu/simd/table.h"
#include "cpu/simd/variants.h"

namespace anyep::cpu::simd {

const Kernels& kernels_v4() noexcept {
  return v4::kTable;
}

}  // namespace anyep::cpu::simd
