"""The native sampler, as sampler.hpp declares it."""
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t
from libcpp cimport bool as cpp_bool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

cimport llama
from grammar cimport NativeGrammarParams
from guards cimport raise_native_error


cdef extern from "sampling/sampler.hpp" namespace "triollama::native" nogil:
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

    cdef cppclass SamplingParams:
        SamplingParams() except +raise_native_error
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
        vector[llama.llama_logit_bias] logit_bias
        vector[llama.llama_token] banned
        NativeGrammarParams grammar

    cdef cppclass TokenLogprob:
        llama.llama_token id
        float logprob

    cdef cppclass Sampler:
        Sampler(const llama.llama_vocab * vocab, SamplingParams params) except +raise_native_error
        llama.llama_token sample(float * logits) except +raise_native_error
        void accept(llama.llama_token token, cpp_bool generated) except +raise_native_error
        vector[llama.llama_token] forced() except +raise_native_error
        void candidates(vector[llama.llama_token_data] & out) except +raise_native_error
        void reset() except +raise_native_error
        unique_ptr[Sampler] clone() except +raise_native_error
        void update(SamplingParams params) except +raise_native_error
        string save_state() except +raise_native_error
        void load_state(string_view bytes) except +raise_native_error
        const SamplingParams & params()
        uint32_t seed()
        cpp_bool is_grammar_done() except +raise_native_error

    llama.llama_token argmax(const float * logits, int32_t n) except +raise_native_error
    double log_sum_exp(const float * logits, int32_t n) except +raise_native_error
    void top_logprobs(const float * logits, int32_t n, int32_t k,
                      vector[TokenLogprob] & out) except +raise_native_error
