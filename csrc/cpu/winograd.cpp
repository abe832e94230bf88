#include "winograd.h"

#include <algorithm>
#include <cstring>
#include <limits>

// no other backend has to give the same bits
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif
#include "vectorize.h"
#include "winograd_lines.h"

namespace fastunet::cpu::winograd {
namespace {

// weights that are turned around on the stack at a time
constexpr int64_t kTurned = 16, kTurnedStep = 16, kLine = 16;

FASTUNET_INLINE void prefetch(const float* from) {
#if defined(__GNUC__)
  __builtin_prefetch(from, 0, 2);
#endif
}

// Weights whose output channels follow one another, in `taps` unless they do already.
FASTUNET_INLINE Weights<const float> turn(const Weights<const float>& weights, int64_t inputs,
                                          int64_t outputs, float* taps) {
  if (weights.output == 1) return weights;
  // steps by powers of two would leave most of a cache unused
  const int64_t step = outputs + kTurnedStep, tap_size = inputs * step;
  const auto row_of = [&](int64_t o, int64_t tap) {
    return weights.at(0, o) + tap / 3 * weights.down + tap % 3 * weights.right;
  };
  for (int64_t o = 0; o < outputs; o += kTurned) {
    const int64_t end = std::min(outputs, o + kTurned);
    // whole rows, as no processor foresees their pieces
    for (int64_t j = o; j < end; ++j) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t k = 0; k < inputs; k += kLine) prefetch(row_of(j, tap) + k * weights.input);
      }
    }
    for (int64_t start = 0; start < inputs; start += kTurned) {
      const int64_t rows = std::min(kTurned, inputs - start);
      for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t j = o; j < end; ++j) {
          const float* const from = row_of(j, tap) + start * weights.input;
          float* const to = taps + tap * tap_size + start * step + j;
          for (int64_t k = 0; k < rows; ++k) to[k * step] = from[k * weights.input];
        }
      }
    }
  }
  return {taps, step, 1, 3 * tap_size, tap_size};
}

// One row of G g G^T for one input channel.
FASTUNET_INLINE void weight_row(int64_t row, const float* __restrict from,
                                const Weights<const float>& weights, int64_t outputs,
                                float* __restrict u, int64_t point) {
  const float *g = kWeightRows[row], *upper = from, *middle = upper + weights.down,
              *lower = middle + weights.down;
  const int64_t right = weights.right;
#pragma GCC ivdep
  for (int64_t o = 0; o < outputs; ++o) {
    float line[3], done[kPatch];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      line[j] =
          g[0] * upper[j * right + o] + g[1] * middle[j * right + o] + g[2] * lower[j * right + o];
    }
    WeightLine::apply(line, done);
#pragma GCC unroll 6
    for (int j = 0; j < kPatch; ++j) u[j * point + o] = done[j];
  }
}

struct Place {
  int64_t image;
  int64_t row;
  int64_t column;
};

FASTUNET_INLINE Place place_of(int64_t tile, const Tiles& tiles) {
  const int64_t within = tile % tiles.per_image();
  return {tile / tiles.per_image(), kTile * (within / tiles.columns()),
          kTile * (within % tiles.columns())};
}

// Transforms size x size pixels from (row, column), of which some may be outside of the images.
template <typename Line>
FASTUNET_INLINE void transform_pixels(const Images<const float>& images, int64_t height,
                                      int64_t width, const Place& place, int64_t channels,
                                      float* to, int64_t point) {
  constexpr int64_t kSize = Line::kFrom;
  if (place.row >= 0 && place.column >= 0 && place.row + kSize <= height &&
      place.column + kSize <= width) {
    transform_all<Line>(images.at(place.image, place.row, place.column), images.row, images.column,
                        to, Line::kTo * point, point, channels);
    return;
  }
  float patch[kSize * kSize * kStrip];
  for (int64_t k = 0; k < channels; k += kStrip) {
    const int64_t strip = std::min(kStrip, channels - k);
    for (int64_t i = 0; i < kSize; ++i) {
      for (int64_t j = 0; j < kSize; ++j) {
        float* const pixel = patch + (i * kSize + j) * kStrip;
        const int64_t row = place.row + i, column = place.column + j;
        if (row < 0 || column < 0 || row >= height || column >= width) {
          std::fill_n(pixel, strip, 0.0f);
        } else {
          std::copy_n(images.at(place.image, row, column) + k, strip, pixel);
        }
      }
    }
    transform_all<Line>(patch, kSize * kStrip, kStrip, to + k, Line::kTo * point, point, strip);
  }
}

FASTUNET_INLINE float larger(float a, float b) { return (a > b) | (a != a) ? a : b; }

