"""LoRA training on a frozen GGUF model."""
from typing import NamedTuple

from cython.operator cimport dereference, preincrement
from libcpp.optional cimport optional
from libcpp.set cimport set as cpp_set
from libcpp.utility cimport pair


cdef dict _PARTS = {
    "weights": <int>training.PART_WEIGHTS,
    "gradients": <int>training.PART_GRADIENTS,
    "first_moments": <int>training.PART_FIRST_MOMENTS,
    "second_moments": <int>training.PART_SECOND_MOMENTS,
}
cdef dict _MERGED_TYPES = {
    None: <int>ggml.GGML_TYPE_COUNT,
    "f16": <int>ggml.GGML_TYPE_F16,
    "f32": <int>ggml.GGML_TYPE_F32,
}
cdef dict _PRECISIONS = {"exact": True, "fast": False}
cdef dict _KERNELS = {
    "portable": <int>training.ProductKernel.portable,
    "ggml": <int>training.ProductKernel.ggml,
    "vector": <int>training.ProductKernel.vector,
    "dots": <int>training.ProductKernel.dots,
    "tiles": <int>training.ProductKernel.tiles,
}


cdef enum:  # what to do with a row
    _TRAIN
    _EVALUATE
    _PROFILE


class TrainingLoss(NamedTuple):
    """What one row of tokens gave.

    loss: the sum of weight * -ln p[label]. nll: float32, -ln p of each labelled position, in
    order. predicted: int32, the likeliest token at each of them.
    """

    loss: float
    nll: object
    predicted: object


class AuditedOperation(NamedTuple):
    """One kind of node in the graphs of a training step.

    operation: ggml's name, and the types of its operands. nodes: how many of them one step has.
    supported: by the GPU the graphs run on (without one, by the CPU backend); what is not runs on
    the CPU, and its operands are copied there and back. contiguous: all operands of all of them.
    """

    operation: str
    nodes: int
    supported: bool
    contiguous: bool


def training_architectures() -> dict[str, str]:
    """The architectures that can be trained, each with what is particular about it."""
    cdef vector[training.Architecture] rows = training.trainable_architectures()
    cdef training.Architecture row
    return {row.name.decode(): row.notes.decode() for row in rows}


def training_kernels() -> tuple[str, ...]:
    """The ways of computing matrix products in training that this build on this machine has.

    "portable": ggml's own, in the form that GPU backends want. "ggml": ggml's own. "vector": F32
    throughout, and a quantised matrix is dequantised panel by panel where it is multiplied.
    "dots": both sides are rounded to BF16 and summed in F32 (AVX-512 with BF16: Zen 4 and later,
    and Intel's servers since Cooper Lake); never chosen by itself. "tiles": the same by matrix
    tiles (Intel AMX).
    """
    return tuple([name for name, kernel in _KERNELS.items()
                  if training.has_product_kernel(<training.ProductKernel><int>kernel)])


def read_gguf(path) -> tuple[dict[str, str | float], dict[str, tuple[str, tuple[int, ...]]]]:
    """The metadata of a GGUF file that is text or a number, and its tensors: type and shape.

    Shapes have rows first, as numpy's. Raises ModelNotFoundError, ModelFormatError.
    """
    cdef string raw_path = path_bytes("path", path)
    name = os.fsdecode(<bytes>raw_path)
    check_magic(name, "", ModelFormatError)
    cdef training.GgufMeta * meta = new training.GgufMeta(raw_path)
    cdef optional[string] text
    cdef optional[double] number
    cdef vector[string] keys
    cdef vector[training.GgufTensor] tensors
    cdef string key
    cdef training.GgufTensor tensor
    found = {}
    try:
        keys = meta.keys()
        for key in keys:
            text = meta.text(key)
            number = meta.number(key)
            if text.has_value():
                found[key.decode("utf-8", "replace")] = text.value().decode("utf-8", "replace")
            elif number.has_value():
                found[key.decode("utf-8", "replace")] = number.value()
        tensors = meta.tensors()
        return found, {
            tensor.name.decode("utf-8", "replace"):
                (tensor.type.decode(), tuple(reversed(list(tensor.shape))))
            for tensor in tensors
        }
    finally:
        del meta


