"""The model: a GGUF file mapped into memory."""
import re

from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF
from cython.operator cimport dereference
from libc.string cimport memcpy

from model_files cimport FileMark, ModelFiles

cdef extern from "llama/gguf_check.hpp" namespace "triollama::native" nogil:
    void check_gguf(const string & path) except +raise_native_error
    vector[string] check_model(
        const string & path, cpp_bool weights, const llama.llama_model_kv_override * overrides
    ) except +raise_native_error

cdef extern from "llama/load.hpp" namespace "triollama::native" nogil:
    enum class Repack "triollama::native::Repack":
        pass

    llama.llama_model * load_model(
        ModelFiles & files, const string & path, llama.llama_model_params params, Repack repack
    ) except +raise_native_error

cdef extern from "kernels/buffer.hpp" namespace "triollama::native::kernels" nogil:
    vector[string] kernel_names()
    cpp_bool kernels_available "triollama::native::kernels::available"()
    cpp_bool choose "triollama::native::kernels::use_kernel"(const string & name)
    void install_kernels "triollama::native::kernels::install"() except +raise_native_error

install_kernels()

cdef dict _SPLIT_MODES = {
    "none": <int>llama.LLAMA_SPLIT_MODE_NONE,
    "layer": <int>llama.LLAMA_SPLIT_MODE_LAYER,
    "row": <int>llama.LLAMA_SPLIT_MODE_ROW,
    "tensor": <int>llama.LLAMA_SPLIT_MODE_TENSOR,
}
cdef dict _REPACK = {False: 0, "ggml": 1, "exact": 2, True: 3}    # Repack


cdef struct LoadProgress:
    void * callback     # a Python callable, or NULL
    void * error        # the exception it raised, owned, or NULL
    bint cancelled


cdef cpp_bool on_load_progress(float progress, void * user_data) noexcept nogil:
    """Called by llama.cpp between tensors. Returning false ends the load."""
    return not exiting.load() and ask_to_go_on(progress, user_data)


cdef cpp_bool ask_to_go_on(float progress, void * user_data) noexcept with gil:
    cdef LoadProgress * load = <LoadProgress *>user_data
    try:
        PyErr_CheckSignals()
        if load.callback != NULL and (<object>load.callback)(progress) is False:
            load.cancelled = True
            return False
        return True
    except BaseException as error:
        # Carried through C and raised again once the load has been undone.
        Py_INCREF(error)
        load.error = <void *>error
        return False


cdef bytes path_bytes(str name, object path):
    """A path as the file system takes it."""
    try:
        raw = os.fsencode(path)
    except (TypeError, UnicodeEncodeError) as error:
        raise ParameterError(f"{name} is no path: {error}", parameter=name, value=path) from None
    if b"\0" in raw:
        raise ParameterError(f"{name} holds NUL", parameter=name, value=path)
    return raw


cdef bytes encoded(str name, object text):
    """Text of a parameter as UTF-8."""
    if not isinstance(text, str):
        raise ParameterError(f"{name} must hold text, not {shown(text)}", parameter=name, value=text)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"{name} holds {text!r}, which is no Unicode text: {error.reason}",
            parameter=name, value=text) from None


def list_devices() -> list[str]:
    """Names of the devices a model can be placed on ("CPU", "CUDA0", ...)."""
    cdef size_t i
    return [ggml.ggml_backend_dev_name(ggml.ggml_backend_dev_get(i)).decode()
            for i in range(ggml.ggml_backend_dev_count())]


def list_kernels() -> list[str]:
    """Instruction sets that our own kernels (docs/kernels.md) have here, fastest first; the last,
    "portable", is for comparison: where it is the only one, models are loaded without. Empty where
    the build leaves them out."""
    return [name.decode() for name in kernel_names()]


def use_kernel(name: str | None) -> None:
    """Compute with this one of ``list_kernels``, in the whole process from now on; None: the fastest.
    The numbers are the same, bit for bit. Raises ParameterError."""
    if not choose(b"" if name is None else encoded("name", name)):
        raise ParameterError(
            f"no kernels are named {name!r}; there are {', '.join(list_kernels()) or 'none'}",
            parameter="name", value=name)


