"""Text to tokens and back."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE


cdef extern from "text/tokenize.hpp" namespace "triollama::native" nogil:
    vector[llama.llama_token] tokenize(
        const llama.llama_vocab * vocab, const char * text, int32_t n, cpp_bool add_special,
        cpp_bool parse_special) except +raise_native_error
    vector[llama.llama_token] named_tokens(
        const llama.llama_vocab * vocab, const vector[string] & texts) except +raise_native_error
    cdef cppclass LongText:
        LongText(const llama.llama_vocab * vocab, const char * text, size_t n,
                 cpp_bool parse_special) except +raise_native_error
        cpp_bool next(vector[llama.llama_token] & out) except +raise_native_error

    void check_vocab(const llama.llama_vocab * vocab) except +raise_native_error

cdef dict _VOCAB_TYPES = {
    <int>llama.LLAMA_VOCAB_TYPE_NONE: "none",
    <int>llama.LLAMA_VOCAB_TYPE_SPM: "spm",
    <int>llama.LLAMA_VOCAB_TYPE_BPE: "bpe",
    <int>llama.LLAMA_VOCAB_TYPE_WPM: "wpm",
    <int>llama.LLAMA_VOCAB_TYPE_UGM: "ugm",
    <int>llama.LLAMA_VOCAB_TYPE_RWKV: "rwkv",
    <int>llama.LLAMA_VOCAB_TYPE_PLAMO2: "plamo2",
    <int>llama.LLAMA_VOCAB_TYPE_TEST: "test",
}

cdef dict _TOKEN_ATTRIBUTES = {
    "unknown": <int>llama.LLAMA_TOKEN_ATTR_UNKNOWN,
    "unused": <int>llama.LLAMA_TOKEN_ATTR_UNUSED,
    "normal": <int>llama.LLAMA_TOKEN_ATTR_NORMAL,
    "control": <int>llama.LLAMA_TOKEN_ATTR_CONTROL,
    "user_defined": <int>llama.LLAMA_TOKEN_ATTR_USER_DEFINED,
    "byte": <int>llama.LLAMA_TOKEN_ATTR_BYTE,
    "normalized": <int>llama.LLAMA_TOKEN_ATTR_NORMALIZED,
    "lstrip": <int>llama.LLAMA_TOKEN_ATTR_LSTRIP,
    "rstrip": <int>llama.LLAMA_TOKEN_ATTR_RSTRIP,
    "single_word": <int>llama.LLAMA_TOKEN_ATTR_SINGLE_WORD,
}

cdef bytes _bytes(str name, object data):
    """``data`` (bytes or another buffer) as bytes; ParameterError otherwise."""
    try:
        return bytes(memoryview(data))      # bytes(5) would be five zeros
    except (TypeError, BufferError) as error:
        raise ParameterError(
            f"{name} must be bytes or another buffer: {error}", parameter=name, value=data) from None


# Longest text one call takes: a token is at least a byte, and llama.cpp counts in int32.
cdef Py_ssize_t _MAX_TEXT = 2**30


cdef vector[llama.llama_token] token_vector(object tokens) except *:
    """``tokens`` (a buffer of int32, or any iterable of ints) as a vector; ids are not checked here."""
    cdef vector[llama.llama_token] out
    cdef const int32_t[::1] view
    cdef Py_ssize_t i
    if tokens is None or isinstance(tokens, (str, bytes, bytearray)):
        raise ParameterError(
            f"tokens must be integers, not {shown(tokens)}", parameter="tokens", value=tokens)
    if not isinstance(tokens, (list, tuple)):
        try:
            view = tokens
        except (TypeError, ValueError, BufferError):
            pass
        else:
            out.resize(view.shape[0])
            for i in range(view.shape[0]):
                out[i] = view[i]
            return out
    try:
        for token in tokens:
            out.push_back(index(token))     # a float would be cut, not refused
    except (TypeError, OverflowError):
        raise TokenError(
            "tokens must be integers within int32", parameter="tokens", value=tokens) from None
    return out


cdef class Vocab:
    """The vocabulary of a model. Obtained as ``model.vocab``; keeps the model alive.

    Methods may be called from several threads at once.
    """

    def __cinit__(self, given=None):
        require_maker(given, "Model.vocab")

    cdef int alive(self) except -1:
        self.model.alive()
        # llama.cpp aborts the process when asked for the tokens of a model without a vocabulary.
        if llama.llama_get_vocab_type(self.ptr) == llama.LLAMA_VOCAB_TYPE_NONE:
            raise UnsupportedError("this model has no vocabulary")
        return 0

    cdef const vector[llama.llama_token] * find_eog(self) except NULL:
        """Tokens that end generation: looked for once, since a vocabulary has hundreds of thousands."""
        self.alive()
        cdef int i
        cdef vector[llama.llama_token] found
        if not self.eog_known:
            for i in range(self.n_tokens):
                if llama.llama_vocab_is_eog(self.ptr, i):
                    found.push_back(i)
            self.eog.swap(found)
            self.eog_known = True
        return &self.eog

    cdef int enter(self) except -1:
        """A call without the GIL reads the model: until ``leave`` nobody may close it."""
        self.alive()
        return self.model.hold()

    cdef void leave(self) noexcept:
        self.model.release()

    cdef llama.llama_token token_id(self, object token) except -1:
        """``token`` as a token of this vocabulary, which is alive."""
        cdef llama.llama_token number = check_int("token", token, -2**31, 2**31 - 1)
        self.alive()
        self.check_token(number)
        return number

    cdef int check_token(self, llama.llama_token token) except -1:
        if token < 0 or token >= self.n_tokens:
            raise TokenError(
                f"token {token} is outside the vocabulary of {self.n_tokens} tokens",
                parameter="token", value=token)
        return 0

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"<Vocab {self.type} of {self.n_tokens} tokens>"

    @property
    def type(self) -> str:
        """The tokenizer: "spm", "bpe", "wpm", "ugm", "rwkv", "plamo2", "test" or "none"."""
        self.model.alive()
        return _VOCAB_TYPES.get(<int>llama.llama_get_vocab_type(self.ptr), "unknown")

    def tokenize(self, text: str | bytes, add_special: bool = True,
                 parse_special: bool = False) -> list[int]:
        """The tokens of ``text``.

        ``add_special`` adds beginning- and end-of-sequence tokens where the model wants them.
        ``parse_special`` turns the text of special tokens ("<eos>") into these tokens; leave it
        off for text from users. Releases the GIL. Raises ParameterError, OutOfMemoryError.
        """
        cdef bytes data
        try:
            # memoryview: bytes(5) would be five zeros.
            data = text.encode("utf-8") if isinstance(text, str) else bytes(memoryview(text))
        except (UnicodeEncodeError, TypeError) as error:
            raise ParameterError(
                f"text cannot be encoded as UTF-8: {error}", parameter="text", value=text) from None
        cdef Py_ssize_t length = PyBytes_GET_SIZE(data)
        if length > _MAX_TEXT:
            raise ParameterError(
                f"text has {length} bytes; at most {_MAX_TEXT} can be tokenized at once",
                parameter="text")
        cdef const char * chars = PyBytes_AS_STRING(data)
        cdef vector[llama.llama_token] tokens
        cdef vector[llama.llama_token] around
        cdef cpp_bool special = add_special
        cdef cpp_bool parse = parse_special
        cdef cpp_bool more = length > 0
        cdef unique_ptr[LongText] rest
        self.enter()
        try:
            with nogil:
                if special:
                    around = tokenize(self.ptr, chars, 0, True, parse)
                rest.reset(new LongText(self.ptr, chars, length, parse))
            while more:
                with nogil:
                    more = rest.get().next(tokens)
                PyErr_CheckSignals()
        finally:
            self.leave()
        if around.size() > 0:
            first = around.size() != 1 or llama.llama_vocab_get_add_bos(self.ptr)
            ends = around.size() != 1 or not first
            if first:
                tokens.insert(tokens.begin(), around[0])
            if ends:
                tokens.push_back(around.back())
        return tokens

    def detokenize(self, tokens, remove_special: bool = False,
                   unparse_special: bool = False) -> str:
        """The text of ``tokens``; bytes that are no UTF-8 become U+FFFD.

        ``remove_special`` drops a beginning- and end-of-sequence token that the model adds.
        ``unparse_special`` shows special tokens as text. Raises TokenError.
        """
        return self.detokenize_bytes(tokens, remove_special, unparse_special).decode(
            "utf-8", "replace")

    def detokenize_bytes(self, tokens, remove_special: bool = False,
                         unparse_special: bool = False) -> bytes:
        """As ``detokenize``, but exactly the bytes."""
        cdef vector[llama.llama_token] ids = token_vector(tokens)
        cdef size_t i
        for i in range(ids.size()):
            self.check_token(ids[i])
        self.alive()
        if ids.size() == 0:
            return b""
        if <Py_ssize_t>ids.size() > _MAX_TEXT // 8:
            raise ParameterError(
                f"{ids.size()} tokens are too many to detokenize at once", parameter="tokens")
        cdef cpp_bool remove = remove_special
        cdef cpp_bool unparse = unparse_special
        cdef int32_t n
        cdef vector[char] text
        self.enter()
        try:
            with nogil:
                text.resize(8 * ids.size() + 16)
                n = llama.llama_detokenize(self.ptr, ids.data(), <int32_t>ids.size(), text.data(),
                                           <int32_t>text.size(), remove, unparse)
                if n < 0:
                    text.resize(-n)
                    n = llama.llama_detokenize(self.ptr, ids.data(), <int32_t>ids.size(), text.data(),
                                               <int32_t>text.size(), remove, unparse)
        finally:
            self.leave()
        if n < 0:
            raise EngineError("llama.cpp could not detokenize", log=native_problem())
        return PyBytes_FromStringAndSize(text.data(), n)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes one token stands for; special tokens give text only if ``special``."""
        cdef cpp_bool shown = special
        cdef llama.llama_token id = self.token_id(token)
        cdef string out
        append_piece(self.ptr, id, shown, out)
        return out

    def text(self, token: int) -> bytes:
        """The token as the vocabulary stores it (with its own marks for spaces)."""
        return llama.llama_vocab_get_text(self.ptr, self.token_id(token))

    def score(self, token: int) -> float:
        """The token's score, as stored in the model file."""
        return llama.llama_vocab_get_score(self.ptr, self.token_id(token))

    def attributes(self, token: int) -> frozenset[str]:
        """What the token is: "normal", "control", "user_defined", "byte", "unknown", ..."""
        cdef int bits = <int>llama.llama_vocab_get_attr(self.ptr, self.token_id(token))
        return frozenset(name for name, bit in _TOKEN_ATTRIBUTES.items() if bits & bit)

    def is_eog(self, token: int) -> bool:
        """Whether the token ends generation (end of sequence, end of turn, ...)."""
        return llama.llama_vocab_is_eog(self.ptr, self.token_id(token))

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, which has no text of its own."""
        return llama.llama_vocab_is_control(self.ptr, self.token_id(token))

    @property
    def eog_tokens(self) -> list[int]:
        """All tokens that end generation."""
        self.alive()
        return list(self.find_eog()[0])

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens the model names: "bos", "eos", "eot", "sep", "nl", "pad", "mask",
        "fim_pre", "fim_suf", "fim_mid"; those it lacks are absent."""
        self.alive()
        found = {
            "bos": llama.llama_vocab_bos(self.ptr),
            "eos": llama.llama_vocab_eos(self.ptr),
            "eot": llama.llama_vocab_eot(self.ptr),
            "sep": llama.llama_vocab_sep(self.ptr),
            "nl": llama.llama_vocab_nl(self.ptr),
            "pad": llama.llama_vocab_pad(self.ptr),
            "mask": llama.llama_vocab_mask(self.ptr),
            "fim_pre": llama.llama_vocab_fim_pre(self.ptr),
            "fim_suf": llama.llama_vocab_fim_suf(self.ptr),
            "fim_mid": llama.llama_vocab_fim_mid(self.ptr),
        }
        return {name: token for name, token in found.items() if token >= 0}

    @property
    def bos(self) -> int | None:
        """The beginning-of-sequence token, if there is one."""
        self.alive()
        token = llama.llama_vocab_bos(self.ptr)
        return token if token >= 0 else None

    @property
    def eos(self) -> int | None:
        """The end-of-sequence token, if there is one."""
        self.alive()
        token = llama.llama_vocab_eos(self.ptr)
        return token if token >= 0 else None

    @property
    def adds_bos(self) -> bool:
        """Whether ``tokenize`` begins with the beginning-of-sequence token."""
        self.alive()
        return llama.llama_vocab_get_add_bos(self.ptr)

    @property
    def adds_eos(self) -> bool:
        """Whether ``tokenize`` ends with the end-of-sequence token."""
        self.alive()
        return llama.llama_vocab_get_add_eos(self.ptr)

    @property
    def adds_sep(self) -> bool:
        """Whether a separator stands between two texts that are read together."""
        self.alive()
        return llama.llama_vocab_get_add_sep(self.ptr)


