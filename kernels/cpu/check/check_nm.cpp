// N:M pruning: any pattern, ties, NaN, ends that are no whole group, shifts, repairs, masks, threads; and products by it.
#include "slow.h"

namespace {

struct Pattern {
    int n, m;
};
constexpr Pattern PATTERNS[] = {{2, 4}, {4, 8}, {8, 16}, {16, 32}, {1, 1}, {1, 2}, {3, 5}, {7, 7}, {5, 12}, {1, 64}, {33, 64}, {63, 64}};
constexpr float SPECIAL[] = {0, -0.0f, 0.25f, -0.25f, 1, -2, 3e38f, 1e-40f, INFINITY, -INFINITY, NAN};

Rule by_pattern(Pattern p) {
    Rule rule = by_rank(p.n);
    rule.group = p.m;
    return rule;
}

// Numbers that every processor draws alike.
std::vector<float> eighths(int64_t n, int most) {
    std::vector<float> found(n);
    for (float& v : found) v = float(below(2 * most + 1) - most) * 0.125f;
    return found;
}

struct Options {
    bool shift, scale, back, repair;
};

// z as it has to come out, in double.
std::vector<double> pruned(const Rule& rule, const std::vector<float>& x, const Mask& mask, const Options& o) {
    const size_t n = x.size();
    std::vector<double> z(n), kept(n);
    for (size_t i = 0; i < n; i++) z[i] = o.shift ? x[i] - rule.shift[i] : x[i], kept[i] = mask[i] ? z[i] : 0;
    auto variance = [&](const std::vector<double>& v) {
        double mean = 0, total = 0;
        for (double each : v) mean += each / double(n);
        for (double each : v) total += (each - mean) * (each - mean);
        return total;
    };
    const double of_kept = variance(kept), factor = !o.repair || of_kept == 0 ? 1 : sqrt(variance(z) / of_kept);
    for (size_t i = 0; i < n; i++) {
        if (kept[i] != 0) kept[i] *= factor;  // NaN included
        if (o.back && o.shift) kept[i] = !o.repair && mask[i] ? x[i] : kept[i] + rule.shift[i];
    }
    return kept;
}

void nm_select(Pattern p, int64_t width, int tokens, int threads, int32_t in, int32_t out, Options o) {
    Rule rule = by_pattern(p);
    rule.repair = o.repair;
    if (o.shift) rule.shift = eighths(width, 9);
    if (o.scale) rule.scale = eighths(width, 5);
    for (float& v : rule.scale) v = fabsf(v);
    Batch x(tokens, width, in), y(tokens, width, out);
    for (int t = 0; t < tokens; t++)
        for (int64_t i = 0; i < width; i++) x.set(t, i, t == 1 && !o.repair ? SPECIAL[below(11)] : float(below(41) - 20) * 0.125f);
    const int64_t bytes = (width + 7) / 8;
    std::vector<uint8_t> bits(tokens * bytes, 0xff);
    const Select select = rule.select();
    const Vectors from = x.vectors(), to = y.vectors();
    expect(sparsity_nm_select(&select, width, &from, &to, o.back, bits.data(), threads) == 0, "nm_select: refused");
    for (uint8_t each : y.data) selections = (selections ^ each) * 0x100000001b3;
    for (uint8_t each : bits) selections = (selections ^ each) * 0x100000001b3;
    for (int t = 0; t < tokens; t++) {
        const std::vector<float> token = floats_of(x, t);
        const Mask mask = mask_of(rule, scores_of(rule, token));
        const std::vector<double> expected = pruned(rule, token, mask, o);
        for (int64_t i = 0; i < bytes * 8; i++)
            expect(((bits[t * bytes + i / 8] >> (i % 8)) & 1) == (i < width && mask[i]), "%d:%d: bit %ld of %ld", p.n, p.m, long(i), long(width));
        for (int64_t i = 0; i < width; i++)
            expect(near(y.at(t, i), {expected[i], o.repair ? 1e-6 * (fabs(expected[i]) + 4) : 0}, out == FORMAT_BF16 ? 0x1p-8 : 0x1p-23),
                   "%d:%d of %ld: entry %ld is %g, not %g", p.n, p.m, long(width), long(i), y.at(t, i), expected[i]);
    }
    expect(y.gaps_untouched(), "nm_select wrote between the vectors");
    Batch again(tokens, width, out);
    const Vectors other = again.vectors();
    expect(sparsity_nm_select(&select, width, &from, &other, o.back, nullptr, 1) == 0 && again.data == y.data, "nm_select: threads");
}

void products(Pattern p, int turn) {
    const int64_t inputs = turn % 2 ? 67 : 192, outputs = 70;
    const Matrix m = matrix(inputs, outputs, STORED[turn % 5], false);
    for (int tokens : {1, 3, 16}) {
        Rule rule = by_pattern(p);
        rule.repair = (turn + tokens) % 3 == 0;
        if (turn % 3 == 1) rule.shift = eighths(inputs, 9);
        const int32_t share = !rule.repair && turn % 4 == 0 ? SHARE_UNION : SHARE_OWN, format = turn % 2;
        Batch x(tokens, inputs, format), y(tokens, outputs, FORMAT_F32);
        for (int t = 0; t < tokens; t++)
            for (int64_t i = 0; i < inputs; i++) x.set(t, i, float(below(17) - 8) * 0.25f);
        const Select select = rule.select();
        const Vectors in = x.vectors(), out = y.vectors();
        std::vector<Mask> masks;
        for (int t = 0; t < tokens; t++) masks.push_back(mask_of(rule, scores_of(rule, floats_of(x, t))));
        const Mask any = any_of(masks);
        int64_t read = -1;
        const int status = sparsity_input_sparse(&m.weight, &select, &in, &out, nullptr, share, &read, 1 + turn % 5);
        expect(status == 0 && read == std::count(any.begin(), any.end(), true) * outputs, "%d:%d: status %d, read %ld", p.n, p.m,
               status, long(read));
        std::vector<Bounded> expected;
        for (int t = 0; t < tokens; t++) {
            const Options o = {!rule.shift.empty(), false, false, rule.repair};
            const std::vector<double> kept = pruned(rule, floats_of(x, t), share == SHARE_UNION ? any : masks[t], o);
            for (int64_t j = 0; j < outputs; j++) {
                Sum sum;
                const double unit = unit_of(m, format, j, kept);
                for (int64_t i = 0; i < inputs; i++)
                    sum.add(kept[i] * m.at(i, j), rounding(m, i, j, unit) + (rule.repair ? 4 * EPS * fabs(kept[i] * m.at(i, j)) : 0));
                expected.push_back(sum.times(1));
            }
        }
        compare("product by N:M", y, expected);
    }
}

void refused() {
    Batch x(2, 8, FORMAT_F32), y(2, 8, FORMAT_F32), many(40, 8, FORMAT_F32);
    const Vectors in = x.vectors(), out = y.vectors(), none{nullptr, 8, FORMAT_F32, 0}, more = many.vectors();
    auto call = [&](Pattern p, int32_t rank, int32_t repair) {
        const Select s{nullptr, nullptr, nullptr, 0, rank, p.n, p.m, repair, LAW_NONE, 0};
        return sparsity_nm_select(&s, 8, &in, &out, 0, nullptr, 1);
    };
    expect(call({2, 4}, 1, 1) == 0, "2:4 was refused");
    for (Pattern p : {Pattern{2, 0}, {0, 4}, {5, 4}, {2, 65}, {2, -4}}) expect(call(p, 1, 0) == 1, "%d:%d was not refused", p.n, p.m);
    expect(call({2, 4}, 0, 0) == 1 && call({2, 4}, 1, 2) == 1, "a bad rule was not refused");
    const Select good = by_pattern({2, 4}).select();
    expect(sparsity_nm_select(&good, 8, &none, &none, 0, nullptr, 1) == 0, "an empty batch was refused");
    expect(sparsity_nm_select(&good, 8, &in, &more, 0, nullptr, 1) == 1 && sparsity_nm_select(&good, 0, &in, &out, 0, nullptr, 1) == 1 &&
               sparsity_nm_select(nullptr, 8, &in, &out, 0, nullptr, 1) == 1 && sparsity_nm_select(&good, 12, &in, &out, 0, nullptr, 1) == 1,
           "a bad size was not refused");
    const Matrix m = matrix(8, 8, {FORMAT_F32, 0}, false);
    Select repaired = good;
    repaired.repair = 1;
    expect(sparsity_input_sparse(&m.weight, &repaired, &in, &out, nullptr, SHARE_OWN, nullptr, 1) == 0 &&
               sparsity_input_sparse(&m.weight, &repaired, &in, &out, nullptr, SHARE_UNION, nullptr, 1) == 1,
           "a repair of what tokens share was not refused");
}

}  // namespace

void check_nm() {
    const std::mt19937 before = engine;
    engine.seed(7);  // the same on every processor
    int turn = 0;
    for (Pattern p : PATTERNS)
        for (int64_t width : {1, 5, 63, 64, 67, 192, 300})
            for (int tokens : {1, 3})
                for (int32_t in : {FORMAT_F32, FORMAT_BF16}) {
                    const int32_t out = turn % 3 ? in : FORMAT_F32;
                    nm_select(p, width, tokens, 1 + turn % 4, in, out, {turn % 2 == 1, turn % 5 > 2, turn % 7 > 2, turn % 3 == 0});
                    turn++;
                }
    engine = before;
    for (Pattern p : PATTERNS)
        for (int i = 0; i < 5; i++) products(p, turn++);
    refused();
}
