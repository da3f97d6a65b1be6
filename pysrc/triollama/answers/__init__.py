"""What an answer has to be: types, and their grammars; thoughts before it, and calls of tools."""

from .partial import PartialJSON
from .reasoning import Thoughts, reasoning_of
from .tools import FORMATS, CallFormat, Calls, Tool, Toolbox, ToolChoice
from .types import Structured, structured

__all__ = [
    "FORMATS",
    "CallFormat",
    "Calls",
    "PartialJSON",
    "Structured",
    "Thoughts",
    "Tool",
    "ToolChoice",
    "Toolbox",
    "reasoning_of",
    "structured",
]
