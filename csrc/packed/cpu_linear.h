// SPDX-License-Identifier: Apache-2.0
// The CPU side as an engine would call it: raw pointers, any thread pool, no torch.
#pragma once

#include <cstdint>

#include "packed/cpu_kernel.h"
#include "packed/layout.h"

namespace discquant {
namespace packed {

// How to run a function over [0, n) in parallel: the caller's own threads, so that two pools never fight for the cores.
// `run` may split the range as it likes; null runs here. `threads` decides how the work is cut, never the result.
struct Parallel {
  int threads = 1;
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context) = nullptr;
};

// y[m][n] = sum_k x[m][k] * scale * (q - zero_point)[n][k] + bias[n].
struct CpuLinear {
  const void* x;
  int64_t x_stride;  // elements between rows of x; its columns are adjacent
  DType x_type;      // of x, bias and y
  int64_t tokens;
  const uint32_t* words;  // kLayoutCpu layout
  const void* scale;
  const uint8_t* zero_point;
  DType scale_type;
  const void* bias;  // null: none
  void* y;           // [tokens][out_features]
  int64_t out_features;
  int64_t in_features;  // at least 1
  int bits;
  int64_t group_size;  // 32, 64 or a multiple of 128; 0 is the whole row
};

// The best set of instructions of this processor, and whether it has a given one.
Isa best_isa();
bool has_isa(Isa isa);
// For this call; what works element by element is the same for all.
const CpuKernels* kernels_for(Isa isa, Mode mode = Mode::kFp32, int64_t tokens = 1);

void packed_linear_cpu(const CpuLinear& call, Mode mode, Isa isa, const Parallel& parallel);
// With kernels of the caller's choice: those for streams where this processor would not take them, say.
void packed_linear_cpu(const CpuLinear& call, Mode mode, const CpuKernels& kernels, const Parallel& parallel);

// Reads `bytes` (a multiple of 4096) once with all threads, as fast as loads go: the roof of the benchmark. A thread takes one
// stream of 64 KiB at a time or four side by side, with or without prefetches.
uint32_t read_memory_cpu(const void* p, int64_t bytes, int streams, bool prefetch, const Parallel& parallel);

// codes [n][k] uint8 -> a runtime layout. Padding gets q = zero point. False if a code does not fit in `bits`.
bool pack_cpu(const uint8_t* codes, const uint8_t* zero_point, int64_t n, int64_t k, int bits, int64_t group_size,
              Layout layout, uint32_t* words, const Parallel& parallel);
void unpack_cpu(const uint32_t* words, int64_t n, int64_t k, int bits, Layout layout, uint8_t* codes,
                const Parallel& parallel);
void repack_cpu(const uint32_t* from, Layout from_layout, uint32_t* to, Layout to_layout, int64_t n, int64_t k,
                int bits, const Parallel& parallel);
// Row-wise dense streams: codes [rows][count] <-> words [rows][dense_words(count)].
bool pack_dense_cpu(const uint8_t* codes, int64_t rows, int64_t count, int bits, uint32_t* words,
                    const Parallel& parallel);
void unpack_dense_cpu(const uint32_t* words, int64_t rows, int64_t count, int bits, uint8_t* codes,
                      const Parallel& parallel);
// The served weight: scale * (q - zero_point) in float32, then one rounding to `type`. out: [row_end - row_begin][k].
struct CpuDequantize {
  const uint32_t* words;
  Layout layout;
  const void* scale;
  DType scale_type;
  const uint8_t* zero_point;
  int64_t row_begin, row_end;  // multiples of 16, or row_end = n
  int64_t k;
  int bits;
  int64_t group_size;
  void* out;
  DType type;
};
void dequantize_cpu(const CpuDequantize& call, const Parallel& parallel);

}  // namespace packed
}  // namespace discquant
