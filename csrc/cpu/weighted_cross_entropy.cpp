#include "weighted_cross_entropy.h"

#include <algorithm>
#include <type_traits>
#include <vector>

// Unlike the weight map, no other backend has to give the same bits, and polynomials are half of
// it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif
#include "softmax_rows.h"

namespace fastunet::cpu {
namespace {

constexpr int64_t kFewestPixels = 32;
constexpr int64_t kLanes = 32;

template <typename Real>
Smoothing<Real> make_smoothing(const CrossEntropy<Real>& problem) {
  Smoothing<Real> smoothing;
  if (problem.label_smoothing == 0) return smoothing;
  const Real share = problem.label_smoothing / static_cast<Real>(problem.classes);
  for (int64_t k = 0; k < problem.classes; ++k) {
    smoothing.smooth.push_back(problem.class_weight ? share * problem.class_weight[k] : share);
    smoothing.sum += smoothing.smooth.back();
  }
  return smoothing;
}

template <typename Target>
FASTUNET_INLINE bool read_index(const Target* target, int64_t count, int64_t classes,
                                int64_t ignore_index, int32_t* index) {
  int32_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = target[i];
    const bool counts = id != ignore_index;
    const bool inside = static_cast<uint64_t>(id) < static_cast<uint64_t>(classes);
    index[i] = counts & inside ? static_cast<int32_t>(id) : kIgnored;
    outside |= counts & !inside;
  }
  return outside == 0;
}

template <typename Real>
FASTUNET_INLINE bool read_index(const CrossEntropy<Real>& problem, int64_t at, int64_t count,
                                int32_t* index) {
  switch (problem.id) {
    case Id::kInt64:
      return read_index(static_cast<const int64_t*>(problem.target) + at, count, problem.classes,
                        problem.ignore_index, index);
    case Id::kInt32:
      return read_index(static_cast<const int32_t*>(problem.target) + at, count, problem.classes,
                        problem.ignore_index, index);
    default:
      return read_index(static_cast<const uint8_t*>(problem.target) + at, count, problem.classes,
                        problem.ignore_index, index);
  }
}

// Fetches what the next chunk starts with: while this one is computed, the hardware would not.
FASTUNET_INLINE void fetch(const void* data, int64_t begin, int64_t end, int64_t bytes) {
#if defined(__GNUC__)
  const char* line = static_cast<const char*>(data) + begin * bytes;
  for (int64_t i = 0; i < (end - begin) * bytes; i += 64) __builtin_prefetch(line + i);
#endif
}

template <typename Real>
FASTUNET_INLINE void fetch(const CrossEntropy<Real>& problem, int64_t begin, int64_t end) {
  const int64_t id_bytes = problem.id == Id::kInt64 ? 8 : problem.id == Id::kInt32 ? 4 : 1;
  fetch(problem.target, begin, end, id_bytes);
  if (problem.pixel_weight) fetch(problem.pixel_weight, begin, end, sizeof(Real));
}

template <typename Real>
FASTUNET_INLINE Real class_weight_of(const Real* class_weight, int32_t index) {
  return class_weight[index < 0 ? 0 : index];
}

template <typename Real>
FASTUNET_INLINE void read_weights(const CrossEntropy<Real>& problem, int64_t at,
                                  Pixels<Real>& pixels) {
  const int64_t count = pixels.count;
  if (problem.pixel_weight) {
    const Real* weight = problem.pixel_weight + at;
    for (int64_t i = 0; i < count; ++i) pixels.base[i] = pixels.index[i] < 0 ? Real(0) : weight[i];
  } else {
    for (int64_t i = 0; i < count; ++i) pixels.base[i] = pixels.index[i] < 0 ? Real(0) : Real(1);
  }
  if (problem.incoming) {
    for (int64_t i = 0; i < count; ++i) pixels.base[i] *= problem.incoming[at + i];
  }
  pixels.peak = pixels.base;
  if (!problem.class_weight && problem.label_smoothing == 0) return;
  pixels.peak = pixels.peaks;
  const Real share = 1 - problem.label_smoothing;
  for (int64_t i = 0; i < count; ++i) {
    const Real of_class =
        problem.class_weight ? class_weight_of(problem.class_weight, pixels.index[i]) : Real(1);
    pixels.peaks[i] = share * of_class * pixels.base[i];
  }
}

// the same order of additions wherever a chunk is computed
template <typename Real>
FASTUNET_INLINE double sum(const Real* values, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += values[i];
  double total = 0;
  for (const double lane : lanes) total += lane;
  return total;
}

// What the chunk adds to the divisor of "mean" or "weighted_mean".
template <typename Real>
FASTUNET_INLINE double counted(const CrossEntropy<Real>& problem, const Pixels<Real>& pixels) {
  if (!problem.class_weight && !(problem.pixels_in_divisor && problem.pixel_weight)) {
    int32_t number = 0;
    for (int64_t i = 0; i < pixels.count; ++i) number += pixels.index[i] >= 0;
    return number;
  }
  Real share[kMostPixels];
  for (int64_t i = 0; i < pixels.count; ++i) {
    const Real weight = problem.pixels_in_divisor ? pixels.base[i] : Real(1);
    const Real of_class =
        problem.class_weight ? class_weight_of(problem.class_weight, pixels.index[i]) : Real(1);
    share[i] = pixels.index[i] < 0 ? Real(0) : weight * of_class;
  }
  return sum(share, pixels.count);
}

// channels_last of a few classes, whose number the compiler has to know to shuffle them in
// registers
template <int64_t classes, typename Stored, typename Real>
FASTUNET_INLINE void read_interleaved(const Stored* from, int64_t count, Rows<Real> rows) {
  FASTUNET_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < classes; ++k) rows[k][i] = widened(from[i * classes + k]);
  }
}

