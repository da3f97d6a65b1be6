#include "kv/sequence_state.hpp"

#include "guards/errors.hpp"
#include "guards/log.hpp"

#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-model.h"

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace triollama::native {

namespace {

// With it begins what llama_state_seq_get_data gives.
constexpr uint32_t SEQUENCE_MAGIC = 0xaf143cd8;

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

// As llama_kv_cache::state_write, without leaving out what the window has passed.
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
        const uint32_t size = cache.get_size();
        llama_kv_cache::slot_info place;
        place.s0 = place.s1 = stream;
        const ggml_init_params params = {(2 * layers.size() + 1) * ggml_tensor_overhead(), nullptr, true};
        const ggml_context_ptr scratch(ggml_init(params));
        const auto values_of = [&](uint32_t il) { return cache.get_v(scratch.get(), (int32_t) il, size, place); };
        const bool transposed = !layers.empty() && [&](const ggml_tensor * v) { return v->nb[1] > v->nb[2]; }(values_of(layers[0]));
        io.put<uint32_t>(transposed);           // then a row for each of a head's numbers: without flash attention
        io.put<uint32_t>(layers.size());
        const auto write_rows = [&](ggml_tensor * tensor, uint32_t width) {
            const size_t row = ggml_row_size(tensor->type, width);
            io.put<int32_t>(tensor->type);
            io.put<uint64_t>(row);
            for (const auto & [first, end] : ranges) {
                io.write_tensor(tensor, first * row, (end - first) * row);
            }
        };
        for (const uint32_t il : layers) {
            write_rows(cache.get_k(scratch.get(), (int32_t) il, size, place), h.n_embd_k_gqa(il));
        }
        for (const uint32_t il : layers) {
            ggml_tensor * v = values_of(il);
            if (!transposed) {
                write_rows(v, h.n_embd_v_gqa(il));
                continue;
            }
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

}  // namespace

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

}  // namespace triollama::native