def gguf_numbers(path, key: str) -> list[float] | None:
    """An array of numbers among the metadata of a GGUF file; None if there is none by this key.
    Raises ModelNotFoundError, ModelFormatError."""
    cdef string raw_path = path_bytes("path", path)
    cdef string raw_key = encoded("key", key)
    check_magic(os.fsdecode(<bytes>raw_path), "", ModelFormatError)
    cdef training.GgufMeta * meta = new training.GgufMeta(raw_path)
    cdef optional[vector[double]] found
    try:
        found = meta.numbers(raw_key)
        return list(found.value()) if found.has_value() else None
    finally:
        del meta


def gguf_bytes(path) -> dict[str, int]:
    """Bytes of the tensors of a GGUF file, by type. Raises ModelNotFoundError, ModelFormatError."""
    cdef string raw_path = path_bytes("path", path)
    check_magic(os.fsdecode(<bytes>raw_path), "", ModelFormatError)
    cdef training.GgufMeta * meta = new training.GgufMeta(raw_path)
    cdef training.GgufTensor tensor
    found = {}
    try:
        for tensor in meta.tensors():
            name = tensor.type.decode()
            found[name] = found.get(name, 0) + tensor.bytes
        return found
    finally:
        del meta


cdef object numbers(str name, object values):
    """An array. Raises ParameterError for what is none: rows of several lengths, say."""
    import numpy
    try:
        return numpy.asarray(values)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{name} must be an array of numbers: {error}", parameter=name) from None


