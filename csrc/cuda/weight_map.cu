// Four kernels: the scan within lines, whatever the whole batch decides, the merge across lines
// (volumes only), and the last merge, which writes the weights. docs/maths/weight_map.md has why.
#include "../weight_map.h"
#include "launch.h"
#include "weight_map.h"

namespace fastunet::cuda {
namespace {

// A block scans so many neighbouring lines, each cut into so many segments. 16 labels in a row
// fill the sectors that are read.
constexpr int kLines = 16;
constexpr int kSegments = 32;

// one Nearest a pixel, field by field
template <typename Id>
struct NearestMap {
  Id* id;
  float* first;
  float* second;

  __device__ Nearest<Id> operator[](int64_t i) const { return {id[i], first[i], second[i]}; }
  __device__ void set(int64_t i, const Nearest<Id>& nearest) const {
    id[i] = nearest.id;
    first[i] = nearest.first;
    second[i] = nearest.second;
  }
};

// what is known only when all labels have been seen
struct Settings {
  ClassWeight classes;
  float reach;
};

// Each block finds Nearest within kLines lines of labels [outer, length, inner], and how many of
// their pixels are cells unless cells_of_task is null. Reads the labels three times and the result
// once, and writes the result twice, all but the first mostly from cache.
template <typename Id>
__global__ void __launch_bounds__(kLines* kSegments)
    _scan_lines_kernel(const Id* __restrict__ labels, int64_t tasks, int length, int64_t inner,
                       float spacing, NearestMap<Id> nearest, int* cells_of_task) {
  // what a segment holds, as seen from its last pixel and from its first
  __shared__ Nearest<Id> seen_ahead[kSegments][kLines];
  __shared__ Nearest<Id> seen_behind[kSegments][kLines];
  __shared__ int cells_of_block;
  const int line = static_cast<int>(threadIdx.x);
  const int segment = static_cast<int>(threadIdx.y);
  const int steps = (length + kSegments - 1) / kSegments;
  const int64_t groups = (inner + kLines - 1) / kLines;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t column = task % groups * kLines + line;
    const int64_t corner = task / groups * length * inner + column;
    const int begin = segment * steps < length ? segment * steps : length;
    const int limit = begin + steps < length ? begin + steps : length;
    const int end = column < inner ? limit : begin;

    Nearest<Id> behind = nothing<Id>();
    Nearest<Id> ahead = nothing<Id>();
    int cells = 0;
    for (int row = begin; row < end; ++row) {
      const Id label = labels[corner + row * inner];
      behind = advance(behind, label);
      if (label > 0) {
        ahead = merge(ahead, Nearest<Id>{label, static_cast<float>(row - begin), INFINITY});
        ++cells;
      }
    }
    seen_ahead[segment][line] = behind;
    seen_behind[segment][line] = ahead;
    if (line == 0 && segment == 0) cells_of_block = 0;
    __syncthreads();
    if (cells_of_task != nullptr && cells > 0) atomicAdd(&cells_of_block, cells);

    behind = nothing<Id>();
    for (int other = 0; other < segment; ++other) {
      behind = merge(moved(behind, static_cast<float>(steps)), seen_ahead[other][line]);
    }
    for (int row = begin; row < end; ++row) {
      behind = advance(behind, labels[corner + row * inner]);
      nearest.set(corner + row * inner, behind);
    }
    ahead = nothing<Id>();
    for (int other = kSegments - 1; other > segment; --other) {
      ahead = merge(moved(ahead, static_cast<float>(steps)), seen_behind[other][line]);
    }
    for (int row = end - 1; row >= begin; --row) {
      const int64_t i = corner + row * inner;
      ahead = advance(ahead, labels[i]);
      const Nearest<Id> both = merge(ahead, nearest[i]);
      nearest.set(i, {both.id, squared(both.first, spacing), squared(both.second, spacing)});
    }
    // the next task writes what others may still read
    __syncthreads();
    if (cells_of_task != nullptr && line == 0 && segment == 0) {
      cells_of_task[task] = cells_of_block;
    }
  }
}

// One block adds up the cells and settles the class weights and the reach.
__global__ void _settle_kernel(const int* __restrict__ cells_of_task, int64_t tasks, int64_t pixels,
                               const float* __restrict__ class_weight, double w0, double sigma,
                               bool distances, Settings* settings) {
  __shared__ int64_t cells_of_thread[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  int64_t cells = 0;
  if (cells_of_task != nullptr) {
    for (int64_t task = thread; task < tasks; task += kThreads) cells += cells_of_task[task];
  }
  cells_of_thread[thread] = cells;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) cells_of_thread[thread] += cells_of_thread[thread + half];
  }
  if (thread != 0) return;
  ClassWeight classes{1.0f, 1.0f};
  if (class_weight != nullptr) {
    classes = {class_weight[0], class_weight[1]};
  } else if (cells_of_task != nullptr) {
    classes = balanced_class_weight(cells_of_thread[0], pixels);
  }
  const double reach = border_reach(w0, sigma, classes);
  *settings = {classes, distances ? INFINITY : static_cast<float>(reach)};
}

