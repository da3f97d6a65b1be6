#include "threads/team.hpp"

#include "threads/per_process.hpp"
#include "threads/thread.hpp"

#if defined(TRIOLLAMA_TEAM)

#include <linux/futex.h>
#include <sched.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <deque>
#include <exception>
#include <iterator>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace triollama::native {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// How a thread waits; OMP_WAIT_POLICY chooses as in any OpenMP program.
struct Patience {
    microseconds turning{10};
    microseconds yielding{2000};    // both together

    Patience() {
        const char * policy = std::getenv("OMP_WAIT_POLICY");
        if (policy && strcasecmp(policy, "passive") == 0) {
            turning = yielding = microseconds(0);
        } else if (policy && strcasecmp(policy, "active") == 0) {
            turning = yielding = std::chrono::seconds(10);
        }
    }
};

// While it is there, this thread asks for slices of 0.1 ms, the shortest that Linux grants (since 6.12; before, and where it
// may not ask, nothing changes): a yield then gives away no more than that, and who wakes up comes sooner to its turn.
class ShortSlices {
public:
    ShortSlices() : before(exchange(100'000)) {}
    ~ShortSlices() {
        if (before > 0) {
            exchange(before);
        }
    }
    ShortSlices(const ShortSlices &) = delete;
    ShortSlices & operator=(const ShortSlices &) = delete;

private:
    struct Attributes {         // struct sched_attr of sched_setattr(2), in its first version
        uint32_t size;
        uint32_t policy;
        uint64_t flags;
        int32_t  nice;
        uint32_t priority;
        uint64_t runtime;       // of policies without deadlines: a slice, in nanoseconds
        uint64_t deadline;
        uint64_t period;
    };
    static_assert(sizeof(Attributes) == 48, "SCHED_ATTR_SIZE_VER0");

    // The slice until now; 0 where nothing was changed. All else is set as it is now: somebody may renice us. Who does so
    // between the two calls has not: Linux has none that sets a slice alone (SCHED_FLAG_KEEP_PARAMS keeps that, too).
    static uint64_t exchange(uint64_t slice) {
        Attributes now = {};
        if (syscall(SYS_sched_getattr, 0, &now, sizeof(now), 0) != 0 || now.policy != SCHED_OTHER) {
            return 0;
        }
        std::swap(now.runtime, slice);
        return syscall(SYS_sched_setattr, 0, &now, 0) == 0 ? slice : 0;
    }

    const uint64_t before;
};

// What a thread inherits from who starts it: where it may run, and how urgently.
struct Standing {
    cpu_set_t   cpus;
    sched_param priority = {};
    const int   policy = sched_getscheduler(0), nice = getpriority(PRIO_PROCESS, 0);

    Standing() {
        CPU_ZERO(&cpus);
        sched_getaffinity(0, sizeof cpus, &cpus);
        sched_getparam(0, &priority);
    }
    bool operator==(const Standing & other) const {
        return CPU_EQUAL(&cpus, &other.cpus) && policy == other.policy && nice == other.nice &&
               priority.sched_priority == other.priority.sched_priority;
    }
};

// How long a thread turns before it yields again. Each yield gives a slice of its due away, and to a program that never
// waits all until the next tick, whatever its priority; so who finds nobody there asks less often, and who finds such a
// program seldom. Someone who ran, and waits as we do, is met with yields in a row.
class Pause {
public:
    microseconds length() const { return pause; }

    // A yield was so long. Whether somebody ran in it.
    bool saw(Clock::duration yield) {
        pause = yield > NEVER_WAITS ? LONGEST
              : yield > OTHERS      ? microseconds(0)
                                    : std::min(LONGEST, std::max(microseconds(2), 2 * pause));
        return yield > OTHERS;
    }

private:
    static constexpr microseconds OTHERS{10};
    static constexpr microseconds NEVER_WAITS{500};
    static constexpr microseconds LONGEST{200};

    microseconds pause{0};
};
thread_local Pause pause_of_thread;

constexpr std::chrono::seconds RETIREMENT{10};  // a thread that has nothing to do for so long ends

void turn() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    asm volatile("yield");
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

const Patience patience;

void came_back();   // this thread, after others may have had its core

// A number that threads wait on.
class Signal {
public:
    uint32_t now() const { return value.load(std::memory_order_acquire); }

    void set(uint32_t to) {
        value.store(to, std::memory_order_seq_cst);
        wake();
    }

    // Wakes nobody.
    bool exchange(uint32_t from, uint32_t to) { return value.compare_exchange_strong(from, to, std::memory_order_seq_cst); }

    // Returns once it is no longer `old`; false if that takes longer than `most` (0: wait for ever).
    bool wait(uint32_t old, std::chrono::seconds most = std::chrono::seconds(0)) {
        if (now() != old) {
            return true;
        }
        const auto start = Clock::now();
        auto time = start;
        if (turns(old, time, patience.turning)) {
            return true;
        }
        while (time - start < patience.yielding) {
            if (turns(old, time, pause_of_thread.length())) {
                return true;
            }
            const auto before = time;
            sched_yield();
            time = Clock::now();
            if (pause_of_thread.saw(time - before)) {
                came_back();
                time = Clock::now();
            }
            if (now() != old) {
                return true;
            }
        }
        timespec timeout = {};
        timeout.tv_sec = most.count();
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        bool in_time = true;
        while (in_time && now() == old) {
            const long result = syscall(
                SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, most.count() > 0 ? &timeout : nullptr, nullptr, 0);
            in_time = result == 0 || errno != ETIMEDOUT;
        }
        sleepers.fetch_sub(1, std::memory_order_relaxed);
        came_back();
        return now() != old;
    }

private:
    // Whether it is no longer `old` within so long from `time`, which is then later.
    bool turns(uint32_t old, Clock::time_point & time, microseconds length) const {
        const auto end = time + length;
        while (time < end) {
            for (int i = 0; i < 16; i++) {
                turn();
                if (now() != old) {
                    return true;
                }
            }
            time = Clock::now();
        }
        return false;
    }

    void wake() {
        if (sleepers.load(std::memory_order_seq_cst) > 0) {
            syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
        }
    }

    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};
};
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is 32 bits");

struct alignas(64) Worker {
    // What `state` counts: 4 for each call; 2 more while the crew counts on it, which is when it does not retire.
    static constexpr uint32_t CLAIMED = 2;
    static constexpr uint32_t CALL = 4;
    static constexpr uint32_t RETIRED = 1;

