"""One generation on one sequence, driven from the calling thread: the scripting API's inner loop.

(The trio layer's is the decoder thread.)
"""

# A common beginning of fewer tokens is computed again.
WORTH_SHARING = decoding.WORTH_SHARING


cdef inline bint contains(const vector[llama.llama_token] & tokens, llama.llama_token token) noexcept nogil:
    cdef size_t i
    for i in range(tokens.size()):
        if tokens[i] == token:
            return True
    return False


cdef int go_back(Context context, const vector[llama.llama_token] & tokens, size_t most) except -1:
    """Leaves in sequence 0 what it still holds of the tokens, and nothing else: so many, at most
    ``most``, and none if they are few."""
    cdef size_t n = 0
    most = min(most, context.held.size()) if context.holds else 0
    while n < most and context.held[n] == tokens[n]:
        n += 1
    memory = context.memory
    if n < <size_t>decoding.WORTH_SHARING or not (
        memory.seq_rm(0, n, None) and memory.can_continue_at(0, n)
    ):
        n = 0
    if n == 0:
        memory.clear()
    context.held.resize(n)
    return <int>n


@cython.no_gc_clear
cdef class Generation:
    """Decodes a prompt and then a token at a time.

    context: the generation has it to itself until it is closed, and uses sequence 0.
    reuse: begin with what sequence 0 still holds of the prompt from the Generation before, WORTH_SHARING
        tokens or more, if nobody else was inside the context since; False: clear the context. What
        follows is then cut elsewhere than in one piece, so the result is the same up to rounding.
    sampler: fresh, or carrying what it should remember; it is shown prompt[accept_from:].
    prompt: tokens; params: a GenerationParams.

    ``step`` gives the next piece of text. Errors leave the generation finished ("error"), except
    BusyError: the context, the sampler or the generation serve another thread at the moment,
    or a view of the logits is alive.
    """

    def __cinit__(self, Context context not None, *args, **kwargs):
        self.context = context
        self.text.reset(new NativeTextStream())
        self.eog_token = -1
        self.token_logprobs = []

    def __init__(
        self, Context context not None, Sampler sampler not None, prompt, params, *, reuse: bool = False,
        accept_from: int = 0,
    ):
        if self.begun:
            raise BusyError("this Generation was begun already; make a new one")
        self.begun = True
        check_params(params)
        self.context = context
        self.sampler = sampler
        self.prompt = token_vector(prompt)
        self.n_keep = params.n_keep
        self.shift = params.context_overflow == "shift"
        self.special = params.special
        self.max_tokens = -1 if params.max_tokens is None else params.max_tokens
        self.logprobs = -1 if params.logprobs is None else params.logprobs
        self.causal_prompt = params.causal_attention
        self.embeddings = params.embeddings
        self.forces = self.logprobs < 0 and not self.embeddings
        self.reuse = reuse
        self.accept_from = check_int("accept_from", accept_from, 0, 2**31 - 1)
        for token in params.stop_tokens:
            self.end_tokens.push_back(end_token(len(context.model.vocab), token))
        cdef vector[string] stops = _utf8_list("stop", params.stop)
        context.alive()
        self.vocab = vocab_of(context.model)
        self.text.reset(new NativeTextStream(stops))
        self.stop_tokens = named_tokens(self.vocab.ptr, stops)
        self.stop_index = -1
        self.batch = Batch(max(1, min(context.n_ubatch, context.n_batch)))
        self.check_prompt()

    cdef int check_prompt(self) except -1:
        cdef int n = <int>self.prompt.size()
        cdef size_t i
        if n == 0:
            raise ParameterError("the prompt is empty: give at least one token", parameter="prompt")
        if n > self.context.n_ctx:
            raise ContextFullError(
                f"the prompt has {n} tokens and the context n_ctx={self.context.n_ctx}; shorten it,"
                " or open the model with a larger n_ctx", needed=n, n_ctx=self.context.n_ctx)
        for i in range(self.prompt.size()):
            self.vocab.check_token(self.prompt[i])
        if self.shift:
            if self.context.no_shift:
                raise UnsupportedError(
                    f'context_overflow="shift": {self.context.no_shift}; use "stop"')
            if self.n_keep < 0:
                self.n_keep = n
            if self.n_keep > self.context.n_ctx - 2:
                raise ParameterError(
                    f"n_keep={self.n_keep} leaves no room to shift in n_ctx={self.context.n_ctx}",
                    parameter="n_keep", value=self.n_keep)
        if not self.causal_prompt and n > self.context.n_ubatch:
            raise ParameterError(
                f"causal_attention=False computes the prompt at once: its {n} tokens are more than"
                f" n_ubatch={self.context.n_ubatch}", parameter="causal_attention", value=False)
        if self.embeddings:
            if self.context.pooling_ != <int>llama.LLAMA_POOLING_TYPE_NONE:
                raise UnsupportedError(
                    "embeddings=True gives the last token's hidden state, and this context pools;"
                    ' make it with pooling="none"')
            if not self.causal_prompt and n > self.context.n_outputs_max:
                raise ParameterError(
                    f"causal_attention=False with embeddings=True needs an output for each of the"
                    f" {n} tokens of the prompt; the context has"
                    f" n_outputs_max={self.context.n_outputs_max}",
                    parameter="causal_attention", value=False)
        return 0

    cdef int enter(self) except -1:
        if self.batch is None:
            raise ClosedError("this Generation was never initialised")
        self.context.alive()
        if self.busy or self.context.busy:
            raise BusyError("another thread is inside this Generation or its Context")
        self.sampler.enter()
        self.busy = True
        return 0

    cdef void leave(self) noexcept:
        self.busy = False
        self.sampler.leave()

    cdef int prefill(self) except -1:
        """Computes one ubatch more of the prompt, so that Ctrl-C gets a word in between."""
        cdef int n_prompt = <int>self.prompt.size()
        cdef int n = min(n_prompt - self.n_past, self.batch.capacity)
        cdef int i
        if self.embeddings:
            n = min(n, self.context.n_outputs_max)
        self.batch.clear()
        for i in range(n):
            self.batch.put(self.prompt[self.n_past + i], self.n_past + i, 0,
                           self.n_past + i == n_prompt - 1)
            if self.n_past + i >= self.accept_from:
                self.sampler.native.get().accept(self.prompt[self.n_past + i], False)
        if self.context.causal_ != self.causal_prompt:
            self.context.causal = self.causal_prompt
        try:
            self.context.decode(self.batch)
        finally:
            if not self.causal_prompt:      # then this was the whole prompt
                self.context.causal = True
        self.n_past += n
        self.prefilled = self.n_past == n_prompt
        self.note_held()
        return 0

    cdef int begin(self) except -1:
        cdef Context context = self.context
        cdef size_t most = self.prompt.size() - 1 if self.reuse and self.causal_prompt else 0
        cdef int i
        self.t_start = llama.llama_time_us()
        self.n_past = self.n_cached = go_back(context, self.prompt, most)
        for i in range(self.accept_from, self.n_past):
            self.sampler.native.get().accept(self.prompt[i], False)
        self.tracks = True
        if context.embeddings_ != self.embeddings:
            context.embeddings = self.embeddings
        return 0

    cdef void note_held(self) noexcept:
        cdef int i
        for i in range(self.batch.c.n_tokens):
            self.context.held.push_back(self.batch.c.token[i])

    def step(self) -> bytes | None:
        """The next piece of text (UTF-8, whole characters), or None once finished.

        A token that gives no text yet, being half a character or the start of a stop string, is
        followed by the next at once.
        """
        cdef string out
        if self.finish_reason is not None:
            return None
        self.context.check_no_views()
        self.enter()
        try:
            if self.t_start == 0:
                self.begin()
            else:
                self.tracks = self.tracks and self.context.holds
            while not self.prefilled:
                self.prefill()
                PyErr_CheckSignals()
            while out.empty() and self.finish_reason is None:
                self.next_token(out)
                PyErr_CheckSignals()
            # What was moved, or looked ahead, is not what a prompt would give.
            self.context.holds = self.tracks and self.causal_prompt and self.n_shifted == 0
        except BaseException:
            self.finish("error")
            raise
        finally:
            self.leave()
        return out if not out.empty() else None

    cdef int next_token(self, string & out) except -1:
        cdef llama.llama_token token
        cdef float * logits
        cdef string piece
        cdef bint ends = False
        cdef bint stops = False
        if self.n_generated == self.max_tokens:
            return self.end("length", out)
        if self.n_past + self.n_undecoded > self.context.n_ctx and not self.make_room():
            return self.end("context", out)
        if self.n_generated == 0:
            self.look_ahead()
        if self.n_forced < self.forced.size():
            token = self.forced[self.n_forced]
            self.sampler.native.get().accept(token, True)
            append_piece(self.vocab.ptr, token, self.special, piece)
            self.n_forced += 1
            return self.say(token, piece, out)
        self.context.enter()
        try:
            if self.n_undecoded:
                self.decode_last()
            logits = self.context.logits_row(-1)
            with nogil:
                token = self.sampler.native.get().sample(logits)
                ends = llama.llama_vocab_is_eog(self.vocab.ptr, token) or contains(self.end_tokens, token)
                stops = not ends and contains(self.stop_tokens, token)
                if not ends and not stops:
                    self.sampler.native.get().accept(token, True)
                    append_piece(self.vocab.ptr, token, self.special, piece)
            if not ends and not stops and self.logprobs >= 0:
                self.note_logprobs(logits, token)
        finally:
            self.context.leave()
        if ends:
            self.eog_token = token
            return self.end("eos", out)
        if stops:
            self.stop_index = list(self.stop_tokens).index(token)
            return self.end("stop", out)
        self.look_ahead()
        return self.say(token, piece, out)

    cdef int say(self, llama.llama_token token, const string & piece, string & out) except -1:
        if self.n_generated == 0:
            self.t_first = llama.llama_time_us()
        self.tokens.push_back(token)
        self.n_generated += 1
        self.n_undecoded += 1
        if self.text.get().feed(piece.data(), piece.size(), out):
            self.stop_index = self.text.get().matched_stop()
            self.finish("stop")
        return 0

    cdef int look_ahead(self) except -1:
        """Finds what comes next without a choice."""
        cdef size_t n = 0
        self.n_forced = 0
        self.forced.clear()
        if self.forces:
            with nogil:
                self.forced = self.sampler.native.get().forced()
            while n < self.forced.size() and not self.ends_it(self.forced[n]):
                n += 1
            self.forced.resize(n)
        return 0

    cdef bint ends_it(self, llama.llama_token token) noexcept:
        return (llama.llama_vocab_is_eog(self.vocab.ptr, token) or contains(self.end_tokens, token)
                or contains(self.stop_tokens, token))

    cdef int decode_last(self) except -1:
        """As Context.decode, without the checks that tokens of the model's own cannot fail."""
        cdef size_t first
        cdef int n, i
        self.context.check_no_views()
        while self.n_undecoded:
            n = min(self.n_undecoded, self.batch.capacity)
            first = self.tokens.size() - self.n_undecoded
            self.batch.c.n_tokens = 0
            for i in range(n):
                self.batch.put(self.tokens[first + i], self.n_past + i, 0, i + 1 == self.n_undecoded)
            self.context.compute(self.batch, False)
            self.context.note_outputs(self.batch, False)
            self.note_held()
            self.n_past += n
            self.n_undecoded -= n
        return 0

    cdef int make_room(self) except -1:
        """Drops the older half of what follows the first n_keep tokens, as llama-completion does."""
        cdef int n_discard
        if not self.shift:
            return False
        memory = self.context.memory
        n_discard = max(1, (self.n_past - self.n_keep) // 2)
        memory.seq_rm(0, self.n_keep, self.n_keep + n_discard)
        memory.seq_add(0, self.n_keep + n_discard, self.n_past, -n_discard)
        self.n_past -= n_discard
        self.n_shifted += n_discard
        self.drops.push_back(n_discard)
        return memory.can_continue_at(0, self.n_past)

    cdef int note_logprobs(self, const float * logits, llama.llama_token token) except -1:
        cdef vector[sampling.TokenLogprob] top
        cdef size_t i
        cdef double log_sum = sampling.log_sum_exp(logits, self.vocab.n_tokens)
        alternatives = []
        if self.logprobs > 0:
            sampling.top_logprobs(logits, self.vocab.n_tokens, self.logprobs, top)
            alternatives = [(top[i].id, top[i].logprob) for i in range(top.size())]
        self.token_logprobs.append((token, logits[token] - log_sum, alternatives))
        return 0

    cdef int end(self, str reason, string & out) except -1:
        """Finishes, and lets out what was held back as the possible start of a stop string."""
        self.text.get().flush(out)
        self.finish(reason)
        return 0

    cdef int finish(self, str reason) except -1:
        if self.finish_reason is None:
            self.finish_reason = reason
            self.t_end = llama.llama_time_us()
        return 0

    def cancel(self) -> None:
        """Finish now, with reason "cancelled"; nothing happens if finished already."""
        self.finish("cancelled")

    def embedding(self):
        """Final hidden state of the last token computed, float32 of shape [n_embd], a copy."""
        return self.context.token_embedding(-1, copy=True)

    def usage(self) -> tuple[int, int, int, int, int, int, int]:
        """n_prompt, of those n_cached, n_generated, n_shifted tokens; start, first token, end (or now) in
        microseconds, 0 for what has not happened."""
        return (<int>self.prompt.size() if self.prefilled else self.n_past, self.n_cached,
                self.n_generated, self.n_shifted, self.t_start, self.t_first,
                self.t_end or llama.llama_time_us())

    @property
    def generated(self) -> list[int]:
        """The tokens generated so far; an end-of-generation token is not among them."""
        return self.tokens

    @property
    def matched_stop(self) -> int:
        """Index of the stop string that ended the text, or -1."""
        return self.stop_index

    @property
    def position(self) -> int:
        """How many tokens of prompt and answer are in memory."""
        return self.n_past

    @property
    def shifts(self) -> list[int]:
        """How many tokens each shift forgot."""
        return self.drops


def score_tokens(Context context not None, tokens, n_given: int = 1, *, reuse: bool = False):
    """Log-probabilities of tokens[n_given:], each given all before it.

    reuse: begin with what sequence 0 still holds of the given tokens, as a Generation does; False:
    clear the context. Returns float32 of shape [len(tokens) - n_given]. Natural logarithms, sums
    in double. Raises ParameterError, TokenError, ContextFullError.
    """
    cdef vector[llama.llama_token] ids = token_vector(tokens)
    cdef int n = <int>ids.size()
    cdef int given = check_int("n_given", n_given, 1, 2**31 - 1)
    cdef int start = 0
    cdef int i
    cdef int count
    cdef float * logits
    import numpy
    context.alive()
    if n > context.n_ctx:
        raise ContextFullError(
            f"the text has {n} tokens and the context n_ctx={context.n_ctx}",
            needed=n, n_ctx=context.n_ctx)
    for i in range(n):      # the last one is never decoded, so decode() would not check it
        if ids[i] < 0 or ids[i] >= context.n_vocab:
            raise TokenError(
                f"token {ids[i]} is outside the vocabulary of {context.n_vocab} tokens",
                parameter="tokens", value=ids[i])
    if n <= given:
        raise ParameterError(
            f"there is nothing to score: {n} tokens, of which {given} are given", parameter="tokens")
    result = numpy.empty(n - given, dtype=numpy.float32)
    cdef float[::1] out = result
    cdef Batch batch = Batch(min(context.n_ubatch, context.n_batch))
    if reuse:
        start = go_back(context, ids, given - 1)
    else:
        context.memory.clear()
        context.held.clear()
    # The last token predicts nothing that is asked for, so it is not computed.
    while start < n - 1:
        batch.clear()
        if start + 1 < given:   # predictions before the first scored token need no output
            count = min(given - 1 - start, batch.capacity)
        else:
            count = min(min(n - 1 - start, batch.capacity), context.n_outputs_max)
        for i in range(count):
            batch.put(ids[start + i], start + i, 0, start + i + 1 >= given)
        context.decode(batch)
        for i in range(count):
            context.held.push_back(ids[start + i])
        PyErr_CheckSignals()
        context.enter()
        try:
            for i in range(count):
                if start + i + 1 >= given:
                    logits = context.logits_row(i)
                    with nogil:
                        out[start + i + 1 - given] = <float>(
                            logits[ids[start + i + 1]] - sampling.log_sum_exp(logits, context.n_vocab))
        finally:
            context.leave()
        start += count
    context.holds = True
    return result


def embed_tokens(Context context not None, tokens, pooling: str):
    """Embedding of one text: float32 of shape [n_embd], or [len(tokens), n_embd] for "none".

    For decoders: token embeddings computed a ubatch at a time and pooled here ("mean", "cls": the
    first token's, "last", "none"), so memory does not grow with the text. Without causal attention
    the text must fit into one ubatch. Clears the context, which must have embeddings=True and
    pooling="none".
    """
    cdef vector[llama.llama_token] ids = token_vector(tokens)
    cdef int n = <int>ids.size()
    cdef int start = 0
    cdef int i
    cdef int count
    import numpy
    context.alive()
    if n == 0:
        raise ParameterError("there are no tokens to embed", parameter="tokens")
    if n > context.n_ctx:
        raise ContextFullError(
            f"the text has {n} tokens and the context n_ctx={context.n_ctx}",
            needed=n, n_ctx=context.n_ctx)
    cdef Batch batch = Batch(min(min(context.n_ubatch, context.n_batch), context.n_outputs_max))
    if n > batch.capacity and not context.causal_:
        raise ParameterError(
            f"the text has {n} tokens; without causal attention at most n_ubatch={batch.capacity}"
            " can be embedded", parameter="tokens", value=n)
    rows = numpy.empty((n, context.n_embd), dtype=numpy.float32)
    if context.mem != NULL:         # what only encodes has none
        context.memory.clear()
    while start < n:
        batch.clear()
        count = min(n - start, batch.capacity)
        for i in range(count):
            batch.put(ids[start + i], start + i, 0, True)
        context.decode(batch)
        PyErr_CheckSignals()
        for i in range(count):
            rows[start + i] = context.token_embedding(i)
        start += count
    if pooling == "none":
        return rows
    if pooling == "mean":
        return rows.mean(axis=0, dtype=numpy.float64).astype(numpy.float32)
    return rows[0 if pooling == "cls" else n - 1].copy()
