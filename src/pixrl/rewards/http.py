"""One HTTP request, and waiting for a service that is gone. The standard library alone; redirects are not followed.

A request ends within its time limit, however slowly the service sends its head or its body; only the system's look-up
of a host's name has a limit of its own. What a service sends is nobody's word but its own: the key that it was given is
taken out of it at once, and what is shown of it is one line of printable characters.

What goes wrong is of four kinds, and each has its own end:

* the service is gone or busy (refused, reset; 429, 502, 503, 504): wait with growing pauses, then ServiceError;
* it does not let us in (401, 403, a certificate that does not hold): ServiceError at once, waiting does not help;
* it failed (500), or was too slow: that may lie with the pictures, so a few tries, then their scores fail;
* everything else it says is an answer, which the caller judges.
"""

import http.client
import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import partial
from typing import IO, Any
from urllib.parse import urlsplit

from pixrl.errors import ConfigError, ServiceError
from pixrl.untrusted import LEAST_SECRET, Secret, plain

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds."""
START_WAIT = 30.0
"""Seconds to wait for a service before a run begins: its address may be mistyped."""
LONGEST_WAIT = 86400.0
"""Seconds that one answer may take at most."""
MOST_BYTES = 32 * 2**20
"""Of an answer."""
GONE = frozenset({429, 502, 503, 504})
LOCKED = frozenset({401, 403})
_log = logging.getLogger("pixrl")


@dataclass(frozen=True)
class Reply:
    """What a service said."""

    status: int
    body: bytes
    retry_after: float | None = None
    """Seconds that it asks to wait."""

    @property
    def text(self) -> str:
        """The beginning of it, for people."""
        return plain(self.body[:640].decode(errors="replace"), 160)


@dataclass(frozen=True)
class Silence:
    """Why there is no reply."""

    reason: str
    slow: bool = False
    """It took the connection and gave no answer in time."""
    hopeless: bool = False
    """Waiting does not help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is for the address that it was given for; where a service would send us is not even read."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message
    ) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Deadline(AbstractContextManager["_Deadline"]):
    """A time limit of one request: at its end the connection is shut, wherever it stands.

    A socket's own limit is one of silence, which every byte begins anew.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self.passed = False

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def connect(
        self, address: tuple[str, int], timeout: object = None, source: tuple[str, int] | None = None
    ) -> socket.socket:
        """As `socket.create_connection`, within the limit over all of a host's addresses."""
        failed: OSError = OSError(f"{address[0]} has no address")
        for family, kind, protocol, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(max(self._end - time.monotonic(), 0.001))
            try:
                connection.connect(place)
            except OSError as error:
                connection.close()
                failed = error
                continue
            with self._lock:  # a second handle: TLS takes the first one over
                self._connection = connection.dup()
            if self.passed:
                self._shut()
            return connection
        raise failed

    def _shut(self) -> None:
        self.passed = True
        with self._lock, suppress(OSError):
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)


class Service:
    """An HTTP service under a base address.

    Args:
        url: of the service, http:// or https://.
        name: what errors call it.
        key_env: the environment variable that holds its key, sent as a bearer token; None: none is sent.

    Raises:
        ConfigError: the address is none, or the variable is not set.
    """

    def __init__(self, url: str, *, name: str, key_env: str | None) -> None:
        self.url = checked_url(url, name)
        self.name = name
        self.key_env = key_env
        key = key_from(os.environ, key_env, name)
        if key is not None and len(key) >= LEAST_SECRET and key in self.url:
            raise ConfigError(f"{name}: its address holds the key itself. Leave it out: {key_env} is enough.")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._secret = Secret(key or "")
        # a proxy that the environment names is not for this machine itself
        self._proxies: dict[str, str] | None = {} if is_loopback(urlsplit(self.url).hostname or "") else None

    def ask(self, path: str, body: bytes | None, time_limit: float) -> Reply | Silence:
        """One request: GET without a body, POST of JSON with one. The key is nowhere in what it gives."""
        with _Deadline(time_limit) as deadline:
            found = self._ask(path, body, time_limit, deadline)
        if deadline.passed:
            return _too_slow(time_limit)
        if isinstance(found, Silence):
            return replace(found, reason=plain(self._secret.without_in(found.reason)))
        return replace(found, body=self._secret.without(found.body))

    def _ask(self, path: str, body: bytes | None, time_limit: float, deadline: _Deadline) -> Reply | Silence:
        headers = {"Accept": "application/json", **self._headers}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(f"{self.url}{path}", data=body, headers=headers)
        opener = urllib.request.build_opener(
            _NoRedirect, urllib.request.ProxyHandler(self._proxies), _Plain(deadline), _Encrypted(deadline)
        )
        try:
            try:
                with opener.open(request, timeout=time_limit) as response:
                    return _read(response)
            except urllib.error.HTTPError as error:
                with error:
                    return _read(error)
        except TimeoutError:
            return _too_slow(time_limit)
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                return _too_slow(time_limit)
            certificate = isinstance(error.reason, ssl.SSLCertVerificationError)
            return Silence(str(error.reason), hopeless=certificate)
        except (OSError, http.client.HTTPException) as error:
            return Silence(f"{type(error).__name__}: {error}")


class _Plain(urllib.request.HTTPHandler):
    """http:// within a deadline."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_watched, http.client.HTTPConnection, self._deadline), req)


class _Encrypted(urllib.request.HTTPSHandler):
    """https:// within a deadline."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_watched, http.client.HTTPSConnection, self._deadline), req)


