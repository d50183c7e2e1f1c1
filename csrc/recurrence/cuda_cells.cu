// The GRU and the LSTM with diagonal weights on a GPU, forward and backward. See cuda_cell_equations.h.
//
// Forward, where there are few channels: Newton's iterations (ParaRNN, arXiv 2510.21450). A block has some
// channels and a tile of tokens of one sequence; each iteration replaces all tokens by affine maps near the
// states of the last one and solves them exactly, each thread its own few tokens, then in shared memory the
// threads one after the other. The tile is done when no state moved by more than `tolerance`; a tile that is not
// after `most_iterations` is walked token by token. Where channels fill the GPU, a thread walks a whole sequence
// of one channel: that is the least work.
//
// Backward, the states are known, and what is left is linear: the same tiles, from the last to the first, each
// solved once.
#include <tuple>

#include "cuda_cell_equations.h"
#include "cuda_values.h"

namespace star {
namespace {

constexpr float tolerance = 1e-6f;
constexpr int most_iterations = 16;
constexpr int tile_channels = 16, tile_threads = 256;
constexpr int ranks = tile_threads / tile_channels;  // threads that share a channel
constexpr int walk_threads = 64, walk_ahead = 8;     // tokens on their way from memory
constexpr int64_t walkers_a_processor = 64;          // channels that fill the GPU enough to walk

// Tokens a thread has of a tile.
template <class Cell>
constexpr int own_tokens = Cell::states == 1 ? 8 : 4;

struct CellCall {
  Dtype dtype;
  int64_t batch, length, width, blocks;  // blocks of channels
  Rows x[3];
  Weight weight[3];
  const float* initial[2];  // (B, D) or null: h, c
  float* final[2];          // (B, D) or null
  void* h;                  // (B, L, D) of dtype, or null
  float* states[2];         // (B, L, D) of every h and c, or null
};

// A (batch, channel) of a walk or of a tile.
struct Channel {
  int64_t batch, channel;
  bool inside;

  __device__ __forceinline__ int64_t state(const CellCall& call) const { return batch * call.width + channel; }
  __device__ __forceinline__ int64_t token(const CellCall& call, int64_t time) const {
    return (batch * call.length + time) * call.width + channel;
  }

  template <int S>
  __device__ __forceinline__ void load_state(const CellCall& call, const float* const (&from)[2],
                                             float (&to)[S]) const {
#pragma unroll
    for (int i = 0; i < S; ++i) to[i] = inside && from[i] != nullptr ? from[i][state(call)] : 0.0f;
  }
  template <int S>
  __device__ __forceinline__ void store_state(const CellCall& call, const float (&from)[S],
                                              float* const (&to)[2]) const {
#pragma unroll
    for (int i = 0; i < S; ++i)
      if (inside && to[i] != nullptr) to[i][state(call)] = from[i];
  }
  __device__ __forceinline__ void load_weights(const CellCall& call, float (&a)[3]) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) a[i] = inside ? call.weight[i][channel] : 0.0f;
  }
  // The inputs of `count` tokens; zeros behind the end.
  template <class T, int count>
  __device__ __forceinline__ void load_inputs(const CellCall& call, int64_t time, float (&x)[count][3]) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const T* from = call.x[i].row<const T>(batch, time) + channel;
#pragma unroll
      for (int k = 0; k < count; ++k)
        x[k][i] = inside && time + k < call.length ? to_float(from[k * call.x[i].row_stride]) : 0.0f;
    }
  }
  template <class T, int S>
  __device__ __forceinline__ void store_token(const CellCall& call, int64_t time, const float (&s)[S]) const {
    const int64_t at = token(call, time);
    if (call.h != nullptr) static_cast<T*>(call.h)[at] = from_float<T>(s[0]);
#pragma unroll
    for (int i = 0; i < S; ++i)
      if (call.states[i] != nullptr) call.states[i][at] = s[i];
  }
  template <class T, int count, int S>
  __device__ __forceinline__ void store_tokens(const CellCall& call, int64_t time, int64_t left,
                                               const float (&s)[count][S]) const {
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (k < left) store_token<T>(call, time + k, s[k]);
  }
  template <class T, int count>
  __device__ __forceinline__ void load_gradients(const Rows& dh, int64_t time, int64_t left,
                                                 float (&to)[count]) const {
    const T* from = dh.row<const T>(batch, time) + channel;
#pragma unroll
    for (int k = 0; k < count; ++k) to[k] = k < left ? to_float(from[k * dh.row_stride]) : 0.0f;
  }
};

