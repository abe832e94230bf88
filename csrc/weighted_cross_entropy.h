// exp and log where a softmax needs them, and 16-bit floats: without branches, so that loops over
// pixels vectorise. NaN gives NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/vectorize.h"

namespace fastunet {

template <typename To, typename From>
FASTUNET_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To same;
  std::memcpy(&same, &value, sizeof(To));
  return same;
}

// exp(x) for x <= 0, within 2 units in the last place; 0 where it is below 1.7e-38.
FASTUNET_INLINE float exp_negative(float x) {
  constexpr float kLeast = -87.0f, kLog2E = 1.44269504f;
  // of log(2), in two parts; the upper one times an exponent is exact
  constexpr float kUpper = 0.693359375f, kLower = -2.12194440e-4f;
  // adding it rounds to an integer, which then fills the lowest bits
  constexpr float kRound = 12582912.0f;
  const float clamped = x < kLeast ? kLeast : x;
  const float shifted = clamped * kLog2E + kRound;
  const float exponent = shifted - kRound;
  const float r = (clamped - exponent * kUpper) - exponent * kLower;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = bits_as<float>((bits_as<uint32_t>(shifted) + 127) << 23);
  return x < kLeast ? 0.0f : p * power;
}

FASTUNET_INLINE double exp_negative(double x) { return std::exp(x); }

// log(x) for x >= 1, within 1.2e-7 and 2 units in the last place.
FASTUNET_INLINE float log_from_one(float x) {
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const int32_t bits = bits_as<int32_t>(x);
  const int32_t exponent = (bits - kRootHalf) >> 23;
  const float f = bits_as<float>(bits - exponent * (1 << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f, scale = static_cast<float>(exponent);
  const float rest = (f * square * p - 2.12194440e-4f * scale) - 0.5f * square;
  return std::isnan(x) ? x : (f + rest) + 0.693359375f * scale;
}

FASTUNET_INLINE double log_from_one(double x) { return std::log(x); }

// log(1 + x) for 0 <= x <= 1, within 8e-8 and 4 units in the last place.
FASTUNET_INLINE float log_one_plus(float x) {
  float p = 4.340349544e-3f;
  p = p * x - 2.574563829e-2f;
  p = p * x + 7.173086263e-2f;
  p = p * x - 1.307202834e-1f;
  p = p * x + 1.880341813e-1f;
  p = p * x - 2.475739610e-1f;
  p = p * x + 3.330705097e-1f;
  p = p * x - 4.999888328e-1f;
  return p * (x * x) + x;
}

FASTUNET_INLINE double log_one_plus(double x) { return std::log1p(x); }

// 16-bit floats as they lie in memory
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FASTUNET_INLINE float widened(float value) { return value; }
FASTUNET_INLINE double widened(double value) { return value; }
FASTUNET_INLINE float widened(BFloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}
FASTUNET_INLINE float widened(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  // the exponents' biases differ by 112; infinity and NaN keep the largest exponent
  const uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  return bits_as<float>(sign | (magnitude < 0x0f800000u ? finite : magnitude | 0x7f800000u));
}

// Round to the nearest, ties to even.
FASTUNET_INLINE void store(float value, float* to) { *to = value; }
FASTUNET_INLINE void store(double value, double* to) { *to = value; }
FASTUNET_INLINE void store(float value, BFloat16* to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(std::isnan(value) ? 0x7fc0u : rounded);
}
FASTUNET_INLINE void store(float value, Float16* to) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  // beside 1/2 the steps are those of subnormal numbers
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t rounded = magnitude >= 0x477ff000u ? 0x7c00u : finite;
  to->bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : rounded));
}

}  // namespace fastunet
