"""How native exceptions become Python's, and what stops a context."""
from libc.stdint cimport int64_t
from libcpp cimport bool as cpp_bool


cdef extern from "guards/raise.hpp" namespace "triollama::native" nogil:
    void raise_native_error() noexcept


cdef extern from "guards/abort_flag.hpp" namespace "triollama::native" nogil:
    cdef cppclass AbortFlag:
        cpp_bool raised()
        void set(cpp_bool value)
        void raise_at(int64_t n, cpp_bool fail)

        @staticmethod
        void raise_all() noexcept

        @staticmethod
        cpp_bool ask(void * flag) noexcept
