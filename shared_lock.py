"""shared-lock lends distributed locks over HTTP and keeps them in etcd. This file is all of it.

    $ curl -X POST localhost:8080/lease -H 'x-lease-ttl: 60s' -d '{"key": "nightly"}'
    4703919738795935662                       201: the lock is yours for 60 s; this is your lease
    $ curl -X POST localhost:8080/keepalive -d 4703919738795935662
                                              200: another 60 s from now; 204 would mean that it is lost

What a holder may rely on: etcd never has two holders of one key, and the lock lives at least as long as its ttl,
counted from the moment the holder *sent* the request that was answered 201 or 200.
What nobody may rely on: that a holder whose lease ran out has stopped. It may be paused and wake up later. Only
the protected resource can stop it, by refusing a fencing token smaller than one it has seen.

One lock is one etcd lease and one key put with it, `/shared-lock/` + key. No other state exists, so any number of
replicas may serve one etcd. The way of a request, which is also the order of this file:

    front door    bytes become a Request, and a Response becomes bytes; HTTP stops here
    LockService   what a lock means: acquire, renew, release, wait; the cache of held keys
    storage       memory (the specification) or etcd (the same promises over a network that fails)
    Combiner      while one call to etcd is in flight, later callers queue up to share the next
    Gateway       etcd's JSON gateway; base64, int64-as-text and the members that fail stop here

Metrics, profiles and the life of the process stand behind them. Every variable of the environment is a field of
Config; `python shared_lock.py --help` prints them.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import email.utils
import errno
import functools
import heapq
import http
import http.server
import itertools
import json
import logging
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
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar

KEY_PREFIX = "/shared-lock/"  # before every key of ours in etcd
DEFAULT_TTL_SECONDS = 10  # of a POST /lease without x-lease-ttl
MOST_TTL_SECONDS = 9_000_000_000  # etcd's own limit
MOST_WAIT_SECONDS = 60  # of x-lease-wait: proxies cut longer silences
POLL_SECONDS = 0.4  # how late a waiter may learn of a release through another replica
MOST_BODY_BYTES = 64 << 10  # of a request
MOST_HEAD_BYTES = 64 << 10  # of a request line, and of the headers together
MOST_HEADERS = 100
MOST_ANSWER_BYTES = 16 << 20  # of etcd: 64 values of 64 KiB in base64 are 6 MiB
INT64 = range(-(1 << 63), 1 << 63)

log = logging.getLogger("shared_lock")


# == Words: errors, settings, small data =============================================================================
#
# Errors are split by who must act: the caller (BadRequest), nobody yet (StorageError: nothing happened), or the
# caller with care (OutcomeUnknown). That a key is held, or a lease gone, is an answer and no error.


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
        super().__init__(text, code)
        self.text, self.code = text, code

    def __str__(self) -> str:
        return self.text


class Unavailable(StorageError):
    """No answer was to be had and nothing was changed: worth a try on another member."""


class OutcomeUnknown(StorageError):
    """The request may have been applied, or may yet be: only safe to repeat in a form that cannot apply twice."""


class ConfigError(Exception):
    """A variable of the environment that cannot be used; the text is one line that names it."""


class Holder(NamedTuple):
    """What a key in etcd holds: the lease it goes with (0: none), its fencing token, and its value where asked for."""

    lease: int
    token: int
    value: bytes = b""


class Grant(NamedTuple):
    """A lock that was taken: its lease, the granted ttl in seconds, its fencing token."""

    lease: int
    ttl: int
    token: int


class LeaseInfo(NamedTuple):
    """A lease that lives: seconds left, seconds granted, and the etcd keys that go with it."""

    left: int
    granted: int
    keys: tuple[str, ...]


def quote(value: object) -> str:
    """The value as error messages show it: on one line, in double quotes, not longer than a reader wants."""
    text = str(value)
    return json.dumps(text if len(text) <= 120 else text[:119] + "…", ensure_ascii=False)


_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_DURATION = re.compile(rf"([+-]?)((?:{_NUMBER}(?:ns|us|µs|μs|ms|s|m|h))+|{_NUMBER})")
_DURATION_PART = re.compile(rf"({_NUMBER})([^0-9.]*)")
_UNIT_SECONDS = {"ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "µs": Fraction(1, 10**6),
                 "μs": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": 1, "m": 60, "h": 3600, "": 1}  # fmt: skip


@functools.lru_cache(maxsize=256)
def parse_duration(text: str) -> Fraction:
    """The seconds in a Go duration ("1m30s", "1500ms") or a bare number of seconds, exactly. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if not match or len(text) > 100:
        raise ValueError(f"not a duration: {quote(text)}")
    seconds = sum((Fraction(n) * _UNIT_SECONDS[unit] for n, unit in _DURATION_PART.findall(match[2])), Fraction())
    return -seconds if match[1] == "-" else seconds


