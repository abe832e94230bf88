#include "norm_relu.h"

#include <algorithm>
#include <vector>

#include "float_bits.h"
#include "vectorize.h"

namespace fastunet::cpu {
namespace {

// values of a part, and pixels that are summed in float before their sum is added in double
constexpr int64_t kPartValues = 1 << 15, kLeastPixels = 16, kRun = 16;
// channels at a time, whose sums stay in the nearest cache
constexpr int64_t kStrip = 64;

// Calls add(channel, pixel, sums) for each channel of a run of pixels, and adds the sums, kSums of
// them a channel, to result[kSums, channels].
template <int kSums, typename Add>
FASTUNET_INLINE void add_runs(int64_t pixels, int64_t channels, double* result, const Add& add) {
  for (int64_t first = 0; first < channels; first += kStrip) {
    const int64_t strip = std::min(kStrip, channels - first);
    for (int64_t pixel = 0; pixel < pixels; pixel += kRun) {
      const int64_t end = std::min(pixels, pixel + kRun);
      float sums[kSums][kStrip] = {};
      for (int64_t p = pixel; p < end; ++p) {
#pragma GCC ivdep
        for (int64_t k = 0; k < strip; ++k) {
          float terms[kSums];
          add(first + k, p * channels + first + k, terms);
          for (int i = 0; i < kSums; ++i) sums[i][k] += terms[i];
        }
      }
      for (int i = 0; i < kSums; ++i) {
        for (int64_t k = 0; k < strip; ++k) result[i * channels + first + k] += sums[i][k];
      }
    }
  }
}

template <typename Bits>
FASTUNET_INLINE float normalised(Bits x, float mean, float factor, float shift) {
  return (widened(x) - mean) * factor + shift;
}

template <typename Bits>
FASTUNET_INLINE float masked(Bits grad, float y, float negative_slope, bool is_masked) {
  const float given = widened(grad), below = negative_slope == 0 ? 0.0f : given * negative_slope;
  return (y > 0) | is_masked ? given : below;
}

template <typename Float, typename Bits = typename Float::Bits>
FASTUNET_INLINE Bits relu_of(float value) {
  Bits bits;
  narrow(value, &bits);
  return relu<Float>(bits);
}

template <typename Float, typename Bits = typename Float::Bits>
FASTUNET_INLINE void pixels_of_row(const Bits* x, const Normalisation& norm, Bits* y,
                                   int64_t pixels, int64_t channels) {
  const float *mean = norm.mean, *factor = norm.factor, *shift = norm.shift,
              negative_slope = norm.negative_slope;
  for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t at = p * channels + k;
      const float value = normalised(x[at], mean[k], factor[k], shift[k]);
      const float below = negative_slope == 0 ? 0.0f : value * negative_slope;
      narrow(value <= 0 ? below : value, y + at);
    }
  }
}

}  // namespace

int64_t part_pixels(int64_t channels) {
  return std::max(kLeastPixels, kPartValues / std::max<int64_t>(1, channels));
}

template <typename Float>
FASTUNET_VECTORIZED_WIDE void moments(const typename Float::Bits* x, int64_t pixels,
                                      int64_t channels, double* result) {
  std::fill_n(result, 3 * channels, 0.0);
  add_runs<1>(pixels, channels, result, [&](int64_t, int64_t at, float* terms) FASTUNET_INLINED {
    terms[0] = widened(x[at]);
  });
  std::vector<float> centres(channels);
  for (int64_t k = 0; k < channels; ++k) {
    centres[k] = static_cast<float>(result[k] / static_cast<double>(pixels));
    result[k] = centres[k];
  }
  const float* const centre = centres.data();
  add_runs<2>(pixels, channels, result + channels,
              [&](int64_t k, int64_t at, float* terms) FASTUNET_INLINED {
                const float difference = widened(x[at]) - centre[k];
                terms[0] = difference;
                terms[1] = difference * difference;
              });
}

void statistics(const double* parts, int64_t pixels, int64_t channels, float* mean,
                float* variance) {
  const int64_t size = part_pixels(channels);
  const double all = static_cast<double>(pixels);
  for (int64_t k = 0; k < channels; ++k) {
    double sum = 0, squares = 0;
    for (int64_t first = 0; first < pixels; first += size) {
      const double* const part = parts + first / size * 3 * channels + k;
      sum += static_cast<double>(std::min(size, pixels - first)) * part[0] + part[channels];
    }
    const double centre = sum / all;
    for (int64_t first = 0; first < pixels; first += size) {
      const double* const part = parts + first / size * 3 * channels + k;
      // sum of (d + a)^2 with a the distance of the part's mean from that of all
      const double a = part[0] - centre,
                   count = static_cast<double>(std::min(size, pixels - first));
      squares += part[2 * channels] + a * (2 * part[channels] + a * count);
    }
    mean[k] = static_cast<float>(centre);
    variance[k] = static_cast<float>(squares / all);
  }
}

