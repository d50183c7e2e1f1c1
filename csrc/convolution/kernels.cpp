// Short causal depthwise convolution, plain and gated; compiled once per instruction-set level.
//
// Forward:   pre_t = bias + sum_k w_k u_{t-K+1+k},  y_t = silu(pre_t) | c_t pre_t | pre_t,  u = x | b x
// Backward:  g_t = dy_t silu'(pre_t) | dy_t c_t | dy_t,  dc_t = dy_t pre_t
//            du_t = sum_k w_k g_{t+K-1-k},  dw_k = sum_t g_t u_{t-K+1+k},  dbias = sum_t g_t
//            dx = du | b du,  db = x du;  pre is recomputed, nothing of the forward pass is kept.
#include "kernels.h"

#include "../common/math.h"

namespace star {
namespace STAR_LEVEL {
namespace {

// Walks rows of the flattened batch and knows the sequence that each one belongs to.
struct Position {
  int64_t batch, time, sequence, start, end;
};

Position locate(const ShortConv& call, int64_t row) {
  Position at;
  at.batch = row / call.length;
  at.time = row % call.length;
  at.sequence = at.batch;
  at.start = 0;
  at.end = call.length;
  if (call.offsets) {
    int64_t low = 0, high = call.sequences;  // offsets[low] <= time < offsets[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (call.offsets[middle] <= at.time ? low : high) = middle;
    }
    at.sequence = low;
    at.start = call.offsets[low];
    at.end = call.offsets[low + 1];
  }
  return at;
}

Position next(const ShortConv& call, Position at) {
  ++at.time;
  if (at.time < at.end) return at;
  return locate(call, at.batch * call.length + at.time);
}

// The K source rows of one output row: u = first * second elementwise in the gated form.
template <class T>
struct Window {
  const T** x;
  const T** b;

  explicit Window(int64_t taps) : x(new const T*[2 * taps]), b(x + taps) {}
  ~Window() { delete[] x; }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;
};

template <class T>
void gather(const ShortConv& call, const Position& at, Window<T>& window) {
  for (int64_t k = 0; k < call.taps; ++k) {
    const int64_t source = at.time - (call.taps - 1) + k;
    if (source >= at.start) {
      window.x[k] = call.x.row<T>(at.batch, source);
      window.b[k] = call.gated ? call.b.row<T>(at.batch, source) : nullptr;
    } else {
      const bool kept = call.state.data != nullptr;
      window.x[k] = kept ? call.state.row<T>(at.sequence, source - at.start + call.taps - 1)
                         : static_cast<const T*>(call.zeros);
      window.b[k] = static_cast<const T*>(call.ones);
    }
  }
}

template <class T, bool gated>
STAR_INLINE float source(const Window<T>& window, int64_t k, int64_t d) {
  const float x = to_float(window.x[k][d]);
  return gated ? x * to_float(window.b[k][d]) : x;
}

// pre[d] for one row; TAPS 0 takes the number of taps from the call.
template <class T, bool gated, int TAPS>
STAR_INLINE float convolve(const ShortConv& call, const Window<T>& window, int64_t d) {
  const int64_t taps = TAPS ? TAPS : call.taps;
  float sum = call.bias[d];
  for (int64_t k = 0; k < taps; ++k) sum += call.weight[k * call.width + d] * source<T, gated>(window, k, d);
  return sum;
}

template <class T, bool gated, bool silu_after, int TAPS>
void forward_rows(const ShortConv& call, int64_t begin, int64_t end) {
  Window<T> window(call.taps);
  Position at = locate(call, begin);
  for (int64_t row = begin; row < end; ++row, at = row < end ? next(call, at) : at) {
    gather(call, at, window);
    T* y = call.y.row<T>(at.batch, at.time);
    const T* c = gated ? call.c.row<T>(at.batch, at.time) : nullptr;
#pragma GCC ivdep
    for (int64_t d = 0; d < call.width; ++d) {
      const float pre = convolve<T, gated, TAPS>(call, window, d);
      y[d] = from_float<T>(gated ? pre * to_float(c[d]) : silu_after ? silu(pre) : pre);
    }
  }
}

// g for one row into `into`, and, where asked, dc and the row's share of the weight and bias sums.
template <class T, bool gated, bool silu_after, int TAPS, bool accumulate>
void pre_gradient(const ShortConvBackward& call, const Position& at, Window<T>& window, float* into,
                  float* sums) {
  const ShortConv& forward = call.forward;
  const int64_t width = forward.width, taps = TAPS ? TAPS : forward.taps;
  const T* dy = call.dy.row<T>(at.batch, at.time);
  const T* c = gated ? forward.c.row<T>(at.batch, at.time) : nullptr;
  T* dc = gated && accumulate ? call.dc.row<T>(at.batch, at.time) : nullptr;
  if (accumulate || silu_after) gather(forward, at, window);
#pragma GCC ivdep
  for (int64_t d = 0; d < width; ++d) {
    float g = to_float(dy[d]);
    if (silu_after || (gated && accumulate)) {
      const float pre = convolve<T, gated, TAPS>(forward, window, d);
      if (silu_after) g *= silu_slope(pre, sigmoid(pre));
      if (gated && accumulate) dc[d] = from_float<T>(g * pre);
    }
    if (gated) g *= to_float(c[d]);
    into[d] = g;
  }
  if (!accumulate) return;
  if (TAPS) {
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t k = 0; k < TAPS; ++k) sums[k * width + d] += into[d] * source<T, gated>(window, k, d);
      sums[TAPS * width + d] += into[d];
    }
    return;
  }
  // One pass a tap: a loop over a number of taps that the compiler does not know would not vectorise.
  for (int64_t k = 0; k < taps; ++k) {
    float* sum = sums + k * width;
#pragma GCC ivdep
    for (int64_t d = 0; d < width; ++d) sum[d] += into[d] * source<T, gated>(window, k, d);
  }
  float* sum = sums + taps * width;
#pragma GCC ivdep
  for (int64_t d = 0; d < width; ++d) sum[d] += into[d];
}

