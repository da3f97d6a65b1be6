"""ggml, as far as triollama uses it. Checked against the pinned headers by scripts/check_pxd.py."""
from libc.stdint cimport int64_t, uint32_t
from libcpp cimport bool as cpp_bool

cdef extern from "ggml.h" nogil:
    enum ggml_type:
        GGML_TYPE_F32
        GGML_TYPE_F16
        GGML_TYPE_Q4_0
        GGML_TYPE_Q4_1
        GGML_TYPE_Q5_0
        GGML_TYPE_Q5_1
        GGML_TYPE_Q8_0
        GGML_TYPE_IQ4_NL
        GGML_TYPE_BF16
        GGML_TYPE_COUNT

    enum ggml_log_level:
        GGML_LOG_LEVEL_NONE
        GGML_LOG_LEVEL_DEBUG
        GGML_LOG_LEVEL_INFO
        GGML_LOG_LEVEL_WARN
        GGML_LOG_LEVEL_ERROR
        GGML_LOG_LEVEL_CONT

    ctypedef void (*ggml_log_callback)(ggml_log_level level, const char * text, void * user_data) noexcept
    ctypedef cpp_bool (*ggml_abort_callback)(void * data) noexcept

    const char * ggml_type_name(ggml_type type) noexcept
    int64_t ggml_blck_size(ggml_type type) noexcept
    size_t ggml_type_size(ggml_type type) noexcept
    const char * ggml_version() noexcept
    const char * ggml_commit() noexcept

cdef extern from "ggml-backend.h" nogil:
    ctypedef struct ggml_backend_device:
        pass
    ctypedef ggml_backend_device * ggml_backend_dev_t
    ctypedef struct ggml_backend_buffer_type:
        pass
    ctypedef ggml_backend_buffer_type * ggml_backend_buffer_type_t

    enum ggml_backend_dev_type:
        GGML_BACKEND_DEVICE_TYPE_CPU
        GGML_BACKEND_DEVICE_TYPE_GPU
        GGML_BACKEND_DEVICE_TYPE_IGPU
        GGML_BACKEND_DEVICE_TYPE_ACCEL

    ctypedef struct ggml_backend_reg:
        pass
    ctypedef ggml_backend_reg * ggml_backend_reg_t

    size_t ggml_backend_reg_count() noexcept
    ggml_backend_reg_t ggml_backend_reg_get(size_t index) noexcept
    const char * ggml_backend_reg_name(ggml_backend_reg_t reg) noexcept
    size_t ggml_backend_dev_count() noexcept
    ggml_backend_dev_t ggml_backend_dev_get(size_t index) noexcept
    const char * ggml_backend_dev_name(ggml_backend_dev_t device) noexcept
    const char * ggml_backend_dev_description(ggml_backend_dev_t device) noexcept
    void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total) noexcept
    ggml_backend_dev_type ggml_backend_dev_get_type "ggml_backend_dev_type"(
        ggml_backend_dev_t device) noexcept
    ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device) noexcept
    const char * ggml_backend_buft_name(ggml_backend_buffer_type_t buft) noexcept
