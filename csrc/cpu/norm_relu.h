// Batch normalisation by a batch's own statistics, and ReLU, on the CPU, over channels_last images:
// sums over a part of the pixels, and what becomes of each pixel once all are known.
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

// (x - mean) factor + shift of each channel.
struct Normalisation {
  const float* mean;
  const float* factor;
  const float* shift;
};

// y = max(0, normalised x), NaN stays NaN; with `pooled`, [B, height / 2, width / 2, channels],
// also the largest of each 2x2 block. Tasks are pairs of rows.
template <typename Float>
void norm_relu(const typename Float::Bits* x, const Normalisation& norm, typename Float::Bits* y,
               typename Float::Bits* pooled, const Images& images, int64_t begin, int64_t end);

// Of each channel over some pixels: the sums of the gradient m g, and of m g (x - mean), with m the
// mask of the ReLU unless the gradient is masked already. [2, channels].
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
