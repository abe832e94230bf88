// Normalisation and ReLU on CPU tensors, images as [B, H, W, C] contiguous; schemas are in
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

// Weights or biases of the channels in float32, or nothing.
std::optional<Tensor> floats_of(const std::optional<Tensor>& given, const Tensor& x,
                                const char* name) {
  if (!given.has_value()) return std::nullopt;
  const Tensor floats = contiguous(torch::stable::to(*given, ScalarType::Float));
  STD_TORCH_CHECK(floats.dim() == 1 && floats.size(0) == x.size(3), "norm_relu: ", name,
                  " must be [C]");
  return floats;
}

// The groups of pixels that have statistics of their own, all or an image each, and the parts of
// each group, which no number of threads changes.
struct Parts {
  int64_t channels;
  int64_t groups;
  // of a group
  int64_t pixels;
  int64_t size;

  Parts(const Tensor& x, bool by_image)
      : channels(x.size(3)),
        groups(by_image ? x.size(0) : 1),
        pixels(x.numel() / (channels * groups)),
        size(cpu::part_pixels(channels)) {}

  int64_t of_group() const { return (pixels + size - 1) / size; }
  int64_t count() const { return groups * of_group(); }

  // Calls run(part, its group, its first value, its number of pixels) for each, in threads.
  template <typename Run>
  void for_each(const Run& run) const {
    parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t group = part / of_group(), first = part % of_group() * size;
        run(part, group, (group * pixels + first) * channels, std::min(size, pixels - first));
      }
    });
  }

  // A number for each channel of each group.
  Tensor new_floats(const Tensor& x) const {
    return new_empty(x, {groups, channels}, ScalarType::Float);
  }

  // Numbers as `new_floats` makes them.
  const float* floats(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                        tensor.dim() == 2 && tensor.size(0) == groups && tensor.size(1) == channels,
                    "norm_relu: ", name, " must be [1, C] float32, or [B, C] by image");
    return tensor.const_data_ptr<float>();
  }
};

// What makes y of x, in memory of its own.
struct Layer {
  Tensor factor;
  Tensor shift;
  cpu::Normalisation norm;

  Layer(const Tensor& x, const Parts& parts, const Tensor& mean, const Tensor& variance,
        const std::optional<Tensor>& any_weight, const std::optional<Tensor>& any_bias, double eps,
        double negative_slope)
      : factor(parts.new_floats(x)), shift(parts.new_floats(x)) {
    const std::optional<Tensor> weight = floats_of(any_weight, x, "weight");
    const std::optional<Tensor> bias = floats_of(any_bias, x, "bias");
    const float* const w = weight ? weight->const_data_ptr<float>() : nullptr;
    const float* const b = bias ? bias->const_data_ptr<float>() : nullptr;
    const float *const of_mean = parts.floats(mean, "mean"), *const of_variance =
                                                                 parts.floats(variance, "var");
    float *const f = factor.mutable_data_ptr<float>(), *const s = shift.mutable_data_ptr<float>();
    for (int64_t i = 0; i < parts.groups * parts.channels; ++i) {
      const int64_t k = i % parts.channels;
      f[i] = static_cast<float>((w == nullptr ? 1.0 : w[k]) / std::sqrt(of_variance[i] + eps));
      s[i] = b == nullptr ? 0.0f : b[k];
    }
    norm = {of_mean, f, s, static_cast<float>(negative_slope),
            parts.groups > 1 ? parts.channels : 0};
  }
};

