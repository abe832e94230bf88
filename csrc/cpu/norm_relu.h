// Normalisation by the statistics of a batch or of each image, and ReLU, on the CPU, over
// channels_last images: sums over a part of the pixels, and what becomes of each pixel once all are
// known.
#pragma once

#include <cstdint>

#include "conv_relu.h"

namespace fastunet::cpu {

// Pixels of a part: few enough that they are still in the cache when they are read again.
int64_t part_pixels(int64_t channels);

// Of each channel over some pixels: their mean, about, the sum of what they differ from it by, and
// the sum of its squares. [3, channels].
template <typename Float>
void moments(const typename Float::Bits* x, int64_t pixels, int64_t channels, double* result);

// Mean and variance of all pixels, from the moments of the parts that they were divided into.
void statistics(const double* parts, int64_t pixels, int64_t channels, float* mean,
                float* variance);

// (x - mean) factor + shift of each channel, times `negative_slope` where it is below zero.
struct Normalisation {
  const float* mean;
  const float* factor;
  const float* shift;
  // 0 is ReLU, 1 leaves values as they are
  float negative_slope;
  // how far the three of one image are from those of the next; 0 where all have the same
  int64_t stride;

  Normalisation of(int64_t image) const {
    const int64_t at = image * stride;
    return {mean + at, factor + at, shift + at, negative_slope, stride};
  }
};

// y, NaN stays NaN; with `pooled`, [B, height / 2, width / 2, channels], and with slope 0 also the
// largest of each 2x2 block. Tasks are pairs of rows.
template <typename Float>
void norm_relu(const typename Float::Bits* x, const Normalisation& norm, typename Float::Bits* y,
               typename Float::Bits* pooled, const Images& images, int64_t begin, int64_t end);

// Of each channel over some pixels of an image: the sums of the gradient m g, and of
// m g (x - mean), with m the slope of the ReLU unless the gradient is masked already. [2,
// channels].
template <typename Float>
void gradient_sums(const typename Float::Bits* grad, const typename Float::Bits* x,
                   const Normalisation& norm, bool is_masked, int64_t pixels, int64_t channels,
                   double* result);

// m g factor - (x - mean) slope - offset, the gradient of x.
template <typename Float>
void norm_relu_bwd(const typename Float::Bits* grad, const typename Float::Bits* x,
                   const Normalisation& norm, bool is_masked, const float* slope,
                   const float* offset, typename Float::Bits* grad_x, int64_t pixels,
                   int64_t channels);

}  // namespace fastunet::cpu