template <int64_t classes, typename Stored, typename Real>
FASTUNET_INLINE void write_interleaved(Rows<Real> rows, int64_t count, Stored* to) {
  FASTUNET_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < classes; ++k) store(rows[k][i], to + i * classes + k);
  }
}

FASTUNET_INLINE bool interleaves(const Layout& layout, int64_t classes) {
  return layout.of_class == 1 && layout.pixel == classes;
}

template <typename Stored, typename Real>
FASTUNET_INLINE void read_rows(const Stored* from, const Layout& layout, int64_t classes,
                               int64_t count, Rows<Real> rows) {
  if (interleaves(layout, classes)) {
    if (classes == 2) return read_interleaved<2>(from, count, rows);
    if (classes == 3) return read_interleaved<3>(from, count, rows);
    if (classes == 4) return read_interleaved<4>(from, count, rows);
    if (classes == 8) return read_interleaved<8>(from, count, rows);
    if (classes == 16) return read_interleaved<16>(from, count, rows);
  }
  for (int64_t k = 0; k < classes; ++k) {
    const Stored* row = from + k * layout.of_class;
    if (layout.pixel == 1) {
      for (int64_t i = 0; i < count; ++i) rows[k][i] = widened(row[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) rows[k][i] = widened(row[i * layout.pixel]);
    }
  }
}

template <typename Stored, typename Real>
FASTUNET_INLINE void write_rows(Rows<Real> rows, int64_t classes, int64_t count, Stored* to,
                                const Layout& layout) {
  if (interleaves(layout, classes)) {
    if (classes == 2) return write_interleaved<2>(rows, count, to);
    if (classes == 3) return write_interleaved<3>(rows, count, to);
    if (classes == 4) return write_interleaved<4>(rows, count, to);
    if (classes == 8) return write_interleaved<8>(rows, count, to);
    if (classes == 16) return write_interleaved<16>(rows, count, to);
  }
  for (int64_t k = 0; k < classes; ++k) {
    Stored* row = to + k * layout.of_class;
    if (layout.pixel == 1) {
      for (int64_t i = 0; i < count; ++i) store(rows[k][i], row + i);
    } else {
      for (int64_t i = 0; i < count; ++i) store(rows[k][i], row + i * layout.pixel);
    }
  }
}

// Calls f with a value of the type that logits are stored in.
template <typename Real, typename F>
FASTUNET_INLINE void with_stored(Number number, const F& f) {
  if constexpr (std::is_same_v<Real, float>) {
    if (number == Number::kFloat16) return f(Float16());
    if (number == Number::kBFloat16) return f(BFloat16());
  }
  f(Real());
}

// `scratch` holds a row of pixels a class.
template <typename Real>
FASTUNET_INLINE void run_chunk(const CrossEntropy<Real>& problem, const Smoothing<Real>& smoothing,
                               int64_t chunk, Pixels<Real>& pixels, Real* scratch) {
  const int64_t classes = problem.classes, size = chunk_pixels(classes);
  const int64_t of_image = (problem.pixels + size - 1) / size;
  const int64_t image = chunk / of_image, first = chunk % of_image * size;
  const int64_t at = image * problem.pixels + first;
  pixels.count = std::min(size, problem.pixels - first);
  const int64_t next = at + pixels.count;
  fetch(problem, next, std::min(next + size, problem.images * problem.pixels));
  const bool inside = read_index(problem, at, pixels.count, pixels.index);
  read_weights(problem, at, pixels);

  const Layout &from = problem.logits_layout, &to = problem.gradient_layout;
  const int64_t from_at = image * from.image + first * from.pixel;
  const int64_t to_at = image * to.image + first * to.pixel;
  const Rows<Real> spare{scratch, size};
  Rows<const Real> logits{scratch, size};
  Rows<Real> gradient = spare;
  const bool reads_rows = problem.number == Number::kReal && from.pixel == 1;
  const bool writes_rows = problem.number == Number::kReal && to.pixel == 1;
  if (reads_rows) {
    logits = {static_cast<const Real*>(problem.logits) + from_at, from.of_class};
  } else {
    with_stored<Real>(problem.number, [&](auto stored) FASTUNET_INLINED {
      const auto* data = static_cast<const decltype(stored)*>(problem.logits);
      read_rows(data + from_at, from, classes, pixels.count, spare);
    });
  }
  if (problem.gradient != nullptr && writes_rows) {
    gradient = {static_cast<Real*>(problem.gradient) + to_at, to.of_class};
  }

  Real loss[kMostPixels];
  if (problem.partials == nullptr) {
    compute<false, true>(logits, classes, pixels, smoothing, problem.scale, loss, spare, gradient);
  } else if (problem.gradient != nullptr) {
    compute<true, true>(logits, classes, pixels, smoothing, problem.scale, loss, spare, gradient);
  } else {
    compute<true, false>(logits, classes, pixels, smoothing, problem.scale, loss, spare, gradient);
  }
  if (problem.gradient != nullptr && !writes_rows) {
    with_stored<Real>(problem.number, [&](auto stored) FASTUNET_INLINED {
      auto* data = static_cast<decltype(stored)*>(problem.gradient);
      write_rows(gradient, classes, pixels.count, data + to_at, to);
    });
  }
  if (problem.pixel_loss != nullptr) {
    with_stored<Real>(problem.number, [&](auto stored) FASTUNET_INLINED {
      auto* data = static_cast<decltype(stored)*>(problem.pixel_loss) + at;
      for (int64_t i = 0; i < pixels.count; ++i) store(loss[i], data + i);
    });
  }
  if (problem.partials != nullptr) {
    problem.partials[chunk] = {sum(loss, pixels.count), counted(problem, pixels), inside};
  }
}

template <typename Real>
FASTUNET_INLINE void run(const CrossEntropy<Real>& problem, int64_t begin, int64_t end) {
  const Smoothing<Real> smoothing = make_smoothing(problem);
  std::vector<Real> scratch(problem.classes * chunk_pixels(problem.classes));
  Pixels<Real> pixels;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    run_chunk(problem, smoothing, chunk, pixels, scratch.data());
  }
}

