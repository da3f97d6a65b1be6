// A thread of the engine's own. Its stack has a stated size, whatever `ulimit -s` says, and signals go to others: Python's
// handlers run in the main thread, which a signal wakes only if it gets there.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <system_error>
#include <utility>

#include <memory>

#include <pthread.h>
#include <signal.h>

namespace triollama::native {

class Thread {
public:
    static constexpr size_t STACK = 8 << 20;        // bytes; what is never touched costs nothing

    Thread() = default;

    // `work` must not throw. The name has at most 15 characters. Throws std::system_error where there are no more threads.
    Thread(const char * name, std::function<void()> work) {
        auto start = std::make_unique<Start>(Start{name, std::move(work)});
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK);
        sigset_t others, before;
        sigfillset(&others);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) {
            sigdelset(&others, fault);
        }
        pthread_sigmask(SIG_SETMASK, &others, &before);
        const int error = pthread_create(&thread, &attributes, run, start.get());
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&attributes);
        if (error != 0) {
            throw std::system_error(error, std::generic_category(), "a thread could not be started");
        }
        start.release();
        running = true;
    }

    Thread(Thread && other) noexcept { *this = std::move(other); }
    Thread & operator=(Thread && other) noexcept {      // this one is not running
        thread  = other.thread;
        running = std::exchange(other.running, false);
        return *this;
    }

    // False where there are no more threads, or no memory for one.
    bool start(const char * name, std::function<void()> work) {     // this one is not running
        try {
            *this = Thread(name, std::move(work));
        } catch (const std::exception &) {
            return false;
        }
        return true;
    }

    bool joinable() const { return running; }
    void join() {
        pthread_join(thread, nullptr);
        running = false;
    }

private:
    struct Start {
        const char * name;
        std::function<void()> work;
    };

    static void * run(void * data) {
        const std::unique_ptr<Start> start(static_cast<Start *>(data));
#if defined(__APPLE__)
        pthread_setname_np(start->name);
#else
        pthread_setname_np(pthread_self(), start->name);
#endif
        start->work();
        return nullptr;
    }

    pthread_t thread = {};
    bool running = false;
};

}  // namespace triollama::native
