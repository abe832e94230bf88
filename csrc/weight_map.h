// The border weights of the U-Net paper, w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)):
// the arithmetic of one pixel, for host and device. docs/maths/weight_map.md proves it exact.
// Compile without contraction to fused multiply-adds: every backend then gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTUNET_HOST_DEVICE __host__ __device__
#else
#define FASTUNET_HOST_DEVICE
#endif

namespace fastunet {

// What one pixel knows of a set of pixels: the nearest cell's id, the squared distance to it, and
// the squared distance to the nearest pixel of any other cell.
template <typename Id>
struct Nearest {
  Id id;
  float first;
  float second;
};

// The Nearest of the empty set; 0 is no id.
template <typename Id>
FASTUNET_HOST_DEVICE inline Nearest<Id> nothing() {
  return {0, INFINITY, INFINITY};
}

// The Nearest of the union of two sets.
template <typename Id>
FASTUNET_HOST_DEVICE inline Nearest<Id> merge(const Nearest<Id>& a, const Nearest<Id>& b) {
  const bool b_wins = b.first < a.first;
  const float loser = b_wins ? a.first : b.first;
  const float other = a.id == b.id ? INFINITY : loser;
  const float second = a.second < b.second ? a.second : b.second;
  return {b_wins ? b.id : a.id, b_wins ? b.first : a.first, other < second ? other : second};
}

// Moves one pixel along a line, on which distances are counted in steps and not squared.
template <typename Id>
FASTUNET_HOST_DEVICE inline Nearest<Id> advance(const Nearest<Id>& behind, Id label) {
  const bool is_cell = label > 0;
  const bool same = label == behind.id;
  const float other = same ? behind.second : behind.first;
  return {is_cell ? label : behind.id, is_cell ? 0.0f : behind.first + 1.0f,
          (is_cell ? other : behind.second) + 1.0f};
}

// The set as seen from a pixel that is farther away by `distance`, in steps or squares.
template <typename Id>
FASTUNET_HOST_DEVICE inline Nearest<Id> moved(const Nearest<Id>& nearest, float distance) {
  return {nearest.id, nearest.first + distance, nearest.second + distance};
}

FASTUNET_HOST_DEVICE inline float squared(float steps, float spacing) {
  const float distance = steps * spacing;
  return distance * distance;
}

// exp(x) for x <= 0 to one unit in the last place, 0 where the result would not be normal.
FASTUNET_HOST_DEVICE inline float exp_of_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  // x = n ln 2 + r, with ln 2 in two parts so that n times the first is exact
  const int32_t n = static_cast<int32_t>(clamped * 1.44269504f - 0.5f);
  const float r =
      (clamped - static_cast<float>(n) * 0.693359375f) + static_cast<float>(n) * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

struct ClassWeight {
  float background;
  float cells;
};

// Gives background and cells the same total and the pixels a mean of 1.
FASTUNET_HOST_DEVICE inline ClassWeight balanced_class_weight(int64_t cells, int64_t pixels) {
  if (cells == 0 || cells == pixels) return {1.0f, 1.0f};
  const double of_cells = static_cast<double>(cells);
  const double of_both = static_cast<double>(pixels);
  return {static_cast<float>(of_both / (2.0 * (of_both - of_cells))),
          static_cast<float>(of_both / (2.0 * of_cells))};
}

struct Border {
  float w0;
  float scale;  // -1 / (2 sigma^2)
};

FASTUNET_HOST_DEVICE inline Border make_border(double w0, double sigma) {
  return {static_cast<float>(w0), static_cast<float>(-0.5 / (sigma * sigma))};
}

FASTUNET_HOST_DEVICE inline float border_weight(const Border& border, float d1, float d2) {
  const float d = d1 + d2;
  return border.w0 * exp_of_negative(d * d * border.scale);
}

// The d1 + d2 from which the border term no longer changes a weight: it is then less than half the
// last bit of the smaller class weight, or zero in float32.
FASTUNET_HOST_DEVICE inline double border_reach(double w0, double sigma,
                                                const ClassWeight& classes) {
  const float smaller = classes.cells < classes.background ? classes.cells : classes.background;
  const double invisible = smaller * 0x1p-26;
  double exponent = invisible > 0 ? std::log(w0 / invisible) : 104.0;
  exponent = exponent < 104.0 ? exponent : 104.0;
  return exponent > 0 ? sigma * std::sqrt(2.0 * exponent) : 0.0;
}

}  // namespace fastunet
