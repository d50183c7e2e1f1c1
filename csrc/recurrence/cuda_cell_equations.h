// The GRU and the LSTM with diagonal weights, in device code: one token, its slope, and its way back.
//
// GRU:   z = s(xz + az h), r = s(xr + ar h), k = tanh(xh + ah r h), h' = h + z (k - h)
// LSTM:  f = s(xf + af h), o = s(xo + ao h), z = tanh(xz + az h), c' = z + f (c - z), h' = o tanh(c')
//
// A state is (h) or (h, c). Near a state s, a token is the affine map s' = value(s) + J (s' - s); the gradient of
// a loss with respect to what a token makes of its state goes back through the transposed J.
#pragma once

#include "../common/cuda/device.h"

namespace star {

// s -> matrix s + offset
template <int S>
struct Map {
  float matrix[S][S], offset[S];

  __device__ __forceinline__ static Map identity() {
    Map map;
#pragma unroll
    for (int i = 0; i < S; ++i) {
      map.offset[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < S; ++j) map.matrix[i][j] = i == j ? 1.0f : 0.0f;
    }
    return map;
  }

  __device__ __forceinline__ void apply(float (&state)[S]) const {
    float after[S];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      after[i] = offset[i];
#pragma unroll
      for (int j = 0; j < S; ++j) after[i] += matrix[i][j] * state[j];
    }
#pragma unroll
    for (int i = 0; i < S; ++i) state[i] = after[i];
  }

  // This map, and then another.
  __device__ __forceinline__ void then(const Map& next) {
    const Map first = *this;
    next.apply(offset);
#pragma unroll
    for (int i = 0; i < S; ++i)
#pragma unroll
      for (int j = 0; j < S; ++j) {
        matrix[i][j] = 0.0f;
#pragma unroll
        for (int k = 0; k < S; ++k) matrix[i][j] += next.matrix[i][k] * first.matrix[k][j];
      }
  }
};

struct GruCell {
  static constexpr int states = 1;
  float z, r, k;

  __device__ __forceinline__ GruCell() {}
  __device__ __forceinline__ GruCell(const float (&x)[3], const float (&a)[3], const float (&s)[1])
      : z(sigmoid(x[0] + a[0] * s[0])), r(sigmoid(x[1] + a[1] * s[0])), k(tanhf(x[2] + a[2] * (r * s[0]))) {}

  __device__ __forceinline__ void advance(float (&s)[1]) const { s[0] += z * (k - s[0]); }

  __device__ __forceinline__ float slope(const float (&a)[3], float h) const {
    return (1.0f - z) + (k - h) * a[0] * z * (1.0f - z) +
           z * (1.0f - k * k) * a[2] * (r + h * a[1] * r * (1.0f - r));
  }

  // The token near the state s.
  __device__ __forceinline__ Map<1> map(const float (&a)[3], const float (&s)[1]) const {
    const float J = slope(a, s[0]);
    return Map<1>{{{J}}, {s[0] + z * (k - s[0]) - J * s[0]}};
  }

  // From the gradient of the state after the token to that of the state s before it; dh comes on top of the first.
  __device__ __forceinline__ Map<1> way_back(const float (&a)[3], const float (&s)[1], float dh) const {
    const float J = slope(a, s[0]);
    return Map<1>{{{J}}, {J * dh}};
  }

  // dx, and what the weights' gradients have from this token, of the gradient g after it.
  __device__ __forceinline__ void gradients(const float (&a)[3], const float (&s)[1], const float (&g)[1],
                                            float (&dx)[3], float (&da)[3]) const {
    const float h = s[0];
    dx[2] = g[0] * z * (1.0f - k * k);
    dx[1] = dx[2] * a[2] * h * r * (1.0f - r);
    dx[0] = g[0] * (k - h) * z * (1.0f - z);
    da[0] += dx[0] * h;
    da[1] += dx[1] * h;
    da[2] += dx[2] * (r * h);
  }
};

struct LstmCell {
  static constexpr int states = 2;
  float f, o, z, bent;  // bent = tanh(c')

  __device__ __forceinline__ LstmCell() {}
  __device__ __forceinline__ LstmCell(const float (&x)[3], const float (&a)[3], const float (&s)[2])
      : f(sigmoid(x[0] + a[0] * s[0])), o(sigmoid(x[1] + a[1] * s[0])), z(tanhf(x[2] + a[2] * s[0])),
        bent(tanhf(z + f * (s[1] - z))) {}

  __device__ __forceinline__ void advance(float (&s)[2]) const {
    s[1] = z + f * (s[1] - z);
    s[0] = o * bent;
  }

  // d c' / d h, and d h' / d h without what goes through c'
  __device__ __forceinline__ float cell_slope(const float (&a)[3], float c) const {
    return (c - z) * a[0] * f * (1.0f - f) + (1.0f - f) * a[2] * (1.0f - z * z);
  }
  __device__ __forceinline__ float output_slope(const float (&a)[3]) const { return a[1] * o * (1.0f - o) * bent; }
  __device__ __forceinline__ float steepness() const { return o * (1.0f - bent * bent); }  // d h' / d c'

  __device__ __forceinline__ Map<2> map(const float (&a)[3], const float (&s)[2]) const {
    const float of_h = cell_slope(a, s[1]), steep = steepness();
    Map<2> map{{{output_slope(a) + steep * of_h, steep * f}, {of_h, f}}, {o * bent, z + f * (s[1] - z)}};
#pragma unroll
    for (int i = 0; i < 2; ++i) map.offset[i] -= map.matrix[i][0] * s[0] + map.matrix[i][1] * s[1];
    return map;
  }

  __device__ __forceinline__ Map<2> way_back(const float (&a)[3], const float (&s)[2], float dh) const {
    const float of_h = cell_slope(a, s[1]), steep = steepness(), through = output_slope(a) + steep * of_h;
    return Map<2>{{{through, of_h}, {steep * f, f}}, {through * dh, steep * f * dh}};
  }

  __device__ __forceinline__ void gradients(const float (&a)[3], const float (&s)[2], const float (&g)[2],
                                            float (&dx)[3], float (&da)[3]) const {
    const float k = g[1] + g[0] * steepness();
    dx[0] = k * (s[1] - z) * f * (1.0f - f);
    dx[1] = g[0] * bent * o * (1.0f - o);
    dx[2] = k * (1.0f - f) * (1.0f - z * z);
#pragma unroll
    for (int i = 0; i < 3; ++i) da[i] += dx[i] * s[0];
  }
};

}  // namespace star
