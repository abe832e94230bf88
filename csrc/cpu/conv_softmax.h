// The 1x1 convolution that ends a network, with the softmax or argmax of its outputs, on the CPU,
// over channels_last images. Tasks are chunks of an image's pixels, none of which reach into the
// next image.
#pragma once

#include <cstdint>
#include <vector>

#include "amx.h"

namespace fastunet::cpu {

// Weights of bfloat16 images on the matrix tiles of AMX, where there are such and channels fill
// them. A thread's products are between its start and stop.
class HeadOnTiles {
 public:
  // Of weights [classes, channels].
  void pack(const Bits16* weight, int64_t classes, int64_t channels);
  bool is_packed() const { return !tiles_.empty(); }

  void start() const;
  void stop() const;
  // Logits of 16 pixels, a row of pixels a class.
  void multiply(const Bits16* x, const float* bias, int64_t classes, int64_t channels,
                float* logits, int64_t step) const;

 private:
  std::vector<Bits16> tiles_;
};

// The convolution, in float.
struct Head {
  int64_t channels;
  int64_t classes;
  // [classes, channels], and [classes]
  std::vector<float> weight;
  std::vector<float> bias;
  HeadOnTiles on_tiles;

  // Of weights [classes, channels], and biases or null.
  template <typename Float>
  static Head of(const typename Float::Bits* weight, const typename Float::Bits* bias,
                 int64_t classes, int64_t channels);
};

// Pixels of a chunk.
int64_t head_chunk_pixels(int64_t classes);

// Probabilities [B, classes, pixels] of images [B, pixels, channels].
template <typename Float>
void conv_softmax(const typename Float::Bits* x, const Head& head, int64_t pixels, float* y,
                  int64_t begin, int64_t end);

// The first of the largest logits, NaN being the largest of numbers; at most 256 classes.
template <typename Float>
void conv_argmax(const typename Float::Bits* x, const Head& head, int64_t pixels, uint8_t* labels,
                 int64_t begin, int64_t end);

}  // namespace fastunet::cpu
