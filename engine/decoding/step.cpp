// One step: the batches of a plan are decoded, and what comes out goes to the streams they are of.
#include "decoding/impl.hpp"

#include <algorithm>
#include <cstring>

namespace triollama::native {

// False if there was nothing to do until something changes.
bool Decoder::Impl::step() {
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
                const bool running = e.stream->work->running();
                n_running += running;
                n_prompt  += e.n - running;
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
bool Decoder::Impl::still_here(const Stream & s) {
    return s.finish() == Finish::none && !s.cancelled && s.work && s.work->sequence && s.work->sequence->slot >= 0;
}

void Decoder::Impl::learn(int32_t n_running, int32_t n_prompt, double seconds) {
    n_running = std::min(n_running, config.n_slots);
    if (n_prompt == 0) {
        cost.saw_ordinary(n_running, seconds);
    } else if (n_running == 0 || cost.knows(n_running)) {
        cost.saw_prompt(n_running, n_prompt, seconds);
    }
}

void Decoder::Impl::enter(const Mode next, const std::vector<StreamPtr> & ready) {
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

void Decoder::Impl::choose_threads(const Group & group) {
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

// One llama_decode and what follows from it. False: it did not go through.
bool Decoder::Impl::execute(Group & group) {
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
void Decoder::Impl::restore(Entry & e) {
    Work & w = *e.stream->work;
    slots.trim(*w.sequence, w.n_decoded);
    w.n_decoded = w.sequence->n;            // 0 if the state cannot go back: it is computed again
}

void Decoder::Impl::make_room(Group & group) {
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

void Decoder::Impl::blame(Group & group, int32_t code) {
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
void Decoder::Impl::advance(Entry & e, std::vector<Sampling> & samplings) {
    const StreamPtr & stream = e.stream;
    Work & w = *stream->work;
    if (!w.running()) {
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

void Decoder::Impl::score(Entry & e) {
    Work & w = *e.stream->work;
    const bool is_given = w.n_decoded - e.n + 1 < e.stream->request.given;
    for (int32_t i = 0; i < e.n && !is_given; i++) {
        const float * row = backend->logits(e.first + i);
        const llama_token next = w.tokens[w.n_decoded - e.n + i + 1];
        e.stream->values.push_back((float) (row[next] - log_sum_exp(row, n_vocab)));
    }
    if (w.n_decoded == w.n_end) {
        end(e.stream, Finish::done);
    }
}

void Decoder::Impl::embed(Entry & e) {
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

}  // namespace triollama::native
