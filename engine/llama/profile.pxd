"""Where the time of a graph goes, profile.hpp."""
from libc.stdint cimport int64_t
from libcpp.map cimport map
from libcpp.string cimport string

cimport llama
from guards cimport raise_native_error

cdef extern from "llama/profile.hpp" namespace "triollama::native" nogil:
    cdef cppclass Timing:
        double seconds
        int64_t calls

    cdef cppclass Profile:
        Profile(llama.llama_context * ctx) except +raise_native_error
        map[string, Timing] timings()
