// Short causal depthwise convolution on a GPU, plain and gated: kernels, launches, registration.
//
// pre_t = bias + sum_k w_k u_{t-K+1+k},  y_t = silu(pre_t) | c_t pre_t | pre_t,  u = x | b x
#include "cuda_short_runs.h"

#include <tuple>

namespace star {
namespace {

// The last K-1 sources of a sequence, N channels a thread.
template <class T, int N>
__device__ __forceinline__ void write_final_state(const ShortConvCall& call, int64_t sequence, int64_t d) {
  if (sequence >= call.sequences.count) return;
  const Extent extent(call.sequences, sequence);
  for (int j = 0; j < call.taps - 1; ++j) {
    float u[N];
    load_source<T, N>(call, extent.batch, sequence, extent.start, extent.end - (call.taps - 1) + j, d, u);
    store_global<N>(u, call.final_state.row<T>(sequence, j) + d);
  }
}

template <class T, int N, int TAPS, bool GATED>
__device__ __forceinline__ void convolve_run(const ShortConvCall& call, const Run& run, int64_t d) {
  constexpr int together = GATED ? 2 : 4;  // rows on their way at once
  float taps[N * TAPS], bias[N], window[TAPS][N];
  load_taps(call.weight, d * TAPS, taps);
  load_bias(call.bias, d, bias);
  Place place(call.sequences, run.batch, run.begin);
  load_window<T, N, TAPS>(call, place, run.begin, d, window);
  for (int64_t first = run.begin; first < run.end; first += together) {
    Words<T, N> x[together], b[together], c[together];
#pragma unroll
    for (int r = 0; r < together; ++r) {
      const bool there = first + r < run.end;
      x[r].load(call.x.row<const T>(run.batch, first + r) + d, there);
      if (GATED) {
        b[r].load(call.b.row<const T>(run.batch, first + r) + d, there);
        c[r].load(call.c.row<const T>(run.batch, first + r) + d, there);
      }
    }
#pragma unroll
    for (int r = 0; r < together; ++r) {
      const int64_t time = first + r;
      if (time >= run.end) break;
      if (time == place.end) {
        place.advance(call.sequences);
        load_window<T, N, TAPS>(call, place, time, d, window);
      }
      float gate[N], pre[N];
      x[r].unpack(window[TAPS - 1]);
      if (GATED) {
        b[r].unpack(gate);
#pragma unroll
        for (int i = 0; i < N; ++i) window[TAPS - 1][i] *= gate[i];
        c[r].unpack(gate);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        pre[i] = bias[i];
#pragma unroll
        for (int k = 0; k < TAPS; ++k) pre[i] += taps[i * TAPS + k] * window[k][i];
        if (GATED) pre[i] *= gate[i];
      }
      if (!GATED && call.silu) {
#pragma unroll
        for (int i = 0; i < N; ++i) pre[i] = silu(pre[i]);
      }
      store_global<N>(pre, call.y.row<T>(run.batch, time) + d);
      shift<N, TAPS>(window);
    }
  }
}

template <class T, int N, int TAPS, bool GATED>
__global__ void __launch_bounds__(run_threads, 3) short_conv_kernel(ShortConvCall call) {
  const Share share(call, N);
  if (share.channel >= call.width) return;
  const int64_t states = share.group - call.batch * call.run_blocks;
  if (states >= 0) return write_final_state<T, N>(call, states * runs + share.run, share.channel);
  const Run run(call, share);
  if (run.begin < run.end) convolve_run<T, N, TAPS, GATED>(call, run, share.channel);
}

// Any number of taps, and rows of any alignment: a thread takes one channel.
template <class T>
__global__ void __launch_bounds__(run_threads, 4) general_short_conv_kernel(ShortConvCall call) {
  const Share share(call, 1);
  const int64_t d = share.channel;
  if (d >= call.width) return;
  const int64_t states = share.group - call.batch * call.run_blocks;
  if (states >= 0) return write_final_state<T, 1>(call, states * runs + share.run, d);
  const Run run(call, share);
  if (run.begin >= run.end) return;
  Place place(call.sequences, run.batch, run.begin);
  for (int64_t time = run.begin; time < run.end; ++time) {
    if (time == place.end) place.advance(call.sequences);
    float y = pre_of<T>(call, run.batch, place.sequence, place.start, time, d);
    if (call.c.data != nullptr) y *= to_float(call.c.row<const T>(run.batch, time)[d]);
    if (call.silu) y = silu(y);
    call.y.row<T>(run.batch, time)[d] = from_float<T>(y);
  }
}

template <class T>
void run(ShortConvCall& call, const OnDevice& on, bool gated) {
  constexpr int N = 16 / sizeof(T);
  if (!all_take_packs<T>(call, N)) {
    divide(call, on, warp_size);
    return launch(on, general_short_conv_kernel<T>, grid_of(call, true), dim3(run_threads), 0, call);
  }
  divide(call, on, warp_size * N);
  STAR_WITH_TAPS(call.taps, TAPS, {
    if constexpr (TAPS != 0)
      launch(on, gated ? short_conv_kernel<T, N, TAPS, true> : short_conv_kernel<T, N, TAPS, false>,
             grid_of(call, true), dim3(run_threads), 0, call);
  })
}

std::tuple<Tensor, Tensor> forward(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x,
                                   const Tensor& weight, const OptionalTensor& bias, bool silu,
                                   const OptionalTensor& state, const OptionalTensor& cu_seqlens) {
  DeviceArguments arguments(x);
  ShortConvCall call = describe(arguments, b, c, x, weight, bias, silu, state, cu_seqlens);
  Tensor y = empty_like_shape(x, {call.batch, call.length, call.width});
  Tensor final_state = empty_like_shape(x, {call.sequences.count, call.taps - 1, call.width});
  call.y = rows_of(y);
  call.final_state = rows_of(final_state);
  const OnDevice on(x);
  STAR_WITH_DTYPE(arguments.dtype(), T, run<T>(call, on, b.has_value()))
  return {y, final_state};
}

std::tuple<Tensor, Tensor> short_conv(Tensor x, Tensor weight, OptionalTensor bias, bool silu,
                                      OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  return forward(std::nullopt, std::nullopt, x, weight, bias, silu, initial_state, cu_seqlens);
}

std::tuple<Tensor, Tensor> gated_short_conv(Tensor b, Tensor c, Tensor x, Tensor weight, OptionalTensor bias,
                                            OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  return forward(b, c, x, weight, bias, false, initial_state, cu_seqlens);
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("short_conv", TORCH_BOX(&star::short_conv));
  m.impl("gated_short_conv", TORCH_BOX(&star::gated_short_conv));
}