def parse_ttl(text: str) -> int:
    """The whole seconds, rounded up, that a lock is asked for. Raises ValueError."""
    seconds = math.ceil(parse_duration(text))
    if not 0 < seconds <= MOST_TTL_SECONDS:
        raise ValueError(f"not more than 0 and at most {MOST_TTL_SECONDS}s: {quote(text)}")
    return seconds


def parse_wait(text: str) -> float:
    """The seconds that a caller is ready to wait for a lock. Raises ValueError."""
    seconds = parse_duration(text)
    if not 0 <= seconds <= MOST_WAIT_SECONDS:
        raise ValueError(f"not between 0s and {MOST_WAIT_SECONDS}s: {quote(text)}")
    return float(seconds)


def parse_timeout(text: str) -> float:
    """The seconds of a server's timeout. Raises ValueError."""
    seconds = parse_duration(text)
    if not 0 <= seconds <= MOST_TTL_SECONDS:
        raise ValueError(f"not between 0s and {MOST_TTL_SECONDS}s: {quote(text)}")
    return float(seconds)


def parse_positive_timeout(text: str) -> float:
    if not (seconds := parse_timeout(text)):
        raise ValueError(f"not more than 0s: {quote(text)}")
    return seconds


def parse_bool(text: str) -> bool:
    """As Go's strconv.ParseBool. Raises ValueError."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError(f"not a boolean (true or false): {quote(text)}")


def parse_port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"not a port number from 0 to 65535: {quote(text)}")
    return int(text)


def parse_size(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError(f"not a number from 1 to 999999999: {quote(text)}")
    return int(text)


def parse_storage_type(text: str) -> str:
    if text not in ("etcd", "mock"):
        raise ValueError(f"not etcd or mock: {quote(text)}")
    return text


class Address(NamedTuple):
    """Where a member of etcd listens; `tls` is None where the endpoint names no scheme."""

    host: str
    port: int
    tls: bool | None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_addresses(text: str) -> tuple[Address, ...]:
    """The endpoints in a comma-separated list of `http://h:p`, `https://h:p` and `h:p`. Raises ValueError."""
    return tuple(parse_address(part.strip()) for part in text.split(","))


def parse_address(text: str) -> Address:
    scheme, separator, rest = text.rpartition("://")
    try:
        parts = urllib.parse.urlsplit("//" + rest)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number, half a bracket
        host = port = None
    bare = parts.path in ("", "/") and not parts.query and not parts.fragment and "@" not in rest if host else False
    if not bare or not host or not port or re.search(r"\s", rest) or scheme not in ("", "http", "https"):
        raise ValueError(f"not an endpoint like http://host:2379: {quote(text)}")
    return Address(host, port, scheme == "https" if separator else None)


def parse_text(text: str) -> str:
    return text


def setting(default: str, parse: Callable[[str], Any], meaning: str) -> Any:
    """A field of Config: its default as the environment would give it, its parser, its line in --help."""
    return field(default=parse(default), metadata={"default": default, "parse": parse, "meaning": meaning})


@dataclass(frozen=True)
class Config:
    """All that can be set, each field by the variable SHARED_LOCK_ + its name in capitals. Durations are seconds."""

    server_port: int = setting("8080", parse_port, "port to listen on; 0 takes a free one, which the log tells")
    server_host: str = setting("", parse_text, "address to listen on; empty is every address, IPv4 and IPv6")
    server_read_timeout: float = setting("10s", parse_timeout, "from a request's first byte to its last; 0 is none")
    server_write_timeout: float = setting("10s", parse_timeout, "to write an answer; 0 is none")
    server_idle_timeout: float = setting("120s", parse_timeout, "an idle connection is closed after it; 0 is none")
    server_shutdown_timeout: float = setting("10s", parse_timeout, "for requests in flight after SIGTERM or SIGINT")
    pprof_enabled: bool = setting("false", parse_bool, "serve /debug/pprof/")
    storage_type: str = setting("etcd", parse_storage_type, "etcd, or mock: in memory, lost with the process")
    etcd_addr_list: tuple[Address, ...] = setting(
        "http://localhost:2379", parse_addresses, "comma-separated endpoints: http://h:p, https://h:p or h:p"
    )
    etcd_tls: bool = setting("false", parse_bool, "TLS to etcd with the three files below")
    ca_cert_path: str = setting("/etc/etcd/ca.crt", parse_text, "who signed etcd's certificate")
    client_cert_path: str = setting("/etc/etcd/client.crt", parse_text, "what this daemon shows to etcd")
    client_key_path: str = setting("/etc/etcd/client.key", parse_text, "the key of that certificate")
    etcd_timeout: float = setting("5s", parse_positive_timeout, "one storage operation, all tries together")
    cache_enabled: bool = setting("false", parse_bool, "answer 202 from memory while a key is known to be held")
    cache_size: int = setting("1000", parse_size, "keys to remember; the least recently used leave")
    debug: bool = setting("false", parse_bool, "log every request")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """The configuration in `env`, such as os.environ. Raises ConfigError, one line, for the first that is wrong."""
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
            path = getattr(self, name)
            try:
                with open(path, "rb"):
                    pass
            except OSError as fault:
                raise ConfigError(f"{variable(name)}: cannot be read: {quote(path)}: {fault.strerror}") from fault
        try:
            ssl.create_default_context(cafile=self.ca_cert_path)
        except (ssl.SSLError, OSError) as fault:
            raise ConfigError(
                f"{variable('ca_cert_path')}: not certificates in PEM: {quote(self.ca_cert_path)}"
            ) from fault
        try:
            self.tls_context()
        except (ssl.SSLError, OSError) as fault:
            raise ConfigError(
                f"{variable('client_cert_path')}: {quote(self.client_cert_path)} is not a certificate in PEM"
                f" that belongs to the key {quote(self.client_key_path)}"
            ) from fault
        for address in self.etcd_addr_list:
            if address.tls is False:
                raise ConfigError(
                    f"{variable('etcd_addr_list')}: an http:// endpoint, with {variable('etcd_tls')}=true:"
                    f" {quote(f'http://{address}')}: use https://, or no scheme"
                )

    def tls_context(self) -> ssl.SSLContext:
        """How to talk TLS to etcd: with our three files, or, for an https endpoint without ETCD_TLS, as curl would."""
        context = ssl.create_default_context(cafile=self.ca_cert_path if self.etcd_tls else None)
        if self.etcd_tls:
            # A password callback keeps OpenSSL from asking for one on the terminal.
            context.load_cert_chain(self.client_cert_path, self.client_key_path, password=lambda: b"")
        return context


def variable(name: str) -> str:
    """The environment's name for a field of Config."""
    return "SHARED_LOCK_" + name.upper()


