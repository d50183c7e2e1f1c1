// What the recurrences' CUDA kernels share: packed loads that fall back to single ones, and cells.
// Include from cuda_*.cu only.
#pragma once

#include "../common/cuda/arguments.h"

namespace star {

// `count` neighbours, in one access where `packed` says that they are aligned. The branch is the same in all
// threads.
template <int count, class T>
__device__ __forceinline__ void load_values(const T* from, bool packed, float (&to)[count]) {
  if (packed) {
    load<count>(from, to);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = to_float(from[i]);
  }
}

// `count` neighbours of a weight; an absent one reads as 0.
template <int count>
__device__ __forceinline__ void load_values(const Weight& weight, int64_t index, bool packed, float (&to)[count]) {
  if (weight.data == nullptr) {
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = 0.0f;
    return;
  }
  switch (weight.dtype) {
    case Dtype::float32: return load_values<count>(static_cast<const float*>(weight.data) + index, packed, to);
    case Dtype::bfloat16: return load_values<count>(static_cast<const bfloat16*>(weight.data) + index, packed, to);
    default: return load_values<count>(static_cast<const float16*>(weight.data) + index, packed, to);
  }
}

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

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline bool takes_packs(const Weight& weight, int count, std::initializer_list<int64_t> strides) {
  return takes_packs(weight.data, bytes_of(weight.dtype), count, strides);
}

inline bool takes_packs(const Rows& rows, Dtype dtype, int count) {
  return takes_packs(rows.data, bytes_of(dtype), count, {rows.batch_stride, rows.row_stride});
}

}  // namespace star
