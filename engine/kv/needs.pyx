"""What a model needs, before it is loaded."""

cdef extern from "kv/needs.hpp" namespace "triollama::native" nogil:
    cppclass NativeNeeds "triollama::native::Needs":
        string device
        uint64_t weights
        uint64_t cache
        uint64_t compute
        uint64_t free
        uint64_t total

    vector[NativeNeeds] native_memory_needs "triollama::native::memory_needs"(
        const string & path, llama.llama_model_params model_params, Repack repack,
        const llama.llama_context_params & context_params) except +raise_native_error
    vector[NativeNeeds] native_memory_held "triollama::native::memory_held"(
        const llama.llama_context * ctx) except +raise_native_error


cdef list needs_rows(const vector[NativeNeeds] & needs):
    cdef size_t i
    return [
        (needs[i].device.decode("utf-8", "replace"), needs[i].weights, needs[i].cache,
         needs[i].compute, needs[i].free, needs[i].total)
        for i in range(needs.size())
    ]


def memory_needs(
    path,
    *,
    n_ctx: int = 2048,
    n_seq_max: int = 1,
    n_ubatch: int = 512,
    n_outputs_max: int = 0,
    n_gpu_layers: int = -1,
    repack: bool | str = True,
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: str = "auto",
    swa_full: bool = True,
    kv_unified: bool = True,
) -> list[tuple[str, int, int, int, int, int]]:
    """What a Model and a Context of it would allocate: rows of device, bytes of weights, of the cache
    and of compute buffers, and the device's free and total bytes.

    llama.cpp lays everything out and allocates nothing, so this takes as long as reading the
    vocabulary. The first row is host memory ("CPU"), whose last two are 0. The arguments are those of
    Model and Context. Raises ModelNotFoundError, ModelFormatError, ParameterError.
    """
    cdef llama.llama_model_params model_params = llama.llama_model_default_params()
    cdef llama.llama_context_params params = llama.llama_context_default_params()
    cdef string raw_path = path_bytes("path", path)
    name = os.fsdecode(<bytes>raw_path)
    model_params.n_gpu_layers = check_int("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
    cdef Repack rearrange = <Repack><int>check_choice("repack", repack, _REPACK)
    params.n_seq_max = check_int("n_seq_max", n_seq_max, 1, <int>llama.llama_max_parallel_sequences())
    cdef long long total = (check_int("n_ctx", n_ctx, 1, _MAX_CTX) + 255) // 256 * 256 * <long long>n_seq_max
    if total > 2**31 - 256:
        raise ParameterError(
            f"n_ctx {n_ctx} times n_seq_max {n_seq_max} is more than llama.cpp can count",
            parameter="n_ctx", value=n_ctx)
    params.n_ctx = <uint32_t>total
    params.n_ubatch = check_int("n_ubatch", n_ubatch, 1, _MAX_CTX)
    params.n_batch = params.n_ubatch
    params.n_outputs_max = check_int("n_outputs_max", n_outputs_max, 0, _MAX_CTX)
    set_cache(&params, type_k, type_v, flash_attn)
    params.swa_full = swa_full
    params.kv_unified = kv_unified
    cdef vector[NativeNeeds] found
    begin_log()
    begin_call()
    try:
        with nogil:
            found = native_memory_needs(raw_path, model_params, rearrange, params)
    except OutOfMemoryError:
        raise
    except ParameterError as error:
        raise wrong_cache(type_k, type_v, error) from None
    except OSError as error:
        if isinstance(error, TriollamaError):
            raise
        raise ModelNotFoundError(
            f"cannot open the model {error.filename}: {error.strerror or error}", path=name) from error
    except TriollamaError as error:
        raise ModelFormatError(f"{name} cannot be laid out: {error}", path=name) from None
    finally:
        end_call()
        flush_log()
    return needs_rows(found)
