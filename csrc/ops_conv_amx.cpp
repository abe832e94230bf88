// Convolutions on AMX of bfloat16 CPU tensors, [B, C, H, W] with their channels next to each other;
// results are [B, H, W, C] contiguous. Schemas are in fastunet/ops/_amx.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/conv_amx.h"
#include "cpu/grad_weight_amx.h"
#include "ops.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

bool has_amx() { return cpu::has_amx(); }

const cpu::Bits16* bits(const Tensor& tensor) {
  return static_cast<const cpu::Bits16*>(tensor.const_data_ptr());
}

cpu::Bits16* mutable_bits(const Tensor& tensor) {
  return static_cast<cpu::Bits16*>(tensor.mutable_data_ptr());
}

void check(const Tensor& tensor, int64_t rank, const char* name) {
  STD_TORCH_CHECK(cpu::has_amx(), "conv_amx: this processor has no AMX");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16 && tensor.dim() == rank,
                  "conv_amx: ", name, " must be bfloat16 of rank ", rank);
}

cpu::Pixels pixels(const Tensor& image, const char* name) {
  check(image, 4, name);
  STD_TORCH_CHECK(image.numel() > 0, "conv_amx: ", name, " must have pixels and channels");
  STD_TORCH_CHECK(image.size(1) == 1 || image.stride(1) == 1, "conv_amx: ", name,
                  " must have its channels next to each other");
  return {bits(image), image.size(1), image.stride(0), image.stride(2), image.stride(3)};
}

bool has_taps(const Tensor& weight) {
  return weight.size(2) == 3 && weight.size(3) == 3 && weight.stride(2) == 3 * weight.stride(3);
}

void set_bias(cpu::ConvAmx& conv, const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return;
  check(*bias, 1, "bias");
  STD_TORCH_CHECK(bias->size(0) == conv.c_out && bias->is_contiguous(),
                  "conv_amx: bias must be contiguous, one value an output channel");
  conv.bias = bits(*bias);
}

void set_mask(cpu::ConvAmx& conv, const std::optional<Tensor>& mask, const Tensor& output) {
  if (!mask.has_value()) return;
  check(*mask, 4, "mask");
  STD_TORCH_CHECK(mask->is_contiguous(), "conv_amx: mask must be [B, H, W, C] contiguous");
  for (int64_t axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(mask->size(axis) == output.size(axis), "conv_amx: mask must be as the output");
  }
  conv.mask = bits(*mask);
}

void check_padding(int64_t padding) {
  STD_TORCH_CHECK(padding == 0 || padding == 1, "conv_amx: padding must be 0 or 1");
}

// A new tensor for the output, [B, H, W, C].
Tensor new_output(cpu::ConvAmx& conv, const Tensor& like) {
  const int64_t height = conv.out_height(), width = conv.out_width();
  STD_TORCH_CHECK(height > 0 && width > 0, "conv_amx: too few pixels");
  const Tensor y = new_empty(like, {like.size(0), height, width, conv.c_out});
  conv.y = mutable_bits(y);
  return y;
}

void run(cpu::ConvAmx& conv, const Tensor& like) {
  const int64_t images = like.size(0), threads = torch::stable::get_num_threads();
  const cpu::Tasks tasks(conv, images, threads);
  const Tensor packed = new_empty(like, {tasks.pack_weights ? 0 : conv.packed_size()});
  if (!tasks.pack_weights) {
    parallel_for(0, 2 * conv.out_blocks(), 1, [&](int64_t begin, int64_t end) {
      cpu::pack_weights(conv, begin, end, mutable_bits(packed) + begin * conv.packed_group());
    });
    conv.packed = bits(packed);
  }
  parallel_for(0, images * tasks.bands * tasks.channel_parts, 1,
               [&](int64_t begin, int64_t end) { cpu::conv_amx(conv, tasks, begin, end); });
}

