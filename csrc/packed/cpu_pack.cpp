// SPDX-License-Identifier: Apache-2.0
// pack, unpack, repack and dequantise on the CPU, tile by tile through the functions of layout.h.
#include <atomic>
#include <cstring>

#include "packed/cpu_linear.h"
#include "packed/float_types.h"

namespace discquant {
namespace packed {
namespace {

template <class Fn>
void for_range(int64_t n, const Parallel& parallel, const Fn& fn) {
  auto body = [](int64_t begin, int64_t end, void* p) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Fn*>(p))(i);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&fn));
  if (parallel.run == nullptr || parallel.threads <= 1)
    body(0, n, context);
  else
    parallel.run(n, body, context);
}

void code_of(Layout layout, int unit, int word, int nibble, int& row, int& k) {
  if (layout == kLayoutMma)
    mma_code(unit, word, nibble, row, k);
  else
    cpu_code(unit, word, nibble, row, k);
}

void encode_tile(const uint8_t codes[kTileRows][kTileK], Layout layout, int bits, uint32_t* tile) {
  for (int unit = 0; unit < tile_units(layout); ++unit) {
    for (int quad = 0; quad < unit_words(layout) / 4; ++quad) {
      uint32_t words[4];
      for (int v = 0; v < 4; ++v) {
        words[v] = 0;
        for (int nibble = 0; nibble < 8; ++nibble) {
          int row, k;
          code_of(layout, unit, 4 * quad + v, nibble, row, k);
          words[v] |= static_cast<uint32_t>(codes[row][k]) << (4 * nibble);
        }
      }
      store_quad(tile, layout, bits, unit, quad, words);
    }
  }
}

// kLayoutCpu: the bytes of a word under 0x0f are four neighbours, those of the word shifted by four the next four.
template <int kBits>
void decode_cpu_tile(const uint32_t* tile, uint8_t codes[kTileRows][kTileK]) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int quad = 0; quad < kTileK / kQuadK; ++quad) {
      uint32_t words[4];
      load_quad(tile, kLayoutCpu, kBits, row, quad, words);
      for (int v = 0; v < 4; ++v) {
        const uint32_t halves[2] = {words[v] & 0x0f0f0f0fu, (words[v] >> 4) & 0x0f0f0f0fu};
        uint8_t* out = codes[row] + kQuadK * quad + 8 * v;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        std::memcpy(out, halves, 8);
#else
        for (int i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(halves[i / 4] >> (8 * (i % 4)));
#endif
      }
    }
  }
}

void decode_tile(const uint32_t* tile, Layout layout, int bits, uint8_t codes[kTileRows][kTileK]) {
  if (layout == kLayoutCpu) return bits == 4 ? decode_cpu_tile<4>(tile, codes) : decode_cpu_tile<3>(tile, codes);
  for (int unit = 0; unit < tile_units(layout); ++unit) {
    for (int quad = 0; quad < unit_words(layout) / 4; ++quad) {
      uint32_t words[4];
      load_quad(tile, layout, bits, unit, quad, words);
      for (int v = 0; v < 4; ++v) {
        for (int nibble = 0; nibble < 8; ++nibble) {
          int row, k;
          code_of(layout, unit, 4 * quad + v, nibble, row, k);
          codes[row][k] = static_cast<uint8_t>((words[v] >> (4 * nibble)) & 15u);
        }
      }
    }
  }
}

float scale_at(const void* scale, DType type, int64_t i) {
  if (type == DType::kFloat32) return static_cast<const float*>(scale)[i];
  const uint16_t bits = static_cast<const uint16_t*>(scale)[i];
  return type == DType::kBFloat16 ? bfloat_to_float(bits) : half_to_float(bits);
}

}  // namespace

bool pack_cpu(const uint8_t* codes, const uint8_t* zero_point, int64_t n, int64_t k, int bits, int64_t group_size,
              Layout layout, uint32_t* words, const Parallel& parallel) {
  const int64_t k_tiles = padded_k(k) / kTileK;
  const int64_t size = group_size > 0 ? group_size : padded_k(k);
  const int64_t groups = ceil_div(k, size);
  const uint8_t middle = static_cast<uint8_t>(1u << (bits - 1));
  std::atomic<uint32_t> seen{0};
  for_range(padded_rows(n) / kTileRows, parallel, [&](int64_t row_tile) {
    uint8_t block[kTileRows][kTileK];
    uint32_t all = 0;
    for (int64_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
      const int64_t first = k_tile * kTileK;
      const int64_t count = k - first < kTileK ? k - first : kTileK;
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = row_tile * kTileRows + r;
        if (row >= n) {
          // The padded rows' zero points are 0 where there are any.
          for (int i = 0; i < kTileK; ++i) block[r][i] = zero_point ? 0 : middle;
          continue;
        }
        const uint8_t* from = codes + row * k + first;
        for (int64_t i = 0; i < count; ++i) {
          block[r][i] = from[i];
          all |= from[i];
        }
        for (int64_t i = count; i < kTileK; ++i) {
          const int64_t g = (first + i) / size < groups ? (first + i) / size : groups - 1;
          block[r][i] = zero_point ? zero_point[row * groups + g] & ((1 << bits) - 1) : middle;
        }
      }
      if ((all >> bits) == 0) encode_tile(block, layout, bits, words + tile_offset(layout, bits, row_tile, k_tile, k_tiles));
    }
    seen |= all;
  });
  return (seen >> bits) == 0;
}

