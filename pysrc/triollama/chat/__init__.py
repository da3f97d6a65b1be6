"""Chat: messages to a prompt, by the model's own template or another.

The template is Jinja from a model file: untrusted, so it is parsed by Jinja2 and evaluated here,
within limits (see ``jinja``). Every character keeps its origin, so that special tokens exist
only where the template writes them, and training masks are exact.
"""

from __future__ import annotations

from .builtin import BUILTIN
from .jinja import Limits
from .template import ROLES, ChatTemplate, Rendered, Segment, named, template_for_model
from .tokens import ChatTokenizer, ChatTokens, TurnEnd
from .training import TrainingText, training_texts

__all__ = [
    "BUILTIN",
    "ROLES",
    "ChatTemplate",
    "ChatTokenizer",
    "ChatTokens",
    "Limits",
    "Rendered",
    "Segment",
    "TrainingText",
    "TurnEnd",
    "named",
    "template_for_model",
    "training_texts",
]