def _watched(
    kind: type[http.client.HTTPConnection], deadline: _Deadline, host: str, **options: Any
) -> http.client.HTTPConnection:
    """A connection that a deadline ends, a proxy's greeting and the handshake of TLS included."""
    connection = kind(host, **options)
    vars(connection)["_create_connection"] = deadline.connect  # the one place where it makes its socket
    return connection


def _too_slow(time_limit: float) -> Silence:
    return Silence(f"no answer within {time_limit:g} s", slow=True)


def _read(response: "http.client.HTTPResponse | urllib.error.HTTPError") -> Reply:
    """The whole answer, in whatever drops it comes."""
    parts, size = [], 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise http.client.HTTPException(f"an answer of more than {MOST_BYTES} bytes")
    expected = _whole_number(response.headers.get("Content-Length"))
    if expected is not None and size < expected:
        raise http.client.IncompleteRead(b"".join(parts), expected - size)
    return Reply(response.status or 0, b"".join(parts), seconds_of(response.headers.get("Retry-After")))


def _whole_number(text: str | None) -> int | None:
    """What a header says; None where it is no number that a length could be."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,15}", text.strip()) else None


def seconds_of(text: str | None) -> float | None:
    """Retry-After, a number of seconds or a date, as seconds from now; None where it is neither or lies in the past."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", text.strip()):
        return float(text)
    try:
        moment = parsedate_to_datetime(text[:64])
        left = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime.now(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return left.total_seconds() if left.total_seconds() >= 0 else None


@dataclass
class Patience:
    """How long a service that is gone is waited for, and how often one that fails is tried.

    One a request, or one for many at once: `stop` ends all their pauses.
    """

    seconds: float
    """After this long without a service, ServiceError."""
    tries: int
    """Of a request that fails or is too slow."""
    slow_is_gone: bool
    """Whether no answer in time means that the service is gone, not that it is busy with these pictures."""
    advice: str
    """What to do when it stays away."""
    stop: threading.Event

    def ask(self, service: Service, once: Callable[[], Reply | Silence]) -> Reply | Silence:
        """The first reply that means something, or what the last of some failed tries gave.

        Raises:
            ServiceError: the service stayed away for `seconds`, or does not let us in.
        """
        since: float | None = None
        failed = 0
        for pause in pauses():
            found = once()
            if isinstance(found, Silence) and found.hopeless:
                raise ServiceError(f"{service.name} at {service.url}: {found.reason}. {self.advice}")
            if isinstance(found, Reply) and found.status in LOCKED:
                raise ServiceError(
                    f"{service.name} at {service.url} does not let us in (HTTP {found.status}: {found.text}). "
                    f"{_key_hint(service.key_env)}"
                )
            if self._gone(found):
                since = time.monotonic() if since is None else since
                pause = max(pause, _asked_pause(found))
                self._wait(service, found, pause, time.monotonic() - since)
                continue
            if since is not None:
                _log.warning("%s is back.", service.name)
                since = None
            failed += 1
            if not _failed(found) or failed >= self.tries:
                return found
            self.stop.wait(pause)
        raise AssertionError("pauses never end")

    def _gone(self, found: Reply | Silence) -> bool:
        if isinstance(found, Silence):
            return self.slow_is_gone or not found.slow
        return found.status in GONE

    def _wait(self, service: Service, found: Reply | Silence, pause: float, waited: float) -> None:
        reason = found.reason if isinstance(found, Silence) else f"HTTP {found.status}: {found.text}"
        if waited >= self.seconds or self.stop.is_set():
            raise ServiceError(
                f"{service.name} at {service.url} stayed away for {waited:.3g} s ({reason}), longer than its option "
                f"`patience` allows. {self.advice}"
            )
        pause = min(pause, self.seconds - waited)  # the last try is at the very end
        _log.warning(
            "%s does not answer (%s): next try in %.3g s, giving up after %g s.",
            service.name,
            reason,
            pause,
            self.seconds,
        )
        self.stop.wait(pause)


def _key_hint(variable: str | None) -> str:
    if variable is None:
        return "It wants a key: name the environment variable that holds it."
    return f"Is what the environment variable {variable} holds its key?"


def _failed(found: Reply | Silence) -> bool:
    return isinstance(found, Silence) or found.status >= 500


def _asked_pause(found: Reply | Silence) -> float:
    return min(found.retry_after or 0.0, LONGEST_PAUSE) if isinstance(found, Reply) else 0.0


def pauses() -> Iterator[float]:
    """Seconds between tries: each twice the one before, up to the longest."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def checked_url(url: str, name: str) -> str:
    """The address without a slash at its end. ConfigError where it is none."""
    try:
        parts = urlsplit(url)
        good = url.isascii() and url.isprintable() and not set(url) & set(" ?#")
        good &= parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna"))
        good &= parts.port != 0  # reading it raises where it is no port at all
    except ValueError:  # UnicodeError is one
        good = False
    if not good:
        raise ConfigError(
            f"{name}: {_shown(url)} is no address of a service. Type, for example: http://127.0.0.1:8765"
        )
    if parts.username is not None:
        raise ConfigError(
            f"{name}: leave name and password out of the address; keys come from the environment."
        )
    return url.rstrip("/")


def _shown(url: str) -> str:
    """What may be said of an address: not what may be a password or a key."""
    return plain(repr(re.sub(r"//[^/]*@", "//...@", re.split("[?#]", url)[0])))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, and reached by nobody else."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_from(environment: Mapping[str, str], variable: str | None, name: str) -> str | None:
    """The secret in an environment variable; None where no variable is named. ConfigError where it is not set."""
    if variable is None:
        return None
    key = environment.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"{name}: the environment variable {variable} is not set. Type: export {variable}=..."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{name}: {variable} holds characters that no key has. Set it again.")
    return key
