// Decode steps of gated linear attention and of the gated delta rule on a GPU, one launch each.
//
// S' = a S + k u^T and y = scale S'^T q, with a = exp(g) and u = v or, by the delta rule,
// u = beta (v - (a S)^T k).
//
// The state is read once into registers and written once. A block has a tile of columns of one head's state:
// `lanes` neighbouring threads have N neighbouring columns each, threads farther apart have other rows, eight
// each. What sums over rows goes through shuffles and shared memory, in an order that the shape fixes.
#include "cuda_values.h"

namespace star {
namespace {

constexpr int rows_of_thread = 8;
constexpr int most_threads = 256, least_lanes = 2, most_lanes = 8;
constexpr int most_rows = most_threads / least_lanes * rows_of_thread;  // at a time
constexpr int pack = 4;  // columns a thread, where everything is aligned for it

// A (B, H, X) tensor, or a (B, H) one; strides count elements.
struct StepHeads {
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0;

  template <class T>
  __device__ __forceinline__ T* at(int64_t batch, int64_t head) const {
    return static_cast<T*>(const_cast<void*>(data)) + batch * batch_stride + head * head_stride;
  }
};

struct MatrixStepCall {
  int64_t heads, heads_a_key, keys, values;
  int64_t tiles;  // of columns, a head
  int lanes, groups;  // threads that share rows, and how many of those there are
  float scale;
  StepHeads q, k, v, beta, y;
  StepHeads log_decay;  // data is null where nothing decays
  Dtype decay_dtype;
  bool decay_of_keys;
  float* state;  // (B, H, Dk, Dv) with these strides
  int64_t state_batch_stride, state_head_stride, state_row_stride;
};

// The sum of each column over the threads that have it. `scratch`: most_lanes * N floats for each warp.
template <int N>
__device__ __forceinline__ void sum_over_rows(float (&sum)[N], int lanes, float* scratch) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / warp_size;
#pragma unroll
  for (int i = 0; i < N; ++i)
    for (int distance = lanes; distance < warp_size; distance *= 2)
      sum[i] += __shfl_xor_sync(all_lanes, sum[i], distance);
  if (warps == 1) return;
  const int lane = thread % warp_size, columns = lanes * N;
  if (lane < lanes) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[thread / warp_size * columns + lane * N + i] = sum[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = 0.0f;
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += scratch[warp * columns + thread % lanes * N + i];
  }
}

// What the rows of a pass share among all columns. `row` counts from the pass's first.
struct RowValues {
  float key[most_rows], query[most_rows], decay[most_rows];

  // exp(g) of one row; g is never positive.
  __device__ __forceinline__ static float decay_of(const MatrixStepCall& call, int64_t batch, int64_t head,
                                                   int64_t row) {
    if (call.log_decay.data == nullptr) return 1.0f;
    const Weight log_decay{call.log_decay.data, call.decay_dtype};
    return fast_exp(log_decay[batch * call.log_decay.batch_stride + head * call.log_decay.head_stride +
                              (call.decay_of_keys ? row : 0)]);
  }

