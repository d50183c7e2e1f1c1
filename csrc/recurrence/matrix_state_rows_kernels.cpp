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

constexpr int64_t V = 16 > lanes ? 16 / lanes : 1;
constexpr int64_t tile = V * lanes;  // rows of S in registers at a time
constexpr int64_t chunk = 16;        // tokens

int64_t tiles_of(int64_t rows) { return (rows + tile - 1) / tile; }

// One chunk: rows of the task's part of S, whole tiles of them, and columns.
struct Staged {
  int64_t rows;
  Scratch buffer;
  float *q, *k, *a, *dq, *dk, *dg;  // (chunk, rows)
  float *u, *dy, *w;                // (chunk, Dv)
  float *beta;

  Staged(int64_t wanted_rows, int64_t values)
      : rows(tiles_of(wanted_rows) * tile), buffer(6 * chunk * rows + 3 * chunk * values + chunk) {
    float** of_rows[6] = {&q, &k, &a, &dq, &dk, &dg};
    float** of_columns[3] = {&u, &dy, &w};
    float* next = buffer.data;
    for (float** one : of_rows) *one = next, next += chunk * rows;
    for (float** one : of_columns) *one = next, next += chunk * values;
    beta = next;
  }
};

// Two columns of S at a time: one chain of additions would be longer than the rest of the work.
template <class Function>
__attribute__((always_inline)) inline void by_pairs(int64_t values, const Function& function) {
  int64_t j = 0;
  for (; j + 2 <= values; j += 2) function(j, 0), function(j + 1, 1);
  if (j < values) function(j, 0);
}

// One tile of S^T, (Dv, tile), over a chunk; `first` is its first row. Leaves dq.
void walk_forward(float* S, const Staged& at, int64_t first, int64_t values, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float *u = at.u + t * values, *dy = at.dy + t * values;
    const int64_t row_t = t * at.rows + first;
    Vector a[V], k[V], dq[2][V] = {};
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) a[v] = load(at.a + row_t + v * lanes), k[v] = load(at.k + row_t + v * lanes);
    by_pairs(values, [&](int64_t j, int64_t one) __attribute__((always_inline)) {
      const Vector u_j = broadcast(u[j]), dy_j = broadcast(dy[j]);
      float* row = S + j * tile;
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) {
        const Vector s = a[v] * load(row + v * lanes) + k[v] * u_j;
        store(row + v * lanes, s);
        dq[one][v] += s * dy_j;
      }
    });
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) store(at.dq + row_t + v * lanes, dq[0][v] + dq[1][v]);
  }
}

// history[t] = S before token t, from history[0].
void recompute(float* history, const Staged& at, int64_t first, int64_t values, int64_t tokens) {
  for (int64_t t = 0; t + 1 < tokens; ++t) {
    const float *u = at.u + t * values, *before = history + t * values * tile;
    const int64_t row_t = t * at.rows + first;
    float* after = history + (t + 1) * values * tile;
    Vector a[V], k[V];
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) a[v] = load(at.a + row_t + v * lanes), k[v] = load(at.k + row_t + v * lanes);
    for (int64_t j = 0; j < values; ++j) {
      const Vector u_j = broadcast(u[j]);
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) {
        const int64_t one = j * tile + v * lanes;
        store(after + one, a[v] * load(before + one) + k[v] * u_j);
      }
    }
  }
}

// HISTORY: what S was is wanted, for decays or for the delta rule. Leaves dk and dg.
template <bool DELTA, bool HISTORY>
void walk_backward(float* C, const float* history, const Staged& at, int64_t first, int64_t values,
                   int64_t tokens) {
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float *u = at.u + t * values, *dy = at.dy + t * values, *w = at.w + t * values;
    const float* before = history + t * values * tile;
    const int64_t row_t = t * at.rows + first;
    Vector a[V], k[V], q[V], dk[2][V] = {}, read[V] = {}, dg[2][V] = {};
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) {
      a[v] = load(at.a + row_t + v * lanes);
      k[v] = load(at.k + row_t + v * lanes);
      q[v] = load(at.q + row_t + v * lanes);
    }
    by_pairs(values, [&](int64_t j, int64_t pair) __attribute__((always_inline)) {
      const Vector u_j = broadcast(u[j]), dy_j = broadcast(dy[j]), w_j = broadcast(DELTA ? w[j] : 0.0f);
      float* row = C + j * tile;
      const int64_t one = DELTA ? 0 : pair;  // the delta rule has work enough, and no registers to spare
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) {
        Vector dS = load(row + v * lanes) + q[v] * dy_j;
        dk[one][v] += dS * u_j;
        const Vector s = HISTORY ? load(before + j * tile + v * lanes) : Vector{};
        if (DELTA) {
          read[v] += s * w_j;
          dS -= k[v] * w_j;
        }
        if (HISTORY) dg[one][v] += s * dS;
        store(row + v * lanes, a[v] * dS);
      }
    });
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) {
      const Vector dk_v = dk[0][v] + dk[1][v];
      store(at.dk + row_t + v * lanes, DELTA ? dk_v - a[v] * read[v] : dk_v);
      store(at.dg + row_t + v * lanes, a[v] * (dg[0][v] + dg[1][v]));
    }
  }
}

