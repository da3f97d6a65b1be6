"""What stops a context, and what its public calls neither tell nor do."""
from libc.stdint cimport int64_t, uint8_t
from libcpp cimport bool as cpp_bool
from libcpp.string cimport string

cimport ggml
cimport llama
from guards cimport raise_native_error


cdef extern from "guards/abort_flag.hpp" namespace "triollama::native" nogil:
    cdef cppclass AbortFlag:
        cpp_bool raised()
        void set(cpp_bool value)
        void raise_at(int64_t n, cpp_bool fail)

        @staticmethod
        void raise_all() noexcept

        @staticmethod
        cpp_bool ask(void * flag) noexcept


cdef extern from "llama/exact.hpp" namespace "triollama::native" nogil:
    string make_exact(llama.llama_context * ctx) except +raise_native_error
    string rearranged(const llama.llama_model * model) except +raise_native_error


cdef extern from "kv/insides.hpp" namespace "triollama::native" nogil:
    string why_no_shift(const llama.llama_context * ctx, ggml.ggml_type type_k) except +raise_native_error
    string why_no_cache(
        const llama.llama_model * model, ggml.ggml_type type_k,
        ggml.ggml_type type_v) except +raise_native_error
    size_t sequence_state(
        llama.llama_context * ctx, llama.llama_seq_id sequence, cpp_bool exact, uint8_t * data,
        size_t size) except +raise_native_error
    void line_up(llama.llama_context * ctx, llama.llama_seq_id sequence) except +raise_native_error
    void settle(
        llama.llama_context * ctx, ggml.ggml_abort_callback callback, void * data) except +raise_native_error
