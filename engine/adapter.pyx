"""LoRA adapters and control vectors."""
from llama cimport (
    llama_adapter_lora_free,
    llama_adapter_lora_init,
    llama_adapter_meta_count,
    llama_adapter_meta_key_by_index,
    llama_adapter_meta_val_str_by_index,
    llama_set_adapter_cvec,
    llama_set_adapters_lora,
)


@cython.no_gc_clear
cdef class Adapter(Owner):
    """A LoRA adapter loaded from GGUF for one model.

    Loading changes tables of the model that running decodes read: load while no context of the
    model is in use. Raises AdapterError, ModelNotFoundError. Releases the GIL.
    """

    def __init__(self, Model model not None, path):
        self.begin()
        model.alive()
        if model.vocab_only:
            raise UnsupportedError("the model was loaded with vocab_only=True")
        cdef bytes raw_path = path_bytes("path", path)
        self.path = os.fsdecode(raw_path)
        try:
            with open(self.path, "rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelNotFoundError(
                f"cannot open the adapter {self.path}: {error.strerror or error}",
                path=self.path) from error
        if magic != b"GGUF":
            raise AdapterError(f"{self.path} is no GGUF file", path=self.path)
        cdef const char * c_path = raw_path
        cdef string checked_path = raw_path
        cdef cpp_map[string, double] numbers
        cdef AbortScope scope
        self.model = model
        begin_log()
        model.enter()
        try:
            with nogil:
                check_gguf(checked_path, False, numbers)
                scope.enter()
                self.ptr = llama_adapter_lora_init(model.ptr, c_path)
        except OutOfMemoryError:
            raise
        except TriollamaError as error:
            raise AdapterError(
                f"{self.path} is no adapter that llama.cpp can load: {error}", path=self.path) from None
        finally:
            model.leave()
            flush_log()
        if self.ptr == NULL:
            raise AdapterError(
                f"llama.cpp cannot load the adapter {self.path}: {native_problem()}",
                path=self.path)
        self.closed = False
        model.children += 1
        count_live("Adapter", 1)

    def __dealloc__(self):
        if self.forks != fork_count:
            return
        if not self.closed:
            self.model.children -= 1
            count_live("Adapter", -1)
        if self.ptr != NULL:
            llama_adapter_lora_free(self.ptr)

    def close(self) -> None:
        """Free the adapter. Idempotent; raises BusyError while a context applies it."""
        if self.closed or self.forks != fork_count:
            return
        self.check_childless()
        self.closed = True
        self.model.children -= 1
        count_live("Adapter", -1)
        llama_adapter_lora_free(self.ptr)
        self.ptr = NULL

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
            for i in range(llama_adapter_meta_count(self.ptr)):
                n = llama_adapter_meta_key_by_index(self.ptr, i, buffer.data(), buffer.size())
                key = buffer.data()[:n].decode("utf-8", "replace")
                n = llama_adapter_meta_val_str_by_index(self.ptr, i, buffer.data(), buffer.size())
                found[key] = buffer.data()[:min(n, <int32_t>buffer.size() - 1)].decode(
                    "utf-8", "replace")
            self.metadata_ = found
        return dict(self.metadata_)


def set_adapters(Context context not None, adapters) -> None:
    """Apply exactly these adapters: a list of (Adapter, scale); an empty list removes all.

    A change costs some milliseconds at the next decode. What is in memory was computed under the
    old set: clear it, or continue knowingly.
    """
    cdef vector[llama_adapter_lora *] pointers
    cdef vector[float] scales
    cdef Adapter adapter
    cdef int code
    context.enter()
    try:
        chosen = tuple(adapters)
        chosen = tuple((item[0], item[1]) for item in chosen)
        for item in chosen:
            adapter, scale = item
            if adapter is None:
                raise ParameterError("an adapter is None", parameter="adapters", value=chosen)
            adapter.alive()
            if adapter.model is not context.model:
                raise AdapterError(
                    f"the adapter {adapter.path} was loaded for another model", path=adapter.path)
            pointers.push_back(adapter.ptr)
            scales.push_back(check_float("scale", scale, -1e6, 1e6))
        if len({id(item[0]) for item in chosen}) != len(chosen):
            raise ParameterError("the same adapter is named twice", parameter="adapters")
        with nogil:
            code = llama_set_adapters_lora(
                context.ptr, pointers.data(), pointers.size(), scales.data())
        if code != 0:
            raise EngineError("llama.cpp refused the adapters", log=native_problem())
        for item in chosen:
            (<Adapter>item[0]).children += 1
        for item in context.adapters_:
            (<Adapter>item[0]).children -= 1
        context.adapters_ = chosen
    finally:
        context.leave()


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
                code = llama_set_adapter_cvec(context.ptr, NULL, 0, n_embd, -1, -1)
        else:
            n_layer = context.model.n_layer
            try:
                view = data
            except (TypeError, ValueError, BufferError) as error:
                raise ParameterError(
                    f"a control vector is a contiguous float32 array of two dimensions: {error}",
                    parameter="data") from None
            if view.shape[0] != n_layer - 1 or view.shape[1] != n_embd:
                raise ParameterError(
                    f"the control vector has shape {view.shape[0]}x{view.shape[1]}; this model"
                    f" needs {n_layer - 1}x{n_embd}", parameter="data")
            start = check_int("layer_start", layer_start, 1, n_layer)
            end = check_int("layer_end", n_layer - 1 if layer_end is None else layer_end,
                            start, n_layer)
            n_values = view.shape[0] * view.shape[1]
            with nogil:
                code = llama_set_adapter_cvec(
                    context.ptr, &view[0, 0], n_values, n_embd, start, end)
        if code != 0:
            raise EngineError("llama.cpp refused the control vector", log=native_problem())
    finally:
        context.leave()
