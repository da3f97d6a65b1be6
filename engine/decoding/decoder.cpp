#include "decoding/decoder.hpp"

#include "decoding/impl.hpp"
#include "guards/errors.hpp"

#include <algorithm>
#include <stdexcept>

namespace triollama::native {

void Decoder::Impl::announce(uint64_t id) {
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

void Decoder::Impl::nudge() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        nudged = true;
    }
    changed.notify_one();
}

// False if no thread will ever run it.
bool Decoder::Impl::post(std::function<void()> command) {
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

ReplyPtr Decoder::Impl::ask(std::function<void(Reply &)> work) {
    auto reply = std::make_shared<Reply>(++last_id);
    auto answer = [this, reply] {
        reply->done.store(true, std::memory_order_release);
        announce(reply->id);
    };
    auto refuse = [this, reply, answer] {
        std::lock_guard<std::mutex> lock(mutex);
        reply->engine_failed = !cause.empty();
        reply->message = cause.empty() ? "the decoder is closed" : cause;
        answer();
    };
    const bool posted = post([this, reply, work, answer, refuse] {
        if (dead) {
            return refuse();
        }
        try {
            reply->ok = true;
            work(*reply);
        } catch (const broken_context & e) {    // nothing may touch the context any more
            reply->ok = false;
            die(e.what());
            refuse();
            throw;
        } catch (const std::exception & e) {
            reply->ok = false;
            reply->message = e.what();
        }
        answer();
    });
    if (!posted) {
        refuse();
    }
    return reply;
}

void Decoder::Impl::uncount(Stream & stream) {
    if (stream.counted.exchange(false)) {
        counted--;
    }
}

Decoder::Decoder(std::unique_ptr<Backend> backend, DecoderConfig config) {
    if (config.n_slots < 1 || config.n_ubatch < 1 || config.n_outputs < 1 || config.n_ctx < 1 ||
        config.max_queue < 0 || config.prompt_tokens < 0 || !(config.prompt_budget > 0.0) || config.set_steps < 1) {
        throw std::invalid_argument("a count of the decoder's configuration is out of range");
    }
    config.n_outputs = std::min(config.n_outputs, config.n_ubatch);
    impl = std::make_unique<Impl>(std::move(backend), config);
    impl->publish();
    impl->thread = Thread("triollama-steps", [this] { impl->run(); });
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

void Decoder::cancel_at(const StreamPtr & stream, int64_t n) {
    Impl * self = impl.get();
    impl->post([self, stream, n] {
        self->cancel_next = stream;
        self->cancel_in   = n;
    });
}

void Decoder::fail_at(int64_t n) {
    Impl * self = impl.get();
    impl->post([self, n] { self->fail_in = n; });
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
        if (self->dead) {
            return;
        }
        std::vector<StreamPtr> all = self->active;      // and those that wait for a place
        all.insert(all.end(), self->queue.begin(), self->queue.end());
        for (const StreamPtr & stream : all) {
            if (stream->request.sequence == sequence) {
                stream->cancelled = true;
                self->end(stream, Finish::cancelled);
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
        if (!self->sets.count(set)) {
            throw std::runtime_error("the sequence to load names a set of adapters that is not defined");
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
        self->slots.forget_set(set);    // the number may come to name another set
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

}  // namespace triollama::native