# == Wire: HTTP/1.1 messages over one socket =========================================================================
#
# The front door reads requests with it and the gateway reads etcd's answers. http.server and http.client parse heads
# with the e-mail package, which takes longer than all the rest of a request: /health at 64 connections went from
# 5,200 to 17,000 requests/s with what follows. Being strict is easier here, too.


class Malformed(Exception):
    """What came is not the HTTP that is spoken here; `status` is the answer where there is a caller to tell."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_RECEIVE_BYTES = 16 << 10  # one recv; nearly every message is smaller


class Wire:
    """One socket, and the bytes that have come over it and were not used yet. It belongs to one thread at a time.

    Reading ends with EOFError where the other side has ended the stream, TimeoutError at the deadline (of
    time.monotonic, math.inf is none), Malformed, or ConnectionError.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""
        self._in_force = {socket.SO_RCVTIMEO: math.inf, socket.SO_SNDTIMEO: math.inf}

    def head(self, deadline: float) -> bytes:
        """A message's first line and headers, up to and without the blank line."""
        start = 0
        while (end := self.rest.find(b"\r\n\r\n", start)) < 0:
            if len(self.rest) > 2 * MOST_HEAD_BYTES:
                break
            if b"\n\n" in self.rest:
                raise Malformed(400, "a line ends in a line feed without a carriage return")
            start = max(0, len(self.rest) - 3)
            self.receive(deadline)
        head = self.rest[:end] if end >= 0 else self.rest
        line_end = head.find(b"\r\n")
        if (line_end if line_end >= 0 else len(head)) > MOST_HEAD_BYTES:
            raise Malformed(414, f"the request line is longer than {MOST_HEAD_BYTES} bytes")
        if end < 0 or len(head) - line_end > MOST_HEAD_BYTES + 2:
            raise Malformed(431, f"the headers are longer than {MOST_HEAD_BYTES} bytes")
        self.rest = self.rest[end + 4 :]
        return head

    def body(self, headers: Mapping[str, str], most: int, deadline: float) -> bytes:
        """The body that these headers announce; without Content-Length and Transfer-Encoding there is none."""
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if coding is not None:
            if length is not None:
                raise Malformed(400, "content-length together with transfer-encoding")
            if coding.lower() != "chunked":
                raise Malformed(400, f"transfer-encoding: not chunked: {quote(coding)}")
            return b"".join(self._chunks(most, deadline))
        if length is None:
            return b""
        if not (length.isascii() and length.isdigit()):
            raise Malformed(400, f"content-length: not a number: {quote(length)}")
        if len(length.lstrip("0")) > 18 or int(length) > most:
            raise Malformed(413, f"the body is larger than {most} bytes")
        return self._exactly(int(length), deadline)

    def _chunks(self, most: int, deadline: float) -> Iterator[bytes]:
        total = 0
        while size := self._chunk_size(deadline):
            total += size
            if total > most:
                raise Malformed(413, f"the body is larger than {most} bytes")
            yield self._exactly(size, deadline)
            if self._exactly(2, deadline) != b"\r\n":
                raise Malformed(400, "a chunk is longer than it said")
        for _ in range(MOST_HEADERS):
            if not self._line(deadline):
                return
        raise Malformed(431, f"more than {MOST_HEADERS} trailers")

    def _chunk_size(self, deadline: float) -> int:
        digits = self._line(deadline).partition(b";")[0].rstrip(b" \t")
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", digits):
            raise Malformed(400, f"not the size of a chunk: {quote(digits.decode('latin-1'))}")
        return int(digits, 16)

    def _line(self, deadline: float) -> bytes:
        while (end := self.rest.find(b"\r\n")) < 0:
            if len(self.rest) > 4096:
                raise Malformed(400, "a line between chunks is longer than 4096 bytes")
            self.receive(deadline)
        line, self.rest = self.rest[:end], self.rest[end + 2 :]
        return line

    def _exactly(self, count: int, deadline: float) -> bytes:
        if len(self.rest) < count:
            parts = [self.rest]
            missing = count - len(self.rest)
            while missing > 0:
                self.rest = b""
                self.receive(deadline)
                parts.append(self.rest)
                missing -= len(self.rest)
            self.rest = b"".join(parts)
        part, self.rest = self.rest[:count], self.rest[count:]
        return part

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
        """Sends all of it, however slowly the other side takes it."""
        while data:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = self.sock.send(data)
            except BlockingIOError as fault:
                raise TimeoutError("timed out") from fault
            data = data[sent:]

    def _limit(self, option: int, deadline: float) -> None:
        """Sets how long the next recv or send may take: by socket option, since settimeout() adds a poll() to each.

        TLS heeds settimeout() only. A timeout in force that is right to within 2 % is kept, which spares a system
        call in nearly every recv and send.
        """
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
    """A request without its body. Header names are in lower case, several of one name joined with ", "."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    keep_alive: bool
    version: str


class Request(NamedTuple):
    """`hung_up()` tells whether the caller has gone while the answer was being made."""

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
    """One line of plain text; what cannot be encoded is shown escaped."""
    return Response(status, (text + "\n").encode("utf-8", "backslashreplace"), TEXT, headers)


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


def parse_head(data: bytes) -> Head:
    """The request line and the headers. Raises Malformed."""
    line, *header_lines = data.decode("utf-8", "replace").split("\r\n")
    if len(header_lines) > MOST_HEADERS:
        raise Malformed(431, f"more than {MOST_HEADERS} headers")
    match = re.fullmatch(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~]+) HTTP/([0-9])\.([0-9])", line)
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


# A client sends the same head again and again, byte for byte: 9 µs become 0.2 µs. Long heads are not worth the memory.
_parse_short_head = functools.lru_cache(maxsize=1024)(parse_head)


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


_REASON = {status.value: status.phrase for status in http.HTTPStatus}
_REASON[413] = "Content Too Large"  # RFC 9110; CPython before 3.13 has the name of RFC 7231


def render(response: Response, head: Head | None, keep_alive: bool) -> bytes:
    """The bytes of an answer. `head` is the request's, None where it could not be read."""
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
    bytes_ = "".join(lines).encode("latin-1")
    return bytes_ if head and head.method == "HEAD" else bytes_ + body


