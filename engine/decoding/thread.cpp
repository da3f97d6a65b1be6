// The thread that decodes: commands come in, steps are made, statistics go out.
#include "decoding/impl.hpp"

#include "guards/errors.hpp"

#include <algorithm>

namespace triollama::native {

void Decoder::Impl::run() {
    backend->set_abort([](void * self) { return static_cast<Impl *>(self)->should_abort(); }, this);
    try_to([this] {
        bool idle = true;
        for (;;) {
            serve(idle);
            if (closing) {
                break;
            }
            if (config.stepwise) {
                admit();
                idle = true;
            } else {
                idle = !step();
            }
            publish();
        }
    });
    worker.stop();
    if (!dead) {
        try_to([this] {
            enter(Mode(), {});
            backend->set_threads(0, 0);
        });
    }
    finish_all();
}

template <class Work> void Decoder::Impl::try_to(Work work) {
    try {
        work();
    } catch (const std::exception & e) {
        die(e.what());
    } catch (...) {
        die("something that is no std::exception was thrown");
    }
}

void Decoder::Impl::die(const std::string & why) {
    dead = true;
    std::lock_guard<std::mutex> lock(mutex);
    if (cause.empty()) {
        cause = why.empty() ? "unknown" : why;
    }
}

// Runs the commands that came in. With `wait`, sleeps until something does.
void Decoder::Impl::serve(bool wait) {
    std::vector<std::function<void()>> commands;
    {
        std::unique_lock<std::mutex> lock(mutex);
        if (wait) {
            changed.wait(lock, [this] { return nudged || !inbox.empty() || closing; });
            gather(lock);
        }
        nudged = false;
        commands.swap(inbox);
    }
    // In order, so that what is left when one of them ends the decoder is found by finish_all.
    for (size_t i = 0; i < commands.size(); i++) {
        try {
            commands[i]();
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            inbox.insert(inbox.begin(), std::make_move_iterator(commands.begin() + i + 1), std::make_move_iterator(commands.end()));
            throw;
        }
    }
    take_sampled();
    drop_cancelled();
}

// Tasks that start together submit one by one. Computed together their prompts cost less, so the first, which finds
// nothing running, waits for as long as others keep coming.
void Decoder::Impl::gather(std::unique_lock<std::mutex> & lock) {
    using namespace std::chrono;
    const auto latest = steady_clock::now() + milliseconds(2);
    const auto known = (int32_t) (active.size() + queue.size());
    for (int32_t seen = counted; !config.stepwise && seen > known && seen < config.n_slots; seen = counted) {
        const auto another = [this, seen] { return closing || counted > seen; };
        if (!changed.wait_for(lock, microseconds(200), another) || closing || steady_clock::now() > latest) {
            break;
        }
    }
}

// Whoever still waits hears of the end. From here on the context is left alone.
void Decoder::Impl::finish_all() {
    std::string why;
    {
        std::lock_guard<std::mutex> lock(mutex);
        stopped = true;
        why = cause;
    }
    std::vector<std::function<void()>> commands;
    for (;;) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            commands.swap(inbox);
        }
        if (commands.empty()) {
            break;
        }
        for (auto & command : commands) {
            try_to(command);
        }
        commands.clear();
    }
    while (!beside.empty()) {           // the worker has answered all, and is gone
        try_to([this] { take_sampled(); });
    }
    std::vector<StreamPtr> rest = active;
    rest.insert(rest.end(), queue.begin(), queue.end());
    for (const StreamPtr & stream : rest) {
        if (why.empty() || stream->cancelled) {
            end(stream, Finish::cancelled);
        } else {
            fail(stream, Failure::engine, why);
        }
    }
    publish();
}

// Called by llama.cpp between graph nodes, on this thread.
bool Decoder::Impl::should_abort() {
    if (closing.load(std::memory_order_relaxed)) {
        return true;
    }
    if (fail_in > 0 && --fail_in == 0) {
        throw broken_context("a failure that a test asked for");
    }
    if (cancel_next && --cancel_in <= 0) {
        cancel_next->cancelled = true;
        uncount(*cancel_next);
        cancel_epoch++;
        cancel_next.reset();
    }
    const uint64_t epoch = cancel_epoch.load(std::memory_order_acquire);
    if (epoch == checked_cancels || !in_flight) {
        return false;
    }
    for (const Entry & e : *in_flight) {
        // A running stream's single token is not worth its peers' step; a prompt is, once.
        if (e.stream->cancelled && (in_flight->size() == 1 || (e.n > 1 && !shielded))) {
            return true;
        }
    }
    checked_cancels = epoch;
    return false;
}

void Decoder::Impl::publish() {
    Statistics s = count;
    for (const StreamPtr & stream : active) {
        (stream->work->generated > 0 ? s.running : s.prefilling)++;
        std::lock_guard<std::mutex> lock(stream->mutex);
        s.parked += stream->parked;
    }
    s.queued     = (int32_t) queue.size();
    s.sequences  = slots.kept_count();
    s.slots_free = slots.free_count();
    s.cells_used = slots.cells_used();
    s.host_bytes = (int64_t) slots.host_used();
    s.disk_bytes = (int64_t) slots.disk_used();
    s.disk_failures = slots.disk_failures();
    s.evictions  = slots.evictions;
    s.restores   = slots.restores;
    s.recomputes = slots.recomputes;
    s.spills     = slots.spills;
    s.first_token_s = first_token_s;
    std::lock_guard<std::mutex> lock(statistics_mutex);
    published = std::move(s);
}

}  // namespace triollama::native
