// The gradients of the short causal depthwise convolution on a GPU: kernels, launches, registration.
//
// g_t = dy_t silu'(pre_t) | dy_t c_t | dy_t,  dc_t = dy_t pre_t
// du_t = sum_k w_k g_{t+K-1-k},  dw_k = sum_t g_t u_{t-K+1+k},  dbias = sum_t g_t
// dx = du | b du,  db = x du;  pre is recomputed, nothing of the forward pass is kept.
//
// The weight's gradient is summed over a thread's rows, a block's runs and then the blocks, in that order.
#include "cuda_short_runs.h"

#include <tuple>

namespace star {
namespace {

// d silu / d pre
__device__ __forceinline__ float silu_slope(float pre) {
  const float gate = sigmoid(pre);
  return gate * (1.0f + pre * (1.0f - gate));
}

// g of one row, from memory: for any number of taps.
template <class T>
__device__ __forceinline__ float pre_gradient(const ShortConvCall& call, int64_t batch, int64_t sequence,
                                              int64_t start, int64_t row, int64_t d) {
  float g = to_float(call.dy.row<const T>(batch, row)[d]);
  if (call.silu) g *= silu_slope(pre_of<T>(call, batch, sequence, start, row, d));
  if (call.c.data != nullptr) g *= to_float(call.c.row<const T>(batch, row)[d]);
  return g;
}

// The gradient of a sequence's initial state, one channel a thread. State row j stands at time
// start - (K-1) + j, so it meets g_{start+i} through tap j - i; in a sequence of fewer than K-1 rows it is
// also a row of the final state.
template <class T>
__device__ __forceinline__ void write_dstate(const ShortConvCall& call, int64_t sequence, int64_t d) {
  if (sequence >= call.sequences.count) return;
  const Extent extent(call.sequences, sequence);
  const int64_t rows = extent.end - extent.start;
  for (int j = 0; j < call.taps - 1; ++j) {
    float sum = 0.0f;
    if (call.dfinal.data != nullptr && j >= rows)
      sum = to_float(call.dfinal.row<const T>(sequence, j - rows)[d]);
    for (int i = 0; i < rows && i <= j; ++i)
      sum += call.weight[d * call.taps + j - i] *
             pre_gradient<T>(call, extent.batch, sequence, extent.start, extent.start + i, d);
    call.dstate.row<T>(sequence, j)[d] = from_float<T>(sum);
  }
}

// A row's gradient du, K-1 rows after it was read, into dx and db.
template <class T, int N, int TAPS, bool GATED>
__device__ __forceinline__ void write_input_gradients(const ShortConvCall& call, const Place& place, int64_t row,
                                                      int64_t d, const float (&taps)[N * TAPS],
                                                      const float (&g)[TAPS][N], const Words<T, N>& x,
                                                      const Words<T, N>& b) {
  float du[N] = {};
  const int64_t from_end = place.end - row;
  if (call.dfinal.data != nullptr && from_end < TAPS)
    load<N>(call.dfinal.row<const T>(place.sequence, TAPS - 1 - from_end) + d, du);
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < TAPS; ++j) du[i] += taps[i * TAPS + TAPS - 1 - j] * g[j][i];
  if (GATED) {
    float values[N], other[N];
    x.unpack(values);
#pragma unroll
    for (int i = 0; i < N; ++i) other[i] = du[i] * values[i];
    store_global<N>(other, call.db.row<T>(place.batch, row) + d);
    b.unpack(values);
#pragma unroll
    for (int i = 0; i < N; ++i) du[i] *= values[i];
  }
  store_global<N>(du, call.dx.row<T>(place.batch, row) + d);
}

// What a row's gradient reads.
template <class T, int N, bool GATED>
struct BackwardRow {
  Words<T, N> dy, x, b, c;

