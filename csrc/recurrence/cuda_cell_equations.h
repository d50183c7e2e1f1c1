// One token of the GRU and of the LSTM with diagonal weights, in device code.
//
// GRU:   z = s(xz + az h), r = s(xr + ar h), c = tanh(xh + ah r h), h' = h + z (c - h)
// LSTM:  f = s(xf + af h), o = s(xo + ao h), z = tanh(xz + az h), c' = z + f (c - z), h' = o tanh(c')
#pragma once

#include "../common/cuda/device.h"

namespace star {

__device__ __forceinline__ void gru_token(const float (&x)[3], const float (&a)[3], float& h) {
  const float z = sigmoid(x[0] + a[0] * h), r = sigmoid(x[1] + a[1] * h);
  h += z * (tanhf(x[2] + a[2] * (r * h)) - h);
}

__device__ __forceinline__ void lstm_token(const float (&x)[3], const float (&a)[3], float& h, float& c) {
  const float f = sigmoid(x[0] + a[0] * h), o = sigmoid(x[1] + a[1] * h), z = tanhf(x[2] + a[2] * h);
  c = z + f * (c - z);
  h = o * tanhf(c);
}

}  // namespace star
