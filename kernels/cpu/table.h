// Ends every isa_*.cpp: its table of operators.
#pragma once
#include "decode.h"
#include "kernels.h"
#include "nm.h"
#include "stripes.h"

namespace ISA {

// Reads every byte once and returns something that depends on all: what the memory gives to these threads.
static double read_all(const Team& team, const void* data, int64_t bytes) {
    const float* p = (const float*)data;
    const int64_t lines = bytes / 256;
    vf total[4] = {(vf){}, (vf){}, (vf){}, (vf){}};
    for (int64_t i = team.begin(lines); i < team.end(lines); i++)
        for (int v = 0; v < 64 / LANES; v++) total[v % 4] += load(p + i * 64 + v * LANES);
    return sum(total[0] + total[1] + total[2] + total[3]);
}

}  // namespace ISA

#define TABLE_NAME2(isa) kernels_##isa
#define TABLE_NAME(isa) TABLE_NAME2(isa)
#define TEXT2(isa) #isa
#define TEXT(isa) TEXT2(isa)
extern const Kernels TABLE_NAME(ISA);
const Kernels TABLE_NAME(ISA) = {TEXT(ISA), ISA::input_sparse, ISA::striped, ISA::dense, ISA::sparse_glu,
                                  ISA::nm_select, ISA::decode, ISA::read_all};
