"""The context: a model's working memory, and the calls that compute."""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE

from kv cimport line_up, settle, why_no_shift

cdef extern from "llama/compute.hpp" namespace "triollama::native" nogil:
    int guarded_decode(
        llama.llama_context * ctx, const llama.llama_batch & batch) except +raise_native_error
    int guarded_encode(
        llama.llama_context * ctx, const llama.llama_batch & batch) except +raise_native_error

cdef extern from "llama/exact.hpp" namespace "triollama::native" nogil:
    string make_exact(llama.llama_context * ctx) except +raise_native_error
    bint has_flash_attention(const llama.llama_context * ctx) noexcept
    string rearranged(const llama.llama_model * model) except +raise_native_error

cdef extern from "llama/load.hpp" namespace "triollama::native" nogil:
    llama.llama_context * make_context(
        llama.llama_model * model, const llama.llama_context_params & params) except +raise_native_error


cdef dict timings_dict(map[string, profile.Timing] timings):
    return {
        timing.first.decode(): (timing.second.seconds, timing.second.calls)
        for timing in timings}


cdef dict _KV_TYPES = {
    "f32": <int>ggml.GGML_TYPE_F32,
    "f16": <int>ggml.GGML_TYPE_F16,
    "bf16": <int>ggml.GGML_TYPE_BF16,
    "q8_0": <int>ggml.GGML_TYPE_Q8_0,
    "q5_1": <int>ggml.GGML_TYPE_Q5_1,
    "q5_0": <int>ggml.GGML_TYPE_Q5_0,
    "q4_1": <int>ggml.GGML_TYPE_Q4_1,
    "q4_0": <int>ggml.GGML_TYPE_Q4_0,
    "iq4_nl": <int>ggml.GGML_TYPE_IQ4_NL,
}
cdef dict _FLASH_ATTN = {
    "auto": <int>llama.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "off": <int>llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "on": <int>llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}
cdef dict _POOLING = {
    "model": <int>llama.LLAMA_POOLING_TYPE_UNSPECIFIED,
    "none": <int>llama.LLAMA_POOLING_TYPE_NONE,
    "mean": <int>llama.LLAMA_POOLING_TYPE_MEAN,
    "cls": <int>llama.LLAMA_POOLING_TYPE_CLS,
    "last": <int>llama.LLAMA_POOLING_TYPE_LAST,
    "rank": <int>llama.LLAMA_POOLING_TYPE_RANK,
}
cdef dict _ROPE_SCALING = {
    "model": <int>llama.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
    "none": <int>llama.LLAMA_ROPE_SCALING_TYPE_NONE,
    "linear": <int>llama.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "yarn": <int>llama.LLAMA_ROPE_SCALING_TYPE_YARN,
    "longrope": <int>llama.LLAMA_ROPE_SCALING_TYPE_LONGROPE,
}

# Beyond this no machine has memory, and sums of sizes could overflow.
cdef int _MAX_CTX = 2**28


