"""What a context remembers, where llama.cpp's public calls do not tell or do it."""
from libc.stdint cimport uint8_t
from libcpp cimport bool as cpp_bool
from libcpp.string cimport string

cimport ggml
cimport llama
from guards cimport raise_native_error


cdef extern from "kv/shift.hpp" namespace "triollama::native" nogil:
    string why_no_shift(const llama.llama_context * ctx, ggml.ggml_type type_k) except +raise_native_error
    void settle(
        llama.llama_context * ctx, ggml.ggml_abort_callback callback, void * data) except +raise_native_error


cdef extern from "kv/sequence_state.hpp" namespace "triollama::native" nogil:
    size_t sequence_state(
        llama.llama_context * ctx, llama.llama_seq_id sequence, cpp_bool exact, uint8_t * data,
        size_t size) except +raise_native_error
    void line_up(llama.llama_context * ctx, llama.llama_seq_id sequence) except +raise_native_error
