// What GCC makes of `#pragma omp` are calls of libgomp. Linked here, hidden in the extension, they are ours: see
// team.hpp. Only what the pinned ggml uses is here (ggml-cpu.c, amx, ggml-blas, ggml-quants.c), as GCC 9 and
// later compile it; the names and what they
// must do are those of libgomp's manual, "The libgomp ABI".
#include "threads/per_process.hpp"
#include "threads/team.hpp"

#if defined(TRIOLLAMA_TEAM)

#include <mutex>

namespace {

struct Atomics {
    std::mutex mutex;
};
std::mutex & atomics() { return triollama::native::per_process<Atomics>().mutex; }

bool give(bool found, const triollama::native::Chunk & chunk, long * first, long * last) {
    *first = chunk.first;
    *last  = chunk.last;
    return found;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*work)(void *), void * data, unsigned n, unsigned) { triollama::native::run_team(n, work, data); }
void GOMP_barrier() { triollama::native::team_barrier(); }
bool GOMP_single_start() { return triollama::native::team_single(); }
void GOMP_atomic_start() { atomics().lock(); }
void GOMP_atomic_end() { atomics().unlock(); }

bool GOMP_loop_nonmonotonic_dynamic_next(long * first, long * last) {
    triollama::native::Chunk mine;
    return give(triollama::native::team_loop_next(mine), mine, first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk, long * mine_first, long * mine_last) {
    triollama::native::Chunk mine;
    return give(triollama::native::team_loop_begin(first, last, step, chunk, mine), mine, mine_first, mine_last);
}
void GOMP_loop_end() { triollama::native::team_barrier(); }

int omp_get_num_threads() { return (int) triollama::native::team_size(); }
int omp_get_thread_num() { return (int) triollama::native::team_rank(); }

}  // extern "C"

#endif
