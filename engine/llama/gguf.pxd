"""gguf, as far as triollama uses it."""
from libc.stdint cimport int64_t

cimport ggml

cdef extern from "gguf.h" nogil:
    ctypedef struct gguf_context:
        pass
    ctypedef struct ggml_context_ "struct ggml_context":
        pass
    struct gguf_init_params:
        bint no_alloc
        ggml_context_ ** ctx

    gguf_context * gguf_init_from_file(const char * fname, gguf_init_params params) except +
    void gguf_free(gguf_context * ctx) noexcept
    size_t gguf_get_data_offset(const gguf_context * ctx) noexcept
    int64_t gguf_get_n_tensors(const gguf_context * ctx) noexcept
    const char * gguf_get_tensor_name(const gguf_context * ctx, int64_t tensor_id) noexcept
    size_t gguf_get_tensor_offset(const gguf_context * ctx, int64_t tensor_id) noexcept
    ggml.ggml_type gguf_get_tensor_type(const gguf_context * ctx, int64_t tensor_id) noexcept
    size_t gguf_get_tensor_size(const gguf_context * ctx, int64_t tensor_id) noexcept
