"""Conversations to files and back: on request, and by themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import trio

from .. import files
from ..checks import check_kind, shown
from ..engine import loaded
from ..engine.loaded import Scaled
from ..errors import (
    ParameterError,
    StateDamagedError,
    StateError,
    StateMismatchError,
    StateVersionError,
)
from ..files.autosave import Autosave, Sync
from ..files.owner import Owner
from ..files.store import real_path
from .choices import check_policy, checked_ids
from .conversation import Conversation
from .registry import Conversations
from .saved import checked_state, document_of, overflow_of, settings_of, tell_of_other_kernels

__all__ = ["autosave", "restore", "save"]

_log = logging.getLogger("triollama.conversation")

_EVER = 1e9
"""As many seconds as a clock can count for sure."""


def settings(chats: Conversations) -> files.ContextSettings:
    """Of this Llama's context, for a document."""
    core = chats.core
    return settings_of(core.engine.layout, core.n_ctx, deterministic=core.deterministic)


def kv_key(chats: Conversations, chat: Conversation) -> bytes:
    """What the KV of a conversation belongs to."""
    adapters = loaded.saved(chat.adapters)
    return files.kv_key(chats.core.engine.model.fingerprint, settings(chats), adapters)


def _document(
    chats: Conversations, conversations: Iterable[files.SavedConversation]
) -> files.Document:
    """A document of these conversations, with this Llama's model and settings."""
    return document_of(chats.core.engine.model, settings(chats), conversations, chats._extras)


async def save(
    chats: Conversations,
    path: Any,
    conversations: Iterable[Conversation] | None = None,
    *,
    format: Literal["json", "msgpack"] = "json",
    kv: bool = False,
) -> files.Document:
    """See ``Llama.save``."""
    await trio.lowlevel.checkpoint()
    chats.core.check_open()
    check_kind("kv", kv, bool)
    await chats.core.engine.fingerprint()
    chosen = list(chats) if conversations is None else _own(chats, conversations)
    keeper = _keeper(chats, path)
    if keeper is not None:
        gone = [chat for chat in chosen if chat.deleted]
        kept = await _write_kv(chats, path, chosen) if kv else {}
        # What was deleted meanwhile, or opened anew under its id, is not to come back.
        chosen = [
            chat
            for chat in chosen
            if chats._all.get(chat.id, chat) is chat and (not chat.deleted or chat in gone)
        ]
        made = _document(chats, [chat.to_saved(kept.get(chat.id)) for chat in chosen])
        belonging = await keeper.save(made.conversations)
        await trio.to_thread.run_sync(files.remove_kv_except, path, belonging)
        return made
    owner = await trio.to_thread.run_sync(Owner, path, abandon_on_cancel=True)
    try:
        kept = await _write_kv(chats, path, chosen) if kv else {}
        made = _document(chats, [chat.to_saved(kept.get(chat.id)) for chat in chosen])

        def write() -> None:
            files.write_document(owner, made, format)
            files.remove_kv_except(path, [one.kv for one in made.conversations])

        await trio.to_thread.run_sync(write)
    finally:
        owner.release()
    return made


def _own(chats: Conversations, conversations: Iterable[Conversation]) -> list[Conversation]:
    """Conversations that somebody gave, if they are this Llama's."""
    given: list[Any] = list(conversations) if isinstance(conversations, Iterable) else [None]
    for one in given:
        if not isinstance(one, Conversation) or one._ledger.core is not chats.core:
            raise ParameterError(
                f"conversations must be a list of this Llama's own, not {shown(conversations)}",
                parameter="conversations",
                value=conversations,
            )
    return given


def _keeper(chats: Conversations, path: Any) -> Autosave | None:
    """The autosave whose file this is."""
    real = real_path(path)
    return next((one for one in chats._autosaves if one.path == real), None)


