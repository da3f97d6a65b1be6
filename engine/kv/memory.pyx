"""What a context remembers: the KV cache or recurrent state, by sequence and position."""


cdef int check_can_shift(Context context) except -1:
    if context.no_shift:
        raise UnsupportedError(f"this context's positions cannot be moved: {context.no_shift}")
    return 0


cdef class Memory:
    """The memory of a context. Obtained as ``context.memory``.

    Positions are half-open ranges [p0, p1); p0 None is 0, p1 None is the end. Sequence ids are
    checked; ``ParameterError`` otherwise.
    """

    def __cinit__(self, given=None):
        require_maker(given, "Context.memory")

    cdef llama.llama_seq_id enter(self, object seq_id, bint any_allowed) except? -2:
        """Enters the context; gives the sequence, which exists (or is -1, for all, if allowed)."""
        cdef llama.llama_seq_id s = check_int("seq_id", seq_id, -2**31, 2**31 - 1)
        self.context.enter()
        try:
            self.context.check_seq(s, any_allowed)
        except BaseException:
            self.context.leave()
            raise
        return s

    def seq_pos_min(self, seq_id: int) -> int:
        """Smallest position held, -1 if none. Above 0 where a sliding window dropped the rest."""
        cdef llama.llama_seq_id s = self.enter(seq_id, False)
        try:
            return llama.llama_memory_seq_pos_min(self.context.mem, s)
        finally:
            self.context.leave()

    def seq_pos_max(self, seq_id: int) -> int:
        """Largest position held, -1 if none."""
        cdef llama.llama_seq_id s = self.enter(seq_id, False)
        try:
            return llama.llama_memory_seq_pos_max(self.context.mem, s)
        finally:
            self.context.leave()

    def seq_rm(self, seq_id: int, p0: int | None = None, p1: int | None = None) -> bool:
        """Forget [p0, p1) of a sequence (-1: of all). False if the memory cannot forget a part (recurrent
        models). True is no promise on sliding windows: see ``can_continue_at``."""
        cdef cpp_bool done
        cdef llama.llama_pos a = bound("p0", p0)
        cdef llama.llama_pos b = bound("p1", p1)
        cdef llama.llama_seq_id s = self.enter(seq_id, True)
        try:
            with nogil:
                done = llama.llama_memory_seq_rm(self.context.mem, s, a, b)
            return done
        finally:
            self.context.leave()

    def can_continue_at(self, seq_id: int, pos: int) -> bool:
        """Whether decoding may go on at ``pos`` after removing what follows: everything that the
        sliding window reaches back to must still be held. The rule is
        seq_pos_min <= max(0, pos - n_swa + 1); ``seq_rm``'s answer does not tell (llama.cpp)."""
        cdef llama.llama_pos low
        cdef llama.llama_pos high
        cdef llama.llama_pos p = check_int("pos", pos, 0, 2**31 - 1)
        cdef llama.llama_seq_id s = self.enter(seq_id, False)
        try:
            low = llama.llama_memory_seq_pos_min(self.context.mem, s)
            high = llama.llama_memory_seq_pos_max(self.context.mem, s)
        finally:
            self.context.leave()
        if p == 0:
            return True
        if high < p - 1:
            return False
        if self.context.model.is_recurrent or self.context.model.is_hybrid:
            return p == high + 1
        n_swa = self.context.model.n_swa
        return low <= (max(0, p - n_swa + 1) if n_swa else 0)

    def seq_cp(self, source: int, target: int, p0: int | None = None, p1: int | None = None) -> None:
        """Let ``target`` share [p0, p1) of ``source``. In a unified cache this costs nothing; with
        separate caches the whole sequence is copied at once, and a part raises UnsupportedError."""
        cdef llama.llama_seq_id t = check_int("target", target, -2**31, 2**31 - 1)
        cdef llama.llama_pos a = bound("p0", p0)
        cdef llama.llama_pos b = bound("p1", p1)
        cdef llama.llama_seq_id s = self.enter(source, False)
        try:
            self.context.check_seq(t, False)
            if not self.context.kv_unified and s != t:
                # llama.cpp aborts the process on a partial copy between separate streams.
                high = llama.llama_memory_seq_pos_max(self.context.mem, s)
                if (a > 0 and a > llama.llama_memory_seq_pos_min(self.context.mem, s)) or (
                        0 <= b <= high):
                    raise UnsupportedError(
                        "with kv_unified=False only a whole sequence can be copied")
                a = -1
                b = -1
            with nogil:
                llama.llama_memory_seq_cp(self.context.mem, s, t, a, b)
            if not self.context.kv_unified:
                self.context.settle_memory()
        finally:
            self.context.leave()

    def seq_keep(self, seq_id: int) -> None:
        """Forget all sequences but this one."""
        cdef llama.llama_seq_id s = self.enter(seq_id, False)
        cdef int other
        try:
            if self.context.kv_unified:
                with nogil:
                    llama.llama_memory_seq_keep(self.context.mem, s)
                return
            # llama.cpp's function looks at the cells of the sequence's own cache only.
            for other in range(self.context.n_seq_max):
                if other != s:
                    llama.llama_memory_seq_rm(self.context.mem, other, -1, -1)
        finally:
            self.context.leave()

    def seq_add(self, seq_id: int, p0: int | None, p1: int | None, delta: int) -> None:
        """Move the positions [p0, p1) by ``delta`` (context shift), and rotate their keys; takes about as
        long as decoding a token. Cells that sequences share move for all of them; what comes to lie
        below 0 is forgotten. Raises UnsupportedError where ``can_shift`` is False, ContextFullError if
        a position would be n_ctx or more."""
        cdef llama.llama_pos a = bound("p0", p0)
        cdef llama.llama_pos b = bound("p1", p1)
        cdef llama.llama_pos d = check_int("delta", delta, -2**30, 2**30)
        cdef llama.llama_seq_id s = self.enter(seq_id, False)
        cdef llama.llama_pos high
        try:
            check_can_shift(self.context)
            high = llama.llama_memory_seq_pos_max(self.context.mem, s)
            if b > 0:
                high = min(high, b - 1)
            if d > 0 and high >= max(a, 0) and high + d >= self.context.n_ctx:
                raise ContextFullError(
                    f"position {high} moved by {d} is outside the context of"
                    f" n_ctx={self.context.n_ctx} tokens", needed=high + d + 1,
                    n_ctx=self.context.n_ctx)
            with nogil:
                llama.llama_memory_seq_add(self.context.mem, s, a, b, d)
            self.context.settle_memory()
            if self.context.exact:
                self.context.order_cells(s)
        finally:
            self.context.leave()

    @property
    def can_shift(self) -> bool:
        """Whether positions can be moved: not by every kind of model, nor with every ``type_k`` or
        ``rope_scaling``."""
        self.context.alive()
        return not self.context.no_shift

    def clear(self) -> None:
        """Forget everything."""
        self.context.enter()
        try:
            with nogil:
                llama.llama_memory_clear(self.context.mem, True)
        finally:
            self.context.leave()


cdef llama.llama_pos bound(str name, object value) except? -2:
    """None, llama.cpp's "open end", is -1."""
    return -1 if value is None else check_int(name, value, 0, 2**31 - 1)


cdef Memory memory_of(Context context):
    if context.mem == NULL:
        raise UnsupportedError("this model has no memory: it only encodes")
    cdef Memory memory = Memory.__new__(Memory, maker)
    memory.context = context
    return memory
