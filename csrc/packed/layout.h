// SPDX-License-Identifier: Apache-2.0
// Packed layouts, defined once: the dense stream D_b and the two runtime tiles for 4 and 3 bits.
// Bit by bit in docs/packed_layout.md. No torch, no CUDA header: host compilers, nvcc and the CPU tests all use
// these functions, so the kernels cannot disagree with the specification about where a code lies.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DISCQUANT_HD __host__ __device__ __forceinline__
#else
// always_inline: files compiled for different instruction sets must not share one out-of-line copy.
#define DISCQUANT_HD __attribute__((always_inline)) inline
#endif

namespace discquant {
namespace packed {

// Raised whenever a stored buffer would decode differently.
constexpr int kLayoutVersion = 1;

// Order of codes inside a buffer. kLayoutMma feeds tensor cores, kLayoutCpu feeds 4-byte dot products.
enum Layout : int { kLayoutDense = 0, kLayoutMma = 1, kLayoutCpu = 2 };

constexpr int kTileRows = 16;
constexpr int kTileK = 128;
constexpr int kBlockRows = 64;  // rows of one contiguous kLayoutMma block, and the padding of N in both layouts
constexpr int kPairRows = 32;   // rows of one contiguous kLayoutCpu block: two tiles, interleaved quad by quad
constexpr int kQuadK = 32;      // codes of one row (or lane) that share the three stored words at 3 bits

DISCQUANT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DISCQUANT_HD int64_t padded_rows(int64_t n) { return ceil_div(n, kBlockRows) * kBlockRows; }
DISCQUANT_HD int64_t padded_k(int64_t k) { return ceil_div(k, kTileK) * kTileK; }
// 32-bit words of one 16 x 128 tile: 256 at 4 bits, 192 at 3 bits.
DISCQUANT_HD int tile_words(int bits) { return kTileRows * kTileK * bits / 32; }
DISCQUANT_HD int64_t packed_words(int64_t n, int64_t k, int bits) {
  return padded_rows(n) / kTileRows * (padded_k(k) / kTileK) * tile_words(bits);
}
// Rows whose scales lie side by side: [padded_rows / group_rows][groups][group_rows].
DISCQUANT_HD int scale_rows(Layout layout) { return layout == kLayoutMma ? kBlockRows : kPairRows; }

// ---- dense stream D_b: code i at bits i*b .. i*b+b-1 of a little-endian bit string in 32-bit words ----

DISCQUANT_HD int64_t dense_words(int64_t count, int bits) { return ceil_div(count * bits, 32); }

DISCQUANT_HD uint32_t dense_get(const uint32_t* words, int64_t i, int bits) {
  const int64_t bit = i * bits;
  const int64_t word = bit >> 5;
  const int shift = static_cast<int>(bit & 31);
  uint32_t value = words[word] >> shift;
  if (shift + bits > 32) value |= words[word + 1] << (32 - shift);
  return value & ((1u << bits) - 1u);
}

// The words must start as zero.
DISCQUANT_HD void dense_or(uint32_t* words, int64_t i, int bits, uint32_t code) {
  const int64_t bit = i * bits;
  const int64_t word = bit >> 5;
  const int shift = static_cast<int>(bit & 31);
  words[word] |= code << shift;
  if (shift + bits > 32) words[word + 1] |= code >> (32 - shift);
}

// ---- the nibble word: both tiles are made of 32-bit words of eight nibbles ----
//
// At 3 bits the low three bits of each nibble hold a code, and the top bits of three stored words are the fourth:
// virtual word 3 of a quad is stolen from bit 3 of every nibble of words 0, 1, 2. After that all four words look alike.

DISCQUANT_HD uint32_t steal_word(uint32_t w0, uint32_t w1, uint32_t w2) {
  return ((w0 >> 3) & 0x11111111u) | ((w1 >> 2) & 0x22222222u) | ((w2 >> 1) & 0x44444444u);
}

// The inverse: what word c (0, 1, 2) of a quad carries for virtual word 3.
DISCQUANT_HD uint32_t stolen_bits(uint32_t w3, int c) { return ((w3 >> c) & 0x11111111u) << 3; }

// A code's place in a tile: `unit` is the lane (kLayoutMma) or the row (kLayoutCpu), `word` the virtual word 0..7 of a lane
// (kLayoutMma) or 0..15 of a row (kLayoutCpu), `nibble` 0..7 in it.
struct TilePlace {
  int unit;
  int word;
  int nibble;
};

// Register j of mma.m16n8k16's A fragment is (word >> 4*j) & 0x000f000f: neighbours (k, k+1) sit 16 bits apart.
DISCQUANT_HD TilePlace mma_place(int row, int k) {
  const int inner = k & 15;
  const int lane = (row & 7) * 4 + ((inner & 7) >> 1);
  const int pair = (row >> 3) + 2 * (inner >> 3);
  return TilePlace{lane, k >> 4, pair + 4 * (inner & 1)};
}

// Bytes of word & 0x0f0f0f0f are k .. k+3, those of (word >> 4) & 0x0f0f0f0f are k+4 .. k+7.
DISCQUANT_HD TilePlace cpu_place(int row, int k) {
  const int inner = k & 7;
  return TilePlace{row, k >> 3, 2 * (inner & 3) + (inner >> 2)};
}

// The inverses: which code of the tile lies at (unit, word, nibble).
DISCQUANT_HD void mma_code(int lane, int word, int nibble, int& row, int& k) {
  const int pair = nibble & 3;
  row = (lane >> 2) + 8 * (pair & 1);
  k = 16 * word + 2 * (lane & 3) + 8 * (pair >> 1) + (nibble >> 2);
}

DISCQUANT_HD void cpu_code(int unit, int word, int nibble, int& row, int& k) {
  row = unit;
  k = 8 * word + 4 * (nibble & 1) + (nibble >> 1);
}

DISCQUANT_HD TilePlace tile_place(Layout layout, int row, int k) {
  return layout == kLayoutMma ? mma_place(row, k) : cpu_place(row, k);
}

DISCQUANT_HD int tile_units(Layout layout) { return layout == kLayoutMma ? 32 : kTileRows; }
DISCQUANT_HD int unit_words(Layout layout) { return layout == kLayoutMma ? 8 : 16; }  // virtual words of a unit

// Stored words of a quad: at 3 bits the fourth is stolen from the others.
DISCQUANT_HD int quad_words(int bits) { return bits == 4 ? 4 : 3; }

// Offset, from the start of a tile, of stored word i of a unit. kLayoutMma, 4 bits: two 16-byte loads per lane; 3 bits: one of
// 16 bytes, one of 8. kLayoutCpu: a quad's words of 16 rows, then the same quad of the other tile of the pair.
DISCQUANT_HD int stored_offset(Layout layout, int bits, int unit, int i) {
  if (layout == kLayoutCpu) {
    const int words = quad_words(bits);
    return (i / words * 2 * words + i % words) * kTileRows + unit;
  }
  if (i < 4) return unit * 4 + i;
  return bits == 4 ? 128 + unit * 4 + (i - 4) : 128 + unit * 2 + (i - 4);
}

// The four virtual words of quad `quad` of a unit, rebuilt from the stored words.
DISCQUANT_HD void load_quad(const uint32_t* tile, Layout layout, int bits, int unit, int quad, uint32_t w[4]) {
  const int words = quad_words(bits);
  for (int i = 0; i < words; ++i) w[i] = tile[stored_offset(layout, bits, unit, quad * words + i)];
  if (bits == 3) {
    w[3] = steal_word(w[0], w[1], w[2]);
    for (int i = 0; i < 3; ++i) w[i] &= 0x77777777u;
  }
}

DISCQUANT_HD void store_quad(uint32_t* tile, Layout layout, int bits, int unit, int quad, const uint32_t w[4]) {
  const int words = quad_words(bits);
  for (int i = 0; i < words; ++i)
    tile[stored_offset(layout, bits, unit, quad * words + i)] = bits == 4 ? w[i] : w[i] | stolen_bits(w[3], i);
}

// One code, the slow way: what the specification says and the tests call.
DISCQUANT_HD uint32_t tile_get(const uint32_t* tile, Layout layout, int bits, int row, int k) {
  const TilePlace place = tile_place(layout, row, k);
  uint32_t w[4];
  load_quad(tile, layout, bits, place.unit, place.word >> 2, w);
  return (w[place.word & 3] >> (4 * place.nibble)) & 0xfu;
}

// Offset in words of the first word of tile (row_tile, k_tile).
DISCQUANT_HD int64_t tile_offset(Layout layout, int bits, int64_t row_tile, int64_t k_tile, int64_t k_tiles) {
  const int64_t words = tile_words(bits);
  if (layout == kLayoutCpu)
    return (row_tile / 2 * k_tiles + k_tile) * 2 * words + row_tile % 2 * quad_words(bits) * kTileRows;
  return ((row_tile / 4 * k_tiles + k_tile) * 4 + row_tile % 4) * words;
}

// Index of a row's scale (and zero point) for group g, in elements.
DISCQUANT_HD int64_t scale_offset(Layout layout, int64_t row, int64_t g, int64_t groups) {
  const int64_t rows = scale_rows(layout);
  return (row / rows * groups + g) * rows + row % rows;
}

}  // namespace packed
}  // namespace discquant
