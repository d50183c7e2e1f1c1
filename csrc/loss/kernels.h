// Cross-entropy of rows of logits on the CPU: arguments of the kernel and its declaration.
#pragma once

#include "../common/level.h"
#include "../common/types.h"

namespace star {

// losses[i] = logsumexp(logits[i]) - logits[i, target_i], 0 for ignored rows; where `share` is not null the
// logits become the gradient (softmax(logits[i]) - onehot(target_i)) * share, 0 for ignored rows.
struct CrossEntropyRows {
  float* logits;           // contiguous (N, V)
  const int64_t* targets;  // (N,)
  int64_t classes, ignore_index;
  const float* share;
  float* losses;  // (N,)
};

}  // namespace star

STAR_KERNEL(cross_entropy_rows, CrossEntropyRows)  // tasks: rows
