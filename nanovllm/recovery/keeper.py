"""Keeper: keeps the journal of an engine, and after a crash restores from it what had not ended.

    with keep(llm.engine, "engine.journal", llm.config) as keeper:      # restores what the file has
        llm.generate(prompts)                                           # serves restored requests along the way
        for entry in keeper.entries(): print(entry.output(llm.tokenizer).text)

A restored request is added again with its prompt, its seed and the tokens that it had drawn, as after a preemption: the
KV is computed again, positions and limits stay, so the next token is the one that would have come. Its answer is kept for
a while, for whoever asked. `build` does this in the engine process of a server. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.detokenizer import IncrementalDetokenizer, StopStrings
from nanovllm.engine.engine_process import ServedEngine
from nanovllm.engine.events import Event, RequestAdded, SequenceAdmitted, SequenceFinished, StepCollected, StepDispatched
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import AddRequest
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ConfigError, NanoVllmError
from nanovllm.log import logger
from nanovllm.recovery.journal import Completion, Ended, Entry, Journal, Record, Tokens
from nanovllm.tokenizer import Tokenizer

BUILDER = "nanovllm.recovery.keeper:build"
DEFAULT_BUILDER = "nanovllm.engine.engine_main:build"
KEEP_SECONDS = 3600.0  # an answer is kept so long
MAX_KEPT = 1000  # answers; the oldest go first
LINGER_SECONDS = 30.0  # what ended so shortly before a crash may not have reached its client
MAX_ATTEMPTS = 3  # restorations of a request in a row without a new token: it may be what kills the engine
SAME = ("model", "revision", "dtype", "cpu_compute")  # options of the engine on which the tokens depend


class Live:
    """A completion that is under way."""

    __slots__ = ("completion", "entry", "handle", "num_known", "sequence")

    def __init__(self, entry: Entry, index: int, sequence: Sequence) -> None:
        self.entry, self.completion, self.sequence = entry, entry.completions[index], sequence
        self.handle = entry.handle + index
        self.num_known = sequence.num_prompt_tokens + len(self.completion.token_ids)  # tokens that the journal has

    def new_tokens(self) -> list[int]:
        token_ids = self.sequence.token_ids[self.num_known :]
        if token_ids:
            self.num_known += len(token_ids)
            self.completion.token_ids += token_ids
            self.entry.num_attempts = 0
        return token_ids


class Keeper:
    """A `Listener`. Made by `keep`. Everything here happens on the engine's thread."""

    def __init__(self, engine: LLMEngine, path: str, tokenizer: Tokenizer, model: dict[str, Any], keep_s: float) -> None:
        self._engine, self._tokenizer, self._keep_s = engine, tokenizer, keep_s
        self._journal = Journal(path, model)
        self._entries: dict[int, Entry] = {}  # all that a rewrite writes, by handle
        self._open: dict[str, tuple[Entry, Request]] = {}  # by the engine's request id
        self._waiting: dict[int, Live] = {}  # by seq_id
        self._running: dict[int, Live] = {}  # admitted once, and not ended: these can grow
        self._new: list[Entry] = []  # not written yet
        self._calls: dict[tuple[str, str], tuple[set[int], list[Entry]]] = {}  # a client's call: open handles, ended entries
        self._lingering: deque[Entry] = deque()  # ended, and perhaps not delivered
        self._kept: deque[Entry] = deque()  # restored and ended, oldest first
        self._restoring: Entry | None = None
        self._is_ready = False
        self._next_handle = 0
        try:
            self._restore()
        except BaseException:
            self._journal.close()
            raise

    # --- listening

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepCollected):
            self._note_tokens()
        elif isinstance(event, StepDispatched):
            if self._new:
                self._write()
        elif isinstance(event, SequenceAdmitted):
            if (live := self._waiting.pop(event.seq_id, None)) is not None:
                self._running[event.seq_id] = live
        elif isinstance(event, SequenceFinished):
            self._on_finished(event)
        elif isinstance(event, RequestAdded):
            self._on_added(event)

    def _on_added(self, event: RequestAdded) -> None:
        request: Request = event.request
        entry = self._restoring or self._entry_of(request)
        self._next_handle = max(self._next_handle, entry.handle + len(entry.completions))
        self._entries[entry.handle] = entry
        self._open[event.request_id] = entry, request
        self._waiting.update((one.seq_id, Live(entry, one.index, one)) for one in request.sequences)
        self._new.append(entry)

    def accept(self, request_id: str, message: AddRequest) -> None:
        """What the engine does not know of a request that it has just taken: whose it is, and which strings stop it."""
        entry, _ = self._open[request_id]
        entry.params = dataclasses.replace(entry.params, stop=message.stop)
        if message.origin is not None:
            entry.origin = message.origin
            handles, _ = self._calls.setdefault((entry.origin.owner, entry.origin.name), (set(), []))
            handles.add(entry.handle)

    def _entry_of(self, request: Request) -> Entry:
        first = request.sequences[0]
        params = dataclasses.replace(first.params, seed=first.sampling.seed, bad_words=())
        return Entry(
            handle=self._next_handle,
            request_id=first.request_id,
            token_ids=list(first.token_ids),
            params=params,
            bad_words=[list(word) for word in first.sampling.bad_words],
            priority=first.priority,
            cache_salt=first.cache_salt,
            pooling=first.sampling.pooling,
            max_num_tokens=first.max_num_tokens,
            arrived=time.time(),
            completions=[Completion() for _ in request.sequences],
        )

    def _note_tokens(self) -> None:
        handles: list[int] = []
        token_ids: list[int] = []
        for live in self._running.values():
            if len(live.sequence.token_ids) > live.num_known:
                new = live.new_tokens()
                handles += [live.handle] * len(new)
                token_ids += new
        if handles:
            self._write(Tokens(handles, token_ids))

    def _on_finished(self, event: SequenceFinished) -> None:
        live = self._running.pop(event.seq_id, None) or self._waiting.pop(event.seq_id, None)
        if live is None:
            return
        entry, completion, matcher = live.entry, live.completion, live.sequence.matcher
        new, now = live.new_tokens(), time.time()
        completion.finish_reason, completion.stop_reason = event.reason, live.sequence.stop_reason
        if event.reason == "error" and matcher is not None:
            completion.stop_reason = matcher.error
        ended = Ended(live.handle, event.reason, completion.stop_reason, now)
        self._write(*([Tokens([live.handle] * len(new), new)] if new else []), ended)
        if entry.is_complete:
            del self._open[event.request_id]
            self._end(entry, now)

    def _end(self, entry: Entry, now: float) -> None:
        """Its answer is whole. Nobody knows yet whether it arrives, so it stays for a moment."""
        entry.ended = now
        call = self._calls.get((entry.origin.owner, entry.origin.name))
        if entry.is_restored:
            self._kept.append(entry)
        elif not entry.params.stop and any(one.finish_reason == "abort" for one in entry.completions):
            del self._entries[entry.handle]  # its client did not want it any more
        elif call is not None:
            call[1].append(entry)
        else:
            self._lingering.append(entry)
        if call is not None:
            call[0].discard(entry.handle)
            if not call[0]:
                self._lingering += call[1]
                del self._calls[entry.origin.owner, entry.origin.name]
        self._forget_old(now)

    def _forget_old(self, now: float) -> None:
        while self._lingering and (self._lingering[0].ended or 0.0) < now - LINGER_SECONDS:
            if not (entry := self._lingering.popleft()).is_restored:
                del self._entries[entry.handle]
        while self._kept and ((self._kept[0].ended or 0.0) < now - self._keep_s or len(self._kept) > MAX_KEPT):
            self._entries.pop(self._kept.popleft().handle, None)

    def _write(self, *records: Record) -> None:
        if not self._is_ready:
            return  # what is restored so far is not all: the old file stays whole until it is
        new, self._new = self._new, []
        self._journal.write([*new, *records])
        if self._journal.is_large:
            self._journal.rewrite(self._entries.values())

    # --- restoring

    def _restore(self) -> None:
        entries, written = self._journal.load()
        self._next_handle = max((entry.handle + len(entry.completions) for entry in entries), default=0)
        open_calls = {(one.origin.owner, one.origin.name) for one in entries if one.ended is None and one.origin.name}
        self._engine.events.listeners.append(self)
        now, resumed, num_kept = time.time(), [], 0
        for entry in entries:
            if self._is_abandoned(entry):
                continue
            if entry.ended is None:
                resumed.append(entry)
                self._resume(entry, now)
            elif entry.is_restored:
                self._keep(entry)
            elif entry.ended > written - LINGER_SECONDS or (entry.origin.owner, entry.origin.name) in open_calls:
                num_kept += 1
                entry.is_restored, entry.ended = True, now
                self._keep(entry)
        self._kept = deque(sorted(self._kept, key=lambda entry: entry.ended or 0.0))
        self._forget_old(now)
        self._new.clear()  # a rewrite has them all
        self._journal.rewrite(self._entries.values())
        self._is_ready = True
        if resumed or num_kept:
            failed = [entry.error for entry in resumed if entry.error is not None]
            logger.warning(
                "checkpoint %s: %d requests go on, %d had just ended, %d cannot be restored%s",
                *(self._journal.path, len(resumed) - len(failed), num_kept, len(failed), f": {failed[0]}" if failed else ""),
            )

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.handle] = entry
        self._kept.append(entry)

    def _is_abandoned(self, entry: Entry) -> bool:
        """Its client has gone: a completion was aborted, and not because of a stop string."""
        if all(one.finish_reason != "abort" for one in entry.completions):
            return False
        return any(completion.finish_reason == "abort" for completion in entry.output(self._tokenizer).completions)

    def _resume(self, entry: Entry, now: float) -> None:
        entry.is_restored = True
        entry.num_attempts += 1
        entry.error = self._problem_with(entry)
        if entry.error is None:
            try:
                self._add_again(entry)
            except NanoVllmError as error:
                entry.error = str(error)
        if entry.error is not None:
            self._entries[entry.handle] = entry
            self._end(entry, now)

    def _problem_with(self, entry: Entry) -> str | None:
        longest = self._engine.bounds.longest_sequence
        if entry.pooling is not None:
            return "embeddings are not restored; send the request again"
        if entry.num_attempts > MAX_ATTEMPTS:
            return f"it was restored {MAX_ATTEMPTS} times, and each time the engine ended before its next token"
        if entry.max_num_tokens > longest:
            return f"it may have {entry.max_num_tokens} tokens; max_model_len and the KV cache now allow {longest}"
        return None

    def _add_again(self, entry: Entry) -> None:
        engine, params = self._engine, entry.params
        params = dataclasses.replace(
            params,
            max_tokens=entry.max_num_tokens - len(entry.token_ids),
            stop=params.stop if engine.tokenizer is not None else (),
            logprobs=None,
            prompt_logprobs=None,
        )
        request_id = f"restored/{entry.handle}"
        self._restoring = entry
        try:
            engine.add_request(
                entry.token_ids,
                params,
                request_id=request_id,
                priority=entry.priority,
                cache_salt=entry.cache_salt,
                bad_words=entry.bad_words,
            )
        finally:
            self._restoring = None
        _, request = self._open[request_id]
        drawn = [list(completion.token_ids) for completion in entry.completions]
        ends = [(completion.finish_reason, completion.stop_reason) for completion in entry.completions]
        for sequence, token_ids, (reason, stop_reason) in zip(request.sequences, drawn, ends):
            if token_ids:
                engine.scheduler.resume(sequence, token_ids)
            if reason is not None:
                engine.scheduler.finish(sequence, reason, stop_reason)
        self._watch_stops(entry, request)

    def _watch_stops(self, entry: Entry, request: Request) -> None:
        """No front end reads this request's text: from now on the engine itself ends it at its stop strings."""
        if self._engine.tokenizer is None and entry.params.stop:
            stops = StopStrings(entry.params.stop)
            make = IncrementalDetokenizer
            request.detokenizers = [make(self._tokenizer, entry.params, stops) for _ in request.sequences]
        for sequence, completion in zip(request.sequences, request.output.completions):
            completion.token_ids.clear()  # all of it is read again
            if sequence.num_generated_tokens and (stop := request.grow(sequence, time.monotonic)) is not None:
                self._engine.scheduler.finish(sequence, "stop", stop)

    # --- answers

    def entries(self, owner: str = "", name: str | None = None) -> list[Entry]:
        """Restored requests of this owner, running and ended, oldest first. `name`: only those of this client's call."""
        self._forget_old(time.time())
        mine = [entry for entry in self._entries.values() if entry.is_restored and entry.origin.owner == owner]
        return [entry for entry in mine if name is None or entry.origin.name == name]

    def adopt(self, frontend: int, request_ids: list[str]) -> list[str]:
        """A front end has died with these requests open. Returns those that go on: their clients may ask for the answers.

        What had just ended is kept, too: it may not have been passed on.
        """
        now = time.time()
        ended = [one for one in self._entries.values() if one.ended is not None and not one.is_restored]
        for entry in ended:
            if entry.request_id.startswith(f"{frontend}/") and not self._is_abandoned(entry):
                entry.is_restored, entry.ended = True, now
                self._keep(entry)
                self._write(entry)
        adopted = [name for name in request_ids if self._open[name][0].pooling is None]
        for name in adopted:
            entry, request = self._open[name]
            entry.is_restored = True
            self._write(entry)
            self._watch_stops(entry, request)
        return adopted

    def close(self, error: BaseException | None = None) -> None:
        """Stop listening. Without an error nothing is left to doubt: what has ended in good order is forgotten."""
        if self in self._engine.events.listeners:
            self._engine.events.listeners.remove(self)
            if error is None:
                wanted = [entry for entry in self._entries.values() if entry.ended is None or entry.is_restored]
                self._journal.rewrite(wanted)
            self._journal.close()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)


