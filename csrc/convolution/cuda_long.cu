// One token of the long convolution on a GPU: kernel, checks, launch, registration.
//
//     y_d = [c_d] (sum_j kernel_{d,j} history_{position-j,d} + skip_d u_d),   u = [b] x,  history_position = u
//
// A block takes some consecutive lags j ("a split") of neighbouring channels for up to 8 sequences, which share
// one read of the kernel: it goes through shared memory, where lags and channels change places as its layout
// needs it. Threads take 16 bytes of history each. The last block to finish adds the splits in their order and
// writes the outputs and the new row of the history, which no block reads.
#include "../common/cuda/arguments.h"
#include "../common/cuda/splits.h"
#include "../common/cuda/words.h"
#include "position.h"

namespace star {
namespace {

constexpr int threads = 128;
constexpr int lanes = 16;              // of a row of history
constexpr int slots = threads / lanes; // rows of history at once
constexpr int chunk = 32;              // lags whose taps are in shared memory at once
constexpr int least = 2 * chunk;       // lags that another split is worth
constexpr int most_splits = 256;

struct LongStepCall {
  int64_t batch, width, capacity, kernel_length;
  const void* positions;  // on the device, int32 or int64; null: `position` for all
  bool wide_positions;
  int64_t position_stride;  // 0: one for all sequences
  int64_t position;
  Rows x, b, c, y;  // one row a sequence; b and c have no data where there are no gates
  Rows history;     // (B, Lmax, D)
  Weight kernel, skip;
  int64_t channel_stride, tap_stride;
  int tiles;           // of channels
  int splits;          // at most
  unsigned* counters;  // a unit, that is, a (tile of channels, tile of sequences)
  float* sums;         // (units, splits, sequences of a block, channels of a block)

  // Where a sequence's new row goes; -1 for a place outside the history, which is not touched then.
  __device__ __forceinline__ int64_t place(int64_t sequence) const {
    int64_t at = position;
    if (positions != nullptr)
      at = wide_positions ? static_cast<const int64_t*>(positions)[sequence * position_stride]
                          : static_cast<const int32_t*>(positions)[sequence * position_stride];
    return at < 0 || at >= capacity ? -1 : at;
  }
};

// BATCH sequences and lanes * N channels a block.
template <class Element, int PACK, int BATCH>
struct LongStepForm {
  using T = Element;
  static constexpr int pack = PACK, batch = BATCH, channels = lanes * PACK;
  static constexpr int pitch = channels + 4;           // of a lag's taps in shared memory
  static constexpr int items = BATCH * channels / 4;   // fours of results
  static constexpr int buffer = chunk * pitch > threads * 4 ? chunk * pitch : threads * 4;
  static_assert(buffer >= threads / warp_size * BATCH * channels, "the warps' sums take the taps' place");
};

template <class Form>
struct LongStepPart {
  int64_t first_channel, first_sequence, unit;
  int split, active;
  int64_t begin, end;  // of lags

  __device__ __forceinline__ LongStepPart(const LongStepCall& call, const int64_t* places) {
    unsigned rest = blockIdx.x;
    const unsigned tile = rest % call.tiles;
    rest /= call.tiles;
    split = static_cast<int>(rest % call.splits);
    const unsigned sequences = rest / call.splits;
    first_channel = static_cast<int64_t>(tile) * Form::channels;
    first_sequence = static_cast<int64_t>(sequences) * Form::batch;
    unit = static_cast<int64_t>(sequences) * call.tiles + tile;
    int64_t seen = 0;  // lags, of the sequence that is longest
    for (int i = 0; i < Form::batch; ++i) seen = places[i] + 1 > seen ? places[i] + 1 : seen;
    seen = seen < call.kernel_length ? seen : call.kernel_length;
    const int64_t useful = (seen + least - 1) / least;
    active = useful < 1 ? 1 : useful > call.splits ? call.splits : static_cast<int>(useful);
    const int64_t share = ((seen + active - 1) / active + chunk - 1) / chunk * chunk;
    begin = split * share;
    end = begin + share < seen ? begin + share : seen;
  }

