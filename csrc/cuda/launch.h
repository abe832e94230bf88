// How the GPU's passes are launched, and how their threads find their pixels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

// blocks of a grid; kernels go on to further tasks by strides of the grid
#ifndef FASTUNET_LARGEST_GRID
#define FASTUNET_LARGEST_GRID 2147483647
#endif

namespace fastunet::cuda {

// of kernels that work on one pixel a thread
constexpr int kThreads = 256;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, void* stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, FASTUNET_LARGEST_GRID)));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  // who checks for errors next must not find this one, which the caller reports
  const cudaError_t last = cudaGetLastError();
  return error == cudaSuccess ? last : error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_on_pixels(void (*kernel)(Parameters...), int64_t pixels, void* stream,
                             Arguments... arguments) {
  return launch(kernel, (pixels + kThreads - 1) / kThreads, dim3(kThreads), stream, arguments...);
}

__device__ inline int64_t first_pixel() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ inline int64_t pixels_of_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Where pixel `i` lies on an axis of `size` whose neighbours are `stride` apart.
__device__ inline int position(int64_t i, int64_t stride, int size) {
  // the GPU has no 64-bit division, and its emulation is long
  if ((i | stride) >> 32 == 0) {
    return static_cast<int>(static_cast<uint32_t>(i) / static_cast<uint32_t>(stride) %
                            static_cast<uint32_t>(size));
  }
  return static_cast<int>(i / stride % size);
}

}  // namespace fastunet::cuda
