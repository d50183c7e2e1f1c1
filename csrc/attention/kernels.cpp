// Softmax and differential attention; compiled once per instruction-set level.
//
// A task takes a block of queries of one head and holds their whole rows of scores, so the softmax is exact
// in one piece, a difference of two softmaxes needs one product with the values, and the backward pass needs
// nothing of the forward pass:
//   S = q kᵀ,  P = softmax(S),  y = P v                        (two sides: P = P1 - lam P2)
//   dP = dy vᵀ,  dS = P (dP - rowsum(P dP)),  dq = dS k,  dk = dSᵀ q,  dv = Pᵀ dy
//   (two sides: dS2 = -lam P2 (dP - rowsum(P2 dP)),  dlam = -sum(P2 dP))
// Scores are in units of log2: q is scaled by scale · log2(e) once, and e^s is 2^s'. With a softcap q is
// scaled by scale / softcap instead, and the score is softcap · log2(e) · tanh of the product.
#include "kernels.h"

#include "../common/math.h"
#include "tiles.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr float log2_of_e = 1.44269504f;
constexpr float ln_of_2 = 0.693147181f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Strides of the packed copies at this level; cpu.cpp allocates for the widest panel.
struct Layout {
  int64_t keys;         // number of keys, padded to whole panels
  int64_t width;        // head width, padded to whole panels
  int64_t value_width;

  explicit Layout(const Attention& call)
      : keys(round_up(call.keys, panel)),
        width(round_up(call.width, panel)),
        value_width(round_up(call.value_width, panel)) {}
};

// Copies keys [begin, end) of a (keys, width) matrix into panels of keys: [key / panel][d][key % panel].
template <class T>
void pack_across(const HeadRows& source, int64_t batch, int64_t head, int64_t keys, int64_t width,
                 int64_t begin, int64_t end, float* into) {
  for (int64_t key = begin; key < end; ++key) {
    float* to = into + key / panel * width * panel + key % panel;
    if (key < keys) {
      const T* from = source.at<T>(batch, key, head);
      for (int64_t d = 0; d < width; ++d) to[d * panel] = to_float(from[d]);
    } else {
      for (int64_t d = 0; d < width; ++d) to[d * panel] = 0.0f;
    }
  }
}

// Copies keys [begin, end) into panels of the width: [d / panel][key][d % panel], rows and columns zero-padded.
template <class T>
void pack_along(const HeadRows& source, int64_t batch, int64_t head, int64_t keys, int64_t width,
                int64_t padded_keys, int64_t begin, int64_t end, float* into) {
  for (int64_t first = 0; first < width; first += panel) {
    for (int64_t key = begin; key < end; ++key) {
      float* to = into + first * padded_keys + key * panel;
      const int64_t columns = key < keys ? smaller(panel, width - first) : 0;
      const T* from = source.at<T>(batch, smaller(key, keys - 1), head) + first;
      for (int64_t d = 0; d < columns; ++d) to[d] = to_float(from[d]);
      for (int64_t d = columns; d < panel; ++d) to[d] = 0.0f;
    }
  }
}

template <class T>
void pack(const Attention& call, int64_t task) {
  const Layout layout(call);
  const int64_t chunks = (call.keys + key_chunk - 1) / key_chunk;
  const int64_t pair = task / chunks, batch = pair / call.kv_heads, head = pair % call.kv_heads;
  const int64_t begin = task % chunks * key_chunk;
  const int64_t end = smaller(begin + key_chunk, layout.keys);
  for (int side = 0; side < call.sides; ++side) {
    pack_across<T>(call.k[side], batch, head, call.keys, call.width, begin, end,
                   call.keys_across[side] + pair * call.key_stride);
    if (call.keys_along[side])
      pack_along<T>(call.k[side], batch, head, call.keys, call.width, layout.keys, begin, end,
                    call.keys_along[side] + pair * call.key_stride);
  }
  if (call.values_along)
    pack_along<T>(call.v, batch, head, call.keys, call.value_width, layout.keys, begin, end,
                  call.values_along + pair * call.value_stride);
  if (call.values_across)
    pack_across<T>(call.v, batch, head, call.keys, call.value_width, begin, end,
                   call.values_across + pair * call.value_stride);
}

