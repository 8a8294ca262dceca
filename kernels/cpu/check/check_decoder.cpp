// The decoder against a slow one: every kind of site, cache and format; threads; structures that have to be refused.
#include <stdlib.h>

#include <memory>

#include "slow_decoder.h"

extern "C" {
int sparsity_decoder_check(const Decoder*);
int sparsity_decode(const Decoder*, int64_t, int64_t, float*, double*, int);
}

namespace {

// How near a score may come to what would change a mask: it comes out of a few layers of float32.
constexpr double SAFE = 1e-5;

void decode(const char* what, const Options& options, double& worst) {
    const Shape& s = options.shape;
    std::vector<int64_t> tokens;
    for (int64_t p = 0; p < s.capacity; p++) tokens.push_back(below(int(s.vocabulary)));
    std::unique_ptr<Model> model;
    std::vector<std::vector<double>> expected;
    std::vector<double> bytes;
    double closest = 0;
    for (int trial = 0; trial < 20 && closest < SAFE; trial++) {  // drawn again where a mask hangs on a rounding
        model.reset(new Model(options));
        SlowDecoder slow(*model);
        expected.clear(), bytes.clear();
        for (int64_t token : tokens) expected.push_back(slow.step(token)), bytes.push_back(slow.bytes);
        closest = slow.closest;
    }
    expect(closest >= SAFE && sparsity_decoder_check(&model->decoder) == 0, "%s: refused, or no model found", what);
    // Errors add up over the layers, each about as large as that of its longest sum.
    const double tolerance = 16 * EPS * double(s.layers + 1) * sqrt(double(std::max(s.hidden, s.neurons)));
    std::vector<std::vector<float>> first;
    std::vector<uint8_t> cache;
    for (int threads : {1, 3, 5}) {
        model->clear();
        for (size_t p = 0; p < tokens.size(); p++) {
            std::vector<float> logits(s.vocabulary);
            double read = -1, largest = 0;
            const int status = sparsity_decode(&model->decoder, tokens[p], p, logits.data(), &read, threads);
            expect(status == 0 && fabs(read - bytes[p]) < 0.5, "%s: status %d, %g bytes of %g", what, status, read, bytes[p]);
            if (threads == 1) first.push_back(logits);
            expect(!memcmp(logits.data(), first[p].data(), 4 * logits.size()), "%s: %d threads change bits", what, threads);
            for (double v : expected[p]) largest = fmax(largest, fabs(v));
            for (size_t v = 0; v < logits.size(); v++) {
                const double error = fabs(logits[v] - expected[p][v]) / largest;
                if (error > worst) worst = error;
                expect(error <= tolerance, "%s: token %zu: logit %zu is %g, not %g", what, p, v, logits[v], expected[p][v]);
            }
        }
        if (threads == 1) cache = model->blocks.back().keys;
        expect(cache == model->blocks.back().keys, "%s: %d threads change the cache", what, threads);
    }
    float logit[1];
    for (int64_t bad : {int64_t(-1), s.vocabulary})
        expect(sparsity_decode(&model->decoder, bad, 0, logit, nullptr, 1) == 1, "token %ld was not refused", long(bad));
    for (int64_t bad : {int64_t(-1), s.capacity})
        expect(sparsity_decode(&model->decoder, 0, bad, logit, nullptr, 1) == 1, "position %ld was not refused", long(bad));
    expect(sparsity_decode(&model->decoder, 0, 0, nullptr, nullptr, 1) == 1, "no place for logits was not refused");
    expect(sparsity_decode(nullptr, 0, 0, logit, nullptr, 1) == 1, "no decoder was not refused");
}

Rule shifted(Rule rule, int64_t n) {
    rule.shift = normals(n, 0.1f);
    return rule;
}

Options dense() { return {}; }
Options gate(Rule rule) {
    Options o;
    o.gate = {true, false, rule};
    return o;
}
Options inputs(const Shape& s) {
    Options o;
    o.shape = s;
    o.qkv = {true, true, by_rank(s.hidden / 2)}, o.o = {true, false, by_rank(s.heads * s.head_dim / 2)};
    o.up = {true, false, by_threshold(0.4f)}, o.down = {true, false, shifted(by_rank(s.neurons / 3), s.neurons)};
    return o;
}
Options rotated_everywhere(const Shape& s) {
    Options o = inputs(s);
    o.o.rotated = o.up.rotated = o.down.rotated = o.extras = true;
    o.qkv.rule = shifted(by_threshold(0.5f), s.hidden), o.qkv.rule.scale.assign(s.hidden, 1.25f);
    o.activation = ACT_GELU_TANH, o.window = 3;
    return o;
}
Options lowered(const Shape& s, bool rotated) {
    Options o = inputs(s);
    if (rotated) o = rotated_everywhere(s);
    o.qkv.rule = by_law(LAW_HALF_NORMAL, 0.6f), o.up.rule = by_law(LAW_NORMAL, -0.2f), o.head = {true, rotated, by_threshold(0.4f)};
    o.qkv.low = 3, o.o.low = 1, o.up.low = 17, o.down.low = s.neurons / 2, o.head.low = 5;
    return o;
}
Options head(const Shape& s, int64_t refined, bool rotated) {
    Options o;
    o.shape = s;
    o.head = {true, rotated, rotated ? by_rank(s.hidden / 3) : by_threshold(0.5f)}, o.refined = refined, o.extras = true;
    return o;
}
Options mixed(const Shape& s) {  // a gate site behind input sites, everything else that a family may have
    Options o = gate(by_rank(s.neurons / 4));
    o.shape = s;
    o.qkv = {true, false, by_rank(s.hidden / 3)}, o.o = {true, true, by_threshold(0.1f)};
    for (int64_t j = 0; j < s.neurons; j++) o.gate.rule.scale.push_back(float(1 + below(3)));
    o.extras = true, o.activation = ACT_GELU, o.window = 2;
    return o;
}
Options granular(const Shape& s, bool extras) {
    Options o = gate(by_threshold(0));
    o.shape = s, o.extras = extras, o.stripes = true;
    for (int64_t j = 0; j < s.neurons; j++) o.gate.rule.each.push_back(fabsf(normal()) * 0.3f);
    return o;
}

// What must be refused before anything follows a pointer: a change of one field each.
void refused() {
    const Model plain((Options())), sparse(inputs({}));
    expect(sparsity_decoder_check(nullptr) == 1, "no decoder was not refused");
    int number = 0;
    auto model = [&](auto change) {
        Decoder copy = plain.decoder;
        change(copy);
        expect(sparsity_decoder_check(&copy) == 1, "wrong decoder %d was not refused", number++);
    };
    model([](Decoder& m) { m.layers = nullptr; });
    model([](Decoder& m) { m.layer_count = 0; });
    model([](Decoder& m) { m.hidden = 25; });
    model([](Decoder& m) { m.heads = 2; });
    model([](Decoder& m) { m.kv_heads = 2; });
    model([](Decoder& m) { m.kv_heads = 0; });
    model([](Decoder& m) { m.head_dim = 7; });
    model([](Decoder& m) { m.head_dim = 4; });
    model([](Decoder& m) { m.neurons = 41; });
    model([](Decoder& m) { m.capacity = 0; });
    model([](Decoder& m) { m.vocabulary = 51; });
    model([](Decoder& m) { m.final_norm = nullptr; });
    model([](Decoder& m) { m.cosine[1] = nullptr; });
    model([](Decoder& m) { m.sine[0] = nullptr; });
    model([](Decoder& m) { m.cache_format = FORMAT_I8; });
    model([](Decoder& m) { m.cache_format = -1; });
    model([](Decoder& m) { m.embedding.data = nullptr; });
    model([](Decoder& m) { m.head.rows = 49; });
    model([](Decoder& m) { m.refined = -1; });
    model([](Decoder& m) { m.refined = 3; });         // of a dense head
    model([](Decoder& m) { m.at_head.active = 1; });  // packed by outputs
    const Model headed(head({}, 3, true));
    auto of_head = [&](auto change) {
        Decoder copy = headed.decoder;
        change(copy);
        expect(sparsity_decoder_check(&copy) == 1, "wrong head %d was not refused", number++);
    };
    of_head([](Decoder& m) { m.refined = 51; });
    of_head([](Decoder& m) { m.head_rows.data = nullptr; });
    of_head([](Decoder& m) { m.head_rows.rows = 49; });
    of_head([](Decoder& m) { m.at_head.rotation.rows--; });
    of_head([](Decoder& m) { m.head.cols--; });
    of_head([](Decoder& m) { m.head_bias = m.final_norm; });  // rows that are read in full have none
    auto layer = [&](const Model& base, auto change) {
        std::vector<Layer> layers = base.layers;
        change(layers.back());
        Decoder copy = base.decoder;
        copy.layers = layers.data();
        expect(sparsity_decoder_check(&copy) == 1, "wrong layer %d was not refused", number++);
    };
    layer(plain, [](Layer& l) { l.norm_attention = nullptr; });
    layer(plain, [](Layer& l) { l.norm_ffn = nullptr; });
    layer(plain, [](Layer& l) { l.keys = nullptr; });
    layer(plain, [](Layer& l) { l.values = nullptr; });
    layer(plain, [](Layer& l) { l.rope = 2; });
    layer(plain, [](Layer& l) { l.rope = -1; });
    layer(plain, [](Layer& l) { l.qkv.rows--; });
    layer(plain, [](Layer& l) { l.o.data = nullptr; });
    layer(plain, [](Layer& l) { l.gate.padded = 24; });
    layer(plain, [](Layer& l) { l.up.stride = 16; });
    layer(plain, [](Layer& l) { l.down.format = 7; });
    layer(plain, [](Layer& l) { l.down.format = FORMAT_I8; });
    layer(plain, [](Layer& l) { l.at_down.active = 1; });  // packed by outputs
    layer(plain, [](Layer& l) { l.at_qkv.rotated = 1; });  // without a rule
    layer(sparse, [](Layer& l) { l.at_qkv.active = 0; });
    layer(sparse, [](Layer& l) { l.at_qkv.rotation.data = nullptr; });
    layer(sparse, [](Layer& l) { l.at_qkv.rotation.rows--; });
    layer(sparse, [](Layer& l) { l.at_gate.active = 1; });
    layer(sparse, [](Layer& l) { l.at_up.active = 0; });
    layer(sparse, [](Layer& l) { l.gate_up.cols--; });
    const Model low(lowered({}, true));
    expect(sparsity_decoder_check(&low.decoder) == 0, "low rank products were refused");
    layer(low, [](Layer& l) { l.at_o.lowered = 0; });
    layer(low, [](Layer& l) { l.at_o.low.cols--; });
    layer(low, [](Layer& l) { l.at_o.low.rows++; });
    layer(low, [](Layer& l) { l.at_up.low.data = nullptr; });
    layer(low, [](Layer& l) { l.at_qkv.select.law = 3; });
    layer(low, [](Layer& l) { l.at_qkv.select.by_rank = 1; });
    layer(low, [](Layer& l) { l.at_o.select.with_sign = 1; });
    layer(plain, [](Layer& l) { l.at_o.lowered = 1; });
    const Model gated(gate(by_rank(5)));
    layer(gated, [](Layer& l) { l.at_gate.lowered = 1; });
    layer(gated, [](Layer& l) { l.at_down.active = 1; });
    layer(gated, [](Layer& l) { l.at_gate.rotated = 1; });
    layer(gated, [](Layer& l) { l.at_gate.active = 0; });
    const Model striped(granular({}, false));
    expect(sparsity_decoder_check(&striped.decoder) == 0, "stripes were refused");
    layer(striped, [](Layer& l) { l.stripes_qkv.count--; });
    layer(striped, [](Layer& l) { l.stripes_o.first = nullptr; });
    layer(striped, [](Layer& l) { l.stripes_gate.count = -1; });
    layer(striped, [](Layer& l) { l.at_qkv.active = 1; });
    layer(striped, [](Layer& l) { l.at_gate.active = 0; });
    auto of_stripes = [&](auto change) {
        Decoder copy = striped.decoder;
        change(copy);
        expect(sparsity_decoder_check(&copy) == 1, "wrong stripes %d of the head were not refused", number++);
    };
    of_stripes([](Decoder& m) { m.stripes_head.count--; });
    of_stripes([&](Decoder& m) { m.at_head = headed.decoder.at_head; });
    of_stripes([&](Decoder& m) { m.refined = 3, m.head_rows = headed.decoder.head_rows; });
}

}  // namespace