std::tuple<Tensor, Tensor> conv_relu_amx(const Tensor& x, const std::optional<Tensor>& skip,
                                         const Tensor& weight, const std::optional<Tensor>& bias,
                                         int64_t padding, bool pool, bool relu) {
  check_padding(padding);
  cpu::ConvAmx conv = {};
  if (skip.has_value()) {
    conv.inputs[conv.n_inputs++] = pixels(*skip, "skip");
    for (const int64_t axis : {0, 2, 3}) {
      STD_TORCH_CHECK(skip->size(axis) == x.size(axis), "conv_amx: skip must be cropped to x");
    }
  }
  conv.inputs[conv.n_inputs++] = pixels(x, "x");
  conv.height = x.size(2);
  conv.width = x.size(3);
  conv.padding = padding;
  check(weight, 4, "weight");
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) == conv.c_in() && has_taps(weight),
                  "conv_amx: weight must be [C_out, ", conv.c_in(),
                  ", 3, 3] with its taps in order");
  conv.c_out = weight.size(0);
  conv.relu = relu;
  const Tensor y = new_output(conv, x);
  set_bias(conv, bias);
  const int64_t height = conv.out_height() / 2, width = conv.out_width() / 2;
  const Tensor pooled =
      pool ? new_empty(x, {x.size(0), height, width, conv.c_out}) : new_empty(x, {0});
  if (pooled.numel() > 0) conv.pooled = mutable_bits(pooled);
  conv.weights = {bits(weight), weight.stride(0), weight.stride(3), weight.stride(1)};
  run(conv, x);
  return {y, pooled};
}

// The gradient of x, zero where mask, [B, H, W, C], is not above zero.
Tensor conv_grad_amx(const Tensor& grad, const Tensor& weight, int64_t padding,
                     const std::optional<Tensor>& mask) {
  check_padding(padding);
  cpu::ConvAmx conv = {};
  conv.inputs[conv.n_inputs++] = pixels(grad, "grad");
  conv.height = grad.size(2);
  conv.width = grad.size(3);
  conv.padding = 2 - padding;
  check(weight, 4, "weight");
  STD_TORCH_CHECK(weight.size(0) == conv.c_in() && weight.size(1) > 0 && has_taps(weight),
                  "conv_amx: weight must be [", conv.c_in(), ", C, 3, 3] with its taps in order");
  conv.c_out = weight.size(1);
  const Tensor grad_x = new_output(conv, grad);
  set_mask(conv, mask, grad_x);
  // taps from the last to the first
  conv.weights = {bits(weight) + 8 * weight.stride(3), weight.stride(1), -weight.stride(3),
                  weight.stride(0)};
  run(conv, grad);
  return grad_x;
}

// The gradients of the weights, [C_out, 3, 3, C], and of the bias.
std::tuple<Tensor, Tensor> grad_weight_amx(const Tensor& grad, const Tensor& x, int64_t padding) {
  check_padding(padding);
  cpu::GradWeightAmx work = {};
  work.x = pixels(x, "x");
  work.grad = pixels(grad, "grad");
  work.images = x.size(0);
  work.height = x.size(2);
  work.width = x.size(3);
  work.padding = padding;
  STD_TORCH_CHECK(grad.size(0) == work.images && grad.size(2) == work.out_height() &&
                      grad.size(3) == work.out_width(),
                  "conv_amx: grad must be [", work.images, ", C_out, ", work.out_height(), ", ",
                  work.out_width(), "]");
  const int64_t c_out = grad.size(1);
  const Tensor weight = new_empty(x, {c_out, 3, 3, x.size(1)}), bias = new_empty(x, {c_out});
  work.weight = mutable_bits(weight);
  work.bias = mutable_bits(bias);
  const cpu::GradWeightTasks tasks(work, torch::stable::get_num_threads());
  const Tensor sums = new_empty(x, {tasks.parts, tasks.part_sums}, ScalarType::Float);
  float* const sums_data = sums.mutable_data_ptr<float>();
  parallel_for(0, tasks.parts * tasks.channel_parts, 1, [&](int64_t begin, int64_t end) {
    cpu::grad_weight_amx(work, tasks, begin, end, sums_data);
  });
  parallel_for(0, work.out_blocks(), 1, [&](int64_t begin, int64_t end) {
    cpu::add_parts(work, tasks, sums_data, begin, end);
  });
  return {weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunet, CompositeExplicitAutograd, m) {
  m.impl("has_amx", TORCH_BOX(&has_amx));
}

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("conv_relu_amx", TORCH_BOX(&conv_relu_amx));
  m.impl("conv_grad_amx", TORCH_BOX(&conv_grad_amx));
  m.impl("grad_weight_amx", TORCH_BOX(&grad_weight_amx));
}

}  // namespace fastunet