std::tuple<Tensor, Tensor> statistics_of(const Tensor& x, const Parts& parts) {
  const int64_t a_part = 3 * parts.channels;
  const Tensor sums = new_empty(x, {parts.count(), a_part}, ScalarType::Double);
  double* const sums_data = sums.mutable_data_ptr<double>();
  for_dtype(x, "norm_relu: x", [&](auto dtype) {
    using Float = decltype(dtype);
    const auto* const from = bits<Float>(x);
    parts.for_each([&](int64_t part, int64_t, int64_t first, int64_t pixels) {
      cpu::moments<Float>(from + first, pixels, parts.channels, sums_data + part * a_part);
    });
  });
  const Tensor mean = parts.new_floats(x), variance = parts.new_floats(x);
  float *const to_mean = mean.mutable_data_ptr<float>(), *const to_variance =
                                                             variance.mutable_data_ptr<float>();
  for (int64_t group = 0; group < parts.groups; ++group) {
    const int64_t at = group * parts.channels;
    cpu::statistics(sums_data + group * parts.of_group() * a_part, parts.pixels, parts.channels,
                    to_mean + at, to_variance + at);
  }
  return {mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_relu_cpu(const Tensor& x,
                                                         const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& bias,
                                                         double eps, double negative_slope,
                                                         bool by_image, bool pool) {
  check_images(x, x, "x");
  STD_TORCH_CHECK(!pool || negative_slope == 0, "norm_relu: pool must go with negative_slope 0");
  const Parts parts(x, by_image);
  const auto [mean, variance] = statistics_of(x, parts);
  const Layer layer(x, parts, mean, variance, weight, bias, eps, negative_slope);
  const cpu::Images images{x.size(1), x.size(2), x.size(3)};
  const Tensor y = new_empty(x, x.sizes());
  const Tensor pooled =
      pool ? new_empty(x, {x.size(0), images.height / 2, images.width / 2, images.channels})
           : new_empty(x, {0});
  for_dtype(x, "norm_relu: x", [&](auto dtype) {
    using Float = decltype(dtype);
    parallel_for(0, x.size(0) * images.row_pairs(), grain(2 * images.row()),
                 [&](int64_t begin, int64_t end) {
                   cpu::norm_relu<Float>(bits<Float>(x), layer.norm, mutable_bits<Float>(y),
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
                                                     double eps, double negative_slope,
                                                     bool by_image, bool is_masked, bool need_x) {
  check_images(x, x, "x");
  check_images(grad, x, "grad");
  const Parts parts(x, by_image);
  const Layer layer(x, parts, mean, variance, weight, bias, eps, negative_slope);
  const int64_t channels = parts.channels, a_part = 2 * channels;
  const Tensor sums = new_empty(x, {parts.count(), a_part}, ScalarType::Double);
  double* const sums_data = sums.mutable_data_ptr<double>();
  for_dtype(x, "norm_relu: x", [&](auto dtype) {
    using Float = decltype(dtype);
    const auto *const from = bits<Float>(grad), *const of_x = bits<Float>(x);
    parts.for_each([&](int64_t part, int64_t group, int64_t first, int64_t pixels) {
      cpu::gradient_sums<Float>(from + first, of_x + first, layer.norm.of(group), is_masked, pixels,
                                channels, sums_data + part * a_part);
    });
  });
  const Tensor grad_weight = new_empty(x, {channels}, ScalarType::Float);
  const Tensor grad_bias = new_empty(x, {channels}, ScalarType::Float);
  const Tensor slope = parts.new_floats(x), offset = parts.new_floats(x);
  float *const to_weight = grad_weight.mutable_data_ptr<float>(),
               *const to_bias = grad_bias.mutable_data_ptr<float>(),
               *const to_slope = slope.mutable_data_ptr<float>(),
               *const to_offset = offset.mutable_data_ptr<float>();
  const float* const of_variance = variance.const_data_ptr<float>();
  const double count = static_cast<double>(parts.pixels);
  for (int64_t k = 0; k < channels; ++k) {
    double of_all = 0, of_all_normalised = 0;
    for (int64_t group = 0; group < parts.groups; ++group) {
      double sum = 0, product = 0;
      for (int64_t part = 0; part < parts.of_group(); ++part) {
        const double* const sums_of = sums_data + (group * parts.of_group() + part) * a_part + k;
        sum += sums_of[0];
        product += sums_of[channels];
      }
      const int64_t i = group * channels + k;
      const double inv_var = 1 / (of_variance[i] + eps), factor = layer.norm.factor[i];
      of_all += sum;
      of_all_normalised += product * std::sqrt(inv_var);
      to_slope[i] = static_cast<float>(factor * inv_var * product / count);
      to_offset[i] = static_cast<float>(factor * sum / count);
    }
    to_bias[k] = static_cast<float>(of_all);
    to_weight[k] = static_cast<float>(of_all_normalised);
  }
  const Tensor grad_x = need_x ? new_empty(x, x.sizes()) : new_empty(x, {0});
  if (need_x) {
    for_dtype(x, "norm_relu: x", [&](auto dtype) {
      using Float = decltype(dtype);
      const auto *const from = bits<Float>(grad), *const of_x = bits<Float>(x);
      auto* const to = mutable_bits<Float>(grad_x);
      parts.for_each([&](int64_t, int64_t group, int64_t first, int64_t pixels) {
        const int64_t at = group * channels;
        cpu::norm_relu_bwd<Float>(from + first, of_x + first, layer.norm.of(group), is_masked,
                                  to_slope + at, to_offset + at, to + first, pixels, channels);
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
