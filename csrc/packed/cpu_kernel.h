// SPDX-License-Identifier: Apache-2.0
// Interface between the CPU driver and the kernels compiled per instruction set. Raw pointers, no torch, no STL:
// files built with wide instructions must not emit shared inline code that an older processor could run.
#pragma once

#include <cstdint>

namespace discquant {
namespace packed {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Mode : int { kA8 = 0, kA15 = 1, kFp32 = 2 };
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAmx = 4 };

// A weight in the kLayoutCpu layout. Scales and zero points: [padded_rows / 32][groups][32].
struct CpuWeight {
  const uint32_t* words;
  const void* scale;
  const uint8_t* zero_point;  // null: symmetric, 2^(bits-1)
  DType scale_type;
  int bits;
  int64_t k_tiles;
  int64_t groups;
  int64_t group_size;  // codes per group, a multiple of block_size
  int64_t block_size;  // codes per integer sum and activation scale: 32, 64 or 128
  int64_t blocks;      // blocks that hold any of the K codes
};

// Up to CpuKernels::max_tokens activations, prepared once and shared by all row tiles.
// a8/a15: x = step * (256 * plane0 + plane1), one plane for a8. A plane holds int8 x 4 words [K/4][tokens].
// From four tokens on AVX2 takes both planes of a15 as one of int16 x 2 words [K/2][tokens] in plane[0].
// Kernels with `by_token` take int8 [blocks][planes][tokens][block_size] in plane[0].
// fp32: `values` [K][tokens].
struct CpuTokens {
  int tokens;          // padded count: 1, 2, 4, 6 or 8; with `by_token` any
  int live;            // tokens that are real
  const int32_t* plane[2];
  const float* values;
  const float* step;   // [blocks][tokens]
  const int32_t* sum;  // [blocks][tokens], of the integer activations
};

constexpr int kMaxTokens = 32;  // of all kernels

// A page and a half ahead, into the second-level cache: the hardware stops at a page's end. Measured on Zen 4, all
// distances in turn on all buffers: 0.84 of the roof with two planes at 4 bits, where 9216 gave 0.80 and 2112 gave 0.58,
// and as much or more at 3 bits. The first-level cache was slower (0.70), so was every other line (0.70).
// On Zen 3 with AVX2, all in turn likewise, 4096 to 13312 were alike within 5 %, 512 10 to 30 % slower, none at all 40 %.
constexpr int kPrefetchBytes = 6656;
// In each of several streams. On Emerald Rapids 1536 to 6656 were alike within 3 %.
constexpr int kPrefetchAbreast = 3072;
// Into the first-level cache, besides. On Emerald Rapids with four streams 512 and 1024 were alike, 2 to 6 % faster than none.
constexpr int kPrefetchNear = 1024;

// Neighbouring pairs of row tiles (32 rows each), at most kMaxAbreast. out: [pairs][2][tokens][16] float sums, before bias.
using RowPairsFn = void (*)(const CpuWeight&, const CpuTokens&, int64_t pair, int pairs, float* out);
constexpr int kMaxAbreast = 4;

// Where a token's codes lie, in bytes from its first four. Codes in pairs of 16 bits: from its first two, quads being two
// codes, and blocks twice as far apart.
struct CodeStrides {
  int64_t quad;   // to the next four
  int64_t block;  // to the next block
  int64_t plane;  // to the low plane
};

// Quantise one row of activations. x: [k] floats, readable and zero up to a multiple of block_size. step, sum:
// [blocks][tokens].
using QuantizeFn = void (*)(const float* x, int64_t blocks, int64_t block_size, int planes, int token, int tokens,
                            CodeStrides stride, int8_t* codes, float* step, int32_t* sum);

// scale * (code - zero) in float32, then one rounding to `type`; count at most kTileK.
using DequantizeFn = void (*)(const uint8_t* codes, int64_t count, float scale, float zero, DType type, void* out);

struct CpuKernels {
  RowPairsFn row_pairs(int bits, Mode mode, int tokens) const {
    const int b = bits == 4 ? 0 : 1;
    const int t = tokens == 1 ? 0 : tokens < 8 ? tokens / 2 : 4;
    return table[b][static_cast<int>(mode)][t];
  }
  RowPairsFn table[2][3][5];  // [bits 4, 3][mode][tokens 1, 2, 4, 6, 8 and more]
  QuantizeFn quantize;
  DequantizeFn dequantize;
  // Every byte once, in so many streams side by side, `bytes` a multiple of 1024: the benchmark's roof.
  void (*read)(const void* p, int64_t bytes, int streams, bool prefetch, uint32_t* out);
  int max_tokens;  // of one call of row_pairs
  int abreast;     // pairs that a call best reads side by side, 1 to kMaxAbreast
  bool by_token;   // how CpuTokens::plane lies
};

// Whether tokens times planes are few enough for kernels in several streams.
__attribute__((always_inline)) inline bool few_products(Mode mode, int64_t tokens) {
  return mode != Mode::kFp32 && (mode == Mode::kA15 ? 2 : 1) * tokens <= 4;
}

const CpuKernels* kernels_scalar();
// `streams`: for few products on processors that prefetch several streams better than one.
const CpuKernels* kernels_avx2(bool streams);
const CpuKernels* kernels_avx512(bool streams);
const CpuKernels* kernels_avx512vnni(bool streams);
const CpuKernels* kernels_amx(Mode mode, int64_t tokens);  // null if the compiler did not know AMX

}  // namespace packed
}  // namespace discquant
