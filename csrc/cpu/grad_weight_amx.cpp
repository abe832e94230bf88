#include "grad_weight_amx.h"

#include <algorithm>
#include <cstring>

#include "kept_memory.h"
#include "vectorize.h"

namespace fastunet::cpu {
namespace {

constexpr int64_t kTaps = 9;
// pixels of a tile product
constexpr int64_t kStep = 32;
// output blocks whose gradients are used one after the other with the same 32 channels of the image
constexpr int64_t kTogether = 2;
// of what these are in a band: it stays in the second cache
constexpr int64_t kBandBytes = 960 << 10;
// sums of 32 x 32 channels: for each tap four tiles, of which the first two have the first 16
// output channels
constexpr int64_t kTapSums = 1024;
constexpr int64_t kBlockSums = kTaps * kTapSums;
// parts at most, and bytes of their sums
constexpr int64_t kParts = 16;
constexpr int64_t kPartBytes = 8 << 20;
// how far ahead images are fetched, in bytes
constexpr int64_t kAhead = 2048;

}  // namespace

GradWeightTasks::GradWeightTasks(const GradWeightAmx& of, int64_t threads) {
  const int64_t pixel_bytes = kLineBytes * (std::min(kTogether, of.out_blocks()) + 1);
  const int64_t rows = of.rows();
  band_rows = std::clamp<int64_t>(kBandBytes / pixel_bytes / of.pitch(), 1, rows);
  // as high as each other
  band_rows = ceil_div(rows, ceil_div(rows, band_rows));
  bands = ceil_div(rows, band_rows);
  const int64_t weights = of.out_blocks() * of.in_blocks() * kBlockSums;
  part_sums = 32 * of.out_blocks() + (bands == 1 ? 0 : weights);
  const int64_t bytes = part_sums * static_cast<int64_t>(sizeof(float));
  parts = std::clamp<int64_t>(kPartBytes / bytes, 1, std::min(kParts, bands));
  channel_parts = std::min(of.out_blocks(), ceil_div(threads, parts));
}

#ifdef FASTUNET_AMX

namespace {

// The pixels of a band in one line.
struct Line {
  // of the gradient, in whole steps
  int64_t pixels;
  // the gradient of one channel after the other, each after a step of zeros
  uint8_t* grad;
  int64_t grad_stride;
  // the image by 16 channels, in pairs of pixels
  uint8_t* x;
  int64_t x_stride;

  Line(const GradWeightAmx& of, int64_t rows, int64_t out_blocks) {
    pixels = ceil_div(rows * of.pitch(), kStep) * kStep;
    // an odd number of cache lines, so that channels do not share their places in a cache
    grad_stride = (((kStep + pixels) * 2 / kLineBytes) | 1) * kLineBytes;
    x_stride = (pixels / 2 + of.pitch() + 2) * kLineBytes;
    thread_local Kept kept;
    grad = kept.bytes(32 * out_blocks * grad_stride + 2 * of.in_blocks() * x_stride);
    x = grad + 32 * out_blocks * grad_stride;
  }
};

// Goes along the line's pixels.
class Walk {
 public:
  // Of rows [first, first + rows) of all padded images; those of `image` begin `margin` rows and
  // columns after them.
  Walk(const GradWeightAmx& of, const Pixels& image, int64_t height, int64_t width, int64_t margin,
       int64_t first, int64_t rows)
      : of_(of),
        image_(image),
        height_(height),
        width_(width),
        margin_(margin),
        row_(first),
        end_(std::min(first + rows, of.images * of.image_rows())) {
    enter_row();
  }

  // The next pixel, or null where there is none.
  const Bits16* next() {
    const int64_t column = column_ - margin_;
    const bool inside = start_ != nullptr && column >= 0 && column < width_;
    const Bits16* const pixel = inside ? start_ + column * image_.column_stride : nullptr;
    if (++column_ == of_.pitch()) {
      column_ = 0;
      ++row_;
      enter_row();
    }
    return pixel;
  }

 private:
  void enter_row() {
    const int64_t row = row_ % of_.image_rows() - margin_;
    const bool inside = row_ < end_ && row >= 0 && row < height_;
    start_ = inside ? image_.data + row_ / of_.image_rows() * image_.image_stride +
                          row * image_.row_stride
                    : nullptr;
  }

