// One generation as its owner sees it: what was asked, what came out, how it ended.
#pragma once

#include "sampling/sampler.hpp"

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace triollama::native {

struct TokenScore {
    float logprob = 0.0f;                   // of the chosen token, before any sampler
    std::vector<TokenLogprob> top;
};

// Text that may be shown, and the tokens it came from. Only a stream's last piece may be without text.
struct Piece {
    std::string text;
    std::vector<llama_token> tokens;
    std::vector<TokenScore>  scores;        // one per token if asked for
    int64_t time_ns = 0;                    // steady clock, when its last token was sampled
};

enum class Kind : int32_t {
    generate,
    score,          // log-probability of each token of the prompt after the first
    embed,          // the prompt's final hidden states, pooled
};

enum class Pooling : int32_t {
    mean,
    first,
    last,
};

enum class Finish : int32_t {
    none,           // still going
    eos,            // an end-of-generation token, or one of the request's end_tokens
    stop,           // a stop string
    length,         // max_tokens
    context,        // no more positions, or no more cells
    done,           // score and embed: complete
    cancelled,
    error,
};

enum class Failure : int32_t {
    none,
    decode,         // llama_decode refused or failed on this stream alone
    grammar,
    sampler,
    context_full,   // the prompt does not fit
    memory,
    adapter,
    engine,         // the decoder is dead
};

struct Usage {
    int32_t prompt    = 0;      // tokens of the prompt
    int32_t cached    = 0;      // of those, taken from the KV cache
    int32_t generated = 0;      // tokens sampled and delivered; one that ends the generation is not counted
    int64_t submitted_ns = 0;   // steady clock; 0: never happened
    int64_t admitted_ns  = 0;
    int64_t first_ns     = 0;
    int64_t last_ns      = 0;
    int64_t finished_ns  = 0;
};

struct Request {
    Kind kind = Kind::generate;
    std::vector<llama_token> tokens;        // everything from position 0
    int32_t cached = 0;                     // as many may be taken from the sequence's KV, if they are still there
    int32_t commit = 0;                     // where this turn begins: a cancelled one goes back to it
    bool    keep_on_cancel = false;         // a cancelled turn keeps what it decoded
    uint64_t sequence = 0;                  // 0: one of its own, gone when the stream ends

    std::unique_ptr<Sampler> sampler;
    int32_t accept_from = 0;                // the sampler has not yet seen the prompt from here on
    std::vector<std::string> stops;
    std::vector<llama_token> stop_tokens;   // of each stop string: the special token whose name it is, or LLAMA_TOKEN_NULL
    std::vector<llama_token> end_tokens;    // end it as the vocabulary's end-of-generation tokens do
    int32_t max_tokens = -1;                // -1: until the context is full
    int32_t logprobs = -1;                  // -1: none; n: with the n most likely
    bool    special = false;
    bool    shift = false;                  // full context: drop the older half and go on
    int32_t n_keep = 0;
    bool    hidden = false;                 // keep the last token's final hidden state
    bool    causal = true;                  // false: each prompt token attends to the whole prompt, which must fit a ubatch
    Pooling pooling = Pooling::mean;        // embed
    int32_t given = 1;                      // score: so many tokens at the beginning are not scored, and may be in the KV
    int32_t threads = 0;                    // 0: the context's own
    int32_t threads_batch = 0;

    uint64_t set = 0;                       // a ContextSet defined before; 0: the bare model
    int32_t bare = 0;                       // so many tokens come before the set is invoked: the bare model's
    int32_t priority = 0;                   // higher goes first
    int32_t capacity = 64;                  // pieces the ring holds before the stream parks
};

struct Update {
    std::optional<int32_t> max_tokens;
    std::optional<SamplingParams> sampling;
};

class Decoder;

class Stream {
public:
    explicit Stream(uint64_t id, Request request) : id(id), request(std::move(request)) {}

    const uint64_t id;

    size_t waiting() const {
        std::lock_guard<std::mutex> lock(mutex);
        return ring.size();
    }

    // Finish::none while it runs. What follows is meaningful, and constant, once it is not.
    Finish finish() const { return finished.load(std::memory_order_acquire); }

    bool was_cancelled() const { return cancelled.load(); }     // asked to; it may have ended otherwise before

    Failure failure = Failure::none;
    std::string message;
    int32_t stop_index = -1;
    llama_token end_token = LLAMA_TOKEN_NULL;   // the token that ended it, if that is how it ended
    int32_t position = 0;                       // positions [0, position) of the sequence are in the KV
    int32_t shifted = 0;                        // tokens dropped by context shifts
    std::vector<int32_t> shifts;                // how many each of them dropped, after the first n_keep
    std::vector<float> values;                  // score: log-probabilities; embed: the vector; hidden: the state

    Usage usage() const {
        std::lock_guard<std::mutex> lock(mutex);
        return use;
    }

    // The sampler as it is after the last delivered token. Only once finished.
    Sampler * sampler() { return request.sampler.get(); }

private:
    friend class Decoder;

    Request request;
    mutable std::mutex mutex;
    std::deque<Piece> ring;
    bool parked = false;                        // guarded by `mutex`
    Usage use;                                  // guarded by `mutex`
    std::atomic<Finish> finished{Finish::none};
    std::atomic<bool> cancelled{false};
    std::atomic<bool> counted{true};            // still counts against admission
    std::shared_ptr<struct Work> work;          // the decoder's own bookkeeping; null before admission and after the end
};

using StreamPtr = std::shared_ptr<Stream>;

}  // namespace triollama::native
