// Attention of one query over a cache on a GPU: kernels, checks, launches, registration.
//
// A block takes some consecutive entries ("a split") of the cache of one sequence and key head, for up to 8 of
// the query heads that share that key head, so that the cache is read once. A group of lanes takes an entry in
// 16-byte accesses, several entries at a time; each group keeps the running softmax of the entries that were its
// own, as csrc/attention/decode_kernels.cpp does:
//     m' = max(m, s),  (l, a) = (l, a) 2^(m - m') + 2^(s - m') (1, v),
// and groups, warps and splits are put together at the end, in the order of their numbers. How many splits there
// may be follows from shapes; how many of them a sequence uses, from its length, which the device alone knows.
#include "cuda_decode.h"

namespace star {
namespace {

// The running softmax of one group of lanes over its entries.
template <class Form>
struct Running {
  static constexpr int heads = Form::heads, packs = Form::packs, pack = Form::pack, rows = Form::rows;
  using T = typename Form::T;
  float most[heads], total[heads], sum[heads][packs][pack];

  __device__ __forceinline__ Running() {
#pragma unroll
    for (int head = 0; head < heads; ++head) {
      most[head] = -FLT_MAX;
      total[head] = 0.0f;
#pragma unroll
      for (int i = 0; i < packs; ++i)
#pragma unroll
        for (int n = 0; n < pack; ++n) sum[head][i][n] = 0.0f;
    }
  }

  // Scores of `rows` entries, -infinity where there is none, become weights; what was summed is brought to
  // the new maximum.
  __device__ __forceinline__ void weigh(int head, float (&scores)[rows]) {
    float maximum = most[head];
#pragma unroll
    for (int r = 0; r < rows; ++r) maximum = fmaxf(maximum, scores[r]);
    const float correction = fast_exp2(most[head] - maximum);
    most[head] = maximum;
    total[head] *= correction;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      scores[r] = fast_exp2(scores[r] - maximum);
      total[head] += scores[r];
    }
#pragma unroll
    for (int i = 0; i < packs; ++i)
#pragma unroll
      for (int n = 0; n < pack; ++n) sum[head][i][n] *= correction;
  }

  // Puts the groups of the warp together, in every one of them.
  __device__ __forceinline__ void merge_groups() {
#pragma unroll
    for (int head = 0; head < heads && Form::groups > 1; ++head) {
      float maximum = most[head];
#pragma unroll
      for (int distance = Form::lanes; distance < warp_size; distance *= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(all_lanes, maximum, distance));
      const float factor = fast_exp2(most[head] - maximum);
      most[head] = maximum;
      total[head] = over_groups(total[head] * factor);
#pragma unroll
      for (int i = 0; i < packs; ++i)
#pragma unroll
        for (int n = 0; n < pack; ++n) sum[head][i][n] = over_groups(sum[head][i][n] * factor);
    }
  }