class Connection(socketserver.BaseRequestHandler):
    """Serves one connection, in a thread of its own: request by request, in order."""

    server: Server
    idle = False  # waiting for a request's first byte; such connections do not delay the shutdown

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wire = Wire(self.request)
        self.server.opened(self)

    def finish(self) -> None:
        self.server.closed(self)

    def handle(self) -> None:
        try:
            while self._serve_one():
                pass
        except (EOFError, TimeoutError, ConnectionError) as fault:  # the caller has gone, or idled too long
            event(logging.DEBUG, "connection closed", reason=fault)

    def _serve_one(self) -> bool:
        """Answers the next request; False when the connection is to be closed."""
        if not self.wire.rest:
            self._await_request()
        try:
            request = self._read_request(_deadline(self.server.config.server_read_timeout))
        except Malformed as fault:
            return self._refuse(fault.status, str(fault))
        except TimeoutError:
            limit = self.server.config.server_read_timeout
            return self._refuse(408, f"the request was not complete after {limit:g}s")
        started = time.monotonic()
        response = self.server.api.answer(request)
        keep_alive = request.head.keep_alive and not (self.server.draining and not self.wire.rest)
        if log.isEnabledFor(logging.DEBUG):
            head, millis = request.head, (time.monotonic() - started) * 1000
            event(logging.DEBUG, "request", method=head.method, path=head.path, status=response.status, ms=f"{millis:.1f}")
        try:
            self._send(render(response, request.head, keep_alive))
        except OSError:
            if response.undo:
                response.undo()
            raise
        return keep_alive

    def _await_request(self) -> None:
        self.idle = True
        if self.server.draining:
            raise EOFError("shutting down")
        self.wire.receive(_deadline(self.server.config.server_idle_timeout))
        self.idle = False

    def _read_request(self, deadline: float) -> Request:
        while self.wire.rest[:2] == b"\r\n":  # RFC 9112, 2.2: an empty line before a request is skipped
            self.wire.rest = self.wire.rest[2:]
        data = self.wire.head(deadline)
        head = _parse_short_head(data) if len(data) < 1024 else parse_head(data)
        if head.headers.get("expect", "").lower() == "100-continue" and not self.wire.rest:
            self._invite(head)
        return Request(head, self.wire.body(head.headers, MOST_BODY_BYTES, deadline), self._hung_up)

    def _invite(self, head: Head) -> None:
        """Asks for a body that the caller holds back until then, unless it will be refused anyway."""
        length = head.headers.get("content-length", "0")
        if not length.isdigit() or len(length) < 9 and int(length) <= MOST_BODY_BYTES:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, status: int, text: str) -> bool:
        """Answers what could not be read as a request. The rest of the stream means nothing, so the connection ends:
        first our half, and a moment later the whole, since closing with bytes unread would destroy the answer."""
        event(logging.DEBUG, "request refused", status=status, reason=text)
        self._send(render(error(status, text), None, keep_alive=False))
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 1
        for _ in range(64):
            self.wire.rest = b""
            self.wire.receive(deadline)
        return False

    def _send(self, data: bytes) -> None:
        self.wire.send(data, _deadline(self.server.config.server_write_timeout))

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.request, select.POLLRDHUP)
        return bool(poll.poll(0))


