// Convolutions of bfloat16 images on the matrix tiles of AMX, with what surrounds them in a U-Net.
//
// A tile product multiplies 16 pixels x 32 channels by 32 channels x 16 output channels. Images are
// copied, a band of rows at a time, into blocks of 32 channels, where the 16 pixels under any tap
// are one run of memory. The copy also joins sources, crops, and pads with zeros.
#pragma once

#include <cstdint>

#include "amx.h"

namespace fastunet::cpu {

// Whether the processor has AMX for bfloat16 and the system lets this process use it.
bool has_amx();

// A convolution's weights, [C_out, taps, C_in].
struct Weights {
  const Bits16* data;
  int64_t c_out_stride;
  int64_t tap_stride;
  int64_t c_in_stride;
};

// A convolution of stride 1 with 3x3 weights. Its input may be in two parts, whose channels follow
// each other.
struct ConvAmx {
  Pixels inputs[2];
  int64_t n_inputs;
  int64_t height, width;  // of each input
  int64_t padding;
  int64_t c_out;

  Weights weights;
  const Bits16* packed;  // all weights by pack_weights; or null, to pack those that come next
  const Bits16* bias;    // [c_out], or null
  bool relu;
  const Bits16* mask;  // shaped as y, which becomes 0 where this is not above 0; or null
  Bits16* y;           // [B, out_height(), out_width(), c_out]
  Bits16* pooled;      // [B, out_height() / 2, out_width() / 2, c_out], or null

  int64_t c_in() const;
  int64_t in_blocks() const { return (c_in() + 31) / 32; }
  int64_t out_blocks() const { return (c_out + 31) / 32; }
  int64_t out_height() const { return height + 2 * padding - 2; }
  int64_t out_width() const { return width + 2 * padding - 2; }
  // weights of 16 output channels
  int64_t packed_group() const { return in_blocks() * 9 * kTileValues; }
  int64_t packed_size() const { return 2 * out_blocks() * packed_group(); }
};

// How the work of a convolution is shared out: by bands of rows, whose copy fits a core's cache,
// and where these are few also by output channels. Then a weight is used by few tasks, each of
// which packs it itself, in its cache.
struct Tasks {
  int64_t band_rows;
  int64_t bands;          // of an image
  int64_t channel_parts;  // of a band
  bool pack_weights;

  Tasks(const ConvAmx& conv, int64_t images, int64_t threads);
};

// Arranges groups [begin, end) of 16 output channels, of which there are two an output block.
void pack_weights(const ConvAmx& conv, int64_t begin, int64_t end, Bits16* packed);

// Computes tasks [begin, end) of images x bands x channel parts. Each thread keeps memory for one
// band and the weights it packs, about 2 MiB, until it ends.
void conv_amx(const ConvAmx& conv, const Tasks& tasks, int64_t begin, int64_t end);

}  // namespace fastunet::cpu
