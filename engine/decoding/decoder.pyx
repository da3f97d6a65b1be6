"""The decoder: streams of tokens from a thread that never holds the GIL."""
from libc.stdint cimport intptr_t
from libcpp.memory cimport shared_ptr
from libcpp.utility cimport move


cdef dict _KINDS = {
    "generate": <int>decoding.Kind.generate,
    "score": <int>decoding.Kind.score,
    "embed": <int>decoding.Kind.embed,
}
cdef dict _DECODER_POOLING = {
    "mean": <int>decoding.Pooling.mean,
    "cls": <int>decoding.Pooling.first,
    "last": <int>decoding.Pooling.last,
}
cdef tuple _FINISHES = (None, "eos", "stop", "length", "context", "done", "cancelled", "error")


cdef object stream_error(decoding.Failure failure, str message):
    """The exception for a stream that ended by an error of its own."""
    if failure == decoding.Failure.grammar:
        return GrammarError(message)
    if failure == decoding.Failure.sampler:
        return ParameterError(message)
    if failure == decoding.Failure.memory:
        return OutOfMemoryError(message)
    if failure == decoding.Failure.adapter:
        return AdapterError(message)
    if failure == decoding.Failure.decode:
        return DecodeError(message)
    return EngineError(message)


cdef void release_set(Decoder decoder, object number) noexcept:
    """The set's adapters may be closed as far as this set goes."""
    use_adapters(decoder.sets.pop(number, ()), -1)


cdef uint64_t sequence_number(str name, object value) except? 0:
    """A number as ``Decoder.make_sequence`` gives them."""
    return check_int(name, value, 0, 2**62)


