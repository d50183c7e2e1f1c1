// Gated memoryless units on the CPU: arguments of the kernels and their declarations.
#pragma once

#include "../common/grid.h"
#include "../common/level.h"
#include "../common/types.h"

namespace star {

enum class Activation : int { silu, gelu, gelu_tanh, relu, sigmoid };

// y = activation(gate) * up over rows of D, and the gradients of both.
struct Glu {
  Dtype dtype;
  Activation activation;
  Grid grid;
  int64_t width;
  GridRows gate, up;
  GridRows y;                // forward
  GridRows dy, dgate, dup;   // backward
};

}  // namespace star

STAR_KERNEL(glu_forward, Glu)   // tasks: rows
STAR_KERNEL(glu_backward, Glu)  // tasks: rows
