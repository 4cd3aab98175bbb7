"""Who may call: API keys, and the ASGI layer that asks for them before anything else happens.

Deny by default. The decision looks at the raw path of the request line, never at a URL that is rebuilt from headers, and
only a path that is spelled exactly like an open one is open. Keys are compared by their SHA-256 in constant time, against
all keys. Admin routes want a key of their own; without one they are closed. Knows nothing of what routes do.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError
from nanovllm.log import logger
from nanovllm.server.errors import HttpError
from nanovllm.server.options import ServerOptions

OPEN_PATHS = frozenset({"/health", "/ready"})
MAX_KEY_LENGTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One caller. `priority`: smaller is more urgent. Limits of None do not limit."""

    name: str
    digest: bytes  # SHA-256 of the key
    priority: int = 0
    max_concurrent: int | None = None  # completions at once
    tokens_per_minute: int | None = None  # of prompt and output together
    is_admin: bool = False

    @property
    def salt(self) -> str:
        """Separates this key's prefix cache from that of others."""
        return self.digest.hex()[:32]


ANONYMOUS = Key(name="anonymous", digest=b"")  # who calls a server without keys


class Keyring:
    """All keys of a server."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self.keys = list(keys)
        names = [key.name for key in self.keys]
        if len(set(names)) < len(names) or len({key.digest for key in self.keys}) < len(names):
            raise ConfigError("two API keys have the same name or the same value")
        self.has_user_keys = any(not key.is_admin for key in self.keys)

    @classmethod
    def load(cls, options: ServerOptions, environment: Mapping[str, str] = os.environ) -> Keyring:
        """Keys of NANOVLLM_API_KEYS and NANOVLLM_ADMIN_KEYS (comma-separated) and of `api_key_file`."""
        keys = [*_from_environment(environment, "NANOVLLM_API_KEYS", is_admin=False)]
        keys += _from_environment(environment, "NANOVLLM_ADMIN_KEYS", is_admin=True)
        if options.api_key_file is not None:
            keys += _from_file(Path(options.api_key_file))
        ring = cls(keys)
        if environment.get("NANOVLLM_API_KEY") and not ring.has_user_keys:
            logger.warning(
                "NANOVLLM_API_KEY is the key of a client; a server's keys are in NANOVLLM_API_KEYS, and this one has none"
            )
        if not options.is_loopback and not ring.has_user_keys and not options.insecure:
            raise ConfigError(
                f"host={options.host!r} is reachable from other machines, and there are no API keys: set NANOVLLM_API_KEYS "
                "or --api-key-file, or say --insecure"
            )
        return ring

    def find(self, secret: bytes) -> Key | None:
        """The key with this value. Takes the same time wherever, and whether, it is found."""
        digest = hashlib.sha256(secret).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def _from_environment(environment: Mapping[str, str], name: str, is_admin: bool) -> list[Key]:
    secrets = [secret.strip() for secret in environment.get(name, "").split(",") if secret.strip()]
    label = "admin" if is_admin else "key"
    return [Key(name=f"{label}-{i}", digest=_digest(secret, name), is_admin=is_admin) for i, secret in enumerate(secrets)]


def _digest(secret: str, where: str) -> bytes:
    if not 8 <= len(secret) <= MAX_KEY_LENGTH or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(f"{where}: an API key has 8 to {MAX_KEY_LENGTH} printable ASCII characters without spaces")
    return hashlib.sha256(secret.encode()).digest()


def _from_file(path: Path) -> list[Key]:
    """A list of keys (JSON), or `[[keys]]` tables (TOML); `Key` says what the fields mean."""
    try:
        text = path.read_text(encoding="utf-8")
        entries = _parse_toml(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file {str(path)!r} cannot be read: {error}") from error
    if isinstance(entries, dict):
        entries = entries.get("keys")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"api_key_file {str(path)!r} must hold a list of keys")
    if not entries:
        raise ConfigError(f"api_key_file {str(path)!r} holds no keys: the server would be open to whoever reaches it")
    if stat.S_IMODE(path.stat().st_mode) & 0o077 and any("key" in entry for entry in entries):
        logger.warning("api_key_file %s holds plain keys and can be read by others; chmod 600, or give sha256 instead", path)
    return [_key_of(entry, f"api_key_file, entry {index}") for index, entry in enumerate(entries)]


def _parse_toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        raise ConfigError("an api_key_file in TOML needs Python 3.11; write it in JSON")
    import tomllib

    return tomllib.loads(text)


def _key_of(entry: dict[str, Any], where: str) -> Key:
    known = {"name", "key", "sha256", "priority", "max_concurrent", "tokens_per_minute", "admin"}
    if set(entry) - known:
        raise ConfigError(f"{where}: unknown field {sorted(set(entry) - known)[0]!r}; known are {', '.join(sorted(known))}")
    if not isinstance(entry.get("name"), str) or ("key" in entry) == ("sha256" in entry):
        raise ConfigError(f"{where}: needs a name, and either key or sha256")
    for name, low in (("priority", -1000), ("max_concurrent", 1), ("tokens_per_minute", 1)):
        value = entry.get(name, low)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (name == "priority" and value > 1000):
            raise ConfigError(f"{where}: {name}={value!r} must be a whole number of at least {low}")
    try:
        digest = _digest(str(entry["key"]), where) if "key" in entry else bytes.fromhex(entry["sha256"])
    except ConfigError:  # says where
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if len(digest) != 32:
        raise ConfigError(f"{where}: sha256 must have 64 hexadecimal digits")
    if not isinstance(entry.get("admin", False), bool):
        raise ConfigError(f"{where}: admin must be true or false")
    limits = {name: entry.get(name) for name in ("max_concurrent", "tokens_per_minute")}
    return Key(name=entry["name"], digest=digest, priority=entry.get("priority", 0), is_admin=entry.get("admin", False), **limits)


class Authentication:
    """Raw ASGI: finds the key of a request, or refuses it. The key ends up in `scope["state"]["key"]`."""

    def __init__(self, app: Any, keyring: Keyring, options: ServerOptions, open_paths: Iterable[str] = ()) -> None:
        """`open_paths`: of static files, which tell nothing; open to GET without a key."""
        self.app, self.keyring = app, keyring
        self._open_paths = frozenset(open_paths)
        self._guards_browsers = not keyring.has_user_keys and not options.insecure and options.uds is None
        self._hosts = {"localhost", "127.0.0.1", "[::1]", options.host}
        self._origins = set(options.origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["state"]["key"] = self.key_for(scope)
        await self.app(scope, receive, send)

    def key_for(self, scope: Any) -> Key:
        """Raises 401 or 403."""
        path = scope["path"]
        is_plain = scope.get("raw_path", b"").partition(b"?")[0] == path.encode("utf-8", "surrogateescape")
        if is_plain and (path in OPEN_PATHS or (path in self._open_paths and scope["method"] in ("GET", "HEAD"))):
            return ANONYMOUS
        is_admin_path = path == "/admin" or path.startswith("/admin/")
        if not self.keyring.has_user_keys and not is_admin_path:
            if self._guards_browsers:
                self._refuse_foreign_pages(scope["headers"])
            return ANONYMOUS
        key = self._find(scope["headers"])
        if is_admin_path and not key.is_admin:
            raise HttpError(403, "admin routes need an admin key", code="admin_key_required")
        return key

    def _find(self, headers: Sequence[tuple[bytes, bytes]]) -> Key:
        given = [value for name, value in headers if name in (b"authorization", b"x-api-key")]
        secrets = {_secret_of(name, value) for name, value in headers if name in (b"authorization", b"x-api-key")}
        if not given:
            raise _unauthorized("an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY", "missing_api_key")
        key = self.keyring.find(secrets.pop()) if len(secrets) == 1 else None
        if key is None:
            raise _unauthorized("the API key is not known", "invalid_api_key")
        return key

    def _refuse_foreign_pages(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Without keys, what keeps web pages out of a local server is its name: the page's host is not ours.

        `Host` is that of the address bar even when its DNS entry was pointed at loopback; `Origin` comes with every
        cross-site POST. Both are only ever used to refuse.
        """
        fields = dict(headers)
        host = fields.get(b"host", b"localhost").decode("latin-1")
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in self._hosts:
            raise HttpError(403, "without API keys only requests to this machine's own name are answered", code="foreign_host")
        origin = fields.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in {f"http://{host}", f"https://{host}", *self._origins}:
            raise HttpError(403, "without API keys pages of other origins are refused; see --cors-origins", code="foreign_origin")


def _secret_of(name: bytes, value: bytes) -> bytes:
    if name == b"x-api-key":
        return value.strip()
    scheme, _, secret = value.strip().partition(b" ")
    return secret.strip() if scheme.lower() == b"bearer" else b""


def _unauthorized(message: str, code: str) -> HttpError:
    return HttpError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
