// The operators of one instruction set.
#pragma once
#include "decode_args.h"
#include "parallel.h"

struct Kernels {
    const char* name;
    void (*input_sparse)(const Team&, const InputSparse&);
    void (*striped)(const Team&, const Striped&);
    void (*dense)(const Team&, const Dense&);
    void (*sparse_glu)(const Team&, const SparseGlu&);
    void (*nm_select)(const Team&, const NmSelect&);
    void (*decode)(const Team&, const DecodeStep&);
    double (*read_all)(const Team&, const void* data, int64_t bytes);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
#endif
