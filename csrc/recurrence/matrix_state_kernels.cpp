// Gated linear attention and the gated delta rule on the CPU: the forward pass, the backward pass over
// columns, one token; compiled once per instruction-set level.
//
// Token by token on purpose: at head widths of CPU models the chunk form needs as many multiplications, and
// a strip of columns of S stays in the first-level cache from the first token to the last. Columns of S share
// nothing: column j of the linear rule reads v_j alone, and the delta rule's u_j reads column j alone.
//
// Forward:   S = a S + k u^T,  y = S^T q
// Backward:  dS = C + q dy^T,  du = dS^T k,  C = a dS                      (u = v: dv = du)
//   delta:   w = beta du,  C = a (dS - k w^T)                              (u = beta e, e = v - (a S)^T k)
//
// The delta rule needs e, or du, before it can update S. The loop over rows that updates for one token
// already gathers the next token's, so that each token still walks over S once.
#include "matrix_state.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr int64_t chunk = 16;         // tokens
constexpr int64_t widest_strip = 32;  // columns of S walked over at a time: what registers hold

// One chunk of tokens for one strip of columns. Rows are tokens; row `tokens` (forward) or row -1 (backward)
// of k and q is zero, so that the walk may gather for a token that is not there.
struct Columns {
  int64_t keys;
  Scratch buffer;
  float *q, *k, *a, *ka, *value, *out, *beta;

  Columns(int64_t keys, int64_t strip)
      : keys(keys), buffer((chunk + 2) * (4 * keys + 2 * strip) + chunk) {
    const int64_t rows = (chunk + 2) * keys, columns = (chunk + 2) * strip;
    q = buffer.data + keys;  // one row of zeros before the first
    k = q + rows;
    a = k + rows;
    ka = a + rows;
    value = ka + rows - keys + strip;
    out = value + columns;
    beta = out + columns - strip;
  }
};

template <int V>
void linear_forward(float* S, const Columns& at, int64_t tokens) {
  constexpr int64_t strip = V * lanes;
  for (int64_t t = 0; t < tokens; ++t) {
    const float *q = at.q + t * at.keys, *k = at.k + t * at.keys, *a = at.a + t * at.keys;
    Vector value[V], y[V] = {};
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) value[v] = load(at.value + t * strip + v * lanes);
    for (int64_t i = 0; i < at.keys; ++i) {
      const Vector a_i = broadcast(a[i]), k_i = broadcast(k[i]), q_i = broadcast(q[i]);
      float* row = S + i * strip;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vector s = a_i * load(row + v * lanes) + k_i * value[v];
        store(row + v * lanes, s);
        y[v] += q_i * s;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(at.out + t * strip + v * lanes, y[v]);
  }
}

// With READ the outputs are y, without it they are the errors e.
template <int V, bool READ>
void delta_forward(float* S, const Columns& at, int64_t tokens) {
  constexpr int64_t strip = V * lanes;
  Vector held[V] = {};  // (a S)^T k of the token that comes next
  for (int64_t i = 0; i < at.keys; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) held[v] += broadcast(at.ka[i]) * load(S + i * strip + v * lanes);
  for (int64_t t = 0; t < tokens; ++t) {
    const float *q = at.q + t * at.keys, *k = at.k + t * at.keys, *a = at.a + t * at.keys;
    const float* next = at.ka + (t + 1) * at.keys;
    Vector u[V], y[V] = {};
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vector error = load(at.value + t * strip + v * lanes) - held[v];
      if (!READ) store(at.out + t * strip + v * lanes, error);
      u[v] = at.beta[t] * error;
      held[v] = Vector{};
    }
    for (int64_t i = 0; i < at.keys; ++i) {
      const Vector a_i = broadcast(a[i]), k_i = broadcast(k[i]), q_i = broadcast(q[i]);
      const Vector next_i = broadcast(next[i]);
      float* row = S + i * strip;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vector s = a_i * load(row + v * lanes) + k_i * u[v];
        store(row + v * lanes, s);
        if (READ) y[v] += q_i * s;
        held[v] += next_i * s;
      }
    }
    if (READ)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(at.out + t * strip + v * lanes, y[v]);
  }
}