@cython.no_gc_clear
cdef class Decoder(Owner):
    """Drives ``context`` for many streams on one native thread. The context serves nobody else
    until the decoder is closed: other calls on it raise BusyError. What it held is forgotten. If the
    decoder dies of a failure of llama.cpp, the context can only be closed.

    Raises ParameterError for a context with adapters or a control vector (``define_adapters`` names
    them for streams), UnsupportedError for models that are not causal decoders.

    deterministic: tokens do not depend on what else runs. Needs a context with exact=True.
    prompt_budget: time that prompts may take of a step in which streams run, in ordinary steps;
        measured while running. prompt_tokens: if not 0, this many tokens instead.
    spares: what a stream without a sequence of its own leaves stays until its place is wanted, and such
        a stream begins with the longest beginning of its prompt that any idle sequence holds: to the
        same bits, if deterministic. ``usage`` tells how much ("cached").
    max_queue: streams that may wait beyond the n_seq_max of the context.
    host_bytes: at most so many bytes of host memory keep the KV of idle sequences. disk_fd, disk_bytes:
        a file open for reading and writing, which the decoder has to itself, and how much of it may
        keep what host memory has no room for; -1 is none. A full disk loses KV, which is then computed
        again, and nothing else.
    restore_cost, prompt_cost: seconds to bring back a byte of KV, and to compute a token: what is
        cheaper is done. If 0, as measured while running.
    slow_sampler: seconds; a sampler that takes longer runs beside the steps instead of in them.
    stepwise: decode only when ``step`` asks: for tests.

    Every method returns at once, except ``close``. One bell, ``fileno()``, tells when ``poll`` has news.
    """

    def __init__(
        self,
        Context context not None,
        *,
        deterministic: bool = False,
        prompt_budget: float = 1.0,
        prompt_tokens: int = 0,
        spares: bool = False,
        max_queue: int = 0,
        host_bytes: int = 0,
        disk_fd: int = -1,
        disk_bytes: int = 0,
        restore_cost: float = 0.0,
        prompt_cost: float = 0.0,
        slow_sampler: float = 0.001,
        stepwise: bool = False,
    ):
        self.begin()
        cdef Model model = context.model
        cdef decoding.DecoderConfig config
        config.prompt_budget = check_float("prompt_budget", prompt_budget, 0.01, 1e6)
        config.prompt_tokens = check_int("prompt_tokens", prompt_tokens, 0, 2**31 - 1)
        config.spares = spares
        config.max_queue = check_int("max_queue", max_queue, 0, 2**30)
        config.host_bytes = check_int("host_bytes", host_bytes, 0, 2**62)
        config.disk_fd = check_int("disk_fd", disk_fd, -1, 2**31 - 1)
        config.disk_bytes = check_int("disk_bytes", disk_bytes, 0, 2**62)
        config.restore_byte_s = check_float("restore_cost", restore_cost, 0.0, 1e6)
        config.prompt_token_s = check_float("prompt_cost", prompt_cost, 0.0, 1e6)
        config.slow_sampler_s = check_float("slow_sampler", slow_sampler, 0.0, 1e6)
        config.stepwise = stepwise
        self.deterministic = deterministic
        Owner.enter(context)            # stays inside until close
        context.holds = False
        try:
            context.check_no_views()
            if context.adapters_ or context.steered:
                raise ParameterError(
                    "the context has adapters or a control vector, which streams of the bare model would run"
                    " under: remove them (set_adapters, set_control_vector) and name them by define_adapters",
                    parameter="context", value=context)
            if not model.has_decoder or model.has_encoder or not context.causal_:
                raise UnsupportedError(
                    "the decoder drives causal decoder-only models; use encode for others")
            if model.vocab.type == "none":
                raise UnsupportedError("the model has no vocabulary")
            if self.deterministic and not context.exact:
                raise ParameterError(
                    "deterministic=True needs a context with exact=True",
                    parameter="deterministic", value=True)
            recurrent = model.is_recurrent or model.is_hybrid
            config.packing = (
                decoding.Packing.mixed if context.kv_unified and not recurrent else decoding.Packing.equal)
            config.n_slots = context.n_seq_max
            config.n_ubatch = min(context.n_ubatch, context.n_batch)
            config.n_outputs = context.n_outputs_max
            config.n_ctx = context.n_ctx
            config.n_swa = model.n_swa
            config.unified = context.kv_unified
            config.exact = context.exact
            config.can_shift = not context.no_shift
            config.can_roll_back = not recurrent
            # Only the CPU is asked whether to stop in the middle of a ubatch.
            config.check_span = 0 if llama.llama_supports_gpu_offload() and model.n_gpu_layers_ != 0 else 512
            # Together with the decoder's own no more than compute a step, and no more than there are streams.
            config.n_helpers = min(context.n_threads, context.n_seq_max, 8) - 1
            llama.llama_memory_clear(context.mem, False)      # streams begin with nothing
            context.output_rows.clear()
            llama.llama_set_embeddings(context.ptr, False)    # as the streams need them
            self.impl = decoding.open_decoder(context.ptr, config)
        except BaseException:
            Owner.leave(context)
            raise
        self.context = context
        self.sets = {}
        self.dropping = {}
        self.held = {}
        context.children += 1
        self.can_shift = config.can_shift
        self.opened()

    def __dealloc__(self):
        if self.forks != fork_count:
            decoding.leak_decoder(self.impl)
        elif not self.closed:
            self.stop()

    cdef void interrupt(self) noexcept:
        if not self.closed:
            self.stop()

    cdef void stop(self) noexcept:
        cdef shared_ptr[decoding.Decoder] impl
        impl.swap(self.impl)
        self.ended()
        begin_free()
        with nogil:
            impl.get().close()
        cause = impl.get().cause_of_death().decode("utf-8", "replace")
        with nogil:
            impl.reset()
        self.held.clear()
        self.context.broken = cause or None
        if not cause:
            llama.llama_memory_clear(self.context.mem, False)
            llama.llama_set_embeddings(self.context.ptr, self.context.embeddings_)
        llama.llama_set_abort_callback(self.context.ptr, AbortFlag.ask, &self.context.abort_flag)
        for number in list(self.sets):
            release_set(self, number)
        Owner.leave(self.context)
        self.context.children -= 1
        end_call()

    def close(self) -> None:
        """End every stream as cancelled, and wait for the thread: milliseconds on CPU and Metal,
        at most one ubatch elsewhere. Idempotent."""
        if self.closed or self.forks != fork_count:
            return
        self.stop()

    def __enter__(self) -> Decoder:
        self.alive()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when ``poll`` has news."""
        self.alive()
        return self.impl.get().fd()

    def poll(self) -> list[int]:
        """Ids of streams and replies with news since the last call: pieces where there were none, an
        end, an answer. Silences the bell."""
        cdef vector[uint64_t] ids
        flush_log()         # first: a filter of the application may raise, and the news must not be lost
        self.alive()
        self.impl.get().poll(ids)
        found = list(ids)
        for id in found if self.held else ():
            self.held.pop(id, None)
        return found

    def submit(
        self,
        tokens,
        *,
        kind: str = "generate",
        Sampler sampler=None,
        accept_from: int = 0,
        stop=(),
        end_tokens=(),
        max_tokens: int | None = None,
        logprobs: int | None = None,
        special: bool = False,
        shift: bool = False,
        n_keep: int = 0,
        hidden: bool = False,
        causal: bool = True,
        pooling: str = "mean",
        given: int = 1,
        threads: int | None = None,
        batch_threads: int | None = None,
        priority: int = 0,
        capacity: int = 64,
        sequence: int = 0,
        cached: int = 0,
        commit: int = 0,
        keep_on_cancel: bool = False,
        adapters: int = 0,
    ) -> DecoderStream:
        """Start a stream; it runs as soon as a sequence is free.

        tokens: the whole prompt, from position 0.
        kind: "generate", "score" (log-probability of each token but the first ``given``, which may be
            in some stream's KV already) or "embed" (the final hidden states, pooled by "mean", "cls"
            (the first) or "last").
        hidden: keep the final hidden state of the last token, as ``values``.
        sampler: copied; the stream's own afterwards. It is shown tokens[accept_from:].
        end_tokens: end the stream as the vocabulary's end-of-generation tokens do.
        capacity: pieces that may wait to be taken before the stream pauses.
        sequence: from ``make_sequence``; the first ``cached`` tokens are taken from its KV if they
            are still there. ``commit`` is where this turn began: a stream that is cancelled goes back
            to it, unless ``keep_on_cancel``.
        adapters: a set from ``define_adapters``.
        The others are documented in GenerationParams.

        Raises QueueFullError, ContextFullError, ClosedError, ParameterError, TokenError, EngineError.
        """
        cdef decoding.Request request
        cdef DecoderStream stream = DecoderStream.__new__(DecoderStream, maker)
        cdef shared_ptr[decoding.Decoder] impl
        self.alive()
        cdef int n_vocab = len(self.context.model.vocab)
        request.kind = <decoding.Kind><int>check_choice("kind", kind, _KINDS)
        if request.kind == decoding.Kind.generate and sampler is None:
            raise ParameterError("a generation needs a sampler", parameter="sampler")
        request.tokens = token_vector(tokens)
        cdef llama.llama_token token
        for token in request.tokens:
            if not 0 <= token < n_vocab:
                raise TokenError(
                    f"token {token} is outside the vocabulary of {n_vocab} tokens",
                    parameter="tokens", value=token)
        if request.tokens.empty():
            raise ParameterError("the prompt is empty; give at least one token", parameter="tokens")
        if <int>request.tokens.size() > self.context.n_ctx:
            raise ContextFullError(
                f"the prompt has {request.tokens.size()} tokens; the context holds"
                f" n_ctx={self.context.n_ctx}",
                needed=request.tokens.size(), n_ctx=self.context.n_ctx)
        request.accept_from = check_int("accept_from", accept_from, 0, 2**31 - 1)
        request.stops = _utf8_list("stop", stop)
        for number in end_tokens:
            request.end_tokens.push_back(end_token(n_vocab, number))
        request.max_tokens = -1 if max_tokens is None else check_int(
            "max_tokens", max_tokens, 0, 2**31 - 1)
        request.logprobs = -1 if logprobs is None else check_int("logprobs", logprobs, 0, n_vocab)
        request.special = special
        request.shift = shift
        if shift and not self.can_shift:
            raise UnsupportedError(
                f'context_overflow="shift": {self.context.no_shift}; use "stop"')
        request.n_keep = check_int("n_keep", n_keep, -1, 2**31 - 1)
        request.hidden = hidden
        pooled = self.context.pooling_ != <int>llama.LLAMA_POOLING_TYPE_NONE
        if pooled and (hidden or request.kind == decoding.Kind.embed):
            raise UnsupportedError(
                "the context pools, so tokens have no states of their own; make it with"
                ' pooling="none"')
        request.causal = causal
        request.pooling = <decoding.Pooling><int>check_choice("pooling", pooling, _DECODER_POOLING)
        request.given = check_int("given", given, 1, 2**31 - 1)
        request.threads = 0 if threads is None else check_int("threads", threads, 1, 512)
        request.threads_batch = 0 if batch_threads is None else check_int(
            "batch_threads", batch_threads, 1, 512)
        request.priority = check_int("priority", priority, -2**31, 2**31 - 1)
        request.capacity = check_int("capacity", capacity, 1, 2**31 - 1)
        request.sequence = sequence_number("sequence", sequence)
        request.cached = check_int("cached", cached, 0, 2**31 - 1)
        request.commit = check_int("commit", commit, 0, 2**31 - 1)
        request.keep_on_cancel = keep_on_cancel
        request.set = check_int("adapters", adapters, 0, 2**62)
        if sampler is not None:
            request.sampler.reset(copy_sampler(sampler))
        self.hold()             # the copy reads the vocabulary
        impl = self.impl
        try:
            request.stop_tokens = named_tokens(vocab_of(self.context.model).ptr, request.stops)
            with nogil:
                stream.ptr = impl.get().submit(move(request))
            if self.closed:     # by another thread meanwhile: it came too late to be of use
                raise ClosedError("this Decoder is closed")
            stream.decoder = self
            stream.sampler = sampler
            return stream
        finally:
            self.release()

    cdef int hold(self) except -1:
        """Keeps the model open, not the decoder: whoever closes that need not wait."""
        self.alive()
        return self.context.model.hold()

    cdef void release(self) noexcept:
        self.context.model.release()

    def make_sequence(self) -> int:
        """A sequence that outlives streams: its KV serves the next one. Holds nothing yet."""
        self.alive()
        return self.impl.get().make_sequence()

    def drop_sequence(self, sequence: int) -> None:
        """Forget a sequence. A stream that uses it is cancelled."""
        cdef uint64_t id = sequence_number("sequence", sequence)
        self.alive()
        self.impl.get().drop_sequence(id)

    def fork_sequence(self, source: int, target: int, n: int) -> DecoderReply:
        """Give ``target`` the first ``n`` positions of ``source``, as far as the cache allows. The
        reply's value is how many it has now."""
        cdef uint64_t a = sequence_number("source", source)
        cdef uint64_t b = sequence_number("target", target)
        cdef int count = check_int("n", n, 0, 2**31 - 1)
        self.alive()
        return wrap_reply(self, self.impl.get().fork_sequence(a, b, count))

    def save_sequence(self, sequence: int) -> DecoderReply:
        """The KV of an idle sequence. The reply's ``data`` is as ``triollama._engine.save_sequence``
        gives it (empty if it holds nothing), its value the number of positions."""
        cdef uint64_t id = sequence_number("sequence", sequence)
        self.alive()
        return wrap_reply(self, self.impl.get().save_sequence(id))

    def load_sequence(self, sequence: int, data, n: int, adapters: int = 0) -> DecoderReply:
        """Restore what ``save_sequence`` gave, ``n`` positions, computed with this set of adapters.
        ``data``, bytes or another buffer, is copied only if it can be written to.

        Raises StateError if the bytes are damaged, or of another model or kind of context; the
        reply does, and the sequence is then empty, if they are not n positions or find no room.
        """
        cdef uint64_t id = sequence_number("sequence", sequence)
        cdef uint64_t set_id = check_int("adapters", adapters, 0, 2**62)
        cdef int count = check_int("n", n, 0, 2**31 - 1)
        cdef const uint8_t[::1] view = state_bytes(data)
        cdef int header = _HEADER.size
        check_state(self.context, view, _KIND_SEQUENCE)
        if view.shape[0] == header:
            raise StateError("the state holds nothing")
        self.alive()
        cdef DecoderReply reply = wrap_reply(self, self.impl.get().load_sequence(
            id, &view[0] + header, view.shape[0] - header, count, set_id))
        # The thread reads these very bytes: they stay until it has answered.
        self.held[reply.ptr.get().id] = view
        return reply

    def shift_sequence(self, sequence: int, keep: int, drop: int) -> DecoderReply:
        """Forget the positions from ``keep`` to ``keep + drop`` of an idle sequence, and move down what
        follows; where others share its cells they keep theirs. The reply's value is how many it has
        then; StateError, and nothing has changed or the sequence is empty, where that cannot be."""
        cdef uint64_t id = sequence_number("sequence", sequence)
        cdef int kept = check_int("keep", keep, 0, 2**30)
        cdef int dropped = check_int("drop", drop, 1, 2**30)
        self.alive()
        return wrap_reply(self, self.impl.get().shift_sequence(id, kept, dropped))

    def query_sequence(self, sequence: int) -> DecoderReply:
        """The reply's value is the number of positions a sequence holds."""
        cdef uint64_t id = sequence_number("sequence", sequence)
        self.alive()
        return wrap_reply(self, self.impl.get().query_sequence(id))

    def load_adapter(self, path) -> DecoderReply:
        """Load a LoRA adapter between two steps, which wait for it: milliseconds, if the file was
        read lately, and until what the model's other contexts compute is done. The reply's
        ``adapter`` is what came of it.

        Raises AdapterError and ModelNotFoundError for a file that is no adapter's; what llama.cpp
        refuses only while it loads, the reply raises.
        """
        self.alive()
        cdef Model model = self.context.model
        cdef str name = check_adapter_file(model, path)
        cdef string raw_path = os.fsencode(name)
        begin_log()
        self.alive()                    # the GIL was free meanwhile
        cdef DecoderReply reply = wrap_reply(
            self, decoding.open_adapter_between_steps(self.impl.get()[0], model.ptr, raw_path))
        reply.path = name
        return reply

    def free_adapter(self, Adapter adapter not None) -> DecoderReply:
        """Close an adapter between two steps. BusyError while a set names it."""
        self.alive()
        adapter.check_model(self.context.model)
        adapter.check_childless()
        return wrap_reply(self, decoding.free_adapter_between_steps(
            self.impl.get()[0], adapter.model.ptr, adapter.let_go()))

    def define_adapters(self, set_id: int, adapters=(), control=None) -> DecoderReply:
        """Name a set of (Adapter, scale) pairs by a number of your own, at least 1, for ``submit``. Sets
        cannot change: define another. The adapters stay open until the set is dropped.

        control: a control vector beside them, float32 [n_layer - 1, n_embd]: row l - 1 is added to
        the hidden state after layer l.

        An adapter with an ``invocation`` stands alone: a stream's prompt is the bare model's up to
        the last place where it says that, and the whole stream where it does not.
        """
        cdef decoding.ContextSet native
        cdef Adapter adapter
        cdef const float[:, ::1] rows
        self.alive()
        number = check_int("set_id", set_id, 1, 2**62)
        cdef uint64_t native_id = number
        chosen = chosen_adapters(adapters)
        if control is not None:
            rows = control_rows(self.context.model, control)
            if rows.shape[0]:           # a model of one layer has none to add to
                native.control.assign(&rows[0, 0], &rows[0, 0] + rows.shape[0] * rows.shape[1])
            native.control_first = 1
            native.control_last = rows.shape[0]
        self.alive()
        if number in self.sets:
            raise ParameterError(f"set {number} is defined already", parameter="set_id", value=number)
        for adapter, scale in chosen:
            adapter.check_model(self.context.model)
            native.adapters.push_back(adapter.ptr)
            native.scales.push_back(scale)
            if adapter.invocation and (len(chosen) > 1 or control is not None):
                raise ParameterError(
                    f"{adapter.path} takes part from its invocation on, and goes with no other",
                    parameter="adapters")
            native.invocation = adapter.invocation
        use_adapters(chosen, 1)
        self.sets[number] = chosen
        return wrap_reply(self, self.impl.get().define_set(native_id, native))

    def drop_adapters(self, set_id: int) -> DecoderReply:
        """Forget a set. The reply raises StateError if a stream still uses it; else its adapters may be
        closed once it is done and ``release_adapters`` was called."""
        number = check_int("set_id", set_id, 1, 2**62)
        cdef uint64_t native_id = number
        self.alive()
        reply = wrap_reply(self, self.impl.get().drop_set(native_id))
        if number in self.sets:
            self.dropping[number] = reply
        return reply

    def release_adapters(self, set_id: int) -> None:
        """After ``drop_adapters`` was answered: let the set's adapters be closed. Raises what the
        answer raises: BusyError before it is there, StateError if a stream still used the set."""
        number = check_int("set_id", set_id, 1, 2**62)
        if number not in self.sets:
            return
        if number not in self.dropping:
            raise BusyError(f"set {number} is in use: ask for drop_adapters first")
        cdef DecoderReply reply = self.dropping[number]
        if reply.is_done:
            del self.dropping[number]
        reply.check()
        release_set(self, number)

    def step(self, n: int = 1) -> DecoderReply:
        """Stepwise: do n steps. The reply's value is how many had something to do."""
        cdef int32_t count = check_int("n", n, 1, 2**30)
        self.alive()
        return wrap_reply(self, self.impl.get().step(count))

    def fail_at(self, node: int) -> None:
        """For tests: die, as of a failed assertion, when llama.cpp has computed so many nodes of graphs
        from now on (CPU and Metal, one thread)."""
        cdef int64_t n = check_int("node", node, 1, 2**62)
        self.alive()
        self.impl.get().fail_at(n)

    def statistics(self) -> dict[str, object]:
        """Counts as of the end of the last step. ``first_token_s``: seconds from submission to the
        first token, of the last 256 streams."""
        self.alive()
        cdef decoding.Statistics s = self.impl.get().statistics()
        return {
            "running": s.running,
            "prefilling": s.prefilling,
            "parked": s.parked,
            "queued": s.queued,
            "sequences": s.sequences,
            "slots_free": s.slots_free,
            "cells_used": s.cells_used,
            "host_bytes": s.host_bytes,
            "disk_bytes": s.disk_bytes,
            "finished": s.finished,
            "cancelled": s.cancelled,
            "failed": s.failed,
            "prompt_tokens": s.prompt_tokens,
            "cached_tokens": s.cached_tokens,
            "generated_tokens": s.generated_tokens,
            "steps": s.steps,
            "aborts": s.aborts,
            "evictions": s.evictions,
            "restores": s.restores,
            "recomputes": s.recomputes,
            "spills": s.spills,
            "disk_failures": s.disk_failures,
            "preemptions": s.preemptions,
            "set_changes": s.set_changes,
            "slow_samples": s.slow_samples,
            "first_token_s": list(s.first_token_s),
        }

    @property
    def cause_of_death(self) -> str:
        """Why the thread ended by itself; empty while it lives. Every stream then failed with it."""
        self.alive()
        return self.impl.get().cause_of_death().decode("utf-8", "replace")


