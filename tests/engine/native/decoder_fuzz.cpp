// The decoder over a backend that remembers every token it was given and fails on request.
//
// Its logits are a function of all tokens in a sequence's cache, so a token that was kept, lost or moved by mistake
// changes what is generated. Usage: decoder_fuzz SEED ROUNDS. Prints "ok" or what went wrong.
#include "decoding/cost.hpp"
#include "decoding/decoder.hpp"
#include "guards/errors.hpp"
#include "text/text_stream.hpp"
#include "text/token_texts.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <poll.h>
#include <pthread.h>
#include <random>
#include <thread>

using namespace triollama::native;

static const int32_t N_VOCAB = 64;
static const llama_token END = 0;

[[noreturn]] static void die(const std::string & why) {
    std::printf("%s\n", why.c_str());
    std::exit(1);
}

static void check(bool good, const std::string & why) {
    if (!good) {
        die(why);
    }
}

// Compiled with -Dpthread_create=start_or_refuse: the decoder's threads begin here, or there are no more.
#undef pthread_create
extern "C" int pthread_create(pthread_t *, const pthread_attr_t *, void * (*)(void *), void *);
static std::atomic<int> refuse_thread{0};       // per mille
static std::atomic<long> total_refused{0};
extern "C" int start_or_refuse(pthread_t * thread, const pthread_attr_t * attributes, void * (*work)(void *), void * data) noexcept {
    static std::atomic<unsigned> calls{0};
    if ((int) (calls++ * 379 % 1000) < refuse_thread) {
        total_refused++;
        return EAGAIN;
    }
    return pthread_create(thread, attributes, work, data);
}

// A thread that finds no memory: once, or for as long as it works on its sampler's job.
enum class Starves { never, once, on };
static thread_local Starves starves = Starves::never;
static std::atomic<long> total_starved{0};
void * operator new(size_t size, const std::nothrow_t &) noexcept {
    if (starves != Starves::never) {
        starves = starves == Starves::once ? Starves::never : starves;
        total_starved++;
        return nullptr;
    }
    return std::malloc(size);
}
void * operator new(size_t size) {
    void * memory = operator new(size, std::nothrow);
    if (!memory) {
        throw std::bad_alloc();
    }
    return memory;
}
void operator delete(void * memory) noexcept { std::free(memory); }
void operator delete(void * memory, size_t) noexcept { std::free(memory); }

static bool is_worker() {
    char name[16] = {};
    return pthread_getname_np(pthread_self(), name, sizeof(name)) == 0 && std::string(name) == "triollama-slow";
}

// What a grammar leaves no choice about, after a token that was sampled.
static std::vector<llama_token> forced_after(llama_token token) {
    std::vector<llama_token> forced;
    for (llama_token i = 1; token % 3 == 1 && i <= token % 8; i++) {
        forced.push_back(1 + (token * 7 + i * 5) % (N_VOCAB - 1));
    }
    return forced;
}
static std::atomic<long> total_forced{0};

// ---------------------------------------------------------------- what the decoder would link otherwise
namespace triollama::native {

struct Sampler::Impl {
    SamplingParams params;
    llama_token last = END;
};
Sampler::Sampler(const llama_vocab *, SamplingParams params) : impl(new Impl{std::move(params), END}) {}
Sampler::~Sampler() = default;
llama_token Sampler::sample(float * logits) {
    starves = Starves::never;
    if (impl->params.seed == 13 || impl->params.seed == 14) {
        const grammar_error why("no token continues the text, which is more than a string has room for in itself");
        starves = impl->params.seed == 14 && is_worker() ? Starves::on : Starves::never;
        throw why;
    }
    return (llama_token) (std::max_element(logits, logits + N_VOCAB) - logits);
}
void Sampler::accept(llama_token token, bool generated) { impl->last = generated ? token : END; }
std::vector<llama_token> Sampler::forced() const {
    const bool forces = !impl->params.grammar.text.empty() && impl->last != END;
    return forces ? forced_after(impl->last) : std::vector<llama_token>();
}
void Sampler::update(SamplingParams params) { impl->params = std::move(params); }
const SamplingParams & Sampler::params() const { return impl->params; }

double log_sum_exp(const float *, int32_t) { return 0.0; }
void top_logprobs(const float *, int32_t, int32_t, std::vector<TokenLogprob> & out) { out.clear(); }
void append_piece(const llama_vocab *, llama_token token, bool, std::string & out) { out += (char) ('0' + token); }

TextStream::TextStream(std::vector<std::string>) {}
bool TextStream::feed(const char * bytes, size_t n, std::string & out) {
    out.append(bytes, n);
    return false;
}
void TextStream::flush(std::string &) {}

}  // namespace triollama::native

