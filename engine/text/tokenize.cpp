#include "text/tokenize.hpp"

#include "guards/errors.hpp"
#include "text/token_texts.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

namespace triollama::native {

namespace {

// Measured: 324 bytes of stack for each character of a match, whatever the expression (GCC 12, x86-64).
constexpr size_t stack_touched  = 400;
constexpr size_t stack_reserved = 1024;

// Matches up to this length do with the stack that every call has: _STACK in guards/owner.pyx.
constexpr size_t short_match = 128;

enum : uint8_t { is_space = 1, is_letter = 2, is_digit = 4, is_other = 8 };

constexpr std::array<uint8_t, 256> make_classes() {
    std::array<uint8_t, 256> classes{};
    for (int c = 0; c < 256; ++c) {
        if (c >= 0x80) {
            classes[c] = is_letter | is_digit | is_other;
        } else if (c == ' ' || (c >= '\t' && c <= '\r')) {
            classes[c] = is_space;
        } else if (c >= '0' && c <= '9') {
            classes[c] = is_digit;
        } else if ((c | 32) >= 'a' && (c | 32) <= 'z') {
            classes[c] = is_letter;
        } else {
            classes[c] = is_other;
        }
    }
    // Bytes of U+0085, U+00A0, U+1680, U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F, U+3000: white space too.
    for (const int c : {0xC2, 0x85, 0xA0, 0xE1, 0x9A, 0xE2, 0xA8, 0xA9, 0xAF, 0x81, 0x9F, 0xE3}) {
        classes[c] |= is_space;
    }
    for (int c = 0x80; c <= 0x8A; ++c) {
        classes[c] |= is_space;
    }
    return classes;
}

constexpr std::array<uint8_t, 256> classes = make_classes();

// Pages that nobody has touched cost nothing.
class Stack {
public:
    explicit Stack(size_t n) : n_bytes(n) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
        flags |= MAP_NORESERVE;
#endif
        base = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (base == MAP_FAILED) {
            throw std::bad_alloc();
        }
    }
    ~Stack() { munmap(base, n_bytes); }
    Stack(const Stack &) = delete;
    Stack & operator=(const Stack &) = delete;

    void *       base;
    const size_t n_bytes;
};

template <typename Work> void with_stack(size_t n_bytes, Work && work) {
    struct Task {
        Work & work;
        std::exception_ptr error;
    } task{work, nullptr};
    const Stack stack(n_bytes);
    pthread_attr_t attributes;
    pthread_t      thread;
    pthread_attr_init(&attributes);
    const auto run = [](void * data) -> void * {
        auto & task = *static_cast<Task *>(data);
        try {
            task.work();
        } catch (...) {
            task.error = std::current_exception();
        }
        return nullptr;
    };
    const bool started = pthread_attr_setstack(&attributes, stack.base, stack.n_bytes) == 0
        && pthread_create(&thread, &attributes, run, &task) == 0;
    pthread_attr_destroy(&attributes);
    if (!started) {
        throw std::bad_alloc();
    }
    pthread_join(thread, nullptr);
    if (task.error) {
        std::rethrow_exception(task.error);
    }
}

size_t half_of_memory() {
    return size_t(sysconf(_SC_PHYS_PAGES)) / 2 * size_t(sysconf(_SC_PAGESIZE));
}

}  // namespace

// With an RWKV vocabulary llama.cpp takes the longest token that the text begins with. Where a token's first byte is none by
// itself there may be none, and it then starts again from the beginning, for ever.
void check_vocab(const llama_vocab * vocab) {
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_RWKV) {
        return;
    }
    std::array<bool, 256> begins{};
    std::array<bool, 256> alone{};
    std::string piece;
    for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
        piece.clear();
        append_piece(vocab, token, true, piece);
        if (!piece.empty()) {
            begins[(unsigned char) piece[0]] = true;
            alone[(unsigned char) piece[0]] |= piece.size() == 1;
        }
    }
    if (begins != alone) {
        throw format_error("its vocabulary calls itself RWKV, and has no token of the single byte that others begin with");
    }
}

size_t longest_match(const char * text, size_t n) {
    size_t longest = 0;
    std::array<size_t, 4> begin{};      // of the present run of each class
    for (size_t i = 0; i < n; ++i) {
        const uint8_t found = classes[(unsigned char) text[i]];
        for (size_t c = 0; c < begin.size(); ++c) {
            if ((found >> c & 1) == 0) {
                longest  = std::max(longest, i - begin[c]);
                begin[c] = i + 1;
            }
        }
    }
    for (const size_t b : begin) {
        longest = std::max(longest, n - std::min(b, n));
    }
    return 3 * longest;
}

