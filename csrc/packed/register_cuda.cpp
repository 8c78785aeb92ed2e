// SPDX-License-Identifier: Apache-2.0
// CUDA operators of the packed formats through torch's stable ABI; empty in a build without CUDA.
#if defined(DISCQUANT_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "packed/gpu_linear.h"
#include "packed/register_checks.h"

// Not in a stable header yet. Weak, so that the library also loads into a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace discquant {
namespace packed {
namespace {

CUstream_st* stream_of(const Tensor& t) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "packed: this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

// Asynchronous copies take 16 bytes at a time.
void check_aligned(const void* p, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, "packed: ", name, " must start at a multiple of 16 bytes");
}

void check_launch(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, op, ": the CUDA launch failed with error ", status);
}

int64_t workspace_words(const Tensor& words, int64_t n, int64_t k) {
  return gpu_workspace_words(n, k, gpu_device(words.get_device_index()));
}

// What both kernels want of their arguments. `y` is made here.
GpuLinear prepare(const char* op, const Tensor& x, const Tensor& words, const Tensor& scale,
                  const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias, Tensor& y, int64_t n,
                  int64_t k, int64_t bits, int64_t group_size) {
  check_weight(words, scale, zero_point, n, k, bits, group_size, kLayoutMma);
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2 && x.size(1) == k && x.get_device_index() == words.get_device_index(),
                  op, ": x must be [tokens, ", k, "] on the device of words");
  const DType type = float_type(x, "x");
  STD_TORCH_CHECK(type != DType::kFloat32, op, ": x must be float16 or bfloat16 on a GPU");
  STD_TORCH_CHECK(x.stride(1) == 1 && x.stride(0) % 8 == 0 && k % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  op, ": rows of x must be 16-byte aligned");
  STD_TORCH_CHECK(x.size(0) < (int64_t{1} << 21), op, ": x must have below 2^21 rows");
  if (bias) check_buffer(*bias, x, x.scalar_type(), n, "bias");
  y = torch::stable::new_empty(x, {x.size(0), n}, std::make_optional(x.scalar_type()));
  GpuLinear call{};
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.type = type;
  call.tokens = static_cast<int>(x.size(0));
  call.words = words_of(words);
  call.scale = scale.const_data_ptr();
  call.scale_type = float_type(scale, "scale");
  call.zero_point = bytes_of(zero_point);
  call.bias = bias ? bias->const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.out_features = n;
  call.in_features = k;
  call.bits = static_cast<int>(bits);
  call.group_size = group_size == -1 ? 0 : static_cast<int>(group_size);
  call.device = gpu_device(x.get_device_index());
  check_aligned(call.words, "words");
  check_aligned(call.scale, "scale");
  check_aligned(call.zero_point, "zero_point");
  return call;
}

Tensor linear(const Tensor& x, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point,
              const std::optional<Tensor>& bias, Tensor workspace, int64_t n, int64_t k, int64_t bits,
              int64_t group_size, bool exact, bool batch_invariant, bool settled) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y;
  GpuLinear call = prepare("packed_linear", x, words, scale, zero_point, bias, y, n, k, bits, group_size);
  const int64_t needed = workspace_words(words, n, k);
  STD_TORCH_CHECK(needed > 0 || n == 0, "packed_linear: a weight of ", n, " x ", k, " is too large for this kernel");
  STD_TORCH_CHECK(workspace.is_cuda() && words.get_device_index() == workspace.get_device_index() &&
                      workspace.is_contiguous() && workspace.scalar_type() == ScalarType::Int &&
                      workspace.numel() >= needed,
                  "packed_linear: workspace must hold at least ", needed, " words");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()) % 16 == 0,
                  "packed_linear: workspace must be 16-byte aligned");
  call.workspace = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  call.settled_weight = settled;
  call.batch_invariant = batch_invariant;
  check_launch(packed_linear_gpu(call, exact, stream_of(x)), "packed_linear");
  return y;
}

Tensor prefill(const Tensor& x, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point,
               const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y;
  const GpuLinear call = prepare("packed_linear_prefill", x, words, scale, zero_point, bias, y, n, k, bits, group_size);
  STD_TORCH_CHECK(call.scale_type == call.type, "packed_linear_prefill: scale must have the dtype of x");
  check_launch(packed_prefill_gpu(call, stream_of(x)), "packed_linear_prefill");
  return y;
}

int64_t prefill_splits(const Tensor& x, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y;
  int splits = 0;
  const auto call = prepare("packed_prefill_splits", x, words, scale, zero_point, std::nullopt, y, n, k, bits, group_size);
  check_launch(prefill_splits_gpu(call, splits), "packed_prefill_splits");
  return splits;
}

int64_t capture_id(const Tensor& words) { return gpu_capture_id(stream_of(words)); }

