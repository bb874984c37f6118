// Which instruction sets this processor has.

#pragma once

#include "layout.h"

#if defined(HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

#if defined(__x86_64__)
struct Cpuid {
    uint32_t a, b, c, d;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
    Cpuid r = {leaf, 0, subleaf, 0};
    __asm__("cpuid" : "+a"(r.a), "=b"(r.b), "+c"(r.c), "=d"(r.d));
    return r;
}

// What leaf 7 of the processor says; nothing where it has none.
Cpuid leaf_7(uint32_t subleaf) { return cpuid(0, 0).a < 7 ? Cpuid{0, 0, 0, 0} : cpuid(7, subleaf); }
#endif

#if defined(HAS_AMX)
// Whether the processor has AMX for int8 and bfloat16 and Linux lends this process its registers.
bool amx_allowed() {
    if ((leaf_7(0).d >> 22 & 13) != 13) return false;  // EDX: AMX-BF16, AMX-TILE and AMX-INT8
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
}
#endif

bool detect(int isa) {
    if (isa == PORTABLE) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == AVX2) return avx2;
    // EAX of subleaf 1: compilers name this feature only since gcc 11
    if (isa == AVXVNNI) return avx2 && (leaf_7(1).a >> 4 & 1);
#if defined(HAS_AMX)
    if (isa == AMX) return detect(AVX512) && amx_allowed();
#endif
    if (isa == AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
#if defined(__aarch64__)
    if (isa == NEON) return 1;
#if defined(__ARM_FEATURE_DOTPROD)
    if (isa == NEONDOT) return 1;
#elif defined(__linux__)
    if (isa == NEONDOT) return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#endif
#endif
    return 0;
}

// Asking the processor traps in virtual machines, so it is asked once.
const struct Found {
    bool has[kIsas];
    Found() {
        for (int i = 0; i < kIsas; i++) has[i] = detect(i);
    }
} kFound;

}  // namespace
