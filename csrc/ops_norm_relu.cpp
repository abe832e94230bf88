// Batch normalisation and ReLU on CPU tensors, images as [B, H, W, C] contiguous; schemas are in
// fastunet/ops/norm_relu/op.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/norm_relu.h"
#include "ops_pixels.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

void check_images(const Tensor& images, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(images.dim() == 4 && images.is_contiguous() && images.numel() > 0,
                  "norm_relu: ", name, " must be [B, H, W, C] contiguous, with pixels");
  STD_TORCH_CHECK(images.scalar_type() == like.scalar_type() && images.numel() == like.numel(),
                  "norm_relu: ", name, " must be as x");
}

// What a channel has: one float32 each.
const float* of_channels(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.dim() == 1 && tensor.size(0) == x.size(3),
                  "norm_relu: ", name, " must be [C] float32");
  return tensor.const_data_ptr<float>();
}

// The pixels of x in parts, which no number of threads changes.
struct Parts {
  int64_t channels;
  int64_t pixels;
  int64_t size;

  explicit Parts(const Tensor& x)
      : channels(x.size(3)), pixels(x.numel() / x.size(3)), size(cpu::part_pixels(channels)) {}

  int64_t count() const { return (pixels + size - 1) / size; }

  // Calls run(part, its first value, its number of pixels) for each, in threads.
  template <typename Run>
  void for_each(const Run& run) const {
    parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        run(part, part * size * channels, std::min(size, pixels - part * size));
      }
    });
  }
};

Tensor new_floats(const Tensor& x) { return new_empty(x, {x.size(3)}, ScalarType::Float); }

// Weights or biases of the channels in float32, or nothing.
std::optional<Tensor> floats_of(const std::optional<Tensor>& given, const Tensor& x,
                                const char* name) {
  if (!given.has_value()) return std::nullopt;
  const Tensor floats = contiguous(torch::stable::to(*given, ScalarType::Float));
  of_channels(floats, x, name);
  return floats;
}

// What makes y of x, in memory of its own.
struct Layer {
  Tensor factor;
  Tensor shift;
  const float* mean;

  Layer(const Tensor& x, const Tensor& given_mean, const Tensor& variance,
        const std::optional<Tensor>& any_weight, const std::optional<Tensor>& any_bias, double eps)
      : factor(new_floats(x)), shift(new_floats(x)), mean(of_channels(given_mean, x, "mean")) {
    const std::optional<Tensor> weight = floats_of(any_weight, x, "weight");
    const std::optional<Tensor> bias = floats_of(any_bias, x, "bias");
    const float* const w = weight ? weight->const_data_ptr<float>() : nullptr;
    const float* const b = bias ? bias->const_data_ptr<float>() : nullptr;
    const float* const of_variance = of_channels(variance, x, "var");
    float *const f = factor.mutable_data_ptr<float>(), *const s = shift.mutable_data_ptr<float>();
    for (int64_t k = 0; k < x.size(3); ++k) {
      f[k] = static_cast<float>((w == nullptr ? 1.0 : w[k]) / std::sqrt(of_variance[k] + eps));
      s[k] = b == nullptr ? 0.0f : b[k];
    }
  }

  cpu::Normalisation norm() const {
    return {mean, factor.const_data_ptr<float>(), shift.const_data_ptr<float>()};
  }
};

