// The kernels of the instruction set that this file is compiled for, as a table.
#pragma once

#include "cpu/simd/casts.h"
#include "cpu/simd/copies.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/sums.h"

namespace anyep::cpu::simd::ANYEP_SIMD_ISA {

#define ANYEP_SIMD_TEXT(name) #name
#define ANYEP_SIMD_NAME(name) ANYEP_SIMD_TEXT(name)

constexpr Kernels kTable{
    ANYEP_SIMD_NAME(ANYEP_SIMD_ISA), copy, stream, sum_rows, weighted_sum, cast_fp8, logfmt_encode, logfmt_decode};

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
