// Decoding one token.
#include "checks.h"
#include "decode_args.h"
#include "workspace.h"

namespace {

int64_t widest(const Decoder& m) {
    int64_t n = m.hidden;
    if (m.heads * m.head_dim > n) n = m.heads * m.head_dim;
    if (m.neurons > n) n = m.neurons;
    auto meet = [&](const Weight& w, const Site& site) {
        if (site.active && w.rows > n) n = w.rows;  // with what is never dropped
    };
    meet(m.head, m.at_head);
    for (int64_t i = 0; i < m.layer_count; i++) {
        const Layer& l = m.layers[i];
        meet(l.qkv, l.at_qkv), meet(l.o, l.at_o), meet(l.gate_up, l.at_up), meet(l.down, l.at_down);
    }
    return n + 128;  // and the padding of the widest line
}

bool fits(const Weight& w, const Site& site, int64_t inputs, int64_t outputs) {
    if (site.rotated && (!site.active || !good(&site.rotation) || site.rotation.rows != inputs || site.rotation.cols != inputs))
        return false;
    if (site.active && !good(site.select, true)) return false;
    if (site.lowered && (!site.active || !good(&site.low) || site.low.cols != inputs ||
                         (site.rotated && site.low.padded != site.rotation.padded)))
        return false;
    const int64_t extra = site.lowered ? site.low.rows : 0;
    return good(&w) && (site.active ? w.rows == inputs + extra && w.cols == outputs : w.rows == outputs && w.cols == inputs);
}

// A projection in stripes, or as one weight.
bool fits(const Weight& w, const Site& site, const Stripes& stripes, int64_t inputs, int64_t outputs) {
    if (!stripes.count) return fits(w, site, inputs, outputs);
    return !site.active && !site.rotated && !site.lowered && good(stripes.first, stripes.count, inputs, outputs, true);
}

bool good(const Decoder& m) {
    if (m.layer_count < 1 || !m.layers || m.hidden < 1 || m.heads < 1 || m.kv_heads < 1 || m.heads % m.kv_heads ||
        m.head_dim < 2 || m.head_dim % 2 || m.neurons < 1 || m.capacity < 1 || m.vocabulary < 1 || !m.final_norm ||
        !m.cosine[0] || !m.sine[0] || m.cache_format > FORMAT_BF16 || m.cache_format < 0)
        return false;
    const Site dense = {};
    if (!fits(m.embedding, dense, m.hidden, m.vocabulary) || !fits(m.head, m.at_head, m.stripes_head, m.hidden, m.vocabulary))
        return false;
    if (m.refined < 0 || m.refined > m.vocabulary ||
        (m.refined && (!m.at_head.active || m.head_bias || !fits(m.head_rows, dense, m.hidden, m.vocabulary))))
        return false;
    const int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    for (int64_t i = 0; i < m.layer_count; i++) {
        const Layer& l = m.layers[i];
        const Site& at_down = l.at_gate.active ? l.at_gate : l.at_down;
        if (!l.norm_attention || !l.norm_ffn || !l.keys || !l.values || l.rope < 0 || l.rope > 1 || !m.cosine[l.rope] ||
            !m.sine[l.rope] || !fits(l.qkv, l.at_qkv, l.stripes_qkv, m.hidden, q + 2 * kv) ||
            !fits(l.o, l.at_o, l.stripes_o, q, m.hidden) ||
            !fits(l.down, at_down, m.neurons, m.hidden) || (l.at_up.active && l.at_gate.active) ||
            (l.at_gate.active && l.at_down.active) || l.at_gate.rotated || l.at_gate.lowered || (l.at_gate.active && l.at_gate.select.repair) ||
            (l.stripes_gate.count && !l.at_gate.active))
            return false;
        if (l.at_up.active ? !fits(l.gate_up, l.at_up, m.hidden, 2 * m.neurons)
                           : !fits(l.gate, dense, l.stripes_gate, m.hidden, m.neurons) ||
                                 !fits(l.up, dense, m.hidden, m.neurons) ||
                                 (!l.stripes_gate.count && l.gate.format != l.up.format))
            return false;
    }
    return true;
}

struct Buffers {
    Scratch scratch[MAX_THREADS];
    float *residual[MAX_THREADS], *scores[MAX_THREADS], *wide[MAX_THREADS];
    float *qkv, *attention, *out, *gates, *products, *ffn, *rotated, *lowered, *partial[2];
    double* bytes;
    float* order;
    int32_t *words, *among;
    uint32_t* keys;
    int64_t* found;
};

void carve_all(Carver& c, const Decoder& m, int threads, Buffers& b) {
    const int64_t n = widest(m);
    for (int i = 0; i < threads; i++) {
        b.scratch[i] = carve(c, n, 1, true);
        b.residual[i] = c.take<float>(m.hidden);
        b.scores[i] = c.take<float>(HEADS_TOGETHER * scores_pitch(m.capacity));
        b.wide[i] = c.take<float>(n);
    }
    b.qkv = c.take<float>((m.heads + 2 * m.kv_heads) * m.head_dim);
    b.attention = c.take<float>(m.heads * m.head_dim);
    b.out = c.take<float>(m.hidden);
    b.gates = c.take<float>(2 * m.neurons);
    b.products = c.take<float>(m.neurons);
    b.ffn = c.take<float>(m.hidden);
    b.rotated = c.take<float>(n);
    b.lowered = c.take<float>(n);
    b.bytes = c.take<double>(threads);
    for (float*& each : b.partial) each = c.take<float>(SHARES * SHARED_SUMS);
    const int64_t words = m.refined ? m.vocabulary : 0;
    b.order = c.take<float>(words);
    b.words = c.take<int32_t>(words + ROWS_MORE);
    b.among = c.take<int32_t>(words + threads * ROWS_MORE);
    b.keys = c.take<uint32_t>(words + KEYS_MORE);
    b.found = c.take<int64_t>(threads);
}

}  // namespace

EXPORT void sparsity_decode_sizes(int64_t* out) {
    out[0] = sizeof(Site);
    out[1] = sizeof(Layer);
    out[2] = sizeof(Decoder);
}

// Whether the structure is sound; asked once, when a decoder is made.
EXPORT int sparsity_decoder_check(const Decoder* model) { return kernels && model && good(*model) ? OK : BAD_ARGUMENT; }

// Logits after `token` at `position`, whose keys and values are written to the cache. `bytes` counts what is read of weights and cache.
EXPORT int sparsity_decode(const Decoder* model, int64_t token, int64_t position, float* logits, double* bytes, int threads) {
    if (!kernels || !model || !logits || token < 0 || token >= model->vocabulary || position < 0 || position >= model->capacity)
        return BAD_ARGUMENT;
    threads = team_of(threads);
    Buffers b;
    Carver count{nullptr};
    carve_all(count, *model, threads, b);
    char* base = workspace.reserve(count.used);
    if (!base) return NO_MEMORY;
    Carver real{base};
    carve_all(real, *model, threads, b);
    for (int i = 0; i < threads; i++) b.bytes[i] = 0;
    DecodeStep step{model, token, position, logits, b.qkv, b.attention, b.out, b.gates, b.products, b.ffn, b.rotated, b.lowered,
                    {b.partial[0], b.partial[1]}, b.bytes, b.scratch, b.residual, b.scores, b.wide, b.order, b.words, b.among,
                    b.keys, b.found};
    run_team([](const Team& team, void* a) { kernels->decode(team, *static_cast<DecodeStep*>(a)); }, &step, threads);
    if (bytes) *bytes = 0;
    for (int i = 0; bytes && i < threads; i++) *bytes += b.bytes[i];
    return OK;
}
