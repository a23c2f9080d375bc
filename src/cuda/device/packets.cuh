// A warp's strip of a row as words or packets that carry their epoch: the data are their own flag, nothing is fenced.
//
//   strip    kVectors vectors of 16 bytes per lane, then kScales words (of lanes 0, 8, 16, 24)
//   words    per vector 64 words {4 bytes, epoch} from the lanes' x and y, then 64 from z and w; then the scales
//   packets  per vector one packet {x, y, z, epoch} a lane; then all w and the scales, three to a packet
//
// Compared for equality: with four regions nothing can be ahead, and nothing stays unwritten for 2^31 turns (refresh in
// low_latency_frame.cuh).
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "protocol/platform.h"

namespace anyep::cuda {

__device__ __forceinline__ std::uint64_t make_word(std::uint32_t data, std::uint32_t epoch) {
  return static_cast<std::uint64_t>(epoch) << 32 | data;
}
__device__ __forceinline__ bool is_fresh(std::uint64_t word, std::uint32_t epoch) {
  return static_cast<std::uint32_t>(word >> 32) == epoch;
}

template <int kVectors, int kScales>
struct Strip {
  uint4 data[kVectors];
  std::uint32_t scale = 0;  ///< of the lane's eighth
};

/// Stores a strip as words at `to` (16-byte aligned). All lanes; pattern G.
template <int kVectors, int kScales>
__device__ __forceinline__ void store_words(std::byte* to, const Strip<kVectors, kScales>& strip, std::uint32_t epoch) {
  const int lane = lane_index();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint4& d = strip.data[v];
    std::byte* const at = to + v * 1024 + lane * 16;
    ptx::store_two_words(at, make_word(d.x, epoch), make_word(d.y, epoch));
    ptx::store_two_words(at + 512, make_word(d.z, epoch), make_word(d.w, epoch));
  }
  if (kScales > 0 && lane % 8 == 0) {
    protocol::Shared(*reinterpret_cast<std::uint64_t*>(to + kVectors * 1024 + lane))
        .store(make_word(strip.scale, epoch), protocol::kRelaxed);
  }
}

/// One look: true when all of this lane's words are there.
template <int kVectors, int kScales>
__device__ __forceinline__ bool load_words(const std::byte* from, Strip<kVectors, kScales>& strip,
                                           std::uint32_t epoch) {
  const int lane = lane_index();
  bool fresh = true;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const std::byte* const at = from + v * 1024 + lane * 16;
    std::uint64_t x, y, z, w;
    ptx::load_two_words(at, x, y);
    ptx::load_two_words(at + 512, z, w);
    strip.data[v] = make_uint4(static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y),
                               static_cast<std::uint32_t>(z), static_cast<std::uint32_t>(w));
    fresh = fresh && is_fresh(x, epoch) && is_fresh(y, epoch) && is_fresh(z, epoch) && is_fresh(w, epoch);
  }
  if (kScales > 0) {
    std::uint64_t& word =
        *reinterpret_cast<std::uint64_t*>(const_cast<std::byte*>(from) + kVectors * 1024 + lane / 8 * 8);
    const std::uint64_t scale = protocol::Shared(word).load(protocol::kRelaxed);
    strip.scale = static_cast<std::uint32_t>(scale);
    fresh = fresh && is_fresh(scale, epoch);
  }
  return fresh;
}

template <int kVectors, int kScales>
inline constexpr int kTailPackets = (kVectors * kLanes + kScales + 2) / 3;

/// Word `index` of the tail: the lanes' w, vector by vector, then the scales. All lanes; `index` differs by lane.
template <int kVectors, int kScales>
__device__ __forceinline__ std::uint32_t tail_word(const Strip<kVectors, kScales>& strip, int index) {
  std::uint32_t word = from_lane(strip.data[0].w, index % kLanes);
  if constexpr (kVectors == 2) {
    const std::uint32_t second = from_lane(strip.data[1].w, index % kLanes);
    word = index >= kLanes ? second : word;
  }
  if constexpr (kScales > 0) {
    const std::uint32_t scale = from_lane(strip.scale, (index % 4) * 8);  // kVectors * 32 is a multiple of 4
    word = index >= kVectors * kLanes ? scale : word;
  }
  return word;
}

/// Stores a strip as packets at `to`. All lanes; pattern G'.
template <int kVectors, int kScales>
__device__ __forceinline__ void store_packets(std::byte* to, const Strip<kVectors, kScales>& strip,
                                              std::uint32_t epoch) {
  const int lane = lane_index();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint4& d = strip.data[v];
    ptx::store_packet(to + (v * kLanes + lane) * 16, static_cast<std::uint64_t>(d.y) << 32 | d.x,
                      make_word(d.z, epoch));
  }
  std::uint32_t tail[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) tail[i] = tail_word(strip, 3 * lane + i);
  if (lane < kTailPackets<kVectors, kScales>) {
    ptx::store_packet(to + (kVectors * kLanes + lane) * 16, static_cast<std::uint64_t>(tail[1]) << 32 | tail[0],
                      make_word(tail[2], epoch));
  }
}

/// A lane's packets as they came.
template <int kVectors>
struct Packets {
  std::uint64_t low[kVectors + 1] = {}, high[kVectors + 1] = {};
};

/// One look: true when all of this lane's packets are there.
template <int kVectors, int kScales>
__device__ __forceinline__ bool load_packets(const std::byte* from, Packets<kVectors>& packets, std::uint32_t epoch) {
  const int lane = lane_index();
  bool fresh = true;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    ptx::load_packet(from + (v * kLanes + lane) * 16, packets.low[v], packets.high[v]);
    fresh = fresh && is_fresh(packets.high[v], epoch);
  }
  if (lane < kTailPackets<kVectors, kScales>) {
    ptx::load_packet(from + (kVectors * kLanes + lane) * 16, packets.low[kVectors], packets.high[kVectors]);
    fresh = fresh && is_fresh(packets.high[kVectors], epoch);
  }
  return fresh;
}

/// Puts the tail back. All lanes.
template <int kVectors, int kScales>
__device__ __forceinline__ void unpack(const Packets<kVectors>& packets, Strip<kVectors, kScales>& strip) {
  const int lane = lane_index();
  const auto tail = [&](int index) {
    const int holder = index / 3;
    const std::uint32_t first = from_lane(static_cast<std::uint32_t>(packets.low[kVectors]), holder);
    const std::uint32_t second = from_lane(static_cast<std::uint32_t>(packets.low[kVectors] >> 32), holder);
    const std::uint32_t third = from_lane(static_cast<std::uint32_t>(packets.high[kVectors]), holder);
    return index % 3 == 0 ? first : index % 3 == 1 ? second : third;
  };
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    strip.data[v] =
        make_uint4(static_cast<std::uint32_t>(packets.low[v]), static_cast<std::uint32_t>(packets.low[v] >> 32),
                   static_cast<std::uint32_t>(packets.high[v]), tail(v * kLanes + lane));
  }
  if constexpr (kScales > 0) strip.scale = tail(kVectors * kLanes + lane / 8);
}

}  // namespace anyep::cuda
