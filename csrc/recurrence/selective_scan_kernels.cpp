// The selective scan (Mamba-1) on the CPU; compiled once per instruction-set level.
//
// Forward:   a_t = exp(delta_t A),  h_t = a_t h_{t-1} + u_t B_t,  u_t = delta_t x_t,  y_t = sum_n C_t h_t + D x_t
// Backward:  dh_t = C_t dy_t + a_{t+1} dh_{t+1},  dC_t = sum_d dy_t h_t,  dB_t = sum_d dh_t u_t,
//            du_t = sum_n dh_t B_t,  q_t = dh_t a_t h_{t-1},  dA = sum_t q_t delta_t,
//            ddelta_t = sum_n q_t A + du_t x_t,  dx_t = du_t delta_t + D dy_t
//
// A task walks its block of channels chunk by chunk. Lanes are channels; a chunk's delta, u and y are staged
// in float32, and the states of a few n stay in registers over the whole chunk. The backward pass first walks
// forward keeping the state at each chunk's start, then walks the chunks backward and recomputes each one.
#include "kernels.h"

#include "../common/math.h"
#include "../common/vector.h"
#include "staging.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr int64_t chunk = 32;  // tokens
constexpr int64_t most = 64;   // channels of a block, at most; the row length of all staging buffers
constexpr float log2_e = 1.44269504f;
constexpr int64_t forward_states = lanes >= 16 ? 16 : 8;  // states in registers at a time
constexpr int64_t backward_states = lanes >= 16 ? 8 : 4;

// One block of channels of one group.
struct Block {
  int64_t group, index, first, width;

  Block(const SelectiveScan& call, int64_t number) {
    const int64_t of_group = call.width / call.groups;
    group = number / call.blocks;
    index = number % call.blocks;
    first = group * of_group + index * call.block;
    width = least(call.block, of_group - index * call.block);
  }
  int64_t vectors() const { return (width + lanes - 1) / lanes; }
};

// (N, most) of a (D, N) matrix's block, times a factor; and back.
void gather(float* to, const float* from, const Block& block, int64_t states, float factor) {
  for (int64_t c = 0; c < block.width; ++c)
    for (int64_t n = 0; n < states; ++n)
      to[n * most + c] = from ? from[(block.first + c) * states + n] * factor : 0.0f;
}

void scatter(float* to, const float* from, const Block& block, int64_t states) {
  for (int64_t c = 0; c < block.width; ++c)
    for (int64_t n = 0; n < states; ++n) to[(block.first + c) * states + n] = from[n * most + c];
}

// x_t, delta_t and u_t of a chunk, and where asked d delta / d dt. The walk comes next to tokens `ahead` away.
template <class T>
void stage(const SelectiveScan& call, const Block& block, int64_t batch, int64_t time, int64_t tokens,
           int64_t ahead, float* x_values, float* delta, float* u, float* slope) {
  const int64_t width = block.width;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* x = call.x.row<T>(batch, time + t) + block.first;
    const T* dt = call.dt.row<T>(batch, time + t) + block.first;
    prefetch(x, width, ahead * call.x.row_stride);
    prefetch(dt, width, ahead * call.dt.row_stride);
    float *x_t = x_values + t * most, *delta_t = delta + t * most, *u_t = u + t * most;
    for (int64_t c = 0; c < width; ++c) x_t[c] = to_float(x[c]);
    for (int64_t c = 0; c < width; ++c) delta_t[c] = to_float(dt[c]);
    if (call.dt_bias)
      for (int64_t c = 0; c < width; ++c) delta_t[c] += call.dt_bias[block.first + c];
    if (slope && call.softplus)
      for (int64_t c = 0; c < width; ++c) slope[t * most + c] = sigmoid(delta_t[c]);
    if (slope && !call.softplus)
      for (int64_t c = 0; c < width; ++c) slope[t * most + c] = 1.0f;
    if (call.softplus)
      for (int64_t c = 0; c < width; ++c) delta_t[c] = softplus(delta_t[c]);
    for (int64_t c = 0; c < width; ++c) u_t[c] = delta_t[c] * x_t[c];
  }
}

