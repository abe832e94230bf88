// Convolutions of a few channels on the matrix tiles of AMX: what lies under the nine taps of a
// pixel is a row of a tile.
#include <algorithm>

#include "conv_few.h"
#include "kept_memory.h"

namespace fastunet::cpu {

#ifdef FASTUNET_AMX

namespace {

int64_t blocks_of(const ConvFew& conv) { return ceil_div(9 * conv.c_in, kLineValues); }

// The three rows of the padded input that an output row reads, and what each of its pixels reads
// of them: [pixels, blocks, kLineValues], a tap's channels after those of the tap before.
class Lines {
 public:
  explicit Lines(const ConvFew& conv)
      : conv_(conv),
        step_((conv.width + 2 * conv.padding) * conv.c_in + kLineValues),
        pixels_(ceil_div(conv.out_width(), 16) * 16) {
    thread_local Kept kept;
    const int64_t lines = (pixels_ * blocks_of(conv) + 1) * kLineValues, values = lines + 3 * step_;
    lines_ = reinterpret_cast<Bits16*>(kept.bytes(values * static_cast<int64_t>(sizeof(Bits16))));
    rows_ = lines_ + lines;
    // what lies between pixels and beyond the image is zero
    std::fill_n(lines_, values, Bits16(0));
  }

  const Bits16* of(int64_t pixel) const { return lines_ + pixel * blocks_of(conv_) * kLineValues; }

  // Takes input rows [first, first + 3) of an image.
  void take(const Bits16* image, int64_t first) {
    const int64_t values = conv_.width * conv_.c_in;
    for (int64_t row = 0; row < 3; ++row) {
      const int64_t i = first + row;
      Bits16* const to = rows_ + row * step_ + conv_.padding * conv_.c_in;
      if (i < 0 || i >= conv_.height) {
        std::fill_n(to, values, Bits16(0));
      } else {
        std::copy_n(image + i * values, values, to);
      }
    }
    spread();
  }

 private:
  FASTUNET_AMX void spread() {
    const int64_t run = 3 * conv_.c_in, line = blocks_of(conv_) * kLineValues;
    const __mmask32 taken = ~0u >> (32 - run);
    Bits16* to = lines_;
    for (int64_t j = 0; j < conv_.out_width(); ++j, to += line) {
      // zeros behind each run are overwritten by the next run or pixel
      for (int64_t row = 0; row < 3; ++row) {
        const __m512i values =
            _mm512_maskz_loadu_epi16(taken, rows_ + row * step_ + j * conv_.c_in);
        _mm512_storeu_si512(to + row * run, values);
      }
    }
  }

  const ConvFew& conv_;
  int64_t step_;
  int64_t pixels_;
  Bits16* lines_;
  Bits16* rows_;
};

// Outputs of up to 16 pixels and channels [channel, channel + 32).
FASTUNET_AMX void convolve(const ConvFew& conv, const Bits16* lines, int64_t channel,
                           int64_t pixels, Bits16* y) {
  alignas(kLineBytes) float sums[2][16][16];
  const int64_t blocks = blocks_of(conv), line_bytes = blocks * kLineBytes;
  const Bits16* const tile = conv.tiles.data() + channel / 16 * blocks * kTileValues;
  // the same line for each pixel
  _tile_loadd(0, conv.bias.data() + channel, 0);
  _tile_loadd(1, conv.bias.data() + channel + 16, 0);
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_loadd(2, lines + block * kLineValues, line_bytes);
    _tile_loadd(3, tile + block * kTileValues, kLineBytes);
    _tile_dpbf16ps(0, 2, 3);
    _tile_loadd(4, tile + (blocks + block) * kTileValues, kLineBytes);
    _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, sums[0], kLineBytes);
  _tile_stored(1, sums[1], kLineBytes);
  const __mmask32 stored = ~0u >> (32 - std::min(kLineValues, conv.c_out - channel));
  for (int64_t p = 0; p < pixels; ++p) {
    __m512 value[2];
    for (int half = 0; half < 2; ++half) {
      value[half] = _mm512_load_ps(sums[half][p]);
      if (conv.relu) value[half] = clamped(value[half]);
    }
    _mm512_mask_storeu_epi16(y + p * conv.c_out + channel, stored, narrowed(value));
  }
}

}  // namespace

void ConvFew::take(const Bits16* weights) {
  const int64_t taps = 9 * c_in, blocks = blocks_of(*this);
  tiles.resize(ceil_div(c_out, 32) * 2 * blocks * kTileValues);
  Bits16* to = tiles.data();
  for (int64_t k = 0; k < c_out; k += 16) {
    for (int64_t block = 0; block < blocks; ++block, to += kTileValues) {
      pack_tile(weights + k * taps + block * kLineValues, taps, 1, c_out - k,
                std::min(kLineValues, taps - block * kLineValues), to);
    }
  }
}

FASTUNET_AMX void conv_few(const ConvFew& conv, const Bits16* x, Bits16* y, int64_t begin,
                           int64_t end) {
  Lines lines(conv);
  TileConfig(16).load();
  const int64_t height = conv.out_height(), width = conv.out_width();
  for (int64_t task = begin; task < end; ++task) {
    const Bits16* const image = x + task / height * conv.height * conv.width * conv.c_in;
    lines.take(image, task % height - conv.padding);
    for (int64_t j = 0; j < width; j += 16) {
      Bits16* const to = y + (task * width + j) * conv.c_out;
      for (int64_t channel = 0; channel < conv.c_out; channel += 32) {
        convolve(conv, lines.of(j), channel, std::min<int64_t>(16, width - j), to);
      }
    }
  }
  _tile_release();
}

#else

void ConvFew::take(const Bits16*) {}
void conv_few(const ConvFew&, const Bits16*, Bits16*, int64_t, int64_t) {}

#endif

}  // namespace fastunet::cpu
