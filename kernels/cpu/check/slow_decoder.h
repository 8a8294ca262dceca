// A decoder-only model by its definition, one token at a time, in double precision.
#pragma once
#include "model.h"

struct SlowDecoder {
    typedef std::vector<double> Row;

    const Model& model;
    std::vector<std::vector<Row>> keys, values;  // [layer][position][kv_heads * head_dim]
    double closest = 1;  // how near any score came to what would change a mask
    double bytes = 0;    // of weights and cache read by the last token

    explicit SlowDecoder(const Model& model) : model(model), keys(model.blocks.size()), values(model.blocks.size()) {}

    Row step(int64_t token) {
        const Decoder& m = model.decoder;
        bytes = 0;
        Row x(m.hidden);
        for (int64_t i = 0; i < m.hidden; i++) x[i] = double(model.embedding.at(token, i)) * m.embedding_scale;
        for (size_t l = 0; l < model.blocks.size(); l++) {
            const Block& b = model.blocks[l];
            const Row attended = attention(l, normed(x, b.norms[0]));
            add(x, project(b.rotations[1], b.lows[1], b.o, b.biases[1], model.options.o, attended, b.o_stripes), b.norms[1]);
            const Row inside = normed(x, b.norms[2]);
            if (model.options.gate.active)
                add(x, chosen(b, inside), b.norms[3]);
            else
                add(x, project(b.rotations[4], b.lows[4], b.down, b.biases[5], model.options.down, expanded(b, inside)), b.norms[3]);
        }
        const Row last = normed(x, model.final_norm);
        Row logits = project(model.turn, model.low, model.head, model.head_bias, model.options.head, last, model.head_stripes);
        if (m.refined) refine(logits, last);
        for (double& v : logits) {
            v *= m.logit_factor;
            if (m.logit_cap > 0) v = m.logit_cap * tanh(v / m.logit_cap);
        }
        return logits;
    }

