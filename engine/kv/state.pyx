"""Saved states: a context's memory as bytes that cannot be mistaken for another's.

llama.cpp's own blobs carry too little to be trusted: a foreign or damaged one can wipe the
sequence it is loaded into, or worse. Ours begin with a header:

    magic "TLKV" | version u32 | kind u32 | key 32 bytes | payload length u64 | checksum u32

The checksum is that of checksum.hpp; in version 1, which is still read, it was a CRC-32. The key is
a SHA-256 over the model's fingerprint and the settings that decide a blob's layout or what its
numbers mean (rope; in exact contexts also the kernels, since bits are promised there). Adapters are
not in it: their caller knows which were applied.
"""
import struct
import zlib

from checksum cimport state_checksum
from kv cimport sequence_state

_HEADER = struct.Struct("<4sII32sQI")
_MAGIC = b"TLKV"
_VERSION = 2
_CRC32_VERSION = 1
cdef int _KIND_SEQUENCE = 1
cdef int _KIND_CONTEXT = 2


cdef bytes state_key(Context context, int kind):
    """Who may load a blob: portable across n_ctx, swa_full and, in a unified cache, n_seq_max."""
    layout = [context.kv_unified, context.flash_attn, context.type_k, context.type_v, context.rope]
    if not context.kv_unified:
        layout.append(context.n_seq_max)
    if context.exact:
        layout.append(context.kernels)
    if kind == _KIND_CONTEXT:
        layout += [context.n_ctx, context.n_seq_max, context.n_batch, context.embeddings_]
    import hashlib

    digest = hashlib.sha256(context.model.fingerprint)
    digest.update(repr(layout).encode())
    return digest.digest()


cdef bytes pack_state(Context context, int kind, int seq_id):
    context.enter()
    cdef size_t size
    cdef size_t written
    cdef uint8_t * data
    cdef bytes blob
    cdef int header = _HEADER.size
    try:
        key = state_key(context, kind)
        with nogil:
            if kind == _KIND_SEQUENCE:
                size = sequence_state(context.ptr, seq_id, context.exact, NULL, 0)
            else:
                size = llama.llama_state_get_size(context.ptr)
        blob = PyBytes_FromStringAndSize(NULL, header + size)
        data = <uint8_t *>PyBytes_AS_STRING(blob)
        with nogil:
            if kind == _KIND_SEQUENCE:
                written = sequence_state(context.ptr, seq_id, context.exact, data + header, size)
            else:
                written = llama.llama_state_get_data(context.ptr, data + header, size)
        if written == 0 or written > size:
            raise EngineError("llama.cpp could not save the state", log=native_problem())
        # The bytes object is not shared with anyone yet, so it may still be written.
        write_header(data, key, kind, written)
        return blob if written == size else blob[:header + written]
    finally:
        context.leave()


cdef int write_header(uint8_t * blob, bytes key, int kind, size_t size) except -1:
    """Before the ``size`` bytes of payload that follow it."""
    cdef int header = _HEADER.size
    cdef uint32_t checksum
    with nogil:
        checksum = state_checksum(blob + header, size)
    packed = _HEADER.pack(_MAGIC, _VERSION, kind, key, size, checksum)
    memcpy(blob, PyBytes_AS_STRING(packed), header)
    return 0


cdef bytes seal_state(Context context, int kind, const string & payload):
    """A blob from what llama.cpp gave to somebody else, such as the decoder's thread."""
    cdef int header = _HEADER.size
    cdef bytes blob = PyBytes_FromStringAndSize(NULL, header + payload.size())
    cdef uint8_t * data = <uint8_t *>PyBytes_AS_STRING(blob)
    with nogil:
        memcpy(data + header, payload.data(), payload.size())
    write_header(data, state_key(context, kind), kind, payload.size())
    return blob


cdef const uint8_t[::1] state_bytes(object blob):
    """``blob`` as bytes that stay as they are: what was checked is what is read."""
    try:
        view = memoryview(blob)
        return view if view.readonly else memoryview(bytes(view))
    except (TypeError, ValueError, BufferError):
        raise ParameterError(
            f"a state is bytes, not {type(blob).__name__}", parameter="blob", value=None) from None