  const GradWeightAmx& of_;
  const Pixels& image_;
  int64_t height_, width_, margin_, row_, end_;
  int64_t column_ = 0;
  const Bits16* start_ = nullptr;
};

// Channels of a pixel, or zeros where there is none.
FASTUNET_AMX FASTUNET_INLINE __m512i loaded(const Bits16* pixel, int64_t channel, __mmask32 lanes) {
  if (pixel == nullptr) return _mm512_setzero_si512();
  _mm_prefetch(reinterpret_cast<const char*>(pixel + channel) + kAhead, _MM_HINT_T0);
  return _mm512_maskz_loadu_epi16(lanes, pixel + channel);
}

// The lanes of 32 channels from `channel` on.
__mmask32 lanes_of(int64_t channels, int64_t channel) {
  return ~0u >> (32 - std::min<int64_t>(32, channels - channel));
}

// Copies rows [first, first + rows) of the gradient, blocks [begin, end) of its channels.
FASTUNET_AMX void fill_grad(const GradWeightAmx& of, int64_t first, int64_t rows, int64_t begin,
                            int64_t end, const Line& line) {
  Walk walk(of, of.grad, of.out_height(), of.out_width(), 0, first, rows);
  alignas(kLineBytes) Bits16 even[32], odd[32];
  for (int k = 0; k < 32; ++k) {
    even[k] = static_cast<Bits16>(2 * k);
    odd[k] = static_cast<Bits16>(2 * k + 1);
  }
  const __m512i evens = _mm512_load_si512(even), odds = _mm512_load_si512(odd);
  for (int64_t channel = 0; channel < 32 * (end - begin); ++channel) {
    _mm512_store_si512(line.grad + channel * line.grad_stride, _mm512_setzero_si512());
  }
  for (int64_t pixel = 0; pixel < line.pixels; pixel += kStep) {
    const Bits16* from[kStep];
    for (const Bits16*& each : from) each = walk.next();
    for (int64_t block = begin; block < end; ++block) {
      const __mmask32 lanes = lanes_of(of.grad.channels, 32 * block);
      __m512i left[16], right[16];
      for (int k = 0; k < 16; ++k) {
        left[k] = loaded(from[k], 32 * block, lanes);
        right[k] = loaded(from[16 + k], 32 * block, lanes);
      }
      transpose(left);
      transpose(right);
      uint8_t* to = line.grad + 32 * (block - begin) * line.grad_stride + 2 * (kStep + pixel);
      for (int k = 0; k < 16; ++k, to += 2 * line.grad_stride) {
        _mm512_store_si512(to, _mm512_permutex2var_epi16(left[k], evens, right[k]));
        _mm512_store_si512(to + line.grad_stride,
                           _mm512_permutex2var_epi16(left[k], odds, right[k]));
      }
    }
  }
}

// Copies the rows of the padded images that rows [first, first + rows) of the gradient touch.
FASTUNET_AMX void fill_x(const GradWeightAmx& of, int64_t first, int64_t rows, const Line& line) {
  Walk walk(of, of.x, of.height, of.width, of.padding, first, rows + 2);
  alignas(kLineBytes) Bits16 low[32], high[32];
  for (int k = 0; k < 32; ++k) {
    low[k] = static_cast<Bits16>(k / 2 + 32 * (k % 2));
    high[k] = static_cast<Bits16>(low[k] + 16);
  }
  const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
  for (int64_t at = 0; at < line.x_stride; at += kLineBytes) {
    const Bits16* const a = walk.next();
    const Bits16* const b = walk.next();
    uint8_t* to = line.x + at;
    for (int64_t block = 0; block < of.in_blocks(); ++block, to += 2 * line.x_stride) {
      const __mmask32 lanes = lanes_of(of.x.channels, 32 * block);
      const __m512i one = loaded(a, 32 * block, lanes), other = loaded(b, 32 * block, lanes);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(one, lows, other));
      _mm512_store_si512(to + line.x_stride, _mm512_permutex2var_epi16(one, highs, other));
    }
  }
}

// What three taps of a row multiply: the gradient as it lies or moved by one pixel, and the image
// of two neighbouring pairs. One gradient takes part with both, the other with the nearer pair.
struct Operands {
  const uint8_t *main, *other;
  int64_t grad_stride;
  const uint8_t *near, *far;
  int64_t x_stride;
};

// Adds the products of a line to the sums of three taps, of 16 output channels and 16 or 32
// channels each: of main and far, main and near, other and near.
template <int kTiles>
FASTUNET_AMX FASTUNET_INLINE void multiply(Operands by, int64_t steps, bool fresh,
                                           float* const (&sums)[3]) {
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  } else {
    _tile_loadd(0, sums[0], kLineBytes);
    _tile_loadd(2, sums[1], kLineBytes);
    _tile_loadd(4, sums[2], kLineBytes);
    if (kTiles == 2) {
      _tile_loadd(1, sums[0] + 256, kLineBytes);
      _tile_loadd(3, sums[1] + 256, kLineBytes);
      _tile_loadd(5, sums[2] + 256, kLineBytes);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, by.main, by.grad_stride);
    _tile_loadd(7, by.far, kLineBytes);
    _tile_dpbf16ps(0, 6, 7);
    if (kTiles == 2) {
      _tile_loadd(7, by.far + by.x_stride, kLineBytes);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, by.near + by.x_stride, kLineBytes);
      _tile_dpbf16ps(3, 6, 7);
    }
    _tile_loadd(7, by.near, kLineBytes);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, by.other, by.grad_stride);
    _tile_dpbf16ps(4, 6, 7);
    if (kTiles == 2) {
      _tile_loadd(7, by.near + by.x_stride, kLineBytes);
      _tile_dpbf16ps(5, 6, 7);
    }
    by.main += kLineBytes;
    by.other += kLineBytes;
    by.near += kTileBytes;
    by.far += kTileBytes;
  }
  _tile_stored(0, sums[0], kLineBytes);
  _tile_stored(2, sums[1], kLineBytes);
  _tile_stored(4, sums[2], kLineBytes);
  if (kTiles == 2) {
    _tile_stored(1, sums[0] + 256, kLineBytes);
    _tile_stored(3, sums[1] + 256, kLineBytes);
    _tile_stored(5, sums[2] + 256, kLineBytes);
  }
}

