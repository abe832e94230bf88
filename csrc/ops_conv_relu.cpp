// What surrounds a convolution on CPU tensors, [B, H, W, C] contiguous; schemas are in
// fastunet/ops/conv_relu/op.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops_pixels.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

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

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("relu_pool_", TORCH_BOX(&fastunet::relu_pool_cpu));
  m.impl("relu_pool_bwd", TORCH_BOX(&fastunet::relu_pool_bwd_cpu));
}