cdef int copy_int32(str name, object values, vector[int32_t] & out, Py_ssize_t n) except -1:
    """Copies one-dimensional integers; n is the length they must have, or -1."""
    import numpy
    array = numbers(name, values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ParameterError(
            f"{name} must be a one-dimensional array of integers, not {array.dtype} of shape"
            f" {array.shape}", parameter=name)
    if n >= 0 and array.shape[0] != n:
        raise ParameterError(
            f"{name} has {array.shape[0]} values for {n} tokens", parameter=name)
    if array.size and (array.min() < -2**31 or array.max() >= 2**31):
        raise ParameterError(f"{name} holds values beyond 32 bits", parameter=name)
    cdef const int32_t[::1] view = numpy.ascontiguousarray(array, dtype=numpy.int32)
    cdef Py_ssize_t i
    out.resize(view.shape[0])
    for i in range(view.shape[0]):
        out[i] = view[i]
    return 0


cdef int copy_float32(str name, object values, vector[float] & out, Py_ssize_t n) except -1:
    import numpy
    array = numbers(name, values)
    if array.ndim != 1 or array.dtype.kind not in "fiu" or array.shape[0] != n:
        raise ParameterError(
            f"{name} must be {n} numbers in one dimension, not {array.dtype} of shape"
            f" {array.shape}", parameter=name)
    cdef const float[::1] view = numpy.ascontiguousarray(array, dtype=numpy.float32)
    cdef Py_ssize_t i
    out.resize(view.shape[0])
    for i in range(view.shape[0]):
        out[i] = view[i]
    return 0


cdef object loss_of(training.RowResult & result):
    import numpy
    cdef Py_ssize_t i
    cdef Py_ssize_t n = result.nll.size()
    nll = numpy.empty(n, dtype=numpy.float32)
    predicted = numpy.empty(n, dtype=numpy.int32)
    cdef float[::1] nll_view = nll
    cdef int32_t[::1] predicted_view = predicted
    for i in range(n):
        nll_view[i] = result.nll[i]
        predicted_view[i] = result.predicted[i]
    return TrainingLoss(result.loss, nll, predicted)


@cython.no_gc_clear
cdef class Trainer(Owner):
    """A frozen model with a LoRA adapter beside it, and the steps that train the adapter.

    path: the model's GGUF file, mapped once more and never written. rank, alpha: the adapter adds
    alpha / rank * B A x (alpha / sqrt(rank) with ``rslora``) to each target's W x. targets: names
    within a layer (``"attn_q"``, ``"ffn_down"``, ...), or ``"all-linear"``. dropout: probability
    that an element of an adapter's input is dropped while training. seed: of the initial A
    (uniform in +-1/sqrt(n_in); B is zero) and of dropout. precision: ``"exact"`` dequantises
    weights to F32; ``"fast"`` rounds both sides of large products to BF16 where the processor has
    matrix tiles, and without AVX-512 multiplies quantised weights with quantised activations on
    the way forward.
    invocation: tokens that activate the adapter (aLoRA, arXiv:2504.12397): it takes part from the
    last place on where a text says them, and before that the model is the bare one, whose KV serves
    it; () is an adapter that takes part everywhere.
    n_gpu_layers: above 0 the graphs run on the GPU. kernel: one of ``training_kernels`` for matrix
    products on the CPU; default: the fastest that the precision admits. kept_bytes: what of a
    layer is computed on the way forward is kept for the way back as far as it has room in so many
    bytes, and else computed again, to the same bits; on a GPU nothing but layers' inputs is.

    Raises ParameterError, ModelNotFoundError, ModelFormatError, OutOfMemoryError, and
    UnsupportedError naming what is missing when the architecture cannot be trained. Blocking calls
    release the GIL; one thread at a time, except for ``request_abort``.
    """

    cdef training.Trainer * native
    cdef readonly str path
    cdef readonly double dropout

    def __init__(self, path, *, rank: int = 8, alpha: float = 16.0, rslora: bool = False,
                 targets="all-linear", dropout: float = 0.0, seed: int = 0,
                 precision: str = "exact", threads: int | None = None, n_gpu_layers: int = 0,
                 kernel: str | None = None, invocation=(), kept_bytes: int = 1 << 27):
        cdef training.TrainerConfig config
        self.begin()
        cdef bytes raw_path = path_bytes("path", path)
        self.path = os.fsdecode(raw_path)
        config.model_path = raw_path
        config.adapter.rank = check_int("rank", rank, 1, 65536)
        config.adapter.alpha = check_float("alpha", alpha, 1e-6, 1e6)
        config.adapter.rslora = rslora
        config.adapter.seed = check_int("seed", seed, 0, 2**63 - 1)
        self.dropout = config.dropout = check_float("dropout", dropout, 0.0, 0.999)
        config.exact = check_choice("precision", precision, _PRECISIONS)
        config.n_threads = check_int(
            "threads", default_threads() if threads is None else threads, 1, 512)
        config.n_gpu_layers = check_int("n_gpu_layers", n_gpu_layers, 0, 2**31 - 1)
        config.kept_bytes = check_int("kept_bytes", kept_bytes, 0, 2**62)
        for token in invocation:
            config.adapter.invocation.push_back(check_int("invocation", token, 0, 2**31 - 1))
        if kernel is not None:
            config.kernel = <training.ProductKernel><int>check_choice("kernel", kernel, _KERNELS)
        if targets != "all-linear":
            if isinstance(targets, str):
                raise ParameterError(
                    f"targets must be 'all-linear' or a sequence of names, not {targets!r}",
                    parameter="targets", value=targets)
            for name in targets:
                config.adapter.targets.push_back(encoded("targets", name))
            if config.adapter.targets.empty():
                raise ParameterError("targets is empty", parameter="targets", value=targets)
        check_magic(self.path, "the model ", ModelFormatError)
        begin_log()
        begin_call()
        try:
            with nogil:
                self.native = new training.Trainer(config)
        finally:
            end_call()
            flush_log()
        self.opened()
        if config.n_gpu_layers > 0 and not has_gpu():
            say_no_gpu()
        elif config.n_gpu_layers > 0:
            left = [each for each in self.audit() if not each.supported]
            if left:
                import logging
                logging.getLogger("triollama.training").warning(
                    "the GPU leaves to the CPU: %s",
                    ", ".join([f"{each.operation} x {each.nodes}" for each in left]))

    def __dealloc__(self):
        if self.native != NULL and self.forks == fork_count:
            self.ended()
            self.free()

    cdef void interrupt(self) noexcept:
        if not self.closed:
            self.native.request_abort(True)

    cdef void free(self) noexcept nogil:
        del self.native
        self.native = NULL
        retire_threads()

    def close(self) -> None:
        """Unmap the model and free the adapter. Idempotent; BusyError while a call runs."""
        if self.closed or self.forks != fork_count:
            return
        self.check_childless()
        self.ended()
        begin_free()
        with nogil:
            self.free()
        end_call()

    def __enter__(self) -> Trainer:
        self.alive()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # ---- what it is

    @property
    def architecture(self) -> str:
        """``general.architecture`` of the model."""
        self.alive()
        return self.native.model().arch.name.decode()

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that identify the base model, as ``Model.fingerprint``."""
        self.alive()
        return fingerprint_of(&self.native.model_files(), {})

    @property
    def kernel(self) -> str:
        """How matrix products are computed: see ``training_kernels``."""
        self.alive()
        return training.product_kernel_name(self.native.kernel()).decode()

    @property
    def n_vocab(self) -> int:
        """Rows of the output matrix."""
        self.alive()
        return self.native.model().n_vocab

    @property
    def n_layer(self) -> int:
        self.alive()
        return self.native.model().n_layer

    @property
    def targets(self) -> tuple[str, ...]:
        """The matrices within each layer that have an adapter."""
        self.alive()
        cdef vector[string] names = self.native.adapter().config().targets
        cdef string name
        return tuple([name.decode() for name in names])

    @property
    def rank(self) -> int:
        self.alive()
        return self.native.adapter().config().rank

    @property
    def alpha(self) -> float:
        self.alive()
        return self.native.adapter().config().alpha

    @property
    def rslora(self) -> bool:
        self.alive()
        return self.native.adapter().config().rslora

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens that activate the adapter; () if it takes part everywhere."""
        self.alive()
        cdef vector[int32_t] tokens = self.native.adapter().config().invocation
        return tuple([<int>token for token in tokens])

    @property
    def n_parameters(self) -> int:
        """Numbers in A and B together."""
        self.alive()
        return self.native.adapter().n_parameters()

    @property
    def layout(self) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """For each pair, in the order of the flat vectors: the base weight's name, then the shapes
        of A (rank, n_in) and B (n_out, rank), in rows and columns as numpy and PEFT see them."""
        self.alive()
        cdef vector[training.LoraPair] pairs = self.native.adapter().pairs()
        cdef training.LoraPair item
        return [
            (item.name.decode(), (item.a.ne[1], item.a.ne[0]), (item.b.ne[1], item.b.ne[0]))
            for item in pairs
        ]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: ``weights`` (the mapping, shared), ``adapter`` (with gradients and moments),
        ``activations`` and ``arena`` (the most so far)."""
        self.alive()
        cdef training.TrainerMemory memory = self.native.memory()
        return {"weights": memory.weights, "adapter": memory.adapter,
                "activations": memory.activations, "arena": memory.arena}

    # ---- steps

    cdef int fill(self, training.TrainingRow & row, object tokens, object labels, object positions,
                  object segments, object weights) except -1:
        import numpy
        copy_int32("tokens", tokens, row.tokens, -1)
        cdef Py_ssize_t n = row.tokens.size()
        if n == 0:
            raise ParameterError("tokens is empty", parameter="tokens")
        copy_int32("labels", labels, row.labels, n)
        copy_int32("positions", numpy.arange(n) if positions is None else positions,
                   row.positions, n)
        copy_int32("segments", numpy.zeros(n, numpy.int32) if segments is None else segments,
                   row.segments, n)
        if weights is None:
            n_labels = sum([1 for label in row.labels if label >= 0])
            weights = numpy.full(n, 1.0 / max(n_labels, 1), numpy.float32)
        copy_float32("weights", weights, row.weights, n)
        return 0

    cdef training.RowResult compute(self, tuple arrays, int work,
                                    map[string, profile.Timing] * timings) except *:
        """One row through the model: the frame that all who do so share. ``arrays``: tokens,
        labels, positions, segments and weights."""
        cdef training.TrainingRow row
        cdef training.RowResult result
        tokens, labels, positions, segments, weights = arrays
        self.fill(row, tokens, labels, positions, segments, weights)
        self.enter()
        try:
            with nogil:
                if work == _TRAIN:
                    result = self.native.forward_backward(row)
                elif work == _EVALUATE:
                    result = self.native.evaluate(row)
                else:
                    timings[0] = self.native.profile(row)
        except DecodeAborted:
            if exiting.load():
                raise exit_error() from None
            raise
        finally:
            self.leave()
        return result

    def forward_backward(self, tokens, labels, *, positions=None, segments=None,
                         weights=None) -> TrainingLoss:
        """Add the gradients of one row's loss to those already there; returns the loss.

        All arrays have one value for each token. labels: the token to be predicted after this one,
        or -1 for none. positions: of each token in its own text (default: 0, 1, ...). segments:
        texts packed in one row have different numbers and do not see each other. weights: of each
        label in the loss (default: one over the number of labels, so the loss is their mean); a
        negative one makes its label less likely.

        Raises ParameterError, OutOfMemoryError, and DecodeAborted after ``request_abort``. When it
        ends in the middle, all gradients are cleared: some layers would have had theirs, others not.
        """
        cdef training.RowResult result = self.compute(
            (tokens, labels, positions, segments, weights), _TRAIN, NULL)
        return loss_of(result)

    def evaluate(self, tokens, labels, *, positions=None, segments=None,
                 weights=None) -> TrainingLoss:
        """The loss as ``forward_backward`` gives it, without gradients and without dropout."""
        cdef training.RowResult result = self.compute(
            (tokens, labels, positions, segments, weights), _EVALUATE, NULL)
        return loss_of(result)

    def profile(self, tokens, labels) -> dict[str, tuple[float, int]]:
        """Run ``forward_backward`` with each graph node timed by itself.

        Returns seconds and number of nodes by operation, products by type and shape too: rows and
        columns of the matrix, then how many columns it is multiplied with.
        """
        cdef map[string, profile.Timing] timings
        self.compute((tokens, labels, None, None, None), _PROFILE, &timings)
        return timings_dict(timings)

    def audit(self, n_tokens: int = 32, missing=()) -> list[AuditedOperation]:
        """What one step on a row of so many tokens is made of, without computing any of it.

        missing: names of operations to count as not supported, such as ``"ROPE_BACK"``: what would
        a backend without them leave to the CPU?
        """
        cdef int n = check_int("n_tokens", n_tokens, 1, 2**20)
        cdef cpp_set[string] absent
        cdef map[string, training.Audited] found
        for name in missing:
            absent.insert(encoded("missing", name))
        self.enter()
        try:
            with nogil:
                found = self.native.audit(n, absent)
        finally:
            self.leave()
        operations = []
        cdef map[string, training.Audited].iterator at = found.begin()
        while at != found.end():
            operations.append(AuditedOperation(
                dereference(at).first.decode(), dereference(at).second.count,
                dereference(at).second.supported, dereference(at).second.contiguous))
            preincrement(at)
        return operations

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients as one vector."""
        cdef double norm
        self.enter()
        try:
            with nogil:
                norm = self.native.adapter().gradient_norm()
        finally:
            self.leave()
        return norm

    def scale_gradients(self, factor: float) -> None:
        cdef float value = check_float("factor", factor, -1e30, 1e30)
        self.enter()
        try:
            with nogil:
                self.native.adapter().scale_gradients(value)
        finally:
            self.leave()

    def clear_gradients(self) -> None:
        self.enter()
        try:
            with nogil:
                self.native.adapter().clear_gradients()
        finally:
            self.leave()

    def adamw_step(self, learning_rate: float, *, beta1: float = 0.9, beta2: float = 0.999,
                   epsilon: float = 1e-8, weight_decay: float = 0.0) -> None:
        """One step of AdamW (Loshchilov and Hutter, 2019) with the gradients, which it clears."""
        cdef training.AdamW optimiser
        optimiser.learning_rate = check_float("learning_rate", learning_rate, 0.0, 1e3)
        optimiser.beta1 = check_float("beta1", beta1, 0.0, 0.9999999)
        optimiser.beta2 = check_float("beta2", beta2, 0.0, 0.9999999)
        optimiser.epsilon = check_float("epsilon", epsilon, 1e-30, 1.0)
        optimiser.weight_decay = check_float("weight_decay", weight_decay, 0.0, 1e3)
        self.enter()
        try:
            with nogil:
                self.native.adamw_step(optimiser)
        finally:
            self.leave()

    def request_abort(self, abort: bool = True) -> None:
        """Make the call now running, and those to come, raise DecodeAborted; False takes it back.

        From any thread. An optimiser step is never cut in half.
        """
        cdef cpp_bool asked = abort
        self.alive()
        self.native.request_abort(asked)

    def set_threads(self, threads: int) -> None:
        cdef int value = check_int("threads", threads, 1, 512)
        self.enter()
        try:
            self.native.set_threads(value)
        finally:
            self.leave()

    # ---- state

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        self.alive()
        return self.native.step()

    @property
    def dropout_counter(self) -> int:
        """Rows trained on: with the seed it selects the next row's dropout masks."""
        self.alive()
        return self.native.dropout_counter()

    def restore_counters(self, step: int, dropout_counter: int) -> None:
        cdef int64_t n_steps = check_int("step", step, 0, 2**62)
        cdef uint64_t n_rows = check_int("dropout_counter", dropout_counter, 0, 2**62)
        self.enter()
        try:
            self.native.restore_counters(n_steps, n_rows)
        finally:
            self.leave()

    def get(self, part: str):
        """A flat float32 copy of all pairs' ``"weights"``, ``"gradients"``, ``"first_moments"``
        or ``"second_moments"``: in the order of ``layout``, A before B."""
        import numpy
        cdef int chosen = <int>check_choice("part", part, _PARTS)
        out = numpy.empty(self.n_parameters, dtype=numpy.float32)
        cdef float[::1] view = out
        self.enter()
        try:
            with nogil:
                self.native.adapter().get(<training.AdapterPart>chosen, &view[0], view.shape[0])
        finally:
            self.leave()
        return out

    def set(self, part: str, values) -> None:
        """The reverse of ``get``."""
        cdef int chosen = <int>check_choice("part", part, _PARTS)
        cdef vector[float] data
        copy_float32("values", values, data, self.n_parameters)
        self.enter()
        try:
            with nogil:
                self.native.adapter().set(<training.AdapterPart>chosen, data.data(), data.size())
        finally:
            self.leave()

    def save_adapter(self, path, metadata: dict[str, str] | None = None) -> None:
        """Write the adapter as GGUF, as any llama.cpp program loads it.

        metadata: more key-value pairs of text. The file appears under its name only when complete.
        Raises OSError, EngineError.
        """
        cdef vector[pair[string, string]] pairs
        cdef pair[string, string] item
        check_kind("metadata", metadata, dict, type(None))
        for key, value in (metadata or {}).items():
            item.first = encoded("metadata", key)
            item.second = encoded("metadata", value)
            if not key or b"\0" in <bytes>item.first or b"\0" in <bytes>item.second:
                raise ParameterError(f"metadata {key!r} is empty or holds NUL", parameter="metadata")
            pairs.push_back(item)
        self.save(path, pairs, 0, False)

    def save_merged(self, path, ftype: str | None = None) -> None:
        """Write the whole model with W + scale * B A in place of each adapted W.

        ftype: ``None`` keeps the type of each matrix, quantised anew; ``"f16"`` or ``"f32"`` for
        the adapted ones. The file appears under its name only when complete. Raises OSError,
        EngineError, UnsupportedError for a type that cannot be made again.
        """
        cdef vector[pair[string, string]] none
        self.save(path, none, check_choice("ftype", ftype, _MERGED_TYPES), True)

    cdef int save(self, object path, vector[pair[string, string]] & metadata, int ftype,
                  bint merged) except -1:
        self.alive()
        target = os.fsdecode(path_bytes("path", path))
        if os.path.exists(target) and os.path.samefile(target, self.path):
            raise ParameterError("path is the model's own file", parameter="path", value=path)
        from triollama.writing import replacing
        cdef string raw_partial
        with replacing(target) as partial:
            raw_partial = os.fsencode(partial)
            self.enter()
            try:
                with nogil:
                    if merged:
                        self.native.save_merged(raw_partial, <ggml.ggml_type>ftype)
                    else:
                        self.native.save_adapter(raw_partial, metadata)
            finally:
                self.leave()
        return 0

    def load_adapter(self, path) -> None:
        """Take A and B from an adapter file with the same targets, rank and scale.

        Moments and counters stay. Raises AdapterError, ModelNotFoundError.
        """
        self.alive()
        cdef string raw_path = path_bytes("path", path)
        name = os.fsdecode(<bytes>raw_path)
        check_magic(name, "the adapter ", AdapterError)
        self.enter()
        try:
            with nogil:
                self.native.load_adapter(raw_path)
        except ModelFormatError as error:
            raise AdapterError(str(error), path=name) from None
        finally:
            self.leave()