// A block of queries of one head, the keys that each of them sees, and room for its rows of scores.
class Block {
 public:
  int64_t batch, head, kv_pair, first, rows, padded_rows;
  int64_t begin, end;  // keys [begin, end) in whole panels cover what any row sees; empty if none
  int64_t low[query_block], high[query_block];  // row i sees keys [low, high)

  Block(const Attention& call, int64_t batch, int64_t head, int64_t index) : batch(batch), head(head) {
    kv_pair = batch * call.kv_heads + head / (call.heads / call.kv_heads);
    first = index * query_block;
    rows = smaller(query_block, call.queries - first);
    padded_rows = round_up(rows, tile_rows);
    begin = call.keys;
    end = 0;
    for (int64_t i = 0; i < rows; ++i) {
      see(call, i);
      if (low[i] >= high[i]) continue;
      begin = smaller(begin, low[i]);
      end = larger(end, high[i]);
    }
    begin = begin / panel * panel;
    end = begin < end ? round_up(end, panel) : begin;
  }

  int64_t columns() const { return end - begin; }

 private:
  void see(const Attention& call, int64_t i) {
    const int64_t position = first + i + call.keys - call.queries;
    low[i] = 0;
    high[i] = call.keys;
    if (call.offsets) {
      int64_t left = 0, right = call.sequences;  // offsets[left] <= position < offsets[right]
      while (right - left > 1) {
        const int64_t middle = (left + right) / 2;
        (call.offsets[middle] <= position ? left : right) = middle;
      }
      low[i] = call.offsets[left];
      high[i] = call.offsets[left + 1];
    }
    if (call.window) {
      low[i] = larger(low[i], position - call.window + 1);
      high[i] = smaller(high[i], position + call.window);
    }
    if (call.causal) high[i] = smaller(high[i], position + 1);
    if (low[i] > high[i]) low[i] = high[i] = 0;
  }
};

// A thread's working memory, for blocks of at most `columns` keys. Rows of scores are `stride` floats apart
// and have room for a tile of rows behind their end, which stays zero.
struct Workspace {
  int64_t stride, width, value_width;
  float* memory;
  float *q[2], *p[2], *raw[2], *dp, *dy, *out;

  Workspace(const Attention& call, bool backward) {
    const Layout layout(call);
    int64_t columns = layout.keys;
    if (call.window) columns = smaller(columns, 2 * (call.window + query_block + panel));
    stride = round_up(columns, panel) + panel;
    width = layout.width;
    value_width = layout.value_width;
    const int64_t scores = query_block * stride, widest = larger(width, value_width);
    const bool capped = call.softcap != 0.0f;
    memory = new float[call.sides * (query_block * width + scores * (capped && backward ? 2 : 1)) +
                       (backward ? scores + query_block * value_width : 0) + query_block * widest];
    float* next = memory;
    for (int side = 0; side < call.sides; ++side) {
      q[side] = take(next, query_block * width);
      p[side] = take(next, scores);
      raw[side] = capped && backward ? take(next, scores) : nullptr;
    }
    dp = backward ? take(next, scores) : nullptr;
    dy = backward ? take(next, query_block * value_width) : nullptr;
    out = take(next, query_block * widest);
  }
  ~Workspace() { delete[] memory; }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
  static float* take(float*& next, int64_t size) {
    float* taken = next;
    next += size;
    return taken;
  }
};

inline float query_factor(const Attention& call) {
  return call.softcap != 0.0f ? call.scale / call.softcap : call.scale * log2_of_e;
}

// Rows of one head as float32, times a factor; padding rows and columns are zero.
template <class T>
void gather_rows(const HeadRows& source, const Block& block, int64_t width, float factor, int64_t stride,
                 float* into) {
  for (int64_t i = 0; i < block.padded_rows; ++i) {
    float* to = into + i * stride;
    if (i < block.rows) {
      const T* from = source.at<T>(block.batch, block.first + i, block.head);
      for (int64_t d = 0; d < width; ++d) to[d] = factor * to_float(from[d]);
    }
    for (int64_t d = i < block.rows ? width : 0; d < stride; ++d) to[d] = 0.0f;
  }
}

template <class T>
void scatter_rows(const float* from, int64_t stride, const Block& block, int64_t width, float factor,
                  const HeadRows& target) {
  for (int64_t i = 0; i < block.rows; ++i) {
    T* to = target.at<T>(block.batch, block.first + i, block.head);
    for (int64_t d = 0; d < width; ++d) to[d] = from_float<T>(factor * from[i * stride + d]);
  }
}