    unsigned    rank = 0;
    Signal      state;
    Thread      thread;     // joined before there is another
};

// Threads that work together: those of one call of run_team after the other. Never destroyed, since a thread that is
// done may still be looking at it.
class Crew {
public:
    explicit Crew(const Standing & standing) : standing(standing), seats(1) {}

    const Standing standing;        // of all of its threads
    void run(unsigned n, void (*work)(void *), void * data);
    void barrier();
    bool single(unsigned & seen);
    bool loop_begin(unsigned & seen, long first, long last, long step, long chunk, Chunk & mine);
    bool loop_next(Chunk & mine);
    void spread(unsigned rank);
    void retire();          // while nobody runs it
    unsigned size = 1;

private:
    bool claim(Worker & worker);
    void serve(Worker & worker);

    void (*work)(void *) = nullptr;
    void * data = nullptr;
    std::deque<Worker> workers;     // they stay where they are
    std::deque<std::atomic<int>> seats;     // by rank: the core where a thread was last seen
    alignas(64) std::atomic<uint32_t> arrived{0};
    alignas(64) Signal passed;      // how many barriers
    alignas(64) std::atomic<uint32_t> busy{0};
    alignas(64) Signal finished;    // how many runs
    alignas(64) std::atomic<unsigned> singles{0};

    std::mutex loop;                // of what follows
    unsigned loops = 0;
    long next = 0;
    long last = 0;
    long step = 1;
    long chunk = 1;
};

struct Member {
    Crew *   crew = nullptr;
    bool     active = false;        // this crew, or one around it, has more than one thread
    unsigned rank = 0;
    unsigned singles = 0;
    unsigned loops = 0;
};
thread_local Member member;

// Those that do nothing now. The last one to have worked is the first to work again: its threads may still be awake.
struct Pool {
    std::mutex mutex;
    std::vector<Crew *> idle;
    size_t crews = 0;               // there is room for all

