// What the kernels of the short convolution on a GPU share: taps in registers, packs, sequences.
// Include from *cuda*.cu only.
#pragma once

#include "../common/cuda/arguments.h"

namespace star {

// The taps of N neighbouring channels, (N, TAPS) as they lie in memory, four at a time.
template <int COUNT>
__device__ __forceinline__ void load_taps(const Weight& weight, int64_t index, float (&taps)[COUNT]) {
  const auto in_fours = [&](const auto* data) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      float four[4];
      load<4>(data + index + i, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) taps[i + j] = four[j];
    }
  };
  switch (weight.dtype) {
    case Dtype::float32: return in_fours(static_cast<const float*>(weight.data));
    case Dtype::bfloat16: return in_fours(static_cast<const bfloat16*>(weight.data));
    default: return in_fours(static_cast<const float16*>(weight.data));
  }
}

// The bias of N neighbouring channels; 0 where there is none.
template <int N>
__device__ __forceinline__ void load_bias(const Weight& bias, int64_t index, float (&values)[N]) {
  if constexpr (N % 4 == 0) {
    if (bias.data != nullptr) return load_taps(bias, index, values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = bias.at(index + i, 0.0f);
  }
}

inline bool taps_take_fours(const Weight& weight) {
  return reinterpret_cast<uintptr_t>(weight.data) % (weight.dtype == Dtype::float32 ? 16 : 8) == 0;
}

// Whether rows are read in packs of `count`; absent ones are.
inline bool rows_take_packs(const Rows& rows, int64_t width, int64_t bytes, int count) {
  return rows.data == nullptr ||
         (width % count == 0 && takes_packs(rows.data, bytes, count, {rows.batch_stride, rows.row_stride}));
}

}  // namespace star

// Runs the statement with TAPS bound to the number of taps, or to 0 for one that has no form of its own.
#define STAR_WITH_TAPS(taps, TAPS, ...)                      \
  switch (taps) {                                            \
    case 2: { constexpr int TAPS = 2; __VA_ARGS__; break; }  \
    case 3: { constexpr int TAPS = 3; __VA_ARGS__; break; }  \
    case 4: { constexpr int TAPS = 4; __VA_ARGS__; break; }  \
    default: { constexpr int TAPS = 0; __VA_ARGS__; break; } \
  }
