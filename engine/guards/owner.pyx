"""Life and death of native objects: use after close, use after fork, two threads inside, living children."""
import atexit
import os
import time
import warnings
import weakref

import cython

from cpython.pythread cimport PyThread_get_thread_ident
from libcpp.atomic cimport atomic

cdef extern from "guards/stack.hpp" namespace "triollama::native" nogil:
    size_t stack_left() noexcept


cdef unsigned int fork_count = 0
cdef dict owners = {}               # weak references to the objects that are open, by id
cdef int calls = 0                  # under way in llama.cpp, or whatever else needs what C++ destroys at exit
cdef atomic[cpp_bool] exiting       # and nothing may begin any more; read without the GIL too
cdef long exiting_thread = 0
cdef object warn = warnings.warn    # at the end of the interpreter a module has no names any more

# Seconds that the end of the process waits for calls that nothing can stop.
cdef double _EXIT_PATIENCE = 60.0

# Bytes of stack that a call has at least. 88 KiB were seen in use, and tokenizing uses 324 bytes for each
# character of a short word (text/tokenize.cpp).
cdef size_t _STACK = 160 << 10


def _after_fork_in_child() -> None:
    global calls, fork_count
    fork_count += 1
    calls = 0                       # those of other threads, which are not here


def _at_exit() -> None:
    """Stops what computes, in whichever thread, and lets nothing begin: the destructors that C++ runs
    next take ggml's tables away. (Of threads that nobody waits for: others have ended by now.)"""
    global exiting_thread
    cdef Owner owner
    exiting_thread = PyThread_get_thread_ident()
    exiting.store(True)             # loads look at it themselves
    AbortFlag.raise_all()
    for reference in list(owners.values()):
        owner = reference()
        if owner is not None and owner.forks == fork_count:
            owner.interrupt()
    latest = time.monotonic() + _EXIT_PATIENCE
    while calls > 0 and time.monotonic() < latest:
        time.sleep(0.001)           # they need the GIL to end
    retire_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)

llama.llama_backend_init()


cdef object exit_error():
    """What a call raises once the interpreter exits. Other threads are about to be ended: silently."""
    if PyThread_get_thread_ident() != exiting_thread:
        return SystemExit()
    return ClosedError("the interpreter is exiting: nothing can be computed any more")


cdef int begin_call() except -1:
    """Before a call that runs without the GIL; ``end_call`` after it, in a ``finally``."""
    if exiting.load():
        raise exit_error()
    cdef size_t left = stack_left()
    if left < _STACK:
        raise EngineError(
            f"this thread has {left >> 10} KiB of stack left, and llama.cpp may need {_STACK >> 10}: call"
            " threading.stack_size() with more, or nothing, before the thread starts")
    begin_free()
    return 0


cdef void begin_free() noexcept:
    """As ``begin_call``, for what may be done at exit too."""
    global calls
    calls += 1


cdef void end_call() noexcept:
    global calls
    calls -= 1


# What classes that only we may make ask for: ``cls.__new__(cls)`` would give one without its insides.
cdef object maker = object()


cdef int require_maker(object given, str origin) except -1:
    if given is not maker:
        raise TypeError(f"such an object comes from {origin}")
    return 0


def live_objects() -> dict[str, int]:
    """How many native objects of each class are open: for tests that look for leaks."""
    found: dict[str, int] = {}
    for reference in list(owners.values()):
        owner = reference()
        if owner is not None:
            name = type(owner).__name__
            found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


@cython.no_gc_clear
cdef class Owner:
    """Base of the classes that own a native object. Not for direct use.

    What Python code may do between a check and a use: anything, close this object included. So
    ``alive()`` stands after the last conversion of an argument, right before the use; or ``enter()``
    or ``hold()`` before both, for while they last nobody closes it.
    """

    def __cinit__(self):
        self.forks = fork_count
        self.closed = True      # until the native object exists

    cdef int begin(self) except -1:
        """First in every __init__."""
        if self.begun:
            raise BusyError(f"this {type(self).__name__} was opened already; make a new one")
        self.begun = True
        return 0

    cdef void opened(self) noexcept:
        """Last in every __init__: the native object exists."""
        self.closed = False
        owners[id(self)] = weakref.ref(self)

    cdef void ended(self) noexcept:
        """First in every close: nobody may use the native object from here on."""
        self.closed = True
        owners.pop(id(self), None)

    cdef void interrupt(self) noexcept:
        """The interpreter exits: stop what runs in other threads."""

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
        begin_call()
        self.busy = True
        return 0

    cdef void leave(self) noexcept:
        self.busy = False
        end_call()

    cdef int hold(self) except -1:
        """Of several threads at once, who only read."""
        self.alive()
        begin_call()
        self.readers += 1
        return 0

    cdef void release(self) noexcept:
        self.readers -= 1
        end_call()

    cdef int check_childless(self) except -1:
        if self.busy or self.readers:
            raise BusyError(
                f"cannot close this {type(self).__name__}: another thread is inside it")
        if self.children:
            raise BusyError(
                f"cannot close this {type(self).__name__}: {self.children} object(s) made from it"
                " are still open; close them first")
        return 0

    def __del__(self):
        # As files do: what nobody closed is closed now, at a time and in an order of nobody's choice.
        if not self.closed and self.forks == fork_count:
            warn(f"unclosed {type(self).__name__}", ResourceWarning, source=self)

    @property
    def is_closed(self) -> bool:
        """Whether ``close()`` was called, or the object belongs to the parent of a fork."""
        return self.closed or self.forks != fork_count
