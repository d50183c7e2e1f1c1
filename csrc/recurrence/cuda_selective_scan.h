// The selective scan (Mamba-1) on a GPU: what the forward and the backward pass share.
//
// A block has a sequence and a block of neighbouring channels, and walks the sequence tile by tile. LANES
// neighbouring threads share a channel; each keeps STATES of its states in registers all the way. A tile of
// x, dt and the rest is read in rows of channels, as it lies in memory, through shared memory; while a tile is
// worked on, the next one is on its way into registers. Where STATES * LANES exceeds N, the states too many
// have A = B = C = 0 and stay 0; tokens behind a sequence's end have delta = 0 and change nothing.
#pragma once

#include "cuda_values.h"

namespace star {

constexpr int scan_threads = 128;
constexpr int summed_tokens = 4;  // whose sums over a channel's lanes are made together
constexpr int chunk_tokens = 8;  // the backward pass goes back from one kept state to the one before it
constexpr float log2_e = 1.44269504f;

#ifdef STAR_EMULATE_CUDA
inline float exponential2(float x) { return std::exp2(x); }
#else
__device__ __forceinline__ float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// log(1 + e^x) and its slope. With e = e^-|x| and s = e / (2 + e) <= 1/3: log(1 + e) = 2 atanh(s), whose series
// keeps the relative accuracy of small results.
__device__ __forceinline__ float softplus_with_slope(float x, float& slope) {
  const float e = fast_exp(-fabsf(x)), s = fast_divide(e, 2.0f + e), q = s * s;
  float series = 1.0f / 15.0f;
  series = series * q + 1.0f / 13.0f;
  series = series * q + 1.0f / 11.0f;
  series = series * q + 1.0f / 9.0f;
  series = series * q + 1.0f / 7.0f;
  series = series * q + 1.0f / 5.0f;
  series = series * q + 1.0f / 3.0f;
  series = series * q + 1.0f;
  slope = fast_divide(x > 0.0f ? 1.0f : e, 1.0f + e);
  return fmaxf(x, 0.0f) + 2.0f * s * series;
}

// Sums over LANES lanes that are STRIDE apart, of V values each, scattered: about one shuffle a value. Lane i of
// the LANES ends with sums of values i V / LANES and following, of which `values` then holds the first.
template <int V, int LANES, int STRIDE>
__device__ __forceinline__ void reduce_scatter(float (&values)[V]) {
  const int lane = static_cast<int>(threadIdx.x) / STRIDE % LANES;
#pragma unroll
  for (int bit = LANES / 2, level = 1; bit > 0; bit /= 2, ++level) {
    const int left = V >> level;  // values after this exchange
    if (left == 0) {
      values[0] += __shfl_xor_sync(all_lanes, values[0], bit * STRIDE);
      continue;
    }
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if (i >= left) continue;
      const float given = upper ? values[i] : values[i + left];
      const float kept = upper ? values[i + left] : values[i];
      values[i] = kept + __shfl_xor_sync(all_lanes, given, bit * STRIDE);
    }
  }
}

// Where reduce_scatter's results are: how many a lane holds, the first one's index, and whether this lane is the
// one, among those with the same results, that speaks for them.
template <int V, int LANES>
struct Scattered {
  static constexpr int count = V > LANES ? V / LANES : 1;
  static constexpr int sharing = LANES > V ? LANES / V : 1;
  int first;
  bool speaks;

  __device__ __forceinline__ explicit Scattered(int lane)
      : first(lane / sharing * count), speaks(lane % sharing == 0) {}
};

// Puts the sums of `values`, one a token from `first` on, over the lanes of a channel into a row of channels each.
template <int LANES, int TOKENS, int PITCH>
__device__ __forceinline__ void put_sums(float (&values)[summed_tokens], int lane, int channel, int first,
                                         float (&to)[TOKENS][PITCH]) {
  using Sums = Scattered<summed_tokens, LANES>;
  reduce_scatter<summed_tokens, LANES, 1>(values);
  const Sums sums(lane);
#pragma unroll
  for (int r = 0; r < Sums::count; ++r)
    if (sums.speaks) to[first + sums.first + r][channel] = values[r];
}

