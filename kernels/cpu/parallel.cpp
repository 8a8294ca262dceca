#include "parallel.h"

#include <sched.h>

#include "runtime.h"

#ifndef SPINS
#define SPINS 20000  // fewer where a team has more threads than cores and nobody counts the time (check/run.sh)
#endif

namespace {

typedef void (*Region)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*Number)();
Region start_region = nullptr;
Number thread_index = nullptr, team_size = nullptr;

struct Call {
    Job job;
    void* argument;
    Barrier barrier;
};

void enter(void* data) {
    Call* call = static_cast<Call*>(data);
    const Team team{thread_index(), team_size(), &call->barrier};
    call->job(team, call->argument);
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void use_runtime(void* parallel, void* index, void* size) {
    start_region = reinterpret_cast<Region>(parallel);
    thread_index = reinterpret_cast<Number>(index);
    team_size = reinterpret_cast<Number>(size);
}

bool has_runtime() { return start_region != nullptr; }

void barrier_wait(Barrier* barrier, int size) {
    const int32_t phase = __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&barrier->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
        if (spins < SPINS)
            pause();
        else
            sched_yield();  // more threads than cores: the one waited for needs this one's
    }
}

void run_team(Job job, void* argument, int threads) {
    Call call{job, argument, {0, 0}};
    if (threads <= 1 || !start_region) {
        job(Team{0, 1, &call.barrier}, argument);
        return;
    }
    start_region(enter, &call, static_cast<unsigned>(threads), 0);
}
