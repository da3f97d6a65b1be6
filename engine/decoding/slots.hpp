// Which conversation's KV lives in which of the context's sequences, and what of it may be reused.
#pragma once

#include "decoding/backend.hpp"
#include "decoding/cost.hpp"
#include "kv/disk.hpp"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <unordered_map>
#include <vector>

namespace triollama::native {

// Fewer common tokens than this are computed again.
constexpr int32_t WORTH_SHARING = 16;

// Some cells, of which a sequence holds the first `n`. Forks share the cells they have in common.
struct Run {
    uint64_t cells = 0;
    int32_t  n = 0;
};

struct Sequence {
    uint64_t id = 0;
    int32_t  slot = -1;         // the context's sequence id, or -1: no KV there
    int32_t  n = 0;             // positions [0, n) are valid in the slot, or else in `host` or on disk
    uint64_t set = 0;           // the ContextSet that computed them
    int32_t  bare = 0;          // but for so many at the beginning, which the bare model did
    uint64_t used = 0;          // for least recently used
    bool     busy = false;      // a stream is using it
    bool     kept = false;      // lives on without a stream
    bool     spare = false;     // nobody's any more: serves who begins alike, until its slot is wanted
    std::vector<llama_token> tokens;    // what its positions hold, as far as is known
    std::string host;           // upstream's blob, while it has no slot
    bool     on_disk = false;   // or there
    std::vector<Run> runs;      // which cells it holds, as of the last look
    bool     shares = false;    // its last run is also another's: what comes now goes into another one
};

struct SlotRules {
    int32_t n_slots = 1;
    int32_t n_swa = 0;
    bool    unified = true;
    bool    can_roll_back = true;
    bool    can_shift = true;           // positions can be moved
    size_t  host_bytes = 0;
    int     disk_fd = -1;
    size_t  disk_bytes = 0;
    double  restore_byte_s = 0.0;   // not 0: in place of what is measured
    double  prompt_token_s = 0.0;   // likewise
};

class Slots {
public:
    // `token_s`: what a prompt's token costs, as measured; 0: not known yet.
    Slots(Backend & backend, SlotRules rules, std::function<double()> token_s)
        : backend(backend), rules(rules), token_s(std::move(token_s)), cost(rules.restore_byte_s, rules.prompt_token_s),
          disk(rules.disk_fd, rules.disk_bytes), owner(rules.n_slots, nullptr) {}

    Sequence * find(uint64_t id);
    Sequence & make(uint64_t id, bool kept);
    void drop(uint64_t id);

    // Gives it a slot: its own, a free one, or one of the least recently used idle sequence. False: all are busy.
    bool acquire(Sequence & sequence);
    // Prepares the slot to go on from at most `wanted`, by this set after `bare` tokens; returns the position to go on from.
    int32_t reuse(Sequence & sequence, int32_t wanted, uint64_t set, int32_t bare);
    // Removes what is at or after `n`. Where that cannot be done exactly everything goes, and sequence.n is 0.
    void trim(Sequence & sequence, int32_t n);
    // Takes the slot away, keeping the KV in host memory if there is room, and making room by moving what was used
    // least recently from there to disk.
    void evict(Sequence & sequence);
    bool evict_idle();
    bool can_make_room() { return free_count() > 0 || least_recently_used(Place::slot); }
    // What this set of adapters computed is of no use any more.
    void forget_set(uint64_t set);
    void touch(Sequence & sequence) { sequence.used = ++clock; }

    // Notes what an idle sequence holds.
    void remember(Sequence & sequence, std::vector<llama_token> tokens);
    // The idle sequence with the longest beginning in common with `tokens`, and how many of them, at most `most`, at
    // least WORTH_SHARING. Or none.
    std::pair<Sequence *, int32_t> find_alike(const std::vector<llama_token> & tokens, int32_t most, uint64_t set,
                                              int32_t bare);
    // A spare one as somebody's own.
    Sequence & adopt(Sequence & spare, uint64_t id);

    void fork(Sequence & from, Sequence & to, int32_t n);
    // Removes the positions [keep, keep + drop) and moves down what follows. Cells that others share are copied first.
    bool shift(Sequence & sequence, int32_t keep, int32_t drop);
    static int32_t shifted(int32_t n, int32_t keep, int32_t drop) { return n <= keep ? n : std::max(keep, n - drop); }
    std::string save(Sequence & sequence);
    bool load(Sequence & sequence, const uint8_t * data, size_t size, int32_t n, uint64_t set);

    int32_t free_count() const;     // slots without an owner; what a spare one has is free
    int64_t cells_used();           // cells that several sequences share count once, those of spare ones not
    size_t  host_used() const { return host_total; }
    size_t  disk_used() const { return disk.used(); }
    int64_t disk_failures() const { return disk.failures(); }
    int32_t kept_count() const;

    int64_t evictions  = 0;
    int64_t restores   = 0;         // came back from memory or disk
    int64_t recomputes = 0;         // could have, but are sooner computed again
    int64_t spills     = 0;         // from host memory to disk

private:
    static int32_t usable(const Sequence & sequence, uint64_t set, int32_t bare);
    bool continuable(int32_t slot, int32_t n);
    int32_t oldest_needed(int32_t n) const;     // to go on at n
    bool reload(Sequence & sequence);
    bool set_state(int32_t slot, const std::string & bytes);
    void clear(Sequence & sequence);            // empties the slot, keeps owning it
    void release(Sequence & sequence);          // empties the slot and gives it back
    enum class Place { slot, host, disk };

    void forget_saved(Sequence & sequence);
    bool keep(Sequence & sequence, std::string bytes);          // in host memory, or else on disk
    bool keep_on_disk(Sequence & sequence, std::string & bytes);    // takes the bytes if it does
    void bring_back(Sequence & sequence);
    std::string saved(Sequence & sequence) { return sequence.on_disk ? disk.get(sequence.id) : sequence.host; }
    Sequence * least_recently_used(Place place);
    void update_runs(Sequence & sequence);
    bool is_shared(Sequence & sequence);

    Backend & backend;
    SlotRules rules;
    std::function<double()> token_s;
    RestoreCost cost;
    DiskStore disk;
    std::vector<Sequence *> owner;
    std::unordered_map<uint64_t, std::unique_ptr<Sequence>> sequences;
    uint64_t clock = 0;
    uint64_t last_cells = 0;
    size_t   host_total = 0;
};

}  // namespace triollama::native
