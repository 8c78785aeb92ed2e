// SPDX-License-Identifier: Apache-2.0
// Run by `make -C csrc/packed emulate-linear`: the GPU kernels themselves, on the emulated GPU of gpu_emulator.h, under
// AddressSanitizer, on buffers of exactly the size that the contract asks for. Against sums in double; and bit for bit
// against itself: any order of the thread blocks, any batch, any rubbish in the workspace.
#define DISCQUANT_EMULATE
#include "gpu_case.h"
#include "packed/gpu_dequantize.cuh"
#include "packed/gpu_linear.cuh"

template <class T, int kBits, int kTokenTiles, bool kExact>
static void run_thread(const GpuLinear& call, const Walk& walk) {
  walk.unit_groups == 1 ? packed_linear_kernel<T, kBits, kTokenTiles, kExact, true>(call, walk)
                        : packed_linear_kernel<T, kBits, kTokenTiles, kExact, false>(call, walk);
}

template <class T, int kBits>
static void run(const GpuLinear& call, bool exact, const Walk& walk, Order order) {
  const int tiles = call.tokens <= 8 ? 1 : 2;
  const size_t bytes = static_cast<size_t>(shared_bytes(call.tokens, walk.slots, walk.chunk_tiles));
  emulated::launch(places(walk.runs, 1, order), Place{walk.runs, 1, 1}, kThreads, bytes, [&] {
    if (tiles == 1)
      exact ? run_thread<T, kBits, 1, true>(call, walk) : run_thread<T, kBits, 1, false>(call, walk);
    else
      exact ? run_thread<T, kBits, 2, true>(call, walk) : run_thread<T, kBits, 2, false>(call, walk);
  });
}

static std::vector<uint16_t> linear(const Case& c, const uint16_t* x, int64_t x_stride, int tokens, const uint16_t* bias,
                                    bool exact, const GpuDevice& device, Order order, int walk_tokens) {
  Buffer<uint16_t> y(static_cast<size_t>(tokens) * c.n);
  Walk walk{};
  CHECK(make_walk(c.n, c.k, c.group_size, device, walk_tokens, walk));
  emulated::late = order != Order::kForward;
  if (order == Order::kForward) give_slots(walk, tokens, device);  // the bits do not depend on it
  const size_t words = static_cast<size_t>(walk_workspace_words(walk));
  Buffer<uint32_t> exact_size(words);
  for (size_t i = 0; i < words; ++i) exact_size.data[i] = i < kMaxBlocks ? 0u : 0xffffffffu;  // NaN
  // Backwards, in the workspace that all weights before have used, as a stream's layers do.
  static Buffer<uint32_t> stream(kMaxBlocks + 512 * kPartialWords);
  static bool fresh = true;
  if (fresh) std::fill(stream.data, stream.data + stream.count, 0u);
  fresh = false;
  uint32_t* const workspace = order == Order::kBackward ? stream.data : exact_size.data;
  CHECK(words <= stream.count);
  GpuLinear call = call_of(c, x, x_stride, tokens, bias, y.data, device);
  call.workspace = workspace;
  const auto launch = [&] {
    if (c.type == DType::kFloat16)
      c.bits == 4 ? run<Half2, 4>(call, exact, walk, order) : run<Half2, 3>(call, exact, walk, order);
    else
      c.bits == 4 ? run<Bfloat2, 4>(call, exact, walk, order) : run<Bfloat2, 3>(call, exact, walk, order);
    for (int i = 0; i < kMaxBlocks; ++i) CHECK(workspace[i] == 0);
  };
  launch();
  if (order == Order::kShuffled) {
    const std::vector<uint16_t> once(y.data, y.data + y.count);
    std::fill(y.data, y.data + y.count, uint16_t{0xffff});
    launch();
    CHECK(std::equal(once.begin(), once.end(), y.data));
  }
  return std::vector<uint16_t>(y.data, y.data + y.count);
}

