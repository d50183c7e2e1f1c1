// The recurrences on the CPU: arguments of the kernels and their declarations.
//
// Kernels run over tasks that share nothing. A task is one block of channels (or columns of a matrix state)
// of one sequence, or, where a backward pass sums over sequences, of one part of them: parts and blocks
// depend on the shapes alone, so that sums have one order whatever the number of threads.
#pragma once

#include "../common/level.h"
#include "../common/types.h"

namespace star {

// The sequences of a batch, or of a packed batch of 1. States have one row a sequence.
struct Spans {
  const int64_t* offsets = nullptr;  // S + 1 offsets of packed sequences, or null
  int64_t count = 0;
  int64_t length = 0;

  int64_t batch(int64_t sequence) const { return offsets ? 0 : sequence; }
  int64_t start(int64_t sequence) const { return offsets ? offsets[sequence] : 0; }
  int64_t end(int64_t sequence) const { return offsets ? offsets[sequence + 1] : length; }
};

// out = the sum of `count` parts of `size` numbers, added in their order.
struct SumParts {
  Dtype dtype;
  const float* parts;
  int64_t count, size;
  void* out;
};

// h_t = decay_t h_{t-1} + x_t
struct LinearScan {
  Dtype dtype;
  Spans spans;
  int64_t width, block;  // tasks: (sequence, block of channels)
  Rows decay, x, h;
  const float* initial;  // (S, D) or null
  float* final;          // (S, D)
};

struct LinearScanBackward {
  LinearScan forward;  // h: the forward pass's result
  Rows dh, ddecay, dx;
  const float* dfinal;  // (S, D) or null
  float* dinitial;      // (S, D) or null
};

struct LinearScanStep {
  Dtype dtype;
  int64_t width;
  Rows decay, x, h;
  Rows state;  // (B, D) float32, updated in place
};

// A (B, L, G, N) tensor of float32 whose last dimension is contiguous.
struct Mixes {
  const float* data;
  int64_t batch_stride, row_stride, group_stride;

  const float* row(int64_t batch, int64_t time, int64_t group) const {
    return data + batch * batch_stride + time * row_stride + group * group_stride;
  }
};

// h = exp(delta A) h + delta x B, y = (C h + D x) silu(z), with delta = softplus(dt + bias) or dt + bias.
struct SelectiveScan {
  Dtype dtype;
  bool softplus;
  Spans spans;
  int64_t width, states, groups;
  int64_t block, blocks;  // channels a task, and blocks a group; tasks: (sequence, group, block)
  Rows x, dt, z, y;       // z.data is null where there is no gate
  const float* A;         // (D, N)
  Mixes B, C;
  const float* D;         // (D,) or null
  const float* dt_bias;   // (D,) or null
  const float* initial;   // (S, D, N) or null
  float* final;           // (S, D, N)
};

struct SelectiveScanBackward {
  SelectiveScan forward;
  Rows dy, dx, ddt, dz;
  const float* dfinal;         // (S, D, N) or null
  float* dinitial;             // (S, D, N) or null
  int64_t parts;               // tasks: (part of the sequences, group, block)
  float *dA, *dD, *dbias;      // (parts, D, N), (parts, D), (parts, D)
  float *dB, *dC;              // (blocks, B L, G, N)
};

struct SelectiveScanStep {
  Dtype dtype;
  bool softplus;
  int64_t width, states, groups;
  Rows x, dt, z, y;
  const float* A;
  Mixes B, C;
  const float* D;
  const float* dt_bias;
  float* state;  // (B, D, N) float32 with these strides, updated in place
  int64_t state_batch_stride, state_row_stride;
};

}  // namespace star

STAR_KERNEL(sum_parts, SumParts)                             // tasks: numbers
STAR_KERNEL(linear_scan_forward, LinearScan)                 // tasks: (sequence, block)
STAR_KERNEL(linear_scan_backward, LinearScanBackward)        // tasks: (sequence, block)
STAR_KERNEL(linear_scan_step, LinearScanStep)                // tasks: batch entries
STAR_KERNEL(selective_scan_forward, SelectiveScan)           // tasks: (sequence, group, block)
STAR_KERNEL(selective_scan_backward, SelectiveScanBackward)  // tasks: (part, group, block)
STAR_KERNEL(selective_scan_step, SelectiveScanStep)          // tasks: batch entries
