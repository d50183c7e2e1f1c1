// Attention of one query over a cache on the CPU: checks, allocation of the output, parallel loop, registration.
#include "../common/tensor.h"
#include "decode_kernels.h"

namespace star {
namespace {

constexpr int64_t grain_operations = 1 << 17;  // below this a second thread costs more than it saves

HeadRows one_row(const Tensor& tensor) {
  return HeadRows{tensor.data_ptr(), tensor.stride(0), 0, tensor.stride(1)};
}

HeadRows rows_of_cache(const Tensor& cache) {
  return HeadRows{cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

Tensor attention_decode_op(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, std::optional<double> scale,
                        std::optional<int64_t> window) {
  STD_TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4,
                  "q must be (B, H, Dh), the caches (B, Lmax, Hkv, D)");
  const int64_t batch = q.size(0), heads = q.size(1), capacity = k_cache.size(1);
  AttentionDecode call{};
  call.dtype = dtype_of(q, "q");
  call.sides = 1;
  call.kv_heads = k_cache.size(2);
  call.width = q.size(2);
  call.value_width = v_cache.size(3);
  check_sizes(q, "q", {batch, heads, call.width});
  check_sizes(k_cache, "k_cache", {batch, capacity, call.kv_heads, call.width});
  check_sizes(v_cache, "v_cache", {batch, capacity, call.kv_heads, call.value_width});
  check_dtype(k_cache, "k_cache", q.scalar_type());
  check_dtype(v_cache, "v_cache", q.scalar_type());
  STD_TORCH_CHECK(call.kv_heads > 0 && heads % call.kv_heads == 0, "H must be a multiple of Hkv");
  STD_TORCH_CHECK(call.width > 0, "q must have a head width");
  STD_TORCH_CHECK(!window || *window > 0, "window must be positive");
  call.group = heads / call.kv_heads;
  call.window = window ? *window : 0;
  call.scale = static_cast<float>(scale ? *scale : 1.0 / __builtin_sqrt(static_cast<double>(call.width)));

  check_sizes(lengths, "lengths", {batch});
  check_dtype(lengths, "lengths", ScalarType::Int);
  const Tensor counts = with_contiguous_rows(lengths);
  call.lengths = static_cast<const int32_t*>(counts.data_ptr());
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(call.lengths[b] >= 0 && call.lengths[b] <= capacity, "lengths must be 0 to Lmax");
    longest = call.lengths[b] > longest ? call.lengths[b] : longest;
  }

  const Tensor queries = with_contiguous_rows(q), keys = with_contiguous_rows(k_cache),
               values = with_contiguous_rows(v_cache);
  Tensor y = empty_like_shape(q, {batch, heads, call.value_width});
  call.q[0] = one_row(queries);
  call.k[0] = rows_of_cache(keys);
  call.v = rows_of_cache(values);
  call.y = one_row(y);
  run_attention_decode(call, batch, longest);
  return y;
}

}  // namespace

void run_attention_decode(const AttentionDecode& call, int64_t batch, int64_t longest) {
  const int64_t seen = call.window && call.window < longest ? call.window : longest;
  const int64_t work = seen * call.group * (call.width * call.sides + call.value_width);
  const int64_t tasks = batch * call.kv_heads;
  if (work * tasks <= grain_operations) return attention_decode(call, 0, tasks);
  const int64_t grain = grain_operations / (work > 0 ? work : 1);
  torch::stable::parallel_for(0, tasks, grain > 0 ? grain : 1, [&](int64_t begin, int64_t end) {
    if (begin < end) attention_decode(call, begin, end);
  });
}

}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&star::attention_decode_op));
}
