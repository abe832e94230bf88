// Carving touching cells apart on a GPU; ids <= 0 are no cell. Nothing here waits for it, or takes
// memory of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shape.h"

namespace fastunet::cuda {

// Id is int32_t or int64_t; the workspace holds one Id a pixel.
template <typename Id>
cudaError_t separate_touching(const Id* labels, const Shape& shape, int64_t width, Id* workspace,
                              Id* carved, void* stream);

}  // namespace fastunet::cuda