std::tuple<Tensor, Tensor> statistics_of(const Tensor& x) {
  const Parts parts(x);
  const Tensor sums = new_empty(x, {parts.count(), 3, parts.channels}, ScalarType::Double);
  double* const sums_data = sums.mutable_data_ptr<double>();
  for_dtype(x, "norm_relu: x", [&](auto dtype) {
    using Float = decltype(dtype);
    const auto* const from = bits<Float>(x);
    parts.for_each([&](int64_t part, int64_t first, int64_t pixels) {
      cpu::moments<Float>(from + first, pixels, parts.channels,
                          sums_data + part * 3 * parts.channels);
    });
  });
  const Tensor mean = new_floats(x), variance = new_floats(x);
  cpu::statistics(sums_data, parts.pixels, parts.channels, mean.mutable_data_ptr<float>(),
                  variance.mutable_data_ptr<float>());
  return {mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_relu_cpu(const Tensor& x,
                                                         const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& bias,
                                                         double eps, bool pool) {
  check_images(x, x, "x");
  const auto [mean, variance] = statistics_of(x);
  const Layer layer(x, mean, variance, weight, bias, eps);
  const cpu::Normalisation norm = layer.norm();
  const cpu::Images images{x.size(1), x.size(2), x.size(3)};
  const Tensor y = new_empty(x, x.sizes());
  const Tensor pooled =
      pool ? new_empty(x, {x.size(0), images.height / 2, images.width / 2, images.channels})
           : new_empty(x, {0});
  for_dtype(x, "norm_relu: x", [&](auto dtype) {
    using Float = decltype(dtype);
    parallel_for(0, x.size(0) * images.row_pairs(), grain(2 * images.row()),
                 [&](int64_t begin, int64_t end) {
                   cpu::norm_relu<Float>(bits<Float>(x), norm, mutable_bits<Float>(y),
                                         mutable_bits<Float>(pooled), images, begin, end);
                 });
  });
  return {y, pooled, mean, variance};
}

// The gradients of x, unless it is not needed, of weight and of bias; the last two in float32.
std::tuple<Tensor, Tensor, Tensor> norm_relu_bwd_cpu(const Tensor& grad, const Tensor& x,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias,
                                                     const Tensor& mean, const Tensor& variance,
                                                     double eps, bool is_masked, bool need_x) {
  check_images(x, x, "x");
  check_images(grad, x, "grad");
  const Layer layer(x, mean, variance, weight, bias, eps);
  const cpu::Normalisation norm = layer.norm();
  const Parts parts(x);
  const int64_t channels = parts.channels;
  const Tensor sums = new_empty(x, {parts.count(), 2, channels}, ScalarType::Double);
  double* const sums_data = sums.mutable_data_ptr<double>();
  for_dtype(x, "norm_relu: x", [&](auto dtype) {
    using Float = decltype(dtype);
    const auto *const from = bits<Float>(grad), *const of_x = bits<Float>(x);
    parts.for_each([&](int64_t part, int64_t first, int64_t pixels) {
      cpu::gradient_sums<Float>(from + first, of_x + first, norm, is_masked, pixels, channels,
                                sums_data + part * 2 * channels);
    });
  });
  for (int64_t part = 1; part < parts.count(); ++part) {
    for (int64_t i = 0; i < 2 * channels; ++i) sums_data[i] += sums_data[part * 2 * channels + i];
  }
  const Tensor grad_weight = new_floats(x), grad_bias = new_floats(x);
  const Tensor slope = new_floats(x), offset = new_floats(x);
  float *const to_weight = grad_weight.mutable_data_ptr<float>(),
               *const to_bias = grad_bias.mutable_data_ptr<float>(),
               *const to_slope = slope.mutable_data_ptr<float>(),
               *const to_offset = offset.mutable_data_ptr<float>();
  const float* const of_variance = variance.const_data_ptr<float>();
  const double count = static_cast<double>(parts.pixels);
  for (int64_t k = 0; k < channels; ++k) {
    const double inv_var = 1 / (of_variance[k] + eps), factor = norm.factor[k];
    to_bias[k] = static_cast<float>(sums_data[k]);
    to_weight[k] = static_cast<float>(sums_data[channels + k] * std::sqrt(inv_var));
    to_slope[k] = static_cast<float>(factor * inv_var * sums_data[channels + k] / count);
    to_offset[k] = static_cast<float>(factor * sums_data[k] / count);
  }
  const Tensor grad_x = need_x ? new_empty(x, x.sizes()) : new_empty(x, {0});
  if (need_x) {
    for_dtype(x, "norm_relu: x", [&](auto dtype) {
      using Float = decltype(dtype);
      const auto *const from = bits<Float>(grad), *const of_x = bits<Float>(x);
      auto* const to = mutable_bits<Float>(grad_x);
      parts.for_each([&](int64_t, int64_t first, int64_t pixels) {
        cpu::norm_relu_bwd<Float>(from + first, of_x + first, norm, is_masked, to_slope, to_offset,
                                  to + first, pixels, channels);
      });
    });
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("norm_relu_pixels", TORCH_BOX(&fastunet::norm_relu_cpu));
  m.impl("norm_relu_pixels_bwd", TORCH_BOX(&fastunet::norm_relu_bwd_cpu));
}
