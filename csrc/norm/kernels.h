// Root-mean-square norm and rotary embedding on the CPU: arguments of the kernels and their declarations.
#pragma once

#include "../common/grid.h"
#include "../common/level.h"
#include "../common/types.h"

namespace star {

// y = u / sqrt(mean(u^2) + eps) * weight, u = x or x + residual, over rows of D.
struct RmsNorm {
  Dtype dtype;
  Grid grid;
  int64_t width;
  float eps;
  GridRows x, y;
  GridRows residual, sum;  // data is null where there is no residual
  const float* weight;     // (D,)
};

// Gradients of the above from u. Chunks of rows are fixed by the shape: chunk i writes its share of the
// weight's gradient to row i of `weight_parts`, and the sums have one order whatever the number of threads.
struct RmsNormBackward {
  Dtype dtype;
  Grid grid;
  int64_t width, rows, chunk_rows;
  float eps;
  GridRows dy, u, dx;
  GridRows dsum;        // gradient of u itself; data is null where there is none
  const float* weight;
  float* weight_parts;  // (chunks, D)
};

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the halves of each head; inverse: sin changes sign.
struct Rope {
  Dtype dtype;
  bool inverse;
  int64_t length, heads, half;
  const void* x;
  int64_t batch_stride, row_stride, head_stride;
  void* y;           // contiguous (B, L, H, 2 half)
  const float* cos;  // (L, half)
  const float* sin;
};

}  // namespace star

STAR_KERNEL(rms_norm_forward, RmsNorm)           // tasks: rows
STAR_KERNEL(rms_norm_backward, RmsNormBackward)  // tasks: chunks of rows
STAR_KERNEL(rope_rows, Rope)                     // tasks: rows of the flattened (B, L)
