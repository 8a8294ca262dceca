// A team of threads for one call: torch's own OpenMP threads, so that no second pool fights them for the cores.
//
// Nothing here is compiled with -fopenmp: Python finds GOMP_parallel in the runtime that torch has loaded and hands it
// over (api.cpp). Without one, a team is the calling thread alone.
#pragma once
#include <stdint.h>

struct Barrier {
    int32_t arrived;
    int32_t phase;
};

// Threads meet here; spins for about the length of a stage, then lets others run.
void barrier_wait(Barrier* barrier, int size);

struct Team {
    int index;
    int size;
    Barrier* barrier;
    inline void wait() const {
        if (size > 1) barrier_wait(barrier, size);
    }
    // This thread's part of n pieces: [first(n), first(n) of the next thread).
    inline int64_t begin(int64_t n) const { return n * index / size; }
    inline int64_t end(int64_t n) const { return n * (index + 1) / size; }
};

typedef void (*Job)(const Team& team, void* argument);
void run_team(Job job, void* argument, int threads);
