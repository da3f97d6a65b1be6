// A failed GGML_ASSERT ends the process. Inside an AbortScope that was entered it throws instead.
//
// ggml_abort() calls its callback before abort(); an exception thrown there passes through ggml's C frames (compiled
// with -fexceptions for that, and without LTO, which loses destructors) into llama.cpp, which catches what loading and
// context creation throw.
// Inside a parallel computation it still ends the process: the other threads would wait for ever for the one that left.
#pragma once

#include "ggml.h"

#include <stdexcept>
#include <string>

namespace triollama::native {

struct native_abort : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class AbortScope {
public:
    AbortScope() = default;
    ~AbortScope() { depth -= entered; }
    AbortScope(const AbortScope &) = delete;
    AbortScope & operator=(const AbortScope &) = delete;

    // Apart from the constructor, because Cython drops a variable that nobody names.
    void enter() {
        ++depth;
        ++entered;
    }

    // Both on one thread, for an owner of a native object that is entered and left by its callers. end() gives what was
    // thrown in between, "" if nothing.
    static void begin();
    static std::string end();

    static void install() { ggml_set_abort_callback(on_abort); }

private:
    static void on_abort(const char * message);

    static inline thread_local int depth = 0;
    static inline thread_local std::string thrown;
    int entered = 0;
};

// A call inside an AbortScope that computes nothing in parallel.
template <class Call> auto guarded(Call && call) {
    AbortScope scope;
    scope.enter();
    return call();
}

}  // namespace triollama::native
