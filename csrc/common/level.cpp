#include "level.h"

#include <cstdlib>
#include <cstring>

namespace star {

static Level detect() {
#ifdef STAR_HAS_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("STAR_KERNELS_CPU_LEVEL");
  if (wanted && std::strcmp(wanted, "portable") == 0) return Level::portable;
  if (avx2 && wanted && std::strcmp(wanted, "avx2") == 0) return Level::avx2;
  if (avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::portable;
}

Level cpu_level() {
  static const Level level = detect();
  return level;
}

}  // namespace star
