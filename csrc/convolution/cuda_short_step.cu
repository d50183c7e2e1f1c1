// One token of the short convolution on a GPU: kernel, checks, launch, registration.
//
// A thread takes 16 bytes of neighbouring channels of one sequence, reads what its state holds of them, and
// writes the state back a row further on.
#include "cuda_short.h"

namespace star {
namespace {

constexpr int threads = 64;

struct ShortStepCall {
  int64_t batch, width;
  int taps;
  bool silu;
  Rows x, b, c, y;  // one row a sequence; b and c have no data where there are no gates
  Rows state;       // (B, K-1, D), of any strides
  int64_t state_channel_stride;
  Weight weight, bias;
};

// u, the newest input, and the convolution's sum as far as the newest tap and the bias make it.
template <class T, int N>
__device__ __forceinline__ void newest(const ShortStepCall& call, int64_t batch, int64_t d, float (&u)[N],
                                       float (&sum)[N]) {
  load<N>(call.x.row<const T>(batch, 0) + d, u);
  if (call.b.data != nullptr) {
    float gate[N];
    load<N>(call.b.row<const T>(batch, 0) + d, gate);
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] *= gate[i];
  }
  load_bias(call.bias, d, sum);
}

template <class T, int N>
__device__ __forceinline__ void finish(const ShortStepCall& call, int64_t batch, int64_t d, float (&sum)[N]) {
  if (call.c.data != nullptr) {
    float gate[N];
    load<N>(call.c.row<const T>(batch, 0) + d, gate);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] *= gate[i];
  }
  if (call.silu) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = silu(sum[i]);
  }
  store_global<N>(sum, call.y.row<T>(batch, 0) + d);
}

template <class T, int N, int TAPS>
__global__ void __launch_bounds__(threads) short_step_kernel(ShortStepCall call) {
  const int64_t d = (blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x) * N;
  if (d >= call.width) return;
  float taps[N * TAPS];
  load_taps(call.weight, d * TAPS, taps);
  for (int64_t batch = blockIdx.y; batch < call.batch; batch += gridDim.y) {
    T* state = call.state.row<T>(batch, 0) + d;
    float u[N], sum[N], past[TAPS - 1][N];
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) load<N>(state + k * call.state.row_stride, past[k]);
    newest<T, N>(call, batch, d, u, sum);
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int k = 0; k < TAPS - 1; ++k) sum[i] += taps[i * TAPS + k] * past[k][i];
      sum[i] += taps[i * TAPS + TAPS - 1] * u[i];
    }
#pragma unroll
    for (int k = 0; k < TAPS - 2; ++k) store_global<N>(past[k + 1], state + k * call.state.row_stride);
    store_global<N>(u, state + (TAPS - 2) * call.state.row_stride);
    finish<T, N>(call, batch, d, sum);
  }
}

// Any number of taps, rows of any alignment, states of any strides: a thread takes one channel. The second launch
// bound leaves 64 registers; without it the compiler aims at fewer, and spills.
template <class T>
__global__ void __launch_bounds__(threads, 16) general_short_step_kernel(ShortStepCall call) {
  const int64_t d = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x;
  if (d >= call.width) return;
  for (int64_t batch = blockIdx.y; batch < call.batch; batch += gridDim.y) {
    T* row = call.state.row<T>(batch, 0) + d * call.state_channel_stride;
    float u[1], sum[1];
    newest<T, 1>(call, batch, d, u, sum);
    for (int k = 0; k < call.taps - 1; ++k) {
      T* next = row + call.state.row_stride;
      sum[0] += call.weight[d * call.taps + k] * to_float(*row);
      *row = k < call.taps - 2 ? *next : from_float<T>(u[0]);
      row = next;
    }
    sum[0] += call.weight[d * call.taps + call.taps - 1] * u[0];
    finish<T, 1>(call, batch, d, sum);
  }
}

template <class T>
void run(const ShortStepCall& call, const OnDevice& on) {
  constexpr int N = 16 / sizeof(T);
  bool packs = taps_take_fours(call.weight) && taps_take_fours(call.bias) && call.state_channel_stride == 1;
  for (const Rows& rows : {call.x, call.b, call.c, call.y, call.state})
    packs = packs && rows_take_packs(rows, call.width, sizeof(T), N);
  const unsigned sequences = static_cast<unsigned>(call.batch < 65535 ? call.batch : 65535);
  const auto grid = [&](int count) { return dim3(blocks(ceil_div(call.width, threads * count)), sequences); };
  if (!packs) return launch(on, general_short_step_kernel<T>, grid(1), dim3(threads), 0, call);
  STAR_WITH_TAPS(call.taps, TAPS, {
    if constexpr (TAPS == 0) {
      launch(on, general_short_step_kernel<T>, grid(1), dim3(threads), 0, call);
    } else {
      launch(on, short_step_kernel<T, N, TAPS>, grid(N), dim3(threads), 0, call);
    }
  })
}

Tensor step(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x, const Tensor& state,
            const Tensor& weight, const OptionalTensor& bias, bool silu) {
  DeviceArguments arguments(x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must be (B, D) and weight (D, K)");
  const int64_t batch = x.size(0), width = x.size(1), taps = weight.size(1);
  STD_TORCH_CHECK(taps >= 1 && taps <= INT32_MAX, "weight must have at least one tap");
  arguments.check(state, "state", {batch, taps - 1, width});
  check_dtype(state, "state", x.scalar_type());
  check_written(state, "state");
  ShortStepCall call{batch, width, static_cast<int>(taps), silu};
  call.x = arguments.rows(x, "x", {batch, width});
  call.b = arguments.rows(b, "b", {batch, width});
  call.c = arguments.rows(c, "c", {batch, width});
  call.weight = arguments.weight(weight, "weight", {width, taps});
  call.bias = arguments.weight(bias, "bias", {width});
  call.state = rows_of(state);
  call.state_channel_stride = state.stride(2);
  Tensor y = empty_like_shape(x, {batch, width});
  call.y = rows_of(y);
  const OnDevice on(x);
  STAR_WITH_DTYPE(arguments.dtype(), T, run<T>(call, on));
  return y;
}

Tensor short_conv_step(Tensor x, Tensor state, Tensor weight, OptionalTensor bias, bool silu) {
  return step(std::nullopt, std::nullopt, x, state, weight, bias, silu);
}

Tensor gated_short_conv_step(Tensor b, Tensor c, Tensor x, Tensor state, Tensor weight, OptionalTensor bias) {
  return step(b, c, x, state, weight, bias, false);
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("short_conv_step", TORCH_BOX(&star::short_conv_step));
  m.impl("gated_short_conv_step", TORCH_BOX(&star::gated_short_conv_step));
}
