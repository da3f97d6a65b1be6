"""llama.cpp's own sampler chain, built from the same parameters: the measure of ours."""
from libc.math cimport INFINITY


@cython.no_gc_clear
cdef class UpstreamSampler:
    """llama.cpp's own samplers with the parameters and in the order of ``Sampler``.

    For comparison: it sorts the vocabulary where ours does not, and its state cannot be saved.
    Grammars are applied as in llama.cpp's programs: a first choice is checked alone, and only if
    it does not fit are all tokens checked and a second choice made.
    """

    def __cinit__(self, Vocab vocab not None, *args, **kwargs):
        self.vocab = vocab
        self.chain = NULL

    def __init__(self, Vocab vocab not None, params, *, n_ctx: int = 2048):
        cdef sampling.SamplingParams p
        cdef vector[const char *] breakers
        cdef size_t i
        cdef sampling.Stage stage
        to_native_params(params, vocab, check_int("n_ctx", n_ctx, 1, 2**31 - 1), p)
        vocab.alive()
        if self.chain != NULL:
            raise BusyError("this UpstreamSampler was made already; make a new one")
        self.vocab = vocab
        self.chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self.add_bans(p)
        for i in range(p.dry_breakers.size()):
            breakers.push_back(p.dry_breakers[i].c_str())
        for i in range(p.stages.size()):
            stage = p.stages[i]
            if stage == sampling.Stage.logit_bias:
                self.add(llama.llama_sampler_init_logit_bias(
                    vocab.n_tokens, <int32_t>p.logit_bias.size(), p.logit_bias.data()))
            elif stage == sampling.Stage.penalties:
                self.add(llama.llama_sampler_init_penalties(
                    vocab.n_tokens, p.penalty_last_n, p.repeat_penalty, p.frequency_penalty,
                    p.presence_penalty))
            elif stage == sampling.Stage.dry:
                self.add(llama.llama_sampler_init_dry(
                    vocab.ptr, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_last_n,
                    breakers.data(), breakers.size()))
            elif stage == sampling.Stage.temperature:
                if p.mirostat:
                    self.add(llama.llama_sampler_init_temp(p.temperature))
                else:
                    self.add(llama.llama_sampler_init_temp_ext(
                        p.temperature, p.dynatemp_range, p.dynatemp_exponent))
            elif p.mirostat:
                continue
            elif stage == sampling.Stage.top_n_sigma:
                self.add(llama.llama_sampler_init_top_n_sigma(p.top_n_sigma))
            elif stage == sampling.Stage.top_k:
                self.add(llama.llama_sampler_init_top_k(p.top_k))
            elif stage == sampling.Stage.typical_p:
                self.add(llama.llama_sampler_init_typical(p.typical_p, p.min_keep))
            elif stage == sampling.Stage.top_p:
                self.add(llama.llama_sampler_init_top_p(p.top_p, p.min_keep))
            elif stage == sampling.Stage.min_p:
                self.add(llama.llama_sampler_init_min_p(p.min_p, p.min_keep))
            else:
                self.add(llama.llama_sampler_init_xtc(
                    p.xtc_probability, p.xtc_threshold, p.min_keep, p.seed))
        if p.mirostat == 1:
            self.add(llama.llama_sampler_init_mirostat(
                vocab.n_tokens, p.seed, p.mirostat_tau, p.mirostat_eta, p.mirostat_m))
        elif p.mirostat == 2:
            self.add(llama.llama_sampler_init_mirostat_v2(p.seed, p.mirostat_tau, p.mirostat_eta))
        elif p.adaptive_target >= 0:
            self.add(llama.llama_sampler_init_adaptive_p(p.adaptive_target, p.adaptive_decay, p.seed))
        else:
            self.add(llama.llama_sampler_init_dist(p.seed))
        self.grammar.reset()
        if not p.grammar.empty():
            self.grammar = make_grammar(vocab.ptr, p.grammar)

    def __dealloc__(self):
        if self.chain != NULL:
            llama.llama_sampler_free(self.chain)

    cdef void add(self, llama.llama_sampler * sampler) noexcept:
        llama.llama_sampler_chain_add(self.chain, sampler)

    cdef int add_bans(self, sampling.SamplingParams & p) except -1:
        cdef vector[llama.llama_logit_bias] bans
        cdef llama.llama_logit_bias ban
        cdef int32_t n = 0
        cdef const llama.llama_token * suppressed = llama.llama_vocab_get_suppress_tokens(self.vocab.ptr, &n)
        cdef int32_t i
        ban.bias = -INFINITY
        for i in range(n):
            ban.token = suppressed[i]
            bans.push_back(ban)
        for i in p.banned:
            ban.token = i
            bans.push_back(ban)
        self.add(llama.llama_sampler_init_logit_bias(self.vocab.n_tokens, <int32_t>bans.size(), bans.data()))
        return 0

    cdef int choose(self, const float[::1] logits, cpp_bool masked, llama.llama_token * token) except -1:
        cdef llama.llama_token_data_array array
        cdef llama.llama_token i
        cdef Py_ssize_t left = 0
        self.tokens.resize(logits.shape[0])
        for i in range(<int>logits.shape[0]):
            self.tokens[i].id = i
            self.tokens[i].logit = logits[i]
            self.tokens[i].p = 0
        if masked:
            self.grammar.get().mask(self.tokens)
        for i in range(<int>self.tokens.size()):
            left += self.tokens[i].logit > -INFINITY
            if self.tokens[i].logit != self.tokens[i].logit or self.tokens[i].logit == INFINITY:
                raise EngineError("the logits hold NaN or infinity")
        if left == 0:
            if masked:
                raise GrammarError("no token of the vocabulary continues the text under the grammar")
            raise ParameterError("every logit is -inf: there is nothing to choose from")
        array.data = self.tokens.data()
        array.size = self.tokens.size()
        array.selected = -1
        array.sorted = False
        with nogil:
            llama.llama_sampler_apply(self.chain, &array)
        if array.selected < 0:
            raise EngineError("llama.cpp's chain chose no token")
        token[0] = array.data[array.selected].id
        return 0

    cdef int enter(self) except -1:
        if self.chain == NULL:
            raise ClosedError("this UpstreamSampler was never initialised")
        if self.busy:
            raise BusyError("another thread is inside this UpstreamSampler")
        self.vocab.enter()
        self.busy = True
        return 0

    cdef void leave(self) noexcept:
        self.busy = False
        self.vocab.leave()

    def sample(self, logits) -> int:
        """The token chosen from ``logits`` (float32, contiguous), which are left as they are."""
        cdef const float[::1] view = _logits_view(logits, self.vocab.n_tokens)
        cdef llama.llama_token token = 0
        self.enter()
        try:
            self.choose(view, False, &token)
            while self.grammar.get() != NULL and not self.grammar.get().allows(token):
                self.choose(view, True, &token)
        finally:
            self.leave()
        return token

    def accept(self, token: int, generated: bool = True) -> None:
        """Record a token, generated or of the prompt. Raises TokenError and GrammarError."""
        cdef llama.llama_token id = check_int("token", token, -2**31, 2**31 - 1)
        cdef cpp_bool is_generated = generated
        self.vocab.check_token(id)
        self.enter()
        try:
            if is_generated and self.grammar.get() != NULL:
                self.grammar.get().accept(id)
            llama.llama_sampler_accept(self.chain, id)
        finally:
            self.leave()
