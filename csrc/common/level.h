// The three instruction-set levels of the CPU kernels, and the choice between them at run time.
//
// Every <family>/kernels.cpp is compiled once per level with STAR_LEVEL set to the level's name and its
// compiler flags; it defines each kernel inside `namespace star::STAR_LEVEL`. These files include no torch
// and no standard containers: an inline function compiled here for AVX-512 must never be merged by the
// linker into code that runs on a machine without it.
#pragma once

#include <cstdint>

namespace star {

enum class Level { portable, avx2, avx512 };

// The best level that both this build and this processor have; STAR_KERNELS_CPU_LEVEL can lower it.
Level cpu_level();

}  // namespace star

// Declares a kernel over tasks [begin, end) at every level, and the function that picks the level.
#ifdef STAR_HAS_X86_LEVELS
#define STAR_KERNEL(name, Call)                                                   \
  namespace star {                                                                \
  namespace portable { void name(const Call& call, int64_t begin, int64_t end); } \
  namespace avx2 { void name(const Call& call, int64_t begin, int64_t end); }     \
  namespace avx512 { void name(const Call& call, int64_t begin, int64_t end); }   \
  inline void name(const Call& call, int64_t begin, int64_t end) {                \
    switch (cpu_level()) {                                                        \
      case Level::avx512: return avx512::name(call, begin, end);                  \
      case Level::avx2: return avx2::name(call, begin, end);                      \
      default: return portable::name(call, begin, end);                           \
    }                                                                             \
  }                                                                               \
  }
#else
#define STAR_KERNEL(name, Call)                                                   \
  namespace star {                                                                \
  namespace portable { void name(const Call& call, int64_t begin, int64_t end); } \
  inline void name(const Call& call, int64_t begin, int64_t end) {                \
    portable::name(call, begin, end);                                             \
  }                                                                               \
  }
#endif
