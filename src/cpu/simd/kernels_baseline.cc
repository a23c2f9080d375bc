#define ANYEP_SIMD_ISA baseline
#include "cpu/simd/table.h"
#include "cpu/simd/variants.h"

namespace anyep::cpu::simd {

const Kernels& kernels_baseline() noexcept {
  return baseline::kTable;
}

}  // namespace anyep::cpu::simd
