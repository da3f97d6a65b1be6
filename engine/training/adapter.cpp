#include "training/adapter.hpp"

#include "guards/abort.hpp"
#include "guards/errors.hpp"
#include "llama/gguf_file.hpp"
#include "llama/gguf_meta.hpp"
#include "training/random.hpp"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace triollama::native {

float AdapterConfig::scale() const {
    return rslora ? alpha / std::sqrt(static_cast<float>(rank)) : alpha / static_cast<float>(rank);
}

float AdapterConfig::gguf_alpha() const { return rslora ? alpha * std::sqrt(static_cast<float>(rank)) : alpha; }

AdapterSet::AdapterSet(const FrozenModel & model, const AdapterConfig & config, ggml_backend_buffer_type_t type)
    : settings(config),
      store(static_cast<size_t>(model.info().n_layer) * std::max(config.targets.size(), model.linear_targets().size()) * 8) {
    if (settings.targets.empty()) {
        settings.targets = model.linear_targets();
    }
    if (config.rank < 1) {
        throw std::invalid_argument("rank must be at least 1, not " + std::to_string(config.rank));
    }
    const std::vector<std::string> known = model.linear_targets();
    for (const std::string & target : settings.targets) {
        if (std::find(known.begin(), known.end(), target) == known.end()) {
            std::string all_known;
            for (const std::string & name : known) {
                all_known += (all_known.empty() ? "" : ", ") + name;
            }
            throw std::invalid_argument("target '" + target + "': the model has no matrix of this name that can have an adapter"
                                        " (have: " + all_known + ")");
        }
    }
    for (int l = 0; l < model.info().n_layer; ++l) {
        for (size_t i = 0; i < settings.targets.size(); ++i) {
            const std::string & target = settings.targets[i];
            LoraPair pair;
            pair.name   = "blk." + std::to_string(l) + "." + target + ".weight";
            pair.layer  = l;
            pair.target = i;
            ggml_tensor * weight = model.weight(pair.name);
            if (!weight) {
                continue;   // of a hybrid model each kind of layer has its own
            }
            const int64_t n_in = weight->ne[0], n_out = weight->ne[1];
            if (config.rank > std::min(n_in, n_out)) {
                throw std::invalid_argument("rank " + std::to_string(config.rank) + " exceeds " + pair.name + ", which is " +
                                            std::to_string(n_in) + " x " + std::to_string(n_out));
            }
            if (index_of.count(weight)) {
                throw std::invalid_argument("target '" + target + "' is given twice");
            }
            for (ggml_tensor ** t : { &pair.a, &pair.grad_a, &pair.m_a, &pair.v_a }) {
                *t = store.add(GGML_TYPE_F32, n_in, config.rank);
            }
            for (ggml_tensor ** t : { &pair.b, &pair.grad_b, &pair.m_b, &pair.v_b }) {
                *t = store.add(GGML_TYPE_F32, config.rank, n_out);
            }
            ggml_format_name(pair.a, "%s.lora_a", pair.name.c_str());
            ggml_format_name(pair.b, "%s.lora_b", pair.name.c_str());
            ggml_set_param(pair.a);
            ggml_set_param(pair.b);
            gradient_of[pair.a] = pair.grad_a;
            gradient_of[pair.b] = pair.grad_b;
            n_values += static_cast<size_t>(ggml_nelements(pair.a) + ggml_nelements(pair.b));
            index_of[weight] = all.size();
            all.push_back(pair);
        }
    }
    store.allocate(type);

    for (size_t i = 0; i < all.size(); ++i) {
        ggml_tensor * a = all[i].a;
        const CounterRandom random(config.seed, i);
        const float bound = 1.0f / std::sqrt(static_cast<float>(a->ne[0]));
        std::vector<float> values(static_cast<size_t>(ggml_nelements(a)));
        for (size_t j = 0; j < values.size(); ++j) {
            values[j] = (2.0f * random.uniform(j) - 1.0f) * bound;
        }
        ggml_backend_tensor_set(a, values.data(), 0, ggml_nbytes(a));
    }
}

const LoraPair * AdapterSet::find(const ggml_tensor * weight) const {
    const auto it = index_of.find(weight);
    return it == index_of.end() ? nullptr : &all[it->second];
}

template <typename F> void AdapterSet::for_each(AdapterPart part, F && visit) const {
    for (const LoraPair & pair : all) {
        switch (part) {
            case PART_WEIGHTS:        visit(pair.a);      visit(pair.b);      break;
            case PART_GRADIENTS:      visit(pair.grad_a); visit(pair.grad_b); break;
            case PART_FIRST_MOMENTS:  visit(pair.m_a);    visit(pair.m_b);    break;
            case PART_SECOND_MOMENTS: visit(pair.v_a);    visit(pair.v_b);    break;
        }
    }
}

namespace {

constexpr const char * invocation_key = "adapter.alora.invocation_tokens";

void require_size(size_t n, size_t expected) {
    if (n != expected) {
        throw std::invalid_argument("expected " + std::to_string(expected) + " values, one for each parameter, not " +
                                    std::to_string(n));
    }
}

}  // namespace

void AdapterSet::get(AdapterPart part, float * out, size_t n) const {
    require_size(n, n_values);
    for_each(part, [&](ggml_tensor * t) {
        ggml_backend_tensor_get(t, out, 0, ggml_nbytes(t));
        out += ggml_nelements(t);
    });
}

void AdapterSet::set(AdapterPart part, const float * values, size_t n) {
    require_size(n, n_values);
    for_each(part, [&](ggml_tensor * t) {
        ggml_backend_tensor_set(t, values, 0, ggml_nbytes(t));
        values += ggml_nelements(t);
    });
}