// y_t starts from D x_t.
void start_outputs(const SelectiveScan& call, const Block& block, int64_t tokens, const float* x, float* y) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < block.width; ++c)
      y[t * most + c] = call.D ? call.D[block.first + c] * x[t * most + c] : 0.0f;
}

// Advances NB states of one vector of channels over a chunk; READ adds C h to y.
template <int NB, bool READ>
void advance(const float* A, const float* B, int64_t B_stride, const float* C, int64_t C_stride,
             const float* delta, const float* u, float* y, float* state, int64_t tokens) {
  Vector h[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) h[n] = load(state + n * most);
  for (int64_t t = 0; t < tokens; ++t) {
    const Vector delta_t = load(delta + t * most), u_t = load(u + t * most);
    Vector sum = READ ? load(y + t * most) : Vector{};
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
      h[n] = exponential2(delta_t * load(A + n * most)) * h[n] + u_t * B[t * B_stride + n];
      if (READ) sum += h[n] * C[t * C_stride + n];
    }
    if (READ) store(y + t * most, sum);
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) store(state + n * most, h[n]);
}

// Calls function(first state, integral constant NB) until all states are done, `widest` at a time.
template <int NB>
struct Constant {
  static constexpr int value = NB;
};

template <int64_t widest, class Function>
inline void by_states(int64_t states, const Function& function) {
  int64_t n = 0;
  for (; n + widest <= states; n += widest) function(n, Constant<widest>());
  if constexpr (widest > 8)
    for (; n + 8 <= states; n += 8) function(n, Constant<8>());
  if constexpr (widest > 4)
    for (; n + 4 <= states; n += 4) function(n, Constant<4>());
  for (; n + 2 <= states; n += 2) function(n, Constant<2>());
  for (; n < states; ++n) function(n, Constant<1>());
}

template <bool READ>
void advance_chunk(const SelectiveScan& call, const Block& block, int64_t batch, int64_t time, int64_t tokens,
                   const float* A, const float* delta, const float* u, float* y, float* state) {
  const float* B = call.B.row(batch, time, block.group);
  const float* C = call.C.row(batch, time, block.group);
  for (int64_t v = 0; v < block.vectors() * lanes; v += lanes)
    by_states<forward_states>(call.states, [&](int64_t n, auto count) {
      advance<decltype(count)::value, READ>(A + n * most + v, B + n, call.B.row_stride, C + n,
                                            call.C.row_stride, delta + v, u + v, y + v, state + n * most + v,
                                            tokens);
    });
}

template <class T>
void write_output(const SelectiveScan& call, const Block& block, int64_t batch, int64_t time, int64_t tokens,
                  const float* y) {
  for (int64_t t = 0; t < tokens; ++t) {
    T* out = call.y.row<T>(batch, time + t) + block.first;
    const float* y_t = y + t * most;
    prefetch(out, block.width, chunk * call.y.row_stride);
    if (call.z.data) {
      const T* z = call.z.row<T>(batch, time + t) + block.first;
      prefetch(z, block.width, chunk * call.z.row_stride);
#pragma GCC ivdep
      for (int64_t c = 0; c < block.width; ++c) out[c] = from_float<T>(y_t[c] * silu(to_float(z[c])));
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < block.width; ++c) out[c] = from_float<T>(y_t[c]);
    }
  }
}

template <class T>
void forward_tasks(const SelectiveScan& call, int64_t begin, int64_t end) {
  const int64_t matrix = call.states * most;
  Scratch staged(4 * chunk * most), A(matrix), state(matrix);
  float *x = staged.data, *delta = x + chunk * most, *u = delta + chunk * most, *y = u + chunk * most;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sequence = task / (call.groups * call.blocks), batch = call.spans.batch(sequence);
    const Block block(call, task % (call.groups * call.blocks));
    if (block.width <= 0) continue;
    staged.clear(4 * chunk * most), A.clear(matrix), state.clear(matrix);
    gather(A.data, call.A, block, call.states, log2_e);
    const int64_t row = sequence * call.width * call.states;
    gather(state.data, call.initial ? call.initial + row : nullptr, block, call.states, 1.0f);
    const int64_t stop = call.spans.end(sequence);
    for (int64_t time = call.spans.start(sequence); time < stop; time += chunk) {
      const int64_t tokens = least(chunk, stop - time);
      stage<T>(call, block, batch, time, tokens, chunk, x, delta, u, nullptr);
      start_outputs(call, block, tokens, x, y);
      advance_chunk<true>(call, block, batch, time, tokens, A.data, delta, u, y, state.data);
      write_output<T>(call, block, batch, time, tokens, y);
    }
    scatter(call.final + row, state.data, block, call.states);
  }
}

