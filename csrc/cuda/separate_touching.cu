// Windows grow along one axis after the other, threefold a pass: joining windows that overlap is
// joining their union. The last pass carves.
#include <vector>

#include "../separate_touching.h"
#include "launch.h"
#include "separate_touching.h"

namespace fastunet::cuda {
namespace {

// Each thread joins, into the window of one pixel, those `step` pixels to either side along an
// axis; `carving`, it writes the label that remains instead. Reads three Ids a pixel and writes
// one, carving reads one more; neighbours come from cache.
template <typename Id>
__global__ void __launch_bounds__(kThreads)
    _join_windows_kernel(const Id* __restrict__ windows, const Id* __restrict__ labels,
                         Id* __restrict__ joined, int64_t pixels, int64_t stride, int size,
                         int step, bool carving) {
  // labels are windows of one pixel, but for negative ids
  const bool growing = windows != labels;
  for (int64_t i = first_pixel(); i < pixels; i += pixels_of_grid()) {
    const int behind = position(i, stride, size);
    const int ahead = size - 1 - behind;
    const auto window = [&](int64_t at) {
      const Id value = windows[at];
      return growing || value > 0 ? value : Id{0};
    };
    // the window at the border lies inside of one that would begin beyond it
    const Id left = window(i - (behind < step ? behind : step) * stride);
    const Id right = window(i + (ahead < step ? ahead : step) * stride);
    const Id all = join_windows(join_windows(left, window(i)), right);
    joined[i] = !carving ? all : labels[i] > 0 && all == kSeveral ? Id{0} : labels[i];
  }
}

struct Pass {
  int64_t stride;
  int size;
  int step;
};

// The passes that grow windows to `width` pixels to either side along every axis, at least one.
std::vector<Pass> plan(const Shape& shape, int64_t width) {
  const int64_t plane = static_cast<int64_t>(shape.height) * shape.width;
  std::vector<Pass> passes;
  for (const Pass& axis :
       {Pass{1, shape.width, 0}, Pass{shape.width, shape.height, 0}, Pass{plane, shape.depth, 0}}) {
    const int farthest = static_cast<int>(std::min<int64_t>(width, axis.size - 1));
    for (int covered = 0; covered < farthest;) {
      const int step = std::min(2 * covered + 1, farthest - covered);
      passes.push_back({axis.stride, axis.size, step});
      covered += step;
    }
  }
  if (passes.empty()) passes.push_back({1, shape.width, 0});
  return passes;
}

}  // namespace

template <typename Id>
cudaError_t separate_touching(const Id* labels, const Shape& shape, int64_t width, Id* workspace,
                              Id* carved, void* stream) {
  const std::vector<Pass> passes = plan(shape, width);
  const Id* windows = labels;
  for (std::size_t number = 0; number < passes.size(); ++number) {
    const Pass& pass = passes[number];
    // such that the last pass writes the result
    Id* const joined = (passes.size() - number) % 2 == 1 ? carved : workspace;
    const cudaError_t error = launch_on_pixels(_join_windows_kernel<Id>, shape.pixels(), stream,
                                               windows, labels, joined, shape.pixels(), pass.stride,
                                               pass.size, pass.step, number + 1 == passes.size());
    if (error != cudaSuccess) return error;
    windows = joined;
  }
  return cudaSuccess;
}

template cudaError_t separate_touching(const int32_t*, const Shape&, int64_t, int32_t*, int32_t*,
                                       void*);
template cudaError_t separate_touching(const int64_t*, const Shape&, int64_t, int64_t*, int64_t*,
                                       void*);

}  // namespace fastunet::cuda
