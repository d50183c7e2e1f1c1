// Root-mean-square norm and rotary embedding; compiled once per instruction-set level.
//
// Norm:  r = (mean(u^2) + eps)^-1/2,  y = r u w.   With g = dy w:
//        du = r g - u r^3 mean(g u)  (dr/du = -r^3 u / D),  dw = sum over rows of dy r u.  r is recomputed.
// Rope:  a rotation, so its derivative is the rotation back.
#include "kernels.h"

#include "../common/scalar.h"

namespace star {
namespace STAR_LEVEL {
namespace {

inline float inverse_root(float mean_square, float eps) { return 1.0f / __builtin_sqrtf(mean_square + eps); }

template <class T>
float sum_of_squares(const T* u, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += to_float(u[d]) * to_float(u[d]);
  return sum;
}

template <class T>
float add_and_square(const T* x, const T* residual, T* u, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) {
    const T stored = from_float<T>(to_float(x[d]) + to_float(residual[d]));
    u[d] = stored;
    sum += to_float(stored) * to_float(stored);
  }
  return sum;
}

template <class T>
void forward_rows(const RmsNorm& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const float* weight = call.weight;
  GridPosition at(call.grid, begin);
  for (int64_t row = begin; row < end; ++row, at.advance()) {
    const T* u = at.row<T>(call.x);
    T* y = at.row<T>(call.y);
    float sum;
    if (call.residual.data) {
      T* added = at.row<T>(call.sum);
      sum = add_and_square(u, at.row<T>(call.residual), added, width);
      u = added;
    } else {
      sum = sum_of_squares(u, width);
    }
    const float r = inverse_root(sum / static_cast<float>(width), call.eps);
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d) y[d] = from_float<T>(to_float(u[d]) * r * weight[d]);
  }
}

template <class T>
void backward_chunk(const RmsNormBackward& call, int64_t chunk) {
  const int64_t width = call.width;
  const float* weight = call.weight;
  float* dweight = call.weight_parts + chunk * width;
  for (int64_t d = 0; d < width; ++d) dweight[d] = 0.0f;
  const int64_t begin = chunk * call.chunk_rows;
  const int64_t end = begin + call.chunk_rows < call.rows ? begin + call.chunk_rows : call.rows;
  GridPosition at(call.grid, begin);
  for (int64_t row = begin; row < end; ++row, at.advance()) {
    const T* dy = at.row<T>(call.dy);
    const T* u = at.row<T>(call.u);
    const T* dsum = call.dsum.data ? at.row<T>(call.dsum) : nullptr;
    T* dx = at.row<T>(call.dx);
    float squares = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : squares, product)
    for (int64_t d = 0; d < width; ++d) {
      const float value = to_float(u[d]);
      squares += value * value;
      product += to_float(dy[d]) * weight[d] * value;
    }
    const float r = inverse_root(squares / static_cast<float>(width), call.eps);
    const float pull = r * r * r * product / static_cast<float>(width);
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d) {
      const float gradient = to_float(dy[d]), value = to_float(u[d]);
      dweight[d] += gradient * (value * r);
      const float normed = gradient * weight[d] * r - value * pull;
      dx[d] = from_float<T>(dsum ? normed + to_float(dsum[d]) : normed);
    }
  }
}

template <class T>
void rotate_rows(const Rope& call, int64_t begin, int64_t end) {
  const int64_t half = call.half;
  const float sign = call.inverse ? -1.0f : 1.0f;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / call.length, time = row % call.length;
    const T* source = static_cast<const T*>(call.x) + batch * call.batch_stride + time * call.row_stride;
    T* y = static_cast<T*>(call.y) + row * call.heads * 2 * half;
    const float* cos = call.cos + time * half;
    const float* sin = call.sin + time * half;
    for (int64_t head = 0; head < call.heads; ++head, y += 2 * half) {
      const T* x = source + head * call.head_stride;
#pragma GCC ivdep
      for (int64_t d = 0; d < half; ++d) {
        const float first = to_float(x[d]), second = to_float(x[half + d]), turned = sign * sin[d];
        y[d] = from_float<T>(first * cos[d] - second * turned);
        y[half + d] = from_float<T>(second * cos[d] + first * turned);
      }
    }
  }
}

}  // namespace

void rms_norm_forward(const RmsNorm& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, { forward_rows<T>(call, begin, end); })
}

void rms_norm_backward(const RmsNormBackward& call, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    STAR_WITH_DTYPE(call.dtype, T, { backward_chunk<T>(call, chunk); })
  }
}

void rope_rows(const Rope& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, { rotate_rows<T>(call, begin, end); })
}

}  // namespace STAR_LEVEL
}  // namespace star