def keep(engine: LLMEngine, path: str, config: EngineConfig, keep_s: float = KEEP_SECONDS) -> Keeper:
    """Restore what the journal at `path` has, and keep it from now on. Raises `ConfigError`.

    `config`: the resolved one, `LLM.config`. The engine must have a tokenizer, and nothing to do yet.
    """
    if engine.tokenizer is None or engine.has_work:
        raise ConfigError("a checkpoint needs an engine that has a tokenizer and no requests yet")
    return Keeper(engine, path, engine.tokenizer, identity(dataclasses.asdict(config), engine), keep_s)


def identity(config: Mapping[str, Any], engine: LLMEngine) -> dict[str, Any]:
    """What must be the same for a restored request to go on with the same tokens."""
    return {**{name: config.get(name) for name in SAME}, "vocab_size": engine.bounds.vocab_size}


# --- in the engine process of a server


def checkpointed(path: str, keep_s: float = KEEP_SECONDS, engine_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of `AsyncEngine.start` for an engine with a journal."""
    inner = (engine_options or {}).get("builder", DEFAULT_BUILDER)
    return {"builder": BUILDER, "builder_options": {"inner": inner, "path": os.path.abspath(path), "keep_s": keep_s}}


def build(config: EngineConfig, inner: str, path: str, keep_s: float) -> ServedEngine:
    """The engine of the builder `inner`, with a journal."""
    module, _, name = inner.partition(":")
    served: ServedEngine = getattr(importlib.import_module(module), name)(config)
    model = identity(served.facts.config, served.engine)
    keeper = Keeper(served.engine, path, served.tokenizer, model, keep_s)

    def restored(frontend: int, owner: str, of_call: str | None = None) -> list[Entry]:
        entries = keeper.entries(owner, of_call)
        return entries if of_call is not None else [entry.without_tokens() for entry in entries]

    return dataclasses.replace(
        served,
        facts=dataclasses.replace(served.facts, has_checkpoint=True),
        calls={**served.calls, "restored": restored},
        on_accept=keeper.accept,
        adopt=keeper.adopt,
        on_end=keeper.close,
    )