void unpack_cpu(const uint32_t* words, int64_t n, int64_t k, int bits, Layout layout, uint8_t* codes,
                const Parallel& parallel) {
  const int64_t k_tiles = padded_k(k) / kTileK;
  for_range(ceil_div(n, kTileRows), parallel, [&](int64_t row_tile) {
    uint8_t block[kTileRows][kTileK];
    for (int64_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
      decode_tile(words + tile_offset(layout, bits, row_tile, k_tile, k_tiles), layout, bits, block);
      const int64_t count = k - k_tile * kTileK < kTileK ? k - k_tile * kTileK : kTileK;
      for (int64_t r = 0; r < kTileRows && row_tile * kTileRows + r < n; ++r)
        std::memcpy(codes + (row_tile * kTileRows + r) * k + k_tile * kTileK, block[r], static_cast<size_t>(count));
    }
  });
}

void repack_cpu(const uint32_t* from, Layout from_layout, uint32_t* to, Layout to_layout, int64_t n, int64_t k,
                int bits, const Parallel& parallel) {
  const int64_t k_tiles = padded_k(k) / kTileK;
  for_range(padded_rows(n) / kTileRows, parallel, [&](int64_t row_tile) {
    uint8_t block[kTileRows][kTileK];
    for (int64_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
      decode_tile(from + tile_offset(from_layout, bits, row_tile, k_tile, k_tiles), from_layout, bits, block);
      encode_tile(block, to_layout, bits, to + tile_offset(to_layout, bits, row_tile, k_tile, k_tiles));
    }
  });
}

bool pack_dense_cpu(const uint8_t* codes, int64_t rows, int64_t count, int bits, uint32_t* words,
                    const Parallel& parallel) {
  const int64_t width = dense_words(count, bits);
  std::atomic<uint32_t> seen{0};
  for_range(rows, parallel, [&](int64_t row) {
    uint32_t* out = words + row * width;
    uint32_t all = 0;
    for (int64_t i = 0; i < width; ++i) out[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = codes[row * count + i];
      all |= code;
      if ((code >> bits) == 0) dense_or(out, i, bits, code);
    }
    seen |= all;
  });
  return (seen >> bits) == 0;
}

void unpack_dense_cpu(const uint32_t* words, int64_t rows, int64_t count, int bits, uint8_t* codes,
                      const Parallel& parallel) {
  const int64_t width = dense_words(count, bits);
  for_range(rows, parallel, [&](int64_t row) {
    for (int64_t i = 0; i < count; ++i)
      codes[row * count + i] = static_cast<uint8_t>(dense_get(words + row * width, i, bits));
  });
}

void dequantize_cpu(const CpuDequantize& call, const Parallel& parallel) {
  const int64_t k_tiles = padded_k(call.k) / kTileK;
  const int64_t size = call.group_size > 0 ? call.group_size : padded_k(call.k);
  const int64_t groups = ceil_div(call.k, size);
  const int64_t span = size < kTileK ? size : kTileK;
  const float middle = static_cast<float>(1 << (call.bits - 1));
  const DequantizeFn dequantize = kernels_for(best_isa())->dequantize;
  const int64_t width = call.type == DType::kFloat32 ? 4 : 2;
  const int64_t first_tile = call.row_begin / kTileRows;
  for_range(ceil_div(call.row_end, kTileRows) - first_tile, parallel, [&](int64_t t) {
    uint8_t block[kTileRows][kTileK];
    const int64_t row_tile = first_tile + t;
    for (int64_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
      decode_tile(call.words + tile_offset(call.layout, call.bits, row_tile, k_tile, k_tiles), call.layout, call.bits,
                  block);
      for (int64_t r = 0; r < kTileRows && row_tile * kTileRows + r < call.row_end; ++r) {
        const int64_t row = row_tile * kTileRows + r;
        for (int64_t begin = k_tile * kTileK; begin < (k_tile + 1) * kTileK && begin < call.k; begin += span) {
          const int64_t at = scale_offset(call.layout, row, begin / size, groups);
          const float scale = scale_at(call.scale, call.scale_type, at);
          const float zero = call.zero_point ? static_cast<float>(call.zero_point[at]) : middle;
          const int64_t end = begin + span < call.k ? begin + span : call.k;
          dequantize(block[r] + (begin - k_tile * kTileK), end - begin, scale, zero, call.type,
                     static_cast<char*>(call.out) + ((row - call.row_begin) * call.k + begin) * width);
        }
      }
    }
  });
}

}  // namespace packed
}  // namespace discquant