template <int V>
void linear_backward(float* C, const Columns& at, int64_t tokens) {
  constexpr int64_t strip = V * lanes;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float *q = at.q + t * at.keys, *k = at.k + t * at.keys, *a = at.a + t * at.keys;
    Vector dy[V], du[V] = {};
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) dy[v] = load(at.value + t * strip + v * lanes);
    for (int64_t i = 0; i < at.keys; ++i) {
      const Vector a_i = broadcast(a[i]), k_i = broadcast(k[i]), q_i = broadcast(q[i]);
      float* row = C + i * strip;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vector dS = load(row + v * lanes) + q_i * dy[v];
        store(row + v * lanes, a_i * dS);
        du[v] += k_i * dS;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(at.out + t * strip + v * lanes, du[v]);
  }
}

template <int V>
void delta_backward(float* C, const Columns& at, int64_t tokens) {
  constexpr int64_t strip = V * lanes;
  Vector dy[V], du[V] = {};
  const float *q = at.q + (tokens - 1) * at.keys, *k = at.k + (tokens - 1) * at.keys;
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) dy[v] = load(at.value + (tokens - 1) * strip + v * lanes);
  for (int64_t i = 0; i < at.keys; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vector dS = load(C + i * strip + v * lanes) + broadcast(q[i]) * dy[v];
      store(C + i * strip + v * lanes, dS);
      du[v] += broadcast(k[i]) * dS;
    }
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float *k_t = at.k + t * at.keys, *a = at.a + t * at.keys;
    q = at.q + (t - 1) * at.keys;
    k = at.k + (t - 1) * at.keys;
    Vector w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      store(at.out + t * strip + v * lanes, du[v]);
      w[v] = at.beta[t] * du[v];
      dy[v] = load(at.value + (t - 1) * strip + v * lanes);
      du[v] = Vector{};
    }
    for (int64_t i = 0; i < at.keys; ++i) {
      const Vector k_i = broadcast(k_t[i]), a_i = broadcast(a[i]), q_i = broadcast(q[i]);
      const Vector next_i = broadcast(k[i]);
      float* row = C + i * strip;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vector dS = a_i * (load(row + v * lanes) - k_i * w[v]) + q_i * dy[v];
        store(row + v * lanes, dS);
        du[v] += next_i * dS;
      }
    }
  }
}

// Stages what all columns of a chunk share.
template <class T>
void stage_keys(const MatrixState& call, const Place& place, Columns& at, int64_t time, int64_t tokens,
                int64_t ahead) {
  const int64_t keys = call.keys, batch = place.batch;
  stage<T>(at.q, keys, call.q, batch, time, place.key_head, 0, keys, tokens, ahead, call.scale);
  stage<T>(at.k, keys, call.k, batch, time, place.key_head, 0, keys, tokens, ahead);
  stage_decay(at.a, keys, call, batch, time, place.head, 0, keys, tokens);
  if (!call.delta) return;
  stage<T>(at.beta, 1, call.beta, batch, time, place.head, 0, 1, tokens, ahead);
  for (int64_t i = 0; i < tokens * keys; ++i) at.ka[i] = at.k[i] * at.a[i];
  for (int64_t i = 0; i < keys; ++i) at.ka[tokens * keys + i] = 0.0f;
}

// A strip of columns of the (S, H, Dk, Dv) states, and back.
void gather_columns(float* S, int64_t strip, const MatrixState& call, const Place& place, int64_t first,
                    int64_t width, const float* states) {
  const float* from = states + (place.sequence * call.heads + place.head) * call.keys * call.values + first;
  for (int64_t i = 0; i < call.keys; ++i)
    for (int64_t j = 0; j < strip; ++j) S[i * strip + j] = states && j < width ? from[i * call.values + j] : 0.0f;
}

void scatter_columns(const float* S, int64_t strip, const MatrixState& call, const Place& place, int64_t first,
                     int64_t width, float* states) {
  float* to = states + (place.sequence * call.heads + place.head) * call.keys * call.values + first;
  for (int64_t i = 0; i < call.keys; ++i)
    for (int64_t j = 0; j < width; ++j) to[i * call.values + j] = S[i * strip + j];
}

// Calls function(first column, columns, state) for each strip of V vectors of columns of the task's tile.
template <int V, class Function>
void by_strips(const MatrixState& call, const Place& place, float* S, const Function& function) {
  constexpr int64_t strip = V * lanes;
  const int64_t begin = place.tile * call.tile, end = least(begin + call.tile, call.values);
  for (int64_t first = begin; first < end; first += strip)
    function(first, least(strip, end - first), S + (first - begin) * call.keys);
}

