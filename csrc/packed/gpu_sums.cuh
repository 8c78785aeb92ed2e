// SPDX-License-Identifier: Apache-2.0
// What becomes of packed_linear's sums: outputs, or parts of a row block that several runs share. Those lie in the
// workspace until every run is over; whoever arrives last adds them in the order of the walk, so results do not depend
// on timing.
#pragma once

#include "packed/gpu_linear.h"
#include "packed/gpu_scale.cuh"

namespace discquant {
namespace packed {

// Zero where there is none.
template <class T>
__device__ __forceinline__ float bias_of(const GpuLinear& p, int64_t n) {
  if (p.bias == nullptr || n >= p.out_features) return 0.0f;
  return scale_value(load_half(p.bias, 2 * n), T::kWide ? DType::kFloat16 : DType::kBFloat16);
}

template <class T>
__device__ __forceinline__ void store_output(const GpuLinear& p, int token, int64_t n, float value) {
  if (n < p.out_features) static_cast<uint16_t*>(p.y)[token * p.out_features + n] = float_to_bits<T>(value);
}

__device__ __forceinline__ float* partial_sums(const GpuLinear& p, const Walk& walk, uint32_t run, int chunk,
                                               int block) {
  return reinterpret_cast<float*>(p.workspace + kMaxBlocks) + walk.slot(run, chunk, block) * kPartialWords;
}

// A row block whose last run we are, its runs in the first chunk; block -1: another's to add.
struct Note {
  int block;
  Range runs;
};
constexpr int kNotes = 128;  // at a time
static_assert(kNotes * sizeof(Note) <= 4 * kSlices * kSumStride, "notes lie where one token's sums in one slot lay");

// Parts of a row block in the order of the walk: chunk by chunk, in a chunk run by run.
struct Parts {
  int block, chunk;
  Range runs;

  __device__ __forceinline__ bool more(const Walk& walk) const { return chunk < walk.chunks; }
  __device__ __forceinline__ const float* next(const GpuLinear& p, const Walk& walk) {
    const float* const found = partial_sums(p, walk, runs.first, chunk, block);
    if (runs.first++ == runs.last && ++chunk < walk.chunks) runs = walk.runs_of(chunk, block);
    return found;
  }
};

// At the end of a run, by its whole thread block: count the run in at the row blocks that it shares, and add up those
// that it is the last at. Parts are numbered chunk by chunk, in a chunk block by block; the run had first_part .. last_part.
template <class T>
__device__ __forceinline__ void add_runs(const GpuLinear& p, const Walk& walk, int first_part, int last_part,
                                         Note* notes) {
  // In one chunk, all parts but the first and the last are whole row blocks.
  const bool ends_only = walk.chunks == 1 && last_part > first_part;
  const int parts = ends_only ? 2 : last_part - first_part + 1;
#pragma unroll 1
  for (int base = 0; base < parts; base += kNotes) {
    const int mine = base + static_cast<int>(threadIdx.x);
    const bool counts = static_cast<int>(threadIdx.x) < kNotes && mine < parts;
    Note note{-1, Range{0, 0}};
    uint32_t expected = 0;
    if (counts) {
      note.block = (ends_only && mine == 1 ? last_part : first_part + mine) % walk.blocks;
#pragma unroll 1
      for (int c = walk.chunks - 1; c >= 0; --c) {
        note.runs = walk.runs_of(c, note.block);
        expected += note.runs.last - note.runs.first + 1;
      }
    }
    block_barrier(kThreads);  // all parts of this run are written, and the notes before are done with
    if (counts) {
      const bool is_last = expected > 1 && increment_released(p.workspace + note.block) + 1 == expected;
      if (is_last)
        p.workspace[note.block] = 0;  // ready for the next launch
      else
        note.block = -1;  // a row block of one part was finished where it ended
      notes[threadIdx.x] = note;
    }
    block_barrier(kThreads);
    // Four rows of a token at a time, twice, so that eight loads are on their way: these end the launch.
    constexpr int kItems = 2, kLoads = 4;
    const int quads = p.tokens * (kBlockRows / 4);
    const int items = quads * (parts - base < kNotes ? parts - base : kNotes);
#pragma unroll 1
    for (int first = threadIdx.x; first < items; first += kItems * kThreads) {
      Parts at[kItems];
      int quad[kItems];
      float sum[kItems][4] = {};
#pragma unroll
      for (int u = 0; u < kItems; ++u) {
        const int item = first + u * kThreads, which = item < items ? item / quads : 0;
        const Note of = notes[which];
        quad[u] = item - which * quads;
        at[u] = Parts{of.block, item < items && of.block >= 0 ? 0 : walk.chunks, of.runs};
      }
      while (at[0].more(walk) || at[1].more(walk)) {
        float v[kItems][kLoads][4] = {};
#pragma unroll
        for (int u = 0; u < kItems; ++u)
#pragma unroll
          for (int j = 0; j < kLoads; ++j)
            if (at[u].more(walk)) load_shared_floats(v[u][j], at[u].next(p, walk) + quad[u] * 4);
        // A part that is not there adds zero, which changes no bit: no sum is minus zero.
#pragma unroll
        for (int u = 0; u < kItems; ++u)
#pragma unroll
          for (int j = 0; j < kLoads; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[u][i] += v[u][j][i];
      }
#pragma unroll
      for (int u = 0; u < kItems; ++u) {
        if (at[u].block < 0 || first + u * kThreads >= items) continue;
        const int64_t n = static_cast<int64_t>(at[u].block) * kBlockRows + quad[u] * 4 % kBlockRows;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          store_output<T>(p, quad[u] * 4 / kBlockRows, n + i, sum[u][i] + bias_of<T>(p, n + i));
      }
    }
  }
}

}  // namespace packed
}  // namespace discquant