// Merges into pixel i what the `size` pixels along an axis show it; neighbours are `stride` apart.
template <bool last_axis, typename Id>
__device__ inline Nearest<Id> search(const NearestMap<Id>& map, int64_t i, int64_t stride, int size,
                                     float spacing, float reach) {
  const int behind = position(i, stride, size);
  const int ahead = size - 1 - behind;
  const int farthest = behind < ahead ? ahead : behind;
  Nearest<Id> best = map[i];
  for (int step = 1; step <= farthest; ++step) {
    const float square = squared(static_cast<float>(step), spacing);
    const float offset = static_cast<float>(step) * spacing;
    const float rest = reach - offset;
    if (square >= best.second || rest <= 0.0f) break;
    if (last_axis && offset > rest && best.first > rest * rest) break;
    const auto look = [&](int64_t at) {
      const float first = map.first[at] + square;
      // most pixels have nothing to add, and one number tells
      if (first >= best.second) return;
      best = merge(best, Nearest<Id>{map.id[at], first, map.second[at] + square});
    };
    if (step <= behind) look(i - step * stride);
    if (step <= ahead) look(i + step * stride);
  }
  return best;
}

// Each thread merges along one axis what one pixel sees. Reads up to 24 bytes a pixel and step,
// from cache but for 12 bytes a pixel, and writes 12.
template <typename Id>
__global__ void __launch_bounds__(kThreads)
    _merge_lines_kernel(NearestMap<Id> lines, NearestMap<Id> merged, int64_t pixels, int64_t stride,
                        int size, float spacing, const Settings* __restrict__ settings) {
  for (int64_t i = first_pixel(); i < pixels; i += pixels_of_grid()) {
    merged.set(i, search<false>(lines, i, stride, size, spacing, settings->reach));
  }
}

// Each thread merges along the last axis and writes one weight, and the distances unless d1 is
// null. Reads as the merge does, and the label; writes 4 bytes a pixel, or 12.
template <typename Id>
__global__ void __launch_bounds__(kThreads)
    _weigh_rows_kernel(const Id* __restrict__ labels, NearestMap<Id> nearest, int64_t pixels,
                       int width, float spacing, Border border,
                       const Settings* __restrict__ settings, float* __restrict__ weights,
                       float* __restrict__ d1, float* __restrict__ d2) {
  const ClassWeight classes = settings->classes;
  for (int64_t i = first_pixel(); i < pixels; i += pixels_of_grid()) {
    const Nearest<Id> best = search<true>(nearest, i, 1, width, spacing, settings->reach);
    const float first = std::sqrt(best.first);
    const float second = std::sqrt(best.second);
    const float of_class = labels[i] > 0 ? classes.cells : classes.background;
    weights[i] = of_class + border_weight(border, first, second);
    if (d1 != nullptr) {
      d1[i] = first;
      d2[i] = second;
    }
  }
}

// [outer, length, inner] of the first axis that is scanned: planes of a volume, rows of an image
struct Lines {
  int64_t outer;
  int length;
  int64_t inner;

