// What must not change a single bit: the number of threads, and the other tokens of a batch.
#include "slow.h"

namespace {

typedef std::vector<uint8_t> Bytes;

// run(threads, in, out) on the whole batch by 1, 3 and 5 threads and, if `alone`, token by token.
template <class Run> void same_bits(const char* what, Batch x, int64_t outputs, int32_t out, bool alone, Run run) {
    Batch first(x.tokens, outputs, out);
    for (int threads : {1, 3, 5}) {
        Batch y(x.tokens, outputs, out);
        const int status = run(threads, x.vectors(), y.vectors());
        if (threads == 1) first = y;
        expect(status == 0 && y.data == first.data, "%s: %d threads change bits (%d tokens, %ld outputs)", what, threads,
               x.tokens, long(outputs));
    }
    for (int t = 0; alone && t < x.tokens; t++) {
        Batch y = first;
        std::fill(y.data.begin() + y.place(t, 0), y.data.begin() + y.place(t, outputs), 0);
        const int status = run(1 + t % 3, x.alone(t), y.alone(t));
        expect(status == 0 && y.data == first.data, "%s: a batch of %d changes bits of token %d (%ld outputs)", what, x.tokens, t,
               long(outputs));
    }
}

void input_sparse(Stored stored, int64_t outputs, int tokens, const Rule& rule, int32_t format) {
    const int64_t inputs = rule.shift.empty() ? 150 : rule.shift.size();
    const Matrix m = matrix(inputs, outputs, stored, false);
    const std::vector<float> bias = normals(outputs);
    const Select select = rule.select();
    const Batch batch = random_batch(tokens, inputs, format);
    const bool alone = !(stored.format == FORMAT_I4 && format == FORMAT_BF16);  // rounded in units of a pass's rows (int4.h)
    same_bits("input_sparse", batch, outputs, format, alone, [&](int threads, Vectors x, Vectors y) {
        return sparsity_input_sparse(&m.weight, &select, &x, &y, bias.data(), SHARE_OWN, nullptr, threads);
    });
}

void striped(Stored stored, const std::vector<int64_t>& widths, int tokens, const std::vector<Rule>& rules, int32_t format) {
    std::vector<Matrix> matrices;
    std::vector<Stripe> stripes;
    int64_t outputs = 0;
    for (int64_t width : widths) matrices.push_back(matrix(150, width, stored, false));
    for (size_t s = 0; s < widths.size(); outputs += widths[s++]) {
        stripes.push_back({matrices[s].weight, rules[s % rules.size()].select(), outputs});
        stripes.back().weight.rounded = format == FORMAT_BF16;
    }
    const std::vector<float> bias = normals(outputs);
    const bool alone = !(stored.format == FORMAT_I4 && format == FORMAT_BF16);
    same_bits("striped", random_batch(tokens, 150, format), outputs, format, alone, [&](int threads, Vectors x, Vectors y) {
        return sparsity_striped(stripes.data(), stripes.size(), outputs, &x, &y, bias.data(), SHARE_OWN, nullptr, threads);
    });
}

// Dot products take four tokens at a time or one, with sums of their own: batches may differ, threads not.
void dense(Stored stored, int tokens) {
    const Matrix m = matrix(23, 300, stored, true);
    const std::vector<float> bias = normals(23);
    same_bits("dense", random_batch(tokens, 300, FORMAT_F32), 23, FORMAT_F32, false, [&](int threads, Vectors x, Vectors y) {
        return sparsity_dense(&m.weight, &x, &y, bias.data(), threads);
    });
}

void glu(Stored stored, int64_t inputs, int tokens, const Rule& rule, bool known = false) {
    const Matrix gate = matrix(90, inputs, stored, true), up = matrix(90, inputs, stored, true);
    const Matrix down = matrix(90, inputs, stored, false);
    const std::vector<float> bias = normals(std::max<int64_t>(90, inputs));
    const Select select = rule.select();
    Batch gates = random_batch(tokens, 90, FORMAT_F32);
    const Vectors given = gates.vectors();
    same_bits("glu", random_batch(tokens, inputs, FORMAT_F32), inputs, FORMAT_F32, false, [&](int threads, Vectors x, Vectors y) {
        return sparsity_glu(known ? nullptr : &gate.weight, known ? &given : nullptr, &up.weight, &down.weight, bias.data(),
                            bias.data(), bias.data(), &select, ACT_SILU, SHARE_OWN, &x, &y, nullptr, threads);
    });
}

}  // namespace

void check_bits() {
    Rule shifted = by_threshold(0.4f);
    shifted.shift = normals(150, 0.2f);
    for (Stored stored : STORED) {
        for (int tokens : {1, 5, 16}) {
            for (int64_t outputs : {20, 300, 700}) {
                input_sparse(stored, outputs, tokens, by_rank(60), FORMAT_F32);
                const int32_t format = outputs == 300 ? FORMAT_BF16 : FORMAT_F32;
                striped(stored, {outputs, 128, 40, 3}, tokens, {shifted, by_rank(9), by_threshold(0.8f)}, format);
            }
            glu(stored, 200, tokens, by_rank(40), true);
            dense(stored, tokens);
            glu(stored, 200, tokens, by_rank(40));
        }
        for (int64_t outputs : {510, 1024, 2040}) input_sparse(stored, outputs, 5, shifted, FORMAT_F32);
        for (int64_t outputs : {4096, 4300, 8500}) input_sparse(stored, outputs, 6, by_rank(30), FORMAT_F32);
        for (int64_t outputs : {4300, 8500}) input_sparse(stored, outputs, 1, by_rank(30), FORMAT_BF16);
        glu(stored, 4300, 3, by_threshold(1));
    }
}
