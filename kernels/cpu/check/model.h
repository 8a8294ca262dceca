// A small random decoder-only model with its own memory, and the same model one token at a time in double precision.
#pragma once
#include "../decode_args.h"
#include "slow.h"

struct Shape {
    int64_t layers = 2, hidden = 24, heads = 3, kv_heads = 1, head_dim = 8, neurons = 40, vocabulary = 50, capacity = 6;
};

struct Place {  // one site of every layer
    bool active = false, rotated = false;
    Rule rule;
    int64_t low = 0;  // rank of a product that nothing is dropped from
};

struct Options {
    Shape shape;
    Stored stored = {FORMAT_F32, 0};
    Place qkv, o, up, gate, down, head;
    int64_t refined = 0;  // words
    int32_t cache_format = FORMAT_F32, activation = ACT_SILU, window = 0;  // window: of all layers but the first
    bool extras = false;  // biases, norms after and of heads, caps, factors
    bool stripes = false;  // qkv, o, gate and head in stripes, with thresholds of their own; the gate's site has to be active
};

// A projection in stripes of several widths.
struct Granular {
    std::vector<Matrix> parts;
    std::vector<Rule> rules;
    std::vector<Stripe> stripes;

    void fill(int64_t inputs, int64_t outputs, Stored stored) {
        for (int64_t first = 0, width = 1; first < outputs; first += width, width = 1 + below(20)) {
            width = std::min(width, outputs - first);
            parts.push_back(matrix(inputs, width, stored, false, 1 / sqrtf(float(inputs))));
            Rule rule;
            for (int64_t i = 0; i < inputs; i++) rule.each.push_back(fabsf(normal()) * 0.6f), rule.shift.push_back(0.1f * normal());
            rules.push_back(rule);
        }
        int64_t first = 0;
        for (size_t s = 0; s < parts.size(); first += parts[s++].weight.cols)
            stripes.push_back({parts[s].weight, rules[s].select(), first});
    }
    Stripes view() const { return {stripes.empty() ? nullptr : stripes.data(), int64_t(stripes.size())}; }
};

struct Block {
    Granular qkv_stripes, o_stripes, gate_stripes;
    std::vector<float> norms[6];
    Matrix qkv, o, gate, up, gate_up, down, rotations[5], lows[5];
    std::vector<float> biases[6];
    std::vector<uint8_t> keys, values;
};

struct Model {
    Options options;
    std::vector<Block> blocks;
    Matrix embedding, head, rows, turn, low;  // rows: of refined words, not the head's numbers; turn, low: the head's
    Granular head_stripes;
    std::vector<float> final_norm, head_bias, cosine[2], sine[2];
    std::vector<Layer> layers;
    Decoder decoder{};

    explicit Model(const Options& options) : options(options), blocks(options.shape.layers) {
        const Shape& s = options.shape;
        embedding = matrix(s.vocabulary, s.hidden, options.stored, true);
        head = weight(s.hidden + options.head.low, s.vocabulary, options.head.active);
        if (options.head.low) low = weight(s.hidden, options.head.low, false);
        if (options.stripes) head_stripes.fill(s.hidden, s.vocabulary, options.stored);
        if (options.refined) rows = weight(s.hidden, s.vocabulary, false);
        if (options.head.rotated) turn = weight(s.hidden, s.hidden, false);
        final_norm = multipliers(s.hidden);
        if (options.extras && !options.refined) head_bias = normals(s.vocabulary, 0.3f);
        for (int table = 0; table < 2; table++)
            for (int64_t i = 0; i < s.capacity * s.head_dim; i++) {
                const double angle = double(i / s.head_dim) * pow(table ? 50 : 10, -double(i % (s.head_dim / 2)) / 4);
                cosine[table].push_back(float(cos(angle))), sine[table].push_back(float(sin(angle)));
            }
        for (Block& b : blocks) fill(b);
        point();
    }
    Model(const Model&) = delete;

    // Empty caches; sizes are exact.
    void clear() {
        for (Block& b : blocks) std::fill(b.keys.begin(), b.keys.end(), 0xff), std::fill(b.values.begin(), b.values.end(), 0xff);
    }

