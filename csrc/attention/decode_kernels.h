// Attention of one query over a cache on the CPU: arguments of the kernel and its declaration.
#pragma once

#include "kernels.h"

namespace star {

// One softmax ("side"), or the difference of two, of the newest query over the first entries of a cache.
struct AttentionDecode {
  Dtype dtype;
  int sides;
  int64_t kv_heads, group, width, value_width;  // group: query heads a key head
  int64_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
  const float* lam;  // (H,) where there are two sides
  HeadRows q[2], k[2], v, y;  // q and y have one row
  const int32_t* lengths;     // how many entries each sequence has; null: `length` for all
  int64_t length;
};

// All sequences and heads, in parallel where the work is worth it (decode_cpu.cpp).
void run_attention_decode(const AttentionDecode& call, int64_t batch, int64_t longest);

}  // namespace star

STAR_KERNEL(attention_decode, AttentionDecode)  // tasks: (batch, key head)
