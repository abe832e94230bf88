// The operators on CUDA tensors, through torch's stable ABI. The file is part of the extension
// where a CUDA toolkit was found, and the extension then still loads under torch without CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/separate_touching.h"
#include "cuda/weight_map.h"
#include "ops.h"

// torch without CUDA does not have it
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastunet {
namespace {

using torch::stable::accelerator::DeviceGuard;

void* current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launches(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// axes are at most kLongestAxis long
cuda::Shape shape_of(int64_t batch, const Grid& grid) {
  return {batch, static_cast<int>(grid.depth), static_cast<int>(grid.height),
          static_cast<int>(grid.width)};
}

template <typename Id>
void map_weights(const Tensor& labels, const cuda::Shape& shape,
                 const cuda::WeightMapOptions& options, const Tensor& weights, const Tensor& d1,
                 const Tensor& d2) {
  const Tensor workspace =
      new_empty(labels, {cuda::weight_map_workspace_bytes<Id>(shape)}, ScalarType::Byte);
  const cudaError_t error =
      cuda::weight_map(labels.const_data_ptr<Id>(), shape, options, workspace.mutable_data_ptr(),
                       weights.mutable_data_ptr<float>(), d1.mutable_data_ptr<float>(),
                       d2.mutable_data_ptr<float>(), current_stream(labels));
  check_launches(error, "weight_map");
}

std::tuple<Tensor, Tensor, Tensor> weight_map_cuda(const Tensor& any_labels,
                                                   const std::optional<Tensor>& class_weight,
                                                   bool balanced, double w0, double sigma,
                                                   double spacing_d, double spacing_h,
                                                   double spacing_w, bool distances) {
  check_labels(any_labels, "weight_map");
  STD_TORCH_CHECK(any_labels.is_cuda(),
                  "weight_map: labels must be on the GPU, as class_weight is");
  const DeviceGuard guard(any_labels.get_device_index());
  const Tensor labels = contiguous(any_labels);
  const Tensor weights = new_empty(labels, labels.sizes(), ScalarType::Float);
  const Tensor nothing = new_empty(weights, {0});
  const Tensor d1 = distances ? new_empty(weights, labels.sizes()) : nothing;
  const Tensor d2 = new_empty(weights, d1.sizes());
  Tensor given = nothing;
  if (class_weight.has_value()) {
    check_class_weight(*class_weight);
    STD_TORCH_CHECK(
        class_weight->is_cuda() && class_weight->get_device_index() == labels.get_device_index(),
        "weight_map: class_weight must be on the device of labels");
    given = contiguous(*class_weight);
  }
  if (labels.numel() == 0) return {weights, d1, d2};

  const float* of_class = class_weight.has_value() ? given.const_data_ptr<float>() : nullptr;
  const Grid grid = grid_of(labels, spacing_d, spacing_h, spacing_w);
  const cuda::Shape shape = shape_of(labels.size(0), grid);
  const cuda::WeightMapOptions options{
      of_class, balanced, w0, sigma, grid.spacing_d, grid.spacing_h, grid.spacing_w, distances};
  if (labels.scalar_type() == ScalarType::Int) {
    map_weights<int32_t>(labels, shape, options, weights, d1, d2);
  } else {
    map_weights<int64_t>(labels, shape, options, weights, d1, d2);
  }
  return {weights, d1, d2};
}

template <typename Id>
void separate(const Tensor& labels, int64_t width, const Tensor& carved) {
  // windows are as wide along either axis, whatever the spacing
  const cuda::Shape shape = shape_of(labels.size(0), grid_of(labels, 1.0, 1.0, 1.0));
  const Tensor workspace = new_empty(labels, labels.sizes());
  const cudaError_t error = cuda::separate_touching(
      labels.const_data_ptr<Id>(), shape, width, workspace.mutable_data_ptr<Id>(),
      carved.mutable_data_ptr<Id>(), current_stream(labels));
  check_launches(error, "separate_touching");
}

Tensor separate_touching_cuda(const Tensor& any_labels, int64_t width) {
  check_labels(any_labels, "separate_touching");
  const DeviceGuard guard(any_labels.get_device_index());
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

STABLE_TORCH_LIBRARY_IMPL(fastunet, CUDA, m) {
  m.impl("weight_map", TORCH_BOX(&fastunet::weight_map_cuda));
  m.impl("separate_touching", TORCH_BOX(&fastunet::separate_touching_cuda));
}
