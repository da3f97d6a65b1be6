"""Requantising a model file."""

cdef extern from "llama/quantize.hpp" namespace "triollama::native" nogil:
    void guarded_quantize(
        const string & source, const string & target,
        const llama.llama_model_quantize_params & params) except +raise_native_error

cdef dict _FTYPES = {
    "f32": <int>llama.LLAMA_FTYPE_ALL_F32,
    "f16": <int>llama.LLAMA_FTYPE_MOSTLY_F16,
    "bf16": <int>llama.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": <int>llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q6_k": <int>llama.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q5_k_m": <int>llama.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q5_k_s": <int>llama.LLAMA_FTYPE_MOSTLY_Q5_K_S,
    "q5_1": <int>llama.LLAMA_FTYPE_MOSTLY_Q5_1,
    "q5_0": <int>llama.LLAMA_FTYPE_MOSTLY_Q5_0,
    "q4_k_m": <int>llama.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_k_s": <int>llama.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "q4_1": <int>llama.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q4_0": <int>llama.LLAMA_FTYPE_MOSTLY_Q4_0,
    "iq4_nl": <int>llama.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "iq4_xs": <int>llama.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "q3_k_l": <int>llama.LLAMA_FTYPE_MOSTLY_Q3_K_L,
    "q3_k_m": <int>llama.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "q3_k_s": <int>llama.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "q2_k": <int>llama.LLAMA_FTYPE_MOSTLY_Q2_K,
    "q2_k_s": <int>llama.LLAMA_FTYPE_MOSTLY_Q2_K_S,
}


def quantize(source, target, ftype: str = "q4_k_m", *, threads: int | None = None,
             allow_requantize: bool = False, quantize_output: bool = True,
             pure: bool = False) -> None:
    """Write the model file ``source`` to ``target`` with another quantisation.

    ftype: one of "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", ... (as llama-quantize names them).
    allow_requantize: accept a source that is already quantised (quality suffers).
    quantize_output: quantise the output matrix too. pure: no mixture, one type for all.
    The target appears under its name only when complete, on disk and read back. Raises
    ParameterError, ModelNotFoundError, ModelFormatError, OSError where it cannot be written,
    OutOfMemoryError, EngineError. Releases the GIL.
    """
    cdef llama.llama_model_quantize_params params = llama.llama_model_quantize_default_params()
    params.ftype = <llama.llama_ftype><int>check_choice("ftype", ftype, _FTYPES)
    params.nthread = check_int("threads", default_threads() if threads is None else threads, 1, 512)
    params.allow_requantize = allow_requantize
    params.quantize_output_tensor = quantize_output
    params.pure = pure
    source_path = os.fsdecode(path_bytes("source", source))
    target_path = os.fsdecode(path_bytes("target", target))
    if os.path.realpath(source_path) == os.path.realpath(target_path):
        raise ParameterError("target is the source itself", parameter="target", value=target)
    check_magic(source_path, "the model ", ModelFormatError)
    from triollama.writing import replacing
    cdef string checked = os.fsencode(source_path)
    cdef string written
    begin_log()
    begin_call()
    try:
        with nogil:
            check_model(checked, True, NULL)
        with replacing(target_path) as partial:
            written = os.fsencode(partial)
            try:
                with nogil:
                    guarded_quantize(checked, written, params)
            except TriollamaError:
                check_room(partial)
                raise
    except ModelFormatError as error:
        raise ModelFormatError(
            f"{source_path} is no model that llama.cpp can quantise: {error}",
            path=source_path) from None
    except EngineError as error:
        raise type(error)(
            f"llama.cpp could not quantise {source_path} to {ftype}: {error}",
            log=native_problem()) from None
    finally:
        end_call()
        flush_log()


cdef int check_room(str partial) except -1:
    """The OSError of a disk that takes no more: llama.cpp does not say why it failed."""
    with open(partial, "ab", buffering=0) as file:
        file.write(bytes(65536))
        os.fsync(file.fileno())
    return 0
