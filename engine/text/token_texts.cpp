#include "text/token_texts.hpp"

#include <algorithm>
#include <cstring>

namespace triollama::native {

void append_piece(const llama_vocab * vocab, llama_token token, bool special, std::string & out) {
    char buffer[128];
    const int32_t n = llama_token_to_piece(vocab, token, buffer, (int32_t) sizeof(buffer), 0, special);
    if (n >= 0) {
        out.append(buffer, (size_t) n);
        return;
    }
    const size_t before = out.size();
    out.resize(before + (size_t) -n);
    llama_token_to_piece(vocab, token, &out[before], -n, 0, special);
}

TokenTexts::TokenTexts(const llama_vocab * vocab, bool special) {
    struct Keyed {
        uint64_t head;              // its first bytes, as a number that orders as they do
        Text     text;
    };
    const int32_t n = llama_vocab_n_tokens(vocab);
    std::vector<Keyed> keyed;
    keyed.reserve((size_t) n);
    for (llama_token token = 0; token < n; ++token) {
        const size_t begin = bytes.size();
        append_piece(vocab, token, special, bytes);
        const size_t size = bytes.size() - begin;
        if (size == 0 || llama_vocab_is_eog(vocab, token)) {
            bytes.resize(begin);
            continue;
        }
        uint64_t head = 0;
        for (size_t i = 0; i < 8; ++i) {
            head = head << 8 | (i < size ? (unsigned char) bytes[begin + i] : 0u);
        }
        keyed.push_back({ head, { (uint32_t) begin, (uint32_t) size, 0, token } });
    }
    std::sort(keyed.begin(), keyed.end(), [&](const Keyed & a, const Keyed & b) {
        if (a.head != b.head) {
            return a.head < b.head;
        }
        const int order = std::memcmp(bytes.data() + a.text.begin, bytes.data() + b.text.begin,
                                      std::min(a.text.size, b.text.size));
        return order != 0 ? order < 0 : a.text.size != b.text.size ? a.text.size < b.text.size : a.text.token < b.text.token;
    });
    texts.reserve(keyed.size());
    for (const Keyed & k : keyed) {
        texts.push_back(k.text);
        if (texts.size() > 1) {
            const Text & before = texts[texts.size() - 2];
            Text & text = texts.back();
            const uint32_t most = std::min(before.size, text.size);
            while (text.shared < most && bytes[before.begin + text.shared] == bytes[text.begin + text.shared]) {
                ++text.shared;
            }
        }
    }
}

}  // namespace triollama::native
