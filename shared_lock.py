"""shared-lock lends distributed locks over HTTP and keeps them in etcd. This file is all of it.

    $ curl -i localhost:8080/lease -H 'x-lease-ttl: 60s' -d '{"key": "nightly"}'
    HTTP/1.1 201 Created                   # it is yours for 60 s; 202: somebody else holds it
    x-fencing-token: 4711                  # larger for each next holder
    5903817394023957                       # your lease
    $ curl localhost:8080/keepalive -d 5903817394023957    # 200: 60 s from now; 204: it is lost

What a holder may rely on: etcd never has two holders of one key, and the lock lives at least as
long as its ttl, counted from the moment the holder *sent* the request that was answered 201 or
200. What nobody may rely on: that a holder whose lease ran out has stopped. It may be paused and
wake up later. Only the protected resource can stop it, by refusing a fencing token smaller than
one it has seen.

One lock is one etcd lease and one key put with it, `/shared-lock/` + key. There is no other
state, so any number of replicas may serve one etcd. The rooms of this file in their order, which
is also the way of a request:

    log, words, configuration    what all others use; every variable is a field of Config
    wire                         HTTP/1.1 messages over one socket
    messages                     bytes become a Request, a Response becomes bytes
    connections, server          who is served, and for how long; HTTP stops at the API
    API                          what a Request asks for: a LockRequest, a lease ID, a key
    service                      what a lock means: acquire, renew, release, wait in line
    storage                      the promise that the next three keep
    cache, memory, etcd          what is known to be held, the specification, a real network
    combiner                     while one call to etcd is under way, later callers share the next
    gateway                      etcd's JSON gateway in our words; base64 stops here
    member, cluster, session     one question to one member; which members there are, and whose
                                 they are; how long a try may take, and whether it is believed
    metrics, profiles, life      what operators see; start and stop
"""

from __future__ import annotations

import argparse
import binascii
import bisect
import collections
import copy
import enum
import errno
import functools
import http
import http.server
import itertools
import json
import os
import queue
import random
import re
import resource
import secrets
import select
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import traceback
import types
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import ceil, inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

if sys.version_info < (3, 11):  # noqa: UP036  else the first class below fails without a word
    sys.exit(f"shared-lock: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")

VERSION = "1.1.0"
KEY_PREFIX = "/shared-lock/"  # before every key of ours in etcd
INT64 = range(-(1 << 63), 1 << 63)
Clock = Callable[[], float]  # seconds, as time.monotonic
Item = TypeVar("Item")
Answer = TypeVar("Answer")

# == Log =========================================================================================
# One event is one line on stderr: whole, or not at all. A reader that is slow or gone never
# delays a lock.

DEBUG = "debug"
INFO = "info"
WARNING = "warning"
ERROR = "error"
LINE_BYTES = 4095  # with its line feed what a pipe takes at once, or not at all (PIPE_BUF)
TALLY_SECONDS = 60  # between two lines about what a stranger can do as often as it likes
_PLAIN = re.compile(r"[\w.:/@,+\[\]-]+")  # a value that needs no quotes


class Log:
    """Writes the events of the daemon to stderr."""

    def __init__(self) -> None:
        self.debug = False  # whether events of that level are written
        self.dropped = 0  # lines that nobody read in time, since the start
        self._told = 0  # of them, those that a later line has told
        self._tallies: dict[str, dict[str, Any]] = {}  # by event, what to show of those not told
        self._mutex = threading.Lock()  # owns all above, and the room that poll saw in the pipe
        self._due: dict[str, float] = {}  # when each may be told again: the main loop's
        self._poll = select.poll()  # select.select() takes 72 KiB of each thread's stack, for good
        self._poll.register(2, select.POLLOUT)

    def event(self, level: str, name: str, **shown: object) -> None:
        """Writes `time=2026-11-23T03:21:00.000Z level=info event=granted key=nightly …`."""
        if level == DEBUG and not self.debug:
            return
        now = time.time()  # the logging module takes 5 µs longer for a line
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        first = {"time": f"{stamp}.{int(now % 1 * 1000):03}Z", "level": level, "event": name}
        with self._mutex:
            if self.dropped > self._told:
                shown["lines_lost"] = self.dropped - self._told
            line = format_line(first | shown)
            with suppress(OSError):  # nobody will ever read it
                if self._poll.poll(0):
                    os.write(2, line + b"\n")
                    self._told = self.dropped
                    return
            self.dropped += 1

    def tally(self, level: str, name: str, **shown: object) -> None:
        """Notes what strangers can do as often as they like: a line a minute tells how often."""
        with self._mutex:
            noted = self._tallies.get(name, {"times": 0})
            self._tallies[name] = {"level": level, **shown, "times": noted["times"] + 1}

    def tell_tallies(self) -> None:
        """Writes what was noted and is due; the main loop calls it now and then."""
        now = monotonic()
        for name in list(self._tallies):
            if now >= self._due.get(name, now):
                self._due[name] = now + TALLY_SECONDS
                with self._mutex:
                    told = self._tallies.pop(name)
                self.event(name=name, **told)


def format_line(shown: Mapping[str, object]) -> bytes:
    """The values as key=value in UTF-8; the longest are cut until the line has LINE_BYTES."""
    line = b""
    for limit in (1000, 500, 250, 120, 60, 30, 10):  # characters of one value
        parts = []
        for name, value in shown.items():
            text = str(value)
            is_plain = len(text) <= limit and _PLAIN.fullmatch(text)
            parts.append(f"{name}={text if is_plain else quote(text, limit)}")
        line = " ".join(parts).encode()
        if len(line) <= LINE_BYTES:
            break
    return line


def quote(value: object, limit: int = 120) -> str:
    """The value as a message shows it: quoted, cut, and on one line for every reader."""
    text = str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)


log = Log()
event = log.event


def log_defect(**shown: object) -> None:
    """The error that is being handled is our own: what it is, and the line where it came up."""
    _, fault, trace = sys.exc_info()
    frame = traceback.extract_tb(trace)[-1]
    at = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    event(ERROR, "internal error", error=repr(fault), at=at, **shown)


# == Words: errors and small data ================================================================
# Errors are split by who must act: the caller (HttpError), the operator at the start
# (ConfigError), nobody yet (NotApplied), or the caller with care (OutcomeUnknown). That a key is
# held, or a lease gone, is an answer and no error.


