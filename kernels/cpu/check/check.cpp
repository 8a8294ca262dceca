// The operators against slow, obvious loops, without Python: for sanitizers, and for processors that are only emulated.
//
//   check ISA [seed]     exits with 0 and one line, or says what differed
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <thread>
#include <vector>

#include "../types.h"

extern "C" {
int sparsity_start(const char*, void*, void*, void*);
const char* sparsity_isa();
int sparsity_input_sparse(const Weight*, const Select*, int64_t, int64_t, const Vectors*, const Vectors*, const float*, int32_t,
                          int64_t*, int);
int sparsity_dense(const Weight*, const Vectors*, const Vectors*, const float*, int);
int sparsity_glu(const Weight*, const Weight*, const Weight*, const float*, const float*, const float*, const Select*, int32_t,
                 int32_t, const Vectors*, const Vectors*, int64_t*, int);
}

namespace {

std::mt19937 engine;
int failures = 0, compared = 0;

float normal() { return std::normal_distribution<float>()(engine); }

// A pool for the team: what OpenMP's GOMP_parallel does, with threads of the standard library.
thread_local int my_index = 0, my_size = 1;
int index_of() { return my_index; }
int size_of() { return my_size; }
void parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; i++)
        others.emplace_back([=] { my_index = int(i), my_size = int(threads), function(data); });
    my_index = 0, my_size = int(threads);
    function(data);
    my_size = 1;
    for (std::thread& each : others) each.join();
}

struct Matrix {  // exactly as large as it says, so that a sanitizer sees every step beyond
    std::vector<float> values;  // what is stored, in float
    std::vector<uint8_t> data;
    std::vector<uint8_t> scales;
    Weight weight;
    float at(int64_t row, int64_t col) const { return values[row * weight.cols + col]; }
};

uint16_t bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float wide(uint16_t h) {
    uint32_t bits = uint32_t(h) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

Matrix matrix(int64_t rows, int64_t cols, int32_t format, int32_t group, bool scale_by_row) {
    const int unit[] = {16, 32, 64, 128};
    const int64_t padded = (cols + unit[format] - 1) / unit[format] * unit[format];
    Matrix m;
    m.values.resize(rows * cols);
    const int64_t bits[] = {32, 16, 8, 4};
    m.data.assign(rows * padded * bits[format] / 8, 0);
    if (format == FORMAT_I8) m.scales.resize((scale_by_row ? rows : cols) * 4);
    if (format == FORMAT_I4) m.scales.resize(rows * padded / group * 2);
    float* by_output = reinterpret_cast<float*>(m.scales.data());
    uint16_t* by_group = reinterpret_cast<uint16_t*>(m.scales.data());
    if (format == FORMAT_I8)
        for (size_t i = 0; i < m.scales.size() / 4; i++) by_output[i] = 0.01f + 0.001f * float(i % 7);
    if (format == FORMAT_I4)
        for (size_t i = 0; i < m.scales.size() / 2; i++) by_group[i] = bf16(0.05f + 0.01f * float(i % 5));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const int64_t at = r * padded + c;
            float& value = m.values[r * cols + c];
            if (format == FORMAT_F32) {
                value = normal();
                memcpy(&m.data[at * 4], &value, 4);
            } else if (format == FORMAT_BF16) {
                const uint16_t h = bf16(normal());
                value = wide(h);
                memcpy(&m.data[at * 2], &h, 2);
            } else if (format == FORMAT_I8) {
                const int8_t q = int8_t(int(engine() % 255) - 127);
                value = float(q) * by_output[scale_by_row ? r : c];
                memcpy(&m.data[at], &q, 1);
            } else {
                const int level = int(engine() % 16);
                value = float(level - 8) * wide(by_group[at / group]);
                uint32_t word;
                uint8_t* place = &m.data[(r * padded + c / 128 * 128) / 2 + (c % 16) * 4];
                memcpy(&word, place, 4);
                word |= uint32_t(level) << (4 * (c % 128 / 16));
                memcpy(place, &word, 4);
            }
        }
    m.weight = Weight{m.data.data(), m.scales.empty() ? nullptr : m.scales.data(), rows, cols, padded, padded, format, group};
    return m;
}