std::vector<llama_token> tokenize(const llama_vocab * vocab, const char * text, int32_t n, bool add_special,
                                  bool parse_special) {
    std::vector<llama_token> tokens;
    const auto work = [&] {
        tokens.resize(size_t(n) + 8);
        int32_t count = llama_tokenize(vocab, text, n, tokens.data(), int32_t(tokens.size()), add_special, parse_special);
        if (count < 0 && count != INT32_MIN) {
            tokens.resize(size_t(-count));
            count = llama_tokenize(vocab, text, n, tokens.data(), int32_t(tokens.size()), add_special, parse_special);
        }
        if (count < 0) {
            throw std::runtime_error("llama.cpp could not tokenize the text");
        }
        tokens.resize(size_t(count));
    };
    with_stack_for(llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_BPE ? std::min(longest_match(text, size_t(n)), size_t(n)) : 0, work);
    return tokens;
}

namespace {

constexpr size_t chunk_bytes  = 4096;
constexpr size_t many_bytes   = 32768;      // from here on it is worth knowing all characters of the vocabulary: milliseconds
constexpr int    special_bits = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED | LLAMA_TOKEN_ATTR_UNKNOWN;

// As llama.cpp steps from one character to the next.
size_t character_bytes(char first) {
    static constexpr size_t lengths[] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4 };
    return lengths[(unsigned char) first >> 4];
}

// The code point at `at`, and the place of the next; 0 if this is no UTF-8.
uint32_t next_character(const char * text, size_t n, size_t & at) {
    const size_t length = std::min(n - at, character_bytes(text[at]));
    uint32_t value = (unsigned char) text[at] & (length == 1 ? 0x7F : 0xFFu >> (length + 1));
    bool good = length == character_bytes(text[at]) && (unsigned char) (text[at] & 0xC0) != 0x80;
    for (size_t i = 1; i < length; ++i) {
        good  = good && ((unsigned char) text[at + i] & 0xC0) == 0x80;
        value = value << 6 | ((unsigned char) text[at + i] & 0x3F);
    }
    at += length;
    return good && value <= 0x10FFFF ? value : 0;
}

uint32_t pair_of(char first, char second) {
    return (uint32_t) (unsigned char) first << 8 | (unsigned char) second;
}

bool is_utf8(const char * text, size_t n) {
    for (size_t at = 0; at < n;) {
        const bool nul = text[at] == 0;
        if (next_character(text, n, at) == 0 && !nul) {
            return false;
        }
    }
    return true;
}

}  // namespace

std::vector<llama_token> tokenize_more(const llama_vocab * vocab, const std::string & text) {
    const auto says = [vocab](const std::vector<llama_token> & tokens, const std::string & wanted) {
        std::string said;
        for (const llama_token token : tokens) {
            append_piece(vocab, token, false, said);
        }
        return said == wanted;
    };
    std::vector<llama_token> tokens = tokenize(vocab, text.data(), (int32_t) text.size(), false, false);
    if (says(tokens, text)) {
        return tokens;
    }
    const std::string after_line = "\n" + text;
    tokens = tokenize(vocab, after_line.data(), (int32_t) after_line.size(), false, false);
    std::string said;
    for (size_t i = 0; i < tokens.size(); ++i) {
        append_piece(vocab, tokens[i], false, said);
        if (said == "\n" || said == " \n") {
            tokens.erase(tokens.begin(), tokens.begin() + (std::ptrdiff_t) i + 1);
            return says(tokens, text) ? tokens : std::vector<llama_token>();
        }
    }
    return {};
}

LongText::LongText(const llama_vocab * vocab, const char * text, size_t n, bool parse_special)
    : vocab(vocab), text(text), n(n), parse_special(parse_special) {
    if (n <= chunk_bytes) {
        return;
    }
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_SPM && n >= many_bytes && is_utf8(text, n)) {
        known.resize(0x110000);
        // The end of C's strings; and white space, which is written otherwise in the vocabulary, or goes with a special token.
        for (const char c : { '\0', ' ', '\t', '\n', '\v', '\f', '\r' }) {
            known[(size_t) c] = true;
        }
    }
    const int parsed = parse_special ? special_bits : (int) LLAMA_TOKEN_ATTR_USER_DEFINED;
    for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
        const int attributes = llama_vocab_get_attr(vocab, token);
        if (known.empty() && !(attributes & parsed)) {
            continue;
        }
        const std::string name = llama_vocab_get_text(vocab, token);
        for (size_t at = 0; !known.empty() && at < name.size();) {
            known[next_character(name.data(), name.size(), at)] = true;
        }
        if (!(attributes & parsed) || name.empty()) {
            continue;
        }
        for (size_t i = 1; i < name.size(); ++i) {
            inside_special.set(pair_of(name[i - 1], name[i]));
        }
        if (!(attributes & LLAMA_TOKEN_ATTR_RSTRIP) && specials.insert(name).second) {
            special_sizes.push_back(name.size());
            ends_special.set((unsigned char) name.back());
        }
    }
    std::sort(special_sizes.begin(), special_sizes.end());
    special_sizes.erase(std::unique(special_sizes.begin(), special_sizes.end()), special_sizes.end());
}

