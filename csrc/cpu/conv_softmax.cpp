#include "conv_softmax.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

// as for the loss, no other backend has to give the same bits
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif
#include "../weighted_cross_entropy.h"
#include "conv_relu.h"
#include "float_bits.h"

namespace fastunet::cpu {
namespace {

// pixels of a chunk at most, and logits of one, which stay in the nearest cache
constexpr int64_t kMostPixels = 128, kLogits = 4096;
// pixels whose logits are computed together
constexpr int64_t kBlock = 16;

// channels, or pixels, at a time; loops over an array would not stay in registers
constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

#if defined(__clang__)
#define FASTUNET_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));
#define FASTUNET_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

FASTUNET_INLINE void load(const float* from, Lanes& to) { std::memcpy(&to, from, sizeof to); }

// The sum of each of eight, in order.
FASTUNET_INLINE void sums_of(Lanes (&v)[kLanes], Lanes& sums) {
  for (int64_t i = 0; i < 8; i += 2) {
    v[i] = FASTUNET_SHUFFLE(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
           FASTUNET_SHUFFLE(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int64_t i = 0; i < 8; i += 4) {
    v[i] = FASTUNET_SHUFFLE(v[i], v[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           FASTUNET_SHUFFLE(v[i], v[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  sums = FASTUNET_SHUFFLE(v[0], v[4], 0, 1, 2, 3, 8, 9, 10, 11) +
         FASTUNET_SHUFFLE(v[0], v[4], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Logits of eight pixels, a row of pixels a class.
FASTUNET_INLINE void multiply(const float* x, const Head& head, float* logits, int64_t step) {
  const int64_t channels = head.channels, whole = channels / kLanes * kLanes;
  for (int64_t k = 0; k < head.classes; ++k) {
    const float* const weight = head.weight.data() + k * channels;
    Lanes products[kLanes] = {}, sums, row;
    for (int64_t c = 0; c < whole; c += kLanes) {
      load(weight + c, row);
      for (int64_t p = 0; p < kLanes; ++p) {
        Lanes values;
        load(x + p * channels + c, values);
        products[p] += values * row;
      }
    }
    sums_of(products, sums);
    sums += head.bias[k];
    for (int64_t c = whole; c < channels; ++c) {
      for (int64_t p = 0; p < kLanes; ++p) sums[p] += x[p * channels + c] * weight[c];
    }
    std::memcpy(logits + k * step, &sums, sizeof sums);
  }
}

// The same of a block.
FASTUNET_INLINE void multiply_block(const int32_t* x, const Head& head, float*, float* logits,
                                    int64_t step) {
  const float* const floats = reinterpret_cast<const float*>(x);
  for (int64_t p = 0; p < kBlock; p += kLanes) {
    multiply(floats + p * head.channels, head, logits + p, step);
  }
}

FASTUNET_INLINE void multiply_block(const int16_t* x, const Head& head, float* floats,
                                    float* logits, int64_t step) {
  if (head.on_tiles.is_packed()) {
    head.on_tiles.multiply(reinterpret_cast<const Bits16*>(x), head.bias.data(), head.classes,
                           head.channels, logits, step);
    return;
  }
  for (int64_t p = 0; p < kBlock; p += kLanes) {
    const int64_t values = kLanes * head.channels;
    for (int64_t i = 0; i < values; ++i) floats[i] = widened(x[p * head.channels + i]);
    multiply(floats, head, logits + p, step);
  }
}

// Calls use(logits, image, its first pixel of that, pixels) for each chunk, logits in rows of
// its size.
template <typename Bits, typename Use>
FASTUNET_INLINE void for_chunks(const Bits* x, const Head& head, int64_t pixels, int64_t begin,
                                int64_t end, const Use& use) {
  const int64_t channels = head.channels, size = head_chunk_pixels(head.classes);
  const int64_t of_image = (pixels + size - 1) / size;
  std::vector<float> logits(head.classes * size), floats(kLanes * channels);
  std::vector<Bits> rest(kBlock * channels);
  head.on_tiles.start();
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t image = chunk / of_image, first = chunk % of_image * size;
    const int64_t count = std::min(size, pixels - first);
    const Bits* from = x + (image * pixels + first) * channels;
    for (int64_t p = 0; p < count; p += kBlock, from += kBlock * channels) {
      const bool is_whole = p + kBlock <= count;
      if (!is_whole) std::copy_n(from, (count - p) * channels, rest.data());
      multiply_block(is_whole ? from : rest.data(), head, floats.data(), logits.data() + p, size);
    }
    use(logits.data(), size, image, first, count);
  }
  head.on_tiles.stop();
}

// Probabilities of a chunk, from logits that are overwritten.
FASTUNET_INLINE void softmax(float* logits, int64_t step, int64_t classes, int64_t count, float* y,
                             int64_t plane) {
  float greatest[kMostPixels], total[kMostPixels];
  for (int64_t i = 0; i < count; ++i) {
    greatest[i] = logits[i];
    total[i] = 0;
  }
  for (int64_t k = 1; k < classes; ++k) {
    const float* const row = logits + k * step;
    for (int64_t i = 0; i < count; ++i) greatest[i] = row[i] > greatest[i] ? row[i] : greatest[i];
  }
  for (int64_t k = 0; k < classes; ++k) {
    float* const row = logits + k * step;
    for (int64_t i = 0; i < count; ++i) {
      row[i] = exp_negative(row[i] - greatest[i]);
      total[i] += row[i];
    }
  }
  for (int64_t k = 0; k < classes; ++k) {
    const float* const row = logits + k * step;
    float* const to = y + k * plane;
    for (int64_t i = 0; i < count; ++i) to[i] = row[i] / total[i];
  }
}

FASTUNET_INLINE void argmax(const float* logits, int64_t step, int64_t classes, int64_t count,
                            uint8_t* labels) {
  float greatest[kMostPixels];
  int32_t label[kMostPixels];
  for (int64_t i = 0; i < count; ++i) {
    greatest[i] = logits[i];
    label[i] = 0;
  }
  for (int32_t k = 1; k < classes; ++k) {
    const float* const row = logits + k * step;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_nan = row[i] != row[i], was_nan = greatest[i] != greatest[i];
      const bool is_greater = (row[i] > greatest[i]) | (is_nan & !was_nan);
      greatest[i] = is_greater ? row[i] : greatest[i];
      label[i] = is_greater ? k : label[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) labels[i] = static_cast<uint8_t>(label[i]);
}

}  // namespace

template <typename Float>
Head Head::of(const typename Float::Bits* weight, const typename Float::Bits* bias, int64_t classes,
              int64_t channels) {
  Head head{channels, classes, std::vector<float>(classes * channels), std::vector<float>(classes)};
  for (int64_t i = 0; i < classes * channels; ++i) head.weight[i] = widened(weight[i]);
  for (int64_t k = 0; bias != nullptr && k < classes; ++k) head.bias[k] = widened(bias[k]);
  if constexpr (std::is_same_v<Float, BFloat16>) {
    head.on_tiles.pack(reinterpret_cast<const Bits16*>(weight), classes, channels);
  }
  return head;
}

int64_t head_chunk_pixels(int64_t classes) {
  return std::clamp(kLogits / classes / kBlock * kBlock, kBlock, kMostPixels);
}

template <typename Float>
FASTUNET_VECTORIZED_WIDE void conv_softmax(const typename Float::Bits* x, const Head& head,
                                           int64_t pixels, float* y, int64_t begin, int64_t end) {
  for_chunks(x, head, pixels, begin, end,
             [&](float* logits, int64_t step, int64_t image, int64_t first, int64_t count)
                 FASTUNET_INLINED {
                   softmax(logits, step, head.classes, count,
                           y + image * head.classes * pixels + first, pixels);
                 });
}

template <typename Float>
FASTUNET_VECTORIZED_WIDE void conv_argmax(const typename Float::Bits* x, const Head& head,
                                          int64_t pixels, uint8_t* labels, int64_t begin,
                                          int64_t end) {
  for_chunks(x, head, pixels, begin, end,
             [&](const float* logits, int64_t step, int64_t image, int64_t first, int64_t count)
                 FASTUNET_INLINED {
                   argmax(logits, step, head.classes, count, labels + image * pixels + first);
                 });
}

template Head Head::of<Float32>(const int32_t*, const int32_t*, int64_t, int64_t);
template Head Head::of<BFloat16>(const int16_t*, const int16_t*, int64_t, int64_t);
template void conv_softmax<Float32>(const int32_t*, const Head&, int64_t, float*, int64_t, int64_t);
template void conv_softmax<BFloat16>(const int16_t*, const Head&, int64_t, float*, int64_t,
                                     int64_t);
template void conv_argmax<Float32>(const int32_t*, const Head&, int64_t, uint8_t*, int64_t,
                                   int64_t);
template void conv_argmax<BFloat16>(const int16_t*, const Head&, int64_t, uint8_t*, int64_t,
                                    int64_t);

}  // namespace fastunet::cpu
