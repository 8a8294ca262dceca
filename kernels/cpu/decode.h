// One token through all layers, as one thread of a team sees it.
//
// Every thread keeps its own copy of the residual stream and normalises it by itself: that is cheaper than waiting for
// another thread to do it. Threads meet where a projection's outputs are needed in full.
#pragma once
#include "attention.h"
#include "decode_args.h"
#include "ops.h"
#include "stripes.h"

namespace ISA {

static inline void rms_norm(const float* x, const float* weight, int64_t n, int64_t padded, float eps, float* out) {
    float total = 0.0f;
    int64_t i = 0;
    vf squares = (vf){};
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < n; i++) total += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf((sum(squares) + total) / n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
    for (i = n; i < padded; i++) out[i] = 0.0f;
}

static inline double entry_size(const Weight& w) {
    const double bytes[] = {4.0, 2.0, 1.0, 0.5 + 2.0 / (w.group > 0 ? w.group : 32)};
    return bytes[w.format];
}
static inline double row_size(const Weight& w) { return entry_size(w) * w.padded; }

static inline void note(const Team& team, const DecodeStep& s, double bytes) {
    if (team.index == 0) s.bytes[0] += bytes;
}

// x, private and zero in the padding, in the order in which rows of w are read; in `wide` where that is another.
static inline const float* arranged(const Weight& w, const float* x, float* wide) {
    if (w.format != FORMAT_BF16) return x;
    arrange<BF16>(x, w.padded, wide);
    return wide;
}

// y = W x for this thread's rows; x: arranged.
static inline void rows_of(const Team& team, const Weight& w, const float* bias, const float* x, float* y) {
    const int64_t begin = team.begin(w.rows), end = team.end(w.rows);
    WITH_FORMAT(w, dot_rows<F>(w, 0, begin, end, x, 0, 1, y));
    for (int64_t row = begin; bias && row < end; row++) y[row] += bias[row];
}

// Where a projection's sums go before all threads have met; after that `fetch` has its outputs.
struct Output {
    const Weight* w;
    const float* bias;
    float *y, *partial;  // partial: where the rows were divided, else null
};

// Outputs [from, to) of a projection, which all threads have finished, into `out` (y itself, where it is there already).
static inline const float* fetch(const Output& p, int64_t from, int64_t to, float* out) {
    if (!p.partial) return p.y + from;
    sum_parts(*p.w, p.bias, p.partial, 1, 0, from, to, out);
    return out;
}

// The sums of rows `b.rows`, times factors, `count` of them.
static inline Output add_kept(const Team& team, const Scratch& b, const Weight& w, const float* bias, const float* factors,
                              int64_t count, float* y, float* partial) {
    if (by_rows(w, 1, team.size)) {
        add_parts(team, w, b.rows, factors, count, 1, partial);
        return Output{&w, bias, y, partial};
    }
    int64_t begin, end;
    split(team, w, &begin, &end);
    columns(w, b.rows, factors, count, bias, Vectors{y, 0, FORMAT_F32, 1}, b.acc, begin, end);
    return Output{&w, bias, y, 0};
}

// y = projection of x in stripes, whose thresholds count among the bytes: there are as many as weights of one output a stripe.
static void project_stripes(const Team& team, const DecodeStep& s, const Stripes& all, const float* bias, const float* x, float* y) {
    const Vectors out = {y, 0, FORMAT_F32, 1};
    double bytes = 0;
    each_stripe(team, all.first, all.count, x, 0, SHARE_OWN, bias, out, s.scratch[team.index],
                [&](const Stripe& stripe, int64_t from, int64_t to, int64_t rows) {
                    const Weight& w = stripe.weight;
                    bytes += entry_size(w) * (to - from) * rows;
                    if (from == 0 && stripe.select.threshold_each) bytes += 4.0 * w.rows;
                });
    s.bytes[team.index] += bytes;
}

// y = projection of x: dense, in stripes, or without the inputs that the site drops. Threads have to meet before they use it.
static Output project(const Team& team, const DecodeStep& s, const Weight& w, const float* bias, const Site& site,
                      const Stripes& stripes, const float* x, float* y, float* partial) {
    const Scratch& b = s.scratch[team.index];
    if (stripes.count) {
        project_stripes(team, s, stripes, bias, x, y);
        return Output{&w, bias, y, 0};
    }
    if (!site.active) {
        rows_of(team, w, bias, arranged(w, x, s.wide[team.index]), y);
        note(team, s, row_size(w) * w.rows);
        return Output{&w, bias, y, 0};
    }
    const int64_t extra = site.lowered ? site.low.rows : 0, inputs = w.rows - extra;
    if (site.lowered) {
        rows_of(team, site.low, 0, arranged(site.low, x, s.wide[team.index]), s.lowered);
        note(team, s, row_size(site.low) * extra);
        if (!site.rotated) team.wait();
    }
    if (site.rotated) {
        rows_of(team, site.rotation, 0, arranged(site.rotation, x, s.wide[team.index]), s.rotated);
        note(team, s, row_size(site.rotation) * site.rotation.rows);
        team.wait();
        x = s.rotated;
    }
    int64_t kept;
    int64_t count = choose_rows(site.select, x, 0, inputs, 1, SHARE_OWN, b, &kept);
    for (int64_t r = 0; r < extra; r++, count++) b.rows[count] = (int32_t)(inputs + r), b.factors[count] = s.lowered[r];
    note(team, s, row_size(w) * count);
    return add_kept(team, b, w, bias, b.factors, count, y, partial);
}

static void attend(const Team& team, const DecodeStep& s, const Layer& layer, const Output& projected) {
    const Decoder& m = *s.model;
    const float* cosine = m.cosine[layer.rope] + s.position * m.head_dim;
    const float* sine = m.sine[layer.rope] + s.position * m.head_dim;
    const int64_t q = m.heads, kv = m.kv_heads, d = m.head_dim;
    float *own = s.wide[team.index], *key = own;
    for (int64_t h = team.begin(kv); h < team.end(kv); h++) {
        const int64_t at = (h * m.capacity + s.position) * d;
        const float* found = fetch(projected, (q + h) * d, (q + h + 1) * d, key);
        if (layer.norm_k)
            rms_norm(found, layer.norm_k, d, d, m.eps, key);
        else if (found != key)
            __builtin_memcpy(key, found, d * sizeof(float));
        rotate(key, cosine, sine, d);
        remember(layer.keys, m.cache_format, at, key, d);
        remember(layer.values, m.cache_format, at, fetch(projected, (q + kv + h) * d, (q + kv + h + 1) * d, key), d);
    }
    const int64_t first = team.begin(q), last = team.end(q);
    const float* queries = first < last ? fetch(projected, first * d, last * d, own) : own;
    for (int64_t h = first; h < last; h++) {
        float* query = own + (h - first) * d;
        if (layer.norm_q)
            rms_norm(queries + (h - first) * d, layer.norm_q, d, d, m.eps, query);
        else if (queries != own)
            __builtin_memcpy(query, queries + (h - first) * d, d * sizeof(float));
        rotate(query, cosine, sine, d);
    }
    team.wait();
    const int64_t start = layer.window > 0 && s.position >= layer.window ? s.position - layer.window + 1 : 0;
    note(team, s, 2.0 * kv * d * (s.position + 1 - start) * (m.cache_format == FORMAT_F32 ? 4 : 2));
    for (int64_t h = first; h < last;) {
        const int64_t shared = h / (q / kv), after = (shared + 1) * (q / kv), end = after < last ? after : last;
        const int together = (int)(end - h < HEADS_TOGETHER ? end - h : HEADS_TOGETHER);
        attention_heads(together, own + (h - first) * d, layer.keys, layer.values, m.cache_format, shared * m.capacity * d, start,
                        s.position + 1, d, m.scaling, m.attention_cap, s.scores[team.index], scores_pitch(m.capacity),
                        s.attention + h * d);
        h += together;
    }
    team.wait();
}

// The down projection's inputs where neurons are not chosen by the gate: all of them, in s.products.
static void expand(const Team& team, const DecodeStep& s, const Layer& layer, const float* x) {
    const Decoder& m = *s.model;
    const int64_t first = team.begin(m.neurons), last = team.end(m.neurons), n = m.neurons;
    if (layer.at_up.active) {
        const Output both = project(team, s, layer.gate_up, layer.gate_up_bias, layer.at_up, {}, x, s.gates, s.partial[0]);
        team.wait();
        float* wide = s.wide[team.index];
        const float* gates = fetch(both, first, last, wide);
        __builtin_memcpy(s.products + first, gates, (last - first) * sizeof(float));
        activate(s.products + first, last - first, m.activation);
        const float* ups = fetch(both, n + first, n + last, wide);
        for (int64_t j = first; j < last; j++) s.products[j] *= ups[j - first];
    } else {
        x = arranged(layer.gate, x, s.wide[team.index]);
        rows_of(team, layer.gate, layer.gate_bias, x, s.gates);
        activate(s.gates + first, last - first, m.activation);
        rows_of(team, layer.up, layer.up_bias, x, s.products);
        for (int64_t j = first; j < last; j++) s.products[j] *= s.gates[j];
        note(team, s, row_size(layer.gate) * n + row_size(layer.up) * n);
    }
    team.wait();
}

static Output contract(const Team& team, const DecodeStep& s, const Layer& layer) {
    const Decoder& m = *s.model;
    const Scratch& b = s.scratch[team.index];
    const Site& site = layer.at_down;
    const int64_t padded = site.rotated   ? site.rotation.padded
                           : site.lowered ? site.low.padded
                           : site.active  ? m.neurons
                                          : layer.down.padded;
    __builtin_memcpy(b.x, s.products, m.neurons * sizeof(float));
    for (int64_t i = m.neurons; i < padded; i++) b.x[i] = 0.0f;
    return project(team, s, layer.down, layer.down_bias, layer.at_down, {}, b.x, s.ffn, s.partial[1]);
}

// The FFN where the gate chooses neurons, whose rows of `up` and `down` alone are read.
static Output choose_neurons(const Team& team, const DecodeStep& s, const Layer& layer, const float* x) {
    const Decoder& m = *s.model;
    const Scratch& b = s.scratch[team.index];
    if (layer.stripes_gate.count) {
        project_stripes(team, s, layer.stripes_gate, layer.gate_bias, x, s.gates);
        team.wait();  // a thread's stripes are not the neurons that it activates
    }
    x = arranged(layer.up, x, s.wide[team.index]);
    if (!layer.stripes_gate.count) {
        rows_of(team, layer.gate, layer.gate_bias, x, s.gates);
        note(team, s, row_size(layer.gate) * m.neurons);
    }
    const int64_t first = team.begin(m.neurons), last = team.end(m.neurons);
    activate(s.gates + first, last - first, m.activation);
    team.wait();
    int64_t kept;
    const Select& rule = layer.at_gate.select;
    const int64_t count = choose_rows(rule, s.gates, 0, m.neurons, 1, SHARE_OWN, b, &kept);
    note(team, s, (row_size(layer.up) + row_size(layer.down)) * count + (rule.threshold_each ? 4.0 * m.neurons : 0.0));
    SparseGlu call = {};
    call.up = &layer.up, call.down = &layer.down, call.up_bias = layer.up_bias;
    call.x.batch = 1, call.h = s.products, call.partial = s.partial[1];
    Scratch own = b;
    own.x = (float*)x;
    if (by_rows(layer.down, 1, team.size)) {
        products_and_parts(team, call, own, count);
        return Output{&layer.down, layer.down_bias, s.ffn, s.partial[1]};
    }
    products(call, own, team.begin(count), team.end(count), team.end(count));
    team.wait();
    return add_kept(team, b, layer.down, layer.down_bias, s.products, count, s.ffn, 0);
}

static inline void add_residual(float* x, const float* out, const float* norm, int64_t n, float eps, float* scratch) {
    const float* more = out;
    if (norm) {
        rms_norm(out, norm, n, n, eps, scratch);
        more = scratch;
    }
    for (int64_t i = 0; i < n; i++) x[i] += more[i];
}

// A row as floats, but for the scales of int8. scales: scratch for one float a group.
template <class F> static inline void read_row(const Weight& w, int64_t row, float* out, float* scales) {
    if (F::scaled) read_scales<F>(w, row, 0, w.padded / F::shared, 1.0f, scales);
    F line(w, row, 0);
    for (int64_t c = 0; c < w.padded; c += F::unit, line.advance())
        for (int v = 0; v < F::unit / LANES; v++)
            store(out + c + v * LANES, F::scaled ? line.get(v) * scales[(c + v * LANES) / F::shared] : line.get(v));
    settle<F>(out, w.padded);
}

// Logits of the words whose logits are the largest so far, from all inputs. x: normalised, private. All logits are there.
static void refine(const Team& team, const DecodeStep& s, const float* x) {
    const Decoder& m = *s.model;
    const auto place = [&](int64_t thread) { return m.vocabulary * thread / team.size; };
    float sample[SAMPLE];
    uint32_t keys[SAMPLE + KEYS_MORE];
    const float floor = likely_floor(s.logits, m.vocabulary, m.refined, sample, keys);
    const int64_t first = place(team.index), after = place(team.index + 1);
    // Each thread's own piece of `among`, which is written in whole vectors.
    s.found[team.index] = keep_from(s.logits, first, after, floor, s.among + first + team.index * ROWS_MORE);
    note(team, s, row_size(m.head_rows) * m.refined);
    x = arranged(m.head_rows, x, s.wide[team.index]);
    team.wait();
    if (team.index == 0) {
        int64_t count = s.found[0];
        for (int64_t t = 1; t < team.size; count += s.found[t++])
            __builtin_memmove(s.among + count, s.among + place(t) + t * ROWS_MORE, s.found[t] * sizeof(int32_t));
        keep_largest(s.logits, m.vocabulary, m.refined, count, s.words, s.order, s.among, s.keys);
    }
    team.wait();
    const int64_t begin = team.begin(m.refined), end = team.end(m.refined);
    WITH_FORMAT(m.head_rows, dot_rows<F>(m.head_rows, s.words, begin, end, x, 0, 1, s.order));
    for (int64_t i = begin; i < end; i++) s.logits[s.words[i]] = s.order[i];
    team.wait();
}

// Logits, before they are scaled. x: normalised, private.
static void head(const Team& team, const DecodeStep& s, const float* x) {
    const Decoder& m = *s.model;
    const Output found = project(team, s, m.head, m.head_bias, m.at_head, m.stripes_head, x, s.logits, s.partial[0]);
    if (!m.at_head.active && !m.stripes_head.count) return;
    team.wait();  // what a thread has summed are not the logits that it scales
    if (found.partial) {
        const int64_t first = team.begin(m.vocabulary), last = team.end(m.vocabulary);
        fetch(found, first, last, s.logits + first);
        if (m.refined) team.wait();
    }
    if (m.refined) refine(team, s, x);
}

static void decode(const Team& team, const DecodeStep& s) {
    const Decoder& m = *s.model;
    const Scratch& b = s.scratch[team.index];
    float* x = s.residual[team.index];
    WITH_FORMAT(m.embedding, read_row<F>(m.embedding, s.token, b.value, b.score));
    const float factor =
        m.embedding_scale * (m.embedding.format == FORMAT_I8 ? ((const float*)m.embedding.scales)[s.token] : 1.0f);
    for (int64_t i = 0; i < m.hidden; i++) x[i] = b.value[i] * factor;
    for (int64_t l = 0; l < m.layer_count; l++) {
        const Layer& layer = m.layers[l];
        const int64_t wide = m.hidden + 128;
        rms_norm(x, layer.norm_attention, m.hidden, wide, m.eps, b.x);
        const Output qkv = project(team, s, layer.qkv, layer.qkv_bias, layer.at_qkv, layer.stripes_qkv, b.x, s.qkv, s.partial[0]);
        team.wait();
        attend(team, s, layer, qkv);
        const int64_t width = m.heads * m.head_dim;
        __builtin_memcpy(b.x, s.attention, width * sizeof(float));
        for (int64_t i = width; i < width + 128; i++) b.x[i] = 0.0f;
        const Output out = project(team, s, layer.o, layer.o_bias, layer.at_o, layer.stripes_o, b.x, s.out, s.partial[1]);
        team.wait();
        add_residual(x, fetch(out, 0, m.hidden, b.score), layer.norm_after_attention, m.hidden, m.eps, b.value);
        rms_norm(x, layer.norm_ffn, m.hidden, wide, m.eps, b.x);
        if (!layer.at_gate.active) expand(team, s, layer, b.x);
        const Output ffn = layer.at_gate.active ? choose_neurons(team, s, layer, b.x) : contract(team, s, layer);
        team.wait();
        add_residual(x, fetch(ffn, 0, m.hidden, b.score), layer.norm_after_ffn, m.hidden, m.eps, b.value);
    }
    rms_norm(x, m.final_norm, m.hidden, m.hidden + 128, m.eps, b.x);
    head(team, s, b.x);
    for (int64_t v = team.begin(m.vocabulary); v < team.end(m.vocabulary); v++) {
        s.logits[v] *= m.logit_factor;
        if (m.logit_cap > 0.0f) s.logits[v] = m.logit_cap * __builtin_tanhf(s.logits[v] / m.logit_cap);
    }
}

}  // namespace ISA
