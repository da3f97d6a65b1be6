// Which conversation's KV lives in which of the context's sequences, and what of it may be reused.
#pragma once

#include "backend.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace triollama {

struct Sequence {
    uint64_t id = 0;
    int32_t  slot = -1;         // the context's sequence id, or -1: no KV there
    int32_t  n = 0;             // positions [0, n) are valid in the slot, or in `host` if there is no slot
    uint64_t set = 0;           // the ContextSet that computed them
    uint64_t used = 0;          // for least recently used
    bool     busy = false;      // a stream is using it
    bool     kept = false;      // lives on without a stream
    std::string host;           // upstream's blob, while it has no slot
};

struct SlotRules {
    int32_t n_slots = 1;
    int32_t n_swa = 0;
    bool    unified = true;
    bool    can_roll_back = true;
    size_t  host_bytes = 0;
};

class Slots {
public:
    Slots(Backend & backend, SlotRules rules) : backend(backend), rules(rules), owner(rules.n_slots, nullptr) {}

    Sequence * find(uint64_t id);
    Sequence & make(uint64_t id, bool kept);
    void drop(uint64_t id);

    // Gives it a slot: its own, a free one, or one of the least recently used idle sequence. False: all are busy.
    bool acquire(Sequence & sequence);
    // Prepares the slot to go on from at most `wanted`; returns the position to go on from.
    int32_t reuse(Sequence & sequence, int32_t wanted, uint64_t set);
    // Removes what is at or after `n`. Where that cannot be done exactly everything goes, and sequence.n is 0.
    void trim(Sequence & sequence, int32_t n);
    // Takes the slot away, keeping the KV in host memory if there is room.
    void evict(Sequence & sequence);
    bool evict_idle();
    void touch(Sequence & sequence) { sequence.used = ++clock; }

    void fork(Sequence & from, Sequence & to, int32_t n);
    std::string save(Sequence & sequence);
    bool load(Sequence & sequence, std::string bytes, int32_t n, uint64_t set);

    int32_t free_count() const;
    int64_t cells_used() const;
    size_t  host_used() const { return host_total; }
    int32_t kept_count() const;

    int64_t evictions = 0;
    int64_t restores  = 0;

private:
    bool continuable(int32_t slot, int32_t n);
    void clear(Sequence & sequence);            // empties the slot, keeps owning it
    void release(Sequence & sequence);          // empties the slot and gives it back
    void forget_host(Sequence & sequence);
    bool keep_on_host(Sequence & sequence, std::string bytes);
    Sequence * least_recently_used(bool on_host);

    Backend & backend;
    SlotRules rules;
    std::vector<Sequence *> owner;
    std::unordered_map<uint64_t, std::unique_ptr<Sequence>> sequences;
    uint64_t clock = 0;
    size_t   host_total = 0;
};

}  // namespace triollama
