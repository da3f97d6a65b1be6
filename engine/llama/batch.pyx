"""What one decode computes: tokens with their positions, sequences and whether they have an output."""


cdef class Batch:
    """Tokens for ``Context.decode``.

    capacity: most tokens it will hold. n_seq_max: most sequences one token may belong to. Together
    at most 2**26 places. A batch owns its memory and may be reused: ``clear`` and fill again.
    """

    def __init__(self, capacity: int, n_seq_max: int = 1):
        cdef int n = check_int("capacity", capacity, 1, 2**24)
        cdef int each = check_int("n_seq_max", n_seq_max, 1, 256)
        cdef int64_t places = <int64_t>n * each
        cdef int i
        if places > 2**26:
            raise ParameterError(
                f"{capacity} tokens of {n_seq_max} sequences each are more than 2**26 places; a batch of"
                " fewer tokens does", parameter="capacity", value=capacity)
        self.check_unused()
        self.c.n_tokens = 0
        self.capacity = 0               # until there is room
        self.token.resize(n)
        self.pos.resize(n)
        self.n_seq_id.resize(n)
        self.seq_id_data.resize(places)
        self.seq_id.resize(n)
        self.logits.resize(n)
        for i in range(n):
            self.seq_id[i] = self.seq_id_data.data() + <int64_t>i * each
        self.capacity = n
        self.n_seq_max = each
        self.c.token = self.token.data()
        self.c.embd = NULL
        self.c.pos = self.pos.data()
        self.c.n_seq_id = self.n_seq_id.data()
        self.c.seq_id = self.seq_id.data()
        self.c.logits = self.logits.data()

    cdef int check_unused(self) except -1:
        if self.readers:
            raise BusyError("this Batch is being decoded by another thread")
        return 0

    cdef int reserve(self, Py_ssize_t n) except -1:
        self.check_unused()
        if self.c.n_tokens + n > self.capacity:
            raise ParameterError(
                f"the batch holds {self.c.n_tokens} of {self.capacity} tokens; {n} more do not fit",
                parameter="tokens", value=n)
        return 0

    cdef void put(self, llama.llama_token token, llama.llama_pos pos, llama.llama_seq_id seq_id,
                  bint output) noexcept nogil:
        cdef int i = self.c.n_tokens
        self.token[i] = token
        self.pos[i] = pos
        self.n_seq_id[i] = 1
        self.seq_id[i][0] = seq_id
        self.logits[i] = output
        self.c.n_tokens = i + 1

    def __len__(self) -> int:
        return self.c.n_tokens

    def clear(self) -> None:
        """Empty the batch."""
        self.check_unused()
        self.c.n_tokens = 0

    def add(self, token: int, pos: int, seq_id: int = 0, output: bool = False) -> int:
        """Append one token; returns its index in the batch."""
        cdef llama.llama_token t = check_int("token", token, 0, 2**31 - 1)
        cdef llama.llama_pos p = check_int("pos", pos, 0, 2**31 - 1)
        cdef llama.llama_seq_id s = check_int("seq_id", seq_id, 0, 255)
        cdef bint has_output = output
        self.reserve(1)
        self.put(t, p, s, has_output)
        return self.c.n_tokens - 1

    def extend(self, tokens, pos: int, seq_id: int | tuple[int, ...] = 0,
               output: str = "last") -> int:
        """Append ``tokens`` (int32 buffer or any iterable) at positions pos, pos + 1, ...

        ``seq_id`` may be a tuple: the tokens then belong to each of these sequences.
        ``output`` is "last", "all" or "none": which tokens have logits afterwards.
        Returns the index of the last token.
        """
        cdef vector[llama.llama_token] ids = token_vector(tokens)
        cdef int n = <int>ids.size()
        cdef int first = check_int("pos", pos, 0, 2**31 - 1 - n)
        cdef int i
        cdef int s
        cdef bint all_outputs = output == "all"
        cdef bint last_output = output == "last"
        if output not in ("last", "all", "none"):
            raise ParameterError(
                f'output must be "last", "all" or "none", not {output!r}',
                parameter="output", value=output)
        cdef vector[llama.llama_seq_id] seqs
        for one in (seq_id if isinstance(seq_id, tuple) else (seq_id,)):
            seqs.push_back(check_int("seq_id", one, 0, 255))
        if not 0 < <int>seqs.size() <= self.n_seq_max:
            raise ParameterError(
                f"a token of this batch may belong to 1 to {self.n_seq_max} sequences,"
                f" not {seqs.size()}", parameter="seq_id", value=seq_id)
        self.reserve(n)
        for i in range(n):
            self.put(ids[i], first + i, seqs[0], all_outputs)
            for s in range(1, <int>seqs.size()):
                self.seq_id[self.c.n_tokens - 1][s] = seqs[s]
            self.n_seq_id[self.c.n_tokens - 1] = <int>seqs.size()
        if n and last_output:
            self.logits[self.c.n_tokens - 1] = True
        return self.c.n_tokens - 1

    def set(self, tokens, positions, seq_ids, outputs) -> None:
        """Replace the content by four buffers of equal length: tokens, positions and sequence ids
        (int32) and outputs (int8 or bool). Nothing is copied token by token in Python."""
        cdef const int32_t[::1] token_view
        cdef const int32_t[::1] pos_view
        cdef const int32_t[::1] seq_view
        cdef const int8_t[::1] output_view
        try:
            token_view = memoryview(tokens)     # None is a memoryview to Cython alone
            pos_view = memoryview(positions)
            seq_view = memoryview(seq_ids)
            output_view = memoryview(outputs).cast("B").cast("b")
        except (TypeError, ValueError, BufferError) as error:
            raise ParameterError(
                "tokens, positions and seq_ids must be contiguous buffers of int32, outputs of int8"
                f" or bool: {error}", parameter="tokens") from None
        cdef Py_ssize_t n = token_view.shape[0]
        cdef Py_ssize_t i
        if not n == pos_view.shape[0] == seq_view.shape[0] == output_view.shape[0]:
            raise ParameterError(
                f"the buffers have different lengths: {n}, {pos_view.shape[0]},"
                f" {seq_view.shape[0]}, {output_view.shape[0]}", parameter="tokens")
        if n > self.capacity:
            raise ParameterError(
                f"the batch takes {self.capacity} tokens, not {n}", parameter="tokens", value=n)
        self.clear()
        for i in range(n):
            self.put(token_view[i], pos_view[i], seq_view[i], output_view[i] != 0)
