// SPDX-License-Identifier: Apache-2.0
// Run by `make -C csrc/packed sanitize`: what Python cannot reach (index maps, magic numbers) and the CPU
// kernels on heap buffers of exactly the size that the contract asks for.
#include <cmath>
#include <set>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#include <vector>

#include "checks.h"
#include "packed/cpu_linear.h"
#include "packed/dequant.h"

using namespace discquant::packed;

static void maps_are_inverse() {
  for (Layout layout : {kLayoutMma, kLayoutCpu}) {
    std::set<int> seen;
    for (int row = 0; row < kTileRows; ++row) {
      for (int k = 0; k < kTileK; ++k) {
        const TilePlace place = tile_place(layout, row, k);
        CHECK(place.unit >= 0 && place.unit < tile_units(layout));
        CHECK(place.word >= 0 && place.word < unit_words(layout));
        int r, kk;
        if (layout == kLayoutMma)
          mma_code(place.unit, place.word, place.nibble, r, kk);
        else
          cpu_code(place.unit, place.word, place.nibble, r, kk);
        CHECK(r == row && kk == k);
        seen.insert((place.unit * unit_words(layout) + place.word) * 8 + place.nibble);
      }
    }
    CHECK(seen.size() == kTileRows * kTileK);
  }
}

static void dense_stream_round_trips() {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t count : {1, 7, 32, 33, 100}) {
      std::vector<uint32_t> words(static_cast<size_t>(dense_words(count, bits)), 0);
      std::vector<uint32_t> codes;
      for (int64_t i = 0; i < count; ++i) {
        codes.push_back(random_word() & ((1u << bits) - 1));
        dense_or(words.data(), i, bits, codes.back());
      }
      for (int64_t i = 0; i < count; ++i) CHECK(dense_get(words.data(), i, bits) == codes[static_cast<size_t>(i)]);
    }
  }
}

// The float32 of a float16, its exponent counted out.
static uint32_t widened(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31;
  uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31) return sign | 0x7f800000u | mantissa << 13;
  if (exponent > 0) return sign | (exponent + 112) << 23 | mantissa << 13;
  if (mantissa == 0) return sign;
  uint32_t place = 113;
  for (; !(mantissa & 0x400u); mantissa <<= 1) --place;
  return sign | place << 23 | (mantissa & 0x3ffu) << 13;
}