// B or C, (B, L, G, N) or (B, L, N), in the dtype of x.
struct Mixes {
  const void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, group_stride = 0;
};

struct SelectiveScanCall {
  Dtype dtype;
  bool softplus;
  DeviceSequences sequences;
  int64_t width, states, groups, blocks;  // channels, N, groups, blocks of channels a group
  Rows x, dt, z, y;                       // z.data is null where there is no gate
  Mixes B, C;
  Weight A, D, dt_bias;
  const float* initial;  // (S, D, N) or null
  float* final;          // (S, D, N)
  float* starts;         // (slots, D, STATES LANES): the state before every chunk, where it is kept
};

// How many chunks there are at most in all sequences, each of which begins a chunk.
inline int64_t chunk_slots(const DeviceSequences& sequences) {
  const int64_t chunks = ceil_div(sequences.length, chunk_tokens);
  return sequences.offsets == nullptr ? sequences.count * chunks : chunks + sequences.count;
}

// The block's sequence and channels, and this thread's part in them.
template <int STATES, int LANES>
struct Place {
  static constexpr int channels = scan_threads / LANES;  // of a block
  static constexpr int padded = STATES * LANES;          // states of a channel, among all of its lanes

  // 32 bits each, which prepare() has checked to be enough: registers are scarce.
  int sequence, batch, start, end, slot;
  int group, block, first, width;      // first channel of the block, and its number of channels
  int lane, channel;                   // of the recurrence
  int row, column;                     // of the tile: the first token and the channel that this thread reads

  __device__ __forceinline__ explicit Place(const SelectiveScanCall& call) {
    const int blocks = static_cast<int>(call.blocks), of_sequence = static_cast<int>(call.groups) * blocks;
    const int index = static_cast<int>(blockIdx.x), rest = index % of_sequence;
    sequence = index / of_sequence;
    batch = static_cast<int>(call.sequences.batch(sequence));
    start = static_cast<int>(call.sequences.start(sequence));
    end = static_cast<int>(call.sequences.end(sequence));
    const int chunks = (static_cast<int>(call.sequences.length) + chunk_tokens - 1) / chunk_tokens;
    slot = call.sequences.offsets == nullptr ? sequence * chunks : start / chunk_tokens + sequence;
    group = rest / blocks;
    block = rest % blocks;
    const int of_group = static_cast<int>(call.width / call.groups), left = of_group - block * channels;
    first = group * of_group + block * channels;
    width = left < channels ? left : channels;
    lane = static_cast<int>(threadIdx.x) % LANES;
    channel = static_cast<int>(threadIdx.x) / LANES;
    row = static_cast<int>(threadIdx.x) / channels;
    column = static_cast<int>(threadIdx.x) % channels;
  }

  // This thread's states in a (S, D, N) tensor.
  __device__ __forceinline__ int64_t state(const SelectiveScanCall& call, int i) const {
    return (static_cast<int64_t>(sequence) * call.width + first + channel) * call.states + lane * STATES + i;
  }
  __device__ __forceinline__ bool has_state(const SelectiveScanCall& call, int i) const {
    return channel < width && lane * STATES + i < call.states;
  }
  // This thread's states in `starts`, before the sequence's chunk `chunk`.
  __device__ __forceinline__ float* kept(const SelectiveScanCall& call, int chunk) const {
    return call.starts + (static_cast<int64_t>(slot + chunk) * call.width + first + channel) * padded + lane * STATES;
  }

