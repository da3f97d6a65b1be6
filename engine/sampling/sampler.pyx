"""From logits to a token: the chain of engine/sampling/sampler.hpp for Python, and log-probabilities."""
from triollama.params import GenerationParams, draw_seed

from libc.stdint cimport int32_t
from libc.string cimport memcpy
from libcpp.string_view cimport string_view


cdef dict _STAGES = {
    "logit_bias": <int>sampling.Stage.logit_bias,
    "penalties": <int>sampling.Stage.penalties,
    "dry": <int>sampling.Stage.dry,
    "top_n_sigma": <int>sampling.Stage.top_n_sigma,
    "top_k": <int>sampling.Stage.top_k,
    "typical_p": <int>sampling.Stage.typical_p,
    "top_p": <int>sampling.Stage.top_p,
    "min_p": <int>sampling.Stage.min_p,
    "xtc": <int>sampling.Stage.xtc,
    "temperature": <int>sampling.Stage.temperature,
}

# The largest finite float32: what a logit can be moved by.
cdef double _LARGEST_BIAS = 3.4028234663852886e38


cdef int check_params(object params) except -1:
    if not isinstance(params, GenerationParams):
        raise ParameterError(
            f"params must be a GenerationParams, not {shown(params)}", parameter="params", value=params)
    return 0


cdef int to_native_params(object params, Vocab vocab, int n_ctx, sampling.SamplingParams & out) except -1:
    """A GenerationParams as the native chain takes it. -1 as a lookback becomes n_ctx; a seed of
    None is drawn here."""
    cdef llama.llama_logit_bias bias
    check_params(params)
    out.seed = draw_seed() if params.seed is None else params.seed
    out.stages.clear()
    for name in params.samplers:
        out.stages.push_back(<sampling.Stage><int>_STAGES[name])
    out.min_keep = params.min_keep
    out.temperature = params.temperature
    out.dynatemp_range = params.dynatemp_range
    out.dynatemp_exponent = params.dynatemp_exponent
    out.top_k = params.top_k
    out.top_p = params.top_p
    out.min_p = params.min_p
    out.typical_p = params.typical_p
    out.top_n_sigma = params.top_n_sigma
    out.xtc_probability = params.xtc_probability
    out.xtc_threshold = params.xtc_threshold
    out.repeat_penalty = params.repeat_penalty
    out.frequency_penalty = params.frequency_penalty
    out.presence_penalty = params.presence_penalty
    out.penalty_last_n = n_ctx if params.repetition_lookback < 0 else params.repetition_lookback
    out.dry_multiplier = params.dry_multiplier
    out.dry_base = params.dry_base
    out.dry_allowed_length = params.dry_allowed_length
    out.dry_last_n = n_ctx if params.dry_last_n < 0 else params.dry_last_n
    out.dry_breakers = _utf8_list("dry_breakers", params.dry_breakers)
    out.mirostat = params.mirostat
    out.mirostat_tau = params.mirostat_tau
    out.mirostat_eta = params.mirostat_eta
    out.adaptive_target = params.adaptive_target
    out.adaptive_decay = params.adaptive_decay
    out.banned.clear()
    if params.ignore_eos:
        out.banned = vocab.find_eog()[0]
    out.logit_bias.clear()
    for item, value in params.logit_bias.items():
        token = check_int("logit_bias's token", item, 0, 2**31 - 1)
        vocab.check_token(token)
        if value != -float("inf") and abs(value) > _LARGEST_BIAS:
            raise ParameterError(
                f"logit_bias[{token}] is {shown(value)}; beyond the range of float32 only -inf is a bias",
                parameter="logit_bias", value=value)
        bias.token = token
        bias.bias = value
        out.logit_bias.push_back(bias)
    fill_grammar(params, vocab, out.grammar)
    return 0


cdef bytes _utf8(str name, object text):
    if not isinstance(text, str):
        raise ParameterError(f"{name} must be a string, not {shown(text)}", parameter=name, value=text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"{name} cannot be encoded as UTF-8: {error}", parameter=name, value=text) from None


cdef tuple _items(str name, object given):
    """What is given, which must be several things, as a tuple; ParameterError otherwise."""
    if not isinstance(given, (str, bytes)):
        try:
            return tuple(given)
        except TypeError:
            pass
    raise ParameterError(
        f"{name} must be a list or another iterable, not {shown(given)}", parameter=name, value=given)


cdef list _utf8_list(str name, object texts):
    return [_utf8(name, text) for text in _items(name, texts)]


cdef const float[::1] _floats(object logits):
    cdef const float[::1] view
    try:
        view = logits
    except (TypeError, ValueError, BufferError) as error:
        raise ParameterError(
            f"logits must be a contiguous buffer of float32: {error}", parameter="logits") from None
    if view is None:        # which Cython takes for any buffer
        raise ParameterError("logits is None", parameter="logits")
    return view


cdef const float[::1] _logits_view(object logits, int n_vocab):
    cdef const float[::1] view = _floats(logits)
    if view.shape[0] != n_vocab:
        raise ParameterError(
            f"logits has {view.shape[0]} values; the vocabulary has {n_vocab} tokens",
            parameter="logits")
    return view


