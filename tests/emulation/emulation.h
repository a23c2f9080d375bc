// GPUs that are not there: kernels as host code. Every thread of a block is a fiber, every block an operating-system thread of its
// own, of which exactly one runs at a time, chosen by a seeded random number: the same seed, the same interleaving, as far as the
// host puts in its work alike.
//
//   who runs      a fiber runs until it meets others (a barrier, a shuffle), or until some basic blocks are over: the kernels are
//                 compiled with -fsanitize-coverage=trace-pc, which calls us at each. So threads part and interleave anywhere
//   __shared__    is thread_local, hence the block's
//   bulk copies   read and write at random moments between their issue and the wait that they need
//   the clock     counts steps: limits of kernels do not depend on how fast this machine is
//   not modelled  weak memory (x86 keeps stores in order), caches, the time that anything takes
//
// What no GPU would accept ends the program with a report: lanes of a warp in different collectives, a block in which everybody
// waits for somebody, threads that name different numbers at a barrier, misaligned copies. Memory ends at a page that nobody may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace anyep::emulation {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// ---- for the headers that stand in for CUDA's: called by threads of a kernel ----------------------------------------

/// Where the calling thread is.
struct Place {
  Dim thread, block, block_size, grid_size;
};
const Place& here();

/// Lanes in `mask` bring a value each and get all values, by lane; nobody goes on before all have come.
const std::uint64_t* meet(const char* what, unsigned mask, std::uint64_t value);

/// What threads that meet at a barrier find out together.
struct Votes {
  bool all, any;
};
/// All threads of the block that have not ended.
Votes sync_block(bool vote);
/// `threads` threads come to barrier `id`, or arrive and go on.
void sync_some(int id, int threads);
void arrive_some(int id, int threads);

/// Lets others run.
void yield();
/// Nanoseconds that have passed in kernels.
std::uint64_t clock_ns();

/// Dynamic shared memory of the block.
std::byte* dynamic_shared();
/// The same place in another block of the cluster.
const void* in_block_of_cluster(unsigned block, const void* at);
void sync_cluster();

// Copies that go on by themselves. Bytes: a multiple of 16, as are addresses.
void bulk_load(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier);
void bulk_store(void* to, const void* from, std::uint32_t bytes);
void bulk_commit();
/// Until all but the last `groups` of the thread's groups have read what they copy; or `written` it, too.
void bulk_wait(int groups, bool written);
void small_load(void* to, const void* from, bool here);
void small_commit();
void small_wait(int groups);

void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals);
void mbarrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes);
bool mbarrier_complete(std::uint64_t* barrier, std::uint32_t parity);

void wait_for_earlier_launches();
void let_later_launches_start();

// ---- for the host --------------------------------------------------------------------------------------------------

struct Launch {
  const char* name = "";
  unsigned blocks = 1, threads = 32, cluster = 0;
  std::size_t shared_bytes = 0;
  bool early = false;
  std::function<void()> kernel;  ///< run by every thread
};

/// What the emulated GPUs are like.
struct Traits {
  int num_gpus = 2;
  int num_sms = 8;
  std::size_t shared_bytes = 227 << 10;
};
/// ANYEP_EMULATED_GPUS, ANYEP_EMULATED_SMS, ANYEP_EMULATED_SEED.
const Traits& traits();

class Stream;
void put(Stream* stream, const Launch& launch);

}  // namespace anyep::emulation