  __device__ __forceinline__ void load_states(const SelectiveScanCall& call, const float* from,
                                              float (&to)[STATES]) const {
#pragma unroll
    for (int i = 0; i < STATES; ++i)
      to[i] = from != nullptr && has_state(call, i) ? from[state(call, i)] : 0.0f;
  }
  __device__ __forceinline__ void store_states(const SelectiveScanCall& call, const float (&from)[STATES],
                                               float* to) const {
#pragma unroll
    for (int i = 0; i < STATES; ++i)
      if (to != nullptr && has_state(call, i)) to[state(call, i)] = from[i];
  }
  // A log2(e)
  __device__ __forceinline__ void load_decays(const SelectiveScanCall& call, float (&to)[STATES]) const {
#pragma unroll
    for (int i = 0; i < STATES; ++i)
      to[i] = has_state(call, i) ? call.A[static_cast<int64_t>(first + channel) * call.states + lane * STATES + i] * log2_e : 0.0f;
  }
};

// A tile's share of one thread, on its way from memory: `count` tokens of its column in each of some tensors, and
// a share of B and C.
template <int STATES, int LANES, int TOKENS>
struct Tile {
  using Where = Place<STATES, LANES>;
  static constexpr int rows = scan_threads / Where::channels;  // tokens that the block reads at a time
  static constexpr int count = TOKENS > rows ? TOKENS / rows : 1;
  static constexpr int mix_count = (TOKENS * Where::padded + scan_threads - 1) / scan_threads;
  static_assert(TOKENS % rows == 0 || rows % TOKENS == 0, "threads share a tile's tokens evenly");

  // Which token of the tile the thread's k-th value is of, and whether there is such a token and its channel.
  static __device__ __forceinline__ int token(const Where& at, int k) { return at.row + k * rows; }
  static __device__ __forceinline__ bool holds(const Where& at, int time, int k) {
    return token(at, k) < TOKENS && time + token(at, k) < at.end && at.column < at.width;
  }

  // Values of one tensor; zeros where there is no token or no channel.
  template <class T>
  static __device__ __forceinline__ void fetch(const Rows& from, const Where& at, int time, float (&to)[count]) {
    const T* data = from.row<const T>(at.batch, time + at.row) + at.first + at.column;
#pragma unroll
    for (int k = 0; k < count; ++k)
      to[k] = holds(at, time, k) ? to_float(data[k * rows * from.row_stride]) : 0.0f;
  }

  template <class T>
  static __device__ __forceinline__ void fetch(const Mixes& from, const SelectiveScanCall& call, const Where& at,
                                               int time, float (&to)[mix_count]) {
    const T* data = static_cast<const T*>(from.data) + at.batch * from.batch_stride + at.group * from.group_stride;
#pragma unroll
    for (int k = 0; k < mix_count; ++k) {
      const int index = k * scan_threads + static_cast<int>(threadIdx.x);
      const int token = index / Where::padded, state = index % Where::padded;
      const bool there = token < TOKENS && time + token < at.end && state < call.states;
      to[k] = there ? to_float(data[(time + token) * from.row_stride + state]) : 0.0f;
    }
  }

  static __device__ __forceinline__ void put(const float (&from)[mix_count], float* to) {
#pragma unroll
    for (int k = 0; k < mix_count; ++k) {
      const int index = k * scan_threads + static_cast<int>(threadIdx.x);
      if (index < TOKENS * Where::padded) to[index] = from[k];
    }
  }

  // y = (sum + direct) silu(gate)
  template <class T, int ROWS, int PITCH>
  static __device__ __forceinline__ void put_outputs(const SelectiveScanCall& call, const Where& at, int time,
                                                     const float (&sums)[ROWS][PITCH], const float (&direct)[count],
                                                     const float (&gate)[count]) {
    T* out = call.y.row<T>(at.batch, time + at.row) + at.first + at.column;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (!holds(at, time, k)) continue;
      float value = sums[token(at, k)][at.column] + direct[k];
      if (call.z.data != nullptr) value *= gate[k] * fast_divide(1.0f, 1.0f + fast_exp(-gate[k]));
      out[k * rows * call.y.row_stride] = from_float<T>(value);
    }
  }
};

// delta and u = delta x of a token and a channel.
struct alignas(8) Drive {
  float delta, u;
};

