// Gated linear attention and the gated delta rule on the CPU: the backward pass over rows of S, for the
// gradients that are sums over its columns; compiled once per instruction-set level.
//
// With u_t known (v_t, or beta_t e_t) S is a linear recurrence, and so is its gradient with w_t = beta_t du_t:
//   S_t = a S_{t-1} + k u^T         dS = C + q dy^T,  E = dS - k w^T,  C = a E       (E = dS, w = 0: linear)
//   dq = S_t dy,   dk = dS u - (a S_{t-1}) w,   dg = rows of (a S_{t-1} * E) summed
// Lanes are rows of S, so that sums over columns need no sums over lanes. The walk forward leaves dq, and S
// at each chunk's start; the walk backward recomputes the S of one chunk at a time.
#include "matrix_state.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr int64_t row_tile = 16;  // rows of S a task: cpu.cpp's row_tile
constexpr int64_t V = row_tile > lanes ? row_tile / lanes : 1;
constexpr int64_t tile = V * lanes;

struct Staged {
  Scratch buffer;
  float *q, *k, *a, *dq, *dk, *dg;  // (chunk, tile)
  float *u, *dy, *w;                // (chunk, Dv)
  float *beta;

  explicit Staged(int64_t values) : buffer(6 * chunk * tile + 3 * chunk * values + chunk) {
    float** tiles[6] = {&q, &k, &a, &dq, &dk, &dg};
    float** rows[3] = {&u, &dy, &w};
    float* next = buffer.data;
    for (float** one : tiles) *one = next, next += chunk * tile;
    for (float** one : rows) *one = next, next += chunk * values;
    beta = next;
  }
};

// S^T is (Dv, tile). Adds the outputs dq of the tokens.
void walk_forward(float* S, const Staged& at, int64_t values, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float *u = at.u + t * values, *dy = at.dy + t * values;
    Vector a[V], k[V], dq[V] = {};
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v)
      a[v] = load(at.a + t * tile + v * lanes), k[v] = load(at.k + t * tile + v * lanes);
    for (int64_t j = 0; j < values; ++j) {
      float* row = S + j * tile;
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) {
        const Vector s = a[v] * load(row + v * lanes) + k[v] * u[j];
        store(row + v * lanes, s);
        dq[v] += s * dy[j];
      }
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) store(at.dq + t * tile + v * lanes, dq[v]);
  }
}

// history[t] = S before token t; history[0] is there.
void recompute(float* history, const Staged& at, int64_t values, int64_t tokens) {
  for (int64_t t = 0; t + 1 < tokens; ++t) {
    const float *u = at.u + t * values, *before = history + t * values * tile;
    float* after = history + (t + 1) * values * tile;
    Vector a[V], k[V];
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v)
      a[v] = load(at.a + t * tile + v * lanes), k[v] = load(at.k + t * tile + v * lanes);
    for (int64_t j = 0; j < values; ++j)
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) {
        const int64_t at_v = j * tile + v * lanes;
        store(after + at_v, a[v] * load(before + at_v) + k[v] * u[j]);
      }
  }
}

// HISTORY: what S was is wanted, for decays or for the delta rule.
template <bool DELTA, bool HISTORY>
void walk_backward(float* C, const float* history, const Staged& at, int64_t values, int64_t tokens) {
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float *u = at.u + t * values, *dy = at.dy + t * values, *w = at.w + t * values;
    const float* before = history + t * values * tile;
    Vector a[V], k[V], q[V], dk[V] = {}, read[V] = {}, dg[V] = {};
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) {
      a[v] = load(at.a + t * tile + v * lanes);
      k[v] = load(at.k + t * tile + v * lanes);
      q[v] = load(at.q + t * tile + v * lanes);
    }
    for (int64_t j = 0; j < values; ++j) {
      float* row = C + j * tile;
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) {
        Vector dS = load(row + v * lanes) + q[v] * dy[j];
        dk[v] += dS * u[j];
        const Vector s = HISTORY ? load(before + j * tile + v * lanes) : Vector{};
        if (DELTA) {
          read[v] += s * w[j];
          dS -= k[v] * w[j];
        }
        if (HISTORY) dg[v] += s * dS;
        store(row + v * lanes, a[v] * dS);
      }
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) {
      store(at.dk + t * tile + v * lanes, DELTA ? dk[v] - a[v] * read[v] : dk[v]);
      store(at.dg + t * tile + v * lanes, a[v] * dg[v]);
    }
  }
}

struct Pass {
  const MatrixStateBackward& call;
  const MatrixState& forward;
  Place place;
  Staged& at;
  int64_t first, width;

  Pass(const MatrixStateBackward& call, int64_t task, Staged& at)
      : call(call), forward(call.forward), place(call.forward, task, call.row_tiles), at(at) {
    first = place.tile * row_tile;
    width = least(row_tile, forward.keys - first);
  }

