#include "runtime.h"

#include <string.h>

const Kernels* choose_kernels(const char* limit) {
    const Kernels* known[] = {
#if defined(__x86_64__)
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl")
            ? &kernels_avx512
            : nullptr,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels_avx2 : nullptr,
#endif
        &kernels_baseline,
    };
    for (const Kernels* each : known)
        if (each && (!limit || !strcmp(limit, each->name))) return each;
    return nullptr;
}
