cdef class Owner:
    """What every owner of a native object shares: whether it lives, who is inside, who depends on it."""
    cdef object __weakref__
    cdef bint closed
    cdef bint begun             # __init__ was called: never twice, for others keep our native pointer
    cdef bint busy              # a thread is inside a blocking call; guarded by the GIL
    cdef int readers            # calls under way in other objects that read this one, likewise
    cdef int children           # living objects that hold native pointers into this one
    cdef unsigned int forks     # forks of this process before the object was made

    cdef int begin(self) except -1
    cdef void opened(self) noexcept
    cdef void ended(self) noexcept
    cdef void interrupt(self) noexcept
    cdef int alive(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef int hold(self) except -1
    cdef void release(self) noexcept
    cdef int check_childless(self) except -1
