#include "conv_amx.h"

#include <algorithm>
#include <cstring>

#include "kept_memory.h"
#include "vectorize.h"

#ifdef FASTUNET_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastunet::cpu {
namespace {

// pixels of a tile, and rows that are computed together
constexpr int64_t kPixels = 16;
constexpr int64_t kRows = 4;
constexpr int64_t kTaps = 3;
// rows and columns of input beyond those of output
constexpr int64_t kHalo = 2;
// of a band's copy: it and the weights of 32 output channels stay in the second cache
constexpr int64_t kBandBytes = 768 << 10;
// to pack weights once for each takes less than to write them to memory
constexpr int64_t kFewBands = 2;

}  // namespace

int64_t ConvAmx::c_in() const {
  int64_t channels = 0;
  for (int64_t part = 0; part < n_inputs; ++part) channels += inputs[part].channels;
  return channels;
}

Tasks::Tasks(const ConvAmx& conv, int64_t images, int64_t threads) {
  const int64_t row_bytes = kLineBytes * conv.in_blocks() * (conv.width + 2 * conv.padding);
  const int64_t fitting = std::max(kRows, kBandBytes / row_bytes - kHalo);
  int64_t wanted = ceil_div(conv.out_height(), fitting);
  pack_weights = images * wanted <= kFewBands && conv.out_blocks() >= 4 * threads;
  // as many for each thread
  while (!pack_weights && images * wanted % threads != 0) ++wanted;
  band_rows = ceil_div(ceil_div(conv.out_height(), wanted), kRows) * kRows;
  bands = ceil_div(conv.out_height(), band_rows);
  channel_parts = std::min(conv.out_blocks(), ceil_div(threads, images * bands));
}

#ifdef FASTUNET_AMX

namespace {

bool ask_for_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!(d & kAmxBf16) || !(d & kAmxTile) || !__builtin_cpu_supports("avx512bf16")) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The copied rows of a band, [blocks of 32 channels, rows, columns, 32].
struct Band {
  uint8_t* data;
  int64_t blocks;
  int64_t block_bytes;
  int64_t row_bytes;

  Band(const ConvAmx& conv, int64_t rows)
      : blocks(conv.in_blocks()), row_bytes((conv.width + 2 * conv.padding) * kLineBytes) {
    block_bytes = (rows + kHalo) * row_bytes;
    thread_local Kept kept;
    data = kept.bytes(blocks * block_bytes);
  }
};

// The packed weights of output blocks [begin, end).
const uint8_t* packed_weights(const ConvAmx& conv, int64_t begin, int64_t end) {
  const int64_t block = 2 * conv.packed_group();
  if (conv.packed != nullptr) return reinterpret_cast<const uint8_t*>(conv.packed + begin * block);
  thread_local Kept kept;
  uint8_t* const packed = kept.bytes((end - begin) * block * static_cast<int64_t>(sizeof(Bits16)));
  pack_weights(conv, 2 * begin, 2 * end, reinterpret_cast<Bits16*>(packed));
  return packed;
}

// Copies rows [first, first + rows) of the padded image.
FASTUNET_AMX void fill(const ConvAmx& conv, int64_t image, int64_t first, int64_t rows,
                       const Band& band) {
  // what no source writes is zero
  const bool joins_in_a_block = conv.n_inputs > 1 && conv.inputs[0].channels % 32 != 0;
  const int64_t margin = conv.padding * kLineBytes;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = first + row - conv.padding;
    const bool is_inside = i >= 0 && i < conv.height && !joins_in_a_block;
    for (int64_t block = 0; block < band.blocks; ++block) {
      uint8_t* const line = band.data + block * band.block_bytes + row * band.row_bytes;
      std::memset(line, 0, is_inside ? margin : band.row_bytes);
      if (is_inside) std::memset(line + band.row_bytes - margin, 0, margin);
    }
  }
  int64_t channel = 0;
  for (int64_t part = 0; part < conv.n_inputs; ++part) {
    const Pixels& input = conv.inputs[part];
    const int64_t whole = input.channels / 32, rest = input.channels % 32;
    const __mmask32 of_rest = (1u << rest) - 1;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t i = first + row - conv.padding;
      if (i < 0 || i >= conv.height) continue;
      const Bits16* from = input.data + image * input.image_stride + i * input.row_stride;
      uint8_t* to = band.data + channel / 32 * band.block_bytes + row * band.row_bytes +
                    conv.padding * kLineBytes;
      for (int64_t j = 0; j < conv.width; ++j, from += input.column_stride, to += kLineBytes) {
        if (channel % 32 == 0) {
          for (int64_t block = 0; block < whole; ++block) {
            std::memcpy(to + block * band.block_bytes, from + 32 * block, kLineBytes);
          }
          if (rest > 0) {
            _mm512_store_si512(to + whole * band.block_bytes,
                               _mm512_maskz_loadu_epi16(of_rest, from + 32 * whole));
          }
          continue;
        }
        uint8_t* block = to;
        int64_t lane = channel % 32;
        for (int64_t c = 0; c < input.channels; lane = 0, block += band.block_bytes) {
          const int64_t run = std::min(32 - lane, input.channels - c);
          std::memcpy(block + 2 * lane, from + c, 2 * run);
          c += run;
        }
      }
    }
    channel += input.channels;
  }
}

