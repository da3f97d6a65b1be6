"""The native grammars, as params.hpp, grammar.hpp and llguidance.hpp declare them."""
from libc.stdint cimport int32_t
from libcpp cimport bool as cpp_bool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

cimport llama
from guards cimport raise_native_error


cdef extern from "grammar/params.hpp" namespace "triollama::native" nogil:
    cdef enum ThoughtStart "triollama::native::ThoughtParams::Start":
        thought_none "triollama::native::ThoughtParams::none"
        thought_inside "triollama::native::ThoughtParams::inside"
        thought_free "triollama::native::ThoughtParams::free"
        thought_forced "triollama::native::ThoughtParams::forced"

    cdef cppclass NativeThoughtParams "triollama::native::ThoughtParams":
        ThoughtStart start
        string open
        string close
        vector[llama.llama_token] open_tokens
        vector[llama.llama_token] close_tokens
        int32_t max_tokens

    cdef enum GrammarSyntax "triollama::native::GrammarParams::Syntax":
        syntax_gbnf "triollama::native::GrammarParams::gbnf"
        syntax_lark "triollama::native::GrammarParams::lark"
        syntax_json_schema "triollama::native::GrammarParams::json_schema"
        syntax_regex "triollama::native::GrammarParams::regex"

    cdef cppclass NativeGrammarParams "triollama::native::GrammarParams":
        NativeGrammarParams() except +raise_native_error
        string text
        GrammarSyntax syntax
        string root
        cpp_bool special
        cpp_bool lazy
        vector[string] trigger_patterns
        vector[llama.llama_token] trigger_tokens
        NativeThoughtParams thought
        cpp_bool empty()


cdef extern from "grammar/grammar.hpp" namespace "triollama::native" nogil:
    cdef cppclass NativeGrammar "triollama::native::Grammar":
        cpp_bool allows(llama.llama_token token) except +raise_native_error
        void mask(vector[llama.llama_token_data] & tokens) except +raise_native_error
        void accept(llama.llama_token token) except +raise_native_error

    unique_ptr[NativeGrammar] make_grammar(
        const llama.llama_vocab * vocab, const NativeGrammarParams & params) except +raise_native_error


cdef extern from "grammar/llguidance.hpp" namespace "triollama::native::llguidance" nogil:
    void load_llguidance "triollama::native::llguidance::load" (
        const string & path, const string & version) except +raise_native_error
    cpp_bool is_llguidance_loaded "triollama::native::llguidance::is_loaded" ()
    void forget_vocabulary "triollama::native::llguidance::forget" (const llama.llama_vocab * vocab) noexcept
