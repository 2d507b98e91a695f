"""shared-lock lends distributed locks over HTTP and keeps them in etcd. This file is all of it.

    $ curl -X POST localhost:8080/lease -H 'x-lease-ttl: 60s' -d '{"key": "nightly"}'
    2264587979177505296                       201: the lock is yours for 60 s; this is your lease
    $ curl -X POST localhost:8080/keepalive -d 2264587979177505296
                                              200: another 60 s from now; 204 would mean that it is lost

What a holder may rely on: etcd never has two holders of one key, and the lock lives at least as long as its ttl,
counted from the moment the holder *sent* the request that was answered 201 or 200.
What nobody may rely on: that a holder whose lease ran out has stopped. It may be paused and wake up later. Only
the protected resource can stop it, by refusing a fencing token smaller than one it has seen.

One lock is one etcd lease and one key put with it, `/shared-lock/` + key. There is no other state, so any number of
replicas may serve one etcd. The path of a request, which is also the order of this file:

    front door    bytes become a Request, and a Response becomes bytes; HTTP stops here
    LockService   what a lock means: acquire, renew, release, wait; the cache of held keys
    storage       memory (the specification) or etcd (the same promises over a network that fails)
    Combiner      while one call to etcd is in flight, later callers queue up to share the next
    Gateway       etcd's JSON gateway; base64, int64-as-text and the members that fail stop here

Metrics, profiles and the life of the process follow. Every environment variable is a field of Config;
`python shared_lock.py --help` prints them.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import copy
import datetime
import email.utils
import errno
import functools
import heapq
import http
import http.server
import itertools
import json
import math
import os
import platform
import random
import re
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

KEY_PREFIX = "/shared-lock/"  # before every key of ours in etcd
DEFAULT_TTL_SECONDS = 10  # of a POST /lease without x-lease-ttl
MAX_TTL_SECONDS = 9_000_000_000  # etcd's own limit
MAX_WAIT_SECONDS = 60  # of x-lease-wait: proxies cut longer silences
POLL_SECONDS = 0.4  # how late a waiter may learn of a release through another replica
HUNG_UP_SECONDS = 2  # how late we may notice that a waiting caller has gone
MAX_BODY_BYTES = 64 << 10  # of a request
MAX_HEAD_BYTES = 64 << 10  # of a request line, and of the headers together
MAX_HEADERS = 100
MAX_ANSWER_BYTES = 16 << 20  # from etcd: most are below 1 MiB, but a lease of another tenant may have many keys
INT64 = range(-(1 << 63), 1 << 63)

# == Words: errors, settings, small data =============================================================================
#
# Errors are split by who must act: the caller (BadRequest), nobody yet (StorageError: nothing happened), or the
# caller with care (OutcomeUnknown). That a key is held, or a lease gone, is an answer, not an error.


class BadRequest(Exception):
    """The request is wrong, and the text says what about it. `status` is a 4xx, or 500 where the contract says so."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class StorageError(Exception):
    """The storage failed, and nothing was changed."""


class Refused(StorageError):
    """etcd understood and said no; any member would say the same. `code` is the gRPC status code."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Unavailable(StorageError):
    """There was no answer, and nothing was changed: worth a try on another member."""


class OutcomeUnknown(StorageError):
    """The request may have been applied, or may yet be: only safe to repeat in a form that cannot apply twice."""


class Stale(OutcomeUnknown):
    """A kept connection turned out to be closed, which says nothing about the member at its other end."""


class ConfigError(Exception):
    """An environment variable cannot be used; the text is one line that names it."""


class Holder(NamedTuple):
    """Who holds a key: its lease (0: none), its fencing token, and its value where asked for."""

    lease: int
    token: int
    value: bytes = b""


class Grant(NamedTuple):
    """A lock that was taken: its lease, the granted ttl in seconds, its fencing token."""

    lease: int
    ttl: int
    token: int


class LeaseInfo(NamedTuple):
    """A live lease: seconds left, seconds granted, and, from etcd, the keys attached to it."""

    left: int
    granted: int
    keys: tuple[bytes, ...] = ()


def quote(value: object) -> str:
    """The value as error messages show it: on one line, in double quotes, cut at 120 characters."""
    text = str(value)
    return json.dumps(text if len(text) <= 120 else text[:119] + "…", ensure_ascii=False)


def deadline_after(timeout: float) -> float:
    """When a timeout that begins now ends (time.monotonic); 0 is none."""
    return time.monotonic() + timeout if timeout else math.inf


_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_DURATION = re.compile(rf"([+-]?)((?:{_NUMBER}(?:ns|us|µs|μs|ms|s|m|h))+|{_NUMBER})")
_DURATION_PART = re.compile(rf"({_NUMBER})([^0-9.]*)")
_UNITS = {"ns": "1e-9", "us": "1e-6", "µs": "1e-6", "μs": "1e-6", "ms": "1e-3", "s": "1", "m": "60", "h": "3600"}


@functools.lru_cache(maxsize=256)
def parse_duration(text: str) -> Fraction:
    """The seconds in a Go duration ("1m30s", "1500ms") or a bare number of seconds, exactly. Raises ValueError."""
    match = _DURATION.fullmatch(text) if len(text) <= 100 else None
    if not match:
        raise ValueError(f"not a duration: {quote(text)}")
    parts = [Fraction(n) * Fraction(_UNITS[unit or "s"]) for n, unit in _DURATION_PART.findall(match[2])]
    return sum(parts, Fraction()) * (-1 if match[1] == "-" else 1)


def parse_ttl(text: str) -> int:
    """The ttl that a lock is asked for, rounded up to whole seconds. Raises ValueError."""
    seconds = math.ceil(parse_duration(text))
    if not 0 < seconds <= MAX_TTL_SECONDS:
        raise ValueError(f"not more than 0s and at most {MAX_TTL_SECONDS}s: {quote(text)}")
    return seconds


def seconds_up_to(limit: int, zero: bool = True) -> Callable[[str], float]:
    """A parser of durations, in seconds; `zero` says whether 0 is one of them."""

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if not 0 <= seconds <= limit or not (seconds or zero):
            raise ValueError(f"not {'between' if zero else 'more than'} 0s and at most {limit}s: {quote(text)}")
        return float(seconds)

    return parse


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"not a number from {low} to {high}: {quote(text)}")
        return int(text)

    return parse


def boolean(text: str) -> bool:
    """As Go's strconv.ParseBool. Raises ValueError."""
    true = text in ("1", "t", "T", "TRUE", "true", "True")
    if not true and text not in ("0", "f", "F", "FALSE", "false", "False"):
        raise ValueError(f"not a boolean, true or false: {quote(text)}")
    return true


def storage_type(text: str) -> str:
    if text not in ("etcd", "mock"):
        raise ValueError(f"not etcd or mock: {quote(text)}")
    return text


class Address(NamedTuple):
    """Where a member of etcd listens; `tls` is None where the endpoint names no scheme."""

    host: str
    port: int
    tls: bool | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_ENDPOINT = re.compile(r"(?:(https?)://)?(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:/?#@\[\]]+)):([0-9]{1,5})/?")


def endpoints(text: str) -> tuple[Address, ...]:
    """The addresses in a comma-separated list of `http://h:p`, `https://h:p` and `h:p`. Raises ValueError."""
    addresses = []
    for part in text.split(","):
        match = _ENDPOINT.fullmatch(part.strip())
        if not match or not 0 < int(match[4]) < 65536:
            raise ValueError(f"not an endpoint, as in http://host:2379: {quote(part)}")
        addresses.append(Address(match[2] or match[3], int(match[4]), (match[1] == "https") if match[1] else None))
    return tuple(addresses)


def variable(name: str) -> str:
    """The environment variable of a field of Config."""
    return "SHARED_LOCK_" + name.upper()


def setting(default: str, parse: Callable[[str], Any], meaning: str) -> Any:
    """A field of Config: its default as the environment would give it, its parser, its line in --help."""
    return field(default=parse(default), metadata={"default": default, "parse": parse, "meaning": meaning})


_timeout = seconds_up_to(MAX_TTL_SECONDS)


@dataclass(frozen=True)
class Config:
    """All settings, each read from the variable SHARED_LOCK_ + its name in capitals. Durations are in seconds."""

    server_port: int = setting("8080", whole(0, 65535), "port to listen on; 0 is a free one, which the log tells")
    server_host: str = setting("", str, "address to listen on; empty is every address, IPv4 and IPv6")
    server_read_timeout: float = setting("10s", _timeout, "from a request's first byte to its last; 0 is none")
    server_write_timeout: float = setting("10s", _timeout, "to write an answer; 0 is none")
    server_idle_timeout: float = setting("120s", _timeout, "an idle connection is closed after it; 0 is none")
    server_shutdown_timeout: float = setting("10s", _timeout, "for requests in flight after SIGTERM or SIGINT")
    pprof_enabled: bool = setting("false", boolean, "serve /debug/pprof/")
    storage_type: str = setting("etcd", storage_type, "etcd, or mock: in memory, lost with the process")
    etcd_addr_list: tuple[Address, ...] = setting(
        "http://localhost:2379", endpoints, "endpoints, separated by commas: http://h:p, https://h:p or h:p"
    )
    etcd_tls: bool = setting("false", boolean, "TLS to etcd with the three files below")
    ca_cert_path: str = setting("/etc/etcd/ca.crt", str, "who signed etcd's certificate")
    client_cert_path: str = setting("/etc/etcd/client.crt", str, "what this daemon shows to etcd")
    client_key_path: str = setting("/etc/etcd/client.key", str, "the key of that certificate")
    etcd_timeout: float = setting(
        "5s", seconds_up_to(MAX_TTL_SECONDS, zero=False), "one storage operation, all tries together"
    )
    cache_enabled: bool = setting("false", boolean, "answer 202 from memory while a key is known to be held")
    cache_size: int = setting("1000", whole(1, 10**9 - 1), "keys to remember; the least recently used leave")
    debug: bool = setting("false", boolean, "log every request")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """The configuration in `env`, such as os.environ. Raises ConfigError for the first variable that is wrong."""
        given = {}
        for one in fields(cls):
            if (text := env.get(variable(one.name))) is not None:
                try:
                    given[one.name] = one.metadata["parse"](text)
                except ValueError as fault:
                    raise ConfigError(f"{variable(one.name)}: {fault}") from fault
        config = cls(**given)
        if config.storage_type == "etcd" and config.etcd_tls:
            config._check_tls()
        return config

    def _check_tls(self) -> None:
        for name in ("ca_cert_path", "client_cert_path", "client_key_path"):
            try:
                open(getattr(self, name), "rb").close()
            except OSError as fault:
                shown = f"{quote(getattr(self, name))}: {fault.strerror}"
                raise ConfigError(f"{variable(name)}: not a file that can be read: {shown}") from fault
        try:
            ssl.create_default_context(cafile=self.ca_cert_path)
        except OSError as fault:  # ssl.SSLError is one
            shown = quote(self.ca_cert_path)
            raise ConfigError(f"{variable('ca_cert_path')}: not a certificate in PEM: {shown}") from fault
        try:
            self.tls_context()
        except OSError as fault:
            raise ConfigError(
                f"{variable('client_cert_path')}: not a certificate in PEM for {variable('client_key_path')}="
                f"{quote(self.client_key_path)}, an open key in PEM: {quote(self.client_cert_path)}"
            ) from fault
        for address in self.etcd_addr_list:
            if address.tls is False:
                raise ConfigError(
                    f"{variable('etcd_addr_list')}: not https://, or without a scheme,"
                    f" as {variable('etcd_tls')}=true wants it: {quote(f'http://{address}')}"
                )

    def tls_context(self) -> ssl.SSLContext:
        """How to talk TLS to etcd: with our three files, or, for an https endpoint without ETCD_TLS, as curl would."""
        if not self.etcd_tls:
            return ssl.create_default_context()
        context = ssl.create_default_context(cafile=self.ca_cert_path)
        # The password keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(self.client_cert_path, self.client_key_path, password="")
        return context