def _deadline(timeout: float) -> float:
    """When a timeout that begins now ends, on the clock of time.monotonic; 0 is none."""
    return time.monotonic() + timeout if timeout else math.inf


class Api:
    """The endpoints: what a Request means to the LockService, and its answer as a Response."""

    def __init__(self, service: LockService, metrics: Metrics, profiling: bool = False) -> None:
        self._service = service
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
        """Always an answer, whatever happens."""
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
        except Exception as fault:  # a defect of ours; the caller deserves an answer all the same
            event(logging.ERROR, "internal error", path=head.path, error=repr(fault), at=_where(fault))
            return error(500, "internal error: see the log of shared-lock")

    def acquire(self, request: Request) -> Response:
        """POST /lease"""
        headers = request.head.headers
        ttl = _parsed(headers, "x-lease-ttl", parse_ttl, DEFAULT_TTL_SECONDS)
        wait = _parsed(headers, "x-lease-wait", parse_wait, 0.0)
        key, value = parse_lock(request.body)
        try:
            outcome = self._service.acquire(key, value, ttl, wait, request.hung_up)
        except OutcomeUnknown as fault:
            return error(500, f"outcome unknown: {fault}")
        except StorageError as fault:
            return error(500, f"not acquired: {fault}")
        if isinstance(outcome, Holder):
            return Response(202, b"%d" % outcome.lease)
        lease = outcome.lease
        answer_headers = (("x-lease-ttl", f"{outcome.ttl}s"), ("x-fencing-token", str(outcome.token)))
        return Response(201, b"%d" % lease, TEXT, answer_headers, undo=lambda: self._service.take_back(lease))

    def renew(self, request: Request) -> Response:
        """POST /keepalive"""
        ttl = self._service.renew(parse_lease(request.body))
        return Response(200, b"", TEXT, (("x-lease-ttl", f"{ttl}s"),)) if ttl else Response(204)

    def release(self, request: Request) -> Response:
        """DELETE /lease"""
        return Response(200 if self._service.release(parse_lease(request.body)) else 204)

    def look(self, request: Request) -> Response:
        """GET /lease?key=K"""
        key = _query(request).get("key", "")
        if not key:
            raise BadRequest("key: missing in the query, as in /lease?key=nightly")
        found = self._service.look(_checked_text("key", key))
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
        fault = self._service.readiness()
        return error(503, f"storage failed: {fault}") if fault else Response(200, b"ok\n")

    def expose_metrics(self, request: Request) -> Response:
        return Response(200, self._metrics.render().encode(), "text/plain; version=0.0.4; charset=utf-8")


