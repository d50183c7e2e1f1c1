// Long causal depthwise convolution on the CPU: checks, allocation, parallel loops, registration.
#include "../common/tensor.h"
#include "long_kernels.h"
#include "position.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace star {
namespace {

// The roots of unity of a size, e^(-2 pi i j / size) as (cos, sin), computed once a process and size.
const float* roots_of_unity(int64_t size) {
  static std::mutex guard;
  static std::map<int64_t, std::unique_ptr<std::vector<float>>> tables;
  const std::lock_guard<std::mutex> lock(guard);
  std::unique_ptr<std::vector<float>>& table = tables[size];
  if (!table) {
    table = std::make_unique<std::vector<float>>(2 * size);
    for (int64_t j = 0; j < size; ++j) {
      const double angle = -2.0 * 3.14159265358979323846 * static_cast<double>(j) / static_cast<double>(size);
      (*table)[2 * j] = static_cast<float>(std::cos(angle));
      (*table)[2 * j + 1] = static_cast<float>(std::sin(angle));
    }
  }
  return table->data();
}

// Owns what a LongConv call points into.
struct Prepared {
  LongConv call;
  std::vector<Tensor> kept;
  int64_t whole_kernel_length;

  Prepared(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x, const Tensor& kernel,
           const OptionalTensor& skip) {
    STD_TORCH_CHECK(x.dim() == 3 && kernel.dim() == 2, "x must be (B, L, D) and kernel (D, Lk)");
    call.dtype = dtype_of(x, "x");
    call.gated = b.has_value();
    call.batch = x.size(0);
    call.length = x.size(1);
    call.width = x.size(2);
    check_sizes(kernel, "kernel", {call.width, -1});
    whole_kernel_length = kernel.size(1);
    call.x = keep_rows(x, "x", x);
    if (b) {
      call.b = keep_rows(*b, "b", x);
      call.c = keep_rows(*c, "c", x);
    }
    // Taps beyond the sequence meet nothing.
    call.kernel_length = whole_kernel_length < call.length ? whole_kernel_length : call.length;
    call.kernel = keep_float(whole_kernel_length > call.length ? torch::stable::narrow(as_mutable(kernel), 1, 0, call.length)
                                                                : kernel);
    call.skip = nullptr;
    if (skip) {
      check_sizes(*skip, "skip", {call.width});
      call.skip = keep_float(*skip);
    }
    call.size = 2;
    while (call.size < call.length + (call.kernel_length > 0 ? call.kernel_length - 1 : 0)) call.size *= 2;
    call.roots = roots_of_unity(call.size);
  }

  static Tensor& as_mutable(const Tensor& tensor) { return const_cast<Tensor&>(tensor); }

  Rows keep_rows(const Tensor& tensor, const char* name, const Tensor& x) {
    check_sizes(tensor, name, {call.batch, call.length, call.width});
    check_dtype(tensor, name, x.scalar_type());
    kept.push_back(with_contiguous_rows(tensor));
    return rows_of(kept.back());
  }

  const float* keep_float(const Tensor& tensor) {
    kept.push_back(as_float(tensor));
    return static_cast<const float*>(kept.back().data_ptr());
  }