// The walk forward. With OUTPUT it writes y and the final state, without it keeps the state before every chunk.
template <int STATES, int LANES, bool OUTPUT>
__global__ void __launch_bounds__(scan_threads, 4) selective_scan_kernel(SelectiveScanCall call) {
  constexpr int tokens = LANES == 4 ? 2 * chunk_tokens : chunk_tokens;
  using At = Place<STATES, LANES>;
  using Tiles = Tile<STATES, LANES, tokens>;
  constexpr int pitch = At::channels + 8;  // of outputs: lanes that write several tokens meet other banks
  __shared__ Drive drive[tokens][At::channels];
  alignas(16) __shared__ float B[tokens * At::padded], C[OUTPUT ? tokens * At::padded : 1];
  __shared__ float y[OUTPUT ? tokens : 1][pitch];
  const At at(call);

  float A[STATES], h[STATES];
  at.load_decays(call, A);
  at.load_states(call, call.initial, h);
  const float bias = at.column < at.width ? call.dt_bias.at(at.first + at.column, 0.0f) : 0.0f;
  const float skip = OUTPUT && at.column < at.width ? call.D.at(at.first + at.column, 0.0f) : 0.0f;
  float x[Tiles::count], dt[Tiles::count], z[Tiles::count] = {}, mixB[Tiles::mix_count], mixC[Tiles::mix_count];
  const auto fetch = [&](int time) {
    STAR_WITH_DTYPE(call.dtype, T, {
      Tiles::template fetch<T>(call.x, at, time, x);
      Tiles::template fetch<T>(call.dt, at, time, dt);
      Tiles::template fetch<T>(call.B, call, at, time, mixB);
      if (OUTPUT) Tiles::template fetch<T>(call.C, call, at, time, mixC);
      if (OUTPUT && call.z.data != nullptr) Tiles::template fetch<T>(call.z, at, time, z);
    });
  };
  if (at.start < at.end) fetch(at.start);
  for (int time = at.start; time < at.end; time += tokens) {
    float direct[Tiles::count], gate[Tiles::count];
#pragma unroll
    for (int k = 0; k < Tiles::count; ++k) {
      float delta = dt[k] + bias, slope;
      if (call.softplus) delta = softplus_with_slope(delta, slope);
      if (!Tiles::holds(at, time, k)) delta = 0.0f;
      if (Tiles::token(at, k) < tokens) drive[Tiles::token(at, k)][at.column] = Drive{delta, delta * x[k]};
      direct[k] = skip * x[k];
      gate[k] = z[k];
    }
    Tiles::put(mixB, B);
    if (OUTPUT) Tiles::put(mixC, C);
    __syncthreads();
    if (time + tokens < at.end) fetch(time + tokens);
#pragma unroll 1
    for (int first = 0; first < tokens; first += summed_tokens) {
      float sums[summed_tokens];
#pragma unroll
      for (int j = 0; j < summed_tokens; ++j) {
        const int t = first + j;
        if (!OUTPUT && t % chunk_tokens == 0 && time + t < at.end && at.channel < at.width)
          store<STATES>(h, at.kept(call, (time + t - at.start) / chunk_tokens));
        const Drive now = drive[t][at.channel];
        float b[STATES], c[STATES];
        load<STATES>(B + t * At::padded + at.lane * STATES, b);
        if (OUTPUT) load<STATES>(C + t * At::padded + at.lane * STATES, c);
        sums[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
          h[i] = exponential2(now.delta * A[i]) * h[i] + now.u * b[i];
          if (OUTPUT) sums[j] += c[i] * h[i];
        }
      }
      if (OUTPUT) put_sums<LANES>(sums, at.lane, at.channel, first, y);
    }
    __syncthreads();
    if (!OUTPUT) continue;
    STAR_WITH_DTYPE(call.dtype, T, Tiles::template put_outputs<T>(call, at, time, y, direct, gate));
  }
  if (OUTPUT) at.store_states(call, h, call.final);
}

// Host side