// What the backward pass holds of one chunk, `most` channels a row.
struct Staged {
  Scratch buffer;
  float *delta, *u, *x, *slope, *dy, *du, *ddelta, *y;

  Staged() : buffer(8 * chunk * most) {
    float** rows[8] = {&delta, &u, &x, &slope, &dy, &du, &ddelta, &y};
    for (int64_t i = 0; i < 8; ++i) *rows[i] = buffer.data + i * chunk * most;
  }
  void clear() { buffer.clear(8 * chunk * most); }
};

// The registers' overflow: NB states of one vector over a chunk.
struct Kept {
  alignas(64) float h[(chunk + 1) * backward_states * lanes];
  alignas(64) float a[chunk * backward_states * lanes];
  alignas(64) float dB[chunk * backward_states * lanes];
  alignas(64) float dC[chunk * backward_states * lanes];
};

template <int NB>
void recompute(const float* A, const float* B, int64_t B_stride, const float* C, int64_t C_stride,
               const float* delta, const float* u, float* y, const float* state, int64_t tokens, Kept& kept) {
  Vector h[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) store(kept.h + n * lanes, h[n] = load(state + n * most));
  for (int64_t t = 0; t < tokens; ++t) {
    const Vector delta_t = load(delta + t * most), u_t = load(u + t * most);
    Vector sum = load(y + t * most);
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
      const Vector a = exponential2(delta_t * load(A + n * most));
      h[n] = a * h[n] + u_t * B[t * B_stride + n];
      sum += h[n] * C[t * C_stride + n];
      store(kept.a + (t * NB + n) * lanes, a);
      store(kept.h + ((t + 1) * NB + n) * lanes, h[n]);
    }
    store(y + t * most, sum);
  }
}

// `carry` is a_{t+1} dh_{t+1}; A is scaled by log2(e), which is taken out of ddelta at the end.
template <int NB>
void retrace(const float* A, const float* B, int64_t B_stride, const float* C, int64_t C_stride,
             const Staged& staged, int64_t v, float* carry, float* dA, int64_t tokens, Kept& kept) {
  Vector g[NB], dA_n[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) g[n] = load(carry + n * most), dA_n[n] = load(dA + n * most);
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const int64_t at = t * most + v;
    const Vector dy = load(staged.dy + at), u = load(staged.u + at), delta = load(staged.delta + at);
    Vector du = load(staged.du + at), ddelta = load(staged.ddelta + at);
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
      const int64_t k = (t * NB + n) * lanes;
      const Vector dh = g[n] + dy * C[t * C_stride + n];
      store(kept.dC + k, load(kept.dC + k) + dy * load(kept.h + k + NB * lanes));
      store(kept.dB + k, load(kept.dB + k) + dh * u);
      du += dh * B[t * B_stride + n];
      g[n] = dh * load(kept.a + k);
      const Vector q = g[n] * load(kept.h + k);
      ddelta += q * load(A + n * most);
      dA_n[n] += q * delta;
    }
    store(staged.du + at, du);
    store(staged.ddelta + at, ddelta);
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) store(carry + n * most, g[n]), store(dA + n * most, dA_n[n]);
}

template <class T>
void stage_gradient(const SelectiveScanBackward& call, const Block& block, int64_t batch, int64_t time,
                    int64_t tokens, const Staged& staged) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* dy = call.dy.row<T>(batch, time + t) + block.first;
    const T* z = call.forward.z.data ? call.forward.z.row<T>(batch, time + t) + block.first : nullptr;
    prefetch(dy, block.width, -chunk * call.dy.row_stride);
    if (z) prefetch(z, block.width, -chunk * call.forward.z.row_stride);
    float* to = staged.dy + t * most;
    for (int64_t c = 0; c < block.width; ++c) to[c] = to_float(dy[c]);
    if (z)
      for (int64_t c = 0; c < block.width; ++c) to[c] *= silu(to_float(z[c]));
    for (int64_t c = 0; c < most; ++c) staged.du[t * most + c] = staged.ddelta[t * most + c] = 0.0f;
  }
}

