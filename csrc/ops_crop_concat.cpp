// crop_concat and its gradient on CPU tensors of any type; schemas are in
// fastunet/ops/crop_concat/op.py. Layouts without runs of bytes are left to torch's own copy.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>

#include "cpu/crop_concat.h"
#include "ops.h"

namespace fastunet {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::parallel_for;
using Axes = std::array<int64_t, 4>;

// bytes that are worth a thread
constexpr int64_t kGrainBytes = 1 << 16;

int64_t grain(int64_t bytes, int64_t tasks) {
  return std::max<int64_t>(1, kGrainBytes * tasks / std::max<int64_t>(1, bytes));
}

// Where the bytes of a tensor are; strides count bytes.
struct Bytes {
  char* data;
  int64_t element;
  Axes size;
  Axes stride;

  Bytes part(int64_t axis, int64_t start, int64_t length) const {
    Bytes narrowed = *this;
    narrowed.data += start * stride[axis];
    narrowed.size[axis] = length;
    return narrowed;
  }
  // The axes in the order in which channels_last has them in memory.
  Bytes channels_last() const {
    return {data,
            element,
            {size[0], size[2], size[3], size[1]},
            {stride[0], stride[2], stride[3], stride[1]}};
  }

  // Elements along the last axis are a run of bytes, runs along the third a plane.
  bool has_runs() const { return stride[3] == element; }
  int64_t run() const { return size[3] * element; }
  int64_t planes() const { return size[0] * size[1]; }
  cpu::Runs plane(int64_t outer, int64_t inner) const {
    return {data + outer * stride[0] + inner * stride[1], stride[2]};
  }
};

Bytes bytes_of(const Tensor& tensor) {
  Bytes bytes{
      static_cast<char*>(tensor.data_ptr()), static_cast<int64_t>(tensor.element_size()), {}, {}};
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t axis = 0; axis < 4; ++axis) {
    bytes.size[axis] = sizes[axis];
    bytes.stride[axis] = strides[axis] * bytes.element;
  }
  return bytes;
}

// The rows and columns that a crop leaves out before those it keeps.
struct Margin {
  int64_t top;
  int64_t left;
};

Margin margin_of(const Tensor& skip, const Tensor& cropped) {
  return {(skip.size(2) - cropped.size(2)) / 2, (skip.size(3) - cropped.size(3)) / 2};
}

Tensor part(Tensor tensor, int64_t axis, int64_t start, int64_t length) {
  return narrow(tensor, axis, start, length);
}

Tensor centre(const Tensor& skip, const Tensor& cropped) {
  const Margin margin = margin_of(skip, cropped);
  return part(part(skip, 2, margin.top, cropped.size(2)), 3, margin.left, cropped.size(3));
}

void check(const Tensor& skip, const Tensor& cropped, const char* op) {
  STD_TORCH_CHECK(skip.dim() == 4 && cropped.dim() == 4, op, ": tensors must be [B, C, H, W]");
  STD_TORCH_CHECK(skip.scalar_type() == cropped.scalar_type(), op, ": dtypes must be equal");
  STD_TORCH_CHECK(skip.size(0) == cropped.size(0) && skip.size(2) >= cropped.size(2) &&
                      skip.size(3) >= cropped.size(3),
                  op, ": skip must be as large as what it is cropped to");
}

// Whether torch suggests channels_last for what comes of a tensor.
bool suggests_channels_last(const Bytes& tensor) {
  if (tensor.stride[1] == 0) return false;
  int64_t least = 0;
  for (const size_t axis : {1, 3, 2, 0}) {
    const int64_t size = tensor.size[axis], stride = tensor.stride[axis];
    if (size == 0 || stride < least || (axis == 0 && least == tensor.stride[1])) return false;
    least = stride * size;
  }
  return true;
}

Tensor crop_concat_cpu(const Tensor& skip, const Tensor& up) {
  check(skip, up, "crop_concat");
  const int64_t channels = skip.size(1), height = up.size(2), width = up.size(3);
  const Margin margin = margin_of(skip, up);
  std::array<Bytes, 2> from{bytes_of(skip).part(2, margin.top, height).part(3, margin.left, width),
                            bytes_of(up)};
  const bool channels_last = suggests_channels_last(from[0]) && suggests_channels_last(from[1]);
  const Tensor out =
      torch::stable::empty({up.size(0), channels + up.size(1), height, width}, up.scalar_type(),
                           std::nullopt, up.device(), std::nullopt,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (out.numel() == 0) return out;

  const Bytes whole = bytes_of(out);
  std::array<Bytes, 2> to{whole.part(1, 0, channels), whole.part(1, channels, up.size(1))};
  if (channels_last) {
    for (auto* halves : {&from, &to}) {
      for (Bytes& half : *halves) half = half.channels_last();
    }
  }
  if (!from[0].has_runs() || !from[1].has_runs()) {
    Tensor before = part(out, 1, 0, channels), after = part(out, 1, channels, up.size(1));
    copy_(before, centre(skip, up));
    copy_(after, up);
    return out;
  }
  // a step is its share of the planes of both: threads have equal parts of both, and what lies side
  // by side in memory is written one soon after the other
  const int64_t steps = std::max(to[0].planes(), to[1].planes());
  const int64_t bytes = out.numel() * whole.element;
  parallel_for(0, steps, grain(bytes, steps), [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      for (size_t half = 0; half < 2; ++half) {
        const Bytes &source = from[half], &target = to[half];
        const int64_t last = (step + 1) * target.planes() / steps;
        for (int64_t i = step * target.planes() / steps; i < last; ++i) {
          const int64_t outer = i / target.size[1], inner = i % target.size[1];
          cpu::copy_runs(source.plane(outer, inner), target.plane(outer, inner), target.size[2],
                         target.run());
        }
      }
    }
  });
  return out;
}

Tensor crop_concat_bwd_cpu(const Tensor& grad, const Tensor& skip) {
  check(skip, grad, "crop_concat_bwd");
  STD_TORCH_CHECK(grad.size(1) >= skip.size(1), "crop_concat_bwd: grad must have skip's channels");
  Tensor full = empty_like(skip);
  if (full.numel() == 0) return full;

  const Margin margin = margin_of(skip, grad);
  const bool channels_last = full.size(1) > 1 && full.stride(1) == 1;
  Bytes from = bytes_of(grad).part(1, 0, skip.size(1)), to = bytes_of(full);
  int64_t lead = margin.top * to.stride[2] + margin.left * to.stride[3];
  if (channels_last) {
    from = from.channels_last();
    to = to.channels_last();
    lead = margin.left * to.stride[2];
  }
  if (!from.has_runs() || !to.has_runs() || to.stride[2] != to.run()) {
    Tensor middle = centre(zero_(full), grad);
    copy_(middle, part(grad, 1, 0, skip.size(1)));
    return full;
  }
  const int64_t plane = to.size[2] * to.run();
  parallel_for(0, to.planes(), grain(plane, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t outer = i / to.size[1], inner = i % to.size[1];
      const int64_t row = channels_last ? inner - margin.top : inner;
      const bool outside = row < 0 || row >= from.size[1];
      cpu::copy_runs_into_zeros(from.plane(outer, outside ? 0 : row), outside ? 0 : from.size[2],
                                from.run(), to.plane(outer, inner).data, lead, to.stride[2], plane);
    }
  });
  return full;
}

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("crop_concat", TORCH_BOX(&fastunet::crop_concat_cpu));
  m.impl("crop_concat_bwd", TORCH_BOX(&fastunet::crop_concat_bwd_cpu));
}
