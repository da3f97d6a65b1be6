#include "training/trainer.hpp"

#include "guards/abort.hpp"
#include "guards/errors.hpp"
#include "training/merge.hpp"
#include "training/random.hpp"

#include <algorithm>
#include <cmath>

namespace triollama::native {

namespace {

constexpr size_t max_layer_nodes = 2048;   // of one layer's forward and backward graph: 300 to 600 in practice

int64_t longest_matrix(const FrozenModel & model) {
    int64_t rows = 0;
    for (const auto & [name, tensor] : model.weights()) {
        if (tensor != model.info().output && tensor != model.info().tok_embd) {
            rows = std::max(rows, tensor->ne[1]);
        }
    }
    return std::max<int64_t>(rows, 4096);   // and blocks of the output matrix
}

// 1 from the last invocation in each text on, where there is one.
std::vector<float> adapted_tokens(const TrainingRow & row, const std::vector<int32_t> & invocation) {
    std::vector<float> adapted(row.tokens.size(), 0.0f);
    const auto begin = row.tokens.begin();
    for (size_t first = 0, last; first < row.tokens.size(); first = last) {
        last = first + 1;
        while (last < row.tokens.size() && row.segments[last] == row.segments[first]) {
            ++last;
        }
        const auto end   = begin + static_cast<std::ptrdiff_t>(last);
        const auto found = std::find_end(begin + static_cast<std::ptrdiff_t>(first), end, invocation.begin(), invocation.end());
        std::fill(adapted.begin() + (found - begin), adapted.begin() + (end - begin), 1.0f);
    }
    return adapted;
}

}  // namespace

// What depends on the length of the row.
struct Trainer::Activations {
    TensorStore store;
    int64_t n_tokens, n_labels;
    ggml_tensor * tokens, * positions, * picked;            // `picked`: indices of the labelled positions
    ggml_tensor * selected, * d_selected;                   // [n_embd, n_labels], after the last norm
    ggml_tensor * d_out, * d_in;                            // gradients flowing from layer to layer
    std::vector<ggml_tensor *> h;                           // the input of each layer, and the last one's output
    LayerInputs inputs;

    Activations(const FrozenModel & model, const AdapterSet & adapters, int64_t n_tokens, int64_t n_labels, bool dropout,
                ggml_backend_buffer_type_t type)
        : store(static_cast<size_t>(model.info().n_layer) + adapters.config().targets.size() +
                2 * static_cast<size_t>(model.info().n_taps) + 16),
          n_tokens(n_tokens), n_labels(n_labels) {
        const ModelGraphInfo & m = model.info();
        tokens     = store.add(GGML_TYPE_I32, n_tokens);
        positions  = store.add(GGML_TYPE_I32, n_tokens);
        picked     = store.add(GGML_TYPE_I32, n_labels);
        selected   = store.add(GGML_TYPE_F32, m.n_embd, n_labels);
        d_selected = store.add(GGML_TYPE_F32, m.n_embd, n_labels);
        d_out      = store.add(GGML_TYPE_F32, m.n_embd, n_tokens);
        d_in       = store.add(GGML_TYPE_F32, m.n_embd, n_tokens);
        for (int l = 0; l <= m.n_layer; ++l) {
            h.push_back(store.add(GGML_TYPE_F32, m.n_embd, n_tokens));
        }
        inputs.positions = positions;
        inputs.mask      = store.add(GGML_TYPE_F32, n_tokens, n_tokens);
        if (m.n_swa) {
            inputs.mask_swa = store.add(GGML_TYPE_F32, n_tokens, n_tokens);
        }
        for (int back = 1; back < m.n_taps; ++back) {
            inputs.past.push_back(store.add(GGML_TYPE_I32, n_tokens));
            inputs.has_past.push_back(store.add(GGML_TYPE_F32, 1, n_tokens));
        }
        if (!adapters.config().invocation.empty()) {
            inputs.adapted = store.add(GGML_TYPE_F32, 1, n_tokens);
        }
        if (dropout) {
            // One mask for each target, shared by all layers that have it, in the same shape: drawn anew before each.
            dropout_masks.resize(adapters.config().targets.size(), nullptr);
            for (const LoraPair & pair : adapters.pairs()) {
                ggml_tensor *& mask = dropout_masks[pair.target];
                mask = mask ? mask : store.add(GGML_TYPE_F32, pair.a->ne[0], n_tokens);
            }
        }
        store.allocate(type);
    }

