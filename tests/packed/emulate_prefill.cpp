// SPDX-License-Identifier: Apache-2.0
// Run by `make -C csrc/packed emulate-prefill`: the kernel for many tokens on the emulated GPU, under AddressSanitizer, on
// buffers of exactly the size that the contract asks for. Against sums in double over the weight as a dense layer has it;
// bit for bit against itself with asynchronous work done early or late; and one bit at a time, with x the identity.
#define DISCQUANT_EMULATE
#include "gpu_case.h"
#include "packed/gpu_prefill.cuh"

// Clusters forward or backward, the thread blocks of one by rank.
static std::vector<Place> tiles(const Prefill& plan, unsigned x, unsigned y, Order order) {
  std::vector<Place> found;
  for (const Place& tile : places(x, y, order))
    for (int rank = 0; rank < plan.splits; ++rank) found.push_back(Place{tile.x, tile.y, static_cast<unsigned>(rank)});
  return found;
}

template <bool kWarpgroups, class T, int kBits, int kTokens>
static void run_group(const GpuLinear& call, const Prefill& plan) {
  plan.unit_groups == 1   ? prefill_tile<kWarpgroups, T, kBits, kTokens, 8>(call, plan)
  : plan.unit_groups == 2 ? prefill_tile<kWarpgroups, T, kBits, kTokens, 4>(call, plan)
                          : prefill_tile<kWarpgroups, T, kBits, kTokens, 2>(call, plan);
}

template <bool kWarpgroups, class T>
static void run_thread(const GpuLinear& call, const Prefill& plan) {
  if (call.bits == 4)
    plan.tokens == 64 ? run_group<kWarpgroups, T, 4, 64>(call, plan) : run_group<kWarpgroups, T, 4, 128>(call, plan);
  else
    plan.tokens == 64 ? run_group<kWarpgroups, T, 3, 64>(call, plan) : run_group<kWarpgroups, T, 3, 128>(call, plan);
}

template <bool kWarpgroups>
static void run_type(const GpuLinear& call, const Prefill& plan) {
  call.type == DType::kFloat16 ? run_thread<kWarpgroups, Half2>(call, plan) : run_thread<kWarpgroups, Bfloat2>(call, plan);
}

static std::vector<uint16_t> linear(const Case& c, const uint16_t* x, int64_t x_stride, int tokens, const uint16_t* bias,
                                    int splits, Order order, bool warpgroups) {
  Buffer<uint16_t> y(static_cast<size_t>(tokens) * c.n);
  std::fill(y.data, y.data + y.count, uint16_t{0xffff});
  const GpuDevice device{132, 227 * 1024, true};
  const GpuLinear call = call_of(c, x, x_stride, tokens, bias, y.data, device);
  Prefill plan{};
  CHECK(make_prefill(c.n, c.k, c.group_size, tokens, device, plan));
  if (splits > 0) plan.splits = splits;
  const unsigned grid_x = static_cast<unsigned>(ceil_div(tokens, plan.tokens));
  const unsigned grid_y = static_cast<unsigned>(ceil_div(plan.blocks, kPrefillRows / kBlockRows));
  const size_t bytes = static_cast<size_t>(prefill_shared_bytes(plan.tokens));
  emulated::launch(tiles(plan, grid_x, grid_y, order), Place{grid_x, grid_y, static_cast<unsigned>(plan.splits)},
                   kPrefillThreads, bytes,
                   [&] { warpgroups ? run_type<true>(call, plan) : run_type<false>(call, plan); },
                   static_cast<size_t>(plan.splits));
  return std::vector<uint16_t>(y.data, y.data + y.count);
}

static void check(const Case& c, int tokens, bool with_bias, int splits) {
  const int64_t stride = c.k + 8;
  Buffer<uint16_t> x(static_cast<size_t>((tokens - 1) * stride + c.k));
  for (size_t i = 0; i < x.count; ++i) x.data[i] = to_bits(random_value(), c.type);
  std::vector<uint16_t> bias(static_cast<size_t>(c.n));
  for (auto& b : bias) b = to_bits(random_value(), c.type);
  const uint16_t* given = with_bias ? bias.data() : nullptr;
  emulated::late = false;
  const auto y = linear(c, x.data, stride, tokens, given, splits, Order::kForward, true);
  emulated::late = true;
  CHECK(linear(c, x.data, stride, tokens, given, splits, Order::kBackward, true) == y);
  // The emulated instructions add alike, so the two ways to multiply agree to the bit.
  CHECK(linear(c, x.data, stride, tokens, given, splits, Order::kShuffled, false) == y);
  std::vector<float> weight(static_cast<size_t>(c.n) * c.k);
  for (int row = 0; row < c.n; ++row)
    for (int k = 0; k < c.k; ++k)
      weight[static_cast<size_t>(row) * c.k + k] = from_bits(to_bits(c.weight(row, k), c.type), c.type);
  const double unit = c.type == DType::kFloat16 ? std::ldexp(1.0, -11) : std::ldexp(1.0, -8);
  for (int t = 0; t < tokens; ++t)
    for (int row = 0; row < c.n; ++row) {
      double sum = with_bias ? from_bits(bias[static_cast<size_t>(row)], c.type) : 0, magnitude = 0;
      for (int k = 0; k < c.k; ++k) {
        const double term = static_cast<double>(weight[static_cast<size_t>(row) * c.k + k]) * from_bits(x.data[t * stride + k], c.type);
        sum += term;
        magnitude += std::fabs(term);
      }
      const double error = 2 * (std::sqrt(c.k) + 8) * std::ldexp(1.0, -23) * (magnitude + 1);
      const double got = from_bits(y[static_cast<size_t>(t) * c.n + row], c.type);
      if (!(std::fabs(got - sum) <= error + unit * (std::fabs(sum) + error) + std::ldexp(1.0, -24))) {
        std::printf("%d x %d, %d bits, group %d, %d splits, token %d row %d: %g instead of %g\n", c.n, c.k, c.bits,
                    c.group_size, splits, t, row, got, sum);
        std::exit(1);
      }
    }
}

