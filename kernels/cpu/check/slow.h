// The operators by their definitions, in double precision, one entry after the other.
#pragma once
#include "matrix.h"

// A Select with its own memory.
struct Rule {
    std::vector<float> shift, scale, each;
    float threshold = 0;
    int64_t k = -1;  // not negative: by rank
    int group = 0;   // not 0: k of every so many
    bool repair = false;
    int law = LAW_NONE;
    bool with_sign = false;
    Select select() const {
        auto data = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
        return {data(shift), data(scale), data(each), threshold, k >= 0, k, group, repair, law, with_sign};
    }
    double border(size_t i, const std::vector<double>& score) const {
        if (law == LAW_NONE) return each.empty() ? threshold : each[i];
        double mean = 0, squares = 0;
        for (double s : score) mean += s / double(score.size());
        if (law == LAW_HALF_NORMAL) mean = 0;
        for (double s : score) squares += (s - mean) * (s - mean) / double(score.size());
        return mean + threshold * sqrt(squares);
    }
    double score_of(double value, size_t i) const {
        return (with_sign ? value : fabs(value)) * (scale.empty() ? 1 : scale[i]);
    }
};

inline Rule by_threshold(float threshold) {
    Rule rule;
    rule.threshold = threshold;
    return rule;
}
inline Rule by_law(int law, float threshold, bool with_sign = false) {
    Rule rule;
    rule.threshold = threshold, rule.law = law, rule.with_sign = with_sign;
    return rule;
}
inline Rule by_rank(int64_t k) {
    Rule rule;
    rule.k = k;
    return rule;
}

typedef std::vector<bool> Mask;

// NaN is kept by any threshold, and ranks above infinity; then the larger score, then the lower index.
inline Mask mask_of(const Rule& rule, const std::vector<double>& score) {
    const size_t n = score.size();
    Mask mask(n);
    if (rule.k < 0) {
        for (size_t i = 0; i < n; i++) mask[i] = !(score[i] <= rule.border(i, score));
        return mask;
    }
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; i++) order[i] = i;
    auto key = [](double s) { return isnan(s) ? 1e300 : isinf(s) ? 1e299 : s; };
    std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return key(score[i]) > key(score[j]); });
    std::vector<int64_t> kept(rule.group ? n / rule.group + 1 : 1);
    for (size_t i : order) mask[i] = kept[rule.group ? i / rule.group : 0]++ < rule.k;
    return mask;
}

// How near the scores come to what would change the mask, relative to their size: it must not hang on a rounding.
inline double closeness(const Rule& rule, const std::vector<double>& score) {
    double closest = 1;
    auto meet = [&](double a, double b) {
        if (a != 0 || b != 0) closest = fmin(closest, fabs(a - b) / (fabs(a) + fabs(b)));  // two that are exactly 0 stay equal
    };
    if (rule.k < 0)
        for (size_t i = 0; i < score.size(); i++) meet(score[i], rule.border(i, score));
    else if (rule.k > 0 && rule.k < int64_t(score.size())) {
        std::vector<double> sorted = score;
        std::sort(sorted.begin(), sorted.end());
        meet(sorted[score.size() - rule.k], sorted[score.size() - rule.k - 1]);
    }
    return closest;
}

// Scores as the operators form them: in float32.
inline std::vector<double> scores_of(const Rule& rule, const std::vector<float>& x) {
    std::vector<double> score(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        const float value = rule.shift.empty() ? x[i] : x[i] - rule.shift[i];
        const float size = rule.with_sign ? value : fabsf(value);
        score[i] = rule.scale.empty() ? size : rule.scale[i] * size;
    }
    return score;
}

inline Mask any_of(const std::vector<Mask>& masks) {
    Mask any(masks[0].size());
    for (const Mask& mask : masks)
        for (size_t i = 0; i < mask.size(); i++) any[i] = any[i] || mask[i];
    return any;
}

// W x of one output: W by outputs, x exact or with errors.
inline Bounded dot(const Matrix& m, int64_t output, const std::vector<Bounded>& x) {
    Sum sum;
    for (size_t i = 0; i < x.size(); i++) sum.add(m.at(output, i) * x[i].value, fabs(m.at(output, i)) * x[i].error);
    return sum.times(1);
}

// The unit to which x_i times an entry's scale may be rounded in a product of int4 for one output (int4.h), x being bfloat16; 0 for
// other products. values: x, 0 where it is dropped. 0.52: half a unit, and the roundings on the way to it.
inline double unit_of(const Matrix& m, int32_t format, int64_t output, const std::vector<double>& values) {
    double largest = 0;
    if (m.weight.format != FORMAT_I4 || format != FORMAT_BF16) return 0;
    for (size_t i = 0; i < values.size(); i++) largest = fmax(largest, fabs(values[i] * m.scale_at(i, output)));
    return largest * 0.52 / 32767;
}

// By how much a product's term may then be off: the unit times the whole number that the entry is.
inline double rounding(const Matrix& m, int64_t input, int64_t output, double unit) {
    return unit == 0 ? 0 : unit * fabs(m.at(input, output) / m.scale_at(input, output));
}

// Activation and its error: none of the functions is steeper than 1.2.
inline Bounded activated(Bounded x, int32_t activation) {
    const double v = x.value, error = 1.2 * x.error + 16 * EPS * fabs(v);
    if (activation == ACT_SILU) return {v / (1 + exp(-v)), error};
    if (activation == ACT_GELU) return {0.5 * v * (1 + erf(v * sqrt(0.5))), error};
    if (activation == ACT_GELU_TANH) return {0.5 * v * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v))), error};
    if (activation == ACT_RELU) return {v <= 0 ? 0 : v, x.error};
    return x;
}

inline std::vector<Bounded> token_of(const Batch& x, int t) {
    std::vector<Bounded> found(x.width);
    for (int64_t i = 0; i < x.width; i++) found[i].value = x.at(t, i);
    return found;
}

inline std::vector<float> floats_of(const Batch& x, int t) {
    std::vector<float> found(x.width);
    for (int64_t i = 0; i < x.width; i++) found[i] = x.at(t, i);
    return found;
}
