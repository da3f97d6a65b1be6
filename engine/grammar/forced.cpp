#include "grammar/forced.hpp"

#include "text/token_texts.hpp"
#include "text/tokenize.hpp"

namespace triollama::native {

std::vector<llama_token> cut_forced(const llama_vocab * vocab, const std::string & text, const std::vector<size_t> & reach) {
    if (text.empty()) {
        return {};
    }
    std::vector<llama_token> tokens = tokenize_more(vocab, text);
    size_t keep = tokens.size();
    size_t at = 0;
    std::string said;
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (reach[at] > text.size()) {
            keep = i;
            break;
        }
        append_piece(vocab, tokens[i], false, said);
        at = said.size();
    }
    tokens.resize(keep);
    return tokens;
}

}  // namespace triollama::native
