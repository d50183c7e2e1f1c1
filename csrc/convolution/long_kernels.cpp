// Long causal depthwise convolution by FFT, plain and gated; compiled once per instruction-set level.
//
// Forward:   pre = kernel * u + skip u (causal), y = c pre | pre,  u = b x | x
// Backward:  g = c dy | dy,  dc = dy pre,  du = correlate(g, kernel) + skip g,  db = x du,  dx = b du | du
//            dkernel_j = sum_b,t g_t u_{t-j},  dskip = sum g u.  u and pre are recomputed.
#include "long_kernels.h"

#include "../common/scalar.h"
#include "fft.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr int64_t pair_width = 2 * lanes;  // channels of one transform

// A tile's channels [start, start + count), count <= pair_width; a row of them as one complex vector:
// the first `lanes` channels are real parts, the others imaginary parts.
struct Tile {
  int64_t start, count;
};

struct Buffer {
  complex_vec* data;
  explicit Buffer(int64_t size) : data(new complex_vec[size]) {}
  ~Buffer() { delete[] data; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <class T>
inline void load_row(const T* row, Tile tile, float (&into)[pair_width]) {
  if (tile.count == pair_width) {
    for (int64_t i = 0; i < pair_width; ++i) into[i] = to_float(row[tile.start + i]);
  } else {
    for (int64_t i = 0; i < pair_width; ++i) into[i] = i < tile.count ? to_float(row[tile.start + i]) : 0.0f;
  }
}

template <class T>
inline void store_row(T* row, Tile tile, const float (&from)[pair_width]) {
  if (tile.count == pair_width) {
    for (int64_t i = 0; i < pair_width; ++i) row[tile.start + i] = from_float<T>(from[i]);
  } else {
    for (int64_t i = 0; i < tile.count; ++i) row[tile.start + i] = from_float<T>(from[i]);
  }
}

inline complex_vec packed(const float (&row)[pair_width]) {
  complex_vec value;
  __builtin_memcpy(&value.re, row, sizeof(vec));
  __builtin_memcpy(&value.im, row + lanes, sizeof(vec));
  return value;
}

inline void unpack(complex_vec value, float (&row)[pair_width]) {
  __builtin_memcpy(row, &value.re, sizeof(vec));
  __builtin_memcpy(row + lanes, &value.im, sizeof(vec));
}

void clear(complex_vec* data, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) data[i] = complex_vec{vec{}, vec{}};
}

// left ⊙ right (right null: left alone), rows of one batch entry, zero-padded and transformed.
template <class T>
void product_spectrum(const LongConv& call, Rows left, Rows right, int64_t batch, Tile tile, complex_vec* into) {
  float a[pair_width], b[pair_width];
  for (int64_t t = 0; t < call.length; ++t) {
    load_row(left.row<T>(batch, t), tile, a);
    if (right.data) {
      load_row(right.row<T>(batch, t), tile, b);
      for (int64_t i = 0; i < pair_width; ++i) a[i] *= b[i];
    }
    into[t] = packed(a);
  }
  clear(into, call.length, call.size);
  forward_transform(into, call.size, call.roots, 1);
}

void kernel_spectrum(const LongConv& call, Tile tile, complex_vec* into) {
  float row[pair_width];
  for (int64_t j = 0; j < call.kernel_length; ++j) {
    for (int64_t i = 0; i < pair_width; ++i)
      row[i] = i < tile.count ? call.kernel[(tile.start + i) * call.kernel_length + j] : 0.0f;
    into[j] = packed(row);
  }
  clear(into, call.kernel_length, call.size);
  forward_transform(into, call.size, call.roots, 1);
}

void load_skip(const LongConv& call, Tile tile, float (&skip)[pair_width]) {
  for (int64_t i = 0; i < pair_width; ++i) skip[i] = call.skip && i < tile.count ? call.skip[tile.start + i] : 0.0f;
}

template <class T>
void forward_tile(const LongConv& call, Tile tile) {
  Buffer kernel(call.size), signal(call.size);
  float skip[pair_width], x[pair_width], b[pair_width], c[pair_width], y[pair_width];
  load_skip(call, tile, skip);
  kernel_spectrum(call, tile, kernel.data);
  const float scale = 1.0f / static_cast<float>(call.size);
  for (int64_t batch = 0; batch < call.batch; ++batch) {
    product_spectrum<T>(call, call.x, call.b, batch, tile, signal.data);
    multiply_spectra<false, false>(signal.data, signal.data, kernel.data, call.size);
    inverse_transform(signal.data, call.size, call.roots, 1);
    for (int64_t t = 0; t < call.length; ++t) {
      unpack(signal.data[t], y);
      load_row(call.x.row<T>(batch, t), tile, x);
      if (call.gated) {
        load_row(call.b.row<T>(batch, t), tile, b);
        load_row(call.c.row<T>(batch, t), tile, c);
        for (int64_t i = 0; i < pair_width; ++i) y[i] = c[i] * (y[i] * scale + skip[i] * b[i] * x[i]);
      } else {
        for (int64_t i = 0; i < pair_width; ++i) y[i] = y[i] * scale + skip[i] * x[i];
      }
      store_row(call.y.row<T>(batch, t), tile, y);
    }
  }
}

template <class T>
void backward_tile(const LongConvBackward& call, Tile tile) {
  const LongConv& forward = call.forward;
  const int64_t size = forward.size;
  Buffer kernel(size), input(size), gradient(size), kernel_gradient(size);
  float skip[pair_width], dskip[pair_width] = {};
  load_skip(forward, tile, skip);
  kernel_spectrum(forward, tile, kernel.data);
  clear(kernel_gradient.data, 0, size);
  const float scale = 1.0f / static_cast<float>(size);
  for (int64_t batch = 0; batch < forward.batch; ++batch) {
    product_spectrum<T>(forward, forward.x, forward.b, batch, tile, input.data);
    product_spectrum<T>(forward, call.dy, forward.c, batch, tile, gradient.data);
    multiply_spectra<true, true>(kernel_gradient.data, gradient.data, input.data, size);
    multiply_spectra<true, false>(gradient.data, gradient.data, kernel.data, size);
    inverse_transform(gradient.data, size, forward.roots, 1);
    if (forward.gated) {
      multiply_spectra<false, false>(input.data, input.data, kernel.data, size);
      inverse_transform(input.data, size, forward.roots, 1);
    }
    for (int64_t t = 0; t < forward.length; ++t) {
      float x[pair_width], b[pair_width], c[pair_width], dy[pair_width], du[pair_width], pre[pair_width];
      load_row(forward.x.row<T>(batch, t), tile, x);
      load_row(call.dy.row<T>(batch, t), tile, dy);
      unpack(gradient.data[t], du);
      if (!forward.gated) {
        for (int64_t i = 0; i < pair_width; ++i) {
          dskip[i] += dy[i] * x[i];
          du[i] = du[i] * scale + skip[i] * dy[i];
        }
        store_row(call.dx.row<T>(batch, t), tile, du);
        continue;
      }
      load_row(forward.b.row<T>(batch, t), tile, b);
      load_row(forward.c.row<T>(batch, t), tile, c);
      unpack(input.data[t], pre);
      for (int64_t i = 0; i < pair_width; ++i) {
        const float u = b[i] * x[i], g = c[i] * dy[i];
        const float total = du[i] * scale + skip[i] * g;
        dskip[i] += g * u;
        pre[i] = dy[i] * (pre[i] * scale + skip[i] * u);
        b[i] *= total;
        x[i] *= total;
      }
      store_row(call.dc.row<T>(batch, t), tile, pre);
      store_row(call.dx.row<T>(batch, t), tile, b);
      store_row(call.db.row<T>(batch, t), tile, x);
    }
  }
  inverse_transform(kernel_gradient.data, size, forward.roots, 1);
  float row[pair_width];
  for (int64_t j = 0; j < forward.kernel_length; ++j) {
    unpack(kernel_gradient.data[j], row);
    for (int64_t i = 0; i < tile.count; ++i)
      call.dkernel[(tile.start + i) * forward.kernel_length + j] = row[i] * scale;
  }
  for (int64_t i = 0; i < tile.count; ++i) call.dskip[tile.start + i] = dskip[i];
}

// The transforms that make up task `task`: long_conv_tile_width channels, pair_width at a time.
template <class F>
void for_each_tile(int64_t width, int64_t task, const F& f) {
  const int64_t end = (task + 1) * long_conv_tile_width < width ? (task + 1) * long_conv_tile_width : width;
  for (int64_t start = task * long_conv_tile_width; start < end; start += pair_width)
    f(Tile{start, end - start < pair_width ? end - start : pair_width});
}

// sum[i] += Σ_j tap_j[i] x_{t-j}[i] for `count` taps from `first` on, each of whose rows lies `step` after the
// one before.
template <class T, int64_t block>
STAR_INLINE void add_taps(float* sum, const float* taps, int64_t step, const T* past, int64_t row_stride,
                          int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const float* tap = taps + j * step;
    const T* row = past - j * row_stride;
    for (int64_t i = 0; i < block; ++i) sum[i] += tap[i] * to_float(row[i]);
  }
}

