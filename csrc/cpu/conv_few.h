// 3x3 convolutions of images of a few channels, as a network's first one is, with bias and ReLU, on
// the CPU. Tasks are rows of output.
#pragma once

#include <cstdint>
#include <vector>

#include "amx.h"

namespace fastunet::cpu {

// In float32 output channels are whole groups of so many.
constexpr int64_t kChannelGroup = 8;

struct ConvFew {
  int64_t c_in;
  int64_t height, width;  // of the input
  int64_t padding;
  int64_t c_out;
  bool relu;

  // [c_out], which zeros follow up to whole blocks of 32
  std::vector<float> bias = {};
  // of float32 images: [3, c_in, 3, c_out]
  std::vector<float> weight = {};
  // of bfloat16 images: [c_out / 16, 9 c_in / 32], a tile of AMX each
  std::vector<Bits16> tiles = {};

  int64_t out_height() const { return height + 2 * padding - 2; }
  int64_t out_width() const { return width + 2 * padding - 2; }

  // Take weights [c_out, 3, 3, c_in].
  void take(const float* weights);
  void take(const Bits16* weights);
};

// Rows of y [B, out_height(), out_width(), c_out] from x [B, height, width, c_in]; NaN stays NaN.
void conv_few(const ConvFew& conv, const float* x, float* y, int64_t begin, int64_t end);
void conv_few(const ConvFew& conv, const Bits16* x, Bits16* y, int64_t begin, int64_t end);

}  // namespace fastunet::cpu
