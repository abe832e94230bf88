// Convolution by Winograd's F(4x4, 3x3) on CPU tensors, and its gradient of the images: transforms
// of ours around products of a BLAS. Schemas are in fastunet/ops/conv_relu/winograd.py.
#include "ops_winograd.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastunet::winograd {
namespace {

using torch::stable::parallel_for;

// Tiles, output channels and input channels that are multiplied at a time, about: what a thread
// writes in between should stay in its cache, and the BLAS wants matrices that are not thin.
struct Blocks {
  int64_t tiles;
  int64_t outputs;
  int64_t inputs;
};
constexpr Blocks kSharedWeights{64, 256, 256};
constexpr Blocks kSharedWeightsNarrow{32, 64, 128};
constexpr Blocks kSharedInput{320, 128, 128};

// input channels whose weights are transformed at a time
constexpr int64_t kWeightRows = 16;

constexpr Images<float> kNowhere{nullptr, 0, 0, 0};
constexpr Images<const float> kNoMask{nullptr, 0, 0, 0};

struct Convolution {
  std::vector<Source> sources;
  std::vector<Target> targets;
  Tiles tiles;
  int64_t tile_count;
  int64_t inputs;
  int64_t outputs;
  Weights<const float> weights;

  Weights<const float> weights_from(int64_t input, int64_t output) const {
    Weights<const float> part = weights;
    part.data = weights.at(input, output);
    return part;
  }
};

void transform_targets(const Convolution& c, Span channels, const Matrices<float>& m, Span rows) {
  for_parts(c.targets, channels, [&](const Target& part, int64_t first, int64_t at, int64_t count) {
    Output output = part.output;
    output.images = output.images.from_channel(first);
    if (output.pooled.data != nullptr) output.pooled = output.pooled.from_channel(first);
    if (output.mask.data != nullptr) output.mask = output.mask.from_channel(first);
    if (output.bias != nullptr) output.bias += first;
    transform_output({m.at(0, at), m.point, m.row}, c.tiles, count, output, rows.begin, rows.end);
  });
}

// Weights are transformed once, a slab of output channels at a time, and each block of tiles where
// it is multiplied: for more tiles than output channels.
void convolve_sharing_weights(const Convolution& c, const Tensor& like) {
  const int64_t fit = kSharedFloats / (kPoints * c.inputs);
  const Blocks size = std::max(c.inputs, c.outputs) <= 64 ? kSharedWeightsNarrow : kSharedWeights;
  const Blocks block{block_of(c.tile_count, size.tiles, 16),
                     std::min(block_of(c.outputs, size.outputs), fit),
                     block_of(c.inputs, size.inputs)};
  const int64_t slab = std::min(c.outputs, fit / block.outputs * block.outputs);
  const int64_t u_size = kPoints * point_step(c.inputs, slab);
  const int64_t v_size = kPoints * point_step(block.tiles, block.inputs);
  const int64_t own_size = v_size + kPoints * block.tiles * block.outputs;
  const int64_t threads = workers(own_size, u_size);
  const Tensor memory = new_empty(like, {u_size + threads * own_size});
  float* const u_data = memory.mutable_data_ptr<float>();
  float* const own_data = u_data + u_size;

  const Span all_tiles{0, c.tile_count}, all_inputs{0, c.inputs};
  for (int64_t start = 0; start < c.outputs; start += slab) {
    const Span outputs{start, std::min(start + slab, c.outputs)};
    const Matrices<float> u = matrices(u_data, c.inputs, outputs.size());
    parallel_for(0, ceil_div(c.inputs, kWeightRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const Span inputs = all_inputs.block(part, kWeightRows);
        transform_weights(c.weights_from(inputs.begin, outputs.begin), inputs.size(),
                          outputs.size(), {u.at(inputs.begin, 0), u.point, u.row});
      }
    });
    const int64_t columns_of_blocks = ceil_div(outputs.size(), block.outputs);
    const int64_t tasks = columns_of_blocks * ceil_div(c.tile_count, block.tiles);
    for_tasks(tasks, threads, [&](int64_t task, int64_t worker) {
      const Span rows = all_tiles.block(task / columns_of_blocks, block.tiles);
      const Span columns = outputs.block(task % columns_of_blocks, block.outputs);
      float* const v_data = own_data + worker * own_size;
      const Matrices<float> m = products(v_data + v_size, rows.size(), columns.size());
      const Tensor product = view(m, rows.size(), columns.size());
      for (int64_t k = 0; k < c.inputs; k += block.inputs) {
        const Span inputs{k, std::min(k + block.inputs, c.inputs)};
        const Matrices<float> v = matrices(v_data, rows.size(), inputs.size());
        transform_sources(c.sources, c.tiles, inputs, v, rows);
        const Matrices<float> here{u.at(k, columns.begin - outputs.begin), u.point, u.row};
        multiply(view(v, rows.size(), inputs.size()), view(here, inputs.size(), columns.size()),
                 product, k > 0);
      }
      transform_targets(c, columns, m, rows);
    });
  }
}

