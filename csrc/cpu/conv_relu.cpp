#include "conv_relu.h"

#include <algorithm>

#include "float_bits.h"

namespace fastunet::cpu {
namespace {

template <typename Bits>
FASTUNET_INLINE Bits add(Bits a, Bits b) {
  Bits sum;
  narrow(widened(a) + widened(b), &sum);
  return sum;
}

template <typename Float, typename Bits>
FASTUNET_INLINE void relu_row(Bits* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = relu<Float>(y[i]);
}

// Values are loaded before they are chosen between: a load under a condition is not vectorised.
template <typename Bits>
FASTUNET_INLINE void mask_row(const Bits* grad_y, const Bits* y, Bits* grad, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const Bits given = grad_y[i];
    grad[i] = y[i] > 0 ? given : Bits(0);
  }
}

// The gradient of one element of a block, which gets `pooled` too if it is the one `taken`.
template <typename Bits>
FASTUNET_INLINE Bits masked(Bits y, Bits given, Bits pooled, bool taken) {
  const Bits sum = add(given, pooled);
  const Bits chosen = taken ? sum : given;
  return y > 0 ? chosen : Bits(0);
}

}  // namespace

template <typename Float>
FASTUNET_VECTORIZED void relu_pool(typename Float::Bits* y, typename Float::Bits* pooled,
                                   const Images& images, int64_t begin, int64_t end) {
  using Bits = typename Float::Bits;
  const int64_t row = images.row(), channels = images.channels, columns = images.width / 2;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / images.row_pairs(), pair = task % images.row_pairs();
    Bits* const upper = y + (image * images.height + 2 * pair) * row;
    const bool whole = 2 * pair + 1 < images.height;
    if (pooled == nullptr || !whole) {
      relu_row<Float>(upper, whole ? 2 * row : row);
      continue;
    }
    Bits* const lower = upper + row;
    Bits* largest = pooled + (image * (images.height / 2) + pair) * columns * channels;
    for (int64_t column = 0; column < columns; ++column, largest += channels) {
      Bits* const a = upper + 2 * column * channels;
      Bits* const c = lower + 2 * column * channels;
      for (int64_t k = 0; k < channels; ++k) {
        const Bits a0 = relu<Float>(a[k]), a1 = relu<Float>(a[k + channels]);
        const Bits c0 = relu<Float>(c[k]), c1 = relu<Float>(c[k + channels]);
        a[k] = a0;
        a[k + channels] = a1;
        c[k] = c0;
        c[k + channels] = c1;
        largest[k] = std::max(std::max(a0, a1), std::max(c0, c1));
      }
    }
    const int64_t done = 2 * columns * channels;
    relu_row<Float>(upper + done, row - done);
    relu_row<Float>(lower + done, row - done);
  }
}

template <typename Float>
FASTUNET_VECTORIZED void relu_pool_bwd(const typename Float::Bits* grad_y,
                                       const typename Float::Bits* grad_pooled,
                                       const typename Float::Bits* y, typename Float::Bits* grad,
                                       const Images& images, int64_t begin, int64_t end) {
  using Bits = typename Float::Bits;
  const int64_t row = images.row(), channels = images.channels, columns = images.width / 2;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / images.row_pairs(), pair = task % images.row_pairs();
    const int64_t start = (image * images.height + 2 * pair) * row;
    const bool whole = 2 * pair + 1 < images.height;
    if (grad_pooled == nullptr || !whole) {
      mask_row(grad_y + start, y + start, grad + start, whole ? 2 * row : row);
      continue;
    }
    const Bits* incoming = grad_pooled + (image * (images.height / 2) + pair) * columns * channels;
    for (int64_t column = 0; column < columns; ++column, incoming += channels) {
      const int64_t left = start + 2 * column * channels, below = left + row;
      const Bits *y0 = y + left, *y1 = y0 + channels, *y2 = y + below, *y3 = y2 + channels;
      const Bits *g0 = grad_y + left, *g1 = g0 + channels, *g2 = grad_y + below,
                 *g3 = g2 + channels;
      Bits *to0 = grad + left, *to1 = to0 + channels, *to2 = grad + below, *to3 = to2 + channels;
#pragma GCC ivdep
      for (int64_t k = 0; k < channels; ++k) {
        const Bits a = y0[k], b = y1[k], c = y2[k], d = y3[k], pooled = incoming[k];
        const Bits largest = std::max(std::max(a, b), std::max(c, d));
        // the first maximum in the order of rows, as PyTorch's pooling takes
        const bool is_a = a == largest;
        const bool is_b = !is_a & (b == largest);
        const bool is_c = !is_a & !is_b & (c == largest);
        const bool is_d = !is_a & !is_b & !is_c;
        to0[k] = masked(a, g0[k], pooled, is_a);
        to1[k] = masked(b, g1[k], pooled, is_b);
        to2[k] = masked(c, g2[k], pooled, is_c);
        to3[k] = masked(d, g3[k], pooled, is_d);
      }
    }
    const int64_t done = 2 * columns * channels;
    for (const int64_t rest : {start + done, start + row + done}) {
      mask_row(grad_y + rest, y + rest, grad + rest, row - done);
    }
  }
}

template void relu_pool<Float32>(int32_t*, int32_t*, const Images&, int64_t, int64_t);
template void relu_pool<BFloat16>(int16_t*, int16_t*, const Images&, int64_t, int64_t);
template void relu_pool_bwd<Float32>(const int32_t*, const int32_t*, const int32_t*, int32_t*,
                                     const Images&, int64_t, int64_t);
template void relu_pool_bwd<BFloat16>(const int16_t*, const int16_t*, const int16_t*, int16_t*,
                                      const Images&, int64_t, int64_t);

}  // namespace fastunet::cpu
