// The insides of Decoder, for the files that make it up.
#pragma once

#include "decoding/cost.hpp"
#include "decoding/decoder.hpp"
#include "decoding/slots.hpp"
#include "text/text_stream.hpp"
#include "threads/helpers.hpp"
#include "threads/thread.hpp"
#include "threads/worker.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace triollama::native {

inline int64_t now_ns() {
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
    llama_token token = LLAMA_TOKEN_NULL;   // none where the text begins with what is forced
    std::vector<llama_token> forced;        // what follows without a choice; the sampler has not seen it yet
    bool end = false;
    int32_t stop = -1;                  // the stop string whose name it is
    TokenScore score;
    Failure failure = Failure::none;
    std::string message;
    double seconds = 0.0;
};

// The decoder's own view of an admitted stream.
struct Work {
    Sequence * sequence = nullptr;
    std::vector<llama_token> tokens;    // prompt, then what was generated
    int32_t n_prompt = 0;
    int32_t n_decoded = 0;              // tokens [0, n_decoded) are in the KV
    int32_t n_end = 0;                  // what must be decoded before the stream's next result
    int32_t generated = 0;
    int32_t n_new = 0;                  // of those, said since the last decode that gave a result
    int32_t max_tokens = -1;
    TextStream text;
    Piece piece;                        // tokens whose text is not complete
    std::vector<Update> updates;
    bool sampling = false;              // the worker has its sampler
    std::atomic<bool> has_sampled{false};       // and this is what came of it
    Sampled sampled;
    bool slow = false;
    double sample_s = 0.0;
    std::vector<float> logits;          // a copy for the worker
    bool alone = false;                 // a joint batch failed: find out who is to blame
    bool ending = false;                // over, but the worker still has its sampler
    Finish ending_as = Finish::none;
    std::vector<double> sum;            // embed
    uint64_t order = 0;                 // of submission

    // Not a prompt, nor one that is computed again.
    bool running() const { return generated > 0 && n_end - n_decoded <= n_new; }
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
    Thread thread;

    // ------------------------------------------------------------------ the decoder's thread alone
    Slots slots;
    StepCost cost;
    Helpers helpers;
    const llama_vocab * vocab;
    const int32_t n_vocab;
    std::vector<StreamPtr> queue;                   // by priority, then order of submission
    std::vector<StreamPtr> active;                  // have a slot
    std::vector<StreamPtr> beside;                  // the worker samples for them
    std::unordered_map<uint64_t, ContextSet> sets;
    Mode     mode;
    int32_t  steps_in_mode = 0;
    int32_t  threads_now = 0;
    int32_t  threads_batch_now = 0;
    uint64_t turn = 0;                              // rotates who goes first
    bool     hold = false;                          // cells ran out: admit nobody until a stream ends
    uint64_t seen_cancels = 0;
    uint64_t checked_cancels = 0;                   // by the abort callback
    bool     dead = false;                          // llama.cpp threw: the context is not touched any more
    bool     shielded = false;                      // survivors of an aborted step: let them through
    const Group * in_flight = nullptr;
    StreamPtr cancel_next;                          // cancel_at's
    int64_t   cancel_in = 0;
    int64_t   fail_in = 0;                          // fail_at's
    Batch batch;
    Statistics count;                               // totals
    std::vector<double> first_token_s;
    size_t first_token_next = 0;
    Worker worker;

    // ------------------------------------------------------------------ from any thread
    void announce(uint64_t id);
    void nudge();
    bool post(std::function<void()> command);
    ReplyPtr ask(std::function<void(Reply &)> work);
    void uncount(Stream & stream);

    // ------------------------------------------------------------------ the thread: thread.cpp
    void run();
    template <class Work> void try_to(Work work);
    void die(const std::string & why);
    void serve(bool wait);
    void gather(std::unique_lock<std::mutex> & lock);
    void finish_all();
    bool should_abort();
    void publish();

    // ------------------------------------------------------------------ streams come and go: streams.cpp
    void enqueue(const StreamPtr & stream);
    void arrive(const StreamPtr & stream);
    void admit();
    Sequence & begin(Stream & stream);
    void start(const StreamPtr & stream, Sequence & sequence);
    void preempt(const StreamPtr & stream);
    bool preempt_parked();
    bool has_place(const Sequence * sequence);
    bool is_parked(Stream & stream);
    void drop_cancelled();
    void fail(const StreamPtr & stream, Failure failure, const std::string & message);
    void deliver(Stream & stream, Piece piece);
    void end(const StreamPtr & stream, Finish how);
    void settle(Stream & stream, Work & w, Finish how);
    void complete(const StreamPtr & stream, Finish how);

    // ------------------------------------------------------------------ what goes into a step: batching.cpp
    static Mode mode_of(const Stream & s);
    void choose_mode(const std::vector<StreamPtr> & ready);
    std::vector<Group> make_plan(const std::vector<StreamPtr> & ready);
    int32_t chunk(const Stream & stream, int32_t room) const;
    static bool every_output(const Stream & stream);
    int32_t outputs(const Stream & stream, int32_t n) const;

    // ------------------------------------------------------------------ a step: step.cpp
    bool step();
    static bool still_here(const Stream & s);
    void learn(int32_t n_running, int32_t n_prompt, double seconds);
    void enter(const Mode next, const std::vector<StreamPtr> & ready);
    void choose_threads(const Group & group);
    bool execute(Group & group);
    void restore(Entry & e);
    void make_room(Group & group);
    void blame(Group & group, int32_t code);
    void advance(Entry & e, std::vector<Sampling> & samplings);
    void score(Entry & e);
    void embed(Entry & e);

    // ------------------------------------------------------------------ tokens: tokens.cpp
    void sample_all(std::vector<Sampling> & samplings);
    void sample_beside(const StreamPtr & stream, const float * logits);
    void take_sampled();
    void emit(const StreamPtr & stream, Sampled sampled);
    bool say(const StreamPtr & stream, llama_token token, TokenScore score);
    void note_first_token(double seconds);
    bool apply_updates(const StreamPtr & stream);
    bool shift(Stream & stream);
};

}  // namespace triollama::native
