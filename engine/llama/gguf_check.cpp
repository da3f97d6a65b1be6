#include "llama/gguf_check.hpp"

#include "ggml.h"
#include "gguf.h"
#include "guards/errors.hpp"
#include "llama-arch.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

namespace triollama::native {

namespace {

constexpr uint64_t max_string = uint64_t(1) << 30;
constexpr uint64_t max_items  = uint64_t(1) << 31;
constexpr double   max_window = 1 << 28;

// Buffered forward reading that can skip. Every failure says where it happened.
class GgufReader {
public:
    explicit GgufReader(const std::string & path)
        : path(path), file(std::fopen(path.c_str(), "rb"), &std::fclose), buffer(1 << 18) {
        if (!file) {
            throw file_error(path);
        }
        std::setvbuf(file.get(), nullptr, _IONBF, 0);
        if (std::fseek(file.get(), 0, SEEK_END) != 0) {
            throw file_error(path);
        }
        const int64_t end = ftello(file.get());
        if (end < 0) {
            throw file_error(path);
        }
        n_bytes = uint64_t(end);
        seek(0);
    }

    uint64_t size() const { return n_bytes; }
    uint64_t tell() const { return base + at; }

    void need(uint64_t n) const {
        if (n > n_bytes - tell()) {
            fail("the file ends too early");
        }
    }

    template <typename T> T get() {
        need(sizeof(T));
        T value;
        if (filled - at >= sizeof(T)) {
            std::memcpy(&value, buffer.data() + at, sizeof(T));
            at += sizeof(T);
        } else {
            read(reinterpret_cast<char *>(&value), sizeof(T));
        }
        return value;
    }

    std::string get_string(uint64_t limit) {
        const uint64_t n = get<uint64_t>();
        if (n > limit) {
            fail("a string of " + std::to_string(n) + " bytes");
        }
        need(n);
        std::string text(n, '\0');
        read(text.data(), n);
        return text;
    }

    void skip(uint64_t n) {
        need(n);
        if (n <= filled - at) {
            at += n;
        } else {
            seek(tell() + n);
        }
    }

    [[noreturn]] void fail(const std::string & what) const {
        throw format_error(what + " (at byte " + std::to_string(tell()) + " of " + std::to_string(n_bytes) + ")");
    }

private:
    void seek(uint64_t position) {
        const int failed = fseeko(file.get(), off_t(position), SEEK_SET);
        if (failed) {
            throw file_error(path);
        }
        base = position;
        at = filled = 0;
    }

    void read(char * out, uint64_t n) {
        while (n > 0) {
            if (at == filled) {
                base += filled;
                at = 0;
                filled = std::fread(buffer.data(), 1, buffer.size(), file.get());
                if (filled == 0) {
                    if (std::ferror(file.get())) {
                        throw file_error(path);
                    }
                    fail("the file ends too early");
                }
            }
            const size_t part = size_t(std::min<uint64_t>(n, filled - at));
            std::memcpy(out, buffer.data() + at, part);
            at += part;
            out += part;
            n -= part;
        }
    }

    std::string path;
    std::unique_ptr<FILE, int (*)(FILE *)> file;
    std::vector<char> buffer;
    uint64_t n_bytes = 0;
    uint64_t base = 0;      // of the buffer, in the file
    size_t at = 0;          // in the buffer
    size_t filled = 0;
};

enum class Kind { number, real, boolean, text, array };

constexpr const char * kind_names[] = {"an integer", "a float", "a bool", "text", "an array"};

struct Metadata {
    std::map<std::string, double> numbers;      // scalars, and the first of short integer arrays
    std::map<std::string, Kind> kinds;
    std::string architecture;
    uint32_t alignment = GGUF_DEFAULT_ALIGNMENT;

