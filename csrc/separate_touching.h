// Carving touching cells apart: the arithmetic of one pixel, for host and device.
#pragma once

#include "weight_map.h"

namespace fastunet {

// A window of labels comes down to 0 (no cell), an id (one cell) or kSeveral; this joins two
// windows, which may overlap.
constexpr int kSeveral = -1;

template <typename Id>
FASTUNET_HOST_DEVICE inline Id join_windows(Id a, Id b) {
  const Id joined = a == 0 || a == b ? b : static_cast<Id>(kSeveral);
  return b == 0 ? a : joined;
}

}  // namespace fastunet
