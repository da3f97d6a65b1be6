"""What an answer has to be: types, and their grammars; thoughts before it, and calls of tools."""

from .calls import Calls
from .formats import FORMATS, CallFormat, voice_of
from .partial import PartialJSON
from .parts import Parts
from .reasoning import Thoughts, reasoning_of
from .tools import Tool, Toolbox, ToolChoice
from .tries import Tries
from .types import Structured, structured

__all__ = [
    "FORMATS",
    "CallFormat",
    "Calls",
    "PartialJSON",
    "Parts",
    "Structured",
    "Thoughts",
    "Tool",
    "ToolChoice",
    "Toolbox",
    "Tries",
    "reasoning_of",
    "structured",
    "voice_of",
]
