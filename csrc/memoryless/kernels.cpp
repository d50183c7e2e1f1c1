// Gated memoryless units; compiled once per instruction-set level.
//
// Forward:   y = a(gate) up.   Backward:  dgate = dy up a'(gate),  dup = dy a(gate);  a and a' are recomputed.
#include "kernels.h"

#include "../common/math.h"

namespace star {
namespace STAR_LEVEL {
namespace {

// An activation's value and its slope at the same point.
struct Tangent {
  float value, slope;
};

// The normal distribution's cumulative function, erfc(-x / sqrt 2) / 2, by erfc(z) = t e^(-z^2 + P(t)) with
// t = 1 / (1 + z / 2); P is our own least-squares fit at Chebyshev nodes, relative error below 4e-7.
inline float normal_cumulative(float x) {
  const float z = absolute(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17061181f;
  p = p * t - 0.8209126f;
  p = p * t + 1.48603654f;
  p = p * t - 1.13249207f;
  p = p * t + 0.277105242f;
  p = p * t - 0.185595468f;
  p = p * t + 0.0966243371f;
  p = p * t + 0.37411195f;
  p = p * t + 1.00002253f;
  p = p * t - 1.26551223f;
  const float tail = 0.5f * t * exponential(p - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

template <Activation activation>
inline Tangent tangent(float x);

template <>
inline Tangent tangent<Activation::silu>(float x) {
  const float s = sigmoid(x);
  return {x * s, silu_slope(x, s)};
}

template <>
inline Tangent tangent<Activation::gelu>(float x) {
  const float cumulative = normal_cumulative(x);
  const float density = 0.39894228f * exponential(-0.5f * x * x);
  return {x * cumulative, cumulative + x * density};
}

// (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <>
inline Tangent tangent<Activation::gelu_tanh>(float x) {
  const float near = minimum(maximum(x, -16.0f), 16.0f);  // beyond, sigmoid(2 u) is 0 or 1 and its slope 0
  const float doubled = 1.59576912f * near * (1.0f + 0.044715f * near * near);
  const float doubled_slope = 1.59576912f * (1.0f + 3.0f * 0.044715f * near * near);
  const float s = sigmoid(x != x ? x : doubled);
  return {x * s, s + near * s * (1.0f - s) * doubled_slope};
}

template <>
inline Tangent tangent<Activation::relu>(float x) {
  return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
}

template <>
inline Tangent tangent<Activation::sigmoid>(float x) {
  const float s = sigmoid(x);
  return {s, s * (1.0f - s)};
}

template <class T, Activation activation>
void forward_rows(const Glu& call, int64_t begin, int64_t end) {
  GridPosition at(call.grid, begin);
  for (int64_t row = begin; row < end; ++row, at.advance()) {
    const T* gate = at.row<T>(call.gate);
    const T* up = at.row<T>(call.up);
    T* y = at.row<T>(call.y);
#pragma GCC ivdep
    for (int64_t d = 0; d < call.width; ++d)
      y[d] = from_float<T>(tangent<activation>(to_float(gate[d])).value * to_float(up[d]));
  }
}

template <class T, Activation activation>
void backward_rows(const Glu& call, int64_t begin, int64_t end) {
  GridPosition at(call.grid, begin);
  for (int64_t row = begin; row < end; ++row, at.advance()) {
    const T* dy = at.row<T>(call.dy);
    const T* gate = at.row<T>(call.gate);
    const T* up = at.row<T>(call.up);
    T* dgate = at.row<T>(call.dgate);
    T* dup = at.row<T>(call.dup);
#pragma GCC ivdep
    for (int64_t d = 0; d < call.width; ++d) {
      const Tangent a = tangent<activation>(to_float(gate[d]));
      const float gradient = to_float(dy[d]);
      dgate[d] = from_float<T>(gradient * to_float(up[d]) * a.slope);
      dup[d] = from_float<T>(gradient * a.value);
    }
  }
}

#define STAR_WITH_ACTIVATION(activation, A, ...)                                                  \
  switch (activation) {                                                                           \
    case Activation::silu: { constexpr Activation A = Activation::silu; __VA_ARGS__; break; }     \
    case Activation::gelu: { constexpr Activation A = Activation::gelu; __VA_ARGS__; break; }     \
    case Activation::gelu_tanh: { constexpr Activation A = Activation::gelu_tanh; __VA_ARGS__; break; } \
    case Activation::relu: { constexpr Activation A = Activation::relu; __VA_ARGS__; break; }     \
    case Activation::sigmoid: { constexpr Activation A = Activation::sigmoid; __VA_ARGS__; break; } \
  }

}  // namespace

void glu_forward(const Glu& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, STAR_WITH_ACTIVATION(call.activation, A, {
    forward_rows<T, A>(call, begin, end);
  }))
}

void glu_backward(const Glu& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, STAR_WITH_ACTIVATION(call.activation, A, {
    backward_rows<T, A>(call, begin, end);
  }))
}

}  // namespace STAR_LEVEL
}  // namespace star
