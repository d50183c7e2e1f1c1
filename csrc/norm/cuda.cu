// Root-mean-square norm with and without a residual on a GPU: kernels, checks, launches, registration.
//
// A block takes a row, reads it twice (the second time from the L1 cache) and writes it once, in 16-byte
// accesses. The weight's gradient is summed by a block over the rows that are its own, then over the blocks, in
// an order that the shape fixes.
#include "../common/cuda/arguments.h"
#include "../common/cuda/grid.h"
#include "../common/cuda/parts.h"
#include "../common/grid_tensor.h"

#include <tuple>

namespace star {
namespace {

constexpr int64_t most_threads = 512;
constexpr int64_t most_parts = 264;  // blocks of the backward pass: two for every multiprocessor of an H100

struct RmsNormCall {
  Grid grid;
  int64_t width, rows;
  float eps;
  GridRows x, y;
  GridRows residual, sum;  // data is null where there is no residual
  Weight weight;
};

// u = x + residual, rounded to T as it is stored, so that the norm is that of the sum which leaves.
template <class T, int N>
__device__ __forceinline__ void load_sum(const T* x, const T* residual, int64_t d, float (&u)[N]) {
  load<N>(x + d, u);
  if (residual == nullptr) return;
  float other[N];
  load<N>(residual + d, other);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] = to_float(from_float<T>(u[i] + other[i]));
}

template <class T, int N>
__global__ void rms_norm_kernel(RmsNormCall call) {
  __shared__ float scratch[warp_size];
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const RowIndex at(call.grid, row);
    const T* x = at.of<const T>(call.x);
    const T* residual = call.residual.data == nullptr ? nullptr : at.of<const T>(call.residual);
    T* y = at.of<T>(call.y);
    float squares = 0.0f;
    for (int64_t d = threadIdx.x * N; d < call.width; d += blockDim.x * N) {
      float u[N];
      load_sum<T, N>(x, residual, d, u);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += u[i] * u[i];
      if (residual != nullptr) store<N>(u, at.of<T>(call.sum) + d);
    }
    const float mean = block_sum(squares, scratch) / static_cast<float>(call.width);
    const float scale = inverse_root(mean + call.eps);
    for (int64_t d = threadIdx.x * N; d < call.width; d += blockDim.x * N) {
      float u[N];
      load_sum<T, N>(x, residual, d, u);
#pragma unroll
      for (int i = 0; i < N; ++i) u[i] *= scale * call.weight[d + i];
      store<N>(u, y + d);
    }
    __syncthreads();  // scratch is written again for the next row
  }
}

struct RmsNormBackwardCall {
  Grid grid;
  int64_t width, rows;
  float eps;
  GridRows dy, u, dx;
  GridRows dsum;  // gradient of u itself; data is null where there is none
  Weight weight;
  float* parts;  // (blocks, D): each block's share of the weight's gradient
};

template <class T, int N>
__global__ void rms_norm_backward_kernel(RmsNormBackwardCall call) {
  __shared__ float scratch[2][warp_size];
  float* part = call.parts + blockIdx.x * call.width;  // a thread's columns are touched by it alone
  for (int64_t d = threadIdx.x * N; d < call.width; d += blockDim.x * N)
    for (int i = 0; i < N; ++i) part[d + i] = 0.0f;
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const RowIndex at(call.grid, row);
    const T* dy = at.of<const T>(call.dy);
    const T* u = at.of<const T>(call.u);
    const T* dsum = call.dsum.data == nullptr ? nullptr : at.of<const T>(call.dsum);
    T* dx = at.of<T>(call.dx);
    float squares = 0.0f, products = 0.0f;
    for (int64_t d = threadIdx.x * N; d < call.width; d += blockDim.x * N) {
      float value[N], gradient[N];
      load<N>(u + d, value);
      load<N>(dy + d, gradient);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        squares += value[i] * value[i];
        products += value[i] * gradient[i] * call.weight[d + i];
      }
    }
    const float width = static_cast<float>(call.width);
    const float scale = inverse_root(block_sum(squares, scratch[0]) / width + call.eps);
    // d/du of u_i s(u) w_i with s = (mean(u^2) + eps)^-1/2: s w dy - u s^3 mean(u w dy)
    const float pull = scale * scale * scale * block_sum(products, scratch[1]) / width;
    for (int64_t d = threadIdx.x * N; d < call.width; d += blockDim.x * N) {
      float value[N], gradient[N], other[N];
      load<N>(u + d, value);
      load<N>(dy + d, gradient);
      if (dsum != nullptr) load<N>(dsum + d, other);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        part[d + i] += value[i] * scale * gradient[i];
        gradient[i] = scale * call.weight[d + i] * gradient[i] - value[i] * pull;
        if (dsum != nullptr) gradient[i] += other[i];
      }
      store<N>(gradient, dx + d);
    }
    __syncthreads();
  }
}