  static __device__ __forceinline__ float over_groups(float value) {
#pragma unroll
    for (int distance = Form::lanes; distance < warp_size; distance *= 2)
      value += __shfl_xor_sync(all_lanes, value, distance);
    return value;
  }
};

// The query heads of the block as floats times the factor, in the order that Form::quad says; zero beyond.
template <class Form>
__device__ __forceinline__ void load_queries(const DecodeCall& call, const Part& part, float* queries) {
  using T = typename Form::T;
  for (int at = static_cast<int>(threadIdx.x); at < Form::heads * Form::columns; at += threads) {
    const int head = at / Form::columns, quad = at % Form::columns / 4;
    const int member = Form::first_member(part, call) + head, column = Form::column(part, call, quad, at % 4);
    const bool inside = member < call.group && column < call.width;
    queries[at] = inside ? call.factor * to_float(call.q.at<T>(part.batch, 0, part.kv_head * call.group +
                                                                                    member)[column])
                         : 0.0f;
  }
}

// Keeps what is in shared memory there: the compiler would hold the queries of many heads in registers at once.
__device__ __forceinline__ void read_again() { asm volatile("" ::: "memory"); }

// Goes over the block's entries of the cache.
template <class Form>
__device__ __forceinline__ void attend(const DecodeCall& call, const Part& part, const float* queries,
                                       Running<Form>& running) {
  using T = typename Form::T;
  constexpr int N = Form::pack, rows = Form::rows, packs = Form::packs, heads = Form::heads;
  const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % Form::lanes;
  const int group = static_cast<int>(threadIdx.x) % warp_size / Form::lanes;
  const T* k = call.k.at<T>(part.batch, 0, part.kv_head) + lane * N;
  const T* v = call.v.at<T>(part.batch, 0, part.kv_head) + lane * N;
  for (int64_t entry = part.first + warp * Form::entries; entry < part.last; entry += warps * Form::entries) {
    Words<T, N> key[rows][packs], value[rows][packs];
    bool there[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t row = entry + r * Form::groups + group;
      there[r] = row < part.last;
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        const int column = (i * Form::lanes + lane) * N;
        key[r][i].load(k + row * call.k.row_stride + i * Form::lanes * N, there[r] && column < call.width);
        value[r][i].load(v + row * call.v.row_stride + i * Form::lanes * N,
                         there[r] && column < call.value_width);
      }
    }
    float scores[heads][rows] = {};
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      float keys[rows][N];
#pragma unroll
      for (int r = 0; r < rows; ++r) key[r][i].unpack(keys[r]);
#pragma unroll
      for (int head = 0; head < heads; ++head) {
        if (heads > 1 && head % 2 == 0) read_again();
#pragma unroll
        for (int part_of = 0; part_of < N / 4; ++part_of) {
          float query[4];
          load<4>(queries + head * Form::columns + Form::quad(lane, i, part_of) * 4, query);
#pragma unroll
          for (int r = 0; r < rows; ++r)
#pragma unroll
            for (int n = 0; n < 4; ++n) scores[head][r] += query[n] * keys[r][part_of * 4 + n];
        }
      }
    }
#pragma unroll
    for (int head = 0; head < heads; ++head) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const float score = warp_sum<Form::lanes>(scores[head][r]);
        scores[head][r] = there[r] ? score : -INFINITY;
      }
      running.weigh(head, scores[head]);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        float values[N];
        value[r][i].unpack(values);
#pragma unroll
        for (int head = 0; head < heads; ++head)
#pragma unroll
          for (int n = 0; n < N; ++n) running.sum[head][i][n] += scores[head][r] * values[n];
      }
    }
  }
}

template <class Form>
__global__ void __launch_bounds__(threads, Form::together) packed_decode_kernel(DecodeCall call) {
  constexpr int heads = Form::heads, columns = Form::columns, pack = Form::pack;
  static_assert(warps * columns >= most_splits, "combine() takes these sums' place");
  alignas(16) __shared__ float queries[heads * columns];
  alignas(16) __shared__ float sums[warps * heads * columns];
  __shared__ float stats[warps][heads][2];
  __shared__ bool last;
  const Part part(call, Form::groups, Form::least);
  if (part.split >= part.active) return;
  load_queries<Form>(call, part, queries);
  __syncthreads();
  Running<Form> running;
  attend<Form>(call, part, queries, running);
  running.merge_groups();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size, lane = thread % warp_size;
  if (lane < Form::lanes) {
#pragma unroll
    for (int head = 0; head < heads; ++head)
#pragma unroll
      for (int i = 0; i < Form::packs; ++i)
#pragma unroll
        for (int quarter = 0; quarter < pack / 4; ++quarter) {
          float four[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) four[n] = running.sum[head][i][quarter * 4 + n];
          store<4>(four, sums + (warp * heads + head) * columns + Form::quad(lane, i, quarter) * 4);
        }
  }
  if (lane == 0) {
#pragma unroll
    for (int head = 0; head < heads; ++head) {
      stats[warp][head][0] = running.most[head];
      stats[warp][head][1] = running.total[head];
    }
  }
  __syncthreads();
  for (int item = thread; item < heads * Form::quads; item += threads) {
    const int head = item / Form::quads, quad = item % Form::quads;
    float most = stats[0][head][0], total = 0.0f, sum[4] = {};
#pragma unroll
    for (int w = 1; w < warps; ++w) most = fmaxf(most, stats[w][head][0]);
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float factor = fast_exp2(stats[w][head][0] - most);
      float four[4];
      load<4>(sums + (w * heads + head) * columns + quad * 4, four);
      total += factor * stats[w][head][1];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += factor * four[i];
    }
    deliver<Form>(call, part, head, quad, most, total, sum);
  }
  if (part.active == 1) return;
  if (is_last_block(call.counters + part.unit, part.active, last)) combine<Form>(call, part, sums);
}

