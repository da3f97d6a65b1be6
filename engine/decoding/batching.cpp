// Which tokens of which streams the next step computes.
#include "decoding/impl.hpp"

#include <algorithm>

namespace triollama::native {

namespace {

// Tokens of what grammars force that streams may compute in one step beside others.
constexpr int32_t forced_at_once = 16;

}  // namespace

Mode Decoder::Impl::mode_of(const Stream & s) {
    const Request & r = s.request;
    return {s.work->n_decoded < r.bare ? 0 : r.set, r.kind == Kind::embed || r.hidden, r.causal || s.work->generated > 0};
}

// A change costs milliseconds, so each mode has several steps before the next in turn.
void Decoder::Impl::choose_mode(const std::vector<StreamPtr> & ready) {
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

// Who decodes how much in this step.
std::vector<Group> Decoder::Impl::make_plan(const std::vector<StreamPtr> & ready) {
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
    // What a grammar forced is computed with the token before it, as far as others need not wait for it.
    AttentionBudget attention(config.n_ubatch, config.check_span);
    const bool lonely = n_running == 1 && prompts.empty();
    int32_t more = std::min(lonely ? config.n_ubatch : std::max(budget, forced_at_once), config.n_ubatch - n_running);
    for (Entry & e : running) {
        const Work & w = *e.stream->work;
        const int32_t n = std::min({w.n_end - w.n_decoded - e.n, more, attention.room(w.n_decoded)});
        if (n > 0) {
            attention.spend(w.n_decoded, n);
            e.n += n;
            more -= n;
            budget = std::max(budget - n, 0);
        }
    }
    if (config.packing == Packing::equal) {
        std::stable_partition(running.begin(), running.end(), [](const Entry & e) { return e.n == 1; });
        while (!running.empty() && running.back().n > 1) {
            plan.push_back(Group{running.back()});
            running.pop_back();
        }
        if (!running.empty()) {
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
    int32_t n_mixed = 0;
    for (const Entry & e : mixed) {
        n_mixed += e.n;
    }
    int32_t room = std::min(budget, config.n_ubatch - n_mixed);
    int32_t rows = config.n_outputs - n_running;
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

// Tokens that `stream` may decode next, at most `room`.
int32_t Decoder::Impl::chunk(const Stream & stream, int32_t room) const {
    const Work & w = *stream.work;
    int32_t n = w.n_end - w.n_decoded;
    if (stream.request.kind == Kind::score && w.n_decoded + 1 < stream.request.given) {
        n = std::min(n, stream.request.given - 1 - w.n_decoded);
    }
    if (every_output(stream)) {
        n = std::min(n, config.n_outputs);
    }
    if (w.n_decoded < stream.request.bare) {
        n = std::min(n, stream.request.bare - w.n_decoded);
    }
    return std::min(n, room);
}

bool Decoder::Impl::every_output(const Stream & stream) {
    const Request & r = stream.request;
    if (r.kind == Kind::score) {
        return stream.work->n_decoded + 1 >= r.given;
    }
    return r.kind == Kind::embed || r.hidden;
}

int32_t Decoder::Impl::outputs(const Stream & stream, int32_t n) const {
    if (every_output(stream)) {
        return n;
    }
    return n > 0 && stream.work->n_decoded + n == stream.work->n_end ? 1 : 0;
}

}  // namespace triollama::native