  // Rows past the last are zeros, so that they add nothing.
  template <class T>
  __device__ __forceinline__ void stage(const MatrixStepCall& call, int64_t batch, int64_t head, int64_t first,
                                        int count) {
    const T* k = call.k.at<const T>(batch, head / call.heads_a_key);
    const T* q = call.q.at<const T>(batch, head / call.heads_a_key);
    for (int row = static_cast<int>(threadIdx.x); row < count; row += static_cast<int>(blockDim.x)) {
      const bool there = first + row < call.keys;
      key[row] = there ? to_float(k[first + row]) : 0.0f;
      query[row] = there ? to_float(q[first + row]) : 0.0f;
      decay[row] = there ? decay_of(call, batch, head, first + row) : 0.0f;
    }
  }
};

// The rows of a thread, which begin at `first` and are `groups` apart.
template <int N>
__device__ __forceinline__ void load_rows(const MatrixStepCall& call, const float* columns, bool inside,
                                          int64_t first, float (&state)[rows_of_thread][N]) {
#pragma unroll
  for (int r = 0; r < rows_of_thread; ++r) {
    const int64_t row = first + r * call.groups;
#pragma unroll
    for (int i = 0; i < N; ++i) state[r][i] = 0.0f;
    if (inside && row < call.keys) load<N>(columns + row * call.state_row_stride, state[r]);
  }
}

template <class T, int N, bool DELTA>
__global__ void __launch_bounds__(most_threads, 2) matrix_step_kernel(MatrixStepCall call) {
  __shared__ float scratch[2][most_threads / warp_size * most_lanes * N];
  __shared__ RowValues rows;
  const int64_t of_head = blockIdx.x / call.tiles, batch = of_head / call.heads, head = of_head % call.heads;
  const int lane = static_cast<int>(threadIdx.x) % call.lanes, group = static_cast<int>(threadIdx.x) / call.lanes;
  const int64_t column = (blockIdx.x % call.tiles * call.lanes + lane) * N;
  const bool inside = column < call.values && group < call.groups;
  float* columns = call.state + batch * call.state_batch_stride + head * call.state_head_stride + column;
  const int pass = call.groups * rows_of_thread;  // rows at a time: all of them, mostly

  float state[rows_of_thread][N], u[N], y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] = y[i] = 0.0f;
  if (inside) load<N>(call.v.at<const T>(batch, head) + column, u);
  if (DELTA) {
    float known[N];  // (a S)^T k
#pragma unroll
    for (int i = 0; i < N; ++i) known[i] = 0.0f;
    for (int64_t first = 0; first < call.keys; first += pass) {
      load_rows<N>(call, columns, inside, first + group, state);
      rows.stage<T>(call, batch, head, first, pass);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < rows_of_thread; ++r) {
        const int row = group + r * call.groups;
        const float weight = inside ? rows.key[row] * rows.decay[row] : 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) known[i] += state[r][i] * weight;
      }
      if (pass < call.keys) __syncthreads();
    }
    sum_over_rows<N>(known, call.lanes, scratch[0]);
    const float beta = to_float(*call.beta.at<const T>(batch, head));
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = beta * (u[i] - known[i]);
  }
  for (int64_t first = 0; first < call.keys; first += pass) {
    if (!DELTA || pass < call.keys) {
      load_rows<N>(call, columns, inside, first + group, state);
      rows.stage<T>(call, batch, head, first, pass);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < rows_of_thread; ++r) {
      const int row = group + r * call.groups;
      if (!inside || first + row >= call.keys) continue;
      const float key = rows.key[row], query = rows.query[row], decay = rows.decay[row];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        state[r][i] = decay * state[r][i] + key * u[i];
        y[i] += query * state[r][i];
      }
      store<N>(state[r], columns + (first + row) * call.state_row_stride);
    }
    if (pass < call.keys) __syncthreads();
  }
  sum_over_rows<N>(y, call.lanes, scratch[1]);
  if (!inside || group != 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] *= call.scale;
  store<N>(y, call.y.at<T>(batch, head) + column);
}