template <class Form>
__global__ void __launch_bounds__(threads) general_decode_kernel(DecodeCall call) {
  using T = typename Form::T;
  constexpr int entries = Form::entries;
  __shared__ float scores[entries];
  __shared__ float weights[most_splits];
  __shared__ bool last;
  const Part part(call, 1, Form::least);
  if (part.split >= part.active) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size, lane = thread % warp_size;
  const T* q = call.q.at<T>(part.batch, 0, part.kv_head * call.group + Form::first_member(part, call));
  float most = -FLT_MAX, total = 0.0f, sum[4] = {};
  for (int64_t entry = part.first; entry < part.last; entry += entries) {
    const int count = part.last - entry < entries ? static_cast<int>(part.last - entry) : entries;
    for (int j = warp; j < count; j += warps) {
      const T* k = call.k.at<T>(part.batch, entry + j, part.kv_head);
      float score = 0.0f;
      for (int d = lane; d < call.width; d += warp_size) score += to_float(q[d]) * to_float(k[d]);
      score = warp_sum(score);
      if (lane == 0) scores[j] = call.factor * score;
    }
    __syncthreads();
    const float score = lane < count ? scores[lane] : -INFINITY;
    const float maximum = fmaxf(most, warp_maximum(score));
    const float correction = fast_exp2(most - maximum), weight = fast_exp2(score - maximum);
    most = maximum;
    total = total * correction + warp_sum(weight);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] *= correction;
    for (int j = 0; j < count; ++j) {
      const T* v = call.v.at<T>(part.batch, entry + j, part.kv_head);
      const float share = __shfl_sync(all_lanes, weight, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = Form::column(part, call, thread, i);
        if (column < call.value_width) sum[i] += share * to_float(v[column]);
      }
    }
    __syncthreads();  // scores are written again
  }
  deliver<Form>(call, part, 0, thread, most, total, sum);
  if (part.active == 1) return;
  if (is_last_block(call.counters + part.unit, part.active, last)) combine<Form>(call, part, weights);
}

// Splits, workspace and launch of one form.
template <class Form>
void run(DecodeCall& call, const Tensor& q, int64_t batch, int64_t tiles, void (*kernel)(DecodeCall)) {
  const OnDevice on(q);
  const int64_t units = batch * call.kv_heads * tiles, multiprocessor_count = multiprocessors(on);
  const int64_t span = call.window != 0 && call.window < call.capacity ? call.window : call.capacity;
  // Where the units alone fill the machine, splits would only cost; else they make for a few blocks more than
  // fit at once, so that what a sequence lacks in length another block fills.
  int64_t splits = 1;
  if (units > 0 && units < 4 * multiprocessor_count) {
    const int64_t wanted = ceil_div(8 * multiprocessor_count, units), useful = ceil_div(span, Form::least);
    splits = wanted < useful ? wanted : useful;
    splits = splits < 1 ? 1 : splits > most_splits ? most_splits : splits;
  }
  STD_TORCH_CHECK(units * splits <= INT32_MAX, "batch x heads is too large for one launch");
  call.tiles = static_cast<int>(tiles);
  call.splits = static_cast<int>(splits);
  if (splits == 1) return launch(on, kernel, dim3(blocks(units)), dim3(threads), 0, call);
  const int64_t counters = ceil_div(units, 4) * 4, stats = ceil_div(units * splits * Form::heads * 2, 4) * 4;
  Tensor workspace = empty_float(q, {counters + stats + units * splits * Form::heads * Form::columns});
  call.counters = reinterpret_cast<unsigned*>(floats_in(workspace));
  call.stats = floats_in(workspace) + counters;
  call.sums = call.stats + stats;
  zero(on, call.counters, static_cast<size_t>(units) * sizeof(unsigned));
  launch(on, kernel, dim3(blocks(units * splits)), dim3(threads), 0, call);
}

template <class T, int LANES, int PACKS, int HEADS, int ROWS>
void run_packed(DecodeCall& call, const Tensor& q, int64_t batch) {
  using Form = PackedForm<T, LANES, PACKS, HEADS, ROWS>;
  run<Form>(call, q, batch, ceil_div(call.group, HEADS), packed_decode_kernel<Form>);
}