template <class T, class Cell>
__global__ void __launch_bounds__(walk_threads, 1) cell_walk_kernel(CellCall call) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(walk_threads) + threadIdx.x;
  if (index >= call.batch * call.width) return;
  const Channel at{index / call.width, index % call.width, true};
  float a[3], s[Cell::states], next[walk_ahead][3];
  at.load_weights(call, a);
  at.load_state(call, call.initial, s);
  at.load_inputs<T>(call, 0, next);
  for (int64_t time = 0; time < call.length; time += walk_ahead) {
    float x[walk_ahead][3];
#pragma unroll
    for (int k = 0; k < walk_ahead; ++k)
#pragma unroll
      for (int i = 0; i < 3; ++i) x[k][i] = next[k][i];
    at.load_inputs<T>(call, time + walk_ahead, next);
#pragma unroll
    for (int k = 0; k < walk_ahead; ++k) {
      if (time + k >= call.length) continue;
      Cell(x[k], a, s).advance(s);
      at.store_token<T>(call, time + k, s);
    }
  }
  at.store_state(call, s, call.final);
}

// A thread's place in the tiles of one sequence and one block of channels.
__device__ __forceinline__ Channel tile_channel(const CellCall& call) {
  const int64_t channel = blockIdx.x % call.blocks * tile_channels + threadIdx.x % tile_channels;
  return Channel{static_cast<int64_t>(blockIdx.x / call.blocks), channel, channel < call.width};
}

__device__ __forceinline__ int tile_rank() { return static_cast<int>(threadIdx.x) / tile_channels; }

template <int S>
struct TileShared {
  Map<S> maps[ranks][tile_channels];
  float carry[S][tile_channels];
};

// One iteration: the states of the tile's tokens from maps near their last values. Says whether one moved far.
template <class Cell, int K>
__device__ __forceinline__ bool newton_step(const float (&x)[K][3], const float (&a)[3], int64_t left,
                                            const float (&start)[Cell::states], const float (&bound)[Cell::states],
                                            float (&before)[Cell::states], float (&s)[K][Cell::states],
                                            TileShared<Cell::states>& shared) {
  constexpr int S = Cell::states;
  const int rank = tile_rank(), column = static_cast<int>(threadIdx.x) % tile_channels;
  Map<S> maps[K], all = Map<S>::identity();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float guess[S];
#pragma unroll
    for (int i = 0; i < S; ++i) guess[i] = k == 0 ? before[i] : s[k == 0 ? 0 : k - 1][i];
    maps[k] = k < left ? Cell(x[k], a, guess).map(a, guess) : Map<S>::identity();
    all.then(maps[k]);
  }
  shared.maps[rank][column] = all;
  __syncthreads();
  float state[S];
#pragma unroll
  for (int i = 0; i < S; ++i) state[i] = start[i];
  for (int earlier = 0; earlier < rank; ++earlier) shared.maps[earlier][column].apply(state);
#pragma unroll
  for (int i = 0; i < S; ++i) before[i] = fminf(fmaxf(state[i], -bound[i]), bound[i]);
  bool far = false;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    maps[k].apply(state);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      far = far || (k < left && !(fabsf(state[i] - s[k][i]) <= tolerance));  // what is no number is far, too
      s[k][i] = fminf(fmaxf(state[i], -bound[i]), bound[i]);
    }
  }
  return far;
}

