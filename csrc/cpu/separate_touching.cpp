#include "separate_touching.h"

#include <algorithm>
#include <vector>

#include "vectorize.h"

namespace fastunet::cpu {
namespace {

template <typename Id>
FASTUNET_INLINE void join(const Id* from, Id* into, int64_t size) {
  for (int64_t i = 0; i < size; ++i) into[i] = join_windows(into[i], from[i]);
}

}  // namespace

template <typename Id>
FASTUNET_VECTORIZED void join_pixels(const Id* labels, Id* joined, int64_t length, int64_t width,
                                     int64_t begin, int64_t end) {
  const int64_t farthest = std::min(width, length - 1);
  std::vector<Id> cells(length);
  for (int64_t row = begin; row < end; ++row) {
    Id* const into = joined + row * length;
    for (int64_t x = 0; x < length; ++x) cells[x] = std::max<Id>(labels[row * length + x], 0);
    std::copy(cells.begin(), cells.end(), into);
    for (int64_t offset = 1; offset <= farthest; ++offset) {
      join(cells.data() + offset, into, length - offset);
      join(cells.data(), into + offset, length - offset);
    }
  }
}

template <typename Id>
FASTUNET_VECTORIZED void join_rows(const Id* windows, Id* joined, int64_t length, int64_t inner,
                                   int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = row % length;
    const int64_t behind = std::min(width, position);
    const int64_t ahead = std::min(width, length - 1 - position);
    Id* const into = joined + row * inner;
    std::copy_n(windows + row * inner, inner, into);
    for (int64_t offset = -behind; offset <= ahead; ++offset) {
      join(windows + (row + offset) * inner, into, inner);
    }
  }
}

template <typename Id>
FASTUNET_VECTORIZED void carve(const Id* labels, const Id* windows, Id* carved, int64_t begin,
                               int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    carved[i] = labels[i] > 0 && windows[i] == kSeveral ? 0 : labels[i];
  }
}

template void join_pixels(const int32_t*, int32_t*, int64_t, int64_t, int64_t, int64_t);
template void join_pixels(const int64_t*, int64_t*, int64_t, int64_t, int64_t, int64_t);
template void join_rows(const int32_t*, int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t);
template void join_rows(const int64_t*, int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t);
template void carve(const int32_t*, const int32_t*, int32_t*, int64_t, int64_t);
template void carve(const int64_t*, const int64_t*, int64_t*, int64_t, int64_t);

}  // namespace fastunet::cpu