@cython.no_gc_clear
cdef class Sampler:
    """Chooses the tokens of one sequence.

    vocab: of the model whose logits it will see.
    params: a GenerationParams; a ``seed`` of None draws one, see ``seed``.
    n_ctx: tokens that a lookback of -1 stands for.
    trigger_patterns, trigger_tokens: with any of these the grammar is lazy: text is free until a
    regular expression (ECMAScript) matches it, or one of the tokens appears; the grammar then
    applies from the pattern's first group, or the token, on.

    For a seed the tokens equal those of llama.cpp's own samplers (see ``UpstreamSampler``):
    exactly if the first stage that drops tokens is top_k or min_p, or if the choice is greedy;
    otherwise up to the rounding of sums over the vocabulary.

    Raises ParameterError, TokenError and GrammarError. One thread at a time: BusyError.
    """

    def __cinit__(self, Vocab vocab not None, *args, **kwargs):
        self.vocab = vocab

    def __init__(self, Vocab vocab not None, params, *, n_ctx: int = 2048,
                 trigger_patterns=(), trigger_tokens=()):
        cdef sampling.SamplingParams native
        if self.begun:
            raise BusyError("this Sampler was made already; make a new one, or see update()")
        self.begun = True
        self.vocab = vocab
        self.n_ctx = check_int("n_ctx", n_ctx, 1, 2**31 - 1)
        self.trigger_patterns = _items("trigger_patterns", trigger_patterns)
        self.trigger_tokens = _items("trigger_tokens", trigger_tokens)
        self.params_ = params
        self.fill(native, params)
        vocab.enter()
        try:
            with nogil:
                self.native.reset(new sampling.Sampler(vocab.ptr, native))
        except GrammarError as error:
            blame(params, vocab, error)
            raise
        finally:
            vocab.leave()

    cdef int fill(self, sampling.SamplingParams & native, object params) except -1:
        to_native_params(params, self.vocab, self.n_ctx, native)
        native.grammar.lazy = bool(self.trigger_patterns or self.trigger_tokens)
        if native.grammar.lazy and native.grammar.syntax != syntax_gbnf:
            raise ParameterError(
                "triggers are for grammars in GBNF alone", parameter="trigger_patterns")
        native.grammar.trigger_patterns = _utf8_list("trigger_patterns", self.trigger_patterns)
        for item in self.trigger_tokens:
            token = check_int("trigger_tokens", item, 0, 2**31 - 1)
            self.vocab.check_token(token)
            native.grammar.trigger_tokens.push_back(token)
        return 0

    cdef int enter(self) except -1:
        if self.native.get() == NULL:
            raise ClosedError("this Sampler was never initialised")
        if self.busy:
            raise BusyError("another thread is inside this Sampler; it serves one thread at a time")
        self.vocab.enter()      # which DRY and grammars read
        self.busy = True
        return 0

    cdef void leave(self) noexcept:
        self.busy = False
        self.vocab.leave()

    def sample(self, logits) -> int:
        """The token chosen from ``logits``: float32, contiguous, one value for each token.

        Does not record it: see ``accept``. ``logits`` is the same afterwards; some values change
        during the call, so a read-only buffer is copied. Releases the GIL.

        Raises GrammarError if no token continues the text, ParameterError if every token is
        banned, EngineError if the logits hold NaN or +inf.
        """
        cdef const float[::1] view = _logits_view(logits, self.vocab.n_tokens)
        cdef float[::1] writable
        cdef vector[float] copy
        cdef float * data
        cdef llama.llama_token token
        try:
            writable = logits
            if writable.shape[0] != view.shape[0]:
                raise ParameterError("logits changed its length", parameter="logits")
            data = &writable[0]
        except (TypeError, ValueError, BufferError):
            copy.resize(view.shape[0])
            data = copy.data()
            memcpy(data, &view[0], view.shape[0] * sizeof(float))
        self.enter()
        try:
            with nogil:
                token = self.native.get().sample(data)
        finally:
            self.leave()
        return token

    def accept(self, token: int, generated: bool = True) -> None:
        """Record a token of the sequence.

        Penalties and DRY count generated tokens and those of the prompt (``generated=False``);
        the grammar counts generated ones only. Raises TokenError, and GrammarError if the token
        may not follow; nothing is recorded then.
        """
        cdef llama.llama_token id = check_int("token", token, -2**31, 2**31 - 1)
        cdef cpp_bool is_generated = generated
        self.vocab.check_token(id)
        self.enter()
        try:
            with nogil:
                self.native.get().accept(id, is_generated)
        finally:
            self.leave()

    def candidates(self):
        """What the last ``sample`` chose among: (ids, probabilities), most likely first.

        Arrays of int32 and float32. Tokens without probability are left out; the probabilities
        are those of the draw, after all stages, and sum to 1. Empty before the first ``sample``.
        """
        import numpy
        cdef vector[llama.llama_token_data] found
        cdef size_t i
        self.enter()
        try:
            with nogil:
                self.native.get().candidates(found)
        finally:
            self.leave()
        ids = numpy.empty(found.size(), dtype=numpy.int32)
        probabilities = numpy.empty(found.size(), dtype=numpy.float32)
        cdef int32_t[::1] id_view = ids
        cdef float[::1] probability_view = probabilities
        for i in range(found.size()):
            id_view[i] = found[i].id
            probability_view[i] = found[i].p
        return ids, probabilities

    def reset(self) -> None:
        """Back to the state after construction: same seed, no history."""
        self.enter()
        try:
            self.native.get().reset()
        finally:
            self.leave()

    def clone(self) -> Sampler:
        """A sampler in the same state, independent from here on."""
        cdef Sampler copy = Sampler.__new__(Sampler, self.vocab)
        self.enter()
        try:
            copy.native.reset(self.native.get().clone().release())
        finally:
            self.leave()
        copy.begun = True
        copy.n_ctx = self.n_ctx
        copy.trigger_patterns = self.trigger_patterns
        copy.trigger_tokens = self.trigger_tokens
        copy.params_ = self.params_
        return copy

    def update(self, params) -> None:
        """Other parameters from the next token on.

        History and random state stay, so ``params.seed`` is not looked at; so do the averages of
        mirostat and adaptive-p if the new parameters use them too, and the place in the grammar
        if it is the same grammar. A new grammar begins here. If it raises, nothing has changed.
        """
        cdef sampling.SamplingParams native
        self.fill(native, params)
        self.enter()
        try:
            with nogil:
                self.native.get().update(native)
        except GrammarError as error:
            blame(params, self.vocab, error)
            raise
        finally:
            self.leave()
        self.params_ = params

    def save_state(self) -> bytes:
        """All that decides the next tokens, besides the parameters: random state, averages,
        history, place in the grammar. Small (kilobytes), versioned, independent of the machine."""
        self.enter()
        try:
            return self.native.get().save_state()
        finally:
            self.leave()

    def load_state(self, state: bytes) -> None:
        """Continue from ``save_state`` of a sampler with the same vocabulary and grammar.

        Raises StateError, changing nothing, if the bytes are damaged or do not fit.
        """
        cdef string data = _bytes("state", state)
        self.enter()
        try:
            with nogil:
                self.native.get().load_state(string_view(data.data(), data.size()))
        finally:
            self.leave()

    def forced(self) -> list[int]:
        """Tokens that come next whatever is sampled, since the grammar leaves no choice: cut as the
        model's tokenizer would cut their text. Nothing is recorded."""
        cdef vector[llama.llama_token] found
        self.enter()
        try:
            with nogil:
                found = self.native.get().forced()
        finally:
            self.leave()
        return found

    def is_grammar_done(self) -> bool:
        """Whether a grammar is set and nothing but the end of generation may follow.

        May try the whole vocabulary: milliseconds.
        """
        cdef cpp_bool done
        self.enter()
        try:
            with nogil:
                done = self.native.get().is_grammar_done()
        finally:
            self.leave()
        return done

    @property
    def seed(self) -> int:
        """The seed in effect: drawn if it was None, that of the state after ``load_state``."""
        self.enter()
        try:
            return self.native.get().seed()
        finally:
            self.leave()

    @property
    def params(self):
        """The GenerationParams in effect."""
        return self.params_

    @property
    def vocabulary(self) -> Vocab:
        """The vocabulary it chooses from."""
        return self.vocab

    def __repr__(self) -> str:
        return f"<Sampler over {self.vocab.n_tokens} tokens>"