// Every float16 there and back, also in a thread that takes subnormals of float32 as zero and makes none.
static void halves_are_exact() {
#if defined(__SSE__)
  constexpr unsigned kFlush = 0x8040;
  const unsigned before = _mm_getcsr();
  for (unsigned control : {before & ~kFlush, before | kFlush}) {
    _mm_setcsr(control);
#else
  {
#endif
    for (uint32_t h = 0; h < 0x10000u; ++h) {
      const float value = half_to_float(static_cast<uint16_t>(h));
      CHECK(bits_of_float(value) == widened(h));
      if ((h & 0x7fffu) <= 0x7c00u) CHECK(float_to_half(value) == h);
    }
    CHECK(float_to_half(float_of_bits(1)) == 0 && float_to_half(float_of_bits(0x807fffffu)) == 0x8000u);
  }
#if defined(__SSE__)
  _mm_setcsr(before);
#endif
}

template <class T>
static float value_of(uint32_t pair, int half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  return T::kWide ? half_to_float(bits) : bfloat_to_float(bits);
}

// Every zero point, many words: the A registers hold exactly q - z of the codes that mma_code names, and the scale's
// product rounds as the float32 product does.
template <class T, int kBits>
static void magic_numbers() {
  for (uint32_t top = 0; top < (1u << kBits); ++top) {
    const uint32_t bottom = (top * 5 + 3) & ((1u << kBits) - 1);
    for (int i = 0; i < 200; ++i) {
      const uint32_t word = random_word();
      uint32_t a[4];
      dequant_word<T, kBits>(word, zero_pair<T>(top), zero_pair<T>(bottom), a);
      for (int nibble = 0; nibble < 8; ++nibble) {
        int row, k;
        mma_code(/*lane=*/7, /*word=*/3, nibble, row, k);
        // PTX, A of m16n8k16: register j holds row 8 * (j & 1) + lane / 4, k 8 * (j >> 1) + 2 * (lane % 4) + half.
        const int j = (row >= 8 ? 1 : 0) + (k % 16 >= 8 ? 2 : 0);
        const int half = k & 1;
        CHECK(row % 8 == 7 / 4 && k / 16 == 3 && (k & 7) / 2 == 7 % 4);
        const int q = static_cast<int>((word >> (4 * nibble)) & ((1u << kBits) - 1));
        const int z = static_cast<int>(j & 1 ? bottom : top);
        CHECK(value_of<T>(a[j], half) == static_cast<float>(q - z));
      }
      const float step = std::ldexp(static_cast<float>(random_word() % 2048) - 1000.0f, -14);
      const uint16_t scale = T::kWide ? float_to_half(step) : float_to_bfloat(step);
      const float exact = (T::kWide ? half_to_float(scale) : bfloat_to_float(scale)) * value_of<T>(a[i & 3], i >> 2 & 1);
      const uint32_t scaled = mul_pair<T>(a[i & 3], scale * 0x10001u);
      const uint16_t expected = T::kWide ? float_to_half(exact) : float_to_bfloat(exact);
      CHECK(static_cast<uint16_t>(scaled >> (16 * (i >> 2 & 1))) == expected);
    }
  }
}

// Heap arrays of exactly n elements, so that AddressSanitizer sees the first byte past the end.
template <class T>
struct Exact {
  explicit Exact(int64_t n) : data(static_cast<T*>(std::malloc(static_cast<size_t>(n) * sizeof(T)))), size(n) {}
  ~Exact() { std::free(data); }
  Exact(const Exact&) = delete;
  T* data;
  int64_t size;
};

// Those of which a processor's maker decides how many streams they read.
static std::vector<const CpuKernels*> vendor_kernels(bool streams) {
  std::vector<const CpuKernels*> found;
  if (has_isa(Isa::kAvx2)) found.push_back(kernels_avx2(streams));
  if (has_isa(Isa::kAvx512)) found.push_back(kernels_avx512(streams));
  if (has_isa(Isa::kAvx512Vnni)) found.push_back(kernels_avx512vnni(streams));
  return found;
}

static void cpu_kernels() {
  // 1100 rows are enough for kernels that take several pairs of row tiles abreast, and leave some over.
  for (int64_t n : {1, 16, 33, 65, 1100}) {
    for (int64_t k : {1, 32, 127, 260}) {
      if (n > 65 && k < 127) continue;
      for (int bits : {3, 4}) {
        for (int64_t group : {32, 64, 128, 0}) {
          if (n > 65 && k > 127 && group != 64) continue;
          const int64_t groups = group == 0 ? 1 : ceil_div(k, group);
          Exact<uint8_t> codes(n * k), zeros(n * groups), back(n * k);
          for (int64_t i = 0; i < codes.size; ++i) codes.data[i] = random_word() & ((1u << bits) - 1);
          for (int64_t i = 0; i < zeros.size; ++i) zeros.data[i] = random_word() & ((1u << bits) - 1);
          Exact<uint32_t> words(packed_words(n, k, bits)), other(packed_words(n, k, bits));
          for (Layout layout : {kLayoutMma, kLayoutCpu}) {
            CHECK(pack_cpu(codes.data, zeros.data, n, k, bits, group, layout, words.data, Parallel{}));
            unpack_cpu(words.data, n, k, bits, layout, back.data, Parallel{});
            for (int64_t i = 0; i < codes.size; ++i) CHECK(codes.data[i] == back.data[i]);
            const int64_t last = (n - 1) * k + k - 1;
            CHECK(tile_get(words.data + tile_offset(layout, bits, (n - 1) / 16, (k - 1) / 128, padded_k(k) / 128),
                           layout, bits, static_cast<int>((n - 1) % 16), static_cast<int>((k - 1) % 128)) ==
                  codes.data[last]);
          }
          repack_cpu(words.data, kLayoutCpu, other.data, kLayoutMma, n, k, bits, Parallel{});
          repack_cpu(other.data, kLayoutMma, words.data, kLayoutCpu, n, k, bits, Parallel{});
          Exact<uint16_t> scale(padded_rows(n) * groups);
          Exact<uint8_t> packed_zero(padded_rows(n) * groups);
          for (int64_t i = 0; i < scale.size; ++i) {
            scale.data[i] = 0x2c00 + (random_word() & 255);
            packed_zero.data[i] = random_word() & ((1u << bits) - 1);
          }
          Exact<float> dense(n * k);
          CpuDequantize dequantize{words.data, kLayoutCpu, scale.data, DType::kFloat16, packed_zero.data, 0, n, k, bits,
                                   group,      dense.data, DType::kFloat32};
          dequantize_cpu(dequantize, Parallel{});
          for (int64_t tokens : {1, 2, 3, 5, 8, 9, 17, 33}) {
            if (n > 65 && tokens > (k == 127 ? 5 : 2)) break;
            Exact<float> x(tokens * k), y(tokens * n), bias(n), first(tokens * n);
            for (int64_t i = 0; i < x.size; ++i) x.data[i] = static_cast<float>(random_word() % 2001) / 1000.0f - 1.0f;
            for (int64_t i = 0; i < n; ++i) bias.data[i] = static_cast<float>(i);
            CpuLinear call{x.data, k,           DType::kFloat32, tokens, words.data, scale.data, packed_zero.data,
                           DType::kFloat16, bias.data, y.data,   n,      k,          bits,       group};
            for (Mode mode : {Mode::kA8, Mode::kA15, Mode::kFp32}) {
              for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAmx}) {
                if (!has_isa(isa)) continue;
                packed_linear_cpu(call, mode, isa, Parallel{});
                for (int64_t i = 0; i < y.size; ++i) {
                  if (isa == Isa::kScalar)
                    first.data[i] = y.data[i];
                  else
                    CHECK(first.data[i] == y.data[i]);
                }
              }
              // In one stream and in several, whichever this processor would take.
              for (bool streams : {false, true}) {
                for (const CpuKernels* kernels : vendor_kernels(streams)) {
                  packed_linear_cpu(call, mode, *kernels, Parallel{});
                  for (int64_t i = 0; i < y.size; ++i) CHECK(first.data[i] == y.data[i]);
                }
              }
              if (mode == Mode::kA8) continue;
              for (int64_t m = 0; m < tokens; ++m) {
                for (int64_t r = 0; r < n; ++r) {
                  double sum = bias.data[r], size = std::fabs(bias.data[r]) + 1.0;
                  for (int64_t i = 0; i < k; ++i) {
                    const double term = static_cast<double>(x.data[m * k + i]) * dense.data[r * k + i];
                    sum += term;
                    size += std::fabs(term);
                  }
                  CHECK(std::fabs(y.data[m * n + r] - sum) <= 1e-4 * size);
                }
              }
            }
          }
        }
      }
    }
  }
  Exact<uint8_t> large(4);
  for (int i = 0; i < 4; ++i) large.data[i] = 8;
  Exact<uint32_t> words(packed_words(2, 2, 3));
  CHECK(!pack_cpu(large.data, nullptr, 2, 2, 3, 32, kLayoutCpu, words.data, Parallel{}));
}

int main() {
  maps_are_inverse();
  dense_stream_round_trips();
  halves_are_exact();
  magic_numbers<Half2, 4>();
  magic_numbers<Half2, 3>();
  magic_numbers<Bfloat2, 4>();
  magic_numbers<Bfloat2, 3>();
  cpu_kernels();
  std::puts("ok");
}
