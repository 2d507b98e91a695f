"""shared-lock lends distributed locks over HTTP and keeps them in etcd. This file is all of it.

    $ curl -X POST localhost:8080/lease -H 'x-lease-ttl: 60s' -d '{"key": "nightly"}'
    2264587979177505296                                          # 201: it is yours for 60 s; this is your lease
    $ curl -X POST localhost:8080/keepalive -d 2264587979177505296   # 200: 60 s from now; 204: it is lost

What a holder may rely on: etcd never has two holders of one key, and the lock lives at least as long as its ttl,
counted from the moment the holder *sent* the request that was answered 201 or 200. What nobody may rely on: that a
holder whose lease ran out has stopped. It may be paused and wake up later. Only the protected resource can stop it,
by refusing a fencing token smaller than one it has seen.

One lock is one etcd lease and one key put with it, `/shared-lock/` + key. There is no other state, so any number of
replicas may serve one etcd. The rooms of this file in their order, which is also the way of a request:

    words, configuration         what all others use; every environment variable is a field of Config
    wire                         HTTP/1.1 messages over one socket
    connections                  bytes become a Request, a Response becomes bytes; HTTP stops here
    API                          what a Request asks for: a LockRequest, a lease ID, a key
    service                      what a lock means: acquire, renew, release, wait
    cache, memory, etcd          the storages: what is known to be held, the specification, and over a real network
    combiner                     while one call to etcd is under way, later callers gather to share the next
    gateway                      etcd's JSON gateway in our words; base64 and int64-as-text stop here
    members                      which member of etcd to ask, over which connection
    metrics, profiles, life      what operators see; start and stop
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import copy
import errno
import functools
import gc
import http
import http.server
import itertools
import json
import math
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
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Generic, NamedTuple, TypeVar, cast

VERSION = "1.0.0"
KEY_PREFIX = "/shared-lock/"  # before every key of ours in etcd
DEFAULT_TTL_SECONDS = 10  # of a POST /lease without x-lease-ttl
MAX_TTL_SECONDS = 9_000_000_000  # etcd's own limit
MAX_WAIT_SECONDS = 60  # of x-lease-wait
MAX_LOCKS_LISTED = 1000  # by one GET /lease?prefix=
MAX_HEAD_BYTES = MAX_BODY_BYTES = 64 << 10  # of a request; its head is the request line and the headers
MAX_HEADERS = 100
SILENT_SECONDS = 0.5  # how long a stop waits for requests that are on their way on kept connections
TEXT, PROMETHEUS_TEXT = "text/plain; charset=utf-8", "text/plain; version=0.0.4; charset=utf-8"
INT64 = range(-(1 << 63), 1 << 63)
POLL_SECONDS = 0.4  # how late a waiter may learn of a release through another replica
HUNG_UP_SECONDS = 2  # how late we may notice that a waiting caller has gone
MAX_DOOMED = 10_000  # leases to end in the background; what is over ends with its ttl
Clock = Callable[[], float]  # seconds, as time.monotonic
Item = TypeVar("Item")
Answer = TypeVar("Answer")
# What our own process lacks, descriptors, memory or ports, and nobody else is to blame for.
OWN_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}

# == Words: the log, errors, small data ==============================================================================
# Errors are split by who must act: the caller (BadRequest), the operator at the start (ConfigError), nobody yet
# (StorageError), or the caller with care (OutcomeUnknown). That a key is held, or a lease gone, is an answer.

DEBUG, INFO, WARNING, ERROR = "debug", "info", "warning", "error"
_PLAIN = re.compile(r"[\w.:/@,+\[\]-]{1,500}")  # a value that needs no quotes; longer ones are cut by quote()


class Log:
    """Writes whole lines to stderr, or none: a reader that is slow or gone never delays a lock."""

    def __init__(self) -> None:
        self.debug, self.dropped = False, 0  # whether debug is written; lines that were not, since the start
        self._told = 0  # of them, those that a later line has told
        self._mutex = threading.Lock()  # owns the numbers above, and the room that poll saw in the pipe
        self._poll = select.poll()  # select.select() takes 72 KiB of each thread's stack, for good
        self._poll.register(2, select.POLLOUT)

    def event(self, level: str, name: str, **shown: object) -> None:
        """One line: time=2026-11-23T03:21:00.000Z level=info event=granted key=nightly lease=4711 …"""
        if level == DEBUG and not self.debug:
            return
        now = time.time()  # the logging module takes 5 µs longer for a line
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
        line = f"time={stamp} level={level}"
        for key, value in {"event": name, **shown}.items():
            line += f" {key}={value if _PLAIN.fullmatch(str(value)) else quote(value, 500 if key == 'reason' else 120)}"
        with self._mutex:
            lost = f" lines_lost={self.dropped - self._told}" if self.dropped > self._told else ""
            with contextlib.suppress(OSError):  # nobody will ever read it
                if self._poll.poll(0):  # a pipe with room takes 4,096 bytes without blocking (PIPE_BUF)
                    os.write(2, f"{line}{lost}".encode()[:4095] + b"\n")
                    self._told = self.dropped
                    return
            self.dropped += 1


log = Log()
event = log.event


def quote(value: object, limit: int = 120) -> str:
    """The value as a message shows it: in double quotes, cut at that many characters, on one line for every reader."""
    text = str(value)
    quoted = json.dumps(text if len(text) <= limit else text[: limit - 1] + "…", ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)


class BadRequest(Exception):
    """The request has no better answer than this error: a 4xx, or a 5xx where the contract says so."""

    def __init__(self, text: str, status: int = 400, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


class ConfigError(Exception):
    """An environment variable cannot be used; the text is one line that names it."""


class StorageError(Exception):
    """The storage failed, and nothing was changed. `sick`: the member that was asked is to be left for another."""

    def __init__(self, text: str, sick: bool = True, code: int = 0) -> None:
        super().__init__(text)
        self.sick, self.code = sick, code


class Refused(StorageError):
    """etcd understood and said no; any member would say the same. `code` is the gRPC status code."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text, False, code)


class OutcomeUnknown(StorageError):
    """The request may have been applied, or may yet be: only safe to repeat in a form that cannot apply twice."""


class LockRequest(NamedTuple):
    key: str
    value: str = ""
    ttl: int = DEFAULT_TTL_SECONDS
    wait: float = 0  # seconds
    lease: int = 0  # the ID that the caller chose, or 0
    client: str = ""  # its address, for the log
    hung_up: Callable[[], bool] = lambda: False  # tells whether the caller has gone meanwhile


class Grant(NamedTuple):
    lease: int
    ttl: int  # as it was granted, in seconds
    token: int  # the fencing token


class Holder(NamedTuple):
    lease: int  # 0: a key without one
    token: int  # the fencing token
    value: str = ""  # this and the ttls only where they were asked for
    ttl: int | None = None  # the seconds that are left of it
    granted_ttl: int | None = None


class Address(NamedTuple):
    host: str
    port: int
    tls: bool | None = None  # None: the endpoint names no scheme

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self, tls: bool = False) -> str:
        return f"{'https' if self.tls or tls else 'http'}://{self}"


def deadline_after(timeout: float) -> float:
    """When a timeout that begins now ends (time.monotonic); 0 is none."""
    return time.monotonic() + timeout if timeout else math.inf


def reason(fault: BaseException) -> str:
    """One line about why a file, a name or a connection failed."""
    if isinstance(fault, ssl.SSLCertVerificationError):
        return f"TLS: its certificate is not accepted: {fault.verify_message}"
    closed = isinstance(fault, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    if closed or getattr(fault, "reason", None) == "WRONG_VERSION_NUMBER":
        return "TLS: it does not answer in TLS; is it http?"
    if isinstance(fault, ssl.SSLError):
        return f"TLS: {(fault.reason or str(fault)).lower().replace('_', ' ')}"
    return (getattr(fault, "strerror", None) or "").lower() or str(fault) or type(fault).__name__


# == Configuration ===================================================================================================

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_DURATION = re.compile(rf"([+-]?)((?:{_NUMBER}(?:ns|us|µs|μs|ms|s|m|h))+|{_NUMBER})")
_UNITS = {"ns": "1e-9", "us": "1e-6", "µs": "1e-6", "μs": "1e-6", "ms": "1e-3", "s": "1", "m": "60", "h": "3600"}
_ENDPOINT = re.compile(r"(?:(https?)://)?(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:/?#@\[\]]+)):([0-9]{1,5})/?")
# What Kubernetes adds for a Service named shared-lock…: …_SERVICE_HOST, …_SERVICE_PORT_HTTP, …_PORT_8080_TCP_ADDR.
_OF_A_SERVICE = r"[^=]+_(SERVICE_(HOST|PORT(_\w+)?)|PORT_[0-9]+_(TCP|UDP|SCTP)(_\w+)?)=|[^=]+_PORT=(tcp|udp|sctp)://"


def parse_duration(text: str) -> Fraction:
    """The seconds in a Go duration ("1m30s", "1500ms") or a bare number of seconds, exactly. Raises ValueError."""
    if len(text) > 100 or not (match := _DURATION.fullmatch(text)):
        raise ValueError(f"not a duration: {quote(text)}")
    parts = [Fraction(n) * Fraction(_UNITS[unit or "s"]) for n, unit in re.findall(rf"({_NUMBER})([^0-9.]*)", match[2])]
    return sum(parts, Fraction()) * (-1 if match[1] == "-" else 1)


def between(low: float, high: float, parse: Callable[[str], Any], unit: str = "") -> Callable[[str], Any]:
    def parse_in_range(text: str) -> Any:
        if low <= (value := parse(text)) <= high:
            return value
        raise ValueError(f"not from {low}{unit} to {high}{unit}: {quote(text)}")

    return parse_in_range


def duration(low: float, high: float, rounded: Callable[[Fraction], float] = float) -> Callable[[str], Any]:
    return between(low, high, lambda text: rounded(parse_duration(text)), "s")


def matching(pattern: str, expected: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"not {expected}: {quote(text)}")
        return convert(text)

    return parse


whole = matching("-?[0-9]{1,19}", "a whole number", int)
# As Go's strconv.ParseBool.
boolean = matching("[1tT]|TRUE|[tT]rue|[0fF]|FALSE|[fF]alse", "a boolean, true or false", lambda text: text[0] in "1tT")
_timeout, _storage = duration(0, MAX_TTL_SECONDS), matching("etcd|mock", "etcd or mock", str)


def endpoints(text: str) -> tuple[Address, ...]:
    addresses = []
    for part in text.split(","):
        if not (match := _ENDPOINT.fullmatch(part.strip())) or not 0 < int(match[4]) < 65536:
            raise ValueError(f"not an endpoint, as in http://host:2379: {quote(part)}")
        addresses.append(Address(match[2] or match[3], int(match[4]), match[1] == "https" if match[1] else None))
    return tuple(addresses)


def variable(name: str) -> str:
    return "SHARED_LOCK_" + name.upper()


def setting(default: str, parse: Callable[[str], Any], meaning: str, needs: str = "") -> Any:
    """A field of Config: its default as the environment would give it, its parser, its --help, what it needs set."""
    shown = {"default": default, "parse": parse, "meaning": meaning, "needs": needs}
    return field(default=parse(default), metadata=shown)


@dataclass(frozen=True)
class Config:
    """All settings, each read from the variable SHARED_LOCK_ + its name in capitals. Durations are in seconds."""

    server_port: int = setting("8080", between(0, 65535, whole), "port to listen on; 0 is a free one, see the log")
    server_host: str = setting("", str, "address to listen on; empty is every address, IPv4 and IPv6")
    server_read_timeout: float = setting("10s", _timeout, "from a request's first byte to its last; 0 is none")
    server_write_timeout: float = setting("10s", _timeout, "to write an answer; 0 is none")
    server_idle_timeout: float = setting("120s", _timeout, "an idle connection is closed after it; 0 is none")
    server_shutdown_timeout: float = setting("10s", _timeout, "for requests in flight after SIGTERM; 0 is none")
    server_token_path: str = setting("", str, "bearer tokens, one a line, of which callers must show one")
    server_cert_path: str = setting("", str, "TLS on the own port, with this certificate", "server_key_path")
    server_key_path: str = setting("", str, "the key of that certificate", "server_cert_path")
    server_client_ca_path: str = setting("", str, "callers need a certificate that this CA signed", "server_cert_path")
    max_ttl: int = setting("9000000000s", duration(1, MAX_TTL_SECONDS, math.ceil), "the longest ttl to grant")
    storage_type: str = setting("etcd", _storage, "etcd, or mock: in memory, lost with the process")
    etcd_addr_list: tuple[Address, ...] = setting("http://localhost:2379", endpoints, "endpoints, comma-separated")
    etcd_timeout: float = setting("5s", duration(0.001, MAX_TTL_SECONDS), "one storage operation, all tries together")
    etcd_username: str = setting("", str, "for an etcd with auth enabled", "etcd_password")
    etcd_password: str = setting("", str, "the password of that user", "etcd_username")
    etcd_tls: bool = setting("false", boolean, "TLS to etcd with the three files below")
    ca_cert_path: str = setting("/etc/etcd/ca.crt", str, "who signed etcd's certificate")
    client_cert_path: str = setting("/etc/etcd/client.crt", str, "what this daemon shows to etcd")
    client_key_path: str = setting("/etc/etcd/client.key", str, "the key of that certificate")
    cache_enabled: bool = setting("false", boolean, "answer 202 from memory while a key is known to be held")
    cache_size: int = setting("1000", between(1, 10**9, whole), "keys to remember; the least recently used leave")
    pprof_enabled: bool = setting("false", boolean, "serve /debug/pprof/")
    debug: bool = setting("false", boolean, "log every request")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """The configuration in `env`, such as os.environ. Raises ConfigError for the first variable that is wrong."""
        given = {}
        for one in fields(cls):
            name, needs = variable(one.name), one.metadata["needs"]
            text = env.get(name, one.metadata["default"])
            try:
                given[one.name] = one.metadata["parse"](text)
            except ValueError as fault:
                raise ConfigError(f"{name}: {fault}") from fault
            if text and needs and not env.get(variable(needs)):
                raise ConfigError(f"{variable(needs)}: empty, but {name} needs it")
        config = cls(**given)
        if config.etcd_tls and (plain := [address for address in config.etcd_addr_list if address.tls is False]):
            wanted = f"not https://, or without a scheme, as {variable('etcd_tls')}=true wants it"
            raise ConfigError(f"{variable('etcd_addr_list')}: {wanted}: {quote(f'http://{plain[0]}')}")
        return config

    @contextlib.contextmanager
    def usable(self, name: str, expected: str) -> Iterator[str]:
        """Gives the path in this setting, and turns what goes wrong with that file into a ConfigError."""
        path: str = getattr(self, name)
        try:
            yield path
        except (OSError, ValueError) as fault:
            raise ConfigError(f"{variable(name)}: not {expected}: {quote(path)}: {reason(fault)}") from fault


def unknown_variables(env: Mapping[str, str]) -> list[str]:
    """Names that look like ours and are not: most likely a typo, which would silently leave a default in force."""
    ours = {name for name in env if name.startswith(variable(""))} - {variable(one.name) for one in fields(Config)}
    return sorted(name for name in ours if not re.match(_OF_A_SERVICE, f"{name}={env[name]}"))


class Renewed(Generic[Item]):
    """What `read` makes of these files, and makes again when one has changed. If it cannot, the old stays in force."""

    def __init__(self, read: Callable[[], Item], *paths: str) -> None:
        self._read, self._paths = read, paths
        self._mutex = threading.Lock()  # owns the two below; looks before it reads: a change in between is seen later
        self._seen, self._current = self._look(), read()

    def get(self) -> Item:
        with self._mutex:
            before, self._seen = self._seen, self._look()
            if self._seen != before:
                try:
                    self._current = self._read()
                    event(INFO, "files renewed", paths=",".join(self._paths))
                except ConfigError as fault:
                    event(WARNING, "files not renewed, the old stay in force", reason=fault)
            return self._current

    def _look(self) -> list[tuple[float, ...]] | None:
        with contextlib.suppress(OSError):  # the last: what has just changed is read again, since it may change more
            return [(at.st_mtime_ns, at.st_ino, at.st_mtime > time.time() - 0.1) for at in map(os.stat, self._paths)]
        return None  # one is missing


def tls_context(config: Config, purpose: ssl.Purpose, *names: str) -> Renewed[ssl.SSLContext]:
    """TLS with the CA, certificate and key in these settings; without any, as curl would. Raises ConfigError."""

    def read() -> ssl.SSLContext:
        with config.usable(names[0], "a certificate in PEM") if names else contextlib.nullcontext("") as ca:
            context = ssl.create_default_context(purpose, cafile=ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # since CPython 3.13; Go and curl accept more, and so do we
        context.verify_mode = ssl.CERT_REQUIRED if ca else context.verify_mode
        if purpose is ssl.Purpose.CLIENT_AUTH:  # or a stop would send silent callers an alert
            context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
        if names:
            with config.usable(names[2], "a file that can be read") as key, open(key, "rb"):
                expected = f"a certificate in PEM for the open key {variable(names[2])}={quote(key)}"
            with config.usable(names[1], expected) as cert:
                context.load_cert_chain(cert, key, password="")  # or OpenSSL asks for one on the terminal
        return context

    return Renewed(read, *(path for name in names if (path := getattr(config, name))))


# == Wire: HTTP/1.1 messages over one socket =========================================================================
# For requests, and for etcd's answers. The standard library reads headers with its e-mail package, which takes longer
# than the rest of a request: at 64 connections on one CPU, /health is answered 47,900 times a second, by http.server's
# handler (buffered, no Nagle) 14,800 times. Being strict is easier here, too.

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# curl sends a path as it was typed: UTF-8 that is not percent-encoded is welcome, other bytes are not.
_REQUEST_LINE = re.compile(rf"({_TOKEN.pattern}) ([^\x00-\x20\x7f\ud800-\udfff]+) HTTP/([0-9])\.([0-9])")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]*)(?::[0-9]*)?", re.ASCII)  # RFC 3986, 3.2.2
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
_RECEIVE_BYTES = 16 << 10  # one recv; nearly every message is smaller


