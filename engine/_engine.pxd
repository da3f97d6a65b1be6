"""Every owner of a native object. One extension, so that ggml's backend registry exists once."""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cpp_bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from decoder cimport NativeDecoder, Reply, Stream
from llama cimport (
    llama_adapter_lora,
    llama_batch,
    llama_context,
    llama_memory_t,
    llama_model,
    llama_pos,
    llama_sampler,
    llama_seq_id,
    llama_token,
    llama_token_data,
    llama_vocab,
)
from model_files cimport ModelFiles
from sampling cimport NativeGrammar, NativeSampler, NativeSamplingParams, NativeTextStream
from insides cimport AbortFlag


cdef class Owner:
    """What every owner of a native object shares: whether it lives, who is inside, who depends on it."""
    cdef object __weakref__
    cdef bint closed
    cdef bint begun             # __init__ was called: never twice, for others keep our native pointer
    cdef bint busy              # a thread is inside a blocking call; guarded by the GIL
    cdef int readers            # calls under way in other objects that read this one, likewise
    cdef int children           # living objects that hold native pointers into this one
    cdef unsigned int forks     # forks of this process before the object was made

    cdef int begin(self) except -1
    cdef void opened(self) noexcept
    cdef void ended(self) noexcept
    cdef void interrupt(self) noexcept
    cdef int alive(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef int hold(self) except -1
    cdef void release(self) noexcept
    cdef int check_childless(self) except -1


cdef class Model(Owner):
    cdef llama_model * ptr
    cdef ModelFiles * files     # what it was loaded from
    cdef readonly str path
    cdef readonly bint vocab_only
    cdef readonly bint repacked         # weights may be repacked for speed: not for training
    cdef int n_gpu_layers_
    cdef dict metadata_
    cdef bytes fingerprint_
    cdef dict overrides         # kv_overrides, as metadata has them
    cdef int drivers            # open Decoders that drive a context of it
    cdef int computing          # contexts of it that compute now

    cdef int check_tables(self) except -1
    cdef void free(self) noexcept nogil


cdef class Vocab:
    cdef Model model
    cdef const llama_vocab * ptr
    cdef readonly int n_tokens
    cdef vector[llama_token] eog
    cdef bint eog_known

    cdef int alive(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef llama_token token_id(self, object token) except -1
    cdef int check_token(self, llama_token token) except -1
    cdef const vector[llama_token] * find_eog(self) except NULL


cdef class Context(Owner):
    cdef llama_context * ptr
    cdef llama_memory_t mem
    cdef readonly Model model
    cdef readonly int n_ctx
    cdef readonly int n_batch
    cdef readonly int n_ubatch
    cdef readonly int n_seq_max
    cdef readonly int n_outputs_max
    cdef readonly bint kv_unified
    cdef readonly bint exact            # numbers do not depend on what shares a step
    cdef readonly bint swa_full
    cdef readonly str type_k
    cdef readonly str type_v
    cdef readonly str flash_attn
    cdef int n_vocab
    cdef int n_embd
    cdef int pooling_
    cdef tuple rope                     # what was asked of positions' rotation
    cdef bint embeddings_
    cdef bint causal_
    cdef int views                      # numpy arrays that show our output buffers
    cdef AbortFlag abort_flag
    cdef str no_shift                   # why positions cannot be moved; empty if they can
    cdef vector[int32_t] output_rows    # batch indices that have an output, of the last decode
    cdef int last_n_tokens
    cdef vector[uint8_t] last_sequences  # of the last decode: 1 where the sequence had tokens
    cdef tuple adapters_                # of (Adapter, scale), those applied
    cdef bint steered                   # by a control vector
    cdef str broken                     # what left llama.cpp in the middle of a computation
    cdef vector[llama_token] held       # what sequence 0 holds, while only Generations come in
    cdef bint holds                     # and it does; whoever else enters may change anything

    cdef int enter_to_read(self) except -1
    cdef int compute(self, Batch batch, bint encode) except -1
    cdef int settle_memory(self) except -1
    cdef int check_batch(self, Batch batch, bint encode) except -1
    cdef void let_go(self) noexcept
    cdef int check_seq(self, int seq_id, bint any_allowed) except -1
    cdef int note_outputs(self, Batch batch, bint all_outputs) except -1
    cdef int row(self, int i) except -1
    cdef float * logits_row(self, int i) except NULL
    cdef object view(self, float * data, int n, bint copy)


cdef class Memory:
    cdef Context context

    cdef llama_seq_id enter(self, object seq_id, bint any_allowed) except? -2


cdef class Batch:
    cdef llama_batch c
    cdef readonly int capacity
    cdef readonly int n_seq_max
    cdef vector[llama_token] token
    cdef vector[llama_pos] pos
    cdef vector[int32_t] n_seq_id
    cdef vector[llama_seq_id] seq_id_data
    cdef vector[llama_seq_id *] seq_id
    cdef vector[int8_t] logits
    cdef int readers                    # decodes under way

    cdef int check_unused(self) except -1
    cdef int reserve(self, Py_ssize_t n) except -1
    cdef void put(self, llama_token token, llama_pos pos, llama_seq_id seq_id, bint output) noexcept nogil


cdef class FloatView:
    cdef Context context
    cdef float * data                   # NULL once the last buffer was released
    cdef int buffers
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]


cdef class Adapter(Owner):
    cdef llama_adapter_lora * ptr
    cdef readonly Model model
    cdef readonly str path
    cdef dict metadata_

    cdef int check_model(self, Model model) except -1
    cdef llama_adapter_lora * let_go(self) noexcept


cdef class Sampler:
    cdef Vocab vocab
    cdef unique_ptr[NativeSampler] native
    cdef object params_
    cdef int n_ctx
    cdef bint begun                     # __init__ was called
    cdef bint busy                      # a thread is inside
    cdef tuple trigger_patterns
    cdef tuple trigger_tokens

    cdef int fill(self, NativeSamplingParams & native, object params) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept


cdef class UpstreamSampler:
    cdef Vocab vocab
    cdef llama_sampler * chain
    cdef unique_ptr[NativeGrammar] grammar
    cdef vector[llama_token_data] tokens
    cdef bint busy                      # a thread is inside

    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef void add(self, llama_sampler * sampler) noexcept
    cdef int add_bans(self, NativeSamplingParams & p) except -1
    cdef int choose(self, const float[::1] logits, cpp_bool masked, llama_token * token) except -1


cdef class TextStream:
    cdef unique_ptr[NativeTextStream] native


cdef class Generation:
    cdef Context context
    cdef Sampler sampler
    cdef Vocab vocab
    cdef Batch batch
    cdef unique_ptr[NativeTextStream] text
    cdef vector[llama_token] prompt
    cdef vector[llama_token] tokens
    cdef vector[llama_token] end_tokens     # end it as end-of-generation tokens do
    cdef vector[llama_token] stop_tokens    # of each stop string: the special token named so, or -1
    cdef int stop_index                     # of the stop string that ended it, or -1
    cdef int n_past             # tokens in memory
    cdef int n_generated
    cdef int n_shifted
    cdef int n_keep
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
    cdef bint undecoded         # the last token is not in memory yet
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
    cdef int decode_last(self) except -1
    cdef int make_room(self) except -1
    cdef int note_logprobs(self, const float * logits, llama_token token) except -1
    cdef int end(self, str reason, string & out) except -1
    cdef int finish(self, str reason) except -1


cdef class Decoder(Owner):
    cdef shared_ptr[NativeDecoder] impl
    cdef readonly Context context
    cdef readonly bint deterministic
    cdef readonly bint can_shift
    cdef dict sets                      # lists of adapters, by number
    cdef dict dropping                  # replies to drop_adapters, by number
    cdef dict held                      # buffers that the thread reads, by the reply they are for

    cdef void stop(self) noexcept


cdef class DecoderStream:
    cdef shared_ptr[Stream] ptr
    cdef readonly Decoder decoder
    cdef Sampler sampler                # its settings; the stream has a native copy


cdef class DecoderReply:
    cdef shared_ptr[Reply] ptr
    cdef Context context                # whose state it may carry
    cdef str path                       # of the adapter that is being loaded
    cdef Adapter loaded

    cdef int check(self) except -1