template <class T, int V>
void forward_task(const MatrixState& call, int64_t task, Columns& at, float* S) {
  constexpr int64_t strip = V * lanes;
  const Place place(call, task, call.tiles);
  by_strips<V>(call, place, S, [&](int64_t first, int64_t width, float* S_strip) {
    gather_columns(S_strip, strip, call, place, first, width, call.initial);
  });
  for (int64_t time = place.start; time < place.end; time += chunk) {
    const int64_t tokens = least(chunk, place.end - time), batch = place.batch, head = place.head;
    stage_keys<T>(call, place, at, time, tokens, chunk);
    by_strips<V>(call, place, S, [&](int64_t first, int64_t width, float* S_strip) {
      stage<T>(at.value, strip, call.v, batch, time, head, first, width, tokens, chunk);
      if (call.error.data) {
        delta_forward<V, false>(S_strip, at, tokens);
        unstage<float>(at.out, strip, call.error, batch, time, head, first, width, tokens);
        return;
      }
      if (call.delta) delta_forward<V, true>(S_strip, at, tokens);
      else linear_forward<V>(S_strip, at, tokens);
      unstage<T>(at.out, strip, call.y, batch, time, head, first, width, tokens);
    });
  }
  if (call.final)
    by_strips<V>(call, place, S, [&](int64_t first, int64_t width, float* S_strip) {
      scatter_columns(S_strip, strip, call, place, first, width, call.final);
    });
}

template <class T, int V>
void columns_task(const MatrixStateBackward& call, int64_t task, Columns& at, float* C) {
  constexpr int64_t strip = V * lanes;
  const MatrixState& forward = call.forward;
  const Place place(forward, task, forward.tiles);
  const int64_t chunks = (place.end - place.start + chunk - 1) / chunk;
  by_strips<V>(forward, place, C, [&](int64_t first, int64_t width, float* C_strip) {
    gather_columns(C_strip, strip, forward, place, first, width, call.dfinal);
  });
  for (int64_t n = chunks - 1; n >= 0; --n) {
    const int64_t time = place.start + n * chunk, tokens = least(chunk, place.end - time);
    stage_keys<T>(forward, place, at, time, tokens, -chunk);
    by_strips<V>(forward, place, C, [&](int64_t first, int64_t width, float* C_strip) {
      stage<T>(at.value, strip, call.dy, place.batch, time, place.head, first, width, tokens, -chunk);
      if (forward.delta) delta_backward<V>(C_strip, at, tokens);
      else linear_backward<V>(C_strip, at, tokens);
      STAR_WITH_DTYPE(call.du_dtype, U, {
        unstage<U>(at.out, strip, call.du, place.batch, time, place.head, first, width, tokens);
      })
    });
  }
  if (call.dinitial)
    by_strips<V>(forward, place, C, [&](int64_t first, int64_t width, float* C_strip) {
      scatter_columns(C_strip, strip, forward, place, first, width, call.dinitial);
    });
}

// One token of one head, in place, some columns at a time; `a` has room for the decays of the keys.
template <class T>
void step_head(const MatrixStateStep& call, int64_t task, float* a) {
  const int64_t batch = task / call.heads, head = task % call.heads;
  const int64_t key_head = head / (call.heads / call.key_heads);
  const T *q = call.q.at<T>(batch, 0, key_head), *k = call.k.at<T>(batch, 0, key_head);
  const T* v = call.v.at<T>(batch, 0, head);
  T* y = call.y.at<T>(batch, 0, head);
  const float beta = call.delta ? to_float(*call.beta.at<T>(batch, 0, head)) : 0.0f;
  const float* g = call.log_decay.data ? call.log_decay.at<float>(batch, 0, head) : nullptr;
  for (int64_t i = 0; i < call.keys; ++i) a[i] = g ? g[call.decay_of_keys ? i : 0] : 0.0f;
  for (int64_t i = 0; i < call.keys; ++i) a[i] = exponential(a[i]);
  float* S = call.state + batch * call.state_batch_stride + head * call.state_head_stride;
  constexpr int64_t most = 8 * lanes;
  alignas(64) float u[most], out[most];
  for (int64_t first = 0; first < call.values; first += most) {
    const int64_t width = least(most, call.values - first);
    for (int64_t j = 0; j < width; ++j) u[j] = to_float(v[first + j]), out[j] = 0.0f;
    if (call.delta) {
      for (int64_t i = 0; i < call.keys; ++i) {
        const float* row = S + i * call.state_row_stride + first;
        const float factor = to_float(k[i]) * a[i];
#pragma GCC ivdep
        for (int64_t j = 0; j < width; ++j) out[j] += factor * row[j];
      }
      for (int64_t j = 0; j < width; ++j) u[j] = beta * (u[j] - out[j]), out[j] = 0.0f;
    }
    for (int64_t i = 0; i < call.keys; ++i) {
      float* row = S + i * call.state_row_stride + first;
      const float a_i = a[i], k_i = to_float(k[i]), q_i = to_float(q[i]);
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) {
        const float s = a_i * row[j] + k_i * u[j];
        row[j] = s;
        out[j] += q_i * s;
      }
    }
    for (int64_t j = 0; j < width; ++j) y[first + j] = from_float<T>(call.scale * out[j]);
  }
}

