// The copies of a concatenation and of its gradient on the CPU, for elements of any type.
#pragma once

#include <cstdint>

namespace fastunet::cpu {

// Runs of bytes, each `stride` after the one before.
struct Runs {
  char* data;
  int64_t stride;
};

// Copies `count` runs of `bytes` each.
void copy_runs(Runs from, Runs to, int64_t count, int64_t bytes);

// Writes `size` bytes: `lead` zeros, then the runs from `from`, `stride` after each other, and
// zeros wherever no run is.
void copy_runs_into_zeros(Runs from, int64_t count, int64_t bytes, char* to, int64_t lead,
                          int64_t stride, int64_t size);

}  // namespace fastunet::cpu
