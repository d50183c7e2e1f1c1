// From stable-ABI tensors to the plain types of the kernels, with the checks that keep a direct call of an
// operator inside its tensors. Users' mistakes are caught earlier, in Python, with better words.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

namespace star {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
  return Dtype::float32;
}

// The device whose operators the including file defines: *cuda*.cu defines STAR_ON_CUDA.
#ifdef STAR_ON_CUDA
constexpr const char* must_be_here = " must be on a CUDA device";
inline bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
inline int32_t device_type_here() { return aoti_torch_device_type_cuda(); }
inline int32_t device_index_of(const Tensor& tensor) { return tensor.get_device(); }
#else
constexpr const char* must_be_here = " must be on the CPU";
inline bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
inline int32_t device_type_here() { return aoti_torch_device_type_cpu(); }
inline int32_t device_index_of(const Tensor&) { return 0; }
#endif

// A tensor that an operator writes into: no two of its elements are one number in memory.
inline void check_written(const Tensor& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    STD_TORCH_CHECK(tensor.size(dim) <= 1 || tensor.stride(dim) != 0, name, "'s elements must not share memory");
}

// A tensor with these sizes (-1: any), on this file's device.
inline void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(is_here(tensor), name, must_be_here);
  const auto actual = tensor.sizes();
  bool fits = actual.size() == sizes.size();
  size_t dim = 0;
  for (int64_t size : sizes) {
    fits = fits && (size < 0 || actual[dim] == size);
    ++dim;
  }
  STD_TORCH_CHECK(fits, name, " has a wrong shape");
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has a wrong dtype");
}

// The tensor itself where its last dimension is contiguous, a contiguous copy elsewhere.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool fits = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return fits ? tensor : torch::stable::contiguous(tensor);
}

// A (batch, length, width) tensor as rows. A (batch, width) one has rows with stride 0.
inline Rows rows_of(const Tensor& tensor) {
  Rows rows;
  rows.data = tensor.data_ptr();
  rows.batch_stride = tensor.stride(0);
  rows.row_stride = tensor.dim() > 2 ? tensor.stride(1) : 0;
  return rows;
}

// A contiguous tensor beside another, straight from the allocator: the dispatcher would cost a step a
// microsecond more.
inline Tensor empty_beside(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type_here(),
                                                         device_index_of(like), &handle));
  return Tensor(handle);
}

// The number by which torch names the dtype, cheaper to get and compare than its ScalarType.
inline int32_t dtype_number(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline bool is_float32(const Tensor& tensor) { return dtype_number(tensor) == aoti_torch_dtype_float32(); }

inline Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_beside(like, sizes, dtype_number(like));
}

inline Tensor empty_float(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_beside(like, sizes, aoti_torch_dtype_float32());
}

// Any floating tensor as contiguous float32 (itself where it is that already).
inline Tensor as_float(const Tensor& tensor) {
  const bool is_float = is_float32(tensor);
  if (is_float && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(is_float ? tensor : torch::stable::to(tensor, ScalarType::Float));
}

inline OptionalTensor as_float(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_float(*tensor)) : std::nullopt;
}

// Where each packed sequence starts and ends; without cu_seqlens, batch entries are the sequences.
// Offsets are clamped to [0, length] and made to rise, so that no values can lead outside the tensor.
struct Sequences {
  std::vector<int64_t> offsets;  // packed: S + 1 offsets; dense: empty
  int64_t count = 0;
  int64_t length = 0;

  Sequences(const OptionalTensor& cu_seqlens, int64_t batch, int64_t length) : count(batch), length(length) {
    if (!cu_seqlens) return;
    STD_TORCH_CHECK(batch == 1, "cu_seqlens packs sequences into a batch of 1");
    STD_TORCH_CHECK(cu_seqlens->is_cpu() && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 &&
                        cu_seqlens->scalar_type() == ScalarType::Int,
                    "cu_seqlens must be a non-empty int32 vector on the CPU");
    const Tensor packed = torch::stable::contiguous(*cu_seqlens);
    const int32_t* values = static_cast<const int32_t*>(packed.data_ptr());
    count = cu_seqlens->size(0) - 1;
    int64_t previous = 0;
    for (int64_t i = 0; i <= count; ++i) {
      const int64_t value = values[i] < previous ? previous : values[i] > length ? length : values[i];
      offsets.push_back(value);
      previous = value;
    }
    STD_TORCH_CHECK(offsets.front() == 0 && offsets.back() == length, "cu_seqlens must rise from 0 to L");
  }

  bool packed() const { return !offsets.empty(); }
  int64_t batch(int64_t sequence) const { return packed() ? 0 : sequence; }
  int64_t start(int64_t sequence) const { return packed() ? offsets[sequence] : 0; }
  int64_t end(int64_t sequence) const { return packed() ? offsets[sequence + 1] : length; }
};

}  // namespace star
