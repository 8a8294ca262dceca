// NaN and infinity, equal scores, empty batches, and what has to be refused.
#include "slow.h"

namespace {

constexpr float NOT_A_NUMBER = NAN, INFINITE = INFINITY;
constexpr int64_t INPUTS = 37, OUTPUTS = 70;

// Status of a product of `x`, and whether each token's outputs are all finite, or none.
std::vector<bool> finite_tokens(Batch& x, const Rule& rule, int threads, int32_t share = SHARE_OWN) {
    const Matrix m = matrix(INPUTS, OUTPUTS, {FORMAT_F32, 0}, false);
    Batch y(x.tokens, OUTPUTS, x.format);
    const Vectors in = x.vectors(), out = y.vectors();
    const Select select = rule.select();
    expect(sparsity_input_sparse(&m.weight, &select, &in, &out, nullptr, share, nullptr, threads) == 0, "refused");
    std::vector<bool> finite;
    for (int t = 0; t < x.tokens; t++) {
        int64_t count = 0;
        for (int64_t o = 0; o < OUTPUTS; o++) count += isfinite(y.at(t, o)) != 0;
        expect(count == 0 || count == OUTPUTS, "token %d: %ld of %ld outputs are finite", t, long(count), long(OUTPUTS));
        finite.push_back(count == OUTPUTS);
    }
    return finite;
}

// Kept, they reach every output of their own token; dropped, none, nor those of the other tokens.
void not_finite(int32_t format, int tokens, int threads) {
    for (float bad : {NOT_A_NUMBER, -NOT_A_NUMBER, INFINITE, -INFINITE})
        for (int64_t place : {0, 5, 36}) {
            Batch x = random_batch(tokens, INPUTS, format);
            x.set(0, place, bad);
            Rule each = by_threshold(0);
            for (const Rule& rule : {by_threshold(1e9f), by_threshold(0.5f), by_rank(1), by_rank(INPUTS)}) {
                for (int32_t share : {SHARE_OWN, SHARE_UNION}) {
                    const std::vector<bool> finite = finite_tokens(x, rule, threads, share);
                    for (int t = 0; t < tokens; t++) expect(finite[t] == (t > 0), "token %d: NaN or infinity lost or spread", t);
                }
            }
            for (bool finite : finite_tokens(x, by_rank(0), threads)) expect(finite, "dropped, and not finite all the same");
            each.each.assign(INPUTS, 0.1f), each.each[place] = INFINITE;  // drops infinity, and still not NaN
            expect(finite_tokens(x, each, threads)[0] == !isnan(bad), "infinity below its threshold, or NaN dropped");
            x.set(0, (place + 1) % INPUTS, NOT_A_NUMBER);  // two: the k largest are NaN first, then infinity
            expect(!finite_tokens(x, by_rank(1), threads)[0], "NaN is not the largest");
        }
}

// One token keeps a neuron whose product overflows; the other, which drops it, must stay finite.
void overflow_of_another_token(int threads) {
    const int64_t n = 33;
    Matrix gate = matrix(n, n, {FORMAT_F32, 0}, true), up = matrix(n, n, {FORMAT_F32, 0}, true);
    const Matrix down = matrix(n, n, {FORMAT_F32, 0}, false);
    std::fill(gate.data.begin(), gate.data.end(), 0);
    const float one = 1;
    for (int64_t j = 0; j < n; j++) memcpy(&gate.data[(j * gate.weight.padded + j) * 4], &one, 4);  // gate: the identity
    std::vector<float> up_bias(n);
    up_bias[7] = INFINITE;
    for (int tokens : {2, 5}) {
        Batch x(tokens, n, FORMAT_F32), y(tokens, n, FORMAT_F32);
        for (int t = 0; t < tokens; t++)
            for (int64_t i = 0; i < n; i++) x.set(t, i, i == (t == 0 ? 7 : 8) ? 1.0f : 0.0f);
        const Vectors in = x.vectors(), out = y.vectors();
        const Select select = by_threshold(0.5f).select();
        int64_t kept = 0;
        const int status = sparsity_glu(&gate.weight, nullptr, &up.weight, &down.weight, nullptr, up_bias.data(), nullptr, &select,
                                        ACT_NONE, SHARE_OWN, &in, &out, &kept, threads);
        expect(status == 0 && kept == 2, "overflow: status %d, kept %ld", status, long(kept));
        for (int t = 0; t < tokens; t++)
            for (int64_t o = 0; o < n; o++) expect((isfinite(y.at(t, o)) != 0) == (t > 0), "overflow spreads to token %d", t);
    }
}

// Of equal scores the k first are kept, for every k.
void equal_scores(int tokens, int threads) {
    const Matrix m = matrix(INPUTS, OUTPUTS, {FORMAT_F32, 0}, false);
    for (float size : {0.0f, 0.75f, INFINITE})
        for (int64_t k = 0; k <= INPUTS; k += k < 3 || k > 33 ? 1 : 5) {
            Batch x(tokens, INPUTS, FORMAT_F32), y(tokens, OUTPUTS, FORMAT_F32);
            for (int t = 0; t < tokens; t++)
                for (int64_t i = 0; i < INPUTS; i++) x.set(t, i, i % 3 == t % 3 ? -size : size);
            Rule rule = by_rank(k);
            if (size == 0)
                for (int64_t i = 0; i < INPUTS; i++) rule.shift.push_back(i % 2 ? -2.0f : 2.0f);
            const Select select = rule.select();
            const Vectors in = x.vectors(), out = y.vectors();
            int64_t read = -1;
            const int status = sparsity_input_sparse(&m.weight, &select, &in, &out, nullptr, SHARE_OWN, &read, threads);
            expect(status == 0 && read == k * OUTPUTS, "equal scores: status %d, read %ld", status, long(read));
            if (size == INFINITE) continue;
            std::vector<Bounded> expected(tokens * OUTPUTS);
            for (int t = 0; t < tokens; t++)
                for (int64_t o = 0; o < OUTPUTS; o++) {
                    Sum sum;
                    for (int64_t i = 0; i < k; i++) sum.add(double(x.at(t, i) - (size == 0 ? rule.shift[i] : 0)) * m.at(i, o));
                    expected[t * OUTPUTS + o] = sum.times(1);
                }
            compare("equal scores", y, expected);
        }
}

void refused() {
    const Matrix m = matrix(3, 4, {FORMAT_I8, 0}, false);  // by outputs as well: 4 scales are enough for 3
    Batch x(2, 4, FORMAT_F32), y(2, 3, FORMAT_F32);
    const Vectors in = x.vectors(), out = y.vectors(), none{nullptr, 4, FORMAT_F32, 1}, empty{nullptr, 4, FORMAT_F32, 0};
    expect(sparsity_dense(&m.weight, &empty, &empty, nullptr, 1) == 0, "an empty batch was refused");
    expect(sparsity_dense(nullptr, &in, &out, nullptr, 1) == 1 && sparsity_dense(&m.weight, &none, &out, nullptr, 1) == 1 &&
               sparsity_dense(&m.weight, &in, nullptr, nullptr, 1) == 1, "null pointers were not refused");
    auto vectors = [&](Vectors v) { return sparsity_dense(&m.weight, &v, &out, nullptr, 1) == 1; };
    expect(vectors({x.data.data(), 3, FORMAT_F32, 2}) && vectors({x.data.data(), 7, FORMAT_I8, 2}) &&
               vectors({x.data.data(), 7, FORMAT_F32, 17}) && vectors({x.data.data(), 7, FORMAT_F32, 1}),
           "a bad batch was not refused");
    auto weight = [&](auto change) {
        Weight w = m.weight;
        change(w);
        expect(sparsity_dense(&w, &in, &out, nullptr, 1) == 1, "a bad weight was not refused");
    };
    weight([](Weight& w) { w.data = nullptr; });
    weight([](Weight& w) { w.scales = nullptr; });
    weight([](Weight& w) { w.rows = 0; });
    weight([](Weight& w) { w.cols = 65; });
    weight([](Weight& w) { w.padded = w.stride = 128; });
    weight([](Weight& w) { w.padded = w.stride = 48; });
    weight([](Weight& w) { w.stride = 0; });
    weight([](Weight& w) { w.stride = 96; });
    weight([](Weight& w) { w.format = 4; });
    weight([](Weight& w) { w.format = -1; });
    weight([](Weight& w) { w.format = FORMAT_I4, w.group = 64; });
    const Select select = by_rank(1).select();
    const Vectors row{y.data.data(), 6, FORMAT_F32, 2}, wide{x.data.data(), 7, FORMAT_F32, 2};
    expect(sparsity_input_sparse(&m.weight, &select, &row, &wide, nullptr, SHARE_OWN, nullptr, 1) == 0, "a product was refused");
    const Matrix more = matrix(3, 2, {FORMAT_F32, 0}, false);
    auto stripes = [&](int64_t count, int64_t outputs, auto change) {
        Stripe all[] = {{m.weight, select, 0}, {more.weight, select, 4}};
        change(all[1]);
        Batch z(2, 6, FORMAT_F32);
        const Vectors out = z.vectors();
        return sparsity_striped(count < 0 ? nullptr : all, count, outputs, &row, &out, nullptr, SHARE_OWN, nullptr, 1);
    };
    expect(stripes(2, 6, [](Stripe&) {}) == 0 && stripes(1, 4, [](Stripe&) {}) == 0, "good stripes were refused");
    expect(stripes(0, 0, [](Stripe&) {}) == 1 && stripes(-1, 6, [](Stripe&) {}) == 1 && stripes(2, 5, [](Stripe&) {}) == 1 &&
               stripes(1, 6, [](Stripe&) {}) == 1 && stripes(2, 6, [](Stripe& s) { s.first = 3; }) == 1 &&
               stripes(2, 6, [](Stripe& s) { s.weight.rows = 2; }) == 1 && stripes(2, 6, [](Stripe& s) { s.weight.cols = 1; }) == 1 &&
               stripes(2, 6, [](Stripe& s) { s.weight.data = nullptr; }) == 1 &&
               stripes(2, 6, [](Stripe& s) { s.select.group = 65; }) == 1, "bad stripes were not refused");
    const Matrix up = matrix(4, 3, {FORMAT_F32, 0}, true), down = matrix(4, 3, {FORMAT_F32, 0}, false);
    auto gates = [&](const Weight* gate, const Vectors* given) {
        return sparsity_glu(gate, given, &up.weight, &down.weight, nullptr, nullptr, nullptr, &select, ACT_NONE, SHARE_OWN, &row, &row,
                            nullptr, 1);
    };
    const Vectors few{x.data.data(), 7, FORMAT_F32, 1}, nowhere{nullptr, 7, FORMAT_F32, 2};
    expect(gates(nullptr, &in) == 0 && gates(&up.weight, nullptr) == 0, "a gated FFN was refused");
    expect(gates(nullptr, nullptr) == 1 && gates(&up.weight, &in) == 1 && gates(nullptr, &few) == 1 && gates(nullptr, &nowhere) == 1,
           "a gated FFN without a gate, or with two, was not refused");
}

}  // namespace

void check_edges() {
    for (int threads : {1, 5}) {
        for (int32_t format : {FORMAT_F32, FORMAT_BF16})
            for (int tokens : {1, 4, 7}) not_finite(format, tokens, threads);
        for (int tokens : {1, 3}) equal_scores(tokens, threads);
        overflow_of_another_token(threads);
    }
    refused();
}
