// Floating-point numbers as the bits that they have in memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "vectorize.h"

namespace fastunet::cpu {

template <typename To, typename From>
FASTUNET_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

FASTUNET_INLINE float widened(int32_t x) { return bit_cast<float>(x); }

FASTUNET_INLINE float widened(int16_t x) {
  return bit_cast<float>(static_cast<uint32_t>(static_cast<uint16_t>(x)) << 16);
}

FASTUNET_INLINE void narrow(float x, int32_t* to) { *to = bit_cast<int32_t>(x); }

// To nearest, ties to even; NaN stays NaN.
FASTUNET_INLINE void narrow(float x, int16_t* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *to = static_cast<int16_t>(x != x ? 0x7fc0u : rounded);
}

// max(x, 0) without sign, so that results are ordered as integers; NaN stays NaN, above infinity.
template <typename Float, typename Bits = typename Float::Bits>
FASTUNET_INLINE Bits relu(Bits x) {
  const Bits magnitude = x & std::numeric_limits<Bits>::max();
  return x < 0 && magnitude <= Float::kInfinity ? Bits(0) : magnitude;
}

}  // namespace fastunet::cpu