    // The value of "<architecture>.<name>"; false if the file does not say.
    bool find(const char * name, double & value) const {
        const auto it = numbers.find(architecture + "." + name);
        if (it == numbers.end()) {
            return false;
        }
        value = it->second;
        return true;
    }
};

Kind kind_of(uint32_t type) {
    switch (type) {
        case GGUF_TYPE_ARRAY:                           return Kind::array;
        case GGUF_TYPE_STRING:                          return Kind::text;
        case GGUF_TYPE_BOOL:                            return Kind::boolean;
        case GGUF_TYPE_FLOAT32: case GGUF_TYPE_FLOAT64: return Kind::real;
        default:                                        return Kind::number;
    }
}

size_t scalar_size(uint32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8: case GGUF_TYPE_INT8: case GGUF_TYPE_BOOL:                              return 1;
        case GGUF_TYPE_UINT16: case GGUF_TYPE_INT16:                                                 return 2;
        case GGUF_TYPE_UINT32: case GGUF_TYPE_INT32: case GGUF_TYPE_FLOAT32:                         return 4;
        case GGUF_TYPE_UINT64: case GGUF_TYPE_INT64: case GGUF_TYPE_FLOAT64:                         return 8;
        default:                                                                                     return 0;
    }
}

double get_number(GgufReader & in, uint32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8: case GGUF_TYPE_BOOL: return in.get<uint8_t>();
        case GGUF_TYPE_INT8:                       return in.get<int8_t>();
        case GGUF_TYPE_UINT16:                     return in.get<uint16_t>();
        case GGUF_TYPE_INT16:                      return in.get<int16_t>();
        case GGUF_TYPE_UINT32:                     return in.get<uint32_t>();
        case GGUF_TYPE_INT32:                      return in.get<int32_t>();
        case GGUF_TYPE_FLOAT32:                    return in.get<float>();
        case GGUF_TYPE_UINT64:                     return double(in.get<uint64_t>());
        case GGUF_TYPE_INT64:                      return double(in.get<int64_t>());
        default:                                   return in.get<double>();
    }
}

void read_array(GgufReader & in, const std::string & key, Metadata & meta) {
    const uint32_t type = in.get<uint32_t>();
    const uint64_t n    = in.get<uint64_t>();
    if (n > max_items) {
        in.fail("the array " + key + " claims " + std::to_string(n) + " items");
    }
    if (type == GGUF_TYPE_STRING) {
        for (uint64_t i = 0; i < n; ++i) {
            const uint64_t length = in.get<uint64_t>();
            if (length > max_string) {
                in.fail("the array " + key + " has a string of " + std::to_string(length) + " bytes");
            }
            in.skip(length);
        }
        return;
    }
    const size_t size = scalar_size(type);
    if (size == 0) {
        in.fail("the array " + key + " has items of the unknown type " + std::to_string(type));
    }
    in.need(n * size);
    if (n == 0 || n > 4096 || type == GGUF_TYPE_FLOAT32 || type == GGUF_TYPE_FLOAT64) {
        in.skip(n * size);
        return;
    }
    meta.numbers[key] = get_number(in, type);   // of values per layer, llama.cpp takes the first layer's for the head size
    in.skip((n - 1) * size);
}

Metadata read_metadata(GgufReader & in, uint64_t n_keys) {
    Metadata meta;
    for (uint64_t i = 0; i < n_keys; ++i) {
        const std::string key = in.get_string(65535);
        const uint32_t type = in.get<uint32_t>();
        meta.kinds[key] = kind_of(type);
        if (type == GGUF_TYPE_ARRAY) {
            read_array(in, key, meta);
        } else if (type == GGUF_TYPE_STRING) {
            const std::string text = in.get_string(max_string);
            if (key == "general.architecture") {
                meta.architecture = text;
            }
        } else if (scalar_size(type) != 0) {
            const double value = get_number(in, type);
            meta.numbers[key] = value;
            if (key == "general.alignment") {
                const uint32_t alignment = uint32_t(value);
                if (type != GGUF_TYPE_UINT32 || alignment == 0 || (alignment & (alignment - 1)) != 0) {
                    in.fail("general.alignment is no power of two");
                }
                meta.alignment = alignment;
            }
        } else {
            in.fail("the key " + key + " has the unknown type " + std::to_string(type));
        }
    }
    return meta;
}

// Tensors that enter element-wise and state-space operations. Their CPU kernels know F32 alone.
bool must_be_f32(const std::string & name) {
    const auto ends_with = [&](const char * end) {
        const size_t n = std::strlen(end);
        return name.size() >= n && name.compare(name.size() - n, n, end) == 0;
    };
    return name.find("_norm") != std::string::npos || ends_with(".bias") || ends_with(".ssm_a") || ends_with(".ssm_d")
        || ends_with(".ssm_conv1d.weight");
}

// Whether matrices of this type have a kernel. ggml only stores I8 to F64, and it
// rounds activations to the other two.
bool can_multiply(ggml_type type) {
    return (type < GGML_TYPE_I8 || type > GGML_TYPE_F64) && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K;
}

// Tables of indices, which some architectures have beside their weights.
bool is_table(const std::string & name) {
    return name.find("tid2eid") != std::string::npos || name.find("d2t") != std::string::npos;
}