  __device__ __forceinline__ void load(const ShortConvCall& call, int64_t batch, int64_t row, int64_t d, bool there) {
    dy.load(call.dy.row<const T>(batch, row) + d, there);
    x.load(call.x.row<const T>(batch, row) + d, there);
    if (!GATED) return;
    b.load(call.b.row<const T>(batch, row) + d, there);
    c.load(call.c.row<const T>(batch, row) + d, there);
  }
};

// The rows of one sequence that are the run's, [begin, end), and the K-1 after them that they flow into.
template <class T, int N, int TAPS, bool GATED>
__device__ __forceinline__ void backward_rows(const ShortConvCall& call, const Place& place, int64_t begin,
                                              int64_t end, int64_t d, const float (&taps)[N * TAPS],
                                              const float (&bias)[N], float (&sums)[TAPS + 1][N]) {
  const int64_t last = end + TAPS - 1, readable = last < place.end ? last : place.end;
  float window[TAPS][N], g[TAPS][N] = {};
  Words<T, N> x[TAPS], b[TAPS];
#pragma unroll
  for (int k = 0; k < TAPS; ++k) {
    x[k].load(nullptr, false);
    b[k].load(nullptr, false);
  }
  load_window<T, N, TAPS>(call, place, begin, d, window);
  BackwardRow<T, N, GATED> next;
  next.load(call, place.batch, begin, d, true);
  for (int64_t time = begin; time < last; ++time) {
    const BackwardRow<T, N, GATED> row = next;
    next.load(call, place.batch, time + 1, d, time + 1 < readable);
    x[TAPS - 1] = row.x;
    if (GATED) b[TAPS - 1] = row.b;
    row.dy.unpack(g[TAPS - 1]);  // zeros beyond the sequence
    row.x.unpack(window[TAPS - 1]);
    float gate[N];
    if (GATED) {
      row.b.unpack(gate);
#pragma unroll
      for (int i = 0; i < N; ++i) window[TAPS - 1][i] *= gate[i];
      row.c.unpack(gate);
    }
    if (GATED || call.silu) {
      float pre[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        pre[i] = bias[i];
#pragma unroll
        for (int k = 0; k < TAPS; ++k) pre[i] += taps[i * TAPS + k] * window[k][i];
      }
      if (GATED) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          pre[i] *= g[TAPS - 1][i];
          g[TAPS - 1][i] *= gate[i];
        }
        if (time < end) store_global<N>(pre, call.dc.row<T>(place.batch, time) + d);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) g[TAPS - 1][i] *= silu_slope(pre[i]);
      }
    }
    if (time < end) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int k = 0; k < TAPS; ++k) sums[k][i] += g[TAPS - 1][i] * window[k][i];
        sums[TAPS][i] += g[TAPS - 1][i];
      }
    }
    const int64_t done = time - (TAPS - 1);
    if (done >= begin) write_input_gradients<T, N, TAPS, GATED>(call, place, done, d, taps, g, x[0], b[0]);
    shift<N, TAPS>(window);
    shift<N, TAPS>(g);
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) {
      x[k] = x[k + 1];
      b[k] = b[k + 1];
    }
  }
}

template <class T, int N, int TAPS, bool GATED>
__global__ void __launch_bounds__(run_threads, TAPS > 3 && GATED ? 2 : 3) short_conv_backward_kernel(ShortConvCall call) {
  constexpr int columns = warp_size * N;
  alignas(16) __shared__ float shares[runs][TAPS + 1][columns];
  const Share share(call, N);
  const int64_t d = share.channel, states = share.group - call.batch * call.run_blocks;
  if (states >= 0) {
    for (int i = 0; i < N && d + i < call.width; ++i) write_dstate<T>(call, states * runs + share.run, d + i);
    return;
  }
  const Run run(call, share);
  float sums[TAPS + 1][N] = {};
  if (d < call.width && run.begin < run.end) {
    float taps[N * TAPS], bias[N];
    load_taps(call.weight, d * TAPS, taps);
    load_bias(call.bias, d, bias);
    Place place(call.sequences, run.batch, run.begin);
    for (int64_t begin = run.begin;;) {
      const int64_t end = place.end < run.end ? place.end : run.end;
      backward_rows<T, N, TAPS, GATED>(call, place, begin, end, d, taps, bias, sums);
      if (end >= run.end) break;
      begin = end;
      place.advance(call.sequences);
    }
  }
#pragma unroll
  for (int k = 0; k <= TAPS; ++k) store<N>(sums[k], &shares[share.run][k][threadIdx.x % warp_size * N]);
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x % call.tiles) * columns;
  float* part = call.parts + share.group * (TAPS + 1) * call.width;
  for (int item = static_cast<int>(threadIdx.x); item < (TAPS + 1) * columns; item += run_threads) {
    const int k = item / columns, column = item % columns;
    if (first + column >= call.width) continue;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < runs; ++r) sum += shares[r][k][column];
    part[k * call.width + first + column] = sum;
  }
}

