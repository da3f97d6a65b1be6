"""What the conversations of a script's Llama have in common, and their files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

from .. import files
from .._engine import Context, Sampler, Vocab
from ..chat import ChatTemplate, ChatTokenizer, TurnEnd, template_for_model
from ..checks import check_kind, shown
from ..conversation.choices import OnCancel, check_policy, checked_id, checked_ids, given
from ..conversation.plan import Overflow, check_overflow
from ..conversation.saved import (
    checked_state,
    document_of,
    overflow_of,
    settings_of,
    tell_of_other_kernels,
)
from ..conversation.tools import ToolSource
from ..engine import loaded
from ..engine.loaded import LoadedAdapter, Scaled
from ..errors import ParameterError, StateMismatchError
from ..files import Message
from ..params import GenerationParams, draw_seed, make_params
from .conversation import Conversation
from .stream import Stream

__all__ = ["Chats"]

_log = logging.getLogger("triollama.sync")


class Chats:
    """Makes conversations, saves and restores them. ``make_room``: sees to it that a stream with
    such adapters may begin; ``opened`` is told which did."""

    def __init__(
        self,
        context: Context,
        vocab: Vocab,
        adapters: Mapping[bytes, LoadedAdapter],
        reuse: Callable[[], bool],
        make_room: Callable[[Scaled], None],
        opened: Callable[[Stream], None],
    ) -> None:
        self.context = context
        self.vocab = vocab
        self.tokenizer = ChatTokenizer(vocab)
        self.make_room = make_room
        self.opened = opened
        self._adapters = adapters
        self._reuse = reuse
        self._templates: dict[str, ChatTemplate] = {}
        self._ends: WeakKeyDictionary[ChatTemplate, TurnEnd] = WeakKeyDictionary()
        self._extras: dict[str, Any] = {}  # of a later version's documents

    @property
    def reuse(self) -> bool:
        return self._reuse()

    def new_sampler(self, params: GenerationParams) -> Sampler:
        return Sampler(self.vocab, params, n_ctx=self.context.n_ctx)

    def template(self, wanted: str | ChatTemplate | None) -> ChatTemplate:
        if isinstance(wanted, ChatTemplate):
            return wanted
        key = wanted or ""
        if key not in self._templates:
            self._templates[key] = template_for_model(self.context.model, wanted or None)
        return self._templates[key]

    def turn_end(self, template: ChatTemplate) -> TurnEnd:
        end = self._ends.get(template)
        if end is None:
            end = self._ends[template] = self.tokenizer.turn_end(template)
        return end

    def check_adapters(self, adapters: Iterable[tuple[LoadedAdapter, float]]) -> Scaled:
        return loaded.scaled(self._adapters, adapters)

    def check_overflow(self, overflow: Any) -> Overflow:
        can_shift = self.context.has_memory and self.context.memory.can_shift
        return check_overflow(overflow, can_shift=can_shift, deterministic=self.context.exact)

    def create(
        self,
        id: str | None = None,
        *,
        system: str | None = None,
        messages: Iterable[Mapping[str, Any] | Message] = (),
        template: str | ChatTemplate | None = None,
        params: GenerationParams | None = None,
        title: str = "",
        overflow: Overflow = "raise",
        on_cancel: OnCancel = "rollback",
        tools: Iterable[ToolSource] | None = None,
        variables: Mapping[str, Any] | None = None,
        adapters: Iterable[tuple[LoadedAdapter, float]] = (),
        **changes: Any,
    ) -> Conversation:
        """See ``Llama.chat``."""
        check_kind("template", template, str, ChatTemplate, type(None))
        check_kind("tools", tools, list, tuple, type(None))
        check_kind("variables", variables, Mapping, type(None))
        made = make_params(params, changes)
        if made.seed is None:  # its turns go on with one random state: what they start from is kept
            made = made.replace(seed=draw_seed())
        source = template.source if isinstance(template, ChatTemplate) else template or ""
        for name, value in (("template", source), ("tools", tools), ("variables", variables)):
            files.check_text(value, name)
        return Conversation(
            self,
            checked_id(id),
            template=self.template(template),
            source=source,
            params=made,
            overflow=self.check_overflow(overflow),
            on_cancel=check_policy(on_cancel),
            tools=tools,
            variables=variables or {},
            state=given(system, messages),
            adapters=self.check_adapters(adapters),
            title=title,
        )

    def _settings(self) -> files.ContextSettings:
        return settings_of(self.context, self.context.n_ctx, deterministic=self.context.exact)

    def save(
        self,
        path: str | os.PathLike[str],
        conversations: Iterable[Conversation],
        format: Literal["json", "msgpack"] = "json",
    ) -> files.Document:
        """See ``Llama.save``."""
        context, settings = self.context, self._settings()
        check_kind("conversations", conversations, Iterable)
        given: list[Any] = list(conversations)
        for one in given:
            if not isinstance(one, Conversation) or one._house is not self:
                raise ParameterError(
                    f"conversations must be this Llama's own, not {shown(one)}",
                    parameter="conversations",
                    value=one,
                )
        saved = [one.to_saved() for one in given]
        document = document_of(context.model, settings, saved, self._extras)
        files.save_document(path, document, format)
        files.remove_kv_except(path, ())
        return document

    def restore(
        self,
        source: str | os.PathLike[str] | files.Document,
        ids: Iterable[str] | None = None,
        *,
        on_mismatch: Literal["error", "recompute"] = "error",
        **options: Any,
    ) -> list[Conversation]:
        """See ``Llama.restore``."""
        check_kind("tools", options.get("tools"), list, tuple, type(None))
        check_kind("variables", options.get("variables"), Mapping, type(None))
        for name, value in options.items():
            if name not in ("overflow", "on_cancel", "tools", "variables"):
                raise ParameterError(
                    f"restore has no option {shown(name)}", parameter=name, value=value
                )
        document = source if isinstance(source, files.Document) else files.load_document(source)
        same = files.check_model(document.model, self.context.model.fingerprint, on_mismatch)
        tell_of_other_kernels(self._settings(), document.context)
        wanted = None if ids is None else checked_ids(ids)
        missing = (wanted or set()) - {one.id for one in document.conversations}
        if missing:
            raise ParameterError(
                f"the file has no conversation {', '.join(sorted(missing))}",
                parameter="ids",
                value=sorted(missing),
            )
        made = [
            self._revive(one, same, f"$.conversations[{at}]", on_mismatch, options)
            for at, one in enumerate(document.conversations)
            if wanted is None or one.id in wanted
        ]
        self._extras.update(document.extras)
        return made

    def _revive(
        self,
        one: files.SavedConversation,
        same: bool,
        place: str,
        on_mismatch: Literal["error", "recompute"],
        options: Mapping[str, Any],
    ) -> Conversation:
        adapters = loaded.find(self._adapters, one.adapters) if same else None
        if adapters is None and same and on_mismatch == "error":
            raise StateMismatchError(
                f"{place}: the conversation {shown(one.id)} used adapters that are not loaded: "
                f"{', '.join(adapter.path for adapter in one.adapters)} (load_adapter)",
                what="adapters",
            )
        chat = Conversation(
            self,
            one.id,
            template=self.template(one.template or None),
            source=one.template,
            params=files.known_params(one.params),
            overflow=overflow_of(one, options, self.check_overflow),
            on_cancel=check_policy(options.get("on_cancel", one.on_cancel)),
            tools=options.get("tools", one.tools),
            variables=options.get("variables", one.variables) or {},
            state=checked_state(
                one,
                self.new_sampler,
                same=same and adapters is not None,
                n_vocab=len(self.vocab),
                place=place,
            ),
            adapters=adapters or (),
            title=one.title,
            parent=one.parent,
        )
        chat.created = one.created or chat.created
        chat.updated = one.updated or chat.updated
        chat.n_prompt_tokens = one.n_prompt_tokens
        chat.n_generated_tokens = one.n_generated_tokens
        chat._extras = one.extras
        chat._unknown_params = files.unknown_params(one.params)
        return chat
