// Which target runs: the best that the processor offers, or the one that ESFAST_TARGET names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu.hpp"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace esfast::cpu {

#if defined(__x86_64__)
// By hand: clang 14's __builtin_cpu_supports does not know the name.
static bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

static std::vector<const Target*> available() {
  std::vector<const Target*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("popcnt") && has_f16c();
  const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (avx512) found.push_back(&avx512_target);
  if (avx2) found.push_back(&avx2_target);
#elif defined(__aarch64__)
  found.push_back(&neon_target);
#endif
  found.push_back(&scalar_target);
  return found;
}

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (const Target* t : available()) names.emplace_back(t->name);
  return names;
}

static const Target& find(const std::string& name, const char* source) {
  std::string there;
  for (const Target* t : available()) {
    if (name == t->name) return *t;
    there += (there.empty() ? "" : ", ") + std::string(t->name);
  }
  throw std::invalid_argument(std::string(source) + " is '" + name +
                              "'; this processor and build offer: " + there +
                              ". Name one of these, or leave it unset for the best.");
}

static std::atomic<const Target*> chosen{nullptr};

const Target& target() {
  const Target* t = chosen.load();
  if (t) return *t;
  const char* name = std::getenv("ESFAST_TARGET");
  t = name && *name ? &find(name, "ESFAST_TARGET") : available().front();
  chosen.store(t);
  return *t;
}

void set_target(const std::string& name) {
  chosen.store(&find(name, "the target"));
}

}  // namespace esfast::cpu
