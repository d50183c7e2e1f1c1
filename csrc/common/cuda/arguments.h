// What the host side of every family does with a call's tensors: checks, rows and weights, and copies kept
// alive until the launch. Include from *cuda*.cu only.
#pragma once

#include <utility>

#include "launch.h"

namespace star {

// Where each packed sequence starts and ends, read by the device; without cu_seqlens, batch entries are the
// sequences. Offsets are clamped to [0, length] on reading, so that no values can lead outside the tensor.
struct DeviceSequences {
  const int32_t* offsets = nullptr;
  int64_t count = 0;
  int64_t length = 0;

  __device__ __forceinline__ int64_t clamped(int64_t index) const {
    const int64_t value = offsets[index];
    return value < 0 ? 0 : value > length ? length : value;
  }
  __device__ __forceinline__ int64_t batch(int64_t sequence) const { return offsets == nullptr ? sequence : 0; }
  __device__ __forceinline__ int64_t start(int64_t sequence) const {
    return offsets == nullptr ? 0 : clamped(sequence);
  }
  __device__ __forceinline__ int64_t end(int64_t sequence) const {
    return offsets == nullptr ? length : clamped(sequence + 1);
  }
};

// Checks arguments, makes their rows addressable, and owns whatever copies that took until the launch.
class DeviceArguments {
 public:
  explicit DeviceArguments(const Tensor& first, const char* name = "x") : first_(first), dtype_(dtype_of(first, name)) {
    STD_TORCH_CHECK(is_here(first), name, must_be_here);
    kept_.reserve(16);
  }

  Dtype dtype() const { return dtype_; }

  // An activation: in the dtype of the first tensor, its last dimension made contiguous where it is not.
  const Tensor& activation(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    check(tensor, name, sizes);
    STD_TORCH_CHECK(tensor.scalar_type() == first_.scalar_type(), name, " has a wrong dtype");
    return keep(with_contiguous_rows(tensor));
  }

  Rows rows(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    return rows_of(activation(tensor, name, sizes));
  }

  Rows rows(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    return tensor ? rows(*tensor, name, sizes) : Rows();
  }

  // A weight in its own floating dtype, contiguous.
  Weight weight(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    check(tensor, name, sizes);
    const Dtype dtype = dtype_of(tensor, name);
    return Weight{keep(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor)).data_ptr(), dtype};
  }

  Weight weight(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    return tensor ? weight(*tensor, name, sizes) : Weight();
  }

  // A state: contiguous float32.
  const float* floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    check(tensor, name, sizes);
    return static_cast<const float*>(keep(as_float(tensor)).data_ptr());
  }

  const float* floats(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    return tensor ? floats(*tensor, name, sizes) : nullptr;
  }

  // The sequences of a (batch, length, ...) call. Offsets must be on the device: reading them here would wait.
  DeviceSequences sequences(const OptionalTensor& cu_seqlens, int64_t batch, int64_t length) {
    if (!cu_seqlens) return DeviceSequences{nullptr, batch, length};
    STD_TORCH_CHECK(batch == 1, "cu_seqlens packs sequences into a batch of 1");
    STD_TORCH_CHECK(is_here(*cu_seqlens) && device_index_of(*cu_seqlens) == device_index_of(first_) &&
                        cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 &&
                        cu_seqlens->scalar_type() == ScalarType::Int,
                    "cu_seqlens must be a non-empty int32 vector on the tensors' device");
    const Tensor& packed = keep(torch::stable::contiguous(*cu_seqlens));
    return DeviceSequences{static_cast<const int32_t*>(packed.data_ptr()), cu_seqlens->size(0) - 1, length};
  }

  void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    check_sizes(tensor, name, sizes);
    STD_TORCH_CHECK(device_index_of(tensor) == device_index_of(first_), name, " is on another device");
  }

  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

 private:
  Tensor first_;
  Dtype dtype_;
  std::vector<Tensor> kept_;
};

// A float32 state that a step overwrites: the last dimension contiguous, never copied.
inline void check_device_state(const Tensor& state, const char* name, std::initializer_list<int64_t> sizes) {
  check_sizes(state, name, sizes);
  STD_TORCH_CHECK(is_float32(state), name, " must be float32");
  const int64_t last = state.dim() - 1;
  STD_TORCH_CHECK(state.size(last) <= 1 || state.stride(last) == 1, name, "'s last dimension must be contiguous");
  check_written(state, name);
}

inline float* floats_in(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

}  // namespace star