void check_decoder() {
    const Shape small, uneven = {2, 33, 4, 2, 18, 70, 31, 5};  // a head that is no whole vector
    double worst = 0;
    decode("dense", dense(), worst);
    decode("gate by threshold", gate(by_threshold(0.2f)), worst);
    decode("gate by rank", gate(by_rank(11)), worst);
    decode("gate by its moments", gate(by_law(LAW_NORMAL, 0.3f, true)), worst);
    for (const Shape& shape : {small, uneven}) {
        decode("inputs", inputs(shape), worst);
        decode("rotated everywhere", rotated_everywhere(shape), worst);
        decode("mixed", mixed(shape), worst);
        for (bool rotated : {false, true}) decode("low rank", lowered(shape, rotated), worst);
        for (bool extras : {false, true}) decode("granular", granular(shape, extras), worst);
        for (int64_t refined : {int64_t(0), int64_t(1), int64_t(7), shape.vocabulary})
            for (bool rotated : {false, true}) decode("head", head(shape, refined, rotated), worst);
    }
    for (int64_t refined : {3, 40, 900}) decode("many words", head({1, 16, 1, 1, 8, 9, 3001, 2}, refined, false), worst);
    for (Stored stored : STORED)
        for (Options o : {dense(), mixed(uneven), rotated_everywhere(small), granular(uneven, true), head(uneven, 5, true),
                          lowered(uneven, true)}) {
            o.stored = stored;
            decode("formats", o, worst);
            o.cache_format = FORMAT_BF16;
            decode("bfloat16 cache", o, worst);
        }
    for (const Shape& wide : {Shape{1, 4200, 3, 1, 8, 9, 11, 2}, Shape{1, 10, 1, 1, 8, 2100, 11, 2}}) {  // beyond NARROW
        decode("wide, mixed", mixed(wide), worst);
        Options o = inputs(wide);
        o.qkv.rotated = false;  // 4200 x 4200 entries else
        decode("wide, inputs", o, worst);
    }
    if (getenv("CHECK_VERBOSE")) printf("largest error of logits: %g of the largest one\n", worst);
    refused();
}