// products[i, key] = a[i, :] · right[key, :] for the block's rows and keys, from panels of keys.
void multiply_across(const Block& block, const float* a, int64_t a_stride, const float* right, int64_t depth,
                     float* products, int64_t stride) {
  for (int64_t key = block.begin; key < block.end; key += panel)
    for (int64_t i = 0; i < block.padded_rows; i += tile_rows)
      tile_product<false, false>(a + i * a_stride, a_stride, right + key * depth, panel, depth,
                                 products + i * stride + key - block.begin, stride);
}

// out[i, :] = sum over the block's keys of weights[i, key] right[key, :], from panels of the width. Keys go
// by blocks that stay in the first cache while the rows pass over them.
void multiply_along(const Block& block, const float* weights, int64_t stride, const float* right,
                    int64_t padded_keys, int64_t width, float* out) {
  constexpr int64_t depth_block = 128;
  for (int64_t d = 0; d < block.padded_rows * width; ++d) out[d] = 0.0f;
  for (int64_t first = 0; first < width; first += panel) {
    for (int64_t key = block.begin; key < block.end; key += depth_block) {
      const int64_t depth = smaller(depth_block, block.end - key);
      const float* strip = right + first * padded_keys + key * panel;
      for (int64_t i = 0; i < block.padded_rows; i += tile_rows)
        tile_product<false, true>(weights + i * stride + key - block.begin, stride, strip, panel, depth,
                                  out + i * width + first, width);
    }
  }
}

// into[key, :] += sum over the block's rows of weights[i, key] rows[i, :]. `weights` is zero beside the keys.
void multiply_down(const Block& block, const float* weights, int64_t stride, const float* rows, int64_t width,
                   float* into) {
  for (int64_t key = 0; key < block.columns(); key += tile_rows)
    for (int64_t first = 0; first < width; first += panel)
      tile_product<true, true>(weights + key, stride, rows + first, width, block.rows,
                               into + (block.begin + key) * width + first, width);
}

// Turns the products of one row in [low, high) into softcapped scores, keeping tanh of the product in `raw`.
void cap(float* row, float* raw, int64_t low, int64_t high, float softcap) {
#pragma GCC ivdep
  for (int64_t j = low; j < high; ++j) {
    const float t = hyperbolic_tangent(row[j]);
    if (raw) raw[j] = t;
    row[j] = softcap * log2_of_e * t;
  }
}

// In place: row[j] becomes 2^(row[j] - max) in [low, high) and 0 elsewhere in [0, columns). Returns the sum.
float exponentials(float* row, int64_t low, int64_t high, int64_t columns) {
  for (int64_t j = 0; j < low; ++j) row[j] = 0.0f;
  for (int64_t j = high; j < columns; ++j) row[j] = 0.0f;
  if (low >= high) return 0.0f;
  float most = row[low];
#pragma omp simd reduction(max : most)
  for (int64_t j = low; j < high; ++j) most = most > row[j] ? most : row[j];
  // The vectors may reach beyond [low, high): what they write there is zero again below.
  Vector sum{};
  int64_t j = low;
  for (; j + lanes <= high; j += lanes) {
    const Vector power = exponential2(load(row + j) - most);
    store(row + j, power);
    sum += power;
  }
  float total = sum_lanes(sum);
  if (j < high) {
    float rest[lanes];
    store(rest, exponential2(load(row + j) - most));
    for (int64_t i = 0; j < high; ++i, ++j) {
      row[j] = rest[i];
      total += rest[i];
    }
  }
  return total;
}

// The block's softmax weights on each side, into work.p, whole rows; with two sides or `normalise`, divided
// by their sums, else `inverse_sums` is what is left to multiply with.
template <class T>
void softmax_rows(const Attention& call, const Block& block, Workspace& work, bool normalise,
                  float (&inverse_sums)[query_block]) {
  for (int side = 0; side < call.sides; ++side) {
    gather_rows<T>(call.q[side], block, call.width, query_factor(call), work.width, work.q[side]);
    multiply_across(block, work.q[side], work.width, call.keys_across[side] + block.kv_pair * call.key_stride,
                    call.width, work.p[side], work.stride);
    for (int64_t i = 0; i < block.padded_rows; ++i) {
      float* row = work.p[side] + i * work.stride;
      const bool real = i < block.rows && block.low[i] < block.high[i];
      const int64_t low = real ? block.low[i] - block.begin : 0, high = real ? block.high[i] - block.begin : 0;
      if (call.softcap != 0.0f)
        cap(row, work.raw[side] ? work.raw[side] + i * work.stride : nullptr, low, high, call.softcap);
      const float sum = exponentials(row, low, high, block.columns() + panel);
      const float inverse = real ? 1.0f / sum : 0.0f;
      inverse_sums[i] = inverse;
      if (normalise)
        for (int64_t j = low; j < high; ++j) row[j] *= inverse;
    }
  }
}

