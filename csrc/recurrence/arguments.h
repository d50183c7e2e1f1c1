// What the torch side of every recurrence shares: tensors kept alive for a call, spans, optional outputs.
#pragma once

#include <tuple>
#include <utility>

#include "../common/tensor.h"
#include "kernels.h"

namespace star {

// Checks arguments, makes their rows addressable, and owns whatever copies that took until the call is over.
class Arguments {
 public:
  Sequences sequences;

  Arguments(const Tensor& first, const OptionalTensor& cu_seqlens)
      : sequences(cu_seqlens, first.size(0), first.size(1)), dtype(dtype_number(first)) {
    kept.reserve(16);
  }

  Spans spans() const {
    return Spans{sequences.packed() ? sequences.offsets.data() : nullptr, sequences.count, sequences.length};
  }

  // An activation: in the dtype of the first tensor, its last dimension made contiguous where it is not.
  const Tensor& activation(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    check_sizes(tensor, name, sizes);
    check_same_dtype(tensor, name);
    return keep(with_contiguous_rows(tensor));
  }

  Rows rows(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    return rows_of(activation(tensor, name, sizes));
  }

  Rows rows(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    return tensor ? rows(*tensor, name, sizes) : Rows();
  }

  // A weight or a state: contiguous float32.
  const float* floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    check_sizes(tensor, name, sizes);
    return static_cast<const float*>(keep(as_float(tensor)).data_ptr());
  }

  const float* floats(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    return tensor ? floats(*tensor, name, sizes) : nullptr;
  }

  void check_same_dtype(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(dtype_number(tensor) == dtype, name, " has a wrong dtype");
  }

  const Tensor& keep(Tensor tensor) {
    kept.push_back(std::move(tensor));
    return kept.back();
  }

 private:
  int32_t dtype;
  std::vector<Tensor> kept;
};

inline float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// A float32 state that a step overwrites: the last dimension contiguous, never copied.
inline void check_state(const Tensor& state, const char* name, std::initializer_list<int64_t> sizes) {
  check_sizes(state, name, sizes);
  STD_TORCH_CHECK(is_float32(state), name, " must be float32");
  const int64_t last = state.dim() - 1;
  STD_TORCH_CHECK(state.size(last) <= 1 || state.stride(last) == 1, name,
                  "'s last dimension must be contiguous");
  check_written(state, name);
}

// A gradient that the caller may not have asked for: empty then.
inline Tensor float_gradient(bool wanted, const Tensor& like, std::vector<int64_t> sizes) {
  if (!wanted) sizes[0] = 0;
  return empty_float(like, sizes);
}

inline void add_parts(const Tensor& parts, int64_t count, const Tensor& out) {
  SumParts call{dtype_of(out, "gradient"), floats_of(parts), count, out.numel(), out.data_ptr()};
  torch::stable::parallel_for(0, call.size, 16384,
                              [&](int64_t begin, int64_t end) { sum_parts(call, begin, end); });
}

}  // namespace star
