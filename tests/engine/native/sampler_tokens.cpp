// What a sampler of ours and llama.cpp's chain choose, for a vocabulary made here: a line for each of both that differ, and
// one for each case with the tokens of ours, to compare machines by.  sampler_tokens CASES
#include "sampling/sampler.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

using namespace triollama::native;

// ---------------------------------------------------------------- the vocabulary: an end, bytes, words
static const int32_t N_VOCAB = 1200;
static const llama_token END = 0;

static std::vector<std::string> make_pieces() {
    std::vector<std::string> pieces = { "" };
    for (int byte = 0; byte < 256; byte++) {
        pieces.emplace_back(1, (char) byte);
    }
    std::mt19937 rng(7);
    const char * letters[] = { "{", "}", "\"", ":", ",", "[", "]", " ", "a", "b", "c", "1", "2", "\\", "\xC3\xA9", "\n" };
    while ((int32_t) pieces.size() < N_VOCAB) {
        std::string word;
        for (unsigned n = 2 + rng() % 4; n > 0; n--) {
            word += letters[rng() % 16];
        }
        pieces.push_back(word);
    }
    return pieces;
}
static const std::vector<std::string> PIECES = make_pieces();

extern "C" {
int32_t llama_vocab_n_tokens(const llama_vocab *) { return N_VOCAB; }
bool llama_vocab_is_eog(const llama_vocab *, llama_token token) { return token == END; }
enum llama_token_attr llama_vocab_get_attr(const llama_vocab *, llama_token token) {
    return token == END ? LLAMA_TOKEN_ATTR_CONTROL : LLAMA_TOKEN_ATTR_NORMAL;
}
enum llama_vocab_type llama_vocab_type(const llama_vocab *) { return LLAMA_VOCAB_TYPE_BPE; }
const char * llama_vocab_get_text(const llama_vocab *, llama_token token) { return PIECES[token].c_str(); }
const llama_token * llama_vocab_get_suppress_tokens(const llama_vocab *, int32_t * n) {
    *n = 0;
    return nullptr;
}
int32_t llama_token_to_piece(const llama_vocab *, llama_token token, char * out, int32_t size, int32_t, bool) {
    const std::string & piece = PIECES[token];
    if ((int32_t) piece.size() > size) {
        return -(int32_t) piece.size();
    }
    std::memcpy(out, piece.data(), piece.size());
    return (int32_t) piece.size();
}
int64_t ggml_time_us(void) { return 0; }
}

// ---------------------------------------------------------------- the cases
// By whole numbers, so that every machine has the same rows.
static std::vector<float> make_row(std::mt19937 & rng, int kind) {
    std::vector<float> row(N_VOCAB);
    for (float & x : row) {
        int32_t sum = 0;
        for (int i = 0; i < 4; i++) {
            sum += (int32_t) (rng() >> 12) - (1 << 19);
        }
        x = (float) (sum / 4) / (float) (1 << (kind == 1 ? 20 : 16));
        if (kind == 2) {
            x = (float) (sum >> 17);
        }
    }
    return row;
}

static SamplingParams make_params(std::mt19937 & rng) {
    auto one_of = [&](std::initializer_list<float> values) { return values.begin()[rng() % values.size()]; };
    SamplingParams p;
    p.seed             = rng() % 1000000;
    p.stages           = { Stage::penalties, Stage::top_n_sigma, Stage::top_k, Stage::typical_p, Stage::top_p,
                           Stage::min_p, Stage::xtc, Stage::temperature };
    p.top_k            = (int32_t) one_of({ 0, 1, 5, 40, 300 });
    p.top_p            = one_of({ 0.3f, 0.9f, 1.0f });
    p.min_p            = one_of({ 0.0f, 0.02f, 0.3f });
    p.typical_p        = one_of({ 0.7f, 1.0f, 1.0f });
    p.top_n_sigma      = one_of({ -1.0f, -1.0f, 1.5f });
    p.xtc_probability  = one_of({ 0.0f, 0.0f, 0.7f });
    p.temperature      = one_of({ 0.0f, 0.6f, 1.0f, 1.7f });
    p.dynatemp_range   = one_of({ 0.0f, 0.0f, 0.4f });
    p.repeat_penalty   = one_of({ 1.0f, 1.1f });
    p.presence_penalty = one_of({ 0.0f, 0.3f });
    p.mirostat         = (int32_t) one_of({ 0, 0, 0, 1, 2 });
    p.mirostat_tau     = 3.0f;
    p.adaptive_target  = one_of({ -1.0f, -1.0f, 0.4f });
    if (p.top_n_sigma > 0.0f) {
        p.typical_p = 1.0f;     // llama.cpp's entropy is no number then: docs/streams.md
    }
    return p;
}

