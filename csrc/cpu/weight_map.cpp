#include "weight_map.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>

#include "vectorize.h"

namespace fastunet::cpu {
namespace {

// pixels searched together
constexpr int64_t kLanes = 32;
// steps between two looks at whether all of them have finished
constexpr int64_t kStepsPerCheck = 4;
// columns scanned together
constexpr int64_t kStripe = 64;

// a piece of a map, small enough to stay in registers or the nearest cache
template <int64_t size>
struct Block {
  int32_t id[size];
  float first[size];
  float second[size];

  Nearest<int32_t> operator[](int64_t i) const { return {id[i], first[i], second[i]}; }
  void set(int64_t i, const Nearest<int32_t>& nearest) {
    id[i] = nearest.id;
    first[i] = nearest.first;
    second[i] = nearest.second;
  }
  NearestMap map() { return {id, first, second}; }
};

void copy(const NearestMap& from, int64_t count, const NearestMap& to) {
  std::copy_n(from.id, count, to.id);
  std::copy_n(from.first, count, to.first);
  std::copy_n(from.second, count, to.second);
}

// The part of a map that a search may look at, with an empty margin of `margin` entries on both
// sides, so that no step needs to ask where the image ends.
class Padded {
 public:
  Padded(int64_t size, int64_t margin)
      : id_(size + 2 * margin, 0),
        first_(size + 2 * margin, INFINITY),
        second_(size + 2 * margin, INFINITY),
        inside_(NearestMap{id_.data(), first_.data(), second_.data()} + margin) {}
  const NearestMap& inside() const { return inside_; }

 private:
  std::vector<int32_t> id_;
  std::vector<float> first_, second_;
  NearestMap inside_;
};

// Merges into kLanes neighbours everything the window shows them; steps are `stride` entries apart.
FASTUNET_INLINE Block<kLanes> search(const NearestMap& map, int64_t stride, const Window& window) {
  Block<kLanes> block;
  for (int64_t lane = 0; lane < kLanes; ++lane) block.set(lane, map[lane]);
  for (int64_t step = 1; step <= window.steps; ++step) {
    const float square = window.square[step];
    if (step % kStepsPerCheck == 1) {
      int32_t open = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        open |= (square < block.second[lane]) & (block.first[lane] <= window.visible[step]);
      }
      if (open == 0) break;
    }
    const int64_t offset = step * stride;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      Nearest<int32_t> sides = merge(map[lane - offset], map[lane + offset]);
      sides.first += square;
      sides.second += square;
      block.set(lane, merge(block[lane], sides));
    }
  }
  return block;
}

}  // namespace

Window make_window(int64_t length, float spacing, double reach, bool last_axis) {
  Window window;
  window.square.push_back(0.0f);
  window.visible.push_back(INFINITY);
  for (int64_t step = 1; step < length; ++step) {
    const double offset = static_cast<double>(step) * spacing;
    if (offset >= reach) break;
    const double rest = reach - offset;
    window.square.push_back(squared(static_cast<float>(step), spacing));
    window.visible.push_back(last_axis && offset > rest ? static_cast<float>(rest * rest)
                                                        : INFINITY);
    window.steps = step;
  }
  return window;
}

FASTUNET_VECTORIZED
void scan_lines(const int32_t* labels, int64_t length, int64_t inner, float spacing,
                NearestMap nearest, int64_t begin, int64_t end) {
  for (int64_t start = begin; start < end; start += kStripe) {
    const int64_t count = std::min(kStripe, end - start);
    for (const bool forward : {true, false}) {
      Block<kStripe> behind;
      for (int64_t i = 0; i < kStripe; ++i) behind.set(i, nothing<int32_t>());
      for (int64_t step = 0; step < length; ++step) {
        const int64_t row = (forward ? step : length - 1 - step) * inner + start;
        for (int64_t i = 0; i < count; ++i) behind.set(i, advance(behind[i], labels[row + i]));
        if (forward) {
          copy(behind.map(), count, nearest + row);
          continue;
        }
        for (int64_t i = 0; i < count; ++i) {
          const Nearest<int32_t> both = merge(behind[i], nearest[row + i]);
          nearest.id[row + i] = both.id;
          nearest.first[row + i] = squared(both.first, spacing);
          nearest.second[row + i] = squared(both.second, spacing);
        }
      }
    }
  }
}

int64_t column_groups(int64_t width) { return (width + kLanes - 1) / kLanes; }

FASTUNET_VECTORIZED
void merge_columns(NearestMap nearest, int64_t height, int64_t width, const Window& window,
                   int64_t begin, int64_t end) {
  const Padded columns(height * kLanes, window.steps * kLanes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t x = task % column_groups(width) * kLanes;
    const int64_t count = std::min(kLanes, width - x);
    const NearestMap corner = nearest + (task / column_groups(width) * height * width + x);
    for (int64_t y = 0; y < height; ++y) {
      copy(corner + y * width, count, columns.inside() + y * kLanes);
    }
    for (int64_t y = 0; y < height; ++y) {
      Block<kLanes> block = search(columns.inside() + y * kLanes, kLanes, window);
      copy(block.map(), count, corner + y * width);
    }
  }
}

FASTUNET_VECTORIZED
void weigh_rows(const int32_t* labels, NearestMap nearest, int64_t width, const Window& window,
                const Border& border, const ClassWeight& classes, float* weights, float* d1,
                float* d2, int64_t begin, int64_t end) {
  const Padded row(column_groups(width) * kLanes, window.steps);
  for (int64_t y = begin; y < end; ++y) {
    copy(nearest + y * width, width, row.inside());
    for (int64_t x = 0; x < width; x += kLanes) {
      const Block<kLanes> block = search(row.inside() + x, 1, window);
      const int64_t corner = y * width + x;
      const int64_t count = std::min(kLanes, width - x);
      float first[kLanes], second[kLanes], falloff[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        first[lane] = std::sqrt(block.first[lane]);
        second[lane] = std::sqrt(block.second[lane]);
        falloff[lane] = border_weight(border, first[lane], second[lane]);
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        const float of_class = labels[corner + lane] > 0 ? classes.cells : classes.background;
        weights[corner + lane] = of_class + falloff[lane];
      }
      if (d1 != nullptr) {
        std::copy_n(first, count, d1 + corner);
        std::copy_n(second, count, d2 + corner);
      }
    }
  }
}

FASTUNET_VECTORIZED
int64_t count_cells(const int32_t* labels, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) count += labels[i] > 0;
  return count;
}

FASTUNET_VECTORIZED
bool narrow_ids(const int64_t* labels, int32_t* narrow, int64_t begin, int64_t end) {
  int64_t largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = std::max<int64_t>(labels[i], 0);
    largest = std::max(largest, id);
    narrow[i] = static_cast<int32_t>(id);
  }
  return largest <= std::numeric_limits<int32_t>::max();
}

void renumber_ids(const int64_t* labels, int32_t* narrow, int64_t size) {
  std::unordered_map<int64_t, int32_t> numbers;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t next = static_cast<int32_t>(numbers.size()) + 1;
    narrow[i] = labels[i] > 0 ? numbers.try_emplace(labels[i], next).first->second : 0;
  }
}

}  // namespace fastunet::cpu
