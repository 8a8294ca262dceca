#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
// GCC 12 warns of its own header: _mm512_reduce_add_ps starts from a vector that is undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,prefer-vector-width=512")
#endif
#define ISA avx512vnni
#define ISA_VNNI
#define LANES 16
#define ISA_LEVEL 2
#include "table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