template <typename Float>
FASTUNET_VECTORIZED_WIDE void norm_relu(const typename Float::Bits* x, const Normalisation& all,
                                        typename Float::Bits* y, typename Float::Bits* pooled,
                                        const Images& images, int64_t begin, int64_t end) {
  using Bits = typename Float::Bits;
  const int64_t row = images.row(), channels = images.channels, columns = images.width / 2;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / images.row_pairs(), pair = task % images.row_pairs();
    const Normalisation norm = all.of(image);
    // a struct's pointers would be loaded anew for each channel
    const float *mean = norm.mean, *factor = norm.factor, *shift = norm.shift;
    const int64_t start = (image * images.height + 2 * pair) * row;
    const bool whole = 2 * pair + 1 < images.height;
    if (pooled == nullptr || !whole) {
      pixels_of_row<Float>(x + start, norm, y + start, (whole ? 2 : 1) * images.width, channels);
      continue;
    }
    Bits* largest = pooled + (image * (images.height / 2) + pair) * columns * channels;
    for (int64_t column = 0; column < columns; ++column, largest += channels) {
      const int64_t left = start + 2 * column * channels, below = left + row;
      const Bits *x0 = x + left, *x1 = x0 + channels, *x2 = x + below, *x3 = x2 + channels;
      Bits *y0 = y + left, *y1 = y0 + channels, *y2 = y + below, *y3 = y2 + channels;
#pragma GCC ivdep
      for (int64_t k = 0; k < channels; ++k) {
        const float m = mean[k], f = factor[k], s = shift[k];
        const Bits a = relu_of<Float>(normalised(x0[k], m, f, s));
        const Bits b = relu_of<Float>(normalised(x1[k], m, f, s));
        const Bits c = relu_of<Float>(normalised(x2[k], m, f, s));
        const Bits d = relu_of<Float>(normalised(x3[k], m, f, s));
        y0[k] = a;
        y1[k] = b;
        y2[k] = c;
        y3[k] = d;
        largest[k] = std::max(std::max(a, b), std::max(c, d));
      }
    }
    const int64_t done = 2 * columns * channels;
    for (const int64_t rest : {start + done, start + row + done}) {
      pixels_of_row<Float>(x + rest, norm, y + rest, images.width - 2 * columns, channels);
    }
  }
}

template <typename Float>
FASTUNET_VECTORIZED_WIDE void gradient_sums(const typename Float::Bits* grad,
                                            const typename Float::Bits* x,
                                            const Normalisation& norm, bool is_masked,
                                            int64_t pixels, int64_t channels, double* result) {
  const float *mean = norm.mean, *factor = norm.factor, *shift = norm.shift,
              negative_slope = norm.negative_slope;
  std::fill_n(result, 2 * channels, 0.0);
  add_runs<2>(pixels, channels, result, [&](int64_t k, int64_t at, float* terms) FASTUNET_INLINED {
    const float y = normalised(x[at], mean[k], factor[k], shift[k]);
    terms[0] = masked(grad[at], y, negative_slope, is_masked);
    terms[1] = terms[0] * (widened(x[at]) - mean[k]);
  });
}

template <typename Float>
FASTUNET_VECTORIZED_WIDE void norm_relu_bwd(const typename Float::Bits* grad,
                                            const typename Float::Bits* x,
                                            const Normalisation& norm, bool is_masked,
                                            const float* slope, const float* offset,
                                            typename Float::Bits* grad_x, int64_t pixels,
                                            int64_t channels) {
  const float *mean = norm.mean, *factor = norm.factor, *shift = norm.shift,
              negative_slope = norm.negative_slope;
  for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t at = p * channels + k;
      const float y = normalised(x[at], mean[k], factor[k], shift[k]);
      const float given = masked(grad[at], y, negative_slope, is_masked);
      narrow(given * factor[k] - (widened(x[at]) - mean[k]) * slope[k] - offset[k], grad_x + at);
    }
  }
}

#define FASTUNET_INSTANTIATE(Float)                                                                \
  template void moments<Float>(const Float::Bits*, int64_t, int64_t, double*);                     \
  template void norm_relu<Float>(const Float::Bits*, const Normalisation&, Float::Bits*,           \
                                 Float::Bits*, const Images&, int64_t, int64_t);                   \
  template void gradient_sums<Float>(const Float::Bits*, const Float::Bits*, const Normalisation&, \
                                     bool, int64_t, int64_t, double*);                             \
  template void norm_relu_bwd<Float>(const Float::Bits*, const Float::Bits*, const Normalisation&, \
                                     bool, const float*, const float*, Float::Bits*, int64_t,      \
                                     int64_t);
FASTUNET_INSTANTIATE(Float32)
FASTUNET_INSTANTIATE(BFloat16)
#undef FASTUNET_INSTANTIATE

}  // namespace fastunet::cpu
