// Cross-entropy of rows of logits; compiled once per instruction-set level.
//
// With m = max_v s_v and e_v = e^(s_v - m):  loss = m + log(sum e) - s_t,  dloss/ds_v = e_v / sum e - [v = t].
#include "kernels.h"

#include "../common/vector.h"

namespace star {
namespace STAR_LEVEL {
namespace {

constexpr float log2_of_e = 1.44269504f;

float maximum_of(const float* row, int64_t size) {
  float most = row[0];
#pragma omp simd reduction(max : most)
  for (int64_t v = 1; v < size; ++v) most = most > row[v] ? most : row[v];
  return most;
}

// The sum of e^(s - most), and these values in place of the row where `keep`.
float exponentials(float* row, int64_t size, float most, bool keep) {
  Vector sum{};
  int64_t v = 0;
  for (; v + lanes <= size; v += lanes) {
    const Vector power = exponential2((load(row + v) - most) * log2_of_e);
    if (keep) store(row + v, power);
    sum += power;
  }
  float total = sum_lanes(sum);
  if (v == size) return total;
  float rest[lanes];
  for (int64_t i = 0; i < lanes; ++i) rest[i] = v + i < size ? row[v + i] : most;
  store(rest, exponential2((load(rest) - most) * log2_of_e));
  for (int64_t i = 0; v < size; ++i, ++v) {
    if (keep) row[v] = rest[i];
    total += rest[i];
  }
  return total;
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* row = call.logits + i * call.classes;
    const int64_t target = call.targets[i];
    if (target == call.ignore_index) {
      call.losses[i] = 0.0f;
      for (int64_t v = 0; call.share && v < call.classes; ++v) row[v] = 0.0f;
      continue;
    }
    const float chosen = row[target], most = maximum_of(row, call.classes);
    const float sum = exponentials(row, call.classes, most, call.share != nullptr);
    call.losses[i] = (most - chosen) + __builtin_logf(sum);
    if (!call.share) continue;
    const float factor = *call.share / sum;
    for (int64_t v = 0; v < call.classes; ++v) row[v] *= factor;
    row[target] -= *call.share;
  }
}

}  // namespace STAR_LEVEL
}  // namespace star
