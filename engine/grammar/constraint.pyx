"""What binds a text, as the native grammars take it; and llguidance, found where pip has put it."""
import importlib.util
import os
import re

import msgspec

# Layouts of structs depend on it: see grammar/llguidance.hpp.
LLGUIDANCE = "1.9.1"

_LARK = re.compile(r"^[ \t]*(?:%llguidance\b|[?!]?start[ \t]*(?:\[[^\]\n]*\])?[ \t]*:(?!:=))", re.MULTILINE)
_SPACES = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

# Keywords of JSON Schema whose values are schemas, or lists or mappings of them.
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else",
        "propertyNames", "unevaluatedProperties", "unevaluatedItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def load_guidance() -> None:
    """Load llguidance, which JSON schemas, regular expressions, choices and Lark grammars need.

    Once a process; milliseconds. Raises UnsupportedError, saying what to do, where it is missing, of
    another version than ``LLGUIDANCE``, or does not work here.
    """
    cdef string path, version
    if is_llguidance_loaded():
        return
    spec = importlib.util.find_spec("llguidance")       # which imports nothing
    why = "it is not installed"
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for name in os.listdir(folder):
            if name.startswith("_lib.") and name.endswith((".so", ".pyd", ".dylib")):
                path, version = os.fsencode(os.path.join(folder, name)), LLGUIDANCE.encode()
                try:
                    with nogil:
                        load_llguidance(path, version)
                    return
                except UnsupportedError as error:
                    why = str(error)
    raise UnsupportedError(
        f"JSON schemas, regular expressions, choices and Lark grammars need llguidance {LLGUIDANCE}: {why}. "
        f"pip install llguidance=={LLGUIDANCE} brings it, where it has a wheel for this Python; "
        "grammars in GBNF do without it")


cdef int fill_grammar(object params, Vocab vocab, NativeGrammarParams & out) except -1:
    """The constraint of a GenerationParams. Loads llguidance if it is needed."""
    out.text = b""
    out.syntax = syntax_gbnf
    out.root = _utf8("grammar_root", params.grammar_root)
    out.special = params.special
    if params.grammar is not None:
        out.text = _utf8("grammar", params.grammar)
        if _LARK.search(params.grammar):
            out.syntax = syntax_lark
    elif params.json_schema is not None:
        out.text = _utf8("json_schema", spaced(params.json_schema))
        out.syntax = syntax_json_schema
    elif params.regex is not None:
        out.text = _utf8("regex", params.regex)
        out.syntax = syntax_regex
    elif params.choices:
        texts = " | ".join(msgspec.json.encode(choice).decode() for choice in params.choices)
        out.text = _utf8("choices", f"start: CHOICE\nCHOICE: {texts}\n")
        out.syntax = syntax_lark
    if out.syntax != syntax_gbnf:
        load_guidance()
    thoughts = params.reasoning
    if thoughts is not None:
        out.thought.open = _utf8("reasoning.open", thoughts.open)
        out.thought.close = _utf8("reasoning.close", thoughts.close)
        out.thought.open_tokens = vocab.tokenize(thoughts.open, False, True)
        out.thought.close_tokens = vocab.tokenize("\n" + thoughts.close + "\n", False, True)
        out.thought.start = {
            "inside": thought_inside, "free": thought_free, "forced": thought_forced}[thoughts.start]
        out.thought.max_tokens = (
            0 if params.thinking is False
            else -1 if params.max_reasoning_tokens is None else params.max_reasoning_tokens)
    return 0


cdef str spaced(str text):
    """A JSON schema that allows a space after commas and colons, and no other whitespace, unless it
    says itself what it allows (``x-guidance``). Raises GrammarError for what is no schema."""
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise GrammarError(f"json_schema is no JSON: {error}", place="$") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema is an object, not {text[:100]}", place="$")
    return msgspec.json.encode({"x-guidance": _SPACES, **schema}).decode()


cdef int blame(object params, Vocab vocab, object error) except -1:
    """Raise a GrammarError that says which part of a JSON schema is at fault: the deepest that is
    refused by itself."""
    if params.json_schema is None or error.place:
        return 0
    schema = msgspec.json.decode(params.json_schema)
    if not isinstance(schema, dict):
        return 0
    shared = {name: schema[name] for name in ("$defs", "definitions", "$schema", "$id") if name in schema}
    place, found, why = "$", schema, str(error)
    deeper = True
    while deeper:
        deeper = False
        for name, child in children(found):
            message = refusal({**shared, **child}, vocab)
            if message:
                place, found, why, deeper = place + name, child, message, True
                break
    raise GrammarError(f"json_schema: {place}: {why}", place=place) from error


cdef list children(dict schema):
    """The schemas directly inside one, and the ends of their paths."""
    found = []
    for key, value in schema.items():
        if key in _MAPPINGS and isinstance(value, dict):
            found += [(f".{key}.{name}", child) for name, child in value.items()]
        elif key in _LISTS and isinstance(value, list):
            found += [(f".{key}[{at}]", child) for at, child in enumerate(value)]
        elif key in _ONE:
            found.append((f".{key}", value))
    return [(path, child) for path, child in found if isinstance(child, dict)]


cdef str refusal(dict schema, Vocab vocab):
    """Why a schema is refused; empty if it is not."""
    cdef NativeGrammarParams params
    cdef unique_ptr[NativeGrammar] _grammar     # only whether there is one matters
    params.syntax = syntax_json_schema
    params.text = _utf8("json_schema", spaced(msgspec.json.encode(schema).decode()))
    try:
        with nogil:
            _grammar = make_grammar(vocab.ptr, params)
    except GrammarError as error:
        return str(error)
    return ""