    // What products give in the layers from `first` on: where a value is a long sum, keeping it spares most.
    void keep(const ModelGraphInfo & m, int first, size_t room, ggml_backend_buffer_type_t type) {
        if (kept) {
            return;
        }
        std::vector<const ggml_tensor *> weights;
        for (size_t l = static_cast<size_t>(first); l < m.layers.size(); ++l) {
            const LayerWeights & w = m.layers[l];
            for (const ggml_tensor * weight : { w.q, w.k, w.v, w.qkv, w.o, w.conv_in, w.conv_out, w.gate, w.up, w.shared_gate,
                                                w.shared_up, w.post_ffn_norm ? w.down : nullptr }) {
                if (weight) {
                    weights.push_back(weight);
                }
            }
        }
        std::stable_sort(weights.begin(), weights.end(), [](const auto * a, const auto * b) { return a->ne[0] > b->ne[0]; });
        auto made = std::make_unique<TensorStore>(weights.size() + 1);
        std::unordered_map<const ggml_tensor *, ggml_tensor *> places;
        for (const ggml_tensor * weight : weights) {
            const size_t bytes = static_cast<size_t>(weight->ne[1] * n_tokens) * sizeof(float);
            if (bytes <= room) {
                room -= bytes;
                places[weight] = made->add(GGML_TYPE_F32, weight->ne[1], n_tokens);
            }
        }
        if (!places.empty()) {
            made->allocate(type);
        }
        kept        = std::move(made);   // once there is memory: else what comes next would find places without
        inputs.kept = std::move(places);
    }

    std::unique_ptr<TensorStore> kept;   // once it trains
    std::vector<ggml_tensor *> dropout_masks;
    std::unique_ptr<Experts>   experts;   // where the model has them

