// SPDX-License-Identifier: Apache-2.0
// packed_linear on tensor cores (sm_80 and later): weights are the A operand of mma.m16n8k16, tokens its n = 8 columns.
// A thread block of 16 warps walks its run of units (gpu_walk.h). A warp owns 32 of a unit's 64 rows and every eighth unit,
// and streams its words from memory into registers, units ahead and past the ends of row blocks. No warp waits for another
// while it streams: where a row block ends it leaves its sums in a slot of shared memory, and the last of the eight slices
// to come adds them in order. Row blocks that several runs share are added at the end of the run (gpu_sums.cuh). All orders
// of addition are fixed, so results do not depend on timing.
#pragma once

#include "packed/gpu_linear.h"
#include "packed/gpu_scale.cuh"
#include "packed/gpu_sums.cuh"
#include "packed/gpu_words.cuh"

namespace discquant {
namespace packed {

// Units that a warp has in flight to registers: 64 KB and more a thread block where memory is as fast as Hopper's.
template <int kBits>
__host__ __device__ constexpr int depth() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 2;
#else
  return kBits == 4 ? 2 : 3;
#endif
}

// What a lane holds of a unit: its words; and of row quad_row of its warp's 32 the scales, group by group, inside 32
// bits. Zero points of one group likewise; of more groups the 32 bits of all that have the lane's number. Loads only:
// nothing here may wait for one.
template <int kBits>
struct Fragment {
  uint32_t words[kWarpTiles][2 * kBits];
  uint32_t scale[4];
  uint32_t zero;
};

// kWhole: a group spans the unit, or more.
template <class T, int kBits, int kTokenTiles, bool kExact, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) packed_linear_kernel(const GpuLinear p, const Walk walk) {
  constexpr int kDepth = depth<kBits>();
  Slot* const slots = reinterpret_cast<Slot*>(dynamic_shared());
  float* const sums = reinterpret_cast<float*>(dynamic_shared() + kSlotsBytes);
  uint8_t* const tokens = reinterpret_cast<uint8_t*>(sums + walk.slots * slot_floats(p.tokens));

  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int half = warp % 2, slice = warp / 2;
  const int row = half * kWarpTiles * kTileRows + lane / 4;
  const uint32_t run = blockIdx.x, first = walk.begin(run), last = walk.begin(run + 1);
  const int group_steps = kWhole ? 8 : 8 / walk.unit_groups;  // k16 steps of a group in a unit: 2, 4 or 8

  Cursor head = walk_at(walk, first);
  int chunk = head.chunk, block = head.block;
  uint32_t origin = first - static_cast<uint32_t>(head.k_tile);
  uint32_t end = origin + static_cast<uint32_t>(walk.width(chunk));  // of this run's part of the block
  if (end > last) end = last;
  end = uniform(end);
  walk_forward(walk, head, slice);

  // Everything that does not change from unit to unit is worked out here: instructions bound the 3-bit loop.
  constexpr int kTileBytes = 256 * kBits;
  constexpr uint32_t kUnitBytes = kBlockRows / kTileRows * kTileBytes;
  const uint8_t* const lane_words =
      kept(reinterpret_cast<const uint8_t*>(p.words) + half * kWarpTiles * kTileBytes + lane * 16);
  const uint32_t tail = kept(512u - static_cast<uint32_t>(lane) * 8);
  // Of its rows' scales and zero points a quad of lanes loads one row each, in the order of the accumulators.
  const int quad_row = lane / 4 + lane % 4 * 8;
  const uint32_t scale_size = p.scale_type == DType::kFloat32 ? 4 : 2, scale_stride = kept(scale_size * kBlockRows);
  const uint32_t scale_bytes = kept(scale_selector(p.scale_type, quad_row & 1));
  const uint8_t* const lane_scale =
      static_cast<const uint8_t*>(p.scale) + ((half * 32 + quad_row) * scale_size & ~3u);
  const uint8_t* const lane_zero = p.zero_point + half * 32 + (kWhole ? quad_row & ~3 : (lane & 7) * 4);

  // The head of the stream: the next unit to load, counted as units lie in memory. `head` says in which row block, and
  // is whole only while it is placed anew.
  uint32_t head_at, head_stop;       // head_stop: where the row block's part ends, or the run
  uint32_t head_jump, head_twice_k;  // from head_stop to the chunk's next row block; twice the k tile
  // Of the row block's first group: pointers that count it take fewer instructions, its number fewer registers.
  const uint8_t *head_scale = lane_scale, *head_zero = lane_zero;
  uint32_t head_group = 0;
  auto place_head = [&] {
    const int k_tile = head.chunk * walk.chunk_tiles + head.k_tile;
    const uint32_t of_run = head.unit < last ? last - head.unit : 0;
    const uint32_t of_block = static_cast<uint32_t>(head.width - head.k_tile);
    head_at = uniform(static_cast<uint32_t>(head.block * walk.k_tiles + k_tile));
    head_stop = uniform(head_at + (of_run < of_block ? of_run : of_block));
    head_jump = of_run < of_block ? walk.units : static_cast<uint32_t>(walk.k_tiles - head.width);
    head_twice_k = uniform(2 * static_cast<uint32_t>(k_tile));
    if constexpr (kWhole) {
      const int64_t group = static_cast<int64_t>(head.block) * walk.groups;
      head_scale = lane_scale + group * scale_stride;
      head_zero = lane_zero + group * kBlockRows;
    } else {
      head_group = static_cast<uint32_t>(head.block * walk.groups);
    }
  };
  place_head();

  // The L2 is kept ahead by rounds: what the thread block's registers hold. A warp brings its share of the round's
  // lines; `ahead` counts from the head, which has come to the next round.
  constexpr uint32_t kRound = kDepth * kSlices;
  constexpr int kUnitLines = kUnitBytes / 128, kLines = kRound * kUnitLines / (kThreads / 32);
  constexpr int kPrefetches = (kLines + 31) / 32, kPrefetchLanes = kLines / kPrefetches;
  auto prefetch_round = [&](uint32_t ahead) {
    const uint32_t line = static_cast<uint32_t>(warp * kPrefetchLanes + lane);
#pragma unroll
    for (int i = 0; i < kPrefetches; ++i) {
      uint32_t at = head_at + ahead - static_cast<uint32_t>(slice) + line / kUnitLines + i * (kRound / kPrefetches);
      if (at >= head_stop) at += head_jump;  // past the end of the run: to nowhere
      if (at < walk.units && lane < kPrefetchLanes)
        prefetch(reinterpret_cast<const uint8_t*>(p.words) +
                 (static_cast<uint64_t>(at) * kUnitBytes + line % kUnitLines * 128));
    }
  };

  auto load = [&](Fragment<kBits>& to) {
    if (head_at >= head_stop) {
      head.k_tile = static_cast<int>(head_at) - head.block * walk.k_tiles - head.chunk * walk.chunk_tiles;
      head.unit = walk.origin(head.chunk, head.block) + static_cast<uint32_t>(head.k_tile);
      if (head.unit >= last) return;
      walk_forward(walk, head, 0);
      place_head();
    }
    const uint8_t* const from = lane_words + static_cast<uint64_t>(head_at) * kUnitBytes;
#pragma unroll
    for (int tile = 0; tile < kWarpTiles; ++tile) load_words<kBits>(to.words[tile], from + tile * kTileBytes, tail);
    if constexpr (kWhole) {
      const uint64_t group = walk.group_of(head_twice_k);
      to.scale[0] = load_word(head_scale, group * scale_stride);
      if (p.zero_point != nullptr) to.zero = load_word(head_zero, group * kBlockRows);
    } else {
      const int k_tile = static_cast<int>(head_twice_k / 2);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < walk.unit_groups)
          to.scale[j] = load_word(head_scale, static_cast<uint64_t>(head_group + walk.group(k_tile, j)) * scale_stride);
      if (p.zero_point != nullptr)
        to.zero = load_word(head_zero, static_cast<uint64_t>(head_group + walk.group(k_tile, lane / 8)) * kBlockRows);
    }
    head_at += kSlices;
    head_twice_k += 2 * kSlices;
  };

  // The chunk's activations: the k tiles that this run meets, `from` on, round the chunk. Tiles begin .. stop of them.
  auto copy_tokens = [&](int from, uint32_t begin, uint32_t stop) {
    const int width = walk.width(chunk);
#pragma unroll 1
    for (int i = threadIdx.x; i < width * 16; i += kThreads) {
      const int ahead = i / 16 - from;
      const uint32_t tile = static_cast<uint32_t>(ahead < 0 ? ahead + width : ahead);
      if (tile < begin || tile >= stop) continue;
      const int64_t k = static_cast<int64_t>(chunk) * walk.chunk_tiles * kTileK + i * 8;
      const int bytes = k < p.in_features ? 16 : 0;
      const uint16_t* copy_from = static_cast<const uint16_t*>(p.x) + (bytes > 0 ? k : 0);
      uint8_t* copy_to = tokens + i * 16;
#pragma unroll 4
      for (int token = 0; token < p.tokens; ++token) {
        copy16(copy_to, copy_from, bytes);
        copy_to += token_stride(walk.chunk_tiles);
        copy_from += p.x_stride;
      }
    }
    close_copies();
  };
  auto tiles_met = [&](uint32_t at) {
    const uint32_t width = static_cast<uint32_t>(walk.width(chunk));
    const uint32_t of_chunk = walk.chunk_begin(chunk) + width * walk.blocks - at, of_run = last - at;
    const uint32_t of_both = of_chunk < of_run ? of_chunk : of_run;
    return of_both < width ? of_both : width;
  };

  // ldmatrix: rows are tokens, so each lane gets k = 2t, 2t+1 (+8) of token g: the B fragment. One instruction serves
  // two steps of one tile of tokens or one step of two. Where there are no more tokens the last one comes again: a column
  // of the product depends on no other, and nobody reads those.
  int token = kTokenTiles == 1 ? lane & 7 : (lane >> 4) * 8 + (lane & 7);
  if (token >= p.tokens) token = p.tokens - 1;
  const int column = kTokenTiles == 1 ? (lane >> 3) * 16 : (lane >> 3 & 1) * 16;
  const uint32_t token_base = shared_address(tokens + token * token_stride(walk.chunk_tiles)) + column;
  uint32_t token_origin = token_base - origin * (kTileK * 2);  // of unit 0, were it in this row block

  float total[kWarpTiles][kTokenTiles][4] = {};
  ZeroPair zero[2 * kWarpTiles];
