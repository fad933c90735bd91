// Chooses the instruction set at run time. Compiled for the plainest CPU.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cpu/kernels.h"

#ifdef LEMUR_FAST_X86
#include <cpuid.h>
#endif
#if defined(LEMUR_FAST_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lemur::cpu {

namespace generic {
extern const Kernels kTable;
}
#ifdef LEMUR_FAST_X86
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
#endif
#ifdef LEMUR_FAST_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kTable;
}
#endif
#ifdef LEMUR_FAST_AMX
namespace amx {
extern const Kernels kTable;
}
#endif

namespace {

#ifdef LEMUR_FAST_X86
// Whether CPUID's leaf says so. The operating system's leave is asked for by __builtin_cpu_supports("avx"...).
bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned registers[4];
  if (!__get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3])) return false;
  return (registers[reg] >> bit) & 1u;
}

bool has_f16c() { return __builtin_cpu_supports("avx") && cpuid_bit(1, 0, 2, 29); }
bool has_dots() { return __builtin_cpu_supports("avx512f") && cpuid_bit(7, 1, 0, 5); }
bool has_halves() { return __builtin_cpu_supports("avx512f") && cpuid_bit(7, 0, 3, 23); }

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

#ifdef LEMUR_FAST_EMULATE  // made of AVX2, for tests
bool has_avx512() { return has_avx2(); }
#ifdef LEMUR_FAST_AVX512_BF16
bool has_avx512_bf16() { return has_avx2(); }
#endif
#ifdef LEMUR_FAST_AMX
bool has_amx() { return has_avx2(); }
#endif
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#ifdef LEMUR_FAST_AVX512_BF16
bool has_avx512_bf16() { return has_avx512() && has_dots(); }
#endif

#ifdef LEMUR_FAST_AMX
// Linux grants the tile registers, 8 KiB of state for each thread, to a process that asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() { return has_avx512_bf16() && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 24) && may_use_tiles(); }
#endif
#endif
#endif

struct Isa {
  const Kernels* table;
  bool usable;
};

// Best first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#ifdef LEMUR_FAST_AMX
      {&amx::kTable, has_amx()},
#endif
#ifdef LEMUR_FAST_AVX512_BF16
      {&avx512_bf16::kTable, has_avx512_bf16() && bfloat16_at_full_rate()},
#endif
#ifdef LEMUR_FAST_X86
      {&avx512::kTable, has_avx512()},
#endif
#ifdef LEMUR_FAST_AVX512_BF16
      {&avx512_bf16::kTable, has_avx512_bf16() && !bfloat16_at_full_rate()},
#endif
#ifdef LEMUR_FAST_X86
      {&avx2::kTable, has_avx2()},
#endif
      {&generic::kTable, true},
  };
  return all;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.usable) names.emplace_back(isa.table->isa);
  }
  return names;
}

const Kernels& kernels() {
  const char* wanted = std::getenv("LEMUR_FAST_CPU");
  const bool any = wanted == nullptr || *wanted == '\0';
  bool built = false;
  for (const Isa& isa : isas()) {
    const bool named = !any && std::strcmp(wanted, isa.table->isa) == 0;
    if (isa.usable && (any || named)) return *isa.table;
    built = built || named;
  }
  std::string takes;
  for (const std::string& name : usable_isas()) takes += (takes.empty() ? "" : ", ") + name;
  throw std::invalid_argument(std::string("LEMUR_FAST_CPU: got '") + wanted + "', " +
                              (built ? "which this CPU lacks" : "which is not an instruction set of this build") +
                              "; takes " + takes);
}

bool bfloat16_at_full_rate() {
#ifdef LEMUR_FAST_X86
  return has_dots() && !(__builtin_cpu_is("intel") && has_halves());
#else
  return false;
#endif
}

std::vector<std::string> features() {
  std::vector<std::string> names;
#ifdef LEMUR_FAST_X86
  const auto add = [&](const char* name, bool present) {
    if (present) names.emplace_back(name);
  };
  add("sse4.2", __builtin_cpu_supports("sse4.2"));
  add("avx", __builtin_cpu_supports("avx"));
  add("avx2", __builtin_cpu_supports("avx2"));
  add("fma", __builtin_cpu_supports("fma"));
  add("f16c", has_f16c());
  add("avx512f", __builtin_cpu_supports("avx512f"));
  add("avx512bw", __builtin_cpu_supports("avx512bw"));
  add("avx512dq", __builtin_cpu_supports("avx512dq"));
  add("avx512vl", __builtin_cpu_supports("avx512vl"));
  add("avx512_vnni", __builtin_cpu_supports("avx512vnni"));
  add("avx512_bf16", has_dots());
  add("avx512_fp16", has_halves());
  add("amx_bf16", cpuid_bit(7, 0, 3, 22));
  add("amx_tile", cpuid_bit(7, 0, 3, 24));
#elif defined(__aarch64__)
  names.emplace_back("neon");
#endif
  return names;
}

}  // namespace lemur::cpu
