// One table per instruction set. Calling a kernel of a table that the CPU does not support is an illegal instruction.
#pragma once

#include "cpu/simd/kernels.h"

namespace anyep::cpu::simd {

const Kernels& kernels_baseline() noexcept;
const Kernels& kernels_v3() noexcept;  ///< not defined where ANYEP_X86_LEVELS is 0
const Kernels& kernels_v4() noexcept;  ///< likewise

}  // namespace anyep::cpu::simd
