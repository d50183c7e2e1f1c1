// Decode steps of the recurrences with vector-valued states on a GPU, one launch each.
//
// All are memory-bound: what counts is the state, read and written once in 16-byte accesses along its
// contiguous dimension. Blocks are small, so that one sequence spreads over many multiprocessors too.
#include "cuda_cell_equations.h"
#include "cuda_values.h"

namespace star {
namespace {

constexpr int threads = 64;  // a block
constexpr int pack = 4;      // channels a thread, where everything is aligned for it

// Where a thread's channels of a (B, D) call are.
struct Channels {
  int64_t batch, channel;

  __device__ __forceinline__ Channels(int64_t width, int count) {
    const int64_t index = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x, groups = width / count;
    batch = index / groups;
    channel = index % groups * count;
  }
};

unsigned channel_blocks(int64_t batch, int64_t width, int count) {
  const int64_t needed = ceil_div(batch * (width / count), threads);
  STD_TORCH_CHECK(needed <= INT32_MAX, "x is larger than a launch");
  return static_cast<unsigned>(needed);
}

// A (B, D) float32 state, updated in place.
struct State {
  float* data = nullptr;
  int64_t stride = 0;

  __device__ __forceinline__ float* at(const Channels& place) const {
    return data + place.batch * stride + place.channel;
  }
};

State state_of(const DeviceArguments& arguments, const Tensor& state, const char* name, int64_t batch,
               int64_t width) {
  arguments.check(state, name, {batch, width});
  check_device_state(state, name, {batch, width});
  return State{floats_in(state), state.stride(0)};
}

bool state_takes_packs(const State& state) {
  return state.data == nullptr || takes_packs(state.data, 4, pack, {state.stride});
}

// linear_scan_step

struct LinearScanStepCall {
  int64_t batch, width;
  Rows decay, x, h;
  State state;
};

template <class T, int N>
__global__ void linear_scan_step_kernel(LinearScanStepCall call) {
  const Channels place(call.width, N);
  if (place.batch >= call.batch) return;
  float decay[N], x[N], state[N];
  load<N>(call.state.at(place), state);
  load<N>(call.decay.row<const T>(place.batch, 0) + place.channel, decay);
  load<N>(call.x.row<const T>(place.batch, 0) + place.channel, x);
#pragma unroll
  for (int i = 0; i < N; ++i) state[i] = decay[i] * state[i] + x[i];
  store<N>(state, call.state.at(place));
  store<N>(state, call.h.row<T>(place.batch, 0) + place.channel);
}

Tensor linear_scan_step(Tensor decay, Tensor x, Tensor state) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be (B, D)");
  DeviceArguments arguments(x);
  const int64_t batch = x.size(0), width = x.size(1);
  LinearScanStepCall call{batch, width};
  call.decay = arguments.rows(decay, "decay", {batch, width});
  call.x = arguments.rows(x, "x", {batch, width});
  call.state = state_of(arguments, state, "state", batch, width);
  Tensor h = empty_like_shape(x, {batch, width});
  call.h = rows_of(h);
  const Dtype dtype = arguments.dtype();
  bool packed = width % pack == 0 && state_takes_packs(call.state);
  for (const Rows& rows : {call.decay, call.x, call.h}) packed = packed && takes_packs(rows, dtype, pack);
  const OnDevice on(x);
  STAR_WITH_DTYPE(dtype, T, {
    if (packed) launch(on, linear_scan_step_kernel<T, pack>, channel_blocks(batch, width, pack), threads, 0, call);
    else launch(on, linear_scan_step_kernel<T, 1>, channel_blocks(batch, width, 1), threads, 0, call);
  });
  return h;
}

// gru_scan_step and lstm_scan_step

struct CellStepCall {
  int64_t batch, width;
  Rows x[3], h;
  Weight weight[3];
  State state, cell;  // h and, for the LSTM, c
};

template <class T, int N, bool LSTM>
__global__ void cell_step_kernel(CellStepCall call) {
  const Channels place(call.width, N);
  if (place.batch >= call.batch) return;
  float h[N], c[N], x[3][N], a[3][N];
  load<N>(call.state.at(place), h);
  if constexpr (LSTM) load<N>(call.cell.at(place), c);
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    load<N>(call.x[k].template row<const T>(place.batch, 0) + place.channel, x[k]);
    load_values<N>(call.weight[k], place.channel, N > 1, a[k]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float inputs[3] = {x[0][i], x[1][i], x[2][i]}, weights[3] = {a[0][i], a[1][i], a[2][i]};
    if constexpr (LSTM) {
      float state[2] = {h[i], c[i]};
      LstmCell(inputs, weights, state).advance(state);
      h[i] = state[0];
      c[i] = state[1];
    } else {
      float state[1] = {h[i]};
      GruCell(inputs, weights, state).advance(state);
      h[i] = state[0];
    }
  }
  store<N>(h, call.state.at(place));
  if constexpr (LSTM) store<N>(c, call.cell.at(place));
  store<N>(h, call.h.row<T>(place.batch, 0) + place.channel);
}

template <bool LSTM>
Tensor cell_step(const Tensor (&x)[3], const Tensor (&a)[3], const Tensor& h, const OptionalTensor& c) {
  constexpr const char* names[2][6] = {{"xz", "xr", "xh", "az", "ar", "ah"}, {"xf", "xo", "xz", "af", "ao", "az"}};
  STD_TORCH_CHECK(x[0].dim() == 2, names[LSTM][0], " must be (B, D)");
  DeviceArguments arguments(x[0], names[LSTM][0]);
  const int64_t batch = x[0].size(0), width = x[0].size(1);
  CellStepCall call{batch, width};
  bool packed = width % pack == 0;
  for (int i = 0; i < 3; ++i) {
    call.x[i] = arguments.rows(x[i], names[LSTM][i], {batch, width});
    call.weight[i] = arguments.weight(a[i], names[LSTM][3 + i], {width});
    packed = packed && takes_packs(call.x[i], arguments.dtype(), pack) && takes_packs(call.weight[i], pack, {});
  }
  call.state = state_of(arguments, h, LSTM ? "state_h" : "state", batch, width);
  if (c) call.cell = state_of(arguments, *c, "state_c", batch, width);
  packed = packed && state_takes_packs(call.state) && state_takes_packs(call.cell);
  Tensor out = empty_like_shape(x[0], {batch, width});
  call.h = rows_of(out);
  packed = packed && takes_packs(call.h, arguments.dtype(), pack);
  const OnDevice on(x[0]);
  STAR_WITH_DTYPE(arguments.dtype(), T, {
    if (packed)
      launch(on, cell_step_kernel<T, pack, LSTM>, channel_blocks(batch, width, pack), threads, 0, call);
    else launch(on, cell_step_kernel<T, 1, LSTM>, channel_blocks(batch, width, 1), threads, 0, call);
  });
  return out;
}

Tensor gru_scan_step(Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah, Tensor state) {
  return cell_step<false>({xz, xr, xh}, {az, ar, ah}, state, std::nullopt);
}

Tensor lstm_scan_step(Tensor xf, Tensor xo, Tensor xz, Tensor af, Tensor ao, Tensor az, Tensor state_c,
                      Tensor state_h) {
  return cell_step<true>({xf, xo, xz}, {af, ao, az}, state_h, state_c);
}

// selective_scan_step

constexpr int batch_rows = 2;  // batch entries a thread: they share A, and their loads are in flight together

// B or C: (B, N) or (B, G, N).
struct StepMixes {
  const void* data = nullptr;
  int64_t batch_stride = 0, group_stride = 0;

