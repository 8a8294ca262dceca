// The C interface that Python calls through ctypes. Returns 0, or a code of Status; sizes are checked again here, since
// what is wrong must never become a pointer that is followed.
#include "checks.h"
#include "workspace.h"

const Kernels* kernels = nullptr;

namespace {

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

// What the structures measure here, for Python to compare with its own.
EXPORT void sparsity_sizes(int64_t* out) {
    out[0] = sizeof(Weight);
    out[1] = sizeof(Select);
    out[2] = sizeof(Vectors);
    out[3] = sizeof(void*);
    out[4] = sizeof(Stripe);
}

EXPORT int sparsity_start(const char* isa, void* parallel, void* index, void* size) {
    const Kernels* chosen = choose_kernels(isa);
    if (!chosen) return BAD_ARGUMENT;
    kernels = chosen;
    use_runtime(parallel, index, size);
    return OK;
}

EXPORT const char* sparsity_isa() { return kernels ? kernels->name : ""; }

EXPORT int sparsity_input_sparse(const Weight* weight, const Select* select, const Vectors* x, const Vectors* y,
                                 const float* bias, int32_t share, int64_t* read, int threads) {
    if (!kernels || !good(weight) || !select || !x || !y || !good(*x, weight->rows) || !good(*y, weight->cols) ||
        x->batch != y->batch || !good(*select, share == SHARE_OWN))
        return BAD_ARGUMENT;
    if (read) *read = 0;
    if (x->batch == 0) return OK;
    Scratch scratch[MAX_THREADS];
    const int64_t parts = parts_of(*weight, x->batch);
    float* partial;
    threads = team_of(threads);
    if (!prepare(weight->rows, x->batch, threads, scratch, 1, &parts, &partial)) return NO_MEMORY;
    Weight w = *weight;
    w.rounded = x->format == FORMAT_BF16;
    InputSparse call{&w, select, *x, *y, bias, share, read, partial, scratch};
    run_team([](const Team& team, void* a) { kernels->input_sparse(team, *static_cast<InputSparse*>(a)); }, &call, threads);
    return OK;
}

// Weight.rounded of the stripes says whether x is bfloat16, as for a whole weight the call itself finds out.
EXPORT int sparsity_striped(const Stripe* stripes, int64_t count, int64_t outputs, const Vectors* x, const Vectors* y,
                            const float* bias, int32_t share, int64_t* read, int threads) {
    if (!kernels || !stripes || count < 1 || !good(stripes, count, stripes[0].weight.rows, outputs, share == SHARE_OWN) || !x || !y ||
        !good(*x, stripes[0].weight.rows) || !good(*y, outputs) || x->batch != y->batch)
        return BAD_ARGUMENT;
    if (read) *read = 0;
    if (x->batch == 0) return OK;
    Scratch scratch[MAX_THREADS];
    threads = team_of(threads);
    if (!prepare(stripes[0].weight.rows, x->batch, threads, scratch, 0, nullptr, nullptr, true)) return NO_MEMORY;
    Striped call{stripes, count, *x, *y, bias, share, read, scratch};
    run_team([](const Team& team, void* a) { kernels->striped(team, *static_cast<Striped*>(a)); }, &call, threads);
    return OK;
}

EXPORT int sparsity_dense(const Weight* weight, const Vectors* x, const Vectors* y, const float* bias, int threads) {
    if (!kernels || !good(weight) || !x || !y || !good(*x, weight->cols) || !good(*y, weight->rows) || x->batch != y->batch)
        return BAD_ARGUMENT;
    if (x->batch == 0) return OK;
    Scratch scratch[MAX_THREADS];
    threads = team_of(threads);
    if (!prepare(weight->padded, x->batch, threads, scratch, 0, nullptr, nullptr)) return NO_MEMORY;
    Dense call{weight, *x, *y, bias, scratch};
    run_team([](const Team& team, void* a) { kernels->dense(team, *static_cast<Dense*>(a)); }, &call, threads);
    return OK;
}

// gate null: `given` holds its outputs, activated.
EXPORT int sparsity_glu(const Weight* gate, const Vectors* given, const Weight* up, const Weight* down, const float* gate_bias,
                        const float* up_bias, const float* down_bias, const Select* select, int32_t activation,
                        int32_t share, const Vectors* x, const Vectors* y, int64_t* kept, int threads) {
    if (!kernels || !good(up) || !good(down) || !select || !x || !y || up->rows != down->rows || x->batch != y->batch ||
        !good(*x, up->cols) || !good(*y, down->cols) || activation < ACT_NONE || activation > ACT_RELU || !good(*select, false))
        return BAD_ARGUMENT;
    if (gate ? given || !good(gate) || gate->rows != up->rows || gate->cols != up->cols || gate->padded != up->padded ||
                   gate->format != up->format || gate->group != up->group
             : !given || !good(*given, up->rows) || given->batch != x->batch)
        return BAD_ARGUMENT;
    if (kept) *kept = 0;
    if (x->batch == 0) return OK;
    Scratch scratch[MAX_THREADS];
    const int64_t extra[] = {up->rows * x->batch, up->rows * x->batch, parts_of(*down, x->batch)};
    float* shared[3];
    threads = team_of(threads);
    if (!prepare(larger(up->rows, up->padded), x->batch, threads, scratch, 3, extra, shared)) return NO_MEMORY;
    Weight w = *down;
    w.rounded = x->format == FORMAT_BF16;
    SparseGlu call{gate,     up,        &w,        given ? *given : Vectors{}, gate_bias, up_bias,   down_bias, *select,
                   activation, share, *x, *y, shared[0], shared[1], shared[2], kept, scratch};
    run_team([](const Team& team, void* a) { kernels->sparse_glu(team, *static_cast<SparseGlu*>(a)); }, &call, threads);
    return OK;
}

EXPORT int sparsity_nm_select(const Select* select, int64_t width, const Vectors* x, const Vectors* y, int32_t back, uint8_t* bits,
                              int threads) {
    if (!kernels || !select || width < 1 || !x || !y || !good(*x, width, INT32_MAX) || !good(*y, width, INT32_MAX) ||
        x->batch != y->batch || select->group < 1 || !good(*select, true))
        return BAD_ARGUMENT;
    if (x->batch == 0) return OK;
    Scratch scratch[MAX_THREADS];
    threads = team_of(threads < x->batch ? threads : x->batch);
    if (!prepare(width, 1, threads, scratch, 0, nullptr, nullptr)) return NO_MEMORY;
    NmSelect call{*select, *x, *y, width, back, bits, scratch};
    run_team([](const Team& team, void* a) { kernels->nm_select(team, *static_cast<NmSelect*>(a)); }, &call, threads);
    return OK;
}

EXPORT double sparsity_read(const void* data, int64_t bytes, int threads) {
    if (!kernels || !data || bytes < 0) return 0;
    struct Call {
        const void* data;
        int64_t bytes;
        double sums[MAX_THREADS];
    } call{data, bytes, {0}};
    run_team([](const Team& team, void* a) {
        Call* c = static_cast<Call*>(a);
        c->sums[team.index] = kernels->read_all(team, c->data, c->bytes);
    }, &call, team_of(threads));
    double total = 0;
    for (double each : call.sums) total += each;
    return total;
}