template <class T, bool gated, bool silu_after, int TAPS>
void backward_chunk(const ShortConvBackward& call, int64_t chunk) {
  const ShortConv& forward = call.forward;
  const int64_t width = forward.width, taps = TAPS ? TAPS : forward.taps, length = forward.length;
  const int64_t chunks_a_batch = (length + call.chunk_rows - 1) / call.chunk_rows;
  const int64_t batch = chunk / chunks_a_batch;
  const int64_t begin = (chunk % chunks_a_batch) * call.chunk_rows;
  const int64_t end = begin + call.chunk_rows < length ? begin + call.chunk_rows : length;
  const int64_t last = end + taps - 1 < length ? end + taps - 1 : length;
  float* sums = call.weight_parts + chunk * (taps + 1) * width;
  for (int64_t i = 0; i < (taps + 1) * width; ++i) sums[i] = 0.0f;

  // A ring of the last K rows of g: row t's inputs are g_t ... g_{t+K-1}.
  float* ring = new float[taps * width];
  const float** g = new const float*[taps];
  Window<T> window(taps);
  Position ahead = locate(forward, batch * length + begin);
  Position at = ahead;
  for (int64_t filled = begin; at.time < end;) {
    const int64_t wanted = at.time + taps < last ? at.time + taps : last;
    for (; filled < wanted; ++filled) {
      float* into = ring + (filled % taps) * width;
      if (filled < end) {
        pre_gradient<T, gated, silu_after, TAPS, true>(call, ahead, window, into, sums);
      } else {
        pre_gradient<T, gated, silu_after, TAPS, false>(call, ahead, window, into, nullptr);
      }
      if (filled + 1 < length) ahead = next(forward, ahead);
    }
    const T* x = forward.x.row<T>(batch, at.time);
    const T* b = gated ? forward.b.row<T>(batch, at.time) : nullptr;
    T* dx = call.dx.row<T>(batch, at.time);
    T* db = gated ? call.db.row<T>(batch, at.time) : nullptr;
    int64_t used = 0;
    for (; used < taps && at.time + used < at.end; ++used) g[used] = ring + ((at.time + used) % taps) * width;
    const int64_t from_end = at.end - at.time;
    const T* dfinal = call.dfinal.data && from_end < taps
                          ? call.dfinal.row<T>(at.sequence, taps - 1 - from_end)
                          : nullptr;
    const auto finish = [&](int64_t d, float du) __attribute__((always_inline)) {
      if (gated) {
        db[d] = from_float<T>(du * to_float(x[d]));
        dx[d] = from_float<T>(du * to_float(b[d]));
      } else {
        dx[d] = from_float<T>(du);
      }
    };
    if (TAPS && used == taps && !dfinal) {
#pragma GCC ivdep
      for (int64_t d = 0; d < width; ++d) {
        float du = 0.0f;
        for (int64_t j = 0; j < TAPS; ++j) du += forward.weight[(TAPS - 1 - j) * width + d] * g[j][d];
        finish(d, du);
      }
    } else {
      for (int64_t d = 0; d < width; ++d) {
        float du = dfinal ? to_float(dfinal[d]) : 0.0f;
        for (int64_t j = 0; j < used; ++j) du += forward.weight[(taps - 1 - j) * width + d] * g[j][d];
        finish(d, du);
      }
    }
    if (at.time + 1 >= length) break;
    at = next(forward, at);
  }
  delete[] g;
  delete[] ring;
}