static const char * GRAMMAR = R"(root ::= "{" pair ("," pair)* "}"
pair ::= ws string ws ":" ws value ws
value ::= string | [0-9]+ | "[" (value ("," value)*)? "]" | root
string ::= "\"" [^"\\\n]* "\""
ws ::= [ \n]*)";

static llama_sampler * make_chain(const SamplingParams & p) {
    llama_sampler * chain = llama_sampler_chain_init({ /*no_perf=*/ true });
    auto add = [&](llama_sampler * sampler) { llama_sampler_chain_add(chain, sampler); };
    add(llama_sampler_init_penalties(N_VOCAB, p.penalty_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty));
    if (!p.mirostat) {
        add(llama_sampler_init_top_n_sigma(p.top_n_sigma));
        add(llama_sampler_init_top_k(p.top_k));
        add(llama_sampler_init_typical(p.typical_p, 1));
        add(llama_sampler_init_top_p(p.top_p, 1));
        add(llama_sampler_init_min_p(p.min_p, 1));
        add(llama_sampler_init_xtc(p.xtc_probability, p.xtc_threshold, 1, p.seed));
        add(llama_sampler_init_temp_ext(p.temperature, p.dynatemp_range, p.dynatemp_exponent));
    } else {
        add(llama_sampler_init_temp(p.temperature));
    }
    if (p.mirostat == 1) {
        add(llama_sampler_init_mirostat(N_VOCAB, p.seed, p.mirostat_tau, p.mirostat_eta, p.mirostat_m));
    } else if (p.mirostat == 2) {
        add(llama_sampler_init_mirostat_v2(p.seed, p.mirostat_tau, p.mirostat_eta));
    } else if (p.adaptive_target >= 0.0f) {
        add(llama_sampler_init_adaptive_p(p.adaptive_target, p.adaptive_decay, p.seed));
    } else {
        add(llama_sampler_init_dist(p.seed));
    }
    return chain;
}

int main(int, char ** arguments) {
    const int cases = std::atoi(arguments[1]);
    const llama_vocab * vocab = nullptr;
    int compared = 0, differ = 0;
    for (int number = 0; number < cases; number++) {
        std::mt19937 rng((unsigned) number);
        SamplingParams params = make_params(rng);
        const bool with_grammar = number % 4 == 3;
        if (with_grammar) {
            params.grammar.text = GRAMMAR;
        }
        // Equals where their order is promised, flat rows where llama.cpp counts what they hold.
        const bool ranked = params.top_k > 0 && params.typical_p == 1.0f;
        const int kind = number % 5 == 4 && ranked ? 2 : number % 3 == 2 && params.mirostat != 1 ? 1 : 0;
        Sampler ours(vocab, params);
        llama_sampler * theirs = make_chain(params);
        std::printf("%d:", number);
        for (int step = 0; step < 12; step++) {
            std::vector<float> row = make_row(rng, kind);
            const llama_token token = ours.sample(row.data());
            std::printf(" %d", token);
            if (!with_grammar) {
                std::vector<llama_token_data> data;
                for (llama_token t = 0; t < N_VOCAB; t++) {
                    data.push_back({ t, row[t], 0.0f });
                }
                llama_token_data_array array = { data.data(), data.size(), -1, false };
                llama_sampler_apply(theirs, &array);
                compared++;
                if (array.data[array.selected].id != token) {
                    differ++;
                    std::printf(" (%d)", array.data[array.selected].id);
                    break;          // from here on their histories differ
                }
            }
            if (with_grammar && token == END) {
                break;
            }
            ours.accept(token, true);
            llama_sampler_accept(theirs, token);
        }
        std::printf("\n");
        llama_sampler_free(theirs);
    }
    std::printf("%d compared with llama.cpp, %d differ\n", compared, differ);
    return 0;
}