template <class T>
void delta_outputs_task(const DeltaOutputs& call, int64_t task) {
  const int64_t head = task % call.heads, time = task / call.heads % call.length;
  const int64_t batch = task / (call.heads * call.length);
  const float* error = call.error.at<float>(batch, time, head);
  const float* du = call.du.at<float>(batch, time, head);
  const float beta = to_float(*call.beta.at<T>(batch, time, head));
  T* dv = call.dv.at<T>(batch, time, head);
  Vector sums = {};
  int64_t j = 0;
  for (; j + lanes <= call.values; j += lanes) sums += load(error + j) * load(du + j);
  float dbeta = sum_lanes(sums);
  for (; j < call.values; ++j) dbeta += error[j] * du[j];
  for (j = 0; j < call.values; ++j) dv[j] = from_float<T>(beta * du[j]);
  *call.dbeta.at<T>(batch, time, head) = from_float<T>(dbeta);
}

template <class T>
void sum_shared_task(const SharedHeads& call, int64_t task) {
  const int64_t key_head = task % call.key_heads, time = task / call.key_heads % call.length;
  const int64_t batch = task / (call.key_heads * call.length), sharing = call.heads / call.key_heads;
  T* out = call.out.at<T>(batch, time, key_head);
  for (int64_t i = 0; i < call.keys; ++i) {
    float sum = 0.0f;
    for (int64_t h = 0; h < sharing; ++h)
      sum += call.of_heads.at<float>(batch, time, key_head * sharing + h)[i];
    out[i] = from_float<T>(sum);
  }
}

}  // namespace

void matrix_state_forward(const MatrixState& call, int64_t begin, int64_t end) {
  with_vectors(least(call.tile, widest_strip), [&](auto count) {
    constexpr int V = decltype(count)::value;
    Columns at(call.keys, V * lanes);
    Scratch S(call.keys * (call.tile + V * lanes));
    STAR_WITH_DTYPE(call.dtype, T, for (int64_t task = begin; task < end; ++task) {
      forward_task<T, V>(call, task, at, S.data);
    })
  });
}

void matrix_state_columns(const MatrixStateBackward& call, int64_t begin, int64_t end) {
  const MatrixState& forward = call.forward;
  with_vectors(least(forward.tile, widest_strip), [&](auto count) {
    constexpr int V = decltype(count)::value;
    Columns at(forward.keys, V * lanes);
    Scratch C(forward.keys * (forward.tile + V * lanes));
    STAR_WITH_DTYPE(forward.dtype, T, for (int64_t task = begin; task < end; ++task) {
      columns_task<T, V>(call, task, at, C.data);
    })
  });
}

void matrix_state_step(const MatrixStateStep& call, int64_t begin, int64_t end) {
  Scratch a(call.keys);
  STAR_WITH_DTYPE(call.dtype, T, for (int64_t task = begin; task < end; ++task) step_head<T>(call, task, a.data))
}

void delta_outputs(const DeltaOutputs& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, for (int64_t task = begin; task < end; ++task) delta_outputs_task<T>(call, task))
}

void sum_shared_heads(const SharedHeads& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, for (int64_t task = begin; task < end; ++task) sum_shared_task<T>(call, task))
}

}  // namespace STAR_LEVEL
}  // namespace star
