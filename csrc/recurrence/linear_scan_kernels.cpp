// The linear scan on the CPU, and the ordered sum that ends every backward pass; compiled once per
// instruction-set level.
//
// Forward:   h_t = decay_t h_{t-1} + x_t
// Backward:  g_t = dh_t + decay_{t+1} g_{t+1},  dx_t = g_t,  ddecay_t = g_t h_{t-1},  dh_0 = decay_1 g_1
//            h is the forward pass's result, so nothing is recomputed.
#include "kernels.h"

#include "../common/scalar.h"

namespace star {
namespace STAR_LEVEL {
namespace {

struct Block {
  int64_t sequence, first, width;

  Block(const LinearScan& call, int64_t task) {
    const int64_t blocks = (call.width + call.block - 1) / call.block;
    sequence = task / blocks;
    first = task % blocks * call.block;
    width = call.width - first < call.block ? call.width - first : call.block;
  }
};

template <class T>
void forward_task(const LinearScan& call, int64_t task) {
  const Block block(call, task);
  const int64_t batch = call.spans.batch(block.sequence), end = call.spans.end(block.sequence);
  float* state = call.final + block.sequence * call.width + block.first;
  const float* initial = call.initial ? call.initial + block.sequence * call.width + block.first : nullptr;
  for (int64_t d = 0; d < block.width; ++d) state[d] = initial ? initial[d] : 0.0f;
  for (int64_t time = call.spans.start(block.sequence); time < end; ++time) {
    const T* decay = call.decay.row<T>(batch, time) + block.first;
    const T* x = call.x.row<T>(batch, time) + block.first;
    T* h = call.h.row<T>(batch, time) + block.first;
#pragma GCC ivdep
    for (int64_t d = 0; d < block.width; ++d) {
      const float after = to_float(decay[d]) * state[d] + to_float(x[d]);
      state[d] = after;
      h[d] = from_float<T>(after);
    }
  }
}

template <class T>
void backward_task(const LinearScanBackward& call, int64_t task, float* g) {
  const LinearScan& forward = call.forward;
  const Block block(forward, task);
  const int64_t batch = forward.spans.batch(block.sequence), start = forward.spans.start(block.sequence);
  const int64_t row = block.sequence * forward.width + block.first;
  for (int64_t d = 0; d < block.width; ++d) g[d] = call.dfinal ? call.dfinal[row + d] : 0.0f;
  for (int64_t time = forward.spans.end(block.sequence) - 1; time > start; --time) {
    const T* dh = call.dh.row<T>(batch, time) + block.first;
    const T* decay = forward.decay.row<T>(batch, time) + block.first;
    const T* before = forward.h.row<T>(batch, time - 1) + block.first;
    T* dx = call.dx.row<T>(batch, time) + block.first;
    T* ddecay = call.ddecay.row<T>(batch, time) + block.first;
#pragma GCC ivdep
    for (int64_t d = 0; d < block.width; ++d) {
      const float here = to_float(dh[d]) + g[d];
      dx[d] = from_float<T>(here);
      ddecay[d] = from_float<T>(here * to_float(before[d]));
      g[d] = here * to_float(decay[d]);
    }
  }
  if (forward.spans.end(block.sequence) > start) {  // the first token comes after the initial state
    const T* dh = call.dh.row<T>(batch, start) + block.first;
    const T* decay = forward.decay.row<T>(batch, start) + block.first;
    T* dx = call.dx.row<T>(batch, start) + block.first;
    T* ddecay = call.ddecay.row<T>(batch, start) + block.first;
    for (int64_t d = 0; d < block.width; ++d) {
      const float here = to_float(dh[d]) + g[d];
      dx[d] = from_float<T>(here);
      ddecay[d] = from_float<T>(forward.initial ? here * forward.initial[row + d] : 0.0f);
      g[d] = here * to_float(decay[d]);
    }
  }
  if (call.dinitial)
    for (int64_t d = 0; d < block.width; ++d) call.dinitial[row + d] = g[d];
}

template <class T>
void step_entry(const LinearScanStep& call, int64_t batch) {
  const T* decay = call.decay.row<T>(batch, 0);
  const T* x = call.x.row<T>(batch, 0);
  T* h = call.h.row<T>(batch, 0);
  float* state = call.state.row<float>(batch, 0);
#pragma GCC ivdep
  for (int64_t d = 0; d < call.width; ++d) {
    const float after = to_float(decay[d]) * state[d] + to_float(x[d]);
    state[d] = after;
    h[d] = from_float<T>(after);
  }
}

}  // namespace

void linear_scan_forward(const LinearScan& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, for (int64_t task = begin; task < end; ++task) forward_task<T>(call, task))
}

void linear_scan_backward(const LinearScanBackward& call, int64_t begin, int64_t end) {
  float* g = new float[call.forward.block];
  STAR_WITH_DTYPE(call.forward.dtype, T,
                  for (int64_t task = begin; task < end; ++task) backward_task<T>(call, task, g))
  delete[] g;
}

void linear_scan_step(const LinearScanStep& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, for (int64_t batch = begin; batch < end; ++batch) step_entry<T>(call, batch))
}

void sum_parts(const SumParts& call, int64_t begin, int64_t end) {
  constexpr int64_t piece = 256;
  float sums[piece];
  for (int64_t first = begin; first < end; first += piece) {
    const int64_t size = end - first < piece ? end - first : piece;
    for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
    for (int64_t part = 0; part < call.count; ++part) {
      const float* values = call.parts + part * call.size + first;
      for (int64_t i = 0; i < size; ++i) sums[i] += values[i];
    }
    STAR_WITH_DTYPE(call.dtype, T, {
      T* out = static_cast<T*>(call.out) + first;
      for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(sums[i]);
    })
  }
}

}  // namespace STAR_LEVEL
}  // namespace star
