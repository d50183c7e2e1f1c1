// Tensors of one shape (..., D), seen as rows of D elements over at most three leading dimensions.
#pragma once

#include <cstdint>

namespace star {

// The leading dimensions that the tensors of a call share, outermost first.
struct Grid {
  int64_t sizes[3] = {1, 1, 1};

  int64_t rows() const { return sizes[0] * sizes[1] * sizes[2]; }
};

// One tensor over the grid; strides count elements.
struct GridRows {
  void* data = nullptr;
  int64_t strides[3] = {0, 0, 0};
};

#ifdef STAR_LEVEL
namespace STAR_LEVEL {

// Walks the rows of a grid in order.
class GridPosition {
 public:
  GridPosition(const Grid& grid, int64_t row) : grid_(grid) {
    index_[2] = row % grid.sizes[2];
    index_[1] = row / grid.sizes[2] % grid.sizes[1];
    index_[0] = row / grid.sizes[2] / grid.sizes[1];
  }

  void advance() {
    if (++index_[2] < grid_.sizes[2]) return;
    index_[2] = 0;
    if (++index_[1] < grid_.sizes[1]) return;
    index_[1] = 0;
    ++index_[0];
  }

  template <class T>
  T* row(const GridRows& tensor) const {
    return static_cast<T*>(tensor.data) + index_[0] * tensor.strides[0] + index_[1] * tensor.strides[1] +
           index_[2] * tensor.strides[2];
  }

 private:
  const Grid& grid_;
  int64_t index_[3];
};

}  // namespace STAR_LEVEL
#endif

}  // namespace star