@cython.no_gc_clear
cdef class DecoderStream:
    """One stream: take its pieces, cancel it, and see how it ended. Comes from ``Decoder.submit``."""

    def __cinit__(self, given=None):
        require_maker(given, "Decoder.submit")

    def __dealloc__(self):
        # An abandoned stream would go on until it is full, and hold its sequence.
        if self.decoder is not None and not self.decoder.closed and self.decoder.forks == fork_count:
            self.decoder.impl.get().cancel(self.ptr.get()[0])

    @property
    def id(self) -> int:
        """As ``Decoder.poll`` names it."""
        return self.ptr.get().id

    def take(self) -> tuple | None:
        """The oldest piece, (text, token ids, scores, time in ns on time.monotonic_ns()'s clock), or
        None if none is there now. scores: None, or per token (logprob, ((token, logprob), ...))."""
        cdef decoding.Piece piece
        cdef cpp_bool found
        self.decoder.alive()
        found = self.decoder.impl.get().take(self.ptr.get()[0], piece)
        if not found:
            return None
        scores = None
        if not piece.scores.empty():
            scores = tuple([
                (score.logprob, tuple([(top.id, top.logprob) for top in score.top]))
                for score in piece.scores])
        return piece.text.decode(), tuple(piece.tokens), scores, piece.time_ns

    def cancel(self) -> None:
        """Stop it, now: also inside a decode on CPU and Metal. From here on it does not count
        against admission. Idempotent."""
        if not self.decoder.is_closed:
            self.decoder.impl.get().cancel(self.ptr.get()[0])

    def cancel_at(self, node: int) -> None:
        """For tests: cancel it when llama.cpp has computed so many nodes of graphs from now on (CPU and
        Metal)."""
        cdef int64_t n = check_int("node", node, 1, 2**62)
        self.decoder.alive()
        self.decoder.impl.get().cancel_at(self.ptr, n)

    def set_priority(self, priority: int) -> None:
        """Higher goes first: in the queue, and among prompts."""
        cdef int32_t value = check_int("priority", priority, -2**31, 2**31 - 1)
        self.decoder.alive()
        self.decoder.impl.get().set_priority(self.ptr, value)

    def update(self, params) -> None:
        """Sample by these parameters, and stop at their ``max_tokens``, from the next token on. The
        seed, and everything that is not about sampling or length, stays as it was."""
        cdef sampling.SamplingParams native
        cdef int32_t most
        self.decoder.alive()
        if self.sampler is None:
            raise ParameterError("this stream does not sample", parameter="params")
        self.sampler.fill(native, params)
        most = -1 if params.max_tokens is None else params.max_tokens
        self.decoder.alive()
        decoding.update_stream(self.decoder.impl.get()[0], self.ptr, most, &native)

    def sampler_state(self) -> bytes:
        """What ``Sampler.save_state`` gives, after the last token; BusyError while it runs."""
        if self.ptr.get().finish() == decoding.Finish.none:
            raise BusyError("the stream is still running")
        if self.ptr.get().sampler() == NULL:
            raise ParameterError("this stream does not sample")
        return self.ptr.get().sampler().save_state()

    @property
    def waiting(self) -> int:
        """Pieces that wait to be taken."""
        return self.ptr.get().waiting()

    @property
    def finish_reason(self) -> str | None:
        """None while it runs; then "eos", "stop", "length", "context", "done" (score, embed),
        "cancelled" or "error". What follows is final only then."""
        return _FINISHES[<int>self.ptr.get().finish()]

    @property
    def error(self) -> Exception | None:
        """What ended it, if its finish_reason is "error"."""
        if self.ptr.get().finish() != decoding.Finish.error:
            return None
        return stream_error(self.ptr.get().failure, self.ptr.get().message.decode("utf-8", "replace"))

    @property
    def failed_with_engine(self) -> bool:
        """Whether it ended because the whole decoder died."""
        return (self.ptr.get().finish() == decoding.Finish.error
                and self.ptr.get().failure == decoding.Failure.engine)

    @property
    def stop_index(self) -> int | None:
        """Which stop string ended it."""
        cdef int index = self.ptr.get().stop_index if self.ptr.get().finish() == decoding.Finish.stop else -1
        return None if index < 0 else index

    @property
    def end_token(self) -> int | None:
        """Which token ended it: of end-of-generation, or one of ``end_tokens``."""
        return self.ptr.get().end_token if self.ptr.get().finish() == decoding.Finish.eos else None

    @property
    def position(self) -> int:
        """Positions of its sequence that are in the KV, once finished."""
        return 0 if self.ptr.get().finish() == decoding.Finish.none else self.ptr.get().position

    @property
    def shifted(self) -> int:
        """Tokens dropped by context shifts, once finished."""
        return 0 if self.ptr.get().finish() == decoding.Finish.none else self.ptr.get().shifted

    @property
    def shifts(self) -> list[int]:
        """How many tokens each context shift dropped, after the first ``n_keep``, once finished."""
        if self.ptr.get().finish() == decoding.Finish.none:
            return []
        return list(self.ptr.get().shifts)

    @property
    def values(self) -> list[float]:
        """Once finished: score's log-probabilities, embed's vector, or with ``hidden`` the state."""
        if self.ptr.get().finish() == decoding.Finish.none:
            return []
        return list(self.ptr.get().values)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, of those from the cache, generated; and the times, in ns on
        time.monotonic_ns()'s clock, 0 where that has not happened."""
        cdef decoding.Usage u = self.ptr.get().usage()
        return {
            "prompt": u.prompt,
            "cached": u.cached,
            "generated": u.generated,
            "submitted_ns": u.submitted_ns,
            "admitted_ns": u.admitted_ns,
            "first_ns": u.first_ns,
            "last_ns": u.last_ns,
            "finished_ns": u.finished_ns,
        }