  private:
    static double row_size(const Weight& w) {
        const double bytes[] = {4, 2, 1, 0.5 + 2.0 / fmax(1, w.group)};  // of an entry, with the scales of int4
        return double(w.padded) * bytes[w.format];
    }
    Row normed(const Row& x, const std::vector<float>& weight) const {
        double squares = 0;
        for (double v : x) squares += v * v;
        Row y(x);
        const double size = sqrt(squares / double(x.size()) + double(model.decoder.eps));
        for (size_t i = 0; i < x.size(); i++) y[i] = x[i] / size * weight[i];
        return y;
    }
    void add(Row& x, Row more, const std::vector<float>& norm) const {
        if (!norm.empty()) more = normed(more, norm);
        for (size_t i = 0; i < x.size(); i++) x[i] += more[i];
    }
    Row product(const Matrix& m, const std::vector<float>& bias, const Row& x) {  // by outputs
        Row y(m.weight.rows);
        for (size_t o = 0; o < y.size(); o++) {
            y[o] = bias.empty() ? 0 : bias[o];
            for (size_t i = 0; i < x.size(); i++) y[o] += double(m.at(o, i)) * x[i];
        }
        bytes += row_size(m.weight) * double(y.size());
        return y;
    }
    Mask mask(const Rule& rule, const Row& x) {
        Row score(x.size());
        for (size_t i = 0; i < x.size(); i++)
            score[i] = rule.score_of(x[i] - (rule.shift.empty() ? 0 : rule.shift[i]), i);
        closest = fmin(closest, closeness(rule, score));
        return mask_of(rule, score);
    }
    Row project(const Matrix& rotation, const Matrix& low, const Matrix& m, const std::vector<float>& bias, const Place& place,
                Row x, const Granular& stripes = {}) {
        if (!place.active) return granular(stripes, m, bias, x);
        const Row lowered = place.low ? product(low, {}, x) : Row();
        if (place.rotated) x = product(rotation, {}, x);
        const Mask kept = mask(place.rule, x);
        Row y(m.weight.cols);
        for (size_t o = 0; o < y.size(); o++) {
            y[o] = bias.empty() ? 0 : bias[o];
            for (size_t i = 0; i < x.size(); i++)
                if (kept[i]) y[o] += (x[i] - (place.rule.shift.empty() ? 0 : place.rule.shift[i])) * double(m.at(i, o));
            for (size_t r = 0; r < lowered.size(); r++) y[o] += lowered[r] * double(m.at(x.size() + r, o));
        }
        bytes += row_size(m.weight) * double(std::count(kept.begin(), kept.end(), true) + place.low);
        return y;
    }
    // In stripes, whose thresholds are read too; a whole dense product where there are none.
    Row granular(const Granular& all, const Matrix& m, const std::vector<float>& bias, const Row& x) {
        if (all.parts.empty()) return product(m, bias, x);
        Row y;
        for (size_t s = 0; s < all.parts.size(); s++) {
            const Mask kept = mask(all.rules[s], x);
            const Matrix& part = all.parts[s];
            bytes += row_size(part.weight) * double(std::count(kept.begin(), kept.end(), true)) + 4 * double(x.size());
            for (int64_t o = 0; o < part.weight.cols; o++) {
                double sum = bias.empty() ? 0 : bias[y.size()];
                for (size_t i = 0; i < x.size(); i++)
                    if (kept[i]) sum += (x[i] - all.rules[s].shift[i]) * double(part.at(i, o));
                y.push_back(sum);
            }
        }
        return y;
    }
    // Logits of the likely words from all inputs and rows of their own.
    void refine(Row& logits, const Row& x) {
        Row score(logits);
        const double lowest = *std::min_element(logits.begin(), logits.end());
        for (double& v : score) v -= lowest;
        const Rule rule = by_rank(model.decoder.refined);
        closest = fmin(closest, closeness(rule, score));
        const Mask chosen = mask_of(rule, score);
        for (size_t v = 0; v < logits.size(); v++) {
            if (!chosen[v]) continue;
            logits[v] = 0;
            for (size_t i = 0; i < x.size(); i++) logits[v] += double(model.rows.at(v, i)) * x[i];
        }
        bytes += row_size(model.rows.weight) * double(model.decoder.refined);
    }
    // One head after its norm, turned to the last position.
    Row turned(Row x, const std::vector<float>& norm, size_t table, int64_t position) const {
        if (!norm.empty()) x = normed(x, norm);
        const int64_t d = x.size(), half = d / 2;
        const float *cosine = &model.cosine[table][position * d], *sine = &model.sine[table][position * d];
        Row y(d);
        for (int64_t i = 0; i < d; i++) y[i] = x[i] * cosine[i] + (i < half ? -x[i + half] : x[i - half]) * sine[i];
        return y;
    }
    // What a cache gives back. Between two bfloat16 numbers the rounding must not hang on the float32 one before it, whose
    // error is some 5 times smaller than a score's.
    double cached(double x) {
        if (model.options.cache_format == FORMAT_F32) return x;
        const double rounded = wide(bf16(float(x))), half = ldexp(1, ilogb(x) - 8);
        closest = fmin(closest, 5 * fabs(half - fabs(x - rounded)) / fabs(x));
        return rounded;
    }
    Row attention(size_t l, const Row& x) {
        const Decoder& m = model.decoder;
        const Block& b = model.blocks[l];
        const int64_t d = m.head_dim, position = keys[l].size();
        const Row qkv = project(b.rotations[0], b.lows[0], b.qkv, b.biases[0], model.options.qkv, x, b.qkv_stripes);
        auto head = [&](int64_t h) { return Row(qkv.begin() + h * d, qkv.begin() + (h + 1) * d); };
        Row key, value, out;
        for (int64_t h = 0; h < m.kv_heads; h++) {
            for (double v : turned(head(m.heads + h), b.norms[5], l % 2, position)) key.push_back(cached(v));
            for (double v : head(m.heads + m.kv_heads + h)) value.push_back(cached(v));
        }
        keys[l].push_back(key), values[l].push_back(value);
        const int64_t window = l ? model.options.window : 0, start = window ? std::max<int64_t>(0, position + 1 - window) : 0;
        bytes += double((position + 1 - start) * 2 * m.kv_heads * d * (m.cache_format == FORMAT_F32 ? 4 : 2));
        for (int64_t h = 0; h < m.heads; h++) {
            const Row query = turned(head(h), b.norms[4], l % 2, position);
            const int64_t base = h / (m.heads / m.kv_heads) * d;
            double total = 0;
            Row sums(d);
            for (int64_t t = start; t <= position; t++) {
                double score = 0;
                for (int64_t i = 0; i < d; i++) score += query[i] * keys[l][t][base + i] * m.scaling;
                if (m.attention_cap > 0) score = m.attention_cap * tanh(score / m.attention_cap);
                total += exp(score);
                for (int64_t i = 0; i < d; i++) sums[i] += exp(score) * values[l][t][base + i];
            }
            for (double v : sums) out.push_back(v / total);
        }
        return out;
    }
    void activate(Row& g) const {
        for (double& v : g) v = activated({v, 0}, model.options.activation).value;
    }
    Row expanded(const Block& b, const Row& x) {
        Row g, u;
        if (model.options.up.active) {
            const Row both = project(b.rotations[2], b.lows[2], b.gate_up, b.biases[4], model.options.up, x);
            const auto middle = both.begin() + model.decoder.neurons;
            g.assign(both.begin(), middle), u.assign(middle, both.end());
        } else {
            g = product(b.gate, b.biases[2], x), u = product(b.up, b.biases[3], x);
        }
        activate(g);
        for (size_t j = 0; j < g.size(); j++) g[j] *= u[j];
        return g;
    }
    Row chosen(const Block& b, const Row& x) {
        Row g = granular(b.gate_stripes, b.gate, b.biases[2], x), y(model.decoder.hidden);
        activate(g);
        const Mask kept = mask(model.options.gate.rule, g);
        const double before = bytes + (model.options.gate.rule.each.empty() ? 0 : 4 * double(g.size()));
        const Row u = product(b.up, b.biases[3], x);
        bytes = before + (row_size(b.up.weight) + row_size(b.down.weight)) * double(std::count(kept.begin(), kept.end(), true));
        for (size_t o = 0; o < y.size(); o++) {
            y[o] = b.biases[5].empty() ? 0 : b.biases[5][o];
            for (size_t j = 0; j < g.size(); j++)
                if (kept[j]) y[o] += g[j] * u[j] * double(b.down.at(j, o));
        }
        return y;
    }
};
