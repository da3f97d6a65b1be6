#include "slots.hpp"

#include <algorithm>

namespace triollama {

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
    forget_host(*sequence);
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
    if (sequence.host.empty()) {
        sequence.n = 0;
        return true;
    }
    if (backend.state_set(sequence.slot, sequence.host)) {
        restores++;
    } else {
        clear(sequence);
    }
    forget_host(sequence);
    return true;
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
    const int32_t oldest = rules.n_swa > 0 ? std::max(0, n - rules.n_swa + 1) : 0;
    return backend.seq_pos_min(slot) <= oldest;
}

void Slots::trim(Sequence & sequence, int32_t n) {
    if (sequence.slot < 0) {
        if (n < sequence.n) {       // a blob cannot be cut
            forget_host(sequence);
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
    sequence.n = n;
}

int32_t Slots::reuse(Sequence & sequence, int32_t wanted, uint64_t set) {
    const int32_t n = sequence.set == set ? std::min(wanted, sequence.n) : 0;
    trim(sequence, n);
    sequence.set = set;
    return sequence.n;
}

void Slots::clear(Sequence & sequence) {
    backend.seq_rm(sequence.slot, -1, -1);      // a whole sequence can always be removed
    sequence.n = 0;
}

void Slots::release(Sequence & sequence) {
    if (sequence.slot >= 0) {
        clear(sequence);
        owner[sequence.slot] = nullptr;
        sequence.slot = -1;
    }
}

void Slots::forget_host(Sequence & sequence) {
    host_total -= sequence.host.size();
    sequence.host.clear();
    sequence.host.shrink_to_fit();
}

Sequence * Slots::least_recently_used(bool on_host) {
    Sequence * oldest = nullptr;
    for (auto & item : sequences) {
        Sequence * s = item.second.get();
        if (!s->busy && (on_host ? !s->host.empty() : s->slot >= 0) && (!oldest || s->used < oldest->used)) {
            oldest = s;
        }
    }
    return oldest;
}

bool Slots::keep_on_host(Sequence & sequence, std::string bytes) {
    if (bytes.empty() || bytes.size() > rules.host_bytes) {
        return false;
    }
    while (host_total + bytes.size() > rules.host_bytes) {
        Sequence * oldest = least_recently_used(true);
        if (!oldest || oldest == &sequence) {
            return false;
        }
        forget_host(*oldest);
        oldest->n = 0;
    }
    host_total += bytes.size();
    sequence.host = std::move(bytes);
    return true;
}

void Slots::evict(Sequence & sequence) {
    if (sequence.slot < 0) {
        return;
    }
    const int32_t n = sequence.n;
    const bool saved = n > 0 && rules.host_bytes > 0 && keep_on_host(sequence, backend.state_get(sequence.slot));
    release(sequence);
    sequence.n = saved ? n : 0;
    evictions++;
}

bool Slots::evict_idle() {
    Sequence * oldest = least_recently_used(false);
    if (!oldest) {
        return false;
    }
    evict(*oldest);
    return true;
}

void Slots::fork(Sequence & from, Sequence & to, int32_t n) {
    n = std::min(n, from.n);
    if (to.busy || &from == &to) {
        return;
    }
    release(to);
    forget_host(to);
    to.n   = 0;
    to.set = from.set;
    if (n == 0) {
        return;
    }
    if (from.slot < 0) {
        if (n == from.n && keep_on_host(to, from.host)) {
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
    } else {
        copied = backend.state_set(to.slot, backend.state_get(from.slot));
    }
    trim(to, copied ? n : 0);
    if (to.n == 0) {
        release(to);
    }
}

std::string Slots::save(Sequence & sequence) {
    if (sequence.n == 0) {
        return {};
    }
    return sequence.slot >= 0 ? backend.state_get(sequence.slot) : sequence.host;
}

bool Slots::load(Sequence & sequence, std::string bytes, int32_t n, uint64_t set) {
    if (sequence.busy || bytes.empty() || n <= 0) {
        return false;
    }
    release(sequence);
    forget_host(sequence);
    sequence.n = 0;
    if (!acquire(sequence)) {
        return false;
    }
    if (!backend.state_set(sequence.slot, bytes)) {
        release(sequence);
        return false;
    }
    sequence.set = set;
    trim(sequence, n);
    if (sequence.n == 0) {
        release(sequence);
    }
    return sequence.n == n;
}

int32_t Slots::free_count() const { return (int32_t) std::count(owner.begin(), owner.end(), nullptr); }

int64_t Slots::cells_used() const {
    int64_t total = 0;
    for (const Sequence * s : owner) {
        total += s ? s->n : 0;
    }
    return total;
}

int32_t Slots::kept_count() const {
    int32_t count = 0;
    for (const auto & item : sequences) {
        count += item.second->kept;
    }
    return count;
}

}  // namespace triollama
