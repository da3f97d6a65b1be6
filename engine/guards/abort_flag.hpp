// What llama.cpp's abort callback looks at, once a node of a graph.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace triollama::native {

class AbortFlag {
public:
    bool raised() const { return on.load(); }
    void set(bool value) {
        left = -1;
        on   = value;
    }
    // Raises itself, or fails as an assertion would, at the n-th question from now on.
    void raise_at(int64_t n, bool fail) {
        on    = false;
        fails = fail;
        left  = n;
    }

    // Of all contexts, and for good: the process ends.
    static void raise_all() { all = true; }

    // The callback. One thread asks at a time.
    static bool ask(void * flag) {
        if (all) {
            return true;
        }
        AbortFlag & self = *static_cast<AbortFlag *>(flag);
        if (self.left > 0 && --self.left == 0) {
            if (self.fails) {
                throw std::runtime_error("a failure that a test asked for");
            }
            self.on = true;
        }
        return self.on;
    }

private:
    static inline std::atomic<bool> all{false};
    std::atomic<bool> on{false};
    std::atomic<bool> fails{false};
    std::atomic<int64_t> left{-1};
};

}  // namespace triollama::native
