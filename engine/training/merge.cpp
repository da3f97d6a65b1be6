#include "training/merge.hpp"

#include "guards/errors.hpp"
#include "llama/gguf_file.hpp"

#include "gguf.h"

#include <cstdio>
#include <map>
#include <memory>
#include <vector>

namespace triollama::native {

namespace {

using File = std::unique_ptr<FILE, int (*)(FILE *)>;

bool seek(FILE * file, uint64_t offset) {
    return fseeko(file, static_cast<off_t>(offset), SEEK_SET) == 0;
}

void require_writable(const std::string & name, ggml_type type) {
    const bool plain = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    if (!plain && (!ggml_is_quantized(type) || ggml_quantize_requires_imatrix(type) ||
                   !ggml_get_type_traits(type)->to_float)) {
        throw unsupported_error(name + " has type " + ggml_type_name(type) +
                                ", which cannot be made again from changed weights; merge to f16 or f32");
    }
}

// Adds scale * B A to the rows of one matrix and stores them as another type.
class MatrixMerger {
public:
    MatrixMerger(const LoraPair & pair, float scale)
        : n_in(pair.a->ne[0]), rank(pair.a->ne[1]), scale(scale), a(static_cast<size_t>(ggml_nelements(pair.a))),
          b(static_cast<size_t>(ggml_nelements(pair.b))), row(static_cast<size_t>(n_in)) {
        ggml_backend_tensor_get(pair.a, a.data(), 0, ggml_nbytes(pair.a));
        ggml_backend_tensor_get(pair.b, b.data(), 0, ggml_nbytes(pair.b));
    }

    void merge(ggml_type from, const void * source, ggml_type to, int64_t index, void * target) {
        if (from == GGML_TYPE_F32) {
            const float * values = static_cast<const float *>(source);
            row.assign(values, values + n_in);
        } else {
            ggml_get_type_traits(from)->to_float(source, row.data(), n_in);
        }
        for (int64_t r = 0; r < rank; ++r) {
            const float   factor = scale * b[static_cast<size_t>(index * rank + r)];
            const float * values = a.data() + r * n_in;
            for (int64_t i = 0; i < n_in; ++i) {
                row[static_cast<size_t>(i)] += factor * values[i];
            }
        }
        ggml_quantize_chunk(to, row.data(), target, 0, 1, n_in, nullptr);
    }

private:
    const int64_t n_in, rank;
    const float   scale;
    std::vector<float> a, b, row;
};

}  // namespace

void merge_adapter(const std::string & base, const AdapterSet & adapters, const std::string & path, ggml_type type) {
    ggml_context * raw = nullptr;
    gguf_init_params params{};
    params.no_alloc = true;
    params.ctx      = &raw;
    const gguf_context_ptr source(gguf_init_from_file(base.c_str(), params));
    const ggml_context_ptr tensors(raw);
    if (!source || !tensors) {
        throw format_error(base + ": not a readable GGUF file");
    }
    if (gguf_find_key(source.get(), "split.count") >= 0) {
        throw unsupported_error(base + ": a model split over several files cannot be merged");
    }
    std::map<std::string, const LoraPair *> pairs;
    for (const LoraPair & pair : adapters.pairs()) {
        pairs[pair.name] = &pair;
    }

    const gguf_context_ptr merged(gguf_init_empty());
    gguf_set_kv(merged.get(), source.get());
    gguf_remove_key(merged.get(), "general.alignment");   // back to the default, by which the offsets are computed
    const int64_t n_tensors = gguf_get_n_tensors(source.get());
    std::vector<ggml_type> types;
    for (int64_t i = 0; i < n_tensors; ++i) {
        const char * name = gguf_get_tensor_name(source.get(), i);
        gguf_add_tensor(merged.get(), ggml_get_tensor(tensors.get(), name));
        ggml_type kept = gguf_get_tensor_type(source.get(), i);
        if (pairs.count(name)) {
            kept = type == GGML_TYPE_COUNT ? kept : type;
            require_writable(name, kept);
            gguf_set_tensor_type(merged.get(), name, kept);
        }
        types.push_back(kept);
    }

    const File in(std::fopen(base.c_str(), "rb"), std::fclose);
    if (!in) {
        throw file_error(base);
    }
    GgufFile out(path, merged.get());
    std::vector<char> from, to;
    for (int64_t i = 0; i < n_tensors; ++i) {
        const char * name = gguf_get_tensor_name(source.get(), i);
        const ggml_tensor * tensor = ggml_get_tensor(tensors.get(), name);
        from.resize(ggml_nbytes(tensor));
        const uint64_t offset = gguf_get_data_offset(source.get()) + gguf_get_tensor_offset(source.get(), i);
        if (!seek(in.get(), offset) || std::fread(from.data(), 1, from.size(), in.get()) != from.size()) {
            throw format_error(base + ": " + name + " is truncated");
        }
        const auto pair = pairs.find(name);
        if (pair != pairs.end()) {
            const size_t from_row = ggml_row_size(tensor->type, tensor->ne[0]);
            const size_t to_row   = ggml_row_size(types[static_cast<size_t>(i)], tensor->ne[0]);
            to.resize(to_row * static_cast<size_t>(tensor->ne[1]));
            MatrixMerger merger(*pair->second, adapters.config().scale());
            for (int64_t row = 0; row < tensor->ne[1]; ++row) {
                merger.merge(tensor->type, from.data() + static_cast<size_t>(row) * from_row,
                             types[static_cast<size_t>(i)], row, to.data() + static_cast<size_t>(row) * to_row);
            }
            from.swap(to);
        }
        out.add(from.data(), from.size());
    }
    out.finish();
}

}  // namespace triollama::native
