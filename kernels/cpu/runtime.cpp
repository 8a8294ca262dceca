#include "runtime.h"

#include <string.h>

const Kernels* choose_kernels(const char* limit) {
#if defined(__x86_64__)
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const Kernels* known[] = {
#if defined(__x86_64__)
        wide && __builtin_cpu_supports("avx512vnni") ? &kernels_avx512vnni : nullptr,
        wide ? &kernels_avx512 : nullptr,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels_avx2 : nullptr,
#endif
        &kernels_baseline,
    };
    for (const Kernels* each : known)
        if (each && (!limit || !strcmp(limit, each->name))) return each;
    return nullptr;
}
