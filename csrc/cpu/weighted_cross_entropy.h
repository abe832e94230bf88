// Weighted softmax cross-entropy on the CPU, forward and backward, in chunks of pixels whose logits
// stay in the nearest caches. No chunk depends on another, nor on how the range is cut.
#pragma once

#include <cstdint>

#include "../weighted_cross_entropy.h"

namespace fastunet::cpu {

enum class Number { kReal, kFloat16, kBFloat16 };
enum class Id { kInt64, kInt32, kUint8 };

// Elements from one image, class and pixel to the next.
struct Layout {
  int64_t image;
  int64_t of_class;
  int64_t pixel;
};

// What the pixels of one chunk add up to.
struct Partial {
  double loss = 0.0;
  double counted = 0.0;  // class weights, and pixel weights where they count in the divisor
  bool inside = true;    // no target is out of range
};

// Real is the type of the arithmetic: float, or double for logits of that type. Pointers are null
// for what is not there or not wanted; with a gradient alone, losses and partials are not made.
template <typename Real>
struct CrossEntropy {
  int64_t images;
  int64_t classes;
  int64_t pixels;  // of an image
  Number number;   // of logits, pixel_loss and gradient
  Layout logits_layout;
  Layout gradient_layout;
  Id id;  // of target
  int64_t ignore_index;
  Real label_smoothing;
  Real scale;              // of the gradient
  bool pixels_in_divisor;  // pixel weights count there

  const void* logits;
  const void* target;  // [images, pixels], as the following
  const Real* pixel_weight;
  const Real* incoming;      // gradient of each pixel's loss
  const Real* class_weight;  // [classes]

  void* pixel_loss;
  void* gradient;
  Partial* partials;  // [chunks]
};

int64_t chunk_pixels(int64_t classes);
int64_t chunks(int64_t images, int64_t classes, int64_t pixels);

// Tasks are the chunks.
void cross_entropy(const CrossEntropy<float>& problem, int64_t begin, int64_t end);
void cross_entropy(const CrossEntropy<double>& problem, int64_t begin, int64_t end);

// The first target out of range, which must be there.
int64_t first_outside(const CrossEntropy<float>& problem);
int64_t first_outside(const CrossEntropy<double>& problem);

}  // namespace fastunet::cpu
