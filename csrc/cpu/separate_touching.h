// Carving touching cells apart on the CPU, one axis at a time; ids <= 0 are no cell. As in
// weight_map.h, each pass works on a range of independent tasks.
#pragma once

#include <cstdint>

#include "../separate_touching.h"

namespace fastunet::cpu {

// The windows of `width` pixels to either side, in rows of `length` labels. Tasks are the rows.
template <typename Id>
void join_pixels(const Id* labels, Id* joined, int64_t length, int64_t width, int64_t begin,
                 int64_t end);

// Joins the windows of `width` rows to either side along the middle axis of [outer, length, inner].
// Tasks are the rows, outer * length.
template <typename Id>
void join_rows(const Id* windows, Id* joined, int64_t length, int64_t inner, int64_t width,
               int64_t begin, int64_t end);

// Zero where the window of a cell's pixel holds several cells, the label elsewhere. Tasks are the
// pixels.
template <typename Id>
void carve(const Id* labels, const Id* windows, Id* carved, int64_t begin, int64_t end);

}  // namespace fastunet::cpu
