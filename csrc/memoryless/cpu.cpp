// Gated memoryless units on the CPU: checks, allocation, parallel loops, registration.
#include "../common/grid_tensor.h"
#include "kernels.h"

#include <tuple>

namespace star {
namespace {

constexpr int64_t grain_elements = 8192;  // below this a second thread costs more than it saves

Glu prepare(const Tensor& gate, const Tensor& up, int64_t activation) {
  STD_TORCH_CHECK(gate.is_cpu() && gate.dim() >= 1, "gate must be (..., D) on the CPU");
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::sigmoid),
                  "activation has no meaning");
  check_like(up, "up", gate);
  Glu call;
  call.dtype = dtype_of(gate, "gate");
  call.activation = static_cast<Activation>(activation);
  return call;
}

int64_t rows_a_task(int64_t width) {
  const int64_t rows = grain_elements / (width > 0 ? width : 1);
  return rows > 1 ? rows : 1;
}

Tensor glu(Tensor gate, Tensor up, int64_t activation) {
  Glu call = prepare(gate, up, activation);
  Tensor y = empty_like_shape(gate, sizes_of(gate));
  const GridTensors<3> tensors({gate, up, y});
  call.grid = tensors.grid;
  call.width = tensors.width;
  call.gate = tensors.rows(0);
  call.up = tensors.rows(1);
  call.y = tensors.rows(2);
  torch::stable::parallel_for(0, call.grid.rows(), rows_a_task(call.width), [&](int64_t begin, int64_t end) {
    if (begin < end) glu_forward(call, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor> glu_backward_op(Tensor dy, Tensor gate, Tensor up, int64_t activation) {
  Glu call = prepare(gate, up, activation);
  check_like(dy, "dy", gate);
  Tensor dgate = empty_like_shape(gate, sizes_of(gate));
  Tensor dup = empty_like_shape(gate, sizes_of(gate));
  const GridTensors<5> tensors({dy, gate, up, dgate, dup});
  call.grid = tensors.grid;
  call.width = tensors.width;
  call.dy = tensors.rows(0);
  call.gate = tensors.rows(1);
  call.up = tensors.rows(2);
  call.dgate = tensors.rows(3);
  call.dup = tensors.rows(4);
  torch::stable::parallel_for(0, call.grid.rows(), rows_a_task(call.width), [&](int64_t begin, int64_t end) {
    if (begin < end) glu_backward(call, begin, end);
  });
  return {dgate, dup};
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("glu", TORCH_BOX(&star::glu));
  m.impl("glu_backward", TORCH_BOX(&star::glu_backward_op));
}
