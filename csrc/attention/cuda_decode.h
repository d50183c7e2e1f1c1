// Attention of one query over a cache on a GPU: arguments, forms, what a block does, and how splits are put
// together. Include from cuda_decode.cu only.
#pragma once

#include "../common/cuda/arguments.h"
#include "../common/cuda/splits.h"
#include "../common/cuda/words.h"

#include <cfloat>
#include <cmath>

namespace star {
namespace {

constexpr int threads = 128;
constexpr int warps = threads / warp_size;
constexpr int most_splits = 256;
constexpr float log2_of_e = 1.44269504f;

// A (B, rows, heads, width) tensor whose last dimension is contiguous; strides count elements.
struct CacheRows {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;

  template <class T>
  __device__ __forceinline__ T* at(int64_t batch, int64_t row, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + row * row_stride + head * head_stride;
  }
};

struct DecodeCall {
  CacheRows q, k, v, y;     // q and y have one row
  const int32_t* lengths;   // (B,)
  int64_t capacity, window; // window 0: none
  int width, value_width, kv_heads, group;
  int tiles;    // blocks that share a key head's query heads, and in the general form its columns
  int splits;   // at most, for a sequence
  float factor; // of q·k, to units of log2
  unsigned* counters;  // a unit, that is, a (sequence, key head, tile)
  float* stats;        // (units, splits, heads of a block, 2): m and l
  float* sums;         // (units, splits, heads of a block, columns of a block): a
};

// What a block does: entries [first, last) of one sequence and key head.
struct Part {
  int64_t batch, kv_head, tile, split, active, first, last;
  int64_t unit;

  // `step`: a split's share is a multiple of it; `least`: the entries for which another split is worth it.
  __device__ __forceinline__ Part(const DecodeCall& call, int64_t step, int64_t least) {
    unsigned rest = blockIdx.x;
    tile = rest % call.tiles;
    rest /= call.tiles;
    kv_head = rest % call.kv_heads;
    rest /= call.kv_heads;
    split = rest % call.splits;
    batch = rest / call.splits;
    unit = (batch * call.kv_heads + kv_head) * call.tiles + tile;
    int64_t end = call.lengths[batch];
    end = end < 0 ? 0 : end > call.capacity ? call.capacity : end;
    const int64_t begin = call.window != 0 && call.window < end ? end - call.window : 0;
    active = (end - begin + least - 1) / least;
    active = active < 1 ? 1 : active > call.splits ? call.splits : active;
    const int64_t share = ((end - begin + active - 1) / active + step - 1) / step * step;
    first = begin + split * share;
    last = first + share < end ? first + share : end;
  }
};

// The form for rows of whole 16-byte packs: LANES lanes take PACKS packs each of an entry, a block HEADS heads,
// a warp ROWS entries a group of lanes at once.
template <class Element, int LANES, int PACKS, int HEADS, int ROWS>
struct PackedForm {
  using T = Element;
  static constexpr int lanes = LANES, packs = PACKS, heads = HEADS, rows = ROWS;
  static constexpr int pack = 16 / sizeof(T), groups = warp_size / LANES;
  static constexpr int columns = LANES * PACKS * pack, quads = columns / 4;
  static constexpr int entries = groups * ROWS;      // that a warp takes at once
  static constexpr int least = 2 * warps * entries;  // that another split is worth
  // Blocks on a multiprocessor at once: bounds registers, and these the entries on their way.
  static constexpr int together = HEADS > 4 ? 2 : PACKS > 1 ? 3 : 4;

  // The columns of an entry lie as the lanes need them, four by four: lane after lane for the first four of
  // each pack, then for the next four.
  static __device__ __forceinline__ int quad(int lane, int i, int part) {
    return (i * (pack / 4) + part) * LANES + lane;
  }
  static __device__ __forceinline__ int column(const Part&, const DecodeCall&, int quad, int element) {
    const int lane = quad % LANES, i = quad / LANES / (pack / 4), part = quad / LANES % (pack / 4);
    return (i * LANES + lane) * pack + part * 4 + element;
  }
  static __device__ __forceinline__ int first_member(const Part& part, const DecodeCall&) {
    return static_cast<int>(part.tile) * HEADS;
  }
};

// The form for any rows: a block takes one query head and 512 columns, a thread four of them.
template <class Element>
struct GeneralForm {
  using T = Element;
  static constexpr int heads = 1, columns = 4 * threads, quads = threads;
  static constexpr int entries = 32;  // that a block takes at once
  static constexpr int least = 2 * entries;