async def _write_kv(
    chats: Conversations, path: Any, chosen: Iterable[Conversation]
) -> dict[str, files.KVFile]:
    written = {}
    for chat in chosen:
        found = await _kv_of(chats, chat)
        if found is not None:
            tokens, blob = found
            written[chat.id] = await trio.to_thread.run_sync(
                files.write_kv, path, chat.id, kv_key(chats, chat), tokens, blob
            )
    return written


async def _kv_of(chats: Conversations, chat: Conversation) -> tuple[tuple[int, ...], bytes] | None:
    """The KV of an idle conversation's committed tokens, if it is there."""
    ledger, tokens = chat._ledger, chat.tokens
    if chat.is_busy or ledger.closed:
        return None
    try:
        n, data = await chats.sequences.save(ledger.sequence, tokens)
    except StateError:
        return None  # closed meanwhile
    return (tokens[:n], data) if n else None


async def restore(
    chats: Conversations,
    source: Any,
    ids: Iterable[str] | None = None,
    *,
    on_mismatch: Literal["error", "recompute"] = "error",
    replace: bool = False,
    **options: Any,
) -> list[Conversation]:
    """See ``Llama.restore``."""
    await trio.lowlevel.checkpoint()
    chats.core.check_open()
    check_kind("replace", replace, bool)
    check_kind("tools", options.get("tools"), list, tuple, type(None))
    check_kind("variables", options.get("variables"), Mapping, type(None))
    for name, value in options.items():
        if name not in ("overflow", "on_cancel", "tools", "variables"):
            raise ParameterError(
                f"restore has no option {shown(name)}", parameter=name, value=value
            )
    if "overflow" in options:
        chats.check_overflow(options["overflow"])
    if "on_cancel" in options:
        check_policy(options["on_cancel"])
    wanted = None if ids is None else checked_ids(ids)
    if isinstance(source, files.Document):
        document, path = source, None
    else:
        path = source
        keeper = _keeper(chats, path)
        # The file may not have yet what was just closed.
        document = (
            keeper.document(wanted)
            if keeper is not None and keeper.begun
            else await trio.to_thread.run_sync(files.load_document, path)
        )
    same = files.check_model(document.model, await chats.core.engine.fingerprint(), on_mismatch)
    tell_of_other_kernels(settings(chats), document.context)
    chosen = [one for one in document.conversations if wanted is None or one.id in wanted]
    if wanted is not None and len(chosen) < len(wanted):
        missing = wanted - {one.id for one in chosen}
        raise ParameterError(
            f"the file has no conversation {', '.join(sorted(missing))}",
            parameter="ids",
            value=sorted(missing),
        )
    with chats.restoring(chosen, replace=replace):
        made = await _revive_all(chats, chosen, same, path, document, on_mismatch, options)
        try:
            _check_replaceable(chats, made)  # a turn may have begun meanwhile
        except BaseException:
            _drop(chats, made)
            raise
        for chat in made:
            old = chats._all.get(chat.id)
            if old is not None:
                old.close()
            chats.add(chat)
    chats._extras.update(document.extras)
    return made


def _check_replaceable(chats: Conversations, made: Iterable[Conversation]) -> None:
    for chat in made:
        if chat.id in chats._all:
            chats._all[chat.id]._ledger.check_idle()


def _drop(chats: Conversations, made: Iterable[Conversation]) -> None:
    for chat in made:
        chats.sequences.drop(chat._ledger.sequence)


async def _revive_all(
    chats: Conversations,
    chosen: Iterable[files.SavedConversation],
    same: bool,
    path: Any,
    document: files.Document,
    on_mismatch: Literal["error", "recompute"],
    options: Mapping[str, Any],
) -> list[Conversation]:
    n_vocab = len(chats.core.vocab)
    made: list[Conversation] = []
    try:
        for at, one in enumerate(chosen):
            place = f"$.conversations[{at}]"
            adapters = chats.adapters.find(one.adapters) if same else None
            if adapters is None and same and on_mismatch == "error":
                raise StateMismatchError(
                    f"{place}: the conversation {shown(one.id)} used adapters that are not loaded: "
                    f"{', '.join(adapter.path for adapter in one.adapters)} (load_adapter)",
                    what="adapters",
                )
            fits = same and adapters is not None
            made.append(_revive(chats, one, fits, n_vocab, place, adapters or (), options))
            if fits and path is not None and one.kv is not None:
                await _load_kv(chats, made[-1], one, path, on_mismatch)
    except BaseException:
        _drop(chats, made)
        raise
    return made


