// Rows of tensors of one shape (..., D) in device code: where a row of ../grid.h's Grid begins.
#pragma once

#include "device.h"
#include "../grid.h"

namespace star {

// Where row `row` of the grid is along its three leading dimensions.
struct RowIndex {
  int64_t index[3];

  __device__ __forceinline__ RowIndex(const Grid& grid, int64_t row) {
    index[2] = row % grid.sizes[2];
    const int64_t rest = row / grid.sizes[2];
    index[1] = rest % grid.sizes[1];
    index[0] = rest / grid.sizes[1];
  }

  template <class T>
  __device__ __forceinline__ T* of(const GridRows& tensor) const {
    return static_cast<T*>(tensor.data) + index[0] * tensor.strides[0] + index[1] * tensor.strides[1] +
           index[2] * tensor.strides[2];
  }
};

}  // namespace star
