// The host side of every launch: the tensors' device and stream, grids, errors. Include from *cuda*.cu only.
#pragma once

#include "device.h"
#include "../tensor.h"

#ifndef STAR_EMULATE_CUDA
#include <dlfcn.h>
#endif

namespace star {

#ifdef STAR_EMULATE_CUDA

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(const OnDevice&, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline int multiprocessors(const OnDevice&) { return 2; }

inline void zero(const OnDevice&, void* data, size_t bytes) { std::memset(data, 0, bytes); }

#else

// Raises, and takes the error out of the runtime, where the next launch would find it again and raise after its
// kernel has run.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// torch's own stream on a device. The function exists in CUDA builds of torch only, so it is looked up in the
// library that the process has loaded, and this object builds beside any torch.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA streams (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// While it lives, launches go to the tensor's device, on torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : device(tensor.get_device()) {
    check_cuda(cudaGetDevice(&before), "the current CUDA device");
    if (before != device) check_cuda(cudaSetDevice(device), "the tensors' CUDA device");
    stream = current_stream(device);
  }
  ~OnDevice() {
    if (before != device && cudaSetDevice(before) != cudaSuccess) cudaGetLastError();
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  int device;
  cudaStream_t stream = nullptr;

 private:
  int before = 0;
};

// Launches a kernel; a grid with a zero is nothing to do. Every failure to launch raises.
template <class... Parameters, class... Arguments>
void launch(const OnDevice& on, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
               "shared memory of a kernel");
  kernel<<<grid, threads, shared_bytes, on.stream>>>(arguments...);
  check_cuda(cudaGetLastError(), "launch of a kernel");
}

// Zeroes memory on the stream, before what is launched next.
inline void zero(const OnDevice& on, void* data, size_t bytes) {
  check_cuda(cudaMemsetAsync(data, 0, bytes, on.stream), "zeroing a workspace");
}

inline int multiprocessors(const OnDevice& on) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, on.device), "multiprocessors");
  return count;
}

#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block count as CUDA takes it in x. Kernels whose work may exceed it loop over blocks.
inline unsigned blocks(int64_t count) {
  return static_cast<unsigned>(count < INT32_MAX ? count : INT32_MAX);
}

// Whether every access of `count` elements at `data` + a multiple of the strides is aligned to its size.
inline bool takes_packs(const void* data, int64_t element_bytes, int count, std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % (element_bytes * count) != 0) return false;
  for (int64_t stride : strides)
    if (stride % count != 0) return false;
  return true;
}

}  // namespace star

// Runs the statement with N bound to the largest pack that `fits(N)` allows: 16 bytes of T, or one element.
#define STAR_WITH_PACK(T, fits, N, ...)                                    \
  if (fits(static_cast<int>(16 / sizeof(T)))) {                            \
    constexpr int N = static_cast<int>(16 / sizeof(T));                    \
    __VA_ARGS__;                                                           \
  } else {                                                                 \
    constexpr int N = 1;                                                   \
    __VA_ARGS__;                                                           \
  }