// Every state of the GRU, and the LSTM's c, lie between -1 and 1 or stay nearer to 0 than the first; so does h.
template <class Cell>
__global__ void __launch_bounds__(tile_threads, 2) cell_newton_kernel(CellCall call) {
  constexpr int S = Cell::states, K = own_tokens<Cell>;
  __shared__ TileShared<S> shared;
  const Channel at = tile_channel(call);
  const int rank = tile_rank(), column = static_cast<int>(threadIdx.x) % tile_channels;
  float a[3], start[S];
  at.load_weights(call, a);
  at.load_state(call, call.initial, start);
  for (int64_t tile = 0; tile < call.length; tile += ranks * K) {
    const int64_t time = tile + rank * K, left = at.inside ? call.length - time : 0;
    float x[K][3], s[K][S], before[S], bound[S];
    STAR_WITH_DTYPE(call.dtype, T, at.load_inputs<T>(call, time, x));
#pragma unroll
    for (int i = 0; i < S; ++i) {
      before[i] = start[i];
      bound[i] = fmaxf(fabsf(start[i]), 1.0f);
#pragma unroll
      for (int k = 0; k < K; ++k) s[k][i] = start[i];
    }
    int far = 1;
    for (int iteration = 0; iteration < most_iterations && far; ++iteration)
      far = __syncthreads_or(newton_step<Cell, K>(x, a, left, start, bound, before, s, shared));
    if (!far) {
      STAR_WITH_DTYPE(call.dtype, T, at.store_tokens<T>(call, time, left, s));
      if (rank == ranks - 1) {
#pragma unroll
        for (int i = 0; i < S; ++i) shared.carry[i][column] = s[K - 1][i];
      }
    } else if (rank == 0) {
      STAR_WITH_DTYPE(call.dtype, T, {
        for (int64_t token = tile; at.inside && token < call.length && token < tile + ranks * K; ++token) {
          float one[1][3];
          at.load_inputs<T>(call, token, one);
          Cell(one[0], a, start).advance(start);
          at.store_token<T>(call, token, start);
        }
      });
#pragma unroll
      for (int i = 0; i < S; ++i) shared.carry[i][column] = start[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S; ++i) start[i] = shared.carry[i][column];
  }
  if (rank == 0) at.store_state(call, start, call.final);
}

struct CellBackwardCall {
  CellCall forward;  // states: those of every token
  Rows dh;
  void* dx[3];              // (B, L, D) of dtype
  const float* dfinal[2];   // (B, D) or null
  float* dinitial[2];       // (B, D) or null
  float* dweight[3];        // (B, D): each sequence's share
};

template <class Cell>
__global__ void __launch_bounds__(tile_threads, 2) cell_backward_kernel(CellBackwardCall call) {
  constexpr int S = Cell::states, K = own_tokens<Cell>;
  __shared__ TileShared<S> shared;
  __shared__ float sums[3][ranks][tile_channels];
  const CellCall& forward = call.forward;
  const Channel at = tile_channel(forward);
  const int rank = tile_rank(), column = static_cast<int>(threadIdx.x) % tile_channels;
  float a[3], da[3] = {0.0f, 0.0f, 0.0f}, end[S];  // end: the gradient that comes from behind the tile
  at.load_weights(forward, a);
  at.load_state(forward, call.dfinal, end);
  for (int64_t tile = (forward.length - 1) / (ranks * K) * (ranks * K); tile >= 0 && forward.length > 0;
       tile -= ranks * K) {
    const int64_t time = tile + rank * K, left = at.inside ? forward.length - time : 0;
    float x[K][3], dh[K], s[K][S];  // s: before each token
    Cell cells[K];
    STAR_WITH_DTYPE(forward.dtype, T, {
      at.load_inputs<T>(forward, time, x);
      at.load_gradients<T>(call.dh, time, left, dh);
    });
    Map<S> all = Map<S>::identity();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (time + k == 0) at.load_state(forward, forward.initial, s[k]);
#pragma unroll
      for (int i = 0; i < S; ++i)
        if (time + k > 0) s[k][i] = k < left ? forward.states[i][at.token(forward, time + k - 1)] : 0.0f;
      cells[k] = Cell(x[k], a, s[k]);
    }
#pragma unroll
    for (int k = K - 1; k >= 0; --k)
      if (k < left) all.then(cells[k].way_back(a, s[k], dh[k]));
    shared.maps[rank][column] = all;
    __syncthreads();
    float g[S];
#pragma unroll
    for (int i = 0; i < S; ++i) g[i] = end[i];
    for (int later = ranks - 1; later > rank; --later) shared.maps[later][column].apply(g);
#pragma unroll
    for (int k = K - 1; k >= 0; --k) {
      if (k >= left) continue;
      float after[S], dx[3];
#pragma unroll
      for (int i = 0; i < S; ++i) after[i] = i == 0 ? g[i] + dh[k] : g[i];
      cells[k].gradients(a, s[k], after, dx, da);
      cells[k].way_back(a, s[k], dh[k]).apply(g);
      const int64_t to = at.token(forward, time + k);
      STAR_WITH_DTYPE(forward.dtype, T, {
        static_cast<T*>(call.dx[0])[to] = from_float<T>(dx[0]);
        static_cast<T*>(call.dx[1])[to] = from_float<T>(dx[1]);
        static_cast<T*>(call.dx[2])[to] = from_float<T>(dx[2]);
      });
    }
    if (rank == 0) {
#pragma unroll
      for (int i = 0; i < S; ++i) shared.carry[i][column] = g[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S; ++i) end[i] = shared.carry[i][column];
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) sums[i][rank][column] = da[i];
  __syncthreads();
  if (rank != 0 || !at.inside) return;
  at.store_state(forward, end, call.dinitial);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    float sum = 0.0f;
    for (int other = 0; other < ranks; ++other) sum += sums[i][other][column];
    call.dweight[i][at.state(forward)] = sum;
  }
}

