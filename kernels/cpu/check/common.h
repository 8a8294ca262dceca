// What all checks share: random numbers, the count of failures, and how far a float32 result may be from the true one.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../types.h"

extern "C" {
int sparsity_input_sparse(const Weight*, const Select*, const Vectors*, const Vectors*, const float*, int32_t, int64_t*, int);
int sparsity_striped(const Stripe*, int64_t, int64_t, const Vectors*, const Vectors*, const float*, int32_t, int64_t*, int);
int sparsity_dense(const Weight*, const Vectors*, const Vectors*, const float*, int);
int sparsity_glu(const Weight*, const Vectors*, const Weight*, const Weight*, const float*, const float*, const float*,
                 const Select*, int32_t, int32_t, const Vectors*, const Vectors*, int64_t*, int);
int sparsity_nm_select(const Select*, int64_t, const Vectors*, const Vectors*, int32_t, uint8_t*, int);
}

constexpr double EPS = 0x1p-24;  // half a unit in the last place of a float32 near 1

inline std::mt19937 engine;
inline int failures = 0, compared = 0;
inline uint64_t selections = 0xcbf29ce484222325;  // every bit that N:M pruning gives, as one number

inline float normal() { return std::normal_distribution<float>()(engine); }
inline int below(int n) { return int(engine() % unsigned(n)); }

inline std::vector<float> normals(int64_t n, float size = 1) {
    std::vector<float> found(n);
    for (float& v : found) v = size * normal();
    return found;
}

// Counts one comparison; says which one failed.
template <class... More> void expect(bool right, const char* format, More... more) {
    compared++;
    if (right) return;
    if (failures++ < 10) printf(format, more...), printf("\n");
}

// A true value, and the most by which a float32 computation of it may be wrong: each rounding of a sum of n terms is at most
// EPS times the sum of their sizes.
struct Bounded {
    double value = 0, error = 0;
};

class Sum {
  public:
    void add(double product, double error = 0) { total += product, size += fabs(product), errors += error, terms++; }
    // The sum times `factor`, plus `more`. 8: the roundings of products, scales and of what is added at the end.
    Bounded times(double factor, double more = 0) const {
        const double value = total * factor + more;
        return {value, (terms + 8) * EPS * (size * fabs(factor) + fabs(more)) + 1.01 * errors * fabs(factor)};
    }

  private:
    double total = 0, size = 0, errors = 0;
    int64_t terms = 0;
};

// Whether a result is as near as it has to be; NaN and infinity have to be the same.
inline bool near(float found, const Bounded& expected, double relative = 0) {
    if (isnan(expected.value)) return isnan(found);
    if (isinf(expected.value)) return found == expected.value;
    return fabs(found - expected.value) <= expected.error + relative * fabs(expected.value) + 1e-37;
}

void check_operators();  // check_operators.cpp
void check_edges();      // check_edges.cpp
void check_bits();       // check_bits.cpp
void check_nm();         // check_nm.cpp
void check_decoder();    // check_decoder.cpp