template <typename Real>
int64_t find_outside(const CrossEntropy<Real>& problem) {
  const auto find = [&](const auto* target) {
    return *std::find_if(target, target + problem.images * problem.pixels, [&](int64_t id) {
      return id != problem.ignore_index && (id < 0 || id >= problem.classes);
    });
  };
  switch (problem.id) {
    case Id::kInt64:
      return find(static_cast<const int64_t*>(problem.target));
    case Id::kInt32:
      return find(static_cast<const int32_t*>(problem.target));
    default:
      return find(static_cast<const uint8_t*>(problem.target));
  }
}

}  // namespace

int64_t chunk_pixels(int64_t classes) {
  return std::clamp(8192 / classes / kFewestPixels * kFewestPixels, kFewestPixels, kMostPixels);
}

int64_t chunks(int64_t images, int64_t classes, int64_t pixels) {
  const int64_t size = chunk_pixels(classes);
  return images * ((pixels + size - 1) / size);
}

FASTUNET_VECTORIZED_WIDE
void cross_entropy(const CrossEntropy<float>& problem, int64_t begin, int64_t end) {
  run(problem, begin, end);
}

// exp and log are calls
void cross_entropy(const CrossEntropy<double>& problem, int64_t begin, int64_t end) {
  run(problem, begin, end);
}

int64_t first_outside(const CrossEntropy<float>& problem) { return find_outside(problem); }
int64_t first_outside(const CrossEntropy<double>& problem) { return find_outside(problem); }

}  // namespace fastunet::cpu