def default_threads() -> int:
    """Threads used unless told otherwise: the processors this process may run on, no more than a
    quota of its container or service pays for, at most 16."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:
        count = os.cpu_count() or 1
    from triollama.cgroups import limits
    for (told,) in limits("cpu.max"):
        quota, _, period = told.partition(" ")
        if quota.isdecimal():  # not "max"
            count = min(count, int(quota) // int(period))
    return max(1, min(count, 16))


cdef int set_cache(llama.llama_context_params * params, type_k, type_v, flash_attn) except -1:
    """What the cache holds, and how it is read. ParameterError for what no model can have."""
    params.type_k = <ggml.ggml_type><int>check_choice("type_k", type_k, _KV_TYPES)
    params.type_v = <ggml.ggml_type><int>check_choice("type_v", type_v, _KV_TYPES)
    params.flash_attn_type = <llama.llama_flash_attn_type><int>check_choice(
        "flash_attn", flash_attn, _FLASH_ATTN)
    if ggml.ggml_blck_size(params.type_v) > 1 and flash_attn == "off":
        raise ParameterError(
            f"type_v={type_v!r} is quantised, which needs flash attention",
            parameter="type_v", value=type_v)
    return 0


cdef object wrong_cache(type_k, type_v, object why):
    """The exception for types that cannot hold the heads of this model, as llama/load.hpp found."""
    return ParameterError(
        f"type_k={type_k!r}, type_v={type_v!r}: {why}", parameter="type_k", value=type_k)


cdef int check_fits_memory(Model model, long long cells, int n_ubatch, int outputs,
                           ggml.ggml_type type_k, ggml.ggml_type type_v, int n_layer) except -1:
    """Refuses what this machine could never hold, before Linux kills the process for trying."""
    if llama.llama_supports_gpu_offload() and model.n_gpu_layers_ != 0:
        return 0        # the cache lives elsewhere, and a failed allocation is reported
    cdef long long n_head = max(1, model.n_head)
    metadata = model.metadata
    arch = metadata.get("general.architecture", "")

    def head_width(name):
        text = metadata.get(f"{arch}.attention.{name}", "")
        return int(text) if text.isdigit() else model.n_embd // n_head

    per_cell = n_layer * model.n_head_kv * (
        head_width("key_length") * ggml.ggml_type_size(type_k) / ggml.ggml_blck_size(type_k)
        + head_width("value_length") * ggml.ggml_type_size(type_v) / ggml.ggml_blck_size(type_v))
    needed = cells * per_cell + 4 * cells * n_ubatch + 8 * outputs * len(model.vocab)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
    if needed > total:
        raise OutOfMemoryError(
            f"this context would need about {needed / 2**30:.1f} GiB and the machine has"
            f" {total / 2**30:.1f} GiB; ask for a smaller n_ctx, n_seq_max or n_batch")
    return 0


cdef bint has_learned_positions(Model model):
    """Whether positions are rows of a table, past whose end llama.cpp would assert."""
    arch = model.architecture
    if arch == "mpt":       # an option there, in place of ALiBi
        return float(model.metadata.get("mpt.attention.max_alibi_bias", 0.0)) == 0.0
    return arch in ("bert", "gpt2", "starcoder")


@cython.no_gc_clear
cdef class Context(Owner):
    """A model's KV cache and compute buffers, for up to ``n_seq_max`` sequences.

    model: keeps it open for as long as the context is.
    n_ctx: tokens of one sequence. The cache has room for n_ctx * n_seq_max tokens (rounded up to
        256 each), unless n_ctx_total says otherwise; with kv_unified any sequence may use all of it.
    n_batch: most tokens of one ``decode``, at most n_ctx_total; n_ubatch: most computed at once.
    n_outputs_max: most outputs of one decode; None is n_batch. Fewer need less memory.
    n_threads, n_threads_batch: for one token and for more; None is ``default_threads()``.
    type_k, type_v: cache types: "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
        "iq4_nl". A quantised V cache needs flash attention.
    flash_attn: "auto", "on" or "off". In an exact context it is that of our own kernels, and "auto"
        is "off" where there are none (list_kernels).
    embeddings: decode puts out embeddings beside logits, for every token.
    pooling: "model", "none", "mean", "cls", "last", "rank": how token embeddings become one.
    causal: None leaves attention as the model has it.
    swa_full: keep the whole cache of sliding-window layers: needed to roll back past the window.
    kv_unified: one buffer for all sequences (shared prefixes are cheap); else one each. None: one,
        where that can be.
    exact: a sequence's numbers are the same, bit for bit, whatever shares its steps and however its
        tokens are cut into batches (docs/kv.md). Needs swa_full=True, a Model with repack="exact"
        (or False), and all of it on the CPU.
    offload_kqv, op_offload: keep the cache, and large operations, on the GPU.
    rope_scaling, rope_freq_base, rope_freq_scale, yarn_*: 0 or None leaves the model's values.
    perf: measure (see ``perf_counters``).

    Raises ParameterError, UnsupportedError, OutOfMemoryError, EngineError.
    One thread at a time: a second gets BusyError.
    """

    def __init__(
        self,
        Model model not None,
        *,
        n_ctx: int = 2048,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_ctx_total: int | None = None,
        n_outputs_max: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: str = "auto",
        embeddings: bool = False,
        pooling: str = "model",
        causal: bool | None = None,
        swa_full: bool = True,
        kv_unified: bool | None = None,
        exact: bool = False,
        offload_kqv: bool = True,
        op_offload: bool = True,
        rope_scaling: str = "model",
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float | None = None,
        yarn_attn_factor: float | None = None,
        yarn_beta_fast: float | None = None,
        yarn_beta_slow: float | None = None,
        yarn_orig_ctx: int = 0,
        perf: bool = True,
    ):
        self.begin()
        if model.vocab_only:
            raise UnsupportedError(
                "the model was loaded with vocab_only=True: it has no weights to decode with")
        if exact and not swa_full:
            raise ParameterError("exact=True needs swa_full=True", parameter="exact", value=True)
        if exact and not kernels_available():
            if flash_attn == "on":
                raise ParameterError(
                    "exact=True with flash_attn='on' needs kernels of our own (list_kernels), which"
                    " this processor or this build has not; leave flash_attn 'auto'",
                    parameter="flash_attn", value=flash_attn)
            flash_attn = "off"          # llama.cpp's cuts long caches by threads
        ordered = not exact or flash_attn != "off"      # whichever way the cells of sequences lie
        cdef bint chosen = exact and ordered and kv_unified is None and flash_attn == "auto"
        if kv_unified is None:
            kv_unified = ordered
        elif kv_unified and not ordered:
            raise ParameterError(
                "exact=True with kv_unified=True needs attention of our own (list_kernels, and"
                " flash_attn 'auto'); leave kv_unified None", parameter="kv_unified", value=True)
        cdef llama.llama_context_params params = llama.llama_context_default_params()
        cdef int max_seq = <int>llama.llama_max_parallel_sequences()
        self.n_ctx = check_int("n_ctx", n_ctx, 1, _MAX_CTX)
        if self.n_ctx > model.n_ctx_train and has_learned_positions(model):
            raise ParameterError(
                f"n_ctx is {n_ctx}, and this model has learned {model.n_ctx_train} positions: it"
                " cannot read further", parameter="n_ctx", value=n_ctx)
        self.n_seq_max = check_int("n_seq_max", n_seq_max, 1, max_seq)
        cdef long long padded = (self.n_ctx + 255) // 256 * 256
        cdef long long total = padded * self.n_seq_max
        if n_ctx_total is not None:
            if not kv_unified:
                raise ParameterError(
                    "n_ctx_total needs kv_unified=True: separate caches all have n_ctx",
                    parameter="n_ctx_total", value=n_ctx_total)
            total = check_int("n_ctx_total", n_ctx_total, self.n_ctx, 2**31 - 1)
        if total > 2**31 - 256:
            raise ParameterError(
                f"n_ctx {n_ctx} times n_seq_max {n_seq_max} is more than llama.cpp can count",
                parameter="n_ctx", value=n_ctx)
        params.n_ctx = <uint32_t>total
        params.n_batch = check_int("n_batch", n_batch, 1, _MAX_CTX)
        params.n_ubatch = check_int("n_ubatch", n_ubatch, 1, _MAX_CTX)
        params.n_seq_max = self.n_seq_max
        params.n_outputs_max = (
            0 if n_outputs_max is None else check_int("n_outputs_max", n_outputs_max, 1, _MAX_CTX))
        if 0 < <int>params.n_outputs_max < self.n_seq_max:
            raise ParameterError(
                f"n_outputs_max is {n_outputs_max}: fewer than one output for each of"
                f" {self.n_seq_max} sequences", parameter="n_outputs_max", value=n_outputs_max)
        threads = default_threads() if n_threads is None else n_threads
        params.n_threads = check_int("n_threads", threads, 1, 512)
        batch_threads = threads if n_threads_batch is None else n_threads_batch
        params.n_threads_batch = check_int("n_threads_batch", batch_threads, 1, 512)
        set_cache(&params, type_k, type_v, flash_attn)
        params.embeddings = embeddings
        params.pooling_type = <llama.llama_pooling_type><int>check_choice("pooling", pooling, _POOLING)
        params.attention_type = (
            llama.LLAMA_ATTENTION_TYPE_UNSPECIFIED if causal is None
            else llama.LLAMA_ATTENTION_TYPE_CAUSAL if causal else llama.LLAMA_ATTENTION_TYPE_NON_CAUSAL)
        params.swa_full = swa_full
        params.kv_unified = kv_unified
        params.offload_kqv = offload_kqv
        params.op_offload = op_offload
        params.rope_scaling_type = <llama.llama_rope_scaling_type><int>check_choice(
            "rope_scaling", rope_scaling, _ROPE_SCALING)
        params.rope_freq_base = check_float("rope_freq_base", rope_freq_base, 0.0, 1e12)
        params.rope_freq_scale = check_float("rope_freq_scale", rope_freq_scale, 0.0, 1e6)
        if yarn_ext_factor is not None:
            params.yarn_ext_factor = check_float("yarn_ext_factor", yarn_ext_factor, 0.0, 1e6)
        if yarn_attn_factor is not None:
            params.yarn_attn_factor = check_float("yarn_attn_factor", yarn_attn_factor, 0.0, 1e6)
        if yarn_beta_fast is not None:
            params.yarn_beta_fast = check_float("yarn_beta_fast", yarn_beta_fast, 0.0, 1e6)
        if yarn_beta_slow is not None:
            params.yarn_beta_slow = check_float("yarn_beta_slow", yarn_beta_slow, 0.0, 1e6)
        params.yarn_orig_ctx = check_int("yarn_orig_ctx", yarn_orig_ctx, 0, _MAX_CTX)
        self.rope = (rope_scaling, rope_freq_base, rope_freq_scale, yarn_ext_factor, yarn_attn_factor,
                     yarn_beta_fast, yarn_beta_slow, yarn_orig_ctx)
        params.no_perf = not perf
        params.abort_callback = AbortFlag.ask       # by ggml, between the nodes of a graph
        params.abort_callback_data = &self.abort_flag

        cdef int n_batch_clipped = min(<int>params.n_batch, <int>total)
        cdef int outputs = <int>params.n_outputs_max if params.n_outputs_max else n_batch_clipped
        check_fits_memory(model, total, min(<int>params.n_ubatch, n_batch_clipped), outputs,
                          params.type_k, params.type_v, model.n_layer)
        self.create(model, params)
        if exact:
            inexact = make_exact(self.ptr).decode()
            if inexact and chosen and n_ctx_total is None and ggml.ggml_blck_size(params.type_v) == 1:
                # A model of another kind: ggml's attention is exact where sequences share nothing.
                self.undo()
                kv_unified, flash_attn = False, "off"
                set_cache(&params, type_k, type_v, flash_attn)
                params.kv_unified = False
                self.create(model, params)
                inexact = make_exact(self.ptr).decode()
            if inexact:
                self.undo()
                raise UnsupportedError(f"exact=True: {inexact}")
            if not has_flash_attention(self.ptr):
                flash_attn = "off"
        if llama.llama_get_pooling_type(self.ptr) == llama.LLAMA_POOLING_TYPE_RANK and not model.has_head:
            self.undo()
            raise UnsupportedError(
                f"pooling='rank' needs a model with a ranking head (tensors cls, cls.output), and"
                f" {model.path} has none: take a reranker, or another pooling for embeddings")
        self.exact = exact
        self.mem = llama.llama_get_memory(self.ptr)
        self.n_batch = llama.llama_n_batch(self.ptr)
        self.n_ubatch = llama.llama_n_ubatch(self.ptr)
        self.n_outputs_max = (
            self.n_batch if not params.n_outputs_max or model.has_encoder
            else <int>params.n_outputs_max)
        self.kv_unified = kv_unified
        self.swa_full = swa_full
        self.type_k = type_k
        self.type_v = type_v
        self.no_shift = why_no_shift(self.ptr, params.type_k).decode()
        self.flash_attn = flash_attn
        self.n_vocab = len(model.vocab) if model.vocab.type != "none" else 0
        self.n_embd = model.n_embd_out
        self.embeddings_ = embeddings
        self.pooling_ = <int>llama.llama_get_pooling_type(self.ptr)
        self.causal_ = llama.llama_get_causal_attn(self.ptr)
        self.last_sequences.resize(self.n_seq_max)
        self.opened()

    cdef int create(self, Model model, llama.llama_context_params params) except -1:
        begin_log()
        self.model = model
        model.hold()            # until we are one of its children
        try:
            with nogil:
                self.ptr = make_context(model.ptr, params)
        except ModelFormatError as error:
            raise ModelFormatError(f"{model.path} cannot be computed: {error}",
                                   path=model.path) from None
        except ParameterError as error:
            raise wrong_cache(
                ggml.ggml_type_name(params.type_k).decode(),
                ggml.ggml_type_name(params.type_v).decode(), error) from None
        finally:
            if self.ptr != NULL:
                model.children += 1
            model.release()
            flush_log()
        if self.ptr == NULL:
            problem = native_problem()
            if "alloc" in problem:
                raise OutOfMemoryError("the context's buffers could not be allocated", log=problem)
            raise EngineError("llama.cpp could not make the context", log=problem)
        return 0

    cdef void undo(self) noexcept:
        with nogil:
            llama.llama_free(self.ptr)
        self.ptr = NULL
        self.model.children -= 1

    def __dealloc__(self):
        if self.forks == fork_count and self.ptr != NULL:
            self.ended()
            llama.llama_free(self.ptr)
            self.let_go()

    cdef void let_go(self) noexcept:
        """Tells the model and the adapters that this context no longer uses them."""
        self.model.children -= 1
        use_adapters(self.adapters_ or (), -1)
        self.adapters_ = ()

    def close(self) -> None:
        """Free the memory. Idempotent. Raises ViewError while views of it are alive."""
        if self.closed or self.forks != fork_count:
            return
        self.check_childless()
        self.check_no_views()
        self.ended()
        begin_free()
        with nogil:
            llama.llama_free(self.ptr)
        self.ptr = NULL
        self.let_go()
        end_call()

    def __enter__(self) -> Context:
        self.alive()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.is_closed:
            return "<Context, closed>"
        return (f"<Context of {self.n_seq_max} sequence(s) of {self.n_ctx} tokens,"
                f" n_batch {self.n_batch}, n_ubatch {self.n_ubatch}>")

    # What it is

    @property
    def kernels(self) -> str:
        """What its numbers depend on, to the last bit, beside model and settings: the llama.cpp inside,
        how it was compiled, the C library, how the model's weights are rearranged. Where two exact
        contexts agree on it, so do their logits."""
        self.alive()
        if self.kernels_ is None:
            weights = rearranged(self.model.ptr).decode()
            ours = self.exact and self.flash_attn != "off"
            attention = "; attention of our own" if ours else ""
            self.kernels_ = (
                compiled_kernels() + attention + (f"; weights as {weights}" if weights else ""))
        return self.kernels_

    @property
    def n_ctx_total(self) -> int:
        """Cells of the cache, all sequences together, as llama.cpp rounded them."""
        self.alive()
        return llama.llama_n_ctx(self.ptr)

    @property
    def n_ctx_seq(self) -> int:
        """Cells one sequence can reach, as llama.cpp rounded them; ``n_ctx`` is what was asked."""
        self.alive()
        return llama.llama_n_ctx_seq(self.ptr)

    @property
    def has_memory(self) -> bool:
        """Whether there is a cache: models that only encode have none."""
        self.alive()
        return self.mem != NULL

    @property
    def memory(self) -> Memory:
        """The cache, by sequences and positions. UnsupportedError where there is none."""
        self.alive()
        return memory_of(self)

    @property
    def pooling(self) -> str:
        """How token embeddings become one: "none", "mean", "cls", "last" or "rank"."""
        self.alive()
        return next((name for name, value in _POOLING.items() if value == self.pooling_), "none")

    # What can change

    @property
    def n_threads(self) -> int:
        """Threads that compute one token."""
        self.alive()
        return llama.llama_n_threads(self.ptr)

    @property
    def n_threads_batch(self) -> int:
        """Threads that compute more than one token."""
        self.alive()
        return llama.llama_n_threads_batch(self.ptr)

    def set_threads(self, n_threads: int | None = None, n_threads_batch: int | None = None) -> None:
        """Change the thread counts; None leaves one as it is."""
        self.enter_to_read()
        try:
            one = llama.llama_n_threads(self.ptr) if n_threads is None else n_threads
            many = llama.llama_n_threads_batch(self.ptr) if n_threads_batch is None else n_threads_batch
            llama.llama_set_n_threads(self.ptr, check_int("n_threads", one, 1, 512),
                                      check_int("n_threads_batch", many, 1, 512))
        finally:
            self.leave()

    @property
    def embeddings(self) -> bool:
        """Whether decode puts out embeddings, for every token, beside the logits."""
        return self.embeddings_

    @embeddings.setter
    def embeddings(self, value: bool) -> None:
        self.enter()
        try:
            llama.llama_set_embeddings(self.ptr, value)
            self.embeddings_ = value
        finally:
            self.leave()

    @property
    def causal(self) -> bool:
        """Whether tokens attend only to those before them."""
        return self.causal_

    @causal.setter
    def causal(self, value: bool) -> None:
        self.enter()
        try:
            llama.llama_set_causal_attn(self.ptr, value)
            self.causal_ = value
        finally:
            self.leave()

    @property
    def aborting(self) -> bool:
        """While True, a decode stops within milliseconds (CPU and Metal; elsewhere at its end) and
        raises DecodeAborted. May be set from any thread; stays until set to False."""
        return self.abort_flag.raised()

    @aborting.setter
    def aborting(self, value: bool) -> None:
        self.abort_flag.set(value)

    def abort_at(self, node: int, *, fail: bool = False) -> None:
        """For tests: set ``aborting`` when llama.cpp has computed so many nodes of graphs from now on
        (CPU and Metal); with ``fail``, fail there as by an assertion (one thread only). What was set
        before is forgotten."""
        self.abort_flag.raise_at(check_int("node", node, 1, 2**62), fail)

    # What it computes

    cdef int check_seq(self, int seq_id, bint any_allowed) except -1:
        if seq_id < (-1 if any_allowed else 0) or seq_id >= self.n_seq_max:
            raise ParameterError(
                f"sequence {seq_id} does not exist: the context has n_seq_max={self.n_seq_max},"
                f" so 0 to {self.n_seq_max - 1}", parameter="seq_id", value=seq_id)
        return 0

    def check_no_views(self) -> None:
        """Raise ViewError if numpy views of logits or embeddings are alive."""
        if self.views:
            raise ViewError(
                f"{self.views} numpy view(s) of this context's logits or embeddings are alive and"
                " would be overwritten; delete them first, or ask for copy=True")

    cdef int check_batch(self, Batch batch, bint encode) except -1:
        cdef int i
        cdef int s
        cdef int n = batch.c.n_tokens
        cdef int n_outputs = 0
        cdef bint pools = self.embeddings_ and self.pooling_ != <int>llama.LLAMA_POOLING_TYPE_NONE
        if n == 0:
            raise ParameterError("the batch is empty", parameter="batch", value=0)
        if n > self.n_batch:
            raise ParameterError(
                f"the batch has {n} tokens; this context takes n_batch={self.n_batch} at once",
                parameter="batch", value=n)
        if n > self.n_ubatch and (encode or not self.causal_):
            raise ParameterError(
                f"the batch has {n} tokens; without causal attention at most"
                f" n_ubatch={self.n_ubatch} can be computed", parameter="batch", value=n)
        # llama.cpp pools each ubatch by itself, and the last one's result is what remains.
        if pools and n > self.n_ubatch:
            raise ParameterError(
                f"the batch has {n} tokens; with pooling at most n_ubatch={self.n_ubatch} can be"
                " computed", parameter="batch", value=n)
        for i in range(n):
            if batch.token[i] < 0 or batch.token[i] >= self.n_vocab:
                raise TokenError(
                    f"token {batch.token[i]} at index {i} of the batch is outside the vocabulary"
                    f" of {self.n_vocab} tokens", parameter="token", value=batch.token[i])
            if batch.pos[i] < 0 or batch.pos[i] >= self.n_ctx:
                raise ContextFullError(
                    f"position {batch.pos[i]} at index {i} of the batch is outside the context of"
                    f" n_ctx={self.n_ctx} tokens", needed=batch.pos[i] + 1, n_ctx=self.n_ctx)
            for s in range(batch.n_seq_id[i]):
                self.check_seq(batch.seq_id[i][s], False)
                if pools and not self.kv_unified and batch.seq_id[i][s] != batch.seq_id[0][0]:
                    raise UnsupportedError(
                        "with kv_unified=False only one sequence can be pooled at once")
            n_outputs += batch.logits[i] != 0
        if encode or self.embeddings_:
            n_outputs = n
        if n_outputs > self.n_outputs_max:
            raise ParameterError(
                f"the batch asks for {n_outputs} outputs; this context was made for"
                f" n_outputs_max={self.n_outputs_max}", parameter="batch", value=n_outputs)
        return 0

    cdef int alive(self) except -1:
        Owner.alive(self)
        if self.broken is not None:
            raise EngineError(
                "this context cannot be used any more, only closed, because llama.cpp failed in"
                f" the middle of a computation: {self.broken}")
        return 0

    cdef int enter(self) except -1:
        self.enter_to_read()
        self.holds = False
        return 0

    cdef int enter_to_read(self) except -1:
        """Until ``leave`` an assertion of llama.cpp that fails on this thread raises EngineError, and
        the context is broken then."""
        Owner.enter(self)
        AbortScope.begin()
        return 0

    cdef void leave(self) noexcept:
        cdef string thrown = AbortScope.end()
        if not thrown.empty():
            self.broken = thrown.decode("utf-8", "replace")
        Owner.leave(self)

    cdef int compute(self, Batch batch, bint encode) except -1:
        """llama_decode or llama_encode, the batch having been checked; outputs are not noted."""
        cdef int code = 0
        self.output_rows.clear()
        LogQueue.forget_problem()
        try:
            with nogil:
                if encode:
                    code = guarded_encode(self.ptr, batch.c)
                else:
                    code = guarded_decode(self.ptr, batch.c)
        except TriollamaError as error:     # a failed assertion, or no memory, anywhere inside
            self.broken = str(error)
            raise
        finally:
            flush_log()
        if code != 0:
            raise exit_error() if exiting.load() else decode_error(code)
        return 0

    cdef int settle_memory(self) except -1:
        """Carries out at once what llama.cpp would do in the next decode: see kv/shift.hpp."""
        try:
            with nogil:
                settle(self.ptr, AbortFlag.ask, &self.abort_flag)
        except TriollamaError as error:
            self.broken = str(error)
            raise
        finally:
            flush_log()
        return 0

    cdef int order_cells(self, int seq_id) except -1:
        """Its cells in a row, with nothing between them: see kv/sequence_state.hpp. Those that
        sequences share are taken in order as they lie."""
        if self.kv_unified:
            return 0
        try:
            with nogil:
                line_up(self.ptr, seq_id)
        except TriollamaError as error:
            self.broken = str(error)
            raise
        return 0

    def decode(self, Batch batch not None) -> None:
        """Compute ``batch``, and keep its tokens in memory. Releases the GIL.

        Raises ParameterError and TokenError before anything is done, NoSlotError (memory as
        before), DecodeAborted, DecodeError (tokens of the batch may be in memory: remove them by
        position), ContextFullError, ViewError.
        """
        self.enter()
        try:
            self.check_and_compute(batch, False)
        finally:
            self.leave()

    cdef int check_and_compute(self, Batch batch, bint encode) except -1:
        """The whole of decode or encode, for who has entered."""
        self.check_no_views()
        if encode:
            if self.mem != NULL and not self.model.has_encoder:
                raise UnsupportedError("this model has no encoder; use decode")
        elif not self.model.has_decoder:
            raise UnsupportedError("this model has no decoder; use encode")
        self.check_batch(batch, encode)
        batch.readers += 1
        try:
            self.compute(batch, encode)
        finally:
            batch.readers -= 1
        self.note_outputs(batch, encode)
        return 0

    def profile(self, Batch batch not None) -> dict[str, tuple[float, int]]:
        """Compute ``batch`` as ``decode`` does, with each graph node timed by itself.

        Returns seconds and number of nodes by operation, products by type and shape too: rows and
        columns of the matrix, then how many columns it is multiplied with. Errors as decode.
        """
        cdef unique_ptr[profile.Profile] watching
        self.enter()
        try:
            watching.reset(new profile.Profile(self.ptr))
            self.check_and_compute(batch, False)
            return timings_dict(watching.get().timings())
        finally:
            watching.reset()
            self.leave()

    def encode(self, Batch batch not None) -> None:
        """Compute ``batch`` without the cache: encoders and embedding models. Errors as decode;
        UnsupportedError for models that only decode."""
        self.enter()
        try:
            self.check_and_compute(batch, True)
        finally:
            self.leave()

    cdef int note_outputs(self, Batch batch, bint all_outputs) except -1:
        cdef int i
        cdef int s
        self.last_n_tokens = batch.c.n_tokens
        for s in range(self.n_seq_max):
            self.last_sequences[s] = 0
        for i in range(batch.c.n_tokens):
            if all_outputs or self.embeddings_ or batch.logits[i]:
                self.output_rows.push_back(i)
            for s in range(batch.n_seq_id[i]):
                self.last_sequences[batch.seq_id[i][s]] = 1
        return 0

    cdef int row(self, int i) except -1:
        """The batch index of output ``i``: checked, negative ones counted from the last output."""
        cdef size_t j
        if self.output_rows.empty():
            raise EngineError("there are no outputs: nothing was decoded since the last failure")
        if i < 0 and -i <= <int>self.output_rows.size():
            return self.output_rows[self.output_rows.size() + i]
        for j in range(self.output_rows.size()):
            if self.output_rows[j] == i:
                return i
        raise ParameterError(
            f"index {i} of the last batch has no output; ask for it when filling the batch",
            parameter="i", value=i)

    cdef float * logits_row(self, int i) except NULL:
        cdef float * data = llama.llama_get_logits_ith(self.ptr, self.row(i))
        if data == NULL:
            raise EngineError("the last decode put out no logits")
        return data

    cdef object view(self, float * data, int n, bint copy):
        import numpy
        cdef FloatView exporter = FloatView.__new__(FloatView, maker)
        exporter.context = self
        exporter.data = data
        exporter.shape[0] = n
        exporter.strides[0] = sizeof(float)
        array = numpy.asarray(exporter)
        return array.copy() if copy else array

    def logits(self, i: int = -1, *, copy: bool = False):
        """Logits of index ``i`` of the last batch (-1: its last output), float32 of shape
        [n_vocab]. A read-only view without copying: while it lives, ``decode`` and ``close`` raise
        ViewError; ``copy=True`` gives an array of your own."""
        self.enter_to_read()
        try:
            return self.view(self.logits_row(check_int("i", i, -2**31, 2**31 - 1)),
                             self.n_vocab, copy)
        finally:
            self.leave()

    def token_embedding(self, i: int = -1, *, copy: bool = False):
        """Final hidden state of index ``i`` of the last batch, float32 of shape [n_embd]. Needs
        ``embeddings`` and pooling "none". A view, as with ``logits``."""
        cdef float * data = NULL
        self.enter_to_read()
        try:
            if self.pooling_ == <int>llama.LLAMA_POOLING_TYPE_NONE:   # else the buffer is never filled
                data = llama.llama_get_embeddings_ith(
                    self.ptr, self.row(check_int("i", i, -2**31, 2**31 - 1)))
            if data == NULL:
                raise EngineError(
                    "the last decode put out no token embeddings; set embeddings=True and"
                    ' pooling="none"')
            return self.view(data, self.n_embd, copy)
        finally:
            self.leave()

    def sequence_embedding(self, seq_id: int = 0, *, copy: bool = False):
        """Pooled embedding of a sequence of the last batch, float32 of shape [n_embd] (pooling
        "rank": [n_cls_out]). A view, as with ``logits``."""
        cdef float * data
        cdef llama.llama_seq_id s = check_int("seq_id", seq_id, -2**31, 2**31 - 1)
        self.enter_to_read()
        try:
            self.check_seq(s, False)
            if not self.last_sequences[s]:
                raise ParameterError(
                    f"sequence {s} was not in the last batch", parameter="seq_id", value=s)
            data = llama.llama_get_embeddings_seq(self.ptr, s)
            if data == NULL:
                raise EngineError(
                    "the last decode put out no pooled embedding; set embeddings=True and a"
                    ' pooling other than "none"')
            n = self.model.n_cls_out if self.pooling == "rank" else self.n_embd
            return self.view(data, n, copy)
        finally:
            self.leave()

    def synchronize(self) -> None:
        """Wait until all computation is finished (it may be asynchronous on GPUs)."""
        self.enter()
        try:
            with nogil:
                llama.llama_synchronize(self.ptr)
        finally:
            self.leave()

    def perf_counters(self) -> dict[str, float]:
        """llama.cpp's counters since the last reset: "t_p_eval_ms" and "n_p_eval" of batches of
        more than one token, "t_eval_ms" and "n_eval" of single tokens, "n_reused" graphs."""
        self.alive()
        cdef llama.llama_perf_context_data data = llama.llama_perf_context(self.ptr)
        return {
            "t_load_ms": data.t_load_ms,
            "t_p_eval_ms": data.t_p_eval_ms,
            "t_eval_ms": data.t_eval_ms,
            "n_p_eval": data.n_p_eval,
            "n_eval": data.n_eval,
            "n_reused": data.n_reused,
        }

    def memory_held(self) -> list[tuple[str, int, int, int, int, int]]:
        """What this context and its model have allocated, as ``memory_needs`` tells it before."""
        self.alive()
        return needs_rows(native_memory_held(self.ptr))

    def reset_perf_counters(self) -> None:
        """Set the counters to zero."""
        self.alive()
        llama.llama_perf_context_reset(self.ptr)


@cython.no_gc_clear
cdef class FloatView:
    """Exports a row of a context's output buffer; counts how many arrays look at it. Once they are
    all gone it exports nothing more, since the row may be gone too."""

    def __cinit__(self, given=None):
        require_maker(given, "Context.logits")

    def __getbuffer__(self, Py_buffer * buffer, int flags):
        if self.data == NULL:
            raise BufferError("what this showed was released")
        if flags & PyBUF_WRITABLE:
            raise BufferError("logits and embeddings are read-only; take a copy to change them")
        buffer.buf = <char *>self.data
        buffer.format = NULL
        if flags & PyBUF_FORMAT:
            buffer.format = <char *>"f"
        buffer.internal = NULL
        buffer.itemsize = sizeof(float)
        buffer.len = self.shape[0] * sizeof(float)
        buffer.ndim = 1
        buffer.obj = self
        buffer.readonly = 1
        buffer.shape = NULL
        if flags & PyBUF_ND:
            buffer.shape = self.shape
        buffer.strides = NULL
        if (flags & PyBUF_STRIDES) == PyBUF_STRIDES:
            buffer.strides = self.strides
        buffer.suboffsets = NULL
        self.buffers += 1
        self.context.views += 1

    def __releasebuffer__(self, Py_buffer * buffer):
        self.context.views -= 1
        self.buffers -= 1
        if self.buffers == 0:
            self.data = NULL
