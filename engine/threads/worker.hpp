// One thread for work that must not hold up a step: samplers that take milliseconds.
#pragma once

#include "threads/thread.hpp"

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>

namespace triollama::native {

class Worker {
public:
    Worker() = default;
    ~Worker() { stop(); }
    Worker(const Worker &) = delete;
    Worker & operator=(const Worker &) = delete;

    // `job` must not throw. The thread starts with the first one; where the system has no more, the job is done here.
    void run(std::function<void()> job) {
        std::unique_lock<std::mutex> lock(mutex);
        if (!thread.joinable() && !thread.start("triollama-slow", [this] { loop(); })) {
            lock.unlock();
            job();
            return;
        }
        jobs.push_back(std::move(job));
        changed.notify_one();
    }

    // Finishes the jobs that were given, then ends.
    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stopping = true;
        }
        changed.notify_one();
        if (thread.joinable()) {
            thread.join();
        }
    }

private:
    void loop() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return stopping || !jobs.empty(); });
            if (jobs.empty()) {
                return;
            }
            std::function<void()> job = std::move(jobs.front());
            jobs.pop_front();
            lock.unlock();
            job();
            lock.lock();
        }
    }

    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> jobs;
    Thread thread;
    bool stopping = false;
};

}  // namespace triollama::native
