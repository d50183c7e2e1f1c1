// Vectors of float32 as wide as the level's registers, for kernels that must keep a state in them; where a
// plain loop does, write the loop. Include only from kernel files.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers, in undefined vectors
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace star {
namespace STAR_LEVEL {

#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
#elif defined(__AVX2__)
constexpr int64_t lanes = 8;
#else
constexpr int64_t lanes = 4;
#endif

typedef float Vector __attribute__((vector_size(lanes * 4)));
typedef int32_t IntVector __attribute__((vector_size(lanes * 4)));
typedef float LooseVector __attribute__((vector_size(lanes * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }
inline Vector broadcast(float value) { return value - Vector{}; }

// a > b ? a : b and a < b ? a : b by lane: b where either is NaN. Compilers make compare and blend of those.
#if defined(__AVX512F__)
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
#else
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
#endif

// The sum over lanes, in an order that depends on the number of lanes alone.
inline float sum_lanes(Vector value) {
  float sums[lanes];
  store(sums, value);
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// 2^x to a relative 1e-7. Above 128 infinity; below -126 it stays at 2^-126, which no float32 sum notices.
inline Vector exponential2(Vector x) {
  constexpr float whole_numbers = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = smaller(broadcast(128.0f), larger(broadcast(-126.0f), x));  // NaN stays NaN
  const Vector shifted = x + whole_numbers;
  const Vector r = x - (shifted - whole_numbers);
  // 2^r = 1 + r q(r) on [-1/2, 1/2], q of least maximal error: 2e-9 beside float32's own rounding.
  Vector q = r * 1.5353362e-4f + 1.3398874e-3f;
  q = q * r + 9.618437e-3f;
  q = q * r + 5.5503324e-2f;
  q = q * r + 2.4022648e-1f;
  q = q * r + 6.9314720e-1f;
  const Vector power = q * r + 1.0f;
  // The low bits of `shifted` are the whole number: moved to the exponent they multiply by 2^whole.
  return (Vector)((IntVector)power + ((IntVector)shifted << 23));
}

}  // namespace STAR_LEVEL
}  // namespace star
