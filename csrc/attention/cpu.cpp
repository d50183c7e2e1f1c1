// Softmax and differential attention on the CPU: checks, allocation, parallel loops, registration.
#include "../common/tensor.h"
#include "decode_kernels.h"
#include "kernels.h"

#include <tuple>

namespace star {
namespace {

constexpr int64_t grain_operations = 1 << 18;  // below this a second thread costs more than it saves

int64_t padded(int64_t size) { return (size + padding - 1) / padding * padding; }

int64_t tasks_a_thread(int64_t operations_a_task) {
  const int64_t tasks = grain_operations / (operations_a_task > 0 ? operations_a_task : 1);
  return tasks > 1 ? tasks : 1;
}

HeadRows head_rows_of(const Tensor& tensor) {
  return HeadRows{tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Owns what an Attention call points into: tensors with contiguous rows, lam, offsets, packed copies.
struct Prepared {
  Attention call{};
  Sequences sequences;
  std::vector<Tensor> kept;

  Prepared(std::initializer_list<const Tensor*> qs, std::initializer_list<const Tensor*> ks, const Tensor& v,
           bool causal, int64_t window, double scale, double softcap, const OptionalTensor& cu_seqlens)
      : sequences(cu_seqlens, (*qs.begin())->size(0), (*qs.begin())->size(1)) {
    const Tensor& q = **qs.begin();
    const Tensor& k = **ks.begin();
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be (B, L, H, D)");
    call.dtype = dtype_of(q, "q");
    call.sides = static_cast<int>(qs.size());
    call.causal = causal;
    call.batch = q.size(0);
    call.queries = q.size(1);
    call.heads = q.size(2);
    call.width = q.size(3);
    call.keys = k.size(1);
    call.kv_heads = k.size(2);
    call.value_width = v.size(3);
    // A window as long as the sequence hides nothing, and sums with a longer one could overflow.
    call.window = window < (call.queries > call.keys ? call.queries : call.keys) ? window : 0;
    call.scale = static_cast<float>(scale);
    call.softcap = static_cast<float>(softcap);
    STD_TORCH_CHECK(call.kv_heads > 0 && call.heads % call.kv_heads == 0, "H must be a multiple of Hkv");
    STD_TORCH_CHECK(window >= 0, "window must not be negative");
    STD_TORCH_CHECK(!cu_seqlens || call.queries == call.keys, "packed queries and keys must be as many");
    int side = 0;
    for (const Tensor* each : qs)
      call.q[side++] = keep(*each, "q", {call.batch, call.queries, call.heads, call.width}, q);
    side = 0;
    for (const Tensor* each : ks)
      call.k[side++] = keep(*each, "k", {call.batch, call.keys, call.kv_heads, call.width}, q);
    call.v = keep(v, "v", {call.batch, call.keys, call.kv_heads, call.value_width}, q);
    call.offsets = sequences.packed() ? sequences.offsets.data() : nullptr;
    call.sequences = sequences.count;
    // Room for the widest panel and for the rows that a tile may reach beyond the last key.
    const int64_t rows = padded(call.keys) + padding;
    call.key_stride = rows * padded(call.width);
    call.value_stride = rows * padded(call.value_width);
  }

  HeadRows keep(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                const Tensor& like) {
    check_sizes(tensor, name, sizes);
    check_dtype(tensor, name, like.scalar_type());
    kept.push_back(with_contiguous_rows(tensor));
    return head_rows_of(kept.back());
  }

  int64_t pairs() const { return call.batch * call.kv_heads; }
  int64_t query_blocks() const { return (call.queries + query_block - 1) / query_block; }
  int64_t key_chunks() const { return (call.keys + key_chunk - 1) / key_chunk; }

  float* floats(const std::vector<int64_t>& sizes) {
    kept.push_back(empty_float(kept.front(), sizes));
    return static_cast<float*>(kept.back().data_ptr());
  }

  // One lam a head, from a scalar or a vector.
  void set_lam(const Tensor& lam) {
    STD_TORCH_CHECK(lam.is_cpu() && (lam.dim() == 0 || (lam.dim() == 1 && lam.size(0) == call.heads)),
                    "lam must be () or (H,) on the CPU");
    const Tensor values = as_float(lam);
    const float* from = static_cast<const float*>(values.data_ptr());
    float* to = floats({call.heads});
    for (int64_t head = 0; head < call.heads; ++head) to[head] = from[lam.dim() == 0 ? 0 : head];
    call.lam = to;
  }

  void pack(bool backward) {
    for (int side = 0; side < call.sides; ++side) {
      call.keys_across[side] = floats({pairs(), call.key_stride});
      if (backward) call.keys_along[side] = floats({pairs(), call.key_stride});
    }
    (backward ? call.values_across : call.values_along) = floats({pairs(), call.value_stride});
    const int64_t grain = tasks_a_thread(8 * key_chunk * (call.width * call.sides + call.value_width));
    torch::stable::parallel_for(0, pairs() * key_chunks(), grain, [&](int64_t begin, int64_t end) {
      if (begin < end) attention_pack(call, begin, end);
    });
  }

  // The only query stands at the last position and sees all keys, or those of the window: packing them
  // would cost more than reading them once.
  void decode() {
    AttentionDecode one{};
    one.dtype = call.dtype;
    one.sides = call.sides;
    one.kv_heads = call.kv_heads;
    one.group = call.heads / call.kv_heads;
    one.width = call.width;
    one.value_width = call.value_width;
    one.window = call.window;
    one.scale = call.scale;
    one.softcap = call.softcap;
    one.lam = call.lam;
    for (int side = 0; side < call.sides; ++side) {
      one.q[side] = call.q[side];
      one.k[side] = call.k[side];
    }
    one.v = call.v;
    one.y = call.y;
    one.length = call.keys;
    run_attention_decode(one, call.batch, call.keys);
  }

  Tensor forward(const Tensor& q) {
    Tensor y = empty_like_shape(q, {call.batch, call.queries, call.heads, call.value_width});
    call.y = head_rows_of(y);
    if (call.queries == 1) {
      decode();
      return y;
    }
    pack(false);
    const int64_t seen = call.window && call.window < call.keys ? call.window : call.keys;
    const int64_t grain = tasks_a_thread(query_block * seen * (call.width * call.sides + call.value_width));
    const int64_t tasks = call.batch * call.heads * query_blocks();
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      if (begin < end) attention_forward(call, begin, end);
    });
    return y;
  }
};

struct Gradients {
  Tensor dq[2], dk[2], dv, dlam;
};

Gradients backward(Prepared& prepared, const Tensor& dy, const Tensor& q) {
  prepared.pack(true);
  AttentionBackward call{};
  call.dy = prepared.keep(dy, "dy",
                          {prepared.call.batch, prepared.call.queries, prepared.call.heads,
                           prepared.call.value_width},
                          q);
  const Attention& forward = call.forward = prepared.call;
  const int64_t pairs = prepared.pairs(), blocks = prepared.query_blocks();
  // Sixteen tasks or more where there are blocks for them: a function of the shape alone.
  const int64_t wanted = pairs > 0 ? (16 + pairs - 1) / pairs : 1;
  call.splits = wanted < blocks ? wanted : (blocks > 0 ? blocks : 1);
  Gradients result;
  for (int side = 0; side < forward.sides; ++side) {
    result.dq[side] = empty_like_shape(q, {forward.batch, forward.queries, forward.heads, forward.width});
    result.dk[side] = empty_like_shape(q, {forward.batch, forward.keys, forward.kv_heads, forward.width});
    call.dq[side] = head_rows_of(result.dq[side]);
    call.dk[side] = head_rows_of(result.dk[side]);
    call.dk_parts[side] = prepared.floats({pairs, call.splits, forward.key_stride});
  }
  result.dv = empty_like_shape(q, {forward.batch, forward.keys, forward.kv_heads, forward.value_width});
  call.dv = head_rows_of(result.dv);
  call.dv_parts = prepared.floats({pairs, call.splits, forward.value_stride});
  if (forward.sides == 2) call.dlam_parts = prepared.floats({forward.batch, forward.heads, blocks});

  const int64_t seen = forward.window && forward.window < forward.keys ? forward.window : forward.keys;
  const int64_t rows = forward.queries * (forward.heads / forward.kv_heads) / call.splits;
  const int64_t grain = tasks_a_thread(rows * seen * (forward.width + forward.value_width) * 3);
  torch::stable::parallel_for(0, pairs * call.splits, grain, [&](int64_t begin, int64_t end) {
    if (begin < end) attention_backward(call, begin, end);
  });
  const int64_t write_grain = tasks_a_thread(8 * key_chunk * (forward.width + forward.value_width));
  torch::stable::parallel_for(0, pairs * prepared.key_chunks(), write_grain, [&](int64_t begin, int64_t end) {
    if (begin < end) attention_write_backward(call, begin, end);
  });
  if (forward.sides == 2) {
    result.dlam = empty_float(q, {forward.heads});
    float* dlam = static_cast<float*>(result.dlam.data_ptr());
    for (int64_t head = 0; head < forward.heads; ++head) {
      float sum = 0.0f;
      for (int64_t batch = 0; batch < forward.batch; ++batch)
        for (int64_t block = 0; block < blocks; ++block)
          sum += call.dlam_parts[(batch * forward.heads + head) * blocks + block];
      dlam[head] = sum;
    }
  }
  return result;
}

Tensor attention(Tensor q, Tensor k, Tensor v, bool causal, int64_t window, double scale, double softcap,
                 OptionalTensor cu_seqlens) {
  Prepared prepared({&q}, {&k}, v, causal, window, scale, softcap, cu_seqlens);
  return prepared.forward(q);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_op(Tensor dy, Tensor q, Tensor k, Tensor v, bool causal,
                                                         int64_t window, double scale, double softcap,
                                                         OptionalTensor cu_seqlens) {
  Prepared prepared({&q}, {&k}, v, causal, window, scale, softcap, cu_seqlens);
  Gradients g = backward(prepared, dy, q);
  return {g.dq[0], g.dk[0], g.dv};
}

Tensor diff_attention(Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam, bool causal,
                      int64_t window, double scale) {
  Prepared prepared({&q1, &q2}, {&k1, &k2}, v, causal, window, scale, 0.0, std::nullopt);
  prepared.set_lam(lam);
  return prepared.forward(q1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> diff_attention_backward_op(
    Tensor dy, Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam, bool causal, int64_t window,
    double scale) {
  Prepared prepared({&q1, &q2}, {&k1, &k2}, v, causal, window, scale, 0.0, std::nullopt);
  prepared.set_lam(lam);
  Gradients g = backward(prepared, dy, q1);
  return {g.dq[0], g.dk[0], g.dq[1], g.dk[1], g.dv, g.dlam};
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&star::attention));
  m.impl("attention_backward", TORCH_BOX(&star::attention_backward_op));
  m.impl("diff_attention", TORCH_BOX(&star::diff_attention));
  m.impl("diff_attention_backward", TORCH_BOX(&star::diff_attention_backward_op));
}
