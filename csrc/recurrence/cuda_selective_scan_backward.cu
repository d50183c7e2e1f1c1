// The selective scan on a GPU: the backward pass. See cuda_selective_scan.h.
//
//   a_t = exp(delta_t A),  h_t = a_t h_{t-1} + u_t B_t,  u_t = delta_t x_t,  y_t = sum_n C_t h_t + D x_t
//   dh_t = C_t dy_t + a_{t+1} dh_{t+1},  dC_t = sum_d dy_t h_t,  dB_t = sum_d dh_t u_t,
//   du_t = sum_n dh_t B_t,  q_t = dh_t a_t h_{t-1},  dA = sum_t q_t delta_t,
//   ddelta_t = sum_n q_t A + du_t x_t,  dx_t = du_t delta_t + D dy_t
//
// One walk forward keeps the state before every chunk of eight tokens; the walk back recomputes each chunk's
// states and decays into registers. Sums over channels are a block's own and then added by another launch.
#include <tuple>

#include "cuda_selective_scan.h"

namespace star {
namespace {

constexpr float ln_2 = 0.693147181f;

struct SelectiveScanBackwardCall {
  SelectiveScanCall forward;
  int64_t tokens;  // B L
  Rows dy, dx, ddt, dz;
  const float* dfinal;     // (S, D, N) or null
  float* dinitial;         // (S, D, N) or null
  float *dA, *dD, *dbias;  // (S, D, N), (S, D), (S, D): each sequence's share
  float *dB, *dC;          // (blocks, B L, G, N): each block of channels' share
};

template <int STATES, int LANES>
struct Backward {
  static constexpr int tokens = chunk_tokens;
  using At = Place<STATES, LANES>;
  using Tiles = Tile<STATES, LANES, tokens>;
  static constexpr int count = Tiles::count, mix_count = Tiles::mix_count;
  static constexpr int pitch = At::channels + 8;
  static constexpr int batch = summed_tokens;
  static constexpr int warp_channels = warp_size / LANES, warps = scan_threads / warp_size;
  static constexpr int mixes = 2 * STATES;  // of dB and dC, a token and a thread
  // Tokens whose dB and dC are summed over a warp's channels together: then there is a value for every lane.
  static constexpr int mix_batch = warp_channels > mixes ? warp_channels / mixes : 1;
  static_assert(tokens % mix_batch == 0, "a chunk has whole batches");

  struct Shared {
    alignas(16) float B[tokens * At::padded];
    alignas(16) float C[tokens * At::padded];
    Drive drive[tokens][At::channels];
    float dy[tokens][At::channels];
    float y[tokens][pitch], du[tokens][pitch], ddelta[tokens][pitch];
    float mix[warps][tokens][2 * At::padded];  // dB, then dC
    float sums[2][scan_threads];      // each thread's share of dD and dbias
    float weights[2][scan_threads];   // D and dt_bias of each thread's column
    // What each thread needs of its own tokens when their gradients are written: here it spares registers.
    float x[count][scan_threads], slope[count][scan_threads], z[count][scan_threads], dout[count][scan_threads];
  };

  // A chunk's share of one thread, as it comes from memory.
  struct Fetched {
    float x[count], dt[count], z[count], dy[count], B[mix_count], C[mix_count], h[STATES];

    __device__ __forceinline__ void fetch(const SelectiveScanBackwardCall& call, const At& at, int chunk) {
      const SelectiveScanCall& forward = call.forward;
      const int time = at.start + chunk * tokens;
      STAR_WITH_DTYPE(forward.dtype, T, {
        Tiles::template fetch<T>(forward.x, at, time, x);
        Tiles::template fetch<T>(forward.dt, at, time, dt);
        Tiles::template fetch<T>(call.dy, at, time, dy);
        if (forward.z.data != nullptr) Tiles::template fetch<T>(forward.z, at, time, z);
        Tiles::template fetch<T>(forward.B, forward, at, time, B);
        Tiles::template fetch<T>(forward.C, forward, at, time, C);
      });
#pragma unroll
      for (int i = 0; i < STATES; ++i) h[i] = 0.0f;
      if (at.channel < at.width) load<STATES>(at.kept(forward, chunk), h);
    }
  };