    Crew & take() {
        const Standing standing;
        std::lock_guard<std::mutex> lock(mutex);
        const auto found = std::find_if(idle.rbegin(), idle.rend(), [&](Crew * crew) { return crew->standing == standing; });
        if (found == idle.rend()) {
            idle.reserve(++crews);
            return *new Crew(standing);
        }
        Crew * crew = *found;
        idle.erase(std::next(found).base());
        return *crew;
    }
    void give(Crew & crew) {
        std::lock_guard<std::mutex> lock(mutex);
        idle.push_back(&crew);
    }
};

// A forked child has none of its parent's threads.
Pool & pool() { return per_process<Pool>(); }

bool Crew::claim(Worker & worker) {
    const uint32_t state = worker.state.now();
    if (state != Worker::RETIRED && worker.state.exchange(state, state + Worker::CLAIMED)) {
        return true;
    }
    if (worker.thread.joinable()) {
        worker.thread.join();
    }
    worker.state.set(Worker::CLAIMED);
    if (!worker.thread.start("triollama-cpu", [this, &worker] { serve(worker); })) {
        worker.state.set(Worker::RETIRED);
        return false;
    }
    return true;
}

void Crew::retire() {
    for (Worker & worker : workers) {
        worker.state.set(Worker::RETIRED);
    }
    for (Worker & worker : workers) {
        if (worker.thread.joinable()) {
            worker.thread.join();
        }
    }
}

void Crew::serve(Worker & worker) {
    const ShortSlices slices;
    for (uint32_t idle = 0;; idle += Worker::CALL) {
        if (!worker.state.wait(idle, RETIREMENT)) {
            worker.state.exchange(idle, Worker::RETIRED);
        }
        if (worker.state.now() == Worker::RETIRED) {
            return;
        }
        worker.state.wait(idle + Worker::CLAIMED);
        member = {this, true, worker.rank, 0, 0};
        spread(worker.rank);
        work(data);
        member = {};
        const uint32_t runs = finished.now();
        if (busy.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            finished.set(runs + 1);
        }
    }
}

void Crew::run(unsigned n, void (*work_)(void *), void * data_) {
    while (workers.size() + 1 < n) {
        seats.emplace_back(-1);
        workers.emplace_back();
        workers.back().rank = (unsigned) workers.size();
        workers.back().state.set(Worker::RETIRED);
    }
    unsigned found = 0;
    while (found + 1 < n && claim(workers[found])) {
        found++;        // where the system has no more threads, those that there are do it
    }
    std::optional<ShortSlices> slices;
    if (found > 0) {
        slices.emplace();
    }
    const bool within = member.active;
    size = found + 1;
    seats[0].store(sched_getcpu(), std::memory_order_relaxed);
    work = work_;
    data = data_;
    singles.store(0, std::memory_order_relaxed);
    loops = 0;
    busy.store(found, std::memory_order_relaxed);
    const uint32_t runs = finished.now();
    for (unsigned i = 0; i < found; i++) {
        workers[i].state.set(workers[i].state.now() - Worker::CLAIMED + Worker::CALL);
    }
    struct Leave {
        Member before = member;
        ~Leave() { member = before; }
    } leave;
    member = {this, within || found > 0, 0, 0, 0};
    try {
        work(data);
    } catch (...) {
        if (found > 0) {
            std::terminate();       // the others wait for this thread at their next barrier
        }
        throw;
    }
    if (found > 0) {
        finished.wait(runs);
    }
}

// Threads that wait for each other gain nothing from a core together, and Linux brings them together: it wakes a thread
// where who wakes it runs, and finds two of them on one core, beside a program that never waits on the other, in balance. So
// who comes back to a core where another one was seen leaves it, and may then be anywhere again. The caller's thread is not
// ours to move.
void Crew::spread(unsigned rank) {
    const int here = sched_getcpu();
    seats[rank].store(here, std::memory_order_relaxed);
    if (rank == 0) {
        return;
    }
    cpu_set_t all, taken, free;
    CPU_ZERO(&taken);
    for (unsigned other = 0; other < size; other++) {
        const int core = seats[other].load(std::memory_order_relaxed);
        if (other != rank && core >= 0) {
            CPU_SET(core, &taken);
        }
    }
    if (!CPU_ISSET(here, &taken) || sched_getaffinity(0, sizeof all, &all) != 0) {
        return;
    }
    CPU_AND(&taken, &all, &taken);
    CPU_XOR(&free, &all, &taken);
    // Who changes this thread's affinity between these calls has done so in vain.
    if (CPU_COUNT(&free) > 0 && sched_setaffinity(0, sizeof free, &free) == 0) {
        seats[rank].store(sched_getcpu(), std::memory_order_relaxed);
        sched_setaffinity(0, sizeof all, &all);
    }
}

void came_back() {
    if (member.crew) {
        member.crew->spread(member.rank);
    }
}

void Crew::barrier() {
    const uint32_t before = passed.now();
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        arrived.store(0, std::memory_order_relaxed);
        passed.set(before + 1);
    } else {
        passed.wait(before);
    }
}