// Adds up the gradient of 32 output channels, by products with ones.
FASTUNET_AMX void add_gradient(const Line& line, const uint8_t* grad, bool fresh, float* sums) {
  alignas(kLineBytes) Bits16 ones[kTileBytes / 2];
  alignas(kLineBytes) float tile[256];
  std::fill_n(ones, kTileBytes / 2, Bits16(0x3f80));
  _tile_loadd(7, ones, kLineBytes);
  for (int64_t half = 0; half < 2; ++half, grad += 16 * line.grad_stride) {
    _tile_zero(0);
    for (int64_t pixel = 0; pixel < line.pixels; pixel += kStep) {
      _tile_loadd(4, grad + 2 * (kStep + pixel), line.grad_stride);
      _tile_dpbf16ps(0, 4, 7);
    }
    _tile_stored(0, tile, kLineBytes);
    for (int64_t k = 0; k < 16; ++k) {
      sums[16 * half + k] = tile[16 * k] + (fresh ? 0.0f : sums[16 * half + k]);
    }
  }
}

// Adds a band's products to the sums of 32 output channels and 32 channels.
FASTUNET_AMX void add_block(const GradWeightAmx& of, const Line& line, const uint8_t* grad,
                            const uint8_t* x, bool narrow, bool fresh, float* sums) {
  for (int64_t row = 0; row < 3; ++row) {
    const int64_t away = row * of.pitch();
    const bool odd = away % 2 != 0;
    const uint8_t* const pair = x + away / 2 * kLineBytes;
    for (int64_t half = 0; half < 2; ++half) {
      const uint8_t* const from = grad + half * 16 * line.grad_stride + 2 * kStep;
      const Operands by = {
          odd ? from - 2 : from,          odd ? from : from - 2,          line.grad_stride,
          odd ? pair + kLineBytes : pair, odd ? pair : pair + kLineBytes, line.x_stride};
      float* const first = sums + 3 * row * kTapSums + 512 * half;
      float* const last = first + 2 * kTapSums;
      float* const to[3] = {odd ? first : last, odd ? last : first, first + kTapSums};
      if (narrow) {
        multiply<1>(by, line.pixels / kStep, fresh, to);
      } else {
        multiply<2>(by, line.pixels / kStep, fresh, to);
      }
    }
  }
}

// Adds 16 sums of each part.
FASTUNET_AMX FASTUNET_INLINE __m256i added(const float* sums, int64_t parts, int64_t stride) {
  __m512 sum = _mm512_loadu_ps(sums);
  for (int64_t part = 1; part < parts; ++part) {
    sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + part * stride));
  }
  return (__m256i)_mm512_cvtneps_pbh(sum);
}

// The lanes of 16 channels from `channel` on.
__mmask16 half_lanes(int64_t channels, int64_t channel) {
  return static_cast<__mmask16>(0xffff >> (16 - std::min<int64_t>(16, channels - channel)));
}