# == Wire: HTTP/1.1 messages over one socket =========================================================================
#
# The front door reads requests with it, and the gateway etcd's answers. http.server and http.client parse headers with
# the e-mail package, which takes longer than all the rest of a request: at 64 connections and on one CPU, /health is
# answered 47,900 times a second, by http.server (buffered, no Nagle) 14,800 times. Being strict is easier here, too.


class Malformed(Exception):
    """Not the HTTP that is spoken here; `status` is the answer where there is a caller to tell."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_RECEIVE_BYTES = 16 << 10  # one recv; nearly every message is smaller


def parse_headers(lines: Iterable[str]) -> dict[str, str]:
    """RFC 9112, 5: strict, since what two parties read differently can be used to smuggle a request past one."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or _CONTROL.search(value):
            raise Malformed(400, f"not a header: {quote(line)}")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


@functools.lru_cache(maxsize=256)
def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", digits) or b"\n" in line or b"\r" in line:
        raise Malformed(400, f"not the size of a chunk: {quote(line.decode('latin-1'))}")
    return int(digits, 16)


class Wire:
    """A socket, and the bytes received from it but not used yet (`rest`). It belongs to one thread at a time.

    Deadlines are on the clock of time.monotonic; math.inf is none. Reading raises EOFError where the other side has
    ended the stream, TimeoutError, Malformed, or ConnectionError.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""
        self._in_force = {socket.SO_RCVTIMEO: math.inf, socket.SO_SNDTIMEO: math.inf}

    def head(self, deadline: float) -> bytes:
        """A message's first line and headers, without the blank line after them."""
        start = 0
        while (end := self.rest.find(b"\r\n\r\n", start)) < 0:
            if len(self.rest) > 2 * MAX_HEAD_BYTES + 6:  # and three line ends
                break
            if b"\n\n" in self.rest or b"\n\r\n" in self.rest:
                raise Malformed(400, "a line ends in a line feed without a carriage return")
            start = max(0, len(self.rest) - 3)
            self.receive(deadline)
        head = self.rest[:end] if end >= 0 else self.rest
        line_end = head.find(b"\r\n")
        if (line_end if line_end >= 0 else len(head)) > MAX_HEAD_BYTES:
            raise Malformed(414, f"the request line is longer than {MAX_HEAD_BYTES} bytes")
        if end < 0 or len(head) - line_end > MAX_HEAD_BYTES + 2:
            raise Malformed(431, f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        self.rest = self.rest[end + 4 :]
        return head

    def body(
        self, headers: Mapping[str, str], limit: int, deadline: float, invite: Callable[[], None] | None = None
    ) -> bytes:
        """The body that these headers announce: without Content-Length and Transfer-Encoding, none.

        `invite` asks for a body that is held back; it is called unless the body has begun to come or is refused.
        """
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if length is not None:
            if coding is not None:
                raise Malformed(400, "content-length together with transfer-encoding")
            if not (length.isascii() and length.isdigit()):
                raise Malformed(400, f"content-length: not a number: {quote(length)}")
            if len(length.lstrip("0")) > 18 or int(length) > limit:
                raise Malformed(413, f"the body is larger than {limit} bytes")
        elif coding is None:
            return b""
        elif coding.lower() != "chunked":
            raise Malformed(400, f"transfer-encoding: not chunked: {quote(coding)}")
        if invite and not self.rest:
            invite()
        if length is None:
            return self._chunked(limit, deadline)
        end = int(length)
        while len(self.rest) < end:
            self.receive(deadline)
        body, self.rest = self.rest[:end], self.rest[end:]
        return body

    def _chunked(self, limit: int, deadline: float) -> bytes:
        """A body in chunks. `rest` is read by index and seldom cut, since one answer of etcd may have 64 of them."""
        parts: list[bytes] = []
        total = at = 0
        while True:
            if at > _RECEIVE_BYTES:
                self.rest, at = self.rest[at:], 0
            line, at = self._line(at, deadline)
            if not (size := _chunk_size(line)):
                break
            total += size
            if total > limit:
                raise Malformed(413, f"the body is larger than {limit} bytes")
            while len(self.rest) < at + size + 2:
                self.receive(deadline)
            parts.append(self.rest[at : at + size])
            at += size + 2
            if self.rest[at - 2 : at] != b"\r\n":
                raise Malformed(400, "a chunk is longer than it said")
        for _ in range(MAX_HEADERS + 1):
            line, at = self._line(at, deadline)
            if not line:
                self.rest = self.rest[at:]
                return b"".join(parts)
            parse_headers([line.decode("latin-1")])
        raise Malformed(431, f"more than {MAX_HEADERS} trailers")

    def _line(self, at: int, deadline: float) -> tuple[bytes, int]:
        """The line that begins at this index of `rest`, and the index after it."""
        while (end := self.rest.find(b"\r\n", at)) < 0:
            if len(self.rest) > at + _RECEIVE_BYTES:
                raise Malformed(400, f"a line between chunks is longer than {_RECEIVE_BYTES} bytes")
            self.receive(deadline)
        return self.rest[at:end], end + 2

    def receive(self, deadline: float) -> None:
        """Waits for more bytes and appends them to `rest`."""
        self._limit(socket.SO_RCVTIMEO, deadline)
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError as fault:  # how SO_RCVTIMEO says it
            raise TimeoutError("timed out") from fault
        if not data:
            raise EOFError("the connection was closed")
        self.rest += data

    def send(self, data: bytes, deadline: float) -> None:
        """Sends all of it. Raises OSError; at the deadline, TimeoutError."""
        while data:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = self.sock.send(data)
            except BlockingIOError as fault:
                raise TimeoutError("timed out") from fault
            data = data[sent:]

    def _limit(self, option: int, deadline: float) -> None:
        """Sets how long the next recv or send may take: by socket option, since settimeout() adds a poll() to each,
        except with TLS, which heeds nothing else. A timeout in force that is right to within 2 % is kept, which spares
        nearly every call a system call."""
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.settimeout(None if seconds == math.inf else seconds)
        elif not seconds <= self._in_force[option] <= seconds * 1.02:
            micros = 0 if seconds == math.inf else max(1, int(seconds * 1e6))
            self.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *divmod(micros, 10**6)))
            self._in_force[option] = seconds


# == Front door: bytes become a Request, a Response becomes bytes ====================================================


class Head(NamedTuple):
    """A request without its body. Header names are in lower case; headers of one name are joined with ", "."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    keep_alive: bool
    version: str


class Request(NamedTuple):
    """`hung_up()` tells whether the caller has gone meanwhile."""

    head: Head
    body: bytes
    hung_up: Callable[[], bool] = lambda: False


TEXT = "text/plain; charset=utf-8"


class Response(NamedTuple):
    """`undo` is called if the answer cannot be written: the caller does not know of its lock, so nobody holds it."""

    status: int
    body: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()
    undo: Callable[[], object] | None = None


def error(status: int, text: str, *headers: tuple[str, str]) -> Response:
    return Response(status, (text + "\n").encode("utf-8", "backslashreplace"), TEXT, headers)


# curl sends a path as it was typed: UTF-8 that is not percent-encoded is welcome, other bytes are not.
_REQUEST_LINE = re.compile(rf"({_TOKEN.pattern}) ([^\x00-\x20\x7f\ud800-\udfff]+) HTTP/([0-9])\.([0-9])")


def parse_head(data: bytes) -> Head:
    """The request that begins with this head. Raises Malformed."""
    line, *header_lines = data.decode("utf-8", "surrogateescape").split("\r\n")
    if len(header_lines) > MAX_HEADERS:
        raise Malformed(431, f"more than {MAX_HEADERS} headers")
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise Malformed(400, f"not a request line: {quote(line)}")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Malformed(505, f"not HTTP/1.1 or HTTP/1.0: {quote(line)}")
    headers = parse_headers(header_lines)
    if "transfer-encoding" in headers and minor == "0":
        raise Malformed(400, "transfer-encoding in HTTP/1.0")
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    keep_alive = "close" not in options and (minor != "0" or "keep-alive" in options)
    if not target.startswith("/"):  # absolute-form, as sent to proxies
        target = re.sub(r"^https?://[^/?]*", "", target, flags=re.IGNORECASE)
    path, _, query = target.partition("#")[0].partition("?")
    return Head(method, path or "/", query, headers, keep_alive, f"HTTP/1.{minor}")


# A client sends the same head again and again, byte for byte: 4 µs become 0.1 µs. Long heads are not worth the memory.
_parse_short_head = functools.lru_cache(maxsize=1024)(parse_head)


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


_REASON = {status.value: status.phrase for status in http.HTTPStatus}
_REASON[413] = "Content Too Large"  # RFC 9110; CPython before 3.13 has the name of RFC 7231


def render(response: Response, head: Head | None, keep_alive: bool) -> bytes:
    """The answer as bytes. `head` is the request's, None where it could not be read."""
    status, body = response.status, response.body
    lines = [f"HTTP/1.1 {status} {_REASON[status]}\r\nDate: {http_date(int(time.time()))}\r\n"]
    if status != 204:  # RFC 9110, 8.6: no Content-Length with 204
        lines.append(f"Content-Type: {response.content_type}\r\nContent-Length: {len(body)}\r\n")
    lines += [f"{name}: {value}\r\n" for name, value in response.headers]
    if not keep_alive:
        lines.append("Connection: close\r\n")
    elif head and head.version == "HTTP/1.0":
        lines.append("Connection: keep-alive\r\n")
    lines.append("\r\n")
    data = "".join(lines).encode("latin-1")
    return data if head and head.method == "HEAD" else data + body