def _revive(
    chats: Conversations,
    one: files.SavedConversation,
    same: bool,
    n_vocab: int,
    place: str,
    adapters: Scaled,
    options: Mapping[str, Any],
) -> Conversation:
    params = files.known_params(one.params)
    state = checked_state(
        one, chats.core.engine.make_sampler, same=same, n_vocab=n_vocab, place=place
    )
    chat = Conversation(
        chats,
        one.id,
        template=chats.template(one.template or None),
        source=one.template,
        params=params,
        overflow=overflow_of(one, options, chats.check_overflow),
        on_cancel=options.get("on_cancel", one.on_cancel),
        tools=options.get("tools", one.tools),
        variables=options.get("variables", one.variables) or {},
        state=state,
        adapters=adapters,
        title=one.title,
        parent=one.parent,
    )
    chat.created = one.created or chat.created
    chat.updated = one.updated or chat.updated
    chat._ledger.n_prompt_tokens = one.n_prompt_tokens
    chat._ledger.n_generated_tokens = one.n_generated_tokens
    chat._extras = one.extras
    chat._unknown_params = files.unknown_params(one.params)
    return chat


async def _load_kv(
    chats: Conversations,
    chat: Conversation,
    one: files.SavedConversation,
    path: Any,
    on_mismatch: str,
) -> None:
    assert one.kv is not None
    tokens = one.tokens[: one.kv.n_tokens]
    file, key = one.kv, kv_key(chats, chat)
    engine, sequence = chats.core.engine, chat._ledger.sequence
    adapters = await chats.adapters.number(chat.adapters)

    def load() -> Any:
        # The blob has a checksum of its own, which load_sequence looks at.
        blob = files.read_kv(path, file, key, tokens, verify=False)
        try:
            return engine.load_sequence(sequence.number, blob, len(tokens), adapters)
        except StateError as error:
            raise StateDamagedError(str(error), path=file.name) from None

    try:
        got = (await chats.core.answer(await trio.to_thread.run_sync(load))).value
    except (StateDamagedError, StateVersionError):
        if on_mismatch == "error":
            raise
        return
    except (FileNotFoundError, StateError) as error:
        _log.info("%s: KV is computed again: %s", chat.id, error)
        return
    sequence.tokens = tokens[:got]


async def autosave(
    chats: Conversations,
    path: Any,
    *,
    every: float = 30.0,
    conversations: Iterable[Conversation] | None = None,
    deadline: float = 5.0,
    sync: Sync = "soon",
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """See ``Llama.autosave``."""
    await trio.lowlevel.checkpoint()
    chats.core.check_open()
    for name, value, least in (("every", every, 0.001), ("deadline", deadline, 0.0)):
        if not isinstance(value, (int, float)) or not value >= least:
            raise ParameterError(
                f"{name} must be a number of seconds, {least:g} or more, not {shown(value)}",
                parameter=name,
                value=value,
            )
    if not isinstance(sync, str) or sync not in ("soon", "commit"):
        raise ParameterError(
            f"sync must be 'soon' or 'commit', not {shown(sync)}", parameter="sync", value=sync
        )
    every, deadline = min(every, _EVER), min(deadline, _EVER)
    await chats.core.engine.fingerprint()
    ids = None if conversations is None else [one.id for one in _own(chats, conversations)]
    saver = Autosave(path, _document(chats, ()), every=every, sync=sync, ids=ids)
    for chat in chats:
        saver.note(chat)
    chats._autosaves.append(saver)  # before anything is awaited: what changes from here on is noted
    try:
        await saver.run(deadline, task_status)
    finally:
        chats._autosaves.remove(saver)
