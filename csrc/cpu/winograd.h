// The transforms of Winograd's F(4x4, 3x3) over channels_last float32 images, vectorised over
// channels; docs/maths/winograd.md derives them. The products between belong to a BLAS.
#pragma once

#include <cstdint>

namespace fastunet::cpu::winograd {

constexpr int64_t kTile = 4;   // outputs along an axis of a tile
constexpr int64_t kPatch = 6;  // inputs that they depend on, kTile + 3 - 1
constexpr int64_t kPoints = kPatch * kPatch;

// Pixel (row, column) of image b is at data + b image + row row_step + column column_step, and its
// channels follow one another. A crop is a view like any other.
template <typename T>
struct Images {
  T* data;
  int64_t image;
  int64_t row;
  int64_t column;

  T* at(int64_t b, int64_t i, int64_t j) const { return data + b * image + i * row + j * column; }
  Images from_channel(int64_t channel) const { return {data + channel, image, row, column}; }
};

// The tiles that cover images of height x width, counted through the batch row by row.
struct Tiles {
  int64_t height;
  int64_t width;

  int64_t rows() const { return (height + kTile - 1) / kTile; }
  int64_t columns() const { return (width + kTile - 1) / kTile; }
  int64_t per_image() const { return rows() * columns(); }
};

// One matrix for each of the 36 points; its rows are contiguous.
template <typename T>
struct Matrices {
  T* data;
  int64_t point;
  int64_t row;

  T* at(int64_t i, int64_t j) const { return data + i * row + j; }
};

// Weights of any layout: where the tap (0, 0) is, and steps between input channels, between output
// channels, and down and right between taps.
template <typename T>
struct Weights {
  T* data;
  int64_t input;
  int64_t output;
  int64_t down;
  int64_t right;

  T* at(int64_t k, int64_t o) const { return data + k * input + o * output; }
};

// What is convolved: pixels outside height x width, which padding reaches, are zero.
struct Input {
  Images<const float> images;
  int64_t height;
  int64_t width;
  int64_t padding;
};

// Where results go, and what becomes of them on the way. Without pooled, mask or bias their data is
// null.
struct Output {
  Images<float> images;
  Images<float> pooled;      // the largest of each 2x2 block
  Images<const float> mask;  // results are zero where it is not positive
  const float* bias;
  bool relu;  // keeps NaN
};

// v[point, tile - begin, channel] = B^T d B of each tile's patch d.
void transform_input(const Input& input, const Tiles& tiles, int64_t channels,
                     const Matrices<float>& v, int64_t begin, int64_t end);

// u[point, k, o] = G g G^T for so many input and output channels.
void transform_weights(const Weights<const float>& weights, int64_t inputs, int64_t outputs,
                       const Matrices<float>& u);

// The same for the six points of one row, of weights whose output channels follow one another.
void transform_weights_row(int64_t row, const Weights<const float>& weights, int64_t inputs,
                           int64_t outputs, const Matrices<float>& u);

// The weights with output channels one after another, in taps[9, inputs, outputs] unless they are.
Weights<const float> turn_weights(const Weights<const float>& weights, int64_t inputs,
                                  int64_t outputs, float* taps);

// A^T m A of each tile into the output; rows of m are tiles from `begin`.
void transform_output(const Matrices<const float>& m, const Tiles& tiles, int64_t channels,
                      const Output& output, int64_t begin, int64_t end);

// The adjoint of the output's transform, p[point, tile - begin, channel] = A g A^T.
void transform_gradient(const Images<const float>& gradient, const Tiles& tiles, int64_t channels,
                        const Matrices<float>& p, int64_t begin, int64_t end);

// The adjoint of the weights' transform, G^T u G of u[point, o, k].
void transform_weight_gradient(const Matrices<const float>& u, int64_t inputs, int64_t outputs,
                               const Weights<float>& gradient);

// sums[channel] += the pixels of tiles [begin, end).
void add_pixels(const Images<const float>& images, const Tiles& tiles, int64_t channels,
                double* sums, int64_t begin, int64_t end);

// sums += terms.
void add(float* sums, const float* terms, int64_t size);

}  // namespace fastunet::cpu::winograd
