// As much of CUDA as the kernels under csrc/cuda use, on the host: the threads of a block are
// fibers that take turns at each __syncthreads, in forward or in reverse order. Results and
// addresses are as on a GPU; warps, memory ordering and speed are not.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// blocks run one after another
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  dim3 index;
  bool done;
};
inline bool reverse = false;
// the only one to launch on, and the number of the launch that shall fail
inline const cudaStream_t current_stream = &blockIdx;
inline int failing_launch = -1;
inline int launches = 0;
inline cudaError_t last_error = cudaSuccess;
inline std::vector<Fiber> fibers;
inline Fiber* running;
inline ucontext_t scheduler;
inline std::function<void()> kernel;

inline void run_thread() {
  kernel();
  running->done = true;
}

inline void run_block() {
  const std::size_t threads = blockDim.x * blockDim.y * blockDim.z;
  if (fibers.size() < threads) fibers.resize(threads);
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    const unsigned x = static_cast<unsigned>(i), plane = blockDim.x * blockDim.y;
    fiber.index = dim3(x % blockDim.x, x / blockDim.x % blockDim.y, x / plane);
    fiber.done = false;
    makecontext(&fiber.context, run_thread, 0);
  }
  // a round takes every thread to its next barrier
  for (std::size_t done = 0; done < threads;) {
    done = 0;
    for (std::size_t turn = 0; turn < threads; ++turn) {
      running = &fibers[reverse ? threads - 1 - turn : turn];
      threadIdx = running->index;
      swapcontext(&scheduler, &running->context);
      done += running->done;
    }
    if (done != 0 && done != threads) {
      std::fputs("a barrier that only some threads of the block reach\n", stderr);
      std::abort();
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
#if !defined(EMULATION_WITHOUT_BARRIER)
  swapcontext(&emulation::running->context, &emulation::scheduler);
#endif
}

inline int atomicAdd(int* address, int value) {
  *address += value;
  return *address - value;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  const bool fails = emulation::launches++ == emulation::failing_launch;
  if (fails || config->stream != emulation::current_stream || grid.x == 0 || grid.x > 2147483647u ||
      grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 ||
      config->dynamicSmemBytes > 48 * 1024) {
    return emulation::last_error = cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  emulation::kernel = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulation::run_block();
      }
    }
  }
  return cudaSuccess;
}
