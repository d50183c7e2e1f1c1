// Long causal depthwise convolution on the CPU: arguments of the kernels and their declarations.
#pragma once

#include "../common/level.h"
#include "../common/types.h"

namespace star {

// y = [c *] (sum_{s<=t} kernel_{t-s} u_s + skip u_t), u = [b *] x, over (B, L, D) rows.
// Tasks are tiles of channels (long_conv_tile_width of them), each with its own transforms.
struct LongConv {
  Dtype dtype;
  bool gated = false;
  int64_t batch, length, width, kernel_length;
  Rows x, b, c, y;
  const float* kernel;  // (D, kernel_length), contiguous
  const float* skip;    // (D,) or null
  const float* roots;   // (size, 2): e^(-2 pi i j / size)
  int64_t size;         // of the transforms: a power of two of at least length + kernel_length - 1
};

struct LongConvBackward {
  LongConv forward;
  Rows dy, dx, db, dc;
  float* dkernel;  // (D, kernel_length)
  float* dskip;    // (D,)
};

struct LongConvStep {
  Dtype dtype;
  bool gated = false;
  int64_t width, kernel_length, position;
  Rows x, b, c, y;      // one row a batch entry
  Rows history;         // (B, Lmax, D)
  const float* kernel;  // (D, kernel_length), one of the two strides 1
  int64_t channel_stride, tap_stride;
  const float* skip;
};

}  // namespace star

constexpr int64_t long_conv_step_block = 64;  // channels whose sums stay in registers or the nearest cache
constexpr int64_t long_conv_tile_width = 32;  // a multiple of twice the lanes of every level

STAR_KERNEL(long_conv_forward, LongConv)           // tasks: tiles of channels
STAR_KERNEL(long_conv_backward, LongConvBackward)  // tasks: tiles of channels
STAR_KERNEL(long_conv_step, LongConvStep)          // tasks: batch entries x blocks of channels
