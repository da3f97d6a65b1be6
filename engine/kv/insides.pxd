"""What stops a context, and what its public calls neither tell nor do."""
from libc.stdint cimport int64_t
from libcpp cimport bool as cpp_bool
from libcpp.string cimport string

from ggml cimport ggml_abort_callback, ggml_type
from llama cimport llama_context, llama_model, raise_native_error


cdef extern from "guards/abort_flag.hpp" namespace "triollama" nogil:
    cdef cppclass AbortFlag:
        cpp_bool raised()
        void set(cpp_bool value)
        void raise_at(int64_t n, cpp_bool fail)

        @staticmethod
        void raise_all() noexcept

        @staticmethod
        cpp_bool ask(void * flag) noexcept


cdef extern from "llama/exact.hpp" namespace "triollama" nogil:
    string make_exact(llama_context * ctx) except +raise_native_error


cdef extern from "kv/insides.hpp" namespace "triollama" nogil:
    string why_no_shift(const llama_context * ctx, ggml_type type_k) except +raise_native_error
    string why_no_cache(
        const llama_model * model, ggml_type type_k, ggml_type type_v) except +raise_native_error
    void settle(
        llama_context * ctx, ggml_abort_callback callback, void * data) except +raise_native_error
