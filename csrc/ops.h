// What the operators check on every device. This file and ops*.cpp alone include torch's headers;
// fastunet/ops/<op>/op.py checks first and says it better.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

namespace fastunet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// pixels that are worth a thread
constexpr int64_t kGrainPixels = 1 << 14;

// tasks that are worth a thread, if each has so many pixels
inline int64_t grain(int64_t pixels) {
  return std::max<int64_t>(1, kGrainPixels / std::max<int64_t>(1, pixels));
}

// steps along an axis are counted in float32
constexpr int64_t kLongestAxis = 1 << 24;

inline void check_labels(const Tensor& labels, const char* op) {
  const ScalarType dtype = labels.scalar_type();
  STD_TORCH_CHECK(labels.dim() == 4, op, ": labels must be [B, D, H, W], got rank ", labels.dim());
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op,
                  ": labels must be int32 or int64");
  for (int64_t axis = 1; axis < 4; ++axis) {
    STD_TORCH_CHECK(labels.size(axis) <= kLongestAxis, op, ": labels must be at most ",
                    kLongestAxis, " long, got ", labels.size(axis));
  }
}

// The axes of labels that are in space, and their spacing.
struct Grid {
  int64_t depth;
  int64_t height;
  int64_t width;
  double spacing_d;
  double spacing_h;
  double spacing_w;
};

// A single row is taken for a single column: lines are scanned along columns, and a scan, unlike a
// search, takes no longer where distances are great.
inline Grid grid_of(const Tensor& labels, double spacing_d, double spacing_h, double spacing_w) {
  const int64_t depth = labels.size(1), height = labels.size(2), width = labels.size(3);
  if (depth == 1 && height == 1) return {1, width, 1, spacing_d, spacing_w, spacing_h};
  return {depth, height, width, spacing_d, spacing_h, spacing_w};
}

inline void check_class_weight(const Tensor& given) {
  STD_TORCH_CHECK(given.scalar_type() == ScalarType::Float && given.numel() == 2,
                  "weight_map: class_weight must be [2] float32");
}

}  // namespace fastunet
