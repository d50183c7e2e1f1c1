// Root-mean-square norm and rotary embedding on the CPU: checks, allocation, parallel loops, registration.
#include "../common/grid_tensor.h"
#include "kernels.h"

#include <tuple>

namespace star {
namespace {

constexpr int64_t grain_elements = 16384;  // below this a second thread costs more than it saves

int64_t rows_a_task(int64_t width) {
  const int64_t rows = grain_elements / (width > 0 ? width : 1);
  return rows > 1 ? rows : 1;
}

void check_norm(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1, "x must be (..., D) on the CPU");
  check_sizes(weight, "weight", {x.size(x.dim() - 1)});
}

void run_norm(RmsNorm& call, const Tensor& x, const Tensor& weight, double eps) {
  const Tensor weight_rows = as_float(weight);
  call.dtype = dtype_of(x, "x");
  call.eps = static_cast<float>(eps);
  call.weight = static_cast<const float*>(weight_rows.data_ptr());
  if (call.width == 0) return;
  torch::stable::parallel_for(0, call.grid.rows(), rows_a_task(call.width), [&](int64_t begin, int64_t end) {
    if (begin < end) rms_norm_forward(call, begin, end);
  });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  check_norm(x, weight);
  Tensor y = empty_like_shape(x, sizes_of(x));
  const GridTensors<2> tensors({x, y});
  RmsNorm call;
  call.grid = tensors.grid;
  call.width = tensors.width;
  call.x = tensors.rows(0);
  call.y = tensors.rows(1);
  run_norm(call, x, weight, eps);
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_residual(Tensor x, Tensor residual, Tensor weight, double eps) {
  check_norm(x, weight);
  check_like(residual, "residual", x);
  Tensor y = empty_like_shape(x, sizes_of(x));
  Tensor sum = empty_like_shape(x, sizes_of(x));
  const GridTensors<4> tensors({x, residual, y, sum});
  RmsNorm call;
  call.grid = tensors.grid;
  call.width = tensors.width;
  call.x = tensors.rows(0);
  call.residual = tensors.rows(1);
  call.y = tensors.rows(2);
  call.sum = tensors.rows(3);
  run_norm(call, x, weight, eps);
  return {y, sum};
}

// Adds the chunks' shares in their order.
void sum_parts(const float* parts, int64_t chunks, int64_t width, float* total) {
  for (int64_t d = 0; d < width; ++d) total[d] = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t d = 0; d < width; ++d) total[d] += parts[chunk * width + d];
}

std::tuple<Tensor, Tensor> rms_norm_backward_op(Tensor dy, OptionalTensor dsum, Tensor u, Tensor weight,
                                                double eps) {
  check_norm(u, weight);
  check_like(dy, "dy", u);
  if (dsum) check_like(*dsum, "dsum", u);
  Tensor dx = empty_like_shape(u, sizes_of(u));
  const GridTensors<4> tensors({dy, u, dx, dsum ? *dsum : dx});
  const Tensor weight_rows = as_float(weight);
  RmsNormBackward call;
  call.dtype = dtype_of(u, "x");
  call.grid = tensors.grid;
  call.width = tensors.width;
  call.rows = tensors.grid.rows();
  call.eps = static_cast<float>(eps);
  call.dy = tensors.rows(0);
  call.u = tensors.rows(1);
  call.dx = tensors.rows(2);
  if (dsum) call.dsum = tensors.rows(3);
  call.weight = static_cast<const float*>(weight_rows.data_ptr());

  // At most 64 chunks, a function of the shape alone.
  const int64_t smallest = rows_a_task(call.width), sixty_fourth = (call.rows + 63) / 64;
  call.chunk_rows = smallest > sixty_fourth ? smallest : sixty_fourth;
  const int64_t chunks = call.width == 0 ? 0 : (call.rows + call.chunk_rows - 1) / call.chunk_rows;
  Tensor parts = empty_float(u, {chunks, call.width});
  Tensor dweight = empty_float(u, {call.width});
  call.weight_parts = static_cast<float*>(parts.data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    rms_norm_backward(call, begin, end);
  });
  sum_parts(call.weight_parts, chunks, call.width, static_cast<float*>(dweight.data_ptr()));
  return {dx, dweight};
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool inverse) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(3) % 2 == 0, "x must be (B, L, H, Dh), Dh even");
  const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), half = x.size(3) / 2;
  check_sizes(cos, "cos", {length, half});
  check_sizes(sin, "sin", {length, half});
  const Tensor rows = with_contiguous_rows(x), cosines = as_float(cos), sines = as_float(sin);
  Tensor y = empty_like_shape(x, {batch, length, heads, 2 * half});
  Rope call;
  call.dtype = dtype_of(x, "x");
  call.inverse = inverse;
  call.length = length;
  call.heads = heads;
  call.half = half;
  call.x = rows.data_ptr();
  call.batch_stride = rows.stride(0);
  call.row_stride = rows.stride(1);
  call.head_stride = rows.stride(2);
  call.y = y.data_ptr();
  call.cos = static_cast<const float*>(cosines.data_ptr());
  call.sin = static_cast<const float*>(sines.data_ptr());
  torch::stable::parallel_for(0, batch * length, rows_a_task(heads * 2 * half), [&](int64_t begin, int64_t end) {
    if (begin < end) rope_rows(call, begin, end);
  });
  return y;
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&star::rms_norm));
  m.impl("rms_norm_residual", TORCH_BOX(&star::rms_norm_residual));
  m.impl("rms_norm_backward", TORCH_BOX(&star::rms_norm_backward_op));
  m.impl("rope", TORCH_BOX(&star::rope));
}
