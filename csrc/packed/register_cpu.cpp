// SPDX-License-Identifier: Apache-2.0
// CPU operators of the packed formats, registered through torch's stable ABI: one binary serves torch 2.10 and later.
// Schemas and fakes are in discquant/ops/pack.py and packed_linear.py.
#include "build_facts.h"
#include "packed/cpu_linear.h"
#include "packed/register_checks.h"

namespace discquant {
namespace packed {
namespace {

static_assert(kLayoutVersion == discquant::kLayoutVersion, "build_facts.h reports the version of layout.h");

Parallel torch_threads() {
  Parallel parallel;
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
  };
  return parallel;
}

Tensor linear(const Tensor& x, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point,
              const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t bits, int64_t group_size, int64_t mode,
              int64_t isa) {
  check_weight(words, scale, zero_point, n, k, bits, group_size, kLayoutCpu);
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) == k, "packed_linear: x must be [tokens, ", k, "] on the CPU");
  STD_TORCH_CHECK(x.stride(1) == 1 || k == 1 || x.size(0) == 0, "packed_linear: x must have adjacent columns");
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "packed_linear: mode must be 0, 1 or 2, got ", mode);
  STD_TORCH_CHECK(isa >= -1 && isa <= 4, "packed_linear: isa must be -1 to 4, got ", isa);
  const Isa chosen = isa < 0 ? best_isa() : static_cast<Isa>(isa);
  STD_TORCH_CHECK(has_isa(chosen), "packed_linear: this processor lacks the instructions of isa ", isa);
  CpuLinear call{};
  call.x_type = float_type(x, "x");
  if (bias) check_buffer(*bias, x, x.scalar_type(), n, "bias");
  Tensor y = torch::stable::new_empty(x, {x.size(0), n}, std::make_optional(x.scalar_type()));
  if (x.size(0) == 0 || n == 0) return y;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.tokens = x.size(0);
  call.words = words_of(words);
  call.scale = scale.const_data_ptr();
  call.scale_type = float_type(scale, "scale");
  call.zero_point = bytes_of(zero_point);
  call.bias = bias ? bias->const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.out_features = n;
  call.in_features = k;
  call.bits = static_cast<int>(bits);
  call.group_size = group_size == -1 ? 0 : group_size;
  packed_linear_cpu(call, static_cast<Mode>(mode), chosen, torch_threads());
  return y;
}

Tensor pack(const Tensor& codes, const std::optional<Tensor>& zero_point, int64_t bits, int64_t group_size,
            int64_t layout) {
  STD_TORCH_CHECK(codes.dim() == 2, "pack: codes must be [out_features, in_features]");
  const int64_t n = codes.size(0), k = codes.size(1);
  check_grid(n, k, bits, group_size, layout);
  check_buffer(codes, codes, ScalarType::Byte, n * k, "codes");
  if (zero_point) check_buffer(*zero_point, codes, ScalarType::Byte, n * group_count(k, group_size), "zero_point");
  Tensor words = torch::stable::new_empty(codes, {packed_words(n, k, static_cast<int>(bits))},
                                          std::make_optional(ScalarType::Int));
  const bool fits = pack_cpu(bytes_of(codes), bytes_of(zero_point), n, k, static_cast<int>(bits),
                             group_size == -1 ? 0 : group_size, static_cast<Layout>(layout),
                             static_cast<uint32_t*>(words.mutable_data_ptr()), torch_threads());
  STD_TORCH_CHECK(fits, "pack: codes must be below 2^num_bits = ", 1 << bits);
  return words;
}

Tensor unpack(const Tensor& words, int64_t n, int64_t k, int64_t bits, int64_t layout) {
  check_grid(n, k, bits, -1, layout);
  check_buffer(words, words, ScalarType::Int, packed_words(n, k, static_cast<int>(bits)), "words");
  Tensor codes = torch::stable::new_empty(words, {n, k}, std::make_optional(ScalarType::Byte));
  unpack_cpu(words_of(words), n, k, static_cast<int>(bits), static_cast<Layout>(layout),
             static_cast<uint8_t*>(codes.mutable_data_ptr()), torch_threads());
  return codes;
}

Tensor repack(const Tensor& words, int64_t n, int64_t k, int64_t bits, int64_t layout, int64_t new_layout) {
  check_grid(n, k, bits, -1, layout);
  check_grid(n, k, bits, -1, new_layout);
  check_buffer(words, words, ScalarType::Int, packed_words(n, k, static_cast<int>(bits)), "words");
  Tensor out = torch::stable::new_empty(words, {words.numel()}, std::make_optional(ScalarType::Int));
  repack_cpu(words_of(words), static_cast<Layout>(layout), static_cast<uint32_t*>(out.mutable_data_ptr()),
             static_cast<Layout>(new_layout), n, k, static_cast<int>(bits), torch_threads());
  return out;
}

