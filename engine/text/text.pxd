"""The texts of tokens, and the text of a stream."""
from libcpp cimport bool as cpp_bool
from libcpp.string cimport string
from libcpp.vector cimport vector

cimport llama
from guards cimport raise_native_error


cdef extern from "text/token_texts.hpp" namespace "triollama::native" nogil:
    void append_piece(const llama.llama_vocab * vocab, llama.llama_token token, cpp_bool special,
                      string & out) except +raise_native_error


cdef extern from "text/text_stream.hpp" namespace "triollama::native" nogil:
    cdef cppclass NativeTextStream "triollama::native::TextStream":
        NativeTextStream() except +raise_native_error
        NativeTextStream(vector[string] stops) except +raise_native_error
        cpp_bool feed(const char * bytes, size_t n, string & out) except +raise_native_error
        void flush(string & out) except +raise_native_error
        cpp_bool stopped()
        int matched_stop()
        size_t pending()