    size_t bytes() const { return store.bytes() + (kept ? kept->bytes() : 0) + (experts ? experts->bytes() : 0); }
};

Trainer::Trainer(const TrainerConfig & config)
    : settings(config),
      executor(config.n_gpu_layers > 0, config.n_threads, max_layer_nodes * 2),
      frozen(std::make_unique<FrozenModel>(config.model_path, config.n_gpu_layers, config.n_threads)),
      adapters(std::make_unique<AdapterSet>(*frozen, config.adapter, executor.buffer_type())),
      builder(*frozen, *adapters),
      head(*frozen),
      constants(4) {
    for (const int32_t token : config.adapter.invocation) {
        if (token < 0 || token >= frozen->info().n_vocab) {
            throw std::invalid_argument("the invocation token " + std::to_string(token) + " is not in the vocabulary");
        }
    }
    if (!(config.dropout >= 0.0f && config.dropout < 1.0f)) {
        throw std::invalid_argument("dropout must be at least 0 and below 1, not " + std::to_string(config.dropout));
    }
    one          = constants.add(GGML_TYPE_F32, 1);
    adamw_params = constants.add(GGML_TYPE_F32, 7);
    options.exact  = config.exact;
    options.kernel = config.kernel.value_or(executor.on_gpu() ? ProductKernel::portable
                                                              : best_product_kernel(config.exact));
    if (executor.on_gpu() && options.kernel != ProductKernel::portable) {
        throw std::invalid_argument(std::string("on a GPU products are computed by its own kernels, not by '") +
                                    product_kernel_name(options.kernel) + "'");
    }
    if (!has_product_kernel(options.kernel)) {
        throw unsupported_error(std::string("this build on this machine has no product kernel '") +
                                product_kernel_name(options.kernel) + "'");
    }
    if (config.exact && options.kernel >= ProductKernel::dots) {
        throw std::invalid_argument(std::string("the product kernel '") + product_kernel_name(options.kernel) +
                                    "' rounds to BF16, which is not exact");
    }
    ggml_tensor *& row_numbers = options.row_numbers;
    row_numbers  = options.kernel == ProductKernel::portable ? constants.add(GGML_TYPE_I32, longest_matrix(*frozen)) : nullptr;
    constants.allocate(executor.buffer_type());
    const float value = 1.0f;
    ggml_backend_tensor_set(one, &value, 0, sizeof(value));
    if (row_numbers) {
        std::vector<int32_t> numbers(static_cast<size_t>(row_numbers->ne[0]));
        for (size_t i = 0; i < numbers.size(); ++i) {
            numbers[i] = static_cast<int32_t>(i);
        }
        ggml_backend_tensor_set(row_numbers, numbers.data(), 0, ggml_nbytes(row_numbers));
    }
}

Trainer::~Trainer() = default;

void Trainer::validate(const TrainingRow & row) const {
    const size_t n = row.tokens.size();
    const ModelGraphInfo & m = frozen->info();
    if (n == 0 || row.positions.size() != n || row.segments.size() != n || row.labels.size() != n ||
        row.weights.size() != n) {
        throw std::invalid_argument("a row needs as many positions, segments, labels and weights as tokens, and at least one");
    }
    if (m.n_ctx_max > 0 && n > static_cast<size_t>(m.n_ctx_max)) {
        throw unsupported_error("rows of this model may have " + std::to_string(m.n_ctx_max) +
                                " tokens (its long-context factors have no training graph), not " + std::to_string(n));
    }
    const auto refuse = [](const char * what, int32_t value, size_t at) {
        throw std::out_of_range(std::string(what) + " " + std::to_string(value) + " at position " + std::to_string(at) +
                                " is out of range");
    };
    bool any = false;
    for (size_t i = 0; i < n; ++i) {
        if (row.tokens[i] < 0 || row.tokens[i] >= m.n_vocab || row.tokens[i] >= m.tok_embd->ne[1]) {
            refuse("token", row.tokens[i], i);
        }
        if (row.labels[i] < -1 || row.labels[i] >= m.n_vocab) {
            refuse("label", row.labels[i], i);
        }
        if (row.positions[i] < 0) {
            refuse("text position", row.positions[i], i);
        }
        if (row.labels[i] >= 0 && !std::isfinite(row.weights[i])) {
            throw std::invalid_argument("the weight of label " + std::to_string(i) + " is not finite");
        }
        any = any || row.labels[i] >= 0;
    }
    if (!any) {
        throw std::invalid_argument("no token of the row has a label");
    }
}

void Trainer::prepare(const TrainingRow & row, bool train) {
    const size_t n = row.tokens.size();
    std::vector<int32_t> picked;
    for (size_t i = 0; i < n; ++i) {
        if (row.labels[i] >= 0) {
            picked.push_back(static_cast<int32_t>(i));
        }
    }
    const int64_t n_labels = static_cast<int64_t>(picked.size());
    if (!activations || activations->n_tokens != static_cast<int64_t>(n) || activations->n_labels != n_labels) {
        activations.reset();   // first, so that the two never exist at once
        auto made = std::make_unique<Activations>(*frozen, *adapters, static_cast<int64_t>(n), n_labels,
                                                  settings.dropout > 0.0f, executor.buffer_type());
        if (frozen->info().n_expert) {
            made->experts = std::make_unique<Experts>(*frozen, builder, static_cast<int64_t>(n), executor.buffer_type());
        }
        activations = std::move(made);
    }
    if (train) {
        activations->keep(frozen->info(), first_layer(), executor.on_gpu() ? 0 : settings.kept_bytes, executor.buffer_type());
    }
    peak_activations = std::max(peak_activations, activations->bytes());
    ggml_backend_tensor_set(activations->tokens, row.tokens.data(), 0, n * sizeof(int32_t));
    ggml_backend_tensor_set(activations->positions, row.positions.data(), 0, n * sizeof(int32_t));
    ggml_backend_tensor_set(activations->picked, picked.data(), 0, picked.size() * sizeof(int32_t));

    for (size_t i = 0; i < activations->inputs.past.size(); ++i) {
        const size_t back = i + 1;
        std::vector<int32_t> past(n, 0);
        std::vector<float>   has_past(n, 0.0f);
        for (size_t t = back; t < n; ++t) {
            past[t]     = static_cast<int32_t>(t - back);
            has_past[t] = row.segments[t - back] == row.segments[t] ? 1.0f : 0.0f;
        }
        ggml_backend_tensor_set(activations->inputs.past[i], past.data(), 0, n * sizeof(int32_t));
        ggml_backend_tensor_set(activations->inputs.has_past[i], has_past.data(), 0, n * sizeof(float));
    }
    if (activations->inputs.adapted) {
        const std::vector<float> adapted = adapted_tokens(row, settings.adapter.invocation);
        ggml_backend_tensor_set(activations->inputs.adapted, adapted.data(), 0, adapted.size() * sizeof(float));
    }

    const int window = frozen->info().n_swa;
    std::vector<float> mask(n * n, -INFINITY), windowed(window ? n * n : 0, -INFINITY);
    for (size_t q = 0; q < n; ++q) {
        for (size_t k = 0; k <= q; ++k) {
            if (row.segments[q] != row.segments[k]) {
                continue;
            }
            mask[q * n + k] = 0.0f;
            if (window && row.positions[q] - row.positions[k] < window) {
                windowed[q * n + k] = 0.0f;
            }
        }
    }
    ggml_backend_tensor_set(activations->inputs.mask, mask.data(), 0, mask.size() * sizeof(float));
    if (window) {
        ggml_backend_tensor_set(activations->inputs.mask_swa, windowed.data(), 0, windowed.size() * sizeof(float));
    }
}

void Trainer::draw_dropout(int layer) {
    LayerInputs & inputs = activations->inputs;
    inputs.dropout.clear();
    if (!dropping) {
        return;
    }
    const std::vector<LoraPair> & pairs = adapters->pairs();
    const float keep = 1.0f / (1.0f - settings.dropout);
    std::vector<float> values;
    for (size_t index = 0; index < pairs.size(); ++index) {
        if (pairs[index].layer != layer) {
            continue;
        }
        // Initial weights are drawn from the streams 0, 1, 2, ...: dropout has the upper half to itself.
        const CounterRandom random(settings.adapter.seed, (1ull << 63) + n_rows * pairs.size() + index);
        ggml_tensor * mask = activations->dropout_masks[pairs[index].target];
        values.resize(static_cast<size_t>(ggml_nelements(mask)));
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = random.uniform(i) < settings.dropout ? 0.0f : keep;
        }
        ggml_backend_tensor_set(mask, values.data(), 0, ggml_nbytes(mask));
        inputs.dropout[frozen->weight(pairs[index].name)] = mask;
    }
}