class Connection(socketserver.BaseRequestHandler):
    """Serves one connection in its own thread, request by request."""

    server: Server
    idle = False  # waiting for a request's first byte; such connections do not delay the shutdown

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wire = Wire(self.request)
        self.client = ":".join(map(str, self.client_address[:2]))
        self.serving: Head | None = None  # the latest request
        self.server.opened(self)

    def finish(self) -> None:
        self.server.closed(self)

    def handle(self) -> None:
        try:
            while self._serve_one():
                pass
        except (EOFError, OSError) as fault:  # the caller has gone, or idled too long
            event(DEBUG, "connection closed", client=self.client, reason=fault)

    def close_if_idle(self) -> None:
        """Ends the wait for a request; one that has arrived already is still read and answered."""
        if self.idle:
            with contextlib.suppress(OSError):  # closed meanwhile
                self.request.shutdown(socket.SHUT_RD)

    def _serve_one(self) -> bool:
        """Answers the next request; False when the connection is to be closed."""
        self._await_request()
        try:
            request = self._read_request(deadline_after(self.server.config.server_read_timeout))
        except Malformed as fault:
            return self._refuse(fault.status, str(fault))
        except TimeoutError:
            limit = self.server.config.server_read_timeout
            return self._refuse(408, f"the request was not complete after {limit:g}s")
        head = self.serving = request.head
        response = self.server.api.answer(request)
        event(DEBUG, "request", client=self.client, method=head.method, path=head.path, status=response.status)
        keep_alive = head.keep_alive and not (self.server.draining and not self.wire.rest)
        try:
            self._send(render(response, head, keep_alive))
        except OSError:
            if response.undo:
                response.undo()
            raise
        return keep_alive

    def _await_request(self) -> None:
        """Waits for a request's first byte. Empty lines before it are skipped: RFC 9112, 2.2."""
        self.serving = None
        deadline = deadline_after(self.server.config.server_idle_timeout)
        while not self.wire.rest.lstrip(b"\r\n"):
            self.wire.rest = b""
            self.idle = True
            # When draining, a moment for a request that is on its way: the last answer promised to read it.
            self.wire.receive(time.monotonic() + 0.05 if self.server.draining else deadline)
        self.idle = False
        self.wire.rest = self.wire.rest.lstrip(b"\r\n")

    def _read_request(self, deadline: float) -> Request:
        data = self.wire.head(deadline)
        head = _parse_short_head(data) if len(data) < 1024 else parse_head(data)
        waits = head.headers.get("expect", "").lower() == "100-continue" and head.version != "HTTP/1.0"
        body = self.wire.body(head.headers, MAX_BODY_BYTES, deadline, self._invite if waits else None)
        return Request(head, body, self._hung_up)

    def _invite(self) -> None:
        self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, status: int, text: str) -> bool:
        """Answers what could not be read as a request. The rest of the stream means nothing, so the connection ends:
        our half first, the whole a moment later, since closing with bytes unread would destroy the answer."""
        event(DEBUG, "request refused", status=status, reason=text)
        self._send(render(error(status, text), None, keep_alive=False))
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 1
        for _ in range(64):
            self.wire.rest = b""
            self.wire.receive(deadline)
        return False

    def _send(self, data: bytes) -> None:
        self.wire.send(data, deadline_after(self.server.config.server_write_timeout))

    def _hung_up(self) -> bool:
        """A caller that ends only its own half of the connection counts as gone, since it looks the same."""
        poll = select.poll()
        poll.register(self.request, select.POLLRDHUP)
        return bool(poll.poll(0))


class Api:
    """The endpoints: what a Request means to the LockService, and its answer as a Response."""

    def __init__(self, service: LockService, metrics: Metrics, profiling: bool = False) -> None:
        self.service = service
        self._metrics = metrics
        self._routes: dict[str, dict[str, Callable[[Request], Response]]] = {
            "/lease": {"POST": self.acquire, "DELETE": self.release, "GET": self.look},
            "/keepalive": {"POST": self.renew},
            "/health": {"GET": self.health},
            "/ready": {"GET": self.ready},
            "/metrics": {"GET": self.expose_metrics},
        }
        if profiling:
            self._routes |= {path: {"GET": page} for path, page in profile_pages().items()}

    def answer(self, request: Request) -> Response:
        """Always answers, unless the caller has gone: then it raises HungUp."""
        head = request.head
        methods = self._routes.get(head.path)
        if methods is None:
            return error(404, f"no such path: {quote(head.path)}")
        handler = methods.get("GET" if head.method == "HEAD" else head.method)
        if handler is None:
            allow = ", ".join([*methods, "HEAD"] if "GET" in methods else methods)
            return error(405, f"{head.path}: not {allow}: {quote(head.method)}", ("Allow", allow))
        try:
            return handler(request)
        except BadRequest as fault:
            return error(fault.status, str(fault))
        except StorageError as fault:
            return error(500, f"storage failed: {fault}")
        except HungUp:
            raise
        except Exception as fault:  # a defect of ours; the caller deserves an answer all the same
            event(ERROR, "internal error", path=head.path, error=repr(fault), at=_where(fault))
            return error(500, "internal error: see the log of shared-lock")

    def acquire(self, request: Request) -> Response:
        """POST /lease"""
        headers = request.head.headers
        ttl = _parsed(headers, "x-lease-ttl", parse_ttl, DEFAULT_TTL_SECONDS)
        wait = _parsed(headers, "x-lease-wait", seconds_up_to(MAX_WAIT_SECONDS), 0.0)
        key, value = parse_lock(request.body)
        try:
            outcome = self.service.acquire(key, value, ttl, wait, request.hung_up)
        except OutcomeUnknown as fault:
            return error(500, f"outcome unknown: {fault}")
        except StorageError as fault:
            return error(500, f"not acquired: {fault}")
        if isinstance(outcome, Holder):
            return Response(202, b"%d" % outcome.lease)
        lease = outcome.lease
        answer_headers = (("x-lease-ttl", f"{outcome.ttl}s"), ("x-fencing-token", str(outcome.token)))
        return Response(201, b"%d" % lease, TEXT, answer_headers, undo=lambda: self.service.take_back(lease))

    def renew(self, request: Request) -> Response:
        """POST /keepalive"""
        ttl = self.service.renew(parse_lease(request.body))
        return Response(200, b"", TEXT, (("x-lease-ttl", f"{ttl}s"),)) if ttl else Response(204)

    def release(self, request: Request) -> Response:
        """DELETE /lease"""
        return Response(200 if self.service.release(parse_lease(request.body)) else 204)

    def look(self, request: Request) -> Response:
        """GET /lease?key=K"""
        key = _query(request).get("key", "")
        if not key:
            raise BadRequest("key: missing in the query, as in /lease?key=nightly")
        found = self.service.look(_checked_text("key", key))
        if found is None:
            return error(404, f"key: free: {quote(key)}")
        holder, lease = found
        answer = {
            "key": key,
            "value": holder.value.decode("utf-8", "replace"),
            "ttl": lease.left if lease else None,
            "granted_ttl": lease.granted if lease else None,
            "fencing_token": holder.token,
        }
        return Response(200, (json.dumps(answer, ensure_ascii=False) + "\n").encode(), "application/json")

    def health(self, request: Request) -> Response:
        return Response(200, b"ok\n")

    def ready(self, request: Request) -> Response:
        fault = self.service.readiness()
        return error(503, f"storage failed: {fault}") if fault else Response(200, b"ok\n")

    def expose_metrics(self, request: Request) -> Response:
        return Response(200, self._metrics.render().encode(), "text/plain; version=0.0.4; charset=utf-8")


def _query(request: Request) -> dict[str, str]:
    """The query's parameters; of several with one name the first counts."""
    try:
        pairs = urllib.parse.parse_qsl(request.head.query, keep_blank_values=True, errors="strict")
    except ValueError as fault:
        raise BadRequest(f"query: not UTF-8 in percent-encoding: {quote(request.head.query)}") from fault
    return dict(reversed(pairs))


_Parsed = TypeVar("_Parsed")


def _parsed(headers: Mapping[str, str], name: str, parse: Callable[[str], _Parsed], default: _Parsed) -> _Parsed:
    text = headers.get(name)
    try:
        return default if text is None else parse(text)
    except ValueError as fault:
        raise BadRequest(f"{name}: {fault}") from fault


# An integer too long for int64 becomes a float, as in JavaScript; Python would refuse 4,300 digits as no JSON at all.
# NaN and Infinity, which Python reads and JSON does not have, are refused.
_JSON = json.JSONDecoder(
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
    lock = {name: given for name, given in lock.items() if given is not None}  # null is absent, as in Go
    for name in ("key", "value", "timestamp"):
        if not isinstance(lock.get(name, ""), str):
            raise BadRequest(f"{name}: not a string: {quote(json.dumps(lock[name]))}")
    labels = lock.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(label, str) for label in labels.values()):
        raise BadRequest(f"labels: not an object of strings: {quote(json.dumps(labels))}")
    if "timestamp" in lock and not is_timestamp(lock["timestamp"]):
        raise BadRequest(f"timestamp: not RFC 3339, as in 2006-01-02T15:04:05Z: {quote(lock['timestamp'])}")
    if not lock.get("key"):
        raise BadRequest('key: empty: ""' if "key" in lock else "key: missing")
    return _checked_text("key", lock["key"]), _checked_text("value", lock.get("value", ""))


def _checked_text(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise BadRequest(f"{name}: not Unicode text, a surrogate stands alone: {text[:100]!a}") from fault
    return text


_TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})T(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])",
    re.IGNORECASE,
)


def is_timestamp(text: str) -> bool:
    """RFC 3339, 5.6."""
    match = _TIMESTAMP.fullmatch(text)
    try:
        return bool(match and datetime.date.fromisoformat(match[1]))
    except ValueError:  # the 30th of February
        return False


def parse_lease(body: bytes) -> int:
    """The lease ID in a body: a number, a number in a JSON string, or an object with `id` as either.

    Not JSON is a 400; JSON that is no int64 is a 500, which the Go service's clients know.
    """
    given = _parse_json(body)
    if isinstance(given, dict):
        given = given.get("id")
    if isinstance(given, str) and re.fullmatch(r"\s*-?[0-9]{1,19}\s*", given, re.ASCII):
        given = int(given)
    if type(given) is not int or given not in INT64:
        raise BadRequest(f"body: not a lease ID: {quote(body.decode('utf-8', 'replace').strip())}", 500)
    return given


# == LockService: what a lock means ==================================================================================


class Storage(Protocol):
    """What both storages promise. Keys are without our prefix. Every method may raise StorageError."""

    def acquire(self, key: str, value: str, ttl: int) -> Grant | Holder:
        """Takes the key, or tells who has it. Raises OutcomeUnknown where the lock may have been taken."""

    def look(self, key: str) -> Holder | None:
        """Who holds the key, with its value; None where it is free."""

    def describe(self, lease: int) -> LeaseInfo | None:
        """What is known of a lease; None where it is gone."""

    def renew(self, lease: int) -> int:
        """Starts the lease's ttl again and returns it; 0 where the lease is known to be gone."""

    def release(self, lease: int) -> list[str] | None:
        """Ends the lease and returns the keys that this frees; None where there is nothing of ours to end."""

    def check(self) -> None:
        """Returns if the storage can serve."""


class HungUp(EOFError):
    """The caller closed its connection while it waited."""


