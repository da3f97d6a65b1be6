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
from libcpp.string cimport string
from libcpp.vector cimport vector

include "guards/errors.pyx"
include "guards/log.pyx"
include "guards/owner.pyx"
include "build_info.pyx"
include "text/vocab.pyx"
include "llama/model.pyx"
include "llama/batch.pyx"
include "llama/context.pyx"
include "kv/memory.pyx"
include "kv/needs.pyx"
include "kv/state.pyx"
include "llama/adapter.pyx"
include "llama/quantize.pyx"
include "grammar/constraint.pyx"
include "sampling/sampler.pyx"
include "sampling/upstream_sampler.pyx"
include "text/text_stream.pyx"
include "decoding/generation.pyx"
include "training/trainer.pyx"
include "decoding/decoder.pyx"
