// What both files of Winograd's convolution on CPU tensors have in common: 36 matrices, one for
// each point, and their products by the BLAS that torch has.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/winograd.h"
#include "ops.h"

namespace fastunet::winograd {

using namespace cpu::winograd;

// Floats that a call takes, 64 MB, and the most that all its threads share of them.
constexpr int64_t kFloats = 16'000'000;
constexpr int64_t kSharedFloats = 7'000'000;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part [begin, end) of an axis.
struct Span {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
  Span block(int64_t index, int64_t size) const {
    return {begin + index * size, std::min(begin + (index + 1) * size, end)};
  }
};

// The size of blocks of about `size`, none of which is thin; with `smallest`, four or more that are
// no smaller. Threads have no say in it: their number must not change what is rounded.
inline int64_t block_of(int64_t all, int64_t size, int64_t smallest = 0) {
  const int64_t quarters = smallest > 0 ? std::min<int64_t>(4, all / smallest) : 1;
  const int64_t count = std::max({ceil_div(2 * all, 3 * size), quarters, int64_t{1}});
  return std::min(all, ceil_div(ceil_div(all, count), 16) * 16);
}

// Floats from one matrix to the next; a line more than it has, as caches dislike powers of two.
inline int64_t point_step(int64_t rows, int64_t columns) { return (rows * columns / 16 + 2) * 16; }

// Without: torch multiplies into contiguous matrices only, or into one after the other.
inline Matrices<float> products(float* data, int64_t rows, int64_t columns) {
  return {data, rows * columns, columns};
}

inline Matrices<float> matrices(float* data, int64_t rows, int64_t columns) {
  return {data, point_step(rows, columns), columns};
}

// `points` of the matrices from `first` on, as a tensor.
inline Tensor view(const Matrices<float>& of, int64_t rows, int64_t columns, int64_t first = 0,
                   int64_t points = kPoints) {
  return torch::stable::from_blob(
      of.data + first * of.point, {points, rows, columns}, {of.point, of.row, 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU, 0), ScalarType::Float);
}

// m = a b, or m + a b to accumulate.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& m, bool accumulate) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_baddbmm_out(m.get(), m.get(), a.get(), b.get(), accumulate ? 1.0 : 0.0, 1.0));
}

// How many threads may work with `own` floats each, beside what they share. Never one of several:
// its products would be shared among them, and their rounding would depend on their number.
inline int64_t workers(int64_t own, int64_t shared) {
  const int64_t threads = torch::stable::get_num_threads();
  return threads == 1 ? 1 : std::max<int64_t>(2, std::min(threads, (kFloats - shared) / own));
}

// Calls run(task, worker) for each task on so many threads. What a task computes depends on
// neither.
template <typename Run>
void for_tasks(int64_t tasks, int64_t workers, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next++) < tasks;) run(task, worker);
    }
  });
}

struct Source {
  Input input;
  int64_t channels;
};

struct Target {
  Output output;
  int64_t channels;
};

// Calls run(part, first channel within it, first channel within `channels`, their number) for the
// parts of a concatenation that `channels` touch.
template <typename Part, typename Run>
void for_parts(const std::vector<Part>& parts, Span channels, const Run& run) {
  int64_t start = 0;
  for (const Part& part : parts) {
    const int64_t begin = std::max(channels.begin, start);
    const int64_t end = std::min(channels.end, start + part.channels);
    if (begin < end) run(part, begin - start, begin - channels.begin, end - begin);
    start += part.channels;
  }
}

inline void transform_sources(const std::vector<Source>& sources, const Tiles& tiles, Span channels,
                              const Matrices<float>& v, Span rows) {
  for_parts(sources, channels, [&](const Source& part, int64_t first, int64_t at, int64_t count) {
    Input input = part.input;
    input.images = input.images.from_channel(first);
    transform_input(input, tiles, count, {v.at(0, at), v.point, v.row}, rows.begin, rows.end);
  });
}

inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Pixels of [B, C, H, W] in channels_last, less what lies around the centre of height x width.
inline Images<const float> centre(const Tensor& images, int64_t height, int64_t width) {
  STD_TORCH_CHECK(images.dim() == 4 && images.scalar_type() == ScalarType::Float &&
                      (images.stride(1) == 1 || images.size(1) == 1),
                  "winograd: images must be float32 in channels_last");
  const Images<const float> all{floats(images), images.stride(0), images.stride(2),
                                images.stride(3)};
  Images<const float> crop = all;
  crop.data = all.at(0, (images.size(2) - height) / 2, (images.size(3) - width) / 2);
  return crop;
}

inline std::vector<Source> sources_of(const Tensor& x, const std::optional<Tensor>& skip,
                                      int64_t padding) {
  const int64_t height = x.size(2), width = x.size(3);
  std::vector<Source> sources;
  if (skip.has_value()) {
    sources.push_back({{centre(*skip, height, width), height, width, padding}, skip->size(1)});
  }
  sources.push_back({{centre(x, height, width), height, width, padding}, x.size(1)});
  return sources;
}

inline int64_t channels_of(const std::optional<Tensor>& skip) {
  return skip.has_value() ? skip->size(1) : 0;
}

}  // namespace fastunet::winograd