class LockService:
    """Locks over a storage. All methods may be called from any thread."""

    def __init__(self, storage: Storage, metrics: Metrics, cache: Cache | None = None) -> None:
        self._storage = storage
        self._metrics = metrics
        self._cache = cache
        self._line = Line()
        self._check_mutex = threading.Lock()  # owns the two below, and is held while the storage is checked
        self._checked_at = -math.inf
        self._check_fault: StorageError | None = None

    def acquire(
        self, key: str, value: str, ttl: int, wait: float = 0, hung_up: Callable[[], bool] = lambda: False
    ) -> Grant | Holder:
        """Takes the lock for `ttl` seconds, or tells who holds it after waiting for up to `wait` seconds.

        Raises StorageError (not acquired), OutcomeUnknown, or HungUp.
        """
        if wait:
            outcome = self._acquire_in_line(key, value, ttl, time.monotonic() + wait, hung_up)
        else:
            outcome = (self._cache and self._cache.holder(key)) or self._try_to_acquire(key, value, ttl)
        if isinstance(outcome, Holder):
            self._metrics.count_lease("get", "accepted")
            event(DEBUG, "refused", key=key, holder=outcome.lease)
        return outcome

    def _acquire_in_line(
        self, key: str, value: str, ttl: int, deadline: float, hung_up: Callable[[], bool]
    ) -> Grant | Holder:
        with self._line.place(key) as turn:
            while True:
                outcome = self._try_to_acquire(key, value, ttl)
                if isinstance(outcome, Grant) and hung_up():
                    self.take_back(outcome.lease)
                    raise HungUp("the caller hung up")
                if isinstance(outcome, Grant) or time.monotonic() >= deadline:
                    return outcome
                self._line.await_turn(key, turn, deadline, hung_up)
                if self._line.dismissed:
                    return outcome

    def _try_to_acquire(self, key: str, value: str, ttl: int) -> Grant | Holder:
        seen = self._cache.releases if self._cache else 0
        started = time.monotonic()
        try:
            outcome = self._storage.acquire(key, value, ttl)
        except StorageError as fault:
            self._note_failure("get", "acquire failed", key=key, error=fault)
            raise
        if isinstance(outcome, Grant):
            self._metrics.count_grant(time.monotonic() - started)
            event(INFO, "granted", key=key, lease=outcome.lease, ttl=outcome.ttl, token=outcome.token)
            if self._cache:
                self._cache.remember(key, outcome.lease, started + outcome.ttl, seen)
        elif self._cache and outcome.lease:  # remembered for what the holder's ttl has left, not for the asker's ttl
            asked = time.monotonic()
            with contextlib.suppress(StorageError):  # the refusal stands without it, and the next one asks again
                if info := self._storage.describe(outcome.lease):
                    self._cache.remember(key, outcome.lease, asked + info.left, seen)
        return outcome

    def renew(self, lease: int) -> int:
        """Starts the lease's ttl again and returns it; 0 where etcd knows that it is gone. Raises StorageError."""
        started = time.monotonic()
        try:
            ttl = self._storage.renew(lease)
        except StorageError as fault:
            self._note_failure("prolong", "keepalive failed", lease=lease, error=fault)
            raise
        if ttl:
            self._metrics.count_lease("prolong", "success")
            if self._cache:
                self._cache.renewed(lease, started + ttl)
        else:
            self._metrics.count_lease("prolong", "failure")
            event(INFO, "lease is gone", lease=lease)
            if self._cache:
                self._cache.released(lease)
        return ttl

    def release(self, lease: int) -> bool:
        """Ends the lease, which frees its key at once; False where there is nothing of ours. Raises StorageError."""
        try:
            keys = self._storage.release(lease)
        except StorageError as fault:
            self._note_failure("release", "release failed", lease=lease, error=fault)
            raise
        finally:
            if self._cache:
                self._cache.released(lease)
        if keys is None:
            self._metrics.count_lease("release", "failure")
            return False
        self._metrics.count_lease("release", "success")
        event(INFO, "released", lease=lease)
        for key in keys:
            self._line.call(key)
        return True

    def take_back(self, lease: int) -> None:
        """Releases a lock whose caller left before it was told."""
        event(INFO, "caller has gone, lock taken back", lease=lease)
        with contextlib.suppress(StorageError):  # logged by release; the lease ends with its ttl
            self.release(lease)

    def look(self, key: str) -> tuple[Holder, LeaseInfo | None] | None:
        """Who holds the key, and its lease (None: held without one); None where it is free. Raises StorageError."""
        holder = self._storage.look(key)
        if holder is None:
            return None
        if not holder.lease:
            return holder, None
        info = self._storage.describe(holder.lease)
        return (holder, info) if info else None  # None: it ended between the two questions

    def _note_failure(self, operation: str, name: str, **fields: object) -> None:
        self._metrics.count_lease(operation, "error")
        event(WARNING, name, **fields)

    def readiness(self) -> StorageError | None:
        """What is wrong with the storage. It is checked at most once a second, however many ask."""
        with self._check_mutex:
            if time.monotonic() - self._checked_at > 1:
                try:
                    self._check_fault = None
                    self._storage.check()
                except StorageError as fault:
                    self._check_fault = fault
                self._checked_at = time.monotonic()
            return self._check_fault

    def dismiss_waiting(self) -> None:
        """Answers all that wait for a lock now."""
        self._line.dismiss()


class Line:
    """Callers that wait for a lock, per key in order of arrival.

    Only the first in line asks the storage, so many waiters cost as much as one: every POLL_SECONDS, and at once
    when the lock is released through this replica. Nobody holds a lease or writes while waiting.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # owns the lines
        self._lines: dict[str, collections.deque[threading.Event]] = {}  # set: ask the storage now
        self.dismissed = False

    @contextlib.contextmanager
    def place(self, key: str) -> Iterator[threading.Event]:
        """A place in the line for this key, held for the with statement."""
        mine = threading.Event()
        with self._mutex:
            self._lines.setdefault(key, collections.deque()).append(mine)
        try:
            yield mine
        finally:
            with self._mutex:
                line = self._lines[key]
                was_first = line[0] is mine
                line.remove(mine)
                if not line:
                    del self._lines[key]
                elif was_first:
                    line[0].set()

    def await_turn(self, key: str, mine: threading.Event, deadline: float, hung_up: Callable[[], bool]) -> None:
        """Waits until it is worth asking the storage again, at most until the deadline. Raises HungUp."""
        called = first = False
        while not (called or first or self.dismissed) and (left := deadline - time.monotonic()) > 0:
            with self._mutex:
                first = self._lines[key][0] is mine
            called = mine.wait(min(left, POLL_SECONDS if first else HUNG_UP_SECONDS))
            if hung_up():
                raise HungUp("the caller hung up")
        mine.clear()

    def call(self, key: str) -> None:
        """Wakes the first in line: the key was released."""
        with self._mutex:
            if key in self._lines:
                self._lines[key][0].set()

    def dismiss(self) -> None:
        with self._mutex:
            self.dismissed = True
            for line in self._lines.values():
                for waiting in line:
                    waiting.set()


# == Cache: keys that are known to be held ===========================================================================


class _Entry:
    """What is known of one key: who holds it, and until when at least (time.monotonic)."""

    __slots__ = ("__weakref__", "ends", "lease")

    def __init__(self, key: str) -> None:
        self.lease = 0
        self.ends = -math.inf


class Cache:
    """Answers "held" from memory. It can delay a grant and never cause one: only etcd grants.

    An entry ends before its lease can, since it counts from the moment the storage was *asked*. functools.lru_cache
    bounds the entries; the index by lease is weak, so that it does not keep alive what the LRU dropped.
    """

    def __init__(self, size: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._mutex = threading.Lock()  # owns all below: by itself, lru_cache gives two threads that miss two entries
        self._entry = functools.lru_cache(maxsize=size)(_Entry)
        self._by_lease: weakref.WeakValueDictionary[int, _Entry] = weakref.WeakValueDictionary()
        self._metrics = metrics
        self._clock = clock
        self.releases = 0  # how many leases were released; what was read before the latest may be outdated

    def holder(self, key: str) -> Holder | None:
        with self._mutex:
            entry = self._entry(key)
            lease = entry.lease if entry.ends > self._clock() else 0
        self._metrics.count_cache("get", "success" if lease else "failure")
        return Holder(lease, 0) if lease else None

    def remember(self, key: str, lease: int, ends: float, seen: int) -> None:
        """The lease holds the key until `ends` at least, as read when `releases` was `seen`."""
        with self._mutex:
            if seen != self.releases:
                return
            entry = self._entry(key)
            self._by_lease.pop(entry.lease, None)
            entry.lease, entry.ends = lease, ends
            self._by_lease[lease] = entry
        self._metrics.count_cache("set", "success")

    def renewed(self, lease: int, ends: float) -> None:
        """The lease lasts until `ends` at least."""
        with self._mutex:
            if entry := self._by_lease.get(lease):
                entry.ends = max(entry.ends, ends)

    def released(self, lease: int) -> None:
        """The lease is gone."""
        with self._mutex:
            self.releases += 1
            if entry := self._by_lease.pop(lease, None):
                entry.ends = -math.inf
        if entry:
            self._metrics.count_cache("evict", "success")


# == Combiner: one call for all that wait ============================================================================
#
# A read costs etcd 407 µs of CPU alone and 13 µs as one of 64 in a call. While one is in flight, later callers queue;
# whoever comes back hands over to the first of them, which makes the next call for all that wait by then, in its own
# thread. There is no dispatcher thread, and a lone caller pays nothing.

Item = TypeVar("Item")
Answer = TypeVar("Answer")
_PENDING = object()


class _Place(Generic[Item]):
    """A caller in the queue. Its `turn` is released once: when its answer is there, or when it is to make the call."""

    __slots__ = ("answer", "gone", "item", "next", "turn")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.answer: Any = _PENDING
        self.next: _Place[Item] | None = None  # whom to wake after this one, of those that shared a call
        self.gone = False  # it gave up waiting for an answer
        self.turn = threading.Lock()
        self.turn.acquire()


class Combiner(Generic[Item, Answer]):
    """Makes calls that carry the items of several callers.

    `call(items, deadline)` returns one answer for each item, in order; an exception among them is raised to its caller.
    An item only joins a call that has not started yet, so a read is never older than its request. `share(item)` is the
    part of a call that an item takes up: a call carries at most 1.
    """

    def __init__(
        self, call: Callable[[list[Item], float], Sequence[Answer | StorageError]], share: Callable[[Item], float]
    ) -> None:
        self._call = call
        self._share = share
        self._mutex = threading.Lock()  # owns the queue, the flag, and who is woken or gone
        self._queue: collections.deque[_Place[Item]] = collections.deque()
        self._in_flight = False

    def ask(self, item: Item, deadline: float) -> Answer:
        """The answer to this item, by `deadline` (time.monotonic). Raises StorageError."""
        mine = _Place(item)
        with self._mutex:
            self._queue.append(mine)
            leads, self._in_flight = not self._in_flight, True
        if not leads:
            self._await_turn(mine, deadline)
        try:
            if mine.answer is _PENDING:
                self._lead(deadline)
        finally:
            # Each wakes the next: waking all at once makes them fight for the interpreter, 15 % fewer requests/s.
            self._wake(mine.next)
        if isinstance(mine.answer, StorageError):
            # A copy, since an exception that several threads raise collects the tracebacks of all.
            raise copy.copy(mine.answer) from mine.answer
        answer: Answer = mine.answer
        return answer

    def _await_turn(self, mine: _Place[Item], deadline: float) -> None:
        if mine.turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return
        with self._mutex:
            if mine.turn.acquire(blocking=False):  # it came in this very moment
                return
            if mine in self._queue:
                self._queue.remove(mine)
                raise Unavailable("timed out behind others that wait for etcd")
            mine.gone = True
        raise OutcomeUnknown("timed out while etcd was asked")

    def _wake(self, place: _Place[Item] | None) -> None:
        with self._mutex:
            while place and place.gone:
                place = place.next
            if place:
                place.turn.release()

    def _lead(self, deadline: float) -> None:
        """Makes one call, for the head of the queue and all that fit in with it."""
        with self._mutex:
            batch = self._take()
        answered: Iterable[tuple[_Place[Item], Answer | StorageError]] = [
            (place, OutcomeUnknown("the call that it shared broke off")) for place in batch
        ]
        try:
            answered = list(zip(batch, self._answers([place.item for place in batch], deadline), strict=True))
        finally:  # whatever happened, nobody is left waiting
            for (place, answer), following in zip(answered, [*batch[1:], None], strict=True):
                place.answer, place.next = answer, following
            with self._mutex:
                self._in_flight = bool(self._queue)
                if self._queue:
                    self._queue[0].turn.release()

    def _take(self) -> list[_Place[Item]]:
        batch = [self._queue.popleft()]
        room = 1 - self._share(batch[0].item)
        while self._queue and (room := room - self._share(self._queue[0].item)) >= 0:
            batch.append(self._queue.popleft())
        return batch

    def _answers(self, items: list[Item], deadline: float) -> Sequence[Answer | StorageError]:
        try:
            return self._call(items, deadline)
        except Refused as fault:
            if len(items) == 1:
                return [fault]
            # One of them made etcd refuse the whole: its lease has run out, or its key is too large.
            return [answer for item in items for answer in self._answers([item], deadline)]
        except StorageError as fault:
            return [fault] * len(items)


# == Storage in memory: the specification ============================================================================


@dataclass
class _Lock:
    key: str
    value: bytes
    token: int
    ttl: int
    ends: float


class MemoryStorage:
    """A table of locks with a clock: what Storage promises, method by method, with nothing in the way. Lost with the
    process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()  # owns all below
        self._locks: dict[int, _Lock] = {}  # by lease
        self._leases: dict[str, int] = {}  # by key
        self._expiries: list[tuple[float, int]] = []  # a heap: no lease ends before the time that stands here
        self._revision = 0

    def acquire(self, key: str, value: str, ttl: int) -> Grant | Holder:
        with self._mutex:
            self._expire()
            if held_by := self._leases.get(key):
                return Holder(held_by, self._locks[held_by].token)
            lease = new_lease_id()
            self._revision += 1
            ends = self._clock() + ttl
            self._locks[lease] = _Lock(key, value.encode(), self._revision, ttl, ends)
            self._leases[key] = lease
            heapq.heappush(self._expiries, (ends, lease))
            return Grant(lease, ttl, self._revision)

    def look(self, key: str) -> Holder | None:
        with self._mutex:
            self._expire()
            lease = self._leases.get(key)
            return Holder(lease, self._locks[lease].token, self._locks[lease].value) if lease else None

    def describe(self, lease: int) -> LeaseInfo | None:
        with self._mutex:
            self._expire()
            lock = self._locks.get(lease)
            return LeaseInfo(int(lock.ends - self._clock()), lock.ttl) if lock else None

    def renew(self, lease: int) -> int:
        with self._mutex:
            self._expire()
            if not (lock := self._locks.get(lease)):
                return 0
            lock.ends = self._clock() + lock.ttl
            return lock.ttl

    def release(self, lease: int) -> list[str] | None:
        with self._mutex:
            self._expire()
            if not (lock := self._locks.pop(lease, None)):
                return None
            del self._leases[lock.key]
            if len(self._expiries) > 2 * len(self._locks):  # half of them have been released: forget those, too
                self._expiries = [(lock.ends, lease) for lease, lock in self._locks.items()]
                heapq.heapify(self._expiries)
            return [lock.key]

    def check(self) -> None:
        pass

    def _expire(self) -> None:
        """Forgets what has ended, and puts renewed leases back with their new time. The caller holds the mutex."""
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            _, lease = heapq.heappop(self._expiries)
            lock = self._locks.get(lease)
            if lock and lock.ends > now:
                heapq.heappush(self._expiries, (lock.ends, lease))
            elif lock:
                del self._locks[lease], self._leases[lock.key]


