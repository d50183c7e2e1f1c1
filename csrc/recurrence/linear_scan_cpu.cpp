// The linear scan on the CPU: checks, allocation, parallel loops, registration.
#include "arguments.h"

namespace star {
namespace {

constexpr int64_t wide_block = 1024;  // channels a task, at most
constexpr int64_t plenty = 4;         // tasks that a memory-bound loop needs to fill a machine

// Whole rows where there are sequences enough: rows read in pieces halve the bandwidth.
int64_t block_of(int64_t width, int64_t sequences) {
  const int64_t pieces = sequences >= plenty ? 1 : plenty / (sequences > 0 ? sequences : 1);
  const int64_t block = ((width + pieces - 1) / pieces + 15) / 16 * 16;  // whole cache lines
  return block < 16 ? 16 : block < wide_block ? block : wide_block;
}

int64_t tasks_of(const LinearScan& call) {
  return call.spans.count * ((call.width + call.block - 1) / call.block);
}

LinearScan prepare(Arguments& arguments, const Tensor& decay, const Tensor& x, const OptionalTensor& initial) {
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  LinearScan call;
  call.dtype = dtype_of(x, "x");
  call.spans = arguments.spans();
  call.width = width;
  call.block = block_of(width, call.spans.count);
  call.decay = arguments.rows(decay, "decay", {batch, length, width});
  call.x = arguments.rows(x, "x", {batch, length, width});
  call.initial = arguments.floats(initial, "initial_state", {call.spans.count, width});
  call.final = nullptr;
  return call;
}

std::tuple<Tensor, Tensor> linear_scan(Tensor decay, Tensor x, OptionalTensor initial_state,
                                       OptionalTensor cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (B, L, D)");
  Arguments arguments(x, cu_seqlens);
  LinearScan call = prepare(arguments, decay, x, initial_state);
  Tensor h = empty_like_shape(x, {x.size(0), x.size(1), x.size(2)});
  Tensor final_state = empty_float(x, {call.spans.count, call.width});
  call.h = rows_of(h);
  call.final = floats_of(final_state);
  torch::stable::parallel_for(0, tasks_of(call), 1,
                              [&](int64_t begin, int64_t end) { linear_scan_forward(call, begin, end); });
  return {h, final_state};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward_op(Tensor dh, OptionalTensor dfinal_state, Tensor decay,
                                                           Tensor h, OptionalTensor initial_state,
                                                           OptionalTensor cu_seqlens) {
  STD_TORCH_CHECK(h.dim() == 3, "h must be (B, L, D)");
  const int64_t batch = h.size(0), length = h.size(1), width = h.size(2);
  Arguments arguments(h, cu_seqlens);
  LinearScanBackward call;
  call.forward = prepare(arguments, decay, h, initial_state);
  call.forward.h = call.forward.x;
  call.dh = arguments.rows(dh, "dh", {batch, length, width});
  const int64_t sequences = call.forward.spans.count;
  call.dfinal = arguments.floats(dfinal_state, "dfinal_state", {sequences, width});
  Tensor ddecay = empty_like_shape(h, {batch, length, width}), dx = empty_like_shape(h, {batch, length, width});
  Tensor dinitial = float_gradient(initial_state.has_value(), h, {sequences, width});
  call.ddecay = rows_of(ddecay);
  call.dx = rows_of(dx);
  call.dinitial = initial_state ? floats_of(dinitial) : nullptr;
  torch::stable::parallel_for(0, tasks_of(call.forward), 1,
                              [&](int64_t begin, int64_t end) { linear_scan_backward(call, begin, end); });
  return {ddecay, dx, dinitial};
}

Tensor linear_scan_step_op(Tensor decay, Tensor x, Tensor state) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be (B, D)");
  const int64_t batch = x.size(0), width = x.size(1);
  check_sizes(x, "x", {batch, width});
  check_sizes(decay, "decay", {batch, width});
  check_dtype(decay, "decay", x.scalar_type());
  check_state(state, "state", {batch, width});
  const Tensor x_rows = with_contiguous_rows(x), decay_rows = with_contiguous_rows(decay);
  Tensor h = empty_like_shape(x, {batch, width});
  const LinearScanStep call{dtype_of(x, "x"),  width,      rows_of(decay_rows), rows_of(x_rows),
                            rows_of(h), rows_of(state)};
  linear_scan_step(call, 0, batch);
  return h;
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&star::linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&star::linear_scan_backward_op));
  m.impl("linear_scan_step", TORCH_BOX(&star::linear_scan_step_op));
}
