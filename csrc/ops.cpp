// The schema of every compiled operator, and the Python module that carries them.
//
// Conventions: optional outputs of a backward (a gradient that nobody asked for) come back as empty tensors,
// final states are always returned (they are small), `..._step` operators change their state in place.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(star_kernels, m) {
  m.def("_empty(Tensor x) -> Tensor");  // does nothing: what dispatching an operator costs at least

  // attention; window 0 and softcap 0 mean none
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, bool causal, int window, float scale, float softcap, "
      "Tensor? cu_seqlens) -> Tensor");
  m.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, bool causal, int window, float scale, "
      "float softcap, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)");
  m.def(
      "diff_attention(Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam, bool causal, int window, "
      "float scale) -> Tensor");
  m.def(
      "diff_attention_backward(Tensor dy, Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam, "
      "bool causal, int window, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float? scale, int? window) "
      "-> Tensor");

  // convolution
  m.def(
      "short_conv(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, "
      "Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def(
      "short_conv_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, bool silu, "
      "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "short_conv_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor");
  m.def(
      "gated_short_conv(Tensor b, Tensor c, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def(
      "gated_short_conv_backward(Tensor dy, Tensor? dfinal_state, Tensor b, Tensor c, Tensor x, Tensor weight, "
      "Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_short_conv_step(Tensor b, Tensor c, Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias) "
      "-> Tensor");
  m.def("long_conv(Tensor x, Tensor kernel, Tensor? skip) -> Tensor");
  m.def(
      "long_conv_backward(Tensor dy, Tensor x, Tensor kernel, Tensor? skip) -> (Tensor, Tensor, Tensor)");
  m.def(
      "long_conv_step(Tensor x, Tensor(a!) history, Tensor kernel, Tensor? skip, int position) -> Tensor");
  m.def(
      "long_conv_step.tensor(Tensor x, Tensor(a!) history, Tensor kernel, Tensor? skip, Tensor position) "
      "-> Tensor");
  m.def("gated_long_conv(Tensor b, Tensor c, Tensor x, Tensor kernel, Tensor? skip) -> Tensor");
  m.def(
      "gated_long_conv_backward(Tensor dy, Tensor b, Tensor c, Tensor x, Tensor kernel, Tensor? skip) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_long_conv_step(Tensor b, Tensor c, Tensor x, Tensor(a!) history, Tensor kernel, Tensor? skip, "
      "int position) -> Tensor");
  m.def(
      "gated_long_conv_step.tensor(Tensor b, Tensor c, Tensor x, Tensor(a!) history, Tensor kernel, "
      "Tensor? skip, Tensor position) -> Tensor");

  // loss
  m.def(
      "cross_entropy_rows_(Tensor(a!) logits, Tensor targets, int ignore_index, Tensor? share) -> Tensor");

  // memoryless
  m.def("glu(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def("glu_backward(Tensor dy, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)");

  // norm
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_residual(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");

  // recurrence
  m.def(
      "linear_scan(Tensor decay, Tensor x, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def(
      "linear_scan_backward(Tensor dh, Tensor? dfinal_state, Tensor decay, Tensor h, Tensor? initial_state, "
      "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)");
  m.def("linear_scan_step(Tensor decay, Tensor x, Tensor(a!) state) -> Tensor");
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def(
      "selective_scan_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? initial_state, "
      "Tensor? cu_seqlens) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor(a!) state, Tensor? D, "
      "Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor");
  m.def(
      "gated_linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def(
      "gated_linear_attention_backward(Tensor dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, "
      "Tensor? log_decay, float scale, Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, "
      "float scale) -> Tensor");
  m.def(
      "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, float scale, "
      "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def(
      "gated_delta_rule_backward(Tensor dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor beta, "
      "Tensor? log_decay, float scale, Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor(a!) state, "
      "float scale) -> Tensor");
  m.def(
      "gru_scan(Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah, Tensor? initial_state) "
      "-> (Tensor, Tensor)");
  m.def(
      "gru_scan_backward(Tensor dh, Tensor? dfinal_state, Tensor xz, Tensor xr, Tensor xh, Tensor az, "
      "Tensor ar, Tensor ah, Tensor? initial_state) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gru_scan_step(Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah, Tensor(a!) state) "
      "-> Tensor");
  m.def(
      "lstm_scan(Tensor xf, Tensor xo, Tensor xz, Tensor af, Tensor ao, Tensor az, Tensor? initial_c, "
      "Tensor? initial_h) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_scan_backward(Tensor dh, Tensor? dfinal_c, Tensor? dfinal_h, Tensor xf, Tensor xo, Tensor xz, "
      "Tensor af, Tensor ao, Tensor az, Tensor? initial_c, Tensor? initial_h) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lstm_scan_step(Tensor xf, Tensor xo, Tensor xz, Tensor af, Tensor ao, Tensor az, Tensor(a!) state_c, "
      "Tensor(b!) state_h) -> Tensor");
}

static torch::stable::Tensor empty_operator(torch::stable::Tensor x) { return x; }

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) { m.impl("_empty", TORCH_BOX(&empty_operator)); }

// Importing star_kernels._C loads this object, which registers the operators above; it has no members.
static PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr,
                                        nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module_definition); }