cdef sampling.Sampler * copy_sampler(Sampler sampler) except NULL:
    """A native sampler in the same state, for a thread that needs no GIL. The caller owns it."""
    sampler.enter()
    try:
        return sampler.native.get().clone().release()
    finally:
        sampler.leave()


def logit_logprobs(logits, k: int):
    """The k most likely tokens under softmax(logits): (ids, log-probabilities), most likely first.

    ``logits``: float32, contiguous. Natural logarithms, summed in double; arrays of int32 and
    float32. Tokens with a logit of -inf are left out. Raises ParameterError, and EngineError if
    the logits hold NaN or +inf.
    """
    import numpy
    cdef const float[::1] view = _floats(logits)
    cdef vector[sampling.TokenLogprob] found
    cdef int32_t count = check_int("k", k, 0, 2**31 - 1)
    cdef size_t i
    if view.shape[0] == 0 or view.shape[0] > 2**31 - 1:
        raise ParameterError(f"logits has {view.shape[0]} values", parameter="logits")
    cdef int32_t n = <int32_t>view.shape[0]
    with nogil:
        sampling.top_logprobs(&view[0], n, count, found)
    ids = numpy.empty(found.size(), dtype=numpy.int32)
    logprobs = numpy.empty(found.size(), dtype=numpy.float32)
    cdef int32_t[::1] id_view = ids
    cdef float[::1] logprob_view = logprobs
    for i in range(found.size()):
        id_view[i] = found[i].id
        logprob_view[i] = found[i].logprob
    return ids, logprobs