  static __device__ __forceinline__ int column_tiles(const DecodeCall& call) {
    return (call.value_width + columns - 1) / columns;
  }
  static __device__ __forceinline__ int column(const Part& part, const DecodeCall& call, int quad, int element) {
    return static_cast<int>(part.tile) % column_tiles(call) * columns + element * threads + quad;
  }
  static __device__ __forceinline__ int first_member(const Part& part, const DecodeCall& call) {
    return static_cast<int>(part.tile) / column_tiles(call);
  }
};

// Four columns of a query head's result.
template <class Form>
__device__ __forceinline__ void write_quad(const DecodeCall& call, const Part& part, int head, int quad,
                                           const float (&values)[4]) {
  using T = typename Form::T;
  const int member = Form::first_member(part, call) + head;
  if (member >= call.group) return;
  T* y = call.y.at<T>(part.batch, 0, part.kv_head * call.group + member);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = Form::column(part, call, quad, i);
    if (column < call.value_width) y[column] = from_float<T>(values[i]);
  }
}

// 1 / l, and 0 for a sequence of length 0, whose sums are 0 as well.
__device__ __forceinline__ float inverse_of(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// Puts a unit's splits together; `weights` is shared memory for heads * most_splits floats.
template <class Form>
__device__ __forceinline__ void combine(const DecodeCall& call, const Part& part, float* weights) {
  constexpr int heads = Form::heads, quads = Form::quads, items = heads * quads;
  constexpr int teams = items < threads ? threads / items : 1;
  const int active = static_cast<int>(part.active);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size;
  const float* stats = call.stats + part.unit * call.splits * (2 * heads);
  const float* sums = call.sums + part.unit * call.splits * (heads * Form::columns);
  for (int head = thread / warp_size; head < heads; head += warps) {
    float most = -FLT_MAX, total = 0.0f;
    for (int split = lane; split < active; split += warp_size)
      most = fmaxf(most, load_fresh(stats + (split * heads + head) * 2));
    most = warp_maximum(most);
    for (int split = lane; split < active; split += warp_size) {
      const float* stat = stats + (split * heads + head) * 2;
      const float weight = fast_exp2(load_fresh(stat) - most);
      total += weight * load_fresh(stat + 1);
      weights[head * most_splits + split] = weight;
    }
    const float inverse = inverse_of(warp_sum(total));
    for (int split = lane; split < active; split += warp_size) weights[head * most_splits + split] *= inverse;
  }
  __syncthreads();
  alignas(16) __shared__ float shares[teams > 1 ? threads * 4 : 4];
  for (int item = thread % (teams * items); item < teams * items; item += threads) {
    const int team = item / items, head = item % items / quads, quad = item % quads;
    float sum[4] = {};
#pragma unroll 4
    for (int split = team; split < active; split += teams) {
      float share[4];
      load_fresh(sums + ((split * heads + head) * static_cast<int64_t>(Form::columns) + quad * 4), share);
      const float weight = weights[head * most_splits + split];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += weight * share[i];
    }
    if (teams > 1) {
      store<4>(sum, shares + item * 4);
    } else {
      write_quad<Form>(call, part, head, quad, sum);
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
  write_quad<Form>(call, part, thread / quads, thread % quads, sum);
}

// Four columns of what the block found for a head: the result, or, where there are other splits, their share.
template <class Form>
__device__ __forceinline__ void deliver(const DecodeCall& call, const Part& part, int head, int quad, float most,
                                        float total, float (&sum)[4]) {
  if (part.active == 1) {
    const float inverse = inverse_of(total);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] *= inverse;
    return write_quad<Form>(call, part, head, quad, sum);
  }
  const int64_t row = (part.unit * call.splits + part.split) * Form::heads + head;
  store_global<4>(sum, call.sums + row * Form::columns + quad * 4);
  if (quad == 0) {
    call.stats[row * 2] = most;
    call.stats[row * 2 + 1] = total;
  }
}

}  // namespace
}  // namespace star
