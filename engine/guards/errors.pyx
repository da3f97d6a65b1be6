"""The one place where native results become exceptions."""

from triollama.checks import check_kind, shown  # no-cython-lint
# Most are raised in the other rooms.
from triollama.errors import (
    AdapterError, BusyError, ClosedError, ContextFullError, DecodeAborted,  # no-cython-lint
    DecodeError, EngineError, ForkedError, GrammarError, LoadCancelled, ModelError,  # no-cython-lint
    ModelChangedError, ModelFormatError, ModelNotFoundError, NoSlotError, OutOfMemoryError,  # no-cython-lint
    ParameterError, StateError, TokenError, TriollamaError, UnsupportedError, ViewError,  # no-cython-lint
)

from operator import index

from libc.math cimport NAN


cdef extern from "guards/abort.hpp" namespace "triollama::native" nogil:
    cdef cppclass AbortScope:
        # Once entered and as long as it lives, a failed assertion of ggml on this thread throws
        # instead of ending the process.
        AbortScope() noexcept
        void enter() noexcept

        @staticmethod
        void begin() noexcept

        @staticmethod
        string end() noexcept

        @staticmethod
        void install() noexcept


cdef extern from "threads/openmp.hpp" namespace "triollama::native" nogil:
    bint has_own_threads() noexcept
    void retire_threads() noexcept

AbortScope.install()


cdef object decode_error(int code):
    """The exception for a non-zero result of llama_decode or llama_encode."""
    log = native_problem()
    if code == 1:
        return NoSlotError(
            "the KV cache has no room for this batch; make n_ctx larger, or remove sequences",
            code=code, log=log)
    if code == 2:
        return DecodeAborted("the abort flag stopped the computation", code=code)
    if code == -1:
        return DecodeError(
            "llama.cpp refused the batch: positions must continue those in memory",
            code=code, log=log)
    if code == -2:
        return DecodeError("llama.cpp could not allocate what the batch needs", code=code, log=log)
    return DecodeError(f"llama.cpp failed with code {code}", code=code, log=log)


cdef int check_magic(str path, str what, object wrong) except -1:
    """ModelNotFoundError if the file, called ``what`` in the message, cannot be read; ``wrong``, an
    exception class, if it does not begin as a GGUF file does."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelNotFoundError(
            f"cannot open {what}{path}: {error.strerror or error}", path=path) from error
    if magic != b"GGUF":
        raise wrong(f"{path} is no GGUF file", path=path)
    return 0


cdef object check_int(str name, object value, long long low, long long high):
    """``value`` as an int within bounds; ParameterError otherwise. Use what this gives, never
    ``value`` again: its ``__index__`` may answer differently."""
    number = None
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        try:
            number = int.__index__(index(value))    # a subclass could compare as it likes
        except TypeError:                           # an array has one, for some shapes
            pass
    if number is None:
        raise ParameterError(
            f"{name} must be an integer, not {shown(value)}", parameter=name, value=value)
    if not low <= number <= high:
        raise ParameterError(
            f"{name} must be from {low} to {high}, not {shown(number)}", parameter=name, value=value)
    return number


cdef double check_float(str name, object value, double low, double high) except? -1.0:
    """``value`` as a finite number within bounds; ParameterError otherwise."""
    cdef double number = NAN
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = value
        except OverflowError:
            pass
    if not low <= number <= high:
        raise ParameterError(
            f"{name} must be a number from {low:g} to {high:g}, not {shown(value)}",
            parameter=name, value=value)
    return number


cdef object check_choice(str name, object value, dict choices):
    """``choices[value]``; ParameterError naming the choices otherwise."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        known = ", ".join(repr(choice) for choice in choices)
        raise ParameterError(
            f"{name} must be one of {known}, not {shown(value)}", parameter=name, value=value) from None
