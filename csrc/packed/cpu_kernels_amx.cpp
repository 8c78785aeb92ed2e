// SPDX-License-Identifier: Apache-2.0
// Kernels of the integer modes for AMX: 16 rows x 16 tokens (or planes of tokens) x 64 columns of u8 x s8 products in one
// instruction. Codes of one virtual word's nibbles, 16 rows x 4 columns, are just one row of the tile operand, so unpacking
// needs no shuffles. Sums are integers and the float operations those of cpu_row_integer.h, in the same order: the same bits.
#include "packed/cpu_kernel.h"

#ifdef __AMX_INT8__
#ifndef __GFNI__
#error "this file needs -mgfni too: csrc/packed/Makefile has the flags"
#endif

#include <cstring>

#include "packed/cpu_row_tile.h"
#include "packed/vectors512.h"

namespace discquant {
namespace packed {
namespace {

using V = Vectors512;

struct VectorsAmx : InStreams<Vectors512> {
  // A byte times an 8 x 8 matrix of bits is any choice of its bits in any order, in one instruction.
  static constexpr bool kBitMatrices = true;
  // What word 3 steals, as bits 3, 2 and 1 of every half byte: `half_codes` puts them in order.
  static I steal(I a, I b, I c) {
    const I two = _mm512_ternarylogic_epi32(set1(0x88888888), a, shift_right<1>(b), 0xca);  // where set a, else b
    return _mm512_ternarylogic_epi32(set1(0xcccccccc), two, shift_right<2>(c), 0xca);
  }
  template <int kBits>
  static I half_codes(I word, int v, int h, I mask) {
    const bool stolen = kBits == 3 && v == 3;
    if (h == 0 && !stolen) return bit_and(word, mask);
    // The highest byte chooses bit 0.
    const uint64_t choice = stolen      ? h == 0 ? 0x0804020000000000 : 0x8040200000000000
                            : kBits == 3 ? 0x1020400000000000
                                         : 0x1020408000000000;
    return _mm512_gf2p8affine_epi64_epi8(word, _mm512_set1_epi64(static_cast<int64_t>(choice)), 0);
  }
  static I part_begin(I acc) { return acc; }
  static I dot(I acc, I codes, I x) { return _mm512_dpbusd_epi32(acc, codes, x); }
  static I part_end(I, I part) { return part; }
};

constexpr int kTileTokens = 16;   // rows of activations and sums: [planes][tokens]
constexpr int kTileColumns = 64;  // of K, one byte each
static_assert(2 * kMaxTokens <= 4 * kTileTokens, "four tile registers hold the sums of two planes");

// Tile registers: 0..3 sums, 4 codes, 5 activations of a whole tile, 6 those of the last.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not say that they read memory: what was stored for them must be there before.
__attribute__((always_inline)) inline void keep_stores(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

TileConfig tile_config(int rows, int64_t block_size) {
  TileConfig config;
  const int columns = block_size < kTileColumns ? static_cast<int>(block_size) : kTileColumns;
  const int tiles = (rows + kTileTokens - 1) / kTileTokens;
  const auto set = [&config](int tile, int height, int bytes) {
    config.rows[tile] = static_cast<uint8_t>(height);
    config.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  const int last = rows - (tiles - 1) * kTileTokens;
  for (int t = 0; t < 4; ++t) set(t, t < tiles - 1 ? kTileTokens : last, 4 * kTileRows);
  set(4, columns / 4, 4 * kTileRows);
  set(5, kTileTokens, columns);
  set(6, last, columns);
  return config;
}

// One quad of 16 rows: eight rows of the tile operand, 64 bytes each.
template <int kBits>
__attribute__((always_inline)) inline void unpack(const uint32_t* words, int64_t ahead, uint8_t* codes) {
  const V::I mask = V::set1(kBits == 4 ? 0x0f0f0f0f : 0x07070707);
  prefetch_strip<VectorsAmx, kBits>(words, ahead);
  V::I word[4];
  load_strip<VectorsAmx, kBits>(words, word);
  DISCQUANT_UNROLL
  for (int v = 0; v < 4; ++v)
    DISCQUANT_UNROLL
    for (int h = 0; h < 2; ++h)
      _mm512_store_si512(codes + 128 * v + 64 * h, half_codes<VectorsAmx, kBits, false>(word[v], v, h, mask));
}

// sums[planes][tokens][16 rows] of one block, from activations [planes][tokens][block_size]. `each(quad)` is called for
// every quad, between the products; `last()` before the sums are stored, for what would else wait behind them.
template <int kTiles, class Each, class Last>
__attribute__((always_inline)) inline void multiply(const uint8_t* codes, const int8_t* x, int64_t block_size,
                                                    int32_t* sums, const Each& each, const Last& last) {
  constexpr int kTile = kTileTokens * kTileRows;
  keep_stores(codes);
  _tile_zero(0);
  if (kTiles > 1) _tile_zero(1);
  if (kTiles > 2) _tile_zero(2);
  if (kTiles > 3) _tile_zero(3);
  const int64_t next = kTileTokens * block_size;
  for (int64_t at = 0; at < block_size; at += kTileColumns, x += kTileColumns) {
    each(at / kQuadK);
    _tile_loadd(4, codes + kTileRows * at, 64);
    if (kTiles > 1) {
      _tile_loadd(5, x, block_size);
      _tile_dpbsud(0, 5, 4);
    }
    if (kTiles > 2) {
      _tile_loadd(5, x + next, block_size);
      _tile_dpbsud(1, 5, 4);
    }
    if (kTiles > 3) {
      _tile_loadd(5, x + 2 * next, block_size);
      _tile_dpbsud(2, 5, 4);
    }
    _tile_loadd(6, x + (kTiles - 1) * next, block_size);
    if (kTiles == 1) _tile_dpbsud(0, 6, 4);
    if (kTiles == 2) _tile_dpbsud(1, 6, 4);
    if (kTiles == 3) _tile_dpbsud(2, 6, 4);
    if (kTiles == 4) _tile_dpbsud(3, 6, 4);
    if (at + kQuadK < block_size) each(at / kQuadK + 1);
  }
  last();
  _tile_stored(0, sums, 64);
  if (kTiles > 1) _tile_stored(1, sums + kTile, 64);
  if (kTiles > 2) _tile_stored(2, sums + 2 * kTile, 64);
  if (kTiles > 3) _tile_stored(3, sums + 3 * kTile, 64);
  keep_stores(sums);
}

// total[token][row] += (sum - zero point * activations) * (scale * step), as integer_strips does.
template <int kBits, int kPlanes>
__attribute__((always_inline)) inline void accumulate(const CpuWeight& w, const CpuTokens& x, const int32_t* sums,
                                                      int64_t block, int64_t at, float* total) {
  prefetch_scale<V>(w, at);
  const V::F scale = load_scale<V>(w, at);
  const bool symmetric = w.zero_point == nullptr;
  const V::I zero = symmetric ? V::set1(0) : V::load_bytes(w.zero_point + at);
  const float* step = x.step + block * x.tokens;
  const int32_t* xsum = x.sum + block * x.tokens;
  const int64_t low = x.tokens * kTileRows;
  for (int m = 0; m < x.tokens; ++m, sums += kTileRows, total += kTileRows) {
    V::I all = _mm512_load_si512(sums);
    if (kPlanes == 2) all = V::add(V::shift_left<8>(all), _mm512_load_si512(sums + low));
    const V::I shift =
        symmetric ? V::shift_left<kBits - 1>(V::set1(xsum[m])) : V::mul(zero, V::set1(xsum[m]));
    const V::F value = V::to_float(V::sub(all, shift));
    V::store_float(total, V::fma(value, V::mul_float(scale, V::set1_float(step[m])), V::load_float(total)));
  }
}

// Three stages, each one (block, row tile) behind the other, so that none waits for what another has just stored. The row
// tiles of all pairs take turns block by block.
template <int kBits, int kPlanes, int kTiles>
void tiles(const CpuWeight& w, const CpuTokens& x, int64_t pair, int pairs, float* out) {
  alignas(64) uint8_t codes[2][kTileK * kTileRows];
  alignas(64) int32_t sums[2][4 * kTileTokens * kTileRows];
  const TileConfig config = tile_config(kPlanes * x.tokens, w.block_size);
  keep_stores(&config);
  _tile_loadconfig(&config);
  const int64_t quads = w.block_size / kQuadK;
  constexpr int kStride = 2 * (kBits == 4 ? 4 : 3) * kTileRows;  // to the same rows of the next quad
  const int64_t block_words = quads * kStride;
  const int64_t sums_of_tile = x.tokens * kTileRows, per_group = w.group_size / w.block_size;
  const int row_tiles = 2 * pairs;
  const int64_t ahead = pairs == 1 ? kPrefetchBytes : kPrefetchAbreast;
  const uint32_t* words[2 * kMaxAbreast];
  for (int s = 0; s < row_tiles; ++s) words[s] = w.words + tile_offset(kLayoutCpu, kBits, 2 * pair + s, 0, w.k_tiles);
  const int8_t* activations = reinterpret_cast<const int8_t*>(x.plane[0]);
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(row_tiles * sums_of_tile));
  const auto finish = [&](int64_t block, int s) {
    const int64_t at = scale_offset(kLayoutCpu, (2 * pair + s) * kTileRows, block / per_group, w.groups);
    accumulate<kBits, kPlanes>(w, x, sums[s & 1], block, at, out + s * sums_of_tile);
  };
  for (int64_t quad = 0; quad < quads; ++quad)
    unpack<kBits>(words[0] + quad * kStride, ahead, codes[0] + quad * 8 * 64);
  for (int64_t block = 0; block < w.blocks; ++block) {
    for (int s = 0; s < row_tiles; ++s) {
      const int next = s + 1 < row_tiles ? s + 1 : 0;
      const bool more = next > 0 || block + 1 < w.blocks;
      const uint32_t* from = words[next] + (more ? block + (next == 0) : 0) * block_words;
      const auto unpack_next = [&](int64_t quad) {
        if (more) unpack<kBits>(from + quad * kStride, ahead, codes[next & 1] + quad * 8 * 64);
      };
      const auto finish_last = [&] {
        if (s > 0)
          finish(block, s - 1);
        else if (block > 0)
          finish(block - 1, row_tiles - 1);
      };
      multiply<kTiles>(codes[s & 1], activations, w.block_size, sums[s & 1], unpack_next, finish_last);
    }
    activations += kPlanes * w.block_size * x.tokens;
  }
  finish(w.blocks - 1, row_tiles - 1);
  _tile_release();
}

template <int kBits, int kPlanes>
void tile_pairs(const CpuWeight& w, const CpuTokens& x, int64_t pair, int pairs, float* out) {
  const int rows = kPlanes * x.tokens;
  if (rows <= kTileTokens) return tiles<kBits, kPlanes, 1>(w, x, pair, pairs, out);
  if (rows <= 2 * kTileTokens) return tiles<kBits, kPlanes, 2>(w, x, pair, pairs, out);
  if constexpr (kPlanes == 2) {
    if (rows <= 3 * kTileTokens) return tiles<kBits, kPlanes, 3>(w, x, pair, pairs, out);
    return tiles<kBits, kPlanes, 4>(w, x, pair, pairs, out);
  }
}

template <int kBits, int kPlanes>
void set_tiles(RowPairsFn row[5]) {
  for (int t = 0; t < 5; ++t) row[t] = tile_pairs<kBits, kPlanes>;
}

}  // namespace

const CpuKernels* kernels_amx(Mode mode, int64_t tokens) {
  static const CpuKernels few = with_streams<VectorsAmx>(*kernels_avx512vnni(false));
  static const CpuKernels kernels = [] {
    CpuKernels k = *kernels_avx512vnni(false);
    k.max_tokens = kMaxTokens;
    k.abreast = kMaxAbreast;
    k.by_token = true;
    set_tiles<4, 1>(k.table[0][0]);
    set_tiles<4, 2>(k.table[0][1]);
    set_tiles<3, 1>(k.table[1][0]);
    set_tiles<3, 2>(k.table[1][1]);
    return k;
  }();
  // Few products do not repay the way of the codes through memory. On Emerald Rapids, both in turn on all buffers, two tokens
  // of 4 bits are 5 to 14 % faster without tiles, four of a8 up to 4 %; four of a15 take 1.15 of the tiles' time.
  if (mode == Mode::kFp32) return kernels_avx512vnni(false);
  return few_products(mode, tokens) ? &few : &kernels;
}

}  // namespace packed
}  // namespace discquant

#else  // a compiler that does not know the instructions

namespace discquant {
namespace packed {
const CpuKernels* kernels_amx(Mode, int64_t) { return nullptr; }
}  // namespace packed
}  // namespace discquant

#endif