template <class T, bool gated, bool silu_after>
void dstate_sequence(const ShortConvBackward& call, int64_t sequence) {
  const ShortConv& forward = call.forward;
  const int64_t width = forward.width, taps = forward.taps;
  Position at;
  at.batch = forward.offsets ? 0 : sequence;
  at.sequence = sequence;
  at.start = forward.offsets ? forward.offsets[sequence] : 0;
  at.end = forward.offsets ? forward.offsets[sequence + 1] : forward.length;
  const int64_t rows = at.end - at.start < taps - 1 ? at.end - at.start : taps - 1;
  float* g = new float[taps * width];
  Window<T> window(taps);
  for (int64_t i = 0; i < rows; ++i) {
    at.time = at.start + i;
    pre_gradient<T, gated, silu_after, 0, false>(call, at, window, g + i * width, nullptr);
  }
  // State row j stands at time start - (K-1) + j; it meets g_i through tap (K-1) - (K-1-j+i) = j - i.
  for (int64_t j = 0; j < taps - 1; ++j) {
    T* dstate = call.dstate.row<T>(sequence, j);
    const int64_t final_row = j - (at.end - at.start);
    const T* dfinal = call.dfinal.data && final_row >= 0 ? call.dfinal.row<T>(sequence, final_row) : nullptr;
    for (int64_t d = 0; d < width; ++d) {
      float sum = dfinal ? to_float(dfinal[d]) : 0.0f;
      for (int64_t i = 0; i < rows && i <= j; ++i) sum += forward.weight[(j - i) * width + d] * g[i * width + d];
      dstate[d] = from_float<T>(sum);
    }
  }
  delete[] g;
}

template <class T>
void final_state_sequence(const ShortConv& call, int64_t sequence) {
  Position at;
  at.batch = call.offsets ? 0 : sequence;
  at.sequence = sequence;
  at.start = call.offsets ? call.offsets[sequence] : 0;
  at.end = call.offsets ? call.offsets[sequence + 1] : call.length;
  at.time = at.end - 1;
  // The window of the last row, less its first entry, would need the row itself to exist; shift by one.
  Window<T> window(call.taps);
  ++at.time;
  gather(call, at, window);
  for (int64_t j = 0; j < call.taps - 1; ++j) {
    T* kept = call.y.row<T>(sequence, j);
    const int64_t row = at.end - (call.taps - 1) + j;
    const bool product = call.gated && row >= at.start;
    for (int64_t d = 0; d < call.width; ++d) {
      const float x = to_float(window.x[j][d]);
      kept[d] = from_float<T>(product ? x * to_float(window.b[j][d]) : x);
    }
  }
}