  static __device__ __forceinline__ void put_mixes(float (&values)[mix_batch * mixes], const At& at, int first,
                                                   Shared& shared) {
    constexpr int V = mix_batch * mixes;
    reduce_scatter<V, warp_channels, LANES>(values);
    const Scattered<V, warp_channels> scattered(at.channel % warp_channels);
#pragma unroll
    for (int r = 0; r < Scattered<V, warp_channels>::count; ++r) {
      const int index = scattered.first + r, value = index % mixes;
      shared.mix[threadIdx.x / warp_size][first + index / mixes]
                [value / STATES * At::padded + at.lane * STATES + value % STATES] = values[r];
    }
  }

  // The chunk's states and decays, and its outputs before D and the gate.
  static __device__ __forceinline__ void recompute(const At& at, const float (&A)[STATES], bool outputs,
                                                   float (&h)[tokens + 1][STATES], float (&a)[tokens][STATES],
                                                   Shared& shared) {
#pragma unroll
    for (int first = 0; first < tokens; first += batch) {
      float sums[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const int t = first + j;
        const Drive now = shared.drive[t][at.channel];
        float b[STATES], c[STATES];
        load<STATES>(shared.B + t * At::padded + at.lane * STATES, b);
        load<STATES>(shared.C + t * At::padded + at.lane * STATES, c);
        sums[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
          a[t][i] = exponential2(now.delta * A[i]);
          h[t + 1][i] = a[t][i] * h[t][i] + now.u * b[i];
          sums[j] += c[i] * h[t + 1][i];
        }
      }
      if (outputs) put_sums<LANES>(sums, at.lane, at.channel, first, shared.y);
    }
  }

  // `carry` is a_{t+1} dh_{t+1} on the way in, of the chunk's first token on the way out.
  static __device__ __forceinline__ void retrace(const At& at, const float (&A)[STATES],
                                                 const float (&h)[tokens + 1][STATES],
                                                 const float (&a)[tokens][STATES], float (&carry)[STATES],
                                                 float (&dA)[STATES], Shared& shared) {
    float du[batch], ddelta[batch], mix[mix_batch * mixes];
#pragma unroll
    for (int t = tokens - 1; t >= 0; --t) {
      const Drive now = shared.drive[t][at.channel];
      const float dy = shared.dy[t][at.channel];
      const int j = t % batch, m = t % mix_batch * mixes;
      float b[STATES], c[STATES];
      load<STATES>(shared.B + t * At::padded + at.lane * STATES, b);
      load<STATES>(shared.C + t * At::padded + at.lane * STATES, c);
      du[j] = ddelta[j] = 0.0f;
#pragma unroll
      for (int i = 0; i < STATES; ++i) {
        const float dh = carry[i] + dy * c[i];
        mix[m + i] = dh * now.u;
        mix[m + STATES + i] = dy * h[t + 1][i];
        du[j] += dh * b[i];
        carry[i] = dh * a[t][i];
        const float q = carry[i] * h[t][i];
        ddelta[j] += q * A[i];
        dA[i] += q * now.delta;
      }
      if (t % mix_batch == 0) put_mixes(mix, at, t, shared);
      if (t % batch == 0) {
        put_sums<LANES>(du, at.lane, at.channel, t, shared.du);
        put_sums<LANES>(ddelta, at.lane, at.channel, t, shared.ddelta);
      }
    }
  }

  // Puts the chunk into shared memory.
  static __device__ __forceinline__ void stage(const SelectiveScanCall& call, const At& at, int time,
                                               const Fetched& next, Shared& shared) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int token = Tiles::token(at, k);
      float delta = next.dt[k] + shared.weights[1][threadIdx.x], dy = next.dy[k], slope = 1.0f;
      if (call.softplus) delta = softplus_with_slope(delta, slope);
      if (!Tiles::holds(at, time, k)) delta = 0.0f;
      shared.x[k][threadIdx.x] = next.x[k];
      shared.slope[k][threadIdx.x] = slope;
      shared.dout[k][threadIdx.x] = dy;
      if (call.z.data != nullptr) {
        shared.z[k][threadIdx.x] = next.z[k];
        dy *= next.z[k] * fast_divide(1.0f, 1.0f + fast_exp(-next.z[k]));
      }
      if (token >= tokens) continue;
      shared.drive[token][at.column] = Drive{delta, delta * next.x[k]};
      shared.dy[token][at.column] = dy;
    }
    Tiles::put(next.B, shared.B);
    Tiles::put(next.C, shared.C);
  }