// x the identity: y is the weight, bit for bit.
static void check_identity(const Case& c, bool warpgroups) {
  Buffer<uint16_t> x(static_cast<size_t>(c.k) * c.k);
  for (int t = 0; t < c.k; ++t)
    for (int k = 0; k < c.k; ++k) x.data[t * c.k + k] = to_bits(t == k ? 1.0f : 0.0f, c.type);
  const auto y = linear(c, x.data, c.k, c.k, nullptr, 0, Order::kForward, warpgroups);
  for (int k = 0; k < c.k; ++k)
    for (int row = 0; row < c.n; ++row) {
      const float value = from_bits(to_bits(c.weight(row, k), c.type), c.type);
      CHECK(from_bits(y[static_cast<size_t>(k) * c.n + row], c.type) == value);
    }
}

int main() {
  const DType types[] = {DType::kFloat16, DType::kBFloat16};
  int trial = 0;
  struct Shape {
    int n, k, tokens, splits;
  };
  // Ragged tiles of every kind; a ring that goes round more than once; clusters with uneven parts of K.
  for (const Shape& shape : {Shape{1, 8, 3, 1}, Shape{97, 328, 17, 2}, Shape{264, 1160, 33, 1}, Shape{320, 648, 70, 4},
                             Shape{72, 2056, 20, 8}, Shape{72, 1288, 129, 1}})
    for (int bits : {3, 4}) {
      const int group = std::vector<int>{32, 64, 128, 384, 0}[static_cast<size_t>(trial % 5)];
      const DType type = types[(trial + trial / 2) % 2];
      check(Case(shape.n, shape.k, bits, group, trial % 3 == 0, type, type), shape.tokens, trial % 4 == 1, shape.splits);
      ++trial;
    }
  for (int group : {32, 64, 128}) {
    emulated::late = group != 64;
    for (int bits : {3, 4})
      for (DType type : types) check_identity(Case(80, 136, bits, group, bits == 3, type, type), (group == 32) == (bits == 3));
  }
  // Real sizes: the parts of K cover it, in order, and no thread block is idle.
  // 116 and 112 thread blocks in clusters of four and eight on 132 multiprocessors: what CUTLASS reckons with.
  const Clusters usual{{132, 66, 29, 14}};
  for (int64_t n : {4096, 6144, 28672, 57344})
    for (int64_t k : {128, 4096, 14336})
      for (int64_t tokens : {17, 64, 65, 256, 1024, 4096}) {
        Prefill plan{};
        CHECK(make_prefill(n, k, 128, tokens, GpuDevice{132, 227 * 1024, true}, plan));
        const int64_t tiles = plan.tiles(tokens);
        plan.splits = prefill_splits(plan.k_tiles, tiles, usual);
        CHECK(plan.k_begin(0) == 0 && plan.k_begin(plan.splits) == plan.k_tiles);
        for (int rank = 0; rank < plan.splits; ++rank) CHECK(plan.k_begin(rank) < plan.k_begin(rank + 1));
        CHECK(prefill_shared_bytes(plan.tokens) <= 227 * 1024);
      }
  // 16 tiles: as 16 clusters of eight they would come in two waves, one of them almost empty; of four they come in one.
  CHECK(prefill_splits(112, 16, usual) == 4 && prefill_splits(112, 14, usual) == 8);
  CHECK(prefill_splits(112, 16, Clusters{{132, 66, 33, 16}}) == 8);
  CHECK(prefill_splits(112, 16, Clusters{{132, 0, 0, 0}}) == 1 && prefill_splits(1, 1, usual) == 1);
  Prefill plan{};
  // With little memory tiles are of 64 tokens; with less there are none.
  CHECK(make_prefill(4096, 4096, 128, 256, GpuDevice{128, 99 * 1024, false}, plan));
  CHECK(plan.splits == 1 && plan.tokens == 64 && prefill_shared_bytes(64) <= 99 * 1024);
  CHECK(!make_prefill(4096, 4096, 128, 256, GpuDevice{108, 64 * 1024, false}, plan));
  std::printf("%d weights\nok\n", trial);
  return 0;
}