RowResult Trainer::forward(const TrainingRow & row, bool train) {
    prepare(row, train);
    const ModelGraphInfo & m = frozen->info();
    Activations & a = *activations;
    dropping = train && settings.dropout > 0.0f;
    {
        Graph graph(max_layer_nodes, false, options);
        ggml_context * c = graph.context();
        ggml_tensor * rows = ggml_get_rows(c, m.tok_embd, a.tokens);
        graph.store(m.embedding_scale == 1.0f ? rows : ggml_scale(c, rows, m.embedding_scale), a.h[0]);
        executor.run(graph);
    }
    for (int l = 0; l < m.n_layer; ++l) {
        draw_dropout(l);
        if (a.experts) {
            a.experts->forward(executor, options, l, a.h[l], a.inputs, a.h[l + 1]);
            continue;
        }
        Graph graph(max_layer_nodes, false, options);
        graph.store(builder.layer(graph, l, a.h[l], a.inputs), a.h[l + 1]);
        executor.run(graph);
    }
    {
        Graph graph(max_layer_nodes, false, options);
        graph.store(builder.last_norm(graph, ggml_get_rows(graph.context(), a.h[m.n_layer], a.picked)), a.selected);
        executor.run(graph);
    }
    std::vector<int32_t> labels;
    std::vector<float>   weights;
    for (size_t i = 0; i < row.labels.size(); ++i) {
        if (row.labels[i] >= 0) {
            labels.push_back(row.labels[i]);
            weights.push_back(row.weights[i]);
        }
    }
    HeadResult scored = head.run(executor, options, a.selected, labels, weights, train ? a.d_selected : nullptr);

    RowResult result;
    for (size_t i = 0; i < scored.nll.size(); ++i) {
        result.loss += static_cast<double>(weights[i]) * scored.nll[i];
    }
    result.nll       = std::move(scored.nll);
    result.predicted = std::move(scored.predicted);
    return result;
}

void Trainer::backward() {
    const ModelGraphInfo & m = frozen->info();
    Activations & a = *activations;
    {
        Graph graph(max_layer_nodes, true, options);
        ggml_tensor * last = a.h[m.n_layer];
        ggml_tensor * selected = builder.last_norm(graph, ggml_get_rows(graph.context(), last, a.picked));
        graph.differentiate({ { selected, a.d_selected } }, one, {}, last, a.d_out);
        executor.run(graph);
    }
    const int first = first_layer();
    for (int l = m.n_layer - 1; l >= first; --l) {
        draw_dropout(l);
        if (a.experts) {
            a.experts->backward(executor, options, l, a.h[l], a.inputs, a.d_out, one, adapters->accumulators(), l > first, a.d_in);
        } else {
            Graph graph(max_layer_nodes, true, options);
            ggml_tensor * out = builder.layer(graph, l, a.h[l], a.inputs);
            graph.differentiate({ { out, a.d_out } }, one, adapters->accumulators(), l > first ? a.h[l] : nullptr, a.d_in);
            executor.run(graph);
        }
        std::swap(a.d_out, a.d_in);
    }
}

