// Short causal depthwise convolution on the CPU: checks, allocation, parallel loops, registration.
#include "../common/tensor.h"
#include "kernels.h"

#include <tuple>

namespace star {
namespace {

constexpr int64_t grain_elements = 16384;  // below this a second thread costs more than it saves

int64_t rows_a_task(int64_t width) {
  const int64_t rows = grain_elements / (width > 0 ? width : 1);
  return rows > 1 ? rows : 1;
}

// Owns what a ShortConv call points into.
struct Prepared {
  ShortConv call;
  Sequences sequences;
  std::vector<Tensor> kept;
  std::vector<float> weight;
  std::vector<float> zeros, ones;

  Prepared(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x, const Tensor& weight_tensor,
           const OptionalTensor& bias, bool silu, const OptionalTensor& state, const OptionalTensor& cu_seqlens)
      : sequences(cu_seqlens, x.size(0), x.size(1)) {
    const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), taps = weight_tensor.size(1);
    check_sizes(x, "x", {batch, length, width});
    check_sizes(weight_tensor, "weight", {width, taps});
    STD_TORCH_CHECK(taps >= 1, "weight must have at least one tap");
    call.dtype = dtype_of(x, "x");
    call.gated = b.has_value();
    call.silu = silu;
    call.length = length;
    call.width = width;
    call.taps = taps;
    call.x = keep_rows(x, "x", {batch, length, width}, x);
    if (b) {
      call.b = keep_rows(*b, "b", {batch, length, width}, x);
      call.c = keep_rows(*c, "c", {batch, length, width}, x);
    }
    transpose_weight(weight_tensor);
    zeros.assign(width, 0.0f);
    call.bias = zeros.data();
    if (bias) {
      check_sizes(*bias, "bias", {width});
      kept.push_back(as_float(*bias));
      call.bias = static_cast<const float*>(kept.back().data_ptr());
    }
    if (state) {
      const Tensor same = torch::stable::contiguous(torch::stable::to(*state, x.scalar_type()));
      call.state = keep_rows(same, "initial_state", {sequences.count, taps - 1, width}, x);
    }
    fill_ones();
    call.zeros = zeros.data();
    call.ones = ones.data();
    call.offsets = sequences.packed() ? sequences.offsets.data() : nullptr;
    call.sequences = sequences.count;
  }

  Rows keep_rows(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, const Tensor& x) {
    check_sizes(tensor, name, sizes);
    check_dtype(tensor, name, x.scalar_type());
    kept.push_back(with_contiguous_rows(tensor));
    return rows_of(kept.back());
  }

  void transpose_weight(const Tensor& tensor) {
    const Tensor rows = as_float(tensor);
    const float* source = static_cast<const float*>(rows.data_ptr());
    weight.resize(call.taps * call.width);
    for (int64_t d = 0; d < call.width; ++d)
      for (int64_t k = 0; k < call.taps; ++k) weight[k * call.width + d] = source[d * call.taps + k];
    call.weight = weight.data();
  }

  void fill_ones() {  // D ones of the storage type, in a buffer of D floats
    ones.assign(call.width, 1.0f);
    if (call.dtype == Dtype::float32) return;
    uint16_t* halves = reinterpret_cast<uint16_t*>(ones.data());
    for (int64_t d = 0; d < call.width; ++d) halves[d] = call.dtype == Dtype::bfloat16 ? 0x3f80 : 0x3c00;
  }
};

std::tuple<Tensor, Tensor> forward(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x,
                                   const Tensor& weight, const OptionalTensor& bias, bool silu,
                                   const OptionalTensor& state, const OptionalTensor& cu_seqlens) {
  Prepared prepared(b, c, x, weight, bias, silu, state, cu_seqlens);
  ShortConv& call = prepared.call;
  const int64_t batch = x.size(0);
  Tensor y = empty_like_shape(x, {batch, call.length, call.width});
  Tensor final_state = empty_like_shape(x, {call.sequences, call.taps - 1, call.width});
  call.y = rows_of(y);
  torch::stable::parallel_for(0, batch * call.length, rows_a_task(call.width), [&](int64_t begin, int64_t end) {
    if (begin < end) short_conv_forward(call, begin, end);
  });
  call.y = rows_of(final_state);
  if (call.taps > 1) short_conv_final_state(call, 0, call.sequences);
  return {y, final_state};
}

std::tuple<Tensor, Tensor> short_conv(Tensor x, Tensor weight, OptionalTensor bias, bool silu,
                                      OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  return forward(std::nullopt, std::nullopt, x, weight, bias, silu, initial_state, cu_seqlens);
}

std::tuple<Tensor, Tensor> gated_short_conv(Tensor b, Tensor c, Tensor x, Tensor weight, OptionalTensor bias,
                                            OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  return forward(b, c, x, weight, bias, false, initial_state, cu_seqlens);
}

struct Gradients {
  Tensor db, dc, dx, dweight, dbias, dstate;
};

// Adds the chunks' sums in their order and lays them out as the weight is: (D, K).
void sum_parts(const float* parts, int64_t chunks, const ShortConv& call, float* dweight, float* dbias) {
  const int64_t width = call.width, taps = call.taps, stride = (taps + 1) * width;
  torch::stable::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(end - begin);
    for (int64_t k = 0; k <= taps; ++k) {
      sum.assign(end - begin, 0.0f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t d = begin; d < end; ++d) sum[d - begin] += parts[chunk * stride + k * width + d];
      for (int64_t d = begin; d < end; ++d) (k < taps ? dweight[d * taps + k] : dbias[d]) = sum[d - begin];
    }
  });
}

