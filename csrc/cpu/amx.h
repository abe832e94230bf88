// What the kernels on AMX's matrix tiles share.
#pragma once

#include <cstdint>

#include "vectorize.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && \
    (defined(__clang__) || __GNUC__ >= 11)
#define FASTUNET_AMX \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#include <immintrin.h>
#endif

namespace fastunet::cpu {

// bfloat16 as its bits
using Bits16 = uint16_t;

// bytes of a tile, and of one of its rows
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kLineBytes = 64;
// the same in values of bfloat16
constexpr int64_t kTileValues = 512;
constexpr int64_t kLineValues = 32;

// An image tensor, [B, H, W, C] with any strides but 1 between channels.
struct Pixels {
  const Bits16* data;
  int64_t channels;
  int64_t image_stride;
  int64_t row_stride;
  int64_t column_stride;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef FASTUNET_AMX

struct alignas(kLineBytes) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tile 7 has 16 rows, the others so many.
  explicit TileConfig(int64_t others) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = kLineBytes;
      rows[tile] = static_cast<uint8_t>(tile == 7 ? 16 : others);
    }
  }

  FASTUNET_AMX void load() const {
    // the compiler believes that only the first bytes are read
    __asm__ volatile("" : : "r"(this) : "memory");
    _tile_loadconfig(this);
  }
};

// Transposes 16 x 16 values of 32 bits.
FASTUNET_AMX inline void transpose(__m512i (&rows)[16]) {
  __m512i half[16];
  for (int k = 0; k < 16; k += 2) {
    half[k] = _mm512_unpacklo_epi32(rows[k], rows[k + 1]);
    half[k + 1] = _mm512_unpackhi_epi32(rows[k], rows[k + 1]);
  }
  for (int k = 0; k < 16; k += 4) {
    rows[k] = _mm512_unpacklo_epi64(half[k], half[k + 2]);
    rows[k + 1] = _mm512_unpackhi_epi64(half[k], half[k + 2]);
    rows[k + 2] = _mm512_unpacklo_epi64(half[k + 1], half[k + 3]);
    rows[k + 3] = _mm512_unpackhi_epi64(half[k + 1], half[k + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    half[k] = _mm512_shuffle_i32x4(rows[k], rows[k + 4], 0x88);
    half[k + 4] = _mm512_shuffle_i32x4(rows[k], rows[k + 4], 0xdd);
    half[k + 8] = _mm512_shuffle_i32x4(rows[k + 8], rows[k + 12], 0x88);
    half[k + 12] = _mm512_shuffle_i32x4(rows[k + 8], rows[k + 12], 0xdd);
  }
  for (int k = 0; k < 8; ++k) {
    rows[k] = _mm512_shuffle_i32x4(half[k], half[k + 8], 0x88);
    rows[k + 8] = _mm512_shuffle_i32x4(half[k], half[k + 8], 0xdd);
  }
}

// Arranges up to 16 output x 32 input channels as a tile takes them: by pairs of input channels.
FASTUNET_AMX inline void pack_tile(const Bits16* from, int64_t c_out_stride, int64_t c_in_stride,
                                   int64_t c_out, int64_t c_in, Bits16* to) {
  if (c_out_stride == 1) {
    const __mmask16 lanes = 0xffff >> (16 - (c_out < 16 ? c_out : 16));
    for (int64_t c = 0; c < 32; c += 2, to += 32) {
      __m512i pair[2];
      for (int64_t k = 0; k < 2; ++k) {
        const __mmask16 loaded = c + k < c_in ? lanes : 0;
        pair[k] =
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(loaded, from + (c + k) * c_in_stride));
      }
      _mm512_storeu_si512(to, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
    }
    return;
  }
  __m512i rows[16];
  for (int64_t o = 0; o < 16; ++o, from += c_out_stride) {
    if (o < c_out && c_in == 32 && c_in_stride == 1) {
      rows[o] = _mm512_loadu_si512(from);
      continue;
    }
    alignas(kLineBytes) Bits16 line[32] = {};
    for (int64_t c = 0; o < c_out && c < c_in; ++c) line[c] = from[c * c_in_stride];
    rows[o] = _mm512_load_si512(line);
  }
  transpose(rows);
  for (int64_t pair = 0; pair < 16; ++pair) _mm512_storeu_si512(to + 32 * pair, rows[pair]);
}

// max(value, 0) without sign; NaN stays NaN.
FASTUNET_AMX FASTUNET_INLINE __m512 clamped(__m512 value) {
  // of zero and NaN, max takes the second
  const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), value);
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(positive), _mm512_set1_epi32(0x7fffffff)));
}

FASTUNET_AMX FASTUNET_INLINE __m512i narrowed(const __m512 (&value)[2]) {
  return (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
}

#endif

}  // namespace fastunet::cpu