cdef ggml.ggml_backend_dev_t find_device(str name) except *:
    cdef size_t i
    cdef ggml.ggml_backend_dev_t device
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        if ggml.ggml_backend_dev_name(device).decode() == name:
            return device
    raise ParameterError(
        f"no device is named {name!r}; this build and machine have {', '.join(list_devices())}",
        parameter="devices", value=name)


cdef ggml.ggml_backend_buffer_type_t find_buffer_type(str name) except *:
    cdef size_t i
    cdef ggml.ggml_backend_dev_t device
    cdef ggml.ggml_backend_buffer_type_t buft
    known = []
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        buft = ggml.ggml_backend_dev_buffer_type(device)
        buft_name = ggml.ggml_backend_buft_name(buft).decode()
        if name in (buft_name, ggml.ggml_backend_dev_name(device).decode()):
            return buft
        known.append(buft_name)
    raise ParameterError(
        f"no device has buffers of type {name!r}; there are {', '.join(known)}",
        parameter="tensor_overrides", value=name)


cdef int fill_override(llama.llama_model_kv_override * out, object key, object value) except -1:
    cdef bytes raw_key = encoded("kv_overrides", key)
    cdef bytes raw
    if not 0 < len(raw_key) < 128 or b"\0" in raw_key:
        raise ParameterError(
            f"kv_overrides has the key {key!r}; keys have 1 to 127 bytes",
            parameter="kv_overrides", value=key)
    memcpy(out.key, <const char *>raw_key, len(raw_key) + 1)
    if isinstance(value, bool):
        out.tag = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL
        out.val_bool = value
    elif isinstance(value, int):
        out.tag = llama.LLAMA_KV_OVERRIDE_TYPE_INT
        out.val_i64 = check_int(f"kv_overrides[{key!r}]", value, -2**63, 2**63 - 1)
    elif isinstance(value, float):
        out.tag = llama.LLAMA_KV_OVERRIDE_TYPE_FLOAT
        out.val_f64 = value
    elif isinstance(value, str):
        raw = encoded("kv_overrides", value)
        if len(raw) > 127 or b"\0" in raw:
            raise ParameterError(
                f"kv_overrides[{key!r}] is longer than 127 bytes or holds NUL",
                parameter="kv_overrides", value=value)
        out.tag = llama.LLAMA_KV_OVERRIDE_TYPE_STR
        memcpy(out.val_str, <const char *>raw, len(raw) + 1)
    else:
        raise ParameterError(
            f"kv_overrides[{key!r}] must be bool, int, float or str, not {value!r}",
            parameter="kv_overrides", value=value)
    return 0


cdef llama.llama_load_mode load_mode(bint use_mmap, bint use_mlock, bint direct_io) except *:
    if direct_io:
        if use_mlock:
            raise ParameterError("direct_io cannot be combined with use_mlock",
                                 parameter="direct_io", value=True)
        return llama.LLAMA_LOAD_MODE_DIRECT_IO
    if use_mmap:
        return llama.LLAMA_LOAD_MODE_MMAP_MLOCK if use_mlock else llama.LLAMA_LOAD_MODE_MMAP
    return llama.LLAMA_LOAD_MODE_MLOCK if use_mlock else llama.LLAMA_LOAD_MODE_NONE


