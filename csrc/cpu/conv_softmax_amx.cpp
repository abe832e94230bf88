// The head's products of bfloat16 images, on the matrix tiles of AMX.
#include "conv_amx.h"
#include "conv_softmax.h"

namespace fastunet::cpu {

#ifdef FASTUNET_AMX

FASTUNET_AMX void HeadOnTiles::pack(const Bits16* weight, int64_t classes, int64_t channels) {
  if (!has_amx() || channels % 32 != 0) return;
  const int64_t blocks = channels / 32;
  tiles_.resize(ceil_div(classes, 16) * blocks * kTileValues);
  Bits16* to = tiles_.data();
  for (int64_t k = 0; k < classes; k += 16) {
    for (int64_t block = 0; block < blocks; ++block, to += kTileValues) {
      pack_tile(weight + k * channels + 32 * block, channels, 1, classes - k, 32, to);
    }
  }
}

FASTUNET_AMX void HeadOnTiles::start() const {
  if (!tiles_.empty()) TileConfig(16).load();
}

FASTUNET_AMX void HeadOnTiles::stop() const {
  if (!tiles_.empty()) _tile_release();
}

FASTUNET_AMX void HeadOnTiles::multiply(const Bits16* x, const float* bias, int64_t classes,
                                        int64_t channels, float* logits, int64_t step) const {
  alignas(kLineBytes) float sums[16][16];
  const Bits16* tile = tiles_.data();
  for (int64_t first = 0; first < classes; first += 16) {
    _tile_zero(0);
    for (int64_t c = 0; c < channels; c += 32, tile += kTileValues) {
      _tile_loadd(1, x + c, channels * static_cast<int64_t>(sizeof(Bits16)));
      _tile_loadd(2, tile, kLineBytes);
      _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, sums, kLineBytes);
    __m512i rows[16];
    for (int64_t p = 0; p < 16; ++p) rows[p] = _mm512_load_si512(sums[p]);
    transpose(rows);
    for (int64_t k = 0; k < 16 && first + k < classes; ++k) {
      const __m512 of_class =
          _mm512_add_ps(_mm512_castsi512_ps(rows[k]), _mm512_set1_ps(bias[first + k]));
      _mm512_storeu_ps(logits + (first + k) * step, of_class);
    }
  }
}

#else

void HeadOnTiles::pack(const Bits16*, int64_t, int64_t) {}
void HeadOnTiles::start() const {}
void HeadOnTiles::stop() const {}
void HeadOnTiles::multiply(const Bits16*, const float*, int64_t, int64_t, float*, int64_t) const {}

#endif

}  // namespace fastunet::cpu
