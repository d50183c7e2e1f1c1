// Attention of one query over a cache on the CPU: arguments of the kernel and its declaration.
#pragma once

#include "kernels.h"

namespace star {

struct AttentionDecode {
  Dtype dtype;
  int64_t kv_heads, group, width, value_width;  // group: query heads a key head
  int64_t window;  // 0: none
  float scale;
  HeadRows q, k, v, y;  // q and y have one row
  const int32_t* lengths;
};

}  // namespace star

STAR_KERNEL(attention_decode, AttentionDecode)  // tasks: (batch, key head)