bool llama_vocab_is_eog(const llama_vocab *, llama_token token) { return token == END; }

// ---------------------------------------------------------------- the model: a function of all tokens so far
static llama_token next_token(const std::vector<llama_token> & tokens) {
    uint64_t h = 1469598103934665603ull;
    for (llama_token t : tokens) {
        h = (h ^ (uint64_t) (t + 1)) * 1099511628211ull;
    }
    h ^= h >> 29;
    return h % 97 == 0 ? END : (llama_token) (1 + h % (N_VOCAB - 1));
}

struct Faults {
    std::atomic<int> no_slot{0};        // per mille of decodes
    std::atomic<int> error{0};
    std::atomic<int> abort_checks{3};
    std::atomic<bool> throws{false};
    std::atomic<int> poison{-1};        // a batch with this token fails with -2
    std::atomic<bool> starves{false};   // no memory for what comes next to a row of logits
};

class ScriptedBackend final : public Backend {
public:
    ScriptedBackend(Faults & faults, int32_t n_slots, size_t cells, bool can_roll_back, unsigned seed)
        : faults(faults), kv(n_slots), cells(cells), can_roll_back(can_roll_back), rng(seed) {}

    const llama_vocab * vocab() const override { return nullptr; }
    int32_t n_vocab() const override { return N_VOCAB; }
    int32_t n_embd() const override { return 4; }
    std::string problem() override { return "scripted"; }

    int32_t decode(const Batch & b) override {
        if (faults.throws) {
            throw std::runtime_error("scripted death");
        }
        size_t used = b.token.size();
        for (const auto & row : kv) {
            used += row.size();
        }
        if (used > cells || chance(faults.no_slot)) {
            return 1;
        }
        rows.assign(b.token.size(), std::vector<float>());
        for (int32_t i = 0; i < b.size(); i++) {
            std::vector<llama_token> & row = kv.at(b.slot[i]);
            check(b.pos[i] == (int32_t) row.size(), "a position does not continue its sequence");
            row.push_back(b.token[i]);
            if (b.output[i]) {
                rows[i].assign(N_VOCAB, 0.0f);
                rows[i][next_token(row)] = 1.0f;
            }
        }
        for (int i = 0; i < faults.abort_checks; i++) {
            if (should_abort(data)) {
                return 2;               // dirty cells stay behind
            }
            std::this_thread::yield();
        }
        const bool poisoned = std::find(b.token.begin(), b.token.end(), faults.poison.load()) != b.token.end();
        return poisoned || chance(faults.error) ? -2 : 0;
    }
    float * logits(int32_t i) override {
        starves = faults.starves.exchange(false) ? Starves::once : Starves::never;
        return rows.at(i).empty() ? nullptr : rows[i].data();
    }
    const float * embeddings(int32_t) override { return nullptr; }