bool Crew::single(unsigned & seen) {
    unsigned expected = seen++;
    return singles.compare_exchange_strong(expected, expected + 1, std::memory_order_acq_rel);
}

bool Crew::loop_begin(unsigned & seen, long first, long last_, long step_, long chunk_, Chunk & mine) {
    {
        std::lock_guard<std::mutex> lock(loop);
        if (loops < ++seen) {       // the first to come
            loops = seen;
            next  = first;
            last  = last_;
            step  = step_;
            chunk = chunk_;
        }
    }
    return loop_next(mine);
}

bool Crew::loop_next(Chunk & mine) {
    std::lock_guard<std::mutex> lock(loop);
    const long left = step > 0 ? last - next : next - last;
    if (left <= 0) {
        return false;
    }
    const long taken = chunk * (step > 0 ? step : -step);
    mine.first = next;
    mine.last  = taken < left ? next + chunk * step : last;
    next       = mine.last;
    return true;
}

unsigned cores() {
    const char * wanted = std::getenv("OMP_NUM_THREADS");
    const long n = wanted ? std::strtol(wanted, nullptr, 10) : 0;
    if (n > 0 && n < 4096) {
        return (unsigned) n;
    }
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return (unsigned) CPU_COUNT(&set);
    }
    const unsigned all = std::thread::hardware_concurrency();
    return all > 0 ? all : 1;
}

}  // namespace

void run_team(unsigned n, void (*work)(void *), void * data) {
    if (in_team()) {
        n = 1;
    } else if (n == 0) {
        n = cores();
    }
    struct Hired {
        Crew & crew = pool().take();
        ~Hired() { pool().give(crew); }
    } hired;
    hired.crew.run(n, work, data);
}

void retire_team() {
    std::vector<Crew *> idle;
    {
        std::lock_guard<std::mutex> lock(pool().mutex);
        idle.reserve(pool().crews);
        idle.swap(pool().idle);
    }
    for (Crew * crew : idle) {
        crew->retire();
        pool().give(*crew);
    }
}

unsigned team_size() { return member.crew ? member.crew->size : 1; }
unsigned team_rank() { return member.rank; }
bool in_team() { return member.active; }

void team_barrier() {
    if (member.crew && member.crew->size > 1) {
        member.crew->barrier();
    }
}

bool team_single() { return !member.crew || member.crew->single(member.singles); }

bool team_loop_begin(long first, long last, long step, long chunk, Chunk & mine) {
    if (!member.crew) {
        mine = {first, last};
        return step > 0 ? first < last : first > last;
    }
    return member.crew->loop_begin(member.loops, first, last, step, chunk, mine);
}

bool team_loop_next(Chunk & mine) { return member.crew && member.crew->loop_next(mine); }

}  // namespace triollama::native

#endif
