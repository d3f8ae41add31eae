// Checks of the operators' arguments: they raise a ValueError that names the argument.

#pragma once

#include <ATen/core/Tensor.h>

namespace rosd {

inline void check_matrix(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), name,
      ": got shape ", tensor.sizes(), " and strides ", tensor.strides(),
      ", want [R, C] with columns side by side");
}

inline void check_same(
    const char* name, const at::Tensor& tensor, const char* other, const at::Tensor& wanted) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == wanted.sizes() && tensor.scalar_type() == wanted.scalar_type(), name,
      ": got ", tensor.scalar_type(), " of shape ", tensor.sizes(), ", want that of ", other, ", ",
      wanted.scalar_type(), " of shape ", wanted.sizes());
}

inline void check_vector(
    const char* name, const at::Tensor& tensor, int64_t size, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous() &&
          tensor.scalar_type() == dtype,
      name, ": got ", tensor.scalar_type(), " of shape ", tensor.sizes(), ", want contiguous ",
      dtype, " of shape [", size, "]");
}

}  // namespace rosd