    bool seq_rm(llama_seq_id slot, llama_pos p0, llama_pos p1) override {
        std::vector<llama_token> & row = kv.at(slot);
        const size_t from = std::max(p0, 0);
        if (from == 0 && p1 < 0) {
            row.clear();
            return true;
        }
        if (!can_roll_back) {
            return from >= row.size();
        }
        const size_t to = p1 < 0 ? row.size() : std::min((size_t) p1, row.size());
        if (from < to) {
            row.erase(row.begin() + from, row.begin() + to);
        }
        return true;
    }
    void seq_cp(llama_seq_id from, llama_seq_id to) override { kv.at(to) = kv.at(from); }
    void seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos) override { die("nobody asked for a shift"); }
    llama_pos seq_pos_min(llama_seq_id slot) override { return kv.at(slot).empty() ? -1 : 0; }
    llama_pos seq_pos_max(llama_seq_id slot) override { return (llama_pos) kv.at(slot).size() - 1; }
    std::string state_get(llama_seq_id slot) override {
        const auto & row = kv.at(slot);
        return std::string((const char *) row.data(), row.size() * sizeof(llama_token));
    }
    bool state_set(llama_seq_id slot, const uint8_t * bytes, size_t size) override {
        auto & row = kv.at(slot);
        row.resize(size / sizeof(llama_token));
        std::copy_n(bytes, size, (uint8_t *) row.data());
        return true;
    }
    void apply(const ContextSet &) override {}
    void set_embeddings(bool) override {}
    void set_causal(bool) override {}
    void set_threads(int32_t, int32_t) override {}
    void set_abort(bool (*fn)(void *), void * d) override {
        should_abort = fn;
        data = d;
    }

private:
    bool chance(int per_mille) { return (int) (rng() % 1000) < per_mille; }

    Faults & faults;
    std::vector<std::vector<llama_token>> kv;
    size_t cells;
    bool can_roll_back;
    std::mt19937 rng;
    std::vector<std::vector<float>> rows;
    bool (*should_abort)(void *) = nullptr;
    void * data = nullptr;
};

static long total_alike = 0;            // streams that began with what another left
static Statistics total;                // over all rounds: what was never reached was never tested

// ---------------------------------------------------------------- streams with what they should give
struct Expected {
    StreamPtr stream;
    std::vector<llama_token> history;   // grows by what was taken
    size_t n_prompt = 0;
    bool forces = false;
    std::vector<llama_token> forced;    // comes next
    bool reads = true;
    bool may_fail = false;
};

static void take_all(Decoder & decoder, Expected & e) {
    Piece piece;
    while (decoder.take(*e.stream, piece)) {
        for (llama_token t : piece.tokens) {
            const bool chosen = e.forced.empty();
            check(t == (chosen ? next_token(e.history) : e.forced.front()),
                  "stream " + std::to_string(e.stream->id) + " gave a wrong token after " +
                      std::to_string(e.history.size() - e.n_prompt));
            e.history.push_back(t);
            if (!chosen) {
                e.forced.erase(e.forced.begin());
                total_forced++;
            } else if (e.forces) {
                e.forced = forced_after(t);
            }
        }
    }
}

static void wait_for_news(Decoder & decoder) {
    pollfd fd = {decoder.fd(), POLLIN, 0};
    check(::poll(&fd, 1, -1) == 1, "poll failed");  // who started us knows how long is too long
    std::vector<uint64_t> ids;
    decoder.poll(ids);
}

static void check_end(const Expected & e, const Request & asked) {
    const Stream & s = *e.stream;
    const size_t n = e.history.size() - e.n_prompt;
    check((size_t) s.usage().generated == n, "usage does not count what was delivered");
    switch (s.finish()) {
        case Finish::eos: return check(next_token(e.history) == END, "an end that the model did not give");
        case Finish::length: return check((int32_t) n == asked.max_tokens, "a wrong length");
        case Finish::context: return;
        case Finish::cancelled: return check(s.was_cancelled(), "cancelled by nobody");
        case Finish::error: return check(e.may_fail && s.failure != Failure::engine, "failed: " + s.message);
        default: die("an impossible end");
    }
}