def new_lease_id() -> int:
    """A random positive int64. We choose it, not etcd, so that a grant can be repeated without harm."""
    return secrets.randbits(63) or 1


# == Storage in etcd: the same promises over a network that fails ====================================================

Argument = TypeVar("Argument")


class EtcdStorage:
    """Locks in etcd. Every operation is safe to repeat, and is repeated until etcd answers or its time is up."""

    def __init__(self, gateway: Gateway, timeout: float) -> None:
        self._gateway = gateway
        self._timeout = timeout  # seconds for one operation, all tries together
        self._holders = Combiner(gateway.holders, lambda key: _part_of_call(len(key)))
        self._claims = Combiner(gateway.claim, lambda claim: _part_of_call(len(claim.key) + len(claim.value)))
        self._renewals = Combiner(gateway.keep_alive, lambda lease: 1 / MAX_KEEPALIVES)
        self._mutex = threading.Lock()  # owns the two below
        self._doomed: collections.deque[tuple[float, int]] = collections.deque(maxlen=10_000)  # when it ends, lease
        self._ending = False  # a thread ends them

    def acquire(self, key: str, value: str, ttl: int) -> Grant | Holder:
        """A read, so that a refusal writes nothing; then a lease of our own, and one transaction that puts the key
        with it if nobody else has.

        The claim is only sent once the lease is granted, though to send both at once takes 15 % less time: a member
        that freezes with both may, when it wakes up, take the key once more after its release.
        """
        deadline = deadline_after(self._timeout)
        if holder := self._read(self._holders.ask, key, deadline):
            return holder
        lease = new_lease_id()
        try:
            granted = self._insist(self._gateway.grant, (lease, ttl), deadline)
        except OutcomeUnknown as fault:  # at worst there is a lease without a key
            self._end_lease(lease, ttl, deadline)
            raise Unavailable(str(fault)) from fault
        try:
            holder = self._insist(self._claims.ask, Claim(key, value, lease), deadline)
        except StorageError as fault:
            if self._end_lease(lease, granted, deadline):
                raise Unavailable(str(fault)) from fault  # not unknown: without its lease there is no lock
            raise
        if holder.lease == lease:
            return Grant(lease, granted, holder.token)
        self._end_lease(lease, granted, deadline)
        return holder

    def look(self, key: str) -> Holder | None:
        return self._read(self._gateway.look, key, deadline_after(self._timeout))

    def describe(self, lease: int) -> LeaseInfo | None:
        return self._read(self._gateway.time_to_live, lease, deadline_after(self._timeout))

    def renew(self, lease: int) -> int:
        return self._insist(self._renewals.ask, lease, deadline_after(self._timeout))

    def release(self, lease: int) -> list[str] | None:
        """A lease with a key outside of our prefix is another tenant's of this etcd, Kubernetes' say, and stays."""
        deadline = deadline_after(self._timeout)
        info = self._read(self._gateway.time_to_live, lease, deadline)
        prefix = KEY_PREFIX.encode()
        if info is None or not all(key.startswith(prefix) for key in info.keys):
            return None
        self._insist(self._gateway.revoke, lease, deadline)
        return [key.removeprefix(prefix).decode("utf-8", "replace") for key in info.keys]

    def check(self) -> None:
        nobody_locks_this = ""  # and it is within our prefix
        self._read(self._holders.ask, nobody_locks_this, deadline_after(self._timeout))

    def _read(self, ask: Callable[[Argument, float], Answer], argument: Argument, deadline: float) -> Answer:
        """As _insist, for what changes nothing, so that its outcome is never unknown."""
        try:
            return self._insist(ask, argument, deadline)
        except OutcomeUnknown as fault:
            raise Unavailable(str(fault)) from fault

    def _insist(self, ask: Callable[[Argument, float], Answer], argument: Argument, deadline: float) -> Answer:
        """Asks until there is an answer or the deadline; the session picks the member and keeps the pace.

        After a try that may have been applied, only a success settles the outcome: a refusal does not.
        """
        unknown: OutcomeUnknown | None = None
        while True:
            try:
                return ask(argument, deadline)
            except Refused as fault:
                raise unknown or fault from fault
            except StorageError as fault:
                if isinstance(fault, OutcomeUnknown):
                    unknown = fault
                if time.monotonic() >= deadline:
                    raise unknown or fault from fault

    def _end_lease(self, lease: int, ttl: int, deadline: float) -> bool:
        """Cleans up after an acquire that failed: True if the lease is gone. Otherwise, more tries follow in the
        background until it has ended by itself."""
        try:
            self._insist(self._gateway.revoke, lease, deadline)
            return True
        except StorageError:
            with self._mutex:
                self._doomed.append((time.monotonic() + ttl, lease))
                start, self._ending = not self._ending, True
            if start:
                threading.Thread(target=self._end_doomed, daemon=True).start()
            return False

    def _end_doomed(self) -> None:
        """Ends the leases that could not be ended at once, one by one, so that a slow etcd is not made slower."""
        pause = 1.0
        while True:
            with self._mutex:
                if not self._doomed:
                    self._ending = False
                    return
                ends, lease = self._doomed.popleft()
            if time.monotonic() >= ends:
                continue
            try:
                self._insist(self._gateway.revoke, lease, deadline_after(self._timeout))
                pause = 1.0
            except StorageError:  # logged per member, not per try
                with self._mutex:
                    self._doomed.append((ends, lease))
                time.sleep(pause)
                pause = min(2 * pause, 5.0)


# == Gateway: etcd's JSON gateway, in our words ======================================================================
#
# Base64 and int64-as-text stop here. etcd's answers leave out fields that are zero, false or empty, and etcd ignores
# fields that it does not know: a typo in a compare would compare something else.


class Claim(NamedTuple):
    """What an acquire asks for: to put the key and value with a lease that was granted before."""

    key: str
    value: str
    lease: int


MAX_OPERATIONS = 64  # in one transaction; etcd allows 128, nested ones counted in
MAX_BATCH_BYTES = 256 << 10  # of keys and values in one call; base64 adds a third, and etcd's limit is 1.5 MiB
MAX_KEEPALIVES = 64  # lines of 26 bytes in one POST: see _LINES_LEAD


def _part_of_call(size: int) -> float:
    """The part of a transaction that an operation with `size` characters takes up; each is at most 4 bytes."""
    return max(1 / MAX_OPERATIONS, size * 4 / MAX_BATCH_BYTES)


