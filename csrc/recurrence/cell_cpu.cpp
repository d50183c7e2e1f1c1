// The GRU and the LSTM with diagonal weights on the CPU: checks, allocation, parallel loops, registration.
#include "arguments.h"

namespace star {
namespace {

constexpr int64_t widest_block = 64;  // channels a task: the kernels' most
constexpr int64_t plenty = 32;        // tasks that fill a machine

struct Inputs {
  Tensor x[3], a[3];
  bool lstm;
};

CellState state_of(Arguments& arguments, const OptionalTensor& state, int64_t batch, int64_t width) {
  if (!state) return CellState();
  return CellState{const_cast<float*>(arguments.floats(*state, "state", {batch, width})), width};
}

CellState state_of(const Tensor& state) { return CellState{floats_of(state), state.stride(0)}; }

// `step`: x (B, D), one token.
Cell prepare(Arguments& arguments, const Inputs& in, bool step) {
  const Tensor& x = in.x[0];
  Cell call;
  call.dtype = dtype_of(x, "x");
  call.batch = x.size(0);
  call.length = step ? 1 : x.size(1);
  call.width = x.size(step ? 1 : 2);
  call.block = call.width < widest_block ? (call.width > 0 ? call.width : 1) : widest_block;
  for (int i = 0; i < 3; ++i) {
    if (step) call.x[i] = arguments.rows(in.x[i], "x", {call.batch, call.width});
    else call.x[i] = arguments.rows(in.x[i], "x", {call.batch, call.length, call.width});
    call.weight[i] = arguments.floats(in.a[i], "a", {call.width});
  }
  return call;
}

int64_t blocks_of(const Cell& call) { return (call.width + call.block - 1) / call.block; }

void run(const Cell& call, bool lstm, int64_t begin, int64_t end) {
  if (lstm) lstm_forward(call, begin, end);
  else gru_forward(call, begin, end);
}

struct Outputs {
  Tensor h, final[2];
};

Outputs forward(const Inputs& in, const OptionalTensor& h, const OptionalTensor& c) {
  STD_TORCH_CHECK(in.x[0].dim() == 3, "x must be (B, L, D)");
  Arguments arguments(in.x[0], std::nullopt);
  Cell call = prepare(arguments, in, false);
  call.initial[0] = state_of(arguments, h, call.batch, call.width);
  call.initial[1] = state_of(arguments, c, call.batch, call.width);
  Outputs out;
  out.h = empty_like_shape(in.x[0], {call.batch, call.length, call.width});
  call.h = rows_of(out.h);
  for (int i = 0; i < (in.lstm ? 2 : 1); ++i) {
    out.final[i] = empty_float(in.x[0], {call.batch, call.width});
    call.final[i] = state_of(out.final[i]);
  }
  torch::stable::parallel_for(0, call.batch * blocks_of(call), 1,
                              [&](int64_t begin, int64_t end) { run(call, in.lstm, begin, end); });
  return out;
}

struct Gradients {
  Tensor dx[3], da[3], dinitial[2];
};

Gradients backward(const Tensor& dh, const OptionalTensor dfinal[2], const Inputs& in,
                   const OptionalTensor initial[2]) {
  STD_TORCH_CHECK(in.x[0].dim() == 3, "x must be (B, L, D)");
  const Tensor& x = in.x[0];
  Arguments arguments(x, std::nullopt);
  CellBackward call;
  call.forward = prepare(arguments, in, false);
  const int64_t batch = call.forward.batch, length = call.forward.length, width = call.forward.width;
  const int64_t blocks = blocks_of(call.forward);
  call.dh = arguments.rows(dh, "dh", {batch, length, width});
  call.parts = blocks > 0 ? (plenty + blocks - 1) / blocks : 1;
  if (call.parts > batch) call.parts = batch > 0 ? batch : 1;
  Gradients out;
  for (int i = 0; i < 2; ++i) {
    call.forward.initial[i] = state_of(arguments, initial[i], batch, width);
    call.dfinal[i] = state_of(arguments, dfinal[i], batch, width);
    out.dinitial[i] = float_gradient(initial[i].has_value(), x, {batch, width});
    if (initial[i]) call.dinitial[i] = state_of(out.dinitial[i]);
  }
  Tensor parts[3];
  for (int i = 0; i < 3; ++i) {
    out.dx[i] = empty_like_shape(x, {batch, length, width});
    call.dx[i] = rows_of(out.dx[i]);
    parts[i] = empty_float(x, {call.parts, width});
    call.dweight[i] = floats_of(parts[i]);
  }
  torch::stable::parallel_for(0, call.parts * blocks, 1, [&](int64_t begin, int64_t end) {
    if (in.lstm) lstm_backward(call, begin, end);
    else gru_backward(call, begin, end);
  });
  for (int i = 0; i < 3; ++i) {
    out.da[i] = empty_float(x, {width});
    add_parts(parts[i], call.parts, out.da[i]);
  }
  return out;
}

Tensor step(const Inputs& in, const Tensor& h, const OptionalTensor& c) {
  STD_TORCH_CHECK(in.x[0].dim() == 2, "x must be (B, D)");
  Arguments arguments(in.x[0], std::nullopt);
  Cell call = prepare(arguments, in, true);
  check_state(h, "state", {call.batch, call.width});
  call.initial[0] = call.final[0] = state_of(h);
  if (c) {
    check_state(*c, "state_c", {call.batch, call.width});
    call.initial[1] = call.final[1] = state_of(*c);
  }
  Tensor out = empty_like_shape(in.x[0], {call.batch, call.width});
  call.h = rows_of(out);
  run(call, in.lstm, 0, call.batch * blocks_of(call));
  return out;
}

std::tuple<Tensor, Tensor> gru_scan(Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah,
                                    OptionalTensor initial_state) {
  const Outputs out = forward({{xz, xr, xh}, {az, ar, ah}, false}, initial_state, std::nullopt);
  return {out.h, out.final[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_scan_backward(
    Tensor dh, OptionalTensor dfinal_state, Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah,
    OptionalTensor initial_state) {
  const OptionalTensor dfinal[2] = {dfinal_state, std::nullopt}, initial[2] = {initial_state, std::nullopt};
  const Gradients g = backward(dh, dfinal, {{xz, xr, xh}, {az, ar, ah}, false}, initial);
  return {g.dx[0], g.dx[1], g.dx[2], g.da[0], g.da[1], g.da[2], g.dinitial[0]};
}

Tensor gru_scan_step(Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah, Tensor state) {
  return step({{xz, xr, xh}, {az, ar, ah}, false}, state, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> lstm_scan(Tensor xf, Tensor xo, Tensor xz, Tensor af, Tensor ao, Tensor az,
                                             OptionalTensor initial_c, OptionalTensor initial_h) {
  const Outputs out = forward({{xf, xo, xz}, {af, ao, az}, true}, initial_h, initial_c);
  return {out.h, out.final[1], out.final[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_scan_backward(
    Tensor dh, OptionalTensor dfinal_c, OptionalTensor dfinal_h, Tensor xf, Tensor xo, Tensor xz, Tensor af,
    Tensor ao, Tensor az, OptionalTensor initial_c, OptionalTensor initial_h) {
  const OptionalTensor dfinal[2] = {dfinal_h, dfinal_c}, initial[2] = {initial_h, initial_c};
  const Gradients g = backward(dh, dfinal, {{xf, xo, xz}, {af, ao, az}, true}, initial);
  return {g.dx[0], g.dx[1], g.dx[2], g.da[0], g.da[1], g.da[2], g.dinitial[1], g.dinitial[0]};
}

Tensor lstm_scan_step(Tensor xf, Tensor xo, Tensor xz, Tensor af, Tensor ao, Tensor az, Tensor state_c,
                      Tensor state_h) {
  return step({{xf, xo, xz}, {af, ao, az}, true}, state_h, state_c);
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("gru_scan", TORCH_BOX(&star::gru_scan));
  m.impl("gru_scan_backward", TORCH_BOX(&star::gru_scan_backward));
  m.impl("gru_scan_step", TORCH_BOX(&star::gru_scan_step));
  m.impl("lstm_scan", TORCH_BOX(&star::lstm_scan));
  m.impl("lstm_scan_backward", TORCH_BOX(&star::lstm_scan_backward));
  m.impl("lstm_scan_step", TORCH_BOX(&star::lstm_scan_step));
}
