// The GRU and the LSTM with diagonal recurrent weights on the CPU; compiled once per instruction-set level.
//
// The sequential loop, exact; channels share nothing and fill the vectors. The backward pass recomputes the
// states of its block of channels, (L + 1, block) numbers in a thread's own memory, and walks back over them.
//
// GRU:   z = s(xz + az h), r = s(xr + ar h), c = tanh(xh + ah r h), h' = h + z (c - h)
//        dc = g z (1 - c^2), dr = dc ah h r (1 - r), dz = g (c - h) z (1 - z)
//        dh = g (1 - z) + dc ah r + dr ar + dz az
// LSTM:  f = s(xf + af h), o = s(xo + ao h), z = tanh(xz + az h), c' = f c + (1 - f) z, h' = o tanh(c')
//        k = gc + g o (1 - tanh(c')^2), df = k (c - z) f (1 - f), do = g tanh(c') o (1 - o),
//        dz = k (1 - f) (1 - z^2), dc = k f, dh = df af + do ao + dz az
#include "kernels.h"

#include "../common/math.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr int64_t most = 64;  // channels of a block, at most

struct Block {
  int64_t first, width;

  Block(const Cell& call, int64_t number) {
    first = number * call.block;
    width = call.width - first < call.block ? call.width - first : call.block;
  }
};

int64_t blocks_of(const Cell& call) { return (call.width + call.block - 1) / call.block; }

void read_state(float* to, const CellState& from, int64_t batch, const Block& block) {
  const float* row = from.data ? from.data + batch * from.batch_stride + block.first : nullptr;
  for (int64_t d = 0; d < block.width; ++d) to[d] = row ? row[d] : 0.0f;
}

void write_state(const float* from, const CellState& to, int64_t batch, const Block& block) {
  if (to.data == nullptr) return;
  float* row = to.data + batch * to.batch_stride + block.first;
  for (int64_t d = 0; d < block.width; ++d) row[d] = from[d];
}

// The three inputs of one token, and the three weights.
template <class T>
struct Token {
  const T* x[3];
  const float* a[3];

  Token(const Cell& call, int64_t batch, int64_t time, const Block& block) {
    for (int i = 0; i < 3; ++i) {
      x[i] = call.x[i].row<T>(batch, time) + block.first;
      a[i] = call.weight[i] + block.first;
    }
  }
};

template <class T>
void gru_token(const Token<T>& token, const float* before, float* after, int64_t width) {
#pragma GCC ivdep
  for (int64_t d = 0; d < width; ++d) {
    const float h = before[d];
    const float z = sigmoid(to_float(token.x[0][d]) + token.a[0][d] * h);
    const float r = sigmoid(to_float(token.x[1][d]) + token.a[1][d] * h);
    const float c = hyperbolic_tangent(to_float(token.x[2][d]) + token.a[2][d] * (r * h));
    after[d] = h + z * (c - h);
  }
}

template <class T>
void lstm_token(const Token<T>& token, const float* h, const float* c, float* next_h, float* next_c,
                int64_t width) {
#pragma GCC ivdep
  for (int64_t d = 0; d < width; ++d) {
    const float f = sigmoid(to_float(token.x[0][d]) + token.a[0][d] * h[d]);
    const float o = sigmoid(to_float(token.x[1][d]) + token.a[1][d] * h[d]);
    const float z = hyperbolic_tangent(to_float(token.x[2][d]) + token.a[2][d] * h[d]);
    const float cell = z + f * (c[d] - z);
    next_c[d] = cell;
    next_h[d] = o * hyperbolic_tangent(cell);
  }
}

template <class T, bool LSTM>
void forward_task(const Cell& call, int64_t task) {
  const int64_t batch = task / blocks_of(call);
  const Block block(call, task % blocks_of(call));
  alignas(64) float h[most], c[most];
  read_state(h, call.initial[0], batch, block);
  read_state(c, call.initial[1], batch, block);
  for (int64_t time = 0; time < call.length; ++time) {
    const Token<T> token(call, batch, time, block);
    if (LSTM) lstm_token(token, h, c, h, c, block.width);
    else gru_token(token, h, h, block.width);
    T* out = call.h.row<T>(batch, time) + block.first;
    for (int64_t d = 0; d < block.width; ++d) out[d] = from_float<T>(h[d]);
  }
  write_state(h, call.final[0], batch, block);
  if (LSTM) write_state(c, call.final[1], batch, block);
}

// What one token's step back reads and writes: g and gc hold the states' gradients and are replaced.
template <class T>
struct StepBack {
  const T* dh;
  T* dx[3];
  float* sums[3];
  float *g, *gc;

  StepBack(const CellBackward& call, int64_t batch, int64_t time, const Block& block, float* weights, float* g,
           float* gc)
      : dh(call.dh.row<T>(batch, time) + block.first), g(g), gc(gc) {
    for (int i = 0; i < 3; ++i) {
      dx[i] = call.dx[i].row<T>(batch, time) + block.first;
      sums[i] = weights + i * most;
    }
  }
};

