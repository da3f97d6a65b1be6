"""Life and death of native objects: use after close, use after fork, two threads inside, living children."""
import os

import cython

from llama cimport llama_backend_init

cdef unsigned int fork_count = 0
cdef dict live_counts = {}


def _after_fork_in_child() -> None:
    global fork_count
    fork_count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

llama_backend_init()


# What classes that only we may make ask for: ``cls.__new__(cls)`` would give one without its insides.
cdef object maker = object()


cdef int require_maker(object given, str origin) except -1:
    if given is not maker:
        raise TypeError(f"such an object comes from {origin}")
    return 0


def live_objects() -> dict[str, int]:
    """How many native objects of each class are open: for tests that look for leaks."""
    return {name: count for name, count in sorted(live_counts.items()) if count}


cdef void count_live(str name, int change) noexcept:
    live_counts[name] = live_counts.get(name, 0) + change


@cython.no_gc_clear
cdef class Owner:
    """Base of the classes that own a native object. Not for direct use."""

    def __cinit__(self):
        self.forks = fork_count
        self.closed = True      # until the native object exists

    cdef int begin(self) except -1:
        """First in every __init__."""
        if self.begun:
            raise BusyError(f"this {type(self).__name__} was opened already; make a new one")
        self.begun = True
        return 0

    cdef int alive(self) except -1:
        if self.forks != fork_count:
            raise ForkedError(
                f"this {type(self).__name__} belongs to the parent process: native threads and"
                " locks do not survive a fork; open a new one in the child")
        if self.closed:
            raise ClosedError(f"this {type(self).__name__} is closed")
        return 0

    cdef int enter(self) except -1:
        self.alive()
        if self.busy:
            raise BusyError(
                f"another thread is inside this {type(self).__name__}; native objects serve one"
                " thread at a time")
        self.busy = True
        return 0

    cdef void leave(self) noexcept:
        self.busy = False

    cdef int check_childless(self) except -1:
        if self.busy or self.readers:
            raise BusyError(
                f"cannot close this {type(self).__name__}: another thread is inside it")
        if self.children:
            raise BusyError(
                f"cannot close this {type(self).__name__}: {self.children} object(s) made from it"
                " are still open; close them first")
        return 0

    @property
    def is_closed(self) -> bool:
        """Whether ``close()`` was called, or the object belongs to the parent of a fork."""
        return self.closed or self.forks != fork_count