class Gateway:
    """Calls to etcd's API. Each raises StorageError if it has no answer by `deadline` (time.monotonic)."""

    def __init__(self, client: Any) -> None:
        self._client = client  # an etcd3gw.Etcd3Client over an EtcdSession
        self._url = functools.cache(client.get_url)

    def holders(self, keys: list[str], deadline: float) -> list[Holder | None]:
        """Who holds each key, without the values; a linearizable read."""
        distinct = list(dict.fromkeys(keys))
        reads = [{"key": _key64(key), "keys_only": True} for key in distinct]
        if len(reads) == 1:  # 20 µs less than a transaction of one
            answers = [self._post("/kv/range", reads[0], deadline)]
        else:
            answer = self._post("/kv/txn", {"success": [{"request_range": read} for read in reads]}, deadline)
            answers = [response["response_range"] for response in answer["responses"]]
        by_key = dict(zip(distinct, map(_holder, answers), strict=True))
        return [by_key[key] for key in keys]

    def look(self, key: str, deadline: float) -> Holder | None:
        return _holder(self._post("/kv/range", {"key": _key64(key)}, deadline))

    def grant(self, wish: tuple[int, int], deadline: float) -> int:
        """Makes a lease with this (ID, ttl) and returns the ttl that was granted. It may be repeated."""
        lease, ttl = wish
        try:
            return int(self._post("/lease/grant", {"ID": lease, "TTL": ttl}, deadline)["TTL"])
        except Refused as fault:
            if "lease already exists" not in str(fault):
                raise
        # An earlier try was applied, since the ID is random and ours. Its answer is lost, so we ask for the ttl.
        info = self.time_to_live(lease, deadline)
        if info is None:
            raise Refused("the lease ended before it was used")
        return info.granted

    def claim(self, claims: list[Claim], deadline: float) -> list[Holder | StorageError]:
        """Puts each key that nobody holds, and tells who holds it then. It may be repeated: whoever finds its own
        lease there has the key. etcd refuses to put a key twice in one transaction, so of two claims for one key only
        the first is sent, and the second gets its answer.

        Who holds a key that was not put is read afterwards: as a branch of the transaction it cost every acquire 8 %.
        """
        distinct = {claim.key: claim for claim in reversed(claims)}
        txns = [_claim_txn(claim) for claim in distinct.values()]
        if len(txns) == 1:
            answer = self._post("/kv/txn", txns[0], deadline)
            answers = [answer]
        else:
            answer = self._post("/kv/txn", {"success": [{"request_txn": txn} for txn in txns]}, deadline)
            answers = [response["response_txn"] for response in answer["responses"]]
        token = int(answer["header"]["revision"])
        outcomes: dict[str, Holder | StorageError] = {
            claim.key: Holder(claim.lease, token)
            for claim, txn in zip(distinct.values(), answers, strict=True)
            if txn.get("succeeded")
        }
        lost = [key for key in distinct if key not in outcomes]
        if lost:
            try:
                found = zip(lost, self.holders(lost, deadline), strict=True)
                outcomes |= {key: holder or Unavailable("released in this very moment") for key, holder in found}
            except StorageError as fault:  # among the lost may be one that an earlier try has won
                outcomes |= dict.fromkeys(lost, OutcomeUnknown(str(fault)))
        return [outcomes[claim.key] for claim in claims]

    def keep_alive(self, leases: list[int], deadline: float) -> list[int | StorageError]:
        """The renewed ttl of each lease, 0 where it is gone. Answers are matched by ID, since some may be missing."""
        answers = self._post("/lease/keepalive", [{"ID": lease} for lease in dict.fromkeys(leases)], deadline)
        results = [answer["result"] for answer in answers if "result" in answer]
        ttls = {int(result.get("ID", 0)): max(0, int(result.get("TTL", 0))) for result in results}
        cut_short = Unavailable("etcd cut its answer short")
        return [ttls.get(lease, cut_short) for lease in leases]

    def time_to_live(self, lease: int, deadline: float) -> LeaseInfo | None:
        answer = self._post("/lease/timetolive", {"ID": lease, "keys": True}, deadline)
        left = int(answer.get("TTL", 0))
        keys = tuple(map(base64.b64decode, answer.get("keys", ())))
        return LeaseInfo(left, int(answer.get("grantedTTL", 0)), keys) if left >= 0 else None

    def revoke(self, lease: int, deadline: float) -> None:
        """Ends the lease; one that is gone already is as good. A claim with it that is still under way will fail."""
        try:
            self._post("/lease/revoke", {"ID": lease}, deadline)
        except Refused as fault:
            if fault.code != GRPC_NOT_FOUND:
                raise

    def _post(self, path: str, payload: Any, deadline: float) -> Any:
        return self._client.post(self._url(path), json=payload, deadline=deadline)


def _key64(key: str) -> str:
    return base64.b64encode((KEY_PREFIX + key).encode()).decode()


def _claim_txn(claim: Claim) -> dict[str, Any]:
    """If the key does not exist (create_revision 0), put it with the lease."""
    key = _key64(claim.key)
    value = base64.b64encode(claim.value.encode()).decode()
    return {
        "compare": [{"key": key, "target": "CREATE", "create_revision": 0}],
        "success": [{"request_put": {"key": key, "value": value, "lease": claim.lease}}],
    }


def _holder(response: dict[str, Any]) -> Holder | None:
    """The holder in a RangeResponse for one key."""
    if not response.get("kvs"):
        return None
    kv = response["kvs"][0]
    return Holder(int(kv.get("lease", 0)), int(kv["create_revision"]), base64.b64decode(kv.get("value", "")))


GRPC_NOT_FOUND = 5
GRPC_UNAVAILABLE = 14
# Codes that mean that nothing was applied, whichever member says it: invalid argument, not found, already exists,
# permission denied, resource exhausted, failed precondition, out of range, unimplemented, unauthenticated.
GRPC_REFUSALS = frozenset({3, 5, 6, 7, 8, 9, 11, 12, 16})


def classify(status: int, text: str) -> StorageError:
    """What an answer other than 200 means; by gRPC code, since HTTP codes differ between etcd's releases.

    Shapes: {"error": M, "code": N} and, 3.6, {"message": M, "code": N}; of a stream {"error": {"grpc_code": N,
    "message": M}} and, 3.6, {"error": {"code": N, "message": M}}; and plain text.
    """
    try:
        answer = json.loads(text)
        detail = answer["error"] if isinstance(answer.get("error"), dict) else answer
        code = int(detail.get("grpc_code", detail.get("code")))
        message = str(detail.get("message") or detail.get("error"))
    except (ValueError, TypeError, AttributeError):
        return _classify_plain(status, " ".join(text.split()))
    if code in GRPC_REFUSALS:
        return Refused(message, code)
    if code == GRPC_UNAVAILABLE and "no leader" in message:
        return Unavailable(message)  # thanks to our header hasleader, before anything was done
    return OutcomeUnknown(message)  # timed out, leader changed, not a primary lessor, and anything else


def _classify_plain(status: int, text: str) -> StorageError:
    shown = f"HTTP {status}: {quote(text)}"
    if "CommonName" in text:
        return Unavailable(f"{shown}: with etcd's auth enabled, the client certificate must have no CommonName")
    if status == 404:
        return Unavailable(f"{shown}: is the gateway on (--enable-grpc-gateway), and is this etcd?")
    return Unavailable(shown) if 400 <= status < 500 else OutcomeUnknown(shown)


# == Members: which one to ask, over which connection ================================================================


class Member:
    """A member of etcd: its idle connections, and what is wrong with it (`fault`; None: it is well)."""

    def __init__(self, address: Address, tls: bool) -> None:
        self.address = address
        self.tls = tls
        self.idle: list[Wire] = []  # append and pop are atomic; the most recently used is taken first
        self.fault: str | None = None
        self.failed_at = -math.inf
        self.watched = False  # a thread checks on it until it is well
        self.headers = (
            f" HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            # Without a leader a member says so at once, and certainly has not applied the call (etcd-io/etcd 10819).
            "Grpc-Metadata-hasleader: true\r\nContent-Length: "
        ).encode()

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"


class Reply(NamedTuple):
    """What etcd3gw looks at in an answer of 200; for any other, EtcdSession raises an error itself."""

    payload: Any
    status_code: int = 200

    def json(self) -> Any:
        return self.payload


PAUSE_SECONDS = 0.1  # between two tries of one member that failed
MAX_IDLE = 256  # connections kept open to one member
WATCH_SECONDS = 1.0  # between two checks of a sick member


