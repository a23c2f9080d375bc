// What runs beside operations: kernels that hold SMs, compute on all of them, or wait for their like on other GPUs. None waits
// without a limit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace anyep::test {

/// Pinned words that host and kernels share, by loads and stores alone. No atomics: two GPUs that add to one word of the host
/// lose each other's sums where cudaDevAttrHostNativeAtomicSupported is 0, as over PCIe. So each word has one writer, but gave_up,
/// of which any value tells the same.
struct CompanyWords {
  static constexpr int kMaxRanks = 8, kMostBlocks = 32, kMostSms = 1024;
  std::uint32_t started[kMaxRanks][kMostSms] = {};  ///< by GPU and block of occupy(): 1 = it holds its SM
  std::uint32_t stop = 0;                           ///< set by the host: they may leave
  std::uint32_t gave_up = 0;                        ///< GaveUp: a block of any of these left at its limit instead
  std::uint32_t arrived[kMostBlocks] = {};          ///< at meet()'s barrier, by block
  std::uint32_t ring[kMaxRanks][kMostBlocks] = {};  ///< of pass_around(): rounds begun
};
enum class GaveUp : std::uint32_t { kNobody, kOccupying, kPassing, kMeeting };

/// Of the current GPU.
int num_sms();
void load_company_kernels();
/// As many blocks, each with an SM for itself, until words.stop or `limit_ns`. Once per GPU and words.
/// @throws std::invalid_argument more blocks, or a GPU of a higher number, than there are words for
void occupy(int blocks, std::uint64_t limit_ns, CompanyWords* words, cudaStream_t stream);
/// The same blocks, small ones, which share SMs with others: what a hook would be that holds one.
void linger_small(int blocks, std::uint64_t limit_ns, CompanyWords* words, cudaStream_t stream);
/// One block per SM, each the same products of numbers in its shared memory, which it has for itself.
void compute_everywhere(int depth, float* sums, cudaStream_t stream);
/// As collectives of other libraries do: block by block, this rank says that it is in `round` and waits for its neighbour to
/// say so.
void pass_around(int rank, int num_ranks, int blocks, std::uint32_t round, std::uint64_t limit_ns, CompanyWords* words,
                 cudaStream_t stream);
/// `blocks` blocks, each with an SM for itself, wait for each other: what no launch of ours may do.
void meet(int blocks, std::uint64_t limit_ns, CompanyWords* words, cudaStream_t stream);

}  // namespace anyep::test
