// Cross-entropy of rows of logits on the CPU: checks, allocation, parallel loop, registration.
#include "../common/tensor.h"
#include "kernels.h"

namespace star {
namespace {

constexpr int64_t grain_elements = 8192;  // below this a second thread costs more than it saves

// The sum of the rows' losses, (); where `share` is given the logits become their gradient.
Tensor cross_entropy_rows_op(Tensor logits, Tensor targets, int64_t ignore_index, OptionalTensor share) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be (N, V), contiguous");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_sizes(logits, "logits", {rows, classes});
  check_dtype(logits, "logits", ScalarType::Float);
  check_sizes(targets, "targets", {rows});
  check_dtype(targets, "targets", ScalarType::Long);
  const Tensor indices = torch::stable::contiguous(targets);
  CrossEntropyRows call{};
  call.logits = static_cast<float*>(logits.data_ptr());
  call.targets = static_cast<const int64_t*>(indices.data_ptr());
  call.classes = classes;
  call.ignore_index = ignore_index;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t target = call.targets[i];
    STD_TORCH_CHECK(target == ignore_index || (target >= 0 && target < classes), "targets must be 0 to V - 1");
  }
  if (share) {
    check_sizes(*share, "share", {});
    check_dtype(*share, "share", ScalarType::Float);
    call.share = static_cast<const float*>(share->data_ptr());
  }
  std::vector<float> losses(rows);
  call.losses = losses.data();
  const int64_t grain = grain_elements / (classes > 0 ? classes : 1);
  torch::stable::parallel_for(0, rows, grain > 0 ? grain : 1, [&](int64_t begin, int64_t end) {
    if (begin < end) cross_entropy_rows(call, begin, end);
  });
  double sum = 0.0;
  for (float loss : losses) sum += loss;
  Tensor total = empty_float(logits, {});
  *static_cast<float*>(total.data_ptr()) = static_cast<float>(sum);
  return total;
}

}  // namespace
}  // namespace star

STABLE_TORCH_LIBRARY_IMPL(star_kernels, CPU, m) {
  m.impl("cross_entropy_rows_", TORCH_BOX(&star::cross_entropy_rows_op));
}