template <class T>
void write_gradients(const SelectiveScanBackward& call, const Block& block, int64_t batch, int64_t time,
                     int64_t tokens, const Staged& staged, float* dD, float* dbias) {
  const float* D = call.forward.D ? call.forward.D + block.first : nullptr;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float *delta = staged.delta + t * most, *x = staged.x + t * most, *slope = staged.slope + t * most;
    const float *dy = staged.dy + t * most, *du = staged.du + t * most, *y = staged.y + t * most;
    const float* ddelta = staged.ddelta + t * most;
    T* dx = call.dx.row<T>(batch, time + t) + block.first;
    T* ddt = call.ddt.row<T>(batch, time + t) + block.first;
    prefetch(dx, block.width, -chunk * call.dx.row_stride);
    prefetch(ddt, block.width, -chunk * call.ddt.row_stride);
#pragma GCC ivdep
    for (int64_t c = 0; c < block.width; ++c) {
      const float draw = (ddelta[c] * (1.0f / log2_e) + du[c] * x[c]) * slope[c];
      dx[c] = from_float<T>(du[c] * delta[c] + (D ? D[c] * dy[c] : 0.0f));
      ddt[c] = from_float<T>(draw);
      dbias[c] += draw;
      dD[c] += dy[c] * x[c];
    }
    if (call.forward.z.data) {
      const T* z = call.forward.z.row<T>(batch, time + t) + block.first;
      const T* dout = call.dy.row<T>(batch, time + t) + block.first;
      T* dz = call.dz.row<T>(batch, time + t) + block.first;
      prefetch(dz, block.width, -chunk * call.dz.row_stride);
#pragma GCC ivdep
      for (int64_t c = 0; c < block.width; ++c) {
        const float gate = to_float(z[c]);
        dz[c] = from_float<T>(to_float(dout[c]) * y[c] * silu_slope(gate, sigmoid(gate)));
      }
    }
  }
}

// One block's walk over one sequence; carry comes in as the final state's gradient.
struct Walk {
  const SelectiveScanBackward& call;
  const Block& block;
  const Staged& staged;
  const float* A;      // (N, most), times log2(e)
  float *state, *carry, *starts;  // (N, most), (N, most), (chunks, N, most)
  float *dA, *dD, *dbias;
  Kept& kept;

  template <class T>
  void run(int64_t sequence) {
    const SelectiveScan& forward = call.forward;
    const int64_t begin = forward.spans.start(sequence), end = forward.spans.end(sequence);
    const int64_t batch = forward.spans.batch(sequence), matrix = forward.states * most;
    const int64_t chunks = (end - begin + chunk - 1) / chunk;
    for (int64_t k = 0; k < chunks; ++k) {
      for (int64_t i = 0; i < matrix; ++i) starts[k * matrix + i] = state[i];
      if (k + 1 == chunks) break;
      const int64_t time = begin + k * chunk;
      stage<T>(forward, block, batch, time, chunk, chunk, staged.x, staged.delta, staged.u, nullptr);
      advance_chunk<false>(forward, block, batch, time, chunk, A, staged.delta, staged.u, staged.y, state);
    }
    for (int64_t k = chunks - 1; k >= 0; --k) {
      const int64_t time = begin + k * chunk, tokens = least(chunk, end - time);
      stage<T>(forward, block, batch, time, tokens, -chunk, staged.x, staged.delta, staged.u, staged.slope);
      start_outputs(forward, block, tokens, staged.x, staged.y);
      stage_gradient<T>(call, block, batch, time, tokens, staged);
      by_states<backward_states>(forward.states, [&](int64_t n, auto count) {
        states<decltype(count)::value>(n, batch, time, tokens, starts + k * matrix);
      });
      write_gradients<T>(call, block, batch, time, tokens, staged, dD, dbias);
    }
  }