  template <class T>
  static __device__ __forceinline__ void write(const SelectiveScanBackwardCall& call, const At& at, int time,
                                               Shared& shared) {
    const float D = shared.weights[0][threadIdx.x];
    float dD = shared.sums[0][threadIdx.x], dbias = shared.sums[1][threadIdx.x];
    const int channel = at.first + at.column;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (!Tiles::holds(at, time, k)) continue;
      const int token = Tiles::token(at, k);
      const float du = shared.du[token][at.column], dy = shared.dy[token][at.column], x = shared.x[k][threadIdx.x];
      const float draw = (shared.ddelta[token][at.column] * ln_2 + du * x) * shared.slope[k][threadIdx.x];
      dbias += draw;
      dD += dy * x;
      const float dx = du * shared.drive[token][at.column].delta + D * dy;
      call.dx.row<T>(at.batch, time + token)[channel] = from_float<T>(dx);
      call.ddt.row<T>(at.batch, time + token)[channel] = from_float<T>(draw);
      if (call.forward.z.data == nullptr) continue;
      const float y = shared.y[token][at.column] + D * x, z = shared.z[k][threadIdx.x];
      const float open = fast_divide(1.0f, 1.0f + fast_exp(-z));
      const float dz = shared.dout[k][threadIdx.x] * y * open * (1.0f + z * (1.0f - open));
      call.dz.row<T>(at.batch, time + token)[channel] = from_float<T>(dz);
    }
    shared.sums[0][threadIdx.x] = dD;
    shared.sums[1][threadIdx.x] = dbias;
  }

  static __device__ __forceinline__ void write_mixes(const SelectiveScanBackwardCall& call, const At& at,
                                                     int time, const Shared& shared) {
    const SelectiveScanCall& forward = call.forward;
    for (int index = static_cast<int>(threadIdx.x); index < tokens * 2 * At::padded; index += scan_threads) {
      const int token = index / (2 * At::padded), value = index % (2 * At::padded), state = value % At::padded;
      if (time + token >= at.end || state >= forward.states) continue;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < warps; ++warp) sum += shared.mix[warp][token][value];
      const int64_t row = at.block * call.tokens + at.batch * forward.sequences.length + time + token;
      float* to = value < At::padded ? call.dB : call.dC;
      to[(row * forward.groups + at.group) * forward.states + state] = sum;
    }
  }

  // The sum over the threads that have the same channel of the tile.
  static __device__ __forceinline__ void write_channels(const SelectiveScanBackwardCall& call, const At& at,
                                                        const Shared& shared) {
    __syncthreads();
    if (at.row != 0 || at.column >= at.width) return;
    float dD = 0.0f, dbias = 0.0f;
    for (int thread = at.column; thread < scan_threads; thread += At::channels) {
      dD += shared.sums[0][thread];
      dbias += shared.sums[1][thread];
    }
    const int64_t channel = at.sequence * call.forward.width + at.first + at.column;
    call.dD[channel] = dD;
    call.dbias[channel] = dbias;
  }
};