Tensor pack_dense(const Tensor& codes, int64_t bits) {
  STD_TORCH_CHECK(codes.dim() == 2 && bits >= 1 && bits <= 8, "pack_dense: codes must be [rows, count], 1 to 8 bits");
  const int64_t rows = codes.size(0), count = codes.size(1);
  check_buffer(codes, codes, ScalarType::Byte, rows * count, "codes");
  Tensor words = torch::stable::new_empty(codes, {rows, dense_words(count, static_cast<int>(bits))},
                                          std::make_optional(ScalarType::Int));
  const bool fits = pack_dense_cpu(bytes_of(codes), rows, count, static_cast<int>(bits),
                                   static_cast<uint32_t*>(words.mutable_data_ptr()), torch_threads());
  STD_TORCH_CHECK(fits, "pack_dense: codes must be below 2^num_bits = ", 1 << bits);
  return words;
}

Tensor unpack_dense(const Tensor& words, int64_t count, int64_t bits) {
  STD_TORCH_CHECK(words.dim() == 2 && bits >= 1 && bits <= 8 && count >= 0, "unpack_dense: words must be [rows, words]");
  const int64_t rows = words.size(0);
  check_buffer(words, words, ScalarType::Int, rows * dense_words(count, static_cast<int>(bits)), "words");
  Tensor codes = torch::stable::new_empty(words, {rows, count}, std::make_optional(ScalarType::Byte));
  unpack_dense_cpu(words_of(words), rows, count, static_cast<int>(bits), static_cast<uint8_t*>(codes.mutable_data_ptr()),
                   torch_threads());
  return codes;
}

void dequantize_into(Tensor out, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point,
                     int64_t n, int64_t k, int64_t bits, int64_t group_size, int64_t layout, int64_t row_begin,
                     int64_t row_end) {
  check_weight(words, scale, zero_point, n, k, bits, group_size, layout);
  STD_TORCH_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= n && row_begin % kTileRows == 0,
                  "dequantize_packed: rows must be a range from a multiple of 16, got ", row_begin, " to ", row_end);
  STD_TORCH_CHECK(out.is_cpu() && out.is_contiguous() && out.dim() == 2 && out.size(0) == row_end - row_begin && out.size(1) == k,
                  "dequantize_packed: out must be contiguous [", row_end - row_begin, ", ", k, "] on the CPU");
  CpuDequantize call{};
  call.words = words_of(words);
  call.layout = static_cast<Layout>(layout);
  call.scale = scale.const_data_ptr();
  call.scale_type = float_type(scale, "scale");
  call.zero_point = bytes_of(zero_point);
  call.row_begin = row_begin;
  call.row_end = row_end;
  call.k = k;
  call.bits = static_cast<int>(bits);
  call.group_size = group_size == -1 ? 0 : group_size;
  call.type = float_type(out, "dtype");
  call.out = out.mutable_data_ptr();
  if (row_end > row_begin) dequantize_cpu(call, torch_threads());
}

Tensor dequantize(const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t n,
                  int64_t k, int64_t bits, int64_t group_size, int64_t layout, int64_t row_begin, int64_t row_end,
                  ScalarType type) {
  check_weight(words, scale, zero_point, n, k, bits, group_size, layout);
  STD_TORCH_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= n, "dequantize_packed: rows must be a range, got ",
                  row_begin, " to ", row_end);
  Tensor out = torch::stable::new_empty(words, {row_end - row_begin, k}, std::make_optional(type));
  dequantize_into(out, words, scale, zero_point, n, k, bits, group_size, layout, row_begin, row_end);
  return out;
}

Tensor read_memory(const Tensor& t, int64_t streams, bool prefetch) {
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && bytes % 4096 == 0, "read_memory: needs contiguous pages");
  STD_TORCH_CHECK(streams == 1 || streams == 4, "read_memory: 1 stream or 4, got ", streams);
  Tensor out = torch::stable::new_empty(t, {1}, std::make_optional(ScalarType::Int));
  *static_cast<uint32_t*>(out.mutable_data_ptr()) =
      read_memory_cpu(t.const_data_ptr(), bytes, static_cast<int>(streams), prefetch, torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(discquant, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&linear));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("repack", TORCH_BOX(&repack));
  m.impl("pack_dense", TORCH_BOX(&pack_dense));
  m.impl("unpack_dense", TORCH_BOX(&unpack_dense));
  m.impl("dequantize_packed", TORCH_BOX(&dequantize));
  m.impl("dequantize_packed_into", TORCH_BOX(&dequantize_into));
  m.impl("read_memory", TORCH_BOX(&read_memory));
}

}  // namespace packed
}  // namespace discquant
