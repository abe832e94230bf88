// What surrounds a convolution on CPU tensors, [B, H, W, C] contiguous, and one of few channels;
// schemas are in fastunet/ops/conv_relu/op.py and few_channels.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/conv_amx.h"
#include "cpu/conv_few.h"
#include "ops_pixels.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

// of an input; a line of a tile holds 32 values, and a run of three pixels has to fit
constexpr int64_t kFewChannels = 7;

cpu::Images images_of(const Tensor& y) {
  STD_TORCH_CHECK(y.dim() == 4 && y.is_contiguous(),
                  "relu_pool: y must be [B, H, W, C] contiguous");
  return {y.size(1), y.size(2), y.size(3)};
}

Tensor relu_pool_cpu(const Tensor& y, bool pool) {
  const cpu::Images images = images_of(y);
  const Tensor pooled =
      pool ? new_empty(y, {y.size(0), images.height / 2, images.width / 2, images.channels})
           : new_empty(y, {0});
  if (y.numel() == 0) return pooled;
  for_dtype(y, "relu_pool: y", [&](auto dtype) {
    using Float = decltype(dtype);
    auto* const into = mutable_bits<Float>(pooled);
    parallel_for(0, y.size(0) * images.row_pairs(), grain(2 * images.row()),
                 [&](int64_t begin, int64_t end) {
                   cpu::relu_pool<Float>(mutable_bits<Float>(y), into, images, begin, end);
                 });
  });
  return pooled;
}

Tensor relu_pool_bwd_cpu(const Tensor& any_grad_y, const std::optional<Tensor>& any_grad_pooled,
                         const Tensor& y) {
  const cpu::Images images = images_of(y);
  const Tensor grad_y = contiguous(any_grad_y);
  const Tensor grad_pooled =
      any_grad_pooled.has_value() ? contiguous(*any_grad_pooled) : new_empty(y, {0});
  for (const Tensor& grad : {grad_y, grad_pooled}) {
    STD_TORCH_CHECK(grad.scalar_type() == y.scalar_type(), "relu_pool_bwd: dtypes differ");
  }
  const int64_t blocks = y.size(0) * (images.height / 2) * (images.width / 2) * images.channels;
  STD_TORCH_CHECK(grad_y.numel() == y.numel() &&
                      (!any_grad_pooled.has_value() || grad_pooled.numel() == blocks),
                  "relu_pool_bwd: shapes differ");
  const Tensor grad = new_empty(y, y.sizes());
  if (y.numel() == 0) return grad;
  for_dtype(y, "relu_pool: y", [&](auto dtype) {
    using Float = decltype(dtype);
    const auto* const pooled =
        blocks > 0 && any_grad_pooled.has_value() ? bits<Float>(grad_pooled) : nullptr;
    parallel_for(0, y.size(0) * images.row_pairs(), grain(2 * images.row()),
                 [&](int64_t begin, int64_t end) {
                   cpu::relu_pool_bwd<Float>(bits<Float>(grad_y), pooled, bits<Float>(y),
                                             mutable_bits<Float>(grad), images, begin, end);
                 });
  });
  return grad;
}

// Takes weights and images of their dtype to results of it.
template <typename Value>
void run_few(cpu::ConvFew& conv, const Tensor& x, const Tensor& weight, const Tensor& y) {
  conv.take(static_cast<const Value*>(weight.const_data_ptr()));
  const auto* const from = static_cast<const Value*>(x.const_data_ptr());
  auto* const to = static_cast<Value*>(y.mutable_data_ptr());
  parallel_for(0, x.size(0) * conv.out_height(), grain(conv.out_width() * conv.c_out),
               [&](int64_t begin, int64_t end) { cpu::conv_few(conv, from, to, begin, end); });
}

Tensor conv_few_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& any_bias,
                    int64_t padding, bool relu) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || (dtype == ScalarType::BFloat16 && cpu::has_amx()),
                  "conv_few: x must be float32, or bfloat16 where there is AMX");
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && x.numel() > 0 && x.size(3) <= kFewChannels,
                  "conv_few: x must be [B, H, W, C] contiguous, of few channels");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.scalar_type() == dtype &&
                      weight.size(0) > 0 && weight.size(1) == 3 && weight.size(2) == 3 &&
                      weight.size(3) == x.size(3),
                  "conv_few: weight must be [C_out, 3, 3, C] contiguous as x");
  STD_TORCH_CHECK(dtype != ScalarType::Float || weight.size(0) % cpu::kChannelGroup == 0,
                  "conv_few: in float32 C_out must be a multiple of ", cpu::kChannelGroup);
  cpu::ConvFew conv{x.size(3), x.size(1), x.size(2), padding, weight.size(0), relu};
  STD_TORCH_CHECK(padding >= 0 && conv.out_height() > 0 && conv.out_width() > 0,
                  "conv_few: x is smaller than the weights");
  conv.bias.resize(cpu::ceil_div(conv.c_out, 32) * 32);
  if (any_bias.has_value()) {
    STD_TORCH_CHECK(any_bias->numel() == conv.c_out, "conv_few: bias must be [C_out]");
    const Tensor bias = contiguous(torch::stable::to(*any_bias, ScalarType::Float));
    std::copy_n(bias.const_data_ptr<float>(), conv.c_out, conv.bias.data());
  }
  const Tensor y = new_empty(x, {x.size(0), conv.out_height(), conv.out_width(), conv.c_out});
  if (dtype == ScalarType::Float) {
    run_few<float>(conv, x, weight, y);
  } else {
    run_few<cpu::Bits16>(conv, x, weight, y);
  }
  return y;
}

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("relu_pool_", TORCH_BOX(&fastunet::relu_pool_cpu));
  m.impl("relu_pool_bwd", TORCH_BOX(&fastunet::relu_pool_bwd_cpu));
  m.impl("conv_few", TORCH_BOX(&fastunet::conv_few_cpu));
}
