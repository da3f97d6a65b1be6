#include "kv/insides.hpp"

#include "guards/abort.hpp"
#include "guards/adapter_lock.hpp"
#include "guards/errors.hpp"
#include "guards/log.hpp"
#include "threads/openmp.hpp"

#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>
#include <vector>

namespace triollama::native {

namespace {

// With it begins what llama_state_seq_get_data gives.
constexpr uint32_t SEQUENCE_MAGIC = 0xaf143cd8;

// A cache holds the layers that slide, those that do not, or all.
enum class Layers { all, sliding, others };

bool multiple_of_block(uint32_t width, ggml_type type) { return width % (uint32_t) ggml_blck_size(type) == 0; }

bool rotates_whole_heads(const llama_kv_cache & cache) {
    const ggml_init_params params = {ggml_tensor_overhead(), nullptr, true};
    const ggml_context_ptr scratch(ggml_init(params));
    return cache.build_input_k_rot(scratch.get()) != nullptr;
}

std::string why_not(const llama_context & ctx, const llama_kv_cache & cache, Layers layers, ggml_type type_k) {
    const llama_model & model = ctx.get_model();
    const llama_hparams & h = model.hparams;
    const llama_cparams & c = ctx.get_cparams();
    if (h.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return {};                          // then a position is a number and nothing else
    }
    bool rotated = false;
    for (uint32_t il = 0; il < h.n_layer(); il++) {
        if (!h.has_kv(il) || !h.has_rope(il) || (layers != Layers::all && h.is_swa(il) != (layers == Layers::sliding))) {
            continue;
        }
        rotated = true;
        // Every key of the cache goes through the rotation, most of them by nothing, and is multiplied by this again.
        const float scale = c.yarn_attn_factor *
            (c.yarn_ext_factor != 0.0f ? 1.0f + 0.1f * std::log(1.0f / model.get_rope_freq_scale(c, (int) il)) : 1.0f);
        if (!(std::fabs(scale - 1.0f) < 1e-6f)) {
            return "its keys are scaled (by YaRN, LongRoPE or an attention factor), and moving them would scale all of them again";
        }
        // Quantised keys are stored as a product with a Hadamard matrix of whole heads, which has to be undone.
        if (ggml_is_quantized(type_k) && h.n_rot((int) il) != h.n_embd_head_k((int) il)) {
            return "with quantised keys, heads must be rotated whole";
        }
    }
    if (!rotated) {
        return "one of its caches holds no layer that knows positions";
    }
    if (type_k != GGML_TYPE_F32 && type_k != GGML_TYPE_F16 && !ggml_is_quantized(type_k)) {
        return std::string("llama.cpp cannot rotate keys of type ") + ggml_type_name(type_k);
    }
    if (ggml_is_quantized(type_k) && !rotates_whole_heads(cache)) {
        return std::string("llama.cpp rotates keys of type ") + ggml_type_name(type_k) + " only where a head's width is a multiple of 64";
    }
    return {};
}

std::string why_not(const llama_context & ctx, const llama_kv_cache_iswa & cache, ggml_type type_k) {
    const std::string others = why_not(ctx, *cache.get_base(), Layers::others, type_k);
    return others.empty() ? why_not(ctx, *cache.get_swa(), Layers::sliding, type_k) : others;
}

// Counts bytes, and writes them where there is a place for them.
class Bytes final : public llama_io_write_i {
public:
    Bytes(uint8_t * data, size_t size) : data(data), size(size) {}

    void write(const void * source, size_t n) override {
        if (uint8_t * place = next(n)) {
            std::memcpy(place, source, n);
        }
    }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t n) override {
        if (uint8_t * place = next(n)) {
            ggml_backend_tensor_get(tensor, place, offset, n);
        }
    }
    template <class T> void put(T value) { write(&value, sizeof(value)); }
    size_t n_bytes() override { return written; }

private:
    uint8_t * next(size_t n) {
        const size_t begin = written;
        written += n;
        if (data && written > size) {
            throw std::runtime_error("a state is longer than was counted");
        }
        return data ? data + begin : nullptr;
    }

