"""From token bytes to text that may be shown."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE


cdef class TextStream:
    """Turns bytes, in pieces, into text: never half a character, and nothing of a stop string.

    stops: strings that end the text. The one complete first wins; of several that end at the same
    character, the longest.

    Bytes that are no UTF-8 become U+FFFD, one for each maximal subpart, as
    ``bytes.decode("utf-8", "replace")`` does. How the bytes are cut makes no difference.
    """

    def __cinit__(self, *args, **kwargs):
        self.native.reset(new NativeTextStream())

    def __init__(self, stops=()):
        cdef vector[string] texts = _utf8_list("stops", stops)
        self.native.reset(new NativeTextStream(texts))

    def feed(self, data: bytes) -> str:
        """Takes bytes and returns what may be shown now. After a stop string, always ""."""
        cdef bytes given = _bytes("data", data)
        cdef string out
        self.native.get().feed(PyBytes_AS_STRING(given), PyBytes_GET_SIZE(given), out)
        return out.decode("utf-8")

    def flush(self) -> str:
        """End of the bytes: returns what was held back."""
        cdef string out
        self.native.get().flush(out)
        return out.decode("utf-8")

    @property
    def matched_stop(self) -> int:
        """Index of the stop string that ended the text, or -1."""
        return self.native.get().matched_stop()

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self.native.get().stopped()

    @property
    def pending(self) -> int:
        """Bytes held back: an unfinished character, or the possible start of a stop string."""
        return self.native.get().pending()
