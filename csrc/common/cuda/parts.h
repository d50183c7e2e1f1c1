// The sum of what blocks have each computed of a gradient, in an order that the shape fixes. Include from
// *cuda*.cu only.
#pragma once

#include "arguments.h"

namespace star {

// out = the sum of `count` parts of `size` numbers, added in their order.
struct SumPartsCall {
  const float* parts;
  int64_t count, size;
  void* out;
  Dtype dtype;
};

static __global__ void __launch_bounds__(128) sum_parts_kernel(SumPartsCall call) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= call.size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < call.count; ++part) sum += call.parts[part * call.size + index];
  STAR_WITH_DTYPE(call.dtype, T, static_cast<T*>(call.out)[index] = from_float<T>(sum));
}

// Sums (count, ...) parts over their first dimension.
inline Tensor sum_parts(const OnDevice& on, const Tensor& parts, const Tensor& out) {
  const SumPartsCall call{floats_in(parts), parts.size(0), out.numel(), out.data_ptr(), dtype_of(out, "gradient")};
  STD_TORCH_CHECK(ceil_div(call.size, 128) <= INT32_MAX, "a gradient is larger than a launch");
  launch(on, sum_parts_kernel, blocks(ceil_div(call.size, 128)), 128, 0, call);
  return out;
}

}  // namespace star
