// SPDX-License-Identifier: Apache-2.0
// How packed_linear's work is dealt to thread blocks on a GPU: host and device functions without CUDA headers.
#pragma once

#include <cstdint>

#include "packed/layout.h"

namespace discquant {
namespace packed {

constexpr int kMaxSplitTokens = 16;  // of one launch
constexpr int kMaxSlots = 8;
constexpr int kMaxBlocks = 1 << 16;  // the counters of a workspace lie in front, where no weight's sums ever come
constexpr int kPartialWords = kBlockRows * kMaxSplitTokens;

// Thread blocks of runs first .. last.
struct Range {
  uint32_t first, last;
};

// What the split depends on besides the weight.
struct GpuDevice {
  int multiprocessors;
  int shared_bytes;  // that one thread block can ask for
  bool overlaps;     // whether a kernel can begin before the last one ends; the split does not depend on it
};

// A unit is 64 rows (a block) x 128 k. K is cut into chunks whose activations fit into shared memory; the units are
// ordered chunk by chunk, in a chunk block by block, and dealt to `runs` thread blocks in equal contiguous runs. All of
// it follows from (N, K, device, whether for 8 or 16 tokens).
struct Walk {
  int k_tiles, blocks, chunk_tiles, chunks;
  uint32_t units, runs;
  int groups;
  int group_tiles;       // k tiles of a group, 1 for groups below 128
  int unit_groups;       // groups of a unit, 1 for groups of 128 and more
  uint32_t group_magic;  // k_tile / group_tiles = the high word of 2 * k_tile * group_magic
  int slots;             // parts of row blocks that can lie in shared memory at a time; results do not depend on it

