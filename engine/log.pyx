"""llama.cpp's log, handed to logging.getLogger("triollama.llama_cpp")."""
import logging

from libcpp.pair cimport pair

from ggml cimport (
    GGML_LOG_LEVEL_DEBUG,
    GGML_LOG_LEVEL_ERROR,
    GGML_LOG_LEVEL_INFO,
    GGML_LOG_LEVEL_NONE,
    GGML_LOG_LEVEL_WARN,
    ggml_log_level,
)
from llama cimport llama_log_set

cdef extern from "log.hpp" namespace "triollama" nogil:
    cdef cppclass LogQueue:
        @staticmethod
        LogQueue & instance() noexcept
        @staticmethod
        void write(ggml_log_level level, const char * text, void * user_data) noexcept
        void set_threshold(ggml_log_level level) noexcept
        cpp_bool has_lines() noexcept
        vector[pair[int, string]] drain() except +
        string problem() except +
        void forget_problem() noexcept

_logger = logging.getLogger("triollama.llama_cpp")
# A library must stay silent unless its user configured logging (logging's last resort prints warnings).
logging.getLogger("triollama").addHandler(logging.NullHandler())

cdef dict _PYTHON_LEVELS = {
    <int>GGML_LOG_LEVEL_NONE: logging.INFO,
    <int>GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    <int>GGML_LOG_LEVEL_INFO: logging.INFO,
    <int>GGML_LOG_LEVEL_WARN: logging.WARNING,
    <int>GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


cdef int begin_log() except -1:
    """Before a call that may fail: what is logged from here on belongs to it."""
    cdef ggml_log_level threshold = GGML_LOG_LEVEL_ERROR
    if _logger.isEnabledFor(logging.DEBUG):
        threshold = GGML_LOG_LEVEL_DEBUG
    elif _logger.isEnabledFor(logging.INFO):
        threshold = GGML_LOG_LEVEL_INFO
    elif _logger.isEnabledFor(logging.WARNING):
        threshold = GGML_LOG_LEVEL_WARN
    LogQueue.instance().set_threshold(threshold)
    LogQueue.instance().forget_problem()
    return 0


cdef int flush_log() except -1:
    """Hands waiting lines to logging. Cheap when there are none."""
    if not LogQueue.instance().has_lines():
        return 0
    for line in LogQueue.instance().drain():
        level = _PYTHON_LEVELS.get(line.first, logging.INFO)
        _logger.log(level, "%s", line.second.decode("utf-8", "replace").rstrip())
    return 0


cdef str native_problem():
    """The first error (or else the last warning) llama.cpp logged since begin_log()."""
    return LogQueue.instance().problem().decode("utf-8", "replace").strip()


def flush_native_log() -> None:
    """Hand what llama.cpp has logged so far to ``logging``.

    Loading, decoding and the other calls of this module do so themselves; lines that its own
    threads wrote in between wait until then.
    """
    flush_log()


llama_log_set(LogQueue.write, NULL)
