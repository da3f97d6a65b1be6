// Text to tokens, however long the text is.
#pragma once

#include "llama.h"

#include <bitset>
#include <cstddef>
#include <functional>
#include <string>
#include <unordered_set>
#include <vector>

namespace triollama::native {

// The most bytes that one match of a pre-tokenizer's regular expression can span, from above: three times the longest run
// of characters that are all white space, all letters, all digits or all others. Non-ASCII may be any but ASCII white space.
size_t longest_match(const char * text, size_t n);

// llama_tokenize into a vector. Many BPE vocabularies are split by std::regex, which recurses once for each character of a
// match, so a long word would overflow the stack: such text is split on a thread with a stack of the size it may need.
// Throws std::length_error where the machine has no memory for that.
std::vector<llama_token> tokenize(const llama_vocab * vocab, const char * text, int32_t n, bool add_special,
                                  bool parse_special);

// The tokens of what goes on after other text: without the space that some vocabularies put in front. Their text is exactly this;
// empty where the tokenizer changes it.
std::vector<llama_token> tokenize_more(const llama_vocab * vocab, const std::string & text);

// The tokens of a long text, a chunk at a time: what llama.cpp does with the text as a whole takes time by the square of the
// number of special tokens in it (every line's end may be one), and by that of unknown characters. The text is cut after a
// special token, or between characters that no token holds; what is on one side of such a place does not matter to the other.
class LongText {
public:
    LongText(const llama_vocab * vocab, const char * text, size_t n, bool parse_special);

    // Appends the tokens of the next chunk. False once there is none.
    bool next(std::vector<llama_token> & out);

private:
    enum class Place { none, after_special, amid_unknown };

    const llama_vocab * vocab;
    const char * text;
    const size_t n;
    const bool parse_special;
    size_t begin = 0;
    Place  begins = Place::none;
    std::unordered_set<std::string> specials;
    std::vector<size_t> special_sizes;
    std::bitset<256>   ends_special;
    std::bitset<65536> inside_special;          // pairs of bytes
    std::vector<bool>  known;                   // by code point: whether a token holds it; empty: no cuts at unknown ones

    Place place(size_t at) const;
    std::string character(size_t at) const;
    size_t tokens_before(size_t at) const;
};

// The token whose text this is, special ones by their names, or LLAMA_TOKEN_NULL.
llama_token single_token(const llama_vocab * vocab, const std::string & text);

// For each text the special token whose name it is, or LLAMA_TOKEN_NULL. Such a token gives no text in which its name could
// be found.
std::vector<llama_token> named_tokens(const llama_vocab * vocab, const std::vector<std::string> & texts);

// Throws format_error if llama.cpp would tokenize for ever with this vocabulary.
void check_vocab(const llama_vocab * vocab);

// Runs what recurses once for each of `n` bytes as std::regex does, with a stack that is large enough.
void with_stack_for(size_t n, const std::function<void()> & work);

}  // namespace triollama::native
