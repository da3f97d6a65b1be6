#include "text/tokenize.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace triollama {

namespace {

// Measured: 324 bytes of stack for each character of a match, whatever the expression (GCC 12, x86-64).
constexpr size_t stack_touched  = 400;
constexpr size_t stack_reserved = 1024;

// Matches up to this length do with the stack of any thread.
constexpr size_t short_match = 1024;

enum : uint8_t { is_space = 1, is_letter = 2, is_digit = 4, is_other = 8 };

std::array<uint8_t, 256> make_classes() {
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

#if defined(_WIN32)

template <typename Work> void with_stack(size_t, Work &&) {
    throw std::length_error("a run of characters without a break is too long to be tokenized on this system");
}

#else

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

#endif

size_t half_of_memory() {
#if defined(_WIN32)
    return SIZE_MAX;
#else
    return size_t(sysconf(_SC_PHYS_PAGES)) / 2 * size_t(sysconf(_SC_PAGESIZE));
#endif
}

}  // namespace

size_t longest_match(const char * text, size_t n) {
    static const std::array<uint8_t, 256> classes = make_classes();
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
    const size_t match = llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_BPE ? std::min(longest_match(text, size_t(n)), size_t(n)) : 0;
    if (match <= short_match) {
        work();
        return tokens;
    }
    if (match > half_of_memory() / stack_touched) {
        throw std::length_error("the text has a run of about " + std::to_string(match / 3)
            + " bytes without a break: too long to be tokenized in this machine's memory");
    }
    // Whole pages, and some for what does not depend on the text.
    with_stack((match * stack_reserved + (size_t(1) << 20)) >> 16 << 16, work);
    return tokens;
}

}  // namespace triollama
