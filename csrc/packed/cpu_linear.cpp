// SPDX-License-Identifier: Apache-2.0
// Driver of the CPU kernels: chooses the instruction set, quantises activations once, shares row tiles among threads.
#include "packed/cpu_linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "packed/float_types.h"

namespace discquant {
namespace packed {
namespace {

constexpr int64_t kTogetherBytes = 1 << 19;  // of activations that a thread goes through again and again

struct FreeDelete {
  void operator()(void* p) const { std::free(p); }
};

// 64-byte aligned scratch for one call; zeroed, because activations are padded with zeros.
template <class T>
std::unique_ptr<T[], FreeDelete> scratch(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes == 0 ? 64 : bytes);
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return std::unique_ptr<T[], FreeDelete>(static_cast<T*>(p));
}

void row_to_float(const void* x, DType type, int64_t at, int64_t count, float* out) {
  if (type == DType::kFloat32) {
    std::memcpy(out, static_cast<const float*>(x) + at, static_cast<size_t>(count) * 4);
  } else if (type == DType::kBFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(x) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = bfloat_to_float(p[i]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(p[i]);
  }
}

float load_as_float(const void* p, DType type, int64_t i) {
  if (type == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return type == DType::kBFloat16 ? bfloat_to_float(bits) : half_to_float(bits);
}

// `count` may be negative: the second tile of a pair can lie past the last row.
void store_row(const float* sums, const void* bias, DType type, int64_t first, int64_t count, void* y, int64_t at) {
  if (count <= 0) return;
  float value[kTileRows];
  for (int64_t i = 0; i < count; ++i) value[i] = bias ? sums[i] + load_as_float(bias, type, first + i) : sums[i];
  if (type == DType::kFloat32) {
    std::memcpy(static_cast<float*>(y) + at, value, static_cast<size_t>(count) * 4);
  } else if (type == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(y)[at + i] = float_to_bfloat(value[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(y)[at + i] = float_to_half(value[i]);
  }
}

// Runs `fn(i)` for i in [0, n): threads take the next index from a counter, so a slowed core delays one tile only.
template <class Fn>
void for_each(int64_t n, const Parallel& parallel, const Fn& fn) {
  if (parallel.run == nullptr || parallel.threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t n;
    const Fn* fn;
  } context;
  context.n = n;
  context.fn = &fn;
  parallel.run(
      parallel.threads,
      [](int64_t, int64_t, void* p) {
        Context* c = static_cast<Context*>(p);
        for (int64_t i = c->next.fetch_add(1); i < c->n; i = c->next.fetch_add(1)) (*c->fn)(i);
      },
      &context);
}

int padded_tokens(const CpuKernels& kernels, int64_t live) {
  if (live <= 2 || kernels.by_token) return static_cast<int>(live);
  return live <= 4 ? 4 : live <= 6 ? 6 : 8;
}

// Whether the processor has the int8 tiles of AMX, and the bit matrices (GFNI) that go with them, and Linux lets this process
// use them; it asks before the first use.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25, kGaloisField = 1u << 8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & kAmxTile) && (d & kAmxInt8) && (c & kGaloisField) && kernels_amx(Mode::kA8, 1) != nullptr &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#if defined(__x86_64__)
// Whether several streams gain: measured with Intel's AVX-512 and AMD's AVX2 (on Zen 3), so only there.
bool gains_from_streams(Isa isa, Mode mode, int64_t tokens) {
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return few_products(mode, tokens) && (isa == Isa::kAvx2 ? amd && tokens == 1 : intel);
}
#endif

}  // namespace

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) return avx512;
  if (isa == Isa::kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::kAmx) {
    static const bool amx = has_isa(Isa::kAvx512Vnni) && may_use_amx();
    return amx;
  }
#endif
  return isa == Isa::kScalar;
}

Isa best_isa() {
  static const Isa best = has_isa(Isa::kAmx)          ? Isa::kAmx
                          : has_isa(Isa::kAvx512Vnni) ? Isa::kAvx512Vnni
                          : has_isa(Isa::kAvx512)   ? Isa::kAvx512
                          : has_isa(Isa::kAvx2)     ? Isa::kAvx2
                                                    : Isa::kScalar;
  return best;
}

const CpuKernels* kernels_for(Isa isa, Mode mode, int64_t tokens) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx) return kernels_amx(mode, tokens);
  const bool streams = gains_from_streams(isa, mode, tokens);
  if (isa == Isa::kAvx2) return kernels_avx2(streams);
  if (isa == Isa::kAvx512) return kernels_avx512(streams);
  if (isa == Isa::kAvx512Vnni) return kernels_avx512vnni(streams);
#endif
  return kernels_scalar();
}

void packed_linear_cpu(const CpuLinear& call, Mode mode, Isa isa, const Parallel& parallel) {
  packed_linear_cpu(call, mode, *kernels_for(isa, mode, call.tokens), parallel);
}

void packed_linear_cpu(const CpuLinear& call, Mode mode, const CpuKernels& kernels, const Parallel& parallel) {
  const int64_t k = call.in_features;
  const int64_t group_size = call.group_size > 0 ? call.group_size : padded_k(k);
  CpuWeight weight{};
  weight.words = call.words;
  weight.scale = call.scale;
  weight.zero_point = call.zero_point;
  weight.scale_type = call.scale_type;
  weight.bits = call.bits;
  weight.k_tiles = padded_k(k) / kTileK;
  weight.groups = ceil_div(k, group_size);
  weight.group_size = group_size;
  weight.block_size = group_size < kTileK ? group_size : kTileK;
  weight.blocks = ceil_div(k, weight.block_size);
  const int64_t width = weight.blocks * weight.block_size;

  // Groups of tokens, the last one padded up to the next kernel.
  const int64_t most = kernels.max_tokens;
  const int64_t groups = ceil_div(call.tokens, most);
  const int planes = mode == Mode::kA15 ? 2 : 1;
  const int64_t all = (groups - 1) * most + padded_tokens(kernels, call.tokens - (groups - 1) * most);
  const bool integer = mode != Mode::kFp32;
  auto codes = scratch<int8_t>(integer ? planes * width * all : 0);
  auto values = scratch<float>(integer ? 0 : width * all);
  auto step = scratch<float>(integer ? weight.blocks * all : 0);
  auto sum = scratch<int32_t>(integer ? weight.blocks * all : 0);
  std::vector<CpuTokens> tokens(static_cast<size_t>(groups));
  for_each(groups, call.tokens * width < 65536 ? Parallel{} : parallel, [&](int64_t g) {
    const int64_t first = g * most;
    const int64_t live = call.tokens - first < most ? call.tokens - first : most;
    const int count = padded_tokens(kernels, live);
    const int64_t token_bytes = kernels.by_token ? weight.block_size : 4;
    CodeStrides stride{4 * count, weight.block_size * count, width * count};
    if (kernels.by_token) stride = {4, planes * weight.block_size * count, weight.block_size * count};
    int8_t* group_codes = codes.get() + planes * width * first;
    float* group_values = values.get() + (integer ? 0 : width * first);
    float* group_step = step.get() + weight.blocks * first;
    int32_t* group_sum = sum.get() + weight.blocks * first;
    auto row = scratch<float>(width);
    for (int64_t m = 0; m < live; ++m) {
      row_to_float(call.x, call.x_type, (first + m) * call.x_stride, k, row.get());
      if (integer) {
        kernels.quantize(row.get(), weight.blocks, weight.block_size, planes, static_cast<int>(m), count, stride,
                          group_codes + m * token_bytes, group_step, group_sum);
      } else {
        for (int64_t i = 0; i < width; ++i) group_values[i * count + m] = row[i];
      }
    }
    CpuTokens& t = tokens[static_cast<size_t>(g)];
    t.tokens = count;
    t.live = static_cast<int>(live);
    t.plane[0] = reinterpret_cast<const int32_t*>(group_codes);
    t.plane[1] = kernels.by_token ? nullptr : t.plane[0] + (planes == 2 ? width * count / 4 : 0);
    t.values = group_values;
    t.step = group_step;
    t.sum = group_sum;
  });

  // A thread takes neighbouring pairs of row tiles, about 64 KiB: long enough to stream, short enough to share evenly.
  // Several abreast are more, so only where every thread gets many.
  const int64_t pairs = ceil_div(call.out_features, 2 * kTileRows);
  const int64_t pair_bytes = 2 * weight.k_tiles * tile_words(call.bits) * 4;
  const bool small = call.out_features * k * call.tokens < 65536;
  const int threads = small || parallel.run == nullptr ? 1 : parallel.threads;
  const int64_t abreast = pairs >= 4 * kernels.abreast * threads ? kernels.abreast : 1;
  const int64_t chunk = ceil_div(std::max<int64_t>(1, 65536 / pair_bytes), abreast) * abreast;
  const int64_t chunks = ceil_div(pairs, chunk);
  // As many groups at once as stay in the second-level cache, for every pair reads them all; the words are read once more
  // for the next ones. On Emerald Rapids 1024 tokens of a15 take 0.85 to 0.92 of the time so, few tokens as long.
  const int64_t group_bytes = (integer ? planes : 4) * width * most;
  const int64_t together = std::max<int64_t>(1, kTogetherBytes / group_bytes);
  for_each(chunks * ceil_div(groups, together), small ? Parallel{} : parallel, [&](int64_t i) {
    const int64_t c = i % chunks, begin = i / chunks * together;
    const int64_t last = std::min(groups, begin + together);
    const int64_t end = (c + 1) * chunk < pairs ? (c + 1) * chunk : pairs;
    alignas(64) float out[kMaxAbreast * 2 * kMaxTokens * kTileRows];
    for (int64_t pair = c * chunk; pair < end; pair += abreast) {
      const int count = static_cast<int>(std::min(abreast, end - pair));
      for (int64_t g = begin; g < last; ++g) {
        const CpuTokens& t = tokens[static_cast<size_t>(g)];
        kernels.row_pairs(call.bits, mode, t.tokens)(weight, t, pair, count, out);
        for (int tile = 0; tile < 2 * count; ++tile) {
          const int64_t first = (2 * pair + tile) * kTileRows;
          const int64_t left = call.out_features - first;
          for (int m = 0; m < t.live; ++m)
            store_row(out + (tile * t.tokens + m) * kTileRows, call.bias, call.x_type, first,
                      left < kTileRows ? left : kTileRows, call.y, (g * most + m) * call.out_features + first);
        }
      }
    }
  });
}

uint32_t read_memory_cpu(const void* p, int64_t bytes, int streams, bool prefetch, const Parallel& parallel) {
  const CpuKernels* kernels = kernels_for(best_isa());
  const int64_t chunk = 65536 * streams;
  std::atomic<uint32_t> total{0};
  for_each(ceil_div(bytes, chunk), parallel, [&](int64_t c) {
    uint32_t lanes[16] = {0};
    const int64_t left = bytes - c * chunk;
    kernels->read(static_cast<const char*>(p) + c * chunk, left < chunk ? left : chunk, streams, prefetch, lanes);
    uint32_t sum = 0;
    for (uint32_t lane : lanes) sum += lane;
    total += sum;
  });
  return total;
}

}  // namespace packed
}  // namespace discquant