  int64_t tasks() const { return (call.width + long_conv_tile_width - 1) / long_conv_tile_width; }
  bool empty() const { return call.batch * call.length * call.width == 0; }
};

Tensor forward(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x, const Tensor& kernel,
               const OptionalTensor& skip) {
  Prepared prepared(b, c, x, kernel, skip);
  LongConv& call = prepared.call;
  Tensor y = empty_like_shape(x, {call.batch, call.length, call.width});
  if (prepared.empty()) return y;
  call.y = rows_of(y);
  torch::stable::parallel_for(0, prepared.tasks(), 1, [&](int64_t begin, int64_t end) {
    long_conv_forward(call, begin, end);
  });
  return y;
}

Tensor long_conv(Tensor x, Tensor kernel, OptionalTensor skip) {
  return forward(std::nullopt, std::nullopt, x, kernel, skip);
}

Tensor gated_long_conv(Tensor b, Tensor c, Tensor x, Tensor kernel, OptionalTensor skip) {
  return forward(b, c, x, kernel, skip);
}

struct Gradients {
  Tensor db, dc, dx, dkernel, dskip;
};

Gradients backward(const Tensor& dy, const OptionalTensor& b, const OptionalTensor& c, const Tensor& x,
                   const Tensor& kernel, const OptionalTensor& skip) {
  Prepared prepared(b, c, x, kernel, skip);
  LongConvBackward call;
  call.dy = prepared.keep_rows(dy, "dy", x);
  call.forward = prepared.call;
  const int64_t batch = call.forward.batch, length = call.forward.length, width = call.forward.width;
  Gradients result;
  result.dx = empty_like_shape(x, {batch, length, width});
  result.db = empty_like_shape(x, {b ? batch : 0, length, width});
  result.dc = empty_like_shape(x, {b ? batch : 0, length, width});
  Tensor dkernel = empty_float(x, {width, call.forward.kernel_length});
  result.dskip = empty_float(x, {width});
  call.dx = rows_of(result.dx);
  call.db = rows_of(result.db);
  call.dc = rows_of(result.dc);
  call.dkernel = static_cast<float*>(dkernel.data_ptr());
  call.dskip = static_cast<float*>(result.dskip.data_ptr());
  if (prepared.empty()) {
    torch::stable::zero_(dkernel);
    torch::stable::zero_(result.dskip);
  } else {
    torch::stable::parallel_for(0, prepared.tasks(), 1, [&](int64_t begin, int64_t end) {
      long_conv_backward(call, begin, end);
    });
  }
  result.dkernel = dkernel;
  if (prepared.whole_kernel_length > call.forward.kernel_length)
    result.dkernel = torch::stable::pad(
        dkernel, std::vector<int64_t>{0, prepared.whole_kernel_length - call.forward.kernel_length});
  return result;
}

std::tuple<Tensor, Tensor, Tensor> long_conv_backward_op(Tensor dy, Tensor x, Tensor kernel, OptionalTensor skip) {
  Gradients g = backward(dy, std::nullopt, std::nullopt, x, kernel, skip);
  return {g.dx, g.dkernel, g.dskip};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_long_conv_backward_op(Tensor dy, Tensor b, Tensor c,
                                                                               Tensor x, Tensor kernel,
                                                                               OptionalTensor skip) {
  Gradients g = backward(dy, b, c, x, kernel, skip);
  return {g.db, g.dc, g.dx, g.dkernel, g.dskip};
}

// `positions`: one for all sequences, or one for each.
Tensor step(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x, const Tensor& history,
            const Tensor& kernel, const OptionalTensor& skip, const std::vector<int64_t>& positions) {
  STD_TORCH_CHECK(x.dim() == 2 && history.dim() == 3 && kernel.dim() == 2,
                  "x must be (B, D), history (B, Lmax, D) and kernel (D, Lk)");
  const int64_t batch = x.size(0), width = x.size(1);
  check_sizes(history, "history", {batch, -1, width});
  check_dtype(history, "history", x.scalar_type());
  check_sizes(kernel, "kernel", {width, -1});
  STD_TORCH_CHECK(width <= 1 || history.stride(2) == 1, "history's last dimension must be contiguous");
  check_written(history, "history");
  for (int64_t position : positions)
    STD_TORCH_CHECK(position >= 0 && position < history.size(1), "position is outside history");
  LongConvStep call;
  call.dtype = dtype_of(x, "x");
  call.gated = b.has_value();
  call.width = width;
  call.kernel_length = kernel.size(1);
  std::vector<Tensor> kept;
  const auto keep = [&](const Tensor& tensor, const char* name) {
    check_sizes(tensor, name, {batch, width});
    check_dtype(tensor, name, x.scalar_type());
    kept.push_back(with_contiguous_rows(tensor));
    return rows_of(kept.back());
  };
  call.x = keep(x, "x");
  if (b) {
    call.b = keep(*b, "b");
    call.c = keep(*c, "c");
  }
  // A kernel of either layout is read where it lies: a copy would cost more than the step.
  const bool either = is_float32(kernel) && (kernel.stride(0) == 1 || kernel.stride(1) == 1);
  kept.push_back(either ? kernel : as_float(kernel));
  call.kernel = static_cast<const float*>(kept.back().data_ptr());
  call.channel_stride = kept.back().stride(0);
  call.tap_stride = kept.back().stride(1);
  call.skip = nullptr;
  if (skip) {
    check_sizes(*skip, "skip", {width});
    kept.push_back(as_float(*skip));
    call.skip = static_cast<const float*>(kept.back().data_ptr());
  }
  call.history = rows_of(history);
  Tensor y = empty_like_shape(x, {batch, width});
  call.y = rows_of(y);
  const int64_t blocks = (width + long_conv_step_block - 1) / long_conv_step_block;
  const int64_t together = positions.size() == 1 ? batch : 1;  // sequences at one position
  for (size_t i = 0; i < positions.size(); ++i) {
    call.position = positions[i];
    // A task of its own for each 64 KiB of history.
    const int64_t grain = 1 + (1 << 14) / (long_conv_step_block * (call.position + 1));
    const int64_t first = static_cast<int64_t>(i) * blocks;
    torch::stable::parallel_for(first, first + together * blocks, grain,
                                [&](int64_t begin, int64_t end) { long_conv_step(call, begin, end); });
  }
  return y;
}

std::vector<int64_t> positions_in(const Tensor& position, int64_t batch) {
  STD_TORCH_CHECK(position.is_cpu(), "position must be on the CPU");
  check_position(position, batch);
  const Tensor values = torch::stable::contiguous(position);
  std::vector<int64_t> positions(position.dim() == 0 ? 1 : position.size(0));
  const bool wide = position.scalar_type() == ScalarType::Long;
  for (size_t i = 0; i < positions.size(); ++i)
    positions[i] = wide ? static_cast<const int64_t*>(values.data_ptr())[i]
                        : static_cast<const int32_t*>(values.data_ptr())[i];
  return positions;
}

Tensor long_conv_step_op(Tensor x, Tensor history, Tensor kernel, OptionalTensor skip, int64_t position) {
  return step(std::nullopt, std::nullopt, x, history, kernel, skip, {position});
}

Tensor long_conv_step_tensor_op(Tensor x, Tensor history, Tensor kernel, OptionalTensor skip, Tensor position) {
  return step(std::nullopt, std::nullopt, x, history, kernel, skip,
              positions_in(position, x.dim() > 0 ? x.size(0) : 0));
}

Tensor gated_long_conv_step_op(Tensor b, Tensor c, Tensor x, Tensor history, Tensor kernel, OptionalTensor skip,
                               int64_t position) {
  return step(b, c, x, history, kernel, skip, {position});
}

Tensor gated_long_conv_step_tensor_op(Tensor b, Tensor c, Tensor x, Tensor history, Tensor kernel,
                                      OptionalTensor skip, Tensor position) {
  return step(b, c, x, history, kernel, skip, positions_in(position, x.dim() > 0 ? x.size(0) : 0));
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("long_conv", TORCH_BOX(&star::long_conv));
  m.impl("long_conv_backward", TORCH_BOX(&star::long_conv_backward_op));
  m.impl("long_conv_step", TORCH_BOX(&star::long_conv_step_op));
  m.impl("long_conv_step.tensor", TORCH_BOX(&star::long_conv_step_tensor_op));
  m.impl("gated_long_conv", TORCH_BOX(&star::gated_long_conv));
  m.impl("gated_long_conv_backward", TORCH_BOX(&star::gated_long_conv_backward_op));
  m.impl("gated_long_conv_step", TORCH_BOX(&star::gated_long_conv_step_op));
  m.impl("gated_long_conv_step.tensor", TORCH_BOX(&star::gated_long_conv_step_tensor_op));
}