class HttpError(Exception):
    """The request has no better answer than this status and line of text."""

    def __init__(self, text: str, status: int = 400, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


class ConfigError(Exception):
    """An environment variable cannot be used; the text is one line that names it."""


class StorageError(Exception):
    """The storage failed."""

    sick = True  # the member that was asked is to be left for another

    def __init__(self, text: str, sick: bool | None = None, code: int = 0) -> None:
        super().__init__(text)
        self.code = code  # the gRPC status code, where etcd gave one
        if sick is not None:
            self.sick = sick


class NotApplied(StorageError):
    """Nothing was changed, and nothing will be."""


class Refused(NotApplied):
    """etcd understood and said no; any member would say the same."""

    sick = False


class AnswerTooLarge(Refused):
    """The answer has more bytes than its reader takes."""


class OutcomeUnknown(StorageError):
    """It may have been applied, or may yet be: to be repeated only where that does no harm."""


class LockRequest(NamedTuple):
    """What a caller asks for with POST /lease."""

    key: str
    value: str = ""
    ttl: int = 10  # seconds
    wait: float = 0  # seconds
    lease: int = 0  # the ID that the caller chose, or 0
    client: str = ""  # its address, for the log
    hung_up: Callable[[], bool] = lambda: False  # tells whether the caller has gone meanwhile


class Grant(NamedTuple):
    """A lock that was taken."""

    lease: int
    ttl: int  # as it was granted, in seconds
    token: int  # the fencing token


class Holder(NamedTuple):
    """Who holds a key."""

    lease: int  # 0: a key without one
    token: int  # the fencing token
    value: str = ""
    ttl: int | None = None  # the seconds that are left of it, where they were asked for
    granted_ttl: int | None = None


class Freed(enum.Enum):
    """What became of a key that an operator wanted to free."""

    NOTHING = "nothing"  # it was free
    OTHER_HOLDER = "other holder"  # than the one with this token
    FREED = "freed"
    LEASE_LIVES = "freed, lease lives on"  # it holds something of another tenant


class Address(NamedTuple):
    """A host and port, and whether TLS is spoken there."""

    host: str
    port: int
    tls: bool | None = None  # None: the endpoint names no scheme

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def url(self) -> str:
        """As it is written in a list of endpoints."""
        return f"{'https' if self.tls else 'http'}://{self}"


# What our own process lacks, descriptors, memory or ports, and nobody else is to blame for.
OWN_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
LONGEST_TIMEOUT = 10**6  # seconds; poll() counts its milliseconds in 31 bits


def deadline_after(timeout: float) -> float:
    """When a timeout that begins now ends (time.monotonic); 0 is none."""
    return monotonic() + timeout if timeout else inf


def seconds_until(deadline: float) -> float:
    """As a timeout; none is 0, which some calls take for no limit."""
    return min(max(0.001, deadline - monotonic()), LONGEST_TIMEOUT)


def reason(fault: BaseException) -> str:
    """One line about why a file, a name or a connection failed."""
    if isinstance(fault, ssl.SSLCertVerificationError):
        return f"TLS: its certificate is not accepted: {fault.verify_message}"
    if (
        isinstance(fault, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        or getattr(fault, "reason", None) == "WRONG_VERSION_NUMBER"
    ):
        return "TLS: it does not answer in TLS; is it http?"
    if isinstance(fault, ssl.SSLError):
        text = fault.reason or str(fault)
        return f"TLS: {text.lower().replace('_', ' ')}"
    told = getattr(fault, "strerror", None) or ""
    return told.lower() or str(fault) or type(fault).__name__


def keep_running(name: str, step: Callable[[], bool]) -> None:
    """Calls `step` in a thread of its own for as long as it returns True. A defect of ours is
    logged, and the thread goes on: the daemon needs it."""

    def run() -> None:
        while True:
            try:
                if not step():
                    return
            except Exception:
                log_defect(thread=name)
                sleep(1)  # second

    threading.Thread(target=run, name=name, daemon=True).start()


# == Configuration ===============================================================================

MAX_TTL_SECONDS = 9_000_000_000  # etcd's own limit
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_DURATION = re.compile(rf"([+-]?)((?:{_NUMBER}(?:ns|us|µs|μs|ms|s|m|h))+|{_NUMBER})")
_UNITS = {"ns": "1e-9", "us": "1e-6", "µs": "1e-6", "μs": "1e-6", "ms": "1e-3"}
_UNITS |= {"s": "1", "m": "60", "h": "3600"}
_ENDPOINT = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\s:/?#@\[\]]+))"
    r":(?P<port>[0-9]{1,5})/?"
)
# What Kubernetes adds for a Service named shared-lock…: …_SERVICE_HOST, …_PORT_8080_TCP_ADDR.
_OF_A_SERVICE = re.compile(
    r"[^=]+_(SERVICE_(HOST|PORT(_\w+)?)|PORT_[0-9]+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|[^=]+_PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)
Parser = Callable[[str], Any]  # what a text means; raises ValueError


def parse_duration(text: str) -> Fraction:
    """The exact seconds in a Go duration ("1m30s") or a bare number. Raises ValueError."""
    match = _DURATION.fullmatch(text) if len(text) <= 100 else None
    if not match:
        raise ValueError(f"not a duration: {quote(text)}")
    seconds = Fraction()
    for number, unit in re.findall(rf"({_NUMBER})([^0-9.]*)", match[2]):
        seconds += Fraction(number) * Fraction(_UNITS[unit or "s"])
    return -seconds if match[1] == "-" else seconds


def between(low: float, high: float, parse: Parser, unit: str = "") -> Parser:
    """A parser that refuses what is out of range, with a ValueError."""

    def parse_in_range(text: str) -> Any:
        value = parse(text)
        if low <= value <= high:
            return value
        raise ValueError(f"not from {low}{unit} to {high}{unit}: {quote(text)}")

    return parse_in_range


def duration(low: float, high: float, rounded: Callable[[Fraction], float] = float) -> Parser:
    """A parser of durations in this range of seconds."""
    return between(low, high, lambda text: rounded(parse_duration(text)), "s")


def matching(pattern: str, expected: str, convert: Parser) -> Parser:
    """A parser of what matches the pattern; the ValueError for the rest says what is expected."""

    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"not {expected}: {quote(text)}")
        return convert(text)

    return parse


whole = matching("-?[0-9]{1,19}", "a whole number", int)
boolean = matching(  # as Go's strconv.ParseBool
    "[1tT]|TRUE|[tT]rue|[0fF]|FALSE|[fF]alse",
    "a boolean, true or false",
    lambda text: text[0] in "1tT",
)
_timeout = duration(0, MAX_TTL_SECONDS)
_storage = matching("etcd|mock", "etcd or mock", str)


def endpoints(text: str) -> tuple[Address, ...]:
    """The addresses in a list of endpoints, separated by commas. Raises ValueError."""
    if "@" in text:  # and what stands before it is never shown
        raise ValueError(
            "no user and no password belong into it, "
            "but into SHARED_LOCK_ETCD_USERNAME and …_PASSWORD"
        )
    addresses = []
    for part in text.split(","):
        match = _ENDPOINT.fullmatch(part.strip())
        if not match or not 0 < int(match["port"]) < 65536:
            raise ValueError(f"not an endpoint, as in http://host:2379: {quote(part)}")
        tls = {"https": True, "http": False}.get(match["scheme"])
        addresses.append(Address(match["ipv6"] or match["host"], int(match["port"]), tls))
    return tuple(addresses)


def with_scheme(addresses: Iterable[Address], tls: bool) -> tuple[Address, ...]:
    """The same, where those without a scheme follow ETCD_TLS. Raises ConfigError."""
    for address in addresses:
        if tls and address.tls is False:
            text = "not https://, or without a scheme, as SHARED_LOCK_ETCD_TLS=true wants it"
            raise ConfigError(f"{variable('etcd_addr_list')}: {text}: {quote(address.url())}")
    return tuple(address._replace(tls=tls or address.tls is True) for address in addresses)


def variable(name: str) -> str:
    """The environment variable of this field of Config."""
    return "SHARED_LOCK_" + name.upper()


def setting(default: str, meaning: str, parse: Parser = str, needs: str = "") -> Any:
    """A field of Config: its default as the environment would give it, its --help, its parser,
    and which other setting must not be empty where this one is not."""
    shown = {"default": default, "parse": parse, "meaning": meaning, "needs": needs}
    return field(default=parse(default), metadata=shown)


@dataclass(frozen=True)
class Config:
    """All settings, each read from SHARED_LOCK_ + its name. Durations are in seconds."""

    server_port: int = setting(
        "8080", "port to listen on; 0 is a free one, see the log", between(0, 65535, whole)
    )
    server_host: str = setting("", "address to listen on; empty is every address")
    server_read_timeout: float = setting(
        "10s", "from a request's first byte to its last; 0 is none", _timeout
    )
    server_write_timeout: float = setting("10s", "to write an answer; 0 is none", _timeout)
    server_idle_timeout: float = setting(
        "120s", "an idle connection is closed after it; 0 is none", _timeout
    )
    server_shutdown_timeout: float = setting(
        "10s", "for requests in flight after SIGTERM; 0 is none", _timeout
    )
    server_token_path: str = setting("", "bearer tokens, one a line; callers must show one")
    server_cert_path: str = setting(
        "", "TLS on the own port, with this certificate", needs="server_key_path"
    )
    server_key_path: str = setting("", "the key of that certificate", needs="server_cert_path")
    server_client_ca_path: str = setting(
        "", "callers need a certificate that this CA signed", needs="server_cert_path"
    )
    max_ttl: int = setting(
        "9000000000s", "the longest ttl to grant", duration(1, MAX_TTL_SECONDS, ceil)
    )
    storage_type: str = setting("etcd", "etcd, or mock: in memory, lost at the end", _storage)
    etcd_addr_list: tuple[Address, ...] = setting(
        "http://localhost:2379", "endpoints, comma-separated", endpoints
    )
    etcd_timeout: float = setting(
        "5s", "one storage operation, all tries together", duration(0.001, MAX_TTL_SECONDS)
    )
    etcd_username: str = setting("", "for an etcd with auth enabled", needs="etcd_password")
    etcd_password: str = setting("", "the password of that user", needs="etcd_username")
    etcd_tls: bool = setting("false", "TLS to etcd, with the three files below", boolean)
    ca_cert_path: str = setting("/etc/etcd/ca.crt", "who signed etcd's certificate")
    client_cert_path: str = setting(
        "/etc/etcd/client.crt", "what this daemon shows to etcd", needs="client_key_path"
    )
    client_key_path: str = setting(
        "/etc/etcd/client.key", "the key of that certificate", needs="client_cert_path"
    )
    cache_enabled: bool = setting(
        "false", "answer 202 from memory for a second after a refusal", boolean
    )
    cache_size: int = setting(
        "1000", "keys to remember; the least recently used leave", between(1, 10**9, whole)
    )
    pprof_enabled: bool = setting("false", "serve /debug/pprof/", boolean)
    debug: bool = setting("false", "log every request", boolean)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """The settings in `env`, such as os.environ. Raises ConfigError for the first wrong one."""
        given: dict[str, Any] = {}
        for one in fields(cls):
            name = variable(one.name)
            try:
                given[one.name] = one.metadata["parse"](env.get(name, one.metadata["default"]))
            except ValueError as fault:
                raise ConfigError(f"{name}: {fault}") from fault
        for one in fields(cls):
            needed = one.metadata["needs"]
            if needed and given[one.name] and not given[needed]:
                raise ConfigError(f"{variable(needed)}: empty, but {variable(one.name)} needs it")
        if not given["etcd_tls"]:  # the defaults of its files are for it alone
            files = ("ca_cert_path", "client_cert_path", "client_key_path")
            given |= {name: "" for name in files if variable(name) not in env}
        given["etcd_addr_list"] = with_scheme(given["etcd_addr_list"], given["etcd_tls"])
        return cls(**given)

    def unused_files(self) -> list[str]:
        """The variables that name a file for TLS to etcd without effect."""
        names = ["client_cert_path", "client_key_path"] if not self.etcd_tls else []
        if not any(address.tls for address in self.etcd_addr_list):
            names.append("ca_cert_path")
        return [variable(name) for name in names if getattr(self, name)]

    @contextmanager
    def usable(self, name: str, expected: str) -> Iterator[str]:
        """Gives the path in this setting; what goes wrong with its file is a ConfigError."""
        path: str = getattr(self, name)
        try:
            yield path
        except (OSError, ValueError) as fault:
            text = f"{variable(name)}: not {expected}: {quote(path)}: {reason(fault)}"
            raise ConfigError(text) from fault


def unknown_variables(env: Mapping[str, str]) -> list[str]:
    """Names that look like ours and are not: most likely a typo, which would leave a default."""
    known = {variable(one.name) for one in fields(Config)}
    unknown = [name for name in env if name.startswith(variable("")) and name not in known]
    return sorted(name for name in unknown if not _OF_A_SERVICE.fullmatch(f"{name}={env[name]}"))


class Renewed(Generic[Item]):
    """What `read` makes of these files, and makes again when one has changed. While it cannot,
    the old stays in force, and each second it tries again."""

    def __init__(self, read: Callable[[], Item], *paths: str) -> None:
        self._read = read
        self._paths = paths
        self._again_at = monotonic() + 1  # when to read them once more
        self._has_failed = False
        self._mutex = threading.Lock()  # owns all but _read and _paths
        self._seen = self._stats()  # before the files are read: a change in between is seen later
        self._current = read()

    def get(self) -> Item:
        """What the files hold now, or held when they could last be used."""
        now = monotonic()
        with self._mutex:
            seen = self._stats()
            is_news = seen != self._seen
            if is_news or now >= self._again_at:
                self._seen = seen
                self._again_at = now + 1  # it may change twice within one tick of its clock
                try:
                    self._current = self._read()
                except ConfigError as fault:
                    if not self._has_failed:  # and not again before it is mended
                        event(WARNING, "files not renewed, the old stay in force", reason=fault)
                    self._has_failed = True
                else:
                    if is_news or self._has_failed:
                        event(INFO, "files renewed", paths=",".join(self._paths))
                    else:
                        self._again_at = inf
                    self._has_failed = False
            return self._current

    def _stats(self) -> object:
        try:
            stats = [os.stat(path) for path in self._paths]
        except OSError:  # one is missing
            return None
        return [(at.st_mtime_ns, at.st_size, at.st_ino) for at in stats]


def tls_context(
    config: Config, purpose: ssl.Purpose, ca_name: str, cert_name: str, key_name: str
) -> Renewed[ssl.SSLContext]:
    """TLS with the CA, certificate and key in these settings, each of which may be empty; without
    a CA, as curl would. Raises ConfigError."""
    paths = [getattr(config, name) for name in (ca_name, cert_name, key_name)]

    def read() -> ssl.SSLContext:
        with config.usable(ca_name, "a certificate in PEM") as ca:
            context = ssl.create_default_context(purpose, cafile=ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # of CPython 3.13; Go and curl accept more
        if getattr(config, cert_name):
            with config.usable(key_name, "a file that can be read") as key:
                open(key, "rb").close()
            expected = f"a certificate in PEM for the open key {variable(key_name)}={quote(key)}"
            with config.usable(cert_name, expected) as cert:
                context.load_cert_chain(cert, key, password="")  # or OpenSSL asks for one
        if purpose is ssl.Purpose.CLIENT_AUTH:
            context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # Mozilla's "intermediate"
            context.set_ecdh_curve("prime256v1")  # of its curves; before 3.15 there can be but one
            context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # or a stop alerts silent callers
            if ca:
                context.verify_mode = ssl.CERT_REQUIRED
        return context

    return Renewed(read, *filter(None, paths))


def read_tokens(config: Config) -> list[bytes]:
    """The tokens of callers in the configured file; there may be none. Raises ConfigError."""
    with config.usable("server_token_path", "a file that can be read") as path:
        data = Path(path).read_bytes()
    lines = map(bytes.strip, data.removeprefix(b"\xef\xbb\xbf").splitlines())
    return [line for line in lines if line and not line.startswith(b"#")]


# == Wire: HTTP/1.1 messages over one socket =====================================================
# For requests, and for etcd's answers. The standard library reads headers with its e-mail
# package, which takes longer than the rest of a request: at 64 connections on one CPU, /health is
# answered 47,900 times a second, by http.server's handler 14,800 times. To be strict is easier
# here, too: what two parties read differently can be used to smuggle a request past one.

MAX_HEAD_BYTES = 64 << 10  # of a request; its head is the request line and the headers
MAX_BODY_BYTES = 64 << 10
MAX_HEADERS = 100
HEAD_END = b"\r\n\r\n"
LINE_END = b"\r\n"
TOO_LONG = {HEAD_END: ("the head", 431), LINE_END: ("a line between chunks", 400)}
MIN_CHUNK_BYTES = 16  # on average: each chunk takes 3 µs
_RECEIVE_BYTES = 16 << 10  # one recv; nearly every message is smaller
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
_HEADER = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
# 66 is SO_RCVTIMEO_NEW, which 32-bit ARM has where its time has 64 bits.
_TIMEVAL = "qq" if socket.SO_RCVTIMEO == 66 else "ll"


def parse_headers(lines: Iterable[str]) -> dict[str, str]:
    """Values by name in lower case (RFC 9112, 5). Raises HttpError."""
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if not match:
            secret = re.search("authorization|bearer", line, re.IGNORECASE)
            shown = "…" if secret or "authorization" in headers else line  # never a token
            raise HttpError(f"not a header: {quote(shown)}")
        name = match[1].lower()
        value = match[2].strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def body_length(headers: Mapping[str, str], limit: int) -> int | None:
    """The bytes of the body that these headers announce; None: in chunks. Raises HttpError."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length", "0")
    if coding is not None:
        if "content-length" in headers:
            raise HttpError("content-length together with transfer-encoding")
        if coding.lower() != "chunked":
            raise HttpError(f"transfer-encoding: not chunked: {quote(coding)}")
        return None
    if not (length.isascii() and length.isdigit()):
        raise HttpError(f"content-length: not a number: {quote(length)}")
    if len(length) > 18 or int(length) > limit:
        raise HttpError(f"the body is larger than {limit} bytes", 413)
    return int(length)


def chunk_size(line: bytes) -> int:
    """The bytes in a chunk, from the line before it."""
    match = _CHUNK.fullmatch(line)
    if not match:
        raise HttpError(f"not the size of a chunk: {quote(line.decode('latin-1'))}")
    return int(match[1], 16)


class Wire:
    """A socket, and the bytes received from it but not used yet; of one thread at a time.

    Deadlines are on the clock of time.monotonic; inf is none. Raises EOFError at the end of
    the stream, TimeoutError, HttpError for what is not HTTP, or another OSError.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self._timeouts = {socket.SO_RCVTIMEO: inf, socket.SO_SNDTIMEO: inf}  # as set

    def body(self, length: int | None, limit: int, deadline: float) -> bytes:
        """A body of this length; None: in chunks, up to `limit` bytes together."""
        if length is not None:
            return self._exactly(length, deadline)
        body = bytearray()
        for number in itertools.count(1):
            size = chunk_size(self.until(LINE_END, deadline))
            if not size:
                break
            if len(body) + size > limit or number * MIN_CHUNK_BYTES > limit:
                raise HttpError("the body in chunks is too large, or in too many of them", 413)
            body += self._exactly(size, deadline)
            if self._exactly(2, deadline) != LINE_END:
                raise HttpError("a chunk is longer than it said")
        for _ in range(MAX_HEADERS + 1):
            line = self.until(LINE_END, deadline)
            if not line:
                return bytes(body)
            parse_headers([line.decode("latin-1")])
        raise HttpError(f"more than {MAX_HEADERS} trailers", 431)

    def until(self, mark: bytes, deadline: float) -> bytes:
        """What comes before the mark, which is skipped."""
        buffer = self.buffer
        searched = 0  # what trickles in is not searched from its start each time
        while (end := buffer.find(mark, searched)) < 0 and len(buffer) <= MAX_HEAD_BYTES:
            for bare in (b"\n\n", b"\n\r\n"):
                if buffer.find(bare, searched) >= 0:
                    raise HttpError("a line ends in a line feed without a carriage return")
            searched = max(0, len(buffer) - len(HEAD_END) + 1)
            self.receive(deadline)
        if end < 0 or end > MAX_HEAD_BYTES:
            what, status = TOO_LONG[mark]
            raise HttpError(f"{what} is longer than {MAX_HEAD_BYTES} bytes", status)
        found = bytes(buffer[:end])
        del buffer[: end + len(mark)]
        return found

    def _exactly(self, count: int, deadline: float) -> bytes:
        while len(self.buffer) < count:
            self.receive(deadline)
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def receive(self, deadline: float) -> None:
        """Waits for some more bytes."""
        self._set_timeout(deadline, socket.SO_RCVTIMEO)
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError as fault:  # how the option says it
            raise TimeoutError("timed out") from fault
        if not data:
            raise EOFError("the connection was closed")
        self.buffer += data

    def send(self, data: bytes, deadline: float) -> None:
        """Sends all of it."""
        rest = memoryview(data)  # a slice of it is no copy
        while rest:
            self._set_timeout(deadline, socket.SO_SNDTIMEO)
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError as fault:
                raise TimeoutError("timed out") from fault

    def _set_timeout(self, deadline: float, option: int) -> None:
        """Makes the next recv or send end at the deadline: by the option, since settimeout() adds a
        poll() to each; TLS heeds nothing else."""
        left = min(deadline - monotonic(), LONGEST_TIMEOUT)
        if left <= 0:
            raise TimeoutError("timed out")
        # One that is a little too long is kept: nearly every call is spared a system call.
        is_near = left <= self._timeouts[option] <= left * 1.02
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.settimeout(left)
        elif not is_near:
            timeval = struct.pack(_TIMEVAL, *divmod(max(1, int(left * 1e6)), 10**6))
            self.sock.setsockopt(socket.SOL_SOCKET, option, timeval)
            self._timeouts[option] = left


# == Messages: bytes become a Request, a Response becomes bytes ==================================

TEXT = "text/plain; charset=utf-8"
# curl sends a path as it was typed: UTF-8 that is not percent-encoded is welcome.
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([^\x00-\x20\x7f\ud800-\udfff]+) HTTP/([0-9])\.([0-9])")
_HOST = re.compile(  # RFC 3986, 3.2.2
    r"(?:\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]*)(?::[0-9]*)?", re.ASCII
)
Pairs = tuple[tuple[str, str], ...]  # names and values of headers


class Head(NamedTuple):
    """The request line and the headers of a request."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # names are in lower case
    lease_headers: Pairs  # of them, those that begin with x-lease-
    keep_alive: bool
    version: str  # HTTP/1.1 or HTTP/1.0


UNREAD = Head("", "", "", {}, (), False, "")  # of a request that could not be read


class Request(NamedTuple):
    """What a handler of the API gets."""

    head: Head
    body: bytes
    client: str  # its address
    trusted: bool  # it has shown a token, or none is needed
    hung_up: Callable[[], bool]  # tells whether the caller has gone meanwhile


class Response(NamedTuple):
    """What a handler of the API returns."""

    status: int
    body: bytes = b""
    content_type: str = TEXT
    headers: Pairs = ()
    undo: Callable[[], object] = lambda: None  # called if nobody can be told


def error_response(fault: HttpError) -> Response:
    """The answer that says what is wrong."""
    line = f"{fault}\n".encode("utf-8", "backslashreplace")
    return Response(fault.status, line, TEXT, fault.headers)


def recall(parse: functools._lru_cache_wrapper[Item], data: bytes) -> Item:
    """What this cached parser makes of `data`; only short words of strangers stay in a cache."""
    return parse(data) if len(data) < 400 else parse.__wrapped__(data)


@functools.lru_cache(maxsize=512)  # byte for byte the same again: 4 µs become 0.1 µs
def parse_head(data: bytes) -> Head:
    """The head of a request. Raises HttpError."""
    line, *header_lines = data.decode("utf-8", "surrogateescape").split("\r\n")
    if len(header_lines) > MAX_HEADERS:
        raise HttpError(f"more than {MAX_HEADERS} headers", 431)
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HttpError(f"not a request line: {quote(line)}")
    method, target, major, minor = match.groups()
    if major != "1":
        raise HttpError(f"not HTTP/1.1 or HTTP/1.0: {quote(line)}", 505)
    headers = parse_headers(header_lines)
    host = headers.get("host", "<none>")
    if minor == "0":
        if "transfer-encoding" in headers:
            raise HttpError("transfer-encoding in HTTP/1.0")
    elif not _HOST.fullmatch(host):  # two are joined with a comma
        raise HttpError(f"host: not one host: {quote(host)}")
    target = re.sub(r"^(?i:https?)://[^/?]*", "", target)  # absolute-form, as sent to proxies
    path, _, query = target.partition("#")[0].partition("?")
    ours = tuple(pair for pair in headers.items() if pair[0].startswith("x-lease-"))
    options = set(map(str.strip, headers.get("connection", "").lower().split(",")))
    keep_alive = "close" not in options and (minor != "0" or "keep-alive" in options)
    return Head(method, path or "/", query, headers, ours, keep_alive, f"HTTP/1.{minor}")


@functools.lru_cache(maxsize=64)  # all answers with one status have this in common for a second
def _first_lines(status: int, second: int) -> str:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
    first = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
    return f"{first}Date: {date}\r\nCache-Control: no-store\r\n"


def render(response: Response, head: Head, keep_alive: bool) -> bytes:
    """The answer as bytes."""
    text = _first_lines(response.status, int(time.time()))
    if response.status != 204:  # RFC 9110, 8.6: no Content-Length with 204
        text += f"Content-Type: {response.content_type}\r\n"
        text += f"Content-Length: {len(response.body)}\r\n"
    for name, value in response.headers:
        text += f"{name}: {value}\r\n"
    if not keep_alive:
        text += "Connection: close\r\n"
    elif head.version == "HTTP/1.0":
        text += "Connection: keep-alive\r\n"
    data = (text + "\r\n").encode("latin-1")
    return data if head.method == "HEAD" else data + response.body


# == Connections and the server: who is served, and for how long =================================

SILENT_SECONDS = 0.5  # how long a stop waits for requests on their way on kept connections
REFUSAL_SECONDS = 1  # how long the rest of a refused request is read, so that its answer arrives
BACKLOG = 1024  # connections that the kernel holds until they are accepted
SOCKET_BYTES = 128 << 10  # else the kernel keeps up to 4 MiB for each caller that does not read
OPEN_PATHS = ("/health", "/ready")  # for probes, which have no token
_TLS_HANDSHAKE = 0x16  # the first byte of every TLS connection, and of no HTTP
_HUNG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)  # POLLRDHUP is Linux's


class Connection(socketserver.BaseRequestHandler):
    """Serves one connection in its own thread, request by request."""

    server: Server

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wire = Wire(self.request)
        host = self.client_address[0].removeprefix("::ffff:")
        self.client = str(Address(host, self.client_address[1]))
        self.doing = ""  # what is read or answered; empty while it is silent
        self.head = UNREAD  # of the latest request, as soon as it could be read
        self.server.connections[self.request] = self

    def handle(self) -> None:
        try:
            if not self.server.tls or self._shake_hands(self.server.tls.get()):
                while self._serve_one():
                    pass
        except (EOFError, OSError) as fault:  # it has gone, or idled too long
            if self.doing or isinstance(fault, ssl.SSLError):
                shown = {"client": self.client, "doing": self.doing, "reason": reason(fault)}
                event(DEBUG, "connection lost", **shown)

    def finish(self) -> None:
        if isinstance(self.wire.sock, ssl.SSLSocket):  # which the server does not know
            with suppress(OSError, ValueError), self.wire.sock as tls:
                tls.settimeout(0)
                tls.unwrap()  # says goodbye, and does not wait for the answer

    def shutdown(self, how: int) -> None:
        """Ends one half of the connection. After SHUT_RD, a request that has arrived already is
        still answered."""
        with suppress(OSError):  # closed meanwhile
            # An SSLSocket's own shutdown() would end its TLS.
            socket.socket.shutdown(self.wire.sock, how)

    def _shake_hands(self, context: ssl.SSLContext) -> bool:
        """In our own thread, where a caller that never shakes hands stops nobody else. False
        where the caller speaks plain HTTP, which is refused in plain HTTP."""
        deadline = deadline_after(self.server.config.server_read_timeout)
        self.request.settimeout(seconds_until(deadline))
        first = self.request.recv(1, socket.MSG_PEEK)
        if not first:
            raise EOFError("a probe")
        if first[0] != _TLS_HANDSHAKE:
            self.request.settimeout(None)
            log.tally(WARNING, "plain HTTP to the port of https", client=self.client)
            return self._refuse(HttpError("this port speaks TLS: use https://"))
        tls = context.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        self.wire.sock = tls  # before it shakes hands, so that a stop can end that
        tls.settimeout(seconds_until(deadline))
        tls.do_handshake()
        return True

    def _serve_one(self) -> bool:
        """Answers one request; whether another may follow."""
        self._await_request()
        limit = self.server.config.server_read_timeout
        try:
            request = self._read_request(deadline_after(limit))
        except HttpError as fault:
            return self._refuse(fault)
        except TimeoutError:
            return self._refuse(HttpError(f"the request was not complete after {limit:g}s", 408))
        head = request.head
        self.doing = f"{head.method} {head.path}"
        response = self.server.api.answer(request)
        goes_on = self.server.silent_until == inf or len(self.wire.buffer) > 0
        keep_alive = head.keep_alive and goes_on
        try:
            self.server.api.count(head, response.status)
            self._send(render(response, head, keep_alive))
        except BaseException:  # who does not know of its lock does not hold it
            response.undo()
            raise
        return keep_alive

    def _await_request(self) -> None:
        """Waits for a request's first byte, after empty lines (RFC 9112, 2.2); in a stop, only
        for a moment."""
        self.doing = ""
        self.head = UNREAD
        deadline = deadline_after(self.server.config.server_idle_timeout)
        buffer = self.wire.buffer
        while not buffer or buffer[0] in b"\r\n":
            if buffer:
                del buffer[0]
            else:
                # A stop leaves a moment to what comes late, too.
                stops_at = max(self.server.silent_until, monotonic() + 0.05)
                self.wire.receive(min(deadline, stops_at))
        self.doing = "reading a request"

    def _read_request(self, deadline: float) -> Request:
        if self.wire.buffer[0] == _TLS_HANDSHAKE and not self.server.tls:
            log.tally(WARNING, "TLS to the port of http", client=self.client)
            raise HttpError("this port speaks plain HTTP: use http://")
        data = self.wire.until(HEAD_END, deadline)
        head = recall(parse_head, data)
        self.head = head
        trusted = self.server.admit(head, self.client)
        length = body_length(head.headers, MAX_BODY_BYTES)
        is_awaited = length != 0 and not self.wire.buffer and head.version != "HTTP/1.0"
        if is_awaited and head.headers.get("expect", "").lower() == "100-continue":
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.wire.body(length, MAX_BODY_BYTES, deadline)
        return Request(head, body, self.client, trusted, self._hung_up)

    def _refuse(self, fault: HttpError) -> bool:
        """Answers what could not be read as a request. The rest of the stream means nothing, so
        the connection ends: our half first, the whole a moment later, since closing with bytes
        unread would destroy the answer."""
        event(DEBUG, "request refused", client=self.client, status=fault.status, reason=fault)
        self.server.api.count(self.head, fault.status)
        self._send(render(error_response(fault), self.head, keep_alive=False))
        self.shutdown(socket.SHUT_WR)
        self.doing = ""
        deadline = monotonic() + REFUSAL_SECONDS
        for _ in range(64):
            self.wire.buffer.clear()
            self.wire.receive(deadline)
        return False

    def _send(self, data: bytes) -> None:
        self.wire.send(data, deadline_after(self.server.config.server_write_timeout))

    def _hung_up(self) -> bool:
        """A caller that ends only its own half of the connection counts as gone, since it looks
        the same."""
        poll = select.poll()
        poll.register(self.wire.sock, _HUNG_UP)
        return bool(poll.poll(0))


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections and knows which are open, so that it can stop without losing a
    request."""

    daemon_threads = True
    block_on_close = False  # its end waits for no silent client; stop() waits for the others
    timeout = 0.1  # seconds: how late handle_request() notices a signal of another thread

    def __init__(self, config: Config, api: Api) -> None:
        """Listens on the configured address. Raises OSError or ConfigError."""
        self.config = config
        self.api = api
        self.silent_until = inf  # in a stop: when a connection without a request is closed
        self.connections: dict[Any, Connection | None] = {}  # by socket; None: no thread yet
        self.tls: Renewed[ssl.SSLContext] | None = None
        if config.server_cert_path:
            names = ("server_client_ca_path", "server_cert_path", "server_key_path")
            self.tls = tls_context(config, ssl.Purpose.CLIENT_AUTH, *names)
        self._tokens: Renewed[list[bytes]] | None = None
        if path := config.server_token_path:
            self._tokens = Renewed(functools.partial(read_tokens, config), path)
            if not self._tokens.get():
                raise ConfigError(f"{variable('server_token_path')}: holds no token: {quote(path)}")
        listener = listen(config.server_host, config.server_port)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # of each connection
            listener.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        # TCPServer's own __init__ would make a socket for one family, and HTTPServer's look up
        # our name in the DNS.
        socketserver.BaseServer.__init__(self, listener.getsockname(), Connection)
        self.socket = listener

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as fault:
            if fault.errno in OWN_SHORTAGES:
                log.tally(ERROR, "accept failed", reason=reason(fault))
                sleep(0.1)  # seconds; without it the loop would spin
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections[request] = None  # before its thread runs: a stop must not miss it
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        super().close_request(request)
        self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_defect(doing="a connection")

    def admit(self, head: Head, client: str) -> bool:
        """Whether the request shows a token, or none is needed. Raises HttpError where it must,
        and where it comes from a web page: any page could take locks through its visitor."""
        open_to_all = head.path in OPEN_PATHS
        if self._tokens is None:
            if "origin" in head.headers and not open_to_all:
                raise HttpError("origin: requests of web pages need a token", 403)
            return True
        tokens = self._tokens.get()
        if not tokens:
            log.tally(ERROR, "no token in the file, everybody is refused")
        scheme, _, given = head.headers.get("authorization", "").partition(" ")
        shown = given.strip().encode("utf-8", "surrogateescape")
        matches = [secrets.compare_digest(shown, token) for token in tokens]  # all: constant time
        if scheme.lower() == "bearer" and any(matches):
            return True
        if open_to_all:
            return False
        log.tally(WARNING, "token refused", client=client)
        challenge = ("WWW-Authenticate", "Bearer")
        raise HttpError("authorization: not Bearer with a known token", 401, challenge)

    def stop(self, timeout: float) -> None:
        """Accepts no more, answers what is in flight, closes silent connections SILENT_SECONDS
        later, and after `timeout` seconds (0: never) cuts what is left. Locks stay with their
        holders."""
        self.silent_until = monotonic() + SILENT_SECONDS
        deadline = deadline_after(timeout)
        # Those that the kernel has let in already are served; a flood of later ones is not awaited.
        self.socket.setblocking(False)  # so that handle_request() waits for nobody
        for _ in range(BACKLOG):
            if monotonic() < self.silent_until:
                self.handle_request()
        self.socket.close()
        self.api.service.dismiss_waiting()
        self._await_ends(min(self.silent_until, deadline))
        for connection in filter(None, list(self.connections.values())):
            if not connection.doing:
                connection.shutdown(socket.SHUT_RD)
        self._await_ends(deadline)
        for connection in filter(None, list(self.connections.values())):
            doing = connection.doing or "nothing"
            event(WARNING, "connection cut", client=connection.client, doing=doing)

    def _await_ends(self, deadline: float) -> None:
        while self.connections and monotonic() < deadline:
            sleep(0.01)  # seconds; and not for a notice, so that a second signal ends it


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; an empty host is every address, IPv6 with IPv4 where there is IPv6.
    Raises OSError."""
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
            )
        except OSError as fault:
            if fault.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
    family, *_, address = found[0]
    return socket.create_server(address, family=family, backlog=BACKLOG)


# == API: what a Request asks for, and its answer ================================================

MAX_WAIT_SECONDS = 60  # of x-lease-wait
MAX_LIST_BYTES = 256 << 10  # of a page; control characters are six times as long in JSON
MAX_PARAMETERS = 8  # of a query
MAX_DEPTH = 100  # of a JSON body: CPython keeps up to 8 MiB of stack for a deeper one
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
Handler = Callable[[Request], Response]


class Api:
    """The endpoints. A handler returns the answer, or raises HttpError, StorageError, or EOFError
    (nobody waits for it)."""

    def __init__(self, service: LockService, metrics: Metrics, config: Config) -> None:
        self.service = service
        self._metrics = metrics
        self._lease_headers = {
            "x-lease-ttl": duration(1, config.max_ttl, ceil),
            "x-lease-wait": duration(0, MAX_WAIT_SECONDS),
            "x-lease-id": between(1, INT64[-1], whole),
        }
        ttl = min(10, config.max_ttl)
        self._defaults = {"x-lease-ttl": ttl, "x-lease-wait": 0, "x-lease-id": 0}
        self._options = functools.lru_cache(maxsize=1024)(self._parse_options)
        self._routes: dict[str, dict[str, Handler]] = {
            "/lease": {"POST": self.acquire, "DELETE": self.release, "GET": self.look},
            "/keepalive": {"POST": self.renew},
            "/health": {"GET": lambda request: Response(200, b"ok\n")},
            "/ready": {"GET": self.ready},
            "/metrics": {"GET": self.show_metrics},
        }
        if config.pprof_enabled:
            for name, page in PROFILES.items():
                self._routes[f"/debug/pprof/{name}"] = {"GET": page}
        for methods in self._routes.values():
            if "GET" in methods:
                methods["HEAD"] = methods["GET"]

    def answer(self, request: Request) -> Response:
        """Always answers, unless the caller has gone: then it raises EOFError."""
        head = request.head
        try:
            response = self._handler(head)(request)
        except HttpError as fault:
            response = error_response(fault)
        except StorageError as fault:
            response = error_response(HttpError(f"storage failed: {fault}", 500))
        except EOFError:
            raise
        except Exception:  # a defect; the caller deserves an answer all the same
            log_defect(path=head.path)
            text = "outcome unknown: internal error: see the log of shared-lock"
            response = error_response(HttpError(text, 500))
        shown = {"client": request.client, "method": head.method, "path": head.path}
        event(DEBUG, "request", status=response.status, **shown)
        return response

    def count(self, head: Head, status: int) -> None:
        """Counts an answer. A caller's own words never become labels."""
        methods = self._routes.get(head.path, {})
        path = head.path if methods else "other"
        method = head.method if head.method in methods else "other"
        self._metrics.count(sample(REQUESTS, path=path, method=method, code=status))

    def _handler(self, head: Head) -> Handler:
        methods = self._routes.get(head.path)
        if not methods:
            raise HttpError(f"no such path: {quote(head.path)}", 404)
        if head.method not in methods:
            allow = ", ".join(methods)
            text = f"{head.path}: not {allow}: {quote(head.method)}"
            raise HttpError(text, 405, ("Allow", allow))
        return methods[head.method]

    def acquire(self, request: Request) -> Response:
        """POST /lease"""
        head = request.head
        must_be_free = _precondition(head, "if-none-match", "if-match")
        if head.query:
            known = ", ".join(self._lease_headers)
            raise HttpError(f"query: not of use, but the headers {known}: {quote(head.query)}")
        ttl, wait, lease = self._options(head.lease_headers)
        key, value = recall(parse_lock, request.body)
        wanted = LockRequest(key, value, ttl, wait, lease, request.client, request.hung_up)
        try:
            grant = self.service.acquire(wanted)
        except StorageError as fault:
            outcome = "not acquired" if isinstance(fault, NotApplied) else "outcome unknown"
            raise HttpError(f"{outcome}: {fault}", 500) from fault
        if grant:
            told = (("x-lease-ttl", f"{grant.ttl}s"), ("x-fencing-token", str(grant.token)))
            undo = functools.partial(self.service.take_back, wanted, grant.lease)
            return Response(201, b"%d" % grant.lease, TEXT, told, undo)
        if must_be_free:
            raise HttpError(f"key: held: {quote(wanted.key)}", 412)
        # Never the holder's lease: a refused script that cleans up after itself would free
        # somebody else's lock.
        return Response(202, b"0")

    def _parse_options(self, headers: Pairs) -> list[Any]:
        options: dict[str, Any] = self._defaults.copy()
        for name, text in headers:
            if name not in options:
                raise HttpError(f"{quote(name)}: not one of the headers {', '.join(options)}")
            try:
                options[name] = self._lease_headers[name](text)
            except ValueError as fault:
                raise HttpError(f"{name}: {fault}") from fault
        return list(options.values())

    def renew(self, request: Request) -> Response:
        """POST /keepalive"""
        lease = read_lease(request)
        ttl = self.service.renew(lease, request.client)
        if not ttl:
            return _answer_gone(lease, request)
        return Response(200, headers=(("x-lease-ttl", f"{ttl}s"),))

    def release(self, request: Request) -> Response:
        """DELETE /lease, of a holder or, with a query, of an operator"""
        if request.head.query:
            return self.free(request)
        lease = read_lease(request)
        if not self.service.release(lease, request.client):
            return _answer_gone(lease, request)
        return Response(200)

    def free(self, request: Request) -> Response:
        """DELETE /lease?key=K with If-Match: "TOKEN", the fencing token that GET tells."""
        key = _lone_key(_query(request))
        if request.body:
            raise HttpError("body: not of use with a key in the query")
        shown = 'a fencing token, as in "4711"'
        given = _precondition(request.head, "if-match", "if-none-match", '"[0-9]{1,19}"', shown)
        if not given:
            raise HttpError(f"if-match: missing; send what GET tells, {shown}", 428)
        token = int(given.strip('"'))
        freed = self.service.free(key, token, request.client)
        if freed is Freed.NOTHING:
            return Response(204)
        if freed is Freed.OTHER_HOLDER:
            raise HttpError(f'if-match: the holder has another token: "{token}"', 412)
        if freed is Freed.LEASE_LIVES:
            text = b"freed; its lease holds keys of others and lives on: the holder is not told\n"
            return Response(200, text)
        return Response(200, b"freed\n")

    def look(self, request: Request) -> Response:
        """GET /lease?key=K, or ?prefix=P with &after=KEY"""
        query = _query(request)
        if query.keys() in ({"prefix"}, {"prefix", "after"}):
            return self._list(query["prefix"], query.get("after"))
        key = _lone_key(query)
        holder = self.service.storage.look(key)
        if holder is None:
            raise HttpError(f"key: free: {quote(key)}", 404)
        line = _json_line(
            key=key,
            value=holder.value,
            ttl=holder.ttl,
            granted_ttl=holder.granted_ttl,
            fencing_token=holder.token,
        )
        return Response(200, line, "application/json", (("ETag", f'"{holder.token}"'),))

    def _list(self, prefix: str, after: str | None) -> Response:
        if after is not None and not after.startswith(prefix):
            raise HttpError(f"after: not behind the prefix {quote(prefix)}: {quote(after)}")
        locks, more = self.service.storage.list_locks(prefix, after or "")
        body = bytearray()
        for key, holder in locks:
            line = _json_line(key=key, value=holder.value, fencing_token=holder.token)
            if body and len(body) + len(line) > MAX_LIST_BYTES:
                more = True
                break
            body += line
        if more:
            body += _json_line(more=True)
        return Response(200, bytes(body), "application/x-ndjson")

    def ready(self, request: Request) -> Response:
        """GET /ready"""
        try:
            self.service.storage.check()
        except StorageError as fault:
            why = f": {fault}" if request.trusted else ""
            raise HttpError(f"storage failed{why}", 503) from fault
        return Response(200, b"ok\n")

    def show_metrics(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(200, self._metrics.render().encode(errors="replace"), PROMETHEUS_TEXT)


def _precondition(
    head: Head, name: str, other: str, form: str = "[*]", shown: str = "*"
) -> str | None:
    """The value of this header (RFC 9110, 13.1), None where it was not sent. Raises HttpError
    where to ignore what was sent would be a trap."""
    if other in head.headers:
        raise HttpError(f"{other}: not of use here, but {name}: {shown}")
    given = head.headers.get(name)
    if given is not None and not re.fullmatch(form, given):
        raise HttpError(f"{name}: not {shown}: {quote(given)}")
    return given


def _answer_gone(lease: int, request: Request) -> Response:
    if "if-match" in request.head.headers:
        raise HttpError(f"lease: gone: {lease}", 412)
    return Response(204)


def _lone_key(query: Mapping[str, str]) -> str:
    key = query.get("key", "")
    if not key or len(query) > 1:
        raise HttpError("key: missing, or not alone, in the query, as in /lease?key=nightly")
    return key


def _json_line(**members: object) -> bytes:
    return (json.dumps(members, ensure_ascii=False) + "\n").encode()


def _query(request: Request) -> dict[str, str]:
    """The query's parameters. Raises HttpError."""
    query = request.head.query
    try:
        pairs = urllib.parse.parse_qsl(
            query, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
        )
    except ValueError as fault:
        text = "not UTF-8 in percent-encoding, or too many names"
        raise HttpError(f"query: {text}: {quote(query)}") from fault
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise HttpError(f"query: a name stands twice: {quote(query)}")
    return parameters


# Names of members match in any case, and of two the last counts, as in Go. An integer too long for
# int64 becomes a float, as in JavaScript: Python would refuse 4,300 digits as no JSON at all. NaN
# and Infinity are none.
_JSON = json.JSONDecoder(
    object_pairs_hook=lambda members: {name.casefold(): given for name, given in members},
    parse_int=lambda digits: int(digits) if len(digits) <= 20 else float(digits),
    parse_constant=int,  # which refuses them with a ValueError
)
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[][{}]', re.DOTALL)
_DEEPER = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


def is_too_deep(body: bytes) -> bool:
    """Whether this JSON is nested deeper than MAX_DEPTH; brackets in strings do not count."""
    steps = (_DEEPER.get(found[0], 0) for found in _STRING_OR_BRACKET.finditer(body))
    return any(depth > MAX_DEPTH for depth in itertools.accumulate(steps))


def _parse_json(body: bytes) -> Any:
    if len(body) > MAX_DEPTH and is_too_deep(body):
        shown = quote(body[:200].decode("latin-1"))
        raise HttpError(f"body: nested deeper than {MAX_DEPTH}: {shown}")
    try:
        return _JSON.decode(body.decode())
    except ValueError as fault:
        text = body.decode("utf-8", "replace").strip()
        raise HttpError(f"body: not JSON: {quote(text)}") from fault


@functools.lru_cache(maxsize=1024)
def parse_lock(body: bytes) -> tuple[str, str]:
    """The key and the value in the body of a POST /lease. Raises HttpError."""
    lock = _parse_json(body)
    if not isinstance(lock, dict):
        raise HttpError(f"body: not a JSON object: {quote(json.dumps(lock))}")
    if "ttl" in lock:
        ttl = quote(json.dumps(lock["ttl"]))
        raise HttpError(f"ttl: not read from the body, send the header x-lease-ttl: {ttl}")
    key = _text(lock, "key")
    if not key:
        raise HttpError('key: missing or empty: ""')
    return key, _text(lock, "value")


def _text(lock: Mapping[str, object], name: str) -> str:
    text = lock.get(name)
    if text is None:  # null is absent, as in Go
        return ""
    if not isinstance(text, str):
        raise HttpError(f"{name}: not a string: {quote(json.dumps(text))}")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise HttpError(f"{name}: not Unicode text, a surrogate stands alone: {text[:100]!a}")
    return text


def read_lease(request: Request) -> int:
    """The lease ID in the body of a request, whose preconditions are checked. Raises HttpError."""
    _precondition(request.head, "if-match", "if-none-match")
    return recall(parse_lease, request.body)


@functools.lru_cache(maxsize=1024)
def parse_lease(body: bytes) -> int:
    """The lease ID in a body: a number, a number in a JSON string, or an object with `id` as
    either. JSON that is no int64 is a 500, which the Go service's clients know."""
    given = _parse_json(body)
    if isinstance(given, dict):
        given = given.get("id")
    if isinstance(given, str) and re.fullmatch(r"\s*-?[0-9]{1,19}\s*", given, re.ASCII):
        given = int(given)
    if type(given) is not int or given not in INT64:
        shown = quote(body.decode("utf-8", "replace").strip())
        raise HttpError(f"body: not a lease ID: {shown}", 500)
    return given


# == Service: what a lock means ==================================================================

ASK_SECONDS = 0.05  # the longest pause of the first in line while few keys are waited for
ASKED_KEYS = 5  # keys with pauses so short: a replica asks the storage some 200 times a second
MAX_ASK_SECONDS = 0.8  # the longest pause, however many keys there are
HUNG_UP_SECONDS = 2  # how late we may notice that a caller behind the first has gone
Line = list[threading.Event]  # one of each caller; set when it has become the first
Timed = tuple[Grant | None, float]  # what the storage said last, and the seconds that it took


class LockService:
    """Locks over a storage. All methods may be called from any thread."""

    def __init__(self, storage: Storage, metrics: Metrics) -> None:
        self.storage = storage
        self._metrics = metrics
        self._stopping = threading.Event()  # nobody waits any more
        self._mutex = threading.Lock()  # owns the lines
        self._lines: dict[str, Line] = {}  # by key
        metrics.sources.append(
            lambda: {"shared_lock_waiting": sum(map(len, list(self._lines.values())))}
        )

    def acquire(self, wanted: LockRequest) -> Grant | None:
        """Takes the lock; None while somebody else holds it, and the caller waits no longer.
        Raises StorageError, HttpError, or EOFError (the caller has gone)."""
        shown = {"client": wanted.client, "key": wanted.key}
        if wanted.wait and not self._stopping.is_set() and not self._has_it(wanted):
            grant, took = self._wait_in_line(wanted)
        else:
            grant, took = self._ask_once(wanted)
        if not grant:
            event(DEBUG, "refused", **shown)
            self._metrics.observe_grant("accepted", took)
            return None
        try:
            event(INFO, "granted", **shown, **grant._asdict(), value=wanted.value)
            self._metrics.observe_grant("created", took)
            if wanted.wait and wanted.hung_up():
                raise EOFError("the caller hung up")
        except BaseException:  # who is not told of its lock does not hold it
            self.take_back(wanted, grant.lease)
            raise
        return grant

    def renew(self, lease: int, client: str) -> int:
        """Starts the lease's ttl again and returns it; 0 where etcd knows that it is gone. Raises
        StorageError."""
        ttl = self._ask("prolong", self.storage.renew, lease, lease=lease, client=client)
        self._metrics.count("prolong success" if ttl else "prolong failure")
        if not ttl:
            event(INFO, "lease is gone", lease=lease, client=client)
        return ttl

    def release(self, lease: int, client: str) -> bool:
        """Ends the lease, which frees its key at once; False where there is nothing of ours.
        Raises StorageError."""
        keys = self._ask("release", self.storage.release, lease, lease=lease, client=client)
        self._metrics.count("release success" if keys else "release failure")
        for key in keys:
            event(INFO, "released", key=key, lease=lease, client=client)
        return bool(keys)

    def free(self, key: str, token: int, client: str) -> Freed:
        """Ends the holder with this fencing token, for an operator. Raises StorageError."""
        freed = self._ask("release", self.storage.free, key, token, key=key, client=client)
        done = freed in (Freed.FREED, Freed.LEASE_LIVES)
        self._metrics.count("release success" if done else "release failure")
        name = "freed" if done else "not freed"
        event(INFO, name, key=key, token=token, outcome=freed.value, client=client)
        return freed

    def take_back(self, wanted: LockRequest, lease: int) -> None:
        """Releases a lock whose caller was not told of it, unless it chose the lease: a
        repetition may have been told."""
        if wanted.lease:
            return
        with suppress(StorageError):  # then it ends with its ttl
            self.storage.release(lease)
            event(INFO, "caller has gone, lock taken back", lease=lease, client=wanted.client)

    def dismiss_waiting(self) -> None:
        """Ends all waits."""
        self._stopping.set()
        with self._mutex:
            for turn in itertools.chain.from_iterable(self._lines.values()):
                turn.set()

    def _has_it(self, wanted: LockRequest) -> bool:
        """Whether the caller's own lease holds the key, by a try whose answer was lost. Then it
        must not stand behind those that wait for it."""
        if not wanted.lease or wanted.key not in self._lines:
            return False
        key = wanted.key
        holder = self._ask("get", self.storage.look, key, key=key, client=wanted.client)
        return holder is not None and holder.lease == wanted.lease

    def _ask(
        self, operation: str, ask: Callable[..., Answer], *items: object, **shown: object
    ) -> Answer:
        """What the storage answers; its failure is counted and logged."""
        try:
            return ask(*items)
        except StorageError as fault:
            self._metrics.count(f"{operation} error")
            event(WARNING, "storage failed", operation=operation, reason=fault, **shown)
            raise

    def _ask_once(self, wanted: LockRequest) -> Timed:
        started = monotonic()
        key = wanted.key
        grant = self._ask("get", self.storage.acquire, wanted, key=key, client=wanted.client)
        return grant, monotonic() - started

    def _wait_in_line(self, wanted: LockRequest) -> Timed:
        """Joins the line of this key, and leaves it with an answer. Raises EOFError."""
        turn = threading.Event()
        with self._mutex:
            line = self._lines.setdefault(wanted.key, [])
            line.append(turn)
        try:
            return self._ask_in_turn(wanted, line, turn)
        finally:
            with self._mutex:
                line.remove(turn)
                if line:
                    line[0].set()
                else:
                    del self._lines[wanted.key]

    def _ask_in_turn(self, wanted: LockRequest, line: Line, turn: threading.Event) -> Timed:
        """Asks as the first in line, at once, after random pauses, and once more when the wait
        ends. Random, since the lines of two replicas would otherwise keep step, and one of them
        always be late. Who waits holds no lease; a release wakes nobody."""
        grant = None
        took = 0.0
        # A second early: a proxy that cuts at 60 s would otherwise cut the answer.
        deadline = monotonic() + min(wanted.wait, MAX_WAIT_SECONDS - 1)
        while not self._stopping.is_set():
            if wanted.hung_up():
                raise EOFError("the caller hung up")
            is_first = line[0] is turn
            if is_first:
                grant, took = self._ask_once(wanted)
            left = deadline - monotonic()
            if grant or left <= 0:
                break
            if is_first:
                longest = ASK_SECONDS * max(1, len(self._lines) / ASKED_KEYS)
                self._stopping.wait(min(left, random.uniform(0, min(longest, MAX_ASK_SECONDS))))
            else:
                turn.wait(min(left, HUNG_UP_SECONDS))
        return grant, took


# == Storage: the promise ========================================================================


Page = tuple[list[tuple[str, Holder]], bool]  # locks by key, and whether there are more


class Storage(Protocol):
    """A table of locks. Keys are without our prefix. Where there is a network, each method may
    raise NotApplied and, if it writes, OutcomeUnknown."""

    def start(self) -> None:
        """Begins to look after what the storage needs."""

    def check(self) -> None:
        """Returns if the storage can serve."""

    def acquire(self, wanted: LockRequest) -> Grant | None:
        """Takes the lock; None while somebody else holds it. If the lease in the request holds it
        already, its ttl starts again. Raises HttpError (409) where that lease is in use for
        something else."""

    def renew(self, lease: int) -> int:
        """Starts the lease's ttl again and returns it; 0 where the lease is known to be gone."""

    def release(self, lease: int) -> list[str]:
        """Ends the lease and returns the keys that this frees; none where it is none of ours."""

    def free(self, key: str, token: int) -> Freed:
        """Frees the key if this fencing token is its holder's, and ends the holder's lease."""

    def look(self, key: str) -> Holder | None:
        """Who holds the key, with its value and ttls; None where it is free."""

    def list_locks(self, prefix: str, after: str) -> Page:
        """The first keys with this prefix that sort behind `after`, with their holders, without
        ttls; whether there are more."""


MAX_LOCKS_LISTED = 1000  # by one GET /lease?prefix=
MAX_LEASE_ID = (1 << 53) - 1  # the largest whole number that JavaScript and jq do not round


def new_lease_id() -> int:
    """A random lease ID. We choose it, not etcd, so that a grant can be repeated unharmed."""
    return secrets.randbelow(MAX_LEASE_ID) + 1


# == Cache: a storage in front of the storage ====================================================

CACHE_SECONDS = 1  # how long a key counts as held after the storage was asked
MAX_CACHED_KEY_BYTES = 1024


class Cache:
    """Refuses from memory while a key is known to be held: it can delay a grant and never cause
    one. A refusal that is asked for while the key is released may be believed for its second."""

    def __init__(
        self, storage: Storage, size: int, metrics: Metrics, clock: Clock = monotonic
    ) -> None:
        self._storage = storage
        self._metrics = metrics
        self._clock = clock
        self._mutex = threading.Lock()  # owns what is remembered
        self._lru = functools.lru_cache(maxsize=size)(
            lambda key: types.SimpleNamespace(held_until=0.0)
        )
        self.start = storage.start
        self.check = storage.check
        self.renew = storage.renew
        self.look = storage.look
        self.list_locks = storage.list_locks
        metrics.sources.append(self._samples)

    def acquire(self, wanted: LockRequest) -> Grant | None:
        """Whoever waits asks the storage each time, and so does a caller that chose its lease: it
        may be its own."""
        key = wanted.key
        if wanted.wait or wanted.lease or len(key.encode()) > MAX_CACHED_KEY_BYTES:
            return self._storage.acquire(wanted)
        asked_at = self._clock()
        remembered = self._remembered(key)
        held_until = remembered.held_until
        if held_until > asked_at:
            self._metrics.count("get hit")
            return None
        self._metrics.count("get expired" if held_until else "get miss")
        grant = self._storage.acquire(wanted)
        remembered.held_until = asked_at + CACHE_SECONDS  # it is held either way
        self._metrics.count("set update" if held_until else "set success")
        return grant

    def release(self, lease: int) -> list[str]:
        keys = self._storage.release(lease)
        for key in keys:
            if len(key.encode()) <= MAX_CACHED_KEY_BYTES:
                self._remembered(key).held_until = 0
        return keys

    def free(self, key: str, token: int) -> Freed:
        try:
            return self._storage.free(key, token)
        finally:  # with the lease other keys may be free
            self._lru.cache_clear()

    def _samples(self) -> Samples:
        info = self._lru.cache_info()
        return {OPERATIONS["evict size_limit"]: info.misses - info.currsize}

    def _remembered(self, key: str) -> types.SimpleNamespace:
        with self._mutex:  # lru_cache alone may make two of one key for two threads
            return self._lru(key)


# == Storage in memory: the specification ========================================================


@dataclass
class _Lock:
    key: str
    lease: int
    token: int
    value: str
    ttl: int
    ends: float = 0  # on the clock


class MemoryStorage(Storage):
    """A table of locks with a clock, lost with the process: the promise with nothing in the
    way."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()  # owns all below
        self._locks: dict[str, _Lock] = {}  # by key
        self._token = 0

    def start(self) -> None:
        """Needs nothing."""

    check = start  # it can always serve

    def acquire(self, wanted: LockRequest) -> Grant | None:
        with self._mutex:
            lock = self._alive().get(wanted.key)
            if not lock:
                if wanted.lease and self._find(wanted.lease):
                    raise lease_in_use(wanted.lease)
                self._token += 1
                lease = wanted.lease or new_lease_id()
                lock = _Lock(wanted.key, lease, self._token, wanted.value, wanted.ttl)
                self._locks[wanted.key] = lock
            elif lock.lease != wanted.lease:
                return None
            return Grant(lock.lease, self._start_ttl(lock), lock.token)

    def renew(self, lease: int) -> int:
        with self._mutex:
            lock = self._find(lease)
            return self._start_ttl(lock) if lock else 0

    def release(self, lease: int) -> list[str]:
        with self._mutex:
            lock = self._find(lease)
            if not lock:
                return []
            del self._locks[lock.key]
            return [lock.key]

    def free(self, key: str, token: int) -> Freed:
        with self._mutex:
            lock = self._alive().get(key)
            if not lock:
                return Freed.NOTHING
            if lock.token != token:
                return Freed.OTHER_HOLDER
            del self._locks[key]
            return Freed.FREED

    def look(self, key: str) -> Holder | None:
        with self._mutex:
            lock = self._alive().get(key)
            if not lock:
                return None
            left = int(lock.ends - self._clock())
            return Holder(lock.lease, lock.token, lock.value, left, lock.ttl)

    def list_locks(self, prefix: str, after: str) -> Page:
        with self._mutex:
            page = [
                (key, Holder(lock.lease, lock.token, lock.value))
                for key, lock in sorted(self._alive().items())  # by code points is by UTF-8, too
                if key.startswith(prefix) and (key > after or not after)
            ]
            return page[:MAX_LOCKS_LISTED], len(page) > MAX_LOCKS_LISTED

    def _alive(self) -> dict[str, _Lock]:
        """The locks by key, once those that have ended are forgotten."""
        now = self._clock()
        self._locks = {key: lock for key, lock in self._locks.items() if lock.ends > now}
        return self._locks

    def _find(self, lease: int) -> _Lock | None:
        return next((lock for lock in self._alive().values() if lock.lease == lease), None)

    def _start_ttl(self, lock: _Lock) -> int:
        lock.ends = self._clock() + lock.ttl
        return lock.ttl


def lease_in_use(lease: int) -> HttpError:
    """What to tell a caller whose lease holds something else."""
    return HttpError(f"x-lease-id: in use for something else: {lease}", 409)


# == Storage in etcd: the same promise over a network that fails =================================

MAX_DOOMED = 10_000  # leases to end in the background; what is over ends with its ttl


class AskedKeys:
    """Which keys this replica was asked for within the hour, in a byte for each of 65,536 hashes
    of keys: nothing grows, and what it forgets or confuses costs a call, never a lock."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()  # owns the table: of two racers only one is the first
        self._hours = bytearray(1 << 16)  # by hash: the hour of the last question; 0: none

    def note(self, key: str) -> bool:
        """Whether the key was asked for within the last hour; now it was."""
        slot = hash(key) % len(self._hours)
        hour = int(self._clock() // 3600) % 255 + 1
        with self._mutex:
            asked_in = self._hours[slot]
            self._hours[slot] = hour
        return asked_in > 0 and (hour - asked_in) % 255 <= 1

    def forget(self, key: str) -> None:
        """The key is free again: the next one need not read first."""
        self._hours[hash(key) % len(self._hours)] = 0


class Operation:
    """One operation on the storage: a deadline, and tries until there is an answer."""

    def __init__(self, timeout: float) -> None:
        self.deadline = deadline_after(timeout)
        self.doubt: OutcomeUnknown | None = None  # an earlier try that may have been applied

    def ask(self, call: Callable[[Item, float], Answer], item: Item, reads: bool = False) -> Answer:
        """Repeats the call until etcd answers; the session picks the member and keeps the pace.
        After a try that may have been applied, only a success settles the outcome: a refusal does
        not. Raises StorageError when the time is up."""
        self.doubt = None
        while True:
            try:
                return call(item, self.deadline)
            except Refused as fault:
                raise self.doubt or fault from None
            except StorageError as fault:
                if isinstance(fault, OutcomeUnknown) and not reads:
                    self.doubt = fault
                if monotonic() >= self.deadline:
                    raise self.doubt or NotApplied(str(fault)) from fault

    def read(self, call: Callable[[Item, float], Answer], item: Item) -> Answer:
        """As ask(), for a call that changes nothing."""
        return self.ask(call, item, reads=True)


class EtcdStorage(Storage):
    """Locks in etcd. Every operation is safe to repeat, and is repeated until etcd answers or its
    time is up."""

    def __init__(self, gateway: Gateway, timeout: float) -> None:
        self._gateway = gateway
        self._cluster = gateway.session.cluster
        self._timeout = timeout  # seconds for one operation, all tries together
        self._asked = AskedKeys()
        self._held = Combiner(gateway.are_held, lambda key: part_of_call(len(key)))
        self._claims = Combiner(
            gateway.claim, lambda claim: part_of_call(len(claim.key) + len(claim.value))
        )
        self._renewals = Combiner(gateway.keep_alive, lambda lease: 1 / MAX_KEEPALIVES)
        self._one_list = threading.Lock()  # lists are large: one at a time
        self._doomed: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()  # end, lease

    def start(self) -> None:
        self._gateway.session.start()
        keep_running("end-leases", self._end_one_doomed)

    def check(self) -> None:
        operation = Operation(self._timeout)
        if not self._cluster.id:
            self._cluster.require_one(operation.deadline)
        operation.read(self._held, "")  # NOBODYS_KEY

    def acquire(self, wanted: LockRequest) -> Grant | None:
        """A read, so that a refusal writes nothing, but where nobody asked for the key lately;
        then a lease of our own, and one transaction that puts the key with it if nobody else has.

        A caller that chose its lease always reads first: its lease is never ended here, and after
        a lost race would answer keepalives for a whole ttl."""
        operation = Operation(self._timeout)
        self._cluster.require_one(operation.deadline)
        was_asked = self._asked.note(wanted.key)
        if wanted.lease:
            holder = operation.read(self._gateway.find_holder, wanted.key)
            if holder and holder.lease != wanted.lease:
                return None
            if holder:  # an earlier try of this caller has taken it
                ttl = operation.ask(self._renewals, wanted.lease)
                if ttl:
                    return Grant(wanted.lease, ttl, holder.token)
        elif was_asked and operation.read(self._held, wanted.key):
            return None
        try:
            grant = self._grant(operation, wanted)
            return self._claim(operation, wanted, grant)
        except Refused:  # by an etcd that is full, perhaps
            if wanted.lease or was_asked or not operation.read(self._held, wanted.key):
                raise
            return None

    def _grant(self, operation: Operation, wanted: LockRequest) -> Grant:
        """A lease to claim the key with."""
        while True:
            lease = wanted.lease or new_lease_id()
            try:
                ttl = operation.ask(self._gateway.grant, (lease, wanted.ttl))
                if not ttl and (wanted.lease or operation.doubt):
                    ttl = self._use_again(operation, wanted, lease)
            except OutcomeUnknown as fault:  # at worst there is a lease without a key
                self._end_lease(operation, wanted, lease, wanted.ttl)
                raise NotApplied(str(fault)) from fault
            if ttl:
                return Grant(lease, ttl, 0)

    def _use_again(self, operation: Operation, wanted: LockRequest, lease: int) -> int:
        """The ttl of the lease, which exists by an earlier try."""
        name = (KEY_PREFIX + wanted.key).encode()
        try:
            found = operation.read(self._gateway.time_to_live, lease)
            if found and found.keys not in ([], [name]):
                raise lease_in_use(lease)
            ttl = operation.ask(self._renewals, lease) if found else 0
        except StorageError as fault:
            raise OutcomeUnknown(str(fault)) from fault
        if not ttl:
            raise NotApplied("the lease ended before it was used")
        return ttl

    def _claim(self, operation: Operation, wanted: LockRequest, grant: Grant) -> Grant | None:
        """Takes the key with a lease that was granted, or ends the lease.

        Only now, though to send the claim with the grant takes 15 % less time: a member that
        freezes with both may, when it wakes up, take the key again after its release."""
        lease = grant.lease
        try:
            token = operation.ask(self._claims, wanted._replace(lease=lease))
            if not token and (operation.doubt or wanted.lease):
                token = self._find_token(operation, wanted.key, lease)
        except BaseException as fault:
            ended = self._end_lease(operation, wanted, lease, grant.ttl)
            if ended and isinstance(fault, OutcomeUnknown):  # without its lease there is no lock
                raise NotApplied(str(fault)) from fault
            raise
        if token:
            return grant._replace(token=token)
        self._end_lease(operation, wanted, lease, grant.ttl)
        return None

    def _find_token(self, operation: Operation, key: str, lease: int) -> int:
        """The token of a claim that put nothing and has won all the same, by a try whose answer was
        lost or by a copy of the request; else 0."""
        try:
            holder = operation.read(self._gateway.find_holder, key)
        except StorageError as fault:
            raise OutcomeUnknown(str(fault)) from fault
        return holder.token if holder and holder.lease == lease else 0

    def renew(self, lease: int) -> int:
        return Operation(self._timeout).ask(self._renewals, lease)

    def release(self, lease: int) -> list[str]:
        """A lease without keys, or with one outside of our prefix, is another tenant's."""
        operation = Operation(self._timeout)
        found = operation.read(self._gateway.time_to_live, lease)
        if not found or not found.is_ours():
            return []
        operation.ask(self._gateway.revoke, lease)
        keys = [name[len(KEY_PREFIX) :].decode("utf-8", "replace") for name in found.keys]
        for key in keys:
            self._asked.forget(key)
        return keys

    def free(self, key: str, token: int) -> Freed:
        """Its lease is revoked, and the key goes with it: to delete the key alone would let the
        holder renew for ever, beside the next one."""
        operation = Operation(self._timeout)
        holder = operation.read(self._gateway.find_holder, key)
        if not holder:
            self._cluster.require_one(operation.deadline)
            return Freed.NOTHING
        if holder.token != token:
            return Freed.OTHER_HOLDER
        self._asked.forget(key)
        if holder.lease:
            found = operation.read(self._gateway.time_to_live, holder.lease)
            if not found:
                return Freed.NOTHING  # it ended meanwhile
            if found.is_ours():
                operation.ask(self._gateway.revoke, holder.lease)
                return Freed.FREED
        deleted = operation.ask(self._gateway.delete, (key, token))
        if not deleted and not operation.doubt:
            return Freed.NOTHING
        return Freed.LEASE_LIVES if holder.lease else Freed.FREED

    def look(self, key: str) -> Holder | None:
        operation = Operation(self._timeout)
        holder = operation.read(self._gateway.find_holder, key)
        if not holder:
            self._cluster.require_one(operation.deadline)
        if not holder or not holder.lease:
            return holder
        found = operation.read(self._gateway.time_to_live, holder.lease)
        if not found:
            return None  # it ended meanwhile
        return holder._replace(ttl=found.left, granted_ttl=found.granted)

    def list_locks(self, prefix: str, after: str) -> Page:
        operation = Operation(self._timeout)
        self._cluster.require_one(operation.deadline)
        if not self._one_list.acquire(timeout=seconds_until(operation.deadline)):
            raise NotApplied("timed out behind others that list locks")
        try:
            return operation.read(self._gateway.list_locks, (prefix, after))
        finally:
            self._one_list.release()

    def _end_lease(self, operation: Operation, wanted: LockRequest, lease: int, ttl: int) -> bool:
        """Cleans up after an acquire that failed, in the background if need be: True if the lease
        is gone. One that the caller chose stays to its ttl: a repetition may have got the lock
        with it since."""
        if wanted.lease:
            return False
        try:
            operation.ask(self._gateway.revoke, lease)
        except StorageError:
            if self._doomed.qsize() < MAX_DOOMED:
                self._doomed.put((monotonic() + ttl, lease))
            return False
        return True

    def _end_one_doomed(self) -> bool:
        """Ends the leases that could not be ended at once one by one, so that a slow etcd is not
        made slower."""
        ends, lease = self._doomed.get()
        if monotonic() < ends:
            try:
                Operation(self._timeout).ask(self._gateway.revoke, lease)
            except StorageError:  # logged for the member, not for each try
                self._doomed.put((ends, lease))
                sleep(1)  # second, after a refusal that came at once
        return True


# == Combiner: one call for all that wait ========================================================
# A read costs etcd 407 µs of CPU alone and 13 µs as one of 64 in a call. So there is one call at a
# time, and who comes meanwhile gathers in a batch that shares the next call.
#
#     time      |   first call    |     second call     |    third call     |
#     ----------|-----------------|---------------------|-------------------|--->
#     batch 1   |  A calls        |  A leaves           |                   |
#     batch 2   |  B, C, D wait   |  B calls for B C D  |  B, C, D leave    |
#     batch 3   |                 |  E, F wait          |  E calls for E F  |  E, F leave
#
# A batch has one baton, a lock that its callers wait for. When A's call is back, A releases the
# baton of batch 2, and B gets it. B is the first, so it makes the call, in its own thread. Then B
# releases two: that of batch 3, for E to call, and its own. C gets that, finds its answer and
# releases it for D. To wake all at once makes them fight for the interpreter: 15 % fewer
# requests/s. While there is no call, the baton of the empty batch is free: A waits for nobody.


@dataclass(eq=False)
class _Entry(Generic[Item]):
    """One caller's question, and then its answer."""

    item: Item
    answer: Any = None  # or a StorageError; None: there is none


class _Batch(Generic[Item]):
    """Callers that share a call."""

    def __init__(self) -> None:
        self.entries: list[_Entry[Item]] = []
        self.room = 1.0  # of a call, what is not taken up
        self.has_started = False  # then nobody joins it or leaves it any more
        self.baton = threading.Lock()
        self.baton.acquire()


class Combiner(Generic[Item, Answer]):
    """Makes calls that carry the items of several callers.

    `call(items, deadline)` returns an answer for each in order; an exception among them is raised
    to its caller. `share(item)` is the part of a call that it takes up, at most 1 in all. An item
    only joins a call that has not started, so a read is never older than its request.
    """

    def __init__(
        self,
        call: Callable[[list[Item], float], Sequence[Answer | StorageError]],
        share: Callable[[Item], float],
    ) -> None:
        self._call = call
        self._share = share
        self._mutex = threading.Lock()  # owns who is in which batch, and which has started
        # Those that have not started. The first is next, the last takes later callers. Outside of
        # the mutex one call is under way, or the baton of the first is free or in a caller's hand.
        self._batches = collections.deque([_Batch[Item]()])
        self._batches[0].baton.release()

    def __call__(self, item: Item, deadline: float) -> Answer:
        """The answer to this item, by `deadline` (time.monotonic). Raises StorageError."""
        entry = _Entry(item)
        batch = self._take_part(entry, deadline)
        answer = entry.answer
        if isinstance(answer, Refused) and len(batch.entries) > 1:  # another may be to blame
            [answer] = self._call([item], deadline)
        if isinstance(answer, StorageError):
            # A copy: one that several threads raise collects the tracebacks of all.
            raise copy.copy(answer) from answer
        if answer is not None:
            return cast(Answer, answer)
        if entry in batch.entries:
            raise OutcomeUnknown("the call that it shared broke off, or takes too long")
        with self._mutex:
            batch.room += self._share(item)
        raise NotApplied("timed out behind others that wait for etcd")

    def _take_part(self, entry: _Entry[Item], deadline: float) -> _Batch[Item]:
        """Joins a batch, and leaves it with an answer or when the time is up."""
        batch = self._join(entry)
        has_baton = False
        hands_on = False  # whether it is for us to let the next batch start
        try:
            has_baton = batch.baton.acquire(timeout=seconds_until(deadline))
            if has_baton and not batch.has_started:  # only who has the baton can start it
                hands_on = True
                self._lead(batch, deadline)
        finally:  # makes no object and calls no function of ours: memory may have run out
            with self._mutex:
                if not batch.has_started:  # gives up; the baton may have come this very moment
                    batch.entries.remove(entry)
                    hands_on = hands_on or batch.baton.acquire(False)
                if hands_on:
                    while not self._batches[0].entries and len(self._batches) > 1:
                        self._batches.popleft()  # all of them gave up
                    self._batches[0].baton.release()
                if has_baton and batch.has_started:
                    batch.baton.release()
        return batch

    def _join(self, entry: _Entry[Item]) -> _Batch[Item]:
        share = self._share(entry.item)
        with self._mutex:
            batch = self._batches[-1]
            if batch.entries and batch.room < share:
                batch = _Batch()
                self._batches.append(batch)
            batch.room -= share
            batch.entries.append(entry)  # nothing behind it can fail: there is nothing to undo
            return batch

    def _lead(self, batch: _Batch[Item], deadline: float) -> None:
        """Makes the call of this batch, which is the first."""
        with self._mutex:
            if len(self._batches) == 1:
                self._batches.append(_Batch())
            self._batches.popleft()
            batch.has_started = True
        try:
            answers = self._call([entry.item for entry in batch.entries], deadline)
            # A list first: too few answers are nobody's.
            for entry, answer in list(zip(batch.entries, answers, strict=True)):
                entry.answer = answer
        except StorageError as fault:
            for entry in batch.entries:
                entry.answer = fault


# == Gateway: etcd's JSON gateway, in our words ==================================================
# Base64 and int64-as-text stop here. etcd's answers leave out fields that are zero, false or
# empty, and etcd ignores fields that it does not know: a typo in a compare would compare something
# else. 3.7 leaves the lease out of keys that are read without their values (etcd-io/etcd 22209).

MAX_OPERATIONS = 64  # in one transaction; etcd allows 128, nested ones counted in
MAX_BATCH_BYTES = 256 << 10  # of keys and values in one call; etcd's limit, in base64, is 1.5 MiB
MAX_KEEPALIVES = 64  # lines of at most 26 bytes in one POST: see _BLANKS
MAX_ANSWER_BYTES = 16 << 20  # most are below 1 MiB, but another's lease may have many keys
MAX_PAGE_BYTES = 512 << 10  # of a list, as etcd answers
GRPC_NOT_FOUND = 5
GRPC_DENIED = 7
GRPC_UNAVAILABLE = 14
GRPC_UNAUTHENTICATED = 16
# Codes that mean that nothing was applied, whichever member says it: invalid argument, not found,
# already exists, permission denied, resource exhausted, failed precondition, out of range,
# unimplemented, unauthenticated.
GRPC_REFUSALS = {3, 5, 6, 7, 8, 9, 11, 12, 16}
# etcd stops reading the lines of a stream once it starts to answer, and the rest is lost. Only
# what its decoder reads first is safe: 512 bytes, but 2,048 after 1,536 blanks, for which Go's
# json.Decoder doubles its buffer. Measured under load: 32 lines without the blanks, 832 of 19,200
# answers missing, 18 lines, none of 86,400; with them 64 and 76 lines, none in 600 calls each. A
# lone line is answered 6 % sooner without.
_SAFE_BYTES = 512
_BLANKS = " " * 1536
_to_json = json.JSONEncoder(separators=(",", ":")).encode
# What reading raises where an answer has another shape than etcd's.
NOT_ETCDS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class LeaseInfo(NamedTuple):
    """A live lease."""

    left: int  # seconds
    granted: int  # seconds
    keys: list[bytes]  # attached to it, with our prefix or another

    def is_ours(self) -> bool:
        """Whether it holds keys of ours, and nothing else."""
        prefix = KEY_PREFIX.encode()
        return self.keys != [] and all(name.startswith(prefix) for name in self.keys)


class Call(NamedTuple, Generic[Answer]):
    """What can be asked of etcd, and how its answer is read."""

    line: str  # method and path
    read: Callable[[Any], Answer]
    writes: bool = False
    doubtful: Callable[[Answer], bool] = lambda found: False  # see Session._try
    max_bytes: int = MAX_ANSWER_BYTES


Found = list[tuple[bytes, Holder]]  # by whole keys


def _read_locks(answer: Any) -> Found:
    locks = []
    for kv in answer.get("kvs", ()):
        value = binascii.a2b_base64(kv.get("value", "")).decode(errors="replace")
        holder = Holder(int(kv.get("lease", 0)), int(kv["create_revision"]), value)
        locks.append((binascii.a2b_base64(kv["key"]), holder))
    return locks


def _read_claim(answer: Any) -> int:
    """The fencing token; 0 where the key was not put."""
    if not answer.get("succeeded"):
        return 0
    return int(answer["responses"][0]["response_put"]["header"]["revision"])


def _read_ttls(answers: Any) -> dict[int, int]:
    """The ttl of each lease; 0: not found."""
    results = [answer["result"] for answer in answers if "result" in answer]
    return {int(result.get("ID", 0)): max(0, int(result.get("TTL", 0))) for result in results}


def _read_lease(answer: Any) -> LeaseInfo | None:
    left = int(answer.get("TTL", 0))
    keys = [binascii.a2b_base64(key) for key in answer.get("keys", ())]
    return LeaseInfo(left, int(answer.get("grantedTTL", 0)), keys) if left >= 0 else None


HELD = Call("POST /v3/kv/range", lambda answer: int(answer.get("count", 0)) > 0)
READ_LOCK = Call(
    "POST /v3/kv/range", lambda answer: (_read_locks(answer), bool(answer.get("more")))
)
READ_PAGE = READ_LOCK._replace(max_bytes=MAX_PAGE_BYTES)
GRANT = Call("POST /v3/lease/grant", lambda answer: int(answer["TTL"]), writes=True)
CLAIM = Call("POST /v3/kv/txn", _read_claim, writes=True)
DELETE = Call("POST /v3/kv/txn", lambda answer: bool(answer.get("succeeded")), writes=True)
REVOKE = Call("POST /v3/lease/revoke", lambda answer: None, writes=True)
KEEP_ALIVE = Call("POST /v3/lease/keepalive", _read_ttls, doubtful=lambda ttls: 0 in ttls.values())
TIME_TO_LIVE = Call("POST /v3/lease/timetolive", _read_lease, doubtful=lambda found: not found)
LOOK = Call("POST /v3/kv/range", lambda answer: int(answer["header"]["revision"]))
AUTHENTICATE = Call("POST /v3/auth/authenticate", lambda answer: str(answer["token"]))
ETCD_RELEASE = Call("GET /version", lambda answer: str(answer["etcdserver"]))


def part_of_call(size: int) -> float:
    """The part of a transaction that an operation with `size` characters takes up; each is at most
    4 bytes."""
    return max(1 / MAX_OPERATIONS, size * 4 / MAX_BATCH_BYTES)


class Gateway:
    """Calls to etcd's API. Each raises StorageError if it has no answer by `deadline`
    (time.monotonic). The client's session is ours, and finds the member to ask."""

    def __init__(self, session: Session) -> None:
        """Raises ImportError, or TypeError for an etcd3gw that takes no session."""
        import etcd3gw  # only here, so that the file runs without any package on the mock

        client: Any = etcd3gw.Etcd3Client  # its types know no session but requests'
        self._client = client(session=session, api_path="/v3/")
        self.session = session
        self._page = MAX_LOCKS_LISTED  # locks to list at once: twice of what could be read last

    def are_held(self, keys: list[str], deadline: float) -> list[bool]:
        """Whether each key exists, by one linearizable read."""
        reads = {key: {"key": to_base64(KEY_PREFIX + key), "count_only": True} for key in keys}
        held = self._transact(HELD, "range", reads, deadline)
        return [held[key] for key in keys]

    def find_holder(self, key: str, deadline: float) -> Holder | None:
        """Who holds the key, with its value, by a linearizable read."""
        locks, _ = self._ask(READ_LOCK, {"key": to_base64(KEY_PREFIX + key)}, deadline)
        return locks[0][1] if locks else None

    def list_locks(self, wanted: tuple[str, str], deadline: float) -> Page:
        """Of a prefix and the key to go on behind: the locks of one page, and whether there are
        more. Keys that are not UTF-8 are none of ours; a page of nothing else is skipped."""
        prefix, after = wanted
        first = (KEY_PREFIX + prefix).encode()
        end = first[:-1] + bytes([first[-1] + 1])  # UTF-8 has no 0xff
        if after:
            first = (KEY_PREFIX + after).encode() + b"\0"
        while True:
            found, more = self._read_page(first, end, deadline)
            locks = []
            for name, holder in found:
                with suppress(UnicodeDecodeError):
                    locks.append((name[len(KEY_PREFIX) :].decode(), holder))
            if locks or not more:
                return locks, more
            first = found[-1][0] + b"\0"

    def _read_page(self, first: bytes, end: bytes, deadline: float) -> tuple[Found, bool]:
        """One linearizable read of as many locks as fit into MAX_PAGE_BYTES; one always does."""
        limit = self._page
        while True:
            call = READ_PAGE if limit > 1 else READ_LOCK
            read = {"key": to_base64(first), "range_end": to_base64(end), "limit": limit}
            try:
                found = self._ask(call, read, deadline)
            except AnswerTooLarge:
                if limit == 1:
                    raise
                limit = max(1, limit // 8)
            else:
                self._page = min(limit * 2, MAX_LOCKS_LISTED)
                return found

    def grant(self, wanted: tuple[int, int], deadline: float) -> int:
        """Makes a lease of this ID and ttl, and returns the ttl that was granted; 0 where it
        exists already."""
        lease, ttl = wanted
        try:
            return self._ask(GRANT, {"ID": lease, "TTL": ttl}, deadline)
        except Refused as fault:
            if "lease already exists" in str(fault):
                return 0
            raise

    def claim(self, claims: list[LockRequest], deadline: float) -> list[int]:
        """Puts each key that nobody holds with its lease. Returns the fencing token of each, 0
        where the key is held. Of two claims for one key only the first is sent, since etcd refuses
        to put a key twice. Who holds a key that was not put is read later, where it matters: as a
        branch it cost every acquire 8 %."""
        txns = {}
        for claim in reversed(claims):
            key = to_base64(KEY_PREFIX + claim.key)
            nobody_holds_it = {"key": key, "target": "CREATE", "create_revision": 0}
            put = {"key": key, "value": to_base64(claim.value), "lease": claim.lease}
            txns[claim.key] = {"compare": [nobody_holds_it], "success": [{"request_put": put}]}
        tokens = self._transact(CLAIM, "txn", txns, deadline)
        return [tokens.pop(claim.key, 0) for claim in claims]

    def keep_alive(self, leases: list[int], deadline: float) -> list[int | StorageError]:
        """The renewed ttl of each lease, 0 where it is gone. Answers are matched by ID, since some
        may be missing."""
        lines = [{"ID": lease} for lease in dict.fromkeys(leases)]
        ttls = self._ask(KEEP_ALIVE, lines, deadline)
        cut_short = NotApplied("etcd cut its answer short", sick=False)
        return [ttls.get(lease, cut_short) for lease in leases]

    def time_to_live(self, lease: int, deadline: float) -> LeaseInfo | None:
        """What etcd knows of the lease; None where it is gone."""
        try:
            return self._ask(TIME_TO_LIVE, {"ID": lease, "keys": True}, deadline)
        except Refused as fault:
            if fault.code == GRPC_DENIED:  # it holds a key that our role may not read
                return LeaseInfo(0, 0, [b""])
            raise

    def revoke(self, lease: int, deadline: float) -> None:
        """Ends the lease; one that is gone already is as good. A claim with it that is still under
        way will fail."""
        try:
            self._ask(REVOKE, {"ID": lease}, deadline)
        except Refused as fault:
            if fault.code != GRPC_NOT_FOUND:
                raise

    def delete(self, wanted: tuple[str, int], deadline: float) -> bool:
        """Deletes the key if this is its fencing token; whether it was."""
        key = to_base64(KEY_PREFIX + wanted[0])
        is_same = {"key": key, "target": "CREATE", "create_revision": wanted[1]}
        txn = {"compare": [is_same], "success": [{"request_delete_range": {"key": key}}]}
        return self._ask(DELETE, txn, deadline)

    def _transact(
        self, call: Call[Answer], kind: str, operations: Mapping[str, Any], deadline: float
    ) -> dict[str, Answer]:
        """What `call` reads in the answer to each of these ranges or txns, in one transaction."""
        if len(operations) == 1:  # 20 µs less than a transaction of one
            return {key: self._ask(call, operations[key], deadline) for key in operations}

        def read(answer: Any) -> dict[str, Answer]:
            answers = zip(operations, answer["responses"], strict=True)
            return {key: call.read(found[f"response_{kind}"]) for key, found in answers}

        txn = {"success": [{f"request_{kind}": each} for each in operations.values()]}
        return self._ask(Call(CLAIM.line, read, call.writes), txn, deadline)

    def _ask(self, call: Call[Answer], payload: object, deadline: float) -> Answer:
        """etcd3gw hands all that it is given to Session.post(), and returns its json()."""
        return cast(Answer, self._client.post(call, json=payload, deadline=deadline))


def to_base64(text: str | bytes) -> str:
    """As bytes are written in JSON."""
    data = text.encode() if isinstance(text, str) else text
    return binascii.b2a_base64(data, newline=False).decode()


def to_body(payload: Any) -> bytes:
    """A payload in JSON; a list as JSON lines, as the keepalive takes them."""
    if not isinstance(payload, list):
        return _to_json(payload).encode()
    lines = _to_json(payload)[1:-1].replace("},{", "}{")  # 5 times as fast as line by line
    if len(lines) >= _SAFE_BYTES:
        lines = _BLANKS + lines
    return lines.encode()


def parse_answer(status: int, text: str, is_stream: bool = False) -> Any:
    """etcd's answer; of a stream, the list of its lines. Raises StorageError."""
    lines = text.strip().split("\n") if is_stream else [text]
    answers = []
    if status == 200:
        with suppress(ValueError, RecursionError):
            answers = json.loads(f"[{','.join(lines)}]")
    # Every answer of etcd has one of these; of many lines one may be an error.
    for line, answer in zip(lines, answers, strict=False):
        is_dict = isinstance(answer, dict)
        if not is_dict or not {"header", "result", "etcdserver"} & answer.keys():
            raise classify(status, line)
    if not answers:
        raise classify(status, text)
    return answers if is_stream else answers[0]


def classify(status: int, text: str) -> StorageError:
    """What an answer means that is none to the question; by gRPC code, since HTTP codes differ
    between etcd's releases. Shapes: {"error": M, "code": N} and, 3.6, {"message": M, "code": N};
    of a stream {"error": {"grpc_code": N, "message": M}} and, 3.6, {"error": {"code": N,
    "message": M}}; and plain text."""
    try:
        answer = json.loads(text)
        detail = answer["error"] if isinstance(answer.get("error"), dict) else answer
        code = int(detail.get("grpc_code", detail.get("code")))
        message = str(detail.get("message") or detail.get("error"))
    except (*NOT_ETCDS, RecursionError):
        line = " ".join(text[:1000].split())
        hint = ""
        if status == 404:
            hint = "; is the gateway on (--enable-grpc-gateway), and is this etcd?"
        if "CommonName" in line:
            hint = "; with etcd's auth enabled, the client certificate must have no CommonName"
        kind = NotApplied if 400 <= status < 500 else OutcomeUnknown
        return kind(f"HTTP {status}: {quote(line)}{hint}")
    if code in GRPC_REFUSALS:
        return Refused(message, code=code)
    if code == GRPC_UNAVAILABLE and "no leader" in message:
        return NotApplied(message)  # thanks to our header hasleader, before anything was done
    return OutcomeUnknown(message)  # timed out, leader changed, not a primary lessor, and others


# == Member: one question, one answer ============================================================

MAX_IDLE = 256  # connections kept open to one member
MAX_IDLE_SECONDS = 60  # an idle one is closed after it
FRESH_SECONDS = 0.1  # one that was in use within it has most likely not ended since
PAUSE_SECONDS = 0.1  # between two tries of one member that failed


class Link:
    """A connection to a member. After an error, or what was not asked for, it is closed."""

    def __init__(self, sock: socket.socket, member: Member) -> None:
        self.member = member
        self.cluster = ""  # the ID of the cluster it leads to
        self.is_reusable = True
        self.is_kept = False  # it was idle before it was asked
        self.idle_since = inf  # time.monotonic
        self.poll = select.poll()  # tells that it was closed, or that something was said unasked
        self.poll.register(sock, select.POLLIN)
        self._wire = Wire(sock)

    def close(self) -> None:
        self.is_reusable = False
        self._wire.sock.close()

    def ask(self, head: str, body: bytes, deadline: float, max_bytes: int) -> tuple[int, str]:
        """Sends a request and returns the status and the body of the answer. Raises
        StorageError."""
        wire = self._wire
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.is_reusable = False  # before its answer is read whole
        try:
            wire.send(request, deadline)
            data = wire.until(HEAD_END, deadline)
            status, headers = recall(parse_answer_head, data)
            text = wire.body(body_length(headers, max_bytes), max_bytes, deadline).decode()
        except (OSError, EOFError, HttpError, ValueError) as fault:
            raise self._broken(fault) from fault
        self.is_reusable = status == 200 and not wire.buffer and "connection" not in headers
        if status == http.HTTPStatus.REQUEST_TIMEOUT and self.is_kept:  # before it was asked
            raise OutcomeUnknown("it gave up the idle connection", sick=False)

        return status, text

    def _broken(self, fault: Exception) -> StorageError:
        """What it means that it broke while the member was asked."""
        text = reason(fault)
        has_ended = isinstance(fault, ConnectionError | EOFError | ssl.SSLError)
        if isinstance(fault, HttpError) and fault.status == 413:
            return AnswerTooLarge(text)
        if self.is_kept and has_ended and not self._wire.buffer:
            self.member.hang_up()  # it closed them while nobody asked: they are of the same age
            return OutcomeUnknown(text, sick=False)
        if self.cluster or self.member.was_well:  # it has answered before
            return OutcomeUnknown(text)
        if isinstance(fault, ssl.SSLEOFError | ssl.SSLZeroReturnError):  # as TLS 1.3 refuses us
            return OutcomeUnknown("TLS: it hung up; does it accept our certificate?")
        if has_ended and not self.member.endpoint.tls:
            text += "; is it https?"
        if has_ended or isinstance(fault, HttpError):
            text += "; does this port speak gRPC only (--listen-client-http-urls)?"
        return OutcomeUnknown(text)


class Member:
    """A member of etcd at one address: its idle connections, and its health as it was last seen.
    The cluster's mutex owns its health."""

    def __init__(self, endpoint: Address, host: str, name: str) -> None:
        self.endpoint = endpoint
        self.host = host  # an IP address; empty while the endpoint's name has none
        self.name = name

        self.fault: str | None = None  # None: it is well
        self.failed_at = -inf  # time.monotonic
        self.errors = 0
        self.was_well = False  # it has answered once
        self.was_told = False  # its failure is in the log
        self.looked_at = False  # at least once, or in vain
        self.is_new = True  # its first looks are not over
        self.look_anew_at = -inf  # over a new connection
        self.behind_since = inf  # it answers with a lower revision than before
        self._idle: list[Link] = []  # append and pop are atomic; the latest used goes first
        # Without a leader a member says so at once, and has not applied the call (etcd-io/etcd
        # 10819).
        self.headers = f"Host: {endpoint}\r\nContent-Type: application/json\r\n"
        self.headers += "Grpc-Metadata-hasleader: true\r\n"

    def take_idle(self, cluster_id: str) -> Link | None:
        """A kept connection to this cluster (empty: to any), if one can be used."""
        while True:
            try:
                link = self._idle.pop()
            except IndexError:
                return None
            link.is_kept = True
            # Each system call lets 150 threads fight for Python: none just after the last use.
            is_fresh = monotonic() < link.idle_since + FRESH_SECONDS
            if cluster_id in ("", link.cluster) and (is_fresh or not link.poll.poll(0)):
                return link
            link.close()

    def give_back(self, link: Link, at_most: int = MAX_IDLE) -> None:
        """Keeps a connection that can still be used, unless so many are kept already."""
        if link.is_reusable and len(self._idle) < at_most:
            link.idle_since = monotonic()
            self._idle.append(link)
        else:
            link.close()

    def hang_up(self, unused_since: float = inf) -> None:
        """Closes the kept connections that were not used since then; by default all."""
        with suppress(IndexError):  # none is left
            while self._idle[0].idle_since < unused_since:
                self._idle.pop(0).close()

    def connect(self, tls: Renewed[ssl.SSLContext] | None, deadline: float) -> Link:
        """A new connection. Raises NotApplied."""
        try:
            if not self.host:
                raise ValueError("its name has no address")
            address = (self.host, self.endpoint.port)
            sock = socket.create_connection(address, seconds_until(deadline))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls and self.endpoint.tls:
                sock.settimeout(seconds_until(deadline))
                name = self.endpoint.host.rstrip(".").partition("%")[0]
                sock = tls.get().wrap_socket(sock, server_hostname=name)
            sock.settimeout(None)
        except (OSError, ValueError) as fault:
            ours = getattr(fault, "errno", None) in OWN_SHORTAGES
            if ours:
                sleep(PAUSE_SECONDS)
            raise NotApplied(reason(fault), sick=not ours) from fault
        return Link(sock, self)


@functools.lru_cache(maxsize=256)  # the answers of one second are alike
def parse_answer_head(data: bytes) -> tuple[int, Mapping[str, str]]:
    """The status and the headers of an answer. Raises HttpError."""
    line, *header_lines = data.decode("latin-1").split("\r\n")
    match = re.match(r"HTTP/1\.[01] ([0-9]{3})", line)
    if not match:
        raise HttpError(f"not HTTP: {quote(line)}")
    return int(match[1]), parse_headers(header_lines)


# == Cluster: which members there are, and whose they are ========================================
# A list that leads to two clusters makes two replicas lend one lock twice: one was rebuilt with an
# empty disk, a name has moved, a balancer has both behind it. So the process belongs to the first
# cluster that it grants a lock in, and grants nothing while it has met another one lately. A look
# finds out which cluster a connection leads to (note_look). Then three guards: no connection to
# another cluster is used (_take_link), bind() stands before each grant, and require_one() before
# each acquire and whatever would say "free" or "gone".

FORGET_SECONDS = 60  # another cluster that was not met for so long …
FORGET_LOOKS = 60  # … nor by so many looks over new connections is not known any more


@dataclass
class Meeting:
    """A cluster that a look has met."""

    member: str  # where it was met last
    at: float  # when: time.monotonic
    missed: int = 0  # looks over new connections that have met another one since


class ForeignCluster(NotApplied):
    """The member is of another cluster than ours."""


class Cluster:
    """The members in the order in which they are asked, their health, and the clusters that were
    met. The first member serves until it fails; then it becomes the last."""

    def __init__(self, endpoints: Iterable[Address], metrics: Metrics) -> None:
        self.id = ""  # of ours, for life; empty before the first grant
        self.members: tuple[Member, ...] = ()  # replaced, never changed
        self.conflict = ""  # while two clusters are known: what to say, and do, about it
        self.first_looks_end = inf  # grants wait for the first looks, but not longer
        self.revision = 0  # the highest that our cluster has answered, or the only one known
        self._mutex = threading.Lock()  # owns all between here and the sources, and members' health
        self._meetings: dict[str, Meeting] = {}  # by the ID of the cluster
        self._unresolved = set(endpoints)
        metrics.sources.append(self._samples)

    def require_one(self, deadline: float) -> None:
        """Waits for the first looks, but no longer than first_looks_end. Raises Refused while two
        clusters are known."""
        while monotonic() < min(deadline, self.first_looks_end):
            if not self._unresolved and all(member.looked_at for member in self.members):
                self.first_looks_end = -inf
            else:
                sleep(0.01)
        if self.conflict:
            raise Refused(self.conflict)

    def bind(self, cluster_id: str) -> None:
        """Before a grant in this cluster: from now on it is ours. Raises Refused, or
        ForeignCluster."""
        if self.id == cluster_id and not self.conflict:
            return
        with self._mutex:
            if self.conflict:
                raise Refused(self.conflict)
            self.id = self.id or cluster_id
            if self.id != cluster_id:
                raise ForeignCluster("it is of another cluster")

    def pick(self, deadline: float) -> Member:
        """The first member, which is sick only if all are: then after a pause. Raises
        NotApplied."""
        while True:
            now = monotonic()
            first = next(iter(self.members), None)
            if first and (first.fault is None or first.failed_at + PAUSE_SECONDS <= now < deadline):
                return first
            if now >= deadline:
                text = f"{first.name}: {first.fault}" if first else "no address is known yet"
                raise NotApplied(text)
            sleep(min(PAUSE_SECONDS / 4, deadline - now))

    def note_look(
        self, member: Member, cluster_id: str, revision: int, before: int, is_new: bool
    ) -> None:
        """What a look has met, over a new connection or a kept one; `before` is the revision that
        was known when it was sent. Raises ForeignCluster."""
        now = monotonic()
        with self._mutex:
            met = Meeting(member.name, now)
            self._meetings[cluster_id] = met
            if is_new:
                self._miss_others(met)
            self._note_conflict()
            if self.id not in ("", cluster_id):
                raise ForeignCluster(f"it is of another cluster, {cluster_id}")
            if self.conflict and not self.id:
                self.revision = 0  # of which of them?
            before = min(before, self.revision)  # that it went back has been told meanwhile
            is_behind = revision < before
            # One look may be stale; two, a second apart, are not.
            went_back = is_behind and now - member.behind_since >= LOOK_SECONDS * 0.9
            if is_behind and not went_back:
                member.behind_since = min(member.behind_since, now)
            else:
                member.behind_since = inf
                self.revision = revision if went_back else max(self.revision, revision)
        if went_back:
            text = "etcd went back: fencing tokens repeat"
            event(ERROR, text, member=member.name, revision=revision, before=before)

    def note_revision(self, revision: int) -> None:
        """What our cluster has answered; what two threads lose, a later answer repeats."""
        self.revision = max(self.revision, revision)

    def _miss_others(self, met: Meeting) -> None:
        for cluster_id, other in list(self._meetings.items()):
            if other is not met and cluster_id != self.id:
                other.missed += 1
                if other.missed >= FORGET_LOOKS and met.at - other.at >= FORGET_SECONDS:
                    del self._meetings[cluster_id]

    def _note_conflict(self) -> None:
        before = self.conflict
        self.conflict = ""
        if len(self._meetings) > 1:
            met = sorted(self._meetings.items(), key=lambda item: item[0] != self.id)
            one, two = [f"{where.member} is of cluster {one}" for one, where in met[:2]]
            self.conflict = f"two clusters of etcd: {one}, {two}; mend the list of members, or"
            self.conflict += " restart shared-lock to accept the new cluster"
        if self.conflict and not before:
            event(ERROR, "another cluster is known, nothing is granted", reason=self.conflict)
        if before and not self.conflict:
            event(INFO, "one cluster is known again")

    def mark_well(self, member: Member) -> None:
        """It has answered."""
        if member.was_well and member.fault is None:
            return
        with self._mutex:
            was_told = member.was_told
            member.fault = None
            member.was_well = True
            member.was_told = False
            self.members = tuple(sorted(self.members, key=lambda one: one.fault is not None))
        if was_told:
            event(INFO, "etcd member is well again", member=member.name)

    def mark_sick(self, member: Member, fault: StorageError) -> None:
        """It has failed, and becomes the last that is asked."""
        member.hang_up()
        # Another cluster is told as such.
        is_expected = isinstance(fault, ForeignCluster) or self._is_spare(member)
        with self._mutex:
            is_news = not is_expected and not member.was_told
            member.was_told = member.was_told or is_news
            member.errors += 1
            member.fault = str(fault)
            member.failed_at = monotonic()
            self.members = tuple(sorted(self.members, key=lambda one: one is member))
        level = WARNING if is_news else DEBUG
        event(level, "etcd member failed", member=member.name, reason=fault)

    def update(self, endpoint: Address, hosts: set[str]) -> list[Member]:
        """Makes a member of each address of the endpoint's name, and returns the new ones. Where
        the name has none, or could not be looked up, all stays as it is."""
        with self._mutex:
            known = {one.host for one in self.members if one.endpoint == endpoint}
            hosts = hosts or known or {""}
            members = [one for one in self.members if one.endpoint != endpoint or one.host in hosts]
            added = []
            for host in hosts - known:
                address = endpoint if len(hosts) == 1 else endpoint._replace(host=host)
                added.append(Member(endpoint, host, address.url()))
                # Anywhere: replicas that start together do not all begin with the same.
                members.insert(random.randint(0, len(members)), added[-1])
            self.members = tuple(members)
            self._unresolved.discard(endpoint)
        return added

    def _is_spare(self, member: Member) -> bool:
        """Whether it is localhost's ::1, where nobody listens beside 127.0.0.1: no news."""
        beside = [one.host for one in self.members if one.endpoint == member.endpoint]
        return member.host == "::1" and "127.0.0.1" in beside and not member.was_well

    def _samples(self) -> Samples:
        found: Samples = {"shared_lock_etcd_foreign_cluster": int(bool(self.conflict))}
        for one in self.members:
            if not self._is_spare(one):
                is_up = one.was_well and one.fault is None
                found[sample("shared_lock_etcd_member_up", member=one.name)] = int(is_up)
                found[sample("shared_lock_etcd_errors_total", member=one.name)] = one.errors
        return found


# == Session: how long a try may take, and whether its answer is believed ========================

LOOK_SECONDS = 1.0  # between two looks at a member, and between two log-ins that are refused
NEW_LOOK_SECONDS = 10.0  # between two looks over new connections, and two look-ups of a name
FIRST_LOOKS = 8  # over new connections: of a balancer's two clusters one hides once in 128
NOBODYS_KEY = {"key": to_base64(KEY_PREFIX)}  # what a look reads, linearizably

# Before these (3.4.42, 3.5.28, 3.6.9) a member that was frozen renews or reads what is stale.
GOOD_RELEASES: dict[tuple[int, ...], int] = {(3, 4): 42, (3, 5): 28, (3, 6): 9}


class Session:
    """What etcd3gw takes for requests' session: each post is one try on one member. (requests
    takes 0.7 ms of CPU a call, not 0.08, and one host.)"""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        endpoints = set(config.etcd_addr_list)
        self.cluster = Cluster(endpoints, metrics)
        self._endpoints = endpoints
        self._timeout = config.etcd_timeout
        self._tls: Renewed[ssl.SSLContext] | None = None
        if any(one.tls for one in endpoints):
            names = ("ca_cert_path", "client_cert_path", "client_key_path")
            self._tls = tls_context(config, ssl.Purpose.SERVER_AUTH, *names)
        self._login = Login(config.etcd_username, config.etcd_password)
        self._usual: dict[bool, float] = {}  # whether it writes: the seconds that a call takes

    def start(self) -> None:
        """Begins to look after the members."""
        self.cluster.first_looks_end = monotonic() + self._timeout / 2
        for endpoint in self._endpoints:
            keep_running(f"name-{endpoint}", functools.partial(self._follow_name, endpoint))

    def post(
        self, call: Call[Answer], *, json: Any, deadline: float, timeout: object = None
    ) -> types.SimpleNamespace:
        """Asks one member for as long as a try may take, and answers with what the call reads in
        its answer. Raises StorageError."""
        member = self.cluster.pick(deadline)
        # Seconds for one try. Only a timeout gives a frozen member away, so each may take a part of
        # the time; and a slow etcd is not a sick one, so it may take as long as three calls took
        # lately. A write takes at least as long as a read.
        usual = max(self._usual.get(False, 0), self._usual.get(call.writes, 0))
        share = max(self._timeout / (len(self.cluster.members) + 1), 3 * usual)
        found = self._try(member, call, json, deadline, share)
        return types.SimpleNamespace(status_code=200, json=lambda: found)

    def _try(
        self,
        member: Member,
        call: Call[Answer],
        payload: Any,
        deadline: float,
        share: float,
        anew: bool = False,
    ) -> Answer:
        """Asks this member for `share` seconds at most, over a kept connection or a new one.

        What the call finds doubtful is only believed after a linearizable read over the same
        connection: a member that was frozen says for some milliseconds that leases are gone which
        are alive."""
        until = min(monotonic() + share, deadline)
        login = self._login.header
        try:
            link = self._take_link(member, until, anew)
            try:
                if call is GRANT:
                    self.cluster.bind(link.cluster)
                found = self._exchange(link, call, payload, until)
                if call.doubtful(found):
                    self._exchange(link, LOOK, NOBODYS_KEY, until)
                    self.cluster.require_one(until)  # of two, only one knows the lease
                    found = self._exchange(link, call, payload, until)
            finally:
                member.give_back(link, 1 if anew else MAX_IDLE)  # not one for each look
        except StorageError as fault:
            raise self._judge(member, fault, login, until, deadline) from fault
        self.cluster.mark_well(member)
        return found

    def _take_link(self, member: Member, until: float, anew: bool) -> Link:
        """The first question on a new connection is a look: one that leads to another cluster is
        never used. An error here has changed nothing."""
        kept = None if anew else member.take_idle(self.cluster.id)
        if kept:
            return kept
        link = member.connect(self._tls, until)
        try:
            self._exchange(link, LOOK, NOBODYS_KEY, until)
        except BaseException as fault:
            link.close()
            if isinstance(fault, OutcomeUnknown):
                raise NotApplied(str(fault), fault.sick) from fault
            raise
        return link

    def _exchange(self, link: Link, call: Call[Answer], payload: Any, until: float) -> Answer:
        """What the call reads in the answer to one question; the cluster hears of it."""
        before = self.cluster.revision
        started = monotonic()
        if started >= until:
            raise NotApplied("no time was left to ask it", sick=False)
        head = f"{call.line} HTTP/1.1\r\n{link.member.headers}{self._login.header}"
        status, text = link.ask(head, to_body(payload), until, call.max_bytes)
        took = monotonic() - started
        usual = self._usual.get(call.writes, took)
        self._usual[call.writes] = usual + (took - usual) / 4  # a running mean
        answer = parse_answer(status, text, isinstance(payload, list))
        try:
            first = answer[0]["result"] if isinstance(answer, list) else answer
            header = first.get("header", {})  # the answer to /version has none
            cluster_id = str(int(header.get("cluster_id", link.cluster or 0)))
            revision = int(header.get("revision", 0))
            found = call.read(answer)
        except NOT_ETCDS as fault:
            link.close()
            raise OutcomeUnknown(f"its answer is not etcd's: {quote(text)}") from fault
        is_new = not link.cluster
        link.cluster = link.cluster or cluster_id
        if link.cluster != cluster_id:  # a proxy that shares it among two clusters
            link.close()
            with suppress(ForeignCluster):
                self.cluster.note_look(link.member, cluster_id, 0, 0, is_new=True)
            raise OutcomeUnknown(f"it answers for another cluster, too, {cluster_id}")
        if call is LOOK:
            self.cluster.note_look(link.member, cluster_id, revision, before, is_new)
        if call.writes:
            self.cluster.note_revision(revision)
        return found

    def _judge(
        self, member: Member, fault: StorageError, login: str, until: float, deadline: float
    ) -> StorageError:
        """What a try that failed says of the member, and whether a log-in helps: the error to
        raise, which names the member."""
        verdict = fault
        if self._login.is_wanted_after(fault):
            log_in = functools.partial(self._log_in, member, until)
            verdict = self._login.renew(login, log_in, until)
        if verdict.sick and monotonic() < deadline:  # that of the caller tells nothing of a member
            self.cluster.mark_sick(member, verdict)
        return type(verdict)(f"{member.name}: {verdict}", verdict.sick, verdict.code)

    def _log_in(self, member: Member, until: float) -> str:
        link = member.connect(self._tls, until)
        try:
            return self._exchange(link, AUTHENTICATE, self._login.credentials, until)
        finally:
            link.close()

    def _follow_name(self, endpoint: Address) -> bool:
        """Keeps the members at what the endpoint's name says now. In a thread of its own, since a
        name server that does not answer holds getaddrinfo() for long."""
        hosts: set[str] = set()
        with suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
            hosts = {str(info[4][0]) for info in found}
        for member in self.cluster.update(endpoint, hosts):
            keep_running(f"look-{member.name}", functools.partial(self._look_after, member))
        again_at = monotonic() + NEW_LOOK_SECONDS
        while monotonic() < again_at:
            sleep(LOOK_SECONDS)
            if any(one.fault for one in self.cluster.members if one.endpoint == endpoint):
                break
        return True

    def _look_after(self, member: Member) -> bool:
        """Looks at the member once a second, now and then over a new connection."""
        if member not in self.cluster.members:
            member.hang_up()
            return False
        now = monotonic()
        member.hang_up(now - MAX_IDLE_SECONDS)
        anew = bool(self.cluster.conflict) or member.is_new or now >= member.look_anew_at
        if anew:
            member.look_anew_at = now + NEW_LOOK_SECONDS
        with suppress(StorageError):  # noted at the member
            for _ in range(FIRST_LOOKS if member.is_new else 1):
                self._try(member, LOOK, NOBODYS_KEY, inf, self._timeout, anew)
            if member.is_new:
                member.is_new = False
                self._check_release(member)
        member.looked_at = True
        sleep(LOOK_SECONDS)
        return True

    def _check_release(self, member: Member) -> None:
        """Warns of releases that renew, or read, what is stale after a freeze."""
        release = self._try(member, ETCD_RELEASE, {}, inf, self._timeout)[:40]
        numbers = [int(number) for number in re.findall("[0-9]{1,6}", release)]
        at_least = GOOD_RELEASES.get(tuple(numbers[:2]), 0)
        if numbers[:2] < [3, 4] or numbers[2:3] < [at_least]:
            text = "etcd release with defects in leases"
            better = "3.5.28, 3.6.9 or newer"
            event(WARNING, text, member=member.name, release=release, better=better)


class Login:
    """The token of an etcd with auth enabled, which ends at etcd's discretion: one log-in for all
    callers."""

    def __init__(self, name: str, password: str) -> None:
        self.credentials = {"name": name, "password": password}
        self.header = ""  # empty before the first log-in
        self._mutex = threading.Lock()  # held during a log-in; only its holder writes what is here
        self._refusal: Refused | None = None
        self._again_at = -inf

    def is_wanted_after(self, fault: StorageError) -> bool:
        """Whether etcd asks for a log-in with this error."""
        asks = re.search("user name is empty|auth store is old", str(fault))
        is_asked = bool(asks) or fault.code == GRPC_UNAUTHENTICATED
        return is_asked and self.credentials["name"] != ""

    def renew(self, used: str, log_in: Callable[[], str], deadline: float) -> StorageError:
        """Logs in, unless another caller did since `used`. Returns what to raise: an error to try
        again after, or etcd's refusal, which stands for LOOK_SECONDS."""
        if not self._mutex.acquire(timeout=seconds_until(deadline)):
            return NotApplied("timed out behind a log-in", sick=False)
        try:
            if self.header == used and monotonic() > self._again_at:
                self.header = ""  # etcd 3.4 refuses an old one even here
                self.header = f"Authorization: {log_in()}\r\n"
                self._refusal = None
        except Refused as refusal:
            if self._refusal is None:
                event(WARNING, "etcd log-in refused", reason=refusal)
            self._refusal = refusal
            self._again_at = monotonic() + LOOK_SECONDS
        except StorageError as fault:  # what asked for the log-in was not applied
            return NotApplied(str(fault), fault.sick)
        finally:
            self._mutex.release()
        return copy.copy(self._refusal) or NotApplied("logged in again", sick=False)


def open_storage(config: Config, metrics: Metrics) -> Storage:
    """The configured storage, with the cache in front where it is wanted. Raises ConfigError."""
    storage: Storage = MemoryStorage()
    if config.storage_type == "etcd":
        try:
            storage = EtcdStorage(Gateway(Session(config, metrics)), config.etcd_timeout)
        except (ImportError, TypeError) as fault:
            needs = "etcd needs `pip install 'etcd3gw>=2.6.0'`"
            raise ConfigError(f"{variable('storage_type')}: {needs}: {fault}") from fault
    return Cache(storage, config.cache_size, metrics) if config.cache_enabled else storage


# == Metrics =====================================================================================

LEASES = "shared_lock_lease_operations_total"
CACHE = "shared_lock_cache_operations_total"
GRANTS = "shared_lock_lease_grant_duration_seconds"
REQUESTS = "shared_lock_http_requests_total"
FAMILIES = {
    LEASES: ("counter", "Operations on locks."),
    GRANTS: ("histogram", "Time to answer a POST /lease with 201 or 202, without that in line."),
    CACHE: ("counter", "Uses of the cache."),
    REQUESTS: ("counter", "Requests that were answered."),
    "shared_lock_etcd_member_up": ("gauge", "1 while the member answers a linearizable read."),
    "shared_lock_etcd_errors_total": ("counter", "Calls that a member of etcd failed."),
    "shared_lock_etcd_foreign_cluster": ("gauge", "1 while another cluster is known."),
    "shared_lock_waiting": ("gauge", "Callers that wait for a lock."),
    "shared_lock_log_lines_dropped_total": ("counter", "Lines that nobody read in time."),
    "shared_lock_build_info": ("gauge", "The version that runs."),
    "process_start_time_seconds": ("gauge", "Start, in seconds since 1970."),
    "process_cpu_seconds_total": ("counter", "CPU time, of user and system."),
    "process_resident_memory_bytes": ("gauge", "Resident memory."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_max_fds": ("gauge", "How many file descriptors may be open."),
}
_STARTED_SECONDS = time.time()
Samples = dict[str, float]  # as a page shows them: the number of each


@functools.lru_cache(maxsize=1024)
def sample(name: str, **labels: object) -> str:
    """A sample's name and labels, as they stand in Prometheus' text format 0.0.4."""
    quoted = {label: json.dumps(str(value), ensure_ascii=False) for label, value in labels.items()}
    return f"{name}{{{','.join(f'{label}={value}' for label, value in quoted.items())}}}"


# Operations are counted under short names, "release success", and shown from the start.
OPERATIONS = {
    f"{operation} {status}": sample(family, operation=operation, status=status)
    for family, operation, statuses in (
        (LEASES, "get", "created accepted error"),
        (LEASES, "prolong", "success failure error"),
        (LEASES, "release", "success failure error"),
        (CACHE, "get", "hit miss expired"),
        (CACHE, "set", "success update"),
        (CACHE, "evict", "size_limit"),
    )
    for status in statuses.split()
}
GRANT_BOUNDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8]  # seconds
_BUCKETS = [
    sample(f"{GRANTS}_bucket", operation="get", le=bound) for bound in [*GRANT_BOUNDS, "+Inf"]
]
_SUM = sample(f"{GRANTS}_sum", operation="get")
_COUNT = sample(f"{GRANTS}_count", operation="get")


class Metrics:
    """Numbers by sample, under the Go service's names. No key, value or lease is a label.
    `sources` are asked for theirs when a page is made."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # owns the numbers
        self._numbers: Samples = dict.fromkeys([*OPERATIONS, *_BUCKETS, _SUM], 0)
        self.sources: list[Callable[[], Samples]] = [_process_samples]

    def count(self, counted: str) -> None:
        """One more of this sample, or of these OPERATIONS."""
        with self._mutex:
            self._numbers[counted] = self._numbers.get(counted, 0) + 1

    def observe_grant(self, status: str, seconds: float) -> None:
        """A POST /lease that the storage answered within so many seconds."""
        bucket = _BUCKETS[bisect.bisect_left(GRANT_BOUNDS, seconds)]  # each counts by itself
        with self._mutex:
            self._numbers[f"get {status}"] += 1
            self._numbers[bucket] += 1
            self._numbers[_SUM] += seconds

    def render(self) -> str:
        """All samples in Prometheus' text format 0.0.4."""
        with self._mutex:
            numbers = {OPERATIONS.get(name, name): n for name, n in self._numbers.items()}
        sums = itertools.accumulate([numbers[bucket] for bucket in _BUCKETS])
        numbers |= zip(_BUCKETS, sums, strict=True)
        numbers[_COUNT] = numbers[_BUCKETS[-1]]
        for source in self.sources:
            numbers |= source()
        page = ""
        for family, (kind, meaning) in FAMILIES.items():
            samples = [
                f"{name} {value}\n" for name, value in numbers.items() if name.startswith(family)
            ]
            if samples:
                page += f"# HELP {family} {meaning}\n# TYPE {family} {kind}\n" + "".join(samples)
        return page


def _process_samples() -> Samples:
    found = {
        "shared_lock_log_lines_dropped_total": log.dropped,
        sample("shared_lock_build_info", version=VERSION): 1,
        "process_start_time_seconds": _STARTED_SECONDS,
        "process_cpu_seconds_total": time.process_time(),
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    with suppress(OSError):  # no /proc, or no descriptor left for it
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        found["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        found["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    return found


# == Profiles: what `go tool pprof` opens ========================================================
# Only for SHARED_LOCK_PPROF_ENABLED, and at no cost before one is asked for.

Stack = tuple[tuple[str, str, int], ...]  # function, file, line; innermost first
_one_at_a_time = threading.Lock()


def cpu_profile(request: Request) -> Response:
    """The CPU profile of `?seconds=N`; a second one meanwhile is 503."""
    try:
        seconds: int = between(1, 300, whole)(_query(request).get("seconds", "30"))
    except ValueError as fault:
        raise HttpError(f"seconds: {fault}") from fault
    if not _one_at_a_time.acquire(blocking=False):
        raise HttpError("a profile is being made already: one at a time", 503)
    try:
        return _pprof("cpu", "nanoseconds", _sample_stacks(seconds), seconds)
    finally:
        _one_at_a_time.release()


def _sample_stacks(seconds: int) -> Mapping[Stack, int]:
    """CPU time by stack, in nanoseconds. A sample of a thread's stack weighs what the thread used
    since the last. The sampler needs the interpreter, too, so it sees each thread where it lets go
    of that, mostly in a system call: the sums by caller (pprof's cum) are right, the innermost
    function (flat) is not."""
    samples: collections.Counter[Stack] = collections.Counter()
    before = _cpu_nanos()
    ends = monotonic() + seconds
    while monotonic() < ends:
        sleep(0.01)
        used = _cpu_nanos()
        frames = sys._current_frames()
        for thread, nanos in used.items():
            since = nanos - before.get(thread, 0)
            if since > 0 and thread.ident in frames:
                samples[_stack(frames[thread.ident])] += since
        before = used
    return samples


def _cpu_nanos() -> dict[threading.Thread, int]:
    used = {}
    for thread in threading.enumerate():
        # The number of its clock as glibc makes it of the kernel's ID (CPUCLOCK_PERTHREAD, SCHED):
        # time.pthread_getcpuclockid() may crash on a thread that has ended.
        clock = ~(thread.native_id or 0) << 3 | 6
        with suppress(OSError):  # it has just ended
            used[thread] = time.clock_gettime_ns(clock)
    return used


def thread_stacks(request: Request) -> Response:
    """Every thread's stack: as text with ?debug=1 or 2, else for pprof."""
    stacks = {ident: _stack(frame) for ident, frame in sys._current_frames().items()}
    if _query(request).get("debug", "0") == "0":
        return _pprof("threads", "count", collections.Counter(stacks.values()))
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    text = ""
    for ident, stack in stacks.items():
        text += f"{names.get(ident, '?')}:\n"
        for function, file, line in stack:
            text += f"  {function} at {file}:{line}\n"
    return Response(200, text.encode())


def _stack(frame: types.FrameType) -> Stack:
    walk = traceback.walk_stack(frame)
    return tuple((one.f_code.co_qualname, one.f_code.co_filename, line) for one, line in walk)


class _Numbered(dict[Any, int]):
    """Numbers each new key, from 1."""

    def __missing__(self, key: object) -> int:
        return self.setdefault(key, len(self) + 1)


def _pprof(kind: str, unit: str, samples: Mapping[Stack, int], seconds: int = 0) -> Response:
    """A gzipped profile.proto (github.com/google/pprof/proto/profile.proto); the numbers are its
    fields'."""
    import gzip

    strings = _Numbered()  # from 1: the first in the file is empty
    places = _Numbered()
    out = _field(1, _field(1, strings[kind]) + _field(2, strings[unit]))
    for stack, value in samples.items():
        locations = b"".join(_field(1, places[place]) for place in stack)
        out += _field(2, locations + _field(2, value))
    for (function, file, line), number in places.items():  # pprof merges functions by their names
        same = _field(1, number)
        out += _field(4, same + _field(4, same + _field(2, line)))
        out += _field(5, same + _field(2, strings[function]) + _field(4, strings[file]))
    for text in ["", *strings]:
        out += _field(6, text.encode())
    out += _field(9, time.time_ns()) + _field(10, seconds * 10**9)
    return Response(200, gzip.compress(out), "application/octet-stream")


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message; bytes are text or another message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    more = value >> 7
    return bytes([value & 0x7F | 0x80]) + _varint(more) if more else bytes([value])


PROFILES: dict[str, Handler] = {
    "": lambda request: Response(200, b"profile?seconds=30\ngoroutine?debug=2\n"),
    "profile": cpu_profile,
    "goroutine": thread_stacks,
}


# == Life of the process: start, serve, stop =====================================================

TWICE_SECONDS = 0.5  # within it a second signal is the first one again: some wrappers send two
MALLOC = {-3: 64 << 10, -1: 128 << 10}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; bytes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """What the signals said."""

    def __init__(self) -> None:
        self.first_at = inf  # time.monotonic; none came
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        now = monotonic()
        if now >= self.first_at + TWICE_SECONDS:
            os._exit(128 + number)
        self.first_at = min(self.first_at, now)


def be_quick() -> None:
    """Only one thread runs Python at a time, and to hand over to one on another CPU takes longer
    than what that does then: on one CPU of 2, 150 connections get 25,600 refusals/s instead of
    12,600, and 1.4 times the keepalives. The CPU is a random one: the kernel moves others away,
    but not another such daemon."""
    # Seconds. Among short bursts a forced switch only delays: without this, p99 of refusals is 56
    # to 84 ms, not 42.
    sys.setswitchinterval(0.02)
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})


def keep_little_memory() -> None:
    """glibc keeps most of what a crowd once needed, below thresholds that grow with its blocks;
    with fixed ones it gives that back."""
    with suppress(ImportError, OSError, AttributeError):  # another libc
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in MALLOC.items():
            mallopt(parameter, value)


def serve(config: Config) -> int:
    """Runs the daemon until a signal; returns the exit status. Raises ConfigError."""
    stop = Stop()
    log.debug = config.debug
    be_quick()
    keep_little_memory()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # the soft limit is often 1,024
    with suppress(OSError, ValueError):  # not allowed: as many as before
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    metrics = Metrics()
    api = Api(LockService(open_storage(config, metrics), metrics), metrics, config)
    try:
        server = Server(config, api)
    except (OSError, UnicodeError) as fault:
        of_host = errno.EADDRNOTAVAIL, errno.EINVAL, None  # None: a UnicodeError
        if isinstance(fault, socket.gaierror) or getattr(fault, "errno", None) in of_host:
            host = quote(config.server_host)
            text = f"{variable('server_host')}: not an address of this machine: {host}"
            raise ConfigError(text) from fault
        print(f"shared-lock: port {config.server_port}: {reason(fault)}", file=sys.stderr)
        return 1
    tell_start(config, server)
    api.service.storage.start()
    while stop.first_at == inf:
        server.handle_request()
        log.tell_tallies()
    event(INFO, "stopping")
    server.stop(config.server_shutdown_timeout)
    event(INFO, "stopped")
    for number in STOP_SIGNALS:  # else the interpreter's end would let a second one kill it
        signal.signal(number, signal.SIG_IGN)
    return 0


def tell_start(config: Config, server: Server) -> None:
    """The first line of the log, and a warning for each variable that is most likely a slip."""
    shown: dict[str, object] = {"storage": config.storage_type}
    if config.storage_type == "etcd":
        shown["members"] = ",".join(address.url() for address in config.etcd_addr_list)
    shown["tls"] = "yes" if config.server_cert_path else "no"
    needs = {"token": config.server_token_path, "certificate": config.server_client_ca_path}
    shown["callers_need"] = "+".join(name for name, path in needs.items() if path) or "nothing"
    address = Address(*server.socket.getsockname()[:2])
    event(INFO, "serving", version=VERSION, address=address, **shown)
    for name in unknown_variables(os.environ):
        event(WARNING, "unknown variable", variable=name, hint="see --help")
    for name in config.unused_files():
        event(WARNING, "file is not used", variable=name, hint="it is for https:// endpoints")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    epilog = "environment:\n"
    for one in fields(Config):
        line = f"  {variable(one.name):<36} {one.metadata['meaning']} [{one.metadata['default']}]"
        epilog += line.removesuffix(" []") + "\n"
    parser = argparse.ArgumentParser(
        "shared_lock.py",
        description="Lends distributed locks over HTTP and keeps them in etcd.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shared-lock {VERSION}")
    parser.add_argument("command", choices=["serve"], help="serve until SIGTERM or SIGINT")
    parser.parse_args(arguments)
    # A closed one of the first three descriptors would become a socket, and get the log.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    try:
        return serve(Config.from_env(os.environ))
    except ConfigError as fault:
        print(f"shared-lock: {fault}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
