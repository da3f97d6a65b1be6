#include "guards/adapter_lock.hpp"

#include "threads/per_process.hpp"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace triollama::native {

namespace {

struct Use {
    int32_t computing = 0;
    int32_t changing = 0;       // who changes the table, and who waits for that
    bool changed = false;       // right now

    bool idle() const { return computing == 0 && changing == 0; }
};

struct Tables {
    std::mutex mutex;
    std::condition_variable moved;
    std::unordered_map<const llama_model *, Use> uses;      // of models that are in use at the moment
};

Tables & tables() { return per_process<Tables>(); }

// With the mutex held.
void left(const llama_model * model, const Use & use) {
    if (use.idle()) {
        tables().uses.erase(model);     // who waits to compute is not counted
    }
    tables().moved.notify_all();
}

}  // namespace

ReadingAdapters::ReadingAdapters(const llama_model * model) : model(model) {
    std::unique_lock<std::mutex> lock(tables().mutex);
    tables().moved.wait(lock, [model] { return tables().uses[model].changing == 0; });
    tables().uses[model].computing++;
}

ReadingAdapters::~ReadingAdapters() {
    const std::lock_guard<std::mutex> lock(tables().mutex);
    Use & use = tables().uses[model];
    use.computing--;
    left(model, use);
}

ChangingAdapters::ChangingAdapters(const llama_model * model, When when) : model(model) {
    std::unique_lock<std::mutex> lock(tables().mutex);
    Use & use = tables().uses[model];       // it stays where it is, and while we are counted it stays
    if (when == When::now && !use.idle()) {
        return;
    }
    use.changing++;
    tables().moved.wait(lock, [&use] { return use.computing == 0 && !use.changed; });
    use.changed = held = true;
}

ChangingAdapters::~ChangingAdapters() {
    if (!held) {
        return;
    }
    const std::lock_guard<std::mutex> lock(tables().mutex);
    Use & use = tables().uses[model];
    use.changed = false;
    use.changing--;
    left(model, use);
}

}  // namespace triollama::native