template <class Cell>
constexpr const char* names[6] = {"xz", "xr", "xh", "az", "ar", "ah"};
template <>
constexpr const char* names<LstmCell>[6] = {"xf", "xo", "xz", "af", "ao", "az"};

template <class Cell>
CellCall prepare(DeviceArguments& arguments, const Tensor (&x)[3], const Tensor (&a)[3],
                 const OptionalTensor (&initial)[2]) {
  STD_TORCH_CHECK(x[0].dim() == 3, names<Cell>[0], " must be (B, L, D)");
  CellCall call{};
  call.dtype = arguments.dtype();
  call.batch = x[0].size(0);
  call.length = x[0].size(1);
  call.width = x[0].size(2);
  call.blocks = ceil_div(call.width, tile_channels);
  STD_TORCH_CHECK(call.batch * call.blocks <= INT32_MAX, names<Cell>[0], " is larger than a launch");
  for (int i = 0; i < 3; ++i) {
    call.x[i] = arguments.rows(x[i], names<Cell>[i], {call.batch, call.length, call.width});
    call.weight[i] = arguments.weight(a[i], names<Cell>[3 + i], {call.width});
  }
  for (int i = 0; i < Cell::states; ++i)
    call.initial[i] = arguments.floats(initial[i], i == 0 ? "initial h" : "initial c", {call.batch, call.width});
  return call;
}

template <class Cell>
void run(const OnDevice& on, const CellCall& call) {
  const int64_t channels = call.batch * call.width;
  if (channels >= multiprocessors(on) * walkers_a_processor) {
    STAR_WITH_DTYPE(call.dtype, T, launch(on, cell_walk_kernel<T, Cell>, blocks(ceil_div(channels, walk_threads)),
                                          walk_threads, 0, call));
  } else {
    launch(on, cell_newton_kernel<Cell>, blocks(call.batch * call.blocks), tile_threads, 0, call);
  }
}

struct Outputs {
  Tensor h, final[2];
};

template <class Cell>
Outputs forward(const Tensor (&x)[3], const Tensor (&a)[3], const OptionalTensor (&initial)[2]) {
  DeviceArguments arguments(x[0], names<Cell>[0]);
  CellCall call = prepare<Cell>(arguments, x, a, initial);
  Outputs out;
  out.h = empty_like_shape(x[0], {call.batch, call.length, call.width});
  call.h = out.h.data_ptr();
  for (int i = 0; i < Cell::states; ++i) {
    out.final[i] = empty_float(x[0], {call.batch, call.width});
    call.final[i] = floats_in(out.final[i]);
  }
  run<Cell>(OnDevice(x[0]), call);
  return out;
}

