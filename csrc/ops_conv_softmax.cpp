// The 1x1 head with its softmax or argmax on CPU tensors, images as [B, H, W, C] contiguous;
// schemas are in fastunet/ops/conv_softmax/op.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/conv_softmax.h"
#include "ops_pixels.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kMostLabels = 256;

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && x.numel() > 0,
                  "conv_softmax: x must be [B, H, W, C] contiguous, with pixels");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == x.scalar_type() &&
                      weight.size(0) > 0 && weight.numel() == weight.size(0) * x.size(3),
                  "conv_softmax: weight must be [K, C, 1, 1] as x");
  STD_TORCH_CHECK(!bias.has_value() || (bias->scalar_type() == x.scalar_type() &&
                                        bias->dim() == 1 && bias->size(0) == weight.size(0)),
                  "conv_softmax: bias must be [K] as x");
}

template <typename Float>
cpu::Head head_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor weights = contiguous(weight);
  const std::optional<Tensor> biases =
      bias.has_value() ? std::optional(contiguous(*bias)) : std::nullopt;
  return cpu::Head::of<Float>(bits<Float>(weights), biases ? bits<Float>(*biases) : nullptr,
                              weight.size(0), x.size(3));
}

// Calls run(Float(), head, pixels of an image, begin, end) for chunks of pixels, in threads.
template <typename Run>
void for_pixels(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const Run& run) {
  for_dtype(x, "conv_softmax: x", [&](auto dtype) {
    const cpu::Head head = head_of<decltype(dtype)>(x, weight, bias);
    const int64_t pixels = x.size(1) * x.size(2), chunk = cpu::head_chunk_pixels(head.classes);
    const int64_t chunks = x.size(0) * ((pixels + chunk - 1) / chunk);
    parallel_for(0, chunks, grain(chunk * head.channels),
                 [&](int64_t begin, int64_t end) { run(dtype, head, pixels, begin, end); });
  });
}

Tensor conv_softmax_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight, bias);
  const Tensor y =
      new_empty(x, {x.size(0), weight.size(0), x.size(1), x.size(2)}, ScalarType::Float);
  for_pixels(x, weight, bias,
             [&](auto dtype, const cpu::Head& head, int64_t pixels, int64_t begin, int64_t end) {
               using Float = decltype(dtype);
               cpu::conv_softmax<Float>(bits<Float>(x), head, pixels, y.mutable_data_ptr<float>(),
                                        begin, end);
             });
  return y;
}

Tensor conv_argmax_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, weight, bias);
  STD_TORCH_CHECK(weight.size(0) <= kMostLabels, "conv_argmax: at most ", kMostLabels, " classes");
  const Tensor labels = new_empty(x, {x.size(0), x.size(1), x.size(2)}, ScalarType::Byte);
  for_pixels(x, weight, bias,
             [&](auto dtype, const cpu::Head& head, int64_t pixels, int64_t begin, int64_t end) {
               using Float = decltype(dtype);
               cpu::conv_argmax<Float>(bits<Float>(x), head, pixels,
                                       labels.mutable_data_ptr<uint8_t>(), begin, end);
             });
  return labels;
}

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("conv_softmax_pixels", TORCH_BOX(&fastunet::conv_softmax_cpu));
  m.impl("conv_argmax_pixels", TORCH_BOX(&fastunet::conv_argmax_cpu));
}