  DISCQUANT_HD int width(int chunk) const {
    return chunk == chunks - 1 ? k_tiles - chunk * chunk_tiles : chunk_tiles;
  }
  DISCQUANT_HD uint32_t begin(uint32_t run) const { return units * run / runs; }
  DISCQUANT_HD uint32_t run_of(uint32_t unit) const { return ((unit + 1) * runs - 1) / units; }
  DISCQUANT_HD uint32_t chunk_begin(int chunk) const { return static_cast<uint32_t>(chunk * chunk_tiles) * blocks; }
  // First unit of a block's part in a chunk.
  DISCQUANT_HD uint32_t origin(int chunk, int block) const {
    return chunk_begin(chunk) + static_cast<uint32_t>(block) * width(chunk);
  }
  // The runs that share a block's part in a chunk.
  DISCQUANT_HD Range runs_of(int chunk, int block) const {
    const uint32_t first_unit = origin(chunk, block);
    return Range{run_of(first_unit), run_of(first_unit + static_cast<uint32_t>(width(chunk)) - 1)};
  }
  // Group of a k tile, for groups of 128 and more.
  DISCQUANT_HD uint32_t group_of(uint32_t twice_k_tile) const {
#if defined(__CUDA_ARCH__)
    return __umulhi(twice_k_tile, group_magic);
#else
    return static_cast<uint32_t>((static_cast<uint64_t>(twice_k_tile) * group_magic) >> 32);
#endif
  }
  // Group of code `k_tile * 128 + 128 / unit_groups * i`; past the last group, where all codes are padding, the last.
  DISCQUANT_HD int group(int k_tile, int i) const {
    if (unit_groups == 1) return static_cast<int>(group_of(2 * static_cast<uint32_t>(k_tile)));
    const int found = k_tile * unit_groups + (i < unit_groups ? i : unit_groups - 1);
    return found < groups ? found : groups - 1;
  }
  // Where a run leaves its part of a block that it shares: along the walk the run or the block grows, so no two agree.
  DISCQUANT_HD int64_t slot(uint32_t run, int chunk, int block) const {
    return static_cast<int64_t>(run) + static_cast<int64_t>(chunk) * blocks + block;
  }
};

// A place in the walk.
struct Cursor {
  uint32_t unit;
  int chunk, block, k_tile, width;  // k_tile counts within the chunk, which is `width` wide
};

DISCQUANT_HD Cursor walk_at(const Walk& walk, uint32_t unit) {
  const int chunk = walk.chunks == 1 ? 0 : static_cast<int>(unit / walk.chunk_begin(1));
  const uint32_t inside = unit - walk.chunk_begin(chunk);
  const uint32_t width = static_cast<uint32_t>(walk.width(chunk));
  return Cursor{unit, chunk, static_cast<int>(inside / width), static_cast<int>(inside % width), static_cast<int>(width)};
}

DISCQUANT_HD void walk_forward(const Walk& walk, Cursor& at, int units) {
  at.unit += static_cast<uint32_t>(units);
  at.k_tile += units;
  while (at.k_tile >= at.width) {
    at.k_tile -= at.width;
    if (++at.block == walk.blocks) at.block = 0, at.width = walk.width(++at.chunk);
  }
}

// A thread block: a warp owns two of the four row tiles of every eighth unit.
constexpr int kSlices = 8;
constexpr int kWarpTiles = 2;  // a fragment of activations serves both
constexpr int kThreads = 32 * kSlices * kBlockRows / (kWarpTiles * kTileRows);

// Shared memory: who is in the slots [slots][2 halves of the rows], sums [slots][8 slices][tokens][64 rows, padded],
// activations [tokens][chunk, padded by 16 bytes: no bank conflicts].
struct Slot {
  uint64_t filled, emptied;  // where the slices meet, and where their sum is done
  uint32_t left;             // slices that have left sums here, ever
  int first_part;            // of the run; in the first slot only
};
constexpr int kSlotsBytes = kMaxSlots * 2 * static_cast<int>(sizeof(Slot));
constexpr int kSumStride = kBlockRows + 4;  // floats: no bank conflicts between tokens
DISCQUANT_HD int token_stride(int chunk_tiles) { return chunk_tiles * kTileK * 2 + 16; }
DISCQUANT_HD int slot_floats(int tokens) { return kSlices * tokens * kSumStride; }
DISCQUANT_HD int shared_bytes(int tokens, int slots, int chunk_tiles) {
  return kSlotsBytes + slots * slot_floats(tokens) * 4 + tokens * token_stride(chunk_tiles);
}

// For up to 8 or up to 16 tokens; group_size 0: one group. False where a size is beyond the kernel's 32-bit arithmetic.
inline bool make_walk(int64_t n, int64_t k, int64_t group_size, const GpuDevice& device, int tokens, Walk& walk) {
  const int64_t k_tiles = padded_k(k) / kTileK, blocks = padded_rows(n) / kBlockRows, units = k_tiles * blocks;
  const int64_t room = (device.shared_bytes - shared_bytes(tokens, 1, 0)) / (tokens * kTileK * 2);
  const int64_t runs = units < device.multiprocessors ? units : device.multiprocessors;
  const int64_t group = group_size > 0 && group_size < padded_k(k) ? group_size : padded_k(k);
  const int64_t scales = padded_rows(n) * ceil_div(k, group);
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (room < 1 || units == 0 || blocks > kMaxBlocks || (units + 1) * runs >= 4 * kLimit || scales >= kLimit) return false;
  if (group > kTileK && k_tiles * (group / kTileK) >= 2 * kLimit) return false;  // group_magic would not be exact
  const int64_t chunk_tiles = ceil_div(k_tiles, ceil_div(k_tiles, room));
  walk.k_tiles = static_cast<int>(k_tiles);
  walk.blocks = static_cast<int>(blocks);
  walk.chunk_tiles = static_cast<int>(chunk_tiles);
  walk.chunks = static_cast<int>(ceil_div(k_tiles, chunk_tiles));
  walk.units = static_cast<uint32_t>(units);
  walk.runs = static_cast<uint32_t>(runs);
  walk.groups = static_cast<int>(ceil_div(k, group));
  walk.unit_groups = group < kTileK ? static_cast<int>(kTileK / group) : 1;
  walk.group_tiles = group < kTileK ? 1 : static_cast<int>(group / kTileK);
  walk.group_magic = (1u << 31) / static_cast<uint32_t>(walk.group_tiles) + 1u;
  walk.slots = 1;
  return true;
}

// As many slots as the device's shared memory has room for.
inline void give_slots(Walk& walk, int tokens, const GpuDevice& device) {
  while (walk.slots < kMaxSlots && shared_bytes(tokens, walk.slots + 1, walk.chunk_tiles) <= device.shared_bytes)
    ++walk.slots;
}

inline int64_t walk_workspace_words(const Walk& walk) {
  return kMaxBlocks + (static_cast<int64_t>(walk.runs) + static_cast<int64_t>(walk.chunks) * walk.blocks) * kPartialWords;
}

}  // namespace packed
}  // namespace discquant