    uint8_t * data;
    size_t    size;
    size_t    written = 0;
};

// As llama_kv_cache::state_write, without leaving out what the window has passed. Without flash attention, as exact
// contexts are: then values are stored a row for each of a head's numbers.
void write_whole(Bytes & io, const llama_kv_cache & cache, const llama_hparams & h, llama_seq_id sequence) {
    const llama_kv_cells & cells  = cache.get_cells(sequence);
    const uint32_t         stream = cache.get_stream(sequence);
    std::vector<std::pair<uint32_t, uint32_t>> ranges;
    uint32_t n_held = 0;
    for (uint32_t i = 0; i < cells.size(); i++) {
        if (cells.is_empty(i) || !cells.seq_has(i, sequence)) {
            continue;
        }
        n_held++;
        if (ranges.empty() || ranges.back().second != i) {
            ranges.emplace_back(i, i);
        }
        ranges.back().second = i + 1;
    }

    io.put<uint32_t>(cache.get_n_stream());
    for (uint32_t s = 0; s < cache.get_n_stream(); s++) {
        io.put<uint32_t>(s == stream ? n_held : 0);
        if (s != stream || n_held == 0) {
            continue;
        }
        for (const auto & [first, end] : ranges) {
            for (uint32_t i = first; i < end; i++) {
                io.put<llama_pos>(cells.pos_get(i));
                io.put<uint32_t>(1);            // sequence in this cell
                if (cache.has_cell_ext()) {
                    io.put(cells.ext_get(i));
                }
                io.put(sequence);
            }
        }
        const std::vector<uint32_t> layers = cache.get_layer_ids();
        io.put<uint32_t>(1);                    // values are transposed
        io.put<uint32_t>(layers.size());

        const uint32_t size = cache.get_size();
        llama_kv_cache::slot_info place;
        place.s0 = place.s1 = stream;
        const ggml_init_params params = {2 * layers.size() * ggml_tensor_overhead(), nullptr, true};
        const ggml_context_ptr scratch(ggml_init(params));
        for (const uint32_t il : layers) {
            ggml_tensor * k = cache.get_k(scratch.get(), (int32_t) il, size, place);
            const size_t row = ggml_row_size(k->type, h.n_embd_k_gqa(il));
            io.put<int32_t>(k->type);
            io.put<uint64_t>(row);
            for (const auto & [first, end] : ranges) {
                io.write_tensor(k, first * row, (end - first) * row);
            }
        }
        for (const uint32_t il : layers) {
            ggml_tensor * v = cache.get_v(scratch.get(), (int32_t) il, size, place);
            const size_t   element = ggml_type_size(v->type);
            const uint32_t n_rows  = h.n_embd_v_gqa(il);
            io.put<int32_t>(v->type);
            io.put<uint32_t>(element);
            io.put<uint32_t>(n_rows);
            for (size_t j = 0; j < n_rows; j++) {
                for (const auto & [first, end] : ranges) {
                    io.write_tensor(v, (j * size + first) * element, (end - first) * element);
                }
            }
        }
    }
}

void update(llama_context * ctx) {
    const ReadingAdapters table(llama_get_model(ctx));
    AbortScope scope;
    if (in_parallel() >= 0) {
        scope.enter();
    }
    ctx->sched_reserve();                   // as llama_decode does
    ctx->memory_update(false);
    // It only logs a failure. What is still to be done tells.
    if (ctx->get_memory()->init_update(ctx, false)->get_status() != LLAMA_MEMORY_STATUS_NO_UPDATE) {
        const std::string problem = LogQueue::problem();
        throw broken_context("llama.cpp could not move positions" + (problem.empty() ? "" : ": " + problem));
    }
}

}  // namespace

std::string why_no_shift(const llama_context * ctx, ggml_type type_k) {
    llama_memory_i * memory = ctx->get_memory();
    if (!memory) {
        return "it has no memory: the model only encodes";
    }
    if (!memory->get_can_shift()) {
        return "llama.cpp does not know how to, for this model or with swa_full=False";
    }
    if (const auto * cache = dynamic_cast<const llama_kv_cache *>(memory)) {
        return why_not(*ctx, *cache, Layers::all, type_k);
    }
    if (const auto * cache = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        return why_not(*ctx, *cache, type_k);
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        return why_not(*ctx, *hybrid->get_mem_attn(), Layers::all, type_k);
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        return why_not(*ctx, *hybrid->get_mem_attn(), type_k);
    }
    if (dynamic_cast<const llama_memory_recurrent *>(memory)) {
        return {};
    }
    return "it is of a kind for which moving them is not proven";
}

std::string why_no_cache(const llama_model * model, ggml_type type_k, ggml_type type_v) {
    const llama_hparams & h = model->hparams;
    for (uint32_t il = 0; il < h.n_layer(); il++) {
        const uint32_t k = h.n_embd_head_k(il);
        const uint32_t v = h.n_embd_head_v(il);
        if (h.is_recr(il) || !h.has_kv(il)) {
            continue;
        }
        if (!multiple_of_block(k, type_k)) {
            return "keys of " + std::to_string(k) + " values a head cannot be stored in blocks of type " + ggml_type_name(type_k);
        }
        if (!h.is_mla() && !multiple_of_block(v, type_v)) {
            return "values of " + std::to_string(v) + " a head cannot be stored in blocks of type " + ggml_type_name(type_v);
        }
    }
    return {};
}

size_t sequence_state(llama_context * ctx, llama_seq_id sequence, bool exact, uint8_t * data, size_t size) {
    llama_memory_i * memory = ctx->get_memory();
    const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(memory);
    const llama_kv_cache_iswa * sliding = hybrid ? hybrid->get_mem_attn() : dynamic_cast<const llama_kv_cache_iswa *>(memory);
    if (!exact || !sliding) {
        return data ? llama_state_seq_get_data(ctx, data, size, sequence) : llama_state_seq_get_size(ctx, sequence);
    }
    Bytes io(data, size);
    io.put<uint32_t>(SEQUENCE_MAGIC);
    io.put(sequence);
    sliding->get_base()->state_write(io, sequence, 0);
    write_whole(io, *sliding->get_swa(), ctx->get_model().hparams, sequence);
    if (hybrid) {
        hybrid->get_mem_recr()->state_write(io, sequence, 0);
    }
    return io.n_bytes();
}

void line_up(llama_context * ctx, llama_seq_id sequence) {
    if (llama_memory_seq_pos_max(ctx->get_memory(), sequence) < 0) {
        return;
    }
    std::vector<uint8_t> bytes(sequence_state(ctx, sequence, true, nullptr, 0));
    const size_t size = sequence_state(ctx, sequence, true, bytes.data(), bytes.size());
    if (size == 0 || llama_state_seq_set_data(ctx, bytes.data(), size, sequence) != size) {
        throw broken_context("llama.cpp could not load what it had just saved: " + LogQueue::problem());
    }
}

void settle(llama_context * ctx, ggml_abort_callback callback, void * data) {
    LogQueue::forget_problem();
    llama_set_abort_callback(ctx, nullptr, nullptr);
    try {
        update(ctx);
    } catch (const broken_context &) {
        throw;
    } catch (const std::exception & e) {
        throw broken_context(e.what());
    }
    llama_set_abort_callback(ctx, callback, data);
}

}  // namespace triollama::native
