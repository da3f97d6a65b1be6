#include "guards/abort.hpp"

#include "threads/openmp.hpp"

#include <cstdio>
#include <utility>

namespace triollama::native {

void AbortScope::begin() {
    depth += in_parallel() >= 0;
    thrown.clear();
}

std::string AbortScope::end() {
    depth -= in_parallel() >= 0;
    return std::exchange(thrown, {});
}

void AbortScope::on_abort(const char * message) {
    if (depth > 0 && in_parallel() <= 0) {
        thrown = message;
        throw native_abort(message);
    }
    // The end of the process: what went wrong must not get lost with the log queue.
    std::fprintf(stderr, "%s\n", message);
    std::fflush(stderr);
}

}  // namespace triollama::native
