// What all threads share: who computes and who changes a model's adapters exclude each other, and a child that is forked
// in the middle of anything waits for nobody.  process_check ROUNDS FORKS.  Prints "ok", or what was wrong.
#include "guards/adapter_lock.hpp"
#include "guards/log.hpp"

#include "ggml-threading.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

using namespace triollama::native;

static void check(bool good, const char * what) {
    if (!good) {
        std::printf("wrong: %s\n", what);
        std::fflush(stdout);
        std::_Exit(1);
    }
}

static bool in_main = false;
struct Probe {
    bool made_in_main = in_main;
};

static const llama_model * model(int number) {      // only its address counts
    return reinterpret_cast<const llama_model *>(uintptr_t(number + 1) << 12);
}

static std::atomic<int> computing[2], refused;
static int adapters[2];                             // guarded by the table alone, for ThreadSanitizer to see

static int compute(int m) {
    const ReadingAdapters table(model(m));
    computing[m]++;
    const int seen = adapters[m];
    std::this_thread::yield();
    check(adapters[m] == seen, "the table changed while somebody computed");
    computing[m]--;
    return seen;
}

static void change(int m, bool now) {
    const ChangingAdapters alone(model(m), now ? ChangingAdapters::When::now : ChangingAdapters::When::free);
    check(bool(alone) || now, "who waits gets it");
    if (!alone) {
        refused++;
        return;
    }
    check(computing[m] == 0, "somebody computes while the table changes");
    adapters[m]++;
    std::this_thread::yield();
    check(computing[m] == 0, "somebody began to compute while the table changes");
}

int main(int, char ** arguments) {
    in_main = true;
    check(!per_process<Probe>().made_in_main, "what threads share is made by a call, in which a child may be forked");
    const int rounds = std::atoi(arguments[1]);
    const int forks  = std::atoi(arguments[2]);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; t++) {
        threads.emplace_back([=] {
            for (int i = 0; i < rounds; i++) {
                if (i % 4 == t) {
                    change(i / 4 % 2, i % 3 == 0);
                } else {
                    compute(i % 2);
                }
            }
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    threads.clear();
    check(adapters[0] + adapters[1] + refused == rounds, "every change is made or refused");
    {
        const ReadingAdapters one(model(0)), two(model(0)), elsewhere(model(1));
        check(!ChangingAdapters(model(0), ChangingAdapters::When::now), "it does not wait");
        check(bool(ChangingAdapters(model(2), ChangingAdapters::When::now)), "another model is free");
    }

    std::atomic<bool> stop{false};
    threads.emplace_back([&] {
        while (!stop) {
            LogQueue::write(GGML_LOG_LEVEL_ERROR, "a line\n", nullptr);
        }
    });
    threads.emplace_back([&] {
        while (!stop) {
            compute(0);
        }
    });
    threads.emplace_back([&] {
        while (!stop) {
            change(0, false);
        }
    });
    threads.emplace_back([&] {
        while (!stop) {
            ggml_critical_section_start();
            ggml_critical_section_end();
        }
    });
    for (int i = 0; i < forks; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);
            computing[0] = computing[1] = 0;
            LogQueue::write(GGML_LOG_LEVEL_ERROR, "a line of the child's\n", nullptr);
            int level = 0;
            std::string line;
            check(LogQueue::instance().take(level, line) && line == "a line of the child's", "the child's own lines");
            compute(0);
            change(0, false);
            ggml_critical_section_start();
            ggml_critical_section_end();
            std::_Exit(0);
        }
        int status = -1;
        waitpid(child, &status, 0);
        check(status == 0, "a forked child waits for threads that it does not have");
    }
    stop = true;
    for (std::thread & thread : threads) {
        thread.join();
    }
    std::printf("ok\n");
    return 0;
}
