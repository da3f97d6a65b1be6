"""The files of a model, model_files.hpp."""
from libc.stdint cimport int64_t, uint64_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from guards cimport raise_native_error

cdef extern from "guards/model_files.hpp" namespace "triollama::native" nogil:
    cdef cppclass FileMark:
        string path
        int fd
        uint64_t device
        uint64_t inode
        int64_t size
        int64_t modified
        int64_t changed

    cdef cppclass ModelFiles:
        ModelFiles() except +
        const vector[FileMark] & marks()
        void check() except +raise_native_error