template <int STATES, int LANES>
__global__ void __launch_bounds__(scan_threads, 2) selective_scan_backward_kernel(SelectiveScanBackwardCall call) {
  using Pass = Backward<STATES, LANES>;
  constexpr int tokens = Pass::tokens;
  __shared__ typename Pass::Shared shared;
  const SelectiveScanCall& forward = call.forward;
  const typename Pass::At at(forward);
  const bool inside = at.column < at.width;
  shared.weights[0][threadIdx.x] = inside ? forward.D.at(at.first + at.column, 0.0f) : 0.0f;
  shared.weights[1][threadIdx.x] = inside ? forward.dt_bias.at(at.first + at.column, 0.0f) : 0.0f;
  shared.sums[0][threadIdx.x] = shared.sums[1][threadIdx.x] = 0.0f;
  float A[STATES], carry[STATES], dA[STATES];
  at.load_decays(forward, A);
  at.load_states(forward, call.dfinal, carry);
#pragma unroll
  for (int i = 0; i < STATES; ++i) dA[i] = 0.0f;

  typename Pass::Fetched next{};
  int chunk = (at.end - at.start + tokens - 1) / tokens - 1;
  if (chunk >= 0) next.fetch(call, at, chunk);
  for (; chunk >= 0; --chunk) {
    const int time = at.start + chunk * tokens;
    float h[tokens + 1][STATES], a[tokens][STATES];
    Pass::stage(forward, at, time, next, shared);
#pragma unroll
    for (int i = 0; i < STATES; ++i) h[0][i] = next.h[i];
    __syncthreads();
    if (chunk > 0) next.fetch(call, at, chunk - 1);
    Pass::recompute(at, A, forward.z.data != nullptr, h, a, shared);
    __syncwarp();  // read B, C and the drive again: the compiler would hold a whole chunk's in registers
    Pass::retrace(at, A, h, a, carry, dA, shared);
    __syncthreads();
    STAR_WITH_DTYPE(forward.dtype, T, Pass::template write<T>(call, at, time, shared));
    Pass::write_mixes(call, at, time, shared);
  }
  at.store_states(forward, carry, call.dinitial);
  at.store_states(forward, dA, call.dA);
  Pass::write_channels(call, at, shared);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(Tensor dy, OptionalTensor dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B,
                                  Tensor C, OptionalTensor D, OptionalTensor z, OptionalTensor dt_bias,
                                  bool dt_softplus, OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  DeviceArguments arguments(x);
  SelectiveScanBackwardCall call{};
  SelectiveScanCall& forward = call.forward;
  forward = prepare(arguments, {x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens});
  const int64_t batch = x.size(0), length = x.size(1), width = forward.width, states = forward.states;
  const int64_t sequences = forward.sequences.count;
  call.tokens = batch * length;
  call.dy = arguments.rows(dy, "dy", {batch, length, width});
  call.dfinal = arguments.floats(dfinal_state, "dfinal_state", {sequences, width, states});

  Tensor dx = empty_like_shape(x, {batch, length, width}), ddt = empty_like_shape(x, {batch, length, width});
  Tensor dz = empty_like_shape(x, {z ? batch : 0, length, width});
  Tensor dinitial = empty_float(x, {initial_state ? sequences : 0, width, states});
  Tensor dA = empty_float(x, {sequences, width, states});
  Tensor dD = empty_float(x, {sequences, width}), dbias = empty_float(x, {sequences, width});
  Tensor dB = empty_float(x, {forward.blocks, call.tokens, forward.groups, states});
  Tensor dC = empty_float(x, {forward.blocks, call.tokens, forward.groups, states});
  Tensor starts = empty_float(x, {chunk_slots(forward.sequences), width, padded_states(states)});
  call.dx = rows_of(dx);
  call.ddt = rows_of(ddt);
  if (z) call.dz = rows_of(dz);
  call.dinitial = initial_state ? floats_in(dinitial) : nullptr;
  call.dA = floats_in(dA);
  call.dD = floats_in(dD);
  call.dbias = floats_in(dbias);
  call.dB = floats_in(dB);
  call.dC = floats_in(dC);
  forward.starts = floats_in(starts);

  const OnDevice on(x);
  STAR_WITH_STATES(states, STATES, LANES, {
    launch(on, selective_scan_kernel<STATES, LANES, false>, scan_blocks(forward), scan_threads, 0, forward);
    launch(on, selective_scan_backward_kernel<STATES, LANES>, scan_blocks(forward), scan_threads, 0, call);
  });
  std::vector<int64_t> mixes{batch, length};
  if (B.dim() == 4) mixes.push_back(forward.groups);
  mixes.push_back(states);
  return {dx,
          ddt,
          sum_parts(on, dA, empty_float(x, {width, states})),
          sum_parts(on, dB, empty_like_shape(x, mixes)),
          sum_parts(on, dC, empty_like_shape(x, mixes)),
          sum_parts(on, dD, empty_float(x, {width})),
          dz,
          sum_parts(on, dbias, empty_float(x, {width})),
          dinitial};
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) { m.impl("selective_scan_backward", TORCH_BOX(&star::selective_scan_backward)); }
