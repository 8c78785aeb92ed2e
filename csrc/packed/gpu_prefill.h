// SPDX-License-Identifier: Apache-2.0
// How a product of many tokens is dealt to thread blocks (gpu_prefill.cuh): host and device, without CUDA headers.
#pragma once

#include <cstdint>

#include "packed/gpu_walk.h"

namespace discquant {
namespace packed {

constexpr int kPrefillRows = 256;  // of a thread block's tile: two warpgroups x two units of 64
constexpr int kPrefillStages = 6;  // tiles of activations, tokens x 128 k, in shared memory
constexpr int kPrefillRowStride = kPrefillRows + 4;  // floats of a token's sums in shared memory: no bank conflicts

// A thread block owns 256 rows x `tokens` tokens. Where that makes too few thread blocks, and the device has clusters, one of
// `splits` (a power of two) shares a tile, each with a part of K; their sums meet in shared memory, in the order of k.
struct Prefill {
  int k_tiles, blocks, groups;
  int group_tiles;  // k tiles of a group, 1 for groups below 128
  int unit_groups;  // groups of a k tile, 1 for groups of 128 and more
  int tokens;       // of a tile: 64 or 128
  int splits;

  DISCQUANT_HD int group(int k_tile, int i) const {
    if (unit_groups == 1) return static_cast<int>(static_cast<uint32_t>(k_tile) / static_cast<uint32_t>(group_tiles));
    const int found = k_tile * unit_groups + (i < unit_groups ? i : unit_groups - 1);
    return found < groups ? found : groups - 1;
  }
  // Thread blocks, each with its cluster.
  DISCQUANT_HD int64_t tiles(int64_t all_tokens) const {
    return ceil_div(all_tokens, tokens) * ceil_div(blocks, kPrefillRows / kBlockRows);
  }
  DISCQUANT_HD int k_begin(int rank) const { return static_cast<int>(static_cast<int64_t>(k_tiles) * rank / splits); }
};

// How wgmma is told where a tile of B lies: rows (columns of the product) of 128 bytes, eight of them 1024 bytes on, the
// 16-byte parts of a row exchanged by the row's number modulo 8 (mode 1, 128-byte swizzle). k16 steps follow at 32 bytes.
DISCQUANT_HD uint64_t swizzled_rows(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffffu) >> 4;
}

DISCQUANT_HD int prefill_shared_bytes(int tokens) {
  const int stages = kPrefillStages * tokens * kTileK * 2, sums = tokens * kPrefillRowStride * 4;
  return 1024 + (stages > sums ? stages : sums);  // stages begin at a multiple of 1024
}

// How many clusters of 1, 2, 4 and 8 thread blocks a device runs at a time. Less than its multiprocessors allow: a cluster
// lies within one of the device's parts, and those have none left over for it.
struct Clusters {
  int at_once[4];
};

// Into how many parts K is cut, by the time of the last thread block to end: k tiles of one, where the end of a tile (its
// sums leave through shared memory) is taken for three, and one more where others' are read.
inline int prefill_splits(int k_tiles, int64_t tiles, const Clusters& clusters) {
  int64_t best = 0;
  int found = 1;
  for (int i = 0; i < 4 && 1 << i <= k_tiles; ++i) {
    if (clusters.at_once[i] < 1) continue;
    const int64_t cost = ceil_div(tiles, clusters.at_once[i]) * (ceil_div(k_tiles, 1 << i) + 3 + (i > 0 ? 1 : 0));
    if (best == 0 || cost < best) best = cost, found = 1 << i;
  }
  return found;
}

// All but `splits`, which is 1: a function of (N, K, tokens, device). False where the device has too little memory, or 32
// bits are too few.
inline bool make_prefill(int64_t n, int64_t k, int64_t group_size, int64_t tokens, const GpuDevice& device, Prefill& to) {
  const int64_t k_tiles = padded_k(k) / kTileK, blocks = padded_rows(n) / kBlockRows;
  const int64_t group = group_size > 0 ? group_size : padded_k(k);
  constexpr int64_t kLimit = int64_t{1} << 30;
  to.tokens = tokens <= 64 || device.shared_bytes < prefill_shared_bytes(128) ? 64 : 128;
  if (device.shared_bytes < prefill_shared_bytes(to.tokens) || tokens < 1 || n < 1 || k < 1 ||
      blocks * k_tiles >= kLimit || padded_rows(n) * ceil_div(k, group) >= kLimit || blocks > 4 * 65535)
    return false;
  to.k_tiles = static_cast<int>(k_tiles);
  to.blocks = static_cast<int>(blocks);
  to.groups = static_cast<int>(ceil_div(k, group));
  to.unit_groups = group < kTileK ? static_cast<int>(kTileK / group) : 1;
  to.group_tiles = group < kTileK ? 1 : static_cast<int>(group / kTileK);
  to.splits = 1;
  return true;
}

}  // namespace packed
}  // namespace discquant
