#include "crop_concat.h"

#include <cstring>

#include "vectorize.h"

namespace fastunet::cpu {
namespace {

#if defined(__GNUC__)
// what one instruction moves; the array would be moved by halves
typedef char Vector __attribute__((vector_size(32)));
#else
struct Vector {
  char bytes[32];
};
#endif
constexpr int64_t kVector = sizeof(Vector);
constexpr int64_t kUnrolled = 4;

FASTUNET_INLINE void copy_vector(const char* from, char* to) {
  Vector vector;
  std::memcpy(&vector, from, kVector);
  std::memcpy(to, &vector, kVector);
}

// As memcpy, which leaves long copies to the processor's string instruction: every page fault of a
// fresh output interrupts and restarts that.
FASTUNET_INLINE void copy(const char* from, char* to, int64_t bytes) {
  if (bytes < kVector) {
    std::memcpy(to, from, bytes);
    return;
  }
  int64_t i = 0;
  for (; i + kUnrolled * kVector <= bytes; i += kUnrolled * kVector) {
    for (int64_t k = 0; k < kUnrolled; ++k)
      copy_vector(from + i + k * kVector, to + i + k * kVector);
  }
  for (; i + kVector <= bytes; i += kVector) copy_vector(from + i, to + i);
  // the last vector may overlap the one before
  copy_vector(from + bytes - kVector, to + bytes - kVector);
}

}  // namespace

FASTUNET_VECTORIZED
void copy_runs(Runs from, Runs to, int64_t count, int64_t bytes) {
  if (from.stride == bytes && to.stride == bytes) {
    bytes *= count;
    count = 1;
  }
  for (int64_t run = 0; run < count; ++run) {
    copy(from.data + run * from.stride, to.data + run * to.stride, bytes);
  }
}

void copy_runs_into_zeros(Runs from, int64_t count, int64_t bytes, char* to, int64_t lead,
                          int64_t stride, int64_t size) {
  char* const end = to + size;
  std::memset(to, 0, lead);
  to += lead;
  copy_runs(from, {to, stride}, count, bytes);
  for (int64_t run = 0; run + 1 < count; ++run, to += stride) {
    std::memset(to + bytes, 0, stride - bytes);
  }
  to += count > 0 ? bytes : 0;
  std::memset(to, 0, end - to);
}

}  // namespace fastunet::cpu