static void round(unsigned seed) {
    std::mt19937 rng(seed);
    auto below = [&rng](unsigned n) { return (int) (rng() % n); };
    Faults faults;
    DecoderConfig config;
    config.n_slots  = 1 + below(5);
    config.n_ctx    = 40 + below(60);
    config.n_ubatch = config.n_slots + below(30);
    config.n_outputs = config.n_ubatch;
    config.packing  = (Packing) below(2);
    config.unified  = config.packing == Packing::mixed;
    config.can_roll_back = below(4) > 0;
    config.can_shift = false;
    config.max_queue = 40;
    config.spares = below(2);
    config.prompt_tokens = below(3) ? 1 + below(12) : 0;
    config.host_bytes = below(2) ? 64 + below(4096) : 0;
    std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(below(2) ? std::tmpfile() : nullptr, [](std::FILE * f) { return f ? std::fclose(f) : 0; });
    config.disk_fd = file ? fileno(file.get()) : -1;
    config.disk_bytes = 64 + below(4096);
    if (below(3) == 0) {                // a price that makes it choose
        config.restore_byte_s = 1.0;
        config.prompt_token_s = 3.0 + below(3);
    }
    if (below(8) == 0) {
        config.disk_fd = 9999;          // a disk that takes nothing
    }
    config.slow_sampler_s = below(4) ? 1.0 : 0.0;
    config.n_helpers = below(4);
    config.check_span = below(3);
    config.share_sampling_s = 0.0;
    const bool tight = below(3) == 0;
    const size_t cells = tight ? config.n_ctx + 8 : (size_t) config.n_ctx * config.n_slots;
    faults.no_slot = below(3) == 0 ? below(60) : 0;
    faults.error = below(4) == 0 ? below(40) : 0;
    faults.abort_checks = 1 + below(6);

    const int refused = below(4) == 0 ? 1000 : below(4) == 0 ? 500 : 0;

    refuse_thread = 0;
    Decoder decoder(std::make_unique<ScriptedBackend>(faults, config.n_slots, cells, config.can_roll_back, seed), config);
    refuse_thread = refused;                        // it has its own; its helpers start when they are needed
    std::map<uint64_t, Expected> streams;
    std::map<uint64_t, int32_t> max_tokens;
    struct Kept {
        std::vector<llama_token> history;
        int32_t position = 0;
    };
    std::map<uint64_t, Kept> kept;
    std::map<uint64_t, uint64_t> using_sequence;    // stream: sequence
    for (int i = below(4); i > 0; i--) {
        kept[decoder.make_sequence()];
    }

    std::vector<llama_token> beginning;             // of many prompts
    for (int i = 0; i < 40; i++) {
        beginning.push_back(1 + below(N_VOCAB - 1));
    }

    int to_start = 10 + below(40);
    while (to_start > 0 || !streams.empty()) {
        if (to_start > 0 && (streams.empty() || below(2))) {
            Request r;
            std::vector<llama_token> history;
            uint64_t sequence = 0;
            if (!kept.empty() && below(2)) {
                auto it = std::next(kept.begin(), below(kept.size()));
                bool used = false;
                for (const auto & u : using_sequence) {
                    used = used || u.second == it->first;
                }
                if (!used) {
                    sequence = it->first;
                    history  = it->second.history;
                    r.cached = it->second.position;
                    r.commit = it->second.position;
                }
            }
            if (!sequence && below(2)) {
                history.assign(beginning.begin(), beginning.begin() + 10 + below(31));
            }
            for (int i = 1 + below(30); i > 0; i--) {
                history.push_back(1 + below(N_VOCAB - 1));
            }
            if ((int32_t) history.size() > config.n_ctx) {
                if (sequence) {
                    kept[sequence] = Kept();
                }
                continue;
            }
            Expected e;
            SamplingParams params;
            params.seed = below(20) == 0 ? 13 + below(2) : 1;
            if (below(3) == 0) {
                params.grammar.text = "root ::= any";
            }
            r.sampler  = std::make_unique<Sampler>(nullptr, params);
            r.tokens   = history;
            r.sequence = sequence;
            r.keep_on_cancel = below(2);
            r.max_tokens = below(40);
            r.capacity = 1 + below(6);
            r.priority = below(3);
            e.may_fail = params.seed > 1 || faults.error > 0;
            e.history  = history;
            e.n_prompt = history.size();
            e.reads    = below(5) > 0;
            e.forces   = !params.grammar.text.empty();
            const int32_t most = r.max_tokens;
            try {
                e.stream = decoder.submit(std::move(r));
            } catch (const queue_full_error &) {
                for (auto & item : streams) {
                    item.second.reads = true;
                }
                continue;
            }
            to_start--;
            max_tokens[e.stream->id] = most;
            if (sequence) {
                using_sequence[e.stream->id] = sequence;
            }
            streams[e.stream->id] = std::move(e);
        }
        bool moved = false;
        for (auto it = streams.begin(); it != streams.end();) {
            Expected & e = it->second;
            const bool over = e.stream->finish() != Finish::none;
            if (e.reads || over || below(50) == 0) {
                take_all(decoder, e);
            }
            if (!over) {
                if (below(1500) == 0) {
                    decoder.cancel(*e.stream);
                } else if (below(60) == 0) {
                    decoder.set_priority(e.stream, below(5));
                }
                ++it;
                continue;
            }
            Request asked;
            asked.max_tokens = max_tokens[it->first];
            check_end(e, asked);
            auto used = using_sequence.find(it->first);
            if (used == using_sequence.end() && e.stream->usage().cached > 0) {
                check(config.spares, "a stream found what nobody left");
                total_alike++;
            }
            if (used != using_sequence.end()) {
                Kept & k = kept[used->second];
                check(e.stream->position <= (int32_t) e.history.size(), "more in the cache than there is");
                k.position = e.stream->position;
                k.history.assign(e.history.begin(), e.history.begin() + k.position);
                using_sequence.erase(used);
            }
            it = streams.erase(it);
            moved = true;
        }
        if (to_start == 0) {
            for (auto & item : streams) {
                item.second.reads = true;
            }
        }
        if (!moved && !streams.empty() && (to_start == 0 || below(3) == 0)) {
            bool pending = false;
            for (auto & item : streams) {
                pending = pending || item.second.stream->waiting() || item.second.stream->finish() != Finish::none;
            }
            if (!pending) {
                wait_for_news(decoder);
            }
        }
        if (kept.size() >= 2 && below(40) == 0) {
            const uint64_t from = kept.begin()->first;
            const uint64_t to = kept.rbegin()->first;
            bool busy = false;
            for (const auto & u : using_sequence) {
                busy = busy || u.second == from || u.second == to;
            }
            if (!busy) {
                const Kept source = kept[from];
                const int32_t n = source.position ? below(source.position + 1) : 0;
                ReplyPtr reply = decoder.fork_sequence(from, to, n);
                while (!reply->is_done()) {
                    wait_for_news(decoder);
                }
                check(reply->ok && reply->value <= n, "a wrong fork");
                kept[to].history.assign(source.history.begin(), source.history.begin() + reply->value);
                kept[to].position = (int32_t) reply->value;
            }
        }
    }
    for (const auto & k : kept) {
        decoder.drop_sequence(k.first);
    }
    ReplyPtr reply = decoder.query_sequence(0);
    while (!reply->is_done()) {
        wait_for_news(decoder);
    }
    decoder.close();
    const Statistics s = decoder.statistics();
    total.finished += s.finished;
    total.cancelled += s.cancelled;
    total.failed += s.failed;
    total.generated_tokens += s.generated_tokens;
    total.cached_tokens += s.cached_tokens;
    total.aborts += s.aborts;
    total.evictions += s.evictions;
    total.restores += s.restores;
    total.recomputes += s.recomputes;
    total.spills += s.spills;
    total.disk_failures += s.disk_failures;
    total.preemptions += s.preemptions;
    total.slow_samples += s.slow_samples;
    check(s.slots_free == config.n_slots, "a slot was lost");
    check(s.cells_used == 0 && s.host_bytes == 0 && s.disk_bytes == 0 && s.sequences == 0, "memory was lost");
}