// The input is transformed once, a slab of tiles at a time, and each block of weights where it is
// multiplied, six points at a time: for more output channels than tiles.
void convolve_sharing_input(const Convolution& c, const Tensor& like) {
  const int64_t fit = kSharedFloats / (kPoints * c.inputs);
  const Blocks block{std::min(block_of(c.tile_count, kSharedInput.tiles), fit),
                     block_of(c.outputs, kSharedInput.outputs, 32),
                     block_of(c.inputs, kSharedInput.inputs)};
  const int64_t slab = std::min(c.tile_count, fit / block.tiles * block.tiles);
  const int64_t v_size = kPoints * point_step(slab, c.inputs);
  const int64_t taps_size = 9 * block.inputs * (block.outputs + 16);
  const int64_t u_size = kPatch * point_step(block.inputs, block.outputs);
  const int64_t own_size = taps_size + u_size + kPoints * block.tiles * block.outputs;
  const int64_t threads = workers(own_size, v_size);
  const Tensor memory = new_empty(like, {v_size + threads * own_size});
  float* const v_data = memory.mutable_data_ptr<float>();
  float* const own_data = v_data + v_size;

  const Span all_outputs{0, c.outputs};
  for (int64_t start = 0; start < c.tile_count; start += slab) {
    const Span tiles{start, std::min(start + slab, c.tile_count)};
    const Matrices<float> v = matrices(v_data, tiles.size(), c.inputs);
    parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
      transform_sources(c.sources, c.tiles, {0, c.inputs}, {v.at(begin, 0), v.point, v.row},
                        {tiles.begin + begin, tiles.begin + end});
    });
    const int64_t rows_of_blocks = ceil_div(tiles.size(), block.tiles);
    const int64_t tasks = rows_of_blocks * ceil_div(c.outputs, block.outputs);
    for_tasks(tasks, threads, [&](int64_t task, int64_t worker) {
      const Span rows = tiles.block(task % rows_of_blocks, block.tiles);
      const Span columns = all_outputs.block(task / rows_of_blocks, block.outputs);
      float* const taps = own_data + worker * own_size;
      float* const u_data = taps + taps_size;
      const Matrices<float> m = products(u_data + u_size, rows.size(), columns.size());
      for (int64_t k = 0; k < c.inputs; k += block.inputs) {
        const Span inputs{k, std::min(k + block.inputs, c.inputs)};
        const Weights<const float> weights =
            turn_weights(c.weights_from(k, columns.begin), inputs.size(), columns.size(), taps);
        const Matrices<float> u = matrices(u_data, inputs.size(), columns.size());
        const Matrices<float> here{v.at(rows.begin - tiles.begin, k), v.point, v.row};
        for (int64_t row = 0; row < kPatch; ++row) {
          const int64_t first = row * kPatch;
          transform_weights_row(row, weights, inputs.size(), columns.size(), u);
          multiply(view(here, rows.size(), inputs.size(), first, kPatch),
                   view(u, inputs.size(), columns.size(), 0, kPatch),
                   view(m, rows.size(), columns.size(), first, kPatch), k > 0);
        }
      }
      transform_targets(c, columns, m, rows);
    });
  }
}

void convolve(const Convolution& c, const Tensor& like) {
  if (c.tile_count == 0 || c.outputs == 0) return;
  if (c.tile_count >= c.outputs) {
    convolve_sharing_weights(c, like);
  } else {
    convolve_sharing_input(c, like);
  }
}

Images<float> pixels(const Tensor& images) {
  const int64_t column = images.size(3), row = images.size(2) * column;
  return {images.mutable_data_ptr<float>(), images.size(1) * row, row, column};
}

