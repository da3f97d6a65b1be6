cdef class Vocab:
    cdef Model model
    cdef const llama.llama_vocab * ptr
    cdef readonly int n_tokens
    cdef vector[llama.llama_token] eog
    cdef bint eog_known

    cdef int alive(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef llama.llama_token token_id(self, object token) except -1
    cdef int check_token(self, llama.llama_token token) except -1
    cdef const vector[llama.llama_token] * find_eog(self) except NULL


cdef class TextStream:
    cdef unique_ptr[NativeTextStream] native
