"""Jinja templates from model files, rendered so that every character's origin is known.

Why not Jinja2's own rendering, which transformers uses in a sandbox:

- Origins. A template mixes markers that become special tokens with what people wrote, and only
  the template's own may become tokens; only what the assistant said is trained on. So strings here
  carry where each character came from through every filter and method (``origins``). Jinja2
  compiles templates to Python in which strings are strings.
- Bounds. A template comes with a model file, and loops without end, strings of gigabytes and
  recursion are easy to write. Every step is counted here and every string is measured before it is
  made (``budget``); a sandbox limits what is touched, not what it costs.
- Reach. Nothing is compiled or looked up on Python objects: a template sees plain data, and calls
  what is in the tables of ``filters``, ``predicates`` and ``methods``, and nothing else.

Jinja2 parses (``parsing``). Scopes, undefined values and printing follow it in a sandbox, set up as
``transformers`` does for chat templates (trim_blocks, lstrip_blocks, loop controls, the tag
``generation``); the tests compare both over the templates of many models.
"""

from __future__ import annotations

from .budget import Limits, TemplateFault
from .evaluator import Evaluator, Raised
from .parsing import parse

__all__ = ["Evaluator", "Limits", "Raised", "TemplateFault", "parse"]