// `count` channels from d on, their taps turned over so that all loops run over channels, whose states lie
// side by side (`dense`) or apart.
template <class T, bool gated, bool silu_after, int TAPS, bool dense, int64_t count>
STAR_INLINE void step_channels(const ShortConvStep& call, int64_t batch, int64_t d) {
  const int64_t taps = TAPS ? TAPS : call.taps, stride = call.state.row_stride;
  const int64_t apart = dense ? 1 : call.state_channel_stride;
  const float* weight = call.weight + d * taps;
  T* state = call.state.row<T>(batch, 0) + d * apart;
  const T* x = call.x.row<T>(batch, 0) + d;
  float u[count], pre[count];
  for (int64_t i = 0; i < count; ++i) u[i] = to_float(x[i]);
  if (gated) {
    const T* b = call.b.row<T>(batch, 0) + d;
    for (int64_t i = 0; i < count; ++i) u[i] *= to_float(b[i]);
  }
  for (int64_t i = 0; i < count; ++i) pre[i] = weight[i * taps + taps - 1] * u[i];
  if (call.bias)
    for (int64_t i = 0; i < count; ++i) pre[i] += call.bias[d + i];
  for (int64_t k = 0; k + 1 < taps; ++k) {
    T* row = state + k * stride;
    for (int64_t i = 0; i < count; ++i) pre[i] += weight[i * taps + k] * to_float(row[i * apart]);
    if (k + 2 < taps) {
      for (int64_t i = 0; i < count; ++i) row[i * apart] = row[stride + i * apart];
    } else {
      for (int64_t i = 0; i < count; ++i) row[i * apart] = from_float<T>(u[i]);
    }
  }
  T* y = call.y.row<T>(batch, 0) + d;
  if (gated) {
    const T* c = call.c.row<T>(batch, 0) + d;
    for (int64_t i = 0; i < count; ++i) y[i] = from_float<T>(pre[i] * to_float(c[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = from_float<T>(silu_after ? silu(pre[i]) : pre[i]);
  }
}

template <class T, bool gated, bool silu_after, int TAPS, bool dense>
void step_entry(const ShortConvStep& call, int64_t batch) {
  constexpr int64_t block = 64;
  int64_t d = 0;
  for (; d + block <= call.width; d += block) step_channels<T, gated, silu_after, TAPS, dense, block>(call, batch, d);
  for (; d < call.width; ++d) step_channels<T, gated, silu_after, TAPS, dense, 1>(call, batch, d);
}

// Turns the call's flags into template arguments: F<T, gated, silu, TAPS>.
#define STAR_WITH_TAPS(taps, TAPS, ...)                          \
  switch (taps) {                                                \
    case 2: { constexpr int TAPS = 2; __VA_ARGS__; break; }      \
    case 3: { constexpr int TAPS = 3; __VA_ARGS__; break; }      \
    case 4: { constexpr int TAPS = 4; __VA_ARGS__; break; }      \
    default: { constexpr int TAPS = 0; __VA_ARGS__; break; }     \
  }
#define STAR_WITH_FORM(call, GATED, SILU, ...)                                             \
  if ((call).gated) { constexpr bool GATED = true, SILU = false; __VA_ARGS__; }            \
  else if ((call).silu) { constexpr bool GATED = false, SILU = true; __VA_ARGS__; }        \
  else { constexpr bool GATED = false, SILU = false; __VA_ARGS__; }

}  // namespace

void short_conv_forward(const ShortConv& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, STAR_WITH_FORM(call, GATED, SILU, STAR_WITH_TAPS(call.taps, TAPS, {
    forward_rows<T, GATED, SILU, TAPS>(call, begin, end);
  })))
}

void short_conv_final_state(const ShortConv& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, {
    for (int64_t sequence = begin; sequence < end; ++sequence) final_state_sequence<T>(call, sequence);
  })
}

void short_conv_backward(const ShortConvBackward& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.forward.dtype, T, STAR_WITH_FORM(call.forward, GATED, SILU,
      STAR_WITH_TAPS(call.forward.taps, TAPS, {
        for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<T, GATED, SILU, TAPS>(call, chunk);
      })))
}

void short_conv_dstate(const ShortConvBackward& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.forward.dtype, T, STAR_WITH_FORM(call.forward, GATED, SILU, {
    for (int64_t sequence = begin; sequence < end; ++sequence) dstate_sequence<T, GATED, SILU>(call, sequence);
  }))
}

void short_conv_step(const ShortConvStep& call, int64_t begin, int64_t end) {
  STAR_WITH_DTYPE(call.dtype, T, STAR_WITH_FORM(call, GATED, SILU, STAR_WITH_TAPS(call.taps, TAPS, {
    for (int64_t batch = begin; batch < end; ++batch) {
      if (call.state_channel_stride == 1) step_entry<T, GATED, SILU, TAPS, true>(call, batch);
      else step_entry<T, GATED, SILU, TAPS, false>(call, batch);
    }
  })))
}

}  // namespace STAR_LEVEL
}  // namespace star
