// The selective scan on the CPU: checks, allocation, parallel loops, registration.
#include "arguments.h"

namespace star {
namespace {

constexpr int64_t wide_block = 64, narrow_block = 32;  // channels a task, in whole cache lines
constexpr int64_t wide = 1024;                         // channels from which narrow blocks gain nothing
constexpr int64_t plenty = 32;                         // tasks that fill a machine

struct Inputs {
  Tensor x, dt, A, B, C;
  OptionalTensor D, z, dt_bias;
  bool softplus;
  OptionalTensor initial_state, cu_seqlens;
};

// B or C as float32 with contiguous rows: itself where it is that, whatever its other strides.
Mixes mixes_of(Arguments& arguments, const Tensor& tensor, const char* name, const Inputs& in, bool step) {
  const bool grouped = tensor.dim() == (step ? 3 : 4);
  const int64_t last = tensor.dim() - 1, groups = grouped ? tensor.size(last - 1) : 1;
  const int64_t batch = in.x.size(0), length = step ? 0 : in.x.size(1), states = in.A.size(1);
  if (step && grouped) check_sizes(tensor, name, {batch, groups, states});
  else if (step) check_sizes(tensor, name, {batch, states});
  else if (grouped) check_sizes(tensor, name, {batch, length, groups, states});
  else check_sizes(tensor, name, {batch, length, states});
  arguments.check_same_dtype(tensor, name);
  const Tensor& kept = arguments.keep(is_float32(tensor) ? with_contiguous_rows(tensor) : as_float(tensor));
  Mixes mixes;
  mixes.data = floats_of(kept);
  mixes.batch_stride = kept.stride(0);
  mixes.row_stride = step ? 0 : kept.stride(1);
  mixes.group_stride = grouped ? kept.stride(last - 1) : 0;
  return mixes;
}

int64_t groups_of(const Inputs& in, bool step) {
  const bool grouped = in.B.dim() == (step ? 3 : 4);
  const int64_t groups = grouped ? in.B.size(step ? 1 : 2) : 1, width = in.x.size(in.x.dim() - 1);
  STD_TORCH_CHECK(groups > 0 && width % groups == 0, "D must be a multiple of B's groups");
  STD_TORCH_CHECK(in.C.dim() == in.B.dim() && (!grouped || in.C.size(step ? 1 : 2) == groups),
                  "C must have B's groups");
  return groups;
}

SelectiveScan prepare(Arguments& arguments, const Inputs& in) {
  const int64_t batch = in.x.size(0), length = in.x.size(1), width = in.x.size(2), states = in.A.size(1);
  SelectiveScan call;
  call.dtype = dtype_of(in.x, "x");
  call.softplus = in.softplus;
  call.spans = arguments.spans();
  call.width = width;
  call.states = states;
  call.groups = groups_of(in, false);
  call.block = width >= wide ? wide_block : narrow_block;
  call.blocks = (width / call.groups + call.block - 1) / call.block;
  call.x = arguments.rows(in.x, "x", {batch, length, width});
  call.dt = arguments.rows(in.dt, "dt", {batch, length, width});
  call.z = arguments.rows(in.z, "z", {batch, length, width});
  call.A = arguments.floats(in.A, "A", {width, states});
  call.B = mixes_of(arguments, in.B, "B", in, false);
  call.C = mixes_of(arguments, in.C, "C", in, false);
  call.D = arguments.floats(in.D, "D", {width});
  call.dt_bias = arguments.floats(in.dt_bias, "dt_bias", {width});
  call.initial = arguments.floats(in.initial_state, "initial_state", {call.spans.count, width, states});
  call.final = nullptr;
  return call;
}

std::tuple<Tensor, Tensor> selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                          OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus,
                                          OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 3 && A.dim() == 2, "x must be (B, L, D) and A (D, N)");
  const Inputs in{x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens};
  Arguments arguments(x, cu_seqlens);
  SelectiveScan call = prepare(arguments, in);
  Tensor y = empty_like_shape(x, {x.size(0), x.size(1), call.width});
  Tensor final_state = empty_float(x, {call.spans.count, call.width, call.states});
  call.y = rows_of(y);
  call.final = floats_of(final_state);
  torch::stable::parallel_for(0, call.spans.count * call.groups * call.blocks, 1,
                              [&](int64_t begin, int64_t end) { selective_scan_forward(call, begin, end); });
  return {y, final_state};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Sums of (count, ...) parts in the shape of what follows the first dimension.
Tensor summed(const Tensor& parts, const Tensor& out) {
  add_parts(parts, parts.size(0), out);
  return out;
}

Gradients selective_scan_backward_op(Tensor dy, OptionalTensor dfinal_state, Tensor x, Tensor dt, Tensor A,
                                     Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                     OptionalTensor dt_bias, bool dt_softplus, OptionalTensor initial_state,
                                     OptionalTensor cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 3 && A.dim() == 2, "x must be (B, L, D) and A (D, N)");
  const Inputs in{x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens};
  Arguments arguments(x, cu_seqlens);
  SelectiveScanBackward call;
  call.forward = prepare(arguments, in);
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), states = A.size(1);
  const int64_t sequences = call.forward.spans.count, groups = call.forward.groups;
  const int64_t tasks = groups * call.forward.blocks;
  call.dy = arguments.rows(dy, "dy", {batch, length, width});
  call.dfinal = arguments.floats(dfinal_state, "dfinal_state", {sequences, width, states});
  call.parts = tasks > 0 ? (plenty + tasks - 1) / tasks : 1;
  if (call.parts > sequences) call.parts = sequences > 0 ? sequences : 1;

  Tensor dx = empty_like_shape(x, {batch, length, width}), ddt = empty_like_shape(x, {batch, length, width});
  Tensor dz = empty_like_shape(x, {z ? batch : 0, length, width});
  Tensor dinitial = float_gradient(initial_state.has_value(), x, {sequences, width, states});
  Tensor dA = empty_float(x, {call.parts, width, states});
  Tensor dD = empty_float(x, {call.parts, width}), dbias = empty_float(x, {call.parts, width});
  const int64_t blocks = call.forward.blocks;
  Tensor dB = empty_float(x, {blocks, batch * length, groups, states});
  Tensor dC = empty_float(x, {blocks, batch * length, groups, states});
  call.dx = rows_of(dx);
  call.ddt = rows_of(ddt);
  call.dz = z ? rows_of(dz) : Rows();
  call.dinitial = initial_state ? floats_of(dinitial) : nullptr;
  call.dA = floats_of(dA);
  call.dD = floats_of(dD);
  call.dbias = floats_of(dbias);
  call.dB = floats_of(dB);
  call.dC = floats_of(dC);
  torch::stable::parallel_for(0, call.parts * tasks, 1,
                              [&](int64_t begin, int64_t end) { selective_scan_backward(call, begin, end); });
  std::vector<int64_t> mixes{batch, length};
  if (B.dim() == 4) mixes.push_back(groups);
  mixes.push_back(states);
  return {dx,
          ddt,
          summed(dA, empty_float(x, {width, states})),
          summed(dB, empty_like_shape(x, mixes)),
          summed(dC, empty_like_shape(x, mixes)),
          summed(dD, empty_float(x, {width})),
          dz,
          summed(dbias, empty_float(x, {width})),
          dinitial};
}

