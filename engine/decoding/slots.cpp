#include "decoding/slots.hpp"

#include <algorithm>
#include <chrono>

namespace triollama::native {

Sequence * Slots::find(uint64_t id) {
    auto it = sequences.find(id);
    return it == sequences.end() ? nullptr : it->second.get();
}

Sequence & Slots::make(uint64_t id, bool kept) {
    std::unique_ptr<Sequence> & place = sequences[id];
    if (!place) {
        place = std::make_unique<Sequence>();
        place->id = id;
    }
    place->kept = place->kept || kept;
    return *place;
}

void Slots::drop(uint64_t id) {
    Sequence * sequence = find(id);
    if (!sequence) {
        return;
    }
    release(*sequence);
    forget_saved(*sequence);
    sequences.erase(id);
}

bool Slots::acquire(Sequence & sequence) {
    touch(sequence);
    if (sequence.slot >= 0) {
        return true;
    }
    auto place = std::find(owner.begin(), owner.end(), nullptr);
    if (place == owner.end()) {
        if (!evict_idle()) {
            return false;
        }
        place = std::find(owner.begin(), owner.end(), nullptr);
    }
    *place = &sequence;
    sequence.slot = (int32_t) (place - owner.begin());
    bring_back(sequence);
    return true;
}

void Slots::bring_back(Sequence & sequence) {
    using Clock = std::chrono::steady_clock;
    const bool from_disk = sequence.on_disk;
    const size_t size = from_disk ? disk.size_of(sequence.id) : sequence.host.size();
    bool good = false;
    if (size == 0) {
        sequence.n = 0;
    } else if (cost.recompute(from_disk, size, sequence.n, token_s())) {
        recomputes++;
    } else {
        const auto start = Clock::now();
        const std::string bytes = from_disk ? disk.get(sequence.id) : std::move(sequence.host);
        if (!from_disk) {
            host_total -= size;
            sequence.host.clear();
        }
        good = !bytes.empty() && set_state(sequence.slot, bytes);
        if (good) {
            restores++;
            cost.saw(from_disk, size, std::chrono::duration<double>(Clock::now() - start).count());
        }
    }
    forget_saved(sequence);
    if (!good) {
        clear(sequence);
    }
}

// seq_rm answers true even where a sliding window has lost cells that position n still attends to; seq_pos_min does not lie.
bool Slots::continuable(int32_t slot, int32_t n) {
    if (n == 0) {
        return true;
    }
    if (backend.seq_pos_max(slot) + 1 != n) {
        return false;
    }
    if (!rules.can_roll_back) {
        return true;
    }
    return backend.seq_pos_min(slot) <= oldest_needed(n);
}

int32_t Slots::oldest_needed(int32_t n) const { return rules.n_swa > 0 ? std::max(0, n - rules.n_swa + 1) : 0; }

void Slots::trim(Sequence & sequence, int32_t n) {
    if (sequence.slot < 0) {
        if (n < sequence.n) {       // a blob cannot be cut
            forget_saved(sequence);
            sequence.n = 0;
        }
        return;
    }
    // Not `sequence.n`: a stopped decode may have left cells beyond it.
    if (n > 0 && backend.seq_pos_max(sequence.slot) + 1 > n) {
        if (!backend.seq_rm(sequence.slot, n, -1)) {
            n = 0;
        }
    }
    if (n <= 0 || !continuable(sequence.slot, n)) {
        clear(sequence);
        return;
    }
    update_runs(sequence);
    sequence.n = n;
    update_runs(sequence);
}

// How many of its positions are what this set, after so many tokens of the bare model, would compute.
int32_t Slots::usable(const Sequence & sequence, uint64_t set, int32_t bare) {
    if (sequence.set == set && sequence.bare == bare) {
        return sequence.n;
    }
    return std::min({sequence.n, sequence.set ? sequence.bare : sequence.n, set ? bare : sequence.n});
}

int32_t Slots::reuse(Sequence & sequence, int32_t wanted, uint64_t set, int32_t bare) {
    trim(sequence, std::min(wanted, usable(sequence, set, bare)));
    sequence.set  = set;
    sequence.bare = bare;
    return sequence.n;
}

void Slots::clear(Sequence & sequence) {
    backend.seq_rm(sequence.slot, -1, -1);      // a whole sequence can always be removed
    sequence.n = 0;
    sequence.runs.clear();
    sequence.shares = false;
}

void Slots::release(Sequence & sequence) {
    if (sequence.slot >= 0) {
        clear(sequence);
        owner[sequence.slot] = nullptr;
        sequence.slot = -1;
    }
}

void Slots::forget_saved(Sequence & sequence) {
    host_total -= sequence.host.size();
    sequence.host.clear();
    sequence.host.shrink_to_fit();
    if (sequence.on_disk) {
        disk.erase(sequence.id);
        sequence.on_disk = false;
    }
}

void Slots::forget_set(uint64_t set) {
    for (Sequence * s : std::vector<Sequence *>(owner)) {
        if (s && s->spare && s->set == set) {
            drop(s->id);
        }
    }
    for (auto & item : sequences) {
        Sequence & sequence = *item.second;
        if (sequence.set == set && !sequence.busy) {
            release(sequence);
            forget_saved(sequence);
            sequence.n    = 0;
            sequence.set  = 0;
            sequence.bare = 0;
        }
    }
}

Sequence * Slots::least_recently_used(Place place) {
    Sequence * oldest = nullptr;
    for (auto & item : sequences) {
        Sequence * s = item.second.get();
        const bool there = place == Place::slot ? s->slot >= 0 : place == Place::host ? !s->host.empty() : s->on_disk;
        // Where a stream waits for its reader its sequence is busy, but its blob is only a blob.
        if (there && (!s->busy || place != Place::slot) &&
            (!oldest || std::make_pair(!s->spare, s->used) < std::make_pair(!oldest->spare, oldest->used))) {
            oldest = s;
        }
    }
    return oldest;
}

bool Slots::keep(Sequence & sequence, std::string bytes) {
    if (bytes.empty()) {
        return false;
    }
    if (bytes.size() > rules.host_bytes) {
        return keep_on_disk(sequence, bytes);
    }
    while (host_total + bytes.size() > rules.host_bytes) {
        Sequence * oldest = least_recently_used(Place::host);
        std::string moved = std::move(oldest->host);
        host_total -= moved.size();
        oldest->host.clear();
        if (!keep_on_disk(*oldest, moved)) {
            oldest->n = 0;
        }
    }
    host_total += bytes.size();
    sequence.host = std::move(bytes);
    return true;
}

bool Slots::keep_on_disk(Sequence & sequence, std::string & bytes) {
    if (!disk.holds_at_all(bytes.size())) {
        return false;
    }
    while (!disk.put(sequence.id, bytes)) {
        Sequence * oldest = least_recently_used(Place::disk);
        if (!oldest) {
            return false;               // what is there is still being written
        }
        forget_saved(*oldest);
        oldest->n = 0;
    }
    sequence.on_disk = true;
    spills++;
    return true;
}

void Slots::evict(Sequence & sequence) {
    if (sequence.slot < 0) {
        return;
    }
    const int32_t n = sequence.n;
    const bool wanted = n > 0 && (rules.host_bytes > 0 || disk.holds_at_all(1));
    std::string bytes = wanted ? backend.state_get(sequence.slot) : std::string();
    release(sequence);
    sequence.n = keep(sequence, std::move(bytes)) ? n : 0;
    evictions++;
}

bool Slots::evict_idle() {
    Sequence * oldest = least_recently_used(Place::slot);
    if (!oldest) {
        return false;
    }
    if (oldest->spare) {
        drop(oldest->id);
    } else {
        evict(*oldest);
    }
    return true;
}

void Slots::remember(Sequence & sequence, std::vector<llama_token> tokens) {
    sequence.tokens = std::move(tokens);
    sequence.tokens.resize(std::min((int32_t) sequence.tokens.size(), sequence.n));
}

std::pair<Sequence *, int32_t> Slots::find_alike(const std::vector<llama_token> & tokens, int32_t most, uint64_t set,
                                                 int32_t bare) {
    std::pair<Sequence *, int32_t> best{nullptr, WORTH_SHARING - 1};
    for (Sequence * s : owner) {
        if (!s || s->busy) {
            continue;
        }
        const int32_t known = std::min({(int32_t) s->tokens.size(), (int32_t) tokens.size(), usable(*s, set, bare), most});
        const int32_t n = (int32_t) (std::mismatch(tokens.begin(), tokens.begin() + known, s->tokens.begin()).first - tokens.begin());
        if (!rules.can_roll_back && n != s->n) {
            continue;
        }
        if (n > best.second || (n == best.second && best.first && s->spare && !best.first->spare)) {
            best = {s, n};
        }
    }
    return best;
}

Sequence & Slots::adopt(Sequence & spare, uint64_t id) {
    auto node = sequences.extract(spare.id);
    node.key() = id;
    Sequence & sequence = *node.mapped();
    sequences.insert(std::move(node));
    sequence.id    = id;
    sequence.spare = false;
    return sequence;
}

void Slots::fork(Sequence & from, Sequence & to, int32_t n) {
    n = std::min(n, from.n);
    if (to.busy || &from == &to) {
        return;
    }
    release(to);
    forget_saved(to);
    to.n   = 0;
    to.set  = from.set;
    to.bare = from.bare;
    to.tokens.clear();
    if (!from.busy) {
        to.tokens.assign(from.tokens.begin(), from.tokens.begin() + std::min((int32_t) from.tokens.size(), n));
    }
    if (n == 0) {
        return;
    }
    if (from.slot < 0) {
        if (n == from.n && keep(to, saved(from))) {
            to.n = n;
        }
        return;
    }
    const bool was_busy = from.busy;
    from.busy = true;                       // so that making room does not evict it
    const bool placed = acquire(to);
    from.busy = was_busy;
    if (!placed) {
        return;
    }
    bool copied = true;
    if (rules.unified) {
        backend.seq_cp(from.slot, to.slot);
        update_runs(from);
        to.runs = from.runs;
        from.shares = to.shares = true;
        to.n = from.n;
    } else {
        copied = set_state(to.slot, backend.state_get(from.slot));
    }
    trim(to, copied ? n : 0);
    if (to.n == 0) {
        release(to);
    }
}

bool Slots::is_shared(Sequence & sequence) {
    update_runs(sequence);
    for (Sequence * other : owner) {
        if (!other || other == &sequence) {
            continue;
        }
        update_runs(*other);
        for (const Run & a : sequence.runs) {
            for (const Run & b : other->runs) {
                if (a.cells == b.cells) {
                    return true;
                }
            }
        }
    }
    return false;
}

bool Slots::shift(Sequence & sequence, int32_t keep, int32_t drop) {
    if (!rules.can_shift || !rules.can_roll_back || keep < 0 || drop < 1 || keep + drop > sequence.n || !acquire(sequence) ||
        keep + drop > sequence.n) {
        return false;
    }
    sequence.tokens.clear();                // positions no longer say what came before
    const int32_t n = sequence.n;
    if (is_shared(sequence) && !reload(sequence)) {     // moving a cell moves it for everybody
        return false;
    }
    // What was restored holds the window alone of layers that slide: what is kept must not come back into it.
    const int32_t held = backend.seq_pos_min(sequence.slot);
    const int32_t then = held <= keep ? held : std::max(held, keep + drop) - drop;
    if (then > oldest_needed(n - drop)) {
        return false;
    }
    if (!backend.seq_rm(sequence.slot, keep, keep + drop)) {
        sequence.n = n;
        return false;
    }
    backend.seq_add(sequence.slot, keep + drop, n, -drop);
    sequence.runs.clear();
    sequence.shares = false;
    sequence.n    = n - drop;
    sequence.bare = shifted(sequence.bare, keep, drop);
    // A hole would be filled by what comes next, out of order, and sums are rounded in the order of cells. A sequence
    // that was evicted comes back without one, so there are none in the mode that promises equal bits.
    return rules.unified || reload(sequence);
}

// Its cells become its own, one after the other.
bool Slots::reload(Sequence & sequence) {
    const int32_t n = sequence.n;
    const std::string bytes = backend.state_get(sequence.slot);
    clear(sequence);
    if (bytes.empty() || !set_state(sequence.slot, bytes)) {
        clear(sequence);
        return false;
    }
    sequence.n = n;
    return true;
}

bool Slots::set_state(int32_t slot, const std::string & bytes) {
    return backend.state_set(slot, (const uint8_t *) bytes.data(), bytes.size());
}

std::string Slots::save(Sequence & sequence) {
    if (sequence.n == 0) {
        return {};
    }
    return sequence.slot >= 0 ? backend.state_get(sequence.slot) : saved(sequence);
}

bool Slots::load(Sequence & sequence, const uint8_t * data, size_t size, int32_t n, uint64_t set) {
    if (sequence.busy || size == 0 || n <= 0) {
        return false;
    }
    release(sequence);
    forget_saved(sequence);
    sequence.tokens.clear();
    sequence.n = 0;
    if (!acquire(sequence)) {
        return false;
    }
    if (!backend.state_set(sequence.slot, data, size)) {
        release(sequence);
        return false;
    }
    sequence.set  = set;
    sequence.bare = 0;
    trim(sequence, n);
    if (sequence.n == 0) {
        release(sequence);
    }
    return sequence.n == n;
}

int32_t Slots::free_count() const {
    return (int32_t) std::count_if(owner.begin(), owner.end(), [](const Sequence * s) { return !s || s->spare; });
}

// Runs follow `n`, which the decoder raises as it decodes.
void Slots::update_runs(Sequence & sequence) {
    int32_t have = 0;
    for (size_t i = 0; i < sequence.runs.size(); i++) {
        Run & run = sequence.runs[i];
        if (have + run.n >= sequence.n) {
            // What comes after a cut is not what another may still have there.
            sequence.shares = sequence.shares || have + run.n > sequence.n || i + 1 < sequence.runs.size();
            run.n = sequence.n - have;
            sequence.runs.resize(run.n > 0 ? i + 1 : i);
            return;
        }
        have += run.n;
    }
    if (sequence.runs.empty() || sequence.shares) {
        sequence.runs.push_back({++last_cells, 0});
        sequence.shares = false;
    }
    sequence.runs.back().n += sequence.n - have;
}

int64_t Slots::cells_used() {
    std::vector<Run> runs;
    for (Sequence * s : owner) {
        if (s && !s->spare) {
            update_runs(*s);
            runs.insert(runs.end(), s->runs.begin(), s->runs.end());
        }
    }
    std::sort(runs.begin(), runs.end(),
              [](const Run & a, const Run & b) { return a.cells != b.cells ? a.cells < b.cells : a.n > b.n; });
    int64_t total = 0;
    uint64_t counted = 0;
    for (const Run & run : runs) {              // of those who share a run, the one that has most of it
        total += run.cells != counted ? run.n : 0;
        counted = run.cells;
    }
    return total;
}

int32_t Slots::kept_count() const {
    int32_t count = 0;
    for (const auto & item : sequences) {
        const Sequence & s = *item.second;
        count += s.kept || !(s.busy || s.spare);    // a stream's own is gone with it
    }
    return count;
}

}  // namespace triollama::native