// Any number of taps, and rows of any alignment: a thread takes one channel and a run of its own in `parts`.
template <class T>
__global__ void __launch_bounds__(run_threads, 4) general_short_conv_backward_kernel(ShortConvCall call) {
  const Share share(call, 1);
  const int64_t d = share.channel, states = share.group - call.batch * call.run_blocks;
  if (d >= call.width) return;
  if (states >= 0) return write_dstate<T>(call, states * runs + share.run, d);
  const Run run(call, share);
  float* part = call.parts + (share.group * runs + share.run) * (call.taps + 1) * call.width + d;
  for (int k = 0; k <= call.taps; ++k) part[k * call.width] = 0.0f;
  if (run.begin >= run.end) return;
  Place place(call.sequences, run.batch, run.begin);
  for (int64_t time = run.begin; time < run.end; ++time) {
    if (time == place.end) place.advance(call.sequences);
    const float g = pre_gradient<T>(call, run.batch, place.sequence, place.start, time, d);
    for (int k = 0; k < call.taps; ++k) {
      float u[1];
      load_source<T, 1>(call, run.batch, place.sequence, place.start, time - (call.taps - 1) + k, d, u);
      part[k * call.width] += g * u[0];
    }
    part[call.taps * call.width] += g;
    if (call.c.data != nullptr)
      call.dc.row<T>(run.batch, time)[d] =
          from_float<T>(to_float(call.dy.row<const T>(run.batch, time)[d]) *
                        pre_of<T>(call, run.batch, place.sequence, place.start, time, d));
    const int64_t from_end = place.end - time;
    float du = 0.0f;
    if (call.dfinal.data != nullptr && from_end < call.taps)
      du = to_float(call.dfinal.row<const T>(place.sequence, call.taps - 1 - from_end)[d]);
    for (int j = 0; j < call.taps && j < from_end; ++j)
      du += call.weight[d * call.taps + call.taps - 1 - j] *
            pre_gradient<T>(call, run.batch, place.sequence, place.start, time + j, d);
    if (call.b.data != nullptr) {
      call.db.row<T>(run.batch, time)[d] = from_float<T>(du * to_float(call.x.row<const T>(run.batch, time)[d]));
      du *= to_float(call.b.row<const T>(run.batch, time)[d]);
    }
    call.dx.row<T>(run.batch, time)[d] = from_float<T>(du);
  }
}

// Adds the parts: a warp's share in their order, then the warps'. Lays the sums out as the weight is, (D, K).
constexpr int sum_warps = 8;

__global__ void __launch_bounds__(sum_warps* warp_size)
    sum_parts_kernel(const float* parts, int64_t count, int64_t width, int taps, float* dweight, float* dbias) {
  __shared__ float shares[sum_warps][warp_size];
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  const int64_t columns = (taps + 1) * width, column = blockIdx.x * static_cast<int64_t>(warp_size) + lane;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = warp; part < count; part += sum_warps) sum += parts[part * columns + column];
  }
  shares[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  sum = 0.0f;
  for (int w = 0; w < sum_warps; ++w) sum += shares[w][lane];
  const int64_t k = column / width, d = column % width;
  *(k < taps ? dweight + d * taps + k : dbias + d) = sum;
}

struct Gradients {
  Tensor db, dc, dx, dweight, dbias, dstate;
};

