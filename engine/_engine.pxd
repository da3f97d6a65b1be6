"""Every owner of a native object. One extension, so that ggml's backend registry exists once."""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cpp_bool
from libcpp.map cimport map
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from model_files cimport ModelFiles

cimport decoding
cimport ggml
cimport gguf
cimport llama
cimport profile
cimport sampling
cimport training
from grammar cimport (
    NativeGrammar, NativeGrammarParams, forget_vocabulary, is_llguidance_loaded, load_llguidance,
    make_grammar,
    syntax_gbnf, syntax_json_schema, syntax_lark, syntax_regex, thought_forced, thought_free,
    thought_inside)
from guards cimport AbortFlag, raise_native_error
from text cimport NativeTextStream, append_piece

include "guards/owners.pxd"
include "llama/owners.pxd"
include "text/owners.pxd"
include "kv/owners.pxd"
include "sampling/owners.pxd"
include "decoding/owners.pxd"