def parse_headers(lines: Iterable[str]) -> dict[str, str]:
    """Values by name in lower case. Strict (RFC 9112, 5): what two parties read differently can be used to smuggle a
    request past one. Raises BadRequest."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or _CONTROL.search(value):
            secret = "authorization" in headers or re.search("authorization|bearer", line, re.IGNORECASE)
            raise BadRequest(f"not a header: {quote('…' if secret else line)}")  # a token is never shown
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def body_length(headers: Mapping[str, str], limit: int) -> int | None:
    """The bytes of the body that these headers announce; None: it comes in chunks. Raises BadRequest."""
    if (coding := headers.get("transfer-encoding")) is not None:
        if "content-length" in headers:
            raise BadRequest("content-length together with transfer-encoding")
        if coding.lower() != "chunked":
            raise BadRequest(f"transfer-encoding: not chunked: {quote(coding)}")
        return None
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise BadRequest(f"content-length: not a number: {quote(length)}")
    if len(length) > 18 or int(length) > limit:
        raise BadRequest(f"the body is larger than {limit} bytes", 413)
    return int(length)


@functools.lru_cache(maxsize=256)
def chunk_size(line: bytes) -> int:
    if not (match := _CHUNK.fullmatch(line)):
        raise BadRequest(f"not the size of a chunk: {quote(line.decode('latin-1'))}")
    return int(match[1], 16)


class Wire:
    """A socket, and the bytes received from it but not used yet. It belongs to one thread at a time. Deadlines are on
    the clock of time.monotonic; math.inf is none. Raises EOFError at the end of the stream, TimeoutError, BadRequest
    for what is not HTTP, or another OSError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self._timeouts = {socket.SO_RCVTIMEO: math.inf, socket.SO_SNDTIMEO: math.inf}  # seconds, as they are set

    def head(self, deadline: float) -> bytes:
        return self._until(b"\r\n\r\n", MAX_HEAD_BYTES, "the head", 431, deadline)

    def body(self, length: int | None, limit: int, deadline: float) -> bytes:
        """A body of this length; None: in chunks, up to `limit` bytes together."""
        if length is not None:
            return self._exactly(length, deadline)
        parts: list[bytes] = []
        while size := chunk_size(self._line(deadline)):
            if (limit := limit - size) < 0:
                raise BadRequest("the body in chunks is too large", 413)
            parts.append(self._exactly(size, deadline))
            if self._exactly(2, deadline) != b"\r\n":
                raise BadRequest("a chunk is longer than it said")
        for _ in range(MAX_HEADERS + 1):
            if not (line := self._line(deadline)):
                return b"".join(parts)
            parse_headers([line.decode("latin-1")])
        raise BadRequest(f"more than {MAX_HEADERS} trailers", 431)

    def _line(self, deadline: float) -> bytes:
        return self._until(b"\r\n", _RECEIVE_BYTES, "a line between chunks", 400, deadline)

    def _until(self, mark: bytes, limit: int, what: str, status: int, deadline: float) -> bytes:
        """What comes before the mark, which is skipped. What trickles in is not searched from its start each time."""
        start = 0
        while (end := self.buffer.find(mark, start)) < 0 and len(self.buffer) <= limit:
            if self.buffer.find(b"\n\n", start) >= 0 or self.buffer.find(b"\n\r\n", start) >= 0:
                raise BadRequest("a line ends in a line feed without a carriage return")
            start = max(0, len(self.buffer) - 3)
            self.receive(deadline)
        if not 0 <= end <= limit:
            raise BadRequest(f"{what} is longer than {limit} bytes", status)
        return self._exactly(end, deadline, len(mark))

    def _exactly(self, count: int, deadline: float, skipped: int = 0) -> bytes:
        while len(self.buffer) < count:
            self.receive(deadline)
        taken = bytes(self.buffer[:count])
        del self.buffer[: count + skipped]
        return taken

    def receive(self, deadline: float) -> None:
        data = self._call(self.sock.recv, _RECEIVE_BYTES, socket.SO_RCVTIMEO, deadline)
        if not data:
            raise EOFError("the connection was closed")
        self.buffer += data

    def send(self, data: bytes, deadline: float) -> None:
        while data:
            data = data[self._call(self.sock.send, data, socket.SO_SNDTIMEO, deadline) :]

    def _call(self, call: Callable[[Any], Any], argument: object, option: int, deadline: float) -> Any:
        """One recv or send. This option ends it at the deadline, since settimeout() adds a poll() to each; TLS heeds
        nothing else. A timeout that is right to within 2 % is kept, which spares nearly every call a system call."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.settimeout(None if left == math.inf else left)
        elif not left <= self._timeouts[option] <= left * 1.02:
            micros = 0 if left == math.inf else max(1, int(left * 1e6))
            self.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *divmod(micros, 10**6)))
            self._timeouts[option] = left
        try:
            return call(argument)
        except BlockingIOError as fault:  # how the option says it
            raise TimeoutError("timed out") from fault


# == Connections: bytes become a Request, a Response becomes bytes ===================================================


class Request(NamedTuple):
    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # names are in lower case
    keep_alive: bool
    version: str
    body: bytes = b""
    client: str = ""  # its address
    hung_up: Callable[[], bool] = lambda: False


class Response(NamedTuple):
    status: int
    body: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()
    undo: Callable[[], object] | None = None  # if it cannot be written: who does not know of its lock does not hold it


def error(fault: BadRequest) -> Response:
    return Response(fault.status, f"{fault}\n".encode("utf-8", "backslashreplace"), TEXT, fault.headers)


@functools.lru_cache(maxsize=1024)  # a client sends the same head again, byte for byte: 4 µs become 0.1 µs
def parse_head(data: bytes) -> Request:
    line, *header_lines = data.decode("utf-8", "surrogateescape").split("\r\n")
    if len(header_lines) > MAX_HEADERS:
        raise BadRequest(f"more than {MAX_HEADERS} headers", 431)
    if not (match := _REQUEST_LINE.fullmatch(line)):
        raise BadRequest(f"not a request line: {quote(line)}")
    method, target, major, minor = match.groups()
    if major != "1":
        raise BadRequest(f"not HTTP/1.1 or HTTP/1.0: {quote(line)}", 505)
    headers = parse_headers(header_lines)
    if minor != "0" and not _HOST.fullmatch(headers.get("host", "/")):  # two are joined with a comma
        raise BadRequest(f"host: not one host: {quote(headers['host'])}" if "host" in headers else "host: missing")
    if "transfer-encoding" in headers and minor == "0":
        raise BadRequest("transfer-encoding in HTTP/1.0")
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    keep_alive = "close" not in options and (minor != "0" or "keep-alive" in options)
    if not target.startswith("/"):  # absolute-form, as sent to proxies
        target = re.sub(r"^https?://[^/?]*", "", target, flags=re.IGNORECASE)
    path, _, query = target.partition("#")[0].partition("?")
    return Request(method, path or "/", query, headers, keep_alive, f"HTTP/1.{minor}")


@functools.lru_cache(maxsize=64)  # all answers with one status have this in common for a second
def _first_lines(status: int, second: int) -> str:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nDate: {date}\r\n"


def render(response: Response, request: Request | None, keep_alive: bool) -> bytes:  # None: not readable
    head = _first_lines(response.status, int(time.time()))
    if response.status != 204:  # RFC 9110, 8.6: no Content-Length with 204
        head += f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\n"
    head += "".join([f"{name}: {value}\r\n" for name, value in response.headers])
    if not keep_alive or (request and request.version == "HTTP/1.0"):
        head += f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n"
    data = (head + "\r\n").encode("latin-1")
    return data if request and request.method == "HEAD" else data + response.body


class Connection(socketserver.BaseRequestHandler):
    """Serves one connection in its own thread, request by request."""

    server: Server

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wire = Wire(self.request)
        self.client = str(Address(self.client_address[0].removeprefix("::ffff:"), self.client_address[1]))
        self.doing = ""  # what is read or answered; empty while it is silent
        self.head: Request | None = None  # of the latest request, as soon as it could be read
        self.server.connections[self.request] = self

    def handle(self) -> None:
        try:
            if self.server.tls:  # in our own thread: a caller that never shakes hands stops nobody else
                tls = self.server.tls.get().wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
                self.wire.sock = tls  # before it shakes hands, so that a stop can end that
                tls.settimeout(self.server.config.server_read_timeout or None)
                tls.do_handshake()
            while self._serve_one():
                pass
        except (EOFError, OSError) as fault:  # the caller has gone, or idled too long, or looked for an open port
            closed = ssl.SSL_ERROR_EOF, ssl.SSL_ERROR_ZERO_RETURN
            if self.doing or (isinstance(fault, ssl.SSLError) and fault.errno not in closed):
                event(DEBUG, "connection lost", client=self.client, doing=self.doing, reason=reason(fault))

    def finish(self) -> None:
        if isinstance(self.wire.sock, ssl.SSLSocket):  # which the server does not know
            with contextlib.suppress(OSError, ValueError), self.wire.sock as tls:
                tls.settimeout(0)
                tls.unwrap()  # says goodbye, and does not wait for the answer

    def shutdown(self, how: int) -> None:
        """Ends one half of the connection. After SHUT_RD, a request that has arrived already is still answered."""
        with contextlib.suppress(OSError):  # closed meanwhile
            socket.socket.shutdown(self.wire.sock, how)  # an SSLSocket's own shutdown() would end its TLS

    def _serve_one(self) -> bool:
        self._await_request()
        limit = self.server.config.server_read_timeout
        try:
            request = self._read_request(deadline_after(limit))
        except BadRequest as fault:
            return self._refuse(fault)
        except TimeoutError:
            return self._refuse(BadRequest(f"the request was not complete after {limit:g}s", 408))
        self.doing = f"{request.method} {request.path}"
        response = self.server.api.answer(request)
        keep_alive = request.keep_alive and (self.server.silent_until == math.inf or len(self.wire.buffer) > 0)
        try:
            self._send(render(response, request, keep_alive))
        except OSError:
            if response.undo:
                response.undo()
            raise
        return keep_alive

    def _await_request(self) -> None:
        """Waits for a request's first byte, after empty lines (RFC 9112, 2.2); in a stop, only for a moment."""
        self.doing, self.head = "", None
        deadline = deadline_after(self.server.config.server_idle_timeout)
        while not (buffer := self.wire.buffer) or buffer[0] in b"\r\n":
            if buffer:
                del buffer[0]
            else:
                stops_at = self.server.silent_until
                self.wire.receive(deadline if stops_at == math.inf else max(stops_at, time.monotonic() + 0.05))
        self.doing = "reading a request"

    def _read_request(self, deadline: float) -> Request:
        data = self.wire.head(deadline)
        parse = parse_head if len(data) < 1024 else parse_head.__wrapped__  # long heads are not worth the memory
        self.head = request = parse(data)
        self.server.authorize(request)
        length = body_length(request.headers, MAX_BODY_BYTES)
        waits = request.headers.get("expect", "").lower() == "100-continue" and request.version != "HTTP/1.0"
        if waits and length != 0 and not self.wire.buffer:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.wire.body(length, MAX_BODY_BYTES, deadline)
        return Request(*request[:6], body, self.client, self._hung_up)

    def _refuse(self, fault: BadRequest) -> bool:
        """Answers what could not be read as a request. The rest of the stream means nothing, so the connection ends:
        our half first, the whole a moment later, since closing with bytes unread would destroy the answer."""
        event(DEBUG, "request refused", client=self.client, status=fault.status, reason=fault)
        self.server.api.count_refusal(self.head, fault.status)
        self._send(render(error(fault), self.head, keep_alive=False))
        self.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 1
        for _ in range(64):
            self.wire.buffer.clear()
            self.wire.receive(deadline)
        return False

    def _send(self, data: bytes) -> None:
        self.wire.send(data, deadline_after(self.server.config.server_write_timeout))

    def _hung_up(self) -> bool:
        """A caller that ends only its own half of the connection counts as gone, since it looks the same."""
        poll = select.poll()
        poll.register(self.wire.sock, select.POLLRDHUP)
        return bool(poll.poll(0))


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections and knows which are open, so that it can stop without losing a request."""

    daemon_threads, block_on_close = True, False  # its end waits for no silent client; stop() waits for the others
    timeout = 0.1  # seconds: how late handle_request() notices a signal that another thread received

    def __init__(self, config: Config, api: Api) -> None:
        """Listens on the configured address. Raises OSError or ConfigError."""
        self.config, self.api = config, api
        self.silent_until = math.inf  # until it stops; then, when a connection without a request is closed
        self.connections: dict[Any, Connection | None] = {}  # by socket; None: it has no thread yet
        names = ("server_client_ca_path", "server_cert_path", "server_key_path")
        self.tls = tls_context(config, ssl.Purpose.CLIENT_AUTH, *names) if config.server_cert_path else None
        self._tokens = Renewed(self._read_tokens, config.server_token_path) if config.server_token_path else None
        listener = listen(config.server_host, config.server_port)
        # TCPServer's own __init__ would make a socket for one family, and HTTPServer's look up our name in the DNS.
        socketserver.BaseServer.__init__(self, listener.getsockname(), Connection)
        self.socket = listener

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as fault:
            if fault.errno in OWN_SHORTAGES:
                event(ERROR, "accept failed", reason=reason(fault))
                time.sleep(0.1)  # seconds; without it the loop would spin
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections[request] = None  # before its thread runs: a stop must not miss it
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        super().close_request(request)
        self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        event(ERROR, "connection failed", **_defect(sys.exception()))

    def _read_tokens(self) -> list[bytes]:
        with self.config.usable("server_token_path", "a file with a token a line") as path, open(path, "rb") as file:
            if tokens := [line.strip() for line in file if line.strip()]:
                return tokens
            raise ValueError("it is empty")

    def authorize(self, request: Request) -> None:
        """Raises BadRequest unless the request shows one of the tokens, where tokens are needed."""
        if self._tokens and request.path not in ("/health", "/ready"):
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            shown = given.strip().encode("utf-8", "surrogateescape")
            known = [secrets.compare_digest(shown, token) for token in self._tokens.get()]  # all, in constant time
            if scheme.lower() != "bearer" or True not in known:
                raise BadRequest("authorization: not Bearer with a known token", 401, ("WWW-Authenticate", "Bearer"))

    def stop(self, timeout: float) -> None:
        """Accepts no more, answers what is in flight, closes silent connections SILENT_SECONDS later, and after
        `timeout` seconds (0: never) cuts what is left. Locks stay with their holders."""
        self.silent_until = time.monotonic() + SILENT_SECONDS
        deadline = deadline_after(timeout)
        self.socket.setblocking(False)
        with contextlib.suppress(OSError, RuntimeError):  # all that were let in are served, or there is no means to
            while True:
                self.process_request(*self.get_request())
        self.socket.close()
        self.api.service.dismiss_waiting()
        while self.connections and time.monotonic() < min(self.silent_until, deadline):
            time.sleep(0.01)  # seconds; and not for a notice, so that a second signal ends it
        for connection in filter(None, list(self.connections.values())):
            if not connection.doing:
                connection.shutdown(socket.SHUT_RD)
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        for connection in filter(None, list(self.connections.values())):
            event(WARNING, "connection cut", client=connection.client, doing=connection.doing or "nothing")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; an empty host is every address, IPv6 with IPv4 where there is IPv6. Raises OSError."""
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError as fault:
            if fault.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    family, *_, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=family, backlog=1024)


