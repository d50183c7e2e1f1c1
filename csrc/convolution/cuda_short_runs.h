// The short convolution of whole sequences on a GPU: arguments, sequences, runs of rows, checks.
// Include from cuda_short*.cu only.
//
// A thread takes neighbouring channels and goes along some consecutive rows ("a run"), the last K of which it
// keeps in registers, so that every input is read once but for the K-1 rows around a run. Rows before a
// sequence's start are those of its initial state, or zeros. Other blocks of the same launch make the states.
#pragma once

#include "cuda_short.h"
#include "../common/cuda/words.h"

namespace star {
namespace {

constexpr int runs = 4;  // of a block: one a warp
constexpr int run_threads = runs * warp_size;

struct ShortConvCall {
  int64_t batch, length, width;
  int taps;
  bool silu;
  Rows x, b, c;  // b and c have no data where there are no gates
  Rows state;    // (S, K-1, D) of u before the first row; no data: zeros
  Weight weight, bias;
  DeviceSequences sequences;
  int64_t run_rows;    // of a run
  int64_t run_blocks;  // a batch entry
  int tiles;           // of channels
  Rows y, final_state;

  // Backward only.
  Rows dy, dfinal;  // dfinal has no data where the final state has no gradient
  Rows dx, db, dc, dstate;
  float* parts;     // (parts, K+1, D): the rows' shares of the weight's and the bias's gradient
};

// The sequence that a row is in. Offsets that do not rise from 0 to L lead to no access outside the tensors.
struct Place {
  int64_t batch, sequence, start, end;

  __device__ __forceinline__ Place(const DeviceSequences& sequences, int64_t batch, int64_t time)
      : batch(batch), sequence(batch), start(0), end(sequences.length) {
    if (sequences.offsets == nullptr) return;
    int64_t low = 0, high = sequences.count;  // offsets[low] <= time < offsets[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (sequences.clamped(middle) <= time ? low : high) = middle;
    }
    enter(sequences, low, time);
    const int64_t begin = sequences.clamped(low);
    start = begin < time ? begin : time;
  }

  // The sequence that starts at the row where this one ends.
  __device__ __forceinline__ void advance(const DeviceSequences& sequences) {
    int64_t next = sequence + 1 < sequences.count ? sequence + 1 : sequence;
    while (next + 1 < sequences.count && sequences.clamped(next + 1) <= end) ++next;
    enter(sequences, next, end);
  }

 private:
  __device__ __forceinline__ void enter(const DeviceSequences& sequences, int64_t which, int64_t time) {
    sequence = which;
    start = time;
    end = sequences.clamped(which + 1);
    if (end <= time) end = sequences.length;
  }
};

// A whole sequence, empty or not.
struct Extent {
  int64_t batch, start, end;
  __device__ __forceinline__ Extent(const DeviceSequences& sequences, int64_t sequence)
      : batch(sequences.batch(sequence)), start(sequences.start(sequence)), end(sequences.end(sequence)) {
    start = start < end ? start : end;
  }
};

// u of a row of the sequence, or before its start the state's.
template <class T, int N>
__device__ __forceinline__ void load_source(const ShortConvCall& call, int64_t batch, int64_t sequence,
                                            int64_t start, int64_t row, int64_t d, float (&u)[N]) {
  if (row >= start) {
    load<N>(call.x.row<const T>(batch, row) + d, u);
    if (call.b.data == nullptr) return;
    float gate[N];
    load<N>(call.b.row<const T>(batch, row) + d, gate);
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] *= gate[i];
  } else if (call.state.data != nullptr) {
    load<N>(call.state.row<const T>(sequence, row - start + call.taps - 1) + d, u);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = 0.0f;
  }
}

// The K-1 sources before row `time`.
template <class T, int N, int TAPS>
__device__ __forceinline__ void load_window(const ShortConvCall& call, const Place& place, int64_t time, int64_t d,
                                            float (&window)[TAPS][N]) {
#pragma unroll
  for (int k = 0; k < TAPS - 1; ++k)
    load_source<T, N>(call, place.batch, place.sequence, place.start, time - (TAPS - 1) + k, d, window[k]);
}

template <int N, int TAPS>
__device__ __forceinline__ void shift(float (&window)[TAPS][N]) {
#pragma unroll
  for (int k = 0; k < TAPS - 1; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) window[k][i] = window[k + 1][i];
}