  // All vectors of NB states over a chunk, and their sums over channels.
  template <int NB>
  void states(int64_t n, int64_t batch, int64_t time, int64_t tokens, const float* start) {
    const SelectiveScan& forward = call.forward;
    const float* B = forward.B.row(batch, time, block.group) + n;
    const float* C = forward.C.row(batch, time, block.group) + n;
    const int64_t B_stride = forward.B.row_stride, C_stride = forward.C.row_stride;
    for (int64_t i = 0; i < tokens * NB * lanes; ++i) kept.dB[i] = kept.dC[i] = 0.0f;
    for (int64_t v = 0; v < block.vectors() * lanes; v += lanes) {
      const int64_t at = n * most + v;
      recompute<NB>(A + at, B, B_stride, C, C_stride, staged.delta + v, staged.u + v, staged.y + v, start + at,
                    tokens, kept);
      retrace<NB>(A + at, B, B_stride, C, C_stride, staged, v, carry + at, dA + at, tokens, kept);
    }
    const int64_t rows = forward.spans.offsets ? forward.spans.length : forward.spans.count * forward.spans.length;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t row = block.index * rows + batch * forward.spans.length + time + t;
      const int64_t to = (row * forward.groups + block.group) * forward.states + n;
      for (int k = 0; k < NB; ++k) {
        call.dB[to + k] = sum_lanes(load(kept.dB + (t * NB + k) * lanes));
        call.dC[to + k] = sum_lanes(load(kept.dC + (t * NB + k) * lanes));
      }
    }
  }
};

template <class T>
void backward_tasks(const SelectiveScanBackward& call, int64_t begin, int64_t end) {
  const SelectiveScan& forward = call.forward;
  const Spans& spans = forward.spans;
  const int64_t matrix = forward.states * most, of_parts = forward.groups * forward.blocks;
  int64_t longest = 0;
  for (int64_t s = 0; s < spans.count; ++s)
    if (spans.end(s) - spans.start(s) > longest) longest = spans.end(s) - spans.start(s);
  Scratch A(matrix), state(matrix), carry(matrix), dA(matrix), sums(2 * most);
  Scratch starts((longest + chunk - 1) / chunk * matrix);
  Staged staged;
  Kept* kept = new Kept;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / of_parts;
    const Block block(forward, task % of_parts);
    if (block.width <= 0) continue;
    A.clear(matrix), dA.clear(matrix), sums.clear(2 * most), staged.clear();
    gather(A.data, forward.A, block, forward.states, log2_e);
    const int64_t first = part * spans.count / call.parts, last = (part + 1) * spans.count / call.parts;
    for (int64_t sequence = first; sequence < last; ++sequence) {
      const int64_t row = sequence * forward.width * forward.states;
      state.clear(matrix), carry.clear(matrix);
      gather(state.data, forward.initial ? forward.initial + row : nullptr, block, forward.states, 1.0f);
      gather(carry.data, call.dfinal ? call.dfinal + row : nullptr, block, forward.states, 1.0f);
      Walk walk{call, block, staged, A.data, state.data, carry.data, starts.data, dA.data, sums.data,
                sums.data + most, *kept};
      walk.template run<T>(sequence);
      if (call.dinitial) scatter(call.dinitial + row, carry.data, block, forward.states);
    }
    scatter(call.dA + part * forward.width * forward.states, dA.data, block, forward.states);
    for (int64_t c = 0; c < block.width; ++c) {
      call.dD[part * forward.width + block.first + c] = sums.data[c];
      call.dbias[part * forward.width + block.first + c] = sums.data[most + c];
    }
  }
  delete kept;
}

// One token of up to `most` channels of one group, from `first` on. The state is (D, N) with N contiguous.
struct StepBlock {
  const SelectiveScanStep& call;
  int64_t first, width;
  const float *B, *C;
  float* h;  // the first channel's states
  float delta[most], u[most], out[most];

  // States fill vectors: lanes are states. Sums over lanes wait until all channels are done.
  // N is the number of states where that is known here, else 0.
  template <int64_t N>
  void wide() {
    alignas(64) float sums[most * lanes];
    const int64_t states = N ? N : call.states, whole = states / lanes * lanes;
    for (int64_t c = 0; c < width; ++c) {
      const float* A = call.A + (first + c) * states;
      float* h_c = h + c * call.state_row_stride;
      const Vector scaled = broadcast(delta[c] * log2_e), u_c = broadcast(u[c]);
      Vector sum = {};
      for (int64_t n = 0; n < whole; n += lanes) {
        const Vector after = exponential2(scaled * load(A + n)) * load(h_c + n) + u_c * load(B + n);
        store(h_c + n, after);
        sum += after * load(C + n);
      }
      store(sums + c * lanes, sum);
      for (int64_t n = whole; n < states; ++n) {
        h_c[n] = exponential(delta[c] * A[n]) * h_c[n] + u[c] * B[n];
        out[c] += h_c[n] * C[n];
      }
    }
    for (int64_t c = 0; c < width; ++c)
      for (int64_t i = 0; i < lanes; ++i) out[c] += sums[c * lanes + i];
  }

