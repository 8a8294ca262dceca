// The compiled operators and the decoder against slow, obvious loops, without Python: for sanitizers, and for processors that
// are only emulated.
//
//   check ISA [seed]     exits with 0 and one line, or says what differed
#include <stdlib.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "common.h"

extern "C" {
int sparsity_start(const char*, void*, void*, void*);
const char* sparsity_isa();
}

namespace {

thread_local int my_index = 0, my_size = 1;
int index_of() { return my_index; }
int size_of() { return my_size; }

// A pool for the team: what OpenMP's GOMP_parallel does, with threads of the standard library that wait for the next call.
class Pool {
  public:
    ~Pool() {
        post(nullptr, nullptr, int(others.size()) + 1);
        for (std::thread& each : others) each.join();
    }
    void call(void (*function)(void*), void* data, int threads) {
        while (int(others.size()) + 1 < threads) others.emplace_back([this, index = int(others.size()) + 1, seen = calls] {
            serve(index, seen);
        });
        post(function, data, threads);
        my_size = threads;
        function(data);
        my_size = 1;
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return running == 0; });
    }

  private:
    void post(void (*function)(void*), void* data, int threads) {
        const std::lock_guard<std::mutex> lock(mutex);
        this->function = function, this->data = data, size = threads, running = threads - 1, calls++;
        changed.notify_all();
    }
    void serve(int index, int64_t seen) {
        my_index = index;
        for (std::unique_lock<std::mutex> lock(mutex);;) {
            changed.wait(lock, [&] { return calls != seen; });
            seen = calls;
            if (!function) return;
            if (index >= size) continue;
            my_size = size;
            lock.unlock();
            function(data);
            lock.lock();
            if (--running == 0) changed.notify_all();
        }
    }
    std::vector<std::thread> others;
    std::mutex mutex;
    std::condition_variable changed;
    void (*function)(void*) = nullptr;
    void* data = nullptr;
    int size = 0, running = 0;
    int64_t calls = 0;
};

void parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
    static Pool pool;
    pool.call(function, data, int(threads));
}

}  // namespace

int main(int count, char** arguments) {
    const char* isa = count > 1 ? arguments[1] : "baseline";
    engine.seed(count > 2 ? unsigned(atoi(arguments[2])) : 0u);
    if (sparsity_start(isa, reinterpret_cast<void*>(parallel), reinterpret_cast<void*>(index_of),
                       reinterpret_cast<void*>(size_of))) {
        printf("%s is not to be had here\n", isa);
        return 77;
    }
    check_operators();
    check_edges();
    check_bits();
    check_nm();
    check_decoder();
    printf("%s: %d comparisons, %d failures, selections %016llx\n", sparsity_isa(), compared, failures, (unsigned long long)selections);
    return failures ? 1 : 0;
}