static Request simple(std::vector<llama_token> tokens, int32_t max_tokens) {
    Request r;
    r.tokens = std::move(tokens);
    r.max_tokens = max_tokens;
    r.sampler = std::make_unique<Sampler>(nullptr, SamplingParams());
    r.capacity = 1000;
    return r;
}

static void finish(Decoder & decoder, const StreamPtr & stream) {
    while (stream->finish() == Finish::none) {
        wait_for_news(decoder);
    }
}

// A stream that always fails ends alone; those it shared a batch with go on.
static void poisoned() {
    Faults faults;
    faults.poison = 7;
    DecoderConfig config;
    config.n_slots = 3;
    config.n_ctx = 100;
    Decoder decoder(std::make_unique<ScriptedBackend>(faults, 3, 300, true, 1), config);
    std::vector<StreamPtr> streams;
    for (llama_token t : {5, 7, 9}) {
        streams.push_back(decoder.submit(simple({t, t, t}, 0)));
    }
    for (const StreamPtr & s : streams) {
        finish(decoder, s);
    }
    check(streams[0]->finish() == Finish::length && streams[2]->finish() == Finish::length, "an innocent stream failed");
    check(streams[1]->finish() == Finish::error && streams[1]->failure == Failure::decode, "the culprit did not fail");
    check(streams[1]->message.find("scripted") != std::string::npos, "the cause was not told");
}

