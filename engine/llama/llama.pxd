"""llama.h, as far as triollama uses it. Checked against the pinned headers by scripts/check_pxd.py.

Functions out of which a C++ exception can escape are declared `except +raise_native_error`;
all others cannot throw.
"""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cpp_bool

from guards cimport raise_native_error
cimport ggml


cdef extern from "llama.h" nogil:
    const uint32_t LLAMA_DEFAULT_SEED
    const int32_t LLAMA_TOKEN_NULL

    ctypedef struct llama_vocab:
        pass
    ctypedef struct llama_model:
        pass
    ctypedef struct llama_context:
        pass
    ctypedef struct llama_adapter_lora:
        pass
    ctypedef struct llama_memory_i:
        pass
    ctypedef llama_memory_i * llama_memory_t
    ctypedef int32_t llama_pos
    ctypedef int32_t llama_token
    ctypedef int32_t llama_seq_id

    enum llama_vocab_type:
        LLAMA_VOCAB_TYPE_NONE
        LLAMA_VOCAB_TYPE_SPM
        LLAMA_VOCAB_TYPE_BPE
        LLAMA_VOCAB_TYPE_WPM
        LLAMA_VOCAB_TYPE_UGM
        LLAMA_VOCAB_TYPE_RWKV
        LLAMA_VOCAB_TYPE_PLAMO2
        LLAMA_VOCAB_TYPE_TEST

    enum llama_token_attr:
        LLAMA_TOKEN_ATTR_UNDEFINED
        LLAMA_TOKEN_ATTR_UNKNOWN
        LLAMA_TOKEN_ATTR_UNUSED
        LLAMA_TOKEN_ATTR_NORMAL
        LLAMA_TOKEN_ATTR_CONTROL
        LLAMA_TOKEN_ATTR_USER_DEFINED
        LLAMA_TOKEN_ATTR_BYTE
        LLAMA_TOKEN_ATTR_NORMALIZED
        LLAMA_TOKEN_ATTR_LSTRIP
        LLAMA_TOKEN_ATTR_RSTRIP
        LLAMA_TOKEN_ATTR_SINGLE_WORD

    enum llama_ftype:
        LLAMA_FTYPE_ALL_F32
        LLAMA_FTYPE_MOSTLY_F16
        LLAMA_FTYPE_MOSTLY_Q4_0
        LLAMA_FTYPE_MOSTLY_Q4_1
        LLAMA_FTYPE_MOSTLY_Q8_0
        LLAMA_FTYPE_MOSTLY_Q5_0
        LLAMA_FTYPE_MOSTLY_Q5_1
        LLAMA_FTYPE_MOSTLY_Q2_K
        LLAMA_FTYPE_MOSTLY_Q2_K_S
        LLAMA_FTYPE_MOSTLY_Q3_K_S
        LLAMA_FTYPE_MOSTLY_Q3_K_M
        LLAMA_FTYPE_MOSTLY_Q3_K_L
        LLAMA_FTYPE_MOSTLY_Q4_K_S
        LLAMA_FTYPE_MOSTLY_Q4_K_M
        LLAMA_FTYPE_MOSTLY_Q5_K_S
        LLAMA_FTYPE_MOSTLY_Q5_K_M
        LLAMA_FTYPE_MOSTLY_Q6_K
        LLAMA_FTYPE_MOSTLY_IQ4_NL
        LLAMA_FTYPE_MOSTLY_IQ4_XS
        LLAMA_FTYPE_MOSTLY_BF16

    enum llama_rope_scaling_type:
        LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED
        LLAMA_ROPE_SCALING_TYPE_NONE
        LLAMA_ROPE_SCALING_TYPE_LINEAR
        LLAMA_ROPE_SCALING_TYPE_YARN
        LLAMA_ROPE_SCALING_TYPE_LONGROPE

    enum llama_pooling_type:
        LLAMA_POOLING_TYPE_UNSPECIFIED
        LLAMA_POOLING_TYPE_NONE
        LLAMA_POOLING_TYPE_MEAN
        LLAMA_POOLING_TYPE_CLS
        LLAMA_POOLING_TYPE_LAST
        LLAMA_POOLING_TYPE_RANK

    enum llama_attention_type:
        LLAMA_ATTENTION_TYPE_UNSPECIFIED
        LLAMA_ATTENTION_TYPE_CAUSAL
        LLAMA_ATTENTION_TYPE_NON_CAUSAL

    enum llama_flash_attn_type:
        LLAMA_FLASH_ATTN_TYPE_AUTO
        LLAMA_FLASH_ATTN_TYPE_DISABLED
        LLAMA_FLASH_ATTN_TYPE_ENABLED

    enum llama_split_mode:
        LLAMA_SPLIT_MODE_NONE
        LLAMA_SPLIT_MODE_LAYER
        LLAMA_SPLIT_MODE_ROW
        LLAMA_SPLIT_MODE_TENSOR

    enum llama_load_mode:
        LLAMA_LOAD_MODE_AUTO
        LLAMA_LOAD_MODE_NONE
        LLAMA_LOAD_MODE_MMAP
        LLAMA_LOAD_MODE_MLOCK
        LLAMA_LOAD_MODE_MMAP_MLOCK
        LLAMA_LOAD_MODE_DIRECT_IO

    ctypedef cpp_bool (*llama_progress_callback)(float progress, void * user_data) noexcept

    struct llama_batch:
        int32_t n_tokens
        llama_token * token
        float * embd
        llama_pos * pos
        int32_t * n_seq_id
        llama_seq_id ** seq_id
        int8_t * logits

    enum llama_model_kv_override_type:
        LLAMA_KV_OVERRIDE_TYPE_INT
        LLAMA_KV_OVERRIDE_TYPE_FLOAT
        LLAMA_KV_OVERRIDE_TYPE_BOOL
        LLAMA_KV_OVERRIDE_TYPE_STR

    struct llama_model_kv_override:
        llama_model_kv_override_type tag
        char key[128]
        int64_t val_i64
        double val_f64
        cpp_bool val_bool
        char val_str[128]

    struct llama_model_tensor_buft_override:
        const char * pattern
        ggml.ggml_backend_buffer_type_t buft

    struct llama_model_params:
        ggml.ggml_backend_dev_t * devices
        const llama_model_tensor_buft_override * tensor_buft_overrides
        int32_t n_gpu_layers
        llama_split_mode split_mode
        llama_load_mode load_mode
        int32_t main_gpu
        const float * tensor_split
        llama_progress_callback progress_callback
        void * progress_callback_user_data
        const llama_model_kv_override * kv_overrides
        cpp_bool vocab_only
        cpp_bool check_tensors
        cpp_bool use_extra_bufts

    struct llama_context_params:
        uint32_t n_ctx
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_seq_max
        uint32_t n_outputs_max
        int32_t n_threads
        int32_t n_threads_batch
        llama_rope_scaling_type rope_scaling_type
        llama_pooling_type pooling_type
        llama_attention_type attention_type
        llama_flash_attn_type flash_attn_type
        float rope_freq_base
        float rope_freq_scale
        float yarn_ext_factor
        float yarn_attn_factor
        float yarn_beta_fast
        float yarn_beta_slow
        uint32_t yarn_orig_ctx
        ggml.ggml_type type_k
        ggml.ggml_type type_v
        ggml.ggml_abort_callback abort_callback
        void * abort_callback_data
        cpp_bool embeddings
        cpp_bool offload_kqv
        cpp_bool no_perf
        cpp_bool op_offload
        cpp_bool swa_full
        cpp_bool kv_unified

    struct llama_model_quantize_params:
        int32_t nthread
        llama_ftype ftype
        ggml.ggml_type output_tensor_type
        ggml.ggml_type token_embedding_type
        cpp_bool allow_requantize
        cpp_bool quantize_output_tensor
        cpp_bool only_copy
        cpp_bool pure

    struct llama_logit_bias:
        llama_token token
        float bias

    ctypedef struct llama_token_data:
        llama_token id
        float logit
        float p

    ctypedef struct llama_token_data_array:
        llama_token_data * data
        size_t size
        int64_t selected
        cpp_bool sorted

    ctypedef struct llama_sampler_chain_params:
        cpp_bool no_perf

    ctypedef struct llama_sampler:
        pass

    struct llama_perf_context_data:
        double t_start_ms
        double t_load_ms
        double t_p_eval_ms
        double t_eval_ms
        int32_t n_p_eval
        int32_t n_eval
        int32_t n_reused

    # library
    const char * llama_version() noexcept
    void llama_backend_init() noexcept
    int64_t llama_time_us() noexcept
    size_t llama_max_devices() noexcept
    size_t llama_max_parallel_sequences() noexcept
    cpp_bool llama_supports_gpu_offload() noexcept
    cpp_bool llama_supports_mmap() noexcept
    cpp_bool llama_supports_mlock() noexcept
    const char * llama_print_system_info() noexcept
    void llama_log_set(ggml.ggml_log_callback log_callback, void * user_data) noexcept

    # model
    llama_model_params llama_model_default_params() noexcept
    llama_model * llama_model_load_from_file(
        const char * path_model, llama_model_params params) except +raise_native_error
    void llama_model_free(llama_model * model) noexcept
    const llama_vocab * llama_model_get_vocab(const llama_model * model) noexcept
    int32_t llama_model_n_ctx_train(const llama_model * model) noexcept
    int32_t llama_model_n_embd(const llama_model * model) noexcept
    int32_t llama_model_n_embd_out(const llama_model * model) noexcept
    int32_t llama_model_n_layer(const llama_model * model) noexcept
    int32_t llama_model_n_head(const llama_model * model) noexcept
    int32_t llama_model_n_head_kv(const llama_model * model) noexcept
    int32_t llama_model_n_swa(const llama_model * model) noexcept
    uint32_t llama_model_n_cls_out(const llama_model * model) noexcept
    const char * llama_model_cls_label(const llama_model * model, uint32_t i) noexcept
    int32_t llama_model_meta_count(const llama_model * model) noexcept
    int32_t llama_model_meta_key_by_index(
        const llama_model * model, int32_t i, char * buf, size_t buf_size) noexcept
    int32_t llama_model_meta_val_str_by_index(
        const llama_model * model, int32_t i, char * buf, size_t buf_size) noexcept
    int32_t llama_model_desc(const llama_model * model, char * buf, size_t buf_size) noexcept
    uint64_t llama_model_size(const llama_model * model) noexcept
    uint64_t llama_model_n_params(const llama_model * model) noexcept
    const char * llama_model_chat_template(
        const llama_model * model, const char * name) except +raise_native_error
    cpp_bool llama_model_has_encoder(const llama_model * model) noexcept
    cpp_bool llama_model_has_decoder(const llama_model * model) noexcept
    llama_token llama_model_decoder_start_token(const llama_model * model) noexcept
    cpp_bool llama_model_is_recurrent(const llama_model * model) noexcept
    cpp_bool llama_model_is_hybrid(const llama_model * model) noexcept
    cpp_bool llama_model_is_diffusion(const llama_model * model) noexcept
    llama_model_quantize_params llama_model_quantize_default_params() noexcept
    uint32_t llama_model_quantize(
        const char * fname_inp,
        const char * fname_out,
        const llama_model_quantize_params * params) except +raise_native_error

    # adapters
    int32_t llama_adapter_meta_count(const llama_adapter_lora * adapter) noexcept
    int32_t llama_adapter_meta_key_by_index(
        const llama_adapter_lora * adapter, int32_t i, char * buf, size_t buf_size) noexcept
    int32_t llama_adapter_meta_val_str_by_index(
        const llama_adapter_lora * adapter, int32_t i, char * buf, size_t buf_size) noexcept
    uint64_t llama_adapter_get_alora_n_invocation_tokens(const llama_adapter_lora * adapter) noexcept
    const llama_token * llama_adapter_get_alora_invocation_tokens(
        const llama_adapter_lora * adapter) noexcept
    int32_t llama_set_adapters_lora(
        llama_context * ctx,
        llama_adapter_lora ** adapters,
        size_t n_adapters,
        float * scales) except +raise_native_error
    int32_t llama_set_adapter_cvec(
        llama_context * ctx,
        const float * data,
        size_t len,
        int32_t n_embd,
        int32_t il_start,
        int32_t il_end) except +raise_native_error

    # context
    llama_context_params llama_context_default_params() noexcept
    llama_context * llama_init_from_model(
        llama_model * model, llama_context_params params) except +raise_native_error
    void llama_free(llama_context * ctx) noexcept
    uint32_t llama_n_ctx(const llama_context * ctx) noexcept
    uint32_t llama_n_ctx_seq(const llama_context * ctx) noexcept
    uint32_t llama_n_batch(const llama_context * ctx) noexcept
    uint32_t llama_n_ubatch(const llama_context * ctx) noexcept
    uint32_t llama_n_seq_max(const llama_context * ctx) noexcept
    llama_memory_t llama_get_memory(const llama_context * ctx) noexcept
    llama_pooling_type llama_get_pooling_type "llama_pooling_type"(
        const llama_context * ctx) noexcept
    void llama_set_n_threads(
        llama_context * ctx, int32_t n_threads, int32_t n_threads_batch) noexcept
    int32_t llama_n_threads(llama_context * ctx) noexcept
    int32_t llama_n_threads_batch(llama_context * ctx) noexcept
    void llama_set_embeddings(llama_context * ctx, cpp_bool embeddings) noexcept
    void llama_set_causal_attn(llama_context * ctx, cpp_bool causal_attn) noexcept
    cpp_bool llama_get_causal_attn(const llama_context * ctx) noexcept
    void llama_set_abort_callback(
        llama_context * ctx, ggml.ggml_abort_callback abort_callback, void * abort_callback_data) noexcept
    void llama_synchronize(llama_context * ctx) except +raise_native_error
    float * llama_get_logits_ith(llama_context * ctx, int32_t i) noexcept
    float * llama_get_embeddings_ith(llama_context * ctx, int32_t i) noexcept
    float * llama_get_embeddings_seq(llama_context * ctx, llama_seq_id seq_id) noexcept
    llama_perf_context_data llama_perf_context(const llama_context * ctx) noexcept
    void llama_perf_context_reset(llama_context * ctx) noexcept

    # memory
    void llama_memory_clear(llama_memory_t mem, cpp_bool data) except +raise_native_error
    cpp_bool llama_memory_seq_rm(
        llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1) except +raise_native_error
    void llama_memory_seq_cp(
        llama_memory_t mem,
        llama_seq_id seq_id_src,
        llama_seq_id seq_id_dst,
        llama_pos p0,
        llama_pos p1) except +raise_native_error
    void llama_memory_seq_keep(llama_memory_t mem, llama_seq_id seq_id) except +raise_native_error
    void llama_memory_seq_add(
        llama_memory_t mem,
        llama_seq_id seq_id,
        llama_pos p0,
        llama_pos p1,
        llama_pos delta) except +raise_native_error
    llama_pos llama_memory_seq_pos_min(
        llama_memory_t mem, llama_seq_id seq_id) except +raise_native_error
    llama_pos llama_memory_seq_pos_max(
        llama_memory_t mem, llama_seq_id seq_id) except +raise_native_error
    cpp_bool llama_memory_can_shift(llama_memory_t mem) except +raise_native_error

    # state
    size_t llama_state_get_size(llama_context * ctx) except +raise_native_error
    size_t llama_state_get_data(
        llama_context * ctx, uint8_t * dst, size_t size) except +raise_native_error
    size_t llama_state_set_data(
        llama_context * ctx, const uint8_t * src, size_t size) except +raise_native_error
    size_t llama_state_seq_get_size(
        llama_context * ctx, llama_seq_id seq_id) except +raise_native_error
    size_t llama_state_seq_get_data(
        llama_context * ctx, uint8_t * dst, size_t size, llama_seq_id seq_id) except +raise_native_error
    size_t llama_state_seq_set_data(
        llama_context * ctx,
        const uint8_t * src,
        size_t size,
        llama_seq_id dest_seq_id) except +raise_native_error

    # vocab
    llama_vocab_type llama_get_vocab_type "llama_vocab_type"(const llama_vocab * vocab) noexcept
    int32_t llama_vocab_n_tokens(const llama_vocab * vocab) noexcept
    const char * llama_vocab_get_text(
        const llama_vocab * vocab, llama_token token) except +raise_native_error
    float llama_vocab_get_score(
        const llama_vocab * vocab, llama_token token) except +raise_native_error
    llama_token_attr llama_vocab_get_attr(
        const llama_vocab * vocab, llama_token token) except +raise_native_error
    cpp_bool llama_vocab_is_eog(const llama_vocab * vocab, llama_token token) noexcept
    cpp_bool llama_vocab_is_control(
        const llama_vocab * vocab, llama_token token) except +raise_native_error
    llama_token llama_vocab_bos(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_eos(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_eot(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_sep(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_nl(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_pad(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_mask(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_fim_pre(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_fim_suf(const llama_vocab * vocab) noexcept
    llama_token llama_vocab_fim_mid(const llama_vocab * vocab) noexcept
    cpp_bool llama_vocab_get_add_bos(const llama_vocab * vocab) noexcept
    cpp_bool llama_vocab_get_add_eos(const llama_vocab * vocab) noexcept
    cpp_bool llama_vocab_get_add_sep(const llama_vocab * vocab) noexcept
    int32_t llama_token_to_piece(
        const llama_vocab * vocab,
        llama_token token,
        char * buf,
        int32_t length,
        int32_t lstrip,
        cpp_bool special) except +raise_native_error
    int32_t llama_detokenize(
        const llama_vocab * vocab,
        const llama_token * tokens,
        int32_t n_tokens,
        char * text,
        int32_t text_len_max,
        cpp_bool remove_special,
        cpp_bool unparse_special) except +raise_native_error

    # Samplers: for UpstreamSampler. Our own are in sampling/sampler.cpp.
    const llama_token * llama_vocab_get_suppress_tokens(
        const llama_vocab * vocab, int32_t * n_suppress_tokens)
    llama_sampler_chain_params llama_sampler_chain_default_params()
    llama_sampler * llama_sampler_chain_init(llama_sampler_chain_params params)
    void llama_sampler_chain_add(llama_sampler * chain, llama_sampler * smpl)
    void llama_sampler_free(llama_sampler * smpl)
    void llama_sampler_accept(llama_sampler * smpl, llama_token token) except +raise_native_error
    void llama_sampler_apply(llama_sampler * smpl, llama_token_data_array * cur_p) except +raise_native_error
    llama_sampler * llama_sampler_init_dist(uint32_t seed)
    llama_sampler * llama_sampler_init_top_k(int32_t k)
    llama_sampler * llama_sampler_init_top_p(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_min_p(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_typical(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_temp(float t)
    llama_sampler * llama_sampler_init_temp_ext(float t, float delta, float exponent)
    llama_sampler * llama_sampler_init_xtc(float p, float t, size_t min_keep, uint32_t seed)
    llama_sampler * llama_sampler_init_top_n_sigma(float n)
    llama_sampler * llama_sampler_init_mirostat(
        int32_t n_vocab, uint32_t seed, float tau, float eta, int32_t m)
    llama_sampler * llama_sampler_init_mirostat_v2(uint32_t seed, float tau, float eta)
    llama_sampler * llama_sampler_init_penalties(
        int32_t n_vocab, int32_t penalty_last_n, float penalty_repeat, float penalty_freq,
        float penalty_present)
    llama_sampler * llama_sampler_init_dry(
        const llama_vocab * vocab, float dry_multiplier, float dry_base, int32_t dry_allowed_length,
        int32_t dry_penalty_last_n, const char ** seq_breakers,
        size_t num_breakers) except +raise_native_error
    llama_sampler * llama_sampler_init_adaptive_p(float target, float decay, uint32_t seed)
    llama_sampler * llama_sampler_init_logit_bias(
        int32_t n_vocab, int32_t n_logit_bias, const llama_logit_bias * logit_bias)
