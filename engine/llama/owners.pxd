cdef class Model(Owner):
    cdef llama.llama_model * ptr
    cdef ModelFiles * files     # what it was loaded from
    cdef readonly str path
    cdef readonly bint vocab_only
    cdef int n_gpu_layers_
    cdef dict metadata_
    cdef bytes fingerprint_
    cdef object has_head_       # None: not looked for
    cdef dict overrides         # kv_overrides, as metadata has them

    cdef void free(self) noexcept nogil


cdef class Context(Owner):
    cdef llama.llama_context * ptr
    cdef llama.llama_memory_t mem
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
    cdef str kernels_
    cdef str no_shift                   # why positions cannot be moved; empty if they can
    cdef vector[int32_t] output_rows    # batch indices that have an output, of the last decode
    cdef int last_n_tokens
    cdef vector[uint8_t] last_sequences  # of the last decode: 1 where the sequence had tokens
    cdef tuple adapters_                # of (Adapter, scale), those applied
    cdef bint steered                   # by a control vector
    cdef str broken                     # what left llama.cpp in the middle of a computation
    cdef vector[llama.llama_token] held       # what sequence 0 holds, while only Generations come in
    cdef bint holds                     # and it does; whoever else enters may change anything

    cdef int enter_to_read(self) except -1
    cdef int compute(self, Batch batch, bint encode) except -1
    cdef int check_and_compute(self, Batch batch, bint encode) except -1
    cdef int settle_memory(self) except -1
    cdef int order_cells(self, int seq_id) except -1
    cdef int create(self, Model model, llama.llama_context_params params) except -1
    cdef void undo(self) noexcept
    cdef int check_batch(self, Batch batch, bint encode) except -1
    cdef void let_go(self) noexcept
    cdef int check_seq(self, int seq_id, bint any_allowed) except -1
    cdef int note_outputs(self, Batch batch, bint all_outputs) except -1
    cdef int row(self, int i) except -1
    cdef float * logits_row(self, int i) except NULL
    cdef object view(self, float * data, int n, bint copy)


cdef class Batch:
    cdef llama.llama_batch c
    cdef readonly int capacity
    cdef readonly int n_seq_max
    cdef vector[llama.llama_token] token
    cdef vector[llama.llama_pos] pos
    cdef vector[int32_t] n_seq_id
    cdef vector[llama.llama_seq_id] seq_id_data
    cdef vector[llama.llama_seq_id *] seq_id
    cdef vector[int8_t] logits
    cdef int readers                    # decodes under way

    cdef int check_unused(self) except -1
    cdef int reserve(self, Py_ssize_t n) except -1
    cdef void put(self, llama.llama_token token, llama.llama_pos pos, llama.llama_seq_id seq_id,
                  bint output) noexcept nogil


cdef class FloatView:
    cdef Context context
    cdef float * data                   # NULL once the last buffer was released
    cdef int buffers
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]


cdef class Adapter(Owner):
    cdef llama.llama_adapter_lora * ptr
    cdef readonly Model model
    cdef readonly str path
    cdef dict metadata_

    cdef int check_model(self, Model model) except -1
    cdef llama.llama_adapter_lora * let_go(self) noexcept