  template <class T>
  __device__ __forceinline__ const T* at(int64_t batch, int64_t group) const {
    return static_cast<const T*>(data) + batch * batch_stride + group * group_stride;
  }
};

struct SelectiveScanStepCall {
  int64_t batch, width, states, group_width;
  int64_t channel_blocks;
  int lanes;  // a power of two: neighbouring lanes that share a channel
  bool softplus, packed_mixes;
  Rows x, dt, z, y;
  StepMixes B, C;
  Weight A, D, dt_bias;
  float* state;  // (B, D, N) with these strides
  int64_t state_batch_stride, state_row_stride;
};

// A thread has N states of a channel at a time, in `batch_rows` batch entries.
template <class T, int N>
__global__ void __launch_bounds__(threads) selective_scan_step_kernel(SelectiveScanStepCall call) {
  const int lane = static_cast<int>(threadIdx.x) % call.lanes;
  const int64_t channel =
      blockIdx.x % call.channel_blocks * (threads / call.lanes) + static_cast<int>(threadIdx.x) / call.lanes;
  const int64_t first = blockIdx.x / call.channel_blocks * batch_rows;
  const bool inside = channel < call.width;
  const int64_t group = inside ? channel / call.group_width : 0;
  float x[batch_rows], delta[batch_rows], sum[batch_rows];
#pragma unroll
  for (int r = 0; r < batch_rows; ++r) {
    const bool there = inside && first + r < call.batch;
    x[r] = there ? to_float(call.x.row<const T>(first + r, 0)[channel]) : 0.0f;
    delta[r] = there ? to_float(call.dt.row<const T>(first + r, 0)[channel]) : 0.0f;
    sum[r] = 0.0f;
  }
  const float bias = inside ? call.dt_bias.at(channel, 0.0f) : 0.0f;
#pragma unroll
  for (int r = 0; r < batch_rows; ++r) delta[r] = call.softplus ? softplus(delta[r] + bias) : delta[r] + bias;
  for (int64_t n = lane * N; inside && n < call.states; n += call.lanes * N) {
    float A[N], state[batch_rows][N], B[batch_rows][N], C[batch_rows][N];
    float* rows = call.state + channel * call.state_row_stride + n;
#pragma unroll
    for (int r = 0; r < batch_rows; ++r) {
      if (first + r >= call.batch) continue;
      load<N>(rows + (first + r) * call.state_batch_stride, state[r]);
      load_values<N>(call.B.at<T>(first + r, group) + n, call.packed_mixes, B[r]);
      load_values<N>(call.C.at<T>(first + r, group) + n, call.packed_mixes, C[r]);
    }
    load_values<N>(call.A, channel * call.states + n, N > 1, A);
#pragma unroll
    for (int r = 0; r < batch_rows; ++r) {
      if (first + r >= call.batch) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        state[r][i] = fast_exp(delta[r] * A[i]) * state[r][i] + delta[r] * x[r] * B[r][i];
        sum[r] += C[r][i] * state[r][i];
      }
      store<N>(state[r], rows + (first + r) * call.state_batch_stride);
    }
  }
#pragma unroll
  for (int r = 0; r < batch_rows; ++r) {
    float y = sum[r];
    for (int distance = call.lanes / 2; distance > 0; distance /= 2) y += __shfl_xor_sync(all_lanes, y, distance);
    if (lane != 0 || !inside || first + r >= call.batch) continue;
    y += call.D.at(channel, 0.0f) * x[r];
    if (call.z.data != nullptr) y *= silu(to_float(call.z.row<const T>(first + r, 0)[channel]));
    call.y.row<T>(first + r, 0)[channel] = from_float<T>(y);
  }
}

