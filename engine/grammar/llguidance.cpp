#include "grammar/llguidance.hpp"

#include "guards/errors.hpp"
#include "text/token_texts.hpp"
#include "threads/per_process.hpp"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <vector>

namespace triollama::native::llguidance {

namespace {

struct Loading {
    std::mutex mutex;
};

Api                loaded;
std::atomic<bool>  ready { false };

template <typename Function>
void find(void * library, const std::string & path, const char * name, Function & function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) {
        throw unsupported_error(path + " has no function " + name);
    }
}

Api functions_of(void * library, const std::string & path) {
    Api api {};
    find(library, path, "llg_get_version", api.get_version);
    find(library, path, "llg_constraint_init_set_defaults", api.constraint_init_set_defaults);
    find(library, path, "llg_new_tokenizer_v2", api.new_tokenizer_v2);
    find(library, path, "llg_free_tokenizer", api.free_tokenizer);
    find(library, path, "llg_new_matcher", api.new_matcher);
    find(library, path, "llg_clone_matcher", api.clone_matcher);
    find(library, path, "llg_free_matcher", api.free_matcher);
    find(library, path, "llg_matcher_get_error", api.matcher_get_error);
    find(library, path, "llg_matcher_compute_mask_into", api.matcher_compute_mask_into);
    find(library, path, "llg_matcher_get_mask_byte_size", api.matcher_get_mask_byte_size);
    find(library, path, "llg_matcher_consume_token", api.matcher_consume_token);
    find(library, path, "llg_matcher_validate_tokens", api.matcher_validate_tokens);
    find(library, path, "llg_matcher_is_accepting", api.matcher_is_accepting);
    find(library, path, "llg_matcher_is_stopped", api.matcher_is_stopped);
    return api;
}

struct Vocabulary {
    std::vector<uint32_t> lengths;
    std::string           bytes;
    std::vector<uint32_t> ends;

    void add(const std::string & text) {
        lengths.push_back((uint32_t) text.size());
        bytes += text;
    }
};

Tokenizer * new_tokenizer(const Api & api, const Vocabulary & vocabulary) {
    TokenizerInit init {};
    init.struct_size  = sizeof(init);
    init.vocab_size   = (uint32_t) vocabulary.lengths.size();
    init.tok_eos      = vocabulary.ends.empty() ? 0xFFFFFFFFu : vocabulary.ends[0];
    init.token_lens   = vocabulary.lengths.data();
    init.token_bytes  = (const uint8_t *) vocabulary.bytes.data();
    init.use_approximate_greedy_tokenize_fn = true;
    if (vocabulary.ends.size() > 1) {
        init.tok_eos_extra       = vocabulary.ends.data() + 1;
        init.tok_eos_extra_count = (uint32_t) vocabulary.ends.size() - 1;
    }
    std::array<char, 400> why {};
    Tokenizer * tokenizer = api.new_tokenizer_v2(&init, why.data(), why.size());
    if (!tokenizer) {
        throw unsupported_error(std::string("llguidance cannot use this vocabulary: ") + why.data());
    }
    return tokenizer;
}

Matcher * matcher_of(const Api & api, const Tokenizer * tokenizer, const char * syntax, const char * text) {
    ConstraintInit init {};
    api.constraint_init_set_defaults(&init, tokenizer);
    init.tokenizer             = tokenizer;
    init.log_buffer_level      = 0;
    init.log_stderr_level      = 0;
    init.limits.verbose_errors = false;
    // Two patterns of fifty words use up the default; with ten times as much no step of any that was tried took 0.2 s.
    init.limits.initial_lexer_fuel *= 10;
    init.limits.step_lexer_fuel *= 10;
    return api.new_matcher(&init, syntax, text);
}

// "ab" or "c" over four tokens: what may come first, what after "a", and that nothing may after "ab".
void test(const Api & api, const std::string & path) {
    auto expect = [&](bool good, const char * what) {
        if (!good) {
            throw unsupported_error(path + " does not work as expected (" + what + ")");
        }
    };
    Vocabulary vocabulary;
    for (const char * text : { "a", "b", "c", "\xFF<end>" }) {
        vocabulary.add(text);
    }
    vocabulary.ends = { 3 };
    const std::unique_ptr<Tokenizer, void (*)(Tokenizer *)> tokenizer(new_tokenizer(api, vocabulary), api.free_tokenizer);
    const std::unique_ptr<Matcher, void (*)(Matcher *)> matcher(matcher_of(api, tokenizer.get(), "regex", "ab|c"),
                                                                api.free_matcher);
    Matcher * m = matcher.get();
    expect(m && !api.matcher_get_error(m), "a grammar");
    expect(api.matcher_get_mask_byte_size(m) == 4, "the size of a mask");
    uint32_t mask = 0;
    const uint32_t a = 0;
    const uint32_t b = 1;
    expect(api.matcher_compute_mask_into(m, &mask, sizeof(mask)) == 0 && mask == 0b101, "the first mask");
    expect(api.matcher_validate_tokens(m, &a, 1) == 1 && api.matcher_validate_tokens(m, &b, 1) == 0, "a candidate");
    expect(api.matcher_consume_token(m, a) == 0, "a token");
    expect(api.matcher_compute_mask_into(m, &mask, sizeof(mask)) == 0 && mask == 0b010, "the second mask");
    const std::unique_ptr<Matcher, void (*)(Matcher *)> copy(api.clone_matcher(m), api.free_matcher);
    expect(!api.matcher_is_accepting(m) && api.matcher_consume_token(m, b) == 0 && api.matcher_is_accepting(m), "the end");
    expect(copy && api.matcher_validate_tokens(copy.get(), &b, 1) == 1, "a copy");
}

struct Kept {
    std::mutex                      making;
    std::shared_ptr<const Prepared> prepared;
};

struct Keeping {
    std::mutex                                           mutex;
    std::map<const llama_vocab *, std::shared_ptr<Kept>> all;
};

}  // namespace

