// The gradient of a convolution's weights from bfloat16 images, on the matrix tiles of AMX.
//
//     grad_weight[o, tap, c] = sum over pixels p of  grad[p, o] x[p + tap, c]
//
// A tile product multiplies 16 output channels x 32 pixels by 32 pixels x 16 channels. The rows of
// a band are copied into one line of pixels, as wide as the padded images are: the gradient by
// channels, with zeros where it is narrower and lower, and the images by pairs of pixels. A tap is
// a distance in that line, which moves the images by pairs, and the gradient by one pixel if it is
// odd. A pixel that is not finite makes NaN of all taps, not of those alone that reach it.
#pragma once

#include <cstdint>

#include "amx.h"

namespace fastunet::cpu {

struct GradWeightAmx {
  Pixels x;     // [images, height, width, C]
  Pixels grad;  // [images, out_height(), out_width(), C_out]
  int64_t images, height, width;
  int64_t padding;
  Bits16* weight;  // [C_out, 9, C], to be written
  Bits16* bias;    // [C_out], to be written: the sum of the gradient

  int64_t out_height() const { return height + 2 * padding - 2; }
  int64_t out_width() const { return width + 2 * padding - 2; }
  // of the padded images, one below the other
  int64_t pitch() const { return width + 2 * padding; }
  int64_t image_rows() const { return height + 2 * padding; }
  // of the gradient; the last image's last two have none
  int64_t rows() const { return images * image_rows() - 2; }
  // of 32 output channels and 32 channels
  int64_t out_blocks() const { return ceil_div(grad.channels, 32); }
  int64_t in_blocks() const { return ceil_div(x.channels, 32); }
};

// How the work is shared out: the rows of all images in bands, these in parts, which have sums of
// their own and do not depend on the number of threads; where they are few also by output channels.
struct GradWeightTasks {
  int64_t band_rows;
  int64_t bands;
  int64_t parts;
  int64_t channel_parts;
  // floats of a part: the sums of the bias, and of the weights unless a single band has them all
  int64_t part_sums;

  GradWeightTasks(const GradWeightAmx& of, int64_t threads);
};

// Computes tasks [begin, end) of parts x channel parts into sums [parts, part_sums]. Each thread
// keeps memory for one band until it ends.
void grad_weight_amx(const GradWeightAmx& of, const GradWeightTasks& tasks, int64_t begin,
                     int64_t end, float* sums);

// Adds up the parts of output blocks [begin, end), once all tasks are done.
void add_parts(const GradWeightAmx& of, const GradWeightTasks& tasks, const float* sums,
               int64_t begin, int64_t end);

}  // namespace fastunet::cpu