StepHeads heads_of(const Tensor& tensor) { return StepHeads{tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// Narrow tiles where wide ones leave multiprocessors without work.
template <int N>
unsigned plan(MatrixStepCall& call, int64_t states, int processors) {
  const auto tiles = [&] { return ceil_div(call.values, static_cast<int64_t>(call.lanes) * N); };
  call.lanes = most_lanes;
  while (call.lanes > least_lanes && (states * tiles() < processors || call.lanes * N >= 2 * call.values)) call.lanes /= 2;
  call.tiles = tiles();
  const int64_t groups = ceil_div(call.keys > 0 ? call.keys : 1, rows_of_thread), most = most_threads / call.lanes;
  call.groups = static_cast<int>(groups < most ? groups : most);
  STD_TORCH_CHECK(states * call.tiles <= INT32_MAX, "v is larger than a launch");
  return static_cast<unsigned>(states * call.tiles);
}

template <int N, bool DELTA>
void run(MatrixStepCall& call, const Tensor& v, Dtype dtype) {
  const OnDevice on(v);
  const unsigned grid = plan<N>(call, v.size(0) * call.heads, multiprocessors(on));
  const unsigned threads = static_cast<unsigned>(ceil_div(call.lanes * call.groups, warp_size)) * warp_size;
  STAR_WITH_DTYPE(dtype, T, launch(on, matrix_step_kernel<T, N, DELTA>, grid, threads, 0, call));
}

template <bool DELTA>
Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& beta,
            const OptionalTensor& log_decay, const Tensor& state, double scale) {
  STD_TORCH_CHECK(q.dim() == 3 && v.dim() == 3, "q and v must be (B, H, X)");
  const int64_t batch = v.size(0), heads = v.size(1), key_heads = q.size(1), keys = q.size(2), values = v.size(2);
  STD_TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, "the heads of v must be a multiple of those of q");
  DeviceArguments arguments(v, "v");
  MatrixStepCall call{heads, heads / key_heads, keys, values};
  call.scale = static_cast<float>(scale);
  call.q = heads_of(arguments.activation(q, "q", {batch, key_heads, keys}));
  call.k = heads_of(arguments.activation(k, "k", {batch, key_heads, keys}));
  call.v = heads_of(arguments.activation(v, "v", {batch, heads, values}));
  if (DELTA) {
    arguments.check(*beta, "beta", {batch, heads});
    STD_TORCH_CHECK(beta->scalar_type() == v.scalar_type(), "beta has a wrong dtype");
    call.beta = heads_of(*beta);
  }
  if (log_decay) {
    call.decay_of_keys = log_decay->dim() == 3;
    if (call.decay_of_keys) arguments.check(*log_decay, "log_decay", {batch, heads, keys});
    else arguments.check(*log_decay, "log_decay", {batch, heads});
    call.decay_dtype = dtype_of(*log_decay, "log_decay");
    call.log_decay = heads_of(call.decay_of_keys ? arguments.keep(with_contiguous_rows(*log_decay)) : *log_decay);
  }
  arguments.check(state, "state", {batch, heads, keys, values});
  check_device_state(state, "state", {batch, heads, keys, values});
  call.state = floats_in(state);
  call.state_batch_stride = state.stride(0);
  call.state_head_stride = state.stride(1);
  call.state_row_stride = state.stride(2);
  Tensor y = empty_like_shape(v, {batch, heads, values});
  call.y = heads_of(y);
  const int64_t bytes = bytes_of(arguments.dtype());
  const bool packed =
      values % pack == 0 && takes_packs(call.v.data, bytes, pack, {call.v.batch_stride, call.v.head_stride}) &&
      takes_packs(call.y.data, bytes, pack, {call.y.batch_stride, call.y.head_stride}) &&
      takes_packs(call.state, 4, pack, {call.state_batch_stride, call.state_head_stride, call.state_row_stride});
  if (packed) run<pack, DELTA>(call, v, arguments.dtype());
  else run<1, DELTA>(call, v, arguments.dtype());
  return y;
}

Tensor gated_linear_attention_step(Tensor q, Tensor k, Tensor v, OptionalTensor log_decay, Tensor state,
                                   double scale) {
  return step<false>(q, k, v, std::nullopt, log_decay, state, scale);
}

Tensor gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, OptionalTensor log_decay, Tensor state,
                             double scale) {
  return step<true>(q, k, v, beta, log_decay, state, scale);
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("gated_linear_attention_step", TORCH_BOX(&star::gated_linear_attention_step));
  m.impl("gated_delta_rule_step", TORCH_BOX(&star::gated_delta_rule_step));
}
