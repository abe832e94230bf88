// Tensors of images, [B, H, W, C], as the bits that the CPU's passes over pixels take.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/conv_relu.h"
#include "ops.h"

namespace fastunet {

// Calls run(Float()) for the dtype of images.
template <typename Run>
void for_dtype(const Tensor& images, const char* op, const Run& run) {
  const ScalarType dtype = images.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  " must be float32 or bfloat16");
  if (dtype == ScalarType::Float) {
    run(cpu::Float32());
  } else {
    run(cpu::BFloat16());
  }
}

template <typename Float>
typename Float::Bits* mutable_bits(const Tensor& images) {
  return images.numel() == 0 ? nullptr
                             : static_cast<typename Float::Bits*>(images.mutable_data_ptr());
}

template <typename Float>
const typename Float::Bits* bits(const Tensor& images) {
  return static_cast<const typename Float::Bits*>(images.const_data_ptr());
}

}  // namespace fastunet