// Zeroes what lies around the centre of [B, H, W, C].
void zero_around(const Tensor& images, int64_t height, int64_t width) {
  const int64_t all_rows = images.size(1), row = images.size(2) * images.size(3);
  const int64_t top = (all_rows - height) / 2, channels = images.size(3);
  const int64_t left = (images.size(2) - width) / 2 * channels, inside = width * channels;
  float* const data = images.mutable_data_ptr<float>();
  parallel_for(0, images.size(0) * all_rows, grain(row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const line = data + i * row;
      const int64_t within = i % all_rows - top;
      const bool crosses = within >= 0 && within < height;
      std::fill(line, line + (crosses ? left : row), 0.0f);
      if (crosses) std::fill(line + left + inside, line + row, 0.0f);
    }
  });
}

std::tuple<Tensor, Tensor> winograd_conv_relu_cpu(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  int64_t padding,
                                                  const std::optional<Tensor>& skip, bool pool,
                                                  bool relu) {
  const int64_t batch = x.size(0), outputs = weight.size(0);
  const Tiles tiles{x.size(2) - 2 + 2 * padding, x.size(3) - 2 + 2 * padding};
  const Tensor y = new_empty(x, {batch, tiles.height, tiles.width, outputs});
  const Tensor pooled =
      pool ? new_empty(x, {batch, tiles.height / 2, tiles.width / 2, outputs}) : new_empty(x, {0});
  const Tensor offsets = bias.has_value() ? contiguous(*bias) : x;
  const float* const bias_data = bias.has_value() ? floats(offsets) : nullptr;
  const Weights<const float> weights{floats(weight), weight.stride(1), weight.stride(0),
                                     weight.stride(2), weight.stride(3)};
  convolve({sources_of(x, skip, padding),
            {{{pixels(y), pool ? pixels(pooled) : kNowhere, kNoMask, bias_data, relu}, outputs}},
            tiles,
            batch * tiles.per_image(),
            weight.size(1),
            outputs,
            weights},
           x);
  return {y, pooled};
}

std::tuple<Tensor, Tensor> winograd_grad_images_cpu(const Tensor& grad, const Tensor& weight,
                                                    int64_t padding, const Tensor& x,
                                                    const std::optional<Tensor>& skip, bool need_x,
                                                    bool need_skip, bool relu_made_x) {
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  const int64_t channels = x.size(1), skip_channels = channels_of(skip);
  need_skip = need_skip && skip.has_value();
  const Tensor grad_x = need_x ? new_empty(x, {batch, height, width, channels}) : new_empty(x, {0});
  const Tensor grad_skip = need_skip
                               ? new_empty(x, {batch, skip->size(2), skip->size(3), skip_channels})
                               : new_empty(x, {0});
  std::vector<Target> targets;
  if (need_skip) {
    zero_around(grad_skip, height, width);
    Images<float> crop = pixels(grad_skip);
    crop.data = crop.at(0, (skip->size(2) - height) / 2, (skip->size(3) - width) / 2);
    targets.push_back({{crop, kNowhere, kNoMask, nullptr, false}, skip_channels});
  }
  if (need_x) {
    const Images<const float> mask = relu_made_x ? centre(x, height, width) : kNoMask;
    targets.push_back({{pixels(grad_x), kNowhere, mask, nullptr, false}, channels});
  }
  // weights turned by 180 degrees, with input and output exchanged
  const int64_t first = need_skip ? 0 : skip_channels;
  const int64_t down = weight.stride(2), right = weight.stride(3);
  const Weights<const float> turned{floats(weight) + 2 * (down + right) + first * weight.stride(1),
                                    weight.stride(0), weight.stride(1), -down, -right};
  const Tiles tiles{height, width};
  convolve({sources_of(grad, std::nullopt, 2 - padding), targets, tiles, batch * tiles.per_image(),
            weight.size(0), (need_skip ? skip_channels : 0) + (need_x ? channels : 0), turned},
           x);
  return {grad_x, grad_skip};
}

}  // namespace
}  // namespace fastunet::winograd

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("winograd_conv_relu", TORCH_BOX(&fastunet::winograd::winograd_conv_relu_cpu));
  m.impl("winograd_grad_images", TORCH_BOX(&fastunet::winograd::winograd_grad_images_cpu));
}