struct Pass {
  const MatrixStateBackward& call;
  const MatrixState& forward;
  Place place;
  Staged& at;
  int64_t first, width;  // rows of S: the first, and how many; those beyond, up to whole tiles, are dropped

  Pass(const MatrixStateBackward& call, int64_t task, Staged& at)
      : call(call), forward(call.forward), place(call.forward, task, call.row_tiles), at(at) {
    first = place.tile * call.row_tile;
    width = least(call.row_tile, forward.keys - first);
  }

  template <class T>
  void stage_tokens(int64_t time, int64_t tokens, int64_t onward) {
    const int64_t batch = place.batch, values = forward.values, ahead = onward * chunk;
    stage<T>(at.q, at.rows, forward.q, batch, time, place.key_head, first, width, tokens, ahead, forward.scale);
    stage<T>(at.k, at.rows, forward.k, batch, time, place.key_head, first, width, tokens, ahead);
    stage_decay(at.a, at.rows, forward, batch, time, place.head, first, width, tokens);
    stage<T>(at.dy, values, call.dy, batch, time, place.head, 0, values, tokens, ahead);
    if (!forward.delta) {
      stage<T>(at.u, values, forward.v, batch, time, place.head, 0, values, tokens, ahead);
      return;
    }
    stage<T>(at.beta, 1, forward.beta, batch, time, place.head, 0, 1, tokens, ahead);
    for (int64_t t = 0; t < tokens; ++t) {
      const float beta = at.beta[t];
      stage<float>(at.u + t * values, values, forward.error, batch, time + t, place.head, 0, values, 1, ahead, beta);
      stage<float>(at.w + t * values, values, call.du, batch, time + t, place.head, 0, values, 1, ahead, beta);
    }
  }

  // (S, H, Dk, Dv) states as tiles of S^T.
  void gather_rows(float* S, const float* states) const {
    const int64_t keys = forward.keys, values = forward.values;
    const float* from = states ? states + (place.sequence * forward.heads + place.head) * keys * values : nullptr;
    for (int64_t i = 0; i < at.rows; ++i)
      for (int64_t j = 0; j < values; ++j)
        S[(i / tile * values + j) * tile + i % tile] = from && i < width ? from[(first + i) * values + j] : 0.0f;
  }

  void write_decay(int64_t time, int64_t tokens) const {
    if (call.dlog_decay.data == nullptr) return;
    if (forward.decay_of_keys) {
      unstage<float>(at.dg, at.rows, call.dlog_decay, place.batch, time, place.head, first, width, tokens);
      return;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0.0f;
      for (int64_t i = 0; i < width; ++i) sum += at.dg[t * at.rows + i];
      call.dlog_decay.at<float>(place.batch, time + t, place.head)[place.tile * call.dlog_decay_tile_stride] = sum;
    }
  }

  template <class T>
  void run(float* S, float* starts, float* history) {
    const int64_t values = forward.values, of_tile = values * tile, size = values * at.rows;
    const int64_t chunks = (place.end - place.start + chunk - 1) / chunk;
    const bool wanted = forward.delta || forward.log_decay.data != nullptr;
    gather_rows(S, forward.initial);
    for (int64_t n = 0; n < chunks; ++n) {
      const int64_t time = place.start + n * chunk, tokens = least(chunk, place.end - time);
      stage_tokens<T>(time, tokens, 1);
      for (int64_t i = 0; wanted && i < size; ++i) starts[n * size + i] = S[i];
      for (int64_t i = 0; i < at.rows; i += tile) walk_forward(S + i * values, at, i, values, tokens);
      for (int64_t i = 0; i < tokens * at.rows; ++i) at.dq[i] *= forward.scale;
      unstage<float>(at.dq, at.rows, call.dq, place.batch, time, place.head, first, width, tokens);
    }
    float* C = S;
    gather_rows(C, call.dfinal);
    for (int64_t n = chunks - 1; n >= 0; --n) {
      const int64_t time = place.start + n * chunk, tokens = least(chunk, place.end - time);
      if (n + 1 < chunks) stage_tokens<T>(time, tokens, -1);  // the last chunk is still staged
      for (int64_t i = 0; i < at.rows; i += tile) {
        float* C_i = C + i * values;
        if (!wanted) {
          walk_backward<false, false>(C_i, history, at, i, values, tokens);
          continue;
        }
        const float* start = starts + n * size + i * values;
        for (int64_t j = 0; j < of_tile; ++j) history[j] = start[j];
        recompute(history, at, i, values, tokens);
        if (forward.delta) walk_backward<true, true>(C_i, history, at, i, values, tokens);
        else walk_backward<false, true>(C_i, history, at, i, values, tokens);
      }
      unstage<float>(at.dk, at.rows, call.dk, place.batch, time, place.head, first, width, tokens);
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
  Staged at(call.row_tile, forward.values);
  const int64_t of_tile = forward.values * tile, size = forward.values * at.rows;
  Scratch S(size), starts(wanted ? (longest + chunk - 1) / chunk * size : 0), history(wanted ? chunk * of_tile : 0);
  STAR_WITH_DTYPE(forward.dtype, T, for (int64_t task = begin; task < end; ++task) {
    Pass(call, task, at).template run<T>(S.data, starts.data, history.data);
  })
}

}  // namespace STAR_LEVEL
}  // namespace star
