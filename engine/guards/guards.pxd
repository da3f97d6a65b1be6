"""How native exceptions become Python's."""

cdef extern from "guards/raise.hpp" namespace "triollama::native" nogil:
    void raise_native_error() noexcept
