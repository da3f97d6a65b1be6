// A few threads that do the independent parts of one task together with the thread that has it.
#pragma once

#include "threads/thread.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace triollama::native {

class Helpers {
public:
    explicit Helpers(int32_t count) : count(count) { threads.reserve(std::max(count, 0)); }
    ~Helpers() { stop(); }
    Helpers(const Helpers &) = delete;
    Helpers & operator=(const Helpers &) = delete;

    // Calls part(0) .. part(n - 1), each once, on this thread and the helpers; returns when all are done. `part` must not
    // throw. The threads start with the first call; they sleep between calls. Where the system has no more, those that
    // there are do it.
    void share(int32_t n, const std::function<void(int32_t)> & part) {
        if (n < 2 || count < 1) {
            for (int32_t i = 0; i < n; i++) {
                part(i);
            }
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex);
            while ((int32_t) threads.size() < count) {
                Thread thread;
                if (!thread.start("triollama-draw", [this] { loop(); })) {
                    break;
                }
                threads.push_back(std::move(thread));
            }
            task  = &part;
            total = n;
            next  = 0;
            round++;
        }
        wake.notify_all();
        work(part, n);
        std::unique_lock<std::mutex> lock(mutex);
        task = nullptr;                                 // who has not begun yet need not
        idle.wait(lock, [this] { return working == 0; });
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stopping = true;
        }
        wake.notify_all();
        for (Thread & thread : threads) {
            thread.join();
        }
        threads.clear();
    }

private:
    void work(const std::function<void(int32_t)> & part, int32_t n) {
        for (int32_t i = next++; i < n; i = next++) {
            part(i);
        }
    }

    void loop() {
        std::unique_lock<std::mutex> lock(mutex);
        uint64_t seen = 0;
        for (;;) {
            wake.wait(lock, [this, seen] { return stopping || (task && round != seen); });
            if (stopping) {
                return;
            }
            seen = round;
            working++;
            const std::function<void(int32_t)> & part = *task;
            const int32_t n = total;
            lock.unlock();
            work(part, n);
            lock.lock();
            if (--working == 0) {
                idle.notify_one();
            }
        }
    }

    const int32_t count;
    std::mutex mutex;                                   // guards what follows, but for `next`
    std::condition_variable wake;
    std::condition_variable idle;
    const std::function<void(int32_t)> * task = nullptr;
    int32_t total = 0;
    std::atomic<int32_t> next{0};
    uint64_t round = 0;
    int32_t working = 0;
    bool stopping = false;
    std::vector<Thread> threads;
};

}  // namespace triollama::native
