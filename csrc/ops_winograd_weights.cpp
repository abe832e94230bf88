// The gradient of the weights, and of the bias, of a convolution by Winograd's F(4x4, 3x3) on CPU
// tensors: the adjoint of the convolution, which is F(3x3, 4x4). Schemas are in
// fastunet/ops/conv_relu/winograd.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops_winograd.h"

namespace fastunet::winograd {
namespace {

// Channels of a block of the gradient, and tiles that are multiplied at a time.
constexpr int64_t kBlock = 128;
constexpr int64_t kTiles = 128;
// Tasks that are enough for threads to share, and so few that each may have as few tiles.
constexpr int64_t kEnough = 16, kFew = 4;
constexpr int64_t kFewestTiles = 32;

struct Problem {
  std::vector<Source> sources;
  Images<const float> grad;
  Tiles tiles;
  int64_t tile_count;
  int64_t inputs;
  int64_t outputs;
};

// dU[point, o, k] = sum over tiles of (A g A^T)[tile, o] (B^T d B)[tile, k], for channels of one
// block; with `sums`, these too get their tiles' pixels added.
void accumulate(const Problem& problem, Span outputs, Span inputs, Span tiles, float* memory,
                const Matrices<float>& u, double* sums) {
  const Images<const float> grad = problem.grad.from_channel(outputs.begin);
  const Tensor product = view(u, outputs.size(), inputs.size());
  for (int64_t start = tiles.begin; start < tiles.end; start += kTiles) {
    const Span rows{start, std::min(start + kTiles, tiles.end)};
    const Matrices<float> p = matrices(memory, rows.size(), outputs.size());
    const Matrices<float> v = matrices(memory + kPoints * p.point, rows.size(), inputs.size());
    transform_gradient(grad, problem.tiles, outputs.size(), p, rows.begin, rows.end);
    if (sums != nullptr) {
      add_pixels(grad, problem.tiles, outputs.size(), sums, rows.begin, rows.end);
    }
    transform_sources(problem.sources, problem.tiles, inputs, v, rows);
    multiply(torch::stable::transpose(view(p, rows.size(), outputs.size()), 1, 2),
             view(v, rows.size(), inputs.size()), product, start > tiles.begin);
  }
}

// Tiles are divided among so many groups, whose sums are added in order: no thread waits for
// another, and the number of threads changes no rounding.
struct Groups {
  int64_t count;
  int64_t tiles;
};

Groups groups_of(int64_t blocks, int64_t tile_count, int64_t floats) {
  const int64_t divisible =
      std::max(std::min(kFew / blocks, tile_count / kFewestTiles), tile_count / (2 * kTiles));
  const int64_t wanted = std::min({kEnough / blocks, kSharedFloats / floats, divisible});
  const int64_t tiles = ceil_div(tile_count, std::max<int64_t>(1, wanted));
  return {ceil_div(tile_count, tiles), tiles};
}

std::tuple<Tensor, Tensor> winograd_grad_weight_cpu(const Tensor& grad, const Tensor& x,
                                                    const std::optional<Tensor>& skip,
                                                    int64_t padding, bool need_bias) {
  const int64_t height = grad.size(2), width = grad.size(3);
  const Tiles tiles{height, width};
  const Problem problem{sources_of(x, skip, padding),  centre(grad, height, width),   tiles,
                        x.size(0) * tiles.per_image(), channels_of(skip) + x.size(1), grad.size(1)};
  const int64_t inputs = problem.inputs, outputs = problem.outputs;
  const Tensor grad_weight = new_empty(x, {outputs, 3, 3, inputs});
  const Tensor grad_bias = new_empty(x, {need_bias ? outputs : 0});

  const int64_t input_block = block_of(inputs, kBlock), output_block = block_of(outputs, kBlock);
  const int64_t input_blocks = ceil_div(inputs, input_block);
  const int64_t blocks = input_blocks * ceil_div(outputs, output_block);
  const int64_t u_size = kPoints * output_block * input_block;
  const Groups groups = groups_of(blocks, problem.tile_count, blocks * u_size);
  const int64_t own_size =
      kPoints * (point_step(kTiles, input_block) + point_step(kTiles, output_block));
  const int64_t sums_kept = groups.count == 1 ? 0 : groups.count * blocks;
  const int64_t threads = workers(own_size + (sums_kept == 0 ? u_size : 0), sums_kept * u_size);
  const int64_t kept = sums_kept == 0 ? threads : sums_kept;
  const Tensor memory = new_empty(x, {kept * u_size + threads * own_size});
  float* const u_data = memory.mutable_data_ptr<float>();
  float* const own_data = u_data + kept * u_size;
  std::vector<double> sums(need_bias ? groups.count * outputs : 0);

  const Span all_outputs{0, outputs}, all_inputs{0, inputs}, all_tiles{0, problem.tile_count};
  const auto finish = [&](int64_t block, const Matrices<float>& u) {
    const Span o = all_outputs.block(block / input_blocks, output_block);
    const Span k = all_inputs.block(block % input_blocks, input_block);
    const Weights<float> all{grad_weight.mutable_data_ptr<float>(), 1, 9 * inputs, 3 * inputs,
                             inputs};
    Weights<float> part = all;
    part.data = all.at(k.begin, o.begin);
    transform_weight_gradient({u.data, u.point, u.row}, k.size(), o.size(), part);
  };
  for_tasks(groups.count * blocks, threads, [&](int64_t task, int64_t worker) {
    const int64_t block = task % blocks, group = task / blocks;
    const Span o = all_outputs.block(block / input_blocks, output_block);
    const Span k = all_inputs.block(block % input_blocks, input_block);
    const Matrices<float> u =
        products(u_data + (groups.count == 1 ? worker : task) * u_size, o.size(), k.size());
    double* const sum =
        need_bias && k.begin == 0 ? sums.data() + group * outputs + o.begin : nullptr;
    accumulate(problem, o, k, all_tiles.block(group, groups.tiles), own_data + worker * own_size, u,
               sum);
    if (groups.count == 1) finish(block, u);
  });
  if (groups.count > 1) {
    for_tasks(blocks * kPoints, threads, [&](int64_t task, int64_t) {
      // the matrices of a block are contiguous: a 36th part of them is one task
      const int64_t part = u_size / kPoints, start = task % kPoints * part;
      float* const first = u_data + task / kPoints * u_size + start;
      for (int64_t group = 1; group < groups.count; ++group) {
        add(first, first + group * blocks * u_size, part);
      }
    });
    for_tasks(blocks, threads, [&](int64_t block, int64_t) {
      const Span o = all_outputs.block(block / input_blocks, output_block);
      const Span k = all_inputs.block(block % input_blocks, input_block);
      finish(block, products(u_data + block * u_size, o.size(), k.size()));
    });
  }
  for (int64_t o = 0; o < (need_bias ? outputs : 0); ++o) {
    double sum = 0;
    for (int64_t group = 0; group < groups.count; ++group) sum += sums[group * outputs + o];
    grad_bias.mutable_data_ptr<float>()[o] = static_cast<float>(sum);
  }
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastunet::winograd

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("winograd_grad_weight", TORCH_BOX(&fastunet::winograd::winograd_grad_weight_cpu));
}
