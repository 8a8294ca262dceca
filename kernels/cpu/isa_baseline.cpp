// What every processor of the target has: SSE2 on x86-64, NEON on 64-bit ARM.
#define ISA baseline
#define LANES 4
#define ISA_LEVEL 0
#include "table.h"
