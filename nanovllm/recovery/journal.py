"""Journal: what an engine has accepted and drawn so far, in a file that outlives its process.

Records follow each other, each behind its length and checksum: a header, requests, tokens, ends. A record is written with
one call and never changed, so a process that is killed leaves at most a torn last one, which reading ignores. Nothing is
synced: the file survives the death of the process, not that of the machine. It holds prompts and answers as token ids, so
only its user may read it. When it has grown, it is written anew with what is still wanted, and replaced in one move.
Knows no engine. Read next: `keeper.py`.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from nanovllm.engine.detokenizer import IncrementalDetokenizer
from nanovllm.engine.messages import Origin
from nanovllm.errors import ConfigError
from nanovllm.log import degraded, logger
from nanovllm.outputs import CompletionOutput, GenerationOutput, RequestMetrics
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer

VERSION = 1
FRAME = struct.Struct(">II")  # bytes of the record, their CRC-32
LOCK_SECONDS = 5.0  # to wait for a predecessor that is dying
MIN_REWRITE_BYTES = 4 << 20
FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class Header(msgspec.Struct, tag="nanovllm journal", array_like=True):
    version: int
    model: dict[str, Any]  # what must be the same for the same tokens


class Completion(msgspec.Struct, array_like=True):
    token_ids: list[int] = []
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Entry(msgspec.Struct, tag="request", array_like=True):
    """A request, and what is known of its answer. A later one with the same handle replaces it."""

    handle: int  # of completion 0, in this file; that of completion i is `handle + i`
    request_id: str  # in the engine that accepted it
    token_ids: list[int]  # the prompt
    params: SamplingParams  # with the seed that was drawn; bad words are below
    bad_words: list[list[int]]
    priority: int
    cache_salt: str
    pooling: str | None
    max_num_tokens: int  # prompt and output together
    arrived: float  # seconds since 1970, as the other times
    completions: list[Completion]
    origin: Origin = Origin()
    is_restored: bool = False  # nobody waits for its answer any more, so it is kept
    num_attempts: int = 0  # restorations since its last new token
    ended: float | None = None
    error: str | None = None  # why there is no answer

    @property
    def is_complete(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    @property
    def lost(self) -> list[str]:
        """What was asked for and does not survive: it is not in the journal."""
        return [name for name in ("logprobs", "prompt_logprobs") if getattr(self.params, name) is not None]

    def without_tokens(self) -> Entry:
        """What a list of many needs."""
        return msgspec.structs.replace(self, token_ids=[], completions=[])

    def output(self, tokenizer: Tokenizer) -> GenerationOutput:
        """The answer so far, as a user gets it; without log-probabilities."""
        completions = [self._completion(tokenizer, index) for index in range(len(self.completions))]
        metrics = RequestMetrics(self.arrived, num_prompt_tokens=len(self.token_ids))
        metrics.num_generated_tokens = sum(len(completion.token_ids) for completion in completions)
        has_ended = self.ended is not None
        return GenerationOutput(self.request_id, None, self.token_ids, completions, metrics, finished=has_ended)

    def _completion(self, tokenizer: Tokenizer, index: int) -> CompletionOutput:
        """A front end ends a completion at its stop string, and tells the engine to abort it: here it is found again."""
        completion = self.completions[index]
        detokenizer = IncrementalDetokenizer(tokenizer, self.params)
        text = detokenizer.append(completion.token_ids)
        reason, stop_reason = completion.finish_reason, completion.stop_reason
        if reason is not None:
            text += detokenizer.finish()
        if reason is not None and detokenizer.stop_string is not None:
            reason, stop_reason = "stop", detokenizer.stop_string
        return CompletionOutput(index, text, completion.token_ids[: detokenizer.num_tokens], reason, stop_reason)


class Tokens(msgspec.Struct, tag="tokens", array_like=True):
    """What a step drew: token i belongs to completion `handles[i]`."""

    handles: list[int]
    token_ids: list[int]


class Ended(msgspec.Struct, tag="ended", array_like=True):
    handle: int  # of the completion
    finish_reason: str
    stop_reason: int | str | None
    time: float


Record = Header | Entry | Tokens | Ended
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Record).decode


class Journal:
    """One file, held by one process. Raises `ConfigError` when it cannot be used."""

    def __init__(self, path: str, model: dict[str, Any]) -> None:
        self.path = path
        self._header = Header(VERSION, model)
        self._fd: int | None = _open_and_lock(path)
        self._size = os.fstat(self._fd).st_size
        self._rewrite_size = MIN_REWRITE_BYTES

    def load(self) -> tuple[list[Entry], float]:
        """(its requests in the order of their arrival, when it was last written)."""
        if self._fd is None:
            raise ConfigError(f"checkpoint={self.path!r} is closed")
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            content = file.read()
        records = _records(content, self.path)
        self._check(next(records, None) if content else self._header)
        return replay(records), os.fstat(self._fd).st_mtime

    def _check(self, header: Record | None) -> None:
        if not isinstance(header, Header):
            raise ConfigError(f"checkpoint={self.path!r} is not a journal of nanovllm; it is left as it is")
        if header.version != VERSION:
            raise ConfigError(f"checkpoint={self.path!r} is of version {header.version}; this is {VERSION}")
        names = [
            name for name in {**header.model, **self._header.model} if header.model.get(name) != self._header.model.get(name)
        ]
        if names:
            there, here = ({name: header.model.get(name) for name in names} for header in (header, self._header))
            raise ConfigError(
                f"checkpoint={self.path!r} is the journal of another model: it has {_listed(there)}, this engine has "
                f"{_listed(here)}. Start with the same model and options, or name another file"
            )

    @property
    def is_large(self) -> bool:
        return self._size > self._rewrite_size

    def write(self, records: Iterable[Record]) -> None:
        """A failure (a full disk) is logged, and ends the journal, not the engine."""
        if self._fd is not None:
            data = b"".join(map(_framed, records))
            try:
                _write_all(self._fd, data)
                self._size += len(data)
            except OSError as error:
                self._fail(error)

    def rewrite(self, entries: Iterable[Entry]) -> None:
        """Only these are wanted from now on."""
        if self._fd is None:
            return
        path = f"{self.path}.new"
        try:
            fd = os.open(path, FLAGS | os.O_TRUNC, 0o600)
            os.fchmod(fd, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = b"".join(map(_framed, (self._header, *entries)))
            _write_all(fd, data)
            os.replace(path, self.path)
        except OSError as error:
            self._fail(error)
            return
        os.close(self._fd)
        self._fd, self._size, self._rewrite_size = fd, len(data), max(MIN_REWRITE_BYTES, 2 * len(data))

    def _fail(self, error: OSError) -> None:
        degraded("checkpoint", "%s ends here, requests do not survive a crash any more: %s", self.path, error)
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def replay(records: Iterable[Record]) -> list[Entry]:
    """The state that the records lead to."""
    entries: dict[int, Entry] = {}
    owners: dict[int, tuple[Entry, Completion]] = {}  # by the completion's handle
    for record in records:
        if isinstance(record, Entry):
            entries[record.handle] = record
            owners.update((record.handle + index, (record, one)) for index, one in enumerate(record.completions))
        elif isinstance(record, Tokens):
            for handle, token_id in zip(record.handles, record.token_ids):
                if (owner := owners.get(handle)) is not None:
                    owner[1].token_ids.append(token_id)
                    owner[0].num_attempts = 0
        elif isinstance(record, Ended) and (owner := owners.get(record.handle)) is not None:
            entry, completion = owner
            completion.finish_reason, completion.stop_reason = record.finish_reason, record.stop_reason
            entry.ended = record.time if entry.is_complete else None
    return list(entries.values())


def _records(content: bytes, path: str) -> Iterator[Record]:
    """Up to the end, or to the first that is not whole. One that this version cannot read is left out."""
    place = 0
    while place < len(content):
        frame = content[place : place + FRAME.size]
        length, checksum = FRAME.unpack(frame) if len(frame) == FRAME.size else (0, 0)
        payload = content[place + FRAME.size : place + FRAME.size + length]
        if not payload or len(payload) < length or zlib.crc32(payload) != checksum:
            lost = len(content) - place
            logger.warning("checkpoint %s: its last %d bytes are torn or damaged, and are left out", path, lost)
            return
        place += FRAME.size + length
        try:
            record = decode(payload)
        except msgspec.MsgspecError as error:
            logger.warning("checkpoint %s: a record is left out: %s", path, error)
        else:
            yield record


def _framed(record: Record) -> bytes:
    payload = encode(record)
    return FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _open_and_lock(path: str) -> int:
    end = time.monotonic() + LOCK_SECONDS
    while True:
        fd = -1
        try:
            fd = os.open(path, FLAGS, 0o600)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(0, "not a regular file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):  # else its owner has just replaced it
                os.fchmod(fd, 0o600)
                return fd
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(fd)
                raise ConfigError(f"checkpoint={path!r} is in use by another process") from None
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise ConfigError(f"checkpoint={path!r} cannot be used: {error.strerror}") from error
        os.close(fd)
        time.sleep(0.02)


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in facts.items())
