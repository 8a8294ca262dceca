// Sizes and pointers checked once more on this side of the border.
#pragma once
#include "runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Status : int { OK = 0, BAD_ARGUMENT = 1, NO_MEMORY = 2 };
extern const Kernels* kernels;

namespace {

// tight: padded to the end of a line and no further, as all weights but the last of several stripes are.
inline bool good(const Weight* w, bool tight = true) {
    if (!w || !w->data || w->rows < 1 || w->cols < 1 || w->padded < w->cols) return false;
    const int unit[] = {16, 32, 64, 128};
    if (w->format < FORMAT_F32 || w->format > FORMAT_I4 || w->padded % unit[w->format] ||
        (tight && w->padded - w->cols >= unit[w->format]) || w->stride < w->padded || w->stride % unit[w->format])
        return false;
    if (w->format == FORMAT_I4) return w->scales && (w->group == 32 || w->group == 128);
    return w->format != FORMAT_I8 || w->scales;
}

inline bool good(const Select& s, bool repairs);

// `count` stripes that lie one after the other over `outputs`.
inline bool good(const Stripe* stripes, int64_t count, int64_t inputs, int64_t outputs, bool repairs) {
    if (!stripes || count < 1) return false;
    int64_t first = 0;
    for (int64_t i = 0; i < count; first += stripes[i++].weight.cols) {
        const Stripe& s = stripes[i];
        if (!good(&s.weight, false) || s.weight.rows != inputs || s.first != first || s.weight.cols > outputs - first ||
            !good(s.select, repairs))
            return false;
    }
    return first == outputs;
}

inline bool good(const Vectors& v, int64_t width, int most = MAX_BATCH) {
    return v.batch >= 0 && v.batch <= most && (v.batch == 0 || v.data) && (v.stride >= width || v.batch <= 1) &&
           (v.format == FORMAT_F32 || v.format == FORMAT_BF16);
}

// A repair is for what each token keeps alone.
inline bool good(const Select& s, bool repairs) {
    const bool groups = s.group >= 1 && s.group <= 64 && s.by_rank && s.k >= 1 && s.k <= s.group;
    const bool law = s.law == LAW_NORMAL || s.law == LAW_HALF_NORMAL;
    if (s.with_sign && (s.by_rank || s.group)) return false;
    if (s.law != LAW_NONE && (!law || s.by_rank || s.threshold_each)) return false;
    return (s.group == 0 || groups) && (s.repair == REPAIR_NONE || (s.repair == REPAIR_VARIANCE && repairs));
}

inline int team_of(int threads) { return threads < 1 ? 1 : threads > 256 ? 256 : has_runtime() ? threads : 1; }

}  // namespace
