cdef class Generation:
    cdef Context context
    cdef Sampler sampler
    cdef Vocab vocab
    cdef Batch batch
    cdef unique_ptr[NativeTextStream] text
    cdef vector[llama.llama_token] prompt
    cdef vector[llama.llama_token] tokens
    cdef vector[llama.llama_token] end_tokens     # end it as end-of-generation tokens do
    cdef vector[llama.llama_token] stop_tokens    # of each stop string: the special token named so, or -1
    cdef int stop_index                     # of the stop string that ended it, or -1
    cdef int n_past             # tokens in memory
    cdef int n_generated
    cdef vector[int] drops      # tokens that each shift forgot
    cdef int n_shifted
    cdef int n_keep
    cdef int accept_from        # the sampler has seen the prompt up to here
    cdef int max_tokens         # -1: no limit
    cdef int logprobs           # alternatives for each token; -1: no logprobs at all
    cdef bint shift
    cdef bint special
    cdef bint causal_prompt
    cdef bint embeddings
    cdef bint reuse             # what sequence 0 holds of the prompt
    cdef int n_cached           # tokens of the prompt that were there
    cdef bint tracks            # nobody else was inside the context since it began
    cdef bint begun             # __init__ was called
    cdef bint busy              # a thread is inside; guarded by the GIL
    cdef bint prefilled         # the whole prompt is in memory
    cdef int n_undecoded        # of the last tokens, not in memory yet
    cdef bint forces            # what a grammar forces is not sampled
    cdef vector[llama.llama_token] forced       # what comes next
    cdef size_t n_forced        # of those, said
    cdef int64_t t_start
    cdef int64_t t_first
    cdef int64_t t_end
    cdef readonly str finish_reason
    cdef readonly list token_logprobs
    cdef readonly int eog_token

    cdef int check_prompt(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef int begin(self) except -1
    cdef int prefill(self) except -1
    cdef void note_held(self) noexcept
    cdef int next_token(self, string & out) except -1
    cdef int say(self, llama.llama_token token, const string & piece, string & out) except -1
    cdef int look_ahead(self) except -1
    cdef bint ends_it(self, llama.llama_token token) noexcept
    cdef int decode_last(self) except -1
    cdef int make_room(self) except -1
    cdef int note_logprobs(self, const float * logits, llama.llama_token token) except -1
    cdef int end(self, str reason, string & out) except -1
    cdef int finish(self, str reason) except -1


cdef class Decoder(Owner):
    cdef shared_ptr[decoding.Decoder] impl
    cdef readonly Context context
    cdef readonly bint deterministic
    cdef readonly bint can_shift
    cdef dict sets                      # lists of adapters, by number
    cdef dict dropping                  # replies to drop_adapters, by number
    cdef dict held                      # buffers that the thread reads, by the reply they are for

    cdef void stop(self) noexcept


cdef class DecoderStream:
    cdef shared_ptr[decoding.Stream] ptr
    cdef readonly Decoder decoder
    cdef Sampler sampler                # its settings; the stream has a native copy


cdef class DecoderReply:
    cdef shared_ptr[decoding.Reply] ptr
    cdef Context context                # whose state it may carry
    cdef str path                       # of the adapter that is being loaded
    cdef Adapter loaded

    cdef int check(self) except -1
