cdef class Memory:
    cdef Context context

    cdef llama.llama_seq_id enter(self, object seq_id, bint any_allowed) except? -2
