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

// A (B, L, H, X) tensor whose last dimension is contiguous, or a (B, L, H) one; strides count elements.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;

  template <class T>
  T* at(int64_t batch, int64_t time, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + time * row_stride + head * head_stride;
  }
};

// S_t = exp(g_t) S_{t-1} + k_t u_t^T, y_t = scale S_t^T q_t, with u_t = v_t or, by the delta rule,
// u_t = beta_t e_t, e_t = v_t - (exp(g_t) S_{t-1})^T k_t.
struct MatrixState {
  Dtype dtype;
  bool delta;
  Spans spans;
  int64_t heads, key_heads, keys, values;  // H, Hk, Dk, Dv
  int64_t tile, tiles;                     // columns of S a task, tiles a head
  float scale;
  Heads q, k, v, beta, y;
  Heads log_decay;        // float32; data is null where nothing decays
  bool decay_of_keys;     // (B, L, H, Dk) rather than (B, L, H)
  const float* initial;   // (S, H, Dk, Dv) or null
  float* final;           // (S, H, Dk, Dv)
  Heads error;            // (B, L, H, Dv) float32: the e_t of the delta rule, where they are wanted
};

// Two passes over the whole sequences. Columns: lanes are columns of S, tasks are tiles of columns; walks
// backward to du_t = dS_t^T k_t. Rows: lanes are rows of S, tasks are tiles of rows; walks forward, then
// backward chunk by chunk, to dq, dk and dg. The delta rule's columns are joined through e and du alone.
struct MatrixStateBackward {
  MatrixState forward;
  Heads dy;
  Heads du;                 // (B, L, H, Dv), of type du_dtype
  Dtype du_dtype;
  const float* dfinal;      // (S, H, Dk, Dv) or null
  float* dinitial;          // (S, H, Dk, Dv) or null
  int64_t row_tile, row_tiles;
  Heads dq, dk;             // (B, L, H, Dk) float32
  Heads dlog_decay;         // float32 (B, L, H, Dk), or (row tiles, B, L, H) of which the first is here
  int64_t dlog_decay_tile_stride;
};

// dv = beta du and dbeta = sum e du of the delta rule; out = sums over the heads that share a key.
struct DeltaOutputs {
  Dtype dtype;
  int64_t batch, length, heads, values;
  Heads beta, error, du, dv, dbeta;
};

struct SharedHeads {
  Dtype dtype;
  int64_t batch, length, heads, key_heads, keys;
  Heads of_heads, out;
};

struct MatrixStateStep {
  Dtype dtype;
  bool delta;
  int64_t heads, key_heads, keys, values;
  float scale;
  Heads q, k, v, beta, y, log_decay;
  bool decay_of_keys;
  float* state;  // (B, H, Dk, Dv) float32 with these strides, updated in place
  int64_t state_batch_stride, state_head_stride, state_row_stride;
};

// A (B, D) float32 state; data is null where there is none.
struct CellState {
  float* data = nullptr;
  int64_t batch_stride = 0;
};

// The GRU (inputs z, r, h; state h) and the LSTM (inputs f, o, z; states h, c) with diagonal weights.
struct Cell {
  Dtype dtype;
  int64_t batch, length, width, block;  // tasks: (batch entry, block of channels)
  Rows x[3], h;
  const float* weight[3];  // (D,)
  CellState initial[2], final[2];
};

struct CellBackward {
  Cell forward;
  Rows dh, dx[3];
  CellState dfinal[2], dinitial[2];
  int64_t parts;      // tasks: (part of the batch, block of channels)
  float* dweight[3];  // (parts, D)
};

}  // namespace star

STAR_KERNEL(sum_parts, SumParts)                             // tasks: numbers
STAR_KERNEL(linear_scan_forward, LinearScan)                 // tasks: (sequence, block)
STAR_KERNEL(linear_scan_backward, LinearScanBackward)        // tasks: (sequence, block)
STAR_KERNEL(linear_scan_step, LinearScanStep)                // tasks: batch entries
STAR_KERNEL(selective_scan_forward, SelectiveScan)           // tasks: (sequence, group, block)
STAR_KERNEL(selective_scan_backward, SelectiveScanBackward)  // tasks: (part, group, block)
STAR_KERNEL(selective_scan_step, SelectiveScanStep)          // tasks: batch entries
STAR_KERNEL(matrix_state_forward, MatrixState)               // tasks: (sequence, head, tile of columns)
STAR_KERNEL(matrix_state_columns, MatrixStateBackward)       // tasks: (sequence, head, tile of columns)
STAR_KERNEL(matrix_state_rows, MatrixStateBackward)          // tasks: (sequence, head, tile of rows)
STAR_KERNEL(delta_outputs, DeltaOutputs)                     // tasks: (batch, time, head)
STAR_KERNEL(sum_shared_heads, SharedHeads)                   // tasks: (batch, time, key head)
STAR_KERNEL(matrix_state_step, MatrixStateStep)              // tasks: (batch, head)
STAR_KERNEL(gru_forward, Cell)                               // tasks: (batch entry, block)
STAR_KERNEL(gru_backward, CellBackward)                      // tasks: (part, block)
STAR_KERNEL(lstm_forward, Cell)                              // tasks: (batch entry, block)
STAR_KERNEL(lstm_backward, CellBackward)                     // tasks: (part, block)