  static __device__ __forceinline__ int64_t first_of_block(const LongStepCall& call) {
    return static_cast<int64_t>(blockIdx.x / call.tiles / call.splits) * Form::batch;
  }
};

// The taps of `chunk` lags from `lag` on as floats, (lag, channel); zero beyond.
template <class Form>
__device__ __forceinline__ void load_taps(const LongStepCall& call, const LongStepPart<Form>& part, int64_t lag,
                                          float* taps) {
  const bool by_lag = call.tap_stride == 1;  // neighbouring threads take neighbours in memory
  for (int at = static_cast<int>(threadIdx.x); at < chunk * Form::channels; at += threads) {
    const int j = by_lag ? at % chunk : at / Form::channels, i = by_lag ? at / chunk : at % Form::channels;
    const int64_t channel = part.first_channel + i;
    const bool inside = channel < call.width && lag + j < part.end;
    taps[j * Form::pitch + i] =
        inside ? call.kernel[channel * call.channel_stride + (lag + j) * call.tap_stride] : 0.0f;
  }
}

// sums[s][i] += the part's lags but 0, whose input is not in the history yet, that are this thread's.
template <class Form>
__device__ __forceinline__ void add_history(const LongStepCall& call, const LongStepPart<Form>& part,
                                            const int64_t* places, float* taps,
                                            float (&sums)[Form::batch][Form::pack]) {
  using T = typename Form::T;
  constexpr int N = Form::pack;
  const int lane = static_cast<int>(threadIdx.x) % lanes, slot = static_cast<int>(threadIdx.x) / lanes;
  const int64_t channel = part.first_channel + lane * N;
  for (int64_t lag = part.begin; lag < part.end; lag += chunk) {
    load_taps<Form>(call, part, lag, taps);
    __syncthreads();
#pragma unroll (Form::batch == 1 ? chunk / slots : 1)
    for (int j = slot; j < chunk; j += slots) {
      Words<T, N> past[Form::batch];
#pragma unroll
      for (int s = 0; s < Form::batch; ++s) {
        const int64_t row = places[s] - (lag + j);
        const bool there = lag + j > 0 && lag + j < part.end && row >= 0 && channel < call.width;
        past[s].load(call.history.row<const T>(part.first_sequence + s, row) + channel, there);
      }
      float tap[N];
      const float* from = taps + j * Form::pitch + lane * N;
      if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) load<4>(from + i, *reinterpret_cast<float(*)[4]>(tap + i));
      } else {
        load<N>(from, tap);
      }
#pragma unroll
      for (int s = 0; s < Form::batch; ++s) {
        float values[N];
        past[s].unpack(values);
#pragma unroll
        for (int i = 0; i < N; ++i) sums[s][i] += tap[i] * values[i];
      }
    }
    __syncthreads();
  }
}

// The outputs of four channels of a sequence, and their new entries of the history.
template <class Form>
__device__ __forceinline__ void finish(const LongStepCall& call, const LongStepPart<Form>& part,
                                       const int64_t* places, int item, const float (&sum)[4]) {
  using T = typename Form::T;
  const int s = item / (Form::channels / 4);
  const int64_t sequence = part.first_sequence + s, place = places[s];
  if (sequence >= call.batch) return;
  for (int i = 0; i < 4; ++i) {
    const int64_t channel = part.first_channel + item % (Form::channels / 4) * 4 + i;
    if (channel >= call.width) return;
    T* y = call.y.row<T>(sequence, 0) + channel;
    if (place < 0) {
      *y = from_float<T>(NAN);
      continue;
    }
    float u = to_float(call.x.row<const T>(sequence, 0)[channel]);
    if (call.b.data != nullptr) u *= to_float(call.b.row<const T>(sequence, 0)[channel]);
    const T kept = from_float<T>(u);
    float pre = sum[i] + call.skip.at(channel, 0.0f) * u;
    if (call.kernel_length > 0) pre += call.kernel[channel * call.channel_stride] * to_float(kept);
    if (call.c.data != nullptr) pre *= to_float(call.c.row<const T>(sequence, 0)[channel]);
    call.history.row<T>(sequence, place)[channel] = kept;
    *y = from_float<T>(pre);
  }
}

