// What the operators check on every device. With ops.cpp and ops_cuda.cpp the only file that
// includes torch's headers; fastunet/ops/<op>/op.py checks first and says it better.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fastunet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline void check_class_weight(const Tensor& given) {
  STD_TORCH_CHECK(given.scalar_type() == ScalarType::Float && given.numel() == 2,
                  "weight_map: class_weight must be [2] float32");
}

}  // namespace fastunet