int64_t workspace_size(const Tensor& words, int64_t n, int64_t k) { return workspace_words(words, n, k); }

Tensor pack(const Tensor& codes, const std::optional<Tensor>& zero_point, int64_t bits, int64_t group_size,
            int64_t layout) {
  STD_TORCH_CHECK(codes.dim() == 2, "pack: codes must be [out_features, in_features]");
  const int64_t n = codes.size(0), k = codes.size(1);
  check_grid(n, k, bits, group_size, layout);
  check_buffer(codes, codes, ScalarType::Byte, n * k, "codes");
  if (zero_point) check_buffer(*zero_point, codes, ScalarType::Byte, n * group_count(k, group_size), "zero_point");
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  Tensor words = torch::stable::new_empty(codes, {packed_words(n, k, static_cast<int>(bits))},
                                          std::make_optional(ScalarType::Int));
  check_launch(pack_gpu(bytes_of(codes), bytes_of(zero_point), n, k, static_cast<int>(bits),
                        group_size == -1 ? 0 : group_size, static_cast<Layout>(layout),
                        static_cast<uint32_t*>(words.mutable_data_ptr()), stream_of(codes)),
               "pack");
  return words;
}

Tensor unpack(const Tensor& words, int64_t n, int64_t k, int64_t bits, int64_t layout) {
  check_grid(n, k, bits, -1, layout);
  check_buffer(words, words, ScalarType::Int, packed_words(n, k, static_cast<int>(bits)), "words");
  const torch::stable::accelerator::DeviceGuard guard(words.get_device_index());
  Tensor codes = torch::stable::new_empty(words, {n, k}, std::make_optional(ScalarType::Byte));
  check_launch(unpack_gpu(words_of(words), n, k, static_cast<int>(bits), static_cast<Layout>(layout),
                          static_cast<uint8_t*>(codes.mutable_data_ptr()), stream_of(words)),
               "unpack");
  return codes;
}

Tensor repack(const Tensor& words, int64_t n, int64_t k, int64_t bits, int64_t layout, int64_t new_layout) {
  check_grid(n, k, bits, -1, layout);
  check_grid(n, k, bits, -1, new_layout);
  check_buffer(words, words, ScalarType::Int, packed_words(n, k, static_cast<int>(bits)), "words");
  const torch::stable::accelerator::DeviceGuard guard(words.get_device_index());
  Tensor out = torch::stable::new_empty(words, {words.numel()}, std::make_optional(ScalarType::Int));
  check_launch(repack_gpu(words_of(words), static_cast<Layout>(layout), static_cast<uint32_t*>(out.mutable_data_ptr()),
                          static_cast<Layout>(new_layout), n, k, static_cast<int>(bits), stream_of(words)),
               "repack");
  return out;
}

Tensor dequantize(const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t n,
                  int64_t k, int64_t bits, int64_t group_size, int64_t layout, int64_t row_begin, int64_t row_end,
                  ScalarType type) {
  STD_TORCH_CHECK(layout == kLayoutMma, "dequantize_packed: layout must be 1 on a GPU, got ", layout);
  check_weight(words, scale, zero_point, n, k, bits, group_size, layout);
  STD_TORCH_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= n && row_begin % kTileRows == 0,
                  "dequantize_packed: rows must be a range from a multiple of 16, got ", row_begin, " to ", row_end);
  const torch::stable::accelerator::DeviceGuard guard(words.get_device_index());
  Tensor out = torch::stable::new_empty(words, {row_end - row_begin, k}, std::make_optional(type));
  GpuDequantize call{};
  call.words = words_of(words);
  call.scale = scale.const_data_ptr();
  call.scale_type = float_type(scale, "scale");
  call.zero_point = bytes_of(zero_point);
  call.row_begin = row_begin;
  call.row_end = row_end;
  call.k = k;
  call.bits = static_cast<int>(bits);
  call.group_size = group_size == -1 ? 0 : group_size;
  call.out = out.mutable_data_ptr();
  call.type = float_type(out, "dtype");
  check_launch(dequantize_gpu(call, stream_of(words)), "dequantize_packed");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(discquant, CUDA, m) {
  m.impl("packed_linear_mma", TORCH_BOX(&linear));
  m.impl("packed_linear_prefill", TORCH_BOX(&prefill));
  m.impl("packed_workspace_size", TORCH_BOX(&workspace_size));
  m.impl("packed_prefill_splits", TORCH_BOX(&prefill_splits));
  m.impl("packed_capture_id", TORCH_BOX(&capture_id));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("repack", TORCH_BOX(&repack));
  m.impl("dequantize_packed", TORCH_BOX(&dequantize));
}

}  // namespace packed
}  // namespace discquant
#endif