// Adds a unit's splits; `shares` is shared memory for four floats a thread.
template <class Form>
__device__ __forceinline__ void combine(const LongStepCall& call, const LongStepPart<Form>& part,
                                        const int64_t* places, float* shares) {
  constexpr int items = Form::items, teams = items < threads ? threads / items : 1;
  const float* sums = call.sums + part.unit * call.splits * (items * 4);
  const int thread = static_cast<int>(threadIdx.x);
  for (int at = thread; at < teams * items; at += threads) {
    const int team = at / items, item = at % items;
    float sum[4] = {};
#pragma unroll 8
    for (int split = team; split < part.active; split += teams) {
      float share[4];
      load_fresh(sums + (split * items + item) * 4, share);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += share[i];
    }
    if (teams > 1) {
      store<4>(sum, shares + at * 4);
    } else {
      finish<Form>(call, part, places, item, sum);
    }
  }
  if (teams == 1) return;
  __syncthreads();
  if (thread >= items) return;
  float sum[4] = {};
#pragma unroll
  for (int team = 0; team < teams; ++team)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += shares[(team * items + thread) * 4 + i];
  finish<Form>(call, part, places, thread, sum);
}

template <class Form>
__global__ void __launch_bounds__(threads, Form::batch == 1 ? 4 : 3) long_step_kernel(LongStepCall call) {
  constexpr int warps = threads / warp_size, channels = Form::channels;
  alignas(16) __shared__ float buffer[Form::buffer];
  __shared__ int64_t places[Form::batch];
  __shared__ bool last;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Form::batch) {
    const int64_t sequence = LongStepPart<Form>::first_of_block(call) + thread;
    places[thread] = sequence < call.batch ? call.place(sequence) : -1;
  }
  __syncthreads();
  const LongStepPart<Form> part(call, places);
  if (part.split >= part.active) return;
  float sums[Form::batch][Form::pack] = {};
  add_history<Form>(call, part, places, buffer, sums);

  // The warps' sums, then the block's; the taps are done with.
#pragma unroll
  for (int s = 0; s < Form::batch; ++s)
#pragma unroll
    for (int i = 0; i < Form::pack; ++i) {
      const float sum = sums[s][i] + __shfl_xor_sync(all_lanes, sums[s][i], lanes);
      if (thread % warp_size < lanes)
        buffer[(thread / warp_size * Form::batch + s) * channels + thread % lanes * Form::pack + i] = sum;
    }
  __syncthreads();
  for (int item = thread; item < Form::items; item += threads) {
    float sum[4] = {};
#pragma unroll
    for (int warp = 0; warp < warps; ++warp)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += buffer[warp * Form::batch * channels + item * 4 + i];
    if (part.active == 1) {
      finish<Form>(call, part, places, item, sum);
    } else {
      store_global<4>(sum, call.sums + ((part.unit * call.splits + part.split) * Form::items + item) * 4);
    }
  }
  if (part.active == 1) return;
  if (is_last_block(call.counters + part.unit, part.active, last)) combine<Form>(call, part, places, buffer);
}

template <class T, int N, int BATCH>
void run(LongStepCall& call, const Tensor& x) {
  using Form = LongStepForm<T, N, BATCH>;
  const OnDevice on(x);
  const int64_t tiles = ceil_div(call.width, Form::channels), units = tiles * ceil_div(call.batch, BATCH);
  if (units == 0) return;
  const int64_t span = call.capacity < call.kernel_length ? call.capacity : call.kernel_length;
  const int64_t wanted = ceil_div(8 * multiprocessors(on), units), useful = ceil_div(span, least);
  int64_t splits = wanted < useful ? wanted : useful;
  splits = splits < 1 ? 1 : splits > most_splits ? most_splits : splits;
  STD_TORCH_CHECK(units * splits <= INT32_MAX, "batch x channels is too large for one launch");
  call.tiles = static_cast<int>(tiles);
  call.splits = static_cast<int>(splits);
  const dim3 grid(blocks(units * splits));
  if (splits == 1) return launch(on, long_step_kernel<Form>, grid, dim3(threads), 0, call);
  const int64_t counters = ceil_div(units, 4) * 4;
  Tensor workspace = empty_float(x, {counters + units * splits * Form::items * 4});
  call.counters = reinterpret_cast<unsigned*>(floats_in(workspace));
  call.sums = floats_in(workspace) + counters;
  zero(on, call.counters, static_cast<size_t>(units) * sizeof(unsigned));
  launch(on, long_step_kernel<Form>, grid, dim3(threads), 0, call);
}