def _defect(fault: BaseException | None) -> dict[str, object]:
    frame = traceback.extract_tb(fault.__traceback__ if fault else None)[-1]
    return {"error": repr(fault), "at": f"{os.path.basename(frame.filename)}:{frame.lineno}"}


# == API: what a Request asks for, and its answer ====================================================================


class Api:
    """The endpoints. A handler returns the answer, or raises BadRequest, StorageError, or EOFError (nobody waits)."""

    def __init__(self, service: LockService, metrics: Metrics, config: Config) -> None:
        self.service, self._metrics = service, metrics
        self._lease_headers: dict[str, tuple[Callable[[str], Any], float]] = {  # their parsers and defaults
            "x-lease-ttl": (duration(1, config.max_ttl, math.ceil), min(DEFAULT_TTL_SECONDS, config.max_ttl)),
            "x-lease-wait": (duration(0, MAX_WAIT_SECONDS), 0),
            "x-lease-id": (between(1, INT64[-1], whole), 0),
        }
        self._options = functools.lru_cache(maxsize=1024)(self._parse_options)  # a client sends the same again
        self._routes: dict[str, dict[str, Callable[[Request], Response]]] = {
            "/lease": {"POST": self.acquire, "DELETE": self.release, "GET": self.look},
            "/keepalive": {"POST": self.renew},
            "/health": {"GET": lambda request: Response(200, b"ok\n")},
            "/ready": {"GET": self.ready},
            "/metrics": {"GET": lambda request: Response(200, metrics.render().encode(), PROMETHEUS_TEXT)},
        }
        if config.pprof_enabled:
            self._routes |= {f"/debug/pprof/{name}": {"GET": page} for name, page in PROFILES.items()}

    def answer(self, request: Request) -> Response:
        """Always answers, unless the caller has gone: then it raises EOFError."""
        methods = self._routes.get(request.path, {})
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        try:
            response = handler(request) if handler else self._no_handler(request, methods)
        except BadRequest as fault:
            response = error(fault)
        except StorageError as fault:
            response = error(BadRequest(f"storage failed: {fault}", 503 if request.path == "/ready" else 500))
        except EOFError:
            raise
        except Exception as fault:  # a defect of ours; the caller deserves an answer all the same
            event(ERROR, "internal error", path=request.path, **_defect(fault))
            response = error(BadRequest("internal error: see the log of shared-lock", 500))
        path, method = request.path if methods else "other", request.method if handler else "other"
        self._metrics.count(REQUESTS, path=path, method=method, code=response.status)
        event(DEBUG, "request", client=request.client, method=request.method, path=request.path, status=response.status)
        return response

    def count_refusal(self, request: Request | None, status: int) -> None:
        """An answer to what could not be read to its end. A caller's own words never become labels."""
        methods = self._routes.get(request.path, {}) if request else {}
        method = request.method if request and request.method.replace("HEAD", "GET") in methods else "other"
        path = request.path if request and methods else "other"
        self._metrics.count(REQUESTS, path=path, method=method, code=status)

    def _no_handler(self, request: Request, methods: Mapping[str, object]) -> Response:
        if not methods:
            raise BadRequest(f"no such path: {quote(request.path)}", 404)
        allow = ", ".join([*methods, "HEAD"] if "GET" in methods else methods)
        raise BadRequest(f"{request.path}: not {allow}: {quote(request.method)}", 405, ("Allow", allow))

    def acquire(self, request: Request) -> Response:
        must_be_free = _precondition(request, "if-none-match", "if-match")
        wanted = self._lock_request(request)
        try:
            outcome = self.service.acquire(wanted)
        except StorageError as fault:
            known = "outcome unknown" if isinstance(fault, OutcomeUnknown) else "not acquired"
            raise BadRequest(f"{known}: {fault}", 500) from fault
        if isinstance(outcome, Holder):
            # Never the holder's lease: a refused script that cleans up after itself would free somebody else's lock.
            return error(BadRequest(f"key: held: {quote(wanted.key)}", 412)) if must_be_free else Response(202, b"0")
        headers = (("x-lease-ttl", f"{outcome.ttl}s"), ("x-fencing-token", str(outcome.token)))
        undo = functools.partial(self.service.take_back, wanted, outcome.lease)
        return Response(201, b"%d" % outcome.lease, TEXT, headers, undo)

    def _lock_request(self, request: Request) -> LockRequest:
        if request.query:
            known = ", ".join(self._lease_headers)
            raise BadRequest(f"query: not of use here, but the headers {known}: {quote(request.query)}")
        ttl, wait, lease = self._options(tuple(request.headers.items()))
        return LockRequest(*parse_lock(request.body), ttl, wait, lease, request.client, request.hung_up)

    def _parse_options(self, headers: tuple[tuple[str, str], ...]) -> list[Any]:
        ttl_wait_lease: dict[str, Any] = {name: default for name, (_, default) in self._lease_headers.items()}
        for name, text in headers:
            if name.startswith("x-lease-"):
                if name not in ttl_wait_lease:
                    raise BadRequest(f"{quote(name)}: not one of the headers {', '.join(ttl_wait_lease)}")
                try:
                    ttl_wait_lease[name] = self._lease_headers[name][0](text)
                except ValueError as fault:
                    raise BadRequest(f"{name}: {fault}") from fault
        return list(ttl_wait_lease.values())

    def renew(self, request: Request) -> Response:
        must_exist = _precondition(request, "if-match", "if-none-match")
        ttl = self.service.renew(lease := parse_lease(request.body), request.client)
        return Response(200, headers=(("x-lease-ttl", f"{ttl}s"),)) if ttl else _gone(lease, must_exist)

    def release(self, request: Request) -> Response:
        must_exist = _precondition(request, "if-match", "if-none-match")
        released = self.service.release(lease := parse_lease(request.body), request.client)
        return Response(200) if released else _gone(lease, must_exist)

    def look(self, request: Request) -> Response:
        query = _query(request)
        if "prefix" in query and "key" not in query:
            locks, more = self.service.storage.list_locks(query["prefix"])
            lines = [_json_line(key=key, value=one.value, fencing_token=one.token) for key, one in locks]
            lines += [_json_line(more=True)] if more else []
            return Response(200, b"".join(lines), "application/x-ndjson")
        if not query.get("key") or "prefix" in query:
            raise BadRequest("key: missing in the query, as in /lease?key=nightly, or a prefix alone, /lease?prefix=")
        if (one := self.service.storage.look(key := query["key"])) is None:
            raise BadRequest(f"key: free: {quote(key)}", 404)
        line = _json_line(key=key, value=one.value, ttl=one.ttl, granted_ttl=one.granted_ttl, fencing_token=one.token)
        return Response(200, line, "application/json")

    def ready(self, request: Request) -> Response:
        self.service.storage.check()
        return Response(200, b"ok\n")