// What llama.cpp reads in place of the file's value. It ignores one of another type, with a warning in its log.
void override(Metadata & meta, const llama_model_kv_override & given) {
    const std::string key = given.key;
    const Kind kind = given.tag == LLAMA_KV_OVERRIDE_TYPE_INT     ? Kind::number
                      : given.tag == LLAMA_KV_OVERRIDE_TYPE_FLOAT ? Kind::real
                      : given.tag == LLAMA_KV_OVERRIDE_TYPE_BOOL  ? Kind::boolean
                                                                  : Kind::text;
    const auto known = meta.kinds.find(key);
    if (known != meta.kinds.end() && known->second != kind) {
        throw std::invalid_argument("kv_overrides: " + key + " is " + kind_names[int(known->second)] + " in the file, not "
            + kind_names[int(kind)]);
    }
    switch (kind) {
        case Kind::number:  meta.numbers[key] = double(given.val_i64); break;
        case Kind::real:    meta.numbers[key] = given.val_f64; break;
        case Kind::boolean: meta.numbers[key] = given.val_bool; break;
        default:
            if (key == "general.architecture") {
                meta.architecture = given.val_str;
            }
    }
}

void read_tensors(GgufReader & in, uint64_t n_tensors, const Metadata & meta, bool model) {
    uint64_t expected = 0;      // offset of the next tensor
    uint64_t end = 0;
    std::string name;
    for (uint64_t i = 0; i < n_tensors; ++i) {
        name = in.get_string(GGML_MAX_NAME - 1);
        const uint32_t n_dims = in.get<uint32_t>();
        if (n_dims > GGML_MAX_DIMS) {
            in.fail("the tensor " + name + " has " + std::to_string(n_dims) + " dimensions");
        }
        uint64_t row = 1;
        uint64_t rows = 1;
        for (uint32_t d = 0; d < n_dims; ++d) {
            const int64_t n = in.get<int64_t>();
            uint64_t & product = d == 0 ? row : rows;
            if (n < 1 || uint64_t(n) > (uint64_t(1) << 48) / product) {
                in.fail("the tensor " + name + " has impossible dimensions");
            }
            product *= uint64_t(n);
        }
        const uint32_t type = in.get<uint32_t>();
        if (type >= GGML_TYPE_COUNT || ggml_blck_size(ggml_type(type)) == 0) {
            in.fail("the tensor " + name + " has the unknown type " + std::to_string(type));
        }
        const uint64_t block = uint64_t(ggml_blck_size(ggml_type(type)));
        const uint64_t row_size = row / block * ggml_type_size(ggml_type(type));
        if (row % block != 0 || (row_size != 0 && rows > (uint64_t(1) << 62) / row_size)) {
            in.fail("the tensor " + name + " has impossible dimensions for its type "
                + ggml_type_name(ggml_type(type)));
        }
        if (!can_multiply(ggml_type(type)) && !is_table(name)) {
            in.fail("the tensor " + name + " is " + ggml_type_name(ggml_type(type)) + ", which no weight can be");
        }
        if (model && type != GGML_TYPE_F32 && must_be_f32(name)) {
            in.fail("the tensor " + name + " is " + ggml_type_name(ggml_type(type)) + "; llama.cpp computes with it as f32");
        }
        if (in.get<uint64_t>() != expected) {
            in.fail("the tensor " + name + " is not where the one before it ends");
        }
        const uint64_t size = (row_size * rows + meta.alignment - 1) / meta.alignment * meta.alignment;
        if (size > (uint64_t(1) << 62) - expected) {
            in.fail("the tensors are larger than any file");
        }
        end = expected + row_size * rows;       // the last tensor's padding may be missing
        expected += size;
    }
    const uint64_t begin = (in.tell() + meta.alignment - 1) / meta.alignment * meta.alignment;
    if (n_tensors > 0 && begin + end > in.size()) {
        in.fail("the file is cut short: its tensors end at byte " + std::to_string(begin + end));
    }
}

[[noreturn]] void refuse(const Metadata & meta, const char * name, double value, const std::string & why) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.15g", value);
    throw format_error(meta.architecture + "." + name + " is " + text + why);
}

// Models without attention. Every other one divides by its number of heads.
bool needs_no_heads(const std::string & architecture) {
    const llm_arch arch = llm_arch_from_string(architecture);
    return arch == LLM_ARCH_UNKNOWN || arch == LLM_ARCH_WAVTOKENIZER_DEC || llm_arch_is_recurrent(arch)
        || llm_arch_is_hybrid(arch);
}

