// bfloat16 as the bits that it has in memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectorize.h"

namespace fastunet::cpu {

template <typename To, typename From>
FASTUNET_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

FASTUNET_INLINE float widened(int16_t x) {
  return bit_cast<float>(static_cast<uint32_t>(static_cast<uint16_t>(x)) << 16);
}

// To nearest, ties to even; NaN stays NaN.
FASTUNET_INLINE int16_t narrowed(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<int16_t>(x != x ? 0x7fc0u : rounded);
}

}  // namespace fastunet::cpu
