// Elementary functions in float32, branch-free so that loops over them vectorise at every level.
// Relative error below 3e-7 over the whole range; infinities and NaN pass as they do in libm.
// Include only from <family>/kernels.cpp.
#pragma once

#include "scalar.h"

namespace star {
namespace STAR_LEVEL {

STAR_INLINE float maximum(float a, float b) { return a > b ? a : b; }
STAR_INLINE float minimum(float a, float b) { return a < b ? a : b; }
STAR_INLINE float absolute(float x) { return __builtin_fabsf(x); }

STAR_INLINE float exponential(float x) {
  // e^x = 2^n e^r with |r| <= ln(2)/2; ln(2) is split so that n ln(2) is exact in its high part.
  const float clamped = minimum(maximum(x, -105.0f), 89.5f);
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its low bits hold n
  const float whole = shifted - 12582912.0f;
  const int n = static_cast<int>(float_bits(shifted)) - 0x4b400000;
  const float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // Two factors, so that results beyond the range of one exponent overflow or underflow as they should.
  const int half = n >> 1;
  const float first = bits_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = bits_float(static_cast<uint32_t>(n - half + 127) << 23);
  return x != x ? x : p * first * second;
}

STAR_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

STAR_INLINE float silu(float x) { return x * sigmoid(x); }

// d silu(x) / dx from s = sigmoid(x): s (1 + x (1 - s)).
STAR_INLINE float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

STAR_INLINE float hyperbolic_tangent(float x) {
  // Near zero 1 - 2 / (e^2x + 1) would cancel: there the odd Taylor series to x^11.
  const float square = x * x;
  float series = -1382.0f / 155925.0f;
  series = series * square + 62.0f / 2835.0f;
  series = series * square - 17.0f / 315.0f;
  series = series * square + 2.0f / 15.0f;
  series = series * square - 1.0f / 3.0f;
  series = series * square * x + x;
  const float far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
  return absolute(x) < 0.3f ? series : far;
}

STAR_INLINE float softplus(float x) {
  // log(1 + e^x) = max(x, 0) + log1p(u) with u = e^-|x| <= 1, and log1p(u) = 2 atanh(u / (2 + u)),
  // whose series in s <= 1/3 keeps the relative accuracy of small results.
  const float u = exponential(-absolute(x));
  const float s = u / (2.0f + u);
  const float square = s * s;
  float series = 1.0f / 15.0f;
  series = series * square + 1.0f / 13.0f;
  series = series * square + 1.0f / 11.0f;
  series = series * square + 1.0f / 9.0f;
  series = series * square + 1.0f / 7.0f;
  series = series * square + 1.0f / 5.0f;
  series = series * square + 1.0f / 3.0f;
  series = series * square * s + s;
  return maximum(x, 0.0f) + 2.0f * series;
}

}  // namespace STAR_LEVEL
}  // namespace star