void compare(const char* what, const std::vector<float>& found, const std::vector<double>& expected, double size) {
    compared++;
    for (size_t i = 0; i < found.size(); i++)
        if (!(fabs(found[i] - expected[i]) <= 1e-4 * (size + fabs(expected[i])))) {
            if (failures++ < 5) printf("%s: entry %zu is %g, expected %g\n", what, i, found[i], expected[i]);
            return;
        }
}

// Mask by the definition: larger score first, then lower index.
std::vector<bool> mask_of(const std::vector<float>& score, const Select& s) {
    const size_t n = score.size();
    std::vector<bool> mask(n);
    for (size_t i = 0; i < n; i++) {
        int64_t before = 0;
        for (size_t j = 0; j < n; j++) before += score[j] > score[i] || (score[j] == score[i] && j < i);
        mask[i] = s.by_rank ? before < s.k : !(score[i] <= s.threshold);
    }
    return mask;
}

void input_sparse(int32_t format, int32_t group, int64_t inputs, int64_t outputs, int tokens, int threads, Select rule) {
    const Matrix m = matrix(inputs, outputs, format, group, false);
    std::vector<float> x(tokens * inputs), y(tokens * outputs, -1), bias(outputs);
    for (float& v : x) v = float(int(engine() % 9) - 4) * 0.25f;  // with many ties
    for (float& v : bias) v = normal();
    const Vectors in{x.data(), inputs, FORMAT_F32, tokens}, out{y.data(), outputs, FORMAT_F32, tokens};
    const int status = sparsity_input_sparse(&m.weight, &rule, 1, 0, &in, &out, bias.data(), SHARE_OWN, nullptr, threads);
    std::vector<double> expected(y.size());
    for (int t = 0; t < tokens; t++) {
        std::vector<float> score(inputs);
        for (int64_t i = 0; i < inputs; i++) score[i] = fabsf(x[t * inputs + i]);
        const std::vector<bool> mask = mask_of(score, rule);
        for (int64_t o = 0; o < outputs; o++) {
            double total = bias[o];
            for (int64_t i = 0; i < inputs; i++) total += mask[i] ? double(x[t * inputs + i]) * m.at(i, o) : 0.0;
            expected[t * outputs + o] = total;
        }
    }
    if (status) failures++, printf("input_sparse: status %d\n", status);
    compare("input_sparse", y, expected, sqrt(double(inputs)));
}

// The middle of the widest gap among the middle half of the scores: masks must not hang on the rounding of a sum.
float widest_gap(std::vector<double> scores) {
    std::sort(scores.begin(), scores.end());
    const size_t n = scores.size();
    size_t best = n / 4;
    for (size_t i = n / 4; i + 1 < n && i < 3 * n / 4; i++)
        if (scores[i + 1] - scores[i] > scores[best + 1 < n ? best + 1 : best] - scores[best]) best = i;
    return best + 1 < n ? float((scores[best] + scores[best + 1]) / 2) : -1.0f;
}