// By the number of query heads that share a key head.
template <class T, int LANES, int PACKS>
void run_with_heads(DecodeCall& call, const Tensor& q, int64_t batch) {
  constexpr bool wide = sizeof(T) == 4 || LANES == 32;  // four heads are as many as registers are for
  if (call.group == 1) return run_packed<T, LANES, PACKS, 1, 4 / PACKS>(call, q, batch);
  if (call.group <= 4 || wide) return run_packed<T, LANES, PACKS, 4, 4 / PACKS>(call, q, batch);
  return run_packed<T, LANES, PACKS, (wide ? 4 : 8), 4 / PACKS>(call, q, batch);
}

template <class T>
void run_with_width(DecodeCall& call, const Tensor& q, int64_t batch, bool packs) {
  constexpr int N = 16 / sizeof(T), wide = sizeof(T) == 4 ? 2 : 1;
  const int width = call.width > call.value_width ? call.width : call.value_width;
  if (packs && width <= 64) return run_with_heads<T, 64 / N, 1>(call, q, batch);
  if (packs && width <= 128) return run_with_heads<T, 128 / N, 1>(call, q, batch);
  if (packs && width <= 256) return run_with_heads<T, 32, wide>(call, q, batch);
  using Form = GeneralForm<T>;
  run<Form>(call, q, batch, call.group * ceil_div(call.value_width, Form::columns), general_decode_kernel<Form>);
}

CacheRows one_row(const Tensor& tensor) {
  return CacheRows{tensor.data_ptr(), tensor.stride(0), 0, tensor.stride(1)};
}

CacheRows rows_of_cache(const Tensor& cache) {
  return CacheRows{cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

bool cache_takes_packs(const CacheRows& rows, int64_t width, int64_t bytes) {
  const int count = static_cast<int>(16 / bytes);
  return width % count == 0 &&
         takes_packs(rows.data, bytes, count, {rows.batch_stride, rows.row_stride, rows.head_stride});
}

Tensor attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, std::optional<double> scale,
                        std::optional<int64_t> window) {
  DeviceArguments arguments(q, "q");
  STD_TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4 && v_cache.dim() == 4,
                  "q must be (B, H, Dh), the caches (B, Lmax, Hkv, D)");
  const int64_t batch = q.size(0), heads = q.size(1), width = q.size(2);
  const int64_t capacity = k_cache.size(1), kv_heads = k_cache.size(2), value_width = v_cache.size(3);
  const Tensor& queries = arguments.activation(q, "q", {batch, heads, width});
  const Tensor& keys = arguments.activation(k_cache, "k_cache", {batch, capacity, kv_heads, width});
  const Tensor& values = arguments.activation(v_cache, "v_cache", {batch, capacity, kv_heads, value_width});
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "H must be a multiple of Hkv");
  STD_TORCH_CHECK(width > 0, "q must have a head width");
  STD_TORCH_CHECK(width <= INT32_MAX && value_width <= INT32_MAX - 1024 && heads <= INT32_MAX,
                  "heads or their widths are too large");
  STD_TORCH_CHECK(!window || *window > 0, "window must be positive");
  arguments.check(lengths, "lengths", {batch});
  check_dtype(lengths, "lengths", ScalarType::Int);
  const Tensor& counts = arguments.keep(torch::stable::contiguous(lengths));

  Tensor y = empty_like_shape(q, {batch, heads, value_width});
  DecodeCall call{};
  call.q = one_row(queries);
  call.k = rows_of_cache(keys);
  call.v = rows_of_cache(values);
  call.y = one_row(y);
  call.lengths = static_cast<const int32_t*>(counts.data_ptr());
  call.capacity = capacity;
  call.window = window ? *window : 0;
  call.width = static_cast<int>(width);
  call.value_width = static_cast<int>(value_width);
  call.kv_heads = static_cast<int>(kv_heads);
  call.group = static_cast<int>(heads / kv_heads);
  const double factor = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(width));
  call.factor = static_cast<float>(factor) * log2_of_e;
  STAR_WITH_DTYPE(arguments.dtype(), T, {
    const bool packs =
        cache_takes_packs(call.k, width, sizeof(T)) && cache_takes_packs(call.v, value_width, sizeof(T));
    run_with_width<T>(call, q, batch, packs);
  });
  return y;
}

}  // namespace
}  // namespace star

STAR_REGISTER_CUDA(m) { m.impl("attention_decode", TORCH_BOX(&star::attention_decode)); }
