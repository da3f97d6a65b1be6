// From a row of logits to a piece of text in a stream's ring.
#include "decoding/impl.hpp"

#include "guards/errors.hpp"
#include "text/token_texts.hpp"

#include <algorithm>
#include <cstring>

namespace triollama::native {

namespace {

Failure failure_of(const std::exception & e) {
    if (dynamic_cast<const grammar_error *>(&e)) {
        return Failure::grammar;
    }
    return dynamic_cast<const std::bad_alloc *>(&e) ? Failure::memory : Failure::sampler;
}

// `begins`: nothing was said yet. It does not throw: who calls it in another thread could not tell anybody.
Sampled sample(const llama_vocab * vocab, int32_t n_vocab, const Request & request, float * logits, bool begins) {
    const std::vector<llama_token> & ends  = request.end_tokens;
    const std::vector<llama_token> & stops = request.stop_tokens;
    Sampler & sampler = *request.sampler;
    const int32_t logprobs = request.logprobs;
    const bool forces = logprobs < 0 && !request.hidden;        // for which each token needs an output
    const auto ends_it = [&](llama_token token) {
        return llama_vocab_is_eog(vocab, token) || std::find(ends.begin(), ends.end(), token) != ends.end() ||
               std::find(stops.begin(), stops.end(), token) != stops.end();
    };
    const auto forced = [&] {
        std::vector<llama_token> tokens = sampler.forced();
        tokens.erase(std::find_if(tokens.begin(), tokens.end(), ends_it), tokens.end());
        return tokens;
    };
    Sampled out;
    const int64_t start = now_ns();
    try {
        if (begins && forces) {
            out.forced = forced();
            if (!out.forced.empty()) {
                return out;
            }
        }
        double log_sum = 0.0;
        if (logprobs >= 0) {
            log_sum = log_sum_exp(logits, n_vocab);
            if (logprobs > 0) {
                top_logprobs(logits, n_vocab, logprobs, out.score.top);
            }
        }
        out.token = sampler.sample(logits);
        out.end   = llama_vocab_is_eog(vocab, out.token) || std::find(ends.begin(), ends.end(), out.token) != ends.end();
        const auto stop = std::find(stops.begin(), stops.end(), out.token);
        if (!out.end && stop != stops.end()) {
            out.end  = true;
            out.stop = (int32_t) (stop - stops.begin());
        }
        if (logprobs >= 0) {
            out.score.logprob = (float) (logits[out.token] - log_sum);
        }
        if (!out.end) {
            sampler.accept(out.token, true);
            if (forces) {
                out.forced = forced();
            }
        }
    } catch (const std::exception & e) {
        out.failure = failure_of(e);
        try {
            out.message = e.what();
        } catch (const std::bad_alloc &) {
            // No memory for the words either.
        }
    }
    out.seconds = 1e-9 * (double) (now_ns() - start);
    return out;
}

}  // namespace

// Each stream has its own sampler and its own row of logits, so it does not matter which thread takes which.
void Decoder::Impl::sample_all(std::vector<Sampling> & samplings) {
    auto one = [this, &samplings](int32_t i) {
        Sampling & s = samplings[i];
        s.result = sample(vocab, n_vocab, s.stream->request, s.logits, s.stream->work->generated == 0);
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

void Decoder::Impl::sample_beside(const StreamPtr & stream, const float * logits) {
    Work & w = *stream->work;
    try {
        w.logits.assign(logits, logits + n_vocab);
        beside.push_back(stream);
        worker.run([this, stream] {
            Work & w = *stream->work;
            w.sampled = sample(vocab, n_vocab, stream->request, w.logits.data(), w.generated == 0);
            w.has_sampled.store(true, std::memory_order_release);   // an answer that takes no memory: there may be none
            nudge();
        });
    } catch (const std::bad_alloc & e) {
        beside.erase(std::remove(beside.begin(), beside.end(), stream), beside.end());
        fail(stream, Failure::memory, e.what());
        return;
    }
    w.sampling = true;
    count.slow_samples++;
}

// What the worker has answered.
void Decoder::Impl::take_sampled() {
    for (size_t i = 0; i < beside.size();) {
        const StreamPtr stream = beside[i];
        Work & w = *stream->work;
        if (!w.has_sampled.load(std::memory_order_acquire)) {
            i++;
            continue;
        }
        beside.erase(beside.begin() + i);
        w.has_sampled = false;
        w.sampling = false;
        // A token that the sampler has taken is said, also of a stream that was cancelled meanwhile: else its sampler
        // would have seen more than its text has.
        const bool ending = w.ending;               // what is not may be over, and gone, after emit
        const bool said = !ending || (w.ending_as == Finish::cancelled && w.sampled.failure == Failure::none);
        if (said && !dead) {
            emit(stream, std::move(w.sampled));
        }
        if (ending) {
            complete(stream, w.ending_as);
        }
    }
}

void Decoder::Impl::emit(const StreamPtr & stream, Sampled sampled) {
    Work & w = *stream->work;
    if (sampled.failure != Failure::none) {
        fail(stream, sampled.failure, sampled.message);
        return;
    }
    w.sample_s += 0.25 * (sampled.seconds - w.sample_s);
    w.slow = w.sample_s > config.slow_sampler_s || (w.slow && w.sample_s > 0.5 * config.slow_sampler_s);
    if (sampled.stop >= 0) {
        stream->stop_index = sampled.stop;
        end(stream, Finish::stop);
        return;
    }
    if (sampled.end) {
        stream->end_token = sampled.token;
        end(stream, Finish::eos);
        return;
    }
    w.n_new = 0;
    const bool changes = !w.updates.empty();    // what is forced by one grammar is not by the next
    bool goes_on = sampled.token == LLAMA_TOKEN_NULL || say(stream, sampled.token, std::move(sampled.score));
    for (size_t i = 0; goes_on && i < sampled.forced.size() && !(changes && w.n_new > 0); i++) {
        try {
            stream->request.sampler->accept(sampled.forced[i], true);
        } catch (const std::exception & e) {
            fail(stream, failure_of(e), e.what());
            return;
        }
        goes_on = say(stream, sampled.forced[i], {});
    }
    if (goes_on && !w.piece.text.empty()) {
        deliver(*stream, std::move(w.piece));
        w.piece = Piece();
    }
}

// One token more; its text goes into the piece. False if the stream ends, or is over.
bool Decoder::Impl::say(const StreamPtr & stream, llama_token token, TokenScore score) {
    Work & w = *stream->work;
    const int64_t now = now_ns();
    w.tokens.push_back(token);
    w.n_end = (int32_t) w.tokens.size();
    w.n_new++;
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
    append_piece(vocab, token, stream->request.special, bytes);
    w.piece.tokens.push_back(token);
    if (stream->request.logprobs >= 0) {
        w.piece.scores.push_back(std::move(score));
    }
    w.piece.time_ns = now;
    if (w.text.feed(bytes.data(), bytes.size(), w.piece.text)) {
        stream->stop_index = w.text.matched_stop();
        end(stream, Finish::stop);
        return false;
    }
    if (w.ending || !apply_updates(stream)) {
        return false;
    }
    if (w.max_tokens >= 0 && w.generated >= w.max_tokens) {
        end(stream, Finish::length);
        return false;
    }
    if ((int32_t) w.tokens.size() > config.n_ctx && !(stream->request.shift && shift(*stream))) {
        end(stream, Finish::context);
        return false;
    }
    return true;
}

void Decoder::Impl::note_first_token(double seconds) {
    if (first_token_s.size() < 256) {
        first_token_s.push_back(seconds);
    } else {
        first_token_s[first_token_next++ % first_token_s.size()] = seconds;
    }
}

bool Decoder::Impl::apply_updates(const StreamPtr & stream) {
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
bool Decoder::Impl::shift(Stream & stream) {
    Work & w = *stream.work;
    const int32_t keep = std::min(stream.request.n_keep < 0 ? w.n_prompt : stream.request.n_keep, w.n_decoded);
    const int32_t drop = (w.n_decoded - keep) / 2;
    if (!slots.shift(*w.sequence, keep, drop)) {
        return false;
    }
    w.tokens.erase(w.tokens.begin() + keep, w.tokens.begin() + keep + drop);
    w.n_decoded -= drop;
    w.n_end = (int32_t) w.tokens.size();
    stream.request.bare = Slots::shifted(stream.request.bare, keep, drop);
    w.n_prompt = std::max(std::min(keep, w.n_prompt), w.n_prompt - drop);
    stream.shifted += drop;
    stream.shifts.push_back(drop);
    return true;
}

}  // namespace triollama::native