template <class T>
void gru_back(const Token<T>& token, const StepBack<T>& back, const float* before, int64_t width) {
#pragma GCC ivdep
  for (int64_t d = 0; d < width; ++d) {
    const float h = before[d], az = token.a[0][d], ar = token.a[1][d], ah = token.a[2][d];
    const float g = back.g[d] + to_float(back.dh[d]);
    const float z = sigmoid(to_float(token.x[0][d]) + az * h);
    const float r = sigmoid(to_float(token.x[1][d]) + ar * h);
    const float c = hyperbolic_tangent(to_float(token.x[2][d]) + ah * (r * h));
    const float dc = g * z * (1.0f - c * c);
    const float dr = dc * ah * h * r * (1.0f - r);
    const float dz = g * (c - h) * z * (1.0f - z);
    back.dx[0][d] = from_float<T>(dz);
    back.dx[1][d] = from_float<T>(dr);
    back.dx[2][d] = from_float<T>(dc);
    back.sums[0][d] += dz * h;
    back.sums[1][d] += dr * h;
    back.sums[2][d] += dc * (r * h);
    back.g[d] = g * (1.0f - z) + dc * ah * r + dr * ar + dz * az;
  }
}

template <class T>
void lstm_back(const Token<T>& token, const StepBack<T>& back, const float* before, const float* cells,
               const float* next_cells, int64_t width) {
#pragma GCC ivdep
  for (int64_t d = 0; d < width; ++d) {
    const float h = before[d], af = token.a[0][d], ao = token.a[1][d], az = token.a[2][d];
    const float g = back.g[d] + to_float(back.dh[d]);
    const float f = sigmoid(to_float(token.x[0][d]) + af * h);
    const float o = sigmoid(to_float(token.x[1][d]) + ao * h);
    const float z = hyperbolic_tangent(to_float(token.x[2][d]) + az * h);
    const float t = hyperbolic_tangent(next_cells[d]);
    const float k = back.gc[d] + g * o * (1.0f - t * t);
    const float df = k * (cells[d] - z) * f * (1.0f - f);
    const float d_o = g * t * o * (1.0f - o);
    const float dz = k * (1.0f - f) * (1.0f - z * z);
    back.dx[0][d] = from_float<T>(df);
    back.dx[1][d] = from_float<T>(d_o);
    back.dx[2][d] = from_float<T>(dz);
    back.sums[0][d] += df * h;
    back.sums[1][d] += d_o * h;
    back.sums[2][d] += dz * h;
    back.gc[d] = k * f;
    back.g[d] = df * af + d_o * ao + dz * az;
  }
}

template <class T, bool LSTM>
void backward_task(const CellBackward& call, int64_t task, float* states, float* cells) {
  const Cell& forward = call.forward;
  const int64_t part = task / blocks_of(forward), length = forward.length;
  const Block block(forward, task % blocks_of(forward));
  const int64_t first = part * forward.batch / call.parts, last = (part + 1) * forward.batch / call.parts;
  alignas(64) float weights[3 * most] = {}, g[most], gc[most];
  for (int64_t batch = first; batch < last; ++batch) {
    read_state(states, forward.initial[0], batch, block);
    if (LSTM) read_state(cells, forward.initial[1], batch, block);
    for (int64_t time = 0; time < length; ++time) {
      const Token<T> token(forward, batch, time, block);
      float *h = states + time * most, *c = cells + time * most;
      if (LSTM) lstm_token(token, h, c, h + most, c + most, block.width);
      else gru_token(token, h, h + most, block.width);
    }
    read_state(g, call.dfinal[0], batch, block);
    read_state(gc, call.dfinal[1], batch, block);
    for (int64_t time = length - 1; time >= 0; --time) {
      const Token<T> token(forward, batch, time, block);
      const StepBack<T> back(call, batch, time, block, weights, g, gc);
      const float *h = states + time * most, *c = cells + time * most;
      if (LSTM) lstm_back(token, back, h, c, c + most, block.width);
      else gru_back(token, back, h, block.width);
    }
    write_state(g, call.dinitial[0], batch, block);
    if (LSTM) write_state(gc, call.dinitial[1], batch, block);
  }
  for (int i = 0; i < 3; ++i)
    for (int64_t d = 0; d < block.width; ++d)
      call.dweight[i][part * forward.width + block.first + d] = weights[i * most + d];
}

template <bool LSTM>
void forward_tasks(const Cell& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, for (int64_t task = begin; task < end; ++task) {
    forward_task<T, LSTM>(call, task);
  })
}

template <bool LSTM>
void backward_tasks(const CellBackward& call, int64_t begin, int64_t end) {
  const int64_t size = (call.forward.length + 1) * most;
  float* states = new float[LSTM ? 2 * size : size];
  STAR_WITH_DTYPE(call.forward.dtype, T, for (int64_t task = begin; task < end; ++task) {
    backward_task<T, LSTM>(call, task, states, LSTM ? states + size : states);
  })
  delete[] states;
}

}  // namespace

void gru_forward(const Cell& call, int64_t begin, int64_t end) { forward_tasks<false>(call, begin, end); }
void gru_backward(const CellBackward& call, int64_t begin, int64_t end) { backward_tasks<false>(call, begin, end); }
void lstm_forward(const Cell& call, int64_t begin, int64_t end) { forward_tasks<true>(call, begin, end); }
void lstm_backward(const CellBackward& call, int64_t begin, int64_t end) { backward_tasks<true>(call, begin, end); }

}  // namespace STAR_LEVEL
}  // namespace star
