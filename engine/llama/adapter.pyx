"""LoRA adapters and control vectors."""

cdef extern from "llama/adapter_handle.hpp" namespace "triollama::native" nogil:
    llama.llama_adapter_lora * open_adapter(
        llama.llama_model * model, const string & path) except +raise_native_error
    void free_adapter(
        const llama.llama_model * model, llama.llama_adapter_lora * adapter) except +raise_native_error
    void free_adapter_now(
        const llama.llama_model * model, llama.llama_adapter_lora * adapter) except +raise_native_error


cdef str check_adapter_file(Model model, object path):
    """The path as text, if there is a well-formed GGUF file. Reads its metadata, without the GIL."""
    model.alive()
    if model.vocab_only:
        raise UnsupportedError("the model was loaded with vocab_only=True")
    cdef bytes raw_path = path_bytes("path", path)
    cdef string checked_path = raw_path
    cdef str name = os.fsdecode(raw_path)
    check_magic(name, "the adapter ", AdapterError)
    try:
        with nogil:
            check_gguf(checked_path)
    except OutOfMemoryError:
        raise
    except TriollamaError as error:
        raise AdapterError(
            f"{name} is no adapter that llama.cpp can load: {error}", path=name) from None
    unused = [tensor for tensor in read_gguf(name)[1] if tensor.endswith("_norm.weight")]
    if unused:
        import logging
        logging.getLogger("triollama").warning(
            "llama.cpp makes no use of %d tensors of the adapter %s: %s",
            len(unused), name, ", ".join(unused[:4]))
    return name


@cython.no_gc_clear
cdef class Adapter(Owner):
    """A LoRA adapter loaded from GGUF for one model.

    Loading and closing wait until what the model's contexts compute is done, and let no more begin
    meanwhile. Raises AdapterError, ModelNotFoundError. Releases the GIL.
    """

    def __init__(self, Model model not None, path):
        self.begin()
        self.path = check_adapter_file(model, path)
        cdef string name = os.fsencode(self.path)
        self.model = model
        begin_log()
        model.hold()
        try:
            with nogil:
                self.ptr = open_adapter(model.ptr, name)
        except OutOfMemoryError:
            raise
        except TriollamaError as error:
            raise AdapterError(
                f"llama.cpp cannot load the adapter {self.path}: {error}", path=self.path) from None
        finally:
            if self.ptr != NULL:
                self.opened()
            model.release()
            flush_log()

    cdef void opened(self) noexcept:
        Owner.opened(self)
        self.model.children += 1

    cdef int check_model(self, Model model) except -1:
        """It is open, and of this model."""
        self.alive()
        if self.model is not model:
            raise AdapterError(f"{self.path} was loaded for another model", path=self.path)
        return 0

    cdef llama.llama_adapter_lora * let_go(self) noexcept:
        """Closed from here on; who called frees what this gives."""
        cdef llama.llama_adapter_lora * ptr = self.ptr
        self.ended()
        self.ptr = NULL
        self.model.children -= 1
        return ptr

    def __dealloc__(self):
        if self.closed or self.forks != fork_count:
            return
        free_adapter_now(self.model.ptr, self.let_go())

    def close(self) -> None:
        """Free the adapter. Idempotent; raises BusyError while a context applies it, or a set of a
        Decoder names it."""
        if self.closed or self.forks != fork_count:
            return
        self.check_childless()
        self.model.hold()
        cdef llama.llama_adapter_lora * ptr = self.let_go()
        try:
            with nogil:
                free_adapter(self.model.ptr, ptr)
        finally:
            self.model.release()

    def __enter__(self) -> Adapter:
        self.alive()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, str]:
        """All scalar metadata of the adapter's file, as text."""
        self.alive()
        cdef int32_t i
        cdef int32_t n
        cdef vector[char] buffer
        if self.metadata_ is None:
            found = {}
            buffer.resize(65536)
            self.readers += 1       # whatever a garbage collection in between may close
            try:
                for i in range(llama.llama_adapter_meta_count(self.ptr)):
                    n = llama.llama_adapter_meta_key_by_index(self.ptr, i, buffer.data(), buffer.size())
                    key = buffer.data()[:n].decode("utf-8", "replace")
                    n = llama.llama_adapter_meta_val_str_by_index(self.ptr, i, buffer.data(), buffer.size())
                    found[key] = buffer.data()[:min(n, <int32_t>buffer.size() - 1)].decode(
                        "utf-8", "replace")
            finally:
                self.readers -= 1
            self.metadata_ = found
        return dict(self.metadata_)

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens that activate it (aLoRA, arXiv:2504.12397): a Decoder has it take part from
        the last place on where a prompt says them. () for one that takes part everywhere."""
        self.alive()
        cdef const llama.llama_token * tokens = llama.llama_adapter_get_alora_invocation_tokens(self.ptr)
        cdef uint64_t n = llama.llama_adapter_get_alora_n_invocation_tokens(self.ptr)
        cdef uint64_t i
        return tuple([tokens[i] for i in range(n)])


cdef Adapter adopt_adapter(Model model, str path, llama.llama_adapter_lora * ptr):
    """An Adapter of what is loaded already."""
    cdef Adapter adapter = Adapter.__new__(Adapter)
    adapter.begin()
    adapter.model = model
    adapter.path = path
    adapter.ptr = ptr
    adapter.opened()
    return adapter


def set_adapters(Context context not None, adapters) -> None:
    """Apply exactly these adapters: a list of (Adapter, scale); an empty list removes all.

    A change costs some milliseconds at the next decode. What is in memory was computed under the
    old set: clear it, or continue knowingly.
    """
    cdef vector[llama.llama_adapter_lora *] pointers
    cdef vector[float] scales
    cdef Adapter adapter
    cdef int code
    context.enter()
    try:
        chosen = chosen_adapters(adapters)
        for adapter, scale in chosen:
            adapter.check_model(context.model)
            pointers.push_back(adapter.ptr)
            scales.push_back(scale)
        use_adapters(chosen, 1)
        with nogil:
            code = llama.llama_set_adapters_lora(
                context.ptr, pointers.data(), pointers.size(), scales.data())
        if code == 0:
            chosen, context.adapters_ = context.adapters_ or (), chosen
        use_adapters(chosen, -1)
        if code != 0:
            raise EngineError("llama.cpp refused the adapters", log=native_problem())
    finally:
        context.leave()


cdef void use_adapters(tuple chosen, int change) noexcept:
    """So many more apply each of these pairs' adapters, and it stays open for them."""
    for item in chosen:
        (<Adapter>(<tuple>item)[0]).children += change