Gradients backward(const Tensor& dy, const OptionalTensor& dfinal, const OptionalTensor& b,
                   const OptionalTensor& c, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   bool silu, const OptionalTensor& state, const OptionalTensor& cu_seqlens) {
  Prepared prepared(b, c, x, weight, bias, silu, state, cu_seqlens);
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), taps = weight.size(1);
  ShortConvBackward call;
  call.dy = prepared.keep_rows(dy, "dy", {batch, length, width}, x);
  if (dfinal)
    call.dfinal = prepared.keep_rows(*dfinal, "dfinal_state", {prepared.call.sequences, taps - 1, width}, x);
  call.forward = prepared.call;

  Gradients result;
  result.dx = empty_like_shape(x, {batch, length, width});
  result.db = empty_like_shape(x, {b ? batch : 0, length, width});
  result.dc = empty_like_shape(x, {b ? batch : 0, length, width});
  result.dweight = empty_float(x, {width, taps});
  result.dbias = empty_float(x, {width});
  result.dstate = empty_like_shape(x, {state ? prepared.call.sequences : 0, taps - 1, width});
  call.dx = rows_of(result.dx);
  call.db = rows_of(result.db);
  call.dc = rows_of(result.dc);

  // Chunks depend on the shape alone, so that sums have the same order whatever the number of threads.
  call.chunk_rows = length > 1024 ? 256 : length > 64 ? 64 : (length > 0 ? length : 1);
  const int64_t chunks = batch * ((length + call.chunk_rows - 1) / call.chunk_rows);
  Tensor parts = empty_float(x, {chunks, taps + 1, width});
  call.weight_parts = static_cast<float*>(parts.data_ptr());
  const int64_t grain = rows_a_task(width) / call.chunk_rows;
  torch::stable::parallel_for(0, chunks, grain > 0 ? grain : 1, [&](int64_t begin, int64_t end) {
    short_conv_backward(call, begin, end);
  });
  sum_parts(call.weight_parts, chunks, call.forward, static_cast<float*>(result.dweight.data_ptr()),
            static_cast<float*>(result.dbias.data_ptr()));
  if (state && taps > 1) {
    call.dstate = rows_of(result.dstate);
    short_conv_dstate(call, 0, prepared.call.sequences);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> short_conv_backward_op(
    Tensor dy, OptionalTensor dfinal_state, Tensor x, Tensor weight, OptionalTensor bias, bool silu,
    OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  Gradients g =
      backward(dy, dfinal_state, std::nullopt, std::nullopt, x, weight, bias, silu, initial_state, cu_seqlens);
  return {g.dx, g.dweight, g.dbias, g.dstate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_short_conv_backward_op(
    Tensor dy, OptionalTensor dfinal_state, Tensor b, Tensor c, Tensor x, Tensor weight, OptionalTensor bias,
    OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  Gradients g = backward(dy, dfinal_state, b, c, x, weight, bias, false, initial_state, cu_seqlens);
  return {g.db, g.dc, g.dx, g.dweight, g.dbias, g.dstate};
}

Tensor step(const OptionalTensor& b, const OptionalTensor& c, const Tensor& x, const Tensor& state,
            const Tensor& weight, const OptionalTensor& bias, bool silu) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must be (B, D) and weight (D, K)");
  const int64_t batch = x.size(0), width = x.size(1), taps = weight.size(1);
  check_sizes(weight, "weight", {width, taps});
  check_sizes(state, "state", {batch, taps - 1, width});
  check_dtype(state, "state", x.scalar_type());
  STD_TORCH_CHECK(taps >= 1, "weight must have at least one tap");
  check_written(state, "state");
  ShortConvStep call;
  call.dtype = dtype_of(x, "x");
  call.gated = b.has_value();
  call.silu = silu;
  call.width = width;
  call.taps = taps;
  const Tensor x_rows = with_contiguous_rows(x);
  call.x = rows_of(x_rows);
  OptionalTensor b_rows, c_rows;
  if (b) {
    check_sizes(*b, "b", {batch, width});
    check_sizes(*c, "c", {batch, width});
    check_dtype(*b, "b", x.scalar_type());
    check_dtype(*c, "c", x.scalar_type());
    b_rows = with_contiguous_rows(*b);
    c_rows = with_contiguous_rows(*c);
    call.b = rows_of(*b_rows);
    call.c = rows_of(*c_rows);
  }
  const Tensor weight_rows = as_float(weight);
  call.weight = static_cast<const float*>(weight_rows.data_ptr());
  OptionalTensor bias_rows = as_float(bias);
  if (bias) check_sizes(*bias, "bias", {width});
  call.bias = bias_rows ? static_cast<const float*>(bias_rows->data_ptr()) : nullptr;
  call.state = rows_of(state);
  call.state_channel_stride = state.stride(2);
  Tensor y = empty_like_shape(x, {batch, width});
  call.y = rows_of(y);
  short_conv_step(call, 0, batch);
  return y;
}

Tensor short_conv_step_op(Tensor x, Tensor state, Tensor weight, OptionalTensor bias, bool silu) {
  return step(std::nullopt, std::nullopt, x, state, weight, bias, silu);
}

Tensor gated_short_conv_step_op(Tensor b, Tensor c, Tensor x, Tensor state, Tensor weight, OptionalTensor bias) {
  return step(b, c, x, state, weight, bias, false);
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("short_conv", TORCH_BOX(&star::short_conv));
  m.impl("short_conv_backward", TORCH_BOX(&star::short_conv_backward_op));
  m.impl("short_conv_step", TORCH_BOX(&star::short_conv_step_op));
  m.impl("gated_short_conv", TORCH_BOX(&star::gated_short_conv));
  m.impl("gated_short_conv_backward", TORCH_BOX(&star::gated_short_conv_backward_op));
  m.impl("gated_short_conv_step", TORCH_BOX(&star::gated_short_conv_step_op));
}
