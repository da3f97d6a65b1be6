// A LoRA training run's native half: a frozen model, the adapter beside it, and the steps that move it.
// Layers are run one at a time; their inputs are kept, and what products gave as far as there is room. The rest is
// computed again on the way back.
// Not safe for several threads at once, except for request_abort().
#pragma once

#include "llama/profile.hpp"
#include "training/adapter.hpp"
#include "training/experts.hpp"
#include "training/graph.hpp"
#include "training/head.hpp"
#include "training/layer.hpp"
#include "training/model.hpp"

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace triollama::native {

struct TrainerConfig {
    std::string   model_path;
    AdapterConfig adapter;
    float dropout      = 0.0f;    // probability that an element of an adapter's input is dropped
    bool  exact        = true;    // weights as F32; else quantised weights meet quantised activations forward
    int   n_threads    = 1;
    int   n_gpu_layers = 0;       // above 0 the graphs run on the GPU
    size_t kept_bytes  = 1 << 27; // of products' outcomes, from the way forward for the way back; on a GPU none are
    std::optional<ProductKernel> kernel;   // the best there is, if not given
};

// One row of tokens: one text, or several packed side by side that cannot see each other.
struct TrainingRow {
    std::vector<int32_t> tokens;
    std::vector<int32_t> positions;   // of each token in its own text
    std::vector<int32_t> segments;    // equal within a text
    std::vector<int32_t> labels;      // the token to be predicted after this one, or -1 for none
    std::vector<float>   weights;     // of each label in the loss
};

struct RowResult {
    double loss = 0.0;                // sum of weight * -log p[label]
    std::vector<float>   nll;         // of the labelled positions, in order
    std::vector<int32_t> predicted;   // what the model would have said there
};

struct AdamW {
    float learning_rate = 1e-4f, beta1 = 0.9f, beta2 = 0.999f, epsilon = 1e-8f, weight_decay = 0.0f;
};

struct TrainerMemory {
    size_t weights = 0;       // bytes of the mapped file; shared with whoever else maps it
    size_t adapter = 0;       // A, B, gradients, moments
    size_t activations = 0;   // layer inputs, what is kept, masks; the most so far
    size_t arena = 0;         // nodes of the graph being run; the most so far
};

class Trainer {
public:
    // Throws format_error, unsupported_error, invalid_argument (see FrozenModel and AdapterSet).
    explicit Trainer(const TrainerConfig & config);
    ~Trainer();

    // Adds the row's gradients to those already there. If it throws, except for an invalid row, all gradients are cleared.
    RowResult forward_backward(const TrainingRow & row);

    // The same loss without gradients and without dropout.
    RowResult evaluate(const TrainingRow & row);

    // Where the time of one forward_backward goes, by operation. The gradients are added like there.
    std::map<std::string, Timing> profile(const TrainingRow & row);

    // What a step on a row of so many tokens is made of, and what of it the GPU leaves to the CPU. Nothing is computed.
    std::map<std::string, Executor::Audited> audit(int n_tokens, const std::set<std::string> & missing);

    void adamw_step(const AdamW & optimiser);   // uses and clears the gradients

    ProductKernel kernel() const { return options.kernel; }
    AdapterSet &       adapter() { return *adapters; }
    const AdapterSet & adapter() const { return *adapters; }
    const ModelGraphInfo & model() const { return frozen->info(); }
    const ModelFiles & model_files() const { return frozen->model_files(); }

    void save_adapter(const std::string & path, const std::vector<std::pair<std::string, std::string>> & metadata) const;
    void load_adapter(const std::string & path);
    // See merge_adapter; GGML_TYPE_COUNT keeps each matrix's type.
    void save_merged(const std::string & path, ggml_type type) const;

    // With the adapter's weights and moments these two are all the state of a run.
    int64_t  step() const { return n_steps; }              // optimiser steps taken
    uint64_t dropout_counter() const { return n_rows; }    // rows trained on; selects the dropout masks
    void restore_counters(int64_t step, uint64_t dropout_counter);

    void set_threads(int n_threads);
    void request_abort(bool abort) { executor.abort = abort; }
    TrainerMemory memory() const;

private:
    struct Activations;

    void validate(const TrainingRow & row) const;
    void prepare(const TrainingRow & row, bool train);
    int  first_layer() const { return adapters->pairs().front().layer; }   // below it nothing is learned
    void draw_dropout(int layer);
    RowResult forward(const TrainingRow & row, bool train);
    void backward();
    void run_optimiser();

    TrainerConfig                 settings;
    Executor                      executor;
    std::unique_ptr<FrozenModel>  frozen;
    std::unique_ptr<AdapterSet>   adapters;
    LayerBuilder                  builder;
    Head                          head;
    GraphOptions                  options;
    TensorStore                   constants;
    ggml_tensor *                 one;           // the gradient of the loss in itself
    ggml_tensor *                 adamw_params;
    std::unique_ptr<Activations>  activations;   // of the last row; kept while rows have the same shape
    bool                          dropping = false;
    size_t                        peak_activations = 0;
    int64_t                       n_steps = 0;
    uint64_t                      n_rows = 0;
};

}  // namespace triollama::native
