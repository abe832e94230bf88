// The weight map on a GPU. Nothing here waits for it, or takes memory of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shape.h"

namespace fastunet::cuda {

struct WeightMapOptions {
  const float* class_weight;  // [2] on the GPU, or null
  bool balanced;
  double w0;
  double sigma;
  double spacing_d;
  double spacing_h;
  double spacing_w;
  bool distances;
};

// Id is int32_t or int64_t. d1 and d2 are written if distances are asked for.
template <typename Id>
int64_t weight_map_workspace_bytes(const Shape& shape);
template <typename Id>
cudaError_t weight_map(const Id* labels, const Shape& shape, const WeightMapOptions& options,
                       void* workspace, float* weights, float* d1, float* d2, void* stream);

}  // namespace fastunet::cuda