// No memory for what the worker is to do ends the stream that it was for.
static void starved() {
    Faults faults;
    DecoderConfig config;
    config.n_slots = 2;
    config.n_ctx = 100;
    Decoder decoder(std::make_unique<ScriptedBackend>(faults, 2, 200, true, 1), config);
    for (int i = 0; i < 2; i++) {
        Request r = simple({1, 2, 3}, 4);
        SamplingParams params;
        params.grammar.text = "root ::= any";       // its sampler runs beside the steps
        r.sampler = std::make_unique<Sampler>(nullptr, params);
        faults.starves = i == 0;
        const StreamPtr stream = decoder.submit(std::move(r));
        finish(decoder, stream);
        check(i > 0 || (stream->finish() == Finish::error && stream->failure == Failure::memory), "starved, and not told so");
        check(i == 0 || stream->finish() == Finish::length || stream->finish() == Finish::eos, "another suffered from it");
    }
}

// An exception out of llama.cpp ends everything, with its cause, and no thread hangs.
static void death() {
    Faults faults;
    DecoderConfig config;
    config.n_slots = 2;
    config.n_ctx = 1000000;
    config.max_queue = 4;
    Decoder decoder(std::make_unique<ScriptedBackend>(faults, 2, 10000000, true, 1), config);
    std::vector<StreamPtr> streams;
    for (int i = 0; i < 4; i++) {
        Request r = simple({1, 2, 3}, -1);
        r.capacity = 2;
        streams.push_back(decoder.submit(std::move(r)));
    }
    faults.throws = true;
    Piece piece;
    for (const StreamPtr & s : streams) {
        while (s->finish() == Finish::none) {
            for (const StreamPtr & other : streams) {
                while (decoder.take(*other, piece)) {}
            }
            wait_for_news(decoder);
        }
        check(s->finish() == Finish::eos || (s->finish() == Finish::error && s->failure == Failure::engine), "not broken");
    }
    check(decoder.cause_of_death() == "scripted death", "the cause of death was not told");
    try {
        decoder.submit(simple({1}, 1));
        die("a dead decoder took a stream");
    } catch (const decoder_dead_error &) {
    }
    ReplyPtr reply = decoder.query_sequence(1);
    check(reply->is_done() && !reply->ok, "a dead decoder took a command");
}