cdef Vocab vocab_of(Model model):
    cdef Vocab vocab = Vocab.__new__(Vocab, maker)
    vocab.model = model
    vocab.ptr = llama.llama_model_get_vocab(model.ptr)
    vocab.n_tokens = llama.llama_vocab_n_tokens(vocab.ptr)
    return vocab


cdef llama.llama_token end_token(int n_vocab, object token) except -1:
    """A token that is to end a generation; TokenError if the vocabulary has none such."""
    number = check_int("stop_tokens", token, -2**31, 2**31 - 1)
    if not 0 <= number < n_vocab:
        raise TokenError(
            f"stop_tokens holds {number}, which is outside the vocabulary of {n_vocab} tokens",
            parameter="stop_tokens", value=number)
    return number


def upstream_tokenize(Vocab vocab not None, text: bytes, parse_special: bool = False) -> list[int]:
    """llama.cpp's tokens of the text as a whole, without those it adds: the measure of
    ``Vocab.tokenize``."""
    vocab.alive()
    cdef bytes data = _bytes("text", text)
    cdef const char * chars = PyBytes_AS_STRING(data)
    cdef int32_t n = check_int("the length of text", len(data), 0, _MAX_TEXT)
    cdef cpp_bool parse = parse_special
    cdef vector[llama.llama_token] tokens
    vocab.model.readers += 1
    try:
        with nogil:
            tokens = tokenize(vocab.ptr, chars, n, False, parse)
    finally:
        vocab.model.readers -= 1
    return tokens