void glu(int32_t format, int32_t group, int64_t inputs, int64_t neurons, int tokens, int threads) {
    const Matrix gate = matrix(neurons, inputs, format, group, true), up = matrix(neurons, inputs, format, group, true);
    const Matrix down = matrix(neurons, inputs, format, group, false);
    std::vector<float> x(tokens * inputs), y(tokens * inputs, -1);
    for (float& v : x) v = normal();
    std::vector<double> g(tokens * neurons), u(tokens * neurons), scores;
    for (int t = 0; t < tokens; t++)
        for (int64_t j = 0; j < neurons; j++) {
            double& product = g[t * neurons + j];
            for (int64_t i = 0; i < inputs; i++) {
                product += double(gate.at(j, i)) * x[t * inputs + i];
                u[t * neurons + j] += double(up.at(j, i)) * x[t * inputs + i];
            }
            product /= 1 + ::exp(-product);
            scores.push_back(fabs(product));
        }
    const Select rule{nullptr, nullptr, nullptr, widest_gap(scores), 0, 0};
    const Vectors in{x.data(), inputs, FORMAT_F32, tokens}, out{y.data(), inputs, FORMAT_F32, tokens};
    int64_t kept = -1, expected_kept = 0;
    const int status = sparsity_glu(&gate.weight, &up.weight, &down.weight, nullptr, nullptr, nullptr, &rule, ACT_SILU, SHARE_OWN,
                                    &in, &out, &kept, threads);
    std::vector<double> expected(y.size());
    double largest = 1;
    for (int64_t j = 0; j < neurons; j++) {
        bool any = false;
        for (int t = 0; t < tokens; t++) {
            const double h = g[t * neurons + j] * u[t * neurons + j];
            if (scores[t * neurons + j] <= rule.threshold) continue;
            any = true;
            for (int64_t o = 0; o < inputs; o++) {
                expected[t * inputs + o] += h * down.at(j, o);
                largest = fmax(largest, fabs(h * down.at(j, o)));
            }
        }
        expected_kept += any;
    }
    if (status || kept != expected_kept)
        failures++, printf("glu: status %d, kept %ld of %ld\n", status, long(kept), long(expected_kept));
    compare("glu", y, expected, largest * double(neurons) / 100);
}

void dense(int32_t format, int32_t group, int64_t inputs, int64_t outputs, int tokens, int threads) {
    const Matrix m = matrix(outputs, inputs, format, group, true);
    std::vector<float> x(tokens * inputs), y(tokens * outputs, -1);
    for (float& v : x) v = normal();
    const Vectors in{x.data(), inputs, FORMAT_F32, tokens}, out{y.data(), outputs, FORMAT_F32, tokens};
    if (sparsity_dense(&m.weight, &in, &out, nullptr, threads)) failures++, printf("dense: refused\n");
    std::vector<double> expected(y.size());
    for (int t = 0; t < tokens; t++)
        for (int64_t o = 0; o < outputs; o++)
            for (int64_t i = 0; i < inputs; i++) expected[t * outputs + o] += double(m.at(o, i)) * x[t * inputs + i];
    compare("dense", y, expected, sqrt(double(inputs)));
}

}  // namespace

int main(int count, char** arguments) {
    const char* isa = count > 1 ? arguments[1] : "baseline";
    engine.seed(count > 2 ? unsigned(atoi(arguments[2])) : 0u);
    if (sparsity_start(isa, reinterpret_cast<void*>(parallel), reinterpret_cast<void*>(index_of), reinterpret_cast<void*>(size_of))) {
        printf("%s is not to be had here\n", isa);
        return 77;
    }
    for (int32_t format = FORMAT_F32; format <= FORMAT_I4; format++)
        for (int32_t group : {32, 128})
            for (int64_t inputs : {1, 7, 130})
                for (int64_t outputs : {1, 33, 257})
                    for (int tokens : {1, 5})
                        for (int threads : {1, 3}) {
                            const Select rules[] = {{nullptr, nullptr, nullptr, 0.5f, 0, 0}, {nullptr, nullptr, nullptr, -1, 0, 0},
                                                    {nullptr, nullptr, nullptr, 1e9f, 0, 0}, {nullptr, nullptr, nullptr, 0, 1, inputs / 2},
                                                    {nullptr, nullptr, nullptr, 0, 1, inputs}};
                            for (const Select& rule : rules) input_sparse(format, group, inputs, outputs, tokens, threads, rule);
                            dense(format, group, inputs, outputs, tokens, threads);
                            glu(format, group, outputs, inputs, tokens, threads);
                        }
    const Vectors none{nullptr, 0, FORMAT_F32, 1};
    const Matrix m = matrix(3, 4, FORMAT_F32, 32, true);
    if (sparsity_dense(&m.weight, &none, &none, nullptr, 1) != 1 || sparsity_dense(nullptr, &none, &none, nullptr, 1) != 1)
        failures++, printf("null pointers were not refused\n");
    printf("%s: %d comparisons, %d failures\n", sparsity_isa(), compared, failures);
    return failures ? 1 : 0;
}