class EtcdSession:
    """The session under etcd3gw: kept connections to all members, and one that is well for each call.

    The first member serves until it fails. Then it is sick: it becomes the last, and is checked in the background
    until it is well. While all are sick they are tried in turn. (requests, etcd3gw's own session, costs 0.7 ms of CPU
    a call instead of 0.08, and knows one endpoint.)
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        members = [Member(a, config.etcd_tls if a.tls is None else a.tls) for a in config.etcd_addr_list]
        random.shuffle(members)  # so that replicas that start together do not all begin with the same
        # Only a timeout gives a frozen member away, so a try gets a share of the time: enough for all, and one twice.
        self._share_seconds = config.etcd_timeout / (len(members) + 1)
        self._mutex = threading.Lock()  # owns the order of members and the fields about their health
        self._members = members

    def start(self) -> None:
        """Checks every member in the background, so that the log tells at once what is wrong."""
        for member in self._members:
            member.watched = True
            threading.Thread(target=self._watch, args=(member,), daemon=True).start()

    def post(self, url: str, *, json: Any, timeout: float | None, deadline: float) -> Reply:
        """One try on one member; a list is sent as JSON lines. The host in `url` and `timeout` are etcd3gw's, and
        unused. Raises Refused, Unavailable or OutcomeUnknown."""
        return self._ask(self._pick(deadline), "/" + url.split("/", 3)[3], json, deadline)

    def _pick(self, deadline: float) -> Member:
        """The first that is well; while none is, each in turn, with a pause between two tries of one."""
        while True:
            for member in self._members:
                if member.fault is None:
                    return member
            member = min(self._members, key=lambda member: member.failed_at)
            pause = min(member.failed_at + PAUSE_SECONDS, deadline) - time.monotonic()
            if time.monotonic() >= deadline:
                raise Unavailable(f"{member}: {member.fault}")
            if pause <= 0:
                return member
            time.sleep(pause)

    def _ask(self, member: Member, path: str, payload: Any, deadline: float) -> Reply:
        now = time.monotonic()
        if now >= deadline:
            raise Unavailable(f"{member}: no time was left to ask it")
        share_ends = now + self._share_seconds
        try:
            status, text = self._exchange(member, path, _to_lines(payload), min(share_ends, deadline))
            if status != 200:
                raise classify(status, text)
            answer = _from_lines(text) if isinstance(payload, list) else _from_json(text)
        except Refused as fault:  # it is well enough to say no
            raise Refused(f"{member}: {fault}", fault.code) from fault
        except Stale as fault:
            raise Stale(f"{member}: {fault}") from fault
        except (StorageError, ValueError) as fault:
            # If the caller's deadline cut the try short, that says nothing about the member.
            if share_ends <= deadline or time.monotonic() < deadline:
                self._mark_sick(member, str(fault))
            kind = Unavailable if isinstance(fault, Unavailable) else OutcomeUnknown
            raise kind(f"{member}: {fault}") from fault
        if member.fault is not None:
            self._mark_well(member)
        return Reply(answer)

    def _exchange(self, member: Member, path: str, body: str, deadline: float) -> tuple[int, str]:
        """Status and body of the answer. Raises Stale for a kept connection that etcd has closed meanwhile."""
        request = b"POST %b%b%d\r\n\r\n%b" % (path.encode(), member.headers, len(body), body.encode())
        try:
            wire, kept = member.idle.pop(), True
        except IndexError:
            wire, kept = self._connect(member, deadline), False
        try:
            return _converse(member, wire, request, deadline)
        except (OSError, EOFError, Malformed, ValueError) as fault:
            wire.sock.close()
            if kept and not wire.rest and isinstance(fault, (ConnectionError, EOFError, ssl.SSLError)):
                _close_all(member.idle)  # they are of the same age
                raise Stale(_reason(fault)) from fault
            if not kept and isinstance(fault, ssl.SSLError):
                raise Unavailable(_reason(fault)) from fault  # TLS 1.3 refuses a client after the handshake
            hint = "; is it https?" if not kept and not member.tls and isinstance(fault, EOFError) else ""
            raise OutcomeUnknown(_reason(fault) + hint) from fault

    def _connect(self, member: Member, deadline: float) -> Wire:
        try:
            left = max(0.001, deadline - time.monotonic())
            sock = socket.create_connection((member.address.host, member.address.port), left)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(max(0.001, deadline - time.monotonic()) if member.tls else None)
            if member.tls:
                # A new context each time, since certificates are renewed while this daemon runs.
                sock = self._config.tls_context().wrap_socket(sock, server_hostname=member.address.host)
        except (OSError, ValueError) as fault:
            raise Unavailable(_reason(fault)) from fault
        return Wire(sock)

    def _mark_sick(self, member: Member, fault: str) -> None:
        _close_all(member.idle)
        with self._mutex:
            before, member.fault, member.failed_at = member.fault, fault, time.monotonic()
            self._members = [other for other in self._members if other is not member] + [member]
            watched, member.watched = member.watched, True
        if before is None:
            event(WARNING, "etcd member failed", member=member, reason=fault)
        if not watched:
            threading.Thread(target=self._watch, args=(member,), daemon=True).start()

    def _mark_well(self, member: Member) -> None:
        with self._mutex:
            before, member.fault = member.fault, None
        if before is not None:
            event(INFO, "etcd member is well again", member=member)

    def _watch(self, member: Member) -> None:
        """Checks the member until it is well, off the path of any request."""
        while True:
            with contextlib.suppress(StorageError):  # _ask has noted it
                self._ask(member, "/v3/kv/range", {"key": _key64("")}, math.inf)  # for as long as a try may take
            with self._mutex:
                if member.fault is None:
                    member.watched = False
                    return
            time.sleep(WATCH_SECONDS)


@functools.lru_cache(maxsize=256)  # the answers of one second are alike
def parse_answer_head(data: bytes) -> tuple[int, Mapping[str, str]]:
    """Status and headers. Raises Malformed."""
    line, *header_lines = data.decode("latin-1").split("\r\n")
    match = re.match(r"HTTP/1\.[01] ([0-9]{3})", line)
    if not match:
        raise Malformed(502, f"not HTTP: {quote(line)}")
    return int(match[1]), parse_headers(header_lines)


def _converse(member: Member, wire: Wire, request: bytes, deadline: float) -> tuple[int, str]:
    """Sends the request, reads status and body of the answer, and keeps the connection if it is as good as new."""
    wire.send(request, deadline)
    status, headers = parse_answer_head(wire.head(deadline))
    text = wire.body(headers, MAX_ANSWER_BYTES, deadline).decode()
    if status == 200 and not wire.rest and "connection" not in headers and len(member.idle) < MAX_IDLE:
        member.idle.append(wire)
    else:  # not to be trusted after an error, or with something unread
        wire.sock.close()
    return status, text


_to_json = json.JSONEncoder(separators=(",", ":")).encode


# etcd stops reading the lines of a stream once it starts to answer, and the rest is lost. Only what its decoder reads
# first is safe: 512 bytes, but 2,048 after 1,536 blanks, for which Go's json.Decoder doubles its buffer.
# Measured under load: 32 lines without the blanks, 832 of 19,200 answers missing, 18 lines, none of 86,400; with them
# 64 and 76 lines, none in 600 calls each. A lone line is answered 6 % sooner without.
_SAFE_BYTES = 512
_LINES_LEAD = " " * 1536


def _to_lines(payload: Any) -> str:
    if not isinstance(payload, list):
        return _to_json(payload)
    lines = _to_json(payload)[1:-1].replace("},{", "}{")  # numbers only; 5 times as fast as line by line
    return lines if len(lines) < _SAFE_BYTES else _LINES_LEAD + lines


def _from_json(text: str) -> dict[str, Any]:
    """The answer to a call. Raises OutcomeUnknown, or ValueError if it is not JSON."""
    answer = json.loads(text)
    if not isinstance(answer, dict) or "header" not in answer:  # which etcd never leaves out
        raise OutcomeUnknown(f"not an answer of etcd: {quote(text)}")
    return answer


def _from_lines(text: str) -> list[dict[str, Any]]:
    """The answers of a stream. Raises StorageError if none is a result, or ValueError if they are not JSON."""
    answers: list[dict[str, Any]] = json.loads("[" + text.strip().replace("\n", ",") + "]")
    if not any(isinstance(answer, dict) and "result" in answer for answer in answers):
        raise classify(200, text.partition("\n")[0])
    return answers


def _close_all(wires: list[Wire]) -> None:
    while wires:
        with contextlib.suppress(IndexError):  # another thread took the last
            wires.pop().sock.close()


def _reason(fault: Exception) -> str:
    """One line about why a connection failed."""
    if isinstance(fault, ssl.SSLCertVerificationError):
        return f"TLS: its certificate is not accepted: {fault.verify_message}"
    if isinstance(fault, ssl.SSLError):
        if isinstance(fault, ssl.SSLEOFError) or fault.reason == "WRONG_VERSION_NUMBER":
            return "TLS: it does not answer in TLS; is it http?"
        return f"TLS: {(fault.reason or str(fault)).lower().replace('_', ' ')}"
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror.lower()
    return str(fault) or type(fault).__name__


def open_storage(config: Config) -> Storage:
    """The configured storage. Raises ConfigError."""
    if config.storage_type == "mock":
        return MemoryStorage()
    try:
        import etcd3gw  # only here, so that the file runs without any package on the mock
    except ImportError as fault:
        raise ConfigError(
            f"{variable('storage_type')}: etcd needs the package etcd3gw (pip install etcd3gw): {fault}"
        ) from fault
    session = EtcdSession(config)
    session.start()
    client = etcd3gw.Etcd3Client(session=cast(Any, session), api_path="/v3/")
    return EtcdStorage(Gateway(client), config.etcd_timeout)


# == Metrics =========================================================================================================

_GRANT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
_LEASE_RESULTS = [("get", "created"), ("get", "accepted"), ("get", "error")] + [
    (operation, status) for operation in ("prolong", "release") for status in ("success", "failure", "error")
]
_CACHE_RESULTS = [("get", "success"), ("get", "failure"), ("set", "success"), ("evict", "success")]


class Metrics:
    """Counters under the Go service's names, in Prometheus' text format 0.0.4. No key, value or lease is a label."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # owns all below
        self._lease = dict.fromkeys(_LEASE_RESULTS, 0)
        self._cache = dict.fromkeys(_CACHE_RESULTS, 0)
        self._grants = [0] * (len(_GRANT_BUCKETS) + 1)
        self._grant_seconds = 0.0

    def count_lease(self, operation: str, status: str) -> None:
        with self._mutex:
            self._lease[operation, status] += 1

    def count_grant(self, seconds: float) -> None:
        """A lock was taken in so many seconds, not counting the wait in line."""
        with self._mutex:
            self._lease["get", "created"] += 1
            self._grants[bisect.bisect_left(_GRANT_BUCKETS, seconds)] += 1
            self._grant_seconds += seconds

    def count_cache(self, operation: str, status: str) -> None:
        with self._mutex:
            self._cache[operation, status] += 1

    def render(self) -> str:
        """All families, as one page."""
        with self._mutex:
            lease, cache = dict(self._lease), dict(self._cache)
            grants, grant_seconds = list(itertools.accumulate(self._grants)), self._grant_seconds
        grant = "shared_lock_lease_grant_duration_seconds"
        bounds = zip([*_GRANT_BUCKETS, "+Inf"], grants, strict=True)
        histogram: dict[str, float] = {f'_bucket{{operation="get",le="{bound}"}}': count for bound, count in bounds}
        histogram |= {'_sum{operation="get"}': grant_seconds, '_count{operation="get"}': grants[-1]}
        return "".join(
            [
                _family("shared_lock_lease_operations_total", "counter", "Operations on locks.", _by_result(lease)),
                _family(grant, "histogram", "Time to take a free lock.", histogram),
                _family("shared_lock_cache_operations_total", "counter", "Uses of the cache.", _by_result(cache)),
                *_process_families(),
            ]
        )


def _by_result(counts: dict[tuple[str, str], int]) -> dict[str, float]:
    return {f'{{operation="{operation}",status="{status}"}}': count for (operation, status), count in counts.items()}