constexpr int pack = 4;  // channels a thread: 8 would take more registers than there are for enough threads

// The input's and the state's gradients and the parts of the weight's, which it returns.
template <class T>
Tensor run(ShortConvCall& call, const Tensor& x, const OnDevice& on, bool gated, bool states) {
  const bool packs = all_take_packs<T>(call, pack);
  divide(call, on, packs ? warp_size * pack : warp_size);
  Tensor parts = empty_float(x, {call.batch * call.run_blocks * (packs ? 1 : runs), call.taps + 1, call.width});
  call.parts = floats_in(parts);
  const dim3 grid = grid_of(call, states);
  if (!packs) {
    launch(on, general_short_conv_backward_kernel<T>, grid, dim3(run_threads), 0, call);
    return parts;
  }
  STAR_WITH_TAPS(call.taps, TAPS, {
    if constexpr (TAPS != 0)
      launch(on,
             gated ? short_conv_backward_kernel<T, pack, TAPS, true>
                   : short_conv_backward_kernel<T, pack, TAPS, false>,
             grid, dim3(run_threads), 0, call);
  })
  return parts;
}

Gradients backward(const Tensor& dy, const OptionalTensor& dfinal, const OptionalTensor& b,
                   const OptionalTensor& c, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   bool silu, const OptionalTensor& state, const OptionalTensor& cu_seqlens) {
  DeviceArguments arguments(x);
  ShortConvCall call = describe(arguments, b, c, x, weight, bias, silu, state, cu_seqlens);
  const int64_t batch = call.batch, length = call.length, width = call.width, taps = call.taps;
  call.dy = arguments.rows(dy, "dy", {batch, length, width});
  call.dfinal = arguments.rows(dfinal, "dfinal_state", {call.sequences.count, taps - 1, width});
  Gradients result;
  result.dx = empty_like_shape(x, {batch, length, width});
  result.db = empty_like_shape(x, {b ? batch : 0, length, width});
  result.dc = empty_like_shape(x, {b ? batch : 0, length, width});
  result.dweight = empty_float(x, {width, taps});
  result.dbias = empty_float(x, {width});
  result.dstate = empty_like_shape(x, {state ? call.sequences.count : 0, taps - 1, width});
  call.dx = rows_of(result.dx);
  if (b) {
    call.db = rows_of(result.db);
    call.dc = rows_of(result.dc);
  }
  call.dstate = rows_of(result.dstate);
  const OnDevice on(x);
  STAR_WITH_DTYPE(arguments.dtype(), T, {
    const Tensor parts = run<T>(call, x, on, b.has_value(), state.has_value());
    launch(on, sum_parts_kernel, dim3(blocks(ceil_div((taps + 1) * width, warp_size))),
           dim3(sum_warps * warp_size), 0, static_cast<const float*>(parts.data_ptr()), parts.size(0), width,
           call.taps, floats_in(result.dweight), floats_in(result.dbias));
  })
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> short_conv_backward(Tensor dy, OptionalTensor dfinal_state, Tensor x,
                                                               Tensor weight, OptionalTensor bias, bool silu,
                                                               OptionalTensor initial_state,
                                                               OptionalTensor cu_seqlens) {
  Gradients g =
      backward(dy, dfinal_state, std::nullopt, std::nullopt, x, weight, bias, silu, initial_state, cu_seqlens);
  return {g.dx, g.dweight, g.dbias, g.dstate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_short_conv_backward(
    Tensor dy, OptionalTensor dfinal_state, Tensor b, Tensor c, Tensor x, Tensor weight, OptionalTensor bias,
    OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  Gradients g = backward(dy, dfinal_state, b, c, x, weight, bias, false, initial_state, cu_seqlens);
  return {g.db, g.dc, g.dx, g.dweight, g.dbias, g.dstate};
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("short_conv_backward", TORCH_BOX(&star::short_conv_backward));
  m.impl("gated_short_conv_backward", TORCH_BOX(&star::gated_short_conv_backward));
}
