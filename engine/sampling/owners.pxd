cdef class Sampler:
    cdef Vocab vocab
    cdef unique_ptr[sampling.Sampler] native
    cdef object params_
    cdef int n_ctx
    cdef bint begun                     # __init__ was called
    cdef bint busy                      # a thread is inside
    cdef tuple trigger_patterns
    cdef tuple trigger_tokens

    cdef int fill(self, sampling.SamplingParams & native, object params) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept


cdef class UpstreamSampler:
    cdef Vocab vocab
    cdef llama.llama_sampler * chain
    cdef unique_ptr[NativeGrammar] grammar
    cdef vector[llama.llama_token_data] tokens
    cdef bint busy                      # a thread is inside

    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef void add(self, llama.llama_sampler * sampler) noexcept
    cdef int add_bans(self, sampling.SamplingParams & p) except -1
    cdef int choose(self, const float[::1] logits, cpp_bool masked, llama.llama_token * token) except -1
