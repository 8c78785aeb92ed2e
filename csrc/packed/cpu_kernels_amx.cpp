// SPDX-License-Identifier: Apache-2.0
// Kernels of the integer modes for AMX: 16 rows x 16 tokens x 64 columns of u8 x s8 products in one instruction.
// Codes of one virtual word's nibbles, 16 rows x 4 columns, are just one row of the tile operand, so unpacking needs no
// shuffles. Sums are integers and the float operations those of cpu_row_tile.h, in the same order: the same bits.
#include "packed/cpu_kernel.h"

#ifdef __AMX_INT8__

#include "packed/vectors512.h"

#include "packed/cpu_row_tile.h"

namespace discquant {
namespace packed {
namespace {

using V = Vectors512;

// One token of 8 bits, on processors that have AMX: these do gain from prefetching.
struct VectorsFew : Vectors512 {
  static constexpr bool kPrefetchAlways = true;
  static I part_begin(I acc) { return acc; }
  static I dot(I acc, I codes, I x) { return _mm512_dpbusd_epi32(acc, codes, x); }
  static I part_end(I, I part) { return part; }
};

constexpr int kTileTokens = 16;
constexpr int kTileColumns = 64;  // of K, one byte each

// Tile registers: 0..3 sums of (token tile, plane), 4 codes, 5 and 6 activations.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not say that they read memory: what was stored for them must be there before.
__attribute__((always_inline)) inline void keep_stores(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

TileConfig tile_config(int tokens, int64_t block_size) {
  TileConfig config;
  const int columns = block_size < kTileColumns ? static_cast<int>(block_size) : kTileColumns;
  const auto set = [&config](int tile, int rows, int bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  const int first = tokens < kTileTokens ? tokens : kTileTokens;
  const int second = tokens > kTileTokens ? tokens - kTileTokens : 1;  // an unused tile must have a shape too
  set(0, first, 4 * kTileRows);
  set(1, first, 4 * kTileRows);
  set(2, second, 4 * kTileRows);
  set(3, second, 4 * kTileRows);
  set(4, columns / 4, 4 * kTileRows);
  set(5, first, columns);
  set(6, second, columns);
  return config;
}

// One block of K of 16 rows: block_size / 4 rows of the tile operand, 64 bytes each.
template <int kBits>
__attribute__((always_inline)) inline void unpack(const uint32_t* words, int64_t quads, uint8_t* codes) {
  constexpr int kStride = 2 * (kBits == 4 ? 4 : 3) * kTileRows;
  const V::I mask = V::set1(kBits == 4 ? 0x0f0f0f0f : 0x07070707);
  for (int64_t quad = 0; quad < quads; ++quad, words += kStride, codes += 8 * 64) {
    V::prefetch(words);
    V::I word[4];
    load_strip<V, kBits>(words, word);
    DISCQUANT_UNROLL
    for (int v = 0; v < 4; ++v) {
      _mm512_store_si512(codes + 128 * v, V::bit_and(word[v], mask));
      _mm512_store_si512(codes + 128 * v + 64, V::bit_and(V::shift_right<4>(word[v]), mask));
    }
  }
}

// sums[(token tile, plane)][token][row] of one block; activations [token][block_size] of each plane.
template <int kPlanes, int kTokenTiles>
__attribute__((always_inline)) inline void multiply(const uint8_t* codes, const int8_t* const plane[kPlanes],
                                                    int64_t block_size, int32_t* sums) {
  keep_stores(codes);
  _tile_zero(0);
  if (kPlanes == 2) _tile_zero(1);
  if (kTokenTiles == 2) _tile_zero(2);
  if (kTokenTiles == 2 && kPlanes == 2) _tile_zero(3);
  for (int64_t at = 0; at < block_size; at += kTileColumns) {
    _tile_loadd(4, codes + 16 * at, 64);
    _tile_loadd(5, plane[0] + at, block_size);
    _tile_dpbsud(0, 5, 4);
    if (kTokenTiles == 2) {
      _tile_loadd(6, plane[0] + kTileTokens * block_size + at, block_size);
      _tile_dpbsud(2, 6, 4);
    }
    if (kPlanes == 2) {
      _tile_loadd(5, plane[kPlanes - 1] + at, block_size);
      _tile_dpbsud(1, 5, 4);
      if (kTokenTiles == 2) {
        _tile_loadd(6, plane[kPlanes - 1] + kTileTokens * block_size + at, block_size);
        _tile_dpbsud(3, 6, 4);
      }
    }
  }
  constexpr int kTile = kTileTokens * kTileRows;
  _tile_stored(0, sums, 64);
  if (kPlanes == 2) _tile_stored(1, sums + 2 * kTile, 64);
  if (kTokenTiles == 2) _tile_stored(2, sums + kTile, 64);
  if (kTokenTiles == 2 && kPlanes == 2) _tile_stored(3, sums + 3 * kTile, 64);
  keep_stores(sums);
}

// total[token][row] += (sum - zero point * activations) * (scale * step), as integer_strips does.
template <int kBits, int kPlanes>
__attribute__((always_inline)) inline void accumulate(const CpuWeight& w, const CpuTokens& x, const int32_t* sums,
                                                      int64_t block, int64_t at, float* total) {
  constexpr int kLow = 2 * kTileTokens * kTileRows;
  prefetch_scale<V>(w, at);
  const V::F scale = load_scale<V>(w, at);
  const bool symmetric = w.zero_point == nullptr;
  const V::I zero = symmetric ? V::set1(0) : V::load_bytes(w.zero_point + at);
  const float* step = x.step + block * x.tokens;
  const int32_t* xsum = x.sum + block * x.tokens;
  for (int m = 0; m < x.tokens; ++m, sums += kTileRows, total += kTileRows) {
    V::I all = _mm512_load_si512(sums);
    if (kPlanes == 2) all = V::add(V::shift_left<8>(all), _mm512_load_si512(sums + kLow));
    const V::I shift =
        symmetric ? V::shift_left<kBits - 1>(V::set1(xsum[m])) : V::mul(zero, V::set1(xsum[m]));
    const V::F value = V::to_float(V::sub(all, shift));
    V::store_float(total, V::fma(value, V::mul_float(scale, V::set1_float(step[m])), V::load_float(total)));
  }
}

// Three stages, each one (block, row tile) behind the other, so that none waits for what another has just stored.
template <int kBits, int kPlanes, int kTokenTiles>
void tiles(const CpuWeight& w, const CpuTokens& x, int64_t pair, float* out) {
  alignas(64) uint8_t codes[2][kTileK * kTileRows];
  alignas(64) int32_t sums[2][4 * kTileTokens * kTileRows];
  const TileConfig config = tile_config(x.tokens, w.block_size);
  keep_stores(&config);
  _tile_loadconfig(&config);
  const int64_t quads = w.block_size / kQuadK;
  const int64_t block_words = quads * 2 * (kBits == 4 ? 4 : 3) * kTileRows;
  const uint32_t* words[2];
  const int8_t* plane[kPlanes];
  for (int s = 0; s < 2; ++s) words[s] = w.words + tile_offset(kLayoutCpu, kBits, 2 * pair + s, 0, w.k_tiles);
  for (int p = 0; p < kPlanes; ++p) plane[p] = reinterpret_cast<const int8_t*>(x.plane[p]);
  std::memset(out, 0, sizeof(float) * 2 * kTileRows * static_cast<size_t>(x.tokens));
  const int64_t per_group = w.group_size / w.block_size;
  const auto finish = [&](int64_t block, int s) {
    const int64_t at = scale_offset(kLayoutCpu, (2 * pair + s) * kTileRows, block / per_group, w.groups);
    accumulate<kBits, kPlanes>(w, x, sums[s], block, at, out + s * x.tokens * kTileRows);
  };
  unpack<kBits>(words[0], quads, codes[0]);
  for (int64_t block = 0; block < w.blocks; ++block) {
    unpack<kBits>(words[1], quads, codes[1]);
    multiply<kPlanes, kTokenTiles>(codes[0], plane, w.block_size, sums[0]);
    if (block > 0) finish(block - 1, 1);
    for (int s = 0; s < 2; ++s) words[s] += block_words;
    if (block + 1 < w.blocks) unpack<kBits>(words[0], quads, codes[0]);
    multiply<kPlanes, kTokenTiles>(codes[1], plane, w.block_size, sums[1]);
    finish(block, 0);
    for (int p = 0; p < kPlanes; ++p) plane[p] += w.block_size * x.tokens;
  }
  finish(w.blocks - 1, 1);
  _tile_release();
}

template <int kBits, int kPlanes>
void tile_pair(const CpuWeight& w, const CpuTokens& x, int64_t pair, float* out) {
  x.tokens > kTileTokens ? tiles<kBits, kPlanes, 2>(w, x, pair, out) : tiles<kBits, kPlanes, 1>(w, x, pair, out);
}

}  // namespace

const CpuKernels* kernels_amx(int bits, Mode mode, int64_t tokens) {
  static const CpuKernels few = [] {
    CpuKernels k = *kernels_avx512vnni();
    k.table[0][0][0] = integer_pair<VectorsFew, 4, 1, 1>;
    k.table[1][0][0] = integer_pair<VectorsFew, 3, 1, 1>;
    return k;
  }();
  static const CpuKernels kernels = [] {
    CpuKernels k = *kernels_avx512vnni();
    k.max_tokens = 2 * kTileTokens;
    k.by_token = true;
    for (int t = 0; t < 5; ++t) {
      k.table[0][0][t] = tile_pair<4, 1>;
      k.table[0][1][t] = tile_pair<4, 2>;
      k.table[1][0][t] = tile_pair<3, 1>;
      k.table[1][1][t] = tile_pair<3, 2>;
    }
    return k;
  }();
  // Measured on Sapphire Rapids: tiles are level or better from the second token on at 4 bits, from the third at 3. One
  // token does not repay the way of its codes through memory; float32 sums have no tiles.
  const int64_t least = bits == 3 ? 3 : 2;
  return mode == Mode::kFp32 || tokens < least ? &few : &kernels;
}

}  // namespace packed
}  // namespace discquant

#else  // a compiler that does not know the instructions

namespace discquant {
namespace packed {
const CpuKernels* kernels_amx(int, Mode, int64_t) { return nullptr; }
}  // namespace packed
}  // namespace discquant

#endif
