#include "simd.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace wrpo {
namespace {

#define WRPO_LEVEL_ENTRY(level)                                                                          \
  Level {                                                                                                \
    #level, level::token_logp, level::token_logp_delta, level::token_logp_grad, level::token_statistics, \
        level::token_statistics_grad, level::transpose, level::product                                   \
  }

// WRPO_BUILT_<LEVEL> come from the build, which knows the flags that the compiler took. They must ask for no feature
// that is not tested here.
std::vector<Level> find_levels() {
  std::vector<Level> found{WRPO_LEVEL_ENTRY(generic)};
#if defined(WRPO_BUILT_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(WRPO_LEVEL_ENTRY(avx2));
#endif
#if defined(WRPO_BUILT_AVX512)
  if (__builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(WRPO_LEVEL_ENTRY(avx512));
#endif
  return found;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> found = find_levels();
  return found;
}

std::atomic<const Level*> chosen{nullptr};

}  // namespace

const Level& level_in_use() {
  const Level* level = chosen.load();
  return level ? *level : levels().back();
}

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.emplace_back(level.name);
  return names;
}

void use_level(const std::string& name) {
  std::string names;
  for (const Level& level : levels()) {
    if (name == level.name) return chosen.store(&level);
    names += std::string(names.empty() ? "" : ", ") + level.name;
  }
  throw std::invalid_argument("level: expected one of " + names + " (what this machine and this build have), got " +
                              name);
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_amx_bf16() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE: xgetbv may be used
  unsigned xcr0, high;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  const bool tiles_saved = (xcr0 >> 17 & 3) == 3;  // XTILECFG and XTILEDATA
  return tiles_saved && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

}  // namespace wrpo
