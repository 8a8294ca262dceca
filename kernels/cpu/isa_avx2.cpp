#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define LANES 8
#define ISA_LEVEL 1
#include "table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
