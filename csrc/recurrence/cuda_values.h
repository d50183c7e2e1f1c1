// What the recurrences' CUDA kernels share: packed loads that fall back to single ones, and cells.
// Include from cuda_*.cu only.
#pragma once

#include "../common/cuda/arguments.h"
#include "../common/cuda/parts.h"

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

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline bool takes_packs(const Weight& weight, int count, std::initializer_list<int64_t> strides) {
  return takes_packs(weight.data, bytes_of(weight.dtype), count, strides);
}

inline bool takes_packs(const Rows& rows, Dtype dtype, int count) {
  return takes_packs(rows.data, bytes_of(dtype), count, {rows.batch_stride, rows.row_stride});
}

}  // namespace star