// P1 - lam P2 into `into` (P1's own place or another).
void subtract_sides(const Attention& call, const Block& block, const Workspace& work, float* into) {
  const float lam = call.lam[block.head];
  for (int64_t i = 0; i < block.padded_rows; ++i) {
    const float* first = work.p[0] + i * work.stride;
    const float* second = work.p[1] + i * work.stride;
    float* row = into + i * work.stride;
#pragma GCC ivdep
    for (int64_t j = 0; j < block.columns(); ++j) row[j] = first[j] - lam * second[j];
  }
}

// The index of a head's n-th task: first, last, second, last but one, ... so that any contiguous share of
// the tasks of a causal head is about as much work as any other.
inline int64_t alternating(int64_t n, int64_t count) { return n % 2 ? count - 1 - n / 2 : n / 2; }

template <class T>
void forward_block(const Attention& call, const Block& block, Workspace& work) {
  const Layout layout(call);
  const bool differential = call.sides == 2;
  float inverse_sums[query_block];
  softmax_rows<T>(call, block, work, differential, inverse_sums);
  if (differential) subtract_sides(call, block, work, work.p[0]);
  multiply_along(block, work.p[0], work.stride, call.values_along + block.kv_pair * call.value_stride,
                 layout.keys, work.value_width, work.out);
  if (!differential)
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t d = 0; d < call.value_width; ++d) work.out[i * work.value_width + d] *= inverse_sums[i];
  scatter_rows<T>(work.out, work.value_width, block, call.value_width, 1.0f, call.y);
}

// One side's gradient of the scores, in place of its weights in work.p: `sign` is 1 or -lam. Returns
// the sum over rows of rowsum(P dP).
float score_gradient(const Attention& call, const Block& block, Workspace& work, int side, float sign) {
  float total = 0.0f;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t low = larger(block.low[i] - block.begin, 0);
    const int64_t high = block.low[i] < block.high[i] ? block.high[i] - block.begin : low;
    float* p = work.p[side] + i * work.stride;
    const float* dp = work.dp + i * work.stride;
    float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
    for (int64_t j = low; j < high; ++j) delta += p[j] * dp[j];
    total += delta;
    if (call.softcap == 0.0f) {
      const float factor = sign * ln_of_2;
#pragma GCC ivdep
      for (int64_t j = low; j < high; ++j) p[j] *= factor * (dp[j] - delta);
    } else {
      const float* t = work.raw[side] + i * work.stride;
      const float factor = sign * call.softcap;
#pragma GCC ivdep
      for (int64_t j = low; j < high; ++j) p[j] *= factor * (1.0f - t[j] * t[j]) * (dp[j] - delta);
    }
  }
  return total;
}

template <class T>
void backward_block(const AttentionBackward& call, const Block& block, Workspace& work, float* const dk[2],
                    float* dv, float* dlam) {
  const Attention& forward = call.forward;
  const Layout layout(forward);
  const bool differential = forward.sides == 2;
  float inverse_sums[query_block];
  softmax_rows<T>(forward, block, work, true, inverse_sums);
  gather_rows<T>(call.dy, block, forward.value_width, 1.0f, work.value_width, work.dy);

  const float lam = differential ? forward.lam[block.head] : 0.0f;
  if (differential) {  // work.dp is free until dP is there: it holds P1 - lam P2
    for (int64_t i = 0; i < block.padded_rows; ++i)
      for (int64_t j = block.columns(); j < work.stride && j < block.columns() + panel; ++j)
        work.dp[i * work.stride + j] = 0.0f;
    subtract_sides(forward, block, work, work.dp);
  }
  multiply_down(block, differential ? work.dp : work.p[0], work.stride, work.dy, work.value_width, dv);
  multiply_across(block, work.dy, work.value_width,
                  forward.values_across + block.kv_pair * forward.value_stride, forward.value_width, work.dp,
                  work.stride);
  for (int side = 0; side < forward.sides; ++side) {
    const float total = score_gradient(forward, block, work, side, side == 0 ? 1.0f : -lam);
    if (side == 1) *dlam = -total;
    multiply_down(block, work.p[side], work.stride, work.q[side], work.width, dk[side]);
    multiply_along(block, work.p[side], work.stride, forward.keys_along[side] + block.kv_pair * forward.key_stride,
                   layout.keys, work.width, work.out);
    scatter_rows<T>(work.out, work.width, block, forward.width, query_factor(forward), call.dq[side]);
  }
}

