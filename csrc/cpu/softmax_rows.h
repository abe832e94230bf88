// Softmax cross-entropy of a chunk of pixels, a row of them a class: loops that vectorise. Only for
// weighted_cross_entropy.cpp, which says for which machines and with which arithmetic.
#pragma once

#include <cstdint>
#include <vector>

#include "../weighted_cross_entropy.h"

// rows are independent, or read and written at the same place
#if defined(__GNUC__) && !defined(__clang__)
#define FASTUNET_INDEPENDENT _Pragma("GCC ivdep")
#else
#define FASTUNET_INDEPENDENT
#endif

namespace fastunet::cpu {

constexpr int64_t kMostPixels = 256;
constexpr int32_t kIgnored = -1;

// the logits or the gradient of a chunk: a row of pixels a class
template <typename Real>
struct Rows {
  Real* first;
  int64_t step;
  FASTUNET_INLINE Real* operator[](int64_t k) const { return first + k * step; }
};

// What a chunk knows of its pixels before it sees their logits.
template <typename Real>
struct Pixels {
  int64_t count;
  int32_t index[kMostPixels];  // class, or kIgnored
  Real base[kMostPixels];      // pixel weight, 0 where ignored
  Real peaks[kMostPixels];     // base times the class weight times (1 - label_smoothing)
  const Real* peak;            // peaks, or base where that is the same
};

// base times smooth[k] is what label smoothing asks of class k.
template <typename Real>
struct Smoothing {
  std::vector<Real> smooth;  // empty without smoothing
  Real sum = 0;
};

// Two classes without smoothing: with z the other logit less the target's, the loss is
// log(1 + exp(z)), and the gradient 1 / (1 + exp(-z)) at the other class and minus that here.
template <bool want_loss, bool want_gradient, typename Real>
FASTUNET_INLINE void two_classes(Rows<const Real> logits, const Pixels<Real>& pixels, Real scale,
                                 Real* loss, Rows<Real> gradient) {
  const Real *first = logits[0], *second = logits[1];
  Real *first_gradient = gradient[0], *second_gradient = gradient[1];
  FASTUNET_INDEPENDENT
  for (int64_t i = 0; i < pixels.count; ++i) {
    const bool is_second = pixels.index[i] == 1;
    const Real difference = second[i] - first[i];
    const Real z = is_second ? -difference : difference;
    const Real power = exp_negative(z > 0 ? -z : z);
    if constexpr (want_loss) {
      const Real nll = (z > 0 ? z : Real(0)) + log_one_plus(power);
      loss[i] = pixels.index[i] < 0 ? Real(0) : pixels.peak[i] * nll;
    }
    if constexpr (want_gradient) {
      const Real other = (z > 0 ? Real(1) : power) / (1 + power) * (scale * pixels.peak[i]);
      second_gradient[i] = is_second ? -other : other;
      first_gradient[i] = is_second ? other : -other;
    }
  }
}

// Any number of classes; `powers` may be where the logits are or the gradient is to be.
template <bool want_loss, bool want_gradient, bool smoothed, typename Real>
FASTUNET_INLINE void any_classes(Rows<const Real> logits, int64_t classes,
                                 const Pixels<Real>& pixels, const Smoothing<Real>& smoothing,
                                 Real scale, Real* loss, Rows<Real> powers, Rows<Real> gradient) {
  const int64_t count = pixels.count;
  Real greatest[kMostPixels], total[kMostPixels], at_target[kMostPixels], spread[kMostPixels];
  for (int64_t i = 0; i < count; ++i) {
    greatest[i] = logits[0][i];
    total[i] = at_target[i] = spread[i] = 0;
  }
  for (int64_t k = 1; k < classes; ++k) {
    const Real* row = logits[k];
    for (int64_t i = 0; i < count; ++i) greatest[i] = row[i] > greatest[i] ? row[i] : greatest[i];
  }
  for (int32_t k = 0; k < classes; ++k) {
    const Real* row = logits[k];
    Real* power_row = powers[k];
    const Real smooth = smoothed ? smoothing.smooth[k] : Real(0);
    FASTUNET_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const Real below = row[i] - greatest[i];
      const Real power = exp_negative(below);
      total[i] += power;
      if constexpr (want_loss) {
        at_target[i] = pixels.index[i] == k ? below : at_target[i];
        if constexpr (smoothed) spread[i] += smooth * below;
      }
      if constexpr (want_gradient) power_row[i] = power;
    }
  }
  if constexpr (want_loss) {
    FASTUNET_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const Real log_total = log_from_one(total[i]);
      Real sum = pixels.peak[i] * (log_total - at_target[i]);
      if constexpr (smoothed) sum += pixels.base[i] * (smoothing.sum * log_total - spread[i]);
      loss[i] = pixels.index[i] < 0 ? Real(0) : sum;
    }
  }
  if constexpr (want_gradient) {
    // written first, so that with one class the same products cancel to exactly 0
    Real base[kMostPixels], peak[kMostPixels];
    for (int64_t i = 0; i < count; ++i) {
      base[i] = scale * pixels.base[i];
      peak[i] = scale * pixels.peak[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      total[i] = (smoothed ? base[i] * smoothing.sum + peak[i] : peak[i]) / total[i];
    }
    for (int32_t k = 0; k < classes; ++k) {
      const Real* power_row = powers[k];
      Real* row = gradient[k];
      const Real smooth = smoothed ? smoothing.smooth[k] : Real(0);
      FASTUNET_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        Real wanted = pixels.index[i] == k ? peak[i] : Real(0);
        if constexpr (smoothed) wanted = base[i] * smooth + wanted;
        row[i] = power_row[i] * total[i] - wanted;
      }
    }
  }
}

template <bool want_loss, bool want_gradient, typename Real>
FASTUNET_INLINE void compute(Rows<const Real> logits, int64_t classes, const Pixels<Real>& pixels,
                             const Smoothing<Real>& smoothing, Real scale, Real* loss,
                             Rows<Real> powers, Rows<Real> gradient) {
  if (!smoothing.smooth.empty()) {
    any_classes<want_loss, want_gradient, true>(logits, classes, pixels, smoothing, scale, loss,
                                                powers, gradient);
  } else if (classes == 2) {
    two_classes<want_loss, want_gradient>(logits, pixels, scale, loss, gradient);
  } else {
    any_classes<want_loss, want_gradient, false>(logits, classes, pixels, smoothing, scale, loss,
                                                 powers, gradient);
  }
}

}  // namespace fastunet::cpu