  int64_t tasks() const { return outer * ((inner + kLines - 1) / kLines); }
};

Lines lines_of(const Shape& shape) {
  if (shape.depth == 1) return {shape.batch, shape.height, shape.width};
  return {shape.batch, shape.depth, static_cast<int64_t>(shape.height) * shape.width};
}

// How the workspace is divided: ids, squares, counts, settings.
template <typename Id>
struct Workspace {
  int64_t pixels;
  int64_t maps;
  int64_t tasks;

  explicit Workspace(const Shape& shape)
      : pixels(shape.pixels()),
        maps(shape.depth > 1 && shape.height > 1 ? 2 : 1),
        tasks(lines_of(shape).tasks()) {}
  int64_t bytes() const {
    return maps * pixels * static_cast<int64_t>(sizeof(Id) + 2 * sizeof(float)) +
           tasks * static_cast<int64_t>(sizeof(int)) + static_cast<int64_t>(sizeof(Settings));
  }
  Id* ids(void* start) const { return static_cast<Id*>(start); }
  float* squares(void* start) const { return reinterpret_cast<float*>(ids(start) + maps * pixels); }
  NearestMap<Id> map(void* start, int64_t number) const {
    float* const square = squares(start) + 2 * number * pixels;
    return {ids(start) + number * pixels, square, square + pixels};
  }
  int* cells_of_task(void* start) const {
    return reinterpret_cast<int*>(squares(start) + 2 * maps * pixels);
  }
  Settings* settings(void* start) const {
    return reinterpret_cast<Settings*>(cells_of_task(start) + tasks);
  }
};

}  // namespace

template <typename Id>
int64_t weight_map_workspace_bytes(const Shape& shape) {
  return Workspace<Id>(shape).bytes();
}

template <typename Id>
cudaError_t weight_map(const Id* labels, const Shape& shape, const WeightMapOptions& options,
                       void* workspace, float* weights, float* d1, float* d2, void* stream) {
  const Workspace<Id> space(shape);
  const Lines lines = lines_of(shape);
  const double along = shape.depth == 1 ? options.spacing_h : options.spacing_d;
  const bool counts = options.balanced && options.class_weight == nullptr;
  int* const cells_of_task = counts ? space.cells_of_task(workspace) : nullptr;
  Settings* const settings = space.settings(workspace);
  NearestMap<Id> nearest = space.map(workspace, 0);

  cudaError_t error = launch(_scan_lines_kernel<Id>, space.tasks, dim3(kLines, kSegments), stream,
                             labels, space.tasks, lines.length, lines.inner,
                             static_cast<float>(along), nearest, cells_of_task);
  if (error != cudaSuccess) return error;
  error =
      launch(_settle_kernel, 1, dim3(kThreads), stream, cells_of_task, space.tasks, space.pixels,
             options.class_weight, options.w0, options.sigma, options.distances, settings);
  if (error != cudaSuccess) return error;
  if (space.maps == 2) {
    const NearestMap<Id> merged = space.map(workspace, 1);
    error = launch_on_pixels(_merge_lines_kernel<Id>, space.pixels, stream, nearest, merged,
                             space.pixels, shape.width, shape.height,
                             static_cast<float>(options.spacing_h), settings);
    if (error != cudaSuccess) return error;
    nearest = merged;
  }
  return launch_on_pixels(_weigh_rows_kernel<Id>, space.pixels, stream, labels, nearest,
                          space.pixels, shape.width, static_cast<float>(options.spacing_w),
                          make_border(options.w0, options.sigma), settings, weights,
                          options.distances ? d1 : nullptr, options.distances ? d2 : nullptr);
}

template int64_t weight_map_workspace_bytes<int32_t>(const Shape&);
template int64_t weight_map_workspace_bytes<int64_t>(const Shape&);
template cudaError_t weight_map(const int32_t*, const Shape&, const WeightMapOptions&, void*,
                                float*, float*, float*, void*);
template cudaError_t weight_map(const int64_t*, const Shape&, const WeightMapOptions&, void*,
                                float*, float*, float*, void*);

}  // namespace fastunet::cuda