cdef tuple chosen_adapters(object adapters):
    """Pairs of an Adapter, open or not, and its scale."""
    chosen = []
    check_kind("adapters", adapters, list, tuple)
    for pair in adapters:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], Adapter):
            raise ParameterError(
                f"{shown(pair)} is no Adapter with its scale", parameter="adapters", value=pair)
        adapter, scale = pair
        chosen.append((adapter, check_float("scale", scale, -1e6, 1e6)))
    if len({id(adapter) for adapter, _ in chosen}) != len(chosen):
        raise ParameterError("the same adapter is named twice", parameter="adapters")
    return tuple(chosen)


cdef const float[:, ::1] control_rows(Model model, object data):
    """``data`` as the rows of a control vector for this model; ParameterError if it is none."""
    cdef const float[:, ::1] view
    try:
        view = data
    except (TypeError, ValueError, BufferError) as error:
        raise ParameterError(
            f"a control vector is a contiguous float32 array of two dimensions: {error}",
            parameter="data") from None
    if view.shape[0] != model.n_layer - 1 or view.shape[1] != model.n_embd:
        raise ParameterError(
            f"the control vector has shape {view.shape[0]}x{view.shape[1]}; this model"
            f" needs {model.n_layer - 1}x{model.n_embd}", parameter="data")
    return view


def read_control_vector(Model model not None, path):
    """The control vector of a GGUF file (F32 tensors ``direction.1``, ``direction.2``... of n_embd
    values), float32 of shape [n_layer - 1, n_embd]; layers that the file does not name are 0.

    Raises AdapterError, ModelNotFoundError.
    """
    import numpy
    cdef str name = check_adapter_file(model, path)
    cdef bytes raw_path = os.fsencode(name)
    cdef const char * c_path = raw_path
    cdef gguf.gguf_init_params params
    cdef gguf.gguf_context * header
    cdef int64_t i
    params.no_alloc = True
    params.ctx = NULL
    with nogil:
        header = gguf.gguf_init_from_file(c_path, params)
    if header == NULL:
        raise AdapterError(f"{name} is no GGUF file", path=name)
    found = []
    try:
        for i in range(gguf.gguf_get_n_tensors(header)):
            found.append((
                gguf.gguf_get_tensor_name(header, i).decode("utf-8", "replace"),
                gguf.gguf_get_tensor_type(header, i) == ggml.GGML_TYPE_F32,
                gguf.gguf_get_data_offset(header) + gguf.gguf_get_tensor_offset(header, i),
                gguf.gguf_get_tensor_size(header, i)))
    finally:
        gguf.gguf_free(header)
    rows = numpy.zeros((model.n_layer - 1, model.n_embd), dtype=numpy.float32)
    with open(name, "rb") as file:
        for tensor, is_f32, offset, size in found:
            prefix, _, number = tensor.partition(".")
            if prefix != "direction" or not number.isascii() or not number.isdecimal():
                continue
            layer = int(number)
            if not 1 <= layer < model.n_layer or not is_f32 or size != 4 * model.n_embd:
                raise AdapterError(
                    f"{name} is no control vector for this model: {tensor} must be F32, of"
                    f" {model.n_embd} values, for a layer from 1 to {model.n_layer - 1}", path=name)
            file.seek(offset)
            rows[layer - 1] = numpy.frombuffer(file.read(size), dtype="<f4")
    if not any(tensor.startswith("direction.") for tensor, *_ in found):
        raise AdapterError(
            f"{name} holds no control vector: it has no tensor direction.1, direction.2...",
            path=name)
    return rows


def set_control_vector(Context context not None, data, layer_start: int = 1,
                       layer_end: int | None = None) -> None:
    """Add ``data[l - 1]`` to the hidden state after layer l, for layer_start <= l <= layer_end.

    data: float32 of shape [n_layer - 1, n_embd] (row 0 is layer 1), or None to remove the vector.
    """
    cdef int code
    cdef const float[:, ::1] view
    cdef int start
    cdef int end
    cdef int n_embd
    cdef size_t n_values
    context.enter()
    try:
        n_embd = context.model.n_embd
        if data is None:
            with nogil:
                code = llama.llama_set_adapter_cvec(context.ptr, NULL, 0, n_embd, -1, -1)
        else:
            n_layer = context.model.n_layer
            view = control_rows(context.model, data)
            start = check_int("layer_start", layer_start, 1, n_layer)
            end = check_int("layer_end", n_layer - 1 if layer_end is None else layer_end,
                            start, n_layer)
            n_values = view.shape[0] * view.shape[1]
            with nogil:
                code = llama.llama_set_adapter_cvec(
                    context.ptr, &view[0, 0], n_values, n_embd, start, end)
        if code != 0:
            raise EngineError("llama.cpp refused the control vector", log=native_problem())
        context.steered = data is not None
    finally:
        context.leave()
