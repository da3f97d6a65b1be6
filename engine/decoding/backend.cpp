#include "decoding/backend.hpp"

#include "guards/abort.hpp"
#include "guards/errors.hpp"
#include "guards/log.hpp"
#include "kv/sequence_state.hpp"
#include "kv/shift.hpp"
#include "llama/compute.hpp"

#include <stdexcept>

namespace triollama::native {

namespace {

// A call whose failed assertion leaves the context in an unknown state.
template <class Call> auto or_broken(Call && call) {
    try {
        return guarded(call);
    } catch (const native_abort & e) {
        throw broken_context(e.what());
    }
}

}  // namespace

LlamaBackend::LlamaBackend(llama_context * ctx, bool exact)
    : ctx(ctx),
      memory(llama_get_memory(ctx)),
      exact(exact),
      own_threads(llama_n_threads(ctx)),
      own_threads_batch(llama_n_threads_batch(ctx)) {}

const llama_vocab * LlamaBackend::vocab() const { return llama_model_get_vocab(llama_get_model(ctx)); }
int32_t LlamaBackend::n_vocab() const { return llama_vocab_n_tokens(vocab()); }
int32_t LlamaBackend::n_embd() const { return llama_model_n_embd_out(llama_get_model(ctx)); }

int32_t LlamaBackend::decode(const Batch & batch) {
    const int32_t n = batch.size();
    slots = batch.slot;
    slot_pointers.resize(n);
    for (int32_t i = 0; i < n; i++) {
        slot_pointers[i] = &slots[i];
    }
    ones.resize(n, 1);

    llama_batch view = {};
    view.n_tokens = n;
    view.token    = const_cast<llama_token *>(batch.token.data());
    view.pos      = const_cast<llama_pos *>(batch.pos.data());
    view.n_seq_id = ones.data();
    view.seq_id   = slot_pointers.data();
    view.logits   = const_cast<int8_t *>(batch.output.data());
    LogQueue::forget_problem();
    int32_t code;
    try {
        code = guarded_decode(ctx, view);
    } catch (const std::exception & e) {
        LogQueue::muted() = false;
        throw broken_context(e.what());
    }
    LogQueue::muted() = false;
    if (code == 0) {
        or_broken([this] { llama_synchronize(ctx); });     // so that a step's measured cost is its own, on GPUs too
    }
    return code;
}

std::string LlamaBackend::problem() { return LogQueue::problem(); }

float * LlamaBackend::logits(int32_t i) { return llama_get_logits_ith(ctx, i); }
const float * LlamaBackend::embeddings(int32_t i) { return llama_get_embeddings_ith(ctx, i); }

bool LlamaBackend::seq_rm(llama_seq_id slot, llama_pos p0, llama_pos p1) {
    return or_broken([=] { return llama_memory_seq_rm(memory, slot, p0, p1); });
}
void LlamaBackend::seq_cp(llama_seq_id from, llama_seq_id to) {
    or_broken([=] { llama_memory_seq_cp(memory, from, to, -1, -1); });
}
void LlamaBackend::seq_add(llama_seq_id slot, llama_pos p0, llama_pos p1, llama_pos delta) {
    or_broken([=] { llama_memory_seq_add(memory, slot, p0, p1, delta); });
    settle(ctx, asked_to_abort, this);
}
llama_pos LlamaBackend::seq_pos_min(llama_seq_id slot) { return llama_memory_seq_pos_min(memory, slot); }
llama_pos LlamaBackend::seq_pos_max(llama_seq_id slot) { return llama_memory_seq_pos_max(memory, slot); }

std::string LlamaBackend::state_get(llama_seq_id slot) {
    return or_broken([=] {
        std::string bytes(sequence_state(ctx, slot, exact, nullptr, 0), '\0');
        const size_t n = sequence_state(ctx, slot, exact, (uint8_t *) bytes.data(), bytes.size());
        bytes.resize(n <= bytes.size() ? n : 0);
        return bytes;
    });
}

bool LlamaBackend::state_set(llama_seq_id slot, const uint8_t * data, size_t size) {
    return or_broken([=] { return llama_state_seq_set_data(ctx, data, size, slot) == size; });
}

void LlamaBackend::apply(const ContextSet & set) {
    std::vector<float> scales = set.scales;
    std::vector<llama_adapter_lora *> adapters = set.adapters;
    if (llama_set_adapters_lora(ctx, adapters.data(), adapters.size(), scales.data()) != 0) {
        throw std::runtime_error("llama.cpp refused the set of adapters");
    }
    const float * control = set.control.empty() ? nullptr : set.control.data();
    const int32_t n_state = llama_model_n_embd(llama_get_model(ctx));
    if (llama_set_adapter_cvec(ctx, control, set.control.size(), n_state, set.control_first, set.control_last) != 0) {
        throw std::runtime_error("llama.cpp refused the control vector");
    }
}

void LlamaBackend::set_embeddings(bool on) { llama_set_embeddings(ctx, on); }
void LlamaBackend::set_causal(bool on) { llama_set_causal_attn(ctx, on); }

void LlamaBackend::set_threads(int32_t n_threads, int32_t n_threads_batch) {
    llama_set_n_threads(ctx, n_threads > 0 ? n_threads : own_threads,
                        n_threads_batch > 0 ? n_threads_batch : own_threads_batch);
}

void LlamaBackend::set_abort(bool (*should_abort_)(void *), void * data) {
    should_abort = should_abort_;
    abort_data   = data;
    llama_set_abort_callback(ctx, asked_to_abort, this);
}

bool LlamaBackend::asked_to_abort(void * self) {
    const LlamaBackend & backend = *static_cast<LlamaBackend *>(self);
    const bool abort = backend.should_abort(backend.abort_data);
    LogQueue::muted() = abort;      // upstream reports a stopped decode as a failure, four lines long
    return abort;
}

}  // namespace triollama::native
