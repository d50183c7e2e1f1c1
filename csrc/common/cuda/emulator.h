// CUDA's execution model on the CPU, as much of it as the kernels here use, so that they are tested where there
// is no GPU: `g++ -x c++ -DSTAR_EMULATE_CUDA` compiles a *cuda*.cu as it stands.
//
// The threads of a block are fibers on one system thread and run in turns, each until it waits at a barrier or
// for the other lanes of its warp. STAR_EMULATED_ORDER=backward runs them from the last to the first: a missing
// barrier then changes results. Shared memory that is allocated at launch is full of NaN before every block, and
// AddressSanitizer sees every access, so this also stands in for compute-sanitizer's memcheck.
//
// Stricter than a GPU: all lanes of a warp that have not returned must take part in a shuffle, and a block whose
// threads wait at different barriers is an error instead of a deadlock.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace star {
namespace emulator {

constexpr int warp_lanes = 32;
constexpr size_t stack_bytes = 128 * 1024;

enum class State { ready, at_warp, at_block, done };

struct Warp {
  uint64_t values[2][warp_lanes];     // two sets: a lane is at most one exchange ahead of the others
  int64_t given[2][warp_lanes] = {};  // by the how-manieth exchange of its lane a value was given
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int lane = 0;
  Warp* warp = nullptr;
  State state = State::ready;
  int64_t exchanges = 0;
  bool vote = false;
};

// The block that runs now on this system thread.
struct Block {
  dim3 grid, size, index;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<unsigned char> shared;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  bool votes[2] = {false, false};  // what __syncthreads_or answers, by turns
  int turn = 0;
};

inline thread_local Block block;

inline void wait(State state) {
  Fiber* self = block.current;
  self->state = state;
  swapcontext(&self->context, &block.scheduler);
}

inline void fiber_main() {
  block.body(block.arguments);
  block.current->state = State::done;
  swapcontext(&block.current->context, &block.scheduler);
}

// Lets every ready fiber run once; false where there was none.
inline bool run_ready(bool backward) {
  bool ran = false;
  const size_t count = block.fibers.size();
  for (size_t i = 0; i < count; ++i) {
    Fiber* fiber = block.fibers[backward ? count - 1 - i : i].get();
    if (fiber->state != State::ready) continue;
    block.current = fiber;
    swapcontext(&block.scheduler, &fiber->context);
    ran = true;
  }
  return ran;
}

// Releases warps, or the block, whose living fibers all wait at the same kind of barrier.
inline bool release() {
  bool released = false;
  for (size_t w = 0; w * warp_lanes < block.fibers.size(); ++w) {
    const size_t end = std::min(block.fibers.size(), (w + 1) * warp_lanes);
    size_t living = 0, waiting = 0;
    for (size_t i = w * warp_lanes; i < end; ++i) {
      living += block.fibers[i]->state != State::done;
      waiting += block.fibers[i]->state == State::at_warp;
    }
    if (waiting == 0 || waiting < living) continue;
    for (size_t i = w * warp_lanes; i < end; ++i)
      if (block.fibers[i]->state == State::at_warp) block.fibers[i]->state = State::ready;
    released = true;
  }
  if (released) return true;
  size_t living = 0, waiting = 0;
  bool any = false;
  for (const auto& fiber : block.fibers) {
    living += fiber->state != State::done;
    waiting += fiber->state == State::at_block;
    any = any || (fiber->state == State::at_block && fiber->vote);
  }
  if (waiting == 0 || waiting < living) return false;
  block.votes[block.turn] = any;
  block.turn ^= 1;
  for (const auto& fiber : block.fibers)
    if (fiber->state == State::at_block) fiber->state = State::ready;
  return true;
}

inline void start_fibers() {
  const unsigned count = block.size.x * block.size.y * block.size.z;
  while (block.fibers.size() > count) block.fibers.pop_back();
  while (block.fibers.size() < count) {
    block.fibers.push_back(std::make_unique<Fiber>());
    block.fibers.back()->stack.reset(new char[stack_bytes]);
  }
  block.warps.clear();
  for (unsigned i = 0; i < count; ++i) {
    if (i % warp_lanes == 0) block.warps.push_back(std::make_unique<Warp>());
    Fiber& fiber = *block.fibers[i];
    fiber.thread = dim3(i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y);
    fiber.lane = static_cast<int>(i % warp_lanes);
    fiber.warp = block.warps.back().get();
    fiber.state = State::ready;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

inline void run_block() {
  static const char* order = std::getenv("STAR_EMULATED_ORDER");
  const bool backward = order != nullptr && std::string(order) == "backward";
  std::fill(block.shared.begin(), block.shared.end(), 0xff);  // NaN
  start_fibers();
  while (run_ready(backward) || release()) {
  }
  for (const auto& fiber : block.fibers)
    if (fiber->state != State::done) throw std::runtime_error("threads of a block wait at different barriers");
}

// Runs the kernel, one block after the other.
template <class Body>
void run(dim3 grid, dim3 size, size_t shared_bytes, Body body) {
  if (size.x * size.y * size.z > 1024) throw std::runtime_error("a block has at most 1024 threads");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("a grid has at most 65535 blocks in y and z");
  block.grid = grid;
  block.size = size;
  block.shared.assign(shared_bytes, 0);
  block.body = [](void* call) { (*static_cast<Body*>(call))(); };
  block.arguments = &body;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = dim3(x, y, z);
        run_block();
      }
}

// What every lane gave, once all living lanes of the warp have given; `source` picks one.
template <class T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  Fiber* self = block.current;
  const int64_t turn = ++self->exchanges;
  const int set = static_cast<int>(turn & 1);
  std::memcpy(&self->warp->values[set][self->lane], &value, sizeof(T));
  self->warp->given[set][self->lane] = turn;
  wait(State::at_warp);
  T result = value;
  if (source >= 0 && source < warp_lanes && self->warp->given[set][source] == turn)
    std::memcpy(&result, &self->warp->values[set][source], sizeof(T));
  return result;
}

}  // namespace emulator
}  // namespace star

#define threadIdx (::star::emulator::block.current->thread)
#define blockIdx (::star::emulator::block.index)
#define blockDim (::star::emulator::block.size)
#define gridDim (::star::emulator::block.grid)

inline void __syncthreads() { star::emulator::wait(star::emulator::State::at_block); }

inline int __syncthreads_or(int value) {
  star::emulator::block.current->vote = value != 0;
  star::emulator::wait(star::emulator::State::at_block);
  star::emulator::block.current->vote = false;
  return star::emulator::block.votes[star::emulator::block.turn ^ 1];
}

inline void __syncwarp(unsigned = 0xffffffffu) { star::emulator::exchange(0, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  const int self = star::emulator::block.current->lane;
  return star::emulator::exchange(value, self / width * width + lane % width);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  const int self = star::emulator::block.current->lane, source = self ^ mask;
  return star::emulator::exchange(value, source / width == self / width ? source : self);
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
  const int self = star::emulator::block.current->lane, source = self - static_cast<int>(delta);
  return star::emulator::exchange(value, source >= self / width * width ? source : self);
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
  const int self = star::emulator::block.current->lane, source = self + static_cast<int>(delta);
  return star::emulator::exchange(value, source < (self / width + 1) * width ? source : self);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
