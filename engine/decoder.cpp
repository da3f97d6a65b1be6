#include "decoder.hpp"

#include "cost.hpp"
#include "helpers.hpp"
#include "native_errors.hpp"
#include "openmp.hpp"
#include "slots.hpp"
#include "text.hpp"
#include "worker.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <thread>
#include <tuple>

namespace triollama {

namespace {

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What is the whole context's, so that only streams that agree on it share a batch.
struct Mode {
    uint64_t set = 0;
    bool embeddings = false;
    bool causal = true;

    bool operator==(const Mode & o) const { return set == o.set && embeddings == o.embeddings && causal == o.causal; }
    bool operator<(const Mode & o) const { return std::tie(set, embeddings, causal) < std::tie(o.set, o.embeddings, o.causal); }
};

// What one sampler call gave, wherever it ran.
struct Sampled {
    llama_token token = LLAMA_TOKEN_NULL;
    bool end = false;
    TokenScore score;
    Failure failure = Failure::none;
    std::string message;
    double seconds = 0.0;
};

Failure failure_of(const std::exception & e) {
    if (dynamic_cast<const grammar_error *>(&e)) {
        return Failure::grammar;
    }
    return dynamic_cast<const std::bad_alloc *>(&e) ? Failure::memory : Failure::sampler;
}

Sampled sample(const llama_vocab * vocab, int32_t n_vocab, const std::vector<llama_token> & end_tokens, Sampler & sampler,
               int32_t logprobs, float * logits) {
    Sampled out;
    const int64_t start = now_ns();
    try {
        double log_sum = 0.0;
        if (logprobs >= 0) {
            log_sum = log_sum_exp(logits, n_vocab);
            if (logprobs > 0) {
                top_logprobs(logits, n_vocab, logprobs, out.score.top);
            }
        }
        out.token = sampler.sample(logits);
        out.end   = llama_vocab_is_eog(vocab, out.token) ||
                    std::find(end_tokens.begin(), end_tokens.end(), out.token) != end_tokens.end();
        if (logprobs >= 0) {
            out.score.logprob = (float) (logits[out.token] - log_sum);
        }
        if (!out.end) {
            sampler.accept(out.token, true);
        }
    } catch (const std::exception & e) {
        out.failure = failure_of(e);
        out.message = e.what();
    }
    out.seconds = 1e-9 * (double) (now_ns() - start);
    return out;
}

}  // namespace

// The decoder's own view of an admitted stream.
struct Work {
    Sequence * sequence = nullptr;
    std::vector<llama_token> tokens;    // prompt, then what was generated
    int32_t n_prompt = 0;
    int32_t n_decoded = 0;              // tokens [0, n_decoded) are in the KV
    int32_t n_end = 0;                  // what must be decoded before the stream's next result
    int32_t generated = 0;
    int32_t max_tokens = -1;
    TextStream text;
    Piece piece;                        // tokens whose text is not complete
    std::vector<Update> updates;
    bool sampling = false;              // the worker has its sampler
    bool slow = false;
    double sample_s = 0.0;
    std::vector<float> logits;          // a copy for the worker
    bool alone = false;                 // a joint batch failed: find out who is to blame
    bool ending = false;                // over, but the worker still has its sampler
    Finish ending_as = Finish::none;
    std::vector<double> sum;            // embed
    uint64_t order = 0;                 // of submission

    bool running() const { return generated > 0 && n_end - n_decoded == 1; }
};

struct Entry {
    StreamPtr stream;
    int32_t n = 0;                      // tokens from n_decoded on
    int32_t first = 0;                  // index in the batch, set just before decoding
};

using Group = std::vector<Entry>;       // what goes into one llama_decode

// A stream whose next token is to be sampled, from this row of the decode's output.
struct Sampling {
    StreamPtr stream;
    float * logits = nullptr;
    Sampled result;
};

struct Decoder::Impl {
    Impl(std::unique_ptr<Backend> backend_, DecoderConfig config_)
        : backend(std::move(backend_)),
          config(config_),
          slots(*backend,
                {config.n_slots, config.n_swa, config.unified, config.can_roll_back, config.can_shift,
                 config.host_bytes, config.disk_fd, config.disk_bytes, config.restore_byte_s, config.prompt_token_s},
                [this] { return cost.prompt_token(); }),
          cost(config.n_slots),
          helpers(config.n_helpers),
          vocab(backend->vocab()),
          n_vocab(backend->n_vocab()) {
        sets[0] = ContextSet();
    }

    // ------------------------------------------------------------------ shared between threads
    std::unique_ptr<Backend> backend;
    const DecoderConfig config;
    Doorbell bell;

    mutable std::mutex mutex;                       // guards the next five
    std::condition_variable changed;
    std::vector<std::function<void()>> inbox;
    bool nudged = false;
    bool stopped = false;                           // no more commands are taken
    std::string cause;                              // why the decoder died

    std::atomic<bool> closing{false};
    std::atomic<uint64_t> cancel_epoch{0};
    std::atomic<int32_t> counted{0};                // streams that count against admission
    std::atomic<uint64_t> last_id{0};

    std::mutex news_mutex;
    std::vector<uint64_t> news;

    mutable std::mutex statistics_mutex;
    Statistics published;

    std::mutex close_mutex;
    std::thread thread;

    // ------------------------------------------------------------------ the decoder's thread alone
    Slots slots;
    StepCost cost;
    Helpers helpers;
    const llama_vocab * vocab;
    const int32_t n_vocab;
    std::vector<StreamPtr> queue;                   // by priority, then order of submission
    std::vector<StreamPtr> active;                  // have a slot
    std::unordered_map<uint64_t, ContextSet> sets;
    Mode     mode;
    int32_t  steps_in_mode = 0;
    int32_t  threads_now = 0;
    int32_t  threads_batch_now = 0;
    uint64_t turn = 0;                              // rotates who goes first
    double   credit = 0.0;                          // single packing: time prompts are owed
    bool     hold = false;                          // cells ran out: admit nobody until a stream ends
    uint64_t seen_cancels = 0;
    uint64_t checked_cancels = 0;                   // by the abort callback
    bool     dead = false;                          // llama.cpp threw: the context is not touched any more
    bool     shielded = false;                      // survivors of an aborted step: let them through
    const Group * in_flight = nullptr;
    Batch batch;
    Statistics count;                               // totals
    std::vector<double> first_token_s;
    size_t first_token_next = 0;
    Worker worker;