#pragma unroll
  for (int r = 0; r < 2 * kWarpTiles; ++r) zero[r] = zero_pair<T>(1u << (kBits - 1));

  auto zero_of = [&](const Fragment<kBits>& from, int group, int r) {
    return shuffle(from.zero, group * 8 + (8 * r + lane / 4) / 4) >> (lane / 4 % 4 * 8) & 255u;
  };

  auto compute = [&](const Fragment<kBits>& from, uint32_t base) {
    float part[kWarpTiles][kTokenTiles][4] = {};
    uint32_t pair_scale[2 * kWarpTiles] = {};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      // The lane's scale, then that of each row. By a choice of two: an index would put the registers into memory.
      const float lane_scale_of =
          selected_scale(kWhole ? from.scale[0] : group_steps == 2 ? from.scale[pair] : from.scale[pair / 2],
                         scale_bytes, p.scale_type);
      if ((2 * pair & (group_steps - 1)) == 0) {
        if (p.zero_point != nullptr) {
          constexpr bool kShifted = T::kWide || kBits == 3;  // rows 8 .. 15 of a tile come shifted by four
          const ZeroPair mine = zero_pair<T>(pick_bytes(from.zero, 0x4440u + (quad_row & 3)));
#pragma unroll
          for (int r = 0; r < 2 * kWarpTiles; ++r) {
            if constexpr (kWhole)
              zero[r].low = zero[r].high = quad_shuffle(kShifted && lane % 2 ? mine.high : mine.low, r);
            else
              zero[r] = zero_pair<T>(zero_of(from, 2 * pair / group_steps, r));
          }
        }
        if constexpr (kExact) {
          const uint32_t mine = float_to_bits<T>(lane_scale_of) * 0x10001u;
#pragma unroll
          for (int r = 0; r < 2 * kWarpTiles; ++r) pair_scale[r] = quad_shuffle(mine, r);
        }
      }
      uint32_t b[2][kTokenTiles][2];
      uint32_t v[4];
      load_matrices(v, base + pair * 64);
      if constexpr (kTokenTiles == 1) {
        b[0][0][0] = v[0], b[0][0][1] = v[1], b[1][0][0] = v[2], b[1][0][1] = v[3];
      } else {
        b[0][0][0] = v[0], b[0][0][1] = v[1], b[0][1][0] = v[2], b[0][1][1] = v[3];
        load_matrices(v, base + pair * 64 + 32);
        b[1][0][0] = v[0], b[1][0][1] = v[1], b[1][1][0] = v[2], b[1][1][1] = v[3];
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int tile = 0; tile < kWarpTiles; ++tile) {
          uint32_t a[4];
          dequant_word<T, kBits>(step_word<kBits>(from.words[tile], 2 * pair + s), zero[2 * tile], zero[2 * tile + 1], a);
          if constexpr (kExact) {
#pragma unroll
            for (int j = 0; j < 4; ++j) a[j] = mul_pair<T>(a[j], pair_scale[2 * tile + (j & 1)]);
          }
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n)
            mma(kExact ? total[tile][n] : part[tile][n], a, b[s][n][0], b[s][n][1], T());
        }
      }
      if (!kExact && (2 * (pair + 1) & (group_steps - 1)) == 0) {
#pragma unroll
        for (int tile = 0; tile < kWarpTiles; ++tile) {
          const float top = word_to_float(quad_shuffle(float_to_word(lane_scale_of), 2 * tile));
          const float bottom = word_to_float(quad_shuffle(float_to_word(lane_scale_of), 2 * tile + 1));
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              total[tile][n][i] = fused(part[tile][n][i], i < 2 ? top : bottom, total[tile][n][i]);
              part[tile][n][i] = 0.0f;
            }
        }
      }
    }
  };

  // Add the eight slices of this half's slot in order, a lane to a row, for every `step`th token: a row that is this
  // run's alone is finished, of others the run's part goes to the workspace.
  int slot = 0;
  uint32_t use = 0;  // parity of the slot's uses
  auto add_slices = [&](int token_begin, int step) {
    const bool whole = walk.chunks == 1 && first <= origin && end == origin + static_cast<uint32_t>(walk.width(0));
    const int row_of = half * kWarpTiles * kTileRows + lane;
    const int64_t n = static_cast<int64_t>(block) * kBlockRows + row_of;
    const float* const from = sums + slot * slot_floats(p.tokens) + row_of;
    float* const to = partial_sums(p, walk, run, chunk, block) + row_of;
    const float bias = whole ? bias_of<T>(p, n) : 0.0f;
#pragma unroll 4
    for (int token_of = token_begin; token_of < p.tokens; token_of += step) {
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) sum += from[(s * p.tokens + token_of) * kSumStride];
      if (whole)
        store_output<T>(p, token_of, n, sum + bias);
      else
        to[token_of * kBlockRows] = sum;
    }
  };

  // This run's part of a row block is done: leave the warp's sums in a slot, once the slot's former ones are added up.
  // The last slice to come adds, while the others stream on; at the end of the run all do, each its tokens.
  auto leave = [&](bool over) {
    Slot* const here = slots + slot * 2 + half;
    wait_for_meeting(&here->emptied, use ^ 1);
#pragma unroll
    for (int tile = 0; tile < kWarpTiles; ++tile)
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column_of = n * 8 + (lane & 3) * 2 + (i & 1);
          if (column_of < p.tokens)
            sums[slot * slot_floats(p.tokens) + (slice * p.tokens + column_of) * kSumStride + row + tile * kTileRows +
                 (i >= 2 ? 8 : 0)] = total[tile][n][i];
          total[tile][n][i] = 0.0f;
        }
    if (over) return;
    arrive(&here->filled);
    if (count_in(&here->left) % kSlices == kSlices - 1) {
      wait_for_meeting(&here->filled, use);
      add_slices(0, 1);
      arrive(&here->emptied);
    }
    if (++slot == walk.slots) slot = 0, use ^= 1;
  };

  Fragment<kBits> ring[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) load(ring[d]);
  prefetch_round(0);
  prefetch_round(kRound);
  if (threadIdx.x < 2 * kMaxSlots) {
    init_meeting(&slots[threadIdx.x].filled, kSlices);
    init_meeting(&slots[threadIdx.x].emptied, 1);
    slots[threadIdx.x].left = 0;
  }
  if (threadIdx.x == 0) slots->first_part = chunk * walk.blocks + block;  // a register through the loop is too dear
  wait_for_previous_kernel();  // the loads above touch the weight only
  const uint32_t met = uniform(tiles_met(first)), met_first = met < kSlices ? met : kSlices;
  copy_tokens(static_cast<int>(first - origin), 0, met_first);
  copy_tokens(static_cast<int>(first - origin), met_first, met);
  wait_for_copies<1>();
  block_barrier(kThreads);
  bool all_staged = met <= kSlices;
  uint32_t unit = uniform(first + static_cast<uint32_t>(slice));
  // One unit; true when the run is over. Called with constant places of the ring, which keeps them in registers.
  auto advance = [&](Fragment<kBits>& at, bool ends_round) {
    while (unit >= end) {
      const bool over = end == last;
      leave(over);
      if (over) return true;
      origin = end;
      if (++block == walk.blocks) {
        block = 0;
        ++chunk;
        block_barrier(kThreads);  // all are done with the chunk before
        copy_tokens(0, 0, tiles_met(end));
        wait_for_copies<0>();
        block_barrier(kThreads);
      }
      end = origin + static_cast<uint32_t>(walk.width(chunk));
      if (end > last) end = last;
      end = uniform(end);
      token_origin = token_base - origin * (kTileK * 2);
    }
    compute(at, token_origin + unit * (kTileK * 2));
    load(at);
    if (ends_round) prefetch_round(kRound);
    unit += kSlices;
    return false;
  };
  while (!advance(ring[0], false)) {
    if (!all_staged) {  // no warp is at its end yet: there are more units than slices
      wait_for_copies<0>();
      block_barrier(kThreads);
      all_staged = true;
    }
    if (advance(ring[1], kDepth == 2) || (kDepth > 2 && advance(ring[kDepth - 1], true))) break;
  }
  block_barrier(kThreads);
  add_slices(slice, kSlices);
  add_runs<T>(p, walk, slots->first_part, chunk * walk.blocks + block, reinterpret_cast<Note*>(sums));
}

}  // namespace packed
}  // namespace discquant