struct SelectiveScanInputs {
  const Tensor &x, &dt, &A, &B, &C;
  const OptionalTensor &D, &z, &dt_bias;
  bool softplus;
  const OptionalTensor &initial_state, &cu_seqlens;
};

inline Mixes mixes_of(DeviceArguments& arguments, const Tensor& tensor, const char* name, int64_t batch,
                      int64_t length, int64_t groups, int64_t states) {
  const bool grouped = tensor.dim() == 4;
  const Tensor& kept = grouped ? arguments.activation(tensor, name, {batch, length, groups, states})
                               : arguments.activation(tensor, name, {batch, length, states});
  return Mixes{kept.data_ptr(), kept.stride(0), kept.stride(1), grouped ? kept.stride(2) : 0};
}

constexpr int64_t most_states = 64;

// How many channels a block has for so many states: see with_states.
inline int64_t channels_of_block(int64_t states) {
  return states <= 2 ? scan_threads : states <= 16 ? scan_threads / 4 : scan_threads / 32;
}
inline int64_t padded_states(int64_t states) { return states <= 2 ? 2 : states <= 16 ? 16 : 64; }

inline SelectiveScanCall prepare(DeviceArguments& arguments, const SelectiveScanInputs& in) {
  STD_TORCH_CHECK(in.x.dim() == 3 && in.A.dim() == 2, "x must be (B, L, D) and A (D, N)");
  const int64_t batch = in.x.size(0), length = in.x.size(1), width = in.x.size(2), states = in.A.size(1);
  const int64_t groups = in.B.dim() == 4 ? in.B.size(2) : 1;
  STD_TORCH_CHECK(groups > 0 && width % groups == 0, "D must be a multiple of B's groups");
  STD_TORCH_CHECK(in.C.dim() == in.B.dim(), "C must have B's groups");
  STD_TORCH_CHECK(states <= most_states, "A has more than ", most_states,
                  " states, which the CUDA kernel takes at most; backend='triton' takes any number");
  SelectiveScanCall call{};
  call.dtype = arguments.dtype();
  call.softplus = in.softplus;
  call.sequences = arguments.sequences(in.cu_seqlens, batch, length);
  call.width = width;
  call.states = states;
  call.groups = groups;
  call.blocks = ceil_div(width / groups, channels_of_block(states));
  call.x = arguments.rows(in.x, "x", {batch, length, width});
  call.dt = arguments.rows(in.dt, "dt", {batch, length, width});
  call.z = arguments.rows(in.z, "z", {batch, length, width});
  call.B = mixes_of(arguments, in.B, "B", batch, length, groups, states);
  call.C = mixes_of(arguments, in.C, "C", batch, length, groups, states);
  call.A = arguments.weight(in.A, "A", {width, states});
  call.D = arguments.weight(in.D, "D", {width});
  call.dt_bias = arguments.weight(in.dt_bias, "dt_bias", {width});
  call.initial = arguments.floats(in.initial_state, "initial_state", {call.sequences.count, width, states});
  for (int64_t size : {width, length + scan_threads, chunk_slots(call.sequences)})
    STD_TORCH_CHECK(size <= INT32_MAX, "x is larger than the CUDA kernel takes");
  return call;
}

inline unsigned scan_blocks(const SelectiveScanCall& call) {
  const int64_t count = call.sequences.count * call.groups * call.blocks;
  STD_TORCH_CHECK(count <= INT32_MAX, "x is larger than a launch");
  return static_cast<unsigned>(count);
}

}  // namespace star

// Runs the statement with STATES and LANES bound to how N states of a channel are shared out.
#define STAR_WITH_STATES(states, STATES, LANES, ...) \
  if ((states) <= 2) {                               \
    constexpr int STATES = 2, LANES = 1;             \
    __VA_ARGS__;                                     \
  } else if ((states) <= 16) {                       \
    constexpr int STATES = 4, LANES = 4;             \
    __VA_ARGS__;                                     \
  } else {                                           \
    constexpr int STATES = 2, LANES = 32;            \
    __VA_ARGS__;                                     \
  }
