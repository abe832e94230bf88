// What surrounds a convolution on the CPU: ReLU and 2x2 max-pooling in one pass over channels_last
// images, and their gradient in another. Tasks are pairs of rows, ceil(height / 2) an image.
#pragma once

#include <cstdint>

namespace fastunet::cpu {

// Images in channels_last order, [B, height, width, channels].
struct Images {
  int64_t height;
  int64_t width;
  int64_t channels;

  int64_t row_pairs() const { return (height + 1) / 2; }
  int64_t row() const { return width * channels; }
};

// Floating-point numbers in memory as integers of their size: those >= 0 are ordered alike, and
// what is above infinity is NaN.
struct Float32 {
  using Bits = int32_t;
  static constexpr Bits kInfinity = 0x7f800000;
};
struct BFloat16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7f80;
};

// y = max(y, 0) in place, NaN stays NaN; with `pooled`, [B, height / 2, width / 2, channels], also
// the largest of each 2x2 block.
template <typename Float>
void relu_pool(typename Float::Bits* y, typename Float::Bits* pooled, const Images& images,
               int64_t begin, int64_t end);

// The gradient before the ReLU, [y > 0] (grad_y + grad_pooled at the first maximum of its block).
template <typename Float>
void relu_pool_bwd(const typename Float::Bits* grad_y, const typename Float::Bits* grad_pooled,
                   const typename Float::Bits* y, typename Float::Bits* grad, const Images& images,
                   int64_t begin, int64_t end);

}  // namespace fastunet::cpu