static void check_linear(const Case& c, int tokens, bool exact, bool with_bias, const GpuDevice& device) {
  const int walk_tokens = tokens <= 8 ? 8 : 16;
  const int64_t stride = c.k + 8;
  Buffer<uint16_t> x(static_cast<size_t>((tokens - 1) * stride + c.k));
  for (size_t i = 0; i < x.count; ++i) x.data[i] = to_bits(random_value(), c.type);
  std::vector<uint16_t> bias(static_cast<size_t>(c.n));
  for (auto& b : bias) b = to_bits(random_value(), c.type);
  const uint16_t* given = with_bias ? bias.data() : nullptr;
  const auto y = linear(c, x.data, stride, tokens, given, exact, device, Order::kForward, walk_tokens);
  const double unit = c.type == DType::kFloat16 ? std::ldexp(1.0, -11) : std::ldexp(1.0, -8);
  for (int t = 0; t < tokens; ++t)
    for (int row = 0; row < c.n; ++row) {
      double sum = 0, magnitude = 0;
      for (int k = 0; k < c.k; ++k) {
        const float rounded = from_bits(to_bits(c.weight(row, k), c.type), c.type);
        const double term = static_cast<double>(exact ? rounded : c.weight(row, k)) * from_bits(x.data[t * stride + k], c.type);
        sum += term;
        magnitude += std::fabs(term);
      }
      if (with_bias) sum += from_bits(bias[static_cast<size_t>(row)], c.type);
      const double error = 2 * (std::sqrt(c.k) + 8) * std::ldexp(1.0, -23) * (magnitude + 1);
      const double got = from_bits(y[static_cast<size_t>(t) * c.n + row], c.type);
      if (!(std::fabs(got - sum) <= error + unit * (std::fabs(sum) + error) + std::ldexp(1.0, -24))) {
        std::printf("%d x %d, %d bits, group %d, token %d row %d: %g instead of %g\n", c.n, c.k, c.bits, c.group_size, t, row, got, sum);
        std::exit(1);
      }
    }
  for (Order order : {Order::kBackward, Order::kShuffled})
    CHECK(linear(c, x.data, stride, tokens, given, exact, device, order, walk_tokens) == y);
  const int t = tokens - 1;
  const auto alone = linear(c, x.data + t * stride, stride, 1, given, exact, device, Order::kForward, walk_tokens);
  CHECK(std::equal(alone.begin(), alone.end(), y.begin() + static_cast<int64_t>(t) * c.n));
}

static void check_dequantize(const Case& c, DType type, int64_t row_begin, int64_t row_end) {
  const size_t size = type == DType::kFloat32 ? 4 : 2;
  Buffer<uint8_t> out(static_cast<size_t>((row_end - row_begin) * c.k) * size);
  GpuDequantize call{};
  call.words = c.words.data;
  call.scale = c.scale.data;
  call.scale_type = c.scale_type;
  call.zero_point = c.symmetric ? nullptr : c.zero.data;
  call.row_begin = row_begin;
  call.row_end = row_end;
  call.k = c.k;
  call.bits = c.bits;
  call.group_size = c.group_size;
  call.out = out.data;
  call.type = type;
  const int group = c.group_size > 0 ? c.group_size : static_cast<int>(padded_k(c.k));
  const unsigned x = static_cast<unsigned>(ceil_div(padded_k(c.k) / kTileK, 2));
  const unsigned y = static_cast<unsigned>(ceil_div(row_end, kBlockRows) - row_begin / kBlockRows);
  emulated::launch(places(x, y, Order::kForward), Place{x, y, 1}, 32 * kDequantizeWarps, kDequantizeShared, [&] {
    if (type == DType::kFloat32)
      c.bits == 4 ? dequantize_kernel<void, 4>(call, group) : dequantize_kernel<void, 3>(call, group);
    else if (type == DType::kFloat16)
      c.bits == 4 ? dequantize_kernel<Half2, 4>(call, group) : dequantize_kernel<Half2, 3>(call, group);
    else
      c.bits == 4 ? dequantize_kernel<Bfloat2, 4>(call, group) : dequantize_kernel<Bfloat2, 3>(call, group);
  });
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t k = 0; k < c.k; ++k) {
      const size_t at = static_cast<size_t>((row - row_begin) * c.k + k);
      if (type == DType::kFloat32)
        CHECK(reinterpret_cast<const float*>(out.data)[at] == c.weight(row, k));
      else
        CHECK(reinterpret_cast<const uint16_t*>(out.data)[at] == to_bits(c.weight(row, k), type));
    }
}