def _query(request: Request) -> dict[str, str]:
    """The query's members; of one name the first counts."""
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


def _parse_json(body: bytes) -> Any:
    """The JSON value of a body; integers that Python would not read (4,300 digits) become 0.5, which is none of ours."""
    try:
    except (ValueError, RecursionError) as fault:
        shown = quote(body[:200].decode("utf-8", "replace"))
        raise BadRequest(f"body: not JSON: {shown}" if body.strip() else "body: empty, JSON expected") from fault


def parse_lock(body: bytes) -> tuple[str, str]:
    """The key and the value that a POST /lease asks for. Raises BadRequest."""
    lock = _parse_json(body)
    if not isinstance(lock, dict):
        raise BadRequest(f"body: not a JSON object: {quote(json.dumps(lock))}")
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
        raise BadRequest(f"{name}: not Unicode text, a surrogate stands alone: {ascii(text[:100])}") from fault
    return text


def is_timestamp(text: str) -> bool:
    """RFC 3339, 5.6: a date, a time with or without fractions of any length, and an offset."""
    match = re.fullmatch(
        r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:)([0-9]{2})(?:\.[0-9]+)?"
        r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])",
        text,
    )
    if not match:
        return False
    second = "59" if match[3] == "60" else match[3]  # a leap second
    try:
        time.strptime(f"{match[1]} {match[2]}{second}", "%Y-%m-%d %H:%M:%S")
    except ValueError:
        return False
    return True


def parse_lease(body: bytes) -> int:
    """The lease ID in a body: a number, a number in a JSON string, or an object with `id` as either.

    Not JSON is a 400; JSON that is no int64 is a 500, which the Go service's clients know.
    """
    text = body.strip(b" \t\r\n")
    if text.isdigit() and len(text) < 19 and not text.startswith(b"0"):
        return int(text)  # what nearly every client sends: 0.3 µs instead of 5
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
    """What both storages promise. Keys and values are text without our prefix; every method may raise StorageError."""

    def acquire(self, key: str, value: str, ttl: int, ready: Callable[[], bool]) -> Grant | Holder:
        """Takes the key, or tells who has it. `ready` is asked when the key is found free, before anything is
        written; where it says no, the answer is NOBODY."""

    def look(self, key: str) -> Holder | None:
        """Who holds the key, with its value; None where it is free."""

    def describe(self, lease: int) -> LeaseInfo | None:
        """What is known of a lease; None where it is gone. Keys of ours are told without the prefix, others as None."""

    def renew(self, lease: int) -> int:
        """Starts the lease's ttl again, which is returned; 0 where the lease is known to be gone."""

    def revoke(self, lease: int) -> None:
        """Ends the lease, and with it its keys; not an error where it is gone already."""

    def check(self) -> None:
        """Reads, so that an answer means that the storage can serve. Raises StorageError."""
