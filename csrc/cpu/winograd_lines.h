// Lines of Winograd's F(4x4, 3x3), and how one is applied to both axes of a tile. Included after
// what says how floating-point operations are contracted.
#pragma once

#include <cstdint>

#include "vectorize.h"
#include "winograd.h"

namespace fastunet::cpu::winograd {

// Polynomials are evaluated at 0, +-kA, +-kB and infinity. With 1 and 2, the usual choice, errors
// are four times as large; these and their products are exact in binary.
constexpr float kA = 0.75f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA * kA2, kB3 = kB * kB2;
constexpr float kScale0 = 1 / (kA2 * kB2);
constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2));
constexpr float kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

// channels that pass through a buffer on the stack at a time
constexpr int64_t kStrip = 64;

// Lines of the transforms: each is applied to the columns of a tile, and then to its rows.
struct InputLine {  // B^T
  static constexpr int kFrom = 6, kTo = 6;
  FASTUNET_INLINED static void apply(const float* d, float* v) {
    const float even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
    const float even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
    v[0] = even_a - kA2 * (d[2] - kB2 * d[0]);
    v[1] = even_a + kA * odd_a;
    v[2] = even_a - kA * odd_a;
    v[3] = even_b + kB * odd_b;
    v[4] = even_b - kB * odd_b;
    v[5] = (d[5] - kB2 * d[3]) - kA2 * odd_a;
  }
};

// Row of G, in the order of the points 0, a, -a, b, -b and infinity.
constexpr float kWeightRows[kPatch][3] = {{kScale0, 0, 0},
                                          {kScaleA, kScaleA * kA, kScaleA * kA2},
                                          {kScaleA, -kScaleA * kA, kScaleA * kA2},
                                          {kScaleB, kScaleB * kB, kScaleB * kB2},
                                          {kScaleB, -kScaleB * kB, kScaleB * kB2},
                                          {0, 0, 1}};

struct WeightLine {  // G
  FASTUNET_INLINED static void apply(const float* g, float* u) {
    const float even_a = kScaleA * (g[0] + kA2 * g[2]), odd_a = kScaleA * kA * g[1];
    const float even_b = kScaleB * (g[0] + kB2 * g[2]), odd_b = kScaleB * kB * g[1];
    u[0] = kScale0 * g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
};

struct OutputLine {  // A^T
  static constexpr int kFrom = 6, kTo = 4;
  FASTUNET_INLINED static void apply(const float* m, float* y) {
    const float sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const float sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = kA * difference_a + kB * difference_b;
    y[2] = kA2 * sum_a + kB2 * sum_b;
    y[3] = kA3 * difference_a + kB3 * difference_b + m[5];
  }
};

struct GradientLine {  // A
  static constexpr int kFrom = 4, kTo = 6;
  FASTUNET_INLINED static void apply(const float* y, float* p) {
    const float even_a = y[0] + kA2 * y[2], odd_a = kA * y[1] + kA3 * y[3];
    const float even_b = y[0] + kB2 * y[2], odd_b = kB * y[1] + kB3 * y[3];
    p[0] = y[0];
    p[1] = even_a + odd_a;
    p[2] = even_a - odd_a;
    p[3] = even_b + odd_b;
    p[4] = even_b - odd_b;
    p[5] = y[3];
  }
};

struct WeightGradientLine {  // G^T
  static constexpr int kFrom = 6, kTo = 3;
  FASTUNET_INLINED static void apply(const float* u, float* g) {
    const float sum_a = kScaleA * (u[1] + u[2]), difference_a = kScaleA * (u[1] - u[2]);
    const float sum_b = kScaleB * (u[3] + u[4]), difference_b = kScaleB * (u[3] - u[4]);
    g[0] = kScale0 * u[0] + sum_a + sum_b;
    g[1] = kA * difference_a + kB * difference_b;
    g[2] = kA2 * sum_a + kB2 * sum_b + u[5];
  }
};

// Line applied to both axes, to columns first, for up to kStrip channels; element (i, j) is at i
// row + j column. Loops over channels are the vectors'; one over both axes has too many addresses.
template <typename Line>
FASTUNET_INLINE void transform_strip(const float* __restrict from, int64_t row, int64_t column,
                                     float* __restrict to, int64_t to_row, int64_t to_column,
                                     int64_t channels) {
  float half[Line::kTo][Line::kFrom][kStrip];
  for (int j = 0; j < Line::kFrom; ++j) {
    const float* const at = from + j * column;
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      float line[Line::kFrom], done[Line::kTo];
#pragma GCC unroll 6
      for (int i = 0; i < Line::kFrom; ++i) line[i] = at[i * row + k];
      Line::apply(line, done);
#pragma GCC unroll 6
      for (int i = 0; i < Line::kTo; ++i) half[i][j][k] = done[i];
    }
  }
  for (int i = 0; i < Line::kTo; ++i) {
    float* const at = to + i * to_row;
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      float line[Line::kFrom], done[Line::kTo];
#pragma GCC unroll 6
      for (int j = 0; j < Line::kFrom; ++j) line[j] = half[i][j][k];
      Line::apply(line, done);
#pragma GCC unroll 6
      for (int j = 0; j < Line::kTo; ++j) at[j * to_column + k] = done[j];
    }
  }
}

template <typename Line>
FASTUNET_INLINE void transform_all(const float* from, int64_t row, int64_t column, float* to,
                                   int64_t to_row, int64_t to_column, int64_t channels) {
  int64_t k = 0;
  // a constant number of channels is the faster loop
  for (; k + kStrip <= channels; k += kStrip) {
    transform_strip<Line>(from + k, row, column, to + k, to_row, to_column, kStrip);
  }
  if (k < channels) {
    transform_strip<Line>(from + k, row, column, to + k, to_row, to_column, channels - k);
  }
}

}  // namespace fastunet::cpu::winograd