template <class T>
void backward_task(const AttentionBackward& call, int64_t task, Workspace& work) {
  const Attention& forward = call.forward;
  const int64_t pair = task / call.splits, split = task % call.splits;
  const int64_t batch = pair / forward.kv_heads, group = forward.heads / forward.kv_heads;
  const int64_t blocks = (forward.queries + query_block - 1) / query_block;
  float* dk[2];
  for (int side = 0; side < forward.sides; ++side) {
    dk[side] = call.dk_parts[side] + task * forward.key_stride;
    for (int64_t i = 0; i < forward.key_stride; ++i) dk[side][i] = 0.0f;
  }
  float* dv = call.dv_parts + task * forward.value_stride;
  for (int64_t i = 0; i < forward.value_stride; ++i) dv[i] = 0.0f;
  for (int64_t member = 0; member < group; ++member) {
    const int64_t head = pair % forward.kv_heads * group + member;
    for (int64_t index = split; index < blocks; index += call.splits) {
      const Block block(forward, batch, head, index);
      float ignored;
      backward_block<T>(call, block, work, dk, dv,
                        call.dlam_parts ? call.dlam_parts + (batch * forward.heads + head) * blocks + index
                                        : &ignored);
    }
  }
}

template <class T>
void write_rows(const HeadRows& target, int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t width,
                const float* parts, int64_t splits, int64_t part_stride, int64_t row_stride) {
  for (int64_t key = begin; key < end; ++key) {
    T* to = target.at<T>(batch, key, head);
    for (int64_t d = 0; d < width; ++d) {
      float sum = 0.0f;
      for (int64_t split = 0; split < splits; ++split) sum += parts[split * part_stride + key * row_stride + d];
      to[d] = from_float<T>(sum);
    }
  }
}

template <class T>
void write_task(const AttentionBackward& call, int64_t task) {
  const Attention& forward = call.forward;
  const Layout layout(forward);
  const int64_t chunks = (forward.keys + key_chunk - 1) / key_chunk;
  const int64_t pair = task / chunks, batch = pair / forward.kv_heads, head = pair % forward.kv_heads;
  const int64_t begin = task % chunks * key_chunk, end = smaller(begin + key_chunk, forward.keys);
  for (int side = 0; side < forward.sides; ++side)
    write_rows<T>(call.dk[side], batch, head, begin, end, forward.width,
                  call.dk_parts[side] + pair * call.splits * forward.key_stride, call.splits, forward.key_stride,
                  layout.width);
  write_rows<T>(call.dv, batch, head, begin, end, forward.value_width,
                call.dv_parts + pair * call.splits * forward.value_stride, call.splits, forward.value_stride,
                layout.value_width);
}

}  // namespace

void attention_pack(const Attention& call, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    STAR_WITH_DTYPE(call.dtype, T, { pack<T>(call, task); })
  }
}

void attention_forward(const Attention& call, int64_t begin, int64_t end) {
  const int64_t blocks = (call.queries + query_block - 1) / query_block;
  Workspace work(call, false);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / blocks;
    const Block block(call, pair / call.heads, pair % call.heads, alternating(task % blocks, blocks));
    STAR_WITH_DTYPE(call.dtype, T, { forward_block<T>(call, block, work); })
  }
}

void attention_backward(const AttentionBackward& call, int64_t begin, int64_t end) {
  Workspace work(call.forward, true);
  for (int64_t task = begin; task < end; ++task) {
    STAR_WITH_DTYPE(call.forward.dtype, T, { backward_task<T>(call, task, work); })
  }
}

void attention_write_backward(const AttentionBackward& call, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    STAR_WITH_DTYPE(call.forward.dtype, T, { write_task<T>(call, task); })
  }
}

}  // namespace STAR_LEVEL
}  // namespace star
