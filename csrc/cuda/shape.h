// What a batch of labels measures.
#pragma once

#include <cstdint>

namespace fastunet::cuda {

// [batch, depth, height, width], contiguous and not empty; an image has depth 1
struct Shape {
  int64_t batch;
  int depth;
  int height;
  int width;

  int64_t pixels() const { return batch * depth * height * width; }
};

}  // namespace fastunet::cuda
