// One token through all layers, as one thread of a team sees it.
//
// Every thread keeps its own copy of the residual stream and normalises it by itself: that is cheaper than waiting for
// another thread to do it. Threads meet where a projection's outputs are needed in full.
#pragma once
#include "attention.h"
#include "decode_args.h"
#include "ops.h"

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

static inline double row_size(const Weight& w) {
    const double bits[] = {4.0, 2.0, 1.0, 0.5 + 2.0 / (w.group > 0 ? w.group : 32)};
    return bits[w.format] * w.padded;
}

static inline void note(const Team& team, const DecodeStep& s, double bytes) {
    if (team.index == 0 && s.bytes) *s.bytes += bytes;
}

// y = W x for this thread's rows; x is private and zero in the padding.
static inline void rows_of(const Team& team, const Weight& w, const float* bias, const float* x, float* y) {
    const int64_t begin = team.begin(w.rows), end = team.end(w.rows);
    WITH_FORMAT(w, dot_rows<F>(w, 0, begin, end, x, 0, 1, y));
    for (int64_t row = begin; bias && row < end; row++) y[row] += bias[row];
}

// y = projection of x: dense, or without the inputs that the site drops.
static void project(const Team& team, const DecodeStep& s, const Weight& w, const float* bias, const Site& site, const float* x,
                    float* y) {
    const Scratch& b = s.scratch[team.index];
    if (!site.active) {
        rows_of(team, w, bias, x, y);
        note(team, s, row_size(w) * w.rows);
        return;
    }
    int64_t kept, begin, end;
    const int64_t count = choose_rows(site.select, x, 0, w.rows, 1, SHARE_OWN, b, &kept);
    split(team, w, &begin, &end);
    columns(w, b.rows, b.factors, count, bias, Vectors{y, 0, FORMAT_F32, 1}, b.acc, begin, end);
    note(team, s, row_size(w) * count);
}

static void attend(const Team& team, const DecodeStep& s, const Layer& layer) {
    const Decoder& m = *s.model;
    const float* cosine = m.cosine[layer.rope] + s.position * m.head_dim;
    const float* sine = m.sine[layer.rope] + s.position * m.head_dim;
    const int64_t q = m.heads, kv = m.kv_heads, d = m.head_dim;
    for (int64_t h = team.begin(q + kv); h < team.end(q + kv); h++) {
        const float* norm = h < q ? layer.norm_q : layer.norm_k;
        if (norm) rms_norm(s.qkv + h * d, norm, d, d, m.eps, s.qkv + h * d);
        rotate(s.qkv + h * d, cosine, sine, d);
        if (h < q) continue;
        remember(layer.keys, m.cache_format, ((h - q) * m.capacity + s.position) * d, s.qkv + h * d, d);
        remember(layer.values, m.cache_format, ((h - q) * m.capacity + s.position) * d, s.qkv + (h + kv) * d, d);
    }
    team.wait();
    const int64_t start = layer.window > 0 && s.position >= layer.window ? s.position - layer.window + 1 : 0;
    for (int64_t h = team.begin(q); h < team.end(q); h++) {
        const int64_t base = (h / (q / kv)) * m.capacity * d;
        attention_head(s.qkv + h * d, layer.keys, layer.values, m.cache_format, base, start, s.position + 1, d, m.scaling,
                       m.attention_cap, s.scores[team.index], s.attention + h * d);
    }
    team.wait();
}

// The FFN up to the down projection's inputs; returns how many rows of it are kept, or -1 where none were chosen yet.
static int64_t expand(const Team& team, const DecodeStep& s, const Layer& layer, const float* x) {
    const Decoder& m = *s.model;
    const Scratch& b = s.scratch[team.index];
    const int64_t first = team.begin(m.neurons), last = team.end(m.neurons);
    if (layer.at_up.active) {
        project(team, s, layer.gate_up, layer.gate_up_bias, layer.at_up, x, s.gates);
        team.wait();
        __builtin_memcpy(s.products + first, s.gates + first, (last - first) * sizeof(float));
        activate(s.products + first, last - first, m.activation);
        for (int64_t j = first; j < last; j++) s.products[j] *= s.gates[m.neurons + j];
        team.wait();
        return -1;
    }
    rows_of(team, layer.gate, layer.gate_bias, x, s.gates);
    activate(s.gates + first, last - first, m.activation);
    note(team, s, row_size(layer.gate) * m.neurons);
    if (!layer.at_gate.active) {
        rows_of(team, layer.up, layer.up_bias, x, s.products);
        for (int64_t j = first; j < last; j++) s.products[j] *= s.gates[j];
        note(team, s, row_size(layer.up) * m.neurons);
        team.wait();
        return -1;
    }
    team.wait();
    int64_t kept;
    const int64_t count = choose_rows(layer.at_gate.select, s.gates, 0, m.neurons, 1, SHARE_OWN, b, &kept);
    const int64_t begin = team.begin(count), end = team.end(count);
    WITH_FORMAT(layer.up, dot_rows<F>(layer.up, b.rows, begin, end, x, 0, 1, s.products));
    for (int64_t n = begin; n < end; n++)
        s.products[n] = b.factors[n] * (s.products[n] + (layer.up_bias ? layer.up_bias[b.rows[n]] : 0.0f));
    note(team, s, row_size(layer.up) * count);
    team.wait();
    return count;
}

