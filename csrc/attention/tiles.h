// Small dense products that stay in registers: a few rows against one panel of columns two vectors wide.
//
// A panel is a matrix cut into strips of `panel` columns, each stored row after row, so that a product reads
// its right side as one stream. Include only from kernel files.
#pragma once

#include "../common/scalar.h"
#include "../common/vector.h"

namespace star {
namespace STAR_LEVEL {

constexpr int64_t panel = 2 * lanes;
#if defined(__AVX512F__)
constexpr int64_t tile_rows = 12;  // 24 of 32 registers hold sums
#else
constexpr int64_t tile_rows = 6;   // 12 of 16
#endif

inline int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// c[r, :] (+)= sum over k of a[r, k] b[k, :] for tile_rows rows r and one panel of columns.
// `a` has rows a_stride apart, or, transposed, a[r, k] stands at a[k * a_stride + r].
template <bool transposed, bool add>
inline void tile_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                         float* c, int64_t c_stride) {
  Vector sums[tile_rows][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < tile_rows; ++r) {
    sums[r][0] = add ? load(c + r * c_stride) : Vector{};
    sums[r][1] = add ? load(c + r * c_stride + lanes) : Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector left = load(b + k * b_stride), right = load(b + k * b_stride + lanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < tile_rows; ++r) {
      const Vector factor = broadcast(transposed ? a[k * a_stride + r] : a[r * a_stride + k]);
      sums[r][0] += factor * left;
      sums[r][1] += factor * right;
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < tile_rows; ++r) {
    store(c + r * c_stride, sums[r][0]);
    store(c + r * c_stride + lanes, sums[r][1]);
  }
}

}  // namespace STAR_LEVEL
}  // namespace star
