// Batch normalisation and ReLU on CPU tensors, images as [B, H, W, C] contiguous; schemas are in
// fastunet/ops/norm_relu/op.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/norm_relu.h"
#include "ops.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

void check_images(const Tensor& images, const Tensor& like, const char* name) {
  const ScalarType dtype = images.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "norm_relu: ", name,
                  " must be float32 or bfloat16");
  STD_TORCH_CHECK(images.dim() == 4 && images.is_contiguous() && images.numel() > 0,
                  "norm_relu: ", name, " must be [B, H, W, C] contiguous, with pixels");
  STD_TORCH_CHECK(dtype == like.scalar_type() && images.numel() == like.numel(),
                  "norm_relu: ", name, " must be as x");
}

// What a channel has: one float32 each.
const float* of_channels(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.dim() == 1 && tensor.size(0) == x.size(3),
                  "norm_relu: ", name, " must be [C] float32");
  return tensor.const_data_ptr<float>();
}

// Calls run(Float()) for the dtype of x.
template <typename Run>
void for_dtype(const Tensor& x, const Run& run) {
  if (x.scalar_type() == ScalarType::Float) {
    run(cpu::Float32());
  } else {
    run(cpu::BFloat16());
  }
}

template <typename Float>
const typename Float::Bits* bits(const Tensor& tensor) {
  return static_cast<const typename Float::Bits*>(tensor.const_data_ptr());
}

template <typename Float>
typename Float::Bits* mutable_bits(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr
                             : static_cast<typename Float::Bits*>(tensor.mutable_data_ptr());
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

Tensor new_floats(const Tensor& like, int64_t size, ScalarType dtype) {
  return new_empty(like, {size}, dtype);
}

std::tuple<Tensor, Tensor> batch_statistics_cpu(const Tensor& x) {
  check_images(x, x, "x");
  const Parts parts(x);
  const Tensor sums = new_floats(x, parts.count() * 3 * parts.channels, ScalarType::Double);
  double* const sums_data = sums.mutable_data_ptr<double>();
  for_dtype(x, [&](auto dtype) {
    using Float = decltype(dtype);
    const auto* const from = bits<Float>(x);
    parts.for_each([&](int64_t part, int64_t first, int64_t pixels) {
      cpu::moments<Float>(from + first, pixels, parts.channels,
                          sums_data + part * 3 * parts.channels);
    });
  });
  const Tensor mean = new_floats(x, parts.channels, ScalarType::Float);
  const Tensor variance = new_floats(x, parts.channels, ScalarType::Float);
  cpu::statistics(sums_data, parts.pixels, parts.channels, mean.mutable_data_ptr<float>(),
                  variance.mutable_data_ptr<float>());
  return {mean, variance};
}

std::tuple<Tensor, Tensor> normalised_relu_cpu(const Tensor& x, const Tensor& mean,
                                               const Tensor& factor, const Tensor& shift,
                                               bool pool) {
  check_images(x, x, "x");
  const cpu::Images images{x.size(1), x.size(2), x.size(3)};
  const cpu::Normalisation norm{of_channels(mean, x, "mean"), of_channels(factor, x, "factor"),
                                of_channels(shift, x, "shift")};
  const Tensor y = new_empty(x, x.sizes());
  const Tensor pooled =
      pool ? new_empty(x, {x.size(0), images.height / 2, images.width / 2, images.channels})
           : new_empty(x, {0});
  for_dtype(x, [&](auto dtype) {
    using Float = decltype(dtype);
    parallel_for(0, x.size(0) * images.row_pairs(), grain(2 * images.row()),
                 [&](int64_t begin, int64_t end) {
                   cpu::norm_relu<Float>(bits<Float>(x), norm, mutable_bits<Float>(y),
                                         mutable_bits<Float>(pooled), images, begin, end);
                 });
  });
  return {y, pooled};
}

// Sums over all pixels of m g and of m g (x - mean), [2, C] in float64.
Tensor norm_relu_sums_cpu(const Tensor& grad, const Tensor& x, const Tensor& mean,
                          const Tensor& factor, const Tensor& shift, bool is_masked) {
  check_images(x, x, "x");
  check_images(grad, x, "grad");
  const Parts parts(x);
  const int64_t size = 2 * parts.channels;
  const cpu::Normalisation norm{of_channels(mean, x, "mean"), of_channels(factor, x, "factor"),
                                of_channels(shift, x, "shift")};
  const Tensor sums = new_floats(x, parts.count() * size, ScalarType::Double);
  double* const sums_data = sums.mutable_data_ptr<double>();
  for_dtype(x, [&](auto dtype) {
    using Float = decltype(dtype);
    parts.for_each([&](int64_t part, int64_t first, int64_t pixels) {
      cpu::gradient_sums<Float>(bits<Float>(grad) + first, bits<Float>(x) + first, norm, is_masked,
                                pixels, parts.channels, sums_data + part * size);
    });
  });
  const Tensor total = new_empty(x, {2, parts.channels}, ScalarType::Double);
  double* const into = total.mutable_data_ptr<double>();
  std::copy_n(sums_data, size, into);
  for (int64_t part = 1; part < parts.count(); ++part) {
    for (int64_t k = 0; k < size; ++k) into[k] += sums_data[part * size + k];
  }
  return total;
}

Tensor norm_relu_grad_cpu(const Tensor& grad, const Tensor& x, const Tensor& mean,
                          const Tensor& factor, const Tensor& shift, bool is_masked,
                          const Tensor& slope, const Tensor& offset) {
  check_images(x, x, "x");
  check_images(grad, x, "grad");
  const Parts parts(x);
  const cpu::Normalisation norm{of_channels(mean, x, "mean"), of_channels(factor, x, "factor"),
                                of_channels(shift, x, "shift")};
  const float* const slopes = of_channels(slope, x, "slope");
  const float* const offsets = of_channels(offset, x, "offset");
  const Tensor grad_x = new_empty(x, x.sizes());
  for_dtype(x, [&](auto dtype) {
    using Float = decltype(dtype);
    parts.for_each([&](int64_t, int64_t first, int64_t pixels) {
      cpu::norm_relu_bwd<Float>(bits<Float>(grad) + first, bits<Float>(x) + first, norm, is_masked,
                                slopes, offsets, mutable_bits<Float>(grad_x) + first, pixels,
                                parts.channels);
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("batch_statistics", TORCH_BOX(&fastunet::batch_statistics_cpu));
  m.impl("normalised_relu", TORCH_BOX(&fastunet::normalised_relu_cpu));
  m.impl("norm_relu_sums", TORCH_BOX(&fastunet::norm_relu_sums_cpu));
  m.impl("norm_relu_grad", TORCH_BOX(&fastunet::norm_relu_grad_cpu));
}