static void contract(const Team& team, const DecodeStep& s, const Layer& layer, int64_t count) {
    const Decoder& m = *s.model;
    const Scratch& b = s.scratch[team.index];
    if (count >= 0) {
        int64_t begin, end;
        split(team, layer.down, &begin, &end);
        columns(layer.down, b.rows, s.products, count, layer.down_bias, Vectors{s.ffn, 0, FORMAT_F32, 1}, b.acc, begin, end);
        note(team, s, row_size(layer.down) * count);
        return;
    }
    const int64_t padded = layer.at_down.active ? m.neurons : layer.down.padded;
    __builtin_memcpy(b.x, s.products, m.neurons * sizeof(float));
    for (int64_t i = m.neurons; i < padded; i++) b.x[i] = 0.0f;
    project(team, s, layer.down, layer.down_bias, layer.at_down, b.x, s.ffn);
}

static inline void add_residual(float* x, float* out, const float* norm, int64_t n, float eps, float* scratch) {
    const float* more = out;
    if (norm) {
        rms_norm(out, norm, n, n, eps, scratch);
        more = scratch;
    }
    for (int64_t i = 0; i < n; i++) x[i] += more[i];
}

static void decode(const Team& team, const DecodeStep& s) {
    const Decoder& m = *s.model;
    const Scratch& b = s.scratch[team.index];
    float* x = s.residual[team.index];
    WITH_FORMAT(m.embedding, for (int64_t c = 0; c < m.embedding.padded; c += F::unit) {
        const F line(m.embedding, s.token, c);
        for (int v = 0; v < F::unit / LANES; v++) store(b.value + c + v * LANES, line.get(v) * line.scale(v));
    });
    const float factor =
        m.embedding_scale * (m.embedding.format == FORMAT_I8 ? ((const float*)m.embedding.scales)[s.token] : 1.0f);
    for (int64_t i = 0; i < m.hidden; i++) x[i] = b.value[i] * factor;
    for (int64_t l = 0; l < m.layer_count; l++) {
        const Layer& layer = m.layers[l];
        const int64_t wide = m.hidden + 128;
        rms_norm(x, layer.norm_attention, m.hidden, wide, m.eps, b.x);
        project(team, s, layer.qkv, layer.qkv_bias, layer.at_qkv, b.x, s.qkv);
        team.wait();
        attend(team, s, layer);
        const int64_t width = m.heads * m.head_dim;
        __builtin_memcpy(b.x, s.attention, width * sizeof(float));
        for (int64_t i = width; i < width + 128; i++) b.x[i] = 0.0f;
        project(team, s, layer.o, layer.o_bias, layer.at_o, b.x, s.out);
        team.wait();
        add_residual(x, s.out, layer.norm_after_attention, m.hidden, m.eps, b.value);
        rms_norm(x, layer.norm_ffn, m.hidden, wide, m.eps, b.x);
        const int64_t count = expand(team, s, layer, b.x);
        contract(team, s, layer, count);
        team.wait();
        add_residual(x, s.ffn, layer.norm_after_ffn, m.hidden, m.eps, b.value);
    }
    rms_norm(x, m.final_norm, m.hidden, m.hidden + 128, m.eps, b.x);
    rows_of(team, m.head, 0, b.x, s.logits);
    note(team, s, row_size(m.head) * m.head.rows);
    for (int64_t v = team.begin(m.vocabulary); v < team.end(m.vocabulary); v++) {
        s.logits[v] *= m.logit_factor;
        if (m.logit_cap > 0.0f) s.logits[v] = m.logit_cap * __builtin_tanhf(s.logits[v] / m.logit_cap);
    }
}

}  // namespace ISA
