#include "abort_guard.hpp"

#include <cstdio>

namespace triollama {

void AbortScope::on_abort(const char * message) {
    if (depth > 0) {
        throw native_abort(message);
    }
    // The end of the process: what went wrong must not get lost with the log queue.
    std::fprintf(stderr, "%s\n", message);
    std::fflush(stderr);
}

}  // namespace triollama
