// The passes of the weight map on the CPU. Each works on a range of independent tasks, so that the
// caller can spread them over threads; none depends on how the range is cut.
#pragma once

#include <cstdint>
#include <vector>

#include "../weight_map.h"

namespace fastunet::cpu {

// one Nearest a pixel, field by field
struct NearestMap {
  int32_t* id;
  float* first;
  float* second;

  NearestMap operator+(int64_t offset) const {
    return {id + offset, first + offset, second + offset};
  }
  Nearest<int32_t> operator[](int64_t i) const { return {id[i], first[i], second[i]}; }
};

// The offsets along an axis that a pixel looks at.
struct Window {
  int64_t steps = 0;
  std::vector<float> square;  // [steps + 1] squared offset
  std::vector<float>
      visible;  // [steps + 1] a nearest cell farther than this has no second in reach
};

// For an axis of `length` pixels; `reach` as border_reach gives it. On the last axis the nearest
// cell is known well enough to stop earlier.
Window make_window(int64_t length, float spacing, double reach, bool last_axis);

// Tasks are the `inner` lines of labels [length, inner].
void scan_lines(const int32_t* labels, int64_t length, int64_t inner, float spacing,
                NearestMap nearest, int64_t begin, int64_t end);

// Merges along the middle axis of [planes, height, width], in place. Tasks are planes *
// column_groups(width).
int64_t column_groups(int64_t width);
void merge_columns(NearestMap nearest, int64_t height, int64_t width, const Window& window,
                   int64_t begin, int64_t end);

// Merges along the last axis and writes the weights, and d1 and d2 unless they are null. Tasks are
// the rows.
void weigh_rows(const int32_t* labels, NearestMap nearest, int64_t width, const Window& window,
                const Border& border, const ClassWeight& classes, float* weights, float* d1,
                float* d2, int64_t begin, int64_t end);

int64_t count_cells(const int32_t* labels, int64_t begin, int64_t end);

// Copies 64-bit ids to 32 bits; false if one of them does not fit.
bool narrow_ids(const int64_t* labels, int32_t* narrow, int64_t begin, int64_t end);
// The same for ids of any size, numbered anew in order of appearance.
void renumber_ids(const int64_t* labels, int32_t* narrow, int64_t size);

}  // namespace fastunet::cpu