void check_values(const Metadata & meta) {
    double value = 0;
    for (const char * name : {"attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
                              "attention.group_norm_epsilon"}) {
        if (meta.find(name, value) && !(value >= 0 && value <= 1)) {
            refuse(meta, name, value, "; it must be from 0 to 1");
        }
    }
    for (const char * name : {"attention.sliding_window", "context_length"}) {
        if (meta.find(name, value) && !(value >= 0 && value <= (name[0] == 'a' ? max_window : 4294967295.0))) {
            refuse(meta, name, value, "; no model has that");
        }
    }
    if (meta.find("interleave_moe_layer_step", value) && value < 1) {
        refuse(meta, "interleave_moe_layer_step", value, "; it must be at least 1");
    }
    double n_head = 0;
    double n_embd = 0;
    if ((!meta.find("attention.head_count", n_head) || n_head < 1) && !needs_no_heads(meta.architecture)) {
        throw format_error(meta.architecture + ".attention.head_count is 0 or missing");
    }
    if (n_head < 1 || !meta.find("embedding_length", n_embd)) {
        return;
    }
    for (const auto & [rotary, key] : {std::pair("rope.dimension_count", "attention.key_length"),
                                       std::pair("rope.dimension_count_swa", "attention.key_length_swa")}) {
        double width = std::floor(n_embd / n_head);
        if (!meta.find(key, width)) {
            meta.find("attention.key_length", width);
        }
        if (meta.find(rotary, value) && (value < 1 || value > width || std::fmod(value, 2) != 0)) {
            refuse(meta, rotary, value, "; it must be even and at most the width of a head, "
                + std::to_string(int64_t(width)));
        }
    }
}

Metadata read_gguf(const std::string & path, bool model, const llama_model_kv_override * overrides) {
    GgufReader in(path);
    if (in.size() == 0) {
        throw format_error("the file is empty");
    }
    if (in.size() < 4 || in.get<uint32_t>() != 0x46554747) {    // "GGUF"
        throw format_error("it does not begin with GGUF");
    }
    const uint32_t version = in.get<uint32_t>();
    if (version != 2 && version != 3) {
        throw format_error((version & 0xFFFF) == 0 ? "it is in the other byte order"
                                                   : "its version is " + std::to_string(version) + "; 2 and 3 are known");
    }
    const uint64_t n_tensors = in.get<uint64_t>();
    const uint64_t n_keys    = in.get<uint64_t>();
    // A key takes at least 13 bytes, a tensor 24.
    if (n_keys > in.size() / 13 || n_tensors > in.size() / 24) {
        in.fail("it claims " + std::to_string(n_tensors) + " tensors and " + std::to_string(n_keys) + " keys");
    }
    Metadata meta = read_metadata(in, n_keys);
    for (const llama_model_kv_override * o = overrides; o && o->key[0] != 0; ++o) {
        override(meta, *o);
    }
    read_tensors(in, n_tensors, meta, model);
    return meta;
}

// The files of a split model in order, as llama.cpp names them; the file itself of any other.
std::vector<std::string> parts_of(const std::string & path, const Metadata & meta) {
    const auto count = meta.numbers.find("split.count");
    if (count == meta.numbers.end() || !(count->second > 1)) {
        return {path};
    }
    const auto number = meta.numbers.find("split.no");
    const int n = int(std::min(count->second, 65535.0));
    std::vector<char> prefix(path.size() + 1), part(path.size() + 64);
    if (number == meta.numbers.end() || number->second != 0
        || llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, n) == 0) {
        throw format_error("it is one of " + std::to_string(n) + " parts of a model: load the first, under its own name"
            " (...-00001-of-" + "N.gguf)");
    }
    std::vector<std::string> parts;
    for (int i = 0; i < n; ++i) {
        llama_split_path(part.data(), part.size(), prefix.data(), i, n);
        parts.emplace_back(part.data());
    }
    return parts;
}

}  // namespace

void check_gguf(const std::string & path) { read_gguf(path, false, nullptr); }

std::vector<std::string> check_model(const std::string & path, bool weights, const llama_model_kv_override * overrides) {
    const Metadata meta = read_gguf(path, weights, overrides);
    if (weights) {
        check_values(meta);
    }
    const std::vector<std::string> parts = parts_of(path, meta);
    for (size_t i = 1; i < parts.size(); ++i) {
        try {
            read_gguf(parts[i], weights, nullptr);
        } catch (const format_error & e) {
            throw format_error(parts[i] + ": " + e.what());
        }
    }
    return parts;
}

}  // namespace triollama::native
