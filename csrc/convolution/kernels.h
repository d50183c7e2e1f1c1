// Short causal depthwise convolution on the CPU: arguments of the kernels and their declarations.
#pragma once

#include "../common/level.h"
#include "../common/types.h"

namespace star {

// y = activation(conv(u)) or c * conv(u), with u = x or b * x, over rows of a (B, L, D) batch.
// Sources of a row before its sequence's start are rows of `state` (S, K-1, D) or zeros; they hold u
// itself, so the gated form reads them beside a row of ones.
struct ShortConv {
  Dtype dtype;
  bool gated = false;
  bool silu = false;
  int64_t length, width, taps;
  Rows x, b, c, y;
  const float* weight;  // (K, D), transposed so that a tap's weights are contiguous
  const float* bias;    // (D,); zeros where there is none, so that loops need no branch and vectorise
  Rows state;           // contiguous (S, K-1, D); data is null where there is none
  const void* zeros;    // D zeros, and
  const void* ones;     // D ones, of the storage type
  const int64_t* offsets;  // S + 1 offsets of the packed sequences, or null
  int64_t sequences;
};

// Gradients of the above. Tasks are fixed chunks of rows, so that the sums over rows have one order
// whatever the number of threads: chunk i writes its weight and bias sums to row i of `weight_parts`.
struct ShortConvBackward {
  ShortConv forward;
  Rows dy;
  Rows dx, db, dc;
  Rows dfinal;              // (S, K-1, D), gradient of the final state; data null where there is none
  Rows dstate;              // (S, K-1, D), written; data null where there is no initial state
  int64_t chunk_rows;
  float* weight_parts;      // (chunks, K + 1, D)
};

struct ShortConvStep {
  Dtype dtype;
  bool gated = false;
  bool silu = false;
  int64_t width, taps;
  Rows x, b, c, y;   // one row a batch entry
  Rows state;        // (B, K-1, D), shifted in place; here alone channels need not lie side by side
  int64_t state_channel_stride = 1;
  const float* weight;  // (D, K)
  const float* bias;
};

}  // namespace star

STAR_KERNEL(short_conv_forward, ShortConv)          // tasks: rows of the flattened (B, L)
STAR_KERNEL(short_conv_final_state, ShortConv)      // tasks: sequences; y holds the (S, K-1, D) result
STAR_KERNEL(short_conv_backward, ShortConvBackward) // tasks: chunks of rows
STAR_KERNEL(short_conv_dstate, ShortConvBackward)   // tasks: sequences
STAR_KERNEL(short_conv_step, ShortConvStep)         // tasks: batch entries