Tensor selective_scan_step_op(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state, OptionalTensor D,
                              OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus) {
  STD_TORCH_CHECK(x.dim() == 2 && A.dim() == 2, "x must be (B, D) and A (D, N)");
  const Inputs in{x, dt, A, B, C, D, z, dt_bias, dt_softplus, std::nullopt, std::nullopt};
  const int64_t batch = x.size(0), width = x.size(1), states = A.size(1);
  Arguments arguments(x, std::nullopt);
  check_state(state, "state", {batch, width, states});
  Tensor y = empty_like_shape(x, {batch, width});
  SelectiveScanStep call;
  call.dtype = dtype_of(x, "x");
  call.softplus = dt_softplus;
  call.width = width;
  call.states = states;
  call.groups = groups_of(in, true);
  call.x = arguments.rows(x, "x", {batch, width});
  call.dt = arguments.rows(dt, "dt", {batch, width});
  call.z = arguments.rows(z, "z", {batch, width});
  call.y = rows_of(y);
  call.A = arguments.floats(A, "A", {width, states});
  call.B = mixes_of(arguments, B, "B", in, true);
  call.C = mixes_of(arguments, C, "C", in, true);
  call.D = arguments.floats(D, "D", {width});
  call.dt_bias = arguments.floats(dt_bias, "dt_bias", {width});
  call.state = floats_of(state);
  call.state_batch_stride = state.stride(0);
  call.state_row_stride = state.stride(1);
  selective_scan_step(call, 0, batch);
  return y;
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&star::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&star::selective_scan_backward_op));
  m.impl("selective_scan_step", TORCH_BOX(&star::selective_scan_step_op));
}
