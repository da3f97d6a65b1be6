// llguidance's C API, from the library inside its wheel on the package index. Needs no GIL.
#pragma once

#include "llama.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace triollama::native::llguidance {

struct Tokenizer;
struct Matcher;

// Layouts as in llguidance.h of the version that load() insists on.
struct TokenizerInit {
    size_t           struct_size;
    uint32_t         vocab_size;
    uint32_t         tok_eos;
    const uint32_t * token_lens;
    const uint8_t *  token_bytes;
    const char *     tokenizer_json;
    bool             tokenize_assumes_string;
    size_t           (*tokenize_fn)(const void *, const uint8_t *, size_t, uint32_t *, size_t);
    bool             use_approximate_greedy_tokenize_fn;
    const void *     tokenize_user_data;
    const char * const * slices;
    const uint32_t * tok_eos_extra;
    uint32_t         tok_eos_extra_count;
};

struct ParserLimits {
    size_t   max_items_in_row;
    uint64_t initial_lexer_fuel;
    uint64_t step_lexer_fuel;
    size_t   step_max_items;
    size_t   max_lexer_states;
    size_t   max_grammar_size;
    bool     precompute_large_lexemes;
    bool     verbose_errors;
};

struct ConstraintInit {
    const Tokenizer * tokenizer;
    uint32_t     log_buffer_level;
    uint32_t     log_stderr_level;
    bool         ff_tokens_ok;
    bool         backtrack_ok;
    ParserLimits limits;
};

struct Api {
    const char * (*get_version)();
    void         (*constraint_init_set_defaults)(ConstraintInit *, const Tokenizer *);
    Tokenizer *  (*new_tokenizer_v2)(const TokenizerInit *, char *, size_t);
    void         (*free_tokenizer)(Tokenizer *);
    Matcher *    (*new_matcher)(const ConstraintInit *, const char *, const char *);
    Matcher *    (*clone_matcher)(const Matcher *);
    void         (*free_matcher)(Matcher *);
    const char * (*matcher_get_error)(Matcher *);
    int32_t      (*matcher_compute_mask_into)(Matcher *, uint32_t *, size_t);
    size_t       (*matcher_get_mask_byte_size)(const Matcher *);
    int32_t      (*matcher_consume_token)(Matcher *, uint32_t);
    int32_t      (*matcher_validate_tokens)(Matcher *, const uint32_t *, size_t);
    bool         (*matcher_is_accepting)(Matcher *);
    bool         (*matcher_is_stopped)(const Matcher *);
};

// Opens the library at `path`, looks for every function, and tries it on a grammar whose masks are known; once a process.
// Throws unsupported_error, saying what is wrong, also if it is not of `version`.
void load(const std::string & path, const std::string & version);
bool is_loaded();
const Api & api();              // throws unsupported_error before load()

struct Deleter {
    void operator()(Tokenizer * tokenizer) const { api().free_tokenizer(tokenizer); }
    void operator()(Matcher * matcher) const { api().free_matcher(matcher); }
};
using OwnedMatcher = std::unique_ptr<Matcher, Deleter>;

// A model's vocabulary, as matchers need it.
struct Prepared {
    std::unique_ptr<Tokenizer, Deleter> tokenizer;
    std::vector<llama_token> ends;              // all that end a generation
    std::vector<uint32_t> sizes;                // of each token's text; 0: it has none
    std::vector<unsigned char> firsts;          // its first byte
    std::array<llama_token, 256> bytes;         // the tokens of single bytes
};

// `syntax` is llguidance's name for it. Throws grammar_error.
OwnedMatcher new_matcher(const Tokenizer * tokenizer, const char * syntax, const std::string & text);

// The model's, made when first asked for (up to a second for a large vocabulary) and kept until its model is freed.
std::shared_ptr<const Prepared> prepared(const llama_vocab * vocab);
void forget(const llama_vocab * vocab) noexcept;

}  // namespace triollama::native::llguidance
