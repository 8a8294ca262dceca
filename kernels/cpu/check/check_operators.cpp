// Input-sparse products, dense products and gated FFNs: formats, sizes, rules, batches, threads.
#include "slow.h"

namespace {

struct Call {
    Stored stored = {FORMAT_F32, 0};
    int64_t inputs = 1, outputs = 1;  // of a gated FFN: inputs and neurons
    int tokens = 1, threads = 1;
    int32_t in = FORMAT_F32, out = FORMAT_F32, share = SHARE_OWN;
    bool bias = true;
};

int64_t kept_of(const Mask& mask) { return std::count(mask.begin(), mask.end(), true); }

// Outputs `first`, first + 1, ... of a product with m by one rule, for all tokens; returns the weights that it reads.
int64_t expect_product(const Call& c, const Matrix& m, const Rule& rule, const Batch& x, const std::vector<float>& bias,
                       int64_t first, std::vector<Bounded>& expected) {
    std::vector<Mask> masks;
    for (int t = 0; t < c.tokens; t++) masks.push_back(mask_of(rule, scores_of(rule, floats_of(x, t))));
    const Mask any = any_of(masks);
    for (int t = 0; t < c.tokens; t++)
        for (int64_t o = 0; o < m.weight.cols; o++) {
            Sum sum;
            const Mask& mask = c.share == SHARE_UNION ? any : masks[t];
            std::vector<double> kept(c.inputs);
            for (int64_t i = 0; i < c.inputs; i++)
                if (mask[i]) kept[i] = double(x.at(t, i) - (rule.shift.empty() ? 0 : rule.shift[i]));
            const double unit = unit_of(m, c.in, o, kept);
            for (int64_t i = 0; i < c.inputs; i++)
                if (mask[i]) sum.add(kept[i] * m.at(i, o), rounding(m, i, o, unit));
            expected[t * c.outputs + first + o] = sum.times(1, c.bias ? bias[first + o] : 0);
        }
    return kept_of(any) * m.weight.cols;
}

Batch with_ties(const Call& c) {
    Batch x(c.tokens, c.inputs, c.in);
    for (int t = 0; t < c.tokens; t++)
        for (int64_t i = 0; i < c.inputs; i++) x.set(t, i, float(below(9) - 4) * 0.25f);
    return x;
}

void input_sparse(const Call& c, const Rule& rule) {
    const Matrix m = matrix(c.inputs, c.outputs, c.stored, false);
    Batch x = with_ties(c), y(c.tokens, c.outputs, c.out);
    const std::vector<float> bias = normals(c.outputs);
    const Select select = rule.select();
    const Vectors in = x.vectors(), out = y.vectors();
    int64_t read = -1;
    const int status = sparsity_input_sparse(&m.weight, &select, &in, &out, c.bias ? bias.data() : nullptr, c.share, &read, c.threads);
    std::vector<Bounded> expected(c.tokens * c.outputs);
    const int64_t right = expect_product(c, m, rule, x, bias, 0, expected);
    expect(status == 0 && read == right, "input_sparse: status %d, read %ld of %ld", status, long(read), long(right));
    compare("input_sparse", y, expected);
}

// widths: outputs of each stripe; rules go round.
void striped(Call c, const std::vector<int64_t>& widths, const std::vector<Rule>& rules) {
    c.outputs = 0;
    for (int64_t width : widths) c.outputs += width;
    std::vector<Matrix> matrices;
    for (int64_t width : widths) matrices.push_back(matrix(c.inputs, width, c.stored, false));
    Batch x = with_ties(c), y(c.tokens, c.outputs, c.out);
    const std::vector<float> bias = normals(c.outputs);
    std::vector<Bounded> expected(c.tokens * c.outputs);
    std::vector<Stripe> stripes;
    int64_t first = 0, read = -1, right = 0;
    for (size_t s = 0; s < widths.size(); first += widths[s++]) {
        const Rule& rule = rules[s % rules.size()];
        stripes.push_back({matrices[s].weight, rule.select(), first});
        stripes.back().weight.rounded = c.in == FORMAT_BF16;
        right += expect_product(c, matrices[s], rule, x, bias, first, expected);
    }
    const Vectors in = x.vectors(), out = y.vectors();
    const int status = sparsity_striped(stripes.data(), stripes.size(), c.outputs, &in, &out, c.bias ? bias.data() : nullptr, c.share,
                                        &read, c.threads);
    expect(status == 0 && read == right, "striped: status %d, read %ld of %ld", status, long(read), long(right));
    compare("striped", y, expected);
}

void dense(const Call& c) {
    const Matrix m = matrix(c.outputs, c.inputs, c.stored, true);
    Batch x = random_batch(c.tokens, c.inputs, c.in), y(c.tokens, c.outputs, c.out);
    const std::vector<float> bias = normals(c.outputs);
    const Vectors in = x.vectors(), out = y.vectors();
    expect(sparsity_dense(&m.weight, &in, &out, c.bias ? bias.data() : nullptr, c.threads) == 0, "dense: refused");
    std::vector<Bounded> expected(c.tokens * c.outputs);
    for (int t = 0; t < c.tokens; t++)
        for (int64_t o = 0; o < c.outputs; o++) {
            Sum sum;
            for (int64_t i = 0; i < c.inputs; i++) sum.add(double(m.at(o, i)) * x.at(t, i));
            expected[t * c.outputs + o] = sum.times(1, c.bias ? bias[o] : 0);
        }
    compare("dense", y, expected);
}

enum Kind { THRESHOLD, EACH, RANK, ALL, NONE };

// A rule of this kind whose mask does not hang on a rounding; scores: of every token.
Rule safe_rule(Kind kind, const std::vector<double>& scale, const std::vector<std::vector<double>>& scores) {
    const int64_t n = scores[0].size();
    Rule best = by_rank(kind == ALL ? n : 0);
    double distance = kind == ALL || kind == NONE ? 2 : 0;
    for (int trial = 0; trial < 200 && distance < 1e-2; trial++) {
        Rule rule = kind == RANK ? by_rank(1 + below(int(n))) : by_threshold(fabsf(normal()) * 0.7f);
        for (int64_t i = 0; kind == EACH && i < n; i++) rule.each.push_back(fabsf(normal()) * 0.7f);
        double closest = 1;
        for (const auto& each : scores) closest = fmin(closest, closeness(rule, each));
        if (closest > distance) best = rule, distance = closest;
    }
    expect(distance > 1e-5, "no rule found: the test itself is at fault");
    best.scale.assign(scale.begin(), scale.end());
    return best;
}

struct Glu {
    Kind kind = THRESHOLD;
    int32_t activation = ACT_SILU;
    bool saliency = false, together = false;  // together: rows of `up` and `down` in turn
    bool given = false;                       // the gate's outputs, and no gate
};

void glu(const Call& c, const Glu& options) {
    const int64_t inputs = c.inputs, neurons = c.outputs;
    const float size = 1 / sqrtf(float(inputs));
    const Matrix gate = matrix(neurons, inputs, c.stored, true, size);
    Matrix up = matrix(neurons, inputs, c.stored, true, size), down = matrix(neurons, inputs, c.stored, false);
    std::vector<uint8_t> both;
    if (options.together) both = side_by_side(up, down), up.data.clear(), down.data.clear();
    const std::vector<float> biases[] = {normals(neurons, 0.3f), normals(neurons), normals(inputs)};
    Batch x = random_batch(c.tokens, inputs, c.in), y(c.tokens, inputs, c.out), gates(c.tokens, neurons, c.out);
    std::vector<double> scale;
    for (int64_t j = 0; options.saliency && j < neurons; j++) scale.push_back(float(1 + below(4)) * 0.5f);
    std::vector<std::vector<Bounded>> g(c.tokens), u(c.tokens);
    std::vector<std::vector<double>> scores(c.tokens);
    for (int t = 0; t < c.tokens; t++)
        for (int64_t j = 0; j < neurons; j++) {
            Bounded sums[] = {dot(gate, j, token_of(x, t)), dot(up, j, token_of(x, t))};
            for (int p = 0; c.bias && p < 2; p++) sums[p].value += biases[p][j], sums[p].error += EPS * fabs(biases[p][j]);
            if (options.given) gates.set(t, j, float(activated(sums[0], options.activation).value));
            g[t].push_back(options.given ? Bounded{gates.at(t, j), 0} : activated(sums[0], options.activation));
            u[t].push_back(sums[1]);
            scores[t].push_back(fabs(g[t][j].value) * (options.saliency ? scale[j] : 1.0));
        }
    const Rule rule = safe_rule(options.kind, scale, scores);
    const Select select = rule.select();
    const Vectors in = x.vectors(), out = y.vectors(), known = gates.vectors();
    auto given = [&](int p) { return c.bias ? biases[p].data() : nullptr; };
    int64_t kept = -1;
    const int status = sparsity_glu(options.given ? nullptr : &gate.weight, options.given ? &known : nullptr, &up.weight,
                                    &down.weight, given(0), given(1), given(2), &select, options.activation, c.share, &in, &out, &kept, c.threads);
    std::vector<Mask> masks;
    for (int t = 0; t < c.tokens; t++) masks.push_back(mask_of(rule, scores[t]));
    const Mask any = any_of(masks);
    expect(status == 0 && kept == kept_of(any), "glu: status %d, kept %ld of %ld", status, long(kept), long(kept_of(any)));
    std::vector<Bounded> expected(c.tokens * inputs);
    for (int t = 0; t < c.tokens; t++)
        for (int64_t o = 0; o < inputs; o++) {
            Sum sum;
            const Mask& mask = c.share == SHARE_UNION ? any : masks[t];
            std::vector<double> kept(neurons);
            for (int64_t j = 0; j < neurons; j++)
                if (mask[j]) kept[j] = g[t][j].value * u[t][j].value;
            const double unit = unit_of(down, c.in, o, kept);
            for (int64_t j = 0; j < neurons; j++)
                if (mask[j]) {
                    const Bounded &a = g[t][j], &b = u[t][j];
                    const double error = fabs(a.value) * b.error + fabs(b.value) * a.error + a.error * b.error;
                    sum.add(kept[j] * down.at(j, o), error * fabs(down.at(j, o)) + rounding(down, j, o, unit));
                }
            expected[t * inputs + o] = sum.times(1, c.bias ? biases[2][o] : 0);
        }
    compare("glu", y, expected);
}

void all_formats_and_sizes() {
    int turn = 0;  // what goes round while sizes and formats meet each other
    for (Stored stored : STORED)
        for (int64_t inputs : {1, 7, 130})
            for (int64_t outputs : {1, 33, 257})
                for (int tokens : {1, 5})
                    for (int threads : {1, 3}) {
                        Call c = {stored, inputs, outputs, tokens, threads};
                        for (const Rule& rule : {by_threshold(0.5f), by_threshold(-1), by_threshold(1e9f), by_rank(0),
                                                 by_law(LAW_NORMAL, 0.2f, true), by_law(LAW_HALF_NORMAL, 0.7f),
                                                 by_rank(inputs / 2), by_rank(inputs)})
                            input_sparse(c, rule);
                        c.bias = turn++ % 2;
                        dense(c);
                        glu({stored, outputs, inputs, tokens, threads}, {Kind(turn % 5), ACT_SILU, turn % 3 == 0, turn % 4 == 0});
                    }
}

Rule full_rule(int64_t inputs, Kind kind) {
    Rule rule = kind == RANK ? by_rank(inputs / 3) : by_threshold(0.6f);
    for (int64_t i = 0; i < inputs; i++) {
        rule.shift.push_back(float(below(5) - 2) * 0.125f), rule.scale.push_back(float(1 + below(3)) * 0.5f);
        if (kind == EACH) rule.each.push_back(float(below(6)) * 0.125f);
    }
    return rule;
}

// Shift, scale and thresholds of every entry; stripes, the last one not whole; batches up to 16; more threads than rows.
void rules_stripes_and_batches() {
    int turn = 0;
    for (Stored stored : STORED)
        for (int tokens : {1, 4, 16})
            for (int threads : {1, 3, 5})
                for (int32_t share : {SHARE_OWN, SHARE_UNION}) {
                    Call c = {stored, 61, 313, tokens, threads, turn % 2, turn / 2 % 2, share, turn % 3 != 0};
                    const std::vector<Rule> three = {full_rule(61, THRESHOLD), full_rule(61, EACH), full_rule(61, RANK)};
                    input_sparse(c, three[turn++ % 3]);
                    striped(c, {128, 128, 57}, three);
                    striped(c, {1, 70, 16, 3, 129}, {three[0], by_rank(0), three[1], three[2]});
                    striped(c, {300 + turn}, {three[turn % 3]});
                    c.inputs = 3, c.outputs = 2;
                    input_sparse(c, full_rule(3, Kind(turn % 3)));
                    striped(c, {1, 1}, {full_rule(3, EACH)});
                    dense(c);
                    glu(c, {Kind(turn % 5), int32_t(turn / 2 % 5), turn % 2 == 1, turn % 3 == 1});
                }
}

// Matrices on both sides of NARROW in each format, and of a block of accumulators; int4 rows longer than a PIECE.
void widths() {
    for (int64_t outputs : {512, 1024, 2048, 2100, 4096, 4300, 8500})
        for (Stored stored : STORED)
            for (int tokens : {1, 16}) {
                const Call c = {stored, 37, outputs, tokens, tokens == 1 ? 3 : 2};
                input_sparse(c, by_rank(20));
                if (outputs > 4096) striped(c, {outputs, 40}, {by_rank(20), full_rule(37, EACH)});
                if (tokens == 1) glu({stored, outputs, 11, tokens, 3}, {RANK, ACT_SILU, false, true});
            }
    for (Stored stored : STORED)
        for (int64_t inputs : {4096, 4300, 8500})
            for (int tokens : {1, 5}) dense({stored, inputs, 7, tokens, 2});
}

void gated_ffns() {
    int turn = 0;
    for (int32_t activation = ACT_NONE; activation <= ACT_RELU; activation++)
        for (Kind kind : {THRESHOLD, EACH, RANK, ALL, NONE})
            for (bool together : {false, true})
                for (int tokens : {1, 6}) {
                    const Call c = {STORED[turn % 5], 45, 70, tokens, 1 + turn % 5, turn % 2, turn / 2 % 2, turn / 3 % 2,
                                    turn % 4 > 0};
                    glu(c, {kind, activation, turn % 3 == 0, together, false});
                    glu(c, {kind, activation, turn % 2 == 0, together, true});
                    turn++;
                }
    for (Stored stored : STORED) {
        glu({stored, 300, 90, 16, 3}, {RANK, ACT_GELU, true, true});   // narrow, many tokens
        glu({stored, 4200, 30, 5, 5}, {RANK, ACT_RELU, false, true});  // wide
    }
}

}  // namespace

void check_operators() {
    all_formats_and_sizes();
    rules_stripes_and_batches();
    widths();
    gated_ffns();
}