// Prompts get their share of time, whatever a token of a prompt costs, and an outlier does not change that.
static void shares() {
    for (double token_s : {0.0002, 0.0015, 0.006}) {
        StepCost cost(4);
        check(!cost.knows(2), "knows what it has not seen");
        cost.saw_prompt(0, 128, 128 * token_s * 0.5);       // long prompts alone are cheaper by the token
        for (int i = 0; i < 5; i++) {
            cost.saw_ordinary(2, 0.020);
        }
        check(cost.knows(2) && !cost.knows(1), "mixes up the numbers of streams");
        double took = 0.0;
        for (int i = 0; i < 60; i++) {
            const int32_t n = cost.prompt_tokens(2, 1, 1.5, 128);
            took = 0.020 + n * token_s;
            cost.saw_prompt(2, n, i == 30 ? 20 * took : took);
        }
        const double steps = took / 0.020;
        check(steps < 2.6, "prompts took more than their share");
        check(steps > 2.1 || 0.020 + 128 * token_s <= took + 1e-9, "prompts got less than their share");
    }
}

// Where many prompts join, a step may cost what it will cost anyway once they run.
static void joins() {
    StepCost cost(16);
    cost.saw_ordinary(1, 0.016);
    cost.saw_prompt(0, 100, 0.2);
    check(std::abs(cost.ordinary(9) - (0.016 + 8 * 0.002)) < 1e-9, "not the least that nine streams cost");
    check(cost.prompt_tokens(1, 1, 1.6, 128) == 12, "a lone prompt got more than its budget");
    check(cost.prompt_tokens(1, 15, 0.05, 128) == 15, "the least that a step will cost was not allowed");
    check(cost.prompt_tokens(4, 4, 0.55, 128) == 24, "four who wait do not count four times beside few");
    check(cost.prompt_tokens(16, 4, 0.6, 128) == 27, "one who waits does not weigh as much as eight who run");
    check(cost.prompt_tokens(1, 15, 1.6, 128) == 128, "one stream holds up fifteen");
    cost.saw_ordinary(16, 0.0965);
    check(cost.prompt_tokens(1, 15, 0.05, 128) == 40, "what a step will cost was not allowed");
    check(cost.prompt_tokens(1, 99, 1.6, 32) == 32, "more than there is room for");
    check(cost.prompt_tokens(16, 1, 1.6, 128) == 77, "the budget depends on who joins");
}

// The deeper in their prompts, the fewer tokens at once, and together no more attention than a full ubatch at the span.
static void depths() {
    const AttentionBudget free(128, 0);
    check(free.room(0) == 128 && free.room(1000000) == 128, "a limit that nobody set");
    AttentionBudget budget(128, 512);
    check(budget.room(0) == 128 && budget.room(512) == 128, "less than a full ubatch near the beginning");
    check(budget.room(700) == 64 && budget.room(1024) == 64 && budget.room(1500) == 32, "a ubatch too long to stop");
    check(budget.room(1000000) == 32, "the first prompt does not move");
    budget.spend(1024, 32);
    check(budget.room(1024) == 32 && budget.room(1500) == 0, "two prompts together take too long to stop");
    check(AttentionBudget(8, 1).room(1000) == 8, "more than the ubatch holds, or nothing");
}

int main(int argc, char ** argv) {
    const unsigned seed = argc > 1 ? std::atoi(argv[1]) : 1;
    const unsigned rounds = argc > 2 ? std::atoi(argv[2]) : 20;
    shares();
    joins();
    depths();
    poisoned();
    starved();
    death();
    for (unsigned i = 0; i < rounds; i++) {
        std::fprintf(stderr, "round %u\n", seed + i);
        round(seed + i);
    }
    std::printf("finished %ld cancelled %ld failed %ld generated %ld cached %ld aborts %ld evictions %ld restores %ld "
                "preemptions %ld beside %ld alike %ld forced %ld refused %ld starved %ld\n", (long) total.finished, (long) total.cancelled, (long) total.failed,
                (long) total.generated_tokens, (long) total.cached_tokens, (long) total.aborts, (long) total.evictions,
                (long) total.restores, (long) total.preemptions, (long) total.slow_samples, total_alike, total_forced.load(), total_refused.load(), total_starved.load());
    std::printf("ok\n");
    return 0;
}
