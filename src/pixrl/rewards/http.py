"""One HTTP request to a service, and the wait for a service that is gone.

A request ends within its time limit, however slowly the service sends its head or its body; only the system's look-up
of a host's name has a limit of its own. Redirects are not followed. The key that the service was given is taken out of
whatever it sends, and what is shown of it is one line of printable characters.

What goes wrong is of four kinds, and each has its own end:

* the service is gone or busy (refused, reset; 429, 502, 503, 504): wait with growing pauses, then ServiceError;
* it does not let us in (401, 403, a certificate that does not hold): ServiceError at once, waiting does not help;
* it failed (500), or was too slow: that may lie with the pictures, so a few tries, then their scores fail;
* everything else it says is an answer, which the caller judges.
"""

import ipaddress
import logging
import os
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from pixrl.errors import ConfigError, ServiceError
from pixrl.untrusted import LEAST_SECRET, Secret, plain

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds between two tries: the first pause, and the longest to which it grows."""
START_WAIT = 30.0
"""Seconds to wait for a service before a run begins: its address may be mistyped."""
LONGEST_WAIT = 86400.0
"""Seconds that one answer may take at most: a day."""
MOST_BYTES = 32 * 2**20
"""The largest answer that is read."""
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
    def reason(self) -> str:
        """Its status and the beginning of its text, for people."""
        return f"HTTP {self.status}: {self.text}"

    @property
    def text(self) -> str:
        """The beginning of its text, for people."""
        return plain(self.body[:640].decode(errors="replace"), 160)


@dataclass(frozen=True)
class Silence:
    """Why there is no reply."""

    reason: str
    slow: bool = False
    """It took the connection and gave no answer in time."""
    hopeless: bool = False
    """Waiting does not help."""

    @classmethod
    def of(cls, error: Exception, time_limit: float) -> "Silence":
        """Say why a request failed, by the first cause of its error; `time_limit` in seconds."""
        causes: list[BaseException] = [error]
        while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(before.exceptions[0] if isinstance(before, BaseExceptionGroup) else before)
        first = causes[-1]
        if any(isinstance(cause, TimeoutError) for cause in causes):
            return cls(f"no answer within {time_limit:g} s", slow=True)
        if isinstance(first, ssl.SSLCertVerificationError):
            return cls(str(first), hopeless=True)
        if isinstance(first, ConnectionError) and first.errno is not None:  # asyncio has a text of its own
            return cls(f"[Errno {first.errno}] {os.strerror(first.errno)}")
        return cls(str(first) if isinstance(first, OSError) else f"{type(first).__name__}: {first}")


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
        # what comes is counted as it comes, so it must not unfold; one request a connection
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._secret = Secret(key or "")
        self._tls = ssl.create_default_context()

    def ask(self, path: str, body: bytes | None, time_limit: float) -> Reply | Silence:
        """One request: GET without a body, POST of JSON with one. The key is nowhere in what it gives."""
        with start_blocking_portal() as portal:  # a thread of its own: a notebook's has an event loop already
            found = portal.call(self._ask, path, body, time_limit)
        if isinstance(found, Silence):
            return replace(found, reason=plain(self._secret.without_in(found.reason)))
        return replace(found, body=self._secret.without(found.body))

    async def _ask(self, path: str, body: bytes | None, time_limit: float) -> Reply | Silence:
        kind = {} if body is None else {"Content-Type": "application/json"}
        method = "GET" if body is None else "POST"
        request = httpx2.Request(method, f"{self.url}{path}", headers={**self._headers, **kind}, content=body)
        try:  # the transport alone: a client would read redirects, and the environment in a way of its own
            parts, proxy = urlsplit(self.url), None
            if not is_loopback(parts.hostname or "") and not urllib.request.proxy_bypass(parts.netloc):
                proxy = urllib.request.getproxies().get(parts.scheme) or None
            if proxy and "://" not in proxy:
                proxy = f"http://{proxy}"
            transport = httpx2.AsyncHTTPTransport(verify=self._tls, proxy=proxy)
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            return Silence(f"the proxy that the environment names is of no use: {error}", hopeless=True)
        said = bytearray()
        try:
            with anyio.fail_after(time_limit):
                async with transport:
                    response = await transport.handle_async_request(request)
                    async for part in response.aiter_raw():
                        said += part
                        if len(said) > MOST_BYTES:
                            return Silence(f"an answer of more than {MOST_BYTES} bytes")
                    after = seconds_of(response.headers.get("Retry-After"))
                    return Reply(response.status_code, bytes(said), after)
        except (TimeoutError, httpx2.HTTPError) as error:
            return Silence.of(error, time_limit)


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

    def ask(self, service: Service, path: str, body: bytes | None, time_limit: float) -> Reply | Silence:
        """The first reply that means something to a request, or what the last of some failed tries gave.

        Raises:
            ServiceError: the service stayed away for `seconds`, or does not let us in.
        """
        since: float | None = None
        failed = 0
        for pause in pauses():
            found = service.ask(path, body, time_limit)
            where = f"{service.name} at {service.url}"
            if isinstance(found, Silence) and found.hopeless:
                raise ServiceError(f"{where}: {found.reason}. {self.advice}")
            if isinstance(found, Reply) and found.status in LOCKED:
                hint = (
                    "It wants a key: name the environment variable that holds it."
                    if service.key_env is None
                    else f"Is what the environment variable {service.key_env} holds its key?"
                )
                raise ServiceError(f"{where} does not let us in ({found.reason}). {hint}")
            if isinstance(found, Reply):
                gone, asked = found.status in GONE, found.retry_after or 0.0
            else:
                gone, asked = self.slow_is_gone or not found.slow, 0.0
            if gone:
                since = time.monotonic() if since is None else since
                pause = max(pause, min(asked, LONGEST_PAUSE))
                waited = time.monotonic() - since
                if waited >= self.seconds or self.stop.is_set():
                    raise ServiceError(
                        f"{where} stayed away for {waited:.3g} s ({found.reason}), longer than its option `patience` "
                        f"allows. {self.advice}"
                    )
                pause = min(pause, self.seconds - waited)  # the last try is at the very end
                said = "%s does not answer (%s): next try in %.3g s, giving up after %g s."
                _log.warning(said, service.name, found.reason, pause, self.seconds)
                self.stop.wait(pause)
                continue
            if since is not None:
                _log.warning("%s is back.", service.name)
                since = None
            failed += 1
            if failed >= self.tries or (isinstance(found, Reply) and found.status < 500):
                return found
            self.stop.wait(pause)
        raise AssertionError("pauses never end")


def pauses() -> Iterator[float]:
    """Seconds between tries: each twice the one before, up to the longest."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def checked_url(url: str, name: str) -> str:
    """The address without a slash at its end. ConfigError where it is none."""
    try:
        httpx2.URL(url)
        parts = urlsplit(url)
        good = url.isascii() and url.isprintable() and not set(url) & set(" ?#")
        good &= parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna"))
        good &= parts.port != 0  # reading it raises where it is no port at all
    except (ValueError, httpx2.InvalidURL):  # UnicodeError is one of the first
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