def _family(name: str, kind: str, meaning: str, samples: Mapping[str, float]) -> str:
    """A metric in the text format; `samples` maps what follows the name to the value."""
    lines = [f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n"]
    return "".join(lines + [f"{name}{rest} {value}\n" for rest, value in samples.items()])


_STARTED_SECONDS = time.time()


def _process_families() -> Iterator[str]:
    """What Prometheus' client libraries tell about every process, where there is a /proc."""
    yield _family("process_start_time_seconds", "gauge", "Start, in seconds since 1970.", {"": _STARTED_SECONDS})
    with contextlib.suppress(OSError):  # no /proc, or no descriptor left to read it with
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        yield _family("process_resident_memory_bytes", "gauge", "Resident memory.", {"": resident})
        open_fds = len(os.listdir("/proc/self/fd"))
        yield _family("process_open_fds", "gauge", "Open file descriptors.", {"": open_fds})
    build = f'{{implementation="{platform.python_implementation()}",version="{platform.python_version()}"}}'
    yield _family("python_info", "gauge", "The Python that runs this.", {build: 1})


# == Profiles: what `go tool pprof` opens ============================================================================
#
# Only for SHARED_LOCK_PPROF_ENABLED. Stacks are tuples of (function, file, line), innermost first.

Stack = tuple[tuple[str, str, int], ...]
_SAMPLES_PER_SECOND = 100
_HEAP_FRAMES = 12  # of each allocation that tracemalloc remembers


def profile_pages() -> dict[str, Callable[[Request], Response]]:
    """The pages under /debug/pprof/, by path. Starts to trace allocations."""
    import tracemalloc

    tracemalloc.start(_HEAP_FRAMES)
    root = "/debug/pprof/"
    pages = {root + "profile": cpu_profile, root + "heap": heap_profile, root + "goroutine": thread_stacks}
    index = f"{root}profile?seconds=30\n{root}heap\n{root}goroutine?debug=2\n".encode()
    return {root: lambda request: Response(200, index), **pages}


def cpu_profile(request: Request) -> Response:
    """CPU time by stack, over `seconds`. A sample of a thread's stack weighs what the thread used since the last one.

    The sampler needs the interpreter, too, so it sees each thread where it lets go of that, mostly in a system call:
    the sums by caller (pprof's cum) are right, the innermost function (flat) is not.
    """
    text = _query(request).get("seconds", "30")
    if not re.fullmatch("[0-9]{1,3}", text) or not 0 < int(text) <= 300:
        raise BadRequest(f"seconds: not a number from 1 to 300: {quote(text)}")
    samples: collections.Counter[Stack] = collections.Counter()
    before = _cpu_nanos()
    ends = time.monotonic() + int(text)
    while time.monotonic() < ends:
        time.sleep(1 / _SAMPLES_PER_SECOND)
        used, frames = _cpu_nanos(), sys._current_frames()
        for thread, nanos in used.items():
            if (since := nanos - before.get(thread, 0)) > 0 and thread.ident in frames:
                samples[_stack(frames[thread.ident])] += since
        before = used
    return _pprof("cpu", "nanoseconds", samples, int(text))


def _cpu_nanos() -> dict[threading.Thread, int]:
    used = {}
    for thread in threading.enumerate():
        with contextlib.suppress(OSError):  # it has just ended
            # Linux' clock of a thread, from its kernel ID as glibc does it: time.pthread_getcpuclockid() may crash on
            # a thread that has ended.
            used[thread] = time.clock_gettime_ns(~(thread.native_id or 0) << 3 | 6)
    return used


def heap_profile(request: Request) -> Response:
    """Bytes in use that Python allocated since the start, by stack."""
    import tracemalloc

    samples: collections.Counter[Stack] = collections.Counter()
    for trace in tracemalloc.take_snapshot().traces:
        stack = [
            (_functions(at.filename).get(at.lineno, at.filename), at.filename, at.lineno) for at in trace.traceback
        ]
        samples[tuple(reversed(stack))] += trace.size
    return _pprof("inuse_space", "bytes", samples)


@functools.cache
def _functions(file: str) -> dict[int, str]:
    """The function at each line of a source file, which tracemalloc does not tell; empty where there is no source."""
    by_line: dict[int, str] = {}

    def walk(code: types.CodeType) -> None:
        by_line.update((line, code.co_qualname) for _, _, line in code.co_lines() if line)
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                walk(inner)

    with contextlib.suppress(OSError, SyntaxError, ValueError), open(file, "rb") as source:
        walk(compile(source.read(), file, "exec"))
    return by_line


def thread_stacks(request: Request) -> Response:
    """Every thread's stack: as text with ?debug=1 or 2, else for pprof."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [(names.get(ident, "?"), _stack(frame)) for ident, frame in sys._current_frames().items()]
    if _query(request).get("debug", "0") == "0":
        return _pprof("threads", "count", collections.Counter(stack for _, stack in stacks))
    text = [
        f"{name}:\n" + "".join(f"  {function} at {file}:{line}\n" for function, file, line in stack)
        for name, stack in stacks
    ]
    return Response(200, "\n".join(text).encode())


def _stack(frame: types.FrameType | None) -> Stack:
    stack = []
    while frame:
        stack.append((frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(stack)


def _pprof(kind: str, unit: str, samples: Mapping[Stack, int], seconds: int = 0) -> Response:
    """A gzipped profile.proto (github.com/google/pprof/proto/profile.proto); the numbers are its fields'."""
    import gzip

    strings: dict[str, int] = {"": 0}
    functions: dict[tuple[str, str], int] = {}
    locations: dict[tuple[str, str, int], int] = {}

    def string(text: str) -> int:
        return strings.setdefault(text, len(strings))

    def location(place: tuple[str, str, int]) -> int:
        functions.setdefault(place[:2], len(functions) + 1)
        return locations.setdefault(place, len(locations) + 1)

    out = [_field(1, _field(1, string(kind)) + _field(2, string(unit)))]
    for stack, value in samples.items():
        out.append(_field(2, b"".join(_field(1, location(place)) for place in stack) + _field(2, value)))
    for (function, file, line), number in locations.items():
        place = _field(1, functions[function, file]) + _field(2, line)
        out.append(_field(4, _field(1, number) + _field(4, place)))
    for (function, file), number in functions.items():
        out.append(_field(5, _field(1, number) + _field(2, string(function)) + _field(4, string(file))))
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


# == Life of the process: start, wait, stop ==========================================================================


DEBUG, INFO, WARNING, ERROR = "debug", "info", "warning", "error"
log_level = {DEBUG: False, INFO: True, WARNING: True, ERROR: True}  # what is written; serve() sets DEBUG


def event(level: str, name: str, **fields: object) -> None:
    """One line to stderr: time=2026-11-23T03:21:00.000Z level=info event=granted key=nightly lease=4711 …

    Not with the logging module, which takes 5 µs longer for a line.
    """
    if not log_level[level]:
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    words = [f"time={now[:-6]}Z level={level} event={_plain(name)}"]
    words += [f"{key}={_plain(value)}" for key, value in fields.items()]
    _stderr.write(" ".join(words))


class Stderr:
    """Writes whole lines, or none: a pipe that nobody reads any more must not stop the locks."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # owns the fields below, and the room that poll saw in the pipe
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)
        self._lost = 0  # lines since the last one that was written

    def write(self, line: str) -> None:
        """Waits up to 100 ms for a slow reader; after that, lines are dropped and counted until it reads again."""
        with self._mutex, contextlib.suppress(OSError):
            if not self._poll.poll(0 if self._lost else 100):
                self._lost += 1
                return
            lost, self._lost = f" lines_lost={self._lost}" if self._lost else "", 0
            # A pipe with room takes 4,096 bytes without blocking (PIPE_BUF).
            os.write(2, (line[:1000] + lost + "\n").encode("utf-8", "backslashreplace"))


_stderr = Stderr()


def _plain(value: object) -> str:
    """One plain word as it is, anything else quoted."""
    text = str(value)
    return text if isinstance(value, int) or re.fullmatch(r"[\w.:/@,+\[\]-]+", text) else quote(text)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections and knows which are open, so that it can stop without losing a request."""

    daemon_threads = True  # block_on_close would wait for idle clients, too: drain() waits for the others only
    block_on_close = False

    def __init__(self, config: Config, api: Api) -> None:
        """Listens on the configured address. Raises OSError."""
        self.config = config
        self.api = api
        self.draining = False
        self._mutex = threading.Condition()  # owns the set below; notified of each connection that closes
        self._connections: set[Connection] = set()
        listener = listen(config.server_host, config.server_port)
        # TCPServer's own __init__ would make a socket for one family, and HTTPServer's look up our name in the DNS.
        socketserver.BaseServer.__init__(self, listener.getsockname(), Connection)
        self.socket = listener

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; serve_forever goes on after an OSError."""
        try:
            return super().get_request()
        except OSError as fault:  # most likely out of descriptors; without a pause the loop would spin
            event(ERROR, "accept failed", reason=fault)
            time.sleep(0.1)
            raise

    def handle_error(self, request: object, client_address: object) -> None:
        fault = sys.exception()
        event(ERROR, "connection failed", error=repr(fault), at=_where(fault))

    def opened(self, connection: Connection) -> None:
        with self._mutex:
            self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        with self._mutex:
            self._connections.discard(connection)
            self._mutex.notify_all()

    def drain(self, timeout: float) -> None:
        """Accepts no more, closes idle connections, answers what is in flight, and after `timeout` seconds cuts what
        is left. Locks stay with their holders."""
        self.shutdown()
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # BlockingIOError: all that were let in have been accepted
            while True:
                self.process_request(*self.socket.accept())
        self.socket.close()
        self.draining = True
        self.api.service.dismiss_waiting()
        deadline = time.monotonic() + timeout
        with self._mutex:
            for connection in self._connections:
                connection.close_if_idle()
            while self._connections and (left := deadline - time.monotonic()) > 0:
                self._mutex.wait(left)
            for connection in self._connections:
                head = connection.serving
                doing = f"{head.method} {head.path}" if head else "reading a request"
                event(WARNING, "connection cut", client=connection.client, doing=doing)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; an empty host is every address, IPv6 with IPv4 where there is IPv6. Raises OSError."""
    if not host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError as fault:
            if fault.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    family, _, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=family, backlog=1024)


def _where(fault: BaseException | None) -> str:
    frames = traceback.extract_tb(fault.__traceback__) if fault else []
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"


STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def be_quick() -> None:
    """Tells Python and Linux that many threads run here, each for a short while at a time.

    Only one runs Python at any time, and handing the interpreter over to a thread on another CPU takes longer than
    what that thread does then: on one CPU of 2, 150 connections get 25,600 refusals/s instead of 12,600, and 1.4 times
    the keepalives. The CPU is chosen at random; the kernel moves other processes out of the way, but two
    daemons that chose the same CPU share it.
    """
    # Seconds. Among short bursts a forced switch only delays: without this, p99 of refusals is 56 to 84 ms, not 42.
    sys.setswitchinterval(0.02)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not allowed: slower, and no worse
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})


def serve(config: Config) -> int:
    """Runs the daemon until SIGTERM or SIGINT; returns the exit status. Raises ConfigError."""
    # Blocked in all threads, and waited for by the main one. A handler may run late or never, when another thread got
    # the signal; and PID 1 would not get one that comes during the start.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    log_level[DEBUG] = config.debug
    be_quick()
    metrics = Metrics()
    cache = Cache(config.cache_size, metrics) if config.cache_enabled else None
    service = LockService(open_storage(config), metrics, cache)
    try:
        server = Server(config, Api(service, metrics, config.pprof_enabled))
    except (OSError, UnicodeError) as fault:
        if isinstance(fault, UnicodeError | socket.gaierror) or fault.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            host = quote(config.server_host)
            raise ConfigError(f"{variable('server_host')}: not an address of this machine: {host}") from fault
        reason = os.strerror(fault.errno or 0).lower()
        print(f"shared-lock: cannot listen on port {config.server_port}: {reason}", file=sys.stderr)
        return 1
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()  # seconds until shutdown() is seen
    host, port = server.socket.getsockname()[:2]
    event(INFO, "serving", address=Address(host, port), storage=config.storage_type)
    signal.sigwait(STOP_SIGNALS)
    event(INFO, "stopping")
    threading.Thread(target=lambda: os._exit(128 + signal.sigwait(STOP_SIGNALS)), daemon=True).start()  # the second
    server.drain(config.server_shutdown_timeout)
    event(INFO, "stopped")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: `python shared_lock.py serve`."""
    parser = argparse.ArgumentParser(
        prog="shared_lock.py",
        description="Lends distributed locks over HTTP and keeps them in etcd.",
        epilog="environment:\n" + "\n".join(_help_lines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    commands.add_parser("serve", help="serve until SIGTERM or SIGINT")
    parser.parse_args(arguments)
    for descriptor in (0, 1, 2):  # one that is closed would become a socket, and get the log
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        return serve(Config.from_env(os.environ))
    except ConfigError as fault:
        print(f"shared-lock: {fault}", file=sys.stderr)
        return 2


def _help_lines() -> Iterator[str]:
    for one in fields(Config):
        meaning, default = one.metadata["meaning"], one.metadata["default"]
        yield f"  {variable(one.name):<36} {meaning}{f' [{default}]' if default else ''}"


if __name__ == "__main__":
    sys.exit(main())