// Whole blocks of channels. A kernel whose taps are contiguous is turned over a few taps at a time, so that
// every cache line of it is read once.
template <class T, int64_t block>
STAR_INLINE void step_sums(const LongConvStep& call, const T* newest, int64_t start, int64_t taps, float* sum) {
  const int64_t row_stride = call.history.row_stride;
  const float* kernel = call.kernel + start * call.channel_stride;
  if (call.channel_stride == 1) {
    add_taps<T, block>(sum, kernel, call.tap_stride, newest + start, row_stride, taps);
    return;
  }
  constexpr int64_t depth = 16;
  float turned[depth * block];
  for (int64_t j = 0; j < taps; j += depth) {
    const int64_t count = taps - j < depth ? taps - j : depth;
    for (int64_t i = 0; i < block; ++i) {
      const float* from = kernel + i * call.channel_stride + j;
      for (int64_t k = 0; k < count; ++k) turned[k * block + i] = from[k];
    }
    add_taps<T, block>(sum, turned, block, newest + start - j * row_stride, row_stride, count);
  }
}

template <class T>
void step_block(const LongConvStep& call, int64_t batch, int64_t start, int64_t count) {
  constexpr int64_t block = long_conv_step_block;
  const int64_t taps = call.position + 1 < call.kernel_length ? call.position + 1 : call.kernel_length;
  const T* x = call.x.row<T>(batch, 0);
  const T* b = call.gated ? call.b.row<T>(batch, 0) : nullptr;
  const T* c = call.gated ? call.c.row<T>(batch, 0) : nullptr;
  T* newest = call.history.row<T>(batch, call.position);
  T* y = call.y.row<T>(batch, 0);
  for (int64_t d = start; d < start + count; ++d)
    newest[d] = from_float<T>(b ? to_float(b[d]) * to_float(x[d]) : to_float(x[d]));
  float sum[block] = {};
  if (count == block) {
    step_sums<T, block>(call, newest, start, taps, sum);
  } else {
    for (int64_t i = 0; i < count; ++i) step_sums<T, 1>(call, newest, start + i, taps, sum + i);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float u = b ? to_float(b[start + i]) * to_float(x[start + i]) : to_float(x[start + i]);
    const float pre = sum[i] + (call.skip ? call.skip[start + i] * u : 0.0f);
    y[start + i] = from_float<T>(c ? to_float(c[start + i]) * pre : pre);
  }
}

}  // namespace

void long_conv_forward(const LongConv& call, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    STAR_WITH_DTYPE(call.dtype, T, {
      for_each_tile(call.width, task, [&](Tile tile) { forward_tile<T>(call, tile); });
    })
  }
}

void long_conv_backward(const LongConvBackward& call, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    STAR_WITH_DTYPE(call.forward.dtype, T, {
      for_each_tile(call.forward.width, task, [&](Tile tile) { backward_tile<T>(call, tile); });
    })
  }
}

void long_conv_step(const LongConvStep& call, int64_t begin, int64_t end) {
  constexpr int64_t block = long_conv_step_block;
  const int64_t blocks = (call.width + block - 1) / block;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t start = task % blocks * block;
    const int64_t count = call.width - start < block ? call.width - start : block;
    STAR_WITH_DTYPE(call.dtype, T, { step_block<T>(call, task / blocks, start, count); })
  }
}

}  // namespace STAR_LEVEL
}  // namespace star
