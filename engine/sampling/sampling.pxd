"""Our own native samplers and text streams, as the headers of their rooms declare them."""
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t
from libcpp cimport bool as cpp_bool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

from llama cimport (
    llama_logit_bias,
    llama_token,
    llama_token_data,
    llama_vocab,
    raise_native_error,
)


cdef extern from "sampling/sampler.hpp" namespace "triollama" nogil:
    cdef enum class Stage(int32_t):
        logit_bias
        penalties
        dry
        top_n_sigma
        top_k
        typical_p
        top_p
        min_p
        xtc
        temperature

    cdef cppclass NativeSamplingParams "triollama::SamplingParams":
        NativeSamplingParams() except +raise_native_error
        uint32_t seed
        vector[Stage] stages
        int32_t min_keep
        float temperature
        float dynatemp_range
        float dynatemp_exponent
        int32_t top_k
        float top_p
        float min_p
        float typical_p
        float top_n_sigma
        float xtc_probability
        float xtc_threshold
        float repeat_penalty
        float frequency_penalty
        float presence_penalty
        int32_t penalty_last_n
        float dry_multiplier
        float dry_base
        int32_t dry_allowed_length
        int32_t dry_last_n
        vector[string] dry_breakers
        int32_t mirostat
        float mirostat_tau
        float mirostat_eta
        int32_t mirostat_m
        float adaptive_target
        float adaptive_decay
        vector[llama_logit_bias] logit_bias
        vector[llama_token] banned
        string grammar
        string grammar_root
        cpp_bool special
        cpp_bool grammar_lazy
        vector[string] grammar_trigger_patterns
        vector[llama_token] grammar_trigger_tokens

    cdef cppclass NativeTokenLogprob "triollama::TokenLogprob":
        llama_token id
        float logprob

    cdef cppclass NativeSampler "triollama::Sampler":
        NativeSampler(const llama_vocab * vocab, NativeSamplingParams params) except +raise_native_error
        llama_token sample(float * logits) except +raise_native_error
        void accept(llama_token token, cpp_bool generated) except +raise_native_error
        void candidates(vector[llama_token_data] & out) except +raise_native_error
        void reset() except +raise_native_error
        unique_ptr[NativeSampler] clone() except +raise_native_error
        void update(NativeSamplingParams params) except +raise_native_error
        string save_state() except +raise_native_error
        void load_state(string_view bytes) except +raise_native_error
        const NativeSamplingParams & params()
        uint32_t seed()
        cpp_bool is_grammar_done() except +raise_native_error

    llama_token argmax(const float * logits, int32_t n) except +raise_native_error
    double log_sum_exp(const float * logits, int32_t n) except +raise_native_error
    void top_logprobs(const float * logits, int32_t n, int32_t k,
                      vector[NativeTokenLogprob] & out) except +raise_native_error


cdef extern from "grammar/grammar.hpp" namespace "triollama" nogil:
    cdef cppclass NativeGrammarParams "triollama::GrammarParams":
        NativeGrammarParams() except +raise_native_error
        string text
        string root
        cpp_bool special
        cpp_bool lazy
        vector[string] trigger_patterns
        vector[llama_token] trigger_tokens

    cdef cppclass NativeGrammar "triollama::Grammar":
        NativeGrammar(const llama_vocab * vocab, NativeGrammarParams params) except +raise_native_error
        cpp_bool allows(llama_token token) except +raise_native_error
        void mask(vector[llama_token_data] & tokens) except +raise_native_error
        void accept(llama_token token) except +raise_native_error


cdef extern from "text/text.hpp" namespace "triollama" nogil:
    void append_piece(const llama_vocab * vocab, llama_token token, cpp_bool special,
                      string & out) except +raise_native_error

    cdef cppclass NativeTextStream "triollama::TextStream":
        NativeTextStream() except +raise_native_error
        NativeTextStream(vector[string] stops) except +raise_native_error
        cpp_bool feed(const char * bytes, size_t n, string & out) except +raise_native_error
        void flush(string & out) except +raise_native_error
        cpp_bool stopped()
        int matched_stop()
        size_t pending()