double AdapterSet::gradient_norm() const {
    double sum = 0.0;
    std::vector<float> values;
    for_each(PART_GRADIENTS, [&](ggml_tensor * t) {
        values.resize(static_cast<size_t>(ggml_nelements(t)));
        ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
        for (const float value : values) {
            sum += static_cast<double>(value) * value;
        }
    });
    return std::sqrt(sum);
}

void AdapterSet::scale_gradients(float factor) {
    std::vector<float> values;
    for_each(PART_GRADIENTS, [&](ggml_tensor * t) {
        values.resize(static_cast<size_t>(ggml_nelements(t)));
        ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
        for (float & value : values) {
            value *= factor;
        }
        ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    });
}

void AdapterSet::clear_gradients() {
    for_each(PART_GRADIENTS, [](ggml_tensor * t) { ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t)); });
}

void AdapterSet::save(const std::string & path, const std::string & architecture,
                      const std::vector<std::pair<std::string, std::string>> & metadata) const {
    const gguf_context_ptr gguf(gguf_init_empty());
    for (const auto & [key, value] : metadata) {
        gguf_set_val_str(gguf.get(), key.c_str(), value.c_str());
    }
    gguf_set_val_str(gguf.get(), "general.type", "adapter");
    gguf_set_val_str(gguf.get(), "general.architecture", architecture.c_str());
    gguf_set_val_str(gguf.get(), "adapter.type", "lora");
    gguf_set_val_f32(gguf.get(), "adapter.lora.alpha", settings.gguf_alpha());
    if (!settings.invocation.empty()) {
        const std::vector<uint32_t> tokens(settings.invocation.begin(), settings.invocation.end());
        gguf_set_arr_data(gguf.get(), invocation_key, GGUF_TYPE_UINT32, tokens.data(), tokens.size());
    }

    // Their values may be in a GPU's memory: they follow one by one.
    for_each(PART_WEIGHTS, [&](ggml_tensor * t) { gguf_add_tensor(gguf.get(), t); });
    GgufFile file(path, gguf.get());
    std::vector<float> values;
    for_each(PART_WEIGHTS, [&](ggml_tensor * t) {
        values.resize(static_cast<size_t>(ggml_nelements(t)));
        ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
        file.add(values.data(), ggml_nbytes(t));
    });
    file.finish();
}

void AdapterSet::load(const std::string & path, const std::string & architecture) {
    const GgufMeta meta(path);
    const auto expect = [&](const char * key, const std::string & value) {
        const std::string found = meta.text(key).value_or("");
        if (found != value) {
            throw format_error(path + ": " + key + " is '" + found + "', expected '" + value + "'");
        }
    };
    expect("general.type", "adapter");
    expect("adapter.type", "lora");
    expect("general.architecture", architecture);
    const float alpha = static_cast<float>(meta.number("adapter.lora.alpha").value_or(0.0));
    const float want  = settings.gguf_alpha();
    if (!(std::fabs(alpha - want) <= 1e-5f * std::fabs(want))) {
        throw format_error(path + ": adapter.lora.alpha is " + std::to_string(alpha) + ", this run has " +
                           std::to_string(want));
    }
    const std::vector<double> invocation = meta.numbers(invocation_key).value_or(std::vector<double>());
    if (!std::equal(invocation.begin(), invocation.end(), settings.invocation.begin(), settings.invocation.end())) {
        throw format_error(path + ": " + invocation_key + " is not what invokes the adapter of this run");
    }

    ggml_context * raw = nullptr;
    gguf_init_params params{};
    params.no_alloc = false;
    params.ctx      = &raw;
    AbortScope scope;
    scope.enter();
    const gguf_context_ptr gguf(gguf_init_from_file(path.c_str(), params));
    const ggml_context_ptr data(raw);
    if (!gguf || !data) {
        throw format_error(path + ": damaged or truncated");
    }
    size_t found = 0;
    std::vector<float> weights(n_values);
    float * out = weights.data();
    for_each(PART_WEIGHTS, [&](ggml_tensor * t) {
        const ggml_tensor * source = ggml_get_tensor(data.get(), t->name);
        if (!source) {
            throw format_error(path + ": tensor " + t->name + " is missing");
        }
        if (!ggml_are_same_shape(source, t)) {
            throw format_error(path + ": " + t->name + " has shape [" + std::to_string(source->ne[0]) + ", " +
                               std::to_string(source->ne[1]) + "], expected [" + std::to_string(t->ne[0]) + ", " +
                               std::to_string(t->ne[1]) + "]");
        }
        const int64_t n = ggml_nelements(t);
        if (source->type == GGML_TYPE_F32) {
            std::memcpy(out, source->data, static_cast<size_t>(n) * sizeof(float));
        } else if (ggml_get_type_traits(source->type)->to_float) {
            ggml_get_type_traits(source->type)->to_float(source->data, out, n);
        } else {
            throw format_error(path + ": " + t->name + " has type " + ggml_type_name(source->type));
        }
        out += n;
        ++found;
    });
    if (static_cast<size_t>(gguf_get_n_tensors(gguf.get())) != found) {
        throw format_error(path + ": holds " + std::to_string(gguf_get_n_tensors(gguf.get())) + " tensors, expected " +
                           std::to_string(found));
    }
    for (const float value : weights) {
        if (!std::isfinite(value)) {
            throw format_error(path + ": holds values that are not finite");
        }
    }
    set(PART_WEIGHTS, weights.data(), weights.size());
}

}  // namespace triollama::native