@cython.no_gc_clear
cdef class Model(Owner):
    """A model, loaded from a GGUF file. Contexts, adapters and samplers are made from it.

    path: the file; of a split model, its first part.
    n_gpu_layers: layers to place on GPUs; -1 is all. No effect on a build without a GPU backend.
    devices: names of the devices to use (see ``list_devices``); None is all.
    split_mode: "none", "layer", "row" or "tensor": how several GPUs share the model.
    main_gpu: the GPU that holds everything when split_mode is "none".
    tensor_split: share of each device; at most ``llama_max_devices`` numbers.
    tensor_overrides: {regular expression over tensor names: device or buffer type name}.
    kv_overrides: {metadata key: bool, int, float or str} read instead of the file's.
    use_mmap: map the file rather than read it. use_mlock: keep it in RAM. direct_io: read past
        the page cache (excludes use_mmap).
    vocab_only: load the vocabulary alone; such a model cannot make contexts.
    check_tensors: validate all weights while loading (slower).
    repack: how weights are copied into another order, for speed (CPU). True: for kernels of our own
        (docs/kernels.md) where they know the type, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K and
        IQ4_NL, else for ggml's. "exact": the same, but of ggml's only those that still round each row
        by itself (AMX), as contexts with exact=True need. "ggml": for ggml's alone. False: not at all;
        the file stays mapped.
    progress: called with a float from 0 to 1, from the loading thread; returning False cancels.

    Raises ModelNotFoundError, ModelFormatError, LoadCancelled, OutOfMemoryError, ParameterError,
    or whatever ``progress`` raises. Releases the GIL while loading. Ctrl-C ends the load.
    """

    def __init__(
        self,
        path,
        *,
        n_gpu_layers: int = -1,
        devices: list[str] | None = None,
        split_mode: str = "layer",
        main_gpu: int = 0,
        tensor_split: list[float] | None = None,
        tensor_overrides: dict[str, str] | None = None,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        use_mmap: bool = True,
        use_mlock: bool = False,
        direct_io: bool = False,
        vocab_only: bool = False,
        check_tensors: bool = False,
        repack: bool | str = True,
        progress=None,
    ):
        self.begin()
        cdef bytes raw_path = path_bytes("path", path)
        self.path = os.fsdecode(raw_path)
        self.vocab_only = vocab_only
        cdef int rearrange = check_choice("repack", repack, _REPACK)
        self.overrides = {}

        cdef llama.llama_model_params params = llama.llama_model_default_params()
        params.n_gpu_layers = check_int("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
        self.n_gpu_layers_ = params.n_gpu_layers
        params.split_mode = <llama.llama_split_mode><int>check_choice(
            "split_mode", split_mode, _SPLIT_MODES)
        params.main_gpu = check_int("main_gpu", main_gpu, 0, 1023)
        params.load_mode = load_mode(use_mmap and not direct_io, use_mlock, direct_io)
        params.vocab_only = vocab_only
        params.check_tensors = check_tensors

        cdef vector[ggml.ggml_backend_dev_t] device_list
        if devices is not None:
            for name in devices:
                device_list.push_back(find_device(name))
            device_list.push_back(NULL)
            params.devices = device_list.data()

        cdef vector[float] split
        if tensor_split is not None:
            split.resize(llama.llama_max_devices(), 0.0)
            if len(tensor_split) > <Py_ssize_t>split.size():
                raise ParameterError(
                    f"tensor_split has {len(tensor_split)} numbers; at most {split.size()} devices",
                    parameter="tensor_split", value=tensor_split)
            for i, share in enumerate(tensor_split):
                split[<size_t>i] = check_float("tensor_split", share, 0.0, 1e9)
            params.tensor_split = split.data()

        cdef vector[llama.llama_model_tensor_buft_override] buft_overrides
        patterns = []       # keeps the bytes alive while llama.cpp reads them
        if tensor_overrides:
            buft_overrides.resize(len(tensor_overrides) + 1)
            for i, (pattern, target) in enumerate(tensor_overrides.items()):
                try:
                    re.compile(pattern)
                except (re.error, TypeError, RecursionError) as error:
                    raise ParameterError(
                        f"tensor_overrides has the bad regular expression {pattern!r}: {error}",
                        parameter="tensor_overrides", value=pattern) from None
                if len(pattern) > 1000:     # std::regex recurses
                    raise ParameterError(
                        "tensor_overrides has a regular expression of more than 1000 characters",
                        parameter="tensor_overrides", value=pattern)
                if "\0" in pattern:
                    raise ParameterError("tensor_overrides has a regular expression that holds NUL",
                                         parameter="tensor_overrides", value=pattern)
                patterns.append(encoded("tensor_overrides", pattern))
                buft_overrides[<size_t>i].pattern = <const char *>(<bytes>patterns[i])
                buft_overrides[<size_t>i].buft = find_buffer_type(target)
            buft_overrides.back().pattern = NULL
            buft_overrides.back().buft = NULL
            params.tensor_buft_overrides = buft_overrides.data()

        cdef vector[llama.llama_model_kv_override] overrides
        if kv_overrides:
            overrides.resize(len(kv_overrides) + 1)
            for i, (key, value) in enumerate(kv_overrides.items()):
                fill_override(&overrides[<size_t>i], key, value)
                self.overrides[key] = (
                    str(value).lower() if isinstance(value, bool) else str(value))
            overrides.back().key[0] = 0
            params.kv_overrides = overrides.data()

        if os.path.isdir(self.path):
            raise ModelNotFoundError(f"{self.path} is a directory, not a GGUF file", path=self.path)
        if self.files == NULL:
            self.files = new ModelFiles()

        cdef LoadProgress load
        load.callback = <void *>progress if progress is not None else NULL
        load.error = NULL
        load.cancelled = False
        params.progress_callback = on_load_progress
        params.progress_callback_user_data = &load

        cdef string c_path = raw_path
        begin_log()
        begin_call()
        try:
            with nogil:
                self.ptr = load_model(
                    dereference(self.files), c_path, params, <Repack>rearrange)
                if self.ptr != NULL:
                    check_vocab(llama.llama_model_get_vocab(self.ptr))
        except (OutOfMemoryError, ParameterError):
            raise
        except OSError as error:        # ModelChangedError is one, too
            if isinstance(error, TriollamaError):
                raise
            raise ModelNotFoundError(
                f"cannot open the model {error.filename}: {error.strerror or error}",
                path=error.filename) from error
        except TriollamaError as error:
            raise ModelFormatError(
                f"{self.path} is no model that llama.cpp can load: {error}",
                path=self.path) from None
        finally:
            end_call()
            error = None
            if load.error != NULL:
                error = <object>load.error
                Py_DECREF(error)
            flush_log()
        if error is not None:
            self.free()
            raise error
        if exiting.load():
            self.free()
            raise exit_error()
        if load.cancelled:
            self.free()
            raise LoadCancelled(f"loading {self.path} was cancelled", path=self.path)
        if self.ptr == NULL:
            raise load_error(self.path, native_problem() or "no reason given")
        if not has_gpu() and (n_gpu_layers > 0 or tensor_split is not None or devices):
            say_no_gpu()
        self.opened()

    cdef void free(self) noexcept nogil:
        del self.files      # before the model: see there
        self.files = NULL
        if self.ptr != NULL:
            forget_vocabulary(llama.llama_model_get_vocab(self.ptr))
            llama.llama_model_free(self.ptr)
            retire_threads()
            self.ptr = NULL

    def __dealloc__(self):
        if self.forks != fork_count:
            return
        self.ended()
        self.free()     # with the GIL: a weak reference could still find what is being freed

    def close(self) -> None:
        """Free the model. Idempotent; raises BusyError while contexts or adapters of it are open."""
        if self.closed or self.forks != fork_count:
            return
        self.check_childless()
        self.ended()
        begin_free()
        with nogil:
            self.free()
        end_call()

    def __enter__(self) -> Model:
        self.alive()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.is_closed:
            return f"<Model {self.path!r}, closed>"
        return f"<Model {self.description} from {self.path!r}>"

    @property
    def vocab(self) -> Vocab:
        """The vocabulary."""
        self.alive()
        return vocab_of(self)

    @property
    def metadata(self) -> dict[str, str]:
        """All scalar metadata of the file, as text, ``kv_overrides`` included. (Arrays, such as
        the token list, are absent.)"""
        self.alive()
        cdef int32_t i
        cdef int32_t n
        cdef vector[char] buffer
        if self.metadata_ is None:
            found = {}
            buffer.resize(256)
            self.readers += 1       # whatever a garbage collection in between may close
            try:
                for i in range(llama.llama_model_meta_count(self.ptr)):
                    n = llama.llama_model_meta_key_by_index(self.ptr, i, buffer.data(), buffer.size())
                    if n >= <int32_t>buffer.size():
                        buffer.resize(n + 1)
                        llama.llama_model_meta_key_by_index(self.ptr, i, buffer.data(), buffer.size())
                    key = buffer.data()[:n].decode("utf-8", "replace")
                    n = llama.llama_model_meta_val_str_by_index(self.ptr, i, buffer.data(), buffer.size())
                    if n >= <int32_t>buffer.size():
                        buffer.resize(n + 1)
                        llama.llama_model_meta_val_str_by_index(self.ptr, i, buffer.data(), buffer.size())
                    found[key] = buffer.data()[:n].decode("utf-8", "replace")
            finally:
                self.readers -= 1
            found.update(self.overrides)
            self.metadata_ = found
        return dict(self.metadata_)

    @property
    def architecture(self) -> str:
        """``general.architecture``, such as "llama" or "gemma3"."""
        return self.metadata.get("general.architecture", "")

    @property
    def description(self) -> str:
        """llama.cpp's short description: architecture, size, quantisation."""
        self.alive()
        cdef char buffer[256]
        llama.llama_model_desc(self.ptr, buffer, 256)
        return (<bytes>buffer).decode("utf-8", "replace")

    def chat_template(self, name: str | None = None) -> str | None:
        """The Jinja chat template in the file (the default one, or that of this name), or None."""
        cdef bytes raw = encoded("name", name) if name is not None else b""
        self.alive()
        cdef const char * found = llama.llama_model_chat_template(
            self.ptr, <const char *>raw if name is not None else NULL)
        return found.decode("utf-8", "replace") if found != NULL else None

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that identify the model: every byte of its file, or of all its parts, and
        ``kv_overrides``.

        Reads all of it the first time, on all cores; the result is noted in the cache folder for as
        long as the files stay untouched. Raises ModelChangedError if they were written to since
        the model was loaded, OSError if they cannot be read. Releases the GIL.
        """
        self.alive()
        if self.fingerprint_ is None:
            self.fingerprint_ = fingerprint_of(self.files, self.overrides)
        return self.fingerprint_

    @property
    def size(self) -> int:
        """Bytes of all tensors together."""
        self.alive()
        return llama.llama_model_size(self.ptr)

    @property
    def n_params(self) -> int:
        """Number of weights."""
        self.alive()
        return llama.llama_model_n_params(self.ptr)

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was trained with, in tokens."""
        self.alive()
        return llama.llama_model_n_ctx_train(self.ptr)

    @property
    def n_embd(self) -> int:
        """Width of the hidden state."""
        self.alive()
        return llama.llama_model_n_embd(self.ptr)

    @property
    def n_embd_out(self) -> int:
        """Width of an embedding that the model puts out."""
        self.alive()
        return llama.llama_model_n_embd_out(self.ptr)

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        self.alive()
        return llama.llama_model_n_layer(self.ptr)

    @property
    def n_head(self) -> int:
        """Attention heads of the first layer; 0, as are other sizes, where there is a vocabulary alone."""
        self.alive()
        return 0 if self.vocab_only else llama.llama_model_n_head(self.ptr)

    @property
    def n_head_kv(self) -> int:
        """Key and value heads of the first layer."""
        self.alive()
        return 0 if self.vocab_only else llama.llama_model_n_head_kv(self.ptr)

    @property
    def n_swa(self) -> int:
        """Sliding window in tokens; 0 where there is none."""
        self.alive()
        return llama.llama_model_n_swa(self.ptr)

    @property
    def has_head(self) -> bool:
        """Whether the file has a classifier's or reranker's head (tensors ``cls``, ``cls.output``)."""
        self.alive()
        cdef size_t i
        if self.has_head_ is None:
            found = False
            for i in range(self.files.marks().size()):
                _, tensors = read_gguf(<bytes>self.files.marks()[i].path)
                found = found or "cls.weight" in tensors or "cls.output.weight" in tensors
            self.has_head_ = found
        return self.has_head_

    @property
    def n_cls_out(self) -> int:
        """Outputs of a classifier's or reranker's head; 1 where there is none."""
        self.alive()
        return llama.llama_model_n_cls_out(self.ptr)

    @property
    def cls_labels(self) -> list[str]:
        """The labels of these outputs, where the file has any."""
        self.alive()
        cdef const char * label
        labels = []
        for i in range(llama.llama_model_n_cls_out(self.ptr)):
            label = llama.llama_model_cls_label(self.ptr, i)
            if label != NULL:
                labels.append(label.decode("utf-8", "replace"))
        return labels

    @property
    def has_encoder(self) -> bool:
        """Whether prompts go through ``Context.encode`` first."""
        self.alive()
        return llama.llama_model_has_encoder(self.ptr)

    @property
    def has_decoder(self) -> bool:
        """Whether the model can decode at all."""
        self.alive()
        return llama.llama_model_has_decoder(self.ptr)

    @property
    def decoder_start_token(self) -> int | None:
        """For encoder-decoder models, the token that begins decoding."""
        self.alive()
        token = llama.llama_model_decoder_start_token(self.ptr)
        return token if token >= 0 else None

    @property
    def is_recurrent(self) -> bool:
        """Whether the memory is a recurrent state (Mamba, RWKV): it cannot be rolled back."""
        self.alive()
        return llama.llama_model_is_recurrent(self.ptr)

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers are recurrent and others attend."""
        self.alive()
        return llama.llama_model_is_hybrid(self.ptr)

    @property
    def is_diffusion(self) -> bool:
        """Whether the model generates by diffusion, not token by token."""
        self.alive()
        return llama.llama_model_is_diffusion(self.ptr)


cdef bytes fingerprint_of(const ModelFiles * files, dict overrides):
    """What identifies a model's files and the metadata read in place of theirs."""
    import hashlib

    from triollama.fingerprints import FileStamp, content_digest
    cdef vector[FileMark] marks = files.marks()
    cdef FileMark mark
    stamps = []
    for mark in marks:
        stamps.append(FileStamp(
            path=os.fsdecode(mark.path), fd=mark.fd, device=mark.device, inode=mark.inode,
            size=mark.size, modified=mark.modified, changed=mark.changed))
    digest = hashlib.sha256(b"".join([content_digest(stamp) for stamp in stamps]))
    files.check()       # what was hashed is what was loaded
    if overrides:
        digest.update(repr(sorted(overrides.items())).encode())
    return digest.digest()


cdef object load_error(str path, str problem):
    """The exception for a load that failed with this in the log: the file need not be at fault."""
    if "alloc" in problem or "Cannot allocate memory" in problem:
        return OutOfMemoryError(f"there is no memory to load {path}", log=problem)
    if "Resource temporarily unavailable" in problem:
        return EngineError(f"the system has no more threads to load {path} with", log=problem)
    if "Too many open files" in problem:
        return EngineError(f"the system has no more files to open for {path}", log=problem)
    return ModelFormatError(f"llama.cpp cannot load {path}: {problem}", path=path)


cdef bint has_gpu() noexcept:
    cdef size_t i
    for i in range(ggml.ggml_backend_dev_count()):
        if ggml.ggml_backend_dev_get_type(ggml.ggml_backend_dev_get(i)) in (
                ggml.GGML_BACKEND_DEVICE_TYPE_GPU, ggml.GGML_BACKEND_DEVICE_TYPE_IGPU):
            return True
    return False


cdef bint told_no_gpu = False


cdef int say_no_gpu() except -1:
    global told_no_gpu
    if not told_no_gpu:
        told_no_gpu = True
        import logging
        logging.getLogger("triollama").warning(
            "n_gpu_layers, tensor_split and devices have no effect: this build and machine have no"
            " GPU; everything is computed on the CPU")
    return 0
