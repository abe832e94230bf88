// The operators on CPU tensors, through torch's stable ABI: one binary for every torch >= 2.11.
// Schemas and argument checks are in fastunet/ops/<op>/op.py; load order is free.
#include "ops.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "cpu/separate_touching.h"
#include "cpu/weight_map.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

Tensor as_int32(const Tensor& labels) {
  if (labels.scalar_type() == ScalarType::Int) return labels;
  const Tensor narrow = new_empty(labels, labels.sizes(), ScalarType::Int);
  const int64_t* from = labels.const_data_ptr<int64_t>();
  int32_t* to = narrow.mutable_data_ptr<int32_t>();
  std::atomic<bool> fits{true};
  parallel_for(0, labels.numel(), kGrainPixels, [&](int64_t begin, int64_t end) {
    if (!cpu::narrow_ids(from, to, begin, end)) fits = false;
  });
  if (!fits) cpu::renumber_ids(from, to, labels.numel());
  return narrow;
}

ClassWeight given_class_weight(const Tensor& given) {
  check_class_weight(given);
  const Tensor weight = contiguous(given);
  const float* of_class = weight.const_data_ptr<float>();
  return {of_class[0], of_class[1]};
}

int64_t count_cells(const int32_t* labels, int64_t size) {
  std::atomic<int64_t> cells{0};
  parallel_for(0, size, kGrainPixels,
               [&](int64_t begin, int64_t end) { cells += cpu::count_cells(labels, begin, end); });
  return cells;
}

std::tuple<Tensor, Tensor, Tensor> weight_map_cpu(const Tensor& any_labels,
                                                  const std::optional<Tensor>& class_weight,
                                                  bool balanced, double w0, double sigma,
                                                  double spacing_d, double spacing_h,
                                                  double spacing_w, bool distances) {
  check_labels(any_labels, "weight_map");
  const Tensor labels = as_int32(contiguous(any_labels));
  const Tensor weights = new_empty(labels, labels.sizes(), ScalarType::Float);
  const Tensor nothing = new_empty(weights, {0});
  const Tensor d1 = distances ? new_empty(weights, labels.sizes()) : nothing;
  const Tensor d2 = new_empty(weights, d1.sizes());
  if (labels.numel() == 0) return {weights, d1, d2};

  const int32_t* ids = labels.const_data_ptr<int32_t>();
  const int64_t size = labels.numel();
  const ClassWeight classes = class_weight.has_value() ? given_class_weight(*class_weight)
                              : balanced ? balanced_class_weight(count_cells(ids, size), size)
                                         : ClassWeight{1.0f, 1.0f};
  const double reach = distances ? INFINITY : border_reach(w0, sigma, classes);
  const Border border = make_border(w0, sigma);

  // [length, height, width]: lines are scanned along the first axis, which in images is the rows
  const Grid grid = grid_of(labels, spacing_d, spacing_h, spacing_w);
  const bool volumes = grid.depth > 1;
  const int64_t length = volumes ? grid.depth : grid.height;
  const int64_t height = volumes ? grid.height : 1;
  const int64_t width = grid.width;
  const int64_t plane = height * width;
  const int64_t pixels = length * plane;
  const float along = static_cast<float>(volumes ? grid.spacing_d : grid.spacing_h);
  const cpu::Window down = cpu::make_window(height, grid.spacing_h, reach, false);
  const cpu::Window across = cpu::make_window(width, grid.spacing_w, reach, true);
  const int64_t groups = cpu::column_groups(width);

  const Tensor nearest_ids = new_empty(labels, {pixels});
  const Tensor nearest_squares = new_empty(weights, {2 * pixels});
  float* squares = nearest_squares.mutable_data_ptr<float>();
  const cpu::NearestMap nearest{nearest_ids.mutable_data_ptr<int32_t>(), squares, squares + pixels};
  for (int64_t image = 0; image < labels.size(0); ++image) {
    const int32_t* here = ids + image * pixels;
    const auto into = [&](const Tensor& map) {
      return map.numel() == 0 ? nullptr : map.mutable_data_ptr<float>() + image * pixels;
    };
    parallel_for(0, plane, grain(length), [&](int64_t begin, int64_t end) {
      cpu::scan_lines(here, length, plane, along, nearest, begin, end);
    });
    if (height > 1) {
      parallel_for(0, length * groups, grain(plane / groups), [&](int64_t begin, int64_t end) {
        cpu::merge_columns(nearest, height, width, down, begin, end);
      });
    }
    parallel_for(0, length * height, grain(width), [&](int64_t begin, int64_t end) {
      cpu::weigh_rows(here, nearest, width, across, border, classes, into(weights), into(d1),
                      into(d2), begin, end);
    });
  }
  return {weights, d1, d2};
}

template <typename Id>
void separate(const Tensor& labels, int64_t width, const Tensor& carved) {
  const int64_t depth = labels.size(1), height = labels.size(2), length = labels.size(3);
  const int64_t rows = labels.numel() / length;
  const Id* ids = labels.const_data_ptr<Id>();
  Tensor windows = new_empty(labels, labels.sizes());
  parallel_for(0, rows, grain(length), [&](int64_t begin, int64_t end) {
    cpu::join_pixels(ids, windows.mutable_data_ptr<Id>(), length, width, begin, end);
  });
  const auto join_axis = [&](int64_t size, int64_t inner) {
    if (size == 1) return;
    const Tensor joined = new_empty(labels, labels.sizes());
    parallel_for(0, labels.numel() / inner, grain(inner), [&](int64_t begin, int64_t end) {
      cpu::join_rows(windows.const_data_ptr<Id>(), joined.mutable_data_ptr<Id>(), size, inner,
                     width, begin, end);
    });
    windows = joined;
  };
  join_axis(height, length);
  join_axis(depth, height * length);
  parallel_for(0, labels.numel(), kGrainPixels, [&](int64_t begin, int64_t end) {
    cpu::carve(ids, windows.const_data_ptr<Id>(), carved.mutable_data_ptr<Id>(), begin, end);
  });
}

Tensor separate_touching_cpu(const Tensor& any_labels, int64_t width) {
  check_labels(any_labels, "separate_touching");
  const Tensor labels = contiguous(any_labels);
  const Tensor carved = new_empty(labels, labels.sizes());
  if (labels.numel() == 0) return carved;
  if (labels.scalar_type() == ScalarType::Int) {
    separate<int32_t>(labels, width, carved);
  } else {
    separate<int64_t>(labels, width, carved);
  }
  return carved;
}

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("weight_map", TORCH_BOX(&fastunet::weight_map_cpu));
  m.impl("separate_touching", TORCH_BOX(&fastunet::separate_touching_cpu));
}

// importing the module runs the registrations; it holds nothing itself
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  return PyModule_Create(&module);
}
