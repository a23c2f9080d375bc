// ANYEP_HD marks functions that compile for the host and for the GPU.
#pragma once

#if defined(__CUDACC__)
#define ANYEP_HD __host__ __device__
#else
#define ANYEP_HD
#endif
