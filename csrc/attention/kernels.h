// Softmax and differential attention on the CPU: arguments of the kernels and their declarations.
#pragma once

#include "../common/level.h"
#include "../common/types.h"

namespace star {

constexpr int64_t query_block = 48;  // rows of scores that a task holds at once, whole
constexpr int64_t key_chunk = 64;    // keys that a packing or writing task takes
constexpr int64_t padding = 32;      // every packed dimension is at most this much longer than the tensor's

// A (batch, length, heads, width) tensor whose last dimension is contiguous; strides count elements.
struct HeadRows {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;

  template <class T>
  T* at(int64_t batch, int64_t row, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + row * row_stride + head * head_stride;
  }
};

// One softmax ("side"), or the difference of two: y = (softmax(q1 k1) - lam softmax(q2 k2)) v.
struct Attention {
  Dtype dtype;
  int sides;
  bool causal;
  int64_t batch, queries, keys, heads, kv_heads, width, value_width;
  int64_t window;     // 0: none
  float scale;
  float softcap;      // 0: none
  const float* lam;   // (H,) where there are two sides
  const int64_t* offsets;  // S + 1 offsets of the packed sequences, or null
  int64_t sequences;
  HeadRows q[2], k[2], v, y;

  // Packed copies in float32, (B, Hkv) of them, each `..._stride` floats: see pack() in kernels.cpp.
  float* keys_across[2];    // panels of keys, depth the head's width: right side of q kᵀ
  float* values_along;      // panels of the values' width, depth the keys: right side of p v
  float* keys_along[2];     // panels of the head's width, depth the keys: right side of ds k
  float* values_across;     // panels of keys, depth the values' width: right side of dy vᵀ
  int64_t key_stride, value_stride;
};

// Tasks own a (batch, key head) and every `splits`-th block of queries, and add up their share of the key
// and value gradients; the shares are added in their order, so the sums do not depend on the threads.
struct AttentionBackward {
  Attention forward;
  HeadRows dy, dq[2], dk[2], dv;
  int64_t splits;
  float* dk_parts[2];  // (B, Hkv, splits, key_stride)
  float* dv_parts;     // (B, Hkv, splits, value_stride)
  float* dlam_parts;   // (B, H, blocks of queries)
};

}  // namespace star

STAR_KERNEL(attention_pack, Attention)                  // tasks: (batch, key head, chunk of keys)
STAR_KERNEL(attention_forward, Attention)               // tasks: (batch, head, block of queries)
STAR_KERNEL(attention_backward, AttentionBackward)      // tasks: (batch, key head, split)
STAR_KERNEL(attention_write_backward, AttentionBackward)  // tasks: (batch, key head, chunk of keys)
