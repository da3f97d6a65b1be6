"""llama.cpp's log, handed to logging.getLogger("triollama.llama_cpp"): its INFO is DEBUG there."""
import sys


cdef extern from "guards/log.hpp" namespace "triollama::native" nogil:
    cdef cppclass LogQueue:
        @staticmethod
        LogQueue & instance() noexcept
        @staticmethod
        void write(ggml.ggml_log_level level, const char * text, void * user_data) noexcept
        void set_threshold(ggml.ggml_log_level level) noexcept
        cpp_bool has_lines() noexcept
        cpp_bool take(int & level, string & line) except +

        @staticmethod
        string problem() except +
        @staticmethod
        void forget_problem() noexcept

# logging's own numbers, so that a script which logs nothing need not import it.
cdef int _DEBUG = 10
cdef int _WARNING = 30
cdef int _ERROR = 40

cdef dict _PYTHON_LEVELS = {
    <int>ggml.GGML_LOG_LEVEL_NONE: _DEBUG,
    <int>ggml.GGML_LOG_LEVEL_DEBUG: _DEBUG,
    <int>ggml.GGML_LOG_LEVEL_WARN: _WARNING,
    <int>ggml.GGML_LOG_LEVEL_ERROR: _ERROR,
}

cdef object _logger = None


cdef object get_logger():
    """The logger, or None while nobody has imported logging: then nobody can be listening."""
    global _logger
    if _logger is None and "logging" in sys.modules:
        import logging
        # A library must stay silent unless its user configured logging (whose last resort prints
        # warnings).
        logging.getLogger("triollama").addHandler(logging.NullHandler())
        _logger = logging.getLogger("triollama.llama_cpp")
    return _logger


cdef int begin_log() except -1:
    """Before a call that may fail: what this thread logs from here on belongs to it."""
    cdef ggml.ggml_log_level threshold = ggml.GGML_LOG_LEVEL_ERROR
    logger = get_logger()
    if logger is not None:
        if logger.isEnabledFor(_DEBUG):
            threshold = ggml.GGML_LOG_LEVEL_DEBUG
        elif logger.isEnabledFor(_WARNING):
            threshold = ggml.GGML_LOG_LEVEL_WARN
    LogQueue.instance().set_threshold(threshold)
    LogQueue.forget_problem()
    return 0


cdef int flush_log() except -1:
    """Hands waiting lines to logging. Cheap when there are none."""
    if not LogQueue.instance().has_lines():
        return 0
    cdef int level = 0
    cdef string line
    logger = get_logger()
    # One by one: logging may raise what a filter raises, and the other lines wait for the next call.
    while LogQueue.instance().take(level, line):
        if logger is not None:
            logger.log(
                _PYTHON_LEVELS.get(level, _DEBUG), "%s", line.decode("utf-8", "replace").rstrip())
    return 0


cdef str native_problem():
    """The first error (or else the last warning) llama.cpp logged on this thread since begin_log()."""
    return LogQueue.problem().decode("utf-8", "replace").strip()


def flush_native_log() -> None:
    """Hand what llama.cpp has logged so far to ``logging``.

    Loading, decoding and the other calls of this module do so themselves; lines that its own
    threads wrote in between wait until then.
    """
    flush_log()


llama.llama_log_set(LogQueue.write, NULL)