def _precondition(request: Request, name: str, other: str) -> bool:
    """Whether this header (RFC 9110, 13.1) was sent. Raises BadRequest where to ignore one would be a trap."""
    given = request.headers.get(name)
    if given not in (None, "*"):
        raise BadRequest(f"{name}: not *: {quote(given)}")
    if other in request.headers:
        raise BadRequest(f"{other}: not of use here, but {name}: *")
    return given == "*"


def _gone(lease: int, must_exist: bool) -> Response:
    return error(BadRequest(f"lease: gone: {lease}", 412)) if must_exist else Response(204)


def _json_line(**members: object) -> bytes:
    return (json.dumps(members, ensure_ascii=False) + "\n").encode()


def _query(request: Request) -> dict[str, str]:
    """The query's parameters; of several with one name the first counts."""
    try:
        pairs = urllib.parse.parse_qsl(request.query, keep_blank_values=True, errors="strict")
    except ValueError as fault:
        raise BadRequest(f"query: not UTF-8 in percent-encoding: {quote(request.query)}") from fault
    return dict(reversed(pairs))


# Names of members match in any case, and of two the last counts, as in Go. An integer too long for int64 becomes a
# float, as in JavaScript: Python would refuse 4,300 digits as no JSON at all. NaN and Infinity are none.
_JSON = json.JSONDecoder(
    object_pairs_hook=lambda members: {name.casefold(): given for name, given in members},
    parse_int=lambda digits: int(digits) if len(digits) <= 20 else float(digits),
    parse_constant=lambda name: float(f"not JSON: {name}"),
)


def _parse_json(body: bytes) -> Any:
    try:
        return _JSON.decode(body.decode())
    except (ValueError, RecursionError) as fault:
        text = body.decode("utf-8", "replace").strip()
        raise BadRequest(f"body: not JSON: {quote(text)}" if text else "body: empty, JSON expected") from fault


def parse_lock(body: bytes) -> tuple[str, str]:
    """The key and the value in the body of a POST /lease. Raises BadRequest."""
    lock = _parse_json(body)
    if not isinstance(lock, dict):
        raise BadRequest(f"body: not a JSON object: {quote(json.dumps(lock))}")
    if "ttl" in lock:
        raise BadRequest(f"ttl: not read from the body, send the header x-lease-ttl: {quote(json.dumps(lock['ttl']))}")
    key, value = lock.get("key"), lock.get("value")
    for name, text in (("key", key), ("value", value)):
        if text is not None and not isinstance(text, str):  # null is absent, as in Go
            raise BadRequest(f"{name}: not a string: {quote(json.dumps(text))}")
        if text and not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise BadRequest(f"{name}: not Unicode text, a surrogate stands alone: {text[:100]!a}")
    if not key:
        raise BadRequest("key: missing" if key is None else 'key: empty: ""')
    return key, value or ""


def parse_lease(body: bytes) -> int:
    """The lease ID in a body: a number, a number in a JSON string, or an object with `id` as either. JSON that is no
    int64 is a 500, which the Go service's clients know."""
    given = _parse_json(body)
    given = given.get("id") if isinstance(given, dict) else given
    if isinstance(given, str) and re.fullmatch(r"\s*-?[0-9]{1,19}\s*", given, re.ASCII):
        given = int(given)
    if type(given) is not int or given not in INT64:
        raise BadRequest(f"body: not a lease ID: {quote(body.decode('utf-8', 'replace').strip())}", 500)
    return given


# == Service: what a lock means ======================================================================================


class LockService:
    """Locks over a storage. All methods may be called from any thread."""

    def __init__(self, storage: Storage, metrics: Metrics) -> None:
        self.storage, self._metrics = storage, metrics
        self._mutex = threading.Lock()  # owns who waits
        self._waiting: dict[str, list[threading.Event]] = {}  # by key; set: ask the storage now
        self._dismissed = False
        metrics.sources.append(lambda: {"shared_lock_waiting": sum(map(len, list(self._waiting.values())))})

    def acquire(self, wanted: LockRequest) -> Grant | Holder:
        """Takes the lock, or tells who holds it when the caller waits no longer. Raises StorageError (not acquired),
        OutcomeUnknown, BadRequest, or EOFError (the caller has gone)."""
        take, asked = self.storage.acquire, {"key": wanted.key, "client": wanted.client}
        started, outcome = time.monotonic(), self._ask("get", take, wanted, asked)
        if wanted.wait and isinstance(outcome, Holder):
            with contextlib.closing(self._turns(wanted)) as turns:
                while isinstance(outcome, Holder) and next(turns, False):
                    started, outcome = time.monotonic(), self._ask("get", take, wanted, asked)
        took = time.monotonic() - started
        if isinstance(outcome, Grant):
            shown = {"ttl": outcome.ttl, "token": outcome.token, "value": wanted.value, "client": wanted.client}
            event(INFO, "granted", key=wanted.key, lease=outcome.lease, **shown)
            if wanted.wait and wanted.hung_up():
                self.take_back(wanted, outcome.lease)
                raise EOFError("the caller hung up")
        else:
            event(DEBUG, "refused", **asked, holder=outcome.lease)
        self._metrics.observe_grant("created" if isinstance(outcome, Grant) else "accepted", took)
        return outcome

    def renew(self, lease: int, client: str) -> int:
        """Starts the lease's ttl again and returns it; 0 where etcd knows that it is gone. Raises StorageError."""
        ttl = self._ask("prolong", self.storage.renew, lease, {"lease": lease, "client": client})
        self._metrics.count(LEASES, operation="prolong", status="success" if ttl else "failure")
        if not ttl:
            event(INFO, "lease is gone", lease=lease, client=client)
        return ttl

    def release(self, lease: int, client: str) -> bool:
        """Ends the lease, which frees its key at once; False where there is nothing of ours. Raises StorageError."""
        keys = self._ask("release", self.storage.release, lease, {"lease": lease, "client": client})
        self._metrics.count(LEASES, operation="release", status="failure" if keys is None else "success")
        for key in keys or ():
            event(INFO, "released", key=key, lease=lease, client=client)
            self._wake(key)
        return keys is not None

    def take_back(self, wanted: LockRequest, lease: int) -> None:
        """Releases a lock whose caller left untold, unless it chose the lease: a repetition may have been told."""
        if not wanted.lease:
            event(INFO, "caller has gone, lock taken back", lease=lease, client=wanted.client)
            with contextlib.suppress(StorageError):  # logged by release; the lease ends with its ttl
                self.release(lease, wanted.client)

    def _ask(self, operation: str, ask: Callable[[Item], Answer], item: Item, asked: Mapping[str, object]) -> Answer:
        """The storage's answer; a failure is counted and logged."""
        try:
            return ask(item)
        except StorageError as fault:
            self._metrics.count(LEASES, operation=operation, status="error")
            event(WARNING, "storage failed", operation=operation, reason=fault, **asked)
            raise

    def _turns(self, wanted: LockRequest) -> Generator[bool, None, None]:
        """Yields whenever this caller should ask the storage again, until its wait is over. Raises EOFError. Of those
        that wait for a key only the first asks: every POLL_SECONDS, and at once after a release through this replica.
        Nobody holds a lease or writes while waiting. This is no fair queue: whoever asks in the moment when a key is
        free gets it, here or through another replica."""
        # A second early: a proxy that cuts at 60 s would otherwise cut the answer to a wait of 60 s.
        deadline = time.monotonic() + min(wanted.wait, MAX_WAIT_SECONDS - 1)
        mine = threading.Event()
        with self._mutex:
            waiting = self._waiting.setdefault(wanted.key, [])
            waiting.append(mine)
        try:
            while (left := deadline - time.monotonic()) > 0 and not self._dismissed:
                first = waiting[0] is mine
                woken = mine.wait(min(left, POLL_SECONDS if first else HUNG_UP_SECONDS))
                if wanted.hung_up():
                    raise EOFError("the caller hung up")
                if (woken or first) and not self._dismissed:
                    mine.clear()
                    yield True
        finally:
            with self._mutex:
                waiting.remove(mine)
                if not waiting:
                    del self._waiting[wanted.key]
            self._wake(wanted.key)

    def _wake(self, key: str) -> None:
        with self._mutex:
            for mine in self._waiting.get(key, ())[:1]:
                mine.set()

    def dismiss_waiting(self) -> None:
        with self._mutex:
            self._dismissed = True
            for mine in itertools.chain.from_iterable(self._waiting.values()):
                mine.set()


# == Cache: a storage in front of the storage ========================================================================


class _Entry:
    """What is known of one key: the newest holder, until when it holds at least, and the lease that ended last."""

    lease = token = ended = 0
    ends = -math.inf  # time.monotonic


class Cache:
    """Refuses from memory while a key is known to be held: it can delay a grant and never cause one. An entry ends
    before its lease can, since it counts from the moment the storage was *asked*. Answers may overtake each other: the
    larger fencing token is the newer holder, and what was seen to end is never believed again. The LRU is
    functools'; the index by lease is weak, so that it keeps nothing alive that the LRU dropped."""

    def __init__(
        self, storage: MemoryStorage | EtcdStorage, size: int, metrics: Metrics, clock: Clock = time.monotonic
    ) -> None:
        self._storage, self._metrics, self._clock = storage, metrics, clock
        self._mutex = threading.Lock()  # owns the two below: by itself, lru_cache gives two threads two entries
        self._entry = functools.lru_cache(maxsize=size)(lambda key: _Entry())
        self._by_lease: weakref.WeakValueDictionary[int, _Entry] = weakref.WeakValueDictionary()
        self.look, self.list_locks = storage.look, storage.list_locks
        self.check, self.start = storage.check, storage.start
        metrics.sources.append(self._evictions)

    def acquire(self, wanted: LockRequest) -> Grant | Holder:
        """Whoever waits asks the storage each time, and so does a caller that chose its lease: it may be its own."""
        from_memory = not wanted.wait and not wanted.lease
        if from_memory and (known := self._known(wanted.key)):
            return known
        asked = self._clock()
        outcome = self._storage.acquire(wanted)
        if isinstance(outcome, Grant):
            self._remember(wanted.key, outcome, asked)
        elif from_memory:
            asked = self._clock()
            with contextlib.suppress(StorageError):  # the refusal stands without it, and the next one asks again
                self._remember(wanted.key, self._storage.look(wanted.key), asked)
        return outcome

    def renew(self, lease: int) -> int:
        asked = self._clock()
        if not (ttl := self._storage.renew(lease)):
            self._forget(lease)
        with self._mutex:
            if entry := self._by_lease.get(lease):
                entry.ends = max(entry.ends, asked + ttl)
        return ttl

    def release(self, lease: int) -> list[str] | None:
        keys = None
        try:
            keys = self._storage.release(lease)
        finally:  # after a failure nobody knows: the next one asks
            self._forget(lease, *keys or ())
        return keys

    def _known(self, key: str) -> Holder | None:
        with self._mutex:
            entry = self._entry(key)
            held = entry.ends > self._clock()
            holder = Holder(entry.lease, entry.token)
        self._metrics.count(CACHE, operation="get", status="hit" if held else "expired" if entry.ends > 0 else "miss")
        return holder if held else None

    def _remember(self, key: str, found: Grant | Holder | None, asked: float) -> None:
        if not found or found.ttl is None:
            return
        with self._mutex:
            entry = self._entry(key)
            if found.token < entry.token + (entry.ends == -math.inf) or found.lease == entry.ended:
                return
            self._metrics.count(CACHE, operation="set", status="update" if entry.token else "success")
            self._by_lease.pop(entry.lease, None)
            entry.lease, entry.token, entry.ends = found.lease, found.token, asked + found.ttl
            self._by_lease[found.lease] = entry

    def _forget(self, lease: int, *keys: str) -> None:
        with self._mutex:
            entry = self._by_lease.pop(lease, None)
            for one in [entry] if entry else map(self._entry, keys):
                one.ended, one.ends = lease, -math.inf

    def _evictions(self) -> dict[str, float]:
        info = self._entry.cache_info()
        return {sample(CACHE, operation="evict", status="size_limit"): info.misses - info.currsize}