int main() {
  const int groups[] = {32, 64, 128, 384, 0};
  const DType types[] = {DType::kFloat16, DType::kBFloat16};
  // {multiprocessors, shared memory}: small memories cut K into chunks of two tiles or of one.
  const GpuDevice devices[] = {{3, 227 * 1024, false}, {7, 46 * 1024, false}, {132, 41 * 1024, false}};
  struct Shape {
    int n, k;
  };
  int trial = 0, skipped = 0;
  for (const Shape& shape : {Shape{1, 8}, Shape{64, 128}, Shape{97, 328}, Shape{200, 1000}, Shape{130, 2056}})
    for (int bits : {3, 4})
      for (int group : groups) {
        // The large shapes take turns at the groups: emulated threads are slow.
        if (shape.k >= 1000 && trial % 5 != 0 && ++skipped) {
          ++trial;
          continue;
        }
        const DType type = types[trial % 2];
        // Exact mode is for scales of the activations' type.
        const bool exact = trial % 3 == 0;
        const DType scale_type = exact || trial % 2 ? type : DType::kFloat32;
        const Case c(shape.n, shape.k, bits, group, trial / 2 % 2 == 0, type, scale_type);
        const int tokens = std::vector<int>{1, 3, 8, 9, 16}[static_cast<size_t>(trial % 5)];
        check_linear(c, tokens, exact, trial % 4 == 1, devices[trial % 3]);
        for (DType out : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) check_dequantize(c, out, 0, shape.n);
        if (shape.n > 32) check_dequantize(c, type, 16, shape.n - 1);
        ++trial;
      }
  // Long runs: several whole row blocks; parts of many in chunks of one tile; more of them than are counted at a time.
  struct Long {
    int n, k, tokens, bits, group;
    GpuDevice device;
  };
  for (const Long& l : {Long{700, 384, 11, 3, 128, {2, 227 * 1024, false}}, Long{650, 384, 13, 4, 384, {2, 80 * 1024, false}},
                        Long{650, 640, 15, 3, 64, {3, 41 * 1024, false}}, Long{300, 712, 10, 4, 32, {2, 45 * 1024, false}},
                        Long{4300, 256, 9, 3, 0, {1, 41 * 1024, false}}, Long{900, 640, 2, 3, 128, {3, 23 * 1024, false}}}) {
    const DType type = types[trial++ % 2];
    const Case c(l.n, l.k, l.bits, l.group, trial % 3 == 0, type, type);
    check_linear(c, l.tokens, trial % 4 == 0, true, l.device);
  }
  // The walk of real sizes: every unit once, chunk by chunk, and no two places of partial sums agree.
  for (const Shape& shape : {Shape{6144, 4096}, Shape{8192, 28672}, Shape{57344, 8192}, Shape{4097, 10944}, Shape{64, 131072}})
    for (const GpuDevice& device : {GpuDevice{132, 227 * 1024, true}, GpuDevice{108, 163 * 1024, false}, GpuDevice{128, 99 * 1024, false}})
    for (int tokens : {8, 16}) {
      Walk walk{};
      CHECK(make_walk(shape.n, shape.k, 128, device, tokens, walk));
      give_slots(walk, tokens, device);
      CHECK(shared_bytes(tokens, walk.slots, walk.chunk_tiles) <= device.shared_bytes);
      CHECK(walk.chunk_tiles >= 8 || walk.chunks == 1);
      Cursor at = walk_at(walk, 0);
      std::vector<bool> used(static_cast<size_t>(walk_workspace_words(walk) - kMaxBlocks) / kPartialWords, false);
      for (uint32_t r = 0; r < walk.runs; ++r) {
        int64_t last_slot = -1;
        for (uint32_t unit = walk.begin(r); unit < walk.begin(r + 1); ++unit) {
          CHECK(at.unit == unit && walk.run_of(unit) == r);
          CHECK(walk.origin(at.chunk, at.block) + static_cast<uint32_t>(at.k_tile) == unit);
          const Cursor same = walk_at(walk, unit);
          CHECK(same.chunk == at.chunk && same.block == at.block && same.k_tile == at.k_tile);
          const int k_tile = at.chunk * walk.chunk_tiles + at.k_tile;
          CHECK(k_tile < walk.k_tiles && walk.group(k_tile, 0) == std::min(k_tile, walk.groups - 1));
          const int64_t slot = walk.slot(r, at.chunk, at.block);
          if (slot != last_slot) {
            CHECK(!used[static_cast<size_t>(slot)]);
            used[static_cast<size_t>(slot)] = true;
            last_slot = slot;
          }
          walk_forward(walk, at, 1);
        }
      }
      CHECK(at.unit == walk.units);
    }
  std::printf("%d weights\nok\n", trial - skipped);
  return 0;
}
