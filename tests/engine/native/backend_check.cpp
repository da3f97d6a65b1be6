// The decoder's backend over calls of llama.cpp that fail an assertion, as llama_synchronize does where a GPU failed.
// Prints "ok" or what went wrong.
#include "decoding/backend.hpp"
#include "guards/abort.hpp"
#include "guards/errors.hpp"
#include "kv/sequence_state.hpp"
#include "kv/shift.hpp"
#include "llama/compute.hpp"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <utility>

using namespace triollama::native;

enum class Fault { none, assertion, memory };

static std::string failing;             // the function that fails, and how
static Fault fault = Fault::none;
static std::string last;                // the one that was called last
static int32_t code = 0;                // of the next decode
static ggml_abort_callback_t on_abort = nullptr;

static void call(const char * name) {
    last = name;
    if (failing != name) {
        return;
    }
    if (fault == Fault::memory) {
        throw std::bad_alloc();
    }
    on_abort("GGML_ASSERT(false) failed");      // as ggml_abort does
    std::abort();
}

// ---------------------------------------------------------------- what the backend would link otherwise
ggml_abort_callback_t ggml_set_abort_callback(ggml_abort_callback_t callback) { return std::exchange(on_abort, callback); }

const llama_model * llama_get_model(const llama_context *) { return nullptr; }
const llama_vocab * llama_model_get_vocab(const llama_model *) { return nullptr; }
int32_t llama_vocab_n_tokens(const llama_vocab *) { return 8; }
int32_t llama_model_n_embd(const llama_model *) { return 4; }
int32_t llama_model_n_embd_out(const llama_model *) { return 4; }
int32_t llama_n_threads(llama_context *) { return 1; }
int32_t llama_n_threads_batch(llama_context *) { return 1; }
void llama_set_n_threads(llama_context *, int32_t, int32_t) {}
void llama_set_abort_callback(llama_context *, ggml_abort_callback, void *) {}
void llama_set_embeddings(llama_context *, bool) {}
void llama_set_causal_attn(llama_context *, bool) {}
int32_t llama_set_adapters_lora(llama_context *, llama_adapter_lora **, size_t, float *) { return 0; }
int32_t llama_set_adapter_cvec(llama_context *, const float *, size_t, int32_t, int32_t, int32_t) { return 0; }
float * llama_get_logits_ith(llama_context *, int32_t) { return nullptr; }
float * llama_get_embeddings_ith(llama_context *, int32_t) { return nullptr; }
llama_pos llama_memory_seq_pos_min(llama_memory_t, llama_seq_id) { return 0; }
llama_pos llama_memory_seq_pos_max(llama_memory_t, llama_seq_id) { return 0; }

llama_memory_t llama_get_memory(const llama_context *) { return nullptr; }
void llama_synchronize(llama_context *) { call("synchronize"); }
bool llama_memory_seq_rm(llama_memory_t, llama_seq_id, llama_pos, llama_pos) {
    call("seq_rm");
    return true;
}
void llama_memory_seq_cp(llama_memory_t, llama_seq_id, llama_seq_id, llama_pos, llama_pos) { call("seq_cp"); }
void llama_memory_seq_add(llama_memory_t, llama_seq_id, llama_pos, llama_pos, llama_pos) { call("seq_add"); }
size_t llama_state_seq_set_data(llama_context *, const uint8_t *, size_t size, llama_seq_id) {
    call("state_set");
    return size;
}

namespace triollama::native {

int32_t guarded_decode(llama_context *, const llama_batch &) {
    call("decode");
    return code;
}
void settle(llama_context *, ggml_abort_callback, void *) { call("settle"); }
size_t sequence_state(llama_context *, llama_seq_id, bool, uint8_t *, size_t) {
    call("state_get");
    return 1;
}

}  // namespace triollama::native

// ---------------------------------------------------------------- the checks
static void check(bool good, const std::string & why) {
    if (!good) {
        std::printf("%s\n", why.c_str());
        std::exit(1);
    }
}

// The class of what is thrown; "" if nothing is.
static std::string thrown(const std::function<void()> & work) {
    try {
        work();
    } catch (const broken_context & e) {
        return std::string("broken: ") + e.what();
    } catch (const std::bad_alloc &) {
        return "memory";
    } catch (const std::exception & e) {
        return e.what();
    }
    return "";
}

int main() {
    AbortScope::install();
    LlamaBackend backend(nullptr, false);
    Batch batch;
    batch.add(1, 0, 0, true);
    const struct {
        const char * fails;
        std::function<void()> work;
    } cases[] = {
        {"synchronize", [&] { backend.decode(batch); }},
        {"seq_rm", [&] { backend.seq_rm(0, 0, -1); }},
        {"seq_cp", [&] { backend.seq_cp(0, 1); }},
        {"seq_add", [&] { backend.seq_add(0, 1, 2, -1); }},
        {"state_get", [&] { backend.state_get(0); }},
        {"state_set", [&] { backend.state_set(0, nullptr, 0); }},
    };
    for (const auto & one : cases) {
        failing = one.fails;
        fault   = Fault::assertion;
        const std::string assertion = thrown(one.work);
        check(assertion == "broken: GGML_ASSERT(false) failed", failing + " that fails an assertion gave: " + assertion);
        check(last == failing, "after " + failing + " the context was still used: " + last);
        fault = Fault::memory;
        const std::string memory = thrown(one.work);
        check(memory == "memory", failing + " without memory gave: " + memory);
        failing.clear();
        const std::string nothing = thrown(one.work);
        check(nothing.empty(), std::string(one.fails) + " that does not fail gave: " + nothing);
    }
    // A decode that did not succeed is not waited for.
    code = 2;
    check(backend.decode(batch) == 2 && last == "decode", "a stopped decode was waited for");
    std::puts("ok");
}