    // ------------------------------------------------------------------ from any thread
    void announce(uint64_t id) {
        bool first;
        {
            std::lock_guard<std::mutex> lock(news_mutex);
            first = news.empty();
            news.push_back(id);
        }
        if (first) {
            bell.ring();
        }
    }

    void nudge() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            nudged = true;
        }
        changed.notify_one();
    }

    // False if no thread will ever run it.
    bool post(std::function<void()> command) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (stopped) {
                return false;
            }
            inbox.push_back(std::move(command));
        }
        changed.notify_one();
        return true;
    }

    ReplyPtr ask(std::function<void(Reply &)> work) {
        auto reply = std::make_shared<Reply>(++last_id);
        const bool posted = post([this, reply, work] {
            try {
                reply->ok = true;
                work(*reply);
            } catch (const std::exception & e) {
                reply->ok = false;
                reply->message = e.what();
            }
            reply->done.store(true, std::memory_order_release);
            announce(reply->id);
        });
        if (!posted) {
            reply->message = "the decoder is closed";
            reply->done.store(true, std::memory_order_release);
            announce(reply->id);
        }
        return reply;
    }

    void uncount(Stream & stream) {
        if (stream.counted.exchange(false)) {
            counted--;
        }
    }

    // ------------------------------------------------------------------ the thread
    void run() {
        backend->set_abort([](void * self) { return static_cast<Impl *>(self)->should_abort(); }, this);
        bool idle = true;
        try {
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
        } catch (const std::exception & e) {
            die(e.what());
        } catch (...) {
            die("something that is no std::exception was thrown");
        }
        finish_all();
    }

    void die(const std::string & why) {
        dead = true;
        std::lock_guard<std::mutex> lock(mutex);
        cause = why.empty() ? "unknown" : why;
    }

    // Runs the commands that came in. With `wait`, sleeps until something does.
    void serve(bool wait) {
        std::vector<std::function<void()>> commands;
        {
            std::unique_lock<std::mutex> lock(mutex);
            if (wait) {
                const auto called = [this] { return nudged || !inbox.empty() || closing; };
                if (!changed.wait_for(lock, std::chrono::seconds(1), called)) {
                    release_team();         // for the other contexts of this process
                    changed.wait(lock, called);
                }
            }
            nudged = false;
            commands.swap(inbox);
        }
        for (auto & command : commands) {
            command();
        }
        drop_cancelled();
    }

    void finish_all() {
        worker.stop();
        if (!dead) {
            enter(Mode(), {});
            backend->set_threads(0, 0);
        }
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
                command();
            }
            commands.clear();
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
    bool should_abort() {
        if (closing.load(std::memory_order_relaxed)) {
            return true;
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

    // ------------------------------------------------------------------ streams come and go
    void enqueue(const StreamPtr & stream) {
        auto before = [](const StreamPtr & a, const StreamPtr & b) {
            return a->request.priority != b->request.priority ? a->request.priority > b->request.priority
                                                              : a->work->order < b->work->order;
        };
        queue.insert(std::upper_bound(queue.begin(), queue.end(), stream, before), stream);
    }

    void arrive(const StreamPtr & stream) {
        Request & r = stream->request;
        auto work = std::make_shared<Work>();
        work->n_prompt   = (int32_t) r.tokens.size();
        work->n_end      = r.kind == Kind::score ? work->n_prompt - 1 : work->n_prompt;
        work->tokens     = std::move(r.tokens);
        work->max_tokens = r.max_tokens;
        work->text       = TextStream(r.stops);
        work->order      = stream->id;
        work->slow       = r.sampler && !r.sampler->params().grammar.empty();
        stream->work     = std::move(work);
        if (!r.causal && stream->work->n_prompt > std::min(config.n_ubatch, every_output(*stream) ? config.n_outputs : config.n_ubatch)) {
            fail(stream, Failure::sampler, "without causal attention the prompt must fit into one ubatch of " +
                                               std::to_string(config.n_ubatch) + " tokens");
            return;
        }
        if (stream->cancelled) {
            end(stream, Finish::cancelled);
            return;
        }
        if (!sets.count(r.set)) {
            fail(stream, Failure::adapter, "the stream names a set of adapters that was never defined");
            return;
        }
        enqueue(stream);
    }

    void admit() {
        for (size_t i = 0; i < queue.size();) {
            const StreamPtr stream = queue[i];
            Work & w = *stream->work;
            const uint64_t name = stream->request.sequence ? stream->request.sequence : stream->id;
            Sequence * sequence = slots.find(name);
            if (stream->request.sequence && !sequence) {
                fail(stream, Failure::sampler, "the stream names a sequence that was dropped");
                continue;
            }
            // A turn waits for the one before it, and a preempted stream for its reader.
            if ((sequence && sequence->busy && w.sequence != sequence) || is_parked(*stream)) {
                i++;
                continue;
            }
            if (hold && !active.empty()) {
                return;
            }
            if (!sequence) {
                sequence = &slots.make(name, false);
            }
            if (!slots.acquire(*sequence)) {
                if (!preempt_parked()) {
                    return;
                }
                slots.acquire(*sequence);
            }
            queue.erase(std::find(queue.begin(), queue.end(), stream));
            hold = false;
            start(stream, *sequence);
            i = 0;              // who was preempted may stand before i now
        }
    }

    void start(const StreamPtr & stream, Sequence & sequence) {
        Work & w = *stream->work;
        const bool again = w.sequence != nullptr;
        sequence.busy = true;
        w.sequence = &sequence;
        const bool fresh = stream->request.kind != Kind::generate || !stream->request.causal;
        const int32_t wanted = fresh ? 0 : again ? w.n_decoded : stream->request.cached;
        w.n_decoded = slots.reuse(sequence, std::min(wanted, w.n_end - 1), stream->request.set);
        if (!again) {
            std::lock_guard<std::mutex> lock(stream->mutex);
            stream->use.cached      = w.n_decoded;
            stream->use.admitted_ns = now_ns();
            count.cached_tokens    += w.n_decoded;
        }
        active.push_back(stream);
        std::sort(active.begin(), active.end(), [](const StreamPtr & a, const StreamPtr & b) {
            return a->work->sequence->slot < b->work->sequence->slot;
        });
        if (w.n_end == 0) {                             // a score of one token: nothing to say about it
            end(stream, Finish::done);
        }
    }

    // Back to the queue, its KV on the host or gone; it will be rebuilt. Its sequence stays busy: no other turn may start.
    void preempt(const StreamPtr & stream) {
        slots.evict(*stream->work->sequence);
        active.erase(std::find(active.begin(), active.end(), stream));
        enqueue(stream);
        count.preemptions++;
    }

    bool preempt_parked() {
        for (const StreamPtr & stream : active) {
            if (!stream->work->sampling && is_parked(*stream)) {
                const StreamPtr held = stream;
                preempt(held);
                return true;
            }
        }
        return false;
    }

    bool is_parked(Stream & stream) {
        std::lock_guard<std::mutex> lock(stream.mutex);
        if (!stream.parked && (int32_t) stream.ring.size() >= stream.request.capacity) {
            stream.parked = true;
        }
        return stream.parked;
    }

    void drop_cancelled() {
        const uint64_t epoch = cancel_epoch.load(std::memory_order_acquire);
        if (epoch == seen_cancels) {
            return;
        }
        seen_cancels = epoch;
        std::vector<StreamPtr> gone;
        for (const auto & list : {active, queue}) {
            for (const StreamPtr & stream : list) {
                if (stream->cancelled) {
                    gone.push_back(stream);
                }
            }
        }
        for (const StreamPtr & stream : gone) {
            end(stream, Finish::cancelled);
        }
    }

    void fail(const StreamPtr & stream, Failure failure, const std::string & message) {
        if (stream->finish() != Finish::none) {
            return;
        }
        stream->failure = failure;
        stream->message = message;
        end(stream, Finish::error);
    }

    void deliver(Stream & stream, Piece piece) {
        bool first;
        {
            std::lock_guard<std::mutex> lock(stream.mutex);
            first = stream.ring.empty();
            stream.ring.push_back(std::move(piece));
        }
        if (first) {
            announce(stream.id);
        }
    }

    // Frees the slot, then lets the owner know.
    void end(const StreamPtr & stream, Finish how) {
        if (stream->finish() != Finish::none || !stream->work || stream->work->ending) {
            return;
        }
        Work & w = *stream->work;
        if (w.sequence && !dead) {
            settle(*stream, w, how);
        }
        active.erase(std::remove(active.begin(), active.end(), stream), active.end());
        queue.erase(std::remove(queue.begin(), queue.end(), stream), queue.end());
        hold = false;
        uncount(*stream);
        if (w.sampling) {
            w.ending    = true;         // the worker's answer completes it
            w.ending_as = how;
            return;
        }
        complete(stream, how);
    }

    void settle(Stream & stream, Work & w, Finish how) {
        Sequence & sequence = *w.sequence;
        sequence.busy = false;
        if (!stream.request.sequence) {
            slots.drop(sequence.id);
        } else {
            const bool back = how == Finish::error || (how == Finish::cancelled && !stream.request.keep_on_cancel);
            const int32_t n = back ? std::min(w.n_decoded, stream.request.commit) : w.n_decoded;
            slots.trim(sequence, n);
            slots.touch(sequence);
            stream.position = sequence.n;
        }
        w.sequence = nullptr;
    }

    void complete(const StreamPtr & stream, Finish how) {
        Work & w = *stream->work;
        if (stream->request.kind == Kind::generate) {
            w.text.flush(w.piece.text);
            if (!w.piece.text.empty() || !w.piece.tokens.empty()) {
                w.piece.time_ns = now_ns();
                deliver(*stream, std::move(w.piece));
            }
        }
        count.finished  += how != Finish::cancelled && how != Finish::error;
        count.cancelled += how == Finish::cancelled;
        count.failed    += how == Finish::error;
        {
            std::lock_guard<std::mutex> lock(stream->mutex);
            stream->use.finished_ns = now_ns();
        }
        stream->work.reset();
        publish();
        stream->finished.store(how, std::memory_order_release);
        announce(stream->id);
    }

    // ------------------------------------------------------------------ one step
    // False if there was nothing to do until something changes.
    bool step() {
        admit();
        std::vector<StreamPtr> ready;
        for (const StreamPtr & stream : active) {
            if (!stream->work->sampling && !is_parked(*stream)) {
                ready.push_back(stream);
            }
        }
        if (ready.empty()) {
            return false;
        }
        choose_mode(ready);
        ready.erase(std::remove_if(ready.begin(), ready.end(), [this](const StreamPtr & s) { return !(mode_of(*s) == mode); }),
                    ready.end());
        if (ready.empty()) {
            return true;                // the set could not be applied; its streams are gone
        }
        const std::vector<Group> plan = make_plan(ready);
        turn++;
        int32_t n_running = 0;
        int32_t n_prompt  = 0;
        bool whole = true;
        const int64_t start = now_ns();
        for (const Group & planned : plan) {
            if (&planned != &plan.front()) {
                serve(false);
            }
            if (closing) {
                return true;
            }
            Group group;
            for (const Entry & e : planned) {
                if (still_here(*e.stream)) {
                    group.push_back(e);
                    (e.stream->work->running() ? n_running : n_prompt) += e.n;
                }
            }
            whole = !group.empty() && execute(group) && whole;
        }
        if (whole) {
            learn(n_running, n_prompt, 1e-9 * (double) (now_ns() - start));
        }
        steps_in_mode++;
        return true;
    }

    // Since the plan was made it may have ended, been cancelled, or had to give up its slot.
    static bool still_here(const Stream & s) {
        return s.finish() == Finish::none && !s.cancelled && s.work && s.work->sequence && s.work->sequence->slot >= 0;
    }

    void learn(int32_t n_running, int32_t n_prompt, double seconds) {
        n_running = std::min(n_running, config.n_slots);
        if (n_prompt == 0) {
            cost.saw_ordinary(n_running, seconds);
        } else if (n_running == 0 || cost.knows(n_running)) {
            cost.saw_prompt(n_running, n_prompt, seconds);
        }
    }

    static Mode mode_of(const Stream & s) {
        const Request & r = s.request;
        return {r.set, r.kind == Kind::embed || r.hidden, r.causal || s.work->generated > 0};
    }

    // A change costs milliseconds, so each mode has several steps before the next in turn.
    void choose_mode(const std::vector<StreamPtr> & ready) {
        bool mine = false;
        const Mode * after = nullptr;
        const Mode * least = nullptr;
        std::vector<Mode> modes;
        for (const StreamPtr & s : ready) {
            modes.push_back(mode_of(*s));
        }
        for (const Mode & m : modes) {
            mine = mine || m == mode;
            if (mode < m && (!after || m < *after)) {
                after = &m;
            }
            if (!least || m < *least) {
                least = &m;
            }
        }
        if (mine && (steps_in_mode < config.set_steps || (!after && *least == mode))) {
            return;
        }
        enter(after ? *after : *least, ready);
    }

    void enter(const Mode next, const std::vector<StreamPtr> & ready) {
        steps_in_mode = 0;
        if (next.set != mode.set) {
            try {
                backend->apply(sets.at(next.set));
                count.set_changes++;
            } catch (const std::runtime_error & e) {
                const std::string why = e.what();
                for (const StreamPtr & s : ready) {
                    if (s->request.set == next.set) {
                        fail(s, Failure::adapter, why);
                    }
                }
                backend->apply(sets.at(mode.set));
                return;
            }
        }
        if (next.embeddings != mode.embeddings) {
            backend->set_embeddings(next.embeddings);
        }
        if (next.causal != mode.causal) {
            backend->set_causal(next.causal);
        }
        mode = next;
    }

    void choose_threads(const Group & group) {
        int32_t one = 0;
        int32_t many = 0;
        for (const Entry & e : group) {
            one  = std::max(one, e.stream->request.threads);
            many = std::max(many, e.stream->request.threads_batch);
        }
        if (one != threads_now || many != threads_batch_now) {
            backend->set_threads(one, many);
            threads_now = one;
            threads_batch_now = many;
        }
    }

    // Who decodes how much in this step.
    std::vector<Group> make_plan(const std::vector<StreamPtr> & ready) {
        Group running;
        std::vector<StreamPtr> prompts;
        for (const StreamPtr & s : ready) {
            if (!mode.causal) {
                return {Group{Entry{s, s->work->n_end - s->work->n_decoded}}};
            }
            if (s->work->alone) {
                return {Group{Entry{s, chunk(*s, config.n_ubatch)}}};
            }
            if (s->work->running()) {
                running.push_back(Entry{s, 1});
            } else {
                prompts.push_back(s);
            }
        }
        const size_t most = std::min(config.n_ubatch, config.n_outputs);
        if (running.size() > most) {
            std::rotate(running.begin(), running.begin() + turn % running.size(), running.end());
            running.resize(most);
        }
        if (!prompts.empty()) {
            std::rotate(prompts.begin(), prompts.begin() + turn % prompts.size(), prompts.end());
            std::stable_sort(prompts.begin(), prompts.end(), [](const StreamPtr & a, const StreamPtr & b) {
                return a->request.priority > b->request.priority;
            });
        }

        const int32_t n_running = (int32_t) running.size();
        std::vector<Group> plan;
        if (config.packing == Packing::single) {
            for (Entry & e : running) {
                plan.push_back(Group{std::move(e)});
            }
            plan_single_prompts(prompts, n_running, plan);
            return plan;
        }

        int32_t budget = config.n_ubatch;
        if (n_running > 0) {
            if (config.prompt_tokens > 0) {
                budget = config.prompt_tokens;
            } else if (cost.knows(n_running)) {
                budget = cost.prompt_tokens(n_running, (int32_t) prompts.size(), config.prompt_budget, config.n_ubatch);
            } else {
                budget = 0;             // one step without prompts shows what an ordinary one costs
            }
        }
        if (config.packing == Packing::equal) {
            if (n_running > 0) {
                plan.push_back(std::move(running));
            }
            for (const StreamPtr & s : prompts) {
                const int32_t n = chunk(*s, std::min(budget, AttentionBudget(config.n_ubatch, config.check_span).room(s->work->n_decoded)));
                if (n > 0) {
                    plan.push_back(Group{Entry{s, n}});
                    budget -= n;
                }
            }
            return plan;
        }

        Group mixed = std::move(running);
        int32_t room = std::min(budget, config.n_ubatch - n_running);
        int32_t rows = config.n_outputs - n_running;
        AttentionBudget attention(config.n_ubatch, config.check_span);
        for (const StreamPtr & s : prompts) {
            int32_t n = chunk(*s, std::min(room, attention.room(s->work->n_decoded)));
            int32_t need = outputs(*s, n);
            if (need > rows) {
                n = every_output(*s) ? rows : n - 1;
                need = outputs(*s, n);
            }
            if (n > 0) {
                mixed.push_back(Entry{s, n});
                attention.spend(s->work->n_decoded, n);
                room -= n;
                rows -= need;
            }
        }
        if (!mixed.empty()) {
            plan.push_back(std::move(mixed));
        }
        return plan;
    }

    void plan_single_prompts(const std::vector<StreamPtr> & prompts, int32_t n_running, std::vector<Group> & plan) {
        if (n_running == 0) {
            credit = 0.0;
            for (const StreamPtr & s : prompts) {
                plan.push_back(Group{Entry{s, chunk(*s, config.n_ubatch)}});
            }
            return;
        }
        if (prompts.empty()) {
            credit = 0.0;
            return;
        }
        const bool by_count = config.prompt_tokens > 0;
        if (!by_count && !cost.knows(n_running)) {
            return;
        }
        const double price = by_count ? 1.0 : cost.prompt_token();
        credit += by_count ? config.prompt_tokens : config.prompt_budget * cost.ordinary(n_running);
        for (const StreamPtr & s : prompts) {
            const int32_t n = chunk(*s, config.n_ubatch);
            if (credit < n * price) {
                return;
            }
            credit -= n * price;
            plan.push_back(Group{Entry{s, n}});
        }
        credit = std::min(credit, config.prefill_chunk * price);
    }

    // Tokens that `stream` may decode next, at most `room`.
    int32_t chunk(const Stream & stream, int32_t room) const {
        const Work & w = *stream.work;
        int32_t n = w.n_end - w.n_decoded;
        if (every_output(stream)) {
            n = std::min(n, config.n_outputs);
        }
        if (config.packing == Packing::single) {
            n = std::min(n, grid_end(stream, w) - w.n_decoded);
        }
        return std::min(n, room);
    }

    // Single packing: a replay is cut exactly where the first run was. Old turns at their recorded cuts, this turn's
    // prompt on a grid from its start, generated tokens one by one.
    int32_t grid_end(const Stream & stream, const Work & w) const {
        const int32_t start = std::min(stream.request.commit, w.n_prompt);
        if (w.n_decoded < start) {
            const std::vector<int32_t> & cuts = stream.request.cuts;
            auto next = std::upper_bound(cuts.begin(), cuts.end(), w.n_decoded);
            return next == cuts.end() ? start : std::min(*next, start);
        }
        if (w.n_decoded >= w.n_prompt) {
            return w.n_decoded + 1;
        }
        const int32_t end = w.n_decoded + config.prefill_chunk - (w.n_decoded - start) % config.prefill_chunk;
        return std::min(end, w.n_prompt);
    }

    static bool every_output(const Stream & stream) {
        return stream.request.kind != Kind::generate || stream.request.hidden;
    }

    int32_t outputs(const Stream & stream, int32_t n) const {
        if (every_output(stream)) {
            return n;
        }
        return n > 0 && stream.work->n_decoded + n == stream.work->n_end ? 1 : 0;
    }

    // One llama_decode and what follows from it. False: it did not go through.
    bool execute(Group & group) {
        batch.clear();
        for (Entry & e : group) {
            const Work & w = *e.stream->work;
            e.first = batch.size();
            for (int32_t i = 0; i < e.n; i++) {
                const int32_t p = w.n_decoded + i;
                const bool out = every_output(*e.stream) || p + 1 == w.n_end;
                batch.add(w.tokens[p], p, w.sequence->slot, out);
            }
        }
        choose_threads(group);
        in_flight = &group;
        const int32_t code = backend->decode(batch);
        in_flight = nullptr;
        if (code == 0) {
            shielded = false;
            count.steps++;
            std::vector<Sampling> samplings;
            for (Entry & e : group) {
                advance(e, samplings);
            }
            sample_all(samplings);
            return true;
        }
        for (Entry & e : group) {
            restore(e);
        }
        if (code == 2) {
            count.aborts++;
            shielded = group.size() > 1;
            serve(false);
        } else if (code == 1) {
            make_room(group);
        } else {
            blame(group, code);
        }
        return false;
    }

    // Back to where the stream was before a decode that failed or was stopped.
    void restore(Entry & e) {
        Work & w = *e.stream->work;
        slots.trim(*w.sequence, w.n_decoded);
        w.n_decoded = w.sequence->n;            // 0 if the state cannot go back: it is computed again
    }

    void make_room(Group & group) {
        if (slots.evict_idle()) {
            return;
        }
        if (active.size() == 1) {
            end(group[0].stream, Finish::context);
            return;
        }
        if (!preempt_parked()) {
            StreamPtr youngest;
            for (const StreamPtr & s : active) {
                if (!s->work->sampling && (!youngest || s->work->order > youngest->work->order)) {
                    youngest = s;
                }
            }
            preempt(youngest);          // there is one: nobody in the group is with the worker
        }
        hold = true;                    // who was sent away waits until somebody is done
    }

    void blame(Group & group, int32_t code) {
        if (group.size() == 1) {
            const std::string why = backend->problem();
            fail(group[0].stream, Failure::decode,
                 "llama_decode failed with code " + std::to_string(code) + (why.empty() ? "" : ": " + why));
            return;
        }
        for (Entry & e : group) {
            e.stream->work->alone = true;
        }
    }

    // What follows from one entry of a decode, but for the sampling of its next token.
    void advance(Entry & e, std::vector<Sampling> & samplings) {
        const StreamPtr & stream = e.stream;
        Work & w = *stream->work;
        const bool was_running = w.running();
        if (!was_running) {
            const bool first_time = stream->starts.empty() || w.n_decoded > stream->starts.back();
            if (config.packing == Packing::single && w.n_decoded < w.n_prompt && first_time) {
                stream->starts.push_back(w.n_decoded);
            }
            count.prompt_tokens += e.n;
        }
        w.alone = false;
        w.n_decoded += e.n;
        w.sequence->n = w.n_decoded;
        switch (stream->request.kind) {
            case Kind::score: return score(e);
            case Kind::embed: return embed(e);
            case Kind::generate: break;
        }
        if (w.n_decoded < w.n_end) {
            return;
        }
        if (stream->request.hidden) {
            const float * state = backend->embeddings(e.first + e.n - 1);
            if (state) {
                stream->values.assign(state, state + backend->n_embd());
            }
        }
        if (w.max_tokens == 0) {
            end(stream, Finish::length);
            return;
        }
        float * logits = backend->logits(e.first + e.n - 1);
        if (!logits) {
            throw std::runtime_error("llama.cpp gave no logits for a token that asked for them");
        }
        if (w.slow) {
            sample_beside(stream, logits);
        } else {
            samplings.push_back(Sampling{stream, logits, {}});
        }
    }

    // Each stream has its own sampler and its own row of logits, so it does not matter which thread takes which.
    void sample_all(std::vector<Sampling> & samplings) {
        auto one = [this, &samplings](int32_t i) {
            Sampling & s = samplings[i];
            const Request & r = s.stream->request;
            s.result = sample(vocab, n_vocab, r.end_tokens, *r.sampler, r.logprobs, s.logits);
        };
        double expected = 0.0;
        for (const Sampling & s : samplings) {
            expected += s.stream->work->sample_s;
        }
        if (expected >= config.share_sampling_s) {
            helpers.share((int32_t) samplings.size(), one);
        } else {
            for (int32_t i = 0; i < (int32_t) samplings.size(); i++) {
                one(i);
            }
        }
        for (Sampling & s : samplings) {
            emit(s.stream, std::move(s.result));
        }
    }

    void score(Entry & e) {
        Work & w = *e.stream->work;
        for (int32_t i = 0; i < e.n; i++) {
            const float * row = backend->logits(e.first + i);
            const llama_token next = w.tokens[w.n_decoded - e.n + i + 1];
            e.stream->values.push_back((float) (row[next] - log_sum_exp(row, n_vocab)));
        }
        if (w.n_decoded == w.n_end) {
            end(e.stream, Finish::done);
        }
    }

    void embed(Entry & e) {
        Work & w = *e.stream->work;
        const int32_t n_embd = backend->n_embd();
        const Pooling pooling = e.stream->request.pooling;
        w.sum.resize(n_embd, 0.0);
        for (int32_t i = 0; i < e.n; i++) {
            const int32_t p = w.n_decoded - e.n + i;
            if ((pooling == Pooling::first && p > 0) || (pooling == Pooling::last && p + 1 < w.n_end)) {
                continue;
            }
            const float * row = backend->embeddings(e.first + i);
            if (!row) {
                fail(e.stream, Failure::decode, "the context gives no embeddings");
                return;
            }
            for (int32_t k = 0; k < n_embd; k++) {
                w.sum[k] += row[k];
            }
        }
        if (w.n_decoded == w.n_end) {
            e.stream->values.resize(n_embd);
            for (int32_t k = 0; k < n_embd; k++) {
                e.stream->values[k] = (float) (pooling == Pooling::mean ? w.sum[k] / w.n_end : w.sum[k]);
            }
            end(e.stream, Finish::done);
        }
    }

    // ------------------------------------------------------------------ tokens
    void sample_beside(const StreamPtr & stream, const float * logits) {
        Work & w = *stream->work;
        w.logits.assign(logits, logits + n_vocab);
        w.sampling = true;
        count.slow_samples++;
        worker.run([this, stream] {
            const Request & r = stream->request;
            auto result = std::make_shared<Sampled>(
                sample(vocab, n_vocab, r.end_tokens, *r.sampler, r.logprobs, stream->work->logits.data()));
            post([this, stream, result] {
                Work & w = *stream->work;
                w.sampling = false;
                if (w.ending) {
                    complete(stream, w.ending_as);
                } else {
                    emit(stream, std::move(*result));
                }
            });
        });
    }

    void emit(const StreamPtr & stream, Sampled sampled) {
        Work & w = *stream->work;
        if (sampled.failure != Failure::none) {
            fail(stream, sampled.failure, sampled.message);
            return;
        }
        w.sample_s += 0.25 * (sampled.seconds - w.sample_s);
        w.slow = w.sample_s > config.slow_sampler_s || (w.slow && w.sample_s > 0.5 * config.slow_sampler_s);
        if (sampled.end) {
            stream->end_token = sampled.token;
            end(stream, Finish::eos);
            return;
        }
        const int64_t now = now_ns();
        w.tokens.push_back(sampled.token);
        w.n_end = (int32_t) w.tokens.size();
        w.generated++;
        count.generated_tokens++;
        {
            std::lock_guard<std::mutex> lock(stream->mutex);
            stream->use.generated = w.generated;
            stream->use.last_ns   = now;
            if (w.generated == 1) {
                stream->use.first_ns = now;
                note_first_token(1e-9 * (double) (now - stream->use.submitted_ns));
            }
        }
        std::string bytes;
        append_piece(vocab, sampled.token, stream->request.special, bytes);
        w.piece.tokens.push_back(sampled.token);
        if (stream->request.logprobs >= 0) {
            w.piece.scores.push_back(std::move(sampled.score));
        }
        const bool stop = w.text.feed(bytes.data(), bytes.size(), w.piece.text);
        if (!w.piece.text.empty() && !stop) {
            w.piece.time_ns = now;
            deliver(*stream, std::move(w.piece));
            w.piece = Piece();
        }
        if (stop) {
            stream->stop_index = w.text.matched_stop();
            end(stream, Finish::stop);
            return;
        }
        if (!apply_updates(stream)) {
            return;
        }
        if (w.max_tokens >= 0 && w.generated >= w.max_tokens) {
            end(stream, Finish::length);
        } else if ((int32_t) w.tokens.size() > config.n_ctx && !(stream->request.shift && shift(*stream))) {
            end(stream, Finish::context);
        }
    }

    void note_first_token(double seconds) {
        if (first_token_s.size() < 256) {
            first_token_s.push_back(seconds);
        } else {
            first_token_s[first_token_next++ % first_token_s.size()] = seconds;
        }
    }

    bool apply_updates(const StreamPtr & stream) {
        Work & w = *stream->work;
        try {
            for (Update & u : w.updates) {
                if (u.sampling && stream->request.sampler) {
                    stream->request.sampler->update(std::move(*u.sampling));
                }
                if (u.max_tokens) {
                    w.max_tokens = *u.max_tokens;
                }
            }
        } catch (const std::exception & e) {
            fail(stream, failure_of(e), e.what());
            return false;
        }
        w.updates.clear();
        return true;
    }

    // Drops the older half of what follows the first n_keep tokens.
    bool shift(Stream & stream) {
        Work & w = *stream.work;
        const int32_t keep = std::min(stream.request.n_keep < 0 ? w.n_prompt : stream.request.n_keep, w.n_decoded);
        const int32_t drop = (w.n_decoded - keep) / 2;
        if (!slots.shift(*w.sequence, keep, drop)) {
            return false;
        }
        w.tokens.erase(w.tokens.begin() + keep, w.tokens.begin() + keep + drop);
        w.n_decoded -= drop;
        w.n_end = (int32_t) w.tokens.size();
        w.n_prompt = std::max(std::min(keep, w.n_prompt), w.n_prompt - drop);
        stream.shifted += drop;
        stream.shifts.push_back(drop);
        return true;
    }

    void publish() {
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
};

Decoder::Decoder(std::unique_ptr<Backend> backend, DecoderConfig config) {
    if (config.n_slots < 1 || config.n_ubatch < 1 || config.n_outputs < 1 || config.n_ctx < 1 || config.prefill_chunk < 1 ||
        config.max_queue < 0 || config.prompt_tokens < 0 || !(config.prompt_budget > 0.0) || config.set_steps < 1) {
        throw std::invalid_argument("a count of the decoder's configuration is out of range");
    }
    config.prefill_chunk = std::min(config.prefill_chunk, config.n_ubatch);
    config.n_outputs     = std::min(config.n_outputs, config.n_ubatch);
    impl = std::make_unique<Impl>(std::move(backend), config);
    impl->publish();
    impl->thread = std::thread([this] { impl->run(); });
}

Decoder::~Decoder() { close(); }

int Decoder::fd() const { return impl->bell.fd(); }

void Decoder::poll(std::vector<uint64_t> & ids) {
    ids.clear();
    impl->bell.silence();           // before the list is taken: what comes after rings again
    std::lock_guard<std::mutex> lock(impl->news_mutex);
    ids.swap(impl->news);
}

StreamPtr Decoder::submit(Request request) {
    const int32_t n = (int32_t) request.tokens.size();
    if (n < 1) {
        throw std::invalid_argument("the prompt is empty; give at least one token");
    }
    for (llama_token token : request.tokens) {
        if (token < 0 || token >= impl->n_vocab) {
            throw std::invalid_argument("the prompt holds token " + std::to_string(token) + "; the vocabulary has " +
                                        std::to_string(impl->n_vocab));
        }
    }
    const int32_t n_ctx = impl->config.n_ctx;
    if (n > n_ctx) {
        throw prompt_too_long_error("the prompt has " + std::to_string(n) + " tokens; the context holds " + std::to_string(n_ctx), n, n_ctx);
    }
    if (request.kind == Kind::generate && !request.sampler) {
        throw std::invalid_argument("a generation needs a sampler");
    }
    if (request.capacity < 1 || request.cached < 0 || request.commit < 0 || request.accept_from < 0) {
        throw std::invalid_argument("capacity must be at least 1; cached, commit and accept_from at least 0");
    }
    if (request.sampler) {
        for (int32_t i = request.accept_from; i < n; i++) {
            request.sampler->accept(request.tokens[i], false);
        }
    }

    auto stream = std::make_shared<Stream>(++impl->last_id, std::move(request));
    stream->use.prompt       = n;
    stream->use.submitted_ns = now_ns();
    const int32_t most = impl->config.n_slots + impl->config.max_queue;
    if (impl->counted.fetch_add(1) >= most) {
        impl->counted--;
        throw queue_full_error(std::to_string(impl->config.n_slots) + " streams run and " + std::to_string(impl->config.max_queue) +
                               " wait; the queue is full");
    }
    Impl * self = impl.get();
    if (!impl->post([self, stream] { self->arrive(stream); })) {
        impl->counted--;
        const std::string cause = cause_of_death();
        if (!cause.empty()) {
            throw decoder_dead_error(cause);
        }
        throw decoder_closed_error("the decoder is closed");
    }
    return stream;
}

bool Decoder::take(Stream & stream, Piece & out) {
    bool go_on = false;
    {
        std::lock_guard<std::mutex> lock(stream.mutex);
        if (stream.ring.empty()) {
            return false;
        }
        out = std::move(stream.ring.front());
        stream.ring.pop_front();
        if (stream.parked && (int32_t) stream.ring.size() <= stream.request.capacity / 2) {
            stream.parked = false;
            go_on = true;
        }
    }
    if (go_on) {
        impl->nudge();
    }
    return true;
}

void Decoder::cancel(Stream & stream) {
    if (stream.finish() != Finish::none) {
        return;
    }
    stream.cancelled = true;
    impl->uncount(stream);
    impl->cancel_epoch.fetch_add(1, std::memory_order_release);
    impl->nudge();
}

void Decoder::update(const StreamPtr & stream, Update update) {
    Impl * self = impl.get();
    auto shared = std::make_shared<Update>(std::move(update));
    impl->post([self, stream, shared] {
        if (!stream->work || stream->work->ending || stream->finish() != Finish::none) {
            return;
        }
        stream->work->updates.push_back(std::move(*shared));
        if (stream->work->sampling || !self->apply_updates(stream)) {
            return;
        }
        const Work & w = *stream->work;
        if (w.max_tokens >= 0 && w.generated >= w.max_tokens && w.generated > 0) {
            self->end(stream, Finish::length);
        }
    });
}

void Decoder::set_priority(const StreamPtr & stream, int32_t priority) {
    Impl * self = impl.get();
    impl->post([self, stream, priority] {
        stream->request.priority = priority;
        auto place = std::find(self->queue.begin(), self->queue.end(), stream);
        if (place != self->queue.end()) {
            self->queue.erase(place);
            self->enqueue(stream);
        }
    });
}

uint64_t Decoder::make_sequence() {
    Impl * self = impl.get();
    const uint64_t id = ++impl->last_id;
    impl->post([self, id] { self->slots.make(id, true); });
    return id;
}

void Decoder::drop_sequence(uint64_t sequence) {
    Impl * self = impl.get();
    impl->post([self, sequence] {
        const Sequence * s = self->slots.find(sequence);
        if (s && s->busy) {
            std::vector<StreamPtr> all = self->active;
            all.insert(all.end(), self->queue.begin(), self->queue.end());
            for (const StreamPtr & stream : all) {
                if (stream->request.sequence == sequence) {
                    stream->cancelled = true;
                    self->end(stream, Finish::cancelled);
                }
            }
        }
        self->slots.drop(sequence);
    });
}

ReplyPtr Decoder::fork_sequence(uint64_t from, uint64_t to, int32_t n) {
    Impl * self = impl.get();
    return impl->ask([self, from, to, n](Reply & reply) {
        Sequence * a = self->slots.find(from);
        Sequence * b = self->slots.find(to);
        if (!a || !b) {
            throw std::runtime_error("a sequence to fork was dropped");
        }
        self->slots.fork(*a, *b, n);
        reply.value = b->n;
    });
}

ReplyPtr Decoder::save_sequence(uint64_t sequence) {
    Impl * self = impl.get();
    return impl->ask([self, sequence](Reply & reply) {
        Sequence * s = self->slots.find(sequence);
        if (!s) {
            throw std::runtime_error("the sequence to save was dropped");
        }
        if (s->busy) {
            throw std::runtime_error("the sequence to save is in use by a stream");
        }
        reply.bytes = self->slots.save(*s);
        reply.value = reply.bytes.empty() ? 0 : s->n;
    });
}

ReplyPtr Decoder::load_sequence(uint64_t sequence, const uint8_t * data, size_t size, int32_t n, uint64_t set) {
    Impl * self = impl.get();
    return impl->ask([self, sequence, data, size, n, set](Reply & reply) {
        Sequence * s = self->slots.find(sequence);
        if (!s) {
            throw std::runtime_error("the sequence to load was dropped");
        }
        reply.ok = self->slots.load(*s, data, size, n, set);
        reply.value = s->n;
        if (!reply.ok) {
            reply.message = "llama.cpp refused the saved state, or every sequence is busy";
        }
    });
}

ReplyPtr Decoder::shift_sequence(uint64_t sequence, int32_t keep, int32_t drop) {
    Impl * self = impl.get();
    return impl->ask([self, sequence, keep, drop](Reply & reply) {
        Sequence * s = self->slots.find(sequence);
        if (!s || s->busy) {
            throw std::runtime_error(s ? "the sequence to shift is in use by a stream" : "the sequence to shift was dropped");
        }
        reply.ok = self->slots.shift(*s, keep, drop);
        reply.value = s->n;
        if (!reply.ok) {
            reply.message = "the sequence could not be shifted";
        }
    });
}

ReplyPtr Decoder::query_sequence(uint64_t sequence) {
    Impl * self = impl.get();
    return impl->ask([self, sequence](Reply & reply) {
        Sequence * s = self->slots.find(sequence);
        reply.value = s ? s->n : 0;
    });
}

ReplyPtr Decoder::define_set(uint64_t set, ContextSet context_set) {
    Impl * self = impl.get();
    return impl->ask([self, set, context_set](Reply &) {
        if (set == 0 || self->sets.count(set)) {
            throw std::runtime_error("this set of adapters is defined already");
        }
        self->sets[set] = context_set;
    });
}

ReplyPtr Decoder::drop_set(uint64_t set) {
    Impl * self = impl.get();
    return impl->ask([self, set](Reply &) {
        self->drop_cancelled();     // who was asked to end before this command no longer uses it
        for (const auto & list : {self->active, self->queue}) {
            for (const StreamPtr & stream : list) {
                if (stream->request.set == set) {
                    throw std::runtime_error("a stream still uses this set of adapters");
                }
            }
        }
        if (set == 0 || !self->sets.count(set)) {
            return;
        }
        if (self->mode.set == set) {
            self->backend->apply(self->sets.at(0));
            self->mode.set = 0;
        }
        self->sets.erase(set);
    });
}

ReplyPtr Decoder::call(std::function<void(Reply &)> work) { return impl->ask(std::move(work)); }

ReplyPtr Decoder::step(int32_t n) {
    Impl * self = impl.get();
    return impl->ask([self, n](Reply & reply) {
        if (!self->config.stepwise) {
            throw std::runtime_error("the decoder was not opened stepwise");
        }
        for (int32_t i = 0; i < n && !self->closing; i++) {
            self->drop_cancelled();
            reply.value += self->step();
        }
        self->publish();
    });
}

Statistics Decoder::statistics() const {
    std::lock_guard<std::mutex> lock(impl->statistics_mutex);
    return impl->published;
}

void Decoder::close() {
    std::lock_guard<std::mutex> once(impl->close_mutex);
    impl->closing = true;
    impl->nudge();
    if (impl->thread.joinable()) {
        impl->thread.join();
    }
}

bool Decoder::closed() const {
    std::lock_guard<std::mutex> lock(impl->mutex);
    return impl->stopped || impl->closing;
}

std::string Decoder::cause_of_death() const {
    std::lock_guard<std::mutex> lock(impl->mutex);
    return impl->cause;
}

}  // namespace triollama
