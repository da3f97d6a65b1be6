// What decides the next token, as bytes and back.
#include "sampling/impl.hpp"

#include <cmath>
#include <cstring>

namespace triollama::native {

namespace {

// Little-endian writer and reader of state bytes.
class ByteWriter {
public:
    std::string bytes;

    void u32(uint32_t value) { put(value, 4); }
    void u64(uint64_t value) { put(value, 8); }
    void f32(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        u32(bits);
    }
    void tokens(const std::vector<llama_token> & values) {
        u32((uint32_t) values.size());
        for (const llama_token value : values) {
            u32((uint32_t) value);
        }
    }

private:
    void put(uint64_t value, int size) {
        for (int i = 0; i < size; ++i) {
            bytes.push_back((char) (value >> (8 * i)));
        }
    }
};

class ByteReader {
public:
    explicit ByteReader(std::string_view bytes) : bytes(bytes) {}

    uint32_t u32() { return (uint32_t) get(4); }
    uint64_t u64() { return get(8); }
    float f32() {
        const uint32_t bits = u32();
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        if (!std::isfinite(value)) {
            throw state_error("the sampler state holds a number that is not finite");
        }
        return value;
    }
    std::vector<llama_token> tokens(int32_t n_vocab) {
        const uint32_t count = u32();
        if ((bytes.size() - pos) / 4 < count) {
            throw state_error("the sampler state is cut short");
        }
        std::vector<llama_token> values(count);
        for (llama_token & value : values) {
            value = (llama_token) u32();
            if (value < 0 || value >= n_vocab) {
                throw state_error("the sampler state holds a token outside the vocabulary");
            }
        }
        return values;
    }
    size_t left() const { return bytes.size() - pos; }

private:
    std::string_view bytes;
    size_t pos = 0;

    uint64_t get(size_t size) {
        if (bytes.size() - pos < size) {
            throw state_error("the sampler state is cut short");
        }
        uint64_t value = 0;
        for (size_t i = 0; i < size; ++i) {
            value |= (uint64_t) (unsigned char) bytes[pos + i] << (8 * i);
        }
        pos += size;
        return value;
    }
};

constexpr uint32_t state_magic    = 0x53534c54;            // "TLSS"
constexpr uint32_t state_version  = 1;
constexpr uint64_t most_draws     = 1ull << 32;            // replaying them takes seconds at most

uint64_t checksum(std::string_view bytes) {
    uint64_t value = 0xcbf29ce484222325ull;                // FNV-1a
    for (const char byte : bytes) {
        value = (value ^ (unsigned char) byte) * 0x100000001b3ull;
    }
    return value;
}

CountedEngine read_engine(ByteReader & reader) {
    const uint32_t seed  = reader.u32();
    const uint64_t draws = reader.u64();
    if (draws > most_draws) {
        throw state_error("the sampler state holds an impossible number of random draws");
    }
    return CountedEngine(seed, draws);
}

}  // namespace

std::string Sampler::Impl::save() const {
    ByteWriter writer;
    writer.u32(state_magic);
    writer.u32(state_version);
    writer.u32((uint32_t) n_vocab);
    writer.u32(state.rng.seed());
    writer.u64(state.rng.draws());
    writer.u32(state.xtc_rng.seed());
    writer.u64(state.xtc_rng.draws());
    writer.f32(state.mu);
    writer.f32(state.weighted_sum);
    writer.f32(state.total_weight);
    writer.u32((uint32_t) state.pending);
    writer.f32(state.pending_prob);
    writer.tokens(state.history.kept());
    writer.u64(grammar ? grammar->params().hash() : 0);
    writer.tokens(grammar ? grammar->accepted() : std::vector<llama_token>());
    writer.u64(checksum(writer.bytes));
    return std::move(writer.bytes);
}

void Sampler::Impl::load(std::string_view bytes) {
    if (bytes.size() < 12 || ByteReader(bytes).u32() != state_magic) {
        throw state_error("these bytes are no sampler state");
    }
    if (ByteReader(bytes.substr(bytes.size() - 8)).u64() != checksum(bytes.substr(0, bytes.size() - 8))) {
        throw state_error("the sampler state is damaged: its checksum does not match");
    }
    ByteReader reader(bytes.substr(0, bytes.size() - 8));
    reader.u32();
    const uint32_t version = reader.u32();
    if (version != state_version) {
        throw state_error("the sampler state has version " + std::to_string(version) +
                          "; this library reads version " + std::to_string(state_version));
    }
    const uint32_t saved_vocab = reader.u32();
    if (saved_vocab != (uint32_t) n_vocab) {
        throw state_error("the sampler state is for a vocabulary of " + std::to_string(saved_vocab) +
                          " tokens; this one has " + std::to_string(n_vocab));
    }
    State loaded(state);
    loaded.rng          = read_engine(reader);
    loaded.xtc_rng      = read_engine(reader);
    loaded.mu           = reader.f32();
    loaded.weighted_sum = reader.f32();
    loaded.total_weight = reader.f32();
    loaded.pending      = (llama_token) reader.u32();
    loaded.pending_prob = reader.f32();
    loaded.history.assign(reader.tokens(n_vocab));
    const uint64_t grammar_hash = reader.u64();
    const std::vector<llama_token> taken = reader.tokens(n_vocab);
    if (reader.left() != 0) {
        throw state_error("the sampler state is longer than it should be");
    }
    if (grammar_hash != (grammar ? grammar->params().hash() : 0)) {
        throw state_error("the sampler state belongs to another grammar");
    }
    std::unique_ptr<Grammar> replayed;
    if (grammar) {
        replayed = make_grammar(vocab, grammar->params());
        try {
            for (const llama_token token : taken) {
                replayed->accept(token);
            }
        } catch (const grammar_error & e) {
            throw state_error(std::string("the sampler state does not fit its grammar: ") + e.what());
        }
    }
    state   = std::move(loaded);
    grammar = std::move(replayed);
    chosen  = Chosen::nothing;
}

}  // namespace triollama::native
