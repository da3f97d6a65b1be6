// ggml's OpenMP as GCC compiles it, on our threads: compiled with -fopenmp and linked to team.cpp and gomp.cpp
// alone.
// Prints "ok", or what was wrong.
#include "threads/team.hpp"

#include <omp.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

static void check(bool good, const char * what) {
    if (!good) {
        std::printf("wrong: %s\n", what);
        std::fflush(stdout);
        std::_Exit(1);
    }
}

static int threads_of_process() {
    int n = 0;
    FILE * status = std::fopen("/proc/self/status", "r");
    char line[256];
    while (std::fgets(line, sizeof line, status)) {
        std::sscanf(line, "Threads: %d", &n);
    }
    std::fclose(status);
    return n;
}

// A thread that was joined is counted for a moment more.
static bool threads_become(int n) {
    for (int i = 0; i < 5000 && threads_of_process() != n; i++) {
        usleep(1000);
    }
    return threads_of_process() == n;
}

// As ggml_graph_compute does: steps whose parts depend on all parts of the step before.
static void steps(int n, int rounds) {
    std::vector<long> now(n, 1), next(n, 0);
    int size = 0;
    #pragma omp parallel num_threads(n)
    {
        #pragma omp single
        size = omp_get_num_threads();
        const int me = omp_get_thread_num();
        for (int r = 0; r < rounds; r++) {
            long sum = 0;
            for (long value : now) {
                sum += value;
            }
            next[me] = sum % 1000003;
            #pragma omp barrier
            now[me] = next[me];
            #pragma omp barrier
        }
    }
    long expected = 1;
    for (int r = 0; r < rounds; r++) {
        expected = expected * n % 1000003;
    }
    check(size == n, "the team's size");
    for (long value : now) {
        check(value == expected, "a barrier let somebody through");
    }
}

static void loops(int n) {
    for (int count : {0, 1, 63, 64, 65, 1000}) {
        std::vector<int> visits(count, 0);
        long total = 0;
        #pragma omp parallel num_threads(n) reduction(+ : total)
        {
            for (int again = 0; again < 3; again++) {
                #pragma omp for schedule(dynamic, 64)
                for (int i = 0; i < count; i++) {
                    visits[i]++;
                    total += i;
                }
            }
        }
        for (int v : visits) {
            check(v == 3, "an iteration was left out or came twice");
        }
        check(total == 3L * count * (count - 1) / 2, "a reduction");
    }
}

static void singles(int n) {
    std::atomic<int> done{0};
    #pragma omp parallel num_threads(n)
    for (int i = 0; i < 100; i++) {
        #pragma omp single
        done++;
    }
    check(done == 100, "single");
}

static void nested() {
    std::atomic<int> inner{0};
    check(!triollama::native::in_team(), "outside");
    #pragma omp parallel num_threads(3)
    {
        check(triollama::native::in_team(), "inside");
        #pragma omp parallel num_threads(4)
        {
            check(omp_get_num_threads() == 1 && omp_get_thread_num() == 0, "nested teams have one thread");
            check(triollama::native::in_team(), "inside, though alone");
            #pragma omp parallel num_threads(2)
            check(omp_get_num_threads() == 1, "nested twice");
            inner++;
        }
        check(omp_get_num_threads() == 3, "back from a nested team");
    }
    check(inner == 3 && !triollama::native::in_team(), "nested");
}

static void orphaned() {
    long total = 0;
    #pragma omp for schedule(dynamic, 64)
    for (int i = 0; i < 1000; i++) {
        total += i;
    }
    check(total == 499500, "a loop outside of teams");
}

// Of a team of two, how many may run on these and no others.
static int pinned_to(const cpu_set_t & cpus) {
    std::atomic<int> there{0};
    #pragma omp parallel num_threads(2)
    {
        cpu_set_t mine;
        sched_getaffinity(0, sizeof mine, &mine);
        there += CPU_EQUAL(&mine, &cpus) != 0;
    }
    return there;
}

static void pinned() {
    cpu_set_t before, one;
    sched_getaffinity(0, sizeof before, &before);
    std::thread([&] {
        CPU_ZERO(&one);
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (CPU_ISSET(cpu, &before) && CPU_COUNT(&one) == 0) {
                CPU_SET(cpu, &one);
            }
        }
        sched_setaffinity(0, sizeof one, &one);
        check(pinned_to(one) == 2, "a team runs where its caller is pinned");
    }).join();
    check(pinned_to(before) == 2, "and others do not");
}