// A tile that is inside the images and, with a pooled copy, four whole blocks; up to kStrip
// channels.
template <bool kPool, bool kMask>
FASTUNET_INLINE void output_strip(const float* __restrict m, int64_t point,
                                  const float* __restrict bias, float floor, float* __restrict y,
                                  int64_t row, int64_t column, float* __restrict pooled,
                                  int64_t pooled_row, int64_t pooled_column,
                                  const float* __restrict mask, int64_t mask_row,
                                  int64_t mask_column, int64_t channels) {
  float half[kTile][kPatch][kStrip], largest[kTile / 2][kStrip];
  for (int j = 0; j < kPatch; ++j) {
    const float* const at = m + j * point;
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      float line[kPatch], done[kTile];
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) line[i] = at[i * kPatch * point + k];
      OutputLine::apply(line, done);
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) half[i][j][k] = done[i];
    }
  }
  for (int i = 0; i < kTile; ++i) {
    float* const at = y + i * row;
    const float* const mask_at = mask + i * mask_row;
#pragma GCC ivdep
    for (int64_t k = 0; k < channels; ++k) {
      float line[kPatch], done[kTile];
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) line[j] = half[i][j][k];
      OutputLine::apply(line, done);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        const float sum = done[j] + bias[k];
        done[j] = sum < floor ? floor : sum;
        if (kMask) {
          const float positive = mask_at[j * mask_column + k];
          done[j] = positive > 0 ? done[j] : 0.0f;
        }
        at[j * column + k] = done[j];
      }
      if (!kPool) continue;
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const float here = larger(done[2 * j], done[2 * j + 1]);
        if (i % 2 == 0) {
          largest[j][k] = here;
        } else {
          pooled[i / 2 * pooled_row + j * pooled_column + k] = larger(largest[j][k], here);
        }
      }
    }
  }
}

template <bool kPool, bool kMask>
FASTUNET_INLINE void output_tile(const float* m, int64_t point, const float* bias, float floor,
                                 float* y, int64_t row, int64_t column, float* pooled,
                                 int64_t pooled_row, int64_t pooled_column, const float* mask,
                                 int64_t mask_row, int64_t mask_column, int64_t channels) {
  const float no_bias[kStrip] = {};
  const auto run = [=, &no_bias](int64_t k, int64_t strip) FASTUNET_INLINED {
    output_strip<kPool, kMask>(m + k, point, bias == nullptr ? no_bias : bias + k, floor, y + k,
                               row, column, kPool ? pooled + k : nullptr, pooled_row, pooled_column,
                               kMask ? mask + k : nullptr, mask_row, mask_column, strip);
  };
  int64_t k = 0;
  for (; k + kStrip <= channels; k += kStrip) run(k, kStrip);
  if (k < channels) run(k, channels - k);
}

// A tile of which rows x columns pixels are inside.
FASTUNET_INLINE void output_border(const float* m, int64_t point, const Output& output, float floor,
                                   const Place& place, int64_t rows, int64_t columns,
                                   int64_t channels) {
  float tile[kTile * kTile * kStrip];
  const auto at = [&tile](int64_t i, int64_t j) { return tile + (i * kTile + j) * kStrip; };
  for (int64_t k = 0; k < channels; k += kStrip) {
    const int64_t strip = std::min(kStrip, channels - k);
    output_tile<false, false>(m + k, point, output.bias == nullptr ? nullptr : output.bias + k,
                              floor, tile, kTile * kStrip, kStrip, nullptr, 0, 0, nullptr, 0, 0,
                              strip);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        float* const y = output.images.at(place.image, place.row + i, place.column + j) + k;
        std::copy_n(at(i, j), strip, y);
        if (output.mask.data == nullptr) continue;
        const float* mask = output.mask.at(place.image, place.row + i, place.column + j) + k;
        for (int64_t c = 0; c < strip; ++c) y[c] = mask[c] > 0 ? y[c] : 0.0f;
      }
    }
    if (output.pooled.data == nullptr) continue;
    for (int64_t i = 0; i + 1 < rows; i += 2) {
      for (int64_t j = 0; j + 1 < columns; j += 2) {
        float* const into =
            output.pooled.at(place.image, (place.row + i) / 2, (place.column + j) / 2) + k;
        for (int64_t c = 0; c < strip; ++c) {
          into[c] = larger(larger(at(i, j)[c], at(i, j + 1)[c]),
                           larger(at(i + 1, j)[c], at(i + 1, j + 1)[c]));
        }
      }
    }
  }
}

}  // namespace

FASTUNET_VECTORIZED_WIDE void transform_input(const Input& input, const Tiles& tiles,
                                              int64_t channels, const Matrices<float>& v,
                                              int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    Place place = place_of(tile, tiles);
    place.row -= input.padding;
    place.column -= input.padding;
    transform_pixels<InputLine>(input.images, input.height, input.width, place, channels,
                                v.at(tile - begin, 0), v.point);
  }
}

FASTUNET_VECTORIZED_WIDE void transform_gradient(const Images<const float>& gradient,
                                                 const Tiles& tiles, int64_t channels,
                                                 const Matrices<float>& p, int64_t begin,
                                                 int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    transform_pixels<GradientLine>(gradient, tiles.height, tiles.width, place_of(tile, tiles),
                                   channels, p.at(tile - begin, 0), p.point);
  }
}