void load(const std::string & path, const std::string & version) {
    const std::lock_guard<std::mutex> lock(per_process<Loading>().mutex);
    if (ready) {
        return;
    }
    void * library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);       // never closed: Rust's threads may be in it
    if (!library) {
        const char * why = dlerror();
        throw unsupported_error(path + " cannot be loaded: " + (why ? why : "no reason given"));
    }
    const Api api = functions_of(library, path);
    const char * found = api.get_version();
    const std::string wanted = "llguidance@" + version + " ";        // and the versions of its parts
    if (!found || (std::string(found) + " ").compare(0, wanted.size(), wanted) != 0) {
        throw unsupported_error(path + " is of version " + (found ? found : "?") + ", and " + version + " is needed");
    }
    test(api, path);
    loaded = api;
    ready  = true;
}

bool is_loaded() {
    return ready;
}

const Api & api() {
    if (!ready) {
        throw unsupported_error("llguidance was not loaded");
    }
    return loaded;
}

OwnedMatcher new_matcher(const Tokenizer * tokenizer, const char * syntax, const std::string & text) {
    OwnedMatcher matcher(matcher_of(api(), tokenizer, syntax, text.c_str()));
    if (!matcher) {
        throw grammar_error("llguidance gave no reason why it refuses the grammar");
    }
    if (const char * why = api().matcher_get_error(matcher.get())) {
        throw grammar_error(why);
    }
    return matcher;
}

std::shared_ptr<const Prepared> prepared(const llama_vocab * vocab) {
    std::shared_ptr<Kept> entry;
    {
        Keeping & kept = per_process<Keeping>();
        const std::lock_guard<std::mutex> lock(kept.mutex);
        std::shared_ptr<Kept> & found = kept.all[vocab];
        if (!found) {
            found = std::make_shared<Kept>();
        }
        entry = found;
    }
    const std::lock_guard<std::mutex> lock(entry->making);
    if (!entry->prepared) {
        auto made = std::make_shared<Prepared>();
        Vocabulary vocabulary;
        const int32_t n = llama_vocab_n_tokens(vocab);
        made->sizes.resize((size_t) n);
        made->firsts.resize((size_t) n);
        made->bytes.fill(LLAMA_TOKEN_NULL);
        std::string text;
        for (llama_token token = 0; token < n; ++token) {
            text.clear();
            if (llama_vocab_is_eog(vocab, token)) {
                vocabulary.ends.push_back((uint32_t) token);
                made->ends.push_back(token);
            } else {
                append_piece(vocab, token, false, text);
            }
            if (text.empty()) {         // a special token: a grammar may name it
                append_piece(vocab, token, true, text);
                text.insert(0, text.empty() ? 0 : 1, '\xFF');
            } else {
                made->sizes[(size_t) token]  = (uint32_t) text.size();
                made->firsts[(size_t) token] = (unsigned char) text[0];
                if (text.size() == 1) {
                    made->bytes[(unsigned char) text[0]] = token;
                }
            }
            vocabulary.add(text);
        }
        made->tokenizer.reset(new_tokenizer(api(), vocabulary));
        entry->prepared = std::move(made);
    }
    return entry->prepared;
}

void forget(const llama_vocab * vocab) noexcept {
    Keeping & kept = per_process<Keeping>();
    const std::lock_guard<std::mutex> lock(kept.mutex);
    kept.all.erase(vocab);
}

}  // namespace triollama::native::llguidance