// Of a team of two, how many are scheduled so.
static int scheduled(int policy, int nice) {
    std::atomic<int> there{0};
    #pragma omp parallel num_threads(2)
    there += sched_getscheduler(0) == policy && getpriority(PRIO_PROCESS, 0) == nice;
    return there;
}

static void urgent() {
    const int policy = sched_getscheduler(0), nice = getpriority(PRIO_PROCESS, 0);
    const auto check_now = [&](const char * who) { check(scheduled(policy, nice) == 2, who); };
    check_now("a team is as urgent as its caller");
    std::thread([] {
        setpriority(PRIO_PROCESS, 0, 19);
        check(scheduled(sched_getscheduler(0), 19) == 2, "one in the background, too");
    }).join();
    check_now("and others are what they were");
    std::thread([nice] {
        const sched_param none = {};
        check(sched_setscheduler(0, SCHED_IDLE, &none) != 0 || scheduled(SCHED_IDLE, nice) == 2, "one for when nobody else runs");
    }).join();
    check_now("and others stay so");
}

// A helper that was brought to its caller's core has left it when they work again.
static void apart() {
    cpu_set_t all, one;
    sched_getaffinity(0, sizeof all, &all);
    int together = 0;
    for (int i = 0; i < 20 && CPU_COUNT(&all) > 1; i++) {
        int cores[2] = {};
        #pragma omp parallel num_threads(2)
        {
            cores[omp_get_thread_num()] = sched_getcpu();
            #pragma omp barrier
            if (omp_get_thread_num() == 1) {
                CPU_ZERO(&one);
                CPU_SET(cores[0], &one);
                sched_setaffinity(0, sizeof one, &one);
                sched_setaffinity(0, sizeof all, &all);
            }
        }
        #pragma omp parallel num_threads(2)
        cores[omp_get_thread_num()] = sched_getcpu();
        together += cores[0] == cores[1];
    }
    check(together < 10, "threads of a team keep to different cores");
    check(pinned_to(all) == 2, "and may go anywhere");
}

static void thrown() {
    bool caught = false;
    try {
        triollama::native::run_team(1, [](void *) { throw 1; }, nullptr);
    } catch (int) {
        caught = true;
    }
    check(caught && !triollama::native::in_team() && omp_get_num_threads() == 1, "an exception leaves a team of one");
}

int main(int argc, char ** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 2000;
    std::thread([] {}).join();
    usleep(10000);
    const int before = threads_of_process();    // sanitizers have one of their own
    steps(2, rounds);
    check(threads_become(before + 1), "one helper for a team of two");
    steps(2, rounds);
    check(threads_become(before + 1), "the helper is used again");
    std::thread([&] { steps(2, rounds); }).join();
    check(threads_become(before + 1), "by any thread");
    for (int n : {1, 3, 8, 2}) {        // more than there are cores, and fewer again
        steps(n, rounds / 10);
        loops(n);
        singles(n);
    }
    nested();
    orphaned();
    pinned();
    urgent();
    apart();
    thrown();
    triollama::native::retire_team();
    check(threads_become(before), "nobody is left of the retired");
    triollama::native::retire_team();
    steps(4, rounds / 10);
    check(threads_become(before + 3), "they come again");

    int all = 0;
    #pragma omp parallel
    {
        #pragma omp single
        all = omp_get_num_threads();
    }
    check(all >= 1, "a team of all cores");

    std::vector<std::thread> masters;
    for (int i = 0; i < 4; i++) {
        masters.emplace_back([rounds, i] {
            for (int k = 0; k < 20; k++) {
                steps(1 + (i + k) % 4, rounds / 100);
                if (k % 7 == i) {
                    triollama::native::retire_team();
                }
            }
        });
    }
    for (std::thread & master : masters) {
        master.join();
    }

    const pid_t child = fork();         // it has none of these threads, and must not wait for them
    if (child == 0) {
        steps(3, rounds / 10);
        std::_Exit(0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(status == 0, "a forked child");
    steps(3, rounds / 10);
    std::printf("ok\n");
    return 0;
}