FASTUNET_VECTORIZED_WIDE Weights<const float> turn_weights(const Weights<const float>& weights,
                                                           int64_t inputs, int64_t outputs,
                                                           float* taps) {
  return turn(weights, inputs, outputs, taps);
}

FASTUNET_VECTORIZED_WIDE void transform_weights_row(int64_t row,
                                                    const Weights<const float>& weights,
                                                    int64_t inputs, int64_t outputs,
                                                    const Matrices<float>& u) {
  for (int64_t k = 0; k < inputs; ++k)
    weight_row(row, weights.at(k, 0), weights, outputs, u.at(k, 0), u.point);
}

FASTUNET_VECTORIZED_WIDE void transform_weights(const Weights<const float>& weights, int64_t inputs,
                                                int64_t outputs, const Matrices<float>& u) {
  float taps[9 * kTurned * (kStrip + kTurnedStep)];
  for (int64_t o = 0; o < outputs; o += kStrip) {
    const int64_t columns = std::min(kStrip, outputs - o);
    for (int64_t k = 0; k < inputs; k += kTurned) {
      const int64_t rows = std::min(kTurned, inputs - k);
      Weights<const float> block = weights;
      block.data = weights.at(k, o);
      block = turn(block, rows, columns, taps);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t row = 0; row < kPatch; ++row) {
          weight_row(row, block.at(i, 0), block, columns, u.at(k + i, o) + row * kPatch * u.point,
                     u.point);
        }
      }
    }
  }
}

FASTUNET_VECTORIZED_WIDE void transform_output(const Matrices<const float>& m, const Tiles& tiles,
                                               int64_t channels, const Output& output,
                                               int64_t begin, int64_t end) {
  const float floor = output.relu ? 0.0f : -std::numeric_limits<float>::infinity();
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of(tile, tiles);
    const float* const from = m.at(tile - begin, 0);
    const int64_t rows = std::min(kTile, tiles.height - place.row);
    const int64_t columns = std::min(kTile, tiles.width - place.column);
    if (rows < kTile || columns < kTile) {
      output_border(from, m.point, output, floor, place, rows, columns, channels);
      continue;
    }
    float* const y = output.images.at(place.image, place.row, place.column);
    const int64_t row = output.images.row, column = output.images.column;
    if (output.pooled.data != nullptr) {
      float* const pooled = output.pooled.at(place.image, place.row / 2, place.column / 2);
      output_tile<true, false>(from, m.point, output.bias, floor, y, row, column, pooled,
                               output.pooled.row, output.pooled.column, nullptr, 0, 0, channels);
    } else if (output.mask.data != nullptr) {
      const float* const mask = output.mask.at(place.image, place.row, place.column);
      output_tile<false, true>(from, m.point, output.bias, floor, y, row, column, nullptr, 0, 0,
                               mask, output.mask.row, output.mask.column, channels);
    } else {
      output_tile<false, false>(from, m.point, output.bias, floor, y, row, column, nullptr, 0, 0,
                                nullptr, 0, 0, channels);
    }
  }
}

FASTUNET_VECTORIZED_WIDE void transform_weight_gradient(const Matrices<const float>& u,
                                                        int64_t inputs, int64_t outputs,
                                                        const Weights<float>& gradient) {
  float taps[9 * kStrip];
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t k = 0; k < inputs; k += kStrip) {
      const int64_t strip = std::min(kStrip, inputs - k);
      transform_all<WeightGradientLine>(u.at(o, k), kPatch * u.point, u.point, taps, 3 * kStrip,
                                        kStrip, strip);
      for (int64_t tap = 0; tap < 9; ++tap) {
        float* const to = gradient.at(k, o) + tap / 3 * gradient.down + tap % 3 * gradient.right;
        for (int64_t c = 0; c < strip; ++c) to[c * gradient.input] = taps[tap * kStrip + c];
      }
    }
  }
}

FASTUNET_VECTORIZED_WIDE void add_pixels(const Images<const float>& images, const Tiles& tiles,
                                         int64_t channels, double* sums, int64_t begin,
                                         int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of(tile, tiles);
    const int64_t rows = std::min(kTile, tiles.height - place.row);
    const int64_t columns = std::min(kTile, tiles.width - place.column);
    for (int64_t k = 0; k < channels; k += kStrip) {
      const int64_t strip = std::min(kStrip, channels - k);
      float sum[kStrip] = {};
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const float* const pixel = images.at(place.image, place.row + i, place.column + j) + k;
          for (int64_t c = 0; c < strip; ++c) sum[c] += pixel[c];
        }
      }
      for (int64_t c = 0; c < strip; ++c) sums[k + c] += sum[c];
    }
  }
}

FASTUNET_VECTORIZED_WIDE void add(float* __restrict sums, const float* __restrict terms,
                                  int64_t size) {
  for (int64_t i = 0; i < size; ++i) sums[i] += terms[i];
}

}  // namespace fastunet::cpu::winograd
