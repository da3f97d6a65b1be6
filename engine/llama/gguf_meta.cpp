#include "llama/gguf_meta.hpp"

#include "guards/errors.hpp"
#include "llama/gguf_check.hpp"

namespace triollama::native {

namespace {

// One element of a scalar or array value; empty if the type holds no number.
std::optional<double> element(gguf_type type, const void * data, size_t i) {
    switch (type) {
        case GGUF_TYPE_UINT8:   return static_cast<const uint8_t *>(data)[i];
        case GGUF_TYPE_INT8:    return static_cast<const int8_t *>(data)[i];
        case GGUF_TYPE_UINT16:  return static_cast<const uint16_t *>(data)[i];
        case GGUF_TYPE_INT16:   return static_cast<const int16_t *>(data)[i];
        case GGUF_TYPE_UINT32:  return static_cast<const uint32_t *>(data)[i];
        case GGUF_TYPE_INT32:   return static_cast<const int32_t *>(data)[i];
        case GGUF_TYPE_UINT64:  return static_cast<double>(static_cast<const uint64_t *>(data)[i]);
        case GGUF_TYPE_INT64:   return static_cast<double>(static_cast<const int64_t *>(data)[i]);
        case GGUF_TYPE_FLOAT32: return static_cast<const float *>(data)[i];
        case GGUF_TYPE_FLOAT64: return static_cast<const double *>(data)[i];
        case GGUF_TYPE_BOOL:    return static_cast<const int8_t *>(data)[i] != 0;
        default:                return std::nullopt;
    }
}

}  // namespace

GgufMeta::GgufMeta(const std::string & path) {
    check_gguf(path);
    gguf_init_params params{};
    params.no_alloc = true;
    gguf.reset(gguf_init_from_file(path.c_str(), params));
    if (!gguf) {
        throw format_error(path + ": not a readable GGUF file");
    }
}

std::optional<std::string> GgufMeta::text(const std::string & key) const {
    const int64_t id = gguf_find_key(gguf.get(), key.c_str());
    if (id < 0 || gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_STRING) {
        return std::nullopt;
    }
    return std::string(gguf_get_val_str(gguf.get(), id));
}

std::optional<double> GgufMeta::number(const std::string & key) const {
    const int64_t id = gguf_find_key(gguf.get(), key.c_str());
    if (id < 0) {
        return std::nullopt;
    }
    const gguf_type type = gguf_get_kv_type(gguf.get(), id);
    if (type == GGUF_TYPE_STRING || type == GGUF_TYPE_ARRAY) {
        return std::nullopt;
    }
    return element(type, gguf_get_val_data(gguf.get(), id), 0);
}

std::optional<std::vector<double>> GgufMeta::numbers(const std::string & key) const {
    const int64_t id = gguf_find_key(gguf.get(), key.c_str());
    if (id < 0 || gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_ARRAY) {
        return std::nullopt;
    }
    const gguf_type type = gguf_get_arr_type(gguf.get(), id);
    if (type == GGUF_TYPE_STRING || type == GGUF_TYPE_ARRAY) {
        return std::nullopt;
    }
    std::vector<double> values;
    for (size_t i = 0; i < gguf_get_arr_n(gguf.get(), id); ++i) {
        values.push_back(*element(type, gguf_get_arr_data(gguf.get(), id), i));
    }
    return values;
}

std::vector<std::string> GgufMeta::keys() const {
    std::vector<std::string> names;
    for (int64_t i = 0; i < gguf_get_n_kv(gguf.get()); ++i) {
        names.emplace_back(gguf_get_key(gguf.get(), i));
    }
    return names;
}

std::vector<GgufTensor> GgufMeta::tensors() const {
    std::vector<GgufTensor> all;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); ++i) {
        const int64_t * ne = gguf_get_tensor_ne(gguf.get(), i);
        int n_dims = GGML_MAX_DIMS;
        while (n_dims > 1 && ne[n_dims - 1] == 1) {
            --n_dims;
        }
        all.push_back({ gguf_get_tensor_name(gguf.get(), i), ggml_type_name(gguf_get_tensor_type(gguf.get(), i)),
                        std::vector<int64_t>(ne, ne + n_dims), gguf_get_tensor_size(gguf.get(), i) });
    }
    return all;
}

}  // namespace triollama::native
