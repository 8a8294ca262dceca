// Which OpenMP runtime and which instruction set are in use.
#pragma once
#include "kernels.h"

void use_runtime(void* parallel, void* index, void* size);
bool has_runtime();
// The best instruction set of this processor that `limit` admits (null: any); null for an unknown name.
const Kernels* choose_kernels(const char* limit);
