// Streams come, wait for a slot, give it up, and end.
#include "decoding/impl.hpp"

#include "guards/errors.hpp"

#include <algorithm>

namespace triollama::native {

void Decoder::Impl::enqueue(const StreamPtr & stream) {
    auto before = [](const StreamPtr & a, const StreamPtr & b) {
        return a->request.priority != b->request.priority ? a->request.priority > b->request.priority
                                                          : a->work->order < b->work->order;
    };
    queue.insert(std::upper_bound(queue.begin(), queue.end(), stream, before), stream);
}

void Decoder::Impl::arrive(const StreamPtr & stream) {
    Request & r = stream->request;
    auto work = std::make_shared<Work>();
    work->n_prompt   = (int32_t) r.tokens.size();
    work->n_end      = r.kind == Kind::score ? work->n_prompt - 1 : work->n_prompt;
    work->tokens     = std::move(r.tokens);
    work->max_tokens = r.max_tokens;
    work->text       = TextStream(r.stops);
    work->order      = stream->id;
    work->slow       = r.sampler && !r.sampler->params().grammar.text.empty();
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
    const std::vector<llama_token> & invocation = sets.at(r.set).invocation;
    if (!invocation.empty()) {
        const std::vector<llama_token> & tokens = stream->work->tokens;
        const auto at = std::find_end(tokens.begin(), tokens.end(), invocation.begin(), invocation.end());
        if (!r.causal) {
            fail(stream, Failure::adapter, "without causal attention no adapter can take part from its invocation on");
            return;
        }
        r.bare = (int32_t) (at - tokens.begin());
        r.set  = at == tokens.end() ? 0 : r.set;
    }
    enqueue(stream);
}

void Decoder::Impl::admit() {
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
        // Who is parked will not end soon: its cells, or its place, are for who can go on.
        if (((hold && !active.empty()) || !has_place(sequence)) && !preempt_parked()) {
            return;
        }
        if (!sequence) {
            sequence = &begin(*stream);     // only now: a queued stream has none that could be left behind
        }
        if (!slots.acquire(*sequence)) {
            return;
        }
        queue.erase(std::find(queue.begin(), queue.end(), stream));
        hold = false;
        start(stream, *sequence);
        i = 0;              // who was preempted may stand before i now
    }
}

// A sequence for a stream that names none: what a stream before it left, a copy of what a conversation has, or new.
Sequence & Decoder::Impl::begin(Stream & stream) {
    Request & r = stream.request;
    const bool scores = r.kind == Kind::score && r.given > 1;
    if (config.spares && (r.kind == Kind::generate || scores) && r.causal) {
        const int32_t most = scores ? std::min(stream.work->n_end, r.given) - 1 : stream.work->n_end - 1;
        const auto [source, n] = slots.find_alike(stream.work->tokens, most, r.set, r.bare);
        if (source) {
            r.cached = n;
            // Where a score begins others beside it may; they find what it leaves, too.
            if (source->spare && (!scores || slots.free_count() < 2)) {
                return slots.adopt(*source, stream.id);
            }
            Sequence & own = slots.make(stream.id, false);
            slots.fork(*source, own, n);
            return own;
        }
    }
    return slots.make(stream.id, false);
}

void Decoder::Impl::start(const StreamPtr & stream, Sequence & sequence) {
    Work & w = *stream->work;
    const bool again = w.sequence != nullptr;
    sequence.busy = true;
    w.sequence = &sequence;
    const bool scores = stream->request.kind == Kind::score && stream->request.given > 1;
    const bool fresh = !(stream->request.kind == Kind::generate || scores) || !stream->request.causal;
    const int32_t wanted = fresh ? 0 : again ? w.n_decoded : stream->request.cached;
    w.n_decoded = slots.reuse(sequence, std::min(wanted, w.n_end - 1), stream->request.set, stream->request.bare);
    if (stream->request.kind == Kind::score) {      // what is computed again is said again
        const size_t known = (size_t) std::max(0, w.n_decoded - (stream->request.given - 1));
        stream->values.resize(std::min(stream->values.size(), known));
    }
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
    if (w.n_end < stream->request.given && stream->request.kind == Kind::score) {   // nothing to say about
        end(stream, Finish::done);
    }
}

// Back to the queue, its KV on the host or gone; it will be rebuilt. Its sequence stays busy: no other turn may start.
void Decoder::Impl::preempt(const StreamPtr & stream) {
    slots.evict(*stream->work->sequence);
    active.erase(std::find(active.begin(), active.end(), stream));
    enqueue(stream);
    count.preemptions++;
}

bool Decoder::Impl::has_place(const Sequence * sequence) {
    return (sequence && sequence->slot >= 0) || slots.can_make_room();
}

bool Decoder::Impl::preempt_parked() {
    for (const StreamPtr & stream : active) {
        if (!stream->work->sampling && is_parked(*stream)) {
            const StreamPtr held = stream;
            preempt(held);
            return true;
        }
    }
    return false;
}

bool Decoder::Impl::is_parked(Stream & stream) {
    std::lock_guard<std::mutex> lock(stream.mutex);
    if (!stream.parked && (int32_t) stream.ring.size() >= stream.request.capacity) {
        stream.parked = true;
    }
    return stream.parked;
}

void Decoder::Impl::drop_cancelled() {
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

void Decoder::Impl::fail(const StreamPtr & stream, Failure failure, const std::string & message) {
    if (stream->finish() != Finish::none) {
        return;
    }
    stream->failure = failure;
    stream->message = message;
    end(stream, Finish::error);
}

void Decoder::Impl::deliver(Stream & stream, Piece piece) {
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
void Decoder::Impl::end(const StreamPtr & stream, Finish how) {
    if (stream->finish() != Finish::none || !stream->work) {
        return;
    }
    Work & w = *stream->work;
    if (w.ending) {
        w.ending_as = how;          // it came to an end of its own, in the token that was sampled meanwhile
        return;
    }
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

void Decoder::Impl::settle(Stream & stream, Work & w, Finish how) {
    Sequence & sequence = *w.sequence;
    sequence.busy = false;
    const Request & r = stream.request;
    if (!r.sequence) {
        const bool begins = r.kind == Kind::generate || (r.kind == Kind::score && r.given > 1);
        const bool of_use = config.spares && begins && r.causal && how != Finish::error && stream.shifts.empty();
        if (of_use && sequence.slot >= 0) {
            slots.trim(sequence, w.n_decoded);
        }
        if (of_use && sequence.slot >= 0 && sequence.n >= WORTH_SHARING) {
            slots.remember(sequence, w.tokens);
            slots.touch(sequence);
            sequence.spare = true;
        } else {
            slots.drop(sequence.id);
        }
    } else {
        const bool back = how == Finish::error || (how == Finish::cancelled && !r.keep_on_cancel);
        const int32_t n = back ? std::min(w.n_decoded, r.commit) : w.n_decoded;
        slots.trim(sequence, n);
        slots.touch(sequence);
        stream.position = sequence.n;
        if (stream.shifts.empty() && r.causal) {
            slots.remember(sequence, w.tokens);
        } else {
            sequence.tokens.clear();
        }
    }
    w.sequence = nullptr;
}

void Decoder::Impl::complete(const StreamPtr & stream, Finish how) {
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

}  // namespace triollama::native