// Adds up 4 rows x 16 pixels x 16 output channels over all taps and input channels; the sums of a
// row are followed by those of its other 16 channels.
FASTUNET_AMX FASTUNET_INLINE void multiply(const Band& band, const uint8_t* pixels,
                                           const uint8_t* weights, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < band.blocks; ++block, pixels += band.block_bytes) {
    for (int64_t tap_row = 0; tap_row < kTaps; ++tap_row) {
      const uint8_t* from = pixels + tap_row * band.row_bytes;
      for (int64_t tap = 0; tap < kTaps; ++tap, from += kLineBytes, weights += kTileBytes) {
        // a tile load waits for each line that is not in the first cache
        for (int64_t line = 0; line < kTileBytes; line += kLineBytes) {
          _mm_prefetch(reinterpret_cast<const char*>(weights) + 2 * kTileBytes + line, _MM_HINT_T0);
        }
        _tile_loadd(7, weights, kLineBytes);
        _tile_loadd(4, from, kLineBytes);
        _tile_dpbf16ps(0, 4, 7);
        _tile_loadd(5, from + band.row_bytes, kLineBytes);
        _tile_dpbf16ps(1, 5, 7);
        _tile_loadd(6, from + 2 * band.row_bytes, kLineBytes);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(4, from + 3 * band.row_bytes, kLineBytes);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
  _tile_stored(0, sums, kLineBytes);
  _tile_stored(1, sums + 512, kLineBytes);
  _tile_stored(2, sums + 1024, kLineBytes);
  _tile_stored(3, sums + 1536, kLineBytes);
}

// Where sums of rows x columns x channels go.
struct Place {
  int64_t image, row, column, channel;
  int64_t rows, columns, channels;
};

FASTUNET_AMX FASTUNET_INLINE __m512 widened(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The larger of values whose sign is clear, as integers, so that NaN wins.
FASTUNET_AMX FASTUNET_INLINE __m512 larger(__m512 a, __m512 b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// Adds the bias, clamps, masks, pools and stores what multiply() left for 32 channels.
template <bool kPool>
FASTUNET_AMX FASTUNET_INLINE void finish(const float* sums, const ConvAmx& conv,
                                         const Place& place) {
  const __mmask32 lanes = ~0u >> (32 - place.channels);
  const int64_t height = conv.out_height(), width = conv.out_width(), c_out = conv.c_out;
  const int64_t start =
      ((place.image * height + place.row) * width + place.column) * c_out + place.channel;
  __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (conv.bias != nullptr) {
    const __m512i bits = _mm512_maskz_loadu_epi16(lanes, conv.bias + place.channel);
    bias[0] = widened(_mm512_castsi512_si256(bits));
    bias[1] = widened(_mm512_extracti64x4_epi64(bits, 1));
  }
  for (int64_t upper = 0; upper < place.rows; upper += 2) {
    const int64_t below = std::min(upper + 2, place.rows);
    __m512 largest[2];
    for (int64_t column = 0; column < place.columns; ++column) {
      for (int64_t row = upper; row < below; ++row) {
        const int64_t offset = start + (row * width + column) * c_out;
        __m512 value[2];
        for (int half = 0; half < 2; ++half) {
          const float* from = sums + 512 * row + 256 * half + 16 * column;
          value[half] = _mm512_add_ps(_mm512_loadu_ps(from), bias[half]);
          if (conv.relu) value[half] = clamped(value[half]);
          if (kPool) {
            const bool fresh = row == upper && column % 2 == 0;
            largest[half] = fresh ? value[half] : larger(largest[half], value[half]);
          }
        }
        __m512i bits = narrowed(value);
        if (conv.mask != nullptr) {
          const __m512i gate = _mm512_maskz_loadu_epi16(lanes, conv.mask + offset);
          bits =
              _mm512_maskz_mov_epi16(_mm512_cmpgt_epi16_mask(gate, _mm512_setzero_si512()), bits);
        }
        _mm512_mask_storeu_epi16(conv.y + offset, lanes, bits);
      }
      if (kPool && column % 2 == 1 && below == upper + 2) {
        const int64_t pixel = (place.image * (height / 2) + (place.row + upper) / 2) * (width / 2) +
                              (place.column + column) / 2;
        _mm512_mask_storeu_epi16(conv.pooled + pixel * c_out + place.channel, lanes,
                                 narrowed(largest));
      }
    }
  }
}

// Computes rows [first, first + rows) of blocks [begin, end) of 32 output channels.
FASTUNET_AMX void convolve(const ConvAmx& conv, const Band& band, int64_t image, int64_t first,
                           int64_t rows, int64_t begin, int64_t end) {
  // those of 16 channels that no image has are not computed
  alignas(kLineBytes) float sums[8 * 256] = {};
  const int64_t group_bytes = 2 * conv.packed_group();
  const int64_t width = conv.out_width(), whole = width / kPixels * kPixels;
  // with few input channels storing weighs more: whole lines of memory, and their neighbours
  const int64_t together = conv.in_blocks() <= 4 ? 2 : 1;
  for (int64_t some = begin; some < end; some += together) {
    const int64_t last = std::min(some + together, end);
    const uint8_t* const packed = packed_weights(conv, some, last);
    for (const bool strip : {false, true}) {
      const int64_t left = strip ? whole : 0, right = strip ? width : whole;
      const int64_t columns = strip ? width - whole : kPixels;
      if (left == right) continue;
      // of weights, and as many pixels in each other
      TileConfig(columns).load();
      for (int64_t i = 0; i < rows; i += kRows) {
        for (int64_t j = left; j < right; j += kPixels) {
          const uint8_t* pixels = band.data + i * band.row_bytes + j * kLineBytes;
          for (int64_t block = some; block < last; ++block) {
            const uint8_t* weights = packed + 2 * (block - some) * group_bytes;
            multiply(band, pixels, weights, sums);
            const int64_t channel = 32 * block;
            if (channel + 16 < conv.c_out) {
              multiply(band, pixels, weights + group_bytes, sums + 256);
            }
            const Place place = {image,
                                 first + i,
                                 j,
                                 channel,
                                 std::min(kRows, rows - i),
                                 columns,
                                 std::min<int64_t>(32, conv.c_out - channel)};
            if (conv.pooled != nullptr) {
              finish<true>(sums, conv, place);
            } else {
              finish<false>(sums, conv, place);
            }
          }
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

bool has_amx() {
  static const bool has = ask_for_amx();
  return has;
}

void pack_weights(const ConvAmx& conv, int64_t begin, int64_t end, Bits16* packed) {
  const Weights& weights = conv.weights;
  const int64_t taps = kTaps * kTaps, blocks = conv.in_blocks();
  for (int64_t group = begin; group < end; ++group, packed += conv.packed_group()) {
    const int64_t out = 16 * group;
    const int64_t c_out = std::clamp<int64_t>(conv.c_out - out, 0, 16);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Bits16* from = weights.data + out * weights.c_out_stride + tap * weights.tap_stride;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t c_in = std::min<int64_t>(32, conv.c_in() - 32 * block);
        pack_tile(from + 32 * block * weights.c_in_stride, weights.c_out_stride,
                  weights.c_in_stride, c_out, c_in, packed + (block * taps + tap) * kTileValues);
      }
    }
  }
}

void conv_amx(const ConvAmx& conv, const Tasks& tasks, int64_t begin, int64_t end) {
  // a last group of rows may reach below the image: it is computed whole and stored in part
  const Band band(conv, tasks.band_rows);
  int64_t filled = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % tasks.channel_parts, copy = task / tasks.channel_parts;
    const int64_t image = copy / tasks.bands, first = copy % tasks.bands * tasks.band_rows;
    const int64_t rows = std::min(tasks.band_rows, conv.out_height() - first);
    if (copy != filled) fill(conv, image, first, rows + kHalo, band);
    filled = copy;
    const int64_t blocks = ceil_div(conv.out_blocks(), tasks.channel_parts);
    convolve(conv, band, image, first, rows, part * blocks,
             std::min((part + 1) * blocks, conv.out_blocks()));
  }
}

#else

bool has_amx() { return false; }
void pack_weights(const ConvAmx&, int64_t, int64_t, Bits16*) {}
void conv_amx(const ConvAmx&, const Tasks&, int64_t, int64_t) {}

#endif

}  // namespace fastunet::cpu
