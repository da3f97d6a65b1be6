// Where the time of a graph goes: each node is computed by itself and timed, which costs a little.
#pragma once

#include "ggml-backend.h"
#include "llama.h"

#include <cstdint>
#include <map>
#include <string>

namespace triollama::native {

struct Timing {
    double  seconds = 0.0;
    int64_t calls   = 0;
};

// By what distinguishes the cost of a node: its operation, and of a product the types and shapes. From the moment that
// it watches what a scheduler computes until it ends.
class Profile {
public:
    explicit Profile(ggml_backend_sched_t sched);
    explicit Profile(llama_context * ctx);
    ~Profile();
    Profile(const Profile &) = delete;
    Profile & operator=(const Profile &) = delete;

    std::map<std::string, Timing> timings() const { return found; }

private:
    static bool visit(ggml_tensor * node, bool ask, void * self);
    void watch(ggml_backend_sched_eval_callback callback);

    ggml_backend_sched_t          sched;
    llama_context *               ctx = nullptr;
    std::map<std::string, Timing> found;
    int64_t                       started = 0;
};

}  // namespace triollama::native
