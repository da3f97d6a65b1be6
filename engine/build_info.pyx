"""How this extension was built, and what it finds on this machine."""

cdef extern from "build_info.h":
    const char * TRIOLLAMA_BUILD_JSON

cdef dict _DEVICE_TYPES = {
    <int>ggml.GGML_BACKEND_DEVICE_TYPE_CPU: "cpu",
    <int>ggml.GGML_BACKEND_DEVICE_TYPE_GPU: "gpu",
    <int>ggml.GGML_BACKEND_DEVICE_TYPE_IGPU: "igpu",
    <int>ggml.GGML_BACKEND_DEVICE_TYPE_ACCEL: "accel",
}


def _features(str text) -> dict:
    """`CPU : AVX2 = 1 | OPENMP = 1 | CUDA : ARCHS = 900 |` as {"CPU": {"AVX2": "1", ...}, ...}."""
    result = {}
    features = {}
    for item in text.split("|"):
        head, colon, rest = item.rpartition(" : ")
        if colon:
            features = result.setdefault(head.strip(), {})
        name, equals, value = rest.partition("=")
        if equals:
            features[name.strip()] = value.strip()
    return result


cdef dict build_facts():
    """What the libraries say of themselves, over what the build wrote down."""
    import json

    info = json.loads(TRIOLLAMA_BUILD_JSON.decode())
    info["llama_version"] = llama.llama_version().decode()
    info["ggml_version"] = ggml.ggml_version().decode()
    info["commit"] = ggml.ggml_commit().decode()
    features = _features(llama.llama_print_system_info().decode())
    info["features"] = features
    info["cpu_features"] = [name for name, value in features.get("CPU", {}).items() if value != "0"]
    return info


cdef str _compiled_kernels = None


cdef str compiled_kernels():
    """Source, compiler, C library and instruction set of the CPU's kernels: on these their bits depend."""
    global _compiled_kernels
    if _compiled_kernels is None:
        info = build_facts()
        try:
            libc = os.confstr("CS_GNU_LIBC_VERSION")
        except (AttributeError, ValueError, OSError):
            libc = info["system"]
        _compiled_kernels = (
            f"llama.cpp {info['commit']}, {info['compiler']}, {libc}, {' '.join(info['cpu_features'])}")
    return _compiled_kernels


def build_info() -> dict:
    """Report what this build is and what it can use here.

    Returns a new dict: ``commit``, ``llama_version``, ``ggml_version`` of the llama.cpp inside,
    and ``pinned``, whether that is the one this release names; ``compiler``, ``cuda_compiler`` (""
    without CUDA), ``system``, ``build_type``; ``cmake_args``, the user's flags, and ``options``, the
    effective value of each ggml option; ``backends``, the names of those compiled in; ``features``, for
    each backend what it was compiled for, and ``cpu_features``, the names of the CPU's; ``threads``, whose
    compute on the CPU: "triollama", "OpenMP" (the system's) or "ggml"; ``devices``, a
    dict for each device found: ``name``, ``description``, ``type`` ("cpu", "gpu", "igpu", "accel"),
    ``memory_free`` and ``memory_total`` in bytes (0 where the backend does not say).

    Asking a GPU for its memory may start its driver in this process.
    """
    cdef size_t i, free, total
    cdef ggml.ggml_backend_dev_t device
    info = build_facts()
    info["backends"] = [
        ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i)).decode()
        for i in range(ggml.ggml_backend_reg_count())
    ]
    features = info["features"]
    info["threads"] = (
        "triollama" if has_own_threads()
        else "OpenMP" if features.get("CPU", {}).get("OPENMP", "0") != "0" else "ggml")
    devices = []
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        free = total = 0
        ggml.ggml_backend_dev_memory(device, &free, &total)
        devices.append({
            "name": ggml.ggml_backend_dev_name(device).decode(),
            "description": ggml.ggml_backend_dev_description(device).decode(errors="replace"),
            "type": _DEVICE_TYPES.get(<int>ggml.ggml_backend_dev_get_type(device), "other"),
            "memory_free": free,
            "memory_total": total,
        })
    info["devices"] = devices
    return info
