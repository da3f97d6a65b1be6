// The trainable part: a pair of matrices A and B beside each chosen weight, with gradients and AdamW's moments.
#pragma once

#include "training/graph.hpp"
#include "training/model.hpp"

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace triollama::native {

struct AdapterConfig {
    int   rank  = 8;
    float alpha = 16.0f;
    bool  rslora = false;                 // scale by alpha / sqrt(rank) instead of alpha / rank
    std::vector<std::string> targets;     // names within a layer, such as "attn_q"; empty: every matrix
    uint64_t seed = 0;
    // Of an activated adapter (arXiv:2504.12397): it takes part from the last place on where a text says these.
    std::vector<int32_t> invocation;

    float scale() const;
    float gguf_alpha() const;   // what a GGUF file says so that llama.cpp's alpha / rank is scale()
};

struct LoraPair {
    std::string name;            // of the base weight, "blk.0.attn_q.weight"
    int    layer  = 0;
    size_t target = 0;           // which of AdapterConfig::targets
    ggml_tensor * a = nullptr, * b = nullptr;           // [n_in, rank], [rank, n_out]
    ggml_tensor * grad_a = nullptr, * grad_b = nullptr;
    ggml_tensor * m_a = nullptr, * m_b = nullptr, * v_a = nullptr, * v_b = nullptr;
};

// Which flat vector of the whole adapter: all A and B in the order of pairs(), A before B, rows as ggml stores them.
enum AdapterPart { PART_WEIGHTS, PART_GRADIENTS, PART_FIRST_MOMENTS, PART_SECOND_MOMENTS };

class AdapterSet {
public:
    // B is zero and A uniform in +-1/sqrt(n_in), as PEFT initialises (Kaiming with a = sqrt 5), so the adapter
    // starts without effect. Throws invalid_argument if a target does not exist or the rank exceeds its matrix.
    AdapterSet(const FrozenModel & model, const AdapterConfig & config, ggml_backend_buffer_type_t type);

    const std::vector<LoraPair> & pairs() const { return all; }
    const LoraPair * find(const ggml_tensor * weight) const;
    const AdapterConfig & config() const { return settings; }
    const std::unordered_map<ggml_tensor *, ggml_tensor *> & accumulators() const { return gradient_of; }

    size_t n_parameters() const { return n_values; }
    size_t bytes() const { return store.bytes(); }

    // `n` floats, n == n_parameters(); otherwise invalid_argument.
    void get(AdapterPart part, float * out, size_t n) const;
    void set(AdapterPart part, const float * values, size_t n);

    double gradient_norm() const;            // of all gradients as one vector
    void   scale_gradients(float factor);
    void   clear_gradients();

    // llama.cpp's adapter format; extra pairs are written as string metadata. Throws file_error if writing fails.
    void save(const std::string & path, const std::string & architecture,
              const std::vector<std::pair<std::string, std::string>> & metadata) const;
    // Throws format_error unless the file holds exactly these pairs with these shapes, this scale and this invocation.
    void load(const std::string & path, const std::string & architecture);

private:
    template <typename F> void for_each(AdapterPart part, F && visit) const;

    AdapterConfig settings;
    std::vector<LoraPair> all;
    std::unordered_map<const ggml_tensor *, size_t> index_of;
    std::unordered_map<ggml_tensor *, ggml_tensor *> gradient_of;
    TensorStore store;
    size_t n_values = 0;
};

}  // namespace triollama::native