# == Storage in memory: the specification ============================================================================


@dataclass
class _Lock:
    lease: int
    token: int
    value: str
    ttl: int
    ends: float = 0


class MemoryStorage:
    """A table of locks with a clock, lost with the process: what every storage promises, method by method, with nothing
    in the way. Keys are without our prefix. Where there is a network, each method may raise StorageError."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()  # owns all below
        self._locks: dict[str, _Lock] = {}  # by key
        self._token = 0

    def acquire(self, wanted: LockRequest) -> Grant | Holder:
        """Takes the lock, or tells who has it. If the lease in the request holds it already, its ttl starts again.
        Raises BadRequest (409) where that lease holds another key, and, where there is a network, OutcomeUnknown."""
        with self._mutex:
            lock = self._alive().get(wanted.key)
            if lock and lock.lease != wanted.lease:
                return self._holder(lock)
            if not lock:
                if wanted.lease and self._key_of(wanted.lease):
                    raise BadRequest(f"x-lease-id: in use for something else: {wanted.lease}", 409)
                self._token += 1
                lock = _Lock(wanted.lease or new_lease_id(), self._token, wanted.value, wanted.ttl)
                self._locks[wanted.key] = lock
            return Grant(lock.lease, self._start_ttl(lock), lock.token)

    def renew(self, lease: int) -> int:
        """Starts the lease's ttl again and returns it; 0 where the lease is known to be gone."""
        with self._mutex:
            key = self._key_of(lease)
            return self._start_ttl(self._locks[key]) if key else 0

    def release(self, lease: int) -> list[str] | None:
        """Ends the lease and returns the keys that this frees; None where there is nothing of ours to end."""
        with self._mutex:
            key = self._key_of(lease)
            return [key] if key and self._locks.pop(key) else None

    def look(self, key: str) -> Holder | None:
        """Who holds the key, with its value and ttls; None where it is free."""
        with self._mutex:
            lock = self._alive().get(key)
            return self._holder(lock) if lock else None

    def list_locks(self, prefix: str) -> tuple[list[tuple[str, Holder]], bool]:
        """The first MAX_LOCKS_LISTED keys with this prefix, sorted, and their holders; whether there are more."""
        with self._mutex:
            keys = sorted(key for key in self._alive() if key.startswith(prefix))
            locks = [(key, self._holder(self._locks[key])) for key in keys[:MAX_LOCKS_LISTED]]
            return locks, len(keys) > MAX_LOCKS_LISTED

    def check(self) -> None:
        """Returns if the storage can serve."""

    start = check  # begins to look after what the storage needs

    def _alive(self) -> dict[str, _Lock]:
        """The locks by key, once those that have ended are forgotten."""
        now = self._clock()
        for key in [key for key, lock in self._locks.items() if lock.ends <= now]:
            del self._locks[key]
        return self._locks

    def _key_of(self, lease: int) -> str | None:
        found = [key for key, lock in self._alive().items() if lock.lease == lease]
        return found[0] if found else None

    def _start_ttl(self, lock: _Lock) -> int:
        lock.ends = self._clock() + lock.ttl
        return lock.ttl

    def _holder(self, lock: _Lock) -> Holder:
        return Holder(lock.lease, lock.token, lock.value, int(lock.ends - self._clock()), lock.ttl)


def new_lease_id() -> int:
    """A random positive int64. We choose it, not etcd, so that a grant can be repeated without harm."""
    return secrets.randbits(63) or 1


# == Storage in etcd: the same promises over a network that fails ====================================================


class EtcdStorage:
    """Locks in etcd. Every operation is safe to repeat, and is repeated until etcd answers or its time is up."""

    def __init__(self, gateway: Gateway, timeout: float) -> None:
        self._gateway, self.start = gateway, gateway.start
        self._timeout = timeout  # seconds for one operation, all tries together
        self._holders = Combiner(gateway.holders, lambda key: part_of_call(len(key)))
        self._claims = Combiner(gateway.claim, lambda claim: part_of_call(len(claim.key) + len(claim.value)))
        self._renewals = Combiner(gateway.keep_alive, lambda lease: 1 / MAX_KEEPALIVES)
        self._doomed: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()  # when it ends, lease
        threading.Thread(target=self._end_doomed, name="end-leases", daemon=True).start()

    def acquire(self, wanted: LockRequest) -> Grant | Holder:
        """A read, so that a refusal writes nothing; then a lease of our own, and one transaction that puts the key
        with it if nobody else has. The claim is only sent once the lease is granted, though to send both at once takes
        15 % less time: a member that freezes with both may, when it wakes up, take the key again after its release."""
        deadline = deadline_after(self._timeout)
        self._gateway.check_clusters(deadline)
        read = self._gateway.look if wanted.lease else self._holders.ask  # only the first tells the lease
        holder = self._insist(read, wanted.key, deadline, reads=True)
        if holder and holder.lease == wanted.lease != 0:  # an earlier try of this caller has taken it
            if ttl := self._insist(self._renewals.ask, wanted.lease, deadline):
                return Grant(wanted.lease, ttl, holder.token)
        elif holder:
            return holder
        claim = wanted._replace(lease=wanted.lease or new_lease_id())
        ttl = self._grant(wanted, claim, deadline)
        # A lease that may end under a slow etcd goes alone: etcd would refuse all that share the call.
        ask = self._claims.ask if ttl > self._timeout else self._gateway.claim_alone
        try:
            winner = self._insist(ask, claim, deadline)
        except StorageError as fault:
            if self._end_lease(wanted, claim.lease, ttl, deadline):
                raise StorageError(str(fault)) from fault  # not unknown: without its lease there is no lock
            raise
        if winner.lease == claim.lease:
            return Grant(claim.lease, ttl, winner.token)
        self._end_lease(wanted, claim.lease, ttl, deadline)
        return winner

    def _grant(self, wanted: LockRequest, claim: LockRequest, deadline: float) -> int:
        """The granted ttl of the lease to claim with."""
        try:
            if ttl := self._insist(self._gateway.grant, claim, deadline):
                return ttl
        except OutcomeUnknown as fault:  # at worst there is a lease without a key
            self._end_lease(wanted, claim.lease, wanted.ttl, deadline)
            raise StorageError(str(fault)) from fault
        # It exists: by a try of ours whose answer is lost, or by an earlier request of this caller.
        found = self._insist(self._gateway.time_to_live, claim.lease, deadline, reads=True)
        if found and any(key != (KEY_PREFIX + wanted.key).encode() for key in found[2]):
            raise BadRequest(f"x-lease-id: in use for something else: {claim.lease}", 409)
        if not found or not (ttl := self._insist(self._renewals.ask, claim.lease, deadline)):
            raise StorageError("the lease ended before it was used")
        return ttl

    def renew(self, lease: int) -> int:
        return self._insist(self._renewals.ask, lease, deadline_after(self._timeout))

    def release(self, lease: int) -> list[str] | None:
        """A lease without keys, or with one outside of our prefix, is another tenant's of this etcd."""
        deadline = deadline_after(self._timeout)
        _, _, keys = self._insist(self._gateway.time_to_live, lease, deadline, reads=True) or (0, 0, [])
        if not keys or not all(key.startswith(KEY_PREFIX.encode()) for key in keys):
            return None
        self._insist(self._gateway.revoke, lease, deadline)
        return [key.decode("utf-8", "replace").removeprefix(KEY_PREFIX) for key in keys]

    def look(self, key: str) -> Holder | None:
        deadline = deadline_after(self._timeout)
        self._gateway.check_clusters(deadline)
        holder = self._insist(self._gateway.look, key, deadline, reads=True)
        if not holder or not holder.lease:
            return holder
        found = self._insist(self._gateway.time_to_live, holder.lease, deadline, reads=True)
        return holder._replace(ttl=found[0], granted_ttl=found[1]) if found else None  # it ended meanwhile

    def list_locks(self, prefix: str) -> tuple[list[tuple[str, Holder]], bool]:
        deadline = deadline_after(self._timeout)
        self._gateway.check_clusters(deadline)
        return self._insist(self._gateway.list_locks, prefix, deadline, reads=True)

    def check(self) -> None:
        deadline = deadline_after(self._timeout)
        self._gateway.check_clusters(deadline)
        self._insist(self._holders.ask, "", deadline, reads=True)  # within our prefix, and nobody's key

    def _insist(self, ask: Callable[[Item, float], Answer], item: Item, deadline: float, reads: bool = False) -> Answer:
        """Asks until there is an answer or the deadline; the session picks the member and keeps the pace. After a try
        that may have been applied, only a success settles the outcome: a refusal does not."""
        unknown: OutcomeUnknown | None = None
        while True:
            try:
                return ask(item, deadline)
            except StorageError as fault:
                if isinstance(fault, OutcomeUnknown) and not reads:
                    unknown = fault
                if isinstance(fault, Refused) or time.monotonic() >= deadline:
                    raise unknown or StorageError(str(fault)) from fault

    def _end_lease(self, wanted: LockRequest, lease: int, ttl: int, deadline: float) -> bool:
        """Cleans up after an acquire that failed, in the background if need be: True if the lease is gone. One that the
        caller chose stays to its ttl: a repetition may have got the lock with it since."""
        try:
            if not wanted.lease:
                self._insist(self._gateway.revoke, lease, deadline)
            return not wanted.lease
        except StorageError:
            if self._doomed.qsize() < MAX_DOOMED:
                self._doomed.put((time.monotonic() + ttl, lease))
            return False

    def _end_doomed(self) -> None:
        """Ends the leases that could not be ended at once, one by one, so that a slow etcd is not made slower."""
        while True:
            ends, lease = self._doomed.get()
            try:
                if time.monotonic() < ends:
                    self._insist(self._gateway.revoke, lease, deadline_after(self._timeout))
            except StorageError:  # logged per member, not per try
                self._doomed.put((ends, lease))
                time.sleep(1)  # second, after a refusal that came at once


# == Combiner: one call for all that wait ============================================================================
# A read costs etcd 407 µs of CPU alone and 13 µs as one of 64 in a call. While one call is under way, later callers
# gather in the batch that is open; when the call is back, one of them makes the next, in its own thread. There is no
# dispatcher thread, and a lone caller pays nothing.


class _Batch(Generic[Item]):
    """Callers that share a call. The baton goes from one to the next: the first to get it makes the call, and all
    others find their answers. To wake all at once makes them fight for the interpreter: 15 % fewer requests/s."""

    def __init__(self) -> None:
        self.items: dict[object, Item] = {}  # by caller
        self.room = 1.0  # of a call, what is not taken up
        self.answers: dict[object, Any] = {}  # by caller; empty before the call starts
        self.next: _Batch[Item] | None = None  # gets its baton when this call is back
        self.baton = threading.Lock()
        self.baton.acquire()


class Combiner(Generic[Item, Answer]):
    """Makes calls that carry the items of several callers. `call(items, deadline)` returns an answer for each in order;
    an exception among them is raised to its caller. `share(item)` is the part of a call that it takes up, at most 1 in
    all. An item only joins a call that has not started, so a read is never older than its request."""

    def __init__(
        self, call: Callable[[list[Item], float], Sequence[Answer | StorageError]], share: Callable[[Item], float]
    ) -> None:
        self._call, self._share = call, share
        self._mutex = threading.Lock()  # owns which batch is open, who is in it, and who has started
        self._open: _Batch[Item] = _Batch()  # later callers join it
        self._open.baton.release()  # free while no call is under way

    def ask(self, item: Item, deadline: float) -> Answer:
        """The answer to this item, by `deadline` (time.monotonic). Raises StorageError."""
        me, share = object(), self._share(item)
        with self._mutex:
            if self._open.items and self._open.room < share:
                self._open.next = self._open = _Batch()
            batch = self._open
            batch.room -= share
            batch.items[me] = item
        if not batch.baton.acquire(timeout=max(0.0, deadline - time.monotonic())):
            with self._mutex:
                if not batch.baton.acquire(blocking=False):  # nor did it come in this very moment
                    if batch.answers:
                        raise OutcomeUnknown("timed out while etcd was asked")
                    del batch.items[me]
                    raise StorageError("timed out behind others that wait for etcd")
        try:
            if not batch.answers:
                self._lead(batch, deadline)
        finally:
            batch.baton.release()
        answer: Answer | StorageError = batch.answers[me]
        if isinstance(answer, Refused) and len(batch.items) > 1:  # another item may be to blame
            [answer] = self._call([item], deadline)
        if isinstance(answer, StorageError):  # a copy: one that several threads raise collects the tracebacks of all
            raise copy.copy(answer) from answer
        return answer

    def _lead(self, batch: _Batch[Item], deadline: float) -> None:
        """Makes the call of this batch, and then lets the next one start."""
        with self._mutex:
            batch.answers = dict.fromkeys(batch.items, OutcomeUnknown("the call that it shared broke off"))
            if batch is self._open:
                self._open.next = self._open = _Batch()
        try:
            answers = self._call(list(batch.items.values()), deadline)
            batch.answers = dict(zip(batch.items, answers, strict=True))
        except StorageError as fault:
            batch.answers = dict.fromkeys(batch.items, fault)
        finally:  # whatever happened, nobody is left waiting
            with self._mutex:
                following = batch.next or self._open
                while not following.items and following.next:  # all of them gave up
                    following = following.next
                following.baton.release()


