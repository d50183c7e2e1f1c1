// Gated linear attention and the gated delta rule on the CPU: checks, allocation, parallel loops, registration.
#include "arguments.h"

namespace star {
namespace {

constexpr int64_t wide_tile = 64;    // columns or rows of a state a task, where heads fill the machine,
constexpr int64_t narrow_tile = 16;  // and where they do not: tiles repeat the loads of what they share
constexpr int64_t plenty = 8;        // states

struct Inputs {
  Tensor q, k, v;
  OptionalTensor beta, log_decay;
  double scale;
};

// A (B, L, H, X) or (B, L, H) tensor; a step's tensors have no L.
Heads heads_of(const Tensor& tensor, bool step) {
  Heads heads;
  heads.data = tensor.data_ptr();
  heads.batch_stride = tensor.stride(0);
  heads.row_stride = step ? 0 : tensor.stride(1);
  heads.head_stride = tensor.stride(step ? 1 : 2);
  return heads;
}

struct Sizes {
  int64_t batch, length, heads, key_heads, keys, values;
};

Sizes sizes_of(const Inputs& in, bool step) {
  const int64_t head = step ? 1 : 2;
  STD_TORCH_CHECK(in.q.dim() == head + 2 && in.v.dim() == head + 2, "q and v have a wrong shape");
  Sizes sizes{in.v.size(0),     step ? 1 : in.v.size(1), in.v.size(head), in.q.size(head),
              in.q.size(head + 1), in.v.size(head + 1)};
  STD_TORCH_CHECK(sizes.key_heads > 0 && sizes.heads % sizes.key_heads == 0,
                  "the heads of v must be a multiple of those of q");
  return sizes;
}

void check(const Tensor& tensor, const char* name, bool step, const Sizes& sizes, int64_t heads, int64_t last) {
  if (step && last < 0) check_sizes(tensor, name, {sizes.batch, heads});
  else if (step) check_sizes(tensor, name, {sizes.batch, heads, last});
  else if (last < 0) check_sizes(tensor, name, {sizes.batch, sizes.length, heads});
  else check_sizes(tensor, name, {sizes.batch, sizes.length, heads, last});
}

// Fills what a MatrixState and a MatrixStateStep have in common.
template <class Call>
void fill(Call& call, Arguments& arguments, const Inputs& in, const Sizes& sizes, bool step) {
  const auto activation = [&](const Tensor& tensor, const char* name, int64_t heads, int64_t last) {
    check(tensor, name, step, sizes, heads, last);
    arguments.check_same_dtype(tensor, name);
    return heads_of(last < 0 ? tensor : arguments.keep(with_contiguous_rows(tensor)), step);
  };
  call.dtype = dtype_of(in.v, "v");
  call.delta = in.beta.has_value();
  call.heads = sizes.heads;
  call.key_heads = sizes.key_heads;
  call.keys = sizes.keys;
  call.values = sizes.values;
  call.scale = static_cast<float>(in.scale);
  call.q = activation(in.q, "q", sizes.key_heads, sizes.keys);
  call.k = activation(in.k, "k", sizes.key_heads, sizes.keys);
  call.v = activation(in.v, "v", sizes.heads, sizes.values);
  if (in.beta) call.beta = activation(*in.beta, "beta", sizes.heads, -1);
  call.decay_of_keys = in.log_decay && in.log_decay->dim() == (step ? 3 : 4);
  if (in.log_decay) {
    check(*in.log_decay, "log_decay", step, sizes, sizes.heads, call.decay_of_keys ? sizes.keys : -1);
    const Tensor floats = is_float32(*in.log_decay) ? *in.log_decay : as_float(*in.log_decay);
    call.log_decay = heads_of(arguments.keep(call.decay_of_keys ? with_contiguous_rows(floats) : floats), step);
  }
}

int64_t tile_of(int64_t size, int64_t states) {
  const int64_t tile = states >= plenty ? wide_tile : narrow_tile;
  return size < 1 ? 1 : size < tile ? size : tile;
}

MatrixState prepare(Arguments& arguments, const Inputs& in, const Sizes& sizes, const OptionalTensor& initial) {
  MatrixState call;
  fill(call, arguments, in, sizes, false);
  call.spans = arguments.spans();
  call.tile = tile_of(sizes.values, call.spans.count * sizes.heads);
  call.tiles = (sizes.values + call.tile - 1) / call.tile;
  call.initial = arguments.floats(initial, "initial_state",
                                  {call.spans.count, sizes.heads, sizes.keys, sizes.values});
  call.final = nullptr;
  return call;
}

int64_t column_tasks(const MatrixState& call) { return call.spans.count * call.heads * call.tiles; }

std::tuple<Tensor, Tensor> forward(const Inputs& in, const OptionalTensor& initial_state,
                                   const OptionalTensor& cu_seqlens) {
  const Sizes sizes = sizes_of(in, false);
  Arguments arguments(in.v, cu_seqlens);
  MatrixState call = prepare(arguments, in, sizes, initial_state);
  Tensor y = empty_like_shape(in.v, {sizes.batch, sizes.length, sizes.heads, sizes.values});
  Tensor final_state = empty_float(in.v, {call.spans.count, sizes.heads, sizes.keys, sizes.values});
  call.y = heads_of(y, false);
  call.final = floats_of(final_state);
  torch::stable::parallel_for(0, column_tasks(call), 1,
                              [&](int64_t begin, int64_t end) { matrix_state_forward(call, begin, end); });
  return {y, final_state};
}

std::tuple<Tensor, Tensor> gated_linear_attention(Tensor q, Tensor k, Tensor v, OptionalTensor log_decay,
                                                  double scale, OptionalTensor initial_state,
                                                  OptionalTensor cu_seqlens) {
  return forward({q, k, v, std::nullopt, log_decay, scale}, initial_state, cu_seqlens);
}

std::tuple<Tensor, Tensor> gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, OptionalTensor log_decay,
                                            double scale, OptionalTensor initial_state,
                                            OptionalTensor cu_seqlens) {
  return forward({q, k, v, beta, log_decay, scale}, initial_state, cu_seqlens);
}

struct Gradients {
  Tensor dq, dk, dv, dbeta, dlog_decay, dinitial;
};

// float32 gradients of q or k, a head of v each, in the shape and dtype of q.
Tensor of_key_heads(const Tensor& of_heads, const Inputs& in, const Sizes& sizes, Dtype dtype) {
  if (sizes.heads == sizes.key_heads && dtype == Dtype::float32) return of_heads;
  Tensor out = empty_like_shape(in.q, {sizes.batch, sizes.length, sizes.key_heads, sizes.keys});
  const SharedHeads call{dtype,           sizes.batch, sizes.length,           sizes.heads,
                         sizes.key_heads, sizes.keys,  heads_of(of_heads, false), heads_of(out, false)};
  torch::stable::parallel_for(0, sizes.batch * sizes.length * sizes.key_heads, 64,
                              [&](int64_t begin, int64_t end) { sum_shared_heads(call, begin, end); });
  return out;
}

// The pass over columns, and dv. The delta rule's goes by way of e and du in float32.
void columns(MatrixStateBackward& call, Arguments& arguments, const Inputs& in, const Sizes& sizes, Gradients& out) {
  MatrixState& forward = call.forward;
  const std::vector<int64_t> shape{sizes.batch, sizes.length, sizes.heads, sizes.values};
  out.dv = empty_like_shape(in.v, shape);
  if (forward.delta) {
    forward.error = heads_of(arguments.keep(empty_float(in.v, shape)), false);
    torch::stable::parallel_for(0, column_tasks(forward), 1,
                                [&](int64_t begin, int64_t end) { matrix_state_forward(forward, begin, end); });
    call.du = heads_of(arguments.keep(empty_float(in.v, shape)), false);
    call.du_dtype = Dtype::float32;
  } else {
    call.du = heads_of(out.dv, false);
    call.du_dtype = forward.dtype;
  }
  torch::stable::parallel_for(0, column_tasks(forward), 1,
                              [&](int64_t begin, int64_t end) { matrix_state_columns(call, begin, end); });
  if (!forward.delta) return;
  out.dbeta = empty_like_shape(in.v, {sizes.batch, sizes.length, sizes.heads});
  const DeltaOutputs outputs{forward.dtype, sizes.batch,   sizes.length, sizes.heads,          sizes.values,
                             forward.beta,  forward.error, call.du,      heads_of(out.dv, false),
                             heads_of(out.dbeta, false)};
  torch::stable::parallel_for(0, sizes.batch * sizes.length * sizes.heads, 64,
                              [&](int64_t begin, int64_t end) { delta_outputs(outputs, begin, end); });
}

// The pass over rows: dq, dk and the log-decay's gradient, whose parts by tile of rows are summed in order.
void rows(MatrixStateBackward& call, const Inputs& in, const Sizes& sizes, Gradients& out) {
  const MatrixState& forward = call.forward;
  const std::vector<int64_t> of_keys{sizes.batch, sizes.length, sizes.heads, sizes.keys};
  Tensor dq = empty_float(in.v, of_keys), dk = empty_float(in.v, of_keys), parts;
  call.dq = heads_of(dq, false);
  call.dk = heads_of(dk, false);
  call.row_tile = tile_of(sizes.keys, forward.spans.count * sizes.heads);
  call.row_tiles = (sizes.keys + call.row_tile - 1) / call.row_tile;
  call.dlog_decay_tile_stride = sizes.batch * sizes.length * sizes.heads;
  const bool summed = in.log_decay && !forward.decay_of_keys;
  if (!in.log_decay) {
    out.dlog_decay = empty_float(in.v, {0});
  } else if (forward.decay_of_keys) {
    out.dlog_decay = empty_float(in.v, of_keys);
    call.dlog_decay = heads_of(out.dlog_decay, false);
  } else {
    parts = empty_float(in.v, {call.row_tiles * sizes.batch, sizes.length, sizes.heads});
    out.dlog_decay = empty_float(in.v, {sizes.batch, sizes.length, sizes.heads});
    call.dlog_decay = heads_of(parts, false);
  }
  torch::stable::parallel_for(0, forward.spans.count * sizes.heads * call.row_tiles, 1,
                              [&](int64_t begin, int64_t end) { matrix_state_rows(call, begin, end); });
  if (summed) add_parts(parts, call.row_tiles, out.dlog_decay);
  out.dq = of_key_heads(dq, in, sizes, forward.dtype);
  out.dk = of_key_heads(dk, in, sizes, forward.dtype);
}

Gradients backward(const Tensor& dy, const OptionalTensor& dfinal_state, const Inputs& in,
                   const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  const Sizes sizes = sizes_of(in, false);
  Arguments arguments(in.v, cu_seqlens);
  MatrixStateBackward call;
  call.forward = prepare(arguments, in, sizes, initial_state);
  const int64_t sequences = call.forward.spans.count;
  check(dy, "dy", false, sizes, sizes.heads, sizes.values);
  arguments.check_same_dtype(dy, "dy");
  call.dy = heads_of(arguments.keep(with_contiguous_rows(dy)), false);
  call.dfinal = arguments.floats(dfinal_state, "dfinal_state", {sequences, sizes.heads, sizes.keys, sizes.values});
  Gradients out;
  out.dinitial =
      float_gradient(initial_state.has_value(), in.v, {sequences, sizes.heads, sizes.keys, sizes.values});
  call.dinitial = initial_state ? floats_of(out.dinitial) : nullptr;
  columns(call, arguments, in, sizes, out);
  rows(call, in, sizes, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_attention_backward(
    Tensor dy, OptionalTensor dfinal_state, Tensor q, Tensor k, Tensor v, OptionalTensor log_decay, double scale,
    OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  const Gradients g =
      backward(dy, dfinal_state, {q, k, v, std::nullopt, log_decay, scale}, initial_state, cu_seqlens);
  return {g.dq, g.dk, g.dv, g.dlog_decay, g.dinitial};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_rule_backward(
    Tensor dy, OptionalTensor dfinal_state, Tensor q, Tensor k, Tensor v, Tensor beta, OptionalTensor log_decay,
    double scale, OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  const Gradients g = backward(dy, dfinal_state, {q, k, v, beta, log_decay, scale}, initial_state, cu_seqlens);
  return {g.dq, g.dk, g.dv, g.dbeta, g.dlog_decay, g.dinitial};
}

Tensor step(const Inputs& in, const Tensor& state) {
  const Sizes sizes = sizes_of(in, true);
  Arguments arguments(in.v, std::nullopt);
  check_state(state, "state", {sizes.batch, sizes.heads, sizes.keys, sizes.values});
  MatrixStateStep call;
  fill(call, arguments, in, sizes, true);
  Tensor y = empty_like_shape(in.v, {sizes.batch, sizes.heads, sizes.values});
  call.y = heads_of(y, true);
  call.state = floats_of(state);
  call.state_batch_stride = state.stride(0);
  call.state_head_stride = state.stride(1);
  call.state_row_stride = state.stride(2);
  matrix_state_step(call, 0, sizes.batch * sizes.heads);
  return y;
}

Tensor gated_linear_attention_step(Tensor q, Tensor k, Tensor v, OptionalTensor log_decay, Tensor state,
                                   double scale) {
  return step({q, k, v, std::nullopt, log_decay, scale}, state);
}

Tensor gated_delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, OptionalTensor log_decay, Tensor state,
                             double scale) {
  return step({q, k, v, beta, log_decay, scale}, state);
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("gated_linear_attention", TORCH_BOX(&star::gated_linear_attention));
  m.impl("gated_linear_attention_backward", TORCH_BOX(&star::gated_linear_attention_backward));
  m.impl("gated_linear_attention_step", TORCH_BOX(&star::gated_linear_attention_step));
  m.impl("gated_delta_rule", TORCH_BOX(&star::gated_delta_rule));
  m.impl("gated_delta_rule_backward", TORCH_BOX(&star::gated_delta_rule_backward));
  m.impl("gated_delta_rule_step", TORCH_BOX(&star::gated_delta_rule_step));
}
