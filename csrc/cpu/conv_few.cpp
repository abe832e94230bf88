// Convolutions of a few channels in float32: sums over all that a pixel reads stay in registers.
#include "conv_few.h"

#include <algorithm>
#include <cstring>

// sums are of float32's accuracy, in whatever order
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif
#include "vectorize.h"

namespace fastunet::cpu {
namespace {

// a group of channels, in a register; loops over an array would not stay there
typedef float Lanes __attribute__((vector_size(kChannelGroup * sizeof(float))));
typedef int32_t Masks __attribute__((vector_size(sizeof(Lanes))));

// pixels, and groups of channels of each, whose sums are in registers at once
constexpr int64_t kPixels = 4, kGroups = 4;

// Outputs of kCount pixels and kStrip groups of channels. `rows` are those of the input under the
// taps, [3 * c_in, step].
template <int64_t kCount, int64_t kStrip>
FASTUNET_INLINE void convolve(const ConvFew& conv, const float* rows, int64_t step, int64_t channel,
                              float* y) {
  Lanes sums[kCount][kStrip];
  for (int64_t p = 0; p < kCount; ++p) {
    for (int64_t k = 0; k < kStrip; ++k) {
      std::memcpy(&sums[p][k], conv.bias.data() + channel + k * kChannelGroup, sizeof(Lanes));
    }
  }
  const float* weight = conv.weight.data() + channel;
  for (int64_t row = 0; row < 3 * conv.c_in; ++row, rows += step) {
    for (int64_t tap = 0; tap < 3; ++tap, weight += conv.c_out) {
      for (int64_t k = 0; k < kStrip; ++k) {
        Lanes weights;
        std::memcpy(&weights, weight + k * kChannelGroup, sizeof weights);
        for (int64_t p = 0; p < kCount; ++p) sums[p][k] += rows[p + tap] * weights;
      }
    }
  }
  for (int64_t p = 0; p < kCount; ++p) {
    for (int64_t k = 0; k < kStrip; ++k) {
      Masks bits = Masks(sums[p][k]);
      // not of NaN, which is not below zero
      if (conv.relu) bits &= ~Masks(sums[p][k] <= 0);
      std::memcpy(y + p * conv.c_out + channel + k * kChannelGroup, &bits, sizeof bits);
    }
  }
}

template <int64_t kCount>
FASTUNET_INLINE void convolve(const ConvFew& conv, const float* rows, int64_t step, float* y) {
  int64_t channel = 0;
  for (; channel + kGroups * kChannelGroup <= conv.c_out; channel += kGroups * kChannelGroup) {
    convolve<kCount, kGroups>(conv, rows, step, channel, y);
  }
  for (; channel < conv.c_out; channel += kChannelGroup) {
    convolve<kCount, 1>(conv, rows, step, channel, y);
  }
}

}  // namespace

void ConvFew::take(const float* weights) {
  weight.resize(9 * c_in * c_out);
  for (int64_t k = 0; k < c_out; ++k) {
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t tap = 0; tap < 3; ++tap) {
        for (int64_t c = 0; c < c_in; ++c, ++weights) {
          weight[((row * c_in + c) * 3 + tap) * c_out + k] = *weights;
        }
      }
    }
  }
}

FASTUNET_VECTORIZED_WIDE void conv_few(const ConvFew& conv, const float* x, float* y, int64_t begin,
                                       int64_t end) {
  const int64_t c_in = conv.c_in, step = conv.width + 2 * conv.padding;
  // [3, c_in, step]
  std::vector<float> rows(3 * c_in * step);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / conv.out_height(), first = task % conv.out_height() - conv.padding;
    for (int64_t row = 0; row < 3; ++row) {
      const int64_t i = first + row;
      float* const to = rows.data() + row * c_in * step;
      if (i < 0 || i >= conv.height) {
        std::fill_n(to, c_in * step, 0.0f);
        continue;
      }
      const float* const from = x + (image * conv.height + i) * conv.width * c_in;
      for (int64_t c = 0; c < c_in; ++c) {
        float* const plane = to + c * step + conv.padding;
        for (int64_t j = 0; j < conv.width; ++j) plane[j] = from[j * c_in + c];
      }
    }
    float* const out = y + task * conv.out_width() * conv.c_out;
    int64_t j = 0;
    for (; j + kPixels <= conv.out_width(); j += kPixels) {
      convolve<kPixels>(conv, rows.data() + j, step, out + j * conv.c_out);
    }
    for (; j < conv.out_width(); ++j) {
      convolve<1>(conv, rows.data() + j, step, out + j * conv.c_out);
    }
  }
}

}  // namespace fastunet::cpu