std::string LongText::character(size_t at) const {
    return std::string(text + at, std::min(n - at, character_bytes(text[at])));
}

// Whether, and why, the text may be cut here.
LongText::Place LongText::place(size_t at) const {
    if (inside_special[pair_of(text[at - 1], text[at])]) {
        return Place::none;
    }
    if (!known.empty() && ((unsigned char) text[at] & 0xC0) != 0x80) {
        size_t before = at - 1;
        while (before > begin && ((unsigned char) text[before] & 0xC0) == 0x80) {
            --before;
        }
        size_t next = at;
        if (!known[next_character(text, n, before)] && !known[next_character(text, n, next)]) {
            return Place::amid_unknown;
        }
    }
    const bool special = ends_special[(unsigned char) text[at - 1]] &&
                         std::any_of(special_sizes.begin(), special_sizes.end(), [&](size_t size) {
        return size <= at - begin && specials.count(std::string(text + at - size, size)) > 0;
    });
    return special ? Place::after_special : Place::none;
}

// How many tokens come of the space that some vocabularies have in front of a text, before a character that stands alone.
size_t LongText::tokens_before(size_t at) const {
    const std::string once = character(at);
    const std::string twice = once + once;
    const size_t n_once  = tokenize(vocab, once.data(), (int32_t) once.size(), false, false).size();
    const size_t n_twice = tokenize(vocab, twice.data(), (int32_t) twice.size(), false, false).size();
    return 2 * n_once - n_twice;
}

bool LongText::next(std::vector<llama_token> & out) {
    for (size_t least = chunk_bytes; begin < n; least *= 2) {
        size_t end = begin + std::min(least, n - begin);
        Place ends = Place::none;
        while (end < n && (ends = place(end)) == Place::none) {
            ++end;
        }
        std::vector<llama_token> tokens = tokenize(vocab, text + begin, (int32_t) (end - begin), false, parse_special);
        const int last = tokens.empty() ? 0 : (int) llama_vocab_get_attr(vocab, tokens.back());
        if (ends == Place::after_special && !(last & special_bits)) {
            continue;           // another special token has taken a part of this one
        }
        const size_t skipped = begins == Place::amid_unknown ? tokens_before(begin) : 0;
        out.insert(out.end(), tokens.begin() + (ptrdiff_t) skipped, tokens.end());
        begin  = end;
        begins = ends;
        break;
    }
    return begin < n;
}

llama_token single_token(const llama_vocab * vocab, const std::string & text) {
    const std::vector<llama_token> tokens = tokenize(vocab, text.data(), int32_t(text.size()), false, true);
    return tokens.size() == 1 ? tokens[0] : LLAMA_TOKEN_NULL;
}

std::vector<llama_token> named_tokens(const llama_vocab * vocab, const std::vector<std::string> & texts) {
    std::vector<llama_token> tokens;
    std::string text;
    for (const std::string & name : texts) {
        llama_token token = single_token(vocab, name);
        if (token != LLAMA_TOKEN_NULL) {
            // Tokens may swallow white space around their names.
            text.clear();
            append_piece(vocab, token, false, text);
            const bool special = text.empty();
            append_piece(vocab, token, true, text);
            if (!special || text != name) {
                token = LLAMA_TOKEN_NULL;
            }
        }
        tokens.push_back(token);
    }
    return tokens;
}

void with_stack_for(size_t n, const std::function<void()> & work) {
    if (n <= short_match) {
        work();
        return;
    }
    if (n > half_of_memory() / stack_touched) {
        throw std::length_error("the text has a run of about " + std::to_string(n / 3)
            + " bytes without a break: too long to be split in this machine's memory");
    }
    // Whole pages, and some for what does not depend on the text.
    with_stack((n * stack_reserved + (size_t(1) << 20)) >> 16 << 16, work);
}

}  // namespace triollama::native