  // Rows of S beyond `width` are computed from what is in the buffers, and dropped.
  template <class T>
  void stage_tokens(int64_t time, int64_t tokens) {
    const int64_t batch = place.batch, values = forward.values;
    stage<T>(at.q, tile, forward.q, batch, time, place.key_head, first, width, tokens, forward.scale);
    stage<T>(at.k, tile, forward.k, batch, time, place.key_head, first, width, tokens);
    stage_decay(at.a, tile, forward, batch, time, place.head, first, width, tokens);
    stage<T>(at.dy, values, call.dy, batch, time, place.head, 0, values, tokens);
    if (!forward.delta) {
      stage<T>(at.u, values, forward.v, batch, time, place.head, 0, values, tokens);
      return;
    }
    stage<T>(at.beta, 1, forward.beta, batch, time, place.head, 0, 1, tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      const float beta = at.beta[t];
      stage<float>(at.u + t * values, values, forward.error, batch, time + t, place.head, 0, values, 1, beta);
      stage<float>(at.w + t * values, values, call.du, batch, time + t, place.head, 0, values, 1, beta);
    }
  }

  void gather_rows(float* S, const float* states) const {
    const int64_t keys = forward.keys, values = forward.values;
    const float* from = states ? states + (place.sequence * forward.heads + place.head) * keys * values : nullptr;
    for (int64_t j = 0; j < values; ++j)
      for (int64_t i = 0; i < tile; ++i)
        S[j * tile + i] = from && i < width ? from[(first + i) * values + j] : 0.0f;
  }

  void write_decay(int64_t time, int64_t tokens) const {
    if (call.dlog_decay.data == nullptr) return;
    if (forward.decay_of_keys) {
      unstage<float>(at.dg, tile, call.dlog_decay, place.batch, time, place.head, first, width, tokens);
      return;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0.0f;
      for (int64_t i = 0; i < width; ++i) sum += at.dg[t * tile + i];
      call.dlog_decay.at<float>(place.batch, time + t, place.head)[place.tile * call.dlog_decay_tile_stride] = sum;
    }
  }

  template <class T>
  void run(float* S, float* starts, float* history) {
    const int64_t values = forward.values, size = values * tile;
    const int64_t chunks = (place.end - place.start + chunk - 1) / chunk;
    const bool wanted = forward.delta || forward.log_decay.data != nullptr;
    gather_rows(S, forward.initial);
    for (int64_t n = 0; n < chunks; ++n) {
      const int64_t time = place.start + n * chunk, tokens = least(chunk, place.end - time);
      stage_tokens<T>(time, tokens);
      for (int64_t i = 0; wanted && i < size; ++i) starts[n * size + i] = S[i];
      walk_forward(S, at, values, tokens);
      for (int64_t i = 0; i < tokens * tile; ++i) at.dq[i] *= forward.scale;
      unstage<float>(at.dq, tile, call.dq, place.batch, time, place.head, first, width, tokens);
    }
    float* C = S;
    gather_rows(C, call.dfinal);
    for (int64_t n = chunks - 1; n >= 0; --n) {
      const int64_t time = place.start + n * chunk, tokens = least(chunk, place.end - time);
      if (n + 1 < chunks) stage_tokens<T>(time, tokens);  // the last chunk is still staged
      if (wanted) {
        for (int64_t i = 0; i < size; ++i) history[i] = starts[n * size + i];
        recompute(history, at, values, tokens);
      }
      if (forward.delta) walk_backward<true, true>(C, history, at, values, tokens);
      else if (wanted) walk_backward<false, true>(C, history, at, values, tokens);
      else walk_backward<false, false>(C, history, at, values, tokens);
      unstage<float>(at.dk, tile, call.dk, place.batch, time, place.head, first, width, tokens);
      write_decay(time, tokens);
    }
  }
};

}  // namespace

void matrix_state_rows(const MatrixStateBackward& call, int64_t begin, int64_t end) {
  const MatrixState& forward = call.forward;
  const bool wanted = forward.delta || forward.log_decay.data != nullptr;
  int64_t longest = 0;
  for (int64_t s = 0; s < forward.spans.count; ++s) {
    const int64_t length = forward.spans.end(s) - forward.spans.start(s);
    if (length > longest) longest = length;
  }
  const int64_t size = forward.values * tile;
  Staged at(forward.values);
  Scratch S(size), starts(wanted ? (longest + chunk - 1) / chunk * size : 0), history(wanted ? chunk * size : 0);
  STAR_WITH_DTYPE(forward.dtype, T, for (int64_t task = begin; task < end; ++task) {
    Pass(call, task, at).template run<T>(S.data, starts.data, history.data);
  })
}

}  // namespace STAR_LEVEL
}  // namespace star
