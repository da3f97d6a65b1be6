"""The native grammar, as grammar.hpp declares it."""
from libcpp cimport bool as cpp_bool
from libcpp.string cimport string
from libcpp.vector cimport vector

cimport llama
from guards cimport raise_native_error


cdef extern from "grammar/grammar.hpp" namespace "triollama::native" nogil:
    cdef cppclass NativeGrammarParams "triollama::native::GrammarParams":
        NativeGrammarParams() except +raise_native_error
        string text
        string root
        cpp_bool special
        cpp_bool lazy
        vector[string] trigger_patterns
        vector[llama.llama_token] trigger_tokens

    cdef cppclass NativeGrammar "triollama::native::Grammar":
        NativeGrammar(const llama.llama_vocab * vocab, NativeGrammarParams params) except +raise_native_error
        cpp_bool allows(llama.llama_token token) except +raise_native_error
        void mask(vector[llama.llama_token_data] & tokens) except +raise_native_error
        void accept(llama.llama_token token) except +raise_native_error
