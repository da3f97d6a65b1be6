# cython: language_level=3, boundscheck=False, wraparound=False, nonecheck=True
# cython: embedsignature=True, embedsignature.format=python
# cython: annotation_typing=False, freethreading_compatible=False
# distutils: language=c++
"""triollama's only extension: Cython classes over llama.cpp's C API.

The rooms are separate files; this one only puts them together, lower rooms first.
Nothing outside engine/ calls C.
"""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t  # no-cython-lint
from libcpp cimport bool as cpp_bool
from libcpp.atomic cimport atomic
from libcpp.string cimport string
from libcpp.vector cimport vector

include "errors.pyx"
include "log.pyx"
include "owner.pyx"
include "build_info.pyx"
include "vocab.pyx"
include "model.pyx"
include "batch.pyx"
include "context.pyx"
include "memory.pyx"
include "state.pyx"
include "adapter.pyx"
include "quantize.pyx"
include "sampler.pyx"
include "upstream_sampler.pyx"
include "text.pyx"
include "generation.pyx"
include "trainer.pyx"
include "decoder.pyx"