# == Gateway: etcd's JSON gateway, in our words ======================================================================
# Base64 and int64-as-text stop here. etcd's answers leave out fields that are zero, false or empty, and etcd ignores
# fields that it does not know: a typo in a compare would compare something else.

MAX_OPERATIONS = 64  # in one transaction; etcd allows 128, nested ones counted in
MAX_BATCH_BYTES = 256 << 10  # of keys and values in one call; base64 adds a third, and etcd's limit is 1.5 MiB
MAX_KEEPALIVES = 64  # lines of 26 bytes in one POST: see _BLANKS
GRPC_NOT_FOUND, GRPC_DENIED, GRPC_UNAVAILABLE, GRPC_UNAUTHENTICATED = 5, 7, 14, 16
# Codes that mean that nothing was applied, whichever member says it: invalid argument, not found, already exists,
# permission denied, resource exhausted, failed precondition, out of range, unimplemented, unauthenticated.
GRPC_REFUSALS = {3, 5, 6, 7, 8, 9, 11, 12, 16}
Storage = MemoryStorage | EtcdStorage | Cache


def part_of_call(size: int) -> float:
    """The part of a transaction that an operation with `size` characters takes up; each is at most 4 bytes."""
    return max(1 / MAX_OPERATIONS, size * 4 / MAX_BATCH_BYTES)


class Gateway:
    """Calls to etcd's API. Each raises StorageError if it has no answer by `deadline` (time.monotonic)."""

    def __init__(self, members: Members) -> None:
        import etcd3gw  # only here, so that the file runs without any package on the mock

        client = etcd3gw.Etcd3Client(session=cast(Any, members), api_path="/v3/")
        self.check_clusters, self.start = members.check_clusters, members.start
        self._post = functools.cache(lambda path: functools.partial(client.post, client.get_url(path)))

    def holders(self, keys: list[str], deadline: float, whole: bool = False) -> list[Holder | None]:
        """Who holds each key; a linearizable read. Only whole keys tell the lease: etcd 3.7 leaves it out of those
        without the value (etcd-io/etcd 22209)."""
        reads = {key: {"key": _base64(KEY_PREFIX + key), "keys_only": not whole} for key in keys}
        _, answers = self._transact("range", list(reads.values()), deadline)
        by_key = {key: one for key, answer in zip(reads, answers, strict=True) for one in _holders(answer)}
        return [by_key.get(key) for key in keys]

    def look(self, key: str, deadline: float) -> Holder | None:
        answer = self._post("/kv/range")(json={"key": _base64(KEY_PREFIX + key)}, deadline=deadline)
        return next(iter(_holders(answer)), None)

    def list_locks(self, prefix: str, deadline: float) -> tuple[list[tuple[str, Holder]], bool]:
        """The first keys with this prefix, and whether there are more; one linearizable read."""
        *most, last = (KEY_PREFIX + prefix).encode()
        end = base64.b64encode(bytes([*most, last + 1])).decode()  # never over 0xff, which UTF-8 does not have
        read = {"key": _base64(KEY_PREFIX + prefix), "range_end": end, "limit": MAX_LOCKS_LISTED}
        answer = self._post("/kv/range")(json=read, deadline=deadline)
        keys = [base64.b64decode(kv["key"])[len(KEY_PREFIX) :].decode(errors="replace") for kv in answer.get("kvs", ())]
        return list(zip(keys, _holders(answer), strict=True)), bool(answer.get("more"))

    def grant(self, wanted: LockRequest, deadline: float) -> int:
        """Makes the lease and returns the ttl that was granted; 0 where it exists already."""
        self.check_clusters(deadline)
        lease = {"ID": wanted.lease, "TTL": wanted.ttl}
        try:
            return int(self._post("/lease/grant")(json=lease, deadline=deadline)["TTL"])
        except Refused as fault:
            if "lease already exists" not in str(fault):
                raise
            return 0

    def claim(self, claims: list[LockRequest], deadline: float) -> list[Holder | StorageError]:
        """Puts each key that nobody holds with its lease, and tells who holds it then. It may be repeated: whoever
        finds its own lease there has the key. Of two claims for one key only the first is sent, since etcd refuses to
        put a key twice, and who holds a key that was not put is read later: as a branch it cost every acquire 8 %."""
        distinct = {claim.key: claim for claim in reversed(claims)}
        answer, answers = self._transact("txn", list(map(_claim_txn, distinct.values())), deadline)
        token = int(answer["header"]["revision"])
        outcomes: dict[str, Holder | StorageError] = {
            claim.key: Holder(claim.lease, token)
            for claim, response in zip(distinct.values(), answers, strict=True)
            if response.get("succeeded")
        }
        if lost := [key for key in distinct if key not in outcomes]:
            try:
                found = zip(lost, self.holders(lost, deadline, whole=True), strict=True)
                outcomes |= {key: holder or StorageError("released in this very moment") for key, holder in found}
            except StorageError as fault:  # among the lost may be one that an earlier try has won
                outcomes |= dict.fromkeys(lost, OutcomeUnknown(str(fault)))
        return [outcomes[claim.key] for claim in claims]

    def claim_alone(self, claim: LockRequest, deadline: float) -> Holder:
        [outcome] = self.claim([claim], deadline)
        if isinstance(outcome, StorageError):
            raise outcome
        return outcome

    def keep_alive(self, leases: list[int], deadline: float) -> list[int | StorageError]:
        """The renewed ttl of each lease, 0 where it is gone. Answers are matched by ID, since some may be missing."""
        post, lines = self._post("/lease/keepalive"), [{"ID": lease} for lease in dict.fromkeys(leases)]
        ttls = _ttls(post(json=lines, deadline=deadline, doubtful=lambda said: 0 in _ttls(said).values()))
        cut_short = StorageError("etcd cut its answer short")
        return [ttls.get(lease, cut_short) for lease in leases]

    def time_to_live(self, lease: int, deadline: float) -> tuple[int, int, list[bytes]] | None:
        """Of a live lease: seconds left, seconds granted, and the keys attached to it, with our prefix or another."""
        post, wanted = self._post("/lease/timetolive"), {"ID": lease, "keys": True}
        try:
            answer = post(json=wanted, deadline=deadline, doubtful=lambda said: int(said.get("TTL", 0)) < 0)
        except Refused as fault:
            if fault.code == GRPC_DENIED:  # it holds a key that our role may not read
                return 0, 0, [b""]
            raise
        left, granted = int(answer.get("TTL", 0)), int(answer.get("grantedTTL", 0))
        return (left, granted, list(map(base64.b64decode, answer.get("keys", ())))) if left >= 0 else None

    def revoke(self, lease: int, deadline: float) -> None:
        """Ends the lease; one that is gone already is as good. A claim with it that is still under way will fail."""
        try:
            self._post("/lease/revoke")(json={"ID": lease}, deadline=deadline)
        except Refused as fault:
            if fault.code != GRPC_NOT_FOUND:
                raise

    def _transact(self, kind: str, operations: list[Any], deadline: float) -> tuple[dict[str, Any], list[Any]]:
        """The answer to one transaction of these operations, ranges or txns, and in it the answer to each."""
        if len(operations) == 1:  # 20 µs less than a transaction of one
            answer = self._post(f"/kv/{kind}")(json=operations[0], deadline=deadline)
            return answer, [answer]
        txn = {"success": [{f"request_{kind}": operation} for operation in operations]}
        answer = self._post("/kv/txn")(json=txn, deadline=deadline)
        return answer, [response[f"response_{kind}"] for response in answer["responses"]]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _claim_txn(claim: LockRequest) -> dict[str, Any]:
    """If the key does not exist (create_revision 0), put it with the lease."""
    key, value = _base64(KEY_PREFIX + claim.key), _base64(claim.value)
    put = {"request_put": {"key": key, "value": value, "lease": claim.lease}}
    return {"compare": [{"key": key, "target": "CREATE", "create_revision": 0}], "success": [put]}


def _holders(answer: dict[str, Any]) -> list[Holder]:
    """The holders in a RangeResponse."""
    found: list[Any] = answer.get("kvs", [])
    values = [base64.b64decode(kv.get("value", "")).decode(errors="replace") for kv in found]
    return [
        Holder(int(kv.get("lease", 0)), int(kv["create_revision"]), one) for kv, one in zip(found, values, strict=True)
    ]


def _ttls(answers: list[dict[str, Any]]) -> dict[int, int]:
    """The ttl of each lease in the answers to a keepalive; 0: not found."""
    results = [answer["result"] for answer in answers if "result" in answer]
    return {int(result.get("ID", 0)): max(0, int(result.get("TTL", 0))) for result in results}


def classify(status: int, text: str) -> StorageError:
    """What an answer other than 200 means; by gRPC code, since HTTP codes differ between etcd's releases. Shapes:
    {"error": M, "code": N} and, 3.6, {"message": M, "code": N}; of a stream {"error": {"grpc_code": N, "message": M}}
    and, 3.6, {"error": {"code": N, "message": M}}; and plain text."""
    try:
        answer = json.loads(text)
        detail = answer["error"] if isinstance(answer.get("error"), dict) else answer
        code = int(detail.get("grpc_code", detail.get("code")))
        message = str(detail.get("message") or detail.get("error"))
    except (ValueError, TypeError, AttributeError):
        hint = "; is the gateway on (--enable-grpc-gateway), and is this etcd?" if status == 404 else ""
        if "CommonName" in text:
            hint = "; with etcd's auth enabled, the client certificate must have no CommonName"
        kind = StorageError if 400 <= status < 500 else OutcomeUnknown
        return kind(f"HTTP {status}: {quote(' '.join(text.split()))}{hint}")
    if code in GRPC_REFUSALS:
        return Refused(message, code)
    if code == GRPC_UNAVAILABLE and "no leader" in message:
        return StorageError(message)  # thanks to our header hasleader, before anything was done
    return OutcomeUnknown(message)  # timed out, leader changed, not a primary lessor, and anything else


# == Members: which one to ask, over which connection ================================================================

PAUSE_SECONDS = 0.1  # between two tries of one member that failed
WATCH_SECONDS = 1.0  # between two looks at a member, and between two log-ins that are refused
MAX_IDLE = 256  # connections kept open to one member
MAX_ANSWER_BYTES = 16 << 20  # most are below 1 MiB, but a lease of another tenant may have many keys
READ: dict[str, Any] = {"url": "http://any/v3/kv/range", "json": {"key": _base64(KEY_PREFIX)}}  # linearizable


