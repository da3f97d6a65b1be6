// A computation's threads for the checks of kernels. While they compute, nothing may be allocated.
#pragma once

#include "kernels/product.hpp"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <thread>
#include <vector>

inline thread_local bool computing = false;

void * operator new(size_t size) {
    if (computing) {
        std::fputs("memory is allocated in a computation\n", stderr);
        std::abort();
    }
    if (void * memory = std::malloc(size)) {
        return memory;
    }
    throw std::bad_alloc();
}
void operator delete(void * memory) noexcept { std::free(memory); }
void operator delete(void * memory, size_t) noexcept { std::free(memory); }

namespace triollama::native::kernels {

struct Meeting {
    explicit Meeting(int n) : n(n) {}
    const int        n;
    std::atomic<int> here{ 0 }, round{ 0 }, next{ 0 };
};

class Threads final : public Team {
public:
    Threads(int ith, Meeting & meeting) : Team(ith, meeting.n), meeting(meeting) {}

    void meet() override {
        if (ith == 0) {
            meeting.next = nth;
        }
        const int round = meeting.round;
        if (++meeting.here == nth) {
            meeting.here = 0;
            ++meeting.round;
        }
        while (meeting.round == round) {
            std::this_thread::yield();
        }
    }
    int64_t next() override { return meeting.next++; }

private:
    Meeting & meeting;
};

inline void in_threads(int n, const std::function<void(Team &)> & compute) {
    Meeting meeting(n);
    const auto one = [&](int ith) {
        Threads team(ith, meeting);
        computing = true;
        compute(team);
        computing = false;
    };
    std::vector<std::thread> others;
    for (int i = 1; i < n; ++i) {
        others.emplace_back(one, i);
    }
    one(0);
    for (std::thread & other : others) {
        other.join();
    }
}

}  // namespace triollama::native::kernels