int64_t width_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must be (..., D)");
  return x.size(x.dim() - 1);
}

bool rows_take_packs(const GridRows& rows, int64_t width, int64_t bytes, int count) {
  return width % count == 0 &&
         takes_packs(rows.data, bytes, count, {rows.strides[0], rows.strides[1], rows.strides[2]});
}

// Enough threads for a row, in whole warps.
unsigned threads_for(int64_t width, int count) {
  const int64_t wanted = ceil_div(ceil_div(width, count), warp_size) * warp_size;
  return static_cast<unsigned>(wanted < most_threads ? wanted : most_threads);
}

void run(const RmsNormCall& call, const Tensor& x) {
  if (call.width == 0) return;
  const OnDevice on(x);
  STAR_WITH_DTYPE(dtype_of(x, "x"), T, {
    const auto fits = [&](int count) {
      for (const GridRows& rows : {call.x, call.y, call.residual, call.sum})
        if (rows.data != nullptr && !rows_take_packs(rows, call.width, sizeof(T), count)) return false;
      return true;
    };
    STAR_WITH_PACK(T, fits, N,
                   launch(on, rms_norm_kernel<T, N>, dim3(blocks(call.rows)), threads_for(call.width, N), 0, call));
  });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  DeviceArguments arguments(x);
  Tensor y = empty_like_shape(x, sizes_of(x));
  const GridTensors<2> tensors({x, y});
  RmsNormCall call{tensors.grid, tensors.width, tensors.grid.rows(), static_cast<float>(eps)};
  call.x = tensors.rows(0);
  call.y = tensors.rows(1);
  call.weight = arguments.weight(weight, "weight", {width_of(x)});
  run(call, x);
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_residual(Tensor x, Tensor residual, Tensor weight, double eps) {
  DeviceArguments arguments(x);
  check_like(residual, "residual", x);
  Tensor y = empty_like_shape(x, sizes_of(x)), sum = empty_like_shape(x, sizes_of(x));
  const GridTensors<4> tensors({x, residual, y, sum});
  RmsNormCall call{tensors.grid, tensors.width, tensors.grid.rows(), static_cast<float>(eps)};
  call.x = tensors.rows(0);
  call.residual = tensors.rows(1);
  call.y = tensors.rows(2);
  call.sum = tensors.rows(3);
  call.weight = arguments.weight(weight, "weight", {width_of(x)});
  run(call, x);
  return {y, sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, OptionalTensor dsum, Tensor u, Tensor weight, double eps) {
  DeviceArguments arguments(u);
  check_like(dy, "dy", u);
  if (dsum) check_like(*dsum, "dsum", u);
  Tensor dx = empty_like_shape(u, sizes_of(u));
  const GridTensors<4> tensors({dy, u, dx, dsum ? *dsum : dx});
  RmsNormBackwardCall call{tensors.grid, tensors.width, tensors.grid.rows(), static_cast<float>(eps)};
  call.dy = tensors.rows(0);
  call.u = tensors.rows(1);
  call.dx = tensors.rows(2);
  if (dsum) call.dsum = tensors.rows(3);
  call.weight = arguments.weight(weight, "weight", {width_of(u)});
  const int64_t count = call.rows < most_parts ? call.rows : most_parts;
  Tensor parts = empty_float(u, {count, call.width}), dweight = empty_float(u, {call.width});
  if (call.width == 0) return {dx, dweight};
  call.parts = static_cast<float*>(parts.data_ptr());
  const OnDevice on(u);
  STAR_WITH_DTYPE(dtype_of(u, "x"), T, {
    const auto fits = [&](int pack) {
      for (const GridRows& rows : {call.dy, call.u, call.dx, call.dsum})
        if (rows.data != nullptr && !rows_take_packs(rows, call.width, sizeof(T), pack)) return false;
      return true;
    };
    STAR_WITH_PACK(T, fits, N,
                   launch(on, rms_norm_backward_kernel<T, N>, dim3(blocks(count)), threads_for(call.width, N), 0,
                          call));
  });
  return {dx, sum_parts(on, parts, dweight)};
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("rms_norm", TORCH_BOX(&star::rms_norm));
  m.impl("rms_norm_residual", TORCH_BOX(&star::rms_norm_residual));
  m.impl("rms_norm_backward", TORCH_BOX(&star::rms_norm_backward));
}
