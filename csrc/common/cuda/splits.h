// Work that several blocks share and the last of them completes: partial results in a workspace, one counter a
// unit of work. The counters are zeroed on the stream before the launch (launch.h's zero), so that a captured
// graph zeroes them at every replay. Which block comes last changes nothing: it adds the partial results in
// the order of their numbers. Include from *cuda*.cu only.
#pragma once

#include "device.h"

namespace star {

// Whether this block is the last of `count` to come here; all its threads call this, and see then what the
// other blocks wrote before they came. `flag` is shared memory.
__device__ __forceinline__ bool is_last_block(unsigned* counter, int64_t count, bool& flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) flag = atomicAdd(counter, 1u) == static_cast<unsigned>(count - 1);
  __syncthreads();
  if (flag) __threadfence();
  return flag;
}

// Reads what other blocks of the same launch have written: from the L2 cache, which they share.
__device__ __forceinline__ void load_fresh(const float* from, float (&to)[4]) {
#ifdef STAR_EMULATE_CUDA
  load<4>(from, to);
#else
  const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
  to[0] = four.x;
  to[1] = four.y;
  to[2] = four.z;
  to[3] = four.w;
#endif
}

__device__ __forceinline__ float load_fresh(const float* from) {
#ifdef STAR_EMULATE_CUDA
  return *from;
#else
  return __ldcg(from);
#endif
}

}  // namespace star
