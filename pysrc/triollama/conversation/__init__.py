"""Conversations: committed history, the plan of a turn, the turn itself, and who has which."""

from __future__ import annotations

from .conversation import Conversation
from .plan import Overflow
from .registry import Conversations
from .turn import OnCancel, TurnStream

__all__ = ["Conversation", "Conversations", "OnCancel", "Overflow", "TurnStream"]