  // Fewer states than lanes: the channels' states, one after the other, fill the vectors.
  template <int64_t N>
  void narrow() {
    alignas(64) float exponent[most * lanes], added[most * lanes], read[most * lanes], after[most * lanes];
    const int64_t states = N ? N : call.states, size = width * states;
    const float* A = call.A + first * states;
    for (int64_t c = 0; c < width; ++c) {
      const float* h_c = h + c * call.state_row_stride;
      for (int64_t n = 0; n < states; ++n) {
        const int64_t i = c * states + n;
        exponent[i] = delta[c] * A[i];
        added[i] = u[c] * B[n];
        read[i] = C[n];
        after[i] = h_c[n];
      }
    }
    for (int64_t i = 0; i < size; ++i) after[i] = exponential(exponent[i]) * after[i] + added[i];
    for (int64_t c = 0; c < width; ++c) {
      float* h_c = h + c * call.state_row_stride;
      for (int64_t n = 0; n < states; ++n) {
        h_c[n] = after[c * states + n];
        out[c] += h_c[n] * read[c * states + n];
      }
    }
  }
};

template <class T>
void step_block(const SelectiveScanStep& call, int64_t batch, StepBlock& block) {
  const int64_t first = block.first, width = block.width;
  const T* x = call.x.row<T>(batch, 0) + first;
  const T* dt = call.dt.row<T>(batch, 0) + first;
  const float* D = call.D ? call.D + first : nullptr;
  float *delta = block.delta, *u = block.u, *out = block.out;
  for (int64_t c = 0; c < width; ++c) delta[c] = to_float(dt[c]);
  if (call.dt_bias)
    for (int64_t c = 0; c < width; ++c) delta[c] += call.dt_bias[first + c];
  if (call.softplus)
    for (int64_t c = 0; c < width; ++c) delta[c] = softplus(delta[c]);
  for (int64_t c = 0; c < width; ++c) u[c] = delta[c] * to_float(x[c]);
  for (int64_t c = 0; c < width; ++c) out[c] = D ? D[c] * to_float(x[c]) : 0.0f;
  if (call.states == 16) block.wide<16>();
  else if (call.states >= lanes) block.wide<0>();
  else if (call.states == 2) block.narrow<2>();
  else block.narrow<0>();
  if (call.z.data) {
    const T* z = call.z.row<T>(batch, 0) + first;
    for (int64_t c = 0; c < width; ++c) out[c] *= silu(to_float(z[c]));
  }
  T* y = call.y.row<T>(batch, 0) + first;
  for (int64_t c = 0; c < width; ++c) y[c] = from_float<T>(out[c]);
}

template <class T>
void step_entry(const SelectiveScanStep& call, int64_t batch) {
  const int64_t of_group = call.width / call.groups;
  for (int64_t group = 0; group < call.groups; ++group) {
    for (int64_t first = group * of_group; first < (group + 1) * of_group; first += most) {
      StepBlock block{call, first, least(most, (group + 1) * of_group - first), call.B.row(batch, 0, group),
                      call.C.row(batch, 0, group), call.state + batch * call.state_batch_stride, {}, {}, {}};
      block.h += first * call.state_row_stride;
      step_block<T>(call, batch, block);
    }
  }
}

}  // namespace

void selective_scan_forward(const SelectiveScan& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, forward_tasks<T>(call, begin, end))
}

void selective_scan_backward(const SelectiveScanBackward& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.forward.dtype, T, backward_tasks<T>(call, begin, end))
}

void selective_scan_step(const SelectiveScanStep& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, for (int64_t batch = begin; batch < end; ++batch) step_entry<T>(call, batch))
}

}  // namespace STAR_LEVEL
}  // namespace star