  private:
    static std::vector<float> multipliers(int64_t n) {
        std::vector<float> found = normals(n, 0.1f);
        for (float& v : found) v += 1;
        return found;
    }
    // By inputs where they are dropped, else by outputs.
    Matrix weight(int64_t inputs, int64_t outputs, bool by_inputs) const {
        const float size = 1 / sqrtf(float(inputs));
        if (by_inputs) return matrix(inputs, outputs, options.stored, false, size);
        return matrix(outputs, inputs, options.stored, true, size);
    }
    void fill(Block& b) {
        const Shape& s = options.shape;
        const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim, n = s.neurons, h = s.hidden;
        b.qkv = weight(h + options.qkv.low, q + 2 * kv, options.qkv.active), b.o = weight(q + options.o.low, h, options.o.active);
        if (options.up.active) b.gate_up = weight(h + options.up.low, 2 * n, true);
        else b.gate = weight(h, n, false), b.up = weight(h, n, false);
        b.down = weight(n + options.down.low, h, options.down.active || options.gate.active);
        if (options.stripes) {
            b.qkv_stripes.fill(h, q + 2 * kv, options.stored), b.o_stripes.fill(q, h, options.stored);
            b.gate_stripes.fill(h, n, options.stored);
        }
        const Place* places[] = {&options.qkv, &options.o, &options.up, &options.gate, &options.down};
        const int64_t widths[] = {h, q, h, n, n};
        for (int i = 0; i < 5; i++)
            if (places[i]->rotated) b.rotations[i] = weight(widths[i], widths[i], false);
        for (int i = 0; i < 5; i++)
            if (places[i]->low) b.lows[i] = weight(widths[i], places[i]->low, false);
        b.norms[0] = multipliers(h), b.norms[2] = multipliers(h);
        const int64_t size = s.capacity * kv * (options.cache_format == FORMAT_F32 ? 4 : 2);
        b.keys.resize(size), b.values.resize(size);
        if (!options.extras) return;
        b.norms[1] = multipliers(h), b.norms[3] = multipliers(h);
        b.norms[4] = multipliers(s.head_dim), b.norms[5] = multipliers(s.head_dim);
        const int64_t outputs[] = {q + 2 * kv, h, n, n, 2 * n, h};
        for (int i = 0; i < 6; i++) b.biases[i] = normals(outputs[i], 0.2f);
    }
    void point() {
        const Shape& s = options.shape;
        auto at = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
        for (size_t i = 0; i < blocks.size(); i++) {
            Block& b = blocks[i];
            auto site = [&](const Place& p, int number) {
                return Site{p.rule.select(), b.rotations[number].weight, b.lows[number].weight, p.active, p.rotated, p.low > 0};
            };
            const auto &n = b.norms, &c = b.biases;
            layers.push_back({at(n[0]), at(n[1]), at(n[2]), at(n[3]), at(n[4]), at(n[5]),
                              b.qkv.weight, b.o.weight, b.gate.weight, b.up.weight, b.gate_up.weight, b.down.weight,
                              at(c[0]), at(c[1]), at(c[2]), at(c[3]), at(c[4]), at(c[5]),
                              site(options.qkv, 0), site(options.o, 1), site(options.up, 2), site(options.gate, 3),
                              site(options.down, 4), b.qkv_stripes.view(), b.o_stripes.view(), b.gate_stripes.view(),
                              b.keys.data(), b.values.data(), i ? options.window : 0, int32_t(i % 2)});
        }
        const bool extras = options.extras;
        decoder = {layers.data(), s.layers, s.hidden, s.heads, s.kv_heads, s.head_dim, s.neurons, s.capacity, s.vocabulary,
                   embedding.weight, head.weight, head_stripes.view(),
                   {options.head.rule.select(), turn.weight, low.weight, options.head.active, options.head.rotated,
                    options.head.low > 0},
                   rows.weight, options.refined,
                   final_norm.data(), at(head_bias), {cosine[0].data(), cosine[1].data()},
                   {sine[0].data(), sine[1].data()}, 1e-5f, float(1 / sqrt(double(s.head_dim))), extras ? 1.5f : 1.0f,
                   extras ? 2.0f : 0.0f, extras ? 3.0f : 0.0f, extras ? 0.5f : 1.0f, options.activation, options.cache_format};
    }
};