RowResult Trainer::forward_backward(const TrainingRow & row) {
    AbortScope scope;
    scope.enter();
    validate(row);
    try {
        RowResult result = forward(row, true);
        backward();
        frozen->model_files().check();
        ++n_rows;
        return result;
    } catch (...) {
        adapters->clear_gradients();   // some layers have added theirs and some have not
        throw;
    }
}

std::map<std::string, Timing> Trainer::profile(const TrainingRow & row) {
    const Profile profile(executor.scheduler());
    forward_backward(row);
    return profile.timings();
}

RowResult Trainer::evaluate(const TrainingRow & row) {
    AbortScope scope;
    scope.enter();
    validate(row);
    RowResult result = forward(row, false);
    frozen->model_files().check();
    return result;
}

void Trainer::adamw_step(const AdamW & optimiser) {
    const double step = static_cast<double>(n_steps + 1);
    const float values[7] = {
        optimiser.learning_rate, optimiser.beta1, optimiser.beta2, optimiser.epsilon, optimiser.weight_decay,
        static_cast<float>(1.0 / (1.0 - std::pow(static_cast<double>(optimiser.beta1), step))),
        static_cast<float>(1.0 / (1.0 - std::pow(static_cast<double>(optimiser.beta2), step))),
    };
    ggml_backend_tensor_set(adamw_params, values, 0, sizeof(values));
    const bool abort = executor.abort.exchange(false);   // the step cannot be taken back: not to be cut in half
    run_optimiser();
    if (abort) {
        executor.abort = true;
    }
    adapters->clear_gradients();
    ++n_steps;
}

void Trainer::run_optimiser() {
    constexpr size_t pairs_per_graph = 256;
    const std::vector<LoraPair> & pairs = adapters->pairs();
    for (size_t i = 0; i < pairs.size(); i += pairs_per_graph) {
        Graph graph(max_layer_nodes, false, options);
        for (size_t j = i; j < std::min(i + pairs_per_graph, pairs.size()); ++j) {
            const LoraPair & p = pairs[j];
            graph.compute(ggml_opt_step_adamw(graph.context(), p.a, p.grad_a, p.m_a, p.v_a, adamw_params));
            graph.compute(ggml_opt_step_adamw(graph.context(), p.b, p.grad_b, p.m_b, p.v_b, adamw_params));
        }
        executor.run(graph);
    }
}

std::map<std::string, Executor::Audited> Trainer::audit(int n_tokens, const std::set<std::string> & missing) {
    const size_t n = static_cast<size_t>(n_tokens);
    TrainingRow row;
    row.tokens.assign(n, 0);
    row.labels.assign(n, 0);
    row.segments.assign(n, 0);
    row.weights.assign(n, 1.0f);
    for (int i = 0; i < n_tokens; ++i) {
        row.positions.push_back(i);
    }
    validate(row);
    executor.start_audit(missing);
    try {
        forward(row, true);
        backward();
        run_optimiser();
    } catch (...) {
        executor.stop_audit();
        throw;
    }
    return executor.stop_audit();
}

void Trainer::save_adapter(const std::string & path,
                           const std::vector<std::pair<std::string, std::string>> & metadata) const {
    adapters->save(path, frozen->info().arch->name, metadata);
}

void Trainer::load_adapter(const std::string & path) { adapters->load(path, frozen->info().arch->name); }

void Trainer::save_merged(const std::string & path, ggml_type type) const {
    if (!settings.adapter.invocation.empty()) {
        throw unsupported_error("an activated adapter takes part from its invocation on, and merged weights everywhere");
    }
    merge_adapter(settings.model_path, *adapters, path, type);
}

void Trainer::restore_counters(int64_t step, uint64_t dropout_counter) {
    if (step < 0) {
        throw std::invalid_argument("the step must not be negative");
    }
    n_steps = step;
    n_rows  = dropout_counter;
}

void Trainer::set_threads(int n_threads) {
    settings.n_threads = n_threads;
    executor.set_threads(n_threads);
}

TrainerMemory Trainer::memory() const {
    TrainerMemory memory;
    memory.weights     = frozen->weight_bytes();
    memory.adapter     = adapters->bytes();
    memory.activations = peak_activations;
    memory.arena       = executor.arena_bytes();
    return memory;
}

}  // namespace triollama::native
