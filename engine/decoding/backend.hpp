// What the decoder needs of a context. Behind an interface, so that tests can script failures that llama.cpp rarely shows.
#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace triollama::native {

// Settings that belong to the whole context, so that only streams that agree on them share a batch.
struct ContextSet {
    std::vector<llama_adapter_lora *> adapters;
    std::vector<float> scales;
    std::vector<float> control;         // rows of n_embd for layers 1.., or empty
    std::vector<llama_token> invocation;    // the set takes part from the last place on where a prompt says these
    int32_t control_first = 0;
    int32_t control_last  = 0;
};

struct Batch {
    std::vector<llama_token>  token;
    std::vector<llama_pos>    pos;
    std::vector<llama_seq_id> slot;
    std::vector<int8_t>       output;

    void clear() {
        token.clear();
        pos.clear();
        slot.clear();
        output.clear();
    }
    void add(llama_token t, llama_pos p, llama_seq_id s, bool out) {
        token.push_back(t);
        pos.push_back(p);
        slot.push_back(s);
        output.push_back(out);
    }
    int32_t size() const { return (int32_t) token.size(); }
};

// All methods are called from the decoder's thread alone.
class Backend {
public:
    virtual ~Backend() = default;

    virtual const llama_vocab * vocab() const = 0;
    virtual int32_t n_vocab() const = 0;
    virtual int32_t n_embd() const = 0;

    virtual int32_t decode(const Batch & batch) = 0;            // llama_decode's codes
    virtual std::string problem() = 0;                          // what was logged about the last decode that failed
    virtual float * logits(int32_t i) = 0;                      // of the batch's token i, until the next decode
    virtual const float * embeddings(int32_t i) = 0;

    virtual bool seq_rm(llama_seq_id slot, llama_pos p0, llama_pos p1) = 0;
    virtual void seq_cp(llama_seq_id from, llama_seq_id to) = 0;            // the whole sequence; unified cache only
    virtual void seq_add(llama_seq_id slot, llama_pos p0, llama_pos p1, llama_pos delta) = 0;     // whole, keys and all
    virtual llama_pos seq_pos_min(llama_seq_id slot) = 0;
    virtual llama_pos seq_pos_max(llama_seq_id slot) = 0;

    virtual std::string state_get(llama_seq_id slot) = 0;                       // empty: failed
    virtual bool state_set(llama_seq_id slot, const uint8_t * data, size_t size) = 0;   // false: the sequence is now empty

    virtual void apply(const ContextSet & set) = 0;             // throws std::runtime_error when refused
    virtual void set_embeddings(bool on) = 0;                   // while on, every token has an output
    virtual void set_causal(bool on) = 0;
    virtual void set_threads(int32_t n_threads, int32_t n_threads_batch) = 0;   // 0: the context's own
    virtual void set_abort(bool (*should_abort)(void *), void * data) = 0;
};

// A llama_context, which somebody else owns and nobody else touches meanwhile.
class LlamaBackend final : public Backend {
public:
    LlamaBackend(llama_context * ctx, bool exact);

    const llama_vocab * vocab() const override;
    int32_t n_vocab() const override;
    int32_t n_embd() const override;
    int32_t decode(const Batch & batch) override;
    std::string problem() override;
    float * logits(int32_t i) override;
    const float * embeddings(int32_t i) override;
    bool seq_rm(llama_seq_id slot, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id from, llama_seq_id to) override;
    void seq_add(llama_seq_id slot, llama_pos p0, llama_pos p1, llama_pos delta) override;
    llama_pos seq_pos_min(llama_seq_id slot) override;
    llama_pos seq_pos_max(llama_seq_id slot) override;
    std::string state_get(llama_seq_id slot) override;
    bool state_set(llama_seq_id slot, const uint8_t * data, size_t size) override;
    void apply(const ContextSet & set) override;
    void set_embeddings(bool on) override;
    void set_causal(bool on) override;
    void set_threads(int32_t n_threads, int32_t n_threads_batch) override;
    void set_abort(bool (*should_abort)(void *), void * data) override;

private:
    static bool asked_to_abort(void * self);

    llama_context * ctx;
    llama_memory_t  memory;
    const bool      exact;
    int32_t own_threads;
    int32_t own_threads_batch;
    bool (*should_abort)(void *) = nullptr;
    void * abort_data = nullptr;
    std::vector<llama_seq_id>   slots;          // storage behind a batch's pointers
    std::vector<llama_seq_id *> slot_pointers;
    std::vector<int32_t>        ones;
};

}  // namespace triollama::native