// Writes the weights of a block of output channels and one of channels from the sums of its parts.
FASTUNET_AMX void write_block(const GradWeightAmx& of, int64_t block, int64_t in, const float* sums,
                              int64_t parts, int64_t stride) {
  const int64_t c = of.x.channels;
  for (int64_t o = 32 * block; o < std::min(32 * block + 32, of.grad.channels); ++o) {
    const float* from = sums + o % 32 / 16 * 512 + o % 16 * 16;
    for (int64_t tap = 0; tap < kTaps; ++tap, from += kTapSums) {
      Bits16* const to = of.weight + (o * kTaps + tap) * c;
      for (int64_t channel = 32 * in; channel < std::min(32 * in + 32, c); channel += 16) {
        _mm256_mask_storeu_epi16(to + channel, half_lanes(c, channel),
                                 added(from + channel % 32 * 16, parts, stride));
      }
    }
  }
}

// Where the sums of a block of output channels and one of channels are in a part, behind the
// bias's.
int64_t block_sums_at(const GradWeightAmx& of, int64_t block, int64_t in) {
  return 32 * of.out_blocks() + (block * of.in_blocks() + in) * kBlockSums;
}

// Adds a band's products for blocks [begin, end) of output channels.
FASTUNET_AMX void add_band(const GradWeightAmx& of, const GradWeightTasks& tasks, const Line& line,
                           int64_t begin, int64_t end, bool fresh, float* sums) {
  alignas(kLineBytes) float of_single[kBlockSums];
  for (int64_t some = begin; some < end; some += kTogether) {
    const int64_t last = std::min(some + kTogether, end);
    for (int64_t in = 0; in < of.in_blocks(); ++in) {
      const uint8_t* const x = line.x + 2 * in * line.x_stride;
      const bool narrow = of.x.channels - 32 * in <= 16;
      for (int64_t block = some; block < last; ++block) {
        const uint8_t* const grad = line.grad + 32 * (block - begin) * line.grad_stride;
        if (in == 0) add_gradient(line, grad, fresh, sums + 32 * block);
        if (tasks.bands == 1) {
          add_block(of, line, grad, x, narrow, true, of_single);
          write_block(of, block, in, of_single, 1, 0);
        } else {
          add_block(of, line, grad, x, narrow, fresh, sums + block_sums_at(of, block, in));
        }
      }
    }
  }
}

}  // namespace

FASTUNET_AMX void grad_weight_amx(const GradWeightAmx& of, const GradWeightTasks& tasks,
                                  int64_t begin, int64_t end, float* sums) {
  const int64_t blocks = ceil_div(of.out_blocks(), tasks.channel_parts);
  TileConfig(16).load();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / tasks.channel_parts, share = task % tasks.channel_parts;
    const int64_t from = share * blocks, to = std::min(from + blocks, of.out_blocks());
    if (from >= to) continue;
    const int64_t first_band = part * tasks.bands / tasks.parts;
    for (int64_t band = first_band; band < (part + 1) * tasks.bands / tasks.parts; ++band) {
      const int64_t first = band * tasks.band_rows;
      const int64_t of_band = std::min(tasks.band_rows, of.rows() - first);
      const Line line(of, of_band, to - from);
      fill_grad(of, first, of_band, from, to, line);
      fill_x(of, first, of_band, line);
      add_band(of, tasks, line, from, to, band == first_band, sums + part * tasks.part_sums);
    }
  }
  _tile_release();
}

FASTUNET_AMX void add_parts(const GradWeightAmx& of, const GradWeightTasks& tasks,
                            const float* sums, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t o = 32 * block; o < std::min(32 * block + 32, of.grad.channels); o += 16) {
      _mm256_mask_storeu_epi16(of.bias + o, half_lanes(of.grad.channels, o),
                               added(sums + o, tasks.parts, tasks.part_sums));
    }
    for (int64_t in = 0; tasks.bands > 1 && in < of.in_blocks(); ++in) {
      write_block(of, block, in, sums + block_sums_at(of, block, in), tasks.parts, tasks.part_sums);
    }
  }
}

#else

void grad_weight_amx(const GradWeightAmx&, const GradWeightTasks&, int64_t, int64_t, float*) {}
void add_parts(const GradWeightAmx&, const GradWeightTasks&, const float*, int64_t, int64_t) {}

#endif

}  // namespace fastunet::cpu