class Member:
    """A member of etcd at one address: its idle connections, and its health as it was last seen."""

    def __init__(self, endpoint: Address, host: str, name: str) -> None:
        self.endpoint, self.name = endpoint, name
        self.host = host  # an IP address; empty while the endpoint's name has none
        self.idle: list[Wire] = []  # append and pop are atomic; the most recently used is taken first
        self.cluster = self.release = ""  # the ID of its cluster, and its version; empty: it never told
        self.fault: str | None = None  # None: it is well
        self.failed_at, self.errors = -math.inf, 0
        # Without a leader a member says so at once, and certainly has not applied the call (etcd-io/etcd 10819).
        self.headers = f"Host: {endpoint}\r\nContent-Type: application/json\r\nGrpc-Metadata-hasleader: true\r\n"

    def hang_up(self) -> None:
        while self.idle:
            with contextlib.suppress(IndexError):  # another thread took the last
                self.idle.pop().sock.close()

    def broken(self, wire: Wire, kept: bool, fault: Exception) -> StorageError:
        """What it means that this connection broke while the member was asked."""
        wire.sock.close()
        if isinstance(fault, BadRequest) and fault.status == 413:
            return Refused(f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
        if kept and not wire.buffer and isinstance(fault, ConnectionError | EOFError | ssl.SSLError):
            self.hang_up()  # etcd closed them while nobody asked: they are of the same age
            return OutcomeUnknown(reason(fault), sick=False)
        if not kept and isinstance(fault, ssl.SSLError):  # TLS 1.3 refuses a client after the handshake
            hung_up = isinstance(fault, ssl.SSLEOFError | ssl.SSLZeroReturnError)  # before we read why
            return StorageError("TLS: it hung up; does it accept our certificate?" if hung_up else reason(fault))
        hint = "; is it https?" if not kept and not self.endpoint.tls and isinstance(fault, EOFError) else ""
        return OutcomeUnknown(reason(fault) + hint)


class Members:
    """The session under etcd3gw: kept connections to all members of etcd, and one that is well for each call. The first
    serves until it fails; then it becomes the last. Each address of an endpoint's name is a member; one thread an
    endpoint looks after them. (requests, etcd3gw's own session, takes 0.7 ms of CPU a call, not 0.08, and one host.)"""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._timeout = config.etcd_timeout
        endpoints = {one._replace(tls=config.etcd_tls or bool(one.tls)) for one in config.etcd_addr_list}
        files = ("ca_cert_path", "client_cert_path", "client_key_path") if config.etcd_tls else ()
        self._tls = tls_context(config, ssl.Purpose.SERVER_AUTH, *files) if any(one.tls for one in endpoints) else None
        self._login = Login(config.etcd_username, config.etcd_password)
        self._mutex = threading.Lock()  # owns the order of members and the fields about their health
        self._members: list[Member] = []
        self._cluster = ""  # the ID of the cluster that is used
        self._unseen = endpoints  # whose members have not been looked at yet
        self._first_looks_end = math.inf
        metrics.sources.append(self._samples)

    def start(self) -> None:
        self._first_looks_end = time.monotonic() + self._timeout / 2
        for endpoint in self._unseen.copy():
            threading.Thread(target=self._watch, args=(endpoint,), name=f"watch-{endpoint}", daemon=True).start()

    def post(
        self, url: str, *, json: Any, deadline: float, doubtful: Any = None, member: Any = None, **_: object
    ) -> types.SimpleNamespace:
        """One try on one member, for a share of the time: only a timeout gives a frozen one away. A list goes as JSON
        lines, and only the path in `url` counts. Raises StorageError. What the predicate `doubtful` finds so is only
        believed after a linearizable read on the same member: one that was frozen says for some milliseconds that
        leases are gone which are alive."""
        asked: Member = member or self._pick(deadline)
        if asked.cluster != self._cluster and not member:  # look at a stranger before the first write to it
            self.post(**READ, deadline=deadline, member=asked)
        share_ends = time.monotonic() + self._timeout / (len(self._members) + 1)
        until, login = min(share_ends, deadline), self._login.header
        try:
            answer = self._exchange(asked, f"POST /{url.split('/', 3)[3]}", json, until)
            self._note_answer(asked, answer)
        except StorageError as fault:
            log_in = functools.partial(self._exchange, asked, "POST /v3/auth/authenticate", deadline=until)
            fault = self._login.cure(fault, login, log_in)
            # If the caller's deadline cut the try short, that says nothing about the member.
            if fault.sick and (share_ends <= deadline or time.monotonic() < deadline):
                self._mark_sick(asked, str(fault))
            fault.args = (f"{asked.name}: {fault}",)
            raise fault
        if doubtful and doubtful(answer):
            self.check_clusters(deadline)  # of two, only one knows the lease
            self.post(**READ, deadline=deadline, member=asked)
            return self.post(url, json=json, deadline=deadline, member=asked)
        return types.SimpleNamespace(status_code=200, json=lambda: answer)  # all that etcd3gw looks at

    def check_clusters(self, deadline: float) -> None:
        """Returns if a lock may be granted: all members were looked at once, and are of one cluster. Two replicas that
        begin with members of two would lend one lock twice. Raises StorageError."""
        while self._unseen and time.monotonic() < min(deadline, self._first_looks_end):
            time.sleep(0.01)
        for member in self._members:
            if member.cluster and member.cluster != self._cluster:
                names = {one.cluster: one.name for one in self._members if one.cluster}.values()
                raise StorageError(f"members of two clusters are listed: {', '.join(names)}")

    def _pick(self, deadline: float) -> Member:
        """The first. If that has just failed, all have: then with a pause between two tries of one."""
        while True:
            first, now = next(iter(self._members), None), time.monotonic()
            if first and (first.fault is None or first.failed_at + PAUSE_SECONDS <= now < deadline):
                return first
            if now >= deadline:
                raise StorageError(f"{first.name}: {first.fault}" if first else "no address of etcd is known yet")
            time.sleep(min(PAUSE_SECONDS / 4, deadline - now))

    def _exchange(self, member: Member, request: str, payload: Any, deadline: float) -> Any:
        """Asks over a kept connection or a new one. Raises StorageError without the member's name."""
        if time.monotonic() >= deadline:
            raise StorageError("no time was left to ask it", sick=False)
        try:
            wire, kept = member.idle.pop(), True
        except IndexError:
            wire, kept = self._connect(member, deadline), False
        body = _to_lines(payload)
        head = f"{request} HTTP/1.1\r\n{member.headers}{self._login.header}Content-Length: {len(body)}\r\n\r\n"
        try:
            wire.send((head + body).encode(), deadline)
            status, headers = parse_answer_head(wire.head(deadline))
            text = wire.body(body_length(headers, MAX_ANSWER_BYTES), MAX_ANSWER_BYTES, deadline).decode()
        except (OSError, EOFError, BadRequest, ValueError) as fault:
            raise member.broken(wire, kept, fault) from fault
        if status == 200 and not wire.buffer and "connection" not in headers and len(member.idle) < MAX_IDLE:
            member.idle.append(wire)
        else:  # not to be trusted after an error, or with something unread
            wire.sock.close()
        return parse_answer(status, text, payload)

    def _connect(self, member: Member, deadline: float) -> Wire:
        try:
            if not member.host:
                raise ValueError("its name has no address")
            left = max(0.001, deadline - time.monotonic())
            sock = socket.create_connection((member.host, member.endpoint.port), left)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls and member.endpoint.tls:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock = self._tls.get().wrap_socket(sock, server_hostname=member.endpoint.host)
            sock.settimeout(None)
            return Wire(sock)
        except (OSError, ValueError) as fault:
            ours = getattr(fault, "errno", None) in OWN_SHORTAGES
            time.sleep(PAUSE_SECONDS if ours else 0)
            hint = "; is it http?" if member.endpoint.tls and isinstance(fault, ConnectionResetError) else ""
            raise StorageError(reason(fault) + hint, sick=not ours) from fault

    def _note_answer(self, member: Member, answer: Any) -> None:
        """Whoever answers is well, unless it is of another cluster. Raises OutcomeUnknown."""
        header = answer["header"] if isinstance(answer, dict) else answer[0].get("result", {}).get("header", {})
        cluster = header.get("cluster_id", member.cluster)
        if cluster == self._cluster == member.cluster and member.fault is None:
            return
        with self._mutex:
            member.cluster = cluster
            if self._cluster not in {one.cluster for one in self._members if one.cluster}:
                self._cluster = cluster  # it is the first that answers, or the whole list has moved
            if cluster != self._cluster:
                raise OutcomeUnknown("it is of another cluster than the members before it")
            before, member.fault = member.fault, None
        if before is not None:
            event(INFO, "etcd member is well again", member=member.name)

    def _mark_sick(self, member: Member, fault: str) -> None:
        member.hang_up()
        with self._mutex:
            member.errors += 1
            before, member.fault, member.failed_at = member.fault, fault, time.monotonic()
            self._members = sorted(self._members, key=lambda one: one is member)  # it becomes the last
        if before is None:
            event(DEBUG if self._is_spare(member) else WARNING, "etcd member failed", member=member.name, reason=fault)

    def _is_spare(self, member: Member) -> bool:
        """An address that never answered, of a name with one that did: ::1 of localhost, say, is no member."""
        return not member.cluster and any(one.cluster for one in self._members if one.endpoint == member.endpoint)

    def _samples(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in itertools.filterfalse(self._is_spare, self._members):
            found[sample("shared_lock_etcd_member_up", member=one.name)] = int(one.fault is None and one.cluster != "")
            found[sample("shared_lock_etcd_errors_total", member=one.name)] = one.errors
        return found

    def _watch(self, endpoint: Address) -> None:
        """Looks the name up while one of its members is sick, and asks each member."""
        mine: list[Member] = []
        while True:
            if not mine or any(member.fault for member in mine):
                mine = self._look_up(endpoint)
            for member in sorted(mine, key=lambda one: ":" in one.host):
                with contextlib.suppress(StorageError):  # noted at the member
                    self.post(**READ, deadline=math.inf, member=member)  # for as long as a try may take
                    if not member.release:
                        self._check_release(member)
            self._unseen.discard(endpoint)
            time.sleep(WATCH_SECONDS)

    def _look_up(self, endpoint: Address) -> list[Member]:
        """The members at the addresses of the endpoint's name. An old one stays while it is well, or no new one is: or
        its cluster would be forgotten."""
        mine = {one.host for one in self._members if one.endpoint == endpoint}
        try:
            found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
            hosts = {str(info[4][0]) for info in found}
        except (OSError, UnicodeError):
            hosts = mine or {""}
        with self._mutex:
            of_it = [one for one in self._members if one.endpoint == endpoint]
            has_heir = any(one.cluster for one in of_it if one.host in hosts)
            gone = [one for one in of_it if one.fault and one.host not in hosts and has_heir]
            members = [one for one in self._members if one not in gone]
            for host in hosts - mine:  # anywhere: replicas that start together do not all begin with the same
                address = endpoint if len(hosts) == 1 else endpoint._replace(host=host)
                members.insert(random.randint(0, len(members)), Member(endpoint, host, address.url()))
            self._members = members
        return [member for member in members if member.endpoint == endpoint]

    def _check_release(self, member: Member) -> None:
        """Warns of releases that may end or renew leases wrongly after a leader was frozen."""
        answer = self._exchange(member, "GET /version", {}, deadline_after(self._timeout))
        member.release = release = str(answer.get("etcdserver"))
        numbers, better = tuple(map(int, re.findall("[0-9]+", release)[:3])), "3.5.23, 3.6.5 or newer"
        if numbers < (3, 5, 23) or (3, 6) <= numbers < (3, 6, 5):
            event(WARNING, "etcd release with defects in leases", member=member.name, release=release, better=better)


class Login:
    """The token of an etcd with auth enabled, which ends at etcd's discretion: one log-in for all callers."""

    def __init__(self, name: str, password: str) -> None:
        self._credentials = {"name": name, "password": password}
        self._mutex = threading.Lock()  # held during a log-in, and owns all below
        self._refusal: Refused | None = None
        self._again_at = -math.inf
        self.header = ""  # empty before the first log-in

    def cure(self, fault: StorageError, used: str, log_in: Callable[[Any], Any]) -> StorageError:
        """Logs in if `fault` asks for it, unless another caller did since `used`. Returns what to raise: an error to
        try again after, or the Refused of the log-in, which is remembered for WATCH_SECONDS."""
        asked = re.search("user name is empty|auth store is old", str(fault))
        if not self._credentials["name"] or not (asked or getattr(fault, "code", 0) == GRPC_UNAUTHENTICATED):
            return fault
        with self._mutex:
            if self.header == used and time.monotonic() > self._again_at:
                before, self._refusal, self.header = self._refusal, None, ""  # etcd 3.4 refuses an old one even here
                try:
                    self.header = f"Authorization: {log_in(self._credentials)['token']}\r\n"
                except Refused as refusal:
                    self._refusal, self._again_at = refusal, time.monotonic() + WATCH_SECONDS
                    if before is None:
                        event(WARNING, "etcd log-in refused", reason=refusal)
                except StorageError as failure:  # what asked for the log-in was not applied
                    return StorageError(str(failure), failure.sick)
            return copy.copy(self._refusal) if self._refusal else StorageError("logged in again", sick=False)


@functools.lru_cache(maxsize=256)  # the answers of one second are alike
def parse_answer_head(data: bytes) -> tuple[int, Mapping[str, str]]:
    line, *header_lines = data.decode("latin-1").split("\r\n")
    if not (match := re.match(r"HTTP/1\.[01] ([0-9]{3})", line)):
        raise BadRequest(f"not HTTP: {quote(line)}")
    return int(match[1]), parse_headers(header_lines)


# etcd stops reading the lines of a stream once it starts to answer, and the rest is lost. Only what its decoder reads
# first is safe: 512 bytes, but 2,048 after 1,536 blanks, for which Go's json.Decoder doubles its buffer.
# Measured under load: 32 lines without the blanks, 832 of 19,200 answers missing, 18 lines, none of 86,400; with them
# 64 and 76 lines, none in 600 calls each. A lone line is answered 6 % sooner without.
_SAFE_BYTES, _BLANKS = 512, " " * 1536
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def _to_lines(payload: Any) -> str:
    if not isinstance(payload, list):
        return _to_json(payload)
    lines = _to_json(payload)[1:-1].replace("},{", "}{")  # numbers only; 5 times as fast as line by line
    return lines if len(lines) < _SAFE_BYTES else _BLANKS + lines


def parse_answer(status: int, text: str, payload: object = None) -> Any:
    """The answer to this payload: of a list, a list. Raises StorageError."""
    many = isinstance(payload, list)
    lines = text.strip().replace("\n", ",") if many else text
    with contextlib.suppress(ValueError):
        answers = json.loads(f"[{lines}]") if status == 200 else []
        for one in answers:  # etcd leaves out neither of these, and a line of many may be an error
            if isinstance(one, dict) and (
                isinstance(one.get("header", one.get("result")), dict) or "etcdserver" in one
            ):
                return answers if many else one
    raise classify(status, text.partition("\n")[0] if status == 200 else text)


def open_storage(config: Config, metrics: Metrics) -> Storage:
    """The configured storage, with the cache in front where it is wanted. Raises ConfigError."""
    storage: MemoryStorage | EtcdStorage = MemoryStorage()
    if config.storage_type == "etcd":
        try:
            storage = EtcdStorage(Gateway(Members(config, metrics)), config.etcd_timeout)
        except ImportError as fault:
            raise ConfigError(f"{variable('storage_type')}: etcd needs `pip install etcd3gw`: {fault}") from fault
    return Cache(storage, config.cache_size, metrics) if config.cache_enabled else storage


# == Metrics =========================================================================================================

LEASES = "shared_lock_lease_operations_total"
CACHE = "shared_lock_cache_operations_total"
GRANTS = "shared_lock_lease_grant_duration_seconds"
REQUESTS = "shared_lock_http_requests_total"
KNOWN_RESULTS = {  # operation and statuses; shown from the start
    LEASES: ("get created accepted error", "prolong success failure error", "release success failure error"),
    CACHE: ("get hit miss expired", "set success update", "evict size_limit"),
}
FAMILIES = {
    LEASES: ("counter", "Operations on locks."),
    GRANTS: ("histogram", "Time to answer a POST /lease with 201 or 202, not counting the wait in line."),
    CACHE: ("counter", "Uses of the cache."),
    REQUESTS: ("counter", "Requests that were answered."),
    "shared_lock_etcd_member_up": ("gauge", "1 while the member of etcd answers a linearizable read."),
    "shared_lock_etcd_errors_total": ("counter", "Calls that a member of etcd failed."),
    "shared_lock_waiting": ("gauge", "Callers that wait for a lock."),
    "shared_lock_log_lines_dropped_total": ("counter", "Lines of the log that nobody read in time."),
    "shared_lock_build_info": ("gauge", "The version that runs."),
    "process_start_time_seconds": ("gauge", "Start, in seconds since 1970."),
    "process_cpu_seconds_total": ("counter", "CPU time, of user and system."),
    "process_resident_memory_bytes": ("gauge", "Resident memory."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_max_fds": ("gauge", "How many file descriptors may be open."),
}
_STARTED_SECONDS = time.time()


@functools.lru_cache(maxsize=1024)
def sample(name: str, **labels: object) -> str:
    """A sample's name and labels, as they stand in Prometheus' text format 0.0.4."""
    return f"{name}{{{','.join(f'{label}={json.dumps(str(value))}' for label, value in labels.items())}}}"


GRANT_BOUNDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8]  # seconds; over them +Inf
_BUCKETS = [sample(f"{GRANTS}_bucket", operation="get", le=bound) for bound in [*GRANT_BOUNDS, "+Inf"]]
_SUM, _COUNT = sample(f"{GRANTS}_sum", operation="get"), sample(f"{GRANTS}_count", operation="get")


class Metrics:
    """Numbers by sample, under the Go service's names. No key, value or lease is a label. `sources` are asked for
    theirs when a page is made."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # owns the numbers
        self._numbers: dict[str, float] = dict.fromkeys([*_BUCKETS, _SUM], 0)  # each bucket by itself
        for name, results in KNOWN_RESULTS.items():
            for operation, *statuses in map(str.split, results):
                self._numbers |= {sample(name, operation=operation, status=status): 0 for status in statuses}
        self.sources: list[Callable[[], Mapping[str, float]]] = [_process_samples]

    def count(self, name: str, **labels: object) -> None:
        counted = sample(name, **labels)
        with self._mutex:
            self._numbers[counted] = self._numbers.get(counted, 0) + 1

    def observe_grant(self, status: str, seconds: float) -> None:
        with self._mutex:
            self._numbers[sample(LEASES, operation="get", status=status)] += 1
            self._numbers[_BUCKETS[bisect.bisect_left(GRANT_BOUNDS, seconds)]] += 1
            self._numbers[_SUM] += seconds

    def render(self) -> str:
        with self._mutex:
            numbers = self._numbers.copy()
        numbers |= zip(_BUCKETS, itertools.accumulate([numbers[bucket] for bucket in _BUCKETS]), strict=True)
        numbers[_COUNT] = numbers[_BUCKETS[-1]]
        for source in self.sources:
            numbers |= source()
        page = ""
        for family, (kind, meaning) in FAMILIES.items():
            if samples := [f"{name} {value}\n" for name, value in numbers.items() if name.startswith(family)]:
                page += f"# HELP {family} {meaning}\n# TYPE {family} {kind}\n" + "".join(samples)
        return page


def _process_samples() -> dict[str, float]:
    found = {
        "shared_lock_log_lines_dropped_total": log.dropped,
        sample("shared_lock_build_info", version=VERSION): 1,
        "process_start_time_seconds": _STARTED_SECONDS,
        "process_cpu_seconds_total": time.process_time(),
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:  # no /proc, or no descriptor left for it
        found["process_resident_memory_bytes"] = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found["process_open_fds"] = len(os.listdir("/proc/self/fd"))
    return found


# == Profiles: what `go tool pprof` opens ============================================================================
# Only for SHARED_LOCK_PPROF_ENABLED, and at no cost before one is asked for.

Stack = tuple[tuple[str, str, int], ...]  # function, file, line; innermost first
_one_at_a_time = threading.Lock()


def timed(profile: Callable[[int], Response], default: str, request: Request) -> Response:
    """The profile of `?seconds=N`. A second one meanwhile is 503."""
    try:
        seconds = between(1, 300, whole)(_query(request).get("seconds", default))
    except ValueError as fault:
        raise BadRequest(f"seconds: {fault}") from fault
    if not _one_at_a_time.acquire(blocking=False):
        raise BadRequest("a profile is being made already: one at a time", 503)
    try:
        return profile(seconds)
    finally:
        _one_at_a_time.release()


def cpu_profile(seconds: int) -> Response:
    """CPU time by stack. A sample of a thread's stack weighs what the thread used since the last. The sampler needs the
    interpreter, too, so it sees each thread where it lets go of that, mostly in a system call: the sums by caller
    (pprof's cum) are right, the innermost function (flat) is not."""
    samples: collections.Counter[Stack] = collections.Counter()
    before, ends = _cpu_nanos(), time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(0.01)
        used, frames = _cpu_nanos(), sys._current_frames()
        for thread, nanos in used.items():
            if (since := nanos - before.get(thread, 0)) > 0 and thread.ident in frames:
                samples[_stack(frames[thread.ident])] += since
        before = used
    return _pprof("cpu", "nanoseconds", samples, seconds)


def _cpu_nanos() -> dict[threading.Thread, int]:
    used = {}
    for thread in threading.enumerate():
        with contextlib.suppress(OSError):  # it has just ended
            # As glibc makes it of the kernel's ID: time.pthread_getcpuclockid() may crash on a thread that has ended.
            used[thread] = time.clock_gettime_ns(~(thread.native_id or 0) << 3 | 6)
    return used


def heap_profile(seconds: int) -> Response:
    """Bytes that Python allocated during so many seconds and that are in use at their end, by stack."""
    import tracemalloc

    tracemalloc.start(12)  # frames of each allocation
    time.sleep(seconds)
    traces = tracemalloc.take_snapshot().traces
    tracemalloc.stop()
    codes = [one.__code__ for one in gc.get_objects() if isinstance(one, types.FunctionType)]
    names = {(code.co_filename, line): code.co_qualname for code in codes for _, _, line in code.co_lines()}
    samples: collections.Counter[Stack] = collections.Counter()
    for trace in traces:
        frames = [(one.filename, one.lineno) for one in reversed(trace.traceback)]
        samples[tuple((names.get(frame, frame[0]), *frame) for frame in frames)] += trace.size
    return _pprof("inuse_space", "bytes", samples, seconds)


def thread_stacks(request: Request) -> Response:
    """Every thread's stack: as text with ?debug=1 or 2, else for pprof."""
    stacks = {thread: _stack(frame) for thread, frame in sys._current_frames().items()}
    if _query(request).get("debug", "0") == "0":
        return _pprof("threads", "count", collections.Counter(stacks.values()))
    names, text = {thread.ident: thread.name for thread in threading.enumerate()}, ""
    for ident, stack in stacks.items():
        lines = [f"  {function} at {file}:{line}\n" for function, file, line in stack]
        text += f"{names.get(ident, '?')}:\n{''.join(lines)}\n"
    return Response(200, text.encode())


def _stack(frame: types.FrameType) -> Stack:
    return tuple((one.f_code.co_qualname, one.f_code.co_filename, line) for one, line in traceback.walk_stack(frame))


def _pprof(kind: str, unit: str, samples: Mapping[Stack, int], seconds: int = 0) -> Response:
    """A gzipped profile.proto (github.com/google/pprof/proto/profile.proto); the numbers are its fields'."""
    import gzip

    strings: dict[str, int] = collections.defaultdict(itertools.count(1).__next__, {"": 0})  # each new one is numbered
    functions: dict[tuple[str, str], int] = collections.defaultdict(itertools.count(1).__next__)
    places: dict[tuple[str, str, int], int] = collections.defaultdict(itertools.count(1).__next__)
    out = [_field(1, _field(1, strings[kind]) + _field(2, strings[unit]))]
    for stack, value in samples.items():
        out.append(_field(2, b"".join(_field(1, places[place]) for place in stack) + _field(2, value)))
    for (function, file, line), number in places.items():
        code = _field(1, functions[function, file]) + _field(2, line)
        out.append(_field(4, _field(1, number) + _field(4, code)))
    for (function, file), number in functions.items():
        out.append(_field(5, _field(1, number) + _field(2, strings[function]) + _field(4, strings[file])))
    out += [_field(6, text.encode()) for text in strings]
    out += [_field(9, time.time_ns()), _field(10, seconds * 10**9)]
    return Response(200, gzip.compress(b"".join(out)), "application/octet-stream")


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message; bytes are text or another message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _varint(value >> 7)


PROFILES: dict[str, Callable[[Request], Response]] = {
    "": lambda request: Response(200, b"profile?seconds=30\nheap?seconds=10\ngoroutine?debug=2\n"),
    "profile": functools.partial(timed, cpu_profile, "30"),
    "heap": functools.partial(timed, heap_profile, "10"),
    "goroutine": thread_stacks,
}


# == Life of the process: start, serve, stop =========================================================================


def be_quick() -> None:
    """Only one thread runs Python at a time, and to hand over to one on another CPU takes longer than what that does
    then: on one CPU of 2, 150 connections get 25,600 refusals/s instead of 12,600, and 1.4 times the keepalives. The
    CPU is a random one: the kernel moves others away, but not another such daemon."""
    # Seconds. Among short bursts a forced switch only delays: without this, p99 of refusals is 56 to 84 ms, not 42.
    sys.setswitchinterval(0.02)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not allowed: slower, and no worse
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})


def serve(config: Config) -> int:
    """Runs the daemon until SIGTERM or SIGINT; returns the exit status. Raises ConfigError."""
    stops: list[int] = []  # the signals that came

    def stop(number: int, frame: object) -> None:
        if stops:  # the second
            os._exit(128 + number)
        stops.append(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.debug = config.debug
    be_quick()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a connection is one, and the soft limit is often 1,024
    with contextlib.suppress(OSError, ValueError):  # not allowed: as many as before
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    metrics = Metrics()
    api = Api(LockService(open_storage(config, metrics), metrics), metrics, config)
    try:
        server = Server(config, api)
    except (OSError, UnicodeError) as fault:
        if isinstance(fault, UnicodeError | socket.gaierror) or fault.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            host = quote(config.server_host)
            raise ConfigError(f"{variable('server_host')}: not an address of this machine: {host}") from fault
        print(f"shared-lock: cannot listen on port {config.server_port}: {reason(fault)}", file=sys.stderr)
        return 1
    tell_start(config, server)
    api.service.storage.start()
    while not stops:
        server.handle_request()
    event(INFO, "stopping")
    server.stop(config.server_shutdown_timeout)
    event(INFO, "stopped")
    return 0


def tell_start(config: Config, server: Server) -> None:
    """The first line of the log, and a warning for each variable that is most likely a typo."""
    shown = {"storage": config.storage_type, "tls": "yes" if config.server_cert_path else "no"}
    if config.storage_type == "etcd":
        shown["members"] = ",".join(one.url(config.etcd_tls) for one in config.etcd_addr_list)
    needs = {"token": config.server_token_path, "certificate": config.server_client_ca_path}
    shown["callers_need"] = "+".join(name for name, path in needs.items() if path) or "nothing"
    event(INFO, "serving", address=Address(*server.socket.getsockname()[:2]), version=VERSION, **shown)
    for name in unknown_variables(os.environ):
        event(WARNING, "unknown variable", variable=name, hint="see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    about, form = "Lends distributed locks over HTTP and keeps them in etcd.", argparse.RawDescriptionHelpFormatter
    epilog = "environment:\n"
    for one in fields(Config):
        line = f"  {variable(one.name):<36} {one.metadata['meaning']} [{one.metadata['default']}]"
        epilog += line.removesuffix(" []") + "\n"
    parser = argparse.ArgumentParser("shared_lock.py", description=about, epilog=epilog, formatter_class=form)
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