cdef int check_state(Context context, const uint8_t[::1] view, int kind) except -1:
    """StateError unless the bytes are whole, and of this model and this kind of context."""
    cdef int header = _HEADER.size
    if view.shape[0] < header:
        raise StateError(f"the state has {view.shape[0]} bytes, fewer than its header")
    magic, version, found_kind, key, size, checksum = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise StateError("this is no state saved by triollama")
    if version not in (_CRC32_VERSION, _VERSION):
        raise StateError(f"the state has version {version}; this triollama reads up to {_VERSION}")
    if found_kind != kind:
        raise StateError(
            "the state is of a whole context, not of one sequence" if kind == _KIND_SEQUENCE
            else "the state is of one sequence, not of a whole context")
    if view.shape[0] != header + size:
        raise StateError(
            f"the state has {view.shape[0] - header} bytes after its header; it says {size}")
    if key != state_key(context, kind):
        raise StateError(
            "the state belongs to another model, or to a context with another kv_unified,"
            " flash_attn, type_k, type_v, rope setting or size"
            + (f", or was computed by other kernels than {context.kernels}" if context.exact else ""))
    cdef size_t length = view.shape[0] - header
    cdef uint32_t found
    if version == _CRC32_VERSION:
        found = zlib.crc32(view[header:])
    else:
        with nogil:
            found = state_checksum(&view[0] + header, length)
    if found != checksum:
        raise StateError("the state is damaged: its checksum does not match")
    return 0


cdef int unpack_state(Context context, object blob, int kind, int seq_id) except -1:
    cdef const uint8_t[::1] view = state_bytes(blob)
    cdef size_t read = 0
    cdef size_t length
    cdef const uint8_t * data
    context.enter()
    try:
        context.check_no_views()
        check_state(context, view, kind)
        context.output_rows.clear()
        begin_log()
        data = &view[0] + <int>_HEADER.size
        length = view.shape[0] - <int>_HEADER.size
        with nogil:
            if kind == _KIND_SEQUENCE:
                read = llama.llama_state_seq_set_data(context.ptr, data, length, seq_id)
            else:
                read = llama.llama_state_set_data(context.ptr, data, length)
        flush_log()
        if read == 0:
            if kind == _KIND_SEQUENCE:
                # With a sliding window llama.cpp empties only one of the two caches.
                llama.llama_memory_seq_rm(context.mem, seq_id, -1, -1)
            raise NoSlotError(
                "the state could not be restored: the cache has too few free cells, and the"
                " sequence is empty now", code=1, log=native_problem())
        if kind == _KIND_CONTEXT and context.exact:
            # Else what comes next would fill cells that a window has passed.
            for seq_id in range(context.n_seq_max):
                context.order_cells(seq_id)
    finally:
        context.leave()
    return 0


def save_sequence(Context context not None, seq_id: int) -> bytes:
    """One sequence's memory as bytes, for ``load_sequence``. Releases the GIL."""
    cdef int s = check_int("seq_id", seq_id, -2**31, 2**31 - 1)
    context.check_seq(s, False)
    return pack_state(context, _KIND_SEQUENCE, s)


def load_sequence(Context context not None, blob, seq_id: int) -> None:
    """Replace a sequence's memory by a saved one, from this or another context of the model.

    Raises StateError, before anything is changed, if the bytes are damaged or belong elsewhere;
    NoSlotError if the cache has no room (the sequence is then empty).
    """
    cdef int s = check_int("seq_id", seq_id, -2**31, 2**31 - 1)
    context.check_seq(s, False)
    unpack_state(context, blob, _KIND_SEQUENCE, s)


def save_context(Context context not None) -> bytes:
    """All sequences' memory as bytes, for ``load_context``. Releases the GIL."""
    return pack_state(context, _KIND_CONTEXT, 0)


def load_context(Context context not None, blob) -> None:
    """Replace all memory by a saved one; the context must be of the same shape. Raises StateError."""
    unpack_state(context, blob, _KIND_CONTEXT, 0)