bool takes_packs_of(const Rows& rows, int64_t width, int64_t bytes, int count) {
  return rows.data == nullptr ||
         (width % count == 0 && takes_packs(rows.data, bytes, count, {rows.batch_stride, rows.row_stride}));
}

// A tensor's position, or else the number.
struct Position {
  int64_t number = 0;
  OptionalTensor tensor;
};

Tensor step(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x, const Tensor& history,
            const Tensor& kernel, const OptionalTensor& skip, const Position& position) {
  DeviceArguments arguments(x);
  STD_TORCH_CHECK(x.dim() == 2 && history.dim() == 3 && kernel.dim() == 2,
                  "x must be (B, D), history (B, Lmax, D) and kernel (D, Lk)");
  const int64_t batch = x.size(0), width = x.size(1);
  arguments.check(history, "history", {batch, -1, width});
  check_dtype(history, "history", x.scalar_type());
  arguments.check(kernel, "kernel", {width, -1});
  STD_TORCH_CHECK(width <= 1 || history.stride(2) == 1, "history's last dimension must be contiguous");
  check_written(history, "history");
  LongStepCall call{batch, width, history.size(1), kernel.size(1)};
  call.position = position.number;
  if (position.tensor) {
    const Tensor& at = *position.tensor;
    STD_TORCH_CHECK(is_here(at) && device_index_of(at) == device_index_of(x), "position is on another device");
    check_position(at, batch);
    call.positions = at.data_ptr();
    call.wide_positions = at.scalar_type() == ScalarType::Long;
    call.position_stride = at.dim() == 1 && at.size(0) > 1 ? at.stride(0) : 0;
  } else {
    STD_TORCH_CHECK(position.number >= 0 && position.number < history.size(1), "position is outside history");
  }
  call.x = arguments.rows(x, "x", {batch, width});
  call.b = arguments.rows(b, "b", {batch, width});
  call.c = arguments.rows(c, "c", {batch, width});
  call.kernel = Weight{kernel.data_ptr(), dtype_of(kernel, "kernel")};
  call.channel_stride = kernel.stride(0);
  call.tap_stride = kernel.stride(1);
  call.skip = arguments.weight(skip, "skip", {width});
  call.history = rows_of(history);
  Tensor y = empty_like_shape(x, {batch, width});
  call.y = rows_of(y);
  STAR_WITH_DTYPE(arguments.dtype(), T, {
    constexpr int N = 16 / sizeof(T);
    if (!takes_packs_of(call.history, width, sizeof(T), N)) {
      run<T, 1, 1>(call, x);
    } else if (batch == 1) {
      run<T, N, 1>(call, x);
    } else {
      run<T, N, 8>(call, x);
    }
  })
  return y;
}

Tensor long_conv_step(Tensor x, Tensor history, Tensor kernel, OptionalTensor skip, int64_t position) {
  return step(std::nullopt, std::nullopt, x, history, kernel, skip, Position{position, std::nullopt});
}

Tensor long_conv_step_tensor(Tensor x, Tensor history, Tensor kernel, OptionalTensor skip, Tensor position) {
  return step(std::nullopt, std::nullopt, x, history, kernel, skip, Position{0, position});
}

Tensor gated_long_conv_step(Tensor b, Tensor c, Tensor x, Tensor history, Tensor kernel, OptionalTensor skip,
                            int64_t position) {
  return step(b, c, x, history, kernel, skip, Position{position, std::nullopt});
}

Tensor gated_long_conv_step_tensor(Tensor b, Tensor c, Tensor x, Tensor history, Tensor kernel,
                                   OptionalTensor skip, Tensor position) {
  return step(b, c, x, history, kernel, skip, Position{0, position});
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) {
  m.impl("long_conv_step", TORCH_BOX(&star::long_conv_step));
  m.impl("long_conv_step.tensor", TORCH_BOX(&star::long_conv_step_tensor));
  m.impl("gated_long_conv_step", TORCH_BOX(&star::gated_long_conv_step));
  m.impl("gated_long_conv_step.tensor", TORCH_BOX(&star::gated_long_conv_step_tensor));
}