cdef DecoderReply wrap_reply(Decoder decoder, shared_ptr[decoding.Reply] ptr):
    cdef DecoderReply reply = DecoderReply.__new__(DecoderReply, maker)
    reply.ptr = ptr
    reply.context = decoder.context
    return reply


cdef class DecoderReply:
    """The answer to a command that only the decoder's thread can carry out."""

    def __cinit__(self, given=None):
        require_maker(given, "a Decoder")

    @property
    def id(self) -> int:
        """As ``Decoder.poll`` names it."""
        return self.ptr.get().id

    @property
    def is_done(self) -> bool:
        """Whether the answer is there."""
        return self.ptr.get().is_done()

    cdef int check(self) except -1:
        if not self.ptr.get().is_done():
            raise BusyError("the decoder has not answered yet; wait until poll names this reply")
        if not self.ptr.get().ok:
            why = self.ptr.get().message.decode("utf-8", "replace")
            if self.ptr.get().engine_failed:
                raise EngineError(why)
            if self.path is not None:
                raise AdapterError(
                    f"llama.cpp cannot load the adapter {self.path}: {why}", path=self.path)
            raise StateError(why)
        return 0

    @property
    def value(self) -> int:
        """The number it answers with. StateError if the command failed, EngineError if the decoder died,
        BusyError if it is not done."""
        self.check()
        return self.ptr.get().value

    @property
    def adapter(self) -> Adapter | None:
        """What ``load_adapter`` loaded, for others None. AdapterError if llama.cpp refused the file,
        BusyError if it is not done."""
        self.check()
        if self.path is None:
            return None
        if self.loaded is None:
            self.context.model.alive()
            self.loaded = adopt_adapter(
                self.context.model, self.path,
                <llama.llama_adapter_lora *><intptr_t>self.ptr.get().value)
        return self.loaded

    @property
    def data(self) -> bytes:
        """The bytes it answers with; errors as ``value``."""
        self.check()
        if self.ptr.get().bytes.empty():
            return b""
        return seal_state(self.context, _KIND_SEQUENCE, self.ptr.get().bytes)
