// What the passes over matrix-valued states share: staging of a chunk of tokens in float32, and tiles of
// states. Include only from kernel files.
#pragma once

#include "../common/math.h"
#include "../common/vector.h"
#include "kernels.h"
#include "staging.h"

namespace star {
namespace STAR_LEVEL {
namespace {

// to[t, 0:width] = factor from[time + t, head, first:first+width] for a chunk of tokens; rows of `to` are
// `stride` apart. The walk comes next to tokens that are `ahead` away, and so do prefetches.
template <class T>
void stage(float* to, int64_t stride, const Heads& from, int64_t batch, int64_t time, int64_t head,
           int64_t first, int64_t width, int64_t tokens, int64_t ahead, float factor = 1.0f) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = from.at<T>(batch, time + t, head) + first;
    prefetch(row, width, ahead * from.row_stride);
    float* into = to + t * stride;
    for (int64_t i = 0; i < width; ++i) into[i] = factor * to_float(row[i]);
  }
}

template <class T>
void unstage(const float* from, int64_t stride, const Heads& to, int64_t batch, int64_t time, int64_t head,
             int64_t first, int64_t width, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t) {
    T* row = to.at<T>(batch, time + t, head) + first;
    const float* values = from + t * stride;
    for (int64_t i = 0; i < width; ++i) row[i] = from_float<T>(values[i]);
  }
}

// exp(g) of a chunk for key dimensions first:first+width, the same in all where a head has one decay.
inline void stage_decay(float* to, int64_t stride, const MatrixState& call, int64_t batch, int64_t time,
                        int64_t head, int64_t first, int64_t width, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* into = to + t * stride;
    if (call.log_decay.data == nullptr) {
      for (int64_t i = 0; i < width; ++i) into[i] = 1.0f;
      continue;
    }
    const float* g = call.log_decay.at<float>(batch, time + t, head);
    if (call.decay_of_keys) {
      for (int64_t i = 0; i < width; ++i) into[i] = exponential(g[first + i]);
    } else {
      const float decay = exponential(g[0]);
      for (int64_t i = 0; i < width; ++i) into[i] = decay;
    }
  }
}

// Calls function(Count<V>) with the number of vectors that hold `width` lanes: 1, 2, 4 or 8.
template <int V>
struct Count {
  static constexpr int value = V;
};

template <class Function>
inline void with_vectors(int64_t width, const Function& function) {
  const int64_t vectors = (width + lanes - 1) / lanes;
  if (vectors <= 1) function(Count<1>());
  else if (vectors <= 2) function(Count<2>());
  else if (vectors <= 4) function(Count<4>());
  else function(Count<8>());
}

// One sequence, one head and one tile of a pass.
struct Place {
  int64_t sequence, batch, start, end, head, key_head, tile;

  Place(const MatrixState& call, int64_t task, int64_t tiles) {
    tile = task % tiles;
    head = task / tiles % call.heads;
    key_head = head / (call.heads / call.key_heads);
    sequence = task / (tiles * call.heads);
    batch = call.spans.batch(sequence);
    start = call.spans.start(sequence);
    end = call.spans.end(sequence);
  }
};

}  // namespace
}  // namespace STAR_LEVEL
}  // namespace star
