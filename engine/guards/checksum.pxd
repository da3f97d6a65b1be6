from libc.stdint cimport uint8_t, uint32_t


cdef extern from "guards/checksum.hpp" namespace "triollama::native" nogil:
    uint32_t state_checksum(const uint8_t * data, size_t size)
