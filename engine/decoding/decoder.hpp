// The decode loop: one native thread that drives one context for many streams and never holds the GIL.
#pragma once

#include "decoding/backend.hpp"
#include "decoding/stream.hpp"
#include "threads/doorbell.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace triollama::native {

struct queue_full_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct decoder_closed_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct decoder_dead_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct prompt_too_long_error : std::runtime_error {
    prompt_too_long_error(const std::string & message, int32_t needed, int32_t n_ctx)
        : std::runtime_error(message), needed(needed), n_ctx(n_ctx) {}
    int32_t needed;
    int32_t n_ctx;
};

// How sequences may share a llama_decode.
enum class Packing : int32_t {
    mixed,      // running tokens and prompt tokens in one ubatch: a unified cache and no recurrent state
    equal,      // running tokens together, each prompt alone: upstream would split anything else
};

struct DecoderConfig {
    Packing packing = Packing::mixed;
    int32_t n_slots = 1;                // sequences of the context
    int32_t n_ubatch = 128;             // most tokens in a llama_decode
    int32_t n_outputs = 128;            // most output rows in a llama_decode
    int32_t n_ctx = 0;                  // positions of one sequence
    int32_t n_swa = 0;                  // the model's sliding window; 0: none
    bool    unified = true;             // sequences share cells
    bool    exact = false;              // numbers depend on nobody else: see llama/exact.hpp
    bool    can_shift = true;           // positions can be moved
    bool    can_roll_back = true;       // false for recurrent state: only the end of a sequence can be continued
    double  prompt_budget = 1.0;        // time for prompts in a step, in ordinary steps
    int32_t prompt_tokens = 0;          // if not 0: this many prompt tokens a step instead
    int32_t check_span = 0;             // position up to which prompts are read in full ubatches; 0: always
    bool    spares = false;             // what a stream without a sequence leaves serves those that begin alike
    int32_t max_queue = 0;              // streams that may wait for a slot
    int32_t set_steps = 8;              // steps of one ContextSet while others wait
    size_t  host_bytes = 0;             // KV of evicted sequences kept in host memory, at most
    int     disk_fd = -1;               // a file of the caller's for what host memory has no room for; -1: none
    size_t  disk_bytes = 0;             // of it, at most
    double  restore_byte_s = 0.0;       // not 0: seconds to bring back a byte of KV, instead of what is measured
    double  prompt_token_s = 0.0;       // not 0: seconds to compute a token instead, likewise
    bool    stepwise = false;           // decodes only when step() asks: for tests and for debugging
    double  slow_sampler_s = 0.001;     // a sampler slower than this runs beside the decoder
    int32_t n_helpers = 0;              // threads that sample together with the decoder's own
    double  share_sampling_s = 100e-6;  // a step that samples less than this needs no help: waking a thread takes longer
};

struct Statistics {
    int32_t running = 0;            // generating
    int32_t prefilling = 0;
    int32_t parked = 0;             // of those two, waiting for their reader
    int32_t queued = 0;
    int32_t sequences = 0;          // kept between streams
    int32_t slots_free = 0;
    int64_t cells_used = 0;         // KV positions held by all sequences; those that several share count once
    int64_t host_bytes = 0;
    int64_t disk_bytes = 0;
    int64_t finished = 0;
    int64_t cancelled = 0;
    int64_t failed = 0;
    int64_t prompt_tokens = 0;      // decoded
    int64_t cached_tokens = 0;      // taken from the cache instead
    int64_t generated_tokens = 0;
    int64_t steps = 0;              // llama_decode calls that succeeded
    int64_t aborts = 0;             // that were stopped
    int64_t evictions = 0;
    int64_t restores = 0;           // of sequences, from host memory or disk
    int64_t recomputes = 0;         // that were sooner computed again
    int64_t spills = 0;             // from host memory to disk
    int64_t disk_failures = 0;
    int64_t preemptions = 0;
    int64_t set_changes = 0;
    int64_t slow_samples = 0;
    std::vector<double> first_token_s;      // of the last streams, up to 256
};

// The answer to a command that only the decoder's thread can carry out.
struct Reply {
    explicit Reply(uint64_t id) : id(id) {}
    const uint64_t id;
    std::atomic<bool> done{false};
    bool is_done() const { return done.load(std::memory_order_acquire); }
    bool ok = false;                // what follows is meaningful once it is
    bool engine_failed = false;     // not ok because the decoder is dead
    std::string message;
    std::string bytes;
    int64_t value = 0;
};
using ReplyPtr = std::shared_ptr<Reply>;

// Every method may be called from any thread, and none waits for a step except close().
class Decoder {
public:
    Decoder(std::unique_ptr<Backend> backend, DecoderConfig config);
    ~Decoder();
    Decoder(const Decoder &) = delete;
    Decoder & operator=(const Decoder &) = delete;

    // Readable when poll() has something to say.
    int fd() const;

    // Ids of the streams and replies that have news since the last call: pieces after none, an end, an answer.
    void poll(std::vector<uint64_t> & ids);

    // Throws queue_full_error, decoder_closed_error, decoder_dead_error, prompt_too_long_error, std::invalid_argument.
    StreamPtr submit(Request request);

    // One piece; tells the thread when a parked stream may go on.
    bool take(Stream & stream, Piece & out);

    // From the return of this call on, the stream no longer counts against admission.
    void cancel(Stream & stream);

    // For tests: cancels the stream when llama.cpp asks for the n-th time from now on whether to stop.
    void cancel_at(const StreamPtr & stream, int64_t n);
    // Likewise: the decoder dies there, as of a failed assertion.
    void fail_at(int64_t n);

    // With effect from the next token that is sampled. An invalid change ends the stream with Failure::sampler.
    void update(const StreamPtr & stream, Update update);
    void set_priority(const StreamPtr & stream, int32_t priority);

    // Sequences that outlive streams. They have no KV until a stream gives them some.
    uint64_t make_sequence();
    void drop_sequence(uint64_t sequence);
    // `to` becomes `from`'s first `n` positions, as far as the cache allows; value: positions it has now.
    ReplyPtr fork_sequence(uint64_t from, uint64_t to, int32_t n);
    // bytes: upstream's blob of the sequence's state, value: positions in it. Empty if it has none.
    ReplyPtr save_sequence(uint64_t sequence);
    // The blob must be one that save_sequence gave, for this model and kind of context: the caller verifies that,
    // and keeps it unchanged until the reply is done.
    ReplyPtr load_sequence(uint64_t sequence, const uint8_t * data, size_t size, int32_t n, uint64_t set);
    // Forgets the positions [keep, keep + drop) of an idle sequence; value: positions it has then.
    ReplyPtr shift_sequence(uint64_t sequence, int32_t keep, int32_t drop);
    // value: positions of the sequence that are in the KV or in host memory
    ReplyPtr query_sequence(uint64_t sequence);

    // A set must be defined before a stream names it. Dropping waits for no stream: those that name it must have ended.
    ReplyPtr define_set(uint64_t set, ContextSet context_set);
    ReplyPtr drop_set(uint64_t set);
    // Runs on the decoder's thread between two steps; an exception it throws becomes the reply's message.
    ReplyPtr call(std::function<void(Reply &)> work);

    // With config.stepwise: `n` steps, or fewer if nothing is left to do; value: how many did something.
    ReplyPtr step(int32_t n);

    Statistics statistics() const;

    // Ends every stream as cancelled, then waits for the thread. Idempotent.
    void close();
    bool closed() const;
    std::string cause_of_death() const;     // empty while alive

private:
    struct Impl;
    std::unique_ptr<Impl> impl;
};

}  // namespace triollama::native
