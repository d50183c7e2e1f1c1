// From stable-ABI tensors of one shape (..., D) to a grid of rows, without copies where three leading
// dimensions are enough to describe their strides.
#pragma once

#include <array>

#include "grid.h"
#include "tensor.h"

namespace star {

// Owns the tensors (themselves, or contiguous copies) that its grid and rows describe.
template <size_t count>
class GridTensors {
 public:
  Grid grid;
  int64_t width = 0;

  explicit GridTensors(std::array<Tensor, count> tensors) : tensors_(std::move(tensors)) {
    for (Tensor& tensor : tensors_) tensor = with_contiguous_rows(tensor);
    if (merge()) return;
    for (Tensor& tensor : tensors_) tensor = torch::stable::contiguous(tensor);
    STD_TORCH_CHECK(merge(), "contiguous tensors must merge into rows");
  }

  GridRows rows(size_t which) const { return rows_[which]; }

 private:
  std::array<Tensor, count> tensors_;
  std::array<GridRows, count> rows_;

  // Merges neighbouring dimensions wherever every tensor steps over them evenly; false if over three remain.
  bool merge() {
    const Tensor& first = tensors_[0];
    const int64_t leading = first.dim() - 1;
    width = first.size(leading);
    grid = Grid();
    for (size_t i = 0; i < count; ++i) rows_[i] = GridRows{tensors_[i].data_ptr(), {0, 0, 0}};
    int slot = 3;  // filled from the innermost dimension outwards
    for (int64_t dim = leading - 1; dim >= 0; --dim) {
      const int64_t size = first.size(dim);
      if (size == 1) continue;
      bool even = slot < 3;
      for (size_t i = 0; i < count && even; ++i)
        even = tensors_[i].stride(dim) == rows_[i].strides[slot] * grid.sizes[slot];
      if (even) {
        grid.sizes[slot] *= size;
        continue;
      }
      if (slot == 0) return false;
      --slot;
      grid.sizes[slot] = size;
      for (size_t i = 0; i < count; ++i) rows_[i].strides[slot] = tensors_[i].stride(dim);
    }
    return true;
  }
};

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes[dim] = tensor.size(dim);
  return sizes;
}

// A tensor of the first one's shape and dtype, on its device.
inline void check_like(const Tensor& tensor, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(is_here(tensor), name, must_be_here);
  STD_TORCH_CHECK(device_index_of(tensor) == device_index_of(first), name, " is on another device");
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), name, " has a wrong dtype");
  bool fits = tensor.dim() == first.dim();
  for (int64_t dim = 0; fits && dim < first.dim(); ++dim) fits = tensor.size(dim) == first.size(dim);
  STD_TORCH_CHECK(fits, name, " has a wrong shape");
}

}  // namespace star