StepMixes mixes_of(DeviceArguments& arguments, const Tensor& tensor, const char* name, int64_t batch, int64_t groups,
                   int64_t states) {
  const bool grouped = tensor.dim() == 3;
  const Tensor& kept = grouped ? arguments.activation(tensor, name, {batch, groups, states})
                               : arguments.activation(tensor, name, {batch, states});
  return StepMixes{kept.data_ptr(), kept.stride(0), grouped ? kept.stride(1) : 0};
}

template <int N>
void run(SelectiveScanStepCall& call, const Tensor& x, Dtype dtype) {
  call.lanes = 1;
  while (call.lanes < warp_size && call.lanes * N < call.states) call.lanes *= 2;
  call.channel_blocks = ceil_div(call.width, threads / call.lanes);
  const int64_t needed = call.channel_blocks * ceil_div(call.batch, batch_rows);
  STD_TORCH_CHECK(needed <= INT32_MAX, "x is larger than a launch");
  call.packed_mixes = true;
  for (const StepMixes& mixes : {call.B, call.C})
    call.packed_mixes = call.packed_mixes && takes_packs(mixes.data, bytes_of(dtype), N,
                                                         {mixes.batch_stride, mixes.group_stride});
  const OnDevice on(x);
  STAR_WITH_DTYPE(dtype, T,
                  launch(on, selective_scan_step_kernel<T, N>, static_cast<unsigned>(needed), threads, 0, call));
}

Tensor selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state, OptionalTensor D,
                           OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus) {
  STD_TORCH_CHECK(x.dim() == 2 && A.dim() == 2, "x must be (B, D) and A (D, N)");
  const int64_t batch = x.size(0), width = x.size(1), states = A.size(1);
  const bool grouped = B.dim() == 3;
  const int64_t groups = grouped ? B.size(1) : 1;
  STD_TORCH_CHECK(groups > 0 && width % groups == 0, "D must be a multiple of B's groups");
  STD_TORCH_CHECK(C.dim() == B.dim(), "C must have B's groups");
  DeviceArguments arguments(x);
  SelectiveScanStepCall call{batch, width, states, width / groups};
  call.softplus = dt_softplus;
  call.x = arguments.rows(x, "x", {batch, width});
  call.dt = arguments.rows(dt, "dt", {batch, width});
  call.z = arguments.rows(z, "z", {batch, width});
  call.B = mixes_of(arguments, B, "B", batch, groups, states);
  call.C = mixes_of(arguments, C, "C", batch, groups, states);
  call.A = arguments.weight(A, "A", {width, states});
  call.D = arguments.weight(D, "D", {width});
  call.dt_bias = arguments.weight(dt_bias, "dt_bias", {width});
  arguments.check(state, "state", {batch, width, states});
  check_device_state(state, "state", {batch, width, states});
  call.state = floats_in(state);
  call.state_batch_stride = state.stride(0);
  call.state_row_stride = state.stride(1);
  Tensor y = empty_like_shape(x, {batch, width});
  call.y = rows_of(y);
  const auto fits = [&](int count) {
    return states % count == 0 && takes_packs(call.A, count, {states}) &&
           takes_packs(call.state, 4, count, {call.state_batch_stride, call.state_row_stride});
  };
  if (fits(4)) run<4>(call, x, arguments.dtype());
  else if (fits(2)) run<2>(call, x, arguments.dtype());
  else run<1>(call, x, arguments.dtype());
  return y;
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("linear_scan_step", TORCH_BOX(&star::linear_scan_step));
  m.impl("gru_scan_step", TORCH_BOX(&star::gru_scan_step));
  m.impl("lstm_scan_step", TORCH_BOX(&star::lstm_scan_step));
  m.impl("selective_scan_step", TORCH_BOX(&star::selective_scan_step));
}