// Which channels, sequence or run a thread has.
struct Share {
  int64_t channel, group;
  int run;
  __device__ __forceinline__ Share(const ShortConvCall& call, int pack)
      : channel((static_cast<int64_t>(blockIdx.x % call.tiles) * warp_size + threadIdx.x % warp_size) * pack),
        group(blockIdx.x / call.tiles),
        run(static_cast<int>(threadIdx.x) / warp_size) {}
};

// Rows [begin, end) of a batch entry.
struct Run {
  int64_t batch, begin, end;
  __device__ __forceinline__ Run(const ShortConvCall& call, const Share& share)
      : batch(share.group / call.run_blocks),
        begin((share.group % call.run_blocks * runs + share.run) * call.run_rows),
        end(begin + call.run_rows < call.length ? begin + call.run_rows : call.length) {}
};

// pre of one row, from memory: for any number of taps.
template <class T>
__device__ __forceinline__ float pre_of(const ShortConvCall& call, int64_t batch, int64_t sequence, int64_t start,
                                        int64_t row, int64_t d) {
  float sum = call.bias.at(d, 0.0f);
  for (int k = 0; k < call.taps; ++k) {
    float u[1];
    load_source<T, 1>(call, batch, sequence, start, row - (call.taps - 1) + k, d, u);
    sum += call.weight[d * call.taps + k] * u[0];
  }
  return sum;
}

// Checks what forward and backward share, and lays out the call.
ShortConvCall describe(DeviceArguments& arguments, const OptionalTensor& b, const OptionalTensor& c, const Tensor& x,
                       const Tensor& weight, const OptionalTensor& bias, bool silu, const OptionalTensor& state,
                       const OptionalTensor& cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must be (B, L, D) and weight (D, K)");
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), taps = weight.size(1);
  STD_TORCH_CHECK(taps >= 1 && taps <= INT32_MAX - 1, "weight must have at least one tap");
  ShortConvCall call{batch, length, width, static_cast<int>(taps), silu};
  call.sequences = arguments.sequences(cu_seqlens, batch, length);
  STD_TORCH_CHECK(call.sequences.count > 0 || batch * length == 0, "cu_seqlens has no sequence");
  call.x = arguments.rows(x, "x", {batch, length, width});
  call.b = arguments.rows(b, "b", {batch, length, width});
  call.c = arguments.rows(c, "c", {batch, length, width});
  call.weight = arguments.weight(weight, "weight", {width, taps});
  call.bias = arguments.weight(bias, "bias", {width});
  if (state) {
    arguments.check(*state, "initial_state", {call.sequences.count, taps - 1, width});
    const Tensor& same = arguments.keep(torch::stable::to(*state, x.scalar_type()));
    call.state = rows_of(arguments.keep(torch::stable::contiguous(same)));
  }
  return call;
}

// Runs short enough for all multiprocessors to have some, and tiles of `channels` channels.
void divide(ShortConvCall& call, const OnDevice& on, int channels) {
  call.tiles = static_cast<int>(ceil_div(call.width, channels));
  call.run_rows = 32;
  const int64_t wanted = 4 * multiprocessors(on);
  while (call.run_rows > 8 &&
         call.batch * ceil_div(call.length, runs * call.run_rows) * call.tiles < wanted)
    call.run_rows /= 2;
  call.run_blocks = ceil_div(call.length, runs * call.run_rows);
}

// Blocks for the runs, and for the sequences' states where there are any to make.
dim3 grid_of(const ShortConvCall& call, bool states) {
  const int64_t groups = call.batch * call.run_blocks +
                         (states && call.taps > 1 ? ceil_div(call.sequences.count, runs) : 0);
  STD_TORCH_CHECK(groups * call.tiles <= INT32_MAX, "batch x length x channels is too large for one launch");
  return dim3(blocks(groups * call.tiles));
}

template <class T>
bool all_take_packs(const ShortConvCall& call, int count) {
  for (const Rows& rows : {call.x, call.b, call.c, call.state, call.y, call.final_state, call.dy, call.dfinal,
                           call.dx, call.db, call.dc})
    if (!rows_take_packs(rows, call.width, sizeof(T), count)) return false;
  return taps_take_fours(call.weight) && taps_take_fours(call.bias) && call.taps >= 2 && call.taps <= 4;
}

}  // namespace
}  // namespace star
