// Attention of one query over a cache; compiled once per instruction-set level.
//
// Keys go by in blocks; the running softmax of each query head keeps its maximum m, its sum l and the weighted
// sum of values a, all scaled by e^m:  m' = max(m, s),  (l, a) = (l, a) e^(m - m') + e^(s - m') (1, v).
// Everything lives on the stack: a step allocates nothing.
#include "decode_kernels.h"

#include "../common/math.h"
#include "../common/vector.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr int64_t key_block = 64;
constexpr int64_t most_sums = 2048;  // floats of weighted sums held at once
constexpr float log2_of_e = 1.44269504f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// scores[j] = factor * q · k_j for `count` keys, a row of k every `stride` elements.
template <class T>
void score_keys(const T* q, const T* k, int64_t stride, int64_t count, int64_t width, float factor,
                float* scores) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const T* row = k + j * stride;
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f, s4 = 0.0f, s5 = 0.0f, s6 = 0.0f, s7 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6, s7)
    for (int64_t d = 0; d < width; ++d) {
      const float value = to_float(q[d]);
      s0 += value * to_float(row[d]);
      s1 += value * to_float(row[stride + d]);
      s2 += value * to_float(row[2 * stride + d]);
      s3 += value * to_float(row[3 * stride + d]);
      s4 += value * to_float(row[4 * stride + d]);
      s5 += value * to_float(row[5 * stride + d]);
      s6 += value * to_float(row[6 * stride + d]);
      s7 += value * to_float(row[7 * stride + d]);
    }
    const float eight[8] = {s0, s1, s2, s3, s4, s5, s6, s7};
    for (int64_t i = 0; i < 8; ++i) scores[j + i] = factor * eight[i];
  }
  for (; j < count; ++j) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += to_float(q[d]) * to_float(k[j * stride + d]);
    scores[j] = factor * sum;
  }
}

// sums += sum over j of weights[j] v_j.
template <class T>
void add_values(const float* weights, const T* v, int64_t stride, int64_t count, int64_t width, float* sums) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T* row = v + j * stride;
    const float w0 = weights[j], w1 = weights[j + 1], w2 = weights[j + 2], w3 = weights[j + 3];
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d)
      sums[d] += w0 * to_float(row[d]) + w1 * to_float(row[stride + d]) + w2 * to_float(row[2 * stride + d]) +
                 w3 * to_float(row[3 * stride + d]);
  }
  for (; j < count; ++j) {
    const float weight = weights[j];
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d) sums[d] += weight * to_float(v[j * stride + d]);
  }
}

// Replaces scores by 2^(score - maximum), the maximum over them and `most`, which becomes it. Returns the sum.
// `scores` has room for whole vectors.
float exponentials(float* scores, int64_t count, float& most) {
  for (int64_t j = 0; j < count; ++j) most = scores[j] > most ? scores[j] : most;
  const int64_t whole = (count + lanes - 1) / lanes * lanes;
  for (int64_t j = count; j < whole; ++j) scores[j] = most;
  float sum = 0.0f;
  for (int64_t j = 0; j < whole; j += lanes) store(scores + j, exponential2(load(scores + j) - most));
  for (int64_t j = 0; j < count; ++j) sum += scores[j];
  return sum;
}

// Replaces scores by softcap tanh(score / softcap), in units of log2; `factor` has brought them in.
void cap(float* scores, int64_t count, float softcap) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) scores[j] = softcap * log2_of_e * hyperbolic_tangent(scores[j]);
}

// The heads of one sequence that a pass takes: query heads [first, first + members) of one key head, value
// columns [column, column + columns).
struct Part {
  int64_t batch, kv_head, first, members, column, columns;
};

// The softmax of one side over the values, (members, columns) into `sums`.
template <class T>
void attend(const AttentionDecode& call, int side, const Part& part, float* sums) {
  float scores[key_block], most[most_sums], total[most_sums];
  for (int64_t i = 0; i < part.members * part.columns; ++i) sums[i] = 0.0f;
  const int64_t end = call.lengths ? call.lengths[part.batch] : call.length;
  int64_t key = call.window && call.window < end ? end - call.window : 0;
  if (key >= end) return;
  const float factor = call.softcap != 0.0f ? call.scale / call.softcap : call.scale * log2_of_e;
  for (bool begun = false; key < end; key += key_block, begun = true) {
    const int64_t count = smaller(key_block, end - key);
    for (int64_t member = 0; member < part.members; ++member) {
      float* sum = sums + member * part.columns;
      score_keys(call.q[side].at<T>(part.batch, 0, part.first + member),
                 call.k[side].at<T>(part.batch, key, part.kv_head), call.k[side].row_stride, count, call.width,
                 factor, scores);
      if (call.softcap != 0.0f) cap(scores, count, call.softcap);
      float maximum = begun ? most[member] : scores[0];
      const float added = exponentials(scores, count, maximum);
      if (begun && maximum != most[member]) {
        float factors[lanes];
        store(factors, exponential2(broadcast(most[member] - maximum)));
        total[member] *= factors[0];
        for (int64_t d = 0; d < part.columns; ++d) sum[d] *= factors[0];
      }
      total[member] = begun ? total[member] + added : added;
      most[member] = maximum;
      add_values(scores, call.v.at<T>(part.batch, key, part.kv_head) + part.column, call.v.row_stride, count,
                 part.columns, sum);
    }
  }
  for (int64_t member = 0; member < part.members; ++member) {
    const float inverse = 1.0f / total[member];
    for (int64_t d = 0; d < part.columns; ++d) sums[member * part.columns + d] *= inverse;
  }
}

template <class T>
void decode(const AttentionDecode& call, const Part& part) {
  float sums[most_sums], second[most_sums];
  attend<T>(call, 0, part, sums);
  if (call.sides == 2) {
    attend<T>(call, 1, part, second);
    for (int64_t member = 0; member < part.members; ++member) {
      const float lam = call.lam[part.first + member];
      for (int64_t i = member * part.columns; i < (member + 1) * part.columns; ++i) sums[i] -= lam * second[i];
    }
  }
  for (int64_t member = 0; member < part.members; ++member) {
    T* y = call.y.at<T>(part.batch, 0, part.first + member) + part.column;
    for (int64_t d = 0; d < part.columns; ++d) y[d] = from_float<T>(sums[member * part.columns + d]);
  }
}

template <class T>
void decode_task(const AttentionDecode& call, int64_t task) {
  Part part;
  part.batch = task / call.kv_heads;
  part.kv_head = task % call.kv_heads;
  for (part.column = 0; part.column < call.value_width; part.column += most_sums) {
    part.columns = smaller(most_sums, call.value_width - part.column);
    const int64_t together = smaller(call.group, most_sums / part.columns);
    for (int64_t member = 0; member < call.group; member += together) {
      part.first = part.kv_head * call.group + member;
      part.members = smaller(together, call.group - member);
      decode<T>(call, part);
    }
  }
}

}  // namespace

void attention_decode(const AttentionDecode& call, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    STAR_WITH_DTYPE(call.dtype, T, { decode_task<T>(call, task); })
  }
}

}  // namespace STAR_LEVEL
}  // namespace star
