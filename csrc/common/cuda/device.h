// What the device code of every family shares: storage types, vector accesses, functions, sums over threads.
// All arithmetic is in float32. Include from *cuda*.cu only.
#pragma once

#include "platform.h"
#include "../types.h"

namespace star {

#ifdef STAR_EMULATE_CUDA

using emulated::from_float;
using emulated::to_float;
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log(float x) { return std::log(x); }
inline float fast_divide(float a, float b) { return a / b; }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }

#else

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
  return bfloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float value) {
  return float16{__half_as_ushort(__float2half_rn(value))};
}

// Two units in the last place of ex2.approx: relative error below 4e-7 for |x| < 1, growing as |x| does, since
// x log2(e) is rounded first; within 1e-5 wherever the result is not negligible.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_log(float x) { return __logf(x); }
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }

#endif

// 1 / (1 + e^-x); e^-x overflows to infinity for x < -88, and the quotient is 0 then, as it should be.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// log(1 + e^x) without overflow, and without the loss of small results that log(1 + y) suffers.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// Several neighbours in memory, read and written in one access of up to 16 bytes.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

template <int count, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[count]) {
  const Pack<T, count> pack = *reinterpret_cast<const Pack<T, count>*>(from);
#pragma unroll
  for (int i = 0; i < count; ++i) to[i] = to_float(pack.values[i]);
}

template <int count, class T>
__device__ __forceinline__ void store(const float (&from)[count], T* to) {
  Pack<T, count> pack;
#pragma unroll
  for (int i = 0; i < count; ++i) pack.values[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, count>*>(to) = pack;
}

// The same to global memory, certainly in one access: the compiler splits some of the above.
#ifdef STAR_EMULATE_CUDA
template <int count, class T>
inline void store_global(const float (&from)[count], T* to) {
  store<count>(from, to);
}
#else
// The 32-bit word of an element, or of two of 16 bits.
__device__ __forceinline__ uint32_t word_of(const float* from, const float*) { return __float_as_uint(from[0]); }
template <class T>
__device__ __forceinline__ uint32_t word_of(const float* from, const T*) {
  return from_float<T>(from[0]).bits | static_cast<uint32_t>(from_float<T>(from[1]).bits) << 16;
}

template <int count, class T>
__device__ __forceinline__ void store_global(const float (&from)[count], T* to) {
  constexpr int bytes = count * static_cast<int>(sizeof(T)), step = 4 / static_cast<int>(sizeof(T));
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (bytes == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word_of(from, to)),
                 "r"(word_of(from + step, to)), "r"(word_of(from + 2 * step, to)),
                 "r"(word_of(from + 3 * step, to))
                 : "memory");
  } else if constexpr (bytes == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word_of(from, to)),
                 "r"(word_of(from + step, to))
                 : "memory");
  } else {
    store<count>(from, to);
  }
}
#endif

// A weight in whatever floating dtype it was given, read without a conversion in memory.
struct Weight {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;

  __device__ __forceinline__ float operator[](int64_t index) const {
    switch (dtype) {
      case Dtype::float32: return static_cast<const float*>(data)[index];
      case Dtype::bfloat16: return to_float(static_cast<const bfloat16*>(data)[index]);
      default: return to_float(static_cast<const float16*>(data)[index]);
    }
  }
  // An absent weight reads as `otherwise`.
  __device__ __forceinline__ float at(int64_t index, float otherwise) const {
    return data == nullptr ? otherwise : (*this)[index];
  }
};

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warp_size = 32;

// The sum over groups of `lanes` neighbouring lanes, in every lane of the group.
template <int lanes = warp_size>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(all_lanes, value, distance);
  return value;
}

template <int lanes = warp_size>
__device__ __forceinline__ float warp_maximum(float value) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(all_lanes, value, distance));
  return value;
}

// The sum over a block's threads, in every thread. `scratch`: 32 floats of shared memory, free again after the
// next barrier of the block; all threads call it.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x + 31) / 32;
  value = warp_sum(value);
  if (warps == 1) return value;
  if (thread % warp_size == 0) scratch[thread / warp_size] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < warps; ++warp) total += scratch[warp];  // in the same order everywhere
  return total;
}

}  // namespace star