struct Gradients {
  Tensor dx[3], da[3], dinitial[2];
};

template <class Cell>
Gradients backward(const Tensor& dh, const OptionalTensor (&dfinal)[2], const Tensor (&x)[3], const Tensor (&a)[3],
                   const OptionalTensor (&initial)[2]) {
  DeviceArguments arguments(x[0], names<Cell>[0]);
  CellBackwardCall call{};
  CellCall& forward = call.forward;
  forward = prepare<Cell>(arguments, x, a, initial);
  const int64_t batch = forward.batch, length = forward.length, width = forward.width;
  call.dh = arguments.rows(dh, "dh", {batch, length, width});
  Gradients out;
  Tensor states[2], parts[3];
  for (int i = 0; i < Cell::states; ++i) {
    call.dfinal[i] = arguments.floats(dfinal[i], i == 0 ? "dfinal h" : "dfinal c", {batch, width});
    out.dinitial[i] = empty_float(x[0], {initial[i] ? batch : 0, width});
    call.dinitial[i] = initial[i] ? floats_in(out.dinitial[i]) : nullptr;
    states[i] = empty_float(x[0], {batch, length, width});
    forward.states[i] = floats_in(states[i]);
  }
  for (int i = 0; i < 3; ++i) {
    out.dx[i] = empty_like_shape(x[0], {batch, length, width});
    call.dx[i] = out.dx[i].data_ptr();
    parts[i] = empty_float(x[0], {batch, width});
    call.dweight[i] = floats_in(parts[i]);
  }
  const OnDevice on(x[0]);
  run<Cell>(on, forward);
  launch(on, cell_backward_kernel<Cell>, blocks(batch * forward.blocks), tile_threads, 0, call);
  for (int i = 0; i < 3; ++i) out.da[i] = sum_parts(on, parts[i], empty_float(x[0], {width}));
  return out;
}

std::tuple<Tensor, Tensor> gru_scan(Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah,
                                    OptionalTensor initial_state) {
  const Outputs out = forward<GruCell>({xz, xr, xh}, {az, ar, ah}, {initial_state, std::nullopt});
  return {out.h, out.final[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_scan_backward(
    Tensor dh, OptionalTensor dfinal_state, Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah,
    OptionalTensor initial_state) {
  const Gradients g = backward<GruCell>(dh, {dfinal_state, std::nullopt}, {xz, xr, xh}, {az, ar, ah},
                                        {initial_state, std::nullopt});
  return {g.dx[0], g.dx[1], g.dx[2], g.da[0], g.da[1], g.da[2], g.dinitial[0]};
}

std::tuple<Tensor, Tensor, Tensor> lstm_scan(Tensor xf, Tensor xo, Tensor xz, Tensor af, Tensor ao, Tensor az,
                                             OptionalTensor initial_c, OptionalTensor initial_h) {
  const Outputs out = forward<LstmCell>({xf, xo, xz}, {af, ao, az}, {initial_h, initial_c});
  return {out.h, out.final[1], out.final[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_scan_backward(
    Tensor dh, OptionalTensor dfinal_c, OptionalTensor dfinal_h, Tensor xf, Tensor xo, Tensor xz, Tensor af,
    Tensor ao, Tensor az, OptionalTensor initial_c, OptionalTensor initial_h) {
  const Gradients g =
      backward<LstmCell>(dh, {dfinal_h, dfinal_c}, {xf, xo, xz}, {af, ao, az}, {initial_h, initial_c});
  return {g.dx[0], g.dx[1], g.dx[2], g.da[0], g.da[1], g.da[2], g.dinitial[1], g.dinitial[0]};
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("gru_scan", TORCH_BOX(&star::gru_scan));
  m.impl("gru_scan_backward", TORCH_BOX(&star::gru_scan_backward));
  m.impl("lstm_scan", TORCH_BOX(&star::lstm_scan));
  m.impl("lstm_scan_backward", TORCH_BOX(&star::lstm_scan_backward));
}
