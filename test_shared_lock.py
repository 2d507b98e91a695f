"""The promises of shared-lock, over memory and over real etcd servers that the tests start.

    python -m pytest                            all of it
    python test_shared_lock.py benchmark        how fast it is, beside the raw gateway (needs wrk)

These variables choose what the tests run on, each by its path:

    SHARED_LOCK_TEST_ETCD       the etcd server; without it, the etcd on PATH
    SHARED_LOCK_TEST_UPGRADE    etcd servers from old to new, separated by colons, for the test of
                                a cluster that is upgraded; without it that test is skipped
    SHARED_LOCK_TEST_PYTHON     the interpreter of the daemon; without it, the one of the tests
"""

from __future__ import annotations

import argparse
import ast
import base64
import collections
import contextlib
import ctypes
import dataclasses
import errno
import functools
import gzip
import http.client
import http.server
import importlib.metadata
import itertools
import json
import math
import os
import platform
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_any
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import pytest

import example
import shared_lock

HERE = Path(__file__).parent
PYTHON = os.environ.get("SHARED_LOCK_TEST_PYTHON", sys.executable)


Start = Callable[..., "Daemon"]
Pool = ThreadPoolExecutor

# == Servers: what the tests start, and stop by its process id ===================================


def etcd_binary() -> str:
    """The etcd server to test with; without one the tests fail, and say how to get one."""
    path = os.environ.get("SHARED_LOCK_TEST_ETCD") or shutil.which("etcd")
    if not path or not os.access(path, os.X_OK):
        pytest.fail(
            f"no etcd server: {path or 'none on PATH'}: put the path of one into"
            " SHARED_LOCK_TEST_ETCD (the README's Development section gets one from Debian)",
            pytrace=False,
        )
    return os.path.abspath(path)  # some tests work in another folder


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port of 127.0.0.1 that nobody else is given for as long as the tests run.

    A socket that is bound and does not listen keeps it: Linux gives such a port to nobody who asks
    for any, while a server that asks for this one may have it, again and again.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    _reserved.append(sock)
    return int(sock.getsockname()[1])


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What the condition returns as soon as that is true; fails if it is not in so many seconds."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)
    return result


def ask(
    port: int,
    method: str,
    path: str,
    body: str | bytes | None = None,
    headers: dict[str, str] | None = None,
    timeout: float = 90,
) -> Answer:
    """One request on a connection of its own."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    ) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return Answer(
            answer.status,
            answer.read(),
            {name.lower(): value for name, value in answer.getheaders()},
        )


class Etcd:
    """One member of etcd, alone or with peers, as a child process; `binary` is its server."""

    def __init__(
        self, folder: Path, name: str = "m0", peers: dict[str, int] | None = None, *options: str
    ) -> None:
        self.binary = etcd_binary()
        self.port = free_port()
        self._log = folder / f"{name}.log"
        self._data = folder / name
        peers = peers or {name: free_port()}
        scheme = "https" if any("cert-file" in option for option in options) else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        peer_urls = {peer: f"http://127.0.0.1:{port}" for peer, port in peers.items()}
        self._options = [
            *("--name", name, "--data-dir", str(self._data)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer_urls[name]),
            *("--initial-advertise-peer-urls", peer_urls[name]),
            *("--initial-cluster", ",".join(f"{peer}={url}" for peer, url in peer_urls.items())),
            *("--log-level", "error", *options),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Etcd:
        """Starts it, with the data it had; does not wait until it serves."""
        with open(self._log, "ab") as log:
            command = [self.binary, *self._options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def wait(self) -> Etcd:
        """Waits until it answers a linearizable read."""

        def answers() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                self.call("/kv/range", {"key": "AA=="})
                return True
            assert self.process and self.process.poll() is None, self._log.read_text()[-2000:]
            return False

        eventually(answers, 60)
        return self

    def __enter__(self) -> Etcd:
        return self.start().wait()

    def __exit__(self, *fault: object) -> None:
        self.stop()

    def rebuild(self, *options: str) -> None:
        """Starts it again with an empty disk, at the addresses that it had."""
        self.stop()
        shutil.rmtree(self._data)
        self._options += options
        self.start().wait()

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()  # SIGKILL ends a stopped process, too
            self.process.wait()

    def call(self, path: str, payload: dict[str, Any], timeout: float = 3) -> dict[str, Any]:
        """One call of its JSON gateway, past the daemon."""
        answer = ask(self.port, "POST", "/v3" + path, json.dumps(payload), timeout=timeout)
        assert answer.status == 200, answer.text
        result: dict[str, Any] = json.loads(answer.text)
        return result

    def key(self, key: str) -> dict[str, Any] | None:
        """What etcd has under the key of this lock: create_revision, lease, value (bytes)."""
        answer = self.call(
            "/kv/range", {"key": base64.b64encode(b"/shared-lock/" + key.encode()).decode()}
        )
        for kv in answer.get("kvs", []):
            return {
                "create_revision": int(kv["create_revision"]),
                "lease": int(kv.get("lease", 0)),
                "value": base64.b64decode(kv.get("value", "")),
            }
        return None

    def put(self, key: bytes, value: bytes = b"", lease: int = 0) -> None:
        encoded = {"key": base64.b64encode(key).decode(), "value": base64.b64encode(value).decode()}
        self.call("/kv/put", {**encoded, "lease": lease})

    def leases(self) -> set[int]:
        return {int(lease["ID"]) for lease in self.call("/lease/leases", {}).get("leases", [])}

    def cluster_id(self) -> int:
        return int(self.call("/kv/range", {"key": "AA=="})["header"]["cluster_id"])


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def token(self) -> int:
        """The fencing token of a lock that was granted."""
        return int(self.headers["x-fencing-token"])


class Daemon:
    """`python shared_lock.py serve` as a child process, on a free port."""

    tls: ssl.SSLContext | None = None  # for raw connections to a daemon that wants it

    def __init__(
        self,
        folder: Path,
        storage: str,
        /,
        *,
        command: Sequence[str] = (),
        stderr: int | None = None,
        **env: str,
    ) -> None:
        """`storage` is mock, or the list of etcd's endpoints; `env` is without SHARED_LOCK_.

        `command` runs the daemon in another way; `stderr`, such as subprocess.PIPE, takes the
        place of the log.
        """
        self.log_path = folder / f"daemon-{next(_numbers)}.log"
        kind = {"STORAGE_TYPE": "mock"} if storage == "mock" else {"ETCD_ADDR_LIST": storage}
        port = "0" if stderr is None else str(free_port())  # the log tells which port 0 is
        settings = {"SERVER_HOST": "127.0.0.1", "SERVER_PORT": port, **kind, **env}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command or [PYTHON, *SERVE],
                env=clean_env()
                | {f"SHARED_LOCK_{name}": value for name, value in settings.items()},
                stdout=log,
                stderr=log if stderr is None else stderr,
            )
        self.port = int(settings["SERVER_PORT"])
        eventually(self._serves, 60)
        self.url = f"http://127.0.0.1:{self.port}"

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.log()
        if served := re.search(r"event=serving .*?address=\S+:([0-9]+)", self.log()):
            self.port = int(served[1])
            return True
        with contextlib.suppress(ConnectionRefusedError):
            self.connect().close()
            return True
        return False

    def log(self) -> str:
        return self.log_path.read_text()

    def descriptors(self) -> int:
        """How many files and connections it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def request(self, method: str, path: str, *more: Any) -> Answer:
        """One request, with its body and headers, on a connection of its own."""
        return ask(self.port, method, path, *more)

    def acquire(self, key: str, ttl: str = "60s", value: str = "", **headers: str) -> Answer:
        return self.request(
            "POST",
            "/lease",
            json.dumps({"key": key, "value": value}),
            {"x-lease-ttl": ttl, **headers},
        )

    def keep_alive(self, lease: str | bytes) -> Answer:
        return self.request("POST", "/keepalive", lease)

    def release(self, lease: str | bytes) -> Answer:
        return self.request("DELETE", "/lease", lease)

    def look(self, key: str) -> Answer:
        return self.request("GET", "/lease?key=" + urllib.parse.quote(key, safe=""))

    def token(self, key: str) -> int:
        """The fencing token of the lock's holder."""
        return int(json.loads(self.look(key).text)["fencing_token"])

    def ready(self) -> bool:
        return self.request("GET", "/ready").status == 200

    def connect(self) -> socket.socket:
        """A raw connection, for what a client library would hide."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.tls.wrap_socket(sock, server_hostname="127.0.0.1") if self.tls else sock

    def stop(self, number: int = signal.SIGTERM) -> int:
        """This signal, then its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()


SERVE = [str(HERE / "shared_lock.py"), "serve"]
_numbers = itertools.count()


def clean_env() -> dict[str, str]:
    """This process's environment without any of the daemon's variables."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith("SHARED_LOCK_")
    }


def run_module(arguments: list[str], /, **env: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, to its end; `env` as for Daemon."""
    settings = clean_env() | {f"SHARED_LOCK_{name}": value for name, value in env.items()}
    command = [PYTHON, *arguments]
    how: Any = {
        "cwd": HERE,
        "stdin": subprocess.DEVNULL,
        "text": True,
        "capture_output": True,
        "timeout": 10,
    }
    return subprocess.run(command, env=settings, **how)


@pytest.fixture(scope="session", autouse=True)
def _children_end_by_signals() -> None:
    """Under nohup, and in some CI, these are ignored: children would inherit that.

    A handler that does nothing ignores them here as well, and ends with each exec.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder for what tests share."""
    with tempfile.TemporaryDirectory(prefix="shared-lock-") as name:
        yield Path(name)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder of the test's own. pytest's would stay, and each etcd fills 128 MB of it."""
    with tempfile.TemporaryDirectory(prefix="shared-lock-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def etcd(folder: Path) -> Iterator[Etcd]:
    """One etcd for all tests that do it no harm."""
    with Etcd(folder) as server:
        yield server


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that only this test uses, and may harm."""
    with Etcd(tmp_path) as server:
        yield server


@contextlib.contextmanager
def running(folder: Path, storage: str, **env: Any) -> Iterator[Daemon]:
    """A daemon that many tests share; it must end well."""
    daemon = Daemon(folder, storage, **env)
    yield daemon
    assert daemon.stop() == 0
    assert not re.search("Traceback|internal error", daemon.log())


@pytest.fixture(scope="session")
def on_memory(folder: Path) -> Iterator[Daemon]:
    """A daemon on the mock."""
    with running(folder, "mock") as daemon:
        yield daemon


@pytest.fixture(scope="session")
def on_etcd(folder: Path, etcd: Etcd) -> Iterator[Daemon]:
    """A daemon on a real etcd."""
    with running(folder, etcd.url) as daemon:
        yield daemon


@pytest.fixture(params=["memory", "etcd"])
def daemon(request: pytest.FixtureRequest) -> Daemon:
    """A daemon that all tests share, on either storage: both keep the same promises."""
    found: Daemon = request.getfixturevalue(f"on_{request.param}")
    return found


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts daemons that end with the test: start("mock" or endpoints, VARIABLE="value")."""
    started: list[Daemon] = []

    def start_one(storage: str, **options: Any) -> Daemon:
        started.append(Daemon(folder, storage, **options))
        return started[-1]

    yield start_one
    for one in started:
        one.process.kill()
        one.process.wait()
        assert "Traceback" not in one.log()


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key that no other test uses."""
    return f"{request.function.__name__}-{next(_numbers)}"


@pytest.fixture
def lease_id() -> int:
    """A lease ID as a caller chooses it."""
    return random.randrange(1, 2**63)


# == Helpers: raw connections, callers at the same time, what metrics tell =======================

KIB64 = 65_536


class Talk:
    """One raw connection: bytes in, answers out."""

    def __init__(self, daemon: Daemon, data: bytes = b"") -> None:
        self.sock = daemon.connect()
        self.port = self.sock.getsockname()[1]
        self._file = self.sock.makefile("rb")
        self.say(data)

    def say(self, data: bytes) -> None:
        """Sends it, as far as the daemon takes it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def answer(self, method: str = "GET") -> Answer:
        line = self._file.readline()
        match = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [\w -]+\r\n", line)
        assert match, line
        headers: dict[str, str] = {}
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value.rstrip("\r\n")
        status = int(match[1])
        length = 0 if method == "HEAD" or status in (100, 204) else int(headers["content-length"])
        return Answer(status, self._file.read(length), headers)

    def rest(self) -> bytes:
        """What comes until the daemon ends the connection."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while part := self._file.read1():
                data += part
        return data

    def close(self) -> None:
        self._file.close()
        self.sock.close()


def talk(daemon: Daemon, data: bytes) -> Answer:
    """The first answer to these bytes."""
    with contextlib.closing(Talk(daemon, data)) as client:
        return client.answer()


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """More of them for the tests' own process: a fresh user's are 1,024."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 8192), max(limits[1], 8192)))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def get(path: str, *headers: bytes, method: str = "GET", version: str = "1.1") -> bytes:
    """A request without a body as it stands on the wire."""
    return b"\r\n".join([f"{method} {path} HTTP/{version}".encode(), b"Host: x", *headers, b"\r\n"])


def post(body: bytes, *headers: bytes, path: str = "/lease", version: str = "1.1") -> bytes:
    """A POST as it stands on the wire; with a Content-Length unless a header tells its length."""
    told = any(
        header.lower().startswith((b"content-length:", b"transfer-encoding:")) for header in headers
    )
    length = [] if told else [b"Content-Length: %d" % len(body)]
    return get(path, *headers, *length, method="POST", version=version) + body


HEALTH = get("/health")


def lock_body(key: str, size: int = 0) -> bytes:
    """The body that asks for this lock, of so many bytes."""
    body = json.dumps({"key": key, "value": ""}).encode()
    return body[:-2] + b"x" * max(0, size - len(body)) + body[-2:]


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


def one_line(answer: Answer, *shown: str) -> None:
    """An error's body is one short line of plain text and shows these."""
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.strip() and len(answer.text.splitlines()) == 1 and len(answer.body) < 1000, (
        answer.text
    )
    assert all(text in answer.text for text in shown), answer.text


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Threads for callers that act at the same time."""
    with Pool(160) as threads:
        yield threads


class Proxy:
    """Stands between the daemon and one etcd, or between callers and a daemon.

    It reads whole requests and answers, and breaks those that a rule is for. `rule` is (path, what
    to do, how many times), and the next of `rules` is in force once it is used up. Several
    paths have blanks between them. To do:

        drop-request    hang up
        drop-answer     hang up after etcd has committed
        cut             an answer ends in its middle
        late            an answer comes after LATE_SECONDS
        wait, stop      an answer, a request waits until go_on is set
        hold            a request waits for HOLD_SECONDS
        surplus         bytes follow an answer
        503, no-leader, no-space    an answer of our own; etcd is not asked
        gone            an answer says that its lease is
        stale           an answer tells an older revision
        3.5.1 or so     an answer to /version tells this release of etcd

    Each new connection leads to the next of `targets`. A look, with which the daemon finds out
    whether a member is well, has the path LOOK. ALL is every path.
    """

    LOOK, ALL = "look", "all"
    LOOKS_FOR = b'"key":"%s"' % base64.b64encode(b"/shared-lock/")

    LATE_SECONDS = 1.3
    HOLD_SECONDS = 0.3
    HARMLESS = ("", "hold", "stop", "wait", "gone", "stale", "well")  # leave a good connection
    OWN_ANSWERS: ClassVar = {
        "503": "<html>service unavailable</html>",
        "no-leader": '{"error":"etcdserver: no leader","message":"etcdserver: no leader",'
        '"code":14}',
        "no-space": '{"error":"etcdserver: mvcc: database space exceeded","code":8}',
    }

    def __init__(self, target: Etcd | Daemon, port: int = 0, host: str = "127.0.0.1") -> None:
        self.targets: Iterator[Etcd | Daemon | Proxy] = itertools.repeat(target)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, port), family=family)
        self.port = self._server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.go_on = threading.Event()
        self._mutex = threading.Lock()  # owns all below
        self._rules: list[tuple[str, str, int]] = []
        self.seen: list[tuple[str, str]] = []  # path, and what was done: "" where nothing
        self.looked: list[tuple[str, str]] = []  # the same with looks among them
        self.first: list[str] = []  # paths of the first requests on each connection
        # paths of requests on connections that had an error, a time-out, an unread body
        self.reused: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def rule(self) -> tuple[str, str, int] | None:
        with self._mutex:
            return self._rules[0] if self._rules else None

    @rule.setter
    def rule(self, rule: tuple[str, str, int] | None) -> None:
        self.rules(*[rule] if rule else [])

    def rules(self, *rules: tuple[str, str, int]) -> None:
        with self._mutex:
            self._rules = list(rules)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(
                    target=self._converse, args=(self._server.accept()[0],), daemon=True
                ).start()

    def _converse(self, client: socket.socket) -> None:
        target = ("127.0.0.1", next(self.targets).port)
        with contextlib.suppress(OSError), client, socket.create_connection(target) as etcd:
            requests, answers, spoiled = client.makefile("rb"), etcd.makefile("rb"), False
            is_first = True
            while request := self._read(requests):
                path = request.split(b" ", 2)[1].decode()
                if self.LOOKS_FOR in request and b"range_end" not in request:
                    path = self.LOOK
                action = self._note(path, spoiled, is_first)
                is_first = False
                if action == "drop-request":
                    break
                if own := self.OWN_ANSWERS.get(action):
                    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(own)}\r\n\r\n"
                    answer = (head + own).encode()
                else:
                    time.sleep(self.HOLD_SECONDS if action == "hold" else 0)
                    if action == "stop":
                        self.go_on.wait(30)
                    etcd.sendall(request)
                    answer = self._edited(self._read(answers), action)
                if not answer or action == "drop-answer":
                    break
                time.sleep(self.LATE_SECONDS if action == "late" else 0)
                if action == "wait":
                    self.go_on.wait(30)
                client.sendall(
                    {"cut": answer[:-5], "surplus": answer + b"surplus"}.get(action, answer)
                )
                if action == "cut":
                    break
                spoiled = spoiled or action not in self.HARMLESS
            client.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _edited(answer: bytes, action: str) -> bytes:
        """An answer that is as long as before."""
        if action == "gone":  # the ttl has two digits; in an answer to a keepalive it is left out
            answer = re.sub(
                rb'"TTL":"..?"',
                rb'"TTL":"-1"' if b"grantedTTL" in answer else b'"Old":"60"',
                answer,
            )
        elif action == "stale":
            answer = re.sub(
                rb'(?<="revision":")[0-9]+',
                lambda found: b"%0*d" % (len(found[0]), max(1, int(found[0]) - 5)),
                answer,
            )
        elif action[:1].isdigit() and action != "503":
            head, end, body = answer.partition(b"\r\n\r\n")
            answer = head + end + (b'{"etcdserver":"%s"}' % action.encode()).ljust(len(body))
        return answer

    def _note(self, path: str, spoiled: bool, is_first: bool) -> str:
        with self._mutex:
            action = ""
            self.first += [path] * is_first
            if self._rules and {path, self.ALL} & set(self._rules[0][0].split()):
                rule, action, times = self._rules.pop(0)
                if times > 1:
                    self._rules.insert(0, (rule, action, times - 1))
            self.looked.append((path, action))
            if path not in (self.LOOK, "/version"):
                self.seen.append((path, action))
            if spoiled:
                self.reused.append(path)
            return action

    @staticmethod
    def _read(stream: BinaryIO) -> bytes:
        """A whole message of HTTP/1.1 as it came; nothing at the end of the connection."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            if not (line := stream.readline()):
                return b""
            head += line
        fields = dict(line.lower().split(": ", 1) for line in head.decode().splitlines()[1:-1])
        if fields.get("transfer-encoding") != "chunked":
            return head + stream.read(int(fields.get("content-length", "0")))
        while (size := stream.readline()) not in (b"", b"0\r\n"):
            head += size + stream.read(int(size, 16) + 2)
        # etcd 3.4 sends some after an error
        while (trailer := stream.readline()) not in (b"", b"\r\n"):
            size += trailer
        return head + size + trailer


@pytest.fixture
def proxy(etcd: Etcd) -> Iterator[Proxy]:
    between = Proxy(etcd)
    yield between
    between.close()


def together(count: int, call: Callable[[int], Answer]) -> list[tuple[float, Answer]]:
    """The answers, each with its seconds, of so many calls at the same time."""
    barrier = threading.Barrier(count)

    def run(number: int) -> tuple[float, Answer]:
        barrier.wait(30)
        began = time.monotonic()
        answer = call(number)
        return time.monotonic() - began, answer

    with Pool(count) as threads:
        return list(threads.map(run, range(count)))


def soon() -> float:
    return time.monotonic() + 10


def take(storage: Any, key: str, ttl: int = 10, value: str = "v") -> Any:
    """What a storage answers to who asks for this lock."""
    return storage.acquire(shared_lock.LockRequest(key, value, ttl))


def acquire_as(daemon: Daemon, lease_id: int, key: str, ttl: str = "60s", **headers: str) -> Answer:
    """Asks for a lock with a lease ID of the caller's choice."""
    return daemon.acquire(key, ttl, **{"x-lease-id": str(lease_id), **headers})


class Clock:
    """time.monotonic for tests that own the time: it goes on by itself, and jumps when told to."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._real = time.monotonic

    def __call__(self) -> float:
        return self._real() + self.ahead


def parse_metrics(text: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """The samples by name and labels; fails on what is not Prometheus' text format 0.0.4."""
    samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    family = kind = helped = ""
    families: set[str] = set()
    label = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if match := re.fullmatch(r"# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) (?:[^\\]|\\\\|\\n)+", line):
            helped = match[1]
        elif match := re.fullmatch(r"# TYPE (\S+) (counter|gauge|histogram|summary|untyped)", line):
            family, kind = match.groups()
            assert family == helped and family not in families, line
            families.add(family)
        else:
            match = re.fullmatch(
                rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({label}(?:,{label})*)\}})? (\S+)", line
            )
            assert match, line
            suffixes = {
                "histogram": ("_bucket", "_sum", "_count"),
                "summary": ("", "_sum", "_count"),
            }.get(kind, ("",))
            assert match[1] in {family + suffix for suffix in suffixes}, line
            pairs = [(name, given) for name, given in re.findall(label, match[2] or "")]
            assert len(dict(pairs)) == len(pairs), line
            assert frozenset(pairs) not in samples.setdefault(match[1], {}), line
            samples[match[1]][frozenset(pairs)] = float(match[match.lastindex or 0])
    return samples


def operations(daemon: Daemon, family: str = "lease") -> dict[str, int]:
    """How often each "operation status" was counted, without those that never were."""
    samples = parse_metrics(daemon.request("GET", "/metrics").text)[
        f"shared_lock_{family}_operations_total"
    ]
    named = {
        f"{dict(labels)['operation']} {dict(labels)['status']}": int(n)
        for labels, n in samples.items()
    }
    return {name: count for name, count in named.items() if count}


def calls(etcd: Etcd) -> collections.Counter[str]:
    """How often each gRPC method of etcd was called, as etcd counts; all daemons' looks, too."""
    samples = parse_metrics(ask(etcd.port, "GET", "/metrics").text)["grpc_server_handled_total"]
    counts: collections.Counter[str] = collections.Counter()
    for labels, count in samples.items():
        counts[dict(labels)["grpc_method"]] += int(count)
    return +counts


# == Log: one event is one line, and who reads it slowly delays nobody ===========================

# All that ends a line for some reader of logs, all other control characters, and what turns the
# writing direction.
CONTROLS = "".join(
    map(chr, [*range(32), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)])
)


def test_each_event_is_one_line_of_key_and_value(start: Start) -> None:
    daemon = start("mock", DEBUG="true")
    keys = ["plain", "a\nlevel=error event=forged", 'quo"te\\ =', "ключ 🔒", "x" * 5000]
    keys += [f"{character}level=error event=forged" for character in CONTROLS]

    for key in keys:
        daemon.acquire(key, value=key)
        daemon.acquire(key, value=key)
        daemon.look(key)
    talk(daemon, b"GET /health\nevent=forged HTTP/1.1\r\n\r\n")
    talk(daemon, get("/a\x85event=forged\u2028level=error"))
    talk(daemon, get('/a%0ab=c"d', b"X: \x85event=forged"))
    daemon.keep_alive("5")
    assert daemon.stop() == 0

    lines = daemon.log_path.read_bytes().decode().splitlines()
    word = r'(?:[^\s"=]+|"(?:[^"\\\n]|\\.)*")'
    for line in lines:
        assert re.fullmatch(rf"time=\S+Z level=[a-z]+ event={word}(?: [a-z_]+={word})*", line), line
        assert not set(line) & set(CONTROLS), line
    assert sum("event=granted" in line for line in lines) == len(keys)
    assert not any("event=forged" in re.sub(r'"(?:[^"\\]|\\.)*"', "", line) for line in lines)


@pytest.mark.parametrize("reads", ["never", "slowly"])
def test_a_log_that_is_not_read_in_time_delays_no_lock_and_tells_what_it_lost(
    start: Start, reads: str
) -> None:
    daemon, log = start("mock", stderr=subprocess.PIPE), bytearray()
    pipe, done = daemon.process.stderr, threading.Event()
    assert pipe

    def read() -> None:
        done.wait(0 if reads == "slowly" else 60)
        while part := os.read(pipe.fileno(), 4096):
            log.extend(part)
            done.wait(0.09)

    reader, client = threading.Thread(target=read), Talk(daemon)
    reader.start()
    for number in range(3000):  # 300 KiB of log, and a pipe holds 64
        client.say(post(lock_body(f"unread-{number}")))
        assert client.answer().status == 201
    done.set()
    eventually(lambda: daemon.acquire(f"again {next(_numbers)}").status and b"lines_lost=" in log)
    [counted] = parse_metrics(daemon.request("GET", "/metrics").text)[
        "shared_lock_log_lines_dropped_total"
    ].values()
    status = daemon.stop()
    reader.join()
    pipe.close()

    lines = log.decode().splitlines()
    lost = sum(int(number) for line in lines for number in re.findall(r"lines_lost=([0-9]+)", line))
    assert status == 0
    assert (
        len({line for line in lines if re.search("event=granted .*key=unread-", line)}) + lost
        >= 3000
        > lost
        > 0
    )
    assert 0 < counted <= lost


def test_with_stderr_closed_the_log_goes_nowhere(start: Start) -> None:
    daemon = start(
        "mock",
        command=["sh", "-c", f"exec {shlex.join([PYTHON, *SERVE])} 2>&-"],
        stderr=subprocess.DEVNULL,
    )

    assert os.readlink(f"/proc/{daemon.process.pid}/fd/2") == os.devnull
    assert daemon.stop() == 0


def events(daemon: Daemon, *names: str) -> list[dict[str, str]]:
    """The fields of each line in the log whose event is one of these names; of all lines without
    any."""
    word = re.compile(r'([a-z_]+)=(?:"((?:[^"\\]|\\.)*)"|(\S*))')
    found = [word.findall(line) for line in daemon.log().splitlines()]
    lines = [{name: quoted or plain for name, quoted, plain in words} for words in found]
    return [line for line in lines if not names or line["event"] in names]


def test_a_grant_and_a_release_are_logged_with_their_client(daemon: Daemon, key: str) -> None:
    with contextlib.closing(
        Talk(daemon, post(b'{"key": "%s", "value": "w 1"}' % key.encode()))
    ) as client:
        lock = client.answer()
        client.say(
            get("/lease", b"Content-Length: %d" % len(lock.body), method="DELETE") + lock.body
        )
        assert client.answer().status == 200
        address = f"127.0.0.1:{client.port}"

    [granted] = [line for line in events(daemon, "granted") if line["key"] == key]
    [released] = [line for line in events(daemon, "released") if line["key"] == key]
    common = {"level": "info", "key": key, "lease": lock.text, "client": address}
    more = {"event": "granted", "ttl": "10", "token": str(lock.token), "value": "w 1"}
    assert {**granted, "time": ""} == {"time": "", **common, **more}
    assert {**released, "time": ""} == {"time": "", **common, "event": "released"}


def changed(before: str = "", after: str = "") -> list[str]:
    """The command of a daemon that is changed `before` or `after` its module was imported."""
    lines = ["import sys", before, "import shared_lock", after, "sys.exit(shared_lock.main())"]
    program = "\n".join(line for line in lines if line)
    return ["env", f"PYTHONPATH={HERE}", PYTHON, "-c", program, "serve"]


# A change: each SIGUSR1 lets the clock of the daemon jump by 61 seconds.
JUMPS = """if True:
    import signal, time
    real, ahead = time.monotonic, [0]
    time.monotonic = lambda: real() + ahead[0]
    signal.signal(signal.SIGUSR1, lambda *_: ahead.append(ahead.pop() + 61))"""


WORDS = {"long": "x" * 2500, "escaped": "\x01" * 2500, "two bytes": "é" * 2500}
WORDS |= {"three bytes": "€" * 2500, "four bytes": "🔒" * 2500, "tags": "\U000e0001" * 2500}


@pytest.mark.parametrize("word", WORDS)
def test_the_line_of_a_grant_is_whole_however_long_its_words_are(start: Start, word: str) -> None:
    daemon, text = start("mock"), WORDS[word]
    locks = [(text, text), (text, "v"), ("k", text)]

    for (key, value), cut in itertools.product(locks, range(4)):  # cut elsewhere in a character
        daemon.release(daemon.acquire("." * cut + key, value=value).text)
    assert daemon.stop() == 0

    lines = daemon.log_path.read_bytes().splitlines()
    assert max(len(line) for line in lines) <= 4095
    assert [line.decode() for line in lines]
    grants, releases = events(daemon, "granted"), events(daemon, "released")
    assert len(grants) == len(releases) == 12
    names = {"time", "level", "event", "client", "key", "lease"}
    assert all(set(grant) == names | {"ttl", "token", "value"} for grant in grants)
    assert all(set(release) == names for release in releases)
    assert {line["client"].split(":")[0] for line in (*grants, *releases)} == {"127.0.0.1"}
    assert grants[4]["value"] == "v" and grants[8]["key"] == "k"  # only what is long is cut


def test_a_malformed_request_is_no_lost_connection(start: Start) -> None:
    daemon = start("mock", DEBUG="true")
    malformed = [b"nonsense\r\n\r\n", get("/health", b"A : b"), post(b"{}", b"Content-Length: -1")]
    malformed += [head_of(70_000), post(b"", b"Content-Length: 70000"), b"GET /\0 HTTP/1.1\r\n\r\n"]

    for data, is_slow in itertools.product(malformed, (False, True)):
        client = Talk(daemon, data)
        assert client.answer().status >= 400
        if is_slow:
            client.say(b"more")
        client.close()
    assert daemon.stop() == 0

    assert not events(daemon, "connection lost")


def test_refused_tokens_are_one_warning_a_minute_with_their_number(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("right-token")
    daemon = start("mock", command=changed(JUMPS), SERVER_TOKEN_PATH=str(tmp_path / "tokens"))

    def warned() -> list[dict[str, str]]:
        lines = [line for line in events(daemon) if line["level"] == "warning"]
        assert all("token" in line["event"] and "client" in line for line in lines), lines
        return lines

    for _ in range(19):
        assert with_token(daemon, "wrong-token") == 401
    eventually(warned)
    for _ in range(19):
        assert with_token(daemon, "") == 401
    in_a_minute = warned()
    daemon.process.send_signal(signal.SIGUSR1)
    eventually(lambda: len(warned()) == 2 or with_token(daemon, "wrong-token") != 401)
    shown = [max(int(text) for text in line.values() if text.isdigit()) for line in warned()]

    assert len(in_a_minute) == 1
    assert 38 <= sum(shown) <= 38 + 600
    assert "-token" not in daemon.log()


def test_a_client_is_logged_as_ipv4_where_it_is_and_as_ipv6_where_it_is(start: Start) -> None:
    daemon = start("mock", SERVER_HOST="")
    clients = []

    for address in ("127.0.0.1", "::1"):
        with socket.create_connection((address, daemon.port), timeout=10) as sock:
            sock.sendall(post(lock_body(address)))
            assert sock.recv(12) == b"HTTP/1.1 201"
            clients.append(str(sock.getsockname()[1]))

    assert [line["client"] for line in events(daemon, "granted")] == [
        f"127.0.0.1:{clients[0]}",
        f"[::1]:{clients[1]}",
    ]


def test_a_line_of_the_log_tells_what_serves_and_for_whom(
    start: Start, etcd: Etcd, pki: Pki, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("secret-1\nsecret-2\n")
    files = {
        "SERVER_CERT_PATH": "server.crt",
        "SERVER_KEY_PATH": "server.key",
        "SERVER_CLIENT_CA_PATH": "ca.crt",
    }
    strict = {
        "SERVER_TOKEN_PATH": str(tmp_path / "tokens"),
        **{name: str(pki.good / at) for name, at in files.items()},
    }
    both = {"storage": "etcd", "members": f"{etcd.url},http://localhost:{etcd.port}"}
    expected: list[tuple[Daemon, dict[str, str]]] = [
        (start("mock"), {"storage": "mock", "tls": "no", "callers_need": "nothing"}),
        (
            start(f"{etcd.url}, localhost:{etcd.port}"),
            {**both, "tls": "no", "callers_need": "nothing"},
        ),
        (
            start("mock", **strict),
            {"storage": "mock", "tls": "yes", "callers_need": "token+certificate"},
        ),
    ]

    for daemon, shown in expected:
        told = {"level": "info", "event": "serving", "version": shared_lock.VERSION, **shown}
        [line] = events(daemon, "serving")
        assert line | {"time": ""} == told | {"time": "", "address": f"127.0.0.1:{daemon.port}"}
        assert "secret" not in daemon.log()


def test_the_line_that_tells_what_serves_is_the_first_even_if_no_member_can_be_reached(
    start: Start,
) -> None:
    daemon = start(f"http://127.0.0.1:{free_port()}")

    eventually(lambda: events(daemon, "etcd member failed"))

    assert (
        events(daemon)[0]["event"] == "serving"
    )  # a member's failure, or a warning of its release, comes later


def test_clients_that_simply_close_leave_no_line_in_the_debug_log(start: Start) -> None:
    daemon = start("mock", DEBUG="true")
    reset = struct.pack("ii", 1, 0)  # SO_LINGER: a close becomes a reset

    for asks, resets in itertools.product((False, True), repeat=2):
        client = Talk(daemon, HEALTH if asks else b"")
        assert not asks or client.answer().status == 200
        if resets:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        client.close()
    cut = Talk(daemon, HEALTH[:-2])
    cut.close()

    lost = eventually(lambda: events(daemon, "connection lost"))
    assert daemon.stop() == 0
    assert [line["client"] for line in lost] == [
        f"127.0.0.1:{cut.port}"
    ]  # that one did not simply close
    assert len(events(daemon)) == len(
        ["serving", "request", "request", "connection lost", "stopping", "stopped"]
    )


def test_probes_of_a_tls_port_that_simply_close_leave_no_line_in_the_debug_log(
    start: Start, pki: Pki
) -> None:
    daemon = start("mock", DEBUG="true", **pki.port())

    for linger in (struct.pack("ii", 0, 0), struct.pack("ii", 1, 0)):  # an end, and a reset
        probe = Talk(daemon)
        probe.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        probe.close()
    assert daemon.stop() == 0

    assert [line["event"] for line in events(daemon)] == ["serving", "stopping", "stopped"]


# == Words: durations, settings ==================================================================


def test_a_timeout_is_never_none_and_never_longer_than_a_poll_can_count() -> None:
    past, far, never = time.monotonic() - 1, time.monotonic() + 9e9, math.inf

    for deadline in (past, far, never):
        assert 0 < shared_lock.seconds_until(deadline) < (1 << 31) / 1000


def test_a_duration_that_is_long_is_refused_without_delay() -> None:
    refuse = "import shared_lock\n"
    refuse += "try: shared_lock.parse_duration('1' * 10**6 + 'x')\nexcept ValueError: exit(7)"

    ended = subprocess.run(
        [PYTHON, "-c", refuse], cwd=HERE, timeout=60
    )  # it took days: the pattern backtracked

    assert ended.returncode == 7


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("60s", 60),
        ("1m30s", 90),
        ("1500ms", 2),
        ("2h", 7200),
        ("1h0m0.5s", 3601),
        ("60", 60),
        ("2.5", 3),
        ("0.5", 1),
        (".5s", 1),
        ("1ns", 1),
        ("0.001", 1),
        ("1.000000001s", 2),
        ("1us", 1),
        ("+7s", 7),
        ("9000000000", 9_000_000_000),
        ("2500000h", 9_000_000_000),
        (" 60s\t", 60),
        ("007", 7),
        ("0.1s0.2s0.7s", 1),
        ("2.s", 2),
    ],
)
def test_a_ttl_is_a_duration_rounded_up_to_whole_seconds(
    daemon: Daemon, key: str, text: str, seconds: int
) -> None:
    answer = daemon.acquire(key, text)

    assert answer.status == 201
    assert answer.headers["x-lease-ttl"] in {
        f"{seconds}s",
        "2s" if seconds == 1 else "",
    }  # etcd raises 1 s to 2 s
    assert math.ceil(shared_lock.parse_duration(text.strip())) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10 s",
        "0",
        "0s",
        "0h0m",
        "-0",
        "-1s",
        "-5",
        "s",
        ".",
        "+",
        "-",
        "1e3",
        "1h30",
        "10S",
        "10d",
        "abc",
        "1_0",
        "1,5",
        "0x10",
        "inf",
        "NaN",
        "9000000001",
        "9000000000.001s",
        "2500001h",
        "9" * 5000,
        "10s, 10s",
        "²",
        "٣s",
        "1s-1s",
        "--1",
        "1..5",
    ],
)
@pytest.mark.parametrize("name", ["x-lease-ttl", "X-Lease-Wait"])
def test_a_duration_that_is_none_is_400_and_shown(
    on_memory: Daemon, key: str, name: str, text: str
) -> None:
    answer = talk(on_memory, post(lock_body(key), f"{name}: {text}".encode()))

    if name == "X-Lease-Wait" and text in ("0", "0s", "0h0m", "-0"):
        assert answer.status == 201
    else:
        assert answer.status == 400
        one_line(answer, name.lower(), text[:100])


def test_two_ttls_a_ttl_out_of_range_and_a_wait_over_a_minute_are_400(
    daemon: Daemon, key: str
) -> None:
    twice = talk(daemon, post(lock_body(key), b"x-lease-ttl: 10s", b"X-Lease-TTL: 20s"))
    none = daemon.acquire(key, "0")
    long = daemon.acquire(key, **{"x-lease-wait": "60.001s"})
    longest = daemon.acquire(key, **{"x-lease-wait": "1m"})

    assert [answer.status for answer in (twice, none, long, longest)] == [400, 400, 400, 201]
    one_line(twice, "10s", "20s")
    one_line(none, 'x-lease-ttl: not from 1s to 9000000000s: "0"')
    one_line(long, 'x-lease-wait: not from 0s to 60s: "60.001s"')


@pytest.mark.parametrize("limit, given", [("1m", "10s"), ("5s", "5s")])
def test_no_ttl_is_longer_than_the_longest_that_is_allowed(
    start: Start, limit: str, given: str
) -> None:
    daemon, seconds = start("mock", MAX_TTL=limit), int(shared_lock.parse_duration(limit))

    longest = daemon.acquire("k", limit)
    too_long = [daemon.acquire("l", ttl) for ttl in (f"{seconds}.001s", f"{seconds + 1}", "2h")]
    default = daemon.request("POST", "/lease", '{"key": "m"}')

    assert (longest.status, longest.headers["x-lease-ttl"]) == (201, f"{seconds}s")
    assert [answer.status for answer in too_long] == [400] * 3
    one_line(too_long[2], f'x-lease-ttl: not from 1s to {seconds}s: "2h"')
    assert (default.status, default.headers["x-lease-ttl"]) == (201, given)


@pytest.mark.parametrize(
    "name, default, text, value",
    [
        ("SERVER_PORT", 8080, "0", 0),
        ("SERVER_HOST", "", "::1", "::1"),
        ("SERVER_READ_TIMEOUT", 10, "1m", 60),
        ("SERVER_WRITE_TIMEOUT", 10, "0", 0),
        ("SERVER_IDLE_TIMEOUT", 120, "1.5", 1.5),
        ("SERVER_SHUTDOWN_TIMEOUT", 10, "500ms", 0.5),
        ("PPROF_ENABLED", False, "t", True),
        ("STORAGE_TYPE", "etcd", "mock", "mock"),
        ("ETCD_TLS", False, "F", False),
        ("CA_CERT_PATH", "/etc/etcd/ca.crt", "a", "a"),
        ("CLIENT_CERT_PATH", "/etc/etcd/client.crt", "b", "b"),
        ("CLIENT_KEY_PATH", "/etc/etcd/client.key", "c", "c"),
        ("ETCD_TIMEOUT", 5, "2500ms", 2.5),
        ("CACHE_ENABLED", False, "TRUE", True),
        ("CACHE_SIZE", 1000, "1", 1),
        ("DEBUG", False, "1", True),
        ("MAX_TTL", 9_000_000_000, "1m0.5s", 61),
    ],
)
def test_a_variable_has_its_default_and_takes_its_values(
    name: str, default: object, text: str, value: object
) -> None:
    config = shared_lock.Config.from_env({f"SHARED_LOCK_{name}": text, name: "ignored"})

    assert getattr(shared_lock.Config(), name.lower()) == default
    assert getattr(config, name.lower()) == value


@pytest.mark.parametrize(
    "text, shown",
    [
        (None, ["localhost:2379"]),
        ("a:1", ["a:1"]),
        ("http://a:1 ,\thttps://b.c:2", ["a:1", "b.c:2"]),
        ("[::1]:3", ["[::1]:3"]),
        (" 10.0.0.1:65535 ", ["10.0.0.1:65535"]),
        ("http://a:1/", ["a:1"]),
    ],
)
def test_endpoints_are_listed_with_commas(text: str | None, shown: list[str]) -> None:
    config = shared_lock.Config.from_env({"SHARED_LOCK_ETCD_ADDR_LIST": text} if text else {})

    assert [str(address) for address in config.etcd_addr_list] == shown


def test_booleans_are_those_of_go() -> None:
    for text in ["1 t T TRUE true True", "0 f F FALSE false False"]:
        configs = [
            shared_lock.Config.from_env({"SHARED_LOCK_CACHE_ENABLED": word})
            for word in text.split()
        ]
        assert {config.cache_enabled for config in configs} == {text[0] == "1"}


DURATIONS = [f"SERVER_{what}_TIMEOUT" for what in ("READ", "WRITE", "IDLE", "SHUTDOWN")] + [
    "ETCD_TIMEOUT"
]


UNUSABLE = [
    *(
        ("SERVER_PORT", text)
        for text in ["http", "", "-1", "65536", "8e3", "80 80", "٣", "8080\n", "9" * 5000]
    ),
    *(
        (name, text)
        for name in DURATIONS
        for text in ["10 s", "", "-1s", "ten", "1h30", "99999999999s", "inf"]
    ),
    *(
        (name, text)
        for name in ["PPROF_ENABLED", "ETCD_TLS", "CACHE_ENABLED", "DEBUG"]
        for text in ["yes", "", "tRUE", "2"]
    ),
    *(("STORAGE_TYPE", text) for text in ["redis", ""]),
    *(("CACHE_SIZE", text) for text in ["many", "", "-1", "1.5"]),
    *(
        ("ETCD_ADDR_LIST", text)
        for text in [
            "ftp://h:1",
            "",
            "h",
            "h:",
            ":1",
            "h:p",
            "h:0",
            "h:65536",
            "a:1,,b:2",
            "http://",
            "h h:1",
        ]
    ),
    ("ETCD_TIMEOUT", "0"),
    *(("MAX_TTL", text) for text in ["0", "", "-1s", "1 m", "9000000001"]),
]


@pytest.mark.parametrize("name, text", UNUSABLE, ids=lambda text: ascii(text)[:30])
def test_a_value_that_cannot_be_used_is_an_error_of_one_line(name: str, text: str) -> None:
    with pytest.raises(shared_lock.ConfigError) as caught:
        shared_lock.Config.from_env({f"SHARED_LOCK_{name}": text})

    line = str(caught.value)
    assert line.startswith(f"SHARED_LOCK_{name}: ") and "\n" not in line and len(line) < 400
    assert text.strip()[:100] in line or "," in text


@pytest.mark.parametrize(
    "name, text",
    [
        *dict(reversed(UNUSABLE)).items(),
        *(("SERVER_HOST", text) for text in ["no host", "192.0.2.1", "a..b", "x" * 64]),
    ],
)
def test_a_value_that_cannot_be_used_stops_the_start(name: str, text: str) -> None:
    ended = run_module(SERVE, **{"STORAGE_TYPE": "mock", "SERVER_PORT": "0", name: text})

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert f"SHARED_LOCK_{name}" in ended.stderr and text in ended.stderr


def test_a_variable_that_is_none_of_ours_is_warned_of_and_kubernetes_service_links_are_not(
    start: Start,
) -> None:
    typos = {
        "ETCD_ADDRS": "http://secret:1",
        "ETCD_TIME_OUT": "5s",
        "SERVER_PORTS": "1",
        "server_port": "1",
        "": "x",
    }
    link, at = "tcp://10.0.0.1:8080", "10.0.0.1"
    links = {
        "SERVICE_HOST": at,
        "SERVICE_PORT": "8080",
        "SERVICE_PORT_HTTP_2": "8080",
        "PORT": link,
    }  # "shared-lock"
    links |= {"PORT_8080_TCP": link, "PORT_8080_TCP_PROTO": "tcp", "PORT_8080_TCP_PORT": "8080"}
    links |= {
        "PORT_8080_TCP_ADDR": at,
        "WEB_SERVICE_HOST": at,
        "WEB_PORT": link,
        "WEB_PORT_53_UDP": "udp://[::1]:53",
    }

    daemon = start("mock", **typos, **links)
    daemon.request("GET", "/health")

    warned = eventually(
        lambda: len(found := events(daemon, "unknown variable")) == len(typos) and found
    )
    assert {line["variable"] for line in warned} == {f"SHARED_LOCK_{name}" for name in typos}
    assert {line["level"] for line in warned} == {"warning"}
    assert "secret" not in daemon.log()  # a password may be among the values


class Pki(NamedTuple):
    """Folders with ca.crt, client.crt, client.key, and the same for server: of those who belong, of
    strangers with a CA
    of their own, and lax ones without what RFC 5280 wants and nobody but CPython 3.13 asks for.

    Beside the good ones locked.key, which has a password, and garbage.
    """

    good: Path
    strangers: Path
    lax: Path

    def env(self, ca: str = "good", client: str = "good", **files: str) -> dict[str, str]:
        """The variables for these files; `files` are others for single ones, by variable."""
        folders = self._asdict()
        names = {"CA_CERT_PATH": (ca, "ca.crt"), "CLIENT_CERT_PATH": (client, "client.crt")}
        names |= {"CLIENT_KEY_PATH": (client, "client.key")} | {
            name: (client, file) for name, file in files.items()
        }
        return {
            "ETCD_TLS": "true",
            **{name: str(folders[whose] / file) for name, (whose, file) in names.items()},
        }

    def port(self, client_ca: str = "") -> dict[str, str]:
        """The variables for TLS on the daemon's own port; `client_ca`, a file, is for callers'
        certificates."""
        files = {"CERT_PATH": "server.crt", "KEY_PATH": "server.key", "CLIENT_CA_PATH": client_ca}
        return {f"SERVER_{name}": str(self.good / file) for name, file in files.items() if file}

    def caller(self, whose: str = "") -> ssl.SSLContext:
        """What a caller of that port trusts, and shows."""
        context = ssl.create_default_context(cafile=str(self.good / "ca.crt"))
        if whose:
            context.load_cert_chain(
                *(self._asdict()[whose] / f"client.{kind}" for kind in ("crt", "key"))
            )
        return context


@pytest.fixture(scope="session")
def pki(folder: Path) -> Pki:
    """Made with the openssl CLI."""
    folders = [folder / name for name in ("good", "strangers", "lax")]
    for made in folders:
        made.mkdir()
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    usage = "-addext keyUsage=critical,digitalSignature,keyCertSign"
    lax = "-config bare -addext authorityKeyIdentifier=none -addext basicConstraints=CA:"
    (folders[2] / "bare").write_text("[req]\ndistinguished_name = names\n[names]\n")
    for folder, name in itertools.product(folders, ("ca", "server", "client")):
        extensions = lax + str(name == "ca").upper() if folder == folders[2] else usage
        signer = (
            "" if name == "ca" else "-CA ca.crt -CAkey ca.key -addext subjectAltName=IP:127.0.0.1"
        )
        command = (
            f"{make} {extensions} {signer} -subj /CN={name} -keyout {name}.key -out {name}.crt"
        )
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    lock = "openssl pkey -aes128 -passout pass:secret -in client.key -out locked.key"
    subprocess.run(lock.split(), cwd=folders[0], check=True, capture_output=True)
    (folders[0] / "garbage").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    return Pki(*folders)


@pytest.mark.parametrize(
    "name, file",
    [
        ("CA_CERT_PATH", "missing"),
        ("CA_CERT_PATH", "garbage"),
        ("CA_CERT_PATH", "client.key"),
        ("CA_CERT_PATH", "."),
        ("CLIENT_CERT_PATH", "missing"),
        ("CLIENT_CERT_PATH", "garbage"),
        ("CLIENT_CERT_PATH", "ca.crt"),
        ("CLIENT_KEY_PATH", "missing"),
        ("CLIENT_KEY_PATH", "garbage"),
        ("CLIENT_KEY_PATH", "locked.key"),
    ],
)
def test_tls_files_that_cannot_be_used_stop_the_start(pki: Pki, name: str, file: str) -> None:
    env = pki.env(**{name: file})

    ended = run_module(SERVE, ETCD_ADDR_LIST="localhost:1", SERVER_PORT="0", **env)

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"SHARED_LOCK_{name}" in ended.stderr and env[name] in ended.stderr


def test_a_plain_endpoint_stops_the_start_where_tls_was_asked_for(pki: Pki) -> None:
    env = {f"SHARED_LOCK_{name}": value for name, value in pki.env().items()}
    env["SHARED_LOCK_ETCD_ADDR_LIST"] = "a:1,https://b:2,http://c:3"

    with pytest.raises(
        shared_lock.ConfigError, match=r'SHARED_LOCK_ETCD_ADDR_LIST: not https.*"http://c:3"'
    ):
        shared_lock.Config.from_env(env)
    assert shared_lock.Config.from_env(
        {**env, "SHARED_LOCK_ETCD_TLS": "f", "SHARED_LOCK_CA_CERT_PATH": "/missing"}
    )


def test_a_password_in_the_list_of_endpoints_is_refused_and_never_shown() -> None:
    for text in [
        "http://root:s3cret@etcd:2379",
        "root:s3cret@etcd:2379",
        "a:1, https://root:s3cret@b:2",
        "http://root:p@s3cret@etcd:2379",
        "http://root:s3cret@etcd",
        "http://root:a/s3cret@etcd:2379/",
        "s3cret@etcd:2379",
        "ftp://root:s3cret@etcd:21",
    ]:
        ended = run_module(SERVE, ETCD_ADDR_LIST=text, SERVER_PORT="0")

        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), text
        assert "SHARED_LOCK_ETCD_ADDR_LIST" in ended.stderr, text
        assert "s3cret" not in ended.stderr and "SHARED_LOCK_ETCD_USERNAME" in ended.stderr, text


@pytest.mark.parametrize(
    "text, host, shown",
    [
        ("http://host.:2379", "host.", "host.:2379"),
        ("[fe80::1%eth0]:2379", "fe80::1%eth0", "[fe80::1%eth0]:2379"),
        ("https://[fe80::1%br-0.1]:2379", "fe80::1%br-0.1", "[fe80::1%br-0.1]:2379"),
    ],
)
def test_a_rooted_name_and_an_address_with_a_zone_are_endpoints(
    text: str, host: str, shown: str
) -> None:
    config = shared_lock.Config.from_env({"SHARED_LOCK_ETCD_ADDR_LIST": text})

    [address] = config.etcd_addr_list
    assert (address.host, address.port, str(address)) == (host, 2379, shown)


@pytest.fixture(scope="session")
def open_tls_etcd(folder: Path, pki: Pki) -> Iterator[Etcd]:
    """An etcd that speaks TLS, for 127.0.0.1 and localhost, and wants no client certificate."""
    folder = folder / "open-tls"
    folder.mkdir()
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    signed = f"-CA {pki.good}/ca.crt -CAkey {pki.good}/ca.key -addext {names} -subj /O=etcd"
    made = f"{command} {signed} -keyout own.key -out own.crt"
    subprocess.run(made.split(), cwd=folder, check=True, capture_output=True)
    options = [f"--cert-file={folder / 'own.crt'}", f"--key-file={folder / 'own.key'}"]
    server = Etcd(folder, "open", None, *options).start()
    try:
        yield server
    finally:
        server.stop()


# A change: names are looked up without the dot at their end, which not every machine knows.
UNROOTED = """if True:
    import socket
    real = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *more, **named: real(host.rstrip("."), *more, **named)"""
NO_CLIENT = {"CLIENT_CERT_PATH": "", "CLIENT_KEY_PATH": ""}


@pytest.mark.parametrize(
    "address, env",
    [
        ("https://127.0.0.1:@", {}),
        ("https://localhost:@", {}),
        ("https://localhost.:@", {}),
        ("127.0.0.1:@", {"ETCD_TLS": "true", **NO_CLIENT}),
        ("https://localhost.:@", {"ETCD_TLS": "true", **NO_CLIENT}),
    ],
    ids=str,
)
def test_a_private_ca_needs_no_client_certificate(
    open_tls_etcd: Etcd, start: Start, pki: Pki, key: str, address: str, env: dict[str, str]
) -> None:
    endpoint = address.replace("@", str(open_tls_etcd.port))

    ca = str(pki.good / "ca.crt")
    daemon = start(endpoint, command=changed(UNROOTED), CA_CERT_PATH=ca, **env)
    eventually(daemon.ready, 30)

    assert daemon.acquire(key).status == 201
    assert not events(daemon, "file is not used") and "level=warning" not in without_release(daemon)


def without_release(daemon: Daemon) -> str:
    """Its log without the warning that the release of etcd has a known defect."""
    lines = daemon.log().splitlines()
    return "\n".join(line for line in lines if "3.5.28" not in line)


@pytest.mark.parametrize("env", [{}, {"ETCD_TLS": "true", **NO_CLIENT}], ids=str)
def test_a_server_that_the_private_ca_did_not_sign_is_refused(
    open_tls_etcd: Etcd, start: Start, pki: Pki, env: dict[str, str]
) -> None:
    endpoint = f"https://127.0.0.1:{open_tls_etcd.port}"

    stranger = start(endpoint, CA_CERT_PATH=str(pki.strangers / "ca.crt"), **env)
    failed = eventually(lambda: events(stranger, "etcd member failed"))

    assert "certificate" in failed[0]["reason"]
    assert stranger.acquire("k").status == 500


@pytest.mark.parametrize(
    "endpoint, env, unused",
    [
        ("http://@", {"CA_CERT_PATH": "ca.crt"}, {"CA_CERT_PATH"}),
        ("http://@", {"CLIENT_CERT_PATH": "client.crt"}, None),
        (
            "http://@",
            {"CLIENT_CERT_PATH": "client.crt", "CLIENT_KEY_PATH": "client.key"},
            {"CLIENT_CERT_PATH", "CLIENT_KEY_PATH"},
        ),
        (
            "https://@",
            {
                "CA_CERT_PATH": "ca.crt",
                "CLIENT_CERT_PATH": "client.crt",
                "CLIENT_KEY_PATH": "client.key",
            },
            {"CLIENT_CERT_PATH", "CLIENT_KEY_PATH"},
        ),
        ("https://@", {"CA_CERT_PATH": "ca.crt"}, set()),
        ("http://@,https://@", {"CA_CERT_PATH": "ca.crt"}, set()),
        ("http://@", {}, set()),
        ("http://@", {"CA_CERT_PATH": ""}, set()),
    ],
    ids=lambda given: str(sorted(given) if isinstance(given, set) else given),
)
def test_a_file_of_tls_that_is_set_and_not_used_is_warned_of(
    start: Start, pki: Pki, endpoint: str, env: dict[str, str], unused: set[str] | None
) -> None:
    address = endpoint.replace("@", f"127.0.0.1:{free_port()}")
    files = {name: str(pki.good / file) if file else "" for name, file in env.items()}

    if unused is None:  # half of a pair: either as good
        ended = run_module(SERVE, ETCD_ADDR_LIST=address, SERVER_PORT="0", SERVER_HOST="x", **files)
        assert ended.returncode == 2
        return
    daemon = start(address, **files)
    assert daemon.stop() == 0

    warned = [line for line in events(daemon) if line["level"] == "warning" and "variable" in line]
    assert {line["variable"] for line in warned} == {f"SHARED_LOCK_{name}" for name in unused}


@pytest.mark.parametrize("missing", NO_CLIENT)
def test_one_half_of_a_client_certificate_stops_the_start(pki: Pki, missing: str) -> None:
    env = pki.env() | {missing: ""}

    ended = run_module(SERVE, ETCD_ADDR_LIST="localhost:1", SERVER_PORT="0", **env)

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"SHARED_LOCK_{missing}" in ended.stderr


# == Wire: what is HTTP/1.1, and what is not =====================================================


def test_pipelined_requests_are_answered_in_order(on_memory: Daemon) -> None:
    client = Talk(on_memory, b"".join(get(f"/p{n}") for n in range(500)))

    client.sock.shutdown(socket.SHUT_WR)  # who says no more still listens
    answers = [client.answer() for _ in range(500)]

    assert [f'"/p{n}"' in answer.text for n, answer in enumerate(answers)] == [True] * 500
    assert client.rest() == b""


def test_a_request_in_single_bytes_is_read_and_so_is_the_longest_head_after_it(
    on_memory: Daemon, key: str
) -> None:
    client = Talk(on_memory)
    for byte in post(lock_body(key)):
        client.say(bytes([byte]))

    first = client.answer()
    client.say(b"\r")  # RFC 9112, 2.2: an empty line before a request is skipped
    time.sleep(0.1)
    for byte in b"\n" + head_of(KIB64):
        client.say(bytes([byte]))
    second = client.answer()

    assert (first.status, second.status) == (201, 200)


@pytest.mark.parametrize(
    "version, option, kept",
    [
        ("1.1", b"", True),
        ("1.1", b"close", False),
        ("1.1", b"foo, Close", False),
        ("1.1", b"keep-alive", True),
        ("1.0", b"", False),
        ("1.0", b"Keep-Alive", True),
        ("1.0", b"close", False),
    ],
)
def test_a_connection_is_kept_as_its_request_says(
    on_memory: Daemon, version: str, option: bytes, kept: bool
) -> None:
    headers = [b"Connection: " + option] if option else []
    client = Talk(on_memory, get("/health", *headers, version=version) + HEALTH)

    first = client.answer()

    assert (first.status, first.headers.get("connection") != "close") == (200, kept)
    assert (version, kept) != ("1.0", True) or first.headers["connection"].lower() == "keep-alive"
    assert client.answer().status == 200 if kept else client.rest() == b""


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0",
        *(
            b"HTTP/1.1\r\nHost: " + host
            for host in [
                b"x",
                b"",
                b"x:8080",
                b"x:",
                b"lock.example.",
                b"a_b",
                b"10.0.0.1:1",
                b"[::1]",
                b"[::1]:8080",
                b"a%20b",
            ]
        ),
    ],
)
def test_a_host_is_a_name_or_an_address_and_only_http_1_0_needs_none(
    on_memory: Daemon, head: bytes
) -> None:
    assert talk(on_memory, b"GET /health %s\r\n\r\n" % head).status == 200


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_a_chunked_body_is_read_whatever_its_chunks(daemon: Daemon, key: str, cut: int) -> None:
    body = lock_body(key, 200)
    extension = b' ;name="a;b";x=' + b"x" * (1000 if cut == 1 else 10) + b"\r\n"
    coded = b"".join(b"%x%s%s\r\n" % (len(part), extension, part) for part in cut_up(body, cut))
    coded += b"0\r\nTrailer: x\r\nOther:\r\n\r\n"
    client = Talk(daemon, post(b"", b"Transfer-Encoding: Chunked"))

    for part in cut_up(coded, max(200, len(coded) // 5)):
        time.sleep(0.02)
        client.say(part)
    first = client.answer()
    client.say(HEALTH)

    assert (first.status, client.answer().status) == (201, 200)


def cut_up(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_64_kib_is_served_and_a_byte_more_is_413(
    daemon: Daemon, key: str, chunked: bool
) -> None:
    def send(body: bytes) -> Answer:
        coded = post(chunks(*cut_up(body, 1000)), b"Transfer-Encoding: chunked")
        return talk(daemon, coded if chunked else post(body))

    answers = send(lock_body(key, KIB64 + 1)), send(lock_body(key, KIB64))

    assert [answer.status for answer in answers] == [413, 201]
    one_line(answers[0])


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Length: 100000000",
        b"Content-Length: " + b"9" * 5000,
        b"Transfer-Encoding: chunked",
    ],
)
def test_413_arrives_although_the_client_is_still_sending(on_memory: Daemon, header: bytes) -> None:
    client = Talk(on_memory, post(b"", header))

    for _ in range(80):
        client.say(b"10000\r\n" + b"x" * KIB64 + b"\r\n")
    answer = client.answer()

    assert (answer.status, answer.headers["connection"], client.rest()) == (413, "close", b"")


def test_100_continue_is_said_before_a_body_that_is_wanted_and_never_for_another(
    daemon: Daemon, key: str
) -> None:
    body, expect = lock_body(key), b"Expect: 100-Continue"
    client = Talk(daemon, post(b"", b"Content-Length: %d" % len(body), expect))
    chunked = Talk(daemon, post(b"", b"Transfer-Encoding: chunked", expect))

    invitations = client.answer(), chunked.answer()
    client.say(body)
    answer = client.answer()
    chunked.say(chunks(body))
    refusal = talk(daemon, post(b"", b"Content-Length: 65537", expect))
    at_once = talk(daemon, post(body, expect))
    empty = talk(daemon, post(b"", expect))

    assert [one.status for one in invitations] == [100, 100]
    assert (answer.status, chunked.answer().status) == (201, 202)
    assert (refusal.status, at_once.status, empty.status) == (413, 202, 400)


def test_an_http_1_0_client_never_sees_100_continue(on_memory: Daemon, key: str) -> None:
    body = lock_body(key)
    client = Talk(
        on_memory,
        post(b"", b"Content-Length: %d" % len(body), b"Expect: 100-continue", version="1.0"),
    )

    early, _, _ = select.select([client.sock], [], [], 0.3)
    client.say(body)

    assert not early  # RFC 9110, 10.1.1
    assert client.answer().status == 201


LENGTHS = [
    b"+2",
    b"-2",
    b"",
    b" ",
    b"0x2",
    b"2.0",
    b"2 2",
    b"2,2",
    b"2;",
    b"1_0",
    b"\xc2\xb2",
    b"\xd9\xa2",
    b"\xff",
]


@pytest.mark.parametrize(
    "request_, shown",
    [
        *((post(b"{}", b"Content-Length: " + text), "content-length") for text in LENGTHS),
        *(
            (post(b"", b"Content-Length: " + text, b"Expect: 100-continue"), "content-length")
            for text in LENGTHS
        ),
        (post(b"{}", b"Content-Length: 2", b"Content-Length: 2"), "content-length"),
        (post(b"{}", b"Content-Length: 2", b"A: b", b"content-length: 3"), "content-length"),
        (
            post(b"2\r\n{}\r\n0\r\n\r\n", b"Transfer-Encoding: chunked", b"Content-Length: 12"),
            "content-length",
        ),
        (
            post(b"2\r\n{}\r\n0\r\n\r\n", b"Content-Length: 12", b"Transfer-Encoding: chunked"),
            "content-length",
        ),
        *(
            (post(body + b"0\r\n\r\n", b"Transfer-Encoding: chunked"), "")
            for body in [
                b"\r\n",
                b"x\r\n",
                b"-5\r\nhello\r\n",
                b"+5\r\nhello\r\n",
                b"0x5\r\nhello\r\n",
                b"5 5\r\nhello\r\n",
                b" 5\r\nhello\r\n",
                b"1_0\r\n",
                b"5\nhello\r\n",
                b"5\r\nhello!\r\n",
                b"5\r\nhello0\r\n\r\n",
                b"5;a\nb\r\nhello\r\n",
                b";a\r\n",
                b"\xd9\xa5\r\nhello\r\n",
                b"5;" + b"x" * 70_000,
            ]
        ),
        (post(b"0\r\n\r\n", b"Transfer-Encoding: gzip"), '"gzip"'),
        (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked, gzip"), "gzip"),
        (
            post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
            "chunked",
        ),
        (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", version="1.0"), "transfer-encoding"),
        *(
            (get("/health", lines), shown)
            for lines, shown in [
                (b"A : x", "A : x"),
                (b"A\t: x", "A"),
                (b"A: b\r\n folded", " folded"),
                (b"A: b\r\n\tfolded: c", "folded: c"),
                (b"no colon", "no colon"),
                (b": nameless", ": nameless"),
                (b"A: b\nC: d", "A: b"),
                (b"A: b\rC: d", "A: b"),
                (b"A: b\0c", "A: b"),
                (b"A: \x1b[31m", "A: "),
                (b"A: \x7f", "A: "),
                (b"A(b): c", "A(b): c"),
                (b"\xc3\xa4: c", "ä: c"),
                (b"A: b\n", ""),
                (b"A: b\n\n", ""),
                (b"Host: x", "host"),
                (b"host: y", "host"),
            ]
        ),
        *(
            (b"GET /health HTTP/1.1\r\n" + lines + b"\r\n\r\n", shown)
            for lines, shown in [
                (b"A: b", "host"),
                (b" A: b", " A: b"),
                *(
                    (b"Host: " + host, "host")
                    for host in [
                        b"a b",
                        b"x/y",
                        b"x:y",
                        b"x:1:2",
                        b"a,b",
                        b"u@x",
                        b"[::1",
                        b"::1",
                        b"http://x",
                        b"x?",
                        b"\xff",
                    ]
                ),
            ]
        ),
        (b"GET /health HTTP/1.1\nHost: x\n\n", "line"),
        (b"GET /health HTTP/1.1\r\n\r\n", "host"),
        *(
            (line + b"\r\nHost: x\r\n\r\n", line.decode("latin-1")[:20])
            for line in [
                b"GET /health",
                b"GET  /health HTTP/1.1",
                b"GET /he alth HTTP/1.1",
                b"GET /health HTTP/1.1 ",
                b" GET /health HTTP/1.1",
                b"GET /health http/1.1",
                b"GET /health HTTP/1.10",
                b"GET /health HTTP/1",
                b"G{T /health HTTP/1.1",
                b"hello",
            ]
        ),
        (get("/\0"), "GET"),
        (b"\x16\x03\x01\x02\0\r\n\r\n", ""),
    ],
)
def test_what_is_not_strictly_http_ends_the_connection(
    on_memory: Daemon, request_: bytes, shown: str
) -> None:
    client = Talk(on_memory, request_ + HEALTH)  # the second one might be smuggled

    answer = client.answer()

    assert (answer.status, answer.headers["connection"], client.rest()) == (400, "close", b"")
    assert shown.lower() in answer.text.lower()
    one_line(answer)


@pytest.mark.parametrize(
    "request_, status, shown",
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2.0"),
        (
            post(b"0\r\n" + b"t: x\r\n" * 102 + b"\r\n", b"Transfer-Encoding: chunked"),
            431,
            "more than 100 trailers",
        ),
    ],
)
def test_http_2_and_too_many_trailers_are_refused(
    on_memory: Daemon, request_: bytes, status: int, shown: str
) -> None:
    answer = talk(on_memory, request_)

    assert (answer.status, answer.headers["connection"]) == (status, "close")
    one_line(answer, shown)


def head_of(size: int, headers: int = 2) -> bytes:
    """A head of so many bytes and header lines, of which one is as long as it needs to be."""
    head = get("/health", *(b"H%d:" % n for n in range(2, headers)), b"A: ")
    return head[:-4] + b"x" * (size - len(head)) + head[-4:]


@pytest.mark.parametrize(
    "head, status",
    [
        (head_of(KIB64), 200),
        (head_of(KIB64 + 5), 431),
        (head_of(500_000), 431),
        (head_of(3000, 100), 200),
        (head_of(3000, 101), 431),
        (head_of(KIB64, 100), 200),
        (head_of(500_000, 90), 431),
        (b"GET /" + b"x" * 200_000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 200_000, 431),
        (get("/" + "x" * (KIB64 - 27)), 404),
        (get("/" + "x" * (KIB64 - 22)), 431),
        (get("/" + "x" * 500_000), 431),
    ],
    ids=lambda value: len(value) if isinstance(value, bytes) else value,
)
@pytest.mark.parametrize("last_packet", [0, 2])
def test_a_head_of_more_than_64_kib_or_100_headers_is_431(
    on_memory: Daemon, head: bytes, status: int, last_packet: int
) -> None:
    client = Talk(on_memory, head[: len(head) - last_packet])
    if last_packet:
        time.sleep(0.1)
        client.say(head[-last_packet:])

    answer = client.answer()

    assert (answer.status, answer.headers.get("connection")) == (
        status,
        "close" if status == 431 else None,
    )
    if status != 200:
        one_line(answer)


def test_whatever_is_sent_the_daemon_answers_or_closes_and_still_serves(start: Start) -> None:
    daemon, dice = start("mock", DEBUG="true"), random.Random(4711)
    seeds = [
        HEALTH + post(lock_body("fuzz")),
        post(b"4711", path="/keepalive"),
        get("/lease?key=a%20b") * 2,
        post(
            chunks(lock_body("fuzz")),
            b"Transfer-Encoding: chunked",
            b"x-lease-ttl: 1m30s",
            b"x-lease-wait: 1ms",
        ),
        post(lock_body("fuzz"), b"Expect: 100-continue", b"x-lease-ttl: 10s"),
    ]
    spices = [
        b"\r\n",
        b"\n",
        b"\0",
        b"\xff\xfe",
        "²".encode(),
        b" ",
        b":",
        b"-1",
        b"9" * 30,
        b"{",
        b'"\\ud800"',
        b"%",
    ]

    def mutant(data: bytes) -> bytes:
        for _ in range(dice.randint(1, 4)):
            at, to = sorted(dice.randrange(len(data) + 1) for _ in range(2))
            spice = dice.choice([*spices, bytes([dice.randrange(256)]), data[at:to], b""])
            data = data[:at] + spice + data[dice.choice([at, at, at + 1, to]) :]
        return data

    for data in (mutant(dice.choice(seeds)) for _ in range(1000)):
        head, _, body = data.partition(b"\r\n\r\n")
        client = Talk(daemon, head + b"\r\n\r\n")
        client.say(body)
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)
        said = client.rest()
        client.close()
        assert not said or said.startswith(b"HTTP/1.1 "), (data, said)

    assert not re.search(".*(?:level=error|Traceback).*", daemon.log())
    assert daemon.request("GET", "/health").status == 200


def nested(depth: int) -> str:
    """JSON of this depth, by turns of arrays and objects."""
    opened = "".join('{"a":' if at % 2 else "[" for at in range(depth))
    return opened + "1" + "".join("}" if at % 2 else "]" for at in reversed(range(depth)))


# The bodies of the three endpoints that read JSON: @ is what is nested, by 99 or 100 around it.
BODIES = [("POST", "/lease", '{"labels": @, "key": "k"}', 99), ("POST", "/keepalive", "@", 100)]
BODIES += [("DELETE", "/lease", "@", 100), ("DELETE", "/lease", '{"id": @}', 99)]


@pytest.mark.parametrize("method, path, form, room", BODIES)
def test_a_body_may_be_nested_a_hundred_deep_and_no_deeper(
    on_memory: Daemon, key: str, method: str, path: str, form: str, room: int
) -> None:
    form = form.replace('"k"', json.dumps(key))

    deepest = on_memory.request(method, path, form.replace("@", nested(room)))
    deeper = on_memory.request(method, path, form.replace("@", nested(room + 1)))

    assert deepest.status == (201 if "key" in form else 500)
    assert deeper.status == 400
    one_line(deeper, "100")


@pytest.mark.parametrize(
    "body",
    [
        "[" * 65_535,
        "{" * 65_535,
        '{"a":' * 13_000,
        "[" * 101,
        '{"key": "k", "labels": ' + "[" * 60_000,
        '{"key": "k", "x": "\\\\"' + ', "y": [' * 5_000,
        '"' + '\\"' * 100 + '", ' + "[" * 200,
        "]" * 500 + "[" * 700,
        "]" * 30_000 + "[" * 30_200,
        "nonsense" + "[" * 101,
    ],
    ids=lambda body: f"{body[:10]} {len(body)}",
)
@pytest.mark.parametrize(
    "method, path", [("POST", "/lease"), *sorted({one[:2] for one in BODIES[1:3]})]
)
def test_what_is_deeper_is_refused_before_it_is_parsed(
    on_memory: Daemon, method: str, path: str, body: str
) -> None:
    answer = on_memory.request(method, path, body)

    assert answer.status == 400
    one_line(answer, "nested deeper than 100")


@pytest.mark.parametrize(
    "value, status",
    [
        ("[" * 60_000, 201),
        ("{[" * 30_000, 201),
        ('"[' * 10_000, 201),
        ("\\" * 500 + "[" * 500, 201),
        ("\\[" * 500 + '"', 201),
        ("é[" * 8_000, 201),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_brackets_in_strings_do_not_count(
    on_memory: Daemon, key: str, value: str, status: int
) -> None:
    answer = on_memory.acquire(key, value=value)

    assert answer.status == status
    assert json.loads(on_memory.look(key).text)["value"] == value


@pytest.mark.parametrize(
    "labels", [[{"a": "b"}] * 200, [[]] * 5_000, {str(n): {} for n in range(200)}]
)
def test_what_is_wide_is_not_deep(on_memory: Daemon, key: str, labels: object) -> None:
    body = json.dumps({"labels": labels, "key": key})

    assert on_memory.request("POST", "/lease", body).status == 201


@pytest.mark.parametrize("text", ['{"key": "%s' % ("[" * 500), '{"key": "k\\', '"' + "[" * 60_000])
def test_a_string_without_an_end_is_no_json(on_memory: Daemon, text: str) -> None:
    answer = on_memory.request("POST", "/lease", text)

    assert answer.status == 400
    one_line(answer, "body: not JSON")


MEMORY_LEFT_MIB = 30


def test_deep_bodies_take_no_memory_while_their_connections_live(start: Start) -> None:
    daemon = start("mock")
    clients = [Talk(daemon, HEALTH) for _ in range(60)]
    assert {client.answer().status for client in clients} == {200}
    before = resident_mib(daemon.process.pid)

    for client, body in zip(clients, itertools.cycle([b"[" * 65_535, b'{"a":' * 13_000])):
        client.say(post(body) + post(body, path="/keepalive"))
    answers = [client.answer() for client in clients for _ in range(2)]

    assert {answer.status for answer in answers} == {400}
    assert resident_mib(daemon.process.pid) < before + MEMORY_LEFT_MIB
    client = clients[0]
    client.say(HEALTH)
    assert client.answer().status == 200


@pytest.mark.parametrize("size, status", [(16, 201), (15, 413), (1, 413)])
def test_a_body_may_come_in_four_thousand_chunks_and_no_more(
    on_memory: Daemon, key: str, size: int, status: int
) -> None:
    body = chunks(*cut_up(lock_body(key, KIB64), size))

    assert talk(on_memory, post(body, b"Transfer-Encoding: chunked")).status == status


def test_what_nobody_reads_fills_little_of_the_kernels_memory() -> None:
    config = shared_lock.Config.from_env(
        {"SHARED_LOCK_SERVER_PORT": "0", "SHARED_LOCK_STORAGE_TYPE": "mock"}
    )
    metrics = shared_lock.Metrics()
    service = shared_lock.LockService(shared_lock.MemoryStorage(), metrics)
    server = shared_lock.Server(config, shared_lock.Api(service, metrics, config))
    with server.socket, socket.create_connection(("127.0.0.1", server.socket.getsockname()[1])):
        near, _ = server.socket.accept()
        with near:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                assert near.getsockopt(socket.SOL_SOCKET, option) <= 512 << 10


def test_what_a_crowd_needed_is_given_back() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another libc keeps memory in its own way")
    program = """if True:
        import pathlib, re, shared_lock
        shared_lock.keep_little_memory()
        blocks = [bytes(100_000) for _ in range(2000)]
        del blocks[:-1]  # the last one lies above the others
        print(re.search("VmRSS:\\s+([0-9]+)", pathlib.Path("/proc/self/status").read_text())[1])"""
    told = subprocess.run(
        [PYTHON, "-c", program], cwd=HERE, capture_output=True, text=True, check=True
    )

    assert int(told.stdout) < 80 << 10  # KiB; all of it is 190 MiB


@pytest.mark.parametrize("kind", ["served", "refused by a header", "a long path", "a long method"])
def test_long_heads_leave_no_memory_behind(start: Start, kind: str) -> None:
    daemon = start("mock")

    def send(numbers: range) -> None:
        client = Talk(daemon)
        for number in numbers:
            text = f"{number:06}" * 10_000  # 60 KB
            client.say(
                {
                    "served": post(lock_body(f"k{number}"), f"X-Other: {text}".encode()),
                    "refused by a header": post(lock_body("k"), f"x-lease-ttl: {text}".encode()),
                    "a long path": get(f"/{text}"),
                    "a long method": get("/health", method=f"A{text}"),
                }[kind]
            )
            assert client.answer().status in (201, 400, 404, 405)
        client.close()

    leaves_no_memory_behind(daemon, send)


def leaves_no_memory_behind(daemon: Daemon, send: Callable[[range], None]) -> None:
    send(range(100))
    before = resident_mib(daemon.process.pid)
    send(range(100, 1600))

    assert resident_mib(daemon.process.pid) < before + MEMORY_LEFT_MIB


@pytest.mark.parametrize("kind", ["keys", "values", "lease IDs", "x-lease- names"])
def test_long_bodies_leave_no_memory_behind(start: Start, kind: str) -> None:
    daemon = start("mock", CACHE_ENABLED="true")

    def send(numbers: range) -> None:
        client = Talk(daemon)
        for number in numbers:
            text = f"{number:06}" * 10_000
            if kind == "keys":  # held by nobody: refused for their ttl, and once for their value
                client.say(post(json.dumps({"key": text, "value": 5}).encode()))
            elif kind == "values":
                client.say(post(json.dumps({"key": "same", "value": text}).encode()))
            elif kind == "lease IDs":
                client.say(post(f'{{"id": 7, "more": "{text}"}}'.encode(), path="/keepalive"))
            else:
                client.say(post(lock_body("k"), f"x-lease-{text}: 1".encode()))
            assert client.answer().status in (201, 202, 204, 400)
        client.close()

    leaves_no_memory_behind(daemon, send)


# == Connections and the server: time and crowds =================================================


def test_a_trickling_request_is_cut_at_the_read_timeout(start: Start) -> None:
    daemon = start("mock", SERVER_READ_TIMEOUT="1s")
    kept = Talk(daemon, HEALTH)
    assert kept.answer().status == 200
    time.sleep(1.2)  # idle time is no reading time
    bodies = [post(b"", b"Content-Length: 9999"), post(b"2", b"Transfer-Encoding: chunked")]
    heads = [b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nA: ", *bodies]
    clients = [kept, *(Talk(daemon) for _ in heads)]
    for client, head in zip(clients, [b"GET /kept", *heads], strict=True):
        client.say(head)
    started = time.monotonic()

    for client in clients:
        while not select.select([client.sock], [], [], 0.05)[0]:
            for each in clients:
                each.say(b"1")
            assert time.monotonic() < started + 8
    elapsed = time.monotonic() - started

    assert elapsed > 0.9
    for client in clients:
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        one_line(answer, "1s")


@pytest.mark.parametrize("first", [b"", HEALTH])
def test_an_idle_connection_is_closed_without_a_word(start: Start, first: bytes) -> None:
    daemon = start("mock", SERVER_IDLE_TIMEOUT="1s", SERVER_READ_TIMEOUT="30s")
    client = Talk(daemon, first)
    assert not first or client.answer().status == 200
    started = time.monotonic()

    said = client.rest()

    assert said == b""
    assert 0.8 < time.monotonic() - started < 8


def test_a_timeout_of_zero_is_none(start: Start, key: str) -> None:
    daemon = start(
        "mock", SERVER_READ_TIMEOUT="0", SERVER_IDLE_TIMEOUT="0s", SERVER_WRITE_TIMEOUT="0"
    )
    client = Talk(daemon)
    time.sleep(0.5)

    for part in (post(lock_body(key))[at : at + 50] for at in range(0, 200, 50)):
        client.say(part)
        time.sleep(0.3)

    assert client.answer().status == 201


def test_a_client_that_never_reads_is_cut_at_the_write_timeout(start: Start) -> None:
    daemon = start("mock", SERVER_WRITE_TIMEOUT="1s")
    before = eventually(daemon.descriptors)
    client = Talk(daemon)
    eventually(lambda: daemon.descriptors() == before + 1)

    client.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(4000):
            client.sock.sendall(get("/metrics"))

    eventually(lambda: daemon.descriptors() == before, 20)
    assert daemon.request("GET", "/health").status == 200


def test_trickling_connections_do_not_delay_others(start: Start) -> None:
    daemon = start("mock")
    clients = [Talk(daemon, b"GET /slow HTTP/1.1\r\nHost: x\r\nA: ") for _ in range(300)]
    started = time.monotonic()

    for _ in range(20):
        for client in clients:
            client.say(b"x")
        assert daemon.request("GET", "/health").status == 200
    elapsed = time.monotonic() - started
    for client in clients:
        client.say(b"\r\n\r\n")

    assert elapsed < 8
    assert {client.answer().status for client in clients} == {404}


def test_two_thousand_connections_are_served_within_128_mib(start: Start, key: str) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(many_descriptors())
        daemon = start("mock")
        clients = [stack.enter_context(contextlib.closing(Talk(daemon))) for _ in range(2000)]
        for number, client in enumerate(
            clients
        ):  # each is granted, and so logged, in its own thread
            client.say(post(lock_body(f"{key}-{number}")))
        answers = [client.answer() for client in clients]
        resident = resident_mib(daemon.process.pid)

    assert {answer.status for answer in answers} == {201}
    assert resident < 128


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one(start: Start) -> None:
    daemon = start(
        "mock", command=["sh", "-c", f"ulimit -S -n 64; exec {shlex.join([PYTHON, *SERVE])}"]
    )

    soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)

    assert soft == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@contextlib.contextmanager
def out_of_descriptors(daemon: Daemon) -> Iterator[list[Talk]]:
    """Silent clients that take all descriptors the daemon may still open; at the end some leave."""
    limit = daemon.descriptors() + 10
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    clients = [Talk(daemon) for _ in range(20)]
    eventually(lambda: "accept" in daemon.log())
    yield clients
    for client in clients[:15]:
        client.close()


def test_a_daemon_out_of_descriptors_serves_again_when_some_are_free(start: Start) -> None:
    daemon = start("mock")

    with out_of_descriptors(daemon) as clients:
        for client in clients:
            client.say(HEALTH)
        assert clients[0].answer().status == 200
        time.sleep(0.5)

    assert {client.answer().status for client in clients[15:]} == {200}
    assert daemon.stop() == 0
    assert len(events(daemon, "accept failed")) == 1  # though it was tried ten times a second


def test_a_shortage_of_descriptors_is_not_blamed_on_etcd_and_ends_no_lock(
    start: Start, etcd: Etcd, key: str
) -> None:
    daemon = start(etcd.url, ETCD_TIMEOUT="2s")
    lease = daemon.acquire(key).text.encode()
    holder, *others = [Talk(daemon, HEALTH) for _ in range(9)]
    assert {client.answer().status for client in (holder, *others)} == {200}

    with out_of_descriptors(daemon):
        for number in range(40):
            holder.say(post(lease, path="/keepalive"))
            for client in others:
                client.say(post(lock_body(f"{key}-{number}")))
            kept = holder.answer()
            assert kept.status == 200, kept
            assert {client.answer().status for client in others} <= {201, 202, 500}

    assert eventually(lambda: daemon.acquire(key + "-after").status == 201)
    assert "etcd member failed" not in daemon.log()


# Connects without a pause, and resets each connection fifty connections later.
FLOOD = """if True:
    import collections, socket, struct, sys
    open_ones = collections.deque()
    while True:
        try:
            open_ones.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5))
            if len(open_ones) > 50:
                sock = open_ones.popleft()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
        except OSError:
            pass"""


@contextlib.contextmanager
def flooded(daemon: Daemon) -> Iterator[None]:
    """Four processes connect to it, without a pause."""
    command = [sys.executable, "-c", FLOOD, str(daemon.port)]
    floods = [subprocess.Popen(command) for _ in range(4)]
    try:
        yield
    finally:
        for flood in floods:
            flood.kill()
            flood.wait()


# A change: a connection is accepted no sooner than on a busy machine.
ACCEPTS_SLOWLY = """if True:
    import socket, time
    real = socket.socket.accept
    socket.socket.accept = lambda self: time.sleep(0.003) or real(self)"""


def test_a_flood_of_connections_makes_no_stop_longer(start: Start) -> None:
    daemon = start("mock", command=changed(ACCEPTS_SLOWLY), SERVER_SHUTDOWN_TIMEOUT="2s")

    with flooded(daemon):
        assert daemon.request("GET", "/health").status == 200
        daemon.process.send_signal(signal.SIGTERM)
        status = daemon.process.wait(20)  # with a flood that goes on

    assert status == 0


# A change: after SIGUSR1 the next ten threads cannot be started, as under a limit of tasks.
NO_THREADS = """if True:
    import signal, threading
    real, failing = threading.Thread.start, []
    def start(self):
        if failing:
            failing.pop()
            raise RuntimeError("can't start new thread")
        real(self)
    threading.Thread.start = start
    signal.signal(signal.SIGUSR1, lambda *_: failing.extend(range(10)))"""


@pytest.mark.parametrize("stops", [False, True])
def test_a_connection_whose_thread_could_not_start_ends_and_is_not_waited_for(
    start: Start, stops: bool
) -> None:
    daemon = start("mock", command=changed(NO_THREADS), SERVER_SHUTDOWN_TIMEOUT="0")
    daemon.process.send_signal(signal.SIGSTOP)  # so that all below comes at once
    clients = [Talk(daemon, get("/health", b"Connection: close")) for _ in range(12)]
    for number in (signal.SIGUSR1, *([signal.SIGTERM] if stops else []), signal.SIGCONT):
        daemon.process.send_signal(number)

    said = [client.rest()[:12] for client in clients]

    assert stops or daemon.request("GET", "/health").status == 200
    assert said.count(b"") >= 10 and set(said) <= {b"", b"HTTP/1.1 200"}
    assert stops or daemon.log().count("can't start new thread") == 10
    assert daemon.stop() == 0  # and there is no limit of time


# == Tokens: who may ask =========================================================================

TOKENS = "\n  first-token \n\n\t\nsecond-token\r\n \n"


@pytest.fixture(scope="session")
def guarded(folder: Path) -> Iterator[Daemon]:
    """A daemon whose callers must show a token."""
    (folder / "tokens").write_text(TOKENS)
    with running(folder, "mock", SERVER_TOKEN_PATH=str(folder / "tokens"), DEBUG="true") as daemon:
        yield daemon


def with_token(daemon: Daemon, token: str) -> int:
    """The status for who shows this token."""
    return daemon.request(
        "GET", "/lease?prefix=", None, {"Authorization": f"Bearer {token}"}
    ).status


@pytest.mark.parametrize(
    "shown",
    [
        "Bearer first-token",
        "bearer second-token",
        "BEARER \t first-token",
        "bEaReR second-token ",
    ],
)
def test_who_shows_one_of_the_tokens_may_ask(guarded: Daemon, key: str, shown: str) -> None:
    lock = guarded.acquire(key, authorization=shown)
    released = guarded.request("DELETE", "/lease", lock.body, {"authorization": shown})

    assert (lock.status, released.status) == (201, 200)


@pytest.mark.parametrize(
    "shown",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"first-token",
        b"Basic first-token",
        b"Bearer:first-token",
        b"Bearer wrong",
        b"Bearer FIRST-TOKEN",
        b"Bearer first-toke",
        b"Bearer first-tokens",
        b"Bearer first-token second-token",
        b"Bearer \xff\xfe\x80",
        "Bearer ключ".encode(),
        b"Bearer " + b"x" * 50_000,
        b"Bearer first-token\r\nAuthorization: Bearer first-token",
    ],
    ids=lambda shown: ascii(shown)[:30],
)
def test_anybody_else_is_401_for_all_but_health_and_readiness(
    guarded: Daemon, key: str, shown: bytes | None
) -> None:
    header = [] if shown is None else [b"Authorization: " + shown]
    paths = [
        "GET /lease?key=x",
        "DELETE /lease",
        "POST /keepalive",
        "GET /metrics",
        "GET /debug/pprof/",
        "GET /nowhere",
    ]
    paths += [
        "PUT /lease",
        "GET /health/",
        "GET //health",
        "GET /Health",
        "GET http://x/lease?/health",
    ]

    answers = [talk(guarded, post(lock_body(key), *header))]
    answers += [
        talk(guarded, get(path, *header, method=method)) for method, path in map(str.split, paths)
    ]
    open_to_all = [
        talk(guarded, get(path, *header)).status
        for path in ("/health", "/ready", "http://x/ready?a")
    ]

    assert {(answer.status, answer.headers["www-authenticate"]) for answer in answers} == {
        (401, "Bearer")
    }
    one_line(answers[0], "authorization")
    assert open_to_all == [200, 200, 200]
    assert guarded.acquire(key, authorization="Bearer first-token").status == 201


@pytest.mark.parametrize(
    "announced",
    [
        [b"Content-Length: 100"],
        [b"Transfer-Encoding: chunked"],
        [b"Content-Length: 100", b"Expect: 100-continue"],
        [b"Content-Length: 99999999"],
        [b"Content-Length: no"],
    ],
    ids=len,
)
def test_401_is_said_before_a_body_is_waited_for_or_looked_at(
    guarded: Daemon, announced: list[bytes]
) -> None:
    assert talk(guarded, post(b"", b"Authorization: Bearer wrong", *announced)).status == 401


def test_no_token_is_logged_or_part_of_an_answer(guarded: Daemon, key: str) -> None:
    headers = [
        b"Authorization: Bearer %s",
        b"Authorization : Bearer %s",
        b"Authorization: Bearer %s\x01",
    ]
    headers += [b"Authorization: %s", b"X: 1\r\n Bearer %s"]

    answers = [
        talk(guarded, get("/lease?key=x", header % token))
        for header, token in itertools.product(headers, (b"first-token", b"mistyped-token"))
    ]

    assert {answer.status for answer in answers} == {404, 401, 400}
    assert not [answer for answer in answers if b"-token" in answer.body]
    assert "-token" not in guarded.log()


def test_a_token_that_is_added_works_within_a_second_and_one_that_is_taken_out_no_longer(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text("old")
    daemon = start("mock", SERVER_TOKEN_PATH=str(file))
    found = [[with_token(daemon, token) for token in ("old", "new")]]

    for text in ("old\nnew\n", "new\n"):
        file.write_text(text)
        time.sleep(1)
        found.append([with_token(daemon, token) for token in ("old", "new")])

    assert found == [[200, 401], [200, 200], [401, 200]]


@pytest.mark.parametrize("first", ["", "mid"])
def test_tokens_that_are_written_within_one_tick_of_the_clock_are_noticed(
    start: Start, tmp_path: Path, first: str
) -> None:
    """Whoever writes a file in place empties it first, and a request may come in between."""
    file = tmp_path / "tokens"
    file.write_text("old")
    daemon = start("mock", SERVER_TOKEN_PATH=str(file))
    file.write_text(first)
    before = file.stat()
    with_token(daemon, "old")

    file.write_text("new")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    eventually(lambda: (with_token(daemon, "old"), with_token(daemon, "new")) == (401, 200), 2)


def renewals(daemon: Daemon) -> list[str]:
    """The levels of the lines about renewed files, in order."""
    return [line["level"] for line in events(daemon) if "renewed" in line["event"]]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the module's clock forward, which stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(shared_lock, "monotonic", lambda: now[0])

    def jump(seconds: float) -> None:
        now[0] += seconds

    return jump


def test_a_file_that_is_read_once_more_is_told_only_where_it_has_changed(
    jump: Callable[[float], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens"
    file.write_text("old")
    read: list[str] = []
    renewed = shared_lock.Renewed(lambda: read.append(file.read_text()), str(file))

    for changes in (1, 2):
        for _ in range(10):
            jump(0.3)
            renewed.get()
        assert len(read) == 2 * changes
        file.write_text("changed")
    renewed.get()

    assert capfd.readouterr().err.count("files renewed") == 2


@pytest.mark.usefixtures("jump")
def test_a_file_that_is_emptied_and_filled_within_one_tick_is_noticed_at_once(
    tmp_path: Path,
) -> None:
    file = tmp_path / "tokens"
    file.write_text("")
    emptied = file.stat()
    renewed = shared_lock.Renewed(file.read_text, str(file))

    file.write_text("new")
    os.utime(file, ns=(emptied.st_atime_ns, emptied.st_mtime_ns))

    assert renewed.get() == "new"


def as_ordinary_user() -> list[str]:
    """The daemon's command, without root's right to read every file."""
    rights = "-dac_override,-dac_read_search"
    as_root = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    return [*(as_root if os.geteuid() == 0 else []), PYTHON, *SERVE]


def hide(file: Path) -> Callable[[], object]:
    file.chmod(0)
    return functools.partial(file.chmod, 0o600)


def move_away(file: Path) -> Callable[[], object]:
    away = file.rename(file.with_suffix(".away"))
    return functools.partial(away.rename, file)


def make_a_folder(file: Path) -> Callable[[], object]:
    away = file.rename(file.with_suffix(".away"))
    file.mkdir()

    def undo() -> None:
        file.rmdir()
        away.rename(file)

    return undo


@pytest.mark.parametrize("harm", [hide, move_away, make_a_folder])
def test_tokens_that_cannot_be_read_when_they_change_are_tried_again(
    start: Start, tmp_path: Path, harm: Callable[[Path], Callable[[], object]]
) -> None:
    file = tmp_path / "tokens"
    file.write_text("old")
    daemon = start("mock", command=as_ordinary_user(), SERVER_TOKEN_PATH=str(file))
    assert with_token(daemon, "old") == 200

    (tmp_path / "next").write_text("new")
    mend = harm((tmp_path / "next").rename(file))
    eventually(lambda: with_token(daemon, "old") == 200 and renewals(daemon))
    ends = time.monotonic() + 2.5  # and it is tried again meanwhile
    while time.monotonic() < ends:
        assert [with_token(daemon, token) for token in ("old", "new", "")] == [200, 401, 401]
        time.sleep(0.2)
    before = renewals(daemon)
    mend()

    eventually(lambda: (with_token(daemon, "old"), with_token(daemon, "new")) == (401, 200), 5)
    time.sleep(1.2)
    assert with_token(daemon, "new") == 200
    assert (before, renewals(daemon)[:2]) == (["warning"], ["warning", "info"])
    assert "SHARED_LOCK_SERVER_TOKEN_PATH" in daemon.log()


def test_tokens_that_change_while_no_descriptor_is_free_are_tried_again(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text("old")
    daemon = start("mock", SERVER_TOKEN_PATH=str(file))
    kept = Talk(daemon, get("/lease?prefix=", b"Authorization: Bearer old"))
    assert kept.answer().status == 200
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)

    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    file.write_text("new")
    ends = time.monotonic() + 0.5  # longer than a change counts as fresh
    while time.monotonic() < ends:
        kept.say(get("/lease?prefix=", b"Authorization: Bearer old"))
        assert kept.answer().status == 200
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)

    eventually(lambda: (with_token(daemon, "old"), with_token(daemon, "new")) == (401, 200), 5)
    assert renewals(daemon)[:2] == ["warning", "info"]
    kept.close()


NO_TOKENS = ["", "\n \t\r\n", "\ufeff", "\ufeff\n\n", "# old\n", "  # old\n\t#\n", "\ufeff# old\n"]


@pytest.mark.parametrize("text", NO_TOKENS, ids=ascii)
def test_a_file_without_tokens_stops_the_start_and_later_refuses_everybody(
    start: Start, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    ended = run_module(SERVE, STORAGE_TYPE="mock", SERVER_PORT="0", SERVER_TOKEN_PATH=str(file))
    file.write_text("old")
    daemon = start("mock", SERVER_TOKEN_PATH=str(file))

    file.write_text(text)
    eventually(lambda: with_token(daemon, "old") == 401, 5)
    shown = [with_token(daemon, token) for token in ("", "#", "# old", "\xef\xbb\xbf", "old")]
    told = eventually(lambda: [line for line in events(daemon) if line["level"] == "error"])
    file.write_text("new")

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "SHARED_LOCK_SERVER_TOKEN_PATH" in ended.stderr and str(file) in ended.stderr
    assert shown == [401] * 5
    assert "token" in " ".join(told[0].values())
    eventually(lambda: with_token(daemon, "new") == 200, 5)


def test_a_byte_order_mark_blank_lines_and_comments_are_no_tokens(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text("\ufefffirst\n# second\n\n #third\n  fourth#4 \n")

    daemon = start("mock", SERVER_TOKEN_PATH=str(file))

    taken = [with_token(daemon, token) for token in ("first", "fourth#4")]
    others = ["", "#", "# second", "second", "#third", "third", "fourth"]
    assert taken == [200, 200]
    assert {with_token(daemon, token) for token in others} == {401}


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://127.0.0.1"])
def test_a_web_page_may_ask_for_nothing_but_health(daemon: Daemon, key: str, origin: str) -> None:
    lease, header = daemon.acquire(key).text, {"Origin": origin}
    token = daemon.token(key)

    answers = [daemon.acquire(key + " free", **header)]
    for method, path, body in [
        ("POST", "/keepalive", lease),
        ("DELETE", "/lease", lease),
        ("GET", f"/lease?key={key}", None),
        ("HEAD", f"/lease?key={key}", None),
        ("GET", "/lease?prefix=", None),
        ("GET", "/metrics", None),
        ("OPTIONS", "/lease", None),
        ("PUT", "/lease", lease),
        ("GET", "/nowhere", None),
    ]:
        answers.append(daemon.request(method, path, body, header))
    freed = {**header, "If-Match": f'"{token}"'}
    answers.append(daemon.request("DELETE", f"/lease?key={key}", None, freed))
    probes = [daemon.request("GET", path, None, header).status for path in ("/health", "/ready")]

    assert {answer.status for answer in answers} == {403}
    one_line(answers[0], "origin")
    assert probes == [200, 200]
    assert [daemon.look(one).status for one in (key, key + " free")] == [200, 404]


def test_a_web_page_that_shows_a_token_is_served(guarded: Daemon, key: str) -> None:
    web, token = {"Origin": "http://ours.example"}, {"authorization": "Bearer first-token"}

    answers = [guarded.acquire(key, **web), guarded.acquire(key, **web, **token)]

    assert [answer.status for answer in answers] == [401, 201]


def test_a_certificate_is_shown_by_a_browser_itself_and_no_reason_to_serve_a_web_page(
    start: Start, pki: Pki, key: str
) -> None:
    daemon = start("mock", **pki.port("ca.crt"))
    daemon.tls = pki.caller("good")

    answers = [
        talk(daemon, post(lock_body(key), *origin)) for origin in ([b"Origin: https://a.b"], [])
    ]

    assert [answer.status for answer in answers] == [403, 201]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_proxy_may_keep_an_answer(
    on_memory: Daemon, guarded: Daemon, key: str, method: str
) -> None:
    on_memory.acquire(key)
    paths = {f"/lease?key={key}": 200, "/lease?key=free": 404, "/lease?prefix=": 200}
    paths |= {"/lease": 400, "/health": 200, "/ready": 200, "/metrics": 200, "/nowhere": 404}
    paths |= {"/keepalive": 405}

    answers = {path: on_memory.request(method, path) for path in paths}
    answers["401"] = guarded.request(method, "/lease?key=x")
    answers["403"] = on_memory.request(method, "/lease?key=x", None, {"Origin": "null"})

    statuses = {path: answer.status for path, answer in answers.items()}
    assert statuses == paths | {"401": 401, "403": 403}
    assert {
        path: answer.headers.get("cache-control") for path, answer in answers.items()
    } == dict.fromkeys(answers, "no-store")


def test_readiness_tells_why_it_failed_only_to_who_shows_a_token(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("right-token")
    port, ask_with = free_port(), {"Authorization": "Bearer right-token"}
    endpoint = f"http://127.0.0.1:{port}"
    closed = start(endpoint, ETCD_TIMEOUT="1s", SERVER_TOKEN_PATH=str(tmp_path / "tokens"))
    open_to_all = start(endpoint, ETCD_TIMEOUT="1s")

    shown = [
        closed.request("GET", "/ready", None, headers)
        for headers in ({}, {"Authorization": "Bearer wrong-token"}, ask_with)
    ]
    shown.append(open_to_all.request("GET", "/ready"))

    assert {answer.status for answer in shown} == {503}
    assert [answer.text for answer in shown[:2]] == ["storage failed\n"] * 2
    for answer in shown[2:]:
        one_line(answer, "storage failed: ", str(port))


@pytest.mark.parametrize(
    "env",
    [
        {"SERVER_TOKEN_PATH": "/no/such/file"},
        {"SERVER_TOKEN_PATH": os.devnull},
        {"SERVER_TOKEN_PATH": "/"},
        {"SERVER_CERT_PATH": "/c"},
        {"SERVER_KEY_PATH": "/k"},
        {"SERVER_CLIENT_CA_PATH": "/ca"},
        {"SERVER_CERT_PATH": "/no/such/file", "SERVER_KEY_PATH": "/no/such/file"},
        {"SERVER_CERT_PATH": __file__, "SERVER_KEY_PATH": __file__},
        {"ETCD_USERNAME": "root"},
        {"ETCD_PASSWORD": "secret"},
        {"ETCD_PASSWORD": "secret", "ETCD_USERNAME": ""},
    ],
    ids=lambda env: " ".join(env),
)
def test_settings_of_who_may_ask_that_cannot_be_used_stop_the_start(env: dict[str, str]) -> None:
    ended = run_module(SERVE, **{"STORAGE_TYPE": "mock", "SERVER_PORT": "0", **env})

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert (
        any(f"SHARED_LOCK_{name}" in ended.stderr for name in env) and "secret" not in ended.stderr
    )


# == TLS on the own port =========================================================================


@pytest.fixture
def start_tls(start: Start, pki: Pki) -> Start:
    """As start, with TLS on the daemon's port and for our raw connections to it."""

    def start_one(client_ca: str = "", storage: str = "mock", **env: str) -> Daemon:
        daemon = start(storage, **{**pki.port(client_ca), **env})
        daemon.tls = pki.caller()
        return daemon

    return start_one


def tcp(daemon: Daemon, data: bytes = b"") -> socket.socket:
    """A connection that does not shake hands."""
    sock = socket.create_connection(("127.0.0.1", daemon.port), timeout=30)
    sock.sendall(data)
    return sock


def test_over_tls_connections_are_kept_and_pipelining_is_answered_in_order(
    start_tls: Start, key: str
) -> None:
    client = Talk(start_tls(), HEALTH)
    assert client.answer().status == 200

    client.say(post(lock_body(key)) + post(lock_body(key)) + get("/nowhere"))
    client.say(post(lock_body(key, KIB64)))

    assert [client.answer().status for _ in range(4)] == [201, 202, 404, 202]


@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
)
def test_tls_is_of_version_1_2_or_newer(start_tls: Start, version: ssl.TLSVersion) -> None:
    daemon = start_tls()
    assert daemon.tls
    daemon.tls.set_ciphers("DEFAULT:@SECLEVEL=0")
    with (
        pytest.warns(DeprecationWarning)
        if version == ssl.TLSVersion.TLSv1_1
        else contextlib.nullcontext()
    ):
        daemon.tls.minimum_version = daemon.tls.maximum_version = version

    with (
        pytest.raises(ssl.SSLError)
        if version == ssl.TLSVersion.TLSv1_1
        else contextlib.nullcontext()
    ):
        assert talk(daemon, HEALTH).status == 200


INTERMEDIATE = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "DHE-RSA-AES128-GCM-SHA256",
    "DHE-RSA-AES256-GCM-SHA384",
    "DHE-RSA-CHACHA20-POLY1305",
]


@pytest.mark.parametrize("kind", ["ec -pkeyopt ec_paramgen_curve:prime256v1", "rsa:2048"])
def test_tls_offers_the_suites_of_mozillas_intermediate_and_no_others(
    start: Start, tmp_path: Path, kind: str
) -> None:
    command = f"openssl req -x509 -newkey {kind} -nodes -days 2 -subj /CN=x -keyout k -out c"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    files = {"SERVER_CERT_PATH": str(tmp_path / "c"), "SERVER_KEY_PATH": str(tmp_path / "k")}
    daemon = start("mock", **files)

    def caller(suite: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(f"{suite}:@SECLEVEL=0")
        return context

    known = {one["name"] for one in caller("ALL:COMPLEMENTOFALL").get_ciphers()}
    known -= {name for name in known if name.startswith("TLS_")}  # of TLS 1.3, which are all fine
    taken = set()
    for suite in sorted(known):
        daemon.tls = caller(suite)
        with contextlib.suppress(OSError):
            daemon.connect().close()
            taken.add(suite)

    assert len(known) > 30 and {"AES256-GCM-SHA384", "ECDHE-RSA-AES256-SHA384"} <= known
    ours = {name for name in INTERMEDIATE if f"-{kind[:2].upper()}" in name.replace("DSA", "EC")}
    assert taken <= set(INTERMEDIATE)
    assert {name for name in ours if name.startswith("ECDHE") and "AES" in name} <= taken


@pytest.mark.parametrize("curve, is_taken", [("prime256v1", True), ("secp521r1", False)])
def test_tls_takes_only_curves_of_mozillas_intermediate(
    start_tls: Start, curve: str, is_taken: bool
) -> None:
    daemon = start_tls()
    assert daemon.tls
    daemon.tls.set_ecdh_curve(curve)

    with contextlib.nullcontext() if is_taken else pytest.raises(ssl.SSLError):
        assert talk(daemon, HEALTH).status == 200


@pytest.mark.parametrize(
    "data", [HEALTH, post(b'{"key": "k"}'), post(b"x" * 60_000), b"GET", b"nonsense\r\n"], ids=len
)
@pytest.mark.parametrize("client_ca", ["", "ca.crt"])
def test_plain_http_to_a_tls_port_is_told_the_scheme(
    start_tls: Start, pki: Pki, data: bytes, client_ca: str
) -> None:
    daemon = start_tls(client_ca, SERVER_READ_TIMEOUT="60s")

    with tcp(daemon, data) as sock:
        sock.settimeout(10)
        said = b""
        while part := sock.recv(4096):
            said += part

    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"https://" in body and body.count(b"\n") == 1
    eventually(lambda: [line for line in events(daemon) if "https" in str(line)])
    daemon.tls = pki.caller("good")
    assert talk(daemon, HEALTH).status == 200


def test_a_handshake_to_a_plain_port_is_refused_at_once_with_a_line_in_the_log(
    start: Start,
) -> None:
    daemon = start("mock", SERVER_READ_TIMEOUT="60s")
    context = ssl.create_default_context()

    for name in (None, "lock.example"):  # with and without SNI
        context.check_hostname = name is not None
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
            with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
                context.wrap_socket(sock, server_hostname=name)
            assert not isinstance(caught.value, TimeoutError)
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
        sock.sendall(b"\x16\x03\x01")  # the rest of the handshake is on its way
        said = sock.recv(1000)
        assert not said or said.startswith((b"HTTP/1.1 400", b"\x15"))

    [line] = eventually(lambda: [line for line in events(daemon) if "TLS" in str(line)])
    assert line["level"] == "warning" and line["client"].startswith("127.0.0.1:")
    assert daemon.request("GET", "/health").status == 200


def test_a_certificate_that_comes_a_moment_after_its_key_is_taken(
    start: Start, pki: Pki, tmp_path: Path
) -> None:
    mine = shutil.copytree(pki.good, tmp_path / "mine")
    daemon = start("mock", command=as_ordinary_user(), **pki._replace(good=mine).port())
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    daemon.tls = context

    def served() -> str:
        with daemon.connect() as sock:
            assert isinstance(sock, ssl.SSLSocket)
            return ssl.DER_cert_to_PEM_cert(sock.getpeercert(True) or b"")

    old, new = served(), (pki.strangers / "server.crt").read_text()
    shutil.copy(pki.strangers / "server.key", mine / "server.key")
    between = [served() for _ in range(3)]
    (mine / "server.crt").unlink()
    shutil.copy(pki.strangers / "server.crt", mine / "server.crt")
    (mine / "server.crt").chmod(0)  # and only then may it be read
    hidden = served()
    time.sleep(1.2)
    hidden_still = served()
    (mine / "server.crt").chmod(0o600)

    eventually(lambda: served() == new, 5)
    assert {*between, hidden, hidden_still} == {old}
    assert renewals(daemon)[:2] == ["warning", "info"]


def test_a_thousand_connections_that_never_shake_hands_delay_nobody(
    start_tls: Start, key: str
) -> None:
    daemon = start_tls()

    with contextlib.ExitStack() as stack:
        stack.enter_context(many_descriptors())
        for number in range(1000):
            stack.enter_context(tcp(daemon, b"\x16\x03\x01" if number % 2 else b""))
        began = time.monotonic()
        status = talk(daemon, post(lock_body(key))).status

    assert status == 201
    assert time.monotonic() - began < 5  # a handshake may take 10 s


@pytest.mark.parametrize("trickles", [False, True])
def test_a_handshake_is_cut_at_the_read_timeout(start_tls: Start, trickles: bool) -> None:
    daemon = start_tls(SERVER_READ_TIMEOUT="1s")
    began = time.monotonic()

    with tcp(daemon, b"\x16\x03\x01\x40\x00") as sock, contextlib.suppress(ConnectionError):
        while not select.select([sock], [], [], 0.2 if trickles else 8)[0]:
            sock.sendall(b"\x01")
            assert time.monotonic() - began < 8
        assert not sock.recv(100)

    assert 0.9 < time.monotonic() - began < 8


@pytest.mark.parametrize("file", ["server.crt", "server.key"])
def test_a_renewed_certificate_is_served_to_the_next_connection_and_a_spoilt_one_is_not(
    start: Start, pki: Pki, tmp_path: Path, file: str
) -> None:
    mine, context = shutil.copytree(pki.good, tmp_path / "mine"), ssl.create_default_context()
    daemon = start("mock", **pki._replace(good=mine).port())
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    daemon.tls = context

    def served() -> str:
        with daemon.connect() as sock:
            assert isinstance(sock, ssl.SSLSocket)
            return ssl.DER_cert_to_PEM_cert(sock.getpeercert(True) or b"")

    kept = Talk(daemon, HEALTH)
    assert kept.answer().status == 200
    (mine / file).write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    spoilt = [served() for _ in range(3)]
    for name in ("server.crt", "server.key"):
        shutil.copy(pki.strangers / name, mine / name)
    renewed = served()
    kept.say(HEALTH)

    assert set(spoilt) == {(pki.good / "server.crt").read_text()}
    assert renewed == (pki.strangers / "server.crt").read_text()
    assert len(re.findall("level=warning .*SHARED_LOCK_SERVER_(CERT|KEY)_PATH", daemon.log())) == 1
    assert kept.answer().status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("whose", ["", "strangers", "good"])
def test_where_callers_need_a_certificate_only_ours_are_served(
    start_tls: Start, pki: Pki, whose: str, version: ssl.TLSVersion
) -> None:
    daemon = start_tls("ca.crt")
    daemon.tls = pki.caller(whose)
    daemon.tls.maximum_version = version

    with (
        contextlib.nullcontext()
        if whose == "good"
        else pytest.raises((ssl.SSLError, ConnectionError, AssertionError))
    ):
        assert talk(daemon, HEALTH).status == 200
    daemon.tls = pki.caller("good")
    assert talk(daemon, HEALTH).status == 200
    assert "callers_need=certificate" in daemon.log() and "tls=yes" in daemon.log()


def test_a_stop_over_tls_closes_the_silent_and_answers_all_others(
    start_tls: Start, key: str
) -> None:
    daemon = start_tls(SERVER_SHUTDOWN_TIMEOUT="30s", SERVER_READ_TIMEOUT="60s")
    silent, late = ([Talk(daemon, HEALTH) for _ in range(5)] for _ in range(2))
    assert {client.answer().status for client in (*silent, *late)} == {200}
    unshaken, half = [tcp(daemon) for _ in range(5)], Talk(daemon, HEALTH[:-2])
    assert talk(daemon, post(lock_body(key))).status == 201
    waiting = [Talk(daemon, post(lock_body(key), b"x-lease-wait: 50s")) for _ in range(5)]
    time.sleep(0.5)

    began = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    for client in late:
        client.say(HEALTH)
    half.say(b"\r\n")
    answers = [client.answer() for client in (*late, half, *waiting)]

    assert [(answer.status, answer.headers["connection"]) for answer in answers] == [
        (200, "close")
    ] * 6 + [(202, "close")] * 5
    assert [client.rest() for client in silent] == [b""] * 5
    for sock in unshaken:
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
        sock.close()
    assert daemon.process.wait(20) == 0
    assert time.monotonic() - began < 10


def test_a_waiter_that_ended_its_half_over_tls_never_gets_the_lock(
    start_tls: Start, key: str
) -> None:
    daemon = start_tls(DEBUG="true")
    lease = talk(daemon, post(lock_body(key))).body
    waiter = Talk(daemon, post(lock_body(key), b"x-lease-wait: 50s"))
    time.sleep(0.5)

    socket.socket.shutdown(waiter.sock, socket.SHUT_WR)

    eventually(lambda: f'connection lost" client=127.0.0.1:{waiter.port}' in daemon.log())
    assert (
        talk(
            daemon, get("/lease", b"Content-Length: %d" % len(lease), method="DELETE") + lease
        ).status
        == 200
    )
    assert talk(daemon, post(lock_body(key))).status == 201


def test_over_tls_a_client_that_never_reads_is_cut_at_the_write_timeout(start_tls: Start) -> None:
    daemon = start_tls(SERVER_WRITE_TIMEOUT="1s", SERVER_READ_TIMEOUT="60s")
    before = eventually(daemon.descriptors)
    client = Talk(daemon)
    eventually(lambda: daemon.descriptors() == before + 1)

    client.sock.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        for _ in range(4000):
            client.sock.sendall(get("/metrics") * 10)

    eventually(lambda: daemon.descriptors() == before, 20)
    assert talk(daemon, HEALTH).status == 200


# == API: paths, methods, bodies =================================================================


@pytest.mark.parametrize(
    "path, allowed",
    [
        ("/lease", {"POST", "DELETE", "GET", "HEAD"}),
        ("/keepalive", {"POST"}),
        ("/health", {"GET", "HEAD"}),
        ("/ready", {"GET", "HEAD"}),
        ("/metrics", {"GET", "HEAD"}),
    ],
)
def test_a_known_path_with_another_method_is_405_with_allow(
    on_memory: Daemon, path: str, allowed: set[str]
) -> None:
    methods = {"POST", "DELETE", "GET", "HEAD", "PUT", "PATCH", "OPTIONS", "get", "X-Y"}

    refusals = {method: on_memory.request(method, path, "{}") for method in methods - allowed}

    for method, refusal in refusals.items():
        assert (refusal.status, set(refusal.headers["allow"].split(", "))) == (405, allowed)
        assert method == "HEAD" or f'"{method}"' in refusal.text


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/leas",
        "/lease/",
        "/Lease",
        "*",
        "/debug/pprof/",
        "/debug/pprof/heap",
        "/%0a",
        "/debug/pprof/profile",
    ],
)
def test_any_other_path_is_404_and_shown(on_memory: Daemon, path: str) -> None:
    answer = on_memory.request("GET", path)

    assert answer.status == 404
    one_line(answer, f'"{path}"')


@pytest.mark.parametrize(
    "target", ["/health?a=b", "http://lock.example/health", "HTTPS://h:1/health?x", "/health#top"]
)
def test_queries_and_absolute_targets_lead_to_the_path(on_memory: Daemon, target: str) -> None:
    answer = on_memory.request("GET", target)

    assert (answer.status, answer.text) == (200, "ok\n")


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/ready",
        "/lease?key=",
        "/lease?key=free",
        "/lease?prefix=no",
        "/lease",
        "/nowhere",
        "/lease?prefix=",
    ],
)
def test_head_is_get_without_the_body(daemon: Daemon, key: str, path: str) -> None:
    path = path if path[-1] != "=" else path + key
    daemon.acquire(key)
    client = Talk(daemon, get(path, method="HEAD") + HEALTH)

    head, answer = client.answer("HEAD"), daemon.request("GET", path)

    assert head.status == answer.status
    assert {**head.headers, "date": ""} == {**answer.headers, "date": ""}
    assert client.answer().status == 200


def test_the_connection_is_kept_after_errors_of_the_application(daemon: Daemon) -> None:
    client = Talk(
        daemon, post(b"no json") + post(b"{}", path="/keepalive") + get("/lease", method="PUT")
    )

    client.say(post(b"[]", path="/x") + HEALTH)
    answers = [client.answer() for _ in range(5)]

    assert [answer.status for answer in answers] == [400, 500, 405, 404, 200]
    assert not any("connection" in answer.headers for answer in answers)


def test_a_defect_of_ours_is_answered_and_logged_in_a_line(start: Start) -> None:
    broken = (
        "import shared_lock as it; it.MemoryStorage.acquire = lambda *_: 1 // 0; it.main(['serve'])"
    )
    daemon = start("mock", command=["env", f"PYTHONPATH={HERE}", PYTHON, "-c", broken])

    answer = daemon.acquire("k")

    told = "outcome unknown: internal error: see the log of shared-lock\n"
    assert (answer.status, answer.text) == (500, told)
    [line] = [line for line in daemon.log().splitlines() if "event=serving" not in line]
    assert 'level=error event="internal error" error="ZeroDivisionError(' in line
    assert "path=/lease" in line


@pytest.mark.parametrize(
    "text",
    [
        '{"key": @}',
        '{"key": @, "value": "v", "labels": {"a": "b"}, "timestamp": "2026-11-23T03:21:00Z"}',
        '{"key": @, "labels": [5], "timestamp": {}}',
        '{"key": @, "labels": "a", "timestamp": 5, "value": null}',
        ' \r\n\t{"key":@}\n',
        '{"key": @, "other": [1, {"a": null}], "Lease": 1.5}',
        '{"key": @, "huge": %s}' % ("9" * 5000),
        '{"key": @, "value": "\\ud83d\\udd12"}',
        '{"Key": @, "VALUE": "v"}',
        '{"KEY": "other", "kEy": @}',
        '{"key": "other", "Key": @}',
        '{"\u212aey": @}',
    ],
)
def test_a_json_object_with_a_key_asks_for_a_lock(daemon: Daemon, key: str, text: str) -> None:
    answer = daemon.request("POST", "/lease", text.replace("@", json.dumps(key)).encode())

    assert (answer.status, answer.headers["x-lease-ttl"]) == (201, "10s")
    assert daemon.token(key) == answer.token


@pytest.mark.parametrize(
    "body, shown",
    [
        ("", "body"),
        (" ", "body"),
        ("nope", '"nope"'),
        ("{", '"{"'),
        ('{"key": "k"} x', "body"),
        ("{'key': 'k'}", "body"),
        ('{"key": "k",}', "body"),
        ('{"key": "a\nb"}', "body"),
        ('{"key": "k", "x": NaN}', "body"),
        (b'{"key": "\xff"}', "body"),
        (b'{"key": "\xed\xa0\x80"}', "body"),
        ("[" * 60_000, "body"),
        ("null", "null"),
        ("[]", "[]"),
        ("4711", "4711"),
        ('"k"', "k"),
        ("{}", "key"),
        ('{"key": ""}', '""'),
        ('{"k\u0435y": "k"}', "key"),
        ('{"key": null}', "key"),
        ('{"key": 5}', "key: not a string: "),
        ('{"key": true}', "true"),
        ('{"Key": 5}', "key"),
        ('{"key": ["k"]}', "key"),
        ('{"key": %s}' % ("9" * 5000), "key"),
        ('{"key": "\\ud800"}', "ud800"),
        ('{"key": "a\\udc00\\ud800b"}', "key"),
        ('{"key": "k", "value": 5}', "value"),
        ('{"key": "k", "Key": ""}', "key"),
        ('{"key": "k", "value": {}}', "value"),
        ('{"key": "k", "value": "\\udfff"}', "value"),
        ('{"key": "k", "ttl": 60}', "x-lease-ttl"),
        ('{"key": "k", "TTL": "60s"}', "x-lease-ttl"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_any_other_body_is_400_and_says_why(daemon: Daemon, body: str | bytes, shown: str) -> None:
    answer = daemon.request("POST", "/lease", body.encode() if isinstance(body, str) else body)

    assert answer.status == 400
    one_line(answer, shown)


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"KEY": @, "VALUE": "v"}', "v"),
        ('{"Key": @, "Value": "v"}', "v"),
        ('{"key": @, "valu\u0435": "v"}', ""),
        ('{"key": @, "value": "a", "vaLue": "b"}', "b"),
        ('{"Value": "a", "value": "b", "kEY": @}', "b"),
        (
            '{"key": @, "labels": {"Value": "x"}, "Labels": [["value"]],'
            ' "timestamp": {"key": "x"}}',
            "",
        ),
    ],
)
def test_the_value_is_found_whatever_the_case_of_its_name(
    daemon: Daemon, key: str, text: str, value: str
) -> None:
    answer = daemon.request("POST", "/lease", text.replace("@", json.dumps(key)).encode())

    assert answer.status == 201
    assert json.loads(daemon.look(key).text)["value"] == value


def test_a_ttl_in_the_body_is_refused_and_names_the_header(daemon: Daemon, key: str) -> None:
    bodies = [{"key": key, "ttl": "60s"}, {"TTL": 60, "key": key}, {"key": key, "Ttl": None}]

    answers = [daemon.request("POST", "/lease", json.dumps(body)) for body in bodies]

    assert [answer.status for answer in answers] == [400] * 3
    one_line(answers[0], "ttl: ", "x-lease-ttl", "60s")
    assert daemon.look(key).status == 404


@pytest.mark.parametrize(
    "name", ["x-lease-tll", "X-Lease-Timeout", "x-lease-", "x-lease-id2", "X-LEASE-TTL-MS"]
)
def test_an_unknown_header_that_looks_like_ours_is_refused_and_the_known_are_listed(
    daemon: Daemon, key: str, name: str
) -> None:
    answer = daemon.acquire(key, **{name: "60s"})

    assert answer.status == 400
    one_line(answer, name.lower(), "x-lease-ttl", "x-lease-wait", "x-lease-id")
    assert daemon.look(key).status == 404


@pytest.mark.parametrize(
    "query, status", [("?ttl=60s", 400), ("?x", 400), ("?key=other", 400), ("?", 201)]
)
def test_a_query_when_asking_for_a_lock_is_refused_and_names_the_headers(
    daemon: Daemon, key: str, query: str, status: int
) -> None:
    answer = daemon.request("POST", "/lease" + query, lock_body(key))

    assert (answer.status, daemon.look(key).status) == (status, 200 if status == 201 else 404)
    assert status == 201 or f'"{query[1:]}"' in answer.text
    assert status == 201 or all(
        name in answer.text for name in ("x-lease-ttl", "x-lease-wait", "x-lease-id")
    )


@pytest.mark.parametrize("more", [{}, {"x-lease-wait": "100ms"}, {"x-lease-id": "4711"}])
def test_if_none_match_makes_the_refusal_a_failure(
    daemon: Daemon, key: str, more: dict[str, str]
) -> None:
    first = daemon.acquire(key, **{"If-None-Match": "*"})

    refusal = daemon.acquire(key, **{"If-None-Match": "*", **more})

    assert (first.status, refusal.status) == (201, 412)
    one_line(refusal, "held", key)
    assert first.text not in refusal.text + str(refusal.headers)
    assert daemon.token(key) == first.token


LEASE_ENDPOINTS = [("POST", "/keepalive"), ("DELETE", "/lease")]


@pytest.mark.parametrize("method, path", LEASE_ENDPOINTS)
def test_if_match_makes_a_lease_that_is_gone_a_failure(
    daemon: Daemon, key: str, method: str, path: str
) -> None:
    lease = daemon.acquire(key).text

    well = daemon.request(method, path, lease, {"If-Match": "*"})
    daemon.release(lease)
    gone = daemon.request(method, path, lease, {"If-Match": "*"})

    assert (well.status, gone.status) == (200, 412)
    one_line(gone, "gone", lease)


@pytest.mark.parametrize("given", ["", '"*"', "**", "W/*", "*, *", '"abc"'])
def test_a_precondition_that_is_not_a_star_is_refused_and_nothing_is_done(
    daemon: Daemon, key: str, given: str
) -> None:
    lease = daemon.acquire(key).text

    refusals = [daemon.acquire(key + " free", **{"If-None-Match": given})]
    refusals += [
        daemon.request(method, path, lease, {"If-Match": given}) for method, path in LEASE_ENDPOINTS
    ]

    assert [refusal.status for refusal in refusals] == [400] * 3
    for name, refusal in zip(("if-none-match", "if-match", "if-match"), refusals, strict=True):
        one_line(refusal, f"{name}: not *: ")
    assert [daemon.look(one).status for one in (key, key + " free")] == [200, 404]


@pytest.mark.parametrize("given", ["*", '"abc"'])
def test_a_precondition_that_would_be_ignored_is_refused_and_the_right_one_named(
    daemon: Daemon, key: str, given: str
) -> None:
    lease = daemon.acquire(key).text

    refusals = [daemon.acquire(key + " free", **{"If-Match": given})]
    refusals += [
        daemon.request(method, path, lease, {"If-None-Match": given})
        for method, path in LEASE_ENDPOINTS
    ]

    assert [refusal.status for refusal in refusals] == [400] * 3
    for refusal in refusals:
        one_line(refusal, "if-match", "if-none-match", "*")
    assert [daemon.look(one).status for one in (key, key + " free")] == [200, 404]


def sh_script(daemon: Daemon, key: str, folder: Path) -> str:
    """The script that everybody writes first; its work lasts until the file `end` is there."""
    post_lock = f"curl -sf {daemon.url}/lease -H 'If-None-Match: *' -d '{json.dumps({'key': key})}'"
    release = f'curl -s -X DELETE {daemon.url}/lease -d "$lease"'
    work = f"echo works; until [ -e {folder}/end ]; do sleep 0.05; done"
    return f"lease=$({post_lock}) || exit; trap '{release}' EXIT; {work}"


def test_of_five_natural_scripts_at_once_one_runs_and_keeps_its_lock(
    daemon: Daemon, tmp_path: Path
) -> None:
    script = sh_script(daemon, str(tmp_path), tmp_path)
    copies = [
        subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(5)
    ]

    eventually(lambda: sum(copy.poll() is not None for copy in copies) == 4)
    refused = {copy.returncode for copy in copies} - {None}
    token, second = daemon.token(str(tmp_path)), daemon.acquire(str(tmp_path)).status
    (tmp_path / "end").touch()
    said = sorted(copy.communicate(timeout=30)[0] for copy in copies)

    assert (refused, second) == ({22}, 202)
    assert (said, [copy.returncode for copy in copies].count(0)) == ([""] * 4 + ["works\n"], 1)
    assert daemon.acquire(str(tmp_path)).token > token


@pytest.mark.parametrize(
    "form", ["%d", " \t\r\n%d\n", '"%d"', '{"id": %d}', '{"id": "%d"}', ' {"x": [], "ID":%d} ']
)
def test_a_lease_id_is_taken_in_every_form(daemon: Daemon, key: str, form: str) -> None:
    lease = int(daemon.acquire(key, "50s").text)

    answers = (
        daemon.keep_alive(form % lease),
        daemon.release(form % lease),
        daemon.release(form % lease),
    )

    assert [answer.status for answer in answers] == [200, 200, 204]
    assert answers[0].headers["x-lease-ttl"] == "50s"


@pytest.mark.parametrize(
    "body, status",
    [
        *(
            (text, 204)
            for text in [
                "0",
                "1",
                "-1",
                "9223372036854775807",
                "-9223372036854775808",
                '"-9223372036854775808"',
                '{"id": 7}',
            ]
        ),
        *(
            (text, 400)
            for text in [
                "",
                " ",
                "x",
                "007",
                "+5",
                "5 5",
                '"5',
                "{",
                "0x5",
                "-",
                "5,",
                "NaN",
                "Infinity",
                "-Infinity",
                "[" * 60_000,
            ]
        ),
        *(
            (text, 500)
            for text in [
                "9223372036854775808",
                "-9223372036854775809",
                "9" * 30,
                "9" * 6000,
                '"9223372036854775808"',
                "5.0",
                "5e3",
                "true",
                "null",
                "[]",
                "[5]",
                "{}",
                '{"id": null}',
                '{"id": false}',
                '{"id": {"id": 5}}',
                '{"lease": 5}',
                '""',
                '"x"',
                '"5.0"',
                '"٣"',
                '"0x5"',
            ]
        ),
    ],
    ids=lambda value: ascii(value)[:40],
)
@pytest.mark.parametrize("method, path", [("POST", "/keepalive"), ("DELETE", "/lease")])
def test_what_is_no_living_lease_is_told_so(
    daemon: Daemon, method: str, path: str, body: str, status: int
) -> None:
    answer = daemon.request(method, path, body.encode())

    assert answer.status == status
    if status == 204:
        assert answer.body == b""
    else:
        one_line(answer, "body", body.strip()[:20].replace('"', '\\"'))


def free_lock(
    daemon: Daemon, key: str, match: str | None, query: str = "", body: str = ""
) -> Answer:
    """What an operator sends to free a lock; `match` as it stands in the header."""
    path = f"/lease?key={urllib.parse.quote(key, safe='')}{query}"
    return daemon.request(
        "DELETE", path, body or None, {} if match is None else {"If-Match": match}
    )


def test_an_operator_frees_a_lock_whose_token_it_knows(daemon: Daemon, key: str) -> None:
    holder = daemon.acquire(key + " ключ&", value="stuck")
    seen = daemon.look(key + " ключ&")

    freed = free_lock(daemon, key + " ключ&", seen.headers["etag"])

    assert freed.status == 200
    assert seen.headers["etag"] == f'"{holder.token}"'
    assert daemon.look(key + " ключ&").status == 404
    assert [daemon.keep_alive(holder.text).status, daemon.release(holder.text).status] == [204] * 2
    assert daemon.acquire(key + " ключ&").token > holder.token
    logged = [line for line in events(daemon) if line.get("token") == str(holder.token)]
    assert any(key in line["key"] and "client" in line for line in logged[1:])


@pytest.mark.parametrize("off", [-1, 1, 1000, None])
def test_a_holder_with_another_token_is_left_alone(
    daemon: Daemon, key: str, off: int | None
) -> None:
    holder = daemon.acquire(key)

    answer = free_lock(daemon, key, f'"{0 if off is None else holder.token + off}"')

    assert answer.status == 412
    one_line(answer, "token")
    assert holder.text not in answer.text
    assert daemon.keep_alive(holder.text).status == 200
    assert daemon.token(key) == holder.token


def test_the_log_tells_what_became_of_a_key_that_was_to_be_freed(start: Start, key: str) -> None:
    daemon = start("mock")
    token = daemon.acquire(key).headers["x-fencing-token"]

    for match in ("4711", token, token):
        free_lock(daemon, key, f'"{match}"')

    told = eventually(lambda: len(found := events(daemon, "freed", "not freed")) == 3 and found)
    assert {line["key"] for line in told} == {key}
    assert [(line["event"], line["token"], line["outcome"]) for line in told] == [
        ("not freed", "4711", "other holder"),
        ("freed", token, "freed"),
        ("not freed", token, "nothing"),
    ]


def test_a_free_key_is_204_to_who_frees_it(daemon: Daemon, key: str) -> None:
    lease = daemon.acquire(key)
    daemon.release(lease.text)

    answers = [free_lock(daemon, key, f'"{token}"') for token in (lease.token, 1, 0)]

    assert [(answer.status, answer.body) for answer in answers] == [(204, b"")] * 3


def test_who_frees_a_lock_must_say_whose(daemon: Daemon, key: str) -> None:
    holder = daemon.acquire(key)

    answers = [free_lock(daemon, one, None) for one in (key, key + " free")]

    assert [answer.status for answer in answers] == [428] * 2
    one_line(answers[0], "if-match")
    assert daemon.keep_alive(holder.text).status == 200


FORMS = ["*", "@", "W/'@'", "'@', '@'", "'@','1'", "'x'", "''", "", "'-1'", "'+@'", "'0x1'", "'@"]
FORMS += ["'1.0'", "'@ '", "'" + "9" * 30 + "'", "'٣'"]


@pytest.mark.parametrize("form", FORMS, ids=ascii)
def test_another_form_of_token_is_refused_and_nothing_is_done(
    daemon: Daemon, key: str, form: str
) -> None:
    holder = daemon.acquire(key)
    given = form.replace("'", '"').replace("@", str(holder.token)).encode()

    answer = talk(daemon, get(f"/lease?key={key}", b"If-Match: " + given, method="DELETE"))

    assert answer.status == 400
    one_line(answer, "if-match")
    assert daemon.keep_alive(holder.text).status == 200


def test_another_query_a_body_or_another_precondition_is_refused_and_nothing_is_done(
    daemon: Daemon, key: str
) -> None:
    holder = daemon.acquire(key)
    match = b'If-Match: "%d"' % holder.token

    answers = [
        free_lock(daemon, key, match[10:].decode(), more)
        for more in ("&x=1", "&prefix=", f"&key={key}", "&after=a", "&KEY=a")
    ]
    answers += [
        talk(daemon, get("/lease" + query, match, method="DELETE"))
        for query in ("?prefix=", "?key", "?key=", "?KEY=k", "?key=%ff", f"?prefix={key}", "?x=1")
    ]
    answers += [
        free_lock(daemon, key, match[10:].decode(), "", holder.text),
        talk(
            daemon,
            get(
                f"/lease?key={key}",
                match,
                b"Transfer-Encoding: chunked",
                method="DELETE",
            )
            + chunks(b"1"),
        ),
        talk(daemon, get(f"/lease?key={key}", match, b"If-None-Match: *", method="DELETE")),
    ]

    assert [answer.status for answer in answers] == [400] * len(answers)
    for answer in answers:
        one_line(answer)
    assert daemon.keep_alive(holder.text).status == 200


def test_a_key_without_a_lease_is_freed(on_etcd: Daemon, etcd: Etcd, key: str) -> None:
    etcd.put(b"/shared-lock/" + key.encode(), b"by hand")

    wrong = free_lock(on_etcd, key, f'"{on_etcd.token(key) + 1}"')
    freed = free_lock(on_etcd, key, f'"{on_etcd.token(key)}"')

    assert (wrong.status, freed.status, etcd.key(key)) == (412, 200, None)
    assert on_etcd.acquire(key).status == 201


@pytest.mark.parametrize(
    "foreign", [b"/registry/pods/", b"/shared-lock", b"/shared-locks/", b"\xff\x00"]
)
def test_a_lease_that_holds_something_of_another_tenant_lives_on_and_the_answer_says_so(
    on_etcd: Daemon, etcd: Etcd, key: str, foreign: bytes
) -> None:
    holder = on_etcd.acquire(key)
    etcd.put(foreign + key.encode(), b"theirs", int(holder.text))

    freed = free_lock(on_etcd, key, f'"{holder.token}"')

    assert freed.status == 200
    one_line(freed, "lives on")
    assert etcd.key(key) is None
    left = etcd.call("/lease/timetolive", {"ID": holder.text, "keys": True})
    assert [base64.b64decode(name) for name in left["keys"]] == [foreign + key.encode()]
    assert on_etcd.keep_alive(holder.text).status == 200
    assert on_etcd.acquire(key).token > holder.token


@pytest.mark.parametrize("cache", ["false", "true"])
def test_all_keys_of_the_lease_are_freed(etcd: Etcd, start: Start, key: str, cache: str) -> None:
    daemon = start(etcd.url, CACHE_ENABLED=cache)
    holder = daemon.acquire(key)
    etcd.put(b"/shared-lock/" + key.encode() + b" second", b"by hand", int(holder.text))
    refused = [daemon.acquire(one).status for one in (key, key + " second")]

    freed = free_lock(daemon, key, f'"{holder.token}"')

    assert (refused, freed.status) == ([202] * 2, 200)
    assert "lives on" not in freed.text
    assert int(holder.text) not in etcd.leases()
    assert daemon.keep_alive(holder.text).status == 204
    assert [daemon.acquire(one).status for one in (key, key + " second")] == [201] * 2


def test_a_release_of_a_lease_of_two_keys_leaves_neither_remembered(
    etcd: Etcd, start: Start, key: str
) -> None:
    daemon = start(etcd.url, CACHE_ENABLED="true")
    holder = daemon.acquire(key)
    etcd.put(b"/shared-lock/" + key.encode() + b" second", b"by hand", int(holder.text))
    refused = [daemon.acquire(one).status for one in (key, key + " second")]

    released = daemon.release(holder.text)

    assert (refused, released.status) == ([202] * 2, 200)
    assert [daemon.acquire(one).status for one in (key, key + " second")] == [201] * 2


@pytest.mark.parametrize("lost", ["drop-request", "drop-answer", "cut", "503"])
def test_to_free_a_lock_is_safe_to_repeat(
    proxy: Proxy, on_etcd: Daemon, start: Start, key: str, lost: str
) -> None:
    daemon, holder = start(proxy.url, ETCD_TIMEOUT="3s"), on_etcd.acquire(key)
    eventually(daemon.ready)
    proxy.rule = ("/v3/lease/revoke", lost, 1)

    answers = [free_lock(daemon, key, f'"{holder.token}"')]
    answers.append(free_lock(daemon, key, f'"{holder.token}"'))

    assert ("/v3/lease/revoke", lost) in proxy.seen
    assert answers[0].status in (200, 204, 500) and answers[1].status in (200, 204)
    assert (on_etcd.look(key).status, on_etcd.keep_alive(holder.text).status) == (404, 204)


def test_without_etcd_nobody_is_told_that_a_lock_is_free(start: Start) -> None:
    daemon = start(f"http://127.0.0.1:{free_port()}", ETCD_TIMEOUT="1s")

    answer = free_lock(daemon, "k", '"1"')

    assert answer.status == 500
    one_line(answer, "storage failed: ")


def test_a_holder_that_chose_its_lease_and_was_freed_gets_a_new_token(
    daemon: Daemon, key: str, lease_id: int
) -> None:
    first = acquire_as(daemon, lease_id, key)

    free_lock(daemon, key, f'"{first.token}"')
    second = acquire_as(daemon, lease_id, key)

    assert (second.status, second.text) == (201, first.text)
    assert second.token > first.token


def test_readers_are_told_the_token_as_etag(daemon: Daemon, key: str) -> None:
    token = daemon.acquire(key).token

    answers = [daemon.request(method, f"/lease?key={key}") for method in ("GET", "HEAD")]
    others = [daemon.request("GET", path) for path in ("/lease?prefix=no", "/lease?key=no")]

    assert [answer.headers["etag"] for answer in answers] == [f'"{token}"'] * 2
    assert not any("etag" in answer.headers for answer in others)


# A change: what is called NAME fails once, when a lock was granted.
FAILS_ONCE = """if True:
    real, failed = shared_lock.NAME, []
    def fail_once(*given, **named):
        if CONDITION and not failed:
            failed.append(1)
            raise ZeroDivisionError("injected")
        return real(*given, **named)
    shared_lock.NAME = fail_once"""
DEFECTS = {"event": '"granted" in given', "render": "given[0].status == 201"}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("wait", [{}, {"x-lease-wait": "20s"}])
@pytest.mark.parametrize("storage", ["mock", "etcd"])
def test_a_defect_after_a_grant_leaves_no_lock(
    etcd: Etcd, start: Start, key: str, name: str, wait: dict[str, str], storage: str
) -> None:
    change = FAILS_ONCE.replace("NAME", name).replace("CONDITION", DEFECTS[name])
    command = changed(after=change)
    daemon = start("mock" if storage == "mock" else etcd.url, command=command)
    before = etcd.leases()

    client = Talk(daemon, post(lock_body(key), *(f"{n}: {v}".encode() for n, v in wait.items())))
    said = client.rest() if name == "render" else b""
    answer = client.answer() if name == "event" else None

    assert b" 201 " not in said
    if answer:
        assert answer.status == 500
        one_line(answer)
        assert re.search("not acquired|outcome unknown", answer.text)
    assert "injected" in daemon.log()
    eventually(lambda: daemon.acquire(key).status == 201)
    assert storage == "mock" or len(etcd.leases() - before) <= 1


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_after_a_grant_leaves_the_lock_whose_lease_its_caller_chose(
    etcd: Etcd, start: Start, key: str, lease_id: int, name: str
) -> None:
    change = FAILS_ONCE.replace("NAME", name).replace("CONDITION", DEFECTS[name])
    daemon = start(etcd.url, command=changed(after=change))

    client = Talk(daemon, post(lock_body(key), b"x-lease-id: %d" % lease_id))
    said = client.rest() if name == "render" else client.answer().body
    again = acquire_as(daemon, lease_id, key)

    assert name == "render" or b"outcome unknown" in said
    assert (again.status, again.text) == (201, str(lease_id))
    assert daemon.token(key) == again.token


def test_waiting_works_on_a_platform_without_pollrdhup(start: Start, pool: Pool, key: str) -> None:
    daemon = start("mock", command=changed("import select; del select.POLLRDHUP"))
    lease = daemon.acquire(key).text
    waiter = pool.submit(daemon.acquire, key, **{"x-lease-wait": "50s"})
    short = daemon.acquire(key, **{"x-lease-wait": "300ms"})

    daemon.release(lease)

    assert (short.status, waiter.result(10).status) == (202, 201)


# == A lock over its life, on both storages ======================================================


def test_a_free_lock_is_granted_with_its_ttl_and_token(daemon: Daemon, key: str) -> None:
    answer = daemon.acquire(key, "90s")

    assert answer.status == 201
    assert re.fullmatch("[1-9][0-9]*", answer.text)
    assert int(answer.text) < 2**63
    assert answer.headers["x-lease-ttl"] == "90s"
    assert answer.token > 0


def test_a_refusal_never_tells_the_lease_of_the_holder(daemon: Daemon, key: str) -> None:
    lease = daemon.acquire(key).text

    refusal = daemon.acquire(key)

    assert (refusal.status, refusal.text) == (202, "0")
    assert lease not in str(refusal.headers)


def test_a_refused_script_that_cleans_up_after_itself_frees_nobodys_lock(
    daemon: Daemon, key: str
) -> None:
    holder = daemon.acquire(key)
    refused = daemon.acquire(key)

    answers = daemon.keep_alive(refused.body), daemon.release(refused.body)

    assert [answer.status for answer in answers] == [204, 204]
    assert (daemon.token(key), daemon.keep_alive(holder.text).status) == (holder.token, 200)


def test_the_key_stands_in_etcd_as_the_go_service_writes_it(
    on_etcd: Daemon, etcd: Etcd, key: str
) -> None:
    answer = on_etcd.acquire(key, value="von Ä bis 🔒")

    value = "von Ä bis 🔒".encode()
    assert etcd.key(key) == {
        "create_revision": answer.token,
        "lease": int(answer.text),
        "value": value,
    }


@pytest.mark.parametrize(
    "name",
    [
        "ключ",
        "🔒",
        " ",
        "\n\r\t",
        "\0",
        "../x//y",
        "\"'\\te\n",
        "%2F+&=#?",
        "100%",
        "a b&c=d#e",
        "\u2028\x85",
        "\U0010ffff\ufffe",
        "x" * 10_000,
        "/shared-lock/",
    ],
    ids=ascii,
)
def test_any_unicode_text_is_a_key(daemon: Daemon, key: str, name: str) -> None:
    mine = key + name

    answers = daemon.acquire(mine), daemon.acquire(mine), daemon.acquire(key)
    free = daemon.look(mine + "x")

    assert [answer.status for answer in answers] == [201, 202, 201]
    assert json.loads(daemon.look(mine).text)["key"] == mine
    assert free.status == 404
    one_line(free, f"key: free: {shared_lock.quote(mine + 'x')}")


def test_keepalive_keeps_a_lock_past_its_ttl(daemon: Daemon, key: str) -> None:
    grant = daemon.acquire(key, "2s")
    ends = time.monotonic() + 3.2

    while time.monotonic() < ends:
        renewal = daemon.keep_alive(grant.text)
        assert (renewal.status, renewal.headers.get("x-lease-ttl")) == (200, "2s")
        time.sleep(0.4)

    assert (daemon.acquire(key).status, daemon.token(key)) == (202, grant.token)


def test_a_lock_is_free_again_soon_after_its_holder_stops(daemon: Daemon, key: str) -> None:
    first = daemon.acquire(key, "1s")

    second = eventually(lambda: (answer := daemon.acquire(key)).status == 201 and answer)

    assert second.text != first.text
    assert (daemon.keep_alive(first.text).status, daemon.release(first.text).status) == (204, 204)
    assert daemon.token(key) == second.token


def test_the_ttl_in_the_answer_is_the_granted_one(daemon: Daemon, key: str) -> None:
    answer = daemon.acquire(key, "1s")

    granted = "1s" if "storage=mock" in daemon.log() else "2s"
    assert answer.headers["x-lease-ttl"] == granted
    assert f"{json.loads(daemon.look(key).text)['granted_ttl']}s" == granted
    assert daemon.keep_alive(answer.text).headers["x-lease-ttl"] == granted


def test_a_release_frees_the_lock_at_once_and_only_once(daemon: Daemon, key: str) -> None:
    lease = daemon.acquire(key).text

    assert (daemon.release(lease).status, daemon.look(key).status, daemon.acquire(key).status) == (
        200,
        404,
        201,
    )

    assert (
        daemon.release(lease).status,
        daemon.keep_alive(lease).status,
        daemon.look(key).status,
    ) == (204, 204, 200)


def test_the_fencing_token_is_constant_while_held_and_larger_for_the_next(
    daemon: Daemon, key: str
) -> None:
    first = daemon.acquire(key)
    daemon.keep_alive(first.text)
    daemon.acquire(key)
    daemon.acquire(key + " another")
    while_held = daemon.token(key)
    daemon.release(first.text)

    second = daemon.acquire(key)

    assert while_held == first.token
    assert second.token > first.token


@pytest.mark.parametrize("storage", ["mock", "etcd"])
def test_of_many_racing_clients_only_one_a_key_gets_a_lease(
    own_etcd: Etcd, start: Start, key: str, storage: str
) -> None:
    daemon = start("mock" if storage == "mock" else own_etcd.url, ETCD_TIMEOUT="20s")

    answers = [
        answer for _, answer in together(150, lambda number: daemon.acquire(f"{key} {number % 40}"))
    ]

    granted = [answer for answer in answers if answer.status == 201]
    assert collections.Counter(answer.status for answer in answers) == {201: 40, 202: 110}
    assert {daemon.token(f"{key} {number}") for number in range(40)} == {
        answer.token for answer in granted
    }
    assert own_etcd.leases() == (
        {int(answer.text) for answer in granted} if storage == "etcd" else set()
    )


def test_a_key_without_a_lease_counts_as_held(on_etcd: Daemon, etcd: Etcd, key: str) -> None:
    etcd.put(b"/shared-lock/" + key.encode(), b"by hand")

    refusal = on_etcd.acquire(key)
    seen = json.loads(on_etcd.look(key).text)

    assert (refusal.status, refusal.text) == (202, "0")
    assert seen.pop("fencing_token") > 0
    assert seen == {"key": key, "value": "by hand", "ttl": None, "granted_ttl": None}


@pytest.mark.parametrize(
    "foreign", [b"/registry/pods/", b"/shared-lock", b"/shared-locks/", b"\xff\x00"]
)
def test_a_lease_without_keys_or_with_foreign_ones_is_never_ended(
    on_etcd: Daemon, etcd: Etcd, key: str, foreign: bytes
) -> None:
    mixed, theirs, empty = (
        on_etcd.acquire(key).text,
        *(etcd.call("/lease/grant", {"TTL": 60})["ID"] for _ in "ab"),
    )
    for lease in (mixed, theirs):
        etcd.put(foreign + lease.encode(), b"theirs", int(lease))

    assert [on_etcd.release(lease).status for lease in (mixed, theirs, empty)] == [204] * 3

    assert {int(mixed), int(theirs), int(empty)} <= etcd.leases()
    assert on_etcd.acquire(key).status == 202


def test_the_holder_of_a_lock_is_shown_without_its_lease(daemon: Daemon, key: str) -> None:
    grant = daemon.acquire(key, "90s", value='pod "7" of Ä')

    answer = daemon.look(key)

    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    seen = json.loads(answer.text)
    assert seen.pop("ttl") in range(85, 91)
    assert seen == {
        "key": key,
        "value": 'pod "7" of Ä',
        "granted_ttl": 90,
        "fencing_token": grant.token,
    }
    assert grant.text not in answer.text + str(answer.headers)


def test_a_key_in_the_query_may_stand_there_as_curl_sends_it(daemon: Daemon, key: str) -> None:
    daemon.acquire(key + "ключ")

    answer = talk(daemon, get(f"/lease?key={key}ключ"))

    assert (answer.status, json.loads(answer.body)["key"]) == (200, key + "ключ")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?",
        "?key",
        "?key=",
        "?KEY=x",
        "?lease=1",
        "?key=%ff",
        "?key=%ED%A0%80",
        "?PREFIX=x",
        "?prefix=%ff",
        "?prefix=%ED%A0%80",
        "?key=k&prefix=k",
        "?prefix=&key=k",
        "?key=&prefix=k",
    ],
)
def test_to_look_without_a_key_or_a_prefix_that_is_text_is_a_bad_request(
    daemon: Daemon, query: str
) -> None:
    answer = daemon.request("GET", "/lease" + query)

    assert answer.status == 400
    one_line(answer)


def listed(daemon: Daemon, prefix: str) -> list[dict[str, Any]]:
    """The lines of a list of locks."""
    answer = daemon.request("GET", "/lease?prefix=" + urllib.parse.quote(prefix, safe=""))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    assert not answer.text or answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.split("\n")[:-1]]


def test_a_prefix_lists_its_locks_sorted_and_without_their_leases(daemon: Daemon, key: str) -> None:
    names = [f"{key}/{name}" for name in ("b", "", "a/b", "é", "a", "ab")]
    grants = {name: daemon.acquire(name, value=f"held by {name}\n🔒") for name in names}
    gone, *_ = daemon.acquire(f"{key}/gone").text, daemon.acquire(key), daemon.acquire(f"{key}0")
    daemon.release(gone)

    lines = listed(daemon, f"{key}/")

    assert lines == [
        {"key": name, "value": f"held by {name}\n🔒", "fencing_token": grants[name].token}
        for name in sorted(names)
    ]
    assert listed(daemon, f"{key}/a") == [
        line for line in lines if line["key"].startswith(f"{key}/a")
    ]
    assert listed(daemon, f"{key}/x") == []


@pytest.mark.parametrize(
    "end", ["\x7f", "\0", "\n", "ключ", "\u07ff", "\ud7ff", "\uffff", "🔒", "\U0010ffff"], ids=ascii
)
def test_any_text_is_a_prefix_and_the_order_is_that_of_unicode(
    daemon: Daemon, key: str, end: str
) -> None:
    names = [
        key + end + more
        for more in ("", "\x7f", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff")
    ]
    for name in (*reversed(names), key + chr(max(0, ord(end[0]) - 1)), key):
        daemon.acquire(name)

    assert [line["key"] for line in listed(daemon, key + end)] == names


@pytest.mark.parametrize("storage", ["mock", "etcd"])
def test_an_empty_prefix_lists_all_locks_and_nothing_of_other_tenants(
    own_etcd: Etcd, start: Start, storage: str
) -> None:
    daemon = start(storage if storage == "mock" else own_etcd.url)
    by_hand = ["by hand"] if storage == "etcd" else []
    for foreign in (b"/shared-lock", b"/shared-lock0", b"/registry/pods/", b"\xff", b"a"):
        own_etcd.put(foreign, b"theirs")
    own_etcd.put(b"/shared-lock/by hand")

    assert [line["key"] for line in listed(daemon, "")] == by_hand
    for name in ("\0", "/shared-lock/k", "🔒", "k"):
        daemon.acquire(name)

    assert [line["key"] for line in listed(daemon, "")] == [
        "\0",
        "/shared-lock/k",
        *by_hand,
        "k",
        "🔒",
    ]


def test_a_list_costs_etcd_one_read(on_etcd: Daemon, start: Start, proxy: Proxy, key: str) -> None:
    daemon, names = start(proxy.url), [f"{key}-{number}" for number in range(3)]
    for name in names:
        on_etcd.acquire(name)

    lines = listed(daemon, key)

    assert [line["key"] for line in lines] == names
    assert proxy.seen == [("/v3/kv/range", "")]


def fill(etcd: Etcd, locks: dict[bytes, bytes]) -> None:
    """Puts all these keys of ours, some MiB at a time."""
    puts: list[Any] = []
    size = 0
    for name, value in locks.items():
        encoded = [base64.b64encode(one).decode() for one in (b"/shared-lock/" + name, value)]
        puts.append({"request_put": {"key": encoded[0], "value": encoded[1]}})
        size += len(value)
        if size + len(value) > 1 << 20 or len(puts) == 100:
            etcd.call("/kv/txn", {"success": puts}, 30)
            puts, size = [], 0
    if puts:
        etcd.call("/kv/txn", {"success": puts}, 30)


def pages(daemon: Daemon, prefix: str) -> list[list[dict[str, Any]]]:
    """The pages of a list, in order, as a caller reads them."""
    found: list[list[dict[str, Any]]] = []
    query = "prefix=" + urllib.parse.quote(prefix, safe="")
    while True:
        after = ""
        if found:
            after = "&after=" + urllib.parse.quote(found[-1][-1]["key"], safe="")
        answer = daemon.request("GET", f"/lease?{query}{after}")
        assert answer.status == 200, answer
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.text.split("\n")[:-1]]
        more = lines[-1:] == [{"more": True}]
        found.append(lines[: len(lines) - more])
        assert len(found[-1]) <= 1000 and len(found) < 1000
        if not more:
            return found
        assert found[-1], "a page without a lock has no more"


def healthy(daemon: Daemon, *etcds: Etcd) -> bool:
    """No member was blamed for anything."""
    page = metrics(daemon)
    errors, up = page[MEMBER_ERRORS].values(), page[MEMBER_UP].values()
    return set(errors) == {0} and set(up) == {1} and not events(daemon, "etcd member failed")


@pytest.mark.parametrize("count", [999, 1000, 1001, 2500])
def test_a_long_list_comes_in_pages_of_a_thousand(own_etcd: Etcd, start: Start, count: int) -> None:
    names = [f"k{number:04}" for number in range(count)]
    fill(own_etcd, {name.encode(): b"v" for name in (*names, "a", "l")})
    daemon = start(own_etcd.url)

    found = pages(daemon, "k")

    sizes = [len(page) for page in found]
    assert sizes == [1000] * (count // 1000) + [count % 1000] * (count % 1000 > 0)
    assert [line["key"] for page in found for line in page] == names


@pytest.mark.parametrize(
    "count, size",
    [(400, 60_000), (800, 30_000), (20, 1_400_000), (9, 1_400_000)],
    ids=lambda value: str(value),
)
def test_a_list_of_large_values_comes_whole_in_smaller_pages(
    own_etcd: Etcd, start: Start, count: int, size: int
) -> None:
    names = [f"k{number:04}" for number in range(count)]
    fill(own_etcd, {name.encode(): name.encode() * (size // len(name)) for name in names})
    daemon = start(own_etcd.url)
    eventually(daemon.ready)

    found = pages(daemon, "k")

    lines = [line for page in found for line in page]
    assert [line["key"] for line in lines] == names
    assert all(line["value"] == line["key"] * (size // 5) for line in lines)
    assert healthy(daemon)


def test_a_page_is_small_in_json_too_where_each_character_takes_six(
    daemon: Daemon, key: str
) -> None:
    names = [f"{key}-{number}" for number in range(10)]
    for name in names:
        assert daemon.acquire(name, value="\x01" * 10_000).status == 201

    found = list[str]()
    while len(found) < len(names):
        after = f"&after={found[-1]}" if found else ""
        page = daemon.request("GET", f"/lease?prefix={key}-{after}").text
        lines = [json.loads(line) for line in page.splitlines()]
        assert len(page) < 256 << 10
        locks = [line for line in lines if "key" in line]
        assert all(lock["value"] == "\x01" * 10_000 for lock in locks)
        found += [lock["key"] for lock in locks]
        assert (lines[-1] == {"more": True}) == (len(found) < len(names))

    assert found == names


def test_large_values_among_small_ones_lose_no_lock(own_etcd: Etcd, start: Start) -> None:
    locks = {b"k%04d" % number: b"v" for number in range(1500)}
    locks |= {b"k%04d" % number: b"V" * 1_400_000 for number in range(600, 614)}
    fill(own_etcd, locks)
    daemon = start(own_etcd.url)

    found = pages(daemon, "")

    assert [line["key"].encode() for page in found for line in page] == sorted(locks)
    assert healthy(daemon)


def test_many_readers_of_a_large_list_make_no_member_look_sick(
    own_etcd: Etcd, start: Start, key: str, pool: Pool
) -> None:
    fill(own_etcd, {b"k%04d" % number: b"v" * 60_000 for number in range(350)})
    daemon = start(own_etcd.url)
    lease = daemon.acquire("held").text

    readers = [pool.submit(pages, daemon, "k") for _ in range(8)]
    kept = []
    while not all(reader.done() for reader in readers):
        kept.append(daemon.keep_alive(lease).status)

    assert {sum(map(len, reader.result())) for reader in readers} == {350}
    assert set(kept) == {200}
    assert healthy(daemon)


@pytest.mark.parametrize("ends", [b"\xff", b"\xed\xa0\x80", b"\xc3"])
def test_keys_that_are_not_utf8_are_left_out_and_the_list_goes_on(
    own_etcd: Etcd, start: Start, ends: bytes
) -> None:
    strange = {b"k" + ends + b"%04d" % number: b"v" for number in range(1500)}
    fill(own_etcd, strange | {b"k": b"", b"ka": b"", b"k\xf4\x8f\xbf\xbf": b"", b"kz": b""})
    daemon = start(own_etcd.url)

    found = pages(daemon, "k")

    assert [line["key"] for page in found for line in page] == ["k", "ka", "kz", "k\U0010ffff"]


def test_a_list_goes_on_behind_a_lock_that_is_gone(daemon: Daemon, key: str) -> None:
    grants = {f"{key}/{name}": daemon.acquire(f"{key}/{name}") for name in "abd"}
    path = f"/lease?prefix={key}/&after={key}"

    daemon.release(grants[f"{key}/b"].text)
    answers = [daemon.request("GET", f"{path}/{name}") for name in ("", "a", "b", "c", "d", "b%00")]

    ends = [
        [json.loads(line)["key"][-1] for line in answer.text.splitlines()] for answer in answers
    ]
    assert ends == [["a", "d"], ["d"], ["d"], ["d"], [], ["d"]]


@pytest.mark.parametrize(
    "query",
    [
        "after=k",
        "after=",
        "prefix=k&after=j",
        "prefix=k&after=l",
        "prefix=k&after=",
        "prefix=k&after=K",
        "prefix=k&after=k%ff",
        "prefix=k&after=k&after=k",
        "key=k&after=k",
        "prefix=k&key=k&after=k",
        "prefix=k&after=k&more=true",
        "prefix=k&After=k",
    ],
)
def test_a_page_that_cannot_be_meant_is_a_bad_request(daemon: Daemon, query: str) -> None:
    answer = daemon.request("GET", f"/lease?{query}")

    assert answer.status == 400
    one_line(answer)


def test_a_query_of_many_names_is_refused_before_it_is_taken_apart(on_memory: Daemon) -> None:
    answer = on_memory.request("GET", "/lease?" + "a&" * 30_000)

    assert answer.status == 400
    one_line(answer, "query: ", "too many names")


@pytest.mark.parametrize("storage", ["mock", "etcd"])
def test_a_list_ends_after_a_thousand_locks_and_tells_that_there_are_more(
    own_etcd: Etcd, start: Start, storage: str
) -> None:
    daemon = start(storage if storage == "mock" else own_etcd.url)
    names = [f"k{number:04}" for number in range(1000)]
    client = Talk(daemon)
    for at in range(0, 1000, 100):
        client.say(
            b"".join(post(lock_body(name), b"x-lease-ttl: 1h") for name in names[at : at + 100])
        )
        assert {client.answer().status for _ in range(100)} == {201}

    exactly = listed(daemon, "k")
    daemon.acquire("k")
    more = listed(daemon, "k")

    assert [line.get("key") for line in exactly] == names
    assert [line["key"] for line in more[:-1]] == ["k", *names[:-1]]
    assert more[-1] == {"more": True}


def test_an_id_that_the_daemon_picks_is_a_number_that_javascript_keeps(
    daemon: Daemon, key: str
) -> None:
    leases = [int(daemon.acquire(f"{key}-{number}").text) for number in range(30)]

    assert len(set(leases)) == 30
    assert max(leases) < 2**53


EXISTS = '{"error":"etcdserver: lease already exists","code":9,'
EXISTS += '"message":"etcdserver: lease already exists"}'


def test_for_an_id_that_is_somebody_elses_a_new_one_is_drawn(
    proxy: Proxy, etcd: Etcd, start: Start, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Proxy.OWN_ANSWERS, "exists", EXISTS)
    daemon = start(proxy.url)
    eventually(daemon.ready)
    before = etcd.leases()
    proxy.rule = ("/v3/lease/grant", "exists", 2)

    answer = daemon.acquire(key)

    assert answer.status == 201
    assert proxy.seen.count(("/v3/lease/grant", "exists")) == 2
    assert etcd.leases() - before >= {int(answer.text)}
    assert not events(daemon, "etcd member failed")


def test_an_id_that_exists_since_its_answer_was_lost_is_ours(
    proxy: Proxy, etcd: Etcd, start: Start, key: str
) -> None:
    daemon = start(proxy.url)
    eventually(daemon.ready)
    before = etcd.leases()
    proxy.rule = ("/v3/lease/grant", "drop-answer", 1)

    answer = daemon.acquire(key)

    assert answer.status == 201
    assert ("/v3/lease/grant", "drop-answer") in proxy.seen
    assert int(answer.text) in etcd.leases() - before


# == Asking again: x-lease-id ====================================================================


@pytest.mark.parametrize(
    "text", ["0", "-1", "9223372036854775808", "x", "", "5.0", "+5", "0x5", "5 5", "5, 5", "٣"]
)
def test_a_lease_id_that_is_no_positive_int64_is_400_and_shown(
    daemon: Daemon, key: str, text: str
) -> None:
    answer = talk(daemon, post(lock_body(key), f"X-Lease-ID: {text}".encode()))

    assert answer.status == 400
    one_line(answer, "x-lease-id: not ", f'"{text}"')
    assert daemon.look(key).status == 404


@pytest.mark.parametrize("text", ["1", "9223372036854775807", "0000000000000004711"])
def test_the_smallest_and_the_largest_lease_id_are_used(
    daemon: Daemon, key: str, text: str
) -> None:
    answers = [acquire_as(daemon, int(text), key), daemon.acquire(key, **{"x-lease-id": text})]

    assert [(answer.status, int(answer.text)) for answer in answers] == [(201, int(text))] * 2
    assert daemon.release(text.lstrip("0")).status == 200


def test_the_same_request_again_is_answered_alike_and_starts_the_ttl_again(
    daemon: Daemon, key: str, lease_id: int
) -> None:
    first = acquire_as(daemon, lease_id, key, "2s")
    ends = time.monotonic() + 3.2

    while time.monotonic() < ends:
        again = acquire_as(daemon, lease_id, key, "2s")
        assert (again.status, again.body, again.token) == (201, first.body, first.token)
        time.sleep(0.4)

    assert first.text == str(lease_id)
    assert (daemon.acquire(key).status, daemon.token(key)) == (202, first.token)


def test_another_ttl_the_second_time_leaves_the_first_and_tells_it(
    daemon: Daemon, key: str, lease_id: int
) -> None:
    first = acquire_as(daemon, lease_id, key, "50s")

    others = [acquire_as(daemon, lease_id, key, ttl) for ttl in ("90s", "5s")]

    assert {(answer.status, answer.headers["x-lease-ttl"]) for answer in (first, *others)} == {
        (201, "50s")
    }
    assert json.loads(daemon.look(key).text)["granted_ttl"] == 50


def test_another_replica_and_one_after_a_restart_answer_alike(
    on_etcd: Daemon, etcd: Etcd, start: Start, key: str, lease_id: int
) -> None:
    first, before = acquire_as(on_etcd, lease_id, key), etcd.leases()
    other = start(etcd.url)

    answers = [acquire_as(other, lease_id, key)]
    other.stop()
    answers.append(acquire_as(start(etcd.url), lease_id, key))

    assert [(answer.status, answer.body, answer.token) for answer in answers] == [
        (201, first.body, first.token)
    ] * 2
    assert etcd.leases() <= before


@pytest.mark.parametrize("storage", ["mock", "etcd"])
@pytest.mark.parametrize("more", [{}, {"x-lease-wait": "5s"}])
@pytest.mark.parametrize("cache", ["false", "true"])
def test_of_twenty_copies_at_once_all_get_the_one_lock(
    own_etcd: Etcd,
    start: Start,
    key: str,
    lease_id: int,
    storage: str,
    more: dict[str, str],
    cache: str,
) -> None:
    daemon = start("mock" if storage == "mock" else own_etcd.url, CACHE_ENABLED=cache)

    answers = [
        answer for _, answer in together(20, lambda _: acquire_as(daemon, lease_id, key, **more))
    ]

    assert {(answer.status, answer.text) for answer in answers} == {(201, str(lease_id))}
    assert {answer.token for answer in answers} == {daemon.token(key)}
    assert own_etcd.leases() == ({lease_id} if storage == "etcd" else set())


@pytest.mark.parametrize("storage", ["mock", "etcd"])
def test_of_many_that_race_with_ids_of_their_own_one_wins(
    own_etcd: Etcd, start: Start, key: str, storage: str
) -> None:
    daemon = start("mock" if storage == "mock" else own_etcd.url)
    lease_ids = [random.randrange(1, 2**63) for _ in range(20)]

    answers = [
        answer
        for _, answer in together(20, lambda number: acquire_as(daemon, lease_ids[number], key))
    ]

    [winner] = [answer for answer in answers if answer.status == 201]
    assert {answer.text for answer in answers if answer.status == 202} == {"0"}
    assert int(winner.text) in lease_ids and winner.token == daemon.token(key)
    assert own_etcd.leases() <= set(lease_ids)


@pytest.mark.parametrize("made_before", [False, True])
def test_a_loser_leaves_the_lease_that_its_caller_chose_and_asks_again_with_it(
    on_etcd: Daemon,
    etcd: Etcd,
    proxy: Proxy,
    start: Start,
    key: str,
    lease_id: int,
    pool: Pool,
    made_before: bool,
) -> None:
    daemon = start(proxy.url)
    if made_before:
        etcd.call("/lease/grant", {"ID": lease_id, "TTL": 60})

    proxy.rule = ("/v3/kv/txn", "stop", 1)
    loser = pool.submit(acquire_as, daemon, lease_id, key)
    eventually(lambda: ("/v3/kv/txn", "stop") in proxy.seen)
    winner = on_etcd.acquire(key)
    proxy.go_on.set()

    assert (winner.status, loser.result(10).status) == (201, 202)
    assert on_etcd.token(key) == winner.token
    assert lease_id in etcd.leases()
    on_etcd.release(winner.text)
    assert acquire_as(daemon, lease_id, key).token > winner.token


def test_a_losers_clean_up_that_comes_late_takes_no_lock_from_its_repetition(
    on_etcd: Daemon, proxy: Proxy, start: Start, key: str, lease_id: int, pool: Pool
) -> None:
    daemon = start(proxy.url)
    proxy.rules(("/v3/kv/txn", "hold", 1), ("/v3/lease/revoke", "stop", 1))
    loser = pool.submit(acquire_as, daemon, lease_id, key)
    eventually(lambda: ("/v3/kv/txn", "hold") in proxy.seen)
    winner = on_etcd.acquire(key).text
    assert eventually(lambda: ("/v3/lease/revoke", "stop") in proxy.seen or loser.done())

    on_etcd.release(winner)
    repetition = acquire_as(on_etcd, lease_id, key)
    proxy.go_on.set()

    assert (loser.result(10).status, repetition.status) == (202, 201)
    assert on_etcd.keep_alive(repetition.text).status == 200
    assert on_etcd.token(key) == repetition.token


def test_with_a_wait_each_copy_gets_the_lock_when_it_is_released(
    daemon: Daemon, key: str, lease_id: int, pool: Pool
) -> None:
    holder = daemon.acquire(key)
    copies = [
        pool.submit(acquire_as, daemon, lease_id, key, **{"x-lease-wait": "50s"}) for _ in range(3)
    ]
    assert not wait_for_any(copies, 0.5, FIRST_COMPLETED).done

    daemon.release(holder.text)

    answers = [copy.result(10) for copy in copies]
    assert {(answer.status, answer.text) for answer in answers} == {(201, str(lease_id))}
    assert {answer.token for answer in answers} == {daemon.token(key)}


@pytest.mark.parametrize("storage", ["mock", "etcd"])
@pytest.mark.parametrize("taken_here", [True, False])
def test_the_cache_never_refuses_a_caller_its_own_lock(
    on_etcd: Daemon,
    etcd: Etcd,
    start: Start,
    key: str,
    lease_id: int,
    storage: str,
    taken_here: bool,
) -> None:
    cached = start("mock" if storage == "mock" else etcd.url, CACHE_ENABLED="true")
    first = acquire_as(on_etcd if storage == "etcd" and not taken_here else cached, lease_id, key)
    refusals = [cached.acquire(key).status for _ in range(3)]

    again = acquire_as(cached, lease_id, key)

    assert refusals == [202] * 3
    assert (again.status, again.body, again.token) == (201, first.body, first.token)
    assert acquire_as(cached, lease_id + 1 if lease_id == 1 else lease_id - 1, key).status == 202
    assert cached.release(again.text).status == 200
    assert cached.acquire(key).status == 201


def test_a_precondition_never_refuses_a_caller_its_own_lock(
    daemon: Daemon, key: str, lease_id: int
) -> None:
    first, again = (acquire_as(daemon, lease_id, key, **{"If-None-Match": "*"}) for _ in "ab")

    assert (first.status, again.status, again.token) == (201, 201, first.token)


def test_after_its_release_or_its_end_an_id_takes_the_lock_anew(
    daemon: Daemon, key: str, lease_id: int
) -> None:
    first = acquire_as(daemon, lease_id, key)
    daemon.release(first.text)

    second = acquire_as(daemon, lease_id, key, "1s")
    third = eventually(lambda: (answer := daemon.acquire(key)).status == 201 and answer)
    late = acquire_as(daemon, lease_id, key)

    assert (second.status, late.status, late.text) == (201, 202, "0")
    assert first.token < second.token < third.token == daemon.token(key)


def test_a_lease_without_a_key_is_used(
    on_etcd: Daemon, etcd: Etcd, key: str, lease_id: int
) -> None:
    etcd.call("/lease/grant", {"ID": lease_id, "TTL": 70})
    before = etcd.leases()

    answer = acquire_as(on_etcd, lease_id, key, "60s")

    assert (answer.status, answer.text, answer.headers["x-lease-ttl"]) == (
        201,
        str(lease_id),
        "70s",
    )
    assert etcd.key(key) == {"create_revision": answer.token, "lease": lease_id, "value": b""}
    assert etcd.leases() <= before


def test_a_lease_that_holds_another_lock_is_409_and_untouched(
    daemon: Daemon, key: str, lease_id: int
) -> None:
    first = acquire_as(daemon, lease_id, key + " first")

    answer = acquire_as(daemon, lease_id, key)
    waited = acquire_as(daemon, lease_id, key, **{"x-lease-wait": "5s"})

    assert (answer.status, waited.status) == (409, 409)
    one_line(answer, f"x-lease-id: in use for something else: {lease_id}")
    assert (daemon.look(key).status, daemon.token(key + " first")) == (404, first.token)
    assert acquire_as(daemon, lease_id, key + " first").token == first.token


@pytest.mark.parametrize(
    "foreign", [b"/registry/pods/", b"/shared-lock", b"/shared-locks/", b"\xff\x00"]
)
def test_a_lease_of_another_tenant_is_409_and_untouched(
    on_etcd: Daemon, etcd: Etcd, key: str, lease_id: int, foreign: bytes
) -> None:
    etcd.call("/lease/grant", {"ID": lease_id, "TTL": 60})
    etcd.put(foreign + key.encode(), b"theirs", lease_id)

    answer = acquire_as(on_etcd, lease_id, key)

    assert answer.status == 409
    one_line(answer, str(lease_id))
    seen = etcd.call("/lease/timetolive", {"ID": lease_id, "keys": True})
    assert [base64.b64decode(name) for name in seen["keys"]] == [foreign + key.encode()]
    assert on_etcd.look(key).status == 404


# == Waiting for a lock ==========================================================================


def gauge(daemon: Daemon, name: str) -> float:
    """The value of a metric without labels; nan where the page has none of this name."""
    page = parse_metrics(daemon.request("GET", "/metrics").text)
    return page.get(f"shared_lock_{name}", {}).get(frozenset(), math.nan)


def waiters(
    pool: Pool, daemon: Daemon, key: str, count: int = 1, wait: str = "50s"
) -> list[Future[Answer]]:
    """So many more callers in line for a lock that is held."""
    before = gauge(daemon, "waiting")
    headers = {"x-lease-wait": wait}
    line = [pool.submit(daemon.acquire, key, **headers) for _ in range(count)]
    eventually(lambda: gauge(daemon, "waiting") == before + count)
    return line


def send_waiting(daemon: Daemon, key: str) -> Talk:
    """A waiting caller that only has sent its request."""
    return Talk(daemon, post(lock_body(key), b"x-lease-wait: 60s"))


def reads(etcd: Etcd) -> int:
    """How many ranges this etcd has read, those in transactions among them."""
    page = parse_metrics(ask(etcd.port, "GET", "/metrics").text)
    names = ("etcd_mvcc_range_total", "etcd_debugging_mvcc_range_total")
    return int(max(page.get(name, {}).get(frozenset(), 0) for name in names))


def test_a_waiter_is_served_when_the_lock_is_released(daemon: Daemon, key: str, pool: Pool) -> None:
    holder = daemon.acquire(key)
    [waiter] = waiters(pool, daemon, key)

    daemon.release(holder.text)

    answer = waiter.result(3)
    assert (answer.status, answer.headers["x-lease-ttl"]) == (201, "60s")
    assert daemon.token(key) == answer.token > holder.token


def test_a_waiter_is_served_by_any_replica(
    on_etcd: Daemon, etcd: Etcd, key: str, start: Start, pool: Pool
) -> None:
    lease = on_etcd.acquire(key).text
    [waiter] = waiters(pool, start(etcd.url), key)

    on_etcd.release(lease)

    assert waiter.result(4).status == 201


def test_a_waiter_is_served_when_the_lock_expires(daemon: Daemon, key: str, pool: Pool) -> None:
    daemon.acquire(key, "1s")

    [waiter] = waiters(pool, daemon, key)

    assert waiter.result(10).status == 201


def test_a_waiter_whose_time_is_up_is_refused(daemon: Daemon, key: str) -> None:
    daemon.acquire(key)
    started = time.monotonic()

    answer = daemon.acquire(key, **{"x-lease-wait": "700ms"})

    assert (answer.status, answer.text) == (202, "0")
    assert time.monotonic() - started >= 0.7


def test_a_line_is_served_in_its_order(daemon: Daemon, key: str, pool: Pool) -> None:
    lease = daemon.acquire(key).text
    line = [waiters(pool, daemon, key)[0] for _ in range(6)]

    for waiter in line:
        daemon.release(lease)
        answer = waiter.result(5)  # who is overtaken waits here for ever: nobody else releases
        assert answer.status == 201
        lease = answer.text

    daemon.release(lease)


def test_who_wants_to_wait_joins_the_line_even_in_the_moment_when_the_lock_is_free(
    on_etcd: Daemon, etcd: Etcd, key: str, pool: Pool
) -> None:
    for number in range(5):
        name = f"{key}-{number}"
        lease = on_etcd.acquire(name).text
        [first] = waiters(pool, on_etcd, name)

        etcd.call("/lease/revoke", {"ID": lease})  # nobody here hears of it
        second = pool.submit(on_etcd.acquire, name, **{"x-lease-wait": "50s"})

        served = first.result(5)
        on_etcd.release(served.text)
        assert second.result(5).token > served.token


def test_a_line_is_served_although_those_at_its_head_time_out(
    daemon: Daemon, key: str, pool: Pool
) -> None:
    lease = daemon.acquire(key).text
    impatient = waiters(pool, daemon, key, 3, "2s")
    [patient] = waiters(pool, daemon, key)
    assert [waiter.result(10).status for waiter in impatient] == [202] * 3

    daemon.release(lease)

    assert patient.result(5).status == 201


def test_who_does_not_wait_is_refused_at_once_and_asks_etcd_once(
    on_etcd: Daemon, start: Start, proxy: Proxy, key: str, pool: Pool
) -> None:
    daemon = start(proxy.url)
    lease = on_etcd.acquire(key).text
    daemon.acquire(key)  # after this it knows that the key is in use
    seen = len(proxy.seen)

    refused = daemon.acquire(key).status
    asked = proxy.seen[seen:]
    line = waiters(pool, daemon, key, 3)
    beside_a_line = daemon.acquire(key).status

    assert (refused, asked, beside_a_line) == (202, [("/v3/kv/range", "")], 202)
    assert not any(waiter.done() for waiter in line)
    on_etcd.release(lease)
    served, _ = wait_for_any(line, 5, FIRST_COMPLETED)
    assert [waiter.result().status for waiter in served] == [201]
    assert daemon.stop() == 0  # who is left in line is answered


def test_a_wait_for_a_free_key_takes_no_pause(on_memory: Daemon, key: str) -> None:
    began = time.monotonic()

    answers = [on_memory.acquire(f"{key}-{n}", **{"x-lease-wait": "9s"}) for n in range(100)]

    assert {answer.status for answer in answers} == {201}
    assert time.monotonic() - began < 1.7  # 100 pauses of up to 50 ms would take 2.5 s


@pytest.mark.parametrize("how", ["close", "reset"])
def test_the_lock_is_never_taken_for_a_waiter_that_hung_up(
    daemon: Daemon, key: str, pool: Pool, how: str
) -> None:
    lease, before = daemon.acquire(key).text, gauge(daemon, "waiting")
    gone = send_waiting(daemon, key)
    eventually(lambda: gauge(daemon, "waiting") == before + 1)
    [waiter] = waiters(pool, daemon, key)

    if how == "reset":
        gone.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()
    daemon.release(lease)

    assert (answer := waiter.result(5)).status == 201
    assert daemon.keep_alive(answer.text).status == 200
    assert gauge(daemon, "waiting") == before


def test_a_waiter_that_hung_up_writes_nothing_and_leaves_the_line(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    daemon = start(own_etcd.url)
    lease = daemon.acquire(key).text
    daemon.acquire(key)
    gone, written = [send_waiting(daemon, key) for _ in range(3)], writes(own_etcd)
    eventually(lambda: gauge(daemon, "waiting") == 3)

    for caller in gone:
        caller.close()
    daemon.release(lease)
    eventually(lambda: gauge(daemon, "waiting") == 0)

    assert writes(own_etcd) == written + 1  # the release
    assert daemon.look(key).status == 404


def test_a_stop_answers_all_who_wait_that_the_lock_is_held(
    start: Start, proxy: Proxy, key: str, pool: Pool
) -> None:
    daemon = start(proxy.url)
    lock = daemon.acquire(key)
    line = waiters(pool, daemon, key, 5)

    daemon.process.send_signal(signal.SIGTERM)

    answers = [waiter.result(10) for waiter in line]
    assert [(answer.status, answer.text) for answer in answers] == [(202, "0")] * 5
    assert {answer.headers["connection"] for answer in answers} == {"close"}
    assert daemon.process.wait(20) == 0
    assert start(proxy.url).keep_alive(lock.text).status == 200


def test_of_twenty_waiters_each_is_served(daemon: Daemon, key: str, pool: Pool) -> None:
    def acquire_and_release() -> int:
        answer = daemon.acquire(key, **{"x-lease-wait": "10s"})
        assert (answer.status, daemon.release(answer.text).status) == (201, 200)
        return answer.token

    lease, before = daemon.acquire(key).text, gauge(daemon, "waiting")
    turns = [pool.submit(acquire_and_release) for _ in range(20)]
    eventually(lambda: gauge(daemon, "waiting") == before + 20)

    daemon.release(lease)

    # Who becomes the first asks at once: not when it looks whether its caller has hung up.
    assert len({turn.result(30) for turn in turns}) == 20


def test_of_two_replicas_each_gets_its_share_for_its_line(
    own_etcd: Etcd, start: Start, key: str, pool: Pool
) -> None:
    replicas, turns = [start(own_etcd.url), start(own_etcd.url)], itertools.count()

    def take_turns(replica: Daemon) -> int:
        """How many of 60 grants this caller had."""
        had = 0
        while True:
            answer = replica.acquire(key, **{"x-lease-wait": "50s"})
            is_over = next(turns) >= 60
            assert (answer.status, replica.release(answer.text).status) == (201, 200)
            if is_over:
                return had
            had += 1

    callers = [pool.submit(take_turns, replica) for replica in replicas for _ in range(5)]
    grants = [caller.result(60) for caller in callers]

    assert sum(grants) == 60
    assert min(sum(grants[:5]), sum(grants[5:])) >= 15, grants


def test_of_twenty_in_line_only_the_first_asks_etcd_and_with_pauses(
    on_etcd: Daemon, proxy: Proxy, start: Start, key: str, pool: Pool
) -> None:
    lease = on_etcd.acquire(key).text
    daemon = start(proxy.url)
    daemon.acquire(key)
    line, before = waiters(pool, daemon, key, 20, "9s"), len(proxy.seen)

    answered, _ = wait_for_any(line, 2, FIRST_COMPLETED)
    asked = [path for path, _ in proxy.seen[before:]]

    assert not answered
    assert set(asked) == {"/v3/kv/range"}
    assert 15 < len(asked) < 200  # pauses are of 25 ms on average; of twenty askers it were 1,600
    on_etcd.release(lease)
    served, _ = wait_for_any(line, 5, FIRST_COMPLETED)
    assert [waiter.result().status for waiter in served] == [201]
    assert daemon.stop() == 0  # who is left in line is answered


def test_however_many_keys_are_waited_for_a_replica_asks_etcd_some_200_times_a_second(
    own_etcd: Etcd, start: Start, key: str, pool: Pool
) -> None:
    holder, daemon = start(own_etcd.url), start(own_etcd.url)
    names = [f"{key}-{number}" for number in range(80)]
    for name in names:
        assert (holder.acquire(name).status, daemon.acquire(name).status) == (201, 202)
    headers = {"x-lease-wait": "9s"}
    lines = [pool.submit(daemon.acquire, name, **headers) for name in names]
    eventually(lambda: gauge(daemon, "waiting") == len(names))
    before, began = reads(own_etcd), time.monotonic()

    answered, _ = wait_for_any(lines, 2, FIRST_COMPLETED)
    a_second = (reads(own_etcd) - before) / (time.monotonic() - began)

    assert not answered
    assert 100 < a_second < 500  # with pauses as for one key it were 3,200
    assert daemon.stop() == 0


def test_two_hundred_waiters_hinder_nobody_and_leave_when_they_hang_up(start: Start) -> None:
    daemon = start("mock")
    lease = daemon.acquire("k").text

    with contextlib.ExitStack() as line:
        for _ in range(200):
            line.enter_context(contextlib.closing(send_waiting(daemon, "k")))
        eventually(lambda: gauge(daemon, "waiting") == 200)
        assert (daemon.keep_alive(lease).status, daemon.acquire("k").status) == (200, 202)

    eventually(lambda: gauge(daemon, "waiting") == 0)
    eventually(lambda: daemon.descriptors() < 20)


def test_the_longest_wait_ends_a_second_before_a_proxy_would_cut_it(start: Start) -> None:
    setting = "import shared_lock; shared_lock.MAX_WAIT_SECONDS = 3"
    script = f"import sys; sys.path[0] = {str(HERE)!r}; {setting}"
    main = "sys.exit(shared_lock.main(['serve']))"
    daemon = start("mock", command=[PYTHON, "-c", f"{script}; {main}"])
    daemon.acquire("k")

    began = time.monotonic()
    answer = daemon.acquire("k", **{"x-lease-wait": "3s"})

    assert answer.status == 202
    assert 1.9 < time.monotonic() - began < 2.9


def test_who_holds_the_lock_already_does_not_stand_behind_those_that_wait_for_it(
    daemon: Daemon, key: str, pool: Pool
) -> None:
    mine = {"x-lease-id": "4711", "x-lease-wait": "50s"}
    if daemon.request("DELETE", "/lease", "4711").status != 204:
        pytest.fail("lease 4711 is in use")
    lost = daemon.acquire(key, **mine)
    [waiter] = waiters(pool, daemon, key)

    again = pool.submit(daemon.acquire, key, **mine).result(5)

    assert (again.status, again.text, again.token) == (201, "4711", lost.token)
    assert not waiter.done()
    daemon.release("4711")
    assert waiter.result(5).status == 201


class LineStorage(shared_lock.MemoryStorage):
    """Tells who asks, and fails for some."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []  # by client
        self.fails_for: set[str] = set()

    def acquire(self, wanted: shared_lock.LockRequest) -> shared_lock.Grant | None:
        self.asked.append(wanted.client)
        if wanted.client in self.fails_for:
            raise shared_lock.NotApplied("etcd is away")
        return super().acquire(wanted)


class InLine:
    """Callers of a lock service over a LineStorage, whose key "k" is held."""

    def __init__(self, pool: Pool) -> None:
        self.storage = LineStorage()
        self.metrics = shared_lock.Metrics()
        self.service = shared_lock.LockService(self.storage, self.metrics)
        self.gone: set[str] = set()  # clients that hung up
        self._pool = pool
        self._count = 0
        held = self.service.acquire(shared_lock.LockRequest("k"))
        assert held
        self.held = held

    def waiting(self) -> int:
        samples = parse_metrics(self.metrics.render())["shared_lock_waiting"]
        return int(samples[frozenset()])

    def join(self, client: str, wait: float = 30) -> Future[shared_lock.Grant | None]:
        before = self.waiting()
        wanted = shared_lock.LockRequest(
            "k", ttl=60, wait=wait, client=client, hung_up=lambda: client in self.gone
        )
        future = self._pool.submit(self.service.acquire, wanted)
        eventually(lambda: self.waiting() > before)
        return future


@pytest.fixture
def line(pool: Pool) -> InLine:
    return InLine(pool)


def test_only_the_first_in_line_asks_and_nobody_is_overtaken(line: InLine) -> None:
    callers = [line.join(name) for name in "abc"]
    eventually(lambda: line.storage.asked.count("a") > 3)
    assert set(line.storage.asked) == {"", "a"}

    held = line.held
    for caller, rest in ((0, callers[1:]), (1, callers[2:]), (2, [])):
        line.service.release(held.lease, "")
        granted = callers[caller].result(5)
        assert granted and granted.token > held.token
        assert not any(one.done() for one in rest)
        held = granted

    assert line.waiting() == 0


def test_a_first_in_line_that_fails_or_hangs_up_hands_its_place_on(line: InLine) -> None:
    failing, gone, patient = [line.join(name) for name in ("failing", "gone", "patient")]

    line.gone.add("gone")
    line.storage.fails_for.add("failing")

    assert isinstance(failing.exception(5), shared_lock.NotApplied)
    assert isinstance(gone.exception(5), EOFError)
    assert "gone" not in line.storage.asked
    line.service.release(line.held.lease, "")
    assert patient.result(5)


def test_a_wait_that_ends_behind_others_is_refused_unasked(line: InLine) -> None:
    first = line.join("first")

    assert line.join("short", wait=0.3).result(5) is None

    assert "short" not in line.storage.asked
    line.service.release(line.held.lease, "")
    assert first.result(5)


def test_a_stop_refuses_the_whole_line_at_once(line: InLine) -> None:
    callers = [line.join(name) for name in "abc"]

    line.service.dismiss_waiting()

    assert [caller.result(1) for caller in callers] == [None, None, None]
    assert set(line.storage.asked) == {"", "a"}


def test_the_first_in_line_asks_once_more_when_its_wait_ends(
    line: InLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 60)

    assert line.join("a", wait=0.3).result(5) is None

    assert line.storage.asked == ["", "a", "a"]


# == Cache =======================================================================================


@pytest.fixture
def held(on_etcd: Daemon, key: str) -> str:
    """The lease that holds the key, taken through a replica without a cache."""
    return on_etcd.acquire(key).text


@pytest.fixture
def cached(start: Start, proxy: Proxy) -> Daemon:
    """A replica that remembers held keys; `proxy` tells what it asks."""
    return start(proxy.url, CACHE_ENABLED="true")


@pytest.mark.parametrize("taken_here", [True, False])
def test_a_key_known_to_be_held_costs_etcd_one_read_a_second_at_most(
    on_etcd: Daemon, cached: Daemon, proxy: Proxy, key: str, taken_here: bool
) -> None:
    (cached if taken_here else on_etcd).acquire(key)
    cached.acquire(key)
    before, began = len(proxy.seen), time.monotonic()

    refusals = [cached.acquire(key) for _ in range(100)]

    assert {(refusal.status, refusal.text) for refusal in refusals} == {(202, "0")}
    assert len(proxy.seen) - before <= 1 + time.monotonic() - began


def test_a_key_is_only_taken_for_held_for_a_second_after_etcd_was_asked(
    held: str, cached: Daemon, proxy: Proxy, key: str
) -> None:
    assert (cached.acquire(key).status, cached.keep_alive(held).status) == (202, 200)
    before = len(proxy.seen)

    eventually(lambda: cached.acquire(key).status == 202 and len(proxy.seen) > before, 4)


def test_a_release_through_another_replica_is_seen_soon_whatever_its_ttl(
    on_etcd: Daemon, held: str, cached: Daemon, key: str
) -> None:
    assert cached.acquire(key, "1h").status == 202

    on_etcd.release(held)

    eventually(lambda: cached.acquire(key, "1h").status == 201, 4)


@pytest.mark.parametrize("taken_here", [True, False])
def test_a_release_through_this_replica_is_seen_at_once(
    on_etcd: Daemon, cached: Daemon, key: str, taken_here: bool
) -> None:
    lease = (cached if taken_here else on_etcd).acquire(key).text
    assert [cached.acquire(key).status for _ in range(2)] == [202, 202]

    assert cached.release(lease).status == 200

    assert cached.acquire(key).status == 201


def test_a_lease_that_is_released_leaves_none_of_its_keys_remembered(
    etcd: Etcd, held: str, cached: Daemon, key: str
) -> None:
    names = [key, key + " 2", key + " 3"]
    for name in names[1:]:
        etcd.put(PREFIX + name.encode(), b"", int(held))
    assert [cached.acquire(name).status for name in names] == [202] * 3

    assert cached.release(held).status == 200

    assert [cached.acquire(name).status for name in names] == [201] * 3


@pytest.mark.parametrize("headers", [{"x-lease-wait": "1ms"}, {"x-lease-id": "4711"}], ids=len)
@pytest.mark.usefixtures("held")
def test_who_waits_or_chose_its_lease_is_never_answered_from_memory(
    cached: Daemon, proxy: Proxy, key: str, headers: dict[str, str]
) -> None:
    for _ in range(5):
        cached.acquire(key)
        before = len(proxy.seen)
        assert cached.acquire(key, **headers).status == 202
        assert len(proxy.seen) > before


@pytest.mark.parametrize("length, remembered", [(900, True), (1100, False)])
def test_only_short_keys_are_remembered(
    on_etcd: Daemon, cached: Daemon, proxy: Proxy, key: str, length: int, remembered: bool
) -> None:
    key = key.ljust(length, "x")
    on_etcd.acquire(key)
    cached.acquire(key)
    before = len(proxy.seen)

    assert [cached.acquire(key).status for _ in range(10)] == [202] * 10

    assert (len(proxy.seen) - before < 10) == remembered


def test_a_long_key_takes_no_place_when_it_is_released() -> None:
    metrics = shared_lock.Metrics()
    cache = shared_lock.Cache(shared_lock.MemoryStorage(), 2, metrics)

    for number in range(5):
        key = f"{number}".ljust(2000, "x")
        assert cache.release(take(cache, key).lease) == [key]

    assert 'evict",status="size_limit"} 0\n' in metrics.render()


def test_the_least_recently_used_key_leaves_a_full_cache(
    start: Start, proxy: Proxy, key: str
) -> None:
    cached = start(proxy.url, CACHE_ENABLED="true", CACHE_SIZE="2")
    for name in "abc":
        cached.acquire(key + name)
    before = len(proxy.seen)

    in_memory = [cached.acquire(key + name).status for name in "bcbc"]
    between = len(proxy.seen)
    forgotten = cached.acquire(key + "a").status

    assert (in_memory, forgotten) == ([202] * 4, 202)
    assert between == before < len(proxy.seen)


def test_a_refusal_that_a_release_overtook_is_believed_for_no_longer_than_any(
    held: str, cached: Daemon, proxy: Proxy, pool: Pool, key: str
) -> None:
    def is_late() -> Future[Answer] | None:
        """A caller whose refusal etcd has said, but who has not heard it."""
        caller = pool.submit(cached.acquire, key)
        eventually(lambda: caller.done() or ("/v3/kv/range", "wait") in proxy.seen)
        return None if caller.done() else caller

    assert cached.acquire(key).status == 202
    proxy.rule = ("/v3/kv/range", "wait", 1)
    late = eventually(is_late, 4)

    assert cached.release(held).status == 200
    proxy.go_on.set()

    assert late.result(10).status == 202
    eventually(lambda: cached.acquire(key).status == 201, 4)


# == Storage in memory ===========================================================================


def entries(storage: shared_lock.MemoryStorage) -> int:
    """How much its tables hold, whatever tables it has."""
    return sum(
        len(table) for table in vars(storage).values() if isinstance(table, (dict, list, set))
    )


def test_in_memory_a_lock_lasts_for_its_ttl_and_no_longer() -> None:
    clock = Clock()
    storage = shared_lock.MemoryStorage(clock)
    first = take(storage, "k")

    clock.ahead = 9.5
    refused, held = take(storage, "k"), storage.look("k")
    clock.ahead = 10.1
    free, second = storage.look("k"), take(storage, "k")

    assert held and isinstance(second, shared_lock.Grant)
    assert (refused, held.token, free) == (None, first.token, None)
    assert second.token > first.token
    assert storage.renew(first.lease) == 0


def test_in_memory_each_renewal_starts_the_ttl_again() -> None:
    clock = Clock()
    storage = shared_lock.MemoryStorage(clock)
    lease = take(storage, "k").lease

    for clock.ahead in (9, 18, 27):
        assert storage.renew(lease) == 10
    clock.ahead = 36.5
    holder = storage.look("k")

    assert holder and (holder.value, holder.ttl, holder.granted_ttl) == ("v", 0, 10)
    clock.ahead = 37.1
    assert storage.look("k") is None


@pytest.mark.parametrize("released", [False, True])
def test_memory_shrinks_when_locks_end(released: bool) -> None:
    clock = Clock()
    storage = shared_lock.MemoryStorage(clock)

    for number in range(1000):
        lease = take(storage, f"k{number}", 86_400 if released else 1 + number % 50).lease
        storage.renew(lease)
        if released:
            storage.release(lease)
    clock.ahead = 0 if released else 60
    storage.look("k")

    assert entries(storage) < 100


def test_in_memory_leases_are_random_and_tokens_grow() -> None:
    storage = shared_lock.MemoryStorage(Clock())

    grants = [take(storage, f"k{number}") for number in range(200)]

    leases = [grant.lease for grant in grants]
    assert len(set(leases)) == 200 and leases != sorted(leases)
    assert min(leases) > 0 and 2**51 < max(leases) < 2**53
    assert all(earlier.token < later.token for earlier, later in itertools.pairwise(grants))


# == Storage in etcd, and its gateway in our words ===============================================


class Scripted:
    """Stands for the session with etcd: answers each path by its script, and keeps what was asked.

    A script maps the end of a path to an answer, an error to raise, or a function that gets what
    was asked and the deadline; a list of those is used up from its beginning.
    """

    def __init__(self, script: dict[str, Any]) -> None:
        self.script = script
        self.asked: list[tuple[str, Any]] = []
        self.cluster = shared_lock.Cluster((), shared_lock.Metrics())
        self.cluster.first_looks_end = 0

    def start(self) -> None:
        """Nobody looks after the members."""

    def post(self, call: shared_lock.Call[Any], *, json: Any, deadline: float, **_: object) -> Any:
        path = next(path for path in self.script if call.line.endswith(path))
        self.asked.append((path, json))
        step = self.script[path]
        step = step.pop(0) if isinstance(step, list) else step
        answer = step(json, deadline) if callable(step) else step
        if isinstance(answer, shared_lock.StorageError):
            raise answer
        found = call.read(answer)
        return types.SimpleNamespace(status_code=200, json=lambda: found)

    def of(self, path: str) -> list[Any]:
        return [json for asked, json in self.asked if asked == path]


def gateway_on(session: Any) -> shared_lock.Gateway:
    return shared_lock.Gateway(session)


def storage_on(session: Any, timeout: float = 5) -> shared_lock.EtcdStorage:
    storage = shared_lock.EtcdStorage(gateway_on(session), timeout)
    storage.start()
    return storage


def claim_of(key: str, lease: int, value: str = "") -> shared_lock.LockRequest:
    return shared_lock.LockRequest(key, value, 60, lease=lease)


def renewed_but(*omitted: int) -> Callable[[Any, float], Any]:
    """An answer to keepalives, in another order, that lacks these leases; an even lease is gone."""

    def answer(asked: list[dict[str, int]], deadline: float) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = (
            [{"error": {"grpc_code": 1, "message": "cut"}}] if omitted else []
        )
        leases = [line["ID"] for line in reversed(asked) if line["ID"] not in omitted]
        return lines + [
            {"result": {"ID": str(ID), **({"TTL": str(ID * 10)} if ID % 2 else {})}}
            for ID in leases
        ]

    return answer


def test_answers_to_keepalives_are_matched_by_id() -> None:
    client = Scripted({"/lease/keepalive": renewed_but(5)})

    answers = gateway_on(client).keep_alive([1, 2, 5, 3, 1], soon())

    assert answers[:2] + answers[3:] == [10, 0, 30, 10]
    assert isinstance(answers[2], shared_lock.StorageError)


def test_a_keepalive_whose_answer_is_missing_is_repeated() -> None:
    client = Scripted({"/lease/keepalive": [renewed_but(7), renewed_but(7), renewed_but()]})

    assert storage_on(client).renew(7) == 70

    assert len(client.asked) == 3


def test_a_lease_that_ended_between_two_tries_to_get_it_is_not_granted() -> None:
    taken = shared_lock.Refused("lease already exists", code=9)
    grants = [shared_lock.OutcomeUnknown("timed out"), taken]
    client = Scripted({"/lease/grant": grants, "/lease/timetolive": {"TTL": "-1"}})

    with pytest.raises(shared_lock.StorageError, match="ended before it was used"):
        take(storage_on(client), "k")


def test_where_no_try_of_ours_can_have_made_a_lease_that_exists_another_id_is_drawn() -> None:
    taken = shared_lock.Refused("lease already exists", code=9)
    granted = {"ID": "5", "TTL": "60"}
    put = {"response_put": {"header": {"revision": "7"}}}
    won = {"header": {"revision": "7"}, "succeeded": True, "responses": [put]}
    client = Scripted({"/lease/grant": [taken, granted], "/kv/txn": won})

    grant = take(shared_lock.EtcdStorage(gateway_on(client), timeout=5), "k")

    first, second = [asked["ID"] for asked in client.of("/lease/grant")]
    assert first != second == grant.lease
    assert 0 < second < 2**53


def test_a_lease_of_an_earlier_try_that_cannot_be_looked_at_is_ended_and_nothing_was_acquired() -> (
    None
):
    unknown = shared_lock.OutcomeUnknown("timed out")
    exists = shared_lock.Refused("lease already exists", code=9)
    answers = {
        "/lease/grant": [unknown, exists],
        "/lease/timetolive": unknown,
        "/lease/revoke": {"header": {}},
    }
    client = Scripted(answers)
    storage = shared_lock.EtcdStorage(gateway_on(client), timeout=0.3)

    with pytest.raises(shared_lock.NotApplied):
        storage.acquire(shared_lock.LockRequest("k"))

    assert client.of("/lease/revoke") == [{"ID": client.of("/lease/grant")[0]["ID"]}]


@pytest.mark.parametrize("count, outcome", [("1", "held"), ("0", "refused")])
def test_a_claim_too_large_for_what_etcd_has_left_is_a_refusal_where_the_key_is_held(
    count: str, outcome: str
) -> None:
    answers = {
        "/lease/grant": {"ID": "5", "TTL": "60"},  # small enough
        "/kv/txn": shared_lock.Refused("mvcc: database space exceeded", code=8),
        "/lease/revoke": {"header": {}},
        "/kv/range": {"header": {}, "count": count},
    }
    client = Scripted(answers)
    storage = shared_lock.EtcdStorage(gateway_on(client), timeout=5)

    if outcome == "held":
        assert storage.acquire(shared_lock.LockRequest("k")) is None
    else:
        with pytest.raises(shared_lock.NotApplied, match="space exceeded"):
            storage.acquire(shared_lock.LockRequest("k"))

    assert client.of("/lease/revoke") == [{"ID": client.of("/lease/grant")[0]["ID"]}]


def test_a_revoke_that_is_refused_for_another_reason_than_a_lease_that_is_gone_is_an_error() -> (
    None
):
    refusals = [
        shared_lock.Refused("not found", code=5),
        shared_lock.Refused("permission denied", code=7),
    ]
    gateway = gateway_on(Scripted({"/lease/revoke": refusals}))

    gateway.revoke(5, soon())
    with pytest.raises(shared_lock.Refused, match="permission denied"):
        gateway.revoke(5, soon())


@pytest.mark.parametrize("count", [1, 19, 20, 64])  # 19 go as they are, more after blanks
def test_keepalives_that_share_a_call_are_each_answered_for_their_own_lease(
    on_etcd: Daemon, proxy: Proxy, start: Start, key: str, count: int, pool: Pool
) -> None:
    daemon = start(proxy.url)
    ttls = [f"{60 + number}s" for number in range(count)]
    leases = [on_etcd.acquire(f"{key}-{ttl}", ttl).text for ttl in ttls]
    proxy.rule = ("/v3/lease/keepalive", "stop", 1)
    first = pool.submit(daemon.keep_alive, leases[0])
    eventually(lambda: proxy.rule is None)

    behind = [pool.submit(daemon.keep_alive, lease) for lease in [*leases, "4711"]]
    await_looks(proxy, 1)  # a second, in which they gather behind the first
    proxy.go_on.set()

    *answers, unknown = [caller.result(10) for caller in (first, *behind)]
    assert [answer.headers.get("x-lease-ttl") for answer in answers] == [ttls[0], *ttls]
    assert unknown.status == 204
    assert len(proxy.seen) < count + 5  # each alone would be two more


def test_a_claim_that_etcd_refuses_is_not_acquired_and_leaves_no_lease(
    etcd: Etcd, proxy: Proxy, start: Start, key: str
) -> None:
    daemon, before = start(proxy.url), etcd.leases()

    proxy.rule = ("/v3/kv/txn", "no-space", 1)
    answer = daemon.acquire(key)

    assert (answer.status, etcd.leases() <= before) == (500, True)
    one_line(answer, "not acquired: ", "database space exceeded")


def test_a_lost_claim_whose_holder_cannot_be_read_is_unknown(
    etcd: Etcd, proxy: Proxy, start: Start, key: str, lease_id: int
) -> None:
    daemon = start(proxy.url, ETCD_TIMEOUT="1s")

    proxy.rules(("/v3/kv/txn", "drop-answer", 1), ("/v3/kv/range", "no-leader", 10**6))
    answer = acquire_as(daemon, lease_id, key)

    assert answer.status == 500
    one_line(answer, "outcome unknown: ")
    assert etcd.key(key) is not None


def test_leases_that_cannot_be_ended_cost_no_threads_and_are_ended_when_etcd_is_well(
    etcd: Etcd, proxy: Proxy, start: Start, key: str
) -> None:
    daemon, before = start(proxy.url, ETCD_TIMEOUT="500ms"), etcd.leases()
    eventually(daemon.ready)
    threads = Path(f"/proc/{daemon.process.pid}/task")

    proxy.rule = ("/v3/kv/txn /v3/lease/revoke", "drop-request", 10**6)
    answers = together(30, lambda number: daemon.acquire(f"{key}-{number}", "1h"))
    left = etcd.leases() - before
    eventually(lambda: len(list(threads.iterdir())) < 20)
    proxy.rule = None

    assert {answer.status for _, answer in answers} == {500}
    assert len(left) == 30
    eventually(lambda: not etcd.leases() & left, 30)


@pytest.mark.parametrize(
    "shape",
    [
        '{"error":M,"message":M,"code":C}',
        '{"error":M,"code":C}',  # 3.4.23 and 3.5
        '{"code":C,"message":M}',
        '{"code":C,"message":M,"details":[]}',  # 3.6
        '{"error":{"grpc_code":C,"http_code":503,"message":M}}',
        '{"error":{"code":C,"message":M}}',  # a stream: 3.5, 3.6
    ],
)
@pytest.mark.parametrize(
    "status, code, message, kind",
    [
        (404, 5, "requested lease not found", "Refused"),
        (412, 9, "lease already exists", "Refused"),
        (400, 9, "lease already exists", "Refused"),
        (400, 11, "too large lease TTL", "Refused"),
        (400, 3, "request is too large", "Refused"),
        (429, 8, "mvcc: database space exceeded", "Refused"),
        (403, 7, "permission denied", "Refused"),
        (401, 16, "invalid auth token", "Refused"),
        (503, 14, "no leader", "NotApplied"),
        (503, 14, "request timed out", "OutcomeUnknown"),
        (503, 14, "leader changed", "OutcomeUnknown"),
        (500, 2, "not a primary lessor", "OutcomeUnknown"),
        (504, 4, "context deadline exceeded", "OutcomeUnknown"),
    ],
)
def test_every_shape_of_error_is_understood(
    shape: str, status: int, code: int, message: str, kind: str
) -> None:
    text = shape.replace("C", str(code)).replace("M", f'"etcdserver: {message}"')

    fault = shared_lock.classify(200 if '"error":{' in shape else status, text)

    assert (type(fault).__name__, message in str(fault)) == (kind, True)


@pytest.mark.parametrize(
    "status, text, kind, shown",
    [
        (404, "404 page not found\n", "NotApplied", "gateway"),
        (503, "", "OutcomeUnknown", "503"),
        (
            400,
            "CommonName of client sending a request against gateway will be ignored",
            "NotApplied",
            "CommonName",
        ),
        (502, "<html>\nbad gateway", "OutcomeUnknown", "bad gateway"),
        (500, "null", "OutcomeUnknown", "500"),
        (500, '{"error": null, "code": "x"}', "OutcomeUnknown", "500"),
    ],
)
def test_an_error_that_is_not_of_etcd_is_understood(
    status: int, text: str, kind: str, shown: str
) -> None:
    fault = shared_lock.classify(status, text)

    assert (type(fault).__name__, "\n" in str(fault)) == (kind, False)
    assert shown in str(fault)


@pytest.mark.parametrize(
    "says, fault",
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "SSH-2.0-OpenSSH"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "not "),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"hello": 1}', "not "),
    ],
    ids=len,
)
def test_what_is_not_an_answer_of_etcd_is_an_error(start: Start, says: bytes, fault: str) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.request.recv(65_536)
            self.wfile.write(says)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = start(f"http://127.0.0.1:{server.server_address[1]}", ETCD_TIMEOUT="1s").acquire(
            "k"
        )
        server.shutdown()

    assert answer.status == 500
    one_line(answer, fault)


NOT_OF_ETCD = [
    b"<html>It works!</html>",
    b"",
    b"\xff\xfe\x00",
    b"[]",
    b'"text"',
    b"{}",
    b'{"header": 1}',
    b'{"header": {}}',
    b'{"header": {"cluster_id": [1], "revision": "1"}}',
    b'{"header": {"cluster_id": "one", "revision": "1"}}',
    b'{"header": {"cluster_id": "1", "revision": "' + b"9" * 5000 + b'"}}',
    b'{"result": {"header": []}}',
    b'{"code": 1e400, "message": "x"}',
    b'{"error": {"grpc_code": [], "message": {}}}',
    b"[" * 50_000,
]


def test_nothing_that_another_server_says_ends_the_search_for_etcd(
    start: Start, etcd: Etcd, key: str
) -> None:
    says: list[Any] = [200, b""]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(says[0])
            self.send_header("Content-Length", str(len(says[1])))
            self.end_headers()
            self.wfile.write(says[1])

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        daemon = start(f"http://127.0.0.1:{port}", ETCD_TIMEOUT="300ms")
        for status, body in itertools.product([200, 404, 500], NOT_OF_ETCD):
            says[:] = [status, body]
            answer = daemon.acquire(key)
            assert answer.status == 500, body
            one_line(answer, f"127.0.0.1:{port}")
        server.shutdown()
    between = Proxy(etcd, port)

    eventually(lambda: daemon.acquire(key).status == 201)

    assert "internal error" not in daemon.log()
    between.close()


def test_what_nobody_asked_for_on_an_idle_connection_makes_no_member_sick(
    start: Start, etcd: Etcd, key: str
) -> None:
    idle: list[socket.socket] = []

    class Handler(socketserver.BaseRequestHandler):
        """Passes bytes between the daemon and etcd."""

        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", etcd.port)) as target:
                idle.append(self.request)
                threading.Thread(target=self.pump, args=(target, self.request)).start()
                self.pump(self.request, target)

        @staticmethod
        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65_536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        daemon = start(f"http://127.0.0.1:{server.server_address[1]}")
        assert daemon.acquire(key).status == 201
        for connection in idle:
            with contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")

        statuses = [daemon.acquire(f"{key}-{n}").status for n in range(10)]

        server.shutdown()
        daemon.stop()
    assert statuses == [201] * 10
    assert not events(daemon, "etcd member failed")


# -- What an acquire costs etcd


def writes(etcd: Etcd) -> int:
    """How many proposals the cluster has committed: what a write costs."""
    page = parse_metrics(ask(etcd.port, "GET", "/metrics").text)
    return int(page["etcd_server_proposals_committed_total"][frozenset()])


@pytest.fixture
def holder(own_etcd: Etcd, start: Start) -> Daemon:
    """Another replica on the etcd that only this test uses."""
    return start(own_etcd.url)


def test_an_acquire_of_a_new_key_takes_two_calls(proxy: Proxy, start: Start, key: str) -> None:
    daemon = start(proxy.url)
    daemon.acquire(key + " before")
    seen = len(proxy.seen)

    answers = [daemon.acquire(f"{key}-{number}") for number in range(3)]

    assert [answer.status for answer in answers] == [201] * 3
    assert proxy.seen[seen:] == [("/v3/lease/grant", ""), ("/v3/kv/txn", "")] * 3


def test_a_release_here_makes_the_next_acquire_as_cheap_as_the_first(
    proxy: Proxy, start: Start, key: str
) -> None:
    daemon = start(proxy.url)
    lease = daemon.acquire(key).text
    assert (daemon.acquire(key).status, daemon.release(lease).status) == (202, 200)
    seen = len(proxy.seen)

    answer = daemon.acquire(key)

    assert answer.status == 201
    assert proxy.seen[seen:] == [("/v3/lease/grant", ""), ("/v3/kv/txn", "")]


@pytest.mark.parametrize("held", [True, False])
def test_whoever_chose_the_id_of_its_lease_reads_first(
    on_etcd: Daemon, etcd: Etcd, proxy: Proxy, start: Start, key: str, lease_id: int, held: bool
) -> None:
    daemon = start(proxy.url)
    if held:
        on_etcd.acquire(key)

    answer = acquire_as(daemon, lease_id, key)

    assert answer.status == (202 if held else 201)
    assert proxy.seen[0] == ("/v3/kv/range", "")
    assert (lease_id in etcd.leases()) == (not held)


def test_only_the_first_refusal_of_a_key_at_a_replica_writes_and_it_leaves_no_lease(
    own_etcd: Etcd, holder: Daemon, start: Start, key: str
) -> None:
    names, daemon = [f"{key}-{number}" for number in range(20)], start(own_etcd.url)
    leases = {int(holder.acquire(name).text) for name in names}

    costs = []
    for _ in range(3):
        before = writes(own_etcd)
        assert {daemon.acquire(name).status for name in names} == {202}
        eventually(lambda: own_etcd.leases() == leases)
        costs.append(writes(own_etcd) - before)

    assert costs[0] <= 3 * len(names)
    assert costs[1:] == [0, 0]


def test_a_refusal_after_a_grant_here_writes_nothing(
    own_etcd: Etcd, holder: Daemon, key: str
) -> None:
    holder.acquire(key)
    before = writes(own_etcd)

    refusals = [holder.acquire(key).status for _ in range(5)]

    assert (refusals, writes(own_etcd) - before) == ([202] * 5, 0)


def test_a_race_of_eight_for_a_new_key_writes_little_and_leaves_one_lease(
    own_etcd: Etcd, holder: Daemon, key: str
) -> None:
    def cost_of_race(name: str) -> int:
        before, leases = writes(own_etcd), own_etcd.leases()
        statuses = [answer.status for _, answer in together(8, lambda _: holder.acquire(name))]
        assert sorted(statuses) == [201] + [202] * 7
        eventually(lambda: len(own_etcd.leases() - leases) == 1)
        return writes(own_etcd) - before

    costs = [cost_of_race(f"{key}-{number}") for number in range(10)]

    assert statistics.median(costs) <= 18, costs  # 8 grants, 7 revokes, claims that share a call


def test_of_callers_whose_reads_share_a_call_each_gets_its_own_answer(
    on_etcd: Daemon, proxy: Proxy, start: Start, key: str
) -> None:
    daemon, names = start(proxy.url), [f"{key}-{number}" for number in range(24)]
    leases = [on_etcd.acquire(name).text for name in names]
    assert [daemon.acquire(name).status for name in names] == [202] * 24
    for lease in leases[::2]:
        on_etcd.release(lease)
    proxy.rule = (Proxy.ALL, "hold", 10**6)  # so long that those behind the first share a call

    answers = together(24, lambda number: daemon.acquire(names[number]))

    assert [answer.status for _, answer in answers] == [201, 202] * 12


# == Combiner ====================================================================================


class Deadline(float):
    """A deadline that tells when somebody works out for how long to wait for it."""

    def __init__(self, _: float) -> None:
        self.is_waited_for = threading.Event()

    def __sub__(self, now: float) -> float:
        self.is_waited_for.set()
        return float(self) - now


class HeldCall:
    """A combined call that multiplies by ten, each time only after the test has let it go on."""

    def __init__(self, pool: Pool, share: float = 0.1) -> None:
        self.batches: list[list[int]] = []
        self.threads: list[int] = []
        self.faults: dict[int, Exception] = {}  # by item: a call with such an item fails
        self.short = False  # answers less than it was asked
        self._pool = pool
        self._may_go_on = threading.Semaphore(0)
        self.combiner = shared_lock.Combiner[int, int](self, lambda item: share)

    def __call__(self, items: list[int], deadline: float) -> list[int]:
        self.batches.append(list(items))
        self.threads.append(threading.get_ident())
        assert self._may_go_on.acquire(timeout=10)
        for item in items:
            if item in self.faults:
                raise self.faults[item]
        return [item * 10 for item in items][: 2 if self.short else None]

    def let_go(self, count: int = 1) -> None:
        self._may_go_on.release(count)

    def first(self, item: int) -> Future[int]:
        """A caller whose call is in flight."""
        future = self._pool.submit(self.combiner, item, soon())
        eventually(lambda: self.batches == [[item]])
        return future

    def behind(self, *items: int, seconds: float = 10) -> list[Future[int]]:
        """Callers that come, in this order, while a call is in flight."""
        futures = []
        for item in items:
            deadline = Deadline(time.monotonic() + seconds)
            futures.append(self._pool.submit(self.combiner, item, deadline))
            assert deadline.is_waited_for.wait(10)  # it has joined
        return futures


@pytest.fixture
def call(pool: Pool) -> HeldCall:
    return HeldCall(pool)


def fault_of(future: Future[Any]) -> type[BaseException] | None:
    fault = future.exception(10)
    return type(fault) if fault else None


def test_a_lone_caller_makes_its_call_in_its_own_thread(call: HeldCall) -> None:
    call.let_go()

    assert call.combiner(1, soon()) == 10

    assert (call.batches, call.threads) == ([[1]], [threading.get_ident()])


def test_callers_that_come_during_a_call_share_the_next_and_never_that_one(call: HeldCall) -> None:
    callers = [call.first(1), *call.behind(1, 2, 3)]

    call.let_go(2)

    assert [future.result(10) for future in callers] == [10, 10, 20, 30]
    assert call.batches == [[1], [1, 2, 3]]


@pytest.mark.parametrize(
    "share, sizes", [(1 / 4, [1, 4, 4, 1]), (0.6, [1] * 10), (2.0, [1] * 10), (0.0, [1, 9])]
)
def test_a_call_carries_no_more_than_fits(pool: Pool, share: float, sizes: list[int]) -> None:
    call = HeldCall(pool, share)
    callers = [call.first(1), *call.behind(*range(2, 11))]

    call.let_go(10)

    assert [future.result(10) for future in callers] == list(range(10, 110, 10))
    assert [len(batch) for batch in call.batches] == sizes


def test_a_refusal_harms_only_the_caller_that_is_refused(call: HeldCall) -> None:
    call.faults[3] = shared_lock.Refused("requested lease not found", code=5)
    first, *later = [call.first(1), *call.behind(2, 3, 4)]

    call.let_go(5)

    assert [future.result(10) for future in (first, later[0], later[2])] == [10, 20, 40]
    with pytest.raises(shared_lock.Refused, match="lease not found") as refusal:
        later[1].result(10)
    assert refusal.value.code == 5
    assert call.batches == [[1], [2, 3, 4], [2], [3], [4]]


@pytest.mark.parametrize("kind", [shared_lock.StorageError, shared_lock.OutcomeUnknown])
def test_a_failure_of_the_call_is_told_to_all_that_share_it(
    call: HeldCall, kind: type[Exception]
) -> None:
    call.faults[3] = kind("etcd is away")
    callers = [call.first(1), *call.behind(2, 3, 4)]

    call.let_go(2)

    assert [fault_of(future) for future in callers] == [None, kind, kind, kind]
    assert "etcd is away" in str(callers[3].exception())
    assert len(call.batches) == 2


@pytest.mark.parametrize("defect", ["raises", "answers too few"])
def test_a_defect_in_the_call_strands_nobody(call: HeldCall, defect: str) -> None:
    call.first(1)
    sharing = call.behind(2, 3, 4, seconds=3)
    call.faults = {3: ZeroDivisionError()} if defect == "raises" else {}
    call.let_go()
    eventually(lambda: len(call.batches) == 2)
    call.short = defect == "answers too few"
    [behind] = call.behind(5, seconds=3)

    call.let_go(10)

    assert all(isinstance(future.exception(8), Exception) for future in sharing)
    call.short = False
    assert [fault_of(behind), call.combiner(6, soon())] == [None, 60]


def test_who_times_out_in_the_queue_was_never_asked_for(call: HeldCall) -> None:
    first = call.first(1)
    [impatient] = call.behind(2, seconds=0.3)
    behind = call.behind(3, 4)

    assert isinstance(fault := impatient.exception(10), shared_lock.StorageError)
    assert not isinstance(fault, shared_lock.OutcomeUnknown)
    call.let_go(2)

    assert [future.result(10) for future in (first, *behind)] == [10, 30, 40]
    assert call.batches == [[1], [3, 4]]


def test_who_times_out_in_flight_does_not_know_the_outcome(call: HeldCall) -> None:
    patient = [call.first(1), *call.behind(2)]
    impatient = call.behind(3, 4, seconds=0.8)
    patient += call.behind(5)
    call.let_go()
    eventually(lambda: call.batches == [[1], [2, 3, 4, 5]])

    assert [fault_of(future) for future in impatient] == [shared_lock.OutcomeUnknown] * 2
    call.let_go()

    assert [future.result(10) for future in patient] == [10, 20, 50]


def test_a_call_whose_callers_all_gave_up_is_stepped_over(pool: Pool) -> None:
    call = HeldCall(pool, share=1)
    first = call.first(1)
    impatient = call.behind(2, 3, seconds=0.3)
    patient = call.behind(4)
    assert all(isinstance(one.exception(10), shared_lock.StorageError) for one in impatient)

    call.let_go(2)

    assert [future.result(5) for future in (first, *patient)] == [10, 40]
    assert call.batches == [[1], [4]]


def test_under_load_every_caller_gets_the_answer_to_its_own_item(pool: Pool) -> None:
    sizes: list[int] = []

    def call(items: list[int], deadline: float) -> list[int | shared_lock.StorageError]:
        sizes.append(len(items))
        time.sleep(0.0005)
        if len(items) > 1 and any(item % 97 == 0 for item in items):
            raise shared_lock.Refused("one of them")
        return [shared_lock.StorageError(str(item)) if item % 89 == 0 else -item for item in items]

    combiner = shared_lock.Combiner[int, int](call, lambda item: 1 / 16)

    def ask(caller: int) -> None:
        for item in range(caller * 1000 + 1, caller * 1000 + 101):
            try:
                assert combiner(item, time.monotonic() + 20) == -item
            except shared_lock.StorageError as fault:
                assert item % 89 == 0 and str(fault) == str(item)

    list(pool.map(ask, range(40)))

    assert 4 < max(sizes) <= 16


def test_callers_behind_a_batch_that_everybody_gave_up_are_served(pool: Pool) -> None:
    call = HeldCall(pool, share=0.6)
    first = call.first(1)
    [impatient] = call.behind(2, seconds=0.5)
    [patient] = call.behind(3)
    assert isinstance(impatient.exception(10), shared_lock.NotApplied)

    call.let_go(2)

    assert [first.result(10), patient.result(5)] == [10, 30]
    assert call.batches == [[1], [3]]


def test_callers_that_gave_up_take_up_no_room(pool: Pool) -> None:
    call = HeldCall(pool, share=0.5)
    first = call.first(1)
    [impatient] = call.behind(2, seconds=0.3)
    assert isinstance(impatient.exception(10), shared_lock.NotApplied)

    patient = call.behind(3, 4)
    call.let_go(2)

    assert [future.result(10) for future in (first, *patient)] == [10, 30, 40]
    assert call.batches == [[1], [3, 4]]


class OutOfMemory:
    """Raises a MemoryError before the n-th line that its thread runs of those lines of the Combiner
    that make an object; a `finally` makes none."""

    def __init__(self) -> None:
        self.left = 0
        tree = ast.parse(Path(shared_lock.__file__).read_text())
        [room] = [
            one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == "Combiner"
        ]
        makers = (ast.Call, ast.BinOp, ast.AugAssign)
        self._lines = {one.lineno for one in ast.walk(room) if isinstance(one, makers)}
        for one in ast.walk(room):
            for last in one.finalbody if isinstance(one, ast.Try) else []:
                self._lines -= set(range(last.lineno, (last.end_lineno or 0) + 1))

    def __call__(self, frame: types.FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != shared_lock.__file__:
            return None
        if event == "line" and frame.f_lineno in self._lines:
            self.left -= 1
            if not self.left:
                raise MemoryError
        return self

    def ask(self, combiner: shared_lock.Combiner[int, int], item: int, deadline: float) -> int:
        sys.settrace(self)
        try:
            return combiner(item, deadline)
        finally:
            sys.settrace(None)


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("role", ["alone", "leader", "follower", "impatient"])
def test_out_of_memory_in_whichever_line_poisons_nothing(
    pool: Pool, share: float, role: str
) -> None:
    memory = OutOfMemory()
    for n in itertools.count(1):
        call = HeldCall(pool, share)
        others = [] if role == "alone" else [call.first(1)]
        others += call.behind(2) if role == "follower" else []
        seconds = 0.05 if role == "impatient" else 10
        memory.left = n
        deadline = Deadline(time.monotonic() + seconds)
        victim = pool.submit(memory.ask, call.combiner, 3, deadline)
        eventually(lambda: victim.done() or deadline.is_waited_for.is_set())  # noqa: B023
        others += [] if role == "alone" else call.behind(4, 5)
        if role == "impatient":
            assert victim.exception(10)

        call.let_go(100)

        assert fault_of(victim) in (None, MemoryError, shared_lock.NotApplied)
        for future in others:  # who shared a call with it may not know, and nobody is stranded
            assert fault_of(future) in (None, shared_lock.OutcomeUnknown)
        later = [pool.submit(call.combiner, item, soon()) for item in (7, 8, 9)]
        assert [future.result(10) for future in later] == [70, 80, 90]
        if memory.left > 0:
            break
    assert n > 4


# == Members: which one to ask, and what a fault of it costs =====================================


def kill(member: Etcd) -> None:
    member.stop()


def freeze(member: Etcd) -> None:
    """Returns once it is frozen: on a busy machine it may go on for a moment after the signal."""
    member.signal(signal.SIGSTOP)
    assert member.process
    stat = Path(f"/proc/{member.process.pid}/stat")
    eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")


def test_a_member_that_is_frozen_at_the_start_is_noted_before_anybody_asks(
    own_etcd: Etcd, start: Start
) -> None:
    freeze(own_etcd)

    daemon = start(own_etcd.url, ETCD_TIMEOUT="1s")
    eventually(lambda: f'member={own_etcd.url} reason="timed out"' in daemon.log())
    own_etcd.signal(signal.SIGCONT)

    eventually(lambda: "etcd member is well again" in daemon.log())


def test_refused_connections_are_left_at_once(etcd: Etcd, start: Start, key: str) -> None:
    nobody = [f"http://127.0.0.1:{free_port()}" for _ in range(4)]
    daemon = start(",".join([*nobody, etcd.url]), ETCD_TIMEOUT="60s")

    began = time.monotonic()
    answer = daemon.acquire(key)

    assert answer.status == 201
    assert time.monotonic() - began < 5  # a share of the budget is 10 s
    eventually(lambda: all(f"member={url} reason=" in daemon.log() for url in nobody))


def test_a_member_without_a_leader_is_left_at_once(
    etcd: Etcd, proxy: Proxy, start: Start, key: str
) -> None:
    proxy.rule = (Proxy.ALL, "no-leader", 10**6)
    daemon = start(f"{proxy.url},{etcd.url}", ETCD_TIMEOUT="30s")

    answers = together(16, lambda number: daemon.acquire(f"{key}-{number}"))

    assert {answer.status for _, answer in answers} == {201}
    assert max(seconds for seconds, _ in answers) < 5  # a share of the budget is 10 s
    eventually(lambda: "no leader" in daemon.log())
    assert daemon.log().count("etcd member failed") == 1


def test_replicas_that_start_together_do_not_all_begin_with_the_same_member(
    etcd: Etcd, start: Start, key: str
) -> None:
    proxies = [Proxy(etcd), Proxy(etcd)]
    urls = ",".join(proxy.url for proxy in proxies)

    for number in range(20):  # all begin with one of two once in 500,000 times
        assert start(urls).acquire(f"{key}-{number}").status == 201
        if all(("/v3/lease/grant", "") in proxy.seen for proxy in proxies):
            break

    assert all(("/v3/lease/grant", "") in proxy.seen for proxy in proxies)
    for proxy in proxies:
        proxy.close()


def test_a_storm_of_failures_is_counted_and_names_the_endpoint_and_the_reason_once(
    start: Start, key: str
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    daemon = start(nobody, ETCD_TIMEOUT="1s")

    answers = together(20, lambda number: daemon.keep_alive(str(number + 1)))
    others = daemon.acquire(key), daemon.release("17")

    assert {answer.status for answer in (*(answer for _, answer in answers), *others)} == {500}
    assert operations(daemon) == {"get error": 1, "prolong error": 20, "release error": 1}
    assert daemon.log().count("etcd member failed") == 1
    assert f'member={nobody} reason="connection refused"' in daemon.log()


def test_a_member_that_has_failed_is_tried_again_after_a_pause(start: Start, key: str) -> None:
    daemon = start(f"http://127.0.0.1:{free_port()}", ETCD_TIMEOUT="2s")

    assert daemon.acquire(key).status == 500

    [errors] = metrics(daemon)[MEMBER_ERRORS].values()
    assert 5 < errors < 50  # ten tries a second, and the looks


def test_a_slow_etcd_is_not_a_sick_one(cluster: Cluster, start: Start, key: str) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(contextlib.closing(Proxy(m))) for m in cluster.members]
        for between in slow:
            between.LATE_SECONDS = 1.4  # a quarter of the budget is 1.25 s
            between.rule = (Proxy.ALL, "late", 10**6)
        daemon = start(",".join(between.url for between in slow))

        # It begins to know. Later tests of this cluster wait until no lease is left.
        eventually(lambda: daemon.acquire(f"{key}-first", "10s").status == 201, 30)
        statuses = [daemon.acquire(f"{key}-{number}", "10s").status for number in range(3)]

        assert statuses == [201] * 3
        assert [of_member(daemon, MEMBER_UP, between.url) for between in slow] == [1] * 3
        assert "etcd member failed" not in daemon.log()


def session_of(port: int, timeout: str = "5s") -> shared_lock.Session:
    """A session with one member, which nobody looks after."""
    env = {"ETCD_ADDR_LIST": f"127.0.0.1:{port}", "ETCD_TIMEOUT": timeout}
    config = shared_lock.Config.from_env({f"SHARED_LOCK_{name}": env[name] for name in env})
    session = shared_lock.Session(config, shared_lock.Metrics())
    session.cluster.update(config.etcd_addr_list[0], {"127.0.0.1"})
    return session


def test_a_try_may_take_as_long_as_three_calls_took_lately(
    jump: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(1)
    near, far = socket.socketpair()
    session.cluster.members[0].give_back(shared_lock.Link(near, session.cluster.members[0]))
    took = 0.0
    shares = []

    def answer(link: object, head: str, body: bytes, deadline: float, limit: int) -> Any:
        shares.append(deadline - vars(shared_lock)["monotonic"]())
        jump(took)
        return 200, '{"header": {"cluster_id": "1", "revision": "1"}}'

    def last_share(*durations: float, call: shared_lock.Call[Any] = shared_lock.HELD) -> Any:
        nonlocal took
        for duration in durations:
            took = duration
            session.post(call, json={}, deadline=math.inf)
        return pytest.approx(shares[-1], rel=0.01)

    monkeypatch.setattr(shared_lock.Link, "ask", answer)

    half_of_the_timeout = 2.5
    assert last_share(*[0.001] * 9) == half_of_the_timeout
    assert last_share(2.4, 0.001) == half_of_the_timeout  # one slow call says little
    assert last_share(*[1.4] * 20) == 3 * 1.4
    assert last_share(0.001, call=shared_lock.REVOKE) == 3 * 1.4  # no less than a read
    assert last_share(*[0.001] * 9) == half_of_the_timeout
    near.close()
    far.close()


def test_what_was_never_sent_was_not_applied_and_gives_no_member_a_bad_name() -> None:
    session = session_of(1)
    [member] = session.cluster.members
    near, far = socket.socketpair()
    link = shared_lock.Link(near, member)
    member.give_back(link)

    with pytest.raises(shared_lock.NotApplied, match="no time was left"):
        session.post(shared_lock.REVOKE, json={"ID": 1}, deadline=time.monotonic() - 1)

    assert link.is_reusable
    assert member.fault is None
    link.close()
    assert far.recv(1) == b""
    far.close()


def test_a_write_whose_new_connection_could_not_be_looked_at_was_not_applied() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        session = session_of(silent.getsockname()[1], "300ms")

        with pytest.raises(shared_lock.NotApplied, match="timed out"):
            session.post(shared_lock.REVOKE, json={"ID": 1}, deadline=soon())


def test_a_caller_with_little_time_left_gives_no_healthy_member_a_bad_name(
    on_etcd: Daemon, proxy: Proxy, start: Start, key: str
) -> None:
    daemon = start(proxy.url, ETCD_TIMEOUT="1s")
    meet(key, daemon, on_etcd)

    proxy.HOLD_SECONDS = 0.4  # two calls are answered in time, the third has 0.2 s left
    proxy.rules(*((path, "hold", 1) for path in ("/v3/kv/range", "/v3/lease/grant", "/v3/kv/txn")))
    answer = daemon.acquire(key)

    assert (answer.status, proxy.rule) == (500, None)
    assert of_member(daemon, MEMBER_UP, proxy.url) == 1
    assert "etcd member failed" not in daemon.log()


def tls_options(folder: Path) -> list[str]:
    """Options of an etcd that wants a client certificate, and shows one of this folder."""
    files = {"--trusted-ca-file": "ca.crt", "--cert-file": "server.crt", "--key-file": "server.key"}
    return ["--client-cert-auth", *(f"{option}={folder / name}" for option, name in files.items())]


@pytest.fixture(scope="session")
def tls_etcd(folder: Path, pki: Pki) -> Iterator[Etcd]:
    """An etcd that wants a client certificate."""
    server = Etcd(folder, "tls", None, *tls_options(pki.good))
    try:
        yield server.start()
    finally:
        server.stop()


def test_over_tls_with_client_certificates_locks_work(
    tls_etcd: Etcd, pki: Pki, start: Start, key: str
) -> None:
    daemon = start(f"127.0.0.1:{tls_etcd.port}", **pki.env())

    lock = eventually(lambda: (answer := daemon.acquire(key)).status == 201 and answer)

    assert daemon.keep_alive(lock.text).status == 200
    assert daemon.acquire(key).status == 202
    assert daemon.release(lock.text).status == 200


@pytest.mark.parametrize(
    "case, words",
    [
        ("wrong CA", "TLS: its certificate is not accepted: "),
        ("http to https", "https"),
        ("https to http", r"is it http\?"),
        ("stranger", "TLS: .*(certificate|unknown ca)"),
    ],
)
def test_what_is_wrong_with_tls_is_one_understandable_line_and_a_500(
    tls_etcd: Etcd, etcd: Etcd, pki: Pki, start: Start, key: str, case: str, words: str
) -> None:
    eventually(start(tls_etcd.url, **pki.env()).ready)

    endpoint, env = {
        "wrong CA": (tls_etcd.url, pki.env(ca="strangers")),
        "http to https": (f"http://127.0.0.1:{tls_etcd.port}", {}),
        "https to http": (f"https://127.0.0.1:{etcd.port}", pki.env()),
        "stranger": (tls_etcd.url, pki.env(client="strangers")),
    }[case]
    daemon = start(endpoint, ETCD_TIMEOUT="1s", **env)
    answer = daemon.acquire(key)

    assert answer.status == 500
    assert answer.text.startswith("not acquired: ")
    [line] = [line for line in daemon.log().splitlines() if "etcd member failed" in line]
    assert re.search(f"member={endpoint} reason=.*{words}", line), line


def test_certificates_are_read_again_when_replaced(
    tls_etcd: Etcd, pki: Pki, start: Start, key: str, tmp_path: Path
) -> None:
    mine = shutil.copytree(pki.strangers, tmp_path / "mine")
    daemon = start(tls_etcd.url, ETCD_TIMEOUT="1s", **Pki(mine, mine, mine).env())
    refused = daemon.acquire(key)

    for name in ("ca.crt", "client.crt", "client.key"):
        shutil.copy(pki.good / name, mine / name)

    assert refused.status == 500
    assert eventually(lambda: daemon.acquire(key).status == 201)


@pytest.mark.parametrize(
    "release, is_good",
    [
        *(("3.4.41", False), ("3.4.42", True), ("3.5.27", False), ("3.5.28", True)),
        *(("3.6.8", False), ("3.6.9", True), ("3.7.0", True)),
    ],
)
def test_a_release_with_defects_is_warned_of_once_a_start(
    proxy: Proxy, start: Start, release: str, is_good: bool
) -> None:
    proxy.rule = ("/version", release, 10**6)

    daemon = start(proxy.url)
    eventually(lambda: ("/version", release) in proxy.looked)
    await_looks(proxy, 2)

    warnings = re.findall("level=warning .*member=.* release=(.*) better=", daemon.log())
    assert warnings == [release] * (not is_good)
    assert proxy.looked.count(("/version", release)) == 1


@pytest.mark.parametrize("whose", ["good", "lax"])
def test_certificates_are_judged_as_go_and_curl_do(
    tmp_path: Path, pki: Pki, start: Start, start_tls: Start, key: str, whose: str
) -> None:
    """CPython 3.13 and newer would refuse the lax ones."""
    etcd = Etcd(tmp_path, "m0", None, *tls_options(pki._asdict()[whose]))
    try:
        etcd.start()
        daemon, own_port = (
            start(f"127.0.0.1:{etcd.port}", **pki.env(whose, whose)),
            start_tls(pki.lax / "ca.crt"),
        )
        own_port.tls = pki.caller("lax")

        assert eventually(daemon.ready)
        assert (daemon.acquire(key).status, talk(own_port, HEALTH).status) == (201, 200)
    finally:
        etcd.stop()


# == One cluster for life ========================================================================


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Etcd]]:
    """Two clusters of one member each, of which a list may wrongly name both."""
    servers = [Etcd(tmp_path, name) for name in ("one", "other")]
    try:
        for server in servers:
            server.start()
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def balancer(two: list[Etcd]) -> Iterator[Proxy]:
    """One address that leads to the first of two clusters, until a test leads it elsewhere."""
    with contextlib.closing(Proxy(two[0])) as between:
        yield between


def is_foreign_known(daemon: Daemon) -> bool:
    """Whether the daemon has seen another cluster than its own."""
    return gauge(daemon, "etcd_foreign_cluster") == 1


def errors(daemon: Daemon, word: str = "") -> list[str]:
    """The errors in its log that have this word."""
    return [line for line in daemon.log().splitlines() if "level=error" in line and word in line]


def await_looks(seen_by: Proxy, count: int = 3) -> None:
    """Waits for so many more looks whose answers arrive as etcd gave them."""
    before = seen_by.looked.count((Proxy.LOOK, ""))
    eventually(lambda: seen_by.looked.count((Proxy.LOOK, "")) >= before + count)


def lent_in(etcd: Etcd, key: str) -> set[str]:
    """The keys that begin so and are lent in this cluster."""
    first, end = PREFIX + key.encode(), PREFIX + key.encode() + b"\xff"
    wish = {"key": base64.b64encode(first).decode(), "range_end": base64.b64encode(end).decode()}
    found = etcd.call("/kv/range", wish).get("kvs", [])
    return {base64.b64decode(kv["key"]).decode("utf-8") for kv in found}


class Split(NamedTuple):
    """A daemon that lent two locks, and then met a second cluster in its list."""

    daemon: Daemon
    own: Etcd
    other: Etcd
    leases: list[str]  # of the keys "kept" and "released"


@pytest.fixture(scope="session")
def split(folder: Path) -> Iterator[Split]:
    folder = folder / "split"
    folder.mkdir()
    other = Etcd(folder, "other")
    with Etcd(folder, "own") as own:
        daemon = Daemon(folder, f"{other.url},{own.url}", ETCD_TIMEOUT="2s")
        try:
            leases = [daemon.acquire(key).text for key in ("kept", "released")]
            other.start().wait()
            eventually(lambda: is_foreign_known(daemon))
            yield Split(daemon, own, other, leases)
            assert daemon.stop() == 0
        finally:
            daemon.process.kill()
            other.stop()


@pytest.mark.parametrize(
    "headers", [{}, {"x-lease-wait": "5s"}, {"x-lease-id": "4711"}], ids=["", "waits", "with an ID"]
)
def test_while_another_cluster_is_known_nothing_is_granted_and_the_answer_says_what_to_do(
    split: Split, key: str, headers: dict[str, str]
) -> None:
    answer = split.daemon.acquire(key, **headers)

    assert answer.status == 500
    one_line(answer, "not acquired: ", split.own.url, split.other.url, "restart")
    for etcd in (split.own, split.other):
        assert re.search(f"{etcd.cluster_id()}|{etcd.cluster_id():x}", answer.text)


def test_while_another_cluster_is_known_what_was_lent_is_kept_and_released(split: Split) -> None:
    kept, released = split.leases

    answers = [split.daemon.keep_alive(kept)]
    if split.own.key("released"):
        answers.append(split.daemon.release(released))

    assert {answer.status for answer in answers} == {200}
    assert (split.own.key("kept") is None, split.own.key("released")) == (False, None)
    assert [split.daemon.request("GET", path).status for path in ("/ready", "/health")] == [200] * 2


@pytest.mark.parametrize(
    "method, path, body, headers",
    [
        ("POST", "/keepalive", "4711", {}),
        ("DELETE", "/lease", "4711", {}),
        ("GET", "/lease?key=free", None, {}),
        ("DELETE", "/lease?key=free", None, {"If-Match": '"4711"'}),
    ],
)
def test_while_another_cluster_is_known_nobody_is_told_that_anything_is_gone_or_free(
    split: Split, method: str, path: str, body: str | None, headers: dict[str, str]
) -> None:
    assert split.daemon.request(method, path, body, headers).status == 500


def test_another_cluster_is_told_once_in_the_log_and_is_never_used(split: Split, key: str) -> None:
    leases, looks = split.other.leases(), calls(split.other)["Range"]
    for number in range(3):
        split.daemon.acquire(f"{key}-{number}")

    eventually(lambda: calls(split.other)["Range"] >= looks + 3)  # it goes on looking

    assert len(errors(split.daemon, split.other.url)) == 1
    assert leases == set()
    assert calls(split.other).keys() <= {"Range", "LeaseLeases"}  # the second is this test's own


@pytest.mark.parametrize("by", ["list", "name", "balancer", "the eighth connection"])
def test_before_the_first_grant_two_clusters_are_one_too_many(
    two: list[Etcd], balancer: Proxy, start: Start, tmp_path: Path, key: str, by: str
) -> None:
    one, other = two
    balancer.targets = itertools.cycle([one] * 7 + [other] if "eighth" in by else two)
    names = Names(tmp_path, m="127.0.0.1 127.0.0.2")
    with contextlib.closing(Proxy(other, one.port, "127.0.0.2")):
        daemon = {
            "list": lambda: start(f"{one.url},{other.url}"),
            "name": lambda: start(f"m.test:{one.port}", command=names.command),
        }.get(by, lambda: start(balancer.url))()

        answers = together(30, lambda number: daemon.acquire(f"{key}-{number // 2}"))

        assert {answer.status for _, answer in answers} == {500}
        assert is_foreign_known(daemon)
    assert (one.leases(), other.leases()) == (set(), set())


def test_replicas_that_start_together_on_members_of_two_clusters_grant_nothing(
    two: list[Etcd], start: Start, key: str, pool: Pool
) -> None:
    slow = [Proxy(member) for member in two]
    for between in slow:
        between.HOLD_SECONDS = 1
        between.rule = (Proxy.LOOK, "hold", 10**6)
    lists = [f"{two[0].url},{slow[1].url}", f"{slow[0].url},{two[1].url}"]

    statuses = list(pool.map(lambda n: start(lists[n % 2]).acquire(key).status, range(4)))

    for between in slow:
        between.close()
    assert statuses == [500] * 4


@pytest.mark.parametrize("turns", ["alternate", "are random"])
def test_one_replica_before_two_clusters_lends_no_lock_twice(
    two: list[Etcd], balancer: Proxy, start: Start, key: str, turns: str
) -> None:
    daemon = start(balancer.url)
    assert daemon.acquire(f"{key}-before").status == 201
    at_random = iter(lambda: random.choice(two), None)
    balancer.targets = itertools.cycle(two) if turns == "alternate" else at_random

    answers = together(60, lambda number: daemon.acquire(f"{key}-{number // 2}"))
    eventually(lambda: is_foreign_known(daemon), 20)
    after = [daemon.acquire(f"{key}-{number}-after").status for number in range(30)]

    assert {answer.status for _, answer in answers} <= {201, 202, 500}
    assert after == [500] * 30
    assert (lent_in(two[1], key), two[1].leases()) == (set(), set())


def test_several_replicas_lend_no_lock_twice_once_each_has_seen_the_other_cluster(
    two: list[Etcd], balancer: Proxy, start: Start, key: str
) -> None:
    with contextlib.closing(Proxy(two[1])) as between:
        replicas = [start(balancer.url), start(between.url)]
        for number, replica in enumerate(replicas):
            assert replica.acquire(f"{key}-{number}").status == 201
        balancer.targets = itertools.cycle(reversed(two))  # the other one first: one new
        between.targets = itertools.cycle(two)  # connection in ten seconds has to do

        eventually(lambda: all(map(is_foreign_known, replicas)), 20)
        asked = [replica.acquire(f"{key}-{n}").status for n in range(30) for replica in replicas]

    assert set(asked) == {500}
    assert not lent_in(two[0], key) & lent_in(two[1], key)


def test_a_name_that_moves_to_another_cluster_while_ours_lives_is_seen(
    two: list[Etcd], start: Start, tmp_path: Path, key: str
) -> None:
    one, other = two
    names = Names(tmp_path, m="127.0.0.1")
    daemon = start(f"m.test:{one.port}", command=names.command)
    with contextlib.closing(Proxy(other, one.port, "127.0.0.2")) as moved:
        assert daemon.acquire(f"{key}-before").status == 201
        names.tell(m="127.0.0.2")

        eventually(lambda: is_foreign_known(daemon), 20)

        assert [daemon.acquire(f"{key}-{number}").status for number in range(5)] == [500] * 5
        assert moved.seen == []
    assert other.leases() == set()


def test_a_cluster_that_was_rebuilt_under_another_token_wants_a_restart(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    daemon = start(own_etcd.url, ETCD_TIMEOUT="2s")
    lease, before = daemon.acquire(key).text, own_etcd.cluster_id()

    own_etcd.rebuild("--initial-cluster-token", "another")
    eventually(lambda: is_foreign_known(daemon))
    refused, kept = daemon.acquire(key), daemon.keep_alive(lease)
    daemon.stop()

    assert own_etcd.cluster_id() != before
    assert (refused.status, kept.status) == (500, 500)
    one_line(refused, "not acquired: ", own_etcd.url, "restart")
    assert start(own_etcd.url).acquire(key).status == 201


@pytest.fixture
def aged(own_etcd: Etcd, start: Start, key: str) -> Iterator[tuple[Daemon, Proxy]]:
    """A daemon that has seen ten changes of its etcd, and what stands between the two."""
    with contextlib.closing(Proxy(own_etcd)) as between:
        daemon = start(between.url)
        for number in range(10):
            assert daemon.acquire(f"{key}-{number}").status == 201
        await_looks(between)
        yield daemon, between


def test_a_cluster_that_went_back_to_an_older_revision_is_one_error_in_the_log_and_serves(
    aged: tuple[Daemon, Proxy], own_etcd: Etcd, key: str
) -> None:
    daemon, between = aged
    before = own_etcd.cluster_id()

    own_etcd.rebuild()
    eventually(lambda: errors(daemon, "revision"))
    await_looks(between, 4)

    assert own_etcd.cluster_id() == before
    assert len(errors(daemon)) == 1
    assert (daemon.acquire(f"{key}-0").status, is_foreign_known(daemon)) == (201, False)


@pytest.mark.parametrize("look", ["late", "stale"])
def test_a_look_that_is_late_or_once_stale_is_no_false_alarm(
    aged: tuple[Daemon, Proxy], key: str, look: str
) -> None:
    daemon, between = aged

    between.rule = (Proxy.LOOK, "stale" if look == "stale" else "wait", 1)
    eventually(lambda: between.rule is None)
    assert daemon.acquire(f"{key}-meanwhile").status == 201
    between.go_on.set()
    await_looks(between)

    assert errors(daemon) == []


def test_two_looks_that_are_stale_are_an_alarm(aged: tuple[Daemon, Proxy]) -> None:
    daemon, between = aged

    between.rule = (Proxy.LOOK, "stale", 10**6)

    eventually(lambda: errors(daemon, "revision"))


def test_nothing_is_granted_before_each_member_was_looked_at_or_half_of_the_timeout_is_over(
    etcd: Etcd, start: Start, key: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        daemon = start(f"127.0.0.1:{silent.getsockname()[1]},{etcd.url}", ETCD_TIMEOUT="4s")

        answer = daemon.acquire(key)

        assert answer.status == 201
        assert time.monotonic() - began > 2


def test_each_new_connection_begins_with_a_look_and_eight_are_looked_at_before_a_grant(
    proxy: Proxy, start: Start, key: str
) -> None:
    daemon = start(proxy.url)
    assert daemon.acquire(key).status == 201
    before_the_grant = len(proxy.first)

    together(30, lambda number: daemon.acquire(f"{key}-{number}"))  # opens more

    assert before_the_grant >= 8
    assert set(proxy.first) == {Proxy.LOOK}


def test_of_the_connections_that_were_made_to_look_few_stay_open(
    proxy: Proxy, start: Start
) -> None:
    without_etcd = start("mock").descriptors()

    daemon = start(proxy.url)
    eventually(lambda: len(proxy.first) >= 8)

    assert eventually(lambda: daemon.descriptors() <= without_etcd + 4)


def test_after_the_first_looks_nothing_waits_and_later_ones_go_over_a_kept_connection(
    proxy: Proxy, start: Start, key: str
) -> None:
    daemon = start(proxy.url, ETCD_TIMEOUT="200s")  # half of it would be too long for this test
    assert daemon.acquire(key).status == 201
    opened = len(proxy.first)
    looks = proxy.looked.count((Proxy.LOOK, ""))

    eventually(lambda: proxy.looked.count((Proxy.LOOK, "")) >= looks + 4)  # one a second

    assert len(proxy.first) <= opened + 1
    assert daemon.acquire(f"{key}-2").status == 201


def test_a_release_of_etcd_that_cannot_be_asked_makes_no_member_sick_for_good(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    with contextlib.closing(Proxy(own_etcd)) as proxy:
        proxy.rule = ("/version", "503", 10**6)
        daemon = start(proxy.url)
        eventually(lambda: proxy.looked.count((Proxy.LOOK, "")) >= 16 + 8)  # and looks go on

        assert len(proxy.first) <= 8 + 2
        assert [path for path, _ in proxy.looked].count("/version") == 1
        assert daemon.acquire(key).status == 201
        assert of_member(daemon, MEMBER_UP, proxy.url) == 1


def test_first_looks_that_break_off_are_made_once_more(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    proxy = Proxy(own_etcd)
    proxy.rule = (Proxy.LOOK, "drop-request", 2)

    daemon = start(proxy.url)

    eventually(lambda: len(proxy.first) >= 2 + 8, 8)  # one each ten seconds otherwise
    assert daemon.acquire(key).status == 201
    proxy.close()


def test_connections_to_etcd_that_a_crowd_needed_are_closed_when_nobody_uses_them(
    etcd: Etcd, start: Start, key: str
) -> None:
    daemon = start(etcd.url, command=changed(after="shared_lock.MAX_IDLE_SECONDS = 1"))
    assert daemon.acquire(key).status == 201
    before = daemon.descriptors()

    together(40, lambda number: daemon.acquire(f"{key}-{number}"))
    after = daemon.descriptors()

    assert after > before
    assert eventually(lambda: daemon.descriptors() <= before)


def test_a_member_whose_name_has_no_address_is_not_looked_for_on_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as another:
        endpoint = shared_lock.Address("etcd", another.getsockname()[1])
        member = shared_lock.Member(endpoint, "", endpoint.url())

        with pytest.raises(shared_lock.NotApplied, match=r"^its name has no address$"):
            member.connect(None, soon())


def test_a_tls_handshake_has_the_time_that_the_connection_left(
    jump: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = socket.socketpair()
    left: list[float | None] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        jump(3)
        near.settimeout(timeout)
        return near

    def wrap(sock: socket.socket, server_hostname: str) -> socket.socket:
        left.append(sock.gettimeout())
        return sock

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *_: None)  # it is no TCP
    tls: Any = types.SimpleNamespace(get=lambda: types.SimpleNamespace(wrap_socket=wrap))
    member = shared_lock.Member(shared_lock.Address("etcd", 2379, True), "127.0.0.1", "m")

    link = member.connect(tls, shared_lock.deadline_after(5))

    assert left == [pytest.approx(2)]
    link.close()
    far.close()


@pytest.mark.parametrize(
    "is_kept, says, told, is_sick",
    [
        (True, b"", r"^the connection was closed$|reset", False),
        (True, b"HTTP/1.1 200", r"is it https\?; does this port speak gRPC only", True),
        (False, b"", r"is it https\?; does this port speak gRPC only", True),
        (False, b"\0\0\6\4\r\n\r\n", r"^not HTTP: .* gRPC only", True),
        (False, ssl.SSLEOFError(8, "EOF"), "^TLS: it hung up; does it accept our cert", True),
    ],
)
def test_a_connection_that_breaks_is_the_members_fault_unless_it_had_idled(
    is_kept: bool, says: Any, told: str, is_sick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = socket.socketpair()
    member = Met().member
    idle = shared_lock.Link(socket.socket(), member)
    member.give_back(idle)
    link = shared_lock.Link(near, member)
    link.is_kept = is_kept
    if isinstance(says, bytes):
        far.sendall(says)
        far.shutdown(socket.SHUT_WR)
    else:

        def fail(*_: object) -> Any:
            raise says

        monkeypatch.setattr(shared_lock.Wire, "send", fail)

    with pytest.raises(shared_lock.OutcomeUnknown, match=told) as fault:
        link.ask("GET / HTTP/1.1\r\n", b"", soon(), 100)

    assert fault.value.sick is is_sick
    assert idle.is_reusable is is_sick  # those of the same age have ended, too
    for sock in (near, far):
        sock.close()
    idle.close()


def test_an_answer_that_ends_its_connection_or_failed_leaves_no_connection_to_keep() -> None:
    for head, stays in [
        (b"200 OK", True),
        (b"200 OK\r\nConnection: close", False),
        (b"408 Request Timeout", False),
    ]:
        near, far = socket.socketpair()
        link = shared_lock.Link(near, Met().member)
        far.sendall(b"HTTP/1.1 " + head + b"\r\nContent-Length: 2\r\n\r\n{}")

        status, text = link.ask("GET / HTTP/1.1\r\n", b"", soon(), 100)

        assert (status, text, link.is_reusable) == (int(head[:3]), "{}", stays)
        link.close()
        far.close()


def test_of_connections_that_were_opened_for_looks_one_is_kept() -> None:
    member = Met().member
    pairs = [socket.socketpair() for _ in range(3)]
    links = [shared_lock.Link(near, member) for near, _ in pairs]

    for link in links:
        member.give_back(link, 1)

    assert [link.is_reusable for link in links] == [True, False, False]
    for sock in itertools.chain.from_iterable(pairs):
        sock.close()


@pytest.mark.parametrize("known", ["member", "connection"])
def test_a_reset_by_who_has_answered_before_is_told_without_a_guess(known: str) -> None:
    near, far = socket.socketpair()
    member = Met().member
    member.was_well = known == "member"
    link = shared_lock.Link(near, member)
    link.cluster = "1" if known == "connection" else ""
    far.close()

    with pytest.raises(shared_lock.OutcomeUnknown) as fault:
        link.ask("GET / HTTP/1.1\r\n", b"", soon(), 100)

    assert "?" not in str(fault.value)
    link.close()


def test_a_daemon_that_begins_with_the_wrong_cluster_tells_nobody_that_a_held_lock_is_gone(
    two: list[Etcd], start: Start, key: str
) -> None:
    one, other = two
    right = start(one.url)
    daemons = [start(f"{one.url},{other.url}", ETCD_TIMEOUT="1s") for _ in range(4)]
    leases = [right.acquire(f"{key}-{number}").text for number in range(4)]

    for number, daemon in enumerate(daemons):
        for what in ("keepalive", "look", "release"):
            answer = ask_about(daemon, what, f"{key}-{number}", leases[number])
            assert answer.status in (200, 500), what


def test_a_minute_after_another_cluster_was_seen_last_locks_are_granted_again(
    two: list[Etcd], balancer: Proxy, start: Start, key: str
) -> None:
    daemon = start(balancer.url)
    assert daemon.acquire(key).status == 201
    balancer.targets = itertools.repeat(two[1])
    eventually(lambda: is_foreign_known(daemon), 20)

    balancer.targets = itertools.repeat(two[0])
    mended = time.monotonic()
    eventually(lambda: not is_foreign_known(daemon), 75)

    assert time.monotonic() - mended > 50
    assert daemon.acquire(f"{key}-after").status == 201


class Met:
    """A cluster of members that nobody looks after, and the looks that a test gives it."""

    def __init__(self) -> None:
        self.cluster = shared_lock.Cluster((), shared_lock.Metrics())
        address = shared_lock.Address("127.0.0.1", 1)
        self.member = shared_lock.Member(address, "127.0.0.1", "m")

    def look(self, cluster_id: str, revision: int = 1, at_least: int = 0, new: bool = True) -> None:
        self.cluster.note_look(self.member, cluster_id, revision, at_least, new)


def test_a_grant_that_was_on_its_way_when_another_cluster_was_met_is_refused() -> None:
    met = Met()
    met.look("1")
    met.cluster.bind("1")
    met.cluster.bind("1")

    with pytest.raises(shared_lock.ForeignCluster):
        met.look("2")

    with pytest.raises(shared_lock.Refused, match="two clusters of etcd: m is of cluster 1, m is"):
        met.cluster.bind("1")


def test_of_two_first_grants_in_two_clusters_only_one_is_made() -> None:
    met = Met()
    met.cluster.bind("1")  # the other has looked at its connection before

    with pytest.raises(shared_lock.ForeignCluster):
        met.cluster.bind("2")
    met.cluster.bind("1")


def test_another_cluster_is_forgotten_after_a_minute_and_sixty_looks_over_new_connections(
    jump: Callable[[float], None],
) -> None:
    met = Met()
    met.look("1")
    met.cluster.bind("1")
    with pytest.raises(shared_lock.ForeignCluster):
        met.look("2")

    for _ in range(100):
        met.look("1")
    assert met.cluster.conflict  # a minute is not over

    with pytest.raises(shared_lock.ForeignCluster):
        met.look("2")
    jump(61)
    for _ in range(100):
        met.look("1", new=False)
    for _ in range(59):
        met.look("1")
    assert met.cluster.conflict

    met.look("1")
    assert not met.cluster.conflict


def test_our_own_cluster_is_never_forgotten(jump: Callable[[float], None]) -> None:
    met = Met()
    met.look("1")
    met.cluster.bind("1")

    for _ in range(100):
        jump(1)
        with pytest.raises(shared_lock.ForeignCluster):
            met.look("2")

    assert "m is of cluster 1, m is of cluster 2" in met.cluster.conflict
    with pytest.raises(shared_lock.Refused):
        met.cluster.bind("1")


def test_the_kept_connections_of_a_member_that_fails_are_closed() -> None:
    met = Met()
    near, far = socket.socketpair()
    link = shared_lock.Link(near, met.member)
    met.member.give_back(link)

    met.cluster.mark_sick(met.member, shared_lock.StorageError("away"))

    assert not link.is_reusable
    assert met.member.take_idle("") is None
    far.close()


def test_that_etcd_listens_on_one_of_the_two_addresses_of_localhost_is_no_news() -> None:
    metrics = shared_lock.Metrics()
    cluster = shared_lock.Cluster((), metrics)
    both = cluster.update(shared_lock.Address("localhost", 2379), {"::1", "127.0.0.1"})
    [spare] = [member for member in both if member.host == "::1"]

    cluster.mark_sick(spare, shared_lock.StorageError("connection refused"))

    assert not spare.was_told
    assert "http://127.0.0.1:2379" in metrics.render()
    assert "::1" not in metrics.render()

    cluster.mark_well(spare)
    cluster.mark_sick(spare, shared_lock.StorageError("connection refused"))
    assert spare.was_told
    assert "http://[::1]:2379" in metrics.render()


def test_a_member_that_is_well_again_is_asked_before_one_that_is_sick() -> None:
    met = Met()
    frozen = met.member
    other = shared_lock.Member(shared_lock.Address("127.0.0.1", 2), "127.0.0.1", "other")
    met.cluster.members = (frozen, other)

    for member in (frozen, other):  # that one has no leader for a moment
        met.cluster.mark_sick(member, shared_lock.StorageError("away"))
    met.cluster.mark_well(other)

    assert met.cluster.pick(soon()) is other


def test_that_etcd_went_back_is_told_once_however_often_it_is_looked_at(
    jump: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    met = Met()
    met.look("1", revision=9)

    for _ in range(10):  # callers look, too
        jump(0.3)
        met.look("1", revision=5, at_least=9, new=False)
    told = capfd.readouterr().err
    other = shared_lock.Member(shared_lock.Address("127.0.0.1", 2), "127.0.0.1", "other")
    for _ in range(3):  # were on their way meanwhile
        jump(1)
        met.cluster.note_look(other, "1", 5, 9, False)

    assert told.count("etcd went back") == 1
    assert "etcd went back" not in capfd.readouterr().err


def test_two_stale_looks_with_a_good_one_between_them_are_no_alarm(
    jump: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    met = Met()

    for revision in (9, 5, 9, 5, 9):
        met.look("1", revision, at_least=met.cluster.revision, new=False)
        jump(100)

    assert met.cluster.revision == 9
    assert "etcd went back" not in capfd.readouterr().err


def test_a_connection_whose_answer_was_not_read_whole_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = socket.socketpair()
    member = Met().member
    link = shared_lock.Link(near, member)
    far.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def fail(*_: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(shared_lock, "body_length", fail)
    with pytest.raises(MemoryError):
        link.ask("GET / HTTP/1.1\r\n", b"", soon(), 100)
    member.give_back(link)

    assert member.take_idle("") is None
    far.close()


def test_of_a_stream_the_line_that_fails_is_told() -> None:
    good = '{"result":{"header":{},"ID":"1","TTL":"5"}}'
    bad = '{"error":{"grpc_code":16,"message":"invalid auth token"}}'

    with pytest.raises(shared_lock.Refused, match=r"^invalid auth token$") as fault:
        shared_lock.parse_answer(200, f"{good}\n{bad}\n{good}\n", True)

    assert fault.value.code == 16


def test_what_a_write_was_answered_counts_for_the_next_look() -> None:
    met = Met()
    met.look("1", revision=5)

    for revision in (9, 8):
        met.cluster.note_revision(revision)

    assert met.cluster.revision == 9


def test_what_was_written_while_slow_looks_were_on_their_way_is_no_alarm(
    jump: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    session = session_of(1)
    [member] = session.cluster.members
    near, far = socket.socketpair()
    member.give_back(shared_lock.Link(near, member))

    def answer(*_: object) -> tuple[int, str]:
        seen = session.cluster.revision
        session.cluster.note_revision(seen + 7)  # another's write
        jump(1.4)
        return 200, f'{{"header": {{"cluster_id": "1", "revision": "{seen}"}}}}'

    monkeypatch.setattr(shared_lock.Link, "ask", answer)
    for _ in range(5):
        session.post(shared_lock.LOOK, json={}, deadline=math.inf)

    assert session.cluster.revision == 5 * 7
    assert "etcd went back" not in capfd.readouterr().err
    near.close()
    far.close()


def test_a_connection_that_answers_for_two_clusters_is_told_and_never_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = session_of(1)
    [member] = session.cluster.members
    near, far = socket.socketpair()
    link = shared_lock.Link(near, member)
    member.give_back(link)
    answers = iter("112")

    def answer(*_: object) -> tuple[int, str]:
        return 200, f'{{"header": {{"cluster_id": "{next(answers)}", "revision": "1"}}}}'

    monkeypatch.setattr(shared_lock.Link, "ask", answer)
    session.post(shared_lock.LOOK, json={}, deadline=math.inf)
    session.post(shared_lock.HELD, json={}, deadline=math.inf)
    with pytest.raises(shared_lock.OutcomeUnknown, match="it answers for another cluster, too, 2"):
        session.post(shared_lock.REVOKE, json={}, deadline=math.inf)

    assert "cluster 1" in session.cluster.conflict
    assert "cluster 2" in session.cluster.conflict
    assert not link.is_reusable
    far.close()


def test_looks_over_a_kept_connection_do_not_let_another_cluster_be_forgotten(
    jump: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(1)
    [member] = session.cluster.members
    near, far = socket.socketpair()
    member.give_back(shared_lock.Link(near, member))

    def answer(*_: object) -> tuple[int, str]:
        jump(1)
        return 200, '{"header": {"cluster_id": "1", "revision": "1"}}'

    monkeypatch.setattr(shared_lock.Link, "ask", answer)
    session.post(shared_lock.LOOK, json={}, deadline=math.inf)
    session.cluster.bind("1")
    with pytest.raises(shared_lock.ForeignCluster):
        session.cluster.note_look(member, "2", 1, 0, True)
    for _ in range(200):
        session.post(shared_lock.LOOK, json={}, deadline=math.inf)

    assert session.cluster.conflict
    near.close()
    far.close()


def test_that_an_unchosen_cluster_has_fewer_revisions_than_another_is_no_alarm(
    jump: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    met = Met()
    for cluster_id, revision in [("2", 1000), ("1", 5), ("2", 1000)] + [("1", 5)] * 70:
        before = met.cluster.revision
        jump(1)
        met.look(cluster_id, revision, before)

    assert not met.cluster.conflict
    assert met.cluster.revision == 5
    assert "etcd went back" not in capfd.readouterr().err


def test_a_kept_connection_to_another_cluster_is_never_used_again() -> None:
    met = Met()
    near, far = socket.socketpair()
    link = shared_lock.Link(near, met.member)
    link.cluster = "2"  # met before ours was chosen
    met.member.give_back(link)

    assert met.member.take_idle("1") is None
    assert not link.is_reusable
    far.close()


def test_who_runs_out_of_time_is_told_which_member_failed_and_why() -> None:
    met = Met()
    with pytest.raises(shared_lock.NotApplied, match="no address"):
        met.cluster.pick(time.monotonic() - 1)
    met.cluster.members = (met.member,)

    met.cluster.mark_sick(met.member, shared_lock.StorageError("away"))

    with pytest.raises(shared_lock.NotApplied, match=r"^m: away$"):
        met.cluster.pick(time.monotonic() - 1)


def test_kept_connections_that_nobody_uses_any_more_are_closed() -> None:
    member = Met().member
    pairs = [socket.socketpair() for _ in range(3)]
    links = [shared_lock.Link(near, member) for near, _ in pairs]
    for number, link in enumerate(links):
        member.give_back(link)
        link.idle_since = number

    member.hang_up(unused_since=2)

    assert [link.is_reusable for link in links] == [False, False, True]
    assert member.take_idle("") is links[2]
    assert member.take_idle("") is None
    for near, far in pairs:
        near.close()
        far.close()


# == Names: several addresses, and name servers that say something else, or nothing ==============

RESOLVER = """
import runpy, socket, sys, time

real, file = socket.getaddrinfo, sys.argv.pop(1)

def getaddrinfo(host, port, *more, **named):
    with open(file) as lines:
        names = dict(line.split(" ", 1) for line in lines)
    if host not in names:
        return real(host, port, *more, **named)
    time.sleep(30 if names[host].strip() == "hangs" else 0)
    if not names[host].strip(" \\nhangs"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [info for address in names[host].split() for info in real(address, port, *more, **named)]

socket.getaddrinfo = getaddrinfo
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Names:
    """What the daemon is told about names: addresses, nothing, or that the name server "hangs"."""

    def __init__(self, folder: Path, **names: str) -> None:
        self._file = folder / "names"
        self.command = [PYTHON, "-c", RESOLVER, str(self._file), *SERVE]
        self.tell(**names)

    def tell(self, **names: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text("".join(f"{name}.test {addresses}\n" for name, addresses in names.items()))
        new.rename(self._file)


@pytest.fixture
def hole(etcd: Etcd) -> Iterator[None]:
    """Somebody at 127.0.0.3 who accepts connections to etcd's port, and never answers."""
    with socket.create_server(("127.0.0.3", etcd.port)):
        yield


@pytest.mark.usefixtures("hole")
@pytest.mark.parametrize("sick", ["127.0.0.2", "127.0.0.3", "127.0.0.2 127.0.0.3 127.0.0.4"])
def test_of_the_addresses_of_a_name_the_one_that_answers_is_found_and_kept(
    etcd: Etcd, start: Start, tmp_path: Path, key: str, sick: str
) -> None:
    daemon = start(f"m.test:{etcd.port}", command=Names(tmp_path, m=f"{sick} 127.0.0.1").command)

    began = time.monotonic()
    statuses = [daemon.acquire(f"{key}-{number}").status for number in range(20)]

    assert statuses == [201] * 20
    assert time.monotonic() - began < 5  # the budget of one
    assert daemon.ready()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_name_with_addresses_of_both_families_is_asked_at_both(
    etcd: Etcd, start: Start, tmp_path: Path, key: str
) -> None:
    with contextlib.closing(Proxy(etcd, etcd.port, "::1")):
        daemon = start(f"m.test:{etcd.port}", command=Names(tmp_path, m="127.0.0.2 ::1").command)

        assert daemon.acquire(key).status == 201


@pytest.mark.usefixtures("hole")
@pytest.mark.parametrize("before", ["127.0.0.2", "127.0.0.3", ""])
def test_a_name_is_looked_up_again_when_its_member_fails(
    etcd: Etcd, start: Start, tmp_path: Path, key: str, before: str
) -> None:
    names = Names(tmp_path, m=before)
    daemon = start(f"m.test:{etcd.port}", command=names.command, ETCD_TIMEOUT="1s")
    down = daemon.acquire(key)

    names.tell(m="127.0.0.1")

    assert down.status == 500
    assert eventually(lambda: daemon.acquire(key).status == 201)
    assert [
        line for line in daemon.request("GET", "/metrics").text.splitlines() if "member_up{" in line
    ] == [f'shared_lock_etcd_member_up{{member="http://m.test:{etcd.port}"}} 1']


@pytest.mark.parametrize("before", ["hangs", "127.0.0.2"])
def test_a_name_server_that_hangs_costs_nobody_more_than_the_budget(
    etcd: Etcd, start: Start, tmp_path: Path, key: str, before: str
) -> None:
    names = Names(tmp_path, m=before)
    daemon = start(f"m.test:{etcd.port},{etcd.url}", command=names.command, ETCD_TIMEOUT="2s")
    first = together(1, lambda _: daemon.acquire(f"{key}-first"))
    names.tell(m="hangs")

    time.sleep(1.5)  # until the name is looked up again
    more = together(20, lambda number: daemon.acquire(f"{key}-{number}"))

    assert {answer.status for _, answer in first + more} == {201}
    assert max(seconds for seconds, _ in first + more) < 2.5
    assert (daemon.ready(), daemon.request("GET", "/health").status, daemon.stop()) == (
        True,
        200,
        0,
    )


def test_where_no_name_can_be_looked_up_answers_say_so_within_the_budget(
    start: Start, tmp_path: Path, key: str
) -> None:
    daemon = start("m.test:1", command=Names(tmp_path, m="hangs").command, ETCD_TIMEOUT="1s")

    began = time.monotonic()
    answers = daemon.acquire(key), daemon.request("GET", "/ready")

    assert [answer.status for answer in answers] == [500, 503]
    assert time.monotonic() - began < 4
    assert daemon.request("GET", "/health").status == 200


def test_an_address_of_a_name_that_never_answers_is_reported(
    etcd: Etcd, start: Start, tmp_path: Path, key: str
) -> None:
    daemon = start(f"m.test:{etcd.port}", command=Names(tmp_path, m="127.0.0.1 127.0.0.2").command)
    assert daemon.acquire(key).status == 201

    eventually(lambda: re.search("level=warning .*127[.]0[.]0[.]2", daemon.log()))

    up = parse_metrics(daemon.request("GET", "/metrics").text)["shared_lock_etcd_member_up"]
    [(dead, value), (_, healthy)] = sorted(up.items(), key=lambda sample: sample[1])
    assert (value, healthy) == (0, 1)
    assert "127.0.0.2" in dict(dead)["member"]


def test_an_address_that_a_name_no_longer_has_is_left(
    etcd: Etcd, start: Start, tmp_path: Path, key: str
) -> None:
    names = Names(tmp_path, m="127.0.0.2")
    daemon = start(f"m.test:{etcd.port}", command=names.command)
    with contextlib.closing(Proxy(etcd, etcd.port, "127.0.0.2")) as old:
        assert daemon.acquire(key).status == 201
        names.tell(m="127.0.0.1")  # the old one is well, and nothing fails

        eventually(lambda: is_left(old, daemon, key), 20)
        eventually(lambda: nobody_looks_at(old))


def nobody_looks_at(old: Proxy) -> bool:
    looked = len(old.looked)
    time.sleep(1.5)  # longer than between two looks
    return len(old.looked) == looked


def is_left(old: Proxy, daemon: Daemon, key: str) -> bool:
    """Whether an acquire and a release ask nothing of this one."""
    seen = len(old.seen)
    answer = daemon.acquire(f"{key}-{seen}-{next(_numbers)}")
    assert (answer.status, daemon.release(answer.text).status) == (201, 200)
    return len(old.seen) == seen


# == etcd's auth =================================================================================


def enable_auth(etcd: Etcd) -> None:
    """Users root, lock (who may read and write our prefix) and other (another one); their passwords
    are secret."""
    for name, first, end in (
        ("root", b"", b""),
        ("lock", b"/shared-lock/", b"/shared-lock0"),
        ("other", b"a", b"b"),
    ):
        etcd.call("/auth/user/add", {"name": name, "password": "secret"})
        etcd.call("/auth/role/add", {"name": name})
        keys = {
            "key": base64.b64encode(first).decode(),
            "range_end": base64.b64encode(end).decode(),
        }
        if first:
            etcd.call("/auth/role/grant", {"name": name, "perm": {"permType": "READWRITE", **keys}})
        etcd.call("/auth/user/grant", {"user": name, "role": name})
    etcd.call("/auth/enable", {})


def is_up(etcd: Etcd) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(etcd.port, "GET", "/health", timeout=3).status == 200
    return False


def start_as(
    start: Start, etcd: Etcd, user: str = "lock", password: str = "secret", **env: str
) -> Daemon:
    return start(etcd.url, ETCD_USERNAME=user, ETCD_PASSWORD=password, DEBUG="true", **env)


def use(daemon: Daemon, key: str) -> list[int]:
    """The statuses of a lock's life."""
    lock = daemon.acquire(key)
    own = daemon.acquire(key, **{"x-lease-id": lock.text})
    answers = [lock, own, daemon.acquire(key), daemon.keep_alive(lock.text), daemon.look(key)]
    answers += [
        daemon.request("GET", "/lease?prefix="),
        daemon.release(lock.text),
        daemon.keep_alive(lock.text),
    ]
    return [
        answer.status for answer in (*answers, daemon.look(key), daemon.request("GET", "/ready"))
    ]


WELL = [201, 201, 202, 200, 200, 200, 200, 204, 404, 200]


def test_with_auth_a_user_who_may_use_our_prefix_is_enough(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    before = start_as(start, own_etcd)
    assert use(before, key) == WELL

    enable_auth(own_etcd)

    assert use(before, key) == use(start_as(start, own_etcd), key) == WELL
    assert not re.search(
        "secret|[A-Za-z]{16}[.][0-9]+", before.log()
    )  # the password, a token of etcd


@pytest.mark.parametrize(
    "user, password, shown",
    [
        ("", "", "user name is empty"),
        ("other", "secret", "permission denied"),
        ("lock", "mistyped", "authentication"),
    ],
    ids=["without a user", "a user of other keys", "with a wrong password"],
)
def test_who_may_not_is_told_so_with_few_tries_and_used_once_he_may(
    own_etcd: Etcd, start: Start, key: str, user: str, password: str, shown: str
) -> None:
    enable_auth(own_etcd)
    began = time.monotonic()
    daemon = start_as(start, own_etcd, user, password)

    answers = [
        answer for _, answer in together(30, lambda number: daemon.acquire(f"{key}-{number}"))
    ]
    answers += [
        daemon.keep_alive("5"),
        daemon.release("5"),
        daemon.look(key),
        daemon.request("GET", "/ready"),
    ]
    assert password != "mistyped" or eventually(lambda: calls(own_etcd)["Authenticate"] > 2)
    tries, took = calls(own_etcd)["Authenticate"], time.monotonic() - began

    allowed = (
        {200, 204}
        if user == "other" or "/3.4." in ask(own_etcd.port, "GET", "/version").text
        else set()
    )
    assert {answer.status for answer in answers} - allowed == {500, 503}
    assert all(answer.status in allowed or shown in answer.text for answer in answers)
    assert tries <= took + 2
    assert "mistyped" not in daemon.log() + "".join(answer.text for answer in answers)
    assert daemon.log().count("log-in refused") == (password == "mistyped")
    token = own_etcd.call("/auth/authenticate", {"name": "root", "password": "secret"})["token"]
    ask(own_etcd.port, "POST", "/v3/auth/disable", "{}", {"Authorization": token})
    assert eventually(daemon.ready)


def test_one_log_in_serves_all_callers_when_etcd_has_lost_its_tokens(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    enable_auth(own_etcd)
    daemon = start_as(start, own_etcd)
    leases = [
        answer.text for _, answer in together(30, lambda number: daemon.acquire(f"{key}-{number}"))
    ]
    time.sleep(
        0.5
    )  # a log-in that is younger than 0.1 s is in etcd's log only, and done again at its start

    own_etcd.stop()
    own_etcd.start()
    eventually(lambda: is_up(own_etcd))
    answers = together(30, lambda number: daemon.look(f"{key}-{number}"))
    answers += together(30, lambda number: daemon.keep_alive(leases[number]))

    assert {answer.status for _, answer in answers} == {200}
    assert calls(own_etcd)["Authenticate"] == 1


def test_while_an_etcd_with_auth_is_killed_and_restarted_no_request_fails(
    own_etcd: Etcd, start: Start, key: str, pool: Pool
) -> None:
    enable_auth(own_etcd)
    daemon, done = start_as(start, own_etcd, ETCD_TIMEOUT="20s"), threading.Event()

    def go_on(number: int) -> list[list[int]]:
        return [
            use(daemon, f"{key}-{number}-{turn}")
            for turn in itertools.takewhile(not_done, itertools.count())
        ]

    def not_done(turn: int) -> bool:
        return not done.is_set()

    clients = [pool.submit(go_on, number) for number in range(8)]
    for _ in range(3):
        time.sleep(1)
        own_etcd.stop()
        own_etcd.start()
        eventually(lambda: is_up(own_etcd))
    time.sleep(1)
    done.set()

    assert [turn for client in clients for turn in client.result(60) if turn != WELL] == []


def test_a_log_in_that_hangs_costs_no_caller_more_than_its_budget(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    proxy = Proxy(own_etcd)
    enable_auth(own_etcd)
    daemon = start(proxy.url, ETCD_USERNAME="lock", ETCD_PASSWORD="secret", ETCD_TIMEOUT="4s")
    eventually(lambda: daemon.acquire(key).status == 201)
    proxy.rule = ("/v3/auth/authenticate", "stop", 1000)
    time.sleep(0.5)  # a younger log-in is in etcd's log only, and done again at its start
    own_etcd.stop()
    own_etcd.start()
    eventually(lambda: is_up(own_etcd))

    def acquire(number: int) -> tuple[float, Answer]:
        time.sleep(number * 0.07)  # each comes while another's log-in hangs
        began = time.monotonic()
        answer = daemon.acquire(f"{key}-{number}")
        return time.monotonic() - began, answer

    with Pool(60) as threads:
        answers = list(threads.map(acquire, range(60)))
    proxy.rule = None
    proxy.go_on.set()

    assert ("/v3/auth/authenticate", "stop") in proxy.seen
    assert max(took for took, _ in answers) < 4.6  # the budget, and a machine that is busy
    assert {answer.status for _, answer in answers} <= {201, 500}
    assert eventually(lambda: daemon.acquire(f"{key}-after").status == 201)
    proxy.close()


def test_one_log_in_serves_all_and_a_refusal_stands_for_a_second(
    jump: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    login = shared_lock.Login("user", "password")
    answers: list[str | shared_lock.StorageError] = []

    def log_in() -> str:
        answer = answers.pop(0)
        if isinstance(answer, shared_lock.StorageError):
            raise answer
        return answer

    def renew(used: str) -> tuple[str, str, bool]:
        """What is raised after who used this header has asked for a log-in."""
        fault = login.renew(used, log_in, shared_lock.deadline_after(1))
        return type(fault).__name__, str(fault), fault.sick

    answers[:] = [shared_lock.Refused("wrong password")] * 2 + ["one", "two"]
    refused = ("Refused", "wrong password", False)
    again = ("NotApplied", "logged in again", False)
    assert [renew(""), renew("")] == [refused] * 2
    assert len(answers) == 3
    for told in (refused, again):
        jump(1.1)
        assert renew("") == told
    first = login.header
    assert first == "Authorization: one\r\n"
    assert capfd.readouterr().err.count("log-in refused") == 1

    assert renew("") == again  # another has logged in meanwhile
    assert answers == ["two"]
    assert renew(first) == again
    assert login.header == "Authorization: two\r\n"

    answers[:] = [shared_lock.OutcomeUnknown("away", sick=False)]
    assert renew(login.header) == ("NotApplied", "away", False)


# == Readiness and metrics =======================================================================


@pytest.mark.parametrize(
    "host, shown", [("b\u00fccher.invalid", "b\u00fccher.invalid"), ("\udcfc.invalid", "?.invalid")]
)
def test_what_is_no_ascii_in_a_label_is_shown_as_far_as_it_is_utf_8(
    start: Start, host: str, shown: str
) -> None:
    daemon = start(f"http://{host}:2379")

    member = f'member="http://{shown}:2379"'
    eventually(lambda: member in daemon.request("GET", "/metrics").text)


def test_it_starts_without_etcd_and_readiness_follows_etcd_while_health_does_not(
    tmp_path: Path, start: Start
) -> None:
    etcd = Etcd(tmp_path)
    daemon = start(etcd.url, ETCD_TIMEOUT="1s")
    try:
        for key in "ab":
            down = daemon.request("GET", "/ready")
            assert [
                down.status,
                daemon.request("GET", "/health").status,
                daemon.acquire(key).status,
            ] == [503, 200, 500]
            one_line(down, "storage failed: ")

            etcd.start().wait()
            assert eventually(daemon.ready)
            assert (daemon.request("HEAD", "/ready")[:2], daemon.acquire(key).status) == (
                (200, b""),
                201,
            )

            etcd.stop()
            assert eventually(lambda: not daemon.ready())
    finally:
        etcd.stop()


MUST_BE_FREE, MUST_EXIST = {"If-None-Match": "*"}, {"If-Match": "*"}
GRANTS = "shared_lock_lease_grant_duration_seconds"
MEMBER_UP, MEMBER_ERRORS = "shared_lock_etcd_member_up", "shared_lock_etcd_errors_total"
Samples = dict[frozenset[tuple[str, str]], float]


def metrics(daemon: Daemon) -> dict[str, Samples]:
    """The page, which is as Prometheus wants it; promtool has a look, too, where there is one."""
    answer = daemon.request("GET", "/metrics")
    assert (
        answer.headers["content-type"].replace(" ", "") == "text/plain;version=0.0.4;charset=utf-8"
    )
    if shutil.which("promtool"):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=answer.body, capture_output=True, timeout=30
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
    return parse_metrics(answer.text)


def of_member(daemon: Daemon, name: str, url: str) -> float:
    return parse_metrics(daemon.request("GET", "/metrics").text)[name][frozenset({("member", url)})]


def test_operations_are_counted_under_the_names_of_the_go_service(daemon: Daemon, key: str) -> None:
    before = collections.Counter(operations(daemon))

    lease = daemon.acquire(key, value="my-value").text
    assert [daemon.acquire(key, **headers).status for headers in ({}, {}, MUST_BE_FREE)] == [
        202,
        202,
        412,
    ]
    assert [daemon.keep_alive(body).status for body in (lease, lease, "17", "x", '"x"')] == [
        200,
        200,
        204,
        400,
        500,
    ]
    assert daemon.request("POST", "/keepalive", "17", MUST_EXIST).status == 412
    assert [daemon.release(body).status for body in (lease, lease, "x", '"x"')] == [
        200,
        204,
        400,
        500,
    ]
    assert daemon.request("DELETE", "/lease", lease, MUST_EXIST).status == 412
    assert [daemon.acquire(k, ttl).status for k, ttl in (("", "1s"), (key, "x"), (key, "1s"))] == [
        400,
        400,
        201,
    ]

    assert collections.Counter(operations(daemon)) - before == {
        "get created": 2,
        "get accepted": 3,
        "prolong success": 2,
        "prolong failure": 2,
        "release success": 1,
        "release failure": 2,
    }
    text = daemon.request("GET", "/metrics").text
    assert not any(secret in text for secret in (key, "my-value", lease))


@pytest.mark.parametrize("storage", ["memory", "etcd"])
def test_what_alerts_rely_on_is_on_the_page_from_the_start(
    start: Start, etcd: Etcd, storage: str
) -> None:
    daemon = start("mock" if storage == "memory" else etcd.url)

    page = metrics(daemon)

    wanted = {("get", status) for status in ("created", "accepted", "error")}
    wanted |= {
        (name, status)
        for name in ("prolong", "release")
        for status in ("success", "failure", "error")
    }
    labels = [frozenset({("operation", name), ("status", status)}) for name, status in wanted]
    assert page["shared_lock_lease_operations_total"] == dict.fromkeys(labels, 0)
    assert page["shared_lock_build_info"] == {frozenset({("version", shared_lock.VERSION)}): 1}
    assert (
        page["shared_lock_waiting"]
        == page["shared_lock_log_lines_dropped_total"]
        == {frozenset(): 0}
    )
    members = [] if storage == "memory" else [frozenset({("member", etcd.url)})]
    assert list(page.get(MEMBER_UP, ())) == list(page.get(MEMBER_ERRORS, ())) == members


def test_the_page_tells_about_its_process(start: Start) -> None:
    daemon = start("mock")

    page = metrics(daemon)
    process = {
        name: values[frozenset()] for name, values in page.items() if name.startswith("process_")
    }
    limit = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)[0]

    assert abs(process.pop("process_start_time_seconds") - time.time()) < 60
    assert 0 < process.pop("process_cpu_seconds_total") < 60
    assert 8 << 20 < process.pop("process_resident_memory_bytes") < 256 << 20
    assert abs(process.pop("process_open_fds") - daemon.descriptors()) < 5
    assert process == {"process_max_fds": limit}


def test_uses_of_the_cache_are_counted_under_the_names_of_the_go_service(start: Start) -> None:
    daemon = start("mock", CACHE_ENABLED="true", CACHE_SIZE="2")
    before = operations(daemon, "cache")

    statuses = [daemon.acquire("a", "1s").status, daemon.acquire("a").status]  # miss, success; hit
    time.sleep(1.05)
    statuses.append(daemon.acquire("a").status)  # expired, update
    statuses += [
        daemon.acquire(key).status for key in "bc"
    ]  # misses, successes; the second drops a
    statuses.append(daemon.acquire("a").status)  # miss; held, which is remembered; drops b

    assert (before, statuses) == ({}, [201, 202, 201, 201, 201, 202])
    assert operations(daemon, "cache") == {
        "get miss": 4,
        "get hit": 1,
        "get expired": 1,
        "set success": 4,
        "set update": 1,
        "evict size_limit": 2,
    }
    assert metrics(daemon)  # a page of this is well-formed, too


def test_what_becomes_of_a_full_cache_and_of_its_entries_is_counted(start: Start) -> None:
    daemon = start("mock", CACHE_ENABLED="true", CACHE_SIZE="1")

    daemon.acquire("a", "1s")
    eventually(lambda: daemon.acquire("a").status == 201)
    daemon.acquire("b")

    counts = operations(daemon, "cache")
    counts.pop("get hit")
    assert counts == {
        "get miss": 2,
        "get expired": 1,
        "set success": 2,
        "set update": 1,
        "evict size_limit": 1,
    }


def test_the_time_of_grants_and_refusals_is_a_cumulative_histogram(start: Start) -> None:
    daemon = start("mock")
    for number in range(5):
        daemon.acquire(str(number))
    lease = daemon.acquire("held").text
    refusals = [daemon.acquire("held", **headers).status for headers in ({}, {}, MUST_BE_FREE)]
    daemon.acquire("held", **{"x-lease-wait": "1s"})
    others = [
        daemon.acquire("").status,
        daemon.acquire("k", "x").status,
        daemon.keep_alive(lease).status,
    ]

    page = metrics(daemon)

    buckets = {
        float(dict(labels)["le"]): count for labels, count in page[GRANTS + "_bucket"].items()
    }
    bounds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, math.inf]
    assert (refusals, others) == ([202, 202, 412], [400, 400, 200])
    assert {dict(labels)["operation"] for labels in page[GRANTS + "_bucket"]} == {"get"}
    assert list(buckets) == bounds and list(buckets.values()) == sorted(buckets.values())
    get_only = frozenset({("operation", "get")})
    assert buckets[math.inf] == page[GRANTS + "_count"][get_only] == 5 + 1 + 3 + 1
    assert 0 < page[GRANTS + "_sum"][get_only] < 0.9  # without the second in line


def test_a_grant_that_took_its_time_is_in_a_later_bucket(
    start: Start, proxy: Proxy, key: str
) -> None:
    daemon = start(proxy.url)
    eventually(daemon.ready)
    proxy.rule = ("/v3/lease/grant", "hold", 1)

    assert daemon.acquire(key).status == 201

    buckets = {
        float(dict(labels)["le"]): count
        for labels, count in metrics(daemon)[GRANTS + "_bucket"].items()
    }
    assert (buckets[0.25], buckets[8], buckets[math.inf]) == (0, 1, 1)


def test_a_caller_that_waits_is_counted_once(start: Start, pool: Pool) -> None:
    daemon = start("mock")
    lease = daemon.acquire("k").text
    daemon.acquire("k", **{"x-lease-wait": "1s"})
    [waiter] = waiters(pool, daemon, "k")
    in_line = metrics(daemon)["shared_lock_waiting"][frozenset()]

    daemon.release(lease)

    assert waiter.result(5).status == 201
    assert operations(daemon) == {"get created": 2, "get accepted": 1, "release success": 1}
    assert (in_line, metrics(daemon)["shared_lock_waiting"][frozenset()]) == (1, 0)


def test_requests_are_counted_by_path_method_and_code(start: Start) -> None:
    daemon = start("mock", PPROF_ENABLED="true")

    lease = daemon.acquire("k").text
    daemon.acquire("k")
    daemon.acquire("k", **MUST_BE_FREE)
    daemon.look("k")
    daemon.keep_alive(lease)
    daemon.release(lease)
    for method, path in [
        ("HEAD", "/health"),
        ("GET", "/ready"),
        ("GET", "/debug/pprof/"),
        ("PATCH", "/lease"),
        ("BREW", "/tea"),
        ("GET", "/lease/"),
    ]:
        daemon.request(method, path)
    talk(daemon, b"nonsense\r\n\r\n")

    named = ["path", "method", "code"]
    counted = metrics(daemon)["shared_lock_http_requests_total"]
    assert {" ".join(dict(labels)[name] for name in named): n for labels, n in counted.items()} == {
        "/lease POST 201": 1,
        "/lease POST 202": 1,
        "/lease POST 412": 1,
        "/lease GET 200": 1,
        "/keepalive POST 200": 1,
        "/lease DELETE 200": 1,
        "/health HEAD 200": 1,
        "/ready GET 200": 1,
        "/debug/pprof/ GET 200": 1,
        "/lease other 405": 1,
        "other other 404": 2,
        "other other 400": 1,
    }


def test_requests_that_are_refused_early_are_counted_under_their_path_too(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("secret\n")
    daemon = start("mock", SERVER_TOKEN_PATH=str(tmp_path / "tokens"))
    known = b"Authorization: Bearer secret"

    assert daemon.acquire("k").status == 401
    assert talk(daemon, post(lock_body("k", KIB64 + 1), known)).status == 413
    assert talk(daemon, get("/nowhere")).status == 401

    page = parse_metrics(talk(daemon, get("/metrics", known)).text)[
        "shared_lock_http_requests_total"
    ]
    expected = [("/lease", "POST", "401"), ("/lease", "POST", "413"), ("other", "other", "401")]
    assert page == {
        frozenset(zip(("path", "method", "code"), one, strict=True)): 1 for one in expected
    }


def test_the_words_of_clients_never_make_the_page_grow(start: Start) -> None:
    daemon, chance = start("mock"), random.Random(14)

    def nonsense(kind: str) -> bytes:
        word = "".join(chance.choices("abcxyzABC", k=9))
        path = {
            "path": f"/{word}",
            "method": "/keepalive",
            "query": f"/lease?key={word}",
            "version": "/x",
        }[kind]
        head = get(
            path,
            method=word if kind == "method" else "GET",
            version="3.1" if kind == "version" else "1.1",
        )
        return (
            head
            if kind != "version"
            else head.replace(b"HTTP/3.1", b"HTTP/1.1\r\n" + word.encode())
        )

    def send(count: int) -> set[str]:
        requests = [
            nonsense(kind)
            for kind in itertools.islice(itertools.cycle(["path", "method", "query"]), count)
        ]
        with contextlib.closing(Talk(daemon)) as client:
            for first in range(0, count, 100):
                client.say(b"".join(requests[first : first + 100]))
                assert {client.answer().status for _ in requests[first : first + 100]} == {404, 405}
        assert {talk(daemon, nonsense("version")).status for _ in range(count // 100)} <= {400}
        return {
            f"{name} {sorted(labels)}"
            for name, values in metrics(daemon).items()
            for labels in values
        }

    daemon.request("GET", "/metrics")
    assert send(300) == send(10_000)


def test_a_member_that_nobody_asks_is_watched(cluster: Cluster, start: Start) -> None:
    daemon, victim = start(cluster.urls), cluster.follower()
    others = [member.url for member in cluster.members if member is not victim]
    eventually(lambda: all(of_member(daemon, MEMBER_UP, member.url) for member in cluster.members))
    assert of_member(daemon, MEMBER_ERRORS, victim.url) == 0

    kill(victim)

    eventually(
        lambda: of_member(daemon, MEMBER_UP, victim.url) == 0, 5
    )  # within two seconds on a machine at rest
    assert of_member(daemon, MEMBER_ERRORS, victim.url) > 0
    assert [of_member(daemon, MEMBER_UP, url) for url in others] == [1, 1]
    cluster.heal()
    eventually(lambda: of_member(daemon, MEMBER_UP, victim.url) == 1, 5)
    assert operations(daemon) == {}  # all this by itself


def test_no_name_of_a_member_spoils_the_page(start: Start) -> None:
    address = 'http://a"b\\c:1'
    try:
        shared_lock.Config.from_env({"SHARED_LOCK_ETCD_ADDR_LIST": address})
    except shared_lock.ConfigError:
        return  # as good
    assert metrics(start(address))


def test_a_member_that_was_no_etcd_is_found_to_be_one_by_nobodys_asking(
    start: Start, etcd: Etcd
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoEtcd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        daemon = start(f"http://127.0.0.1:{port}", ETCD_TIMEOUT="500ms")
        eventually(lambda: events(daemon, "etcd member failed"))
        for said in NoEtcd.ANSWERS:
            NoEtcd.says = said
            assert daemon.request("GET", "/ready").status == 503
            answers = [daemon.acquire("k"), daemon.keep_alive("7"), daemon.release("7")]
            answers += [daemon.look("k"), daemon.request("GET", "/lease?prefix=")]
            assert {answer.status for answer in answers} == {500}, said
            for answer in answers:
                one_line(answer, f"127.0.0.1:{port}")
        server.shutdown()

    between = Proxy(etcd, port)

    eventually(lambda: of_member(daemon, MEMBER_UP, f"http://127.0.0.1:{port}") == 1)
    assert "internal error" not in daemon.log()
    between.close()


class NoEtcd(socketserver.StreamRequestHandler):
    """Answers the first request of each connection with something else than HTTP of etcd."""

    ANSWERS: ClassVar = [
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00\x40\x00",  # HTTP/2: SETTINGS
        b"",
        b"\xff" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n<html>until the end",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 999 \r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"HTTP/1.1 500 \xff\r\nContent-Length: 16\r\n\r\n" + b'{"code":1e400}\r\n',
        b'HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n{"error":{"http_code":[{}]}}',
    ]
    says: ClassVar[bytes] = ANSWERS[0]

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.rfile.readline()
            self.wfile.write(self.says)


def test_a_port_that_speaks_grpc_only_is_told_so(start: Start, tmp_path: Path) -> None:
    helped = subprocess.run([etcd_binary(), "--help"], capture_output=True, text=True, timeout=30)
    if "--listen-client-http-urls" not in helped.stdout + helped.stderr:
        assert (
            "3.4."
            in subprocess.run([etcd_binary(), "--version"], capture_output=True, text=True).stdout
        )
        return  # the option came with 3.4.25 and 3.5.8
    gateway = free_port()
    etcd = Etcd(tmp_path, "m0", None, f"--listen-client-http-urls=http://127.0.0.1:{gateway}")
    try:
        etcd.start()
        eventually(lambda: listens(gateway) and listens(etcd.port), 30)
        daemon = start(etcd.url, ETCD_TIMEOUT="2s")

        answer = daemon.acquire("k")

        assert answer.status == 500
        one_line(answer, "--listen-client-http-urls")
        assert start(f"http://127.0.0.1:{gateway}").acquire("k").status == 201
    finally:
        etcd.stop()


def listens(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False


# == Profiles ====================================================================================


def decode(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message by number: ints and bytes."""
    fields: dict[int, list[Any]] = collections.defaultdict(list)
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            byte, place = data[place], place + 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise AssertionError("a varint of more than 10 bytes")

    while place < len(data):
        number, kind = divmod(varint(), 8)
        assert kind in (0, 2) and number, (number, kind)
        value = varint()
        if kind == 2:
            place += value
            assert place <= len(data)
        fields[number].append(value if kind == 0 else data[place - value : place])
    return fields


class Profile:
    """A profile as `go tool pprof` reads it: (kind, unit), and of each sample its value and
    (function, file)s."""

    def __init__(self, answer: Answer) -> None:
        assert answer.status == 200, answer
        fields = decode(gzip.decompress(answer.body))
        strings = [text.decode() for text in fields[6]]
        assert strings[0] == ""
        [sample_type] = map(decode, fields[1])
        self.type = strings[sample_type[1][0]], strings[sample_type[2][0]]
        functions = {
            one[1][0]: (strings[one[2][0]], strings[one[4][0]]) for one in map(decode, fields[5])
        }
        locations = {
            one[1][0]: functions[decode(one[4][0])[1][0]] for one in map(decode, fields[4])
        }
        assert 0 not in functions and 0 not in locations
        samples = map(decode, fields[2])
        self.samples = [(one[2][0], [locations[number] for number in one[1]]) for one in samples]

    @property
    def ours(self) -> set[str]:
        """The functions of shared_lock.py in it."""
        frames = itertools.chain.from_iterable(stack for _, stack in self.samples)
        return {function for function, file in frames if file.endswith("shared_lock.py")}


def defined_names() -> set[str]:
    """What a function of shared_lock.py can be called, without its class."""
    unnamed = {"<module>", "<lambda>", "<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>"}
    return unnamed | set(re.findall(r"(?:def|class) (\w+)", (HERE / "shared_lock.py").read_text()))


@pytest.fixture(scope="session")
def profiled(folder: Path) -> Iterator[Daemon]:
    with running(folder, "mock", PPROF_ENABLED="true") as daemon:
        yield daemon


@contextlib.contextmanager
def load(daemon: Daemon, pool: Pool, body: str) -> Iterator[None]:
    """Clients that ask for locks without a pause; @ in the body is a number that grows."""
    stop, numbers = threading.Event(), itertools.count()

    def ask() -> None:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
        ) as connection:
            while not stop.is_set():
                connection.request("POST", "/lease", body.replace("@", str(next(numbers))))
                connection.getresponse().read()

    clients = [pool.submit(ask) for _ in range(4)]
    yield
    stop.set()
    assert [client.exception(10) for client in clients] == [None] * 4


def test_a_cpu_profile_shows_where_the_time_goes(profiled: Daemon, pool: Pool) -> None:
    with load(profiled, pool, '{"key": "busy"}'):
        profile = Profile(profiled.request("GET", "/debug/pprof/profile?seconds=1"))

    assert profile.type == ("cpu", "nanoseconds")
    assert {name.split(".")[-1] for name in profile.ours} & {"handle", "answer", "acquire"}
    assert {name.split(".")[-1] for name in profile.ours} <= defined_names()
    assert all(0 < value < 2e9 for value, _ in profile.samples)
    assert 0.05e9 < sum(value for value, _ in profile.samples) < 2e9


def test_a_cpu_profile_never_takes_a_thread_for_one_that_has_ended(start: Start) -> None:
    program = """if True:
        import shared_lock, threading, time

        def burn():
            ends = time.monotonic() + 0.05
            while time.monotonic() < ends:
                pass

        def rest():
            time.sleep(0.03)

        def by_turns():
            while True:
                for work in (burn, rest):  # the second inherits the first's ident
                    thread = threading.Thread(target=work)
                    thread.start()
                    thread.join()

        threading.Thread(target=by_turns, daemon=True).start()
        shared_lock.main(["serve"])"""
    command = ["env", f"PYTHONPATH={HERE}", PYTHON, "-c", program]
    daemon = start("mock", command=command, PPROF_ENABLED="true")

    profile = Profile(daemon.request("GET", "/debug/pprof/profile?seconds=1"))

    def used(name: str) -> int:
        return sum(
            value
            for value, stack in profile.samples
            if any(function == name for function, _ in stack)
        )

    assert all(0 < value < 2e9 for value, _ in profile.samples)
    assert used("burn") > 10 * used("rest")


def test_of_two_profiles_at_a_time_one_is_503(profiled: Daemon) -> None:
    clients = [Talk(profiled, get("/debug/pprof/profile?seconds=2")) for _ in range(2)]

    answers = sorted((client.answer() for client in clients), key=lambda answer: answer.status)

    assert [answer.status for answer in answers] == [200, 503]
    one_line(answers[1])
    assert profiled.request("GET", "/debug/pprof/profile?seconds=1").status == 200


def test_the_stack_of_every_thread_is_shown_and_all_profiles_are_listed(profiled: Daemon) -> None:
    text = profiled.request("GET", "/debug/pprof/goroutine?debug=2").text
    index = profiled.request("GET", "/debug/pprof/")

    assert "MainThread" in text and "shared_lock.py:" in text
    assert "thread_stacks" in Profile(profiled.request("GET", "/debug/pprof/goroutine")).ours
    assert index.status == 200
    assert all(name in index.text for name in ("profile", "goroutine"))


def test_there_is_no_heap_profile(profiled: Daemon) -> None:
    assert profiled.request("GET", "/debug/pprof/heap").status == 404


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "", "1e3", "99999999999", "0.5s"])
def test_a_profile_takes_a_number_of_seconds(profiled: Daemon, seconds: str) -> None:
    answer = profiled.request("GET", f"/debug/pprof/profile?seconds={seconds}")

    assert answer.status == 400
    one_line(answer, "seconds", f'"{seconds}"')


def test_without_the_switch_no_tool_of_profiling_is_loaded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # as python -X importtime

    quiet, profiled = start("mock"), start("mock", PPROF_ENABLED="true")
    quiet.acquire("k")
    profiled.request("GET", "/debug/pprof/profile?seconds=1")

    assert re.search(r"\| +socket\n", quiet.log())
    assert not re.search(r"\| +(tracemalloc|gzip|etcd3gw)\n", quiet.log())
    assert re.search(r"\| +gzip\n", profiled.log())


# == Life of the process =========================================================================


def test_an_old_python_is_told_what_is_needed_in_one_line() -> None:
    ast.parse((HERE / "shared_lock.py").read_text(), feature_version=(3, 8))
    pretend = "import runpy, sys; sys.version_info = (3, 9, 2, 'final', 0);"
    pretend += "runpy.run_path('shared_lock.py', run_name='__main__')"

    ended = run_module(["-c", pretend])

    assert ended.returncode == 1
    assert ended.stderr.startswith("shared-lock: Python 3.11 or newer is needed")
    assert ended.stderr.count("\n") == 1


def test_an_old_etcd3gw_is_told_what_is_needed_in_one_line(tmp_path: Path) -> None:
    old = "class Etcd3Client:\n    def __init__(self, host='localhost', port=2379): pass\n"
    (tmp_path / "etcd3gw.py").write_text(old)
    first_of_all = f"sys.path.insert(0, {str(tmp_path)!r})"

    ended = run_module(changed(first_of_all)[3:], SERVER_PORT="0")

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "etcd3gw>=2.6.0" in ended.stderr


def test_help_names_every_variable_and_a_wrong_command_shows_the_usage() -> None:
    shown, bare, wrong = (
        run_module([SERVE[0], "--help"]),
        run_module(SERVE[:1]),
        run_module([SERVE[0], "sevre"]),
    )

    assert (shown.returncode, bare.returncode, wrong.returncode) == (0, 2, 2)
    names = {shared_lock.variable(one.name) for one in dataclasses.fields(shared_lock.Config)}
    assert names <= set(shown.stdout.split()) and shown.stderr == ""
    usage = "usage: shared_lock.py [-h] [--version] {serve}"
    assert all(text.startswith(usage) for text in (shown.stdout, bare.stderr, wrong.stderr)), (
        shown.stdout
    )
    assert "sevre" in wrong.stderr


def test_the_version_is_told_in_one_word_that_all_others_repeat() -> None:
    told = run_module([SERVE[0], "--version"])

    assert (told.returncode, told.stderr) == (0, "")
    assert re.fullmatch(
        r"shared-lock \d+\.\d+\.\d+\n", told.stdout
    )  # the log and the metrics tell VERSION, too
    assert told.stdout.split() == ["shared-lock", shared_lock.VERSION]


@pytest.mark.parametrize(
    "family, taken, host",
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "", ""),
        (socket.AF_INET6, "::", ""),
        (socket.AF_INET, "127.0.0.1", ""),
    ],
)
def test_a_port_that_is_taken_is_status_1_and_one_line(
    family: socket.AddressFamily, taken: str, host: str
) -> None:
    with socket.create_server((taken, 0), family=family) as other:
        port = str(other.getsockname()[1])
        ended = run_module(SERVE, STORAGE_TYPE="mock", SERVER_HOST=host, SERVER_PORT=port)

    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert port in ended.stderr


def test_the_file_alone_serves_the_mock_and_says_what_etcd_needs(
    start: Start, tmp_path: Path
) -> None:
    alone = [
        PYTHON,
        "-I",
        "-S",
        str(shutil.copy(HERE / "shared_lock.py", tmp_path / "lock.py")),
        "serve",
    ]

    answer = start("mock", command=alone).acquire("k")
    ended = run_module(alone[1:])

    assert answer.status == 201
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "pip install 'etcd3gw>=2.6.0'" in ended.stderr
    assert "SHARED_LOCK_STORAGE_TYPE" in ended.stderr


def test_the_longest_timeouts_serve_and_stop(start: Start) -> None:
    longest = "9000000000s"
    daemon = start("mock", **dict.fromkeys(DURATIONS, longest))

    assert daemon.request("GET", "/health").status == 200
    assert daemon.stop() == 0


def test_it_starts_where_it_may_not_choose_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, cpus: set[int]) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    interval = sys.getswitchinterval()
    monkeypatch.setattr(os, "sched_setaffinity", refuse)

    shared_lock.be_quick()

    assert sys.getswitchinterval() != interval
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_loses_no_request_and_answers_tell_of_it(
    start: Start, key: str, pool: Pool, number: int
) -> None:
    daemon = start("mock", SERVER_SHUTDOWN_TIMEOUT="30s")
    silent, late = ([Talk(daemon, HEALTH) for _ in range(10)] for _ in range(2))
    assert {client.answer().status for client in (*silent, *late)} == {200}
    silent += [Talk(daemon) for _ in range(5)]
    halves = [Talk(daemon, HEALTH[:-2]) for _ in range(16)]

    def lock_on_and_on(client: Talk, who: int) -> int:
        """How many locks it was granted, until an answer told that the connection ends."""
        for n in itertools.count(1):
            client.say(post(lock_body(f"{key}-{who}-{n}")))
            answer = client.answer()
            assert answer.status == 201
            if answer.headers.get("connection") == "close":
                break
        return n

    counts = [pool.submit(lock_on_and_on, Talk(daemon), who) for who in range(16)]
    eventually(lambda: daemon.log().count("event=granted") > 200)
    started = time.monotonic()
    daemon.process.send_signal(number)
    time.sleep(
        0.2
    )  # a proxy in front may not know of the stop yet: half a second is left to its requests
    for client in (*late, *halves):
        client.say(HEALTH if client in late else b"\r\n")
    answers = [client.answer() for client in (*late, *halves)]

    assert [client.rest() for client in silent] == [b""] * 15
    assert daemon.process.wait(20) == 0
    assert time.monotonic() - started < 10
    assert {(answer.status, answer.headers["connection"]) for answer in answers} == {(200, "close")}
    assert sum(count.result() for count in counts) == daemon.log().count("event=granted")


@pytest.mark.parametrize("timeout", ["30s", "0"])  # 0 is none
def test_a_stop_refuses_new_clients_and_waits_for_those_in_flight(
    start: Start, key: str, timeout: str
) -> None:
    daemon = start("mock", SERVER_SHUTDOWN_TIMEOUT=timeout)
    half = Talk(daemon, b"GET /health")
    daemon.acquire(key)
    waiting = [Talk(daemon, post(lock_body(key), b"x-lease-wait: 30s")) for _ in range(5)]
    time.sleep(0.5)
    started = time.monotonic()

    daemon.process.send_signal(signal.SIGTERM)
    answers = [client.answer() for client in waiting]
    elapsed = time.monotonic() - started

    def refused() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            daemon.connect().close()
            return False
        return True

    eventually(refused)
    assert {(answer.status, answer.text, answer.headers["connection"]) for answer in answers} == {
        (202, "0", "close")
    }
    time.sleep(1)  # twice as long as silent connections are kept
    assert elapsed < 10 and daemon.process.poll() is None
    half.say(b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (half.answer().status, daemon.process.wait(10)) == (200, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_each_signal_to_stop_answers_what_is_in_flight_however_often_it_comes_at_once(
    start: Start, pool: Pool, key: str, number: int, times: int
) -> None:
    daemon = start("mock")
    daemon.acquire(key)
    waiter = pool.submit(daemon.acquire, key, **{"x-lease-wait": "30s"})
    eventually(lambda: "shared_lock_waiting 1" in daemon.request("GET", "/metrics").text)

    for _ in range(times - 1):
        daemon.process.send_signal(number)
    status = daemon.stop(number)

    assert (status, waiter.result(10).status) == (0, 202)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("later", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_later_signal_ends_at_once_with_128_and_its_number(
    start: Start, first: int, later: int
) -> None:
    command = ["env", "--default-signal=INT,HUP", PYTHON, *SERVE]  # whatever our own caller ignores
    slow = {"SERVER_SHUTDOWN_TIMEOUT": "60s", "SERVER_READ_TIMEOUT": "60s"}
    daemon = start("mock", command=command, **slow)
    client = Talk(daemon, b"GET /health")
    eventually(lambda: daemon.descriptors() and client.sock.send(b" ") == 1)
    daemon.process.send_signal(first)
    eventually(lambda: "event=stopping" in daemon.log())
    time.sleep(0.6)  # one that comes within half a second is the first one again
    assert daemon.process.poll() is None

    daemon.process.send_signal(later)

    assert daemon.process.wait(10) == 128 + later
    assert client.rest() == b""


def test_two_signals_within_a_moment_cut_nothing(start: Start) -> None:
    daemon = start("mock", SERVER_SHUTDOWN_TIMEOUT="60s", SERVER_READ_TIMEOUT="60s")
    client = Talk(daemon, HEALTH + HEALTH[:-2])
    assert client.answer().status == 200

    daemon.process.send_signal(signal.SIGTERM)
    time.sleep(0.001)
    daemon.process.send_signal(signal.SIGTERM)
    eventually(lambda: "event=stopping" in daemon.log())
    client.say(b"\r\n")

    assert client.answer().status == 200
    assert daemon.process.wait(10) == 0


def test_under_nohup_it_outlives_its_terminal(start: Start) -> None:
    daemon = start("mock", command=["nohup", PYTHON, *SERVE])

    daemon.process.send_signal(signal.SIGHUP)

    for _ in range(20):
        assert daemon.request("GET", "/health").status == 200
    assert "event=stopping" not in daemon.log()
    assert daemon.stop() == 0


# A change: the interpreter's end takes a while.
ENDS_SLOWLY = """
class Late:
    def __del__(self, write=__import__("os").write, sleep=__import__("time").sleep):
        write(2, b"ending\\n")
        sleep(1)
shared_lock.late = Late()"""


def test_a_second_signal_that_comes_while_the_interpreter_ends_changes_no_status(
    start: Start,
) -> None:
    daemon = start("mock", command=changed(after=ENDS_SLOWLY))

    daemon.process.terminate()
    eventually(lambda: "ending" in daemon.log())
    daemon.process.terminate()

    assert daemon.process.wait(10) == 0


def test_a_signal_that_another_thread_receives_stops_it_as_well(start: Start) -> None:
    daemon = start("mock")
    pid = daemon.process.pid
    kept = Talk(daemon, HEALTH)  # whose thread is one of those
    assert kept.answer().status == 200
    others = [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]

    sent = ctypes.CDLL(None).tgkill(pid, others[0], signal.SIGTERM)

    assert (sent, daemon.process.wait(10)) == (0, 0)
    assert "event=stopped" in daemon.log()


def test_what_is_left_at_the_shutdown_timeout_is_cut_and_named(start: Start) -> None:
    daemon = start(
        "mock", SERVER_SHUTDOWN_TIMEOUT="1s", SERVER_READ_TIMEOUT="60s", PPROF_ENABLED="true"
    )
    busy = Talk(daemon, get("/debug/pprof/profile?seconds=30"))
    half = Talk(daemon, HEALTH + b"POST /le")
    assert half.answer().status == 200
    time.sleep(0.3)
    started = time.monotonic()

    status = daemon.stop()

    assert status == 0 and 0.8 < time.monotonic() - started < 10
    cut = [line for line in daemon.log().splitlines() if "cut" in line]
    assert len(cut) == 2
    assert any(str(busy.port) in line and "GET /debug/pprof/profile" in line for line in cut)
    assert any(
        str(half.port) in line and "/health" not in line for line in cut
    )  # that one was answered


@pytest.mark.parametrize("round_", range(4))
def test_a_signal_stops_it_while_connections_are_arriving(start: Start, round_: int) -> None:
    daemon = start("mock")

    with contextlib.ExitStack() as stack:
        for number in range(120):
            with contextlib.suppress(OSError):  # it has stopped
                stack.enter_context(contextlib.closing(Talk(daemon, HEALTH)))
            if number == 60:
                daemon.process.send_signal(signal.SIGTERM)
        status = daemon.process.wait(20)

    assert status == 0


def test_locks_stay_with_their_holders_over_a_restart(start: Start, etcd: Etcd, key: str) -> None:
    first = start(etcd.url)
    lease = first.acquire(key).text
    before = etcd.key(key)

    status = first.stop()
    second = start(etcd.url)

    assert (status, etcd.key(key)) == (0, before)
    assert (second.acquire(key).status, second.keep_alive(lease).status) == (202, 200)


# == Faults: clusters whose members die, freeze and come back ====================================


PREFIX = b"/shared-lock/"
RECOVERY_SECONDS = 6  # how long after a fault clients may be told of it


class Cluster:
    """Three members of etcd, which tests may kill, freeze and restart; heal() makes all three well
    again."""

    def __init__(self, folder: Path, *options: str) -> None:
        peers = {f"m{number}": free_port() for number in range(3)}
        self.members = [Etcd(folder, name, peers, *options) for name in peers]
        self.urls = ",".join(member.url for member in self.members)

    def leader(self) -> Etcd:
        """The member that leads, by its own word."""

        def leads(member: Etcd) -> bool:
            with contextlib.suppress(OSError, AssertionError, http.client.HTTPException):
                status = member.call("/maintenance/status", {}, timeout=1)
                return bool(status["leader"] == status["header"]["member_id"])
            return False

        found: Etcd = eventually(lambda: next(filter(leads, self.members), None), 30)
        return found

    def follower(self) -> Etcd:
        leader = self.leader()
        return next(member for member in self.members if member is not leader)

    def heal(self) -> Cluster:
        for member in self.members:
            if member.process and member.process.poll() is None:
                member.signal(signal.SIGCONT)
            else:
                member.start()
        for member in self.members:
            member.wait()
        return self


class Call(NamedTuple):
    """What a client asked of the daemon and was told. Status 0: the connection was dropped. Times
    are monotonic."""

    operation: str
    body: str
    key: str
    value: str
    began: float
    ended: float
    status: int
    text: str
    token: int


class Clients:
    """Threads that take, keep and release locks on kept connections, in a with statement; `calls`
    is what they saw.

    The value of a lock names the try that took it. Who is told that its lease is gone tries to
    release it, too.
    """

    ROUTES: ClassVar = {
        "acquire": ("POST", "/lease"),
        "keepalive": ("POST", "/keepalive"),
        "release": ("DELETE", "/lease"),
    }

    def __init__(self, daemon: Daemon, key: str, count: int = 16) -> None:
        self.calls: list[Call] = []
        self._daemon, self._tries, self._stop = daemon, itertools.count(), threading.Event()
        self._keys = [f"{key}-{number}" for number in range(count * 2)]
        self._pool = Pool(count)

    def __enter__(self) -> Clients:
        self._runs = [self._pool.submit(self._run) for _ in self._keys[::2]]
        return self

    def __exit__(self, *fault: object) -> None:
        self._stop.set()
        for run in self._runs:
            run.result()
        self._pool.shutdown()

    def since(self, moment: float) -> list[Call]:
        """The calls that began after this moment."""
        return [call for call in self.calls if call.began > moment]

    def _run(self) -> None:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._daemon.port, timeout=30)
        ) as connection:
            while not self._stop.wait(0.02):
                key, value = random.choice(self._keys), f"try {next(self._tries)}"
                got = self._ask(
                    connection, "acquire", json.dumps({"key": key, "value": value}), key, value
                )
                if got.status == 201:
                    self._ask(connection, "keepalive", got.text, key, value)
                    self._stop.wait(random.uniform(0, 0.05))
                    self._ask(connection, "release", got.text, key, value)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        operation: str,
        body: str,
        key: str,
        value: str,
    ) -> Call:
        began, status, text, token = time.monotonic(), 0, "", 0
        try:
            connection.request(*self.ROUTES[operation], body, {"x-lease-ttl": "3s"})
            answer = connection.getresponse()
            status, text, token = (
                answer.status,
                answer.read().decode(),
                int(answer.headers["x-fencing-token"] or 0),
            )
        except (OSError, http.client.HTTPException) as fault:
            text = repr(fault)
            connection.close()
        call = Call(operation, body, key, value, began, time.monotonic(), status, text, token)
        self.calls.append(call)
        return call


class Event(NamedTuple):
    """A change of a key: `lease` is 0 where it was deleted."""

    key: str
    revision: int
    lease: int
    value: str


class History:
    """What etcd itself saw of every key, by a watch from revision 1, held against what clients were
    told.

    - For each key put and delete alternate, and a put creates the key: nobody ever takes what is
      held.
    - The token of each 201 is the create_revision of one put of the key, with the client's own
      lease and value, and
      no other 201 for the key has it (one transaction may create several keys). Of two calls for a
      key, one after the
      other, the later has the larger token.
    - Whoever was told 202 put nothing, and a 500 tells what it means for the lock.
    - Whoever was told that its lease is gone (204) could not release it afterwards.
    """

    def __init__(self, member: Etcd) -> None:
        self.events = list(self._watch(member))

    @staticmethod
    def _watch(member: Etcd) -> Iterator[Event]:
        end = b"/shared-lock-end"
        member.put(end)
        wish = {
            "key": base64.b64encode(end).decode(),
            "range_end": base64.b64encode(b"/shared-lock0").decode(),
        }
        last = int(member.call("/kv/range", {"key": wish["key"]})["kvs"][0]["mod_revision"])
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", member.port, timeout=20)
        ) as connection:
            connection.request(
                "POST", "/v3/watch", json.dumps({"create_request": {**wish, "start_revision": 1}})
            )
            answer = connection.getresponse()
            while line := answer.readline():
                for change in json.loads(line)["result"].get("events", []):
                    kv = change["kv"]
                    key, revision = base64.b64decode(kv["key"]), int(kv["mod_revision"])
                    if revision == last:
                        return
                    if key.startswith(PREFIX):
                        value = base64.b64decode(kv.get("value", "")).decode()
                        yield Event(
                            key.removeprefix(PREFIX).decode(),
                            revision,
                            int(kv.get("lease", 0)),
                            value,
                        )
        raise AssertionError("the watch ended early")

    def check(self, calls: list[Call]) -> None:
        by_key: dict[str, list[Event]] = collections.defaultdict(list)
        for change in self.events:
            by_key[change.key].append(change)
        for changes in by_key.values():
            assert all(
                bool(change.lease) == (place % 2 == 0) for place, change in enumerate(changes)
            ), changes
        granted = [call for call in calls if call.operation == "acquire" and call.status == 201]
        puts = {(change.key, change.revision): change for change in self.events if change.lease}
        for call in granted:
            assert puts[call.key, call.token] == Event(
                call.key, call.token, int(call.text), call.value
            ), call
        assert len({(call.key, call.token) for call in granted}) == len(granted) > 0
        latest: dict[str, Call] = {}
        for call in sorted(granted, key=lambda call: call.token):
            before = latest.setdefault(call.key, call)
            assert before is call or call.ended > before.began, (before, call)
            latest[call.key] = call
        put_values = {(change.key, change.value) for change in puts.values()}
        for call in calls:
            if call.operation == "acquire" and call.status == 202:
                assert (call.key, call.value) not in put_values, call
            if call.operation == "acquire" and call.status == 500:
                assert call.text.startswith(("not acquired: ", "outcome unknown: ")), call
        gone = {call.body for call in calls if call.operation == "keepalive" and call.status == 204}
        wrong = [
            call
            for call in calls
            if call.operation == "release" and call.status == 200 and call.body in gone
        ]
        assert not wrong, f"told gone, and released then: {wrong}"


def no_leases_left(member: Etcd) -> bool:
    with contextlib.suppress(OSError, AssertionError):
        return not member.leases()
    return False


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Three members; a test that harms them heals them."""
    home = folder / "cluster"
    home.mkdir()
    servers = Cluster(home)
    try:
        yield servers.heal()
    finally:
        for member in servers.members:
            member.stop()


def start_on(start: Start, cluster: Cluster, member: Etcd) -> Daemon:
    """A daemon that has picked this member of the cluster to begin with; which it picks is left to
    chance."""
    for number in range(40):
        daemon, before = start(cluster.urls), calls(member)["LeaseGrant"]
        assert daemon.release(daemon.acquire(f"pick-{id(daemon)}-{number}").text).status == 200
        if calls(member)["LeaseGrant"] > before:
            return daemon
        daemon.stop()
    raise AssertionError("no daemon in 40 began with this member")


@pytest.mark.parametrize("harm, role", [(kill, "leader"), (freeze, "leader"), (freeze, "follower")])
def test_clients_are_served_again_within_seconds_of_the_loss_of_a_member(
    cluster: Cluster, start: Start, key: str, harm: Callable[[Etcd], None], role: str
) -> None:
    victim = cluster.leader() if role == "leader" else cluster.follower()
    healthy = next(member for member in cluster.members if member is not victim)
    daemon = start_on(start, cluster, victim)

    with Clients(daemon, key) as clients:
        time.sleep(1)
        harm(victim)
        harmed = time.monotonic()
        time.sleep(RECOVERY_SECONDS + 1)
    after = clients.since(harmed + RECOVERY_SECONDS)

    try:
        assert any(call.status == 201 for call in after)
        assert not [call for call in after if call.status in (0, 500)]
        assert not [call for call in clients.calls if call.status == 0]
        assert (
            len([call for call in after if call.ended - call.began > 1]) < 3
        )  # a try of a frozen one takes 1.25 s
        History(healthy).check(clients.calls)
        eventually(lambda: no_leases_left(healthy), 40)
    finally:
        cluster.heal()


def test_without_a_quorum_answers_say_what_is_known(
    cluster: Cluster, start: Start, key: str
) -> None:
    daemon = start(cluster.urls, ETCD_TIMEOUT="1s")
    lease = daemon.acquire(key, "120s").text

    with Clients(daemon, key, 8) as clients:
        time.sleep(0.5)
        for member in cluster.members[:2]:
            member.stop()
        time.sleep(2.5)
        answers = [
            daemon.keep_alive(lease),
            daemon.release("12345"),
            daemon.acquire(f"{key}-alone"),
        ]
        ready = daemon.request("GET", "/ready")
        cluster.heal()
        healed = time.monotonic()
        time.sleep(RECOVERY_SECONDS + 1)
    after = clients.since(healed + RECOVERY_SECONDS)

    assert [answer.status for answer in answers] == [500, 500, 500]
    assert ready.status == 503
    assert {call.status for call in after} <= {200, 201, 202}
    assert any(call.status == 201 for call in after)
    assert daemon.keep_alive(lease).status == 200
    History(cluster.members[0]).check(clients.calls)
    assert daemon.release(lease).status == 200
    eventually(lambda: no_leases_left(cluster.members[0]), 40)


def test_while_every_member_is_restarted_in_turn_nothing_is_lost(
    cluster: Cluster, start: Start, key: str
) -> None:
    daemon = start(cluster.urls)
    lock = daemon.acquire(key, "120s")

    with Clients(daemon, key, 8) as clients:
        for member in cluster.members:
            member.stop()
            time.sleep(0.5)
            member.start().wait()
            time.sleep(1)
        restarted = time.monotonic()
        time.sleep(4)
    after = clients.since(restarted + 3)

    assert {call.status for call in after} <= {200, 201, 202}
    assert not [call for call in clients.calls if call.status == 0]
    assert cluster.members[0].key(key) == {
        "create_revision": lock.token,
        "lease": int(lock.text),
        "value": b"",
    }
    History(cluster.members[1]).check(clients.calls)
    assert daemon.release(lock.text).status == 200


def upgrades() -> list[str]:
    """etcd servers from old to new: each may follow the one before in a cluster that goes on."""
    given = os.environ.get("SHARED_LOCK_TEST_UPGRADE")
    if not given:
        pytest.skip("SHARED_LOCK_TEST_UPGRADE names no etcd servers; .ci/run builds some")
    return given.split(":")


def upgrade(member: Etcd, binary: str) -> None:
    """As an operator does it: the old server ends well, the new one has its data."""
    assert member.process
    member.signal(signal.SIGTERM)
    member.process.wait(30)
    member.binary = binary
    member.start().wait()


def is_upgraded(cluster: Cluster) -> bool:
    """Whether the cluster is of the release of its members: before, none may be newer."""
    told = [json.loads(ask(one.port, "GET", "/version").text) for one in cluster.members]
    return all(one["etcdserver"].startswith(one["etcdcluster"][:-1]) for one in told)


def test_while_each_member_is_upgraded_in_turn_no_request_is_answered_wrongly(
    tmp_path: Path, start: Start, key: str
) -> None:
    old, *newer = upgrades()
    # Of entries that 3.5 wrote some kill 3.7, if 3.6 took no snapshot since; it does after 10,000.
    cluster = Cluster(tmp_path, "--snapshot-count", "100")
    with contextlib.ExitStack() as stack:
        for member in cluster.members:
            member.binary = old
            stack.callback(member.stop)
        cluster.heal()
        daemon = start(cluster.urls)
        lock = daemon.acquire(key, "300s")

        with Clients(daemon, key, 8) as clients:
            for binary in newer:
                for member in cluster.members:
                    upgrade(member, binary)
                eventually(lambda: is_upgraded(cluster), 30)
            upgraded = time.monotonic()
            time.sleep(2)

        assert {call.status for call in clients.since(upgraded)} <= {200, 201, 202}
        assert {call.status for call in clients.calls} <= {200, 201, 202, 500}
        History(cluster.members[0]).check(clients.calls)
        assert (daemon.token(key), daemon.release(lock.text).status) == (lock.token, 200)


def test_a_frozen_member_is_used_again_when_it_is_well(
    cluster: Cluster, start: Start, key: str
) -> None:
    victim = cluster.follower()
    daemon = start_on(start, cluster, victim)

    freeze(victim)
    served = daemon.acquire(key)
    victim.signal(signal.SIGCONT)

    assert served.status == 201
    assert re.search(rf'event="etcd member failed" member={victim.url} reason=', daemon.log())
    eventually(lambda: f'event="etcd member is well again" member={victim.url}' in daemon.log(), 15)
    assert daemon.release(served.text).status == 200


# == Faults: members that say of living leases that they are gone ================================


def ask_about(daemon: Daemon, what: str, key: str, lease: str) -> Answer:
    """What the daemon says of this lock, asked in one of four ways."""
    if what == "look":
        return daemon.look(key)
    if what == "acquire again":
        return daemon.acquire(key, **{"x-lease-id": lease})
    return daemon.keep_alive(lease) if what == "keepalive" else daemon.release(lease)


@pytest.mark.parametrize("then", ["well", "no-leader"])
@pytest.mark.parametrize(
    "what, path",
    [
        ("keepalive", "/v3/lease/keepalive"),
        ("acquire again", "/v3/lease/keepalive"),
        ("look", "/v3/lease/timetolive"),
        ("release", "/v3/lease/timetolive"),
    ],
)
def test_who_says_once_that_a_living_lease_is_gone_is_not_believed(
    etcd: Etcd, proxy: Proxy, start: Start, key: str, what: str, path: str, then: str
) -> None:
    daemon = start(proxy.url)
    lock = daemon.acquire(key)
    seen = len(proxy.looked)

    proxy.rules((path, "gone", 1), (Proxy.LOOK, then, 1))
    answer = ask_about(daemon, what, key, lock.text)

    assert answer.status == (201 if what == "acquire again" else 200)
    asked = proxy.looked[proxy.looked.index((path, "gone"), seen) :]
    assert (Proxy.LOOK, then) in asked[
        1 : asked.index((path, ""))
    ]  # a linearizable read comes in between
    assert what == "release" or etcd.key(key) == {
        "create_revision": lock.token,
        "lease": int(lock.text),
        "value": b"",
    }


@pytest.mark.parametrize("what, status", [("keepalive", 204), ("release", 204), ("look", 404)])
def test_a_lease_that_is_gone_is_told_so(
    on_etcd: Daemon, etcd: Etcd, key: str, what: str, status: int
) -> None:
    lease = on_etcd.acquire(key).text

    etcd.call("/lease/revoke", {"ID": lease})

    assert ask_about(on_etcd, what, key, lease).status == status


def test_a_leader_that_wakes_up_tells_nobody_that_a_living_lease_is_gone(
    cluster: Cluster, start: Start, key: str, pool: Pool
) -> None:
    leader, other = cluster.leader(), start(cluster.follower().url, ETCD_TIMEOUT="10s")
    daemon, ways = start(leader.url, ETCD_TIMEOUT="20s"), ("keepalive", "release", "look")
    assert eventually(daemon.ready) and eventually(other.ready)
    together(
        48, lambda number: daemon.release(f"{number + 1}")
    )  # opens connections that are used when it wakes up

    try:
        freeze(leader)
        wakes = time.monotonic() + 2.6
        locks = list(pool.map(lambda number: other.acquire(f"{key}-{number}").text, range(48)))
        time.sleep(max(0.3, wakes - 0.3 - time.monotonic()))
        answers = [
            pool.submit(ask_about, daemon, ways[number % 3], f"{key}-{number}", lease)
            for number, lease in enumerate(locks)
        ]
        time.sleep(0.3)
        leader.signal(signal.SIGCONT)
        statuses = [answer.result(30).status for answer in answers]
    finally:
        cluster.heal()

    assert set(statuses) <= {200, 500} and 200 in statuses
    for number, lease in enumerate(locks):
        assert other.release(lease).status == (
            204 if number % 3 == 1 and statuses[number] == 200 else 200
        )


# == Faults: requests, answers and connections that break ========================================

ACTIONS = ["drop-request", "drop-answer", "cut", "late", "hold", "surplus", "503", "no-leader"]


def meet(key: str, daemon: Daemon, other: Daemon) -> None:
    """Another replica had the key when this one was asked for it: this one reads before it
    grants."""
    lease = other.acquire(key).text
    assert daemon.acquire(key).status == 202
    assert other.release(lease).status == 200


@pytest.mark.parametrize("path", ["/v3/kv/range", "/v3/lease/grant", "/v3/kv/txn"])
@pytest.mark.parametrize(
    "action, times", [*((action, 1) for action in ACTIONS), ("drop-answer", 2), ("drop-answer", 3)]
)
def test_a_call_that_breaks_is_repeated_and_the_lock_is_ours_with_one_lease(
    on_etcd: Daemon,
    etcd: Etcd,
    proxy: Proxy,
    start: Start,
    key: str,
    action: str,
    times: int,
    path: str,
) -> None:
    timeout = f"{Proxy.LATE_SECONDS * 1.6}s" if action == "late" else "5s"
    daemon = start(proxy.url, ETCD_TIMEOUT=timeout)
    if path == "/v3/kv/range":
        meet(key, daemon, on_etcd)
    eventually(lambda: proxy.looked)
    before = etcd.leases()

    proxy.rule = (path, action, times)
    answer = daemon.acquire(key)

    assert answer.status == 201
    lease = int(answer.text)
    assert etcd.key(key) == {"create_revision": answer.token, "lease": lease, "value": b""}
    assert etcd.leases() - before == {lease}
    assert (path, action) in proxy.seen
    assert proxy.reused == []


@pytest.mark.parametrize("action", ACTIONS)
def test_keepalive_and_release_are_repeated_too(
    etcd: Etcd, proxy: Proxy, start: Start, key: str, action: str
) -> None:
    daemon = start(
        proxy.url, ETCD_TIMEOUT="5s" if action != "late" else f"{Proxy.LATE_SECONDS * 1.6}s"
    )
    lease = daemon.acquire(key).text

    proxy.rule = ("/v3/lease/keepalive", action, 1)
    kept = daemon.keep_alive(lease)
    proxy.rule = ("/v3/lease/revoke", action, 1)
    released = daemon.release(lease)

    assert (kept.status, released.status) == (200, 200)
    assert (etcd.key(key), int(lease) in etcd.leases(), proxy.reused) == (None, False, [])
    assert proxy.rule is None


def test_a_claim_is_only_sent_once_its_lease_is_granted(
    proxy: Proxy, start: Start, key: str
) -> None:
    """If both came late, from a member that froze, they would take a key that was released."""
    daemon = start(proxy.url)
    daemon.acquire(key + " before")  # opens the connections
    seen = len(proxy.seen)

    proxy.rule = ("/v3/lease/grant", "hold", 1)
    answer = daemon.acquire(key)

    assert answer.status == 201
    assert proxy.seen[seen:] == [("/v3/lease/grant", "hold"), ("/v3/kv/txn", "")]


def test_a_claim_whose_lease_has_ended_harms_no_other(
    etcd: Etcd, proxy: Proxy, start: Start, key: str, pool: Pool
) -> None:
    daemon, before = start(proxy.url, ETCD_TIMEOUT="6s"), etcd.leases()
    proxy.rules(
        ("/v3/kv/txn", "wait", 1), ("/v3/kv/txn", "hold", 10**6)
    )  # HOLD_SECONDS each: too slow for one by one
    callers = [pool.submit(daemon.acquire, key)]
    eventually(lambda: ("/v3/kv/txn", "wait") in proxy.seen)
    callers += [
        pool.submit(daemon.acquire, f"{key}-{n}", "7s" if n == 20 else "60s") for n in range(40)
    ]

    new = eventually(lambda: len(found := etcd.leases() - before) == 41 and found)
    [short] = [
        lease for lease in new if etcd.call("/lease/timetolive", {"ID": lease})["grantedTTL"] == "7"
    ]
    etcd.call("/lease/revoke", {"ID": short})
    proxy.go_on.set()

    statuses = [caller.result(30).status for caller in callers]
    assert (statuses.pop(21), statuses) == (500, [201] * 40)
    assert etcd.key(f"{key}-20") is None


@pytest.mark.parametrize("drops", [1, 2], ids=["on a kept connection", "and on a new one"])
@pytest.mark.parametrize("path", ["/v3/lease/grant", "/v3/kv/txn"])
def test_an_answer_says_no_more_than_is_known_and_no_lease_stays(
    etcd: Etcd, proxy: Proxy, start: Start, key: str, path: str, drops: int
) -> None:
    daemon, before = start(proxy.url, ETCD_TIMEOUT="1s"), etcd.leases()

    proxy.rules((path, "drop-answer", drops), (path, "no-leader", 10**6))
    answer = daemon.acquire(key, "1h")
    found = etcd.key(key)
    proxy.rule = None

    assert answer.status == 500
    assert answer.text.startswith(
        ("outcome unknown: ", "not acquired: ") if not found else "outcome unknown: "
    )
    eventually(lambda: not etcd.leases() - before, 5)  # in the background, long before its ttl


@pytest.mark.parametrize("action", ["drop-request", "drop-answer", "no-leader"])
@pytest.mark.parametrize("path", ["/v3/kv/range", "/v3/lease/grant", "/v3/kv/txn"])
def test_after_a_first_try_that_died_half_way_the_second_has_the_lock_with_one_lease(
    etcd: Etcd, proxy: Proxy, start: Start, key: str, lease_id: int, action: str, path: str
) -> None:
    daemon, before = start(proxy.url, ETCD_TIMEOUT="700ms"), etcd.leases()
    eventually(daemon.ready)

    proxy.rule = (path, action, 10**6)
    first = acquire_as(daemon, lease_id, key)
    taken = etcd.key(key)
    proxy.rule = None
    second = eventually(
        lambda: (answer := acquire_as(daemon, lease_id, key)).status == 201 and answer
    )

    assert (first.status, second.text) == (500, str(lease_id))
    assert etcd.key(key) == {"create_revision": second.token, "lease": lease_id, "value": b""}
    assert taken in (None, etcd.key(key)) and bool(taken) == (
        (path, action) == ("/v3/kv/txn", "drop-answer")
    )
    assert etcd.leases() - before == {lease_id}


@pytest.mark.parametrize("path", ["/v3/lease/grant", "/v3/kv/txn"])
@pytest.mark.parametrize("chosen", [True, False])
def test_what_a_lost_answer_may_have_given_is_taken_back_only_from_who_cannot_ask_again(
    on_etcd: Daemon,
    etcd: Etcd,
    proxy: Proxy,
    start: Start,
    key: str,
    lease_id: int,
    chosen: bool,
    path: str,
) -> None:
    daemon, before = start(proxy.url), etcd.leases()

    proxy.rules((path, "drop-answer", 1), (path, "no-space", 1))
    failed = acquire_as(daemon, lease_id, key) if chosen else daemon.acquire(key)
    taken, left = etcd.key(key), etcd.leases() - before
    again = acquire_as(on_etcd, lease_id, key)

    unknown = chosen and path == "/v3/kv/txn"
    assert (failed.status, again.status) == (500, 201)
    assert failed.text.startswith("outcome unknown: " if unknown else "not acquired: ")
    assert (taken is not None, left) == (unknown, {lease_id} if chosen else set())
    assert again.token == (taken or {"create_revision": again.token})["create_revision"]


@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "late"])
@pytest.mark.parametrize(
    "path",
    [
        "/v3/kv/range",
        "/v3/lease/keepalive",
        "/v3/lease/grant",
        "/v3/lease/timetolive",
        "/v3/kv/txn",
    ],
)
def test_a_repetition_whose_own_calls_break_is_answered_alike(
    etcd: Etcd, proxy: Proxy, start: Start, key: str, lease_id: int, action: str, path: str
) -> None:
    daemon = start(proxy.url)
    holds = path in (
        "/v3/kv/range",
        "/v3/lease/keepalive",
    )  # in the others a first try left a lease without a key
    etcd.call("/lease/grant", {"ID": lease_id, "TTL": 60})
    if holds:
        etcd.put(b"/shared-lock/" + key.encode(), b"", lease_id)
    taken, before = etcd.key(key), etcd.leases()

    proxy.rule = (path, action, 1)
    answer = acquire_as(daemon, lease_id, key)

    assert (answer.status, answer.text, (path, action) in proxy.seen) == (201, str(lease_id), True)
    assert etcd.key(key) == (
        taken or {"create_revision": answer.token, "lease": lease_id, "value": b""}
    )
    assert etcd.leases() <= before


def test_who_lost_the_answer_on_its_way_asks_again_and_has_the_lock(
    daemon: Daemon, key: str, lease_id: int
) -> None:
    lossy = Proxy(daemon)
    lossy.rule = ("/lease", "drop-answer", 1)
    headers = {"x-lease-id": str(lease_id)}

    with contextlib.closing(lossy):
        with pytest.raises(http.client.RemoteDisconnected):
            ask(lossy.port, "POST", "/lease", lock_body(key), headers)
        token = daemon.token(key)
        second = ask(lossy.port, "POST", "/lease", lock_body(key), headers)

    assert (second.status, second.text, second.token) == (201, str(lease_id), token)
    assert (daemon.release(str(lease_id)).status, daemon.look(key).status) == (200, 404)


@pytest.mark.parametrize("chosen", [True, False])
def test_an_answer_that_cannot_be_written_takes_back_only_a_lock_that_nobody_can_ask_for_again(
    on_etcd: Daemon, etcd: Etcd, proxy: Proxy, start: Start, key: str, lease_id: int, chosen: bool
) -> None:
    daemon = start(proxy.url, DEBUG="true")
    proxy.rule = ("/v3/kv/txn", "wait", 1)
    client = Talk(daemon, post(lock_body(key), *[b"x-lease-id: %d" % lease_id] * chosen))
    taken = eventually(lambda: etcd.key(key))

    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    proxy.go_on.set()
    eventually(lambda: "connection lost" in daemon.log())

    assert etcd.key(key) == (taken if chosen else None)
    assert (taken["lease"] in etcd.leases()) == chosen
    again = acquire_as(on_etcd, lease_id, key)
    assert (again.status, again.token == taken["create_revision"]) == (201, chosen)


def test_keepalive_says_204_only_when_etcd_knows_that_the_lease_is_gone(
    etcd: Etcd, proxy: Proxy, start: Start, key: str
) -> None:
    daemon = start(proxy.url, ETCD_TIMEOUT="500ms")
    lease = eventually(lambda: (got := daemon.acquire(key)).status == 201 and got.text)

    outages = []
    for action in ("no-leader", "503", "drop-request", "drop-answer", "cut"):
        proxy.rule = ("/v3/lease/keepalive", action, 10**6)
        outages.append(daemon.keep_alive(lease))
    proxy.rule = None
    well = daemon.keep_alive(lease)
    etcd.call("/lease/revoke", {"ID": lease})
    gone = daemon.keep_alive(lease)

    assert [answer.status for answer in outages] == [500] * len(outages)
    assert all(proxy.url in answer.text for answer in outages)
    assert (well.status, gone.status) == (200, 204)


def test_after_a_restart_of_etcd_the_first_request_succeeds(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    daemon = start(own_etcd.url)
    together(8, lambda number: daemon.acquire(f"{key}-{number}"))  # leaves several kept connections
    lease = daemon.acquire(key).text

    own_etcd.stop()
    own_etcd.start().wait()

    assert daemon.keep_alive(lease).status == 200
    assert "etcd member failed" not in daemon.log()


def test_the_timeout_bounds_callers_queued_behind_a_hanging_call_too(
    own_etcd: Etcd, start: Start, key: str
) -> None:
    daemon = start(own_etcd.url, ETCD_TIMEOUT="2s")
    lease = daemon.acquire(key).text

    freeze(own_etcd)
    answers = together(
        30, lambda n: daemon.keep_alive(lease) if n % 2 else daemon.acquire(f"{key}-{n}")
    )
    own_etcd.signal(signal.SIGCONT)

    assert {answer.status for _, answer in answers} == {500}
    assert max(seconds for seconds, _ in answers) < 5
    assert eventually(lambda: daemon.keep_alive(lease).status == 200)
    eventually(lambda: own_etcd.leases() == {int(lease)}, 40)


def test_with_etcd_out_of_space_all_but_a_new_lock_still_works(
    tmp_path: Path, start: Start, key: str
) -> None:
    with Etcd(tmp_path, "full", None, "--quota-backend-bytes", str(1 << 20)) as etcd:
        daemon, stranger = start(etcd.url), start(etcd.url)  # the second never met the key
        lease = daemon.acquire(key).text
        with pytest.raises(AssertionError, match="space exceeded"):
            for number in range(100):
                etcd.put(b"filler-%d" % number, bytes(100_000))

        refused = daemon.acquire(f"{key}-2")
        held = [stranger.acquire(key).status, daemon.acquire(key).status]
        kept = daemon.keep_alive(lease)
        left = etcd.leases()
        released = daemon.release(lease)

        assert refused.status == 500
        one_line(refused, "not acquired: ", "mvcc: database space exceeded")
        assert (held, kept.status, released.status) == ([202, 202], 200, 200)
        assert (left, etcd.leases()) == ({int(lease)}, set())


# == example.py: a runner that people copy =======================================================


class Runner:
    """`python example.py … -- command` as a child process, under another command if one is
    given."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        under: Sequence[str] = (),
        python: Sequence[str] = (PYTHON,),
        **more: Any,
    ) -> None:
        self.err_path = folder / f"runner-{next(_numbers)}.err"
        self.out_path = self.err_path.with_suffix(".out")
        command = [*under, *python, str(HERE / "example.py"), *arguments]
        more = {
            "env": clean_env(),
            "stdin": subprocess.DEVNULL,
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **more,
        }
        with open(self.out_path, "wb") as out, open(self.err_path, "wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, **more)

    def out(self) -> str:
        return self.out_path.read_text()

    def err(self) -> str:
        return self.err_path.read_text()

    def wait(self, seconds: float = 30) -> int:
        """Its exit status."""
        return self.process.wait(seconds)


@pytest.fixture
def run(folder: Path, on_memory: Daemon, key: str) -> Iterator[Callable[..., Runner]]:
    """Starts runners: run("sh", "-c", "a line", ttl="60s", on=a URL, options=["-n"]); they end with
    the test.

    A line that is to get a signal does without `sleep` in the foreground: dash drops what comes
    while it starts one.
    """
    started: list[Runner] = []

    def start_one(
        *command: str, ttl: str = "60s", on: str = "", options: Sequence[str] = (), **more: Any
    ) -> Runner:
        arguments = [
            "--url",
            on or on_memory.url,
            "--key",
            key,
            "--ttl",
            ttl,
            *options,
            "--",
            *command,
        ]
        started.append(Runner(folder, *arguments, **more))
        return started[-1]

    yield start_one
    for one in started:
        one.process.terminate()  # which it hands on, so that no command stays behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(15)
        one.process.kill()
        one.process.wait()
        assert "Traceback" not in one.err()


Run = Callable[..., Runner]


def sh(line: str) -> tuple[str, str, str]:
    return ("sh", "-c", line)


def is_free(daemon: Daemon, key: str) -> bool:
    return daemon.request("GET", "/lease?key=" + urllib.parse.quote(key)).status == 404


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def beats(beat: Path) -> bool:
    """Whether a command still touches its file."""
    last = beat.stat().st_mtime
    time.sleep(0.3)
    return beat.stat().st_mtime != last


# Beats every 50 ms, in a grandchild that does not care for SIGTERM; "$0" is the file that shows
# when it last did.
STUBBORN = (
    "(trap '' TERM; while :; do echo >\"$0\"; sleep 0.05; done) & echo $SHARED_LOCK_LEASE; wait"
)


class StandIn(http.server.ThreadingHTTPServer):
    """A shared-lock of one lock that is always granted, but for the answers that are written down.

    Those of "POST /lease" may be ["500 why", "202 0"], then it is granted. "lost" does as asked and
    hangs up, "silent"
    says nothing for ever, "trickle" a byte every 50 ms; what has no status in front is sent as it
    is.
    """

    daemon_threads = True

    def __init__(self, granted: str, answers: dict[str, list[str]], host: str, port: int) -> None:
        super().__init__((host, port), StandInHandler)
        self.url = f"http://{host}:{self.server_port}"
        self.granted = granted
        self.answers = answers
        self.requests: list[
            tuple[str, dict[str, str], str]
        ] = []  # what was asked for, headers, body
        self.before_answer: Callable[[], object] = lambda: None

    def asked(self, what: str = "") -> list[str]:
        return [one for one, _, _ in self.requests if one.startswith(what)]

    def ids(self) -> list[str]:
        """Of the requests for the lock, and to release it."""
        return [
            headers.get("x-lease-id", body)
            for what, headers, body in self.requests
            if what.endswith(" /lease")
        ]

    def handle_error(self, *about: object) -> None:
        """The runner hung up."""


class StandInHandler(http.server.BaseHTTPRequestHandler):
    server: StandIn

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        what = f"{self.command} {self.path.partition('?')[0]}"
        self.server.requests.append(
            (what, {name.lower(): value for name, value in self.headers.items()}, body)
        )
        self.server.before_answer()
        usual = {"POST /lease": "201 ID", "GET /lease": "404"}.get(what, "200")
        say = self.server.answers[what].pop(0) if self.server.answers.get(what) else usual
        say = say.replace("ID", self.headers["x-lease-id"] or "")
        status, _, text = say.partition(" ")
        while say == "silent":
            time.sleep(1)
        if status.isdigit():
            self.send_response(int(status))
            self.send_header("x-lease-ttl", self.server.granted)
            self.send_header("x-fencing-token", "1")
            self.end_headers()
        while say == "trickle" or text == "trickle":
            self.wfile.write(b"H")
            time.sleep(0.05)
        self.wfile.write((text if status.isdigit() else say.removeprefix("lost")).encode())

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def stand_in(
    granted: str = "60s",
    tls: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    **answers: list[str],
) -> Iterator[StandIn]:
    """stand_in(acquire=[…], keepalive=[…], release=[…], holder=[…]).

    With `tls`, a certificate and its key.
    """
    paths = {
        "acquire": "POST /lease",
        "keepalive": "POST /keepalive",
        "release": "DELETE /lease",
        "holder": "GET /lease",
    }
    said = {paths[what]: list(texts) for what, texts in answers.items()}
    with StandIn(granted, said, host, port) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.url = server.url.replace("http:", "https:")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def lease_of(granted: float) -> example.Lease:
    """A lock of which this process is told that it has it, of a service that is away."""
    service = example.Service("http://127.0.0.1:1")
    return example.Lease(service, "4711", "1", granted, example.now())


# -- The command and its lock


def test_the_command_runs_under_the_lock_and_its_exit_status_is_handed_on(
    on_memory: Daemon, run: Run, key: str
) -> None:
    runner = run(*sh("echo $SHARED_LOCK_FENCING_TOKEN $SHARED_LOCK_KEY $SHARED_LOCK_LEASE; exit 7"))
    assert runner.wait() == 7

    token, told_key, lease = runner.out().split()
    assert told_key == key
    assert int(lease) > 0
    assert is_free(on_memory, key)
    assert int(on_memory.acquire(key).headers["x-fencing-token"]) > int(token)
    assert runner.err() == ""


def test_while_the_command_runs_its_lock_is_held_far_beyond_the_ttl(
    on_memory: Daemon, run: Run, key: str
) -> None:
    runner = run(*sh("echo $SHARED_LOCK_FENCING_TOKEN; sleep 5"), ttl="3s")
    token = int(eventually(runner.out))

    time.sleep(4)
    held = on_memory.request("GET", f"/lease?key={key}")

    assert json.loads(held.body)["fencing_token"] == token
    assert runner.wait() == 0
    assert runner.err() == ""


def test_the_ttl_that_counts_is_the_granted_one(run: Run) -> None:
    with stand_in(granted="60s") as service:
        assert run(*sh("sleep 2"), ttl="2s", on=service.url).wait() == 0
        assert service.asked() == [
            "POST /lease",
            "DELETE /lease",
        ]  # a third of 2 s has passed, of 60 s it has not


def test_of_three_runners_at_once_only_one_at_a_time_runs_its_command(
    run: Run, folder: Path
) -> None:
    diary = folder / "diary"
    line = "echo in $SHARED_LOCK_FENCING_TOKEN >>$0; sleep 0.5;"
    line += " echo out $SHARED_LOCK_FENCING_TOKEN >>$0"

    runners = [run(*sh(line), str(diary)) for _ in range(3)]
    assert [runner.wait() for runner in runners] == [0, 0, 0]

    entries = [entry.split() for entry in diary.read_text().splitlines()]
    assert [what for what, _ in entries] == ["in", "out"] * 3
    tokens = [int(token) for _, token in entries]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == 3


def test_of_five_machines_at_the_same_second_one_runs_the_job_and_all_end_well(run: Run) -> None:
    runners = [run(*sh("echo ran; sleep 3"), options=["-n", "-E", "0"]) for _ in range(5)]

    assert [runner.wait() for runner in runners] == [0] * 5
    assert sorted(runner.out() for runner in runners) == ["", "", "", "", "ran\n"]


def test_with_keep_a_job_that_takes_no_time_runs_once_however_the_clocks_differ(run: Run) -> None:
    options = ["-n", "-E", "0", "--keep"]
    runners = []
    for _ in range(3):  # each starts when the one before has ended
        runners.append(run("echo", "ran", options=options, ttl="10m"))
        assert runners[-1].wait() == 0

    assert [runner.out() for runner in runners] == ["ran\n", "", ""]
    assert [runner.err() for runner in runners] == ["", "", ""]


def test_with_keep_the_ttl_runs_from_the_end_of_the_command(run: Run) -> None:
    with stand_in() as service:
        assert run("true", on=service.url, options=["--keep"]).wait() == 0
        assert service.asked() == ["POST /lease", "POST /keepalive"]


@pytest.mark.parametrize("options", [[], ["--keep"]])
def test_a_lock_that_was_lost_unnoticed_is_told_in_the_end(
    on_memory: Daemon, run: Run, options: list[str]
) -> None:
    runner = run(*sh("echo $SHARED_LOCK_LEASE; sleep 1; exit 3"), options=options)

    on_memory.release(eventually(runner.out).strip())

    assert runner.wait() == 3
    assert "had been lost" in runner.err()


@pytest.mark.parametrize(
    ("options", "status"),
    [(["-n"], 73), (["--wait", "1s"], 73), (["-n", "-E", "5"], 5)],
)
def test_a_lock_that_is_not_to_be_had_gives_the_conflict_status_and_says_who_has_it(
    on_memory: Daemon, run: Run, key: str, options: list[str], status: int
) -> None:
    on_memory.acquire(key, "60s", "alice")
    runner = run("echo", "ran", options=options)

    assert runner.wait(10) == status
    assert runner.out() == ""
    assert re.fullmatch(r"example.py: held by 'alice', (59|60) s left\n", runner.err())


@pytest.mark.parametrize("options", [["-n", "-E", "0"], ["--wait", "500ms", "-E0"]])
def test_where_a_held_lock_is_no_failure_nothing_is_said(
    on_memory: Daemon, run: Run, key: str, options: list[str]
) -> None:
    on_memory.acquire(key)
    runner = run("echo", "ran", options=options)

    assert runner.wait(10) == 0
    assert (runner.out(), runner.err()) == ("", "")


def test_a_holder_without_a_name_is_told_as_one(on_memory: Daemon, run: Run, key: str) -> None:
    on_memory.acquire(key)
    runner = run("true", options=["-n"])

    assert runner.wait(10) == 73
    assert re.fullmatch(r"example.py: held, (59|60) s left\n", runner.err())


def test_a_lock_that_gets_free_within_the_wait_is_taken(
    on_memory: Daemon, run: Run, key: str
) -> None:
    other = on_memory.acquire(key).text
    runner = run("echo", "ran", options=["--wait", "30s"])
    eventually(runner.err)

    on_memory.release(other)

    assert runner.wait(10) == 0
    assert runner.out() == "ran\n"


def test_a_lock_that_was_waited_for_longer_than_its_ttl_is_as_good_as_any(
    on_memory: Daemon, run: Run, key: str
) -> None:
    other = on_memory.acquire(key).text
    runner = run(*sh("echo started; sleep 1"), ttl="3s")
    eventually(runner.err)
    time.sleep(3.2)  # its request is now older than the ttl that it asks for
    assert runner.out() == ""

    on_memory.release(other)

    assert runner.wait() == 0
    assert runner.out() == "started\n"
    assert "trying again" not in runner.err()
    assert is_free(on_memory, key)


def test_a_command_that_dies_by_a_signal_gives_128_and_its_number(run: Run) -> None:
    assert run(*sh("kill -9 $$")).wait() == 137


@pytest.mark.parametrize(("command", "status"), [("/no/such/command", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_started_gives_the_status_of_a_shell_and_frees_the_lock(
    on_memory: Daemon, run: Run, key: str, command: str, status: int
) -> None:
    runner = run(command, options=["--keep"])

    assert runner.wait() == status
    assert command in runner.err()
    assert is_free(on_memory, key)


def test_what_a_command_leaves_behind_ends_before_the_lock_is_released(run: Run) -> None:
    runner = run(*sh("sleep 1000 & echo $!"))

    assert runner.wait() == 0
    assert not lives(int(runner.out()))


# -- A service that is sick, and what it costs


def test_a_frozen_service_stops_the_command_and_all_of_its_group_before_the_lease_can_have_ended(
    start: Callable[..., Daemon], run: Run, folder: Path
) -> None:
    daemon, beat = start("mock"), folder / "beat-frozen"
    runner = run(*sh(STUBBORN), str(beat), ttl="4s", on=daemon.url)
    eventually(beat.exists)
    renewed = 'operation="prolong",status="success"} 1'
    eventually(lambda: renewed in daemon.request("GET", "/metrics").text)

    daemon.process.send_signal(signal.SIGSTOP)
    frozen_at = time.time()

    assert runner.wait() == 75
    assert frozen_at < beat.stat().st_mtime < frozen_at + 4
    assert not beats(beat)
    assert "could not be kept alive in time" in runner.err()


@pytest.mark.parametrize(
    "keepalives", [["silent"], ["500 no answer in 1 s", "500 no answer in 2 s"]]
)
def test_keepalives_that_fail_alike_stop_nothing_and_are_told_once(
    run: Run, keepalives: list[str]
) -> None:
    with stand_in("6s", keepalive=keepalives) as service:
        runner = run("sleep", "4", on=service.url)

        assert runner.wait() == 0
        assert len(service.asked("POST /keepalive")) > len(keepalives)
        assert re.fullmatch(
            r"example.py: keepalive failed, \d.\d s left: .* no answer in .*\n", runner.err()
        )


def test_a_revoked_lease_stops_the_command_and_gives_75_whatever_the_command_says(
    on_memory: Daemon, run: Run
) -> None:
    line = "trap 'echo told to stop; exit 0' TERM; echo $SHARED_LOCK_LEASE; sleep 100 & wait"
    runner = run(*sh(line), ttl="3s")

    assert on_memory.release(eventually(runner.out).strip()).status == 200

    assert runner.wait() == 75
    assert runner.out().endswith("\ntold to stop\n")
    assert "the lock is lost" in runner.err()


def test_of_a_revoked_lease_a_stubborn_group_is_killed(
    on_memory: Daemon, run: Run, folder: Path
) -> None:
    beat = folder / "beat-revoked"
    runner = run(*sh(STUBBORN), str(beat), ttl="3s")
    eventually(beat.exists)

    on_memory.release(runner.out().strip())

    assert runner.wait() == 75
    assert not beats(beat)


@pytest.mark.parametrize("how", ["the service said so", "the machine was suspended beyond the ttl"])
def test_a_lease_that_has_ended_stops_the_command_at_once(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    lease = lease_of(3600)
    command = example.Command(["sh", "-c", "trap '' TERM; exec sleep 15"], {})
    started, woken_at = time.monotonic(), example.now() + 4000

    if how == "the service said so":
        lease.gone = True
        lease.grace = 0.5
    else:
        monkeypatch.setattr(example, "now", lambda: woken_at)
    kept = example.guard(command, lease, queue.SimpleQueue())
    command.stop(lease)

    assert not kept
    assert command.status in (128 + signal.SIGTERM, 128 + signal.SIGKILL)
    assert time.monotonic() - started < 10


def test_a_service_that_is_away_is_waited_for_and_that_is_told_once(
    start: Callable[..., Daemon], run: Run
) -> None:
    port = free_port()
    runner = run("echo", "done", on=f"http://127.0.0.1:{port}")
    eventually(runner.err)
    time.sleep(1.5)  # a second try

    start("mock", SERVER_PORT=str(port))

    assert runner.wait() == 0
    assert runner.out() == "done\n"
    assert re.fullmatch(
        r"example.py: no lock yet, trying again: http://127.0.0.1:\d+: .*refused\n", runner.err()
    )


def test_pauses_between_failures_grow_to_10_s_and_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses = list[float]()
    # In its own `time` alone: any other thread would go on without a pause, and fill the memory.
    clock = types.SimpleNamespace(**{**vars(time), "sleep": pauses.append})
    monkeypatch.setattr(example, "time", clock)

    with stand_in(acquire=["500 away"] * 7) as service:
        assert example.Lock(example.Service(service.url), "k", 60).acquire(math.inf)

    assert pauses == [1, 2, 4, 8, 10, 10, 10]


def test_the_holder_is_told_once_and_again_when_it_changes(run: Run) -> None:
    holders = [
        json.dumps({"value": who, "ttl": ttl, "fencing_token": n}) for who, ttl, n in HELD_BY
    ]
    with stand_in(acquire=["202 0"] * 4, holder=[f"200 {holder}" for holder in holders]) as service:
        runner = run("true", on=service.url)

        assert runner.wait() == 0
        assert runner.err().splitlines() == [
            "example.py: held by 'alice', 9 s left",
            r"example.py: held by 'b\x1b[31mob', 8 s left",
        ]


HELD_BY = [("alice", 9, 1), ("alice", 8, 1), ("b\x1b[31mob", 8, 2), ("b\x1b[31mob", 7, 2)]


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "301 elsewhere",
            "400 \x1b[2Jno more",
            "401 who?",
            "403 no",
            "404 no such path: /lease",
            "413 too much",
            "200 <html>",
        ),
        *("204", "202 accepted", "SSH-2.0-OpenSSH_9.2\r\n", "HTTP/1.1 what\r\n\r\n"),
        "201 4711",  # not the lease ID that was asked for
    ],
)
def test_what_cannot_get_better_ends_it_with_69_and_the_reason_in_one_line(
    run: Run, answer: str
) -> None:
    with stand_in(acquire=[answer]) as service:
        runner = run("echo", "ran", on=service.url)

        assert runner.wait(10) == 69
        assert runner.out() == ""
        assert runner.err().count("\n") == 1
        assert service.url in runner.err()
        assert answer.partition(" ")[2].strip()[-4:] in runner.err()
        assert "\x1b" not in runner.err()
        assert service.asked("POST /lease") == ["POST /lease"]


@pytest.mark.parametrize("told", ["x-lease-ttl: 9s", "x-fencing-token: 1"])
def test_a_lock_without_a_fencing_token_or_a_ttl_is_none(run: Run, told: str) -> None:
    with stand_in(acquire=[f"HTTP/1.1 201 Created\r\n{told}\r\n\r\nID"]) as service:
        runner = run("echo", "ran", on=service.url)

        assert runner.wait(10) == 69
        assert runner.out() == ""
        assert "not a shared-lock, or one that is too old" in runner.err()


def test_trouble_until_the_wait_is_over_gives_69_and_not_the_conflict_status(run: Run) -> None:
    runner = run("echo", "ran", on=f"http://127.0.0.1:{free_port()}", options=["-n", "-E", "0"])

    assert runner.wait(10) == 69
    assert "giving up" in runner.err()


def test_a_service_that_stops_and_lets_nobody_wait_does_not_end_the_wait(run: Run) -> None:
    with stand_in(acquire=["202 0", "202 0", "202 0"]) as service:
        assert run("true", on=service.url, options=["--wait", "30s"]).wait() == 0
        asked = [
            headers.get("x-lease-wait")
            for what, headers, _ in service.requests
            if what == "POST /lease"
        ]
        assert asked[0] is None  # to tell early who holds it
        assert all(25 < float(str(wait).removesuffix("s")) <= 30 for wait in asked[1:])


@pytest.mark.parametrize(
    "lost",
    [
        *(["lost"], ["500 outcome unknown", "lost"], ["502 from a proxy"]),
        *(["408 slow"], ["429 too many"], ["HTTP/1.1 201 OK\r\nContent-Length: 9\r\n\r\n4711"]),
    ],
)
def test_a_lost_answer_costs_one_more_request_with_the_same_id(run: Run, lost: list[str]) -> None:
    options = ["-n"] if len(lost) == 1 else []
    with stand_in(acquire=lost) as service:
        runner = run(*sh("echo $SHARED_LOCK_LEASE"), on=service.url, options=options)

        assert runner.wait() == 0
        assert set(service.ids()) == {runner.out().strip()}  # the one that was released, too
        assert 0 < int(runner.out()) < 2**53  # also for a command in JavaScript
        assert len(service.asked("POST /lease")) == len(lost) + 1
        told = runner.err().count("trying again")
        assert told == (0 if options else len(lost))  # with -n the next try comes at once


def test_an_id_that_is_in_use_is_never_asked_for_again_nor_released(run: Run) -> None:
    with stand_in(acquire=["409 in use", "lost", "lost"]) as service:
        assert run("true", on=service.url, options=["--wait", "1ms"]).wait() == 69
        assert service.ids().count(service.ids()[0]) == 1
        assert service.asked()[-1] == "DELETE /lease"


@pytest.mark.parametrize("ending", ["a signal", "the end of the wait"])
def test_a_claim_whose_outcome_is_unknown_is_withdrawn(run: Run, ending: str) -> None:
    with stand_in(
        acquire=["silent"] if ending == "a signal" else ["lost", "lost"], release=["silent"]
    ) as service:
        runner = run("echo", "ran", on=service.url, options=["-n"])
        eventually(service.asked)
        if ending == "a signal":
            runner.process.terminate()

        assert runner.wait(8) == (
            143 if ending == "a signal" else 69
        )  # although the release is not answered, either
        assert service.asked()[-1] == "DELETE /lease"
        assert len(set(service.ids())) == 1
        assert runner.out() == ""


@pytest.mark.parametrize("answer", ["trickle", "200 trickle", "silent"])
def test_an_answer_that_never_ends_holds_no_request_beyond_its_time(answer: str) -> None:
    with stand_in(release=[answer]) as service:
        threads = threading.active_count()
        started = time.monotonic()

        with pytest.raises(example.Unavailable, match="no answer in time"):
            example.Service(service.url).request("DELETE /lease", "1", (200,), seconds=0.5)

        assert time.monotonic() - started < 2
        eventually(lambda: threading.active_count() <= threads + 1)  # the stand-in's own


def test_a_name_server_that_does_not_answer_holds_no_request_beyond_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered = threading.Event()
    here = socket.getaddrinfo("127.0.0.1", 1, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: answered.wait(20) and here)
    started = time.monotonic()

    with pytest.raises(example.Unavailable, match="no answer in time"):
        example.Service("http://locks.example").request("GET /lease", "", (200,), seconds=0.5)

    assert time.monotonic() - started < 2
    answered.set()


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
def test_a_release_that_trickles_holds_the_runner_no_longer_than_its_time_out(
    run: Run, number: int
) -> None:
    with stand_in("6s", release=["trickle"]) as service:
        runner = run("true", on=service.url)
        eventually(lambda: service.asked("DELETE"))
        runner.process.send_signal(number)

        assert runner.wait(5) == 0
        assert "not released, ends within 6 s" in runner.err()


# -- A name with several addresses


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that the name locks.test has in this process; with none, it cannot be looked up."""
    real = socket.getaddrinfo
    known = list[str]()

    def getaddrinfo(host: str, port: int, **more: Any) -> list[Any]:
        if host != "locks.test":
            return real(host, port, **more)
        if not known:
            raise socket.gaierror(socket.EAI_AGAIN, "no name server")
        return [info for address in known for info in real(address, port, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


def at_locks_test(server: StandIn) -> example.Service:
    return example.Service(f"http://locks.test:{server.server_port}")


def release(service: example.Service, seconds: float = 2) -> example.Answer:
    return service.request("DELETE /lease", "1", (200, 204), seconds=seconds)


@pytest.mark.parametrize(
    "sick", [["silent"], ["silent", "refused", "silent"], ["refused"], ["cut"], ["nonsense"]]
)
def test_of_the_addresses_of_a_name_the_one_that_answers_is_found_and_asked_alone_from_then_on(
    addresses: list[str], sick: list[str]
) -> None:
    says = {"silent": "silent", "cut": "lost", "nonsense": "SSH-2.0-OpenSSH_9.2\r\n"}
    with stand_in() as healthy, contextlib.ExitStack() as others:
        for number, how in enumerate(sick, 2):
            addresses.append(f"127.0.0.{number}")
            if how in says:
                place: Any = {"host": addresses[-1], "port": healthy.server_port}
                others.enter_context(stand_in(release=[says[how]], **place))
        service = at_locks_test(healthy)
        addresses.append("127.0.0.1")

        first = release(service)
        addresses.clear()  # and no name server is asked, either
        alone = [release(service).alone for _ in range(3)]

        assert not first.alone  # somebody else may have released it before
        assert alone == [True] * 3
        assert len(healthy.requests) == 4


def test_an_address_that_is_slow_has_all_of_the_time_although_others_are_asked_meanwhile(
    addresses: list[str],
) -> None:
    addresses += ["127.0.0.1", "127.0.0.2"]
    with (
        stand_in() as slow,
        stand_in(host="127.0.0.2", port=slow.server_port, release=["silent"]) as silent,
    ):
        slow.before_answer = lambda: eventually(lambda: silent.requests)

        assert release(at_locks_test(slow), seconds=1).status == 200


def test_a_waiting_request_is_not_taken_for_silent_while_it_waits(addresses: list[str]) -> None:
    addresses += ["127.0.0.1", "127.0.0.2"]
    go_on = threading.Event()
    with stand_in() as first, stand_in(host="127.0.0.2", port=first.server_port) as second:
        first.before_answer = lambda: go_on.wait(0.5)
        service = at_locks_test(first)

        service.request("POST /lease", "", (201,), seconds=0.1, patience=5)

        assert not second.requests


@pytest.mark.parametrize(
    ("answers", "failure"),
    [
        (["silent", "silent"], "no answer in time"),
        (["silent", "lost"], "no answer in time"),
        (["lost", "SSH-2.0"], "BadStatusLine"),
        (["SSH-2.0", "lost"], "BadStatusLine"),
        (["silent", "SSH-2.0"], "BadStatusLine"),
        (["lost", "trickle"], "no answer in time"),
    ],
)
def test_where_no_address_answers_the_reason_is_told_that_no_later_try_would_change(
    addresses: list[str], answers: list[str], failure: str
) -> None:
    addresses += ["127.0.0.1", "127.0.0.2"]
    kind = example.Refused if failure == "BadStatusLine" else example.Unavailable
    with (
        stand_in(release=answers[:1]) as one,
        stand_in(host="127.0.0.2", port=one.server_port, release=answers[1:]),
        pytest.raises(kind, match=f"^http://locks.test:{one.server_port}: {failure}"),
    ):
        release(at_locks_test(one), seconds=0.4)


@pytest.mark.parametrize("fault", ["silent", "lost", "500 no", "404 no"])
def test_after_a_fault_another_address_is_asked_first_and_the_name_is_looked_up_anew(
    addresses: list[str], fault: str
) -> None:
    addresses.append("127.0.0.1")
    with stand_in(release=["200", fault]) as old:
        service = at_locks_test(old)
        release(service)
        addresses.append("127.0.0.2")
        with pytest.raises(example.Failure):
            release(service, seconds=0.3)

        with stand_in(host="127.0.0.2", port=old.server_port) as new:
            assert release(service).alone

            assert (len(old.requests), len(new.requests)) == (2, 1)


def test_a_lost_lock_is_not_told_where_another_address_may_have_released_it(
    addresses: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    addresses += ["127.0.0.1", "127.0.0.2"]
    with (
        stand_in(release=["lost"]) as one,
        stand_in(host="127.0.0.2", port=one.server_port, release=["204"]),
    ):
        lease = example.Lease(at_locks_test(one), "4711", "1", 6, example.now())

        lease.release()

        assert capfd.readouterr().err == ""


def test_a_job_goes_on_when_the_address_of_its_lock_falls_silent_and_another_answers(
    start: Start, run: Run, tmp_path: Path
) -> None:
    daemon = start("mock")
    with contextlib.closing(Proxy(daemon, daemon.port, "127.0.0.2")) as silenced:
        names = Names(tmp_path, m="127.0.0.2 127.0.0.1")
        runner = run(
            *sh("echo on; sleep 4"),
            ttl="3s",
            on=f"http://m.test:{daemon.port}",
            python=names.command[:-2],
        )
        eventually(runner.out)

        silenced.rule = (Proxy.ALL, "stop", 99)

        assert runner.wait() == 0
        assert runner.err() == ""
        silenced.go_on.set()


# -- Signals


def test_every_signal_that_ends_a_process_is_handed_on_and_none_leaves_the_command_behind(
    on_memory: Daemon, run: Run, key: str
) -> None:
    ends_nothing = (
        "SIG(CHLD|CLD|CONT|URG|WINCH|STOP|TSTP|TTIN|TTOU|PIPE|XFSZ)"  # Python ignores the last two
    )
    numbers = [
        one
        for one in signal.valid_signals()
        if not re.fullmatch(ends_nothing, getattr(one, "name", ""))
    ]
    runners = {
        number: run(*sh("echo $$; exec sleep 100"), options=["--key", f"{key}{number}"])
        for number in numbers
    }
    commands = {number: int(eventually(runner.out, 30)) for number, runner in runners.items()}

    for number, runner in runners.items():
        runner.process.send_signal(number)

    for number, runner in runners.items():
        fatal = number in (
            signal.SIGKILL,
            signal.SIGILL,
            signal.SIGBUS,
            signal.SIGFPE,
            signal.SIGSEGV,
            signal.SIGSYS,
        )
        assert runner.wait() == (-number if fatal else 128 + number)
        assert fatal or is_free(on_memory, f"{key}{number}")
        eventually(lambda command=commands[number]: not lives(command))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "ALRM"])
def test_a_command_may_answer_a_signal_as_it_likes(
    on_memory: Daemon, run: Run, key: str, name: str
) -> None:
    runner = run(*sh(f"trap 'echo {name}; exit 42' {name}; echo started; sleep 100 & wait"))
    eventually(runner.out)

    runner.process.send_signal(signal.Signals[f"SIG{name}"])

    assert runner.wait() == 42
    assert runner.out() == f"started\n{name}\n"
    assert is_free(on_memory, key)


def test_a_command_that_ignores_sigterm_keeps_its_lock_until_it_ends(
    on_memory: Daemon, run: Run, key: str
) -> None:
    runner = run(*sh("trap '' TERM; echo started; sleep 4; echo done"), ttl="3s")
    eventually(runner.out)

    runner.process.terminate()
    time.sleep(3.2)

    assert on_memory.acquire(key).status == 202
    assert runner.wait() == 0
    assert runner.out() == "started\ndone\n"


def test_without_a_terminal_a_command_that_is_stopped_keeps_its_lock(
    on_memory: Daemon, run: Run, folder: Path, key: str
) -> None:
    beat = folder / "beat-stopped-lock"
    runner = run(*sh(STUBBORN), str(beat), ttl="2s", start_new_session=True)
    eventually(beat.exists)

    runner.process.send_signal(signal.SIGTSTP)
    eventually(lambda: not beats(beat))
    time.sleep(2.5)
    assert not is_free(on_memory, key)
    runner.process.send_signal(signal.SIGCONT)

    eventually(lambda: beats(beat))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_while_waiting_ends_the_wait_and_nothing_is_left_in_line(
    on_memory: Daemon, run: Run, key: str, number: int
) -> None:
    other = on_memory.acquire(key).text
    runner = run("echo", "started")
    eventually(runner.err)

    runner.process.send_signal(number)

    assert runner.wait(10) == 128 + number
    assert runner.out() == ""
    on_memory.release(other)
    eventually(lambda: is_free(on_memory, key))
    assert on_memory.acquire(key).status == 201


def test_a_runner_that_is_killed_takes_all_of_its_command_along(run: Run, folder: Path) -> None:
    beat = folder / "beat-killed"
    runner = run(*sh(STUBBORN), str(beat))
    eventually(beat.exists)

    runner.process.kill()

    eventually(lambda: not beats(beat))


def test_under_nohup_a_hangup_ends_neither_the_runner_nor_its_command(run: Run) -> None:
    runner = run(
        *sh("echo $$; sleep 1; echo done"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    command = int(eventually(runner.out))

    runner.process.send_signal(signal.SIGHUP)
    os.kill(command, signal.SIGHUP)

    assert runner.wait() == 0
    assert runner.out() == f"{command}\ndone\n"


# -- Where it is started: cron, a container, a terminal


@pytest.mark.parametrize("closed", ["", "<&-", "<&- >&- 2>&-"])
def test_in_an_empty_environment_and_with_closed_descriptors_it_works(
    run: Run, folder: Path, closed: str
) -> None:
    wrote = folder / f"wrote-{next(_numbers)}"
    runner = run(
        *sh(f"readlink /proc/$PPID/fd/2 >{wrote}"),
        env={},
        under=["sh", "-c", f'exec "$@" {closed}', "sh"],
    )

    assert runner.wait() == 0
    assert wrote.read_text().strip() == (
        "/dev/null" if "2>" in closed else str(runner.err_path)
    )  # and no socket


def as_pid_1() -> list[str]:
    """Before a command, this runs it as the first process of a PID namespace."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    tried = subprocess.run([*command, "true"], text=True, capture_output=True, timeout=10)
    if tried.returncode:
        pytest.skip(f"needs root, or a kernel that lets others do this: {tried.stderr.strip()}")
    return command


def test_as_pid_1_it_waits_for_orphans_and_takes_no_zombie_for_living(run: Run) -> None:
    line = "sleep 0.1 & (setsid sleep 0.1 &); exec sleep 0.5"  # which waits for neither
    started = time.monotonic()

    assert run(*sh(line), under=as_pid_1()).wait() == 0

    # SIGKILL would have come after 10 s, for a group that seems to live
    assert time.monotonic() - started < 5


class Screen:
    """A terminal with an interactive shell in it."""

    def __init__(self, url: str, key: str) -> None:
        self.key = re.sub("[^a-z0-9]+", "-", key)
        self.pid, self._fd = os.forkpty()
        if not self.pid:
            runner = (
                f"{shlex.quote(PYTHON)} {HERE}/example.py --url {url} --key {self.key} --ttl 3s --"
            )
            os.execvpe(
                "sh",
                ["sh", "-i"],
                clean_env() | {"PS1": "ready> ", "RUN": runner, "ENV": "", "HISTFILE": ""},
            )
        self._seen = ""
        self.wait("ready> ")

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self, pattern: str, seconds: float = 10) -> str:
        """What was written up to this, and the match at its end."""

        def found() -> re.Match[str] | None:
            while select.select([self._fd], [], [], 0)[0]:
                self._seen += os.read(self._fd, 1 << 16).decode()
            return re.search(pattern, self._seen)

        with contextlib.suppress(AssertionError):
            match = eventually(found, seconds)
            before, self._seen = self._seen[: match.end()], self._seen[match.end() :]
            return str(before)
        raise AssertionError(f"no {pattern!r} in {self._seen!r}")

    def close(self) -> None:
        """As when its window is closed: the kernel sends SIGHUP to all of it."""
        os.kill(self.pid, signal.SIGHUP)
        os.close(self._fd)
        os.waitpid(self.pid, 0)


@pytest.fixture
def screen(on_memory: Daemon, key: str) -> Iterator[Screen]:
    found = Screen(on_memory.url, key)
    yield found
    with contextlib.suppress(OSError, ChildProcessError):
        found.close()


@pytest.mark.parametrize("pipe", ["", "| cat", "2>&1 | tee /dev/null"])
def test_the_command_reads_from_the_terminal(screen: Screen, pipe: str) -> None:
    screen.type(f"$RUN sh -c 'echo on; read x; echo got $x' {pipe}\n")
    screen.wait("on\r\n")
    screen.type("hello\n")
    screen.wait("got hello\r\n")
    screen.type("read y; echo back $y\n")  # so does the shell afterwards
    screen.wait("ready> ")
    screen.type("home\n")
    screen.wait("back home\r\n")


def test_in_a_pipeline_the_others_may_read_from_the_terminal(screen: Screen) -> None:
    screen.type("$RUN sh -c 'echo on >&2; sleep 1' | { read x </dev/tty; echo got $x; }\n")
    screen.wait("on\r\n")
    screen.type("hello\n")
    screen.wait("got hello\r\n")


@pytest.mark.parametrize(("key_", "status"), [("\x03", 130), ("\x1c", 131)])
def test_what_is_typed_to_end_the_command_ends_it(screen: Screen, key_: str, status: int) -> None:
    screen.type("ulimit -c 0; $RUN sh -c 'echo on; exec sleep 100'; echo status $?\n")
    screen.wait("on\r\n")

    screen.type(key_)

    if status == 131:  # of Ctrl-C the rest of the line ends, too
        screen.wait("status 131")
    screen.wait("ready> ")
    screen.type("echo st=$?\n")
    screen.wait("st=(130|0)\r\n")


@pytest.mark.parametrize("held", ["", "held"])
def test_ctrl_c_ends_the_loop_around_it_too(on_memory: Daemon, screen: Screen, held: str) -> None:
    if held:
        on_memory.acquire(screen.key, "60s", "alice")
    screen.type("while :; do $RUN sh -c 'echo on; exec sleep 100'; done\n")
    screen.wait("alice" if held else "on\r\n")

    screen.type("\x03")

    screen.wait("ready> ")


@pytest.mark.parametrize("pipe", ["", "| cat"])
def test_ctrl_z_gives_the_prompt_and_fg_the_command(screen: Screen, pipe: str) -> None:
    screen.type(f"$RUN sh -c 'echo on; read x; echo got $x' {pipe}\n")
    screen.wait("on\r\n")

    for _ in range(2):
        screen.type("\x1a")
        screen.wait("[Ss]topped.*\n(.*\n)*.*ready> ")
        screen.type("fg\n")
        screen.wait("sh -c .*\n")
        time.sleep(0.5)  # what is typed before it goes on is lost, as in any shell
    screen.type("hello\n")

    screen.wait("got hello\r\n")
    screen.wait("ready> ")


def beating(screen: Screen, beat: Path, then: str = "") -> Path:
    """A file that the runner's command touches for as long as it lives, once it does."""
    screen.type(f"$RUN sh -c 'while :; do echo >{beat}; sleep 0.05; done'{then}\n")
    eventually(beat.exists)
    return beat


def test_a_command_whose_lease_ended_while_it_was_stopped_never_goes_on(
    on_memory: Daemon, screen: Screen, folder: Path
) -> None:
    beat = beating(screen, folder / "beat-stopped", "; echo status $?")
    screen.type("\x1a")
    screen.wait("ready> ")
    last = beat.stat().st_mtime
    eventually(lambda: is_free(on_memory, screen.key))

    screen.type("fg; echo status $?\n")

    screen.wait("the lock is lost\r\n")
    screen.wait("status 75\r\n")
    assert beat.stat().st_mtime == last


def test_in_the_background_it_waits_for_fg_to_read(screen: Screen) -> None:
    screen.type("$RUN sh -c 'read x; echo got $x' &\n")
    screen.wait("ready> ")
    time.sleep(1)
    screen.type("jobs\n")
    screen.wait("topped.*\n")

    screen.type("fg\n")
    time.sleep(0.5)
    screen.type("hello\n")

    screen.wait("got hello\r\n")


def test_a_terminal_that_is_closed_ends_the_command(
    on_memory: Daemon, screen: Screen, folder: Path
) -> None:
    beat = beating(screen, folder / "beat-closed")

    screen.close()

    eventually(lambda: is_free(on_memory, screen.key))
    assert not beats(beat)


# -- The service: a URL, a token, a certificate; and the command line


def test_a_path_in_the_url_leads_those_of_all_requests(run: Run) -> None:
    with stand_in() as service:
        runner = run("true", on=service.url + "/team/locks/", options=["-n"])

        assert runner.wait() == 69  # a stand-in knows no such path
        assert service.asked()[0] == "POST /team/locks/lease"


def test_a_proxy_of_the_environment_is_not_asked(on_memory: Daemon, run: Run) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    assert (
        run(
            "true", env=clean_env() | {"http_proxy": away, "HTTP_PROXY": away, "all_proxy": away}
        ).wait()
        == 0
    )


def test_url_and_token_file_come_from_the_environment_where_they_are_not_given(
    folder: Path,
) -> None:
    token = folder / "token-env"
    token.write_text("s3cret\n")
    with stand_in() as service:
        env = clean_env() | {"SHARED_LOCK_URL": service.url, "SHARED_LOCK_TOKEN_FILE": str(token)}
        assert Runner(folder, "--key", "k", "--", "true", env=env).wait() == 0

        assert [headers["authorization"] for _, headers, _ in service.requests] == [
            "Bearer s3cret"
        ] * 2


@pytest.mark.parametrize(("renewed", "status"), [("new", 0), ("old", 69)])
def test_a_401_is_asked_again_once_if_the_token_was_renewed_since(
    folder: Path, run: Run, renewed: str, status: int
) -> None:
    token = folder / f"token-{renewed}"
    token.write_text("old")
    with stand_in(acquire=["500 slow", "401 who?"]) as service:
        runner = run("true", on=service.url, options=["--token-file", str(token)])
        service.before_answer = lambda: (
            token.write_text(renewed) if len(service.requests) == 2 else None
        )

        assert runner.wait() == status
        sent = [
            headers["authorization"]
            for what, headers, _ in service.requests
            if what == "POST /lease"
        ]
        assert sent == ["Bearer old", "Bearer old", "Bearer new"][: 3 if renewed == "new" else 2]


def test_a_certificate_is_judged_by_the_ca_file_and_refused_at_once_without(
    folder: Path, run: Run
) -> None:
    pem = folder / "runner.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    make += " -days 2 -subj /CN=x -addext"
    subprocess.run(
        [*make.split(), "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", pem],
        check=True,
        stderr=-3,
    )
    pem.write_text(
        pem.read_text() + subprocess.check_output(["openssl", "x509", "-in", pem], text=True)
    )
    with stand_in(tls=pem) as service:
        assert run("true", on=service.url, options=["--ca-file", str(pem)]).wait() == 0

        refused = run("true", on=service.url)
        assert refused.wait(5) == 69
        assert "certificate verify failed" in refused.err()
        assert refused.err().count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--key: missing"),
        (["--key", ""], "--key: missing"),
        (
            ["--key", "k", "--url", "localhost:8080"],
            "--url: not a URL such as http://localhost:8080: 'localhost:8080'",
        ),
        (["--key", "k", "--url", "http://localhost:x"], "--url: "),
        (["--key", "k", "--url", "http://h/?a=b"], "--url: "),
        (["--key", "k", "--url", "http://me:s3cret@h"], "see --token-file"),
        (["--key", "k", "--url", "htp:/me:s3cret@[h"], "see --token-file"),
        (["--key", "k", "--ttl", "soon"], "--ttl: not a duration such as 15s or 1m30s: 'soon'"),
        (["--key", "k", "--ttl", "15 s"], "--ttl: not a duration"),
        (["--key", "k", "--ttl", "0s"], "--ttl: not more than 0"),
        (["--key", "k", "--wait", "1m30"], "--wait: not a duration"),
        (["--key", "k", "-E", "256"], "not 0 to 255"),
        (["--key", "k", "--token-file", "/no/such"], "'/no/such'"),
        (["--key", "k", "--url", "https://h", "--ca-file", "/no/such"], "'/no/such'"),
        (["--key", "k", "job.sh"], "unrecognized arguments: job.sh"),
    ],
)
def test_a_wrong_call_of_the_runner_is_told_in_one_line(
    arguments: list[str], complaint: str
) -> None:
    command = [PYTHON, str(HERE / "example.py"), *arguments, "--", "echo", "ran"]

    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), timeout=20)

    assert (done.returncode, done.stdout) == (2, "")
    usage, _, line = done.stderr.partition("example.py: error: ")
    assert usage.startswith("usage: ")
    assert complaint in line
    assert line.count("\n") == 1
    assert "s3cret" not in done.stderr


# Python is to read its arguments as the locale says.
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", **ASCII}])
def test_the_key_is_the_same_in_every_locale_and_handed_on_as_it_is(
    on_memory: Daemon, run: Run, key: str, locale: dict[str, str]
) -> None:
    wanted = f"{key}-nächtlich"
    runner = run(
        *sh("echo $SHARED_LOCK_KEY; read line"),
        options=["--key", wanted],
        env=clean_env() | locale,
        stdin=subprocess.PIPE,
    )

    assert eventually(runner.out) == f"{wanted}\n"
    assert on_memory.look(wanted).status == 200


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", **ASCII}])
def test_a_key_that_is_not_utf_8_is_refused(run: Run, locale: dict[str, str]) -> None:
    key: Any = "nächtlich".encode("latin-1")
    runner = run("echo", "ran", options=["--key", key], env=clean_env() | locale)

    assert runner.wait() == 2
    assert runner.out() == ""
    assert r"argument --key: not UTF-8: b'n\xe4chtlich'" in runner.err()


@pytest.mark.parametrize("arguments", [["--key", "k", "--"], ["--key", "k"]])
def test_a_command_of_nothing_is_a_wrong_call(arguments: list[str]) -> None:
    done = subprocess.run(
        [PYTHON, str(HERE / "example.py"), *arguments], capture_output=True, text=True
    )

    assert done.returncode == 2
    assert "no command after --" in done.stderr


def test_help_lists_the_exit_statuses_and_what_the_command_gets() -> None:
    text = subprocess.run(
        [PYTHON, str(HERE / "example.py"), "--help"], capture_output=True, text=True
    ).stdout

    assert re.findall(r"^  (\d+) ", text, re.MULTILINE) == ["2", "69", "73", "75", "126"]
    for word in (
        "127",
        "128 + N",
        "SHARED_LOCK_FENCING_TOKEN",
        "SHARED_LOCK_LEASE",
        "SHARED_LOCK_KEY",
    ):
        assert word in text


def test_a_python_that_is_too_old_is_told_in_one_line() -> None:
    pretend = "import runpy, sys; sys.hexversion = 0x030A0DF0; sys.version = '3.10.13 (of 2023)'"
    script = f"{pretend}; runpy.run_path({str(HERE / 'example.py')!r})"
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stderr == "example.py: needs Python 3.11 or newer, and this is 3.10.13\n"
    ast.parse((HERE / "example.py").read_text(), feature_version=(3, 6))  # for it to come that far


def test_the_example_is_one_file_of_the_standard_library() -> None:
    source = (HERE / "example.py").read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}

    assert "http.client" in imported
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


# == Dockerfile and kubernetes-example.yaml: what can be checked as text =========================


def manifest() -> str:
    """The lines of kubernetes-example.yaml without their comments."""
    lines = (HERE / "kubernetes-example.yaml").read_text().splitlines()
    return "\n".join(re.sub(r"(^|\s)#.*", "", line).rstrip() for line in lines)


def seconds_of(name: str) -> list[int]:
    """The values of a member whose value is a number of seconds, in order."""
    return [int(value) for value in re.findall(rf"^ *{name}: ([0-9]+)$", manifest(), re.MULTILINE)]


def variables() -> dict[str, str]:
    """The environment of the container."""
    given = re.findall(r'- name: ([A-Z_]+)\n +value: "?([^"\n]*)"?$', manifest(), re.MULTILINE)
    assert len(given) == len(re.findall(r"- name: [A-Z_]+$", manifest(), re.MULTILINE)) > 2
    return dict(given)


def test_each_variable_in_the_manifest_is_one_of_the_daemons_and_its_value_can_be_used() -> None:
    parsers = {
        shared_lock.variable(one.name): one.metadata["parse"]
        for one in dataclasses.fields(shared_lock.Config)
    }

    for name, value in variables().items():
        parsers[name](value)


def test_the_probes_ask_paths_that_the_daemon_has_and_outlast_its_timeouts(
    on_memory: Daemon,
) -> None:
    probes = dict(
        re.findall(
            r"(\w+)Probe:\n +httpGet:\n +path: (\S+)\n +port: http$", manifest(), re.MULTILINE
        )
    )
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert {on_memory.request("GET", path).status for path in probes.values()} == {200}

    env = {
        name: value for name, value in variables().items() if "TLS" not in name
    }  # its files are not here
    config = shared_lock.Config.from_env(env)
    assert seconds_of("timeoutSeconds")[-1] > config.etcd_timeout
    assert (
        seconds_of("terminationGracePeriodSeconds")[0]
        > seconds_of("seconds")[0] + config.server_shutdown_timeout
    )


def test_the_manifest_keeps_kubernetes_from_naming_variables_for_the_daemon() -> None:
    name = re.findall(r"kind: Service\nmetadata:\n  name: (\S+)", manifest())[0]
    injected = f"{name.upper().replace('-', '_')}_PORT"  # =tcp://10.0.0.1:8080

    assert injected in {
        shared_lock.variable(field.name) for field in dataclasses.fields(shared_lock.Config)
    }
    assert "      enableServiceLinks: false\n" in manifest()


def test_the_ports_and_the_user_of_the_manifest_are_those_of_the_image_and_of_the_daemon() -> None:
    dockerfile = (HERE / "Dockerfile").read_text()

    ports = set(
        re.findall(
            r"(?:port|containerPort|prometheus.io/port): \"?([0-9]+)\"?$", manifest(), re.MULTILINE
        )
    )
    assert (
        ports
        == {str(shared_lock.Config().server_port)}
        == set(re.findall(r"^EXPOSE (\d+)$", dockerfile, re.MULTILINE))
    )
    user = re.findall(r"^USER (\d+):\1$", dockerfile, re.MULTILINE)[0]
    assert (
        set(re.findall(r"(?:runAsUser|runAsGroup|fsGroup): (\d+)$", manifest(), re.MULTILINE))
        == {user}
        != {"0"}
    )


def test_the_image_pins_what_the_daemon_imports_and_brings_no_test_tools() -> None:
    dockerfile = (HERE / "Dockerfile").read_text()
    pins = set(re.findall(r"^ +([a-z0-9-]+)==[0-9.]+(?:post[0-9]+)? \\$", dockerfile, re.MULTILINE))

    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import etcd3gw, sys; print(*{name.partition('.')[0] for name in sys.modules})",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    packages = importlib.metadata.packages_distributions()
    needed = {
        package.lower().replace("_", "-")
        for name in set(imported) - sys.stdlib_module_names
        for package in packages.get(name, [])
    }
    assert "etcd3gw" in pins
    assert (
        needed - {"setuptools"} <= pins
    )  # setuptools hooks itself into every start where it is installed
    assert not pins & {"pytest", "setuptools", "mypy", "ruff"}
    assert re.search(r"^FROM python:3\.14\.\d+-slim-\w+$", dockerfile, re.MULTILINE)


def test_the_health_check_of_the_image_tells_a_daemon_from_none(on_memory: Daemon) -> None:
    lines = (HERE / "Dockerfile").read_text().replace("\\\n", "")  # as docker reads them
    [command] = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", lines, re.MULTILINE)
    _, *arguments = json.loads(command)

    def check(port: int) -> int:
        env = clean_env() | {
            "SHARED_LOCK_SERVER_PORT": str(port),
            "SHARED_LOCK_SERVER_HOST": "127.0.0.1",
        }
        return subprocess.run(
            [PYTHON, *arguments], env=env, stderr=subprocess.DEVNULL, timeout=20
        ).returncode

    assert check(on_memory.port) == 0
    assert check(free_port()) == 1


# == README.md: what it shows is run as it stands ================================================

README = (HERE / "README.md").read_text()


def blocks(kind: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell(name: str) -> str:
    """The path of a program, or the test is skipped; sh is everywhere."""
    path = shutil.which(name)
    if not path and name != "sh":
        pytest.skip(f"no {name} on this machine")
    assert path, "no sh on PATH"
    return path


def program(path: Path, script: str) -> None:
    """Makes a script of sh that can be run by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def fresh_machine(folder: Path, etcd_port: int) -> dict[str, str]:
    """A checkout in the folder, and an environment in which no package is installed or fetched.

    Python, etcd and pip are stand-ins for the ones that the README calls; etcd leaves its process
    ID, sudo and etcdctl what they were asked for.
    """
    for name in ("shared_lock.py", "example.py"):
        shutil.copy(HERE / name, folder)
    python, tools = shlex.quote(PYTHON), folder / "tools"
    url, peer = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{free_port()}"
    client = f"--listen-client-urls {url} --advertise-client-urls {url}"
    peers = f"--listen-peer-urls {peer} --initial-advertise-peer-urls {peer}"
    cluster = f"--initial-cluster default={peer}"
    etcd = f'exec {shlex.quote(etcd_binary())} {client} {peers} {cluster} --log-level error "$@"'
    program(folder / ".venv/bin/python", f'exec {python} "$@"')
    program(folder / ".venv/bin/pip", 'echo "$@" >>asked')
    program(tools / "python3", f'[ "$1 $2" = "-m venv" ] || exec {python} "$@"')
    program(tools / "etcd", f"echo $$ >etcd.pid\n{etcd} >etcd.log")
    program(tools / "sudo", 'echo "$@" >>asked')
    program(tools / "etcdctl", 'echo "$@" >>asked')
    home = {"HOME": str(folder), "CURL_HOME": str(folder), "TMPDIR": str(folder)}
    return clean_env() | home | {"PATH": f"{tools}:{os.environ['PATH']}"}


def like(text: str) -> str:
    """The text without what differs from run to run: times, tokens, hosts, processes."""
    known = re.sub('"value": "[^"]+"', '"value": "…"', text)
    return re.sub('("(ttl|fencing_token)": )[0-9]+', r"\1…", known)


@pytest.mark.parametrize("options", ["sh -i", "bash --norc -i", "zsh -f -i"])
def test_all_blocks_can_be_pasted_into_a_shell_in_order_and_print_what_the_readme_says(
    tmp_path: Path, options: str
) -> None:
    name, *rest = options.split()
    command, port, etcd_port = [shell(name), *rest], free_port(), free_port()
    env = fresh_machine(tmp_path, etcd_port)
    tour = README.partition("\n## How fast")[0]  # what follows is how to test
    steps = re.findall(r"^```sh\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", tour, re.M | re.DOTALL)
    assert len(steps) > 8
    find = f"$(curl -s 'localhost:{port}/lease?key=nightly' | sed 's/.*token\": //; s/}}//')"
    on = [
        ("localhost:8080", f"localhost:{port}"),
        ("localhost:2379", f"localhost:{etcd_port}"),
        ("token=4711", f'token="{find}"'),  # which an operator reads
    ]

    pasted = "".join(f"{block}echo '<end of block>'\n" for block, _ in steps)
    for shown, here in on:
        assert shown in pasted
        pasted = pasted.replace(shown, here)
    try:
        ended = subprocess.run(
            command,
            input=pasted + 'kill "$daemon"; wait "$daemon"\n',
            env=env | {"SHARED_LOCK_SERVER_PORT": str(port)},
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=90,
            start_new_session=True,  # an interactive shell takes the terminal
        )
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((tmp_path / "etcd.pid").read_text()), signal.SIGKILL)

    printed = [part.lstrip("\n") for part in ended.stdout.split("<end of block>")]
    assert [like(part) for part in printed] == [*(like(text) for _, text in steps), ""], (
        ended.stderr
    )
    assert ended.returncode == 0
    asked = (tmp_path / "asked").read_text()
    assert "install -y etcd-server python3-venv curl\n" in asked
    assert "install -q etcd3gw>=2.6.0\n" in asked
    assert "user grant-role shared-lock shared-lock\n" in asked
    log = (tmp_path / "shared_lock.log").read_text()
    assert log.count("event=granted") == log.count("event=freed") == 1


# -- The job on many machines


def test_the_readmes_line_for_cron_runs_a_job_once_where_clocks_differ_and_sends_no_mail(
    tmp_path: Path, daemon: Daemon, key: str
) -> None:
    [line] = [line for line in "".join(blocks("sh")).splitlines() if "example.py" in line]
    shutil.copy(HERE / "example.py", tmp_path)
    program(tmp_path / "job.sh", "echo ran >>ran")
    for shown, here in [
        ("python3", shlex.quote(PYTHON)),
        ("http://localhost:8080", daemon.url),
        ("nightly", key),
    ]:
        line = line.replace(shown, here)

    def crontab() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line, shell=True, cwd=tmp_path, env=clean_env(), text=True, capture_output=True
        )

    nights = [crontab() for _ in range(3)]  # the job of one has ended when the next clock strikes

    assert [(one.returncode, one.stdout, one.stderr) for one in nights] == 3 * [(0, "", "")]
    assert (tmp_path / "ran").read_text() == "ran\n"


class Guarded:
    """The README's script for cron, in sh; its job is a line for sh that runs in its folder."""

    def __init__(self, folder: Path, url: str, key: str, job: str, **more: Any) -> None:
        [script] = re.findall(r"^cat >nightly\.sh <<'END'\n(.*)^END$", README, re.M | re.DOTALL)
        keep = more.pop("keep", "")
        settings = {"URL": url, "KEY": key, "TTL": "10", "JOB": job, "KEEP": keep}
        others = {"SHARED_LOCK_KEY": "x", "SHARED_LOCK_LEASE": "1"}  # of a job of example.py
        self.folder = folder
        if not (folder / "script").exists():  # another copy may be reading it
            (folder / "script").write_text(script)
        self.process = subprocess.Popen(
            [shell("sh"), "script"],
            cwd=folder,
            env=clean_env() | others | {f"LOCK_{name}": value for name, value in settings.items()},
            stderr=subprocess.PIPE,
            text=True,
            **{"stdin": subprocess.DEVNULL, **more},
        )

    def wait(self) -> tuple[int, str]:
        """Its exit status and what it says; dash says "Terminated" of the keeper, too."""
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said.replace("Terminated\n", "")

    def has(self, name: str) -> bool:
        """Whether the job has made this file."""
        return (self.folder / name).exists()


@pytest.fixture
def guard(tmp_path: Path, on_memory: Daemon, key: str) -> Iterator[Callable[..., Guarded]]:
    """Starts the script: guard("a line for sh", url, keep="yes"); it ends with the test."""
    started: list[Guarded] = []

    def start_one(job: str, url: str = on_memory.url, **more: Any) -> Guarded:
        started.append(Guarded(tmp_path, url, key, job, **more))
        return started[-1]

    yield start_one
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.wait()


def test_of_two_copies_of_the_readmes_script_one_runs_its_job(
    guard: Callable[..., Guarded], on_memory: Daemon, key: str, tmp_path: Path
) -> None:
    job = "echo ran >>ran; while [ ! -e go ]; do sleep 0.05; done; exit 7"
    copies = [guard(job) for _ in range(2)]

    refused = eventually(
        lambda: next((one for one in copies if one.process.poll() is not None), None)
    )
    assert (refused.wait(), is_free(on_memory, key)) == ((73, ""), False)
    [holder] = [one for one in copies if one is not refused]
    value = json.loads(on_memory.look(key).text)["value"]
    assert value == f"{os.uname().nodename} {holder.process.pid}"
    (tmp_path / "go").touch()

    assert holder.wait() == (7, "")  # the job's
    assert (tmp_path / "ran").read_text() == "ran\n"
    assert is_free(on_memory, key)


def test_the_readmes_script_runs_a_job_once_on_machines_whose_clocks_differ(
    guard: Callable[..., Guarded], tmp_path: Path
) -> None:
    nights = [guard("echo ran >>ran", keep="yes").wait() for _ in range(3)]

    assert nights == [(0, ""), (73, ""), (73, "")]
    assert (tmp_path / "ran").read_text() == "ran\n"


def test_a_refused_copy_of_the_readmes_script_is_no_lost_lock_to_the_alerts(
    guard: Callable[..., Guarded], start: Start, key: str
) -> None:
    daemon = start("mock")
    daemon.acquire(key)

    assert guard("true", daemon.url).wait() == (73, "")

    assert operations(daemon) == {"get created": 1, "get accepted": 1}


def test_the_lease_of_the_readmes_script_survives_a_number_of_javascript(
    guard: Callable[..., Guarded], start: Start
) -> None:
    daemon = start("mock")

    for _ in range(5):
        assert guard("true", daemon.url).wait() == (0, "")

    leases = {int(granted["lease"]) for granted in events(daemon, "granted")}
    assert len(leases) == 5
    assert all(0 < lease < 2**53 for lease in leases)


def test_the_job_of_the_readmes_script_has_its_standard_input(
    guard: Callable[..., Guarded], tmp_path: Path
) -> None:
    (tmp_path / "work").write_text("a line\n")

    with open(tmp_path / "work") as work:
        assert guard("cat >copy", stdin=work).wait() == (0, "")

    assert (tmp_path / "copy").read_text() == "a line\n"


def test_the_readmes_script_keeps_its_lock_until_it_is_stopped(
    guard: Callable[..., Guarded], on_memory: Daemon, key: str
) -> None:
    renewed = operations(on_memory).get("prolong success", 0)
    holder = guard(
        "trap 'sleep 0.5; echo >stopped; exit' TERM; echo >began; while :; do sleep 0.05; done"
    )

    eventually(lambda: operations(on_memory).get("prolong success", 0) > renewed, 15)
    holder.process.terminate()

    assert holder.wait() == (143, "")
    assert holder.has("stopped") and is_free(on_memory, key)


@pytest.mark.parametrize("loss", ["released", "frozen"])
def test_the_readmes_script_stops_its_job_when_the_lock_is_lost_or_may_be(
    guard: Callable[..., Guarded], start: Start, key: str, tmp_path: Path, loss: str
) -> None:
    daemon = start("mock")
    job = {"released": "trap 'echo >stopped; exit 0' TERM", "frozen": "trap '' TERM"}[loss]
    holder = guard(f"{job}; while :; do echo >beat; sleep 0.05; done", daemon.url)
    eventually(lambda: holder.has("beat"))
    began = time.monotonic()

    if loss == "released":
        [granted] = events(daemon, "granted")
        assert daemon.release(granted["lease"]).status == 200
        assert daemon.acquire(key).status == 201
        ended = holder.wait()
    else:
        daemon.process.send_signal(signal.SIGSTOP)
        eventually(lambda: time.time() - (tmp_path / "beat").stat().st_mtime > 1.5, 20)
        assert time.monotonic() - began - 1.5 < 10  # before the ttl is over
        daemon.process.send_signal(signal.SIGCONT)
        ended = holder.wait()

    assert ended == (75, "the lock is lost, or may be soon: the job is stopped\n")
    assert holder.has("stopped") == (loss == "released")
    assert is_free(daemon, key) == (loss == "frozen")  # the next holder's lock is not touched


def test_without_a_service_the_readmes_script_runs_nothing_and_says_which_url_it_asked(
    guard: Callable[..., Guarded],
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    alone = guard("echo >ran", url)

    assert alone.wait() == (69, f"no lock: {url}: status 000\n")
    assert not alone.has("ran")


# -- The programs


class Leader:
    """One of the README's programs, with another ttl where a test waits for its end."""

    def __init__(self, folder: Path, language: str, url: str, ttl: int) -> None:
        [text] = blocks(language)
        assert text.count("TTL = 15") == 1
        path = folder / {"python": "leader.py", "js": "leader.mjs"}[language]
        path.write_text(text.replace("TTL = 15", f"TTL = {ttl}"))
        interpreter = {"python": PYTHON, "js": "node"}[language]
        self.out_path = folder / f"leader-{next(_numbers)}.out"
        with open(self.out_path, "wb") as out:
            self.process = subprocess.Popen(
                [shell(interpreter), str(path)],
                env=clean_env() | {"SHARED_LOCK_URL": url},
                stdout=out,
                stderr=out,
            )

    def works(self) -> bool:
        """Whether it takes another step of its work."""
        steps = self.out_path.read_text().count("at work\n")
        return bool(eventually(lambda: self.out_path.read_text().count("at work\n") > steps))

    def waits(self) -> bool:
        return self.out_path.read_text() == "" and self.process.poll() is None

    def resigns(self) -> bool:
        """Whether it ends well when it is told to."""
        self.process.terminate()
        return self.process.wait(20) in (0, 143)


Lead = Callable[..., Leader]


@pytest.fixture(params=["python", "js"])
def lead(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lead]:
    """Starts programs: lead(url); they end with the test."""
    started: list[Leader] = []

    def start_one(url: str, ttl: int = 6) -> Leader:
        started.append(Leader(tmp_path, request.param, url, ttl))
        return started[-1]

    yield start_one
    for one in started:
        one.process.kill()
        one.process.wait()


def test_the_readmes_program_goes_on_through_lost_answers_and_a_restart(
    lead: Lead, start: Start, own_etcd: Etcd
) -> None:
    daemon = start(own_etcd.url)
    proxy = Proxy(daemon)
    proxy.rules(("/lease", "drop-answer", 1), ("/keepalive", "drop-answer", 1))
    leader = lead(proxy.url, ttl=15)
    assert leader.works()
    token = daemon.token("leader")

    assert daemon.stop() == 0
    daemon = start(own_etcd.url, SERVER_PORT=str(daemon.port))
    proxy.rule = ("/keepalive", "drop-answer", 1)
    eventually(lambda: not proxy.rule and operations(daemon).get("prolong success", 0) > 1, 30)

    assert leader.works()
    assert daemon.token("leader") == token
    assert leader.resigns() and is_free(daemon, "leader")
    proxy.close()


def test_of_two_of_the_readmes_programs_the_second_takes_over_after_a_wait_longer_than_the_ttl(
    lead: Lead, start: Start
) -> None:
    daemon = start("mock")
    leader = lead(daemon.url)
    assert leader.works()
    standby = lead(daemon.url)

    eventually(lambda: operations(daemon).get("prolong success", 0) > 4, 20)  # 8 s of 6
    assert leader.works() and standby.waits()
    assert leader.resigns()

    assert standby.works()
    assert standby.resigns() and is_free(daemon, "leader")
    assert "prolong failure" not in operations(daemon)


def test_the_readmes_program_ends_when_an_operator_frees_its_lock(
    lead: Lead, start: Start, own_etcd: Etcd
) -> None:
    daemon = start(own_etcd.url)
    leader = lead(daemon.url)
    assert leader.works()

    holder = {"If-Match": f'"{daemon.token("leader")}"'}
    freed = daemon.request("DELETE", "/lease?key=leader", None, holder)

    assert freed.status == 200
    assert leader.process.wait(20) == 75


def test_the_readmes_program_ends_before_a_lock_that_it_cannot_renew_can_be_anothers(
    lead: Lead, start: Start, own_etcd: Etcd
) -> None:
    daemon = start(own_etcd.url)
    leader = lead(daemon.url)
    assert leader.works()

    daemon.process.send_signal(signal.SIGSTOP)
    status = leader.process.wait(20)
    held = own_etcd.key("leader")
    daemon.process.send_signal(signal.SIGCONT)

    assert status in (75, -signal.SIGALRM)
    assert held


# -- The alerts


def replica(job: str, instance: str, everything: str = "", **changed: str) -> dict[str, str]:
    """What Prometheus sees of a replica in 20 minutes, a sample every 15 s, as promtool writes it.

    It is well, but for the series that are changed; `everything` is what becomes of the others.
    """
    operations = "shared_lock_lease_operations_total"
    usual = {
        "info": ("shared_lock_build_info", {"version": "1.0.0"}, "1x80"),
        "m1": ("shared_lock_etcd_member_up", {"member": "m1"}, "1x80"),
        "m2": ("shared_lock_etcd_member_up", {"member": "m2"}, "1x80"),
        "foreign": ("shared_lock_etcd_foreign_cluster", {}, "0x80"),
        "created": (operations, {"operation": "get", "status": "created"}, "0+7x80"),
        "error": (operations, {"operation": "get", "status": "error"}, "0x80"),
        "prolong": (operations, {"operation": "prolong", "status": "failure"}, "0x80"),
        "release": (operations, {"operation": "release", "status": "failure"}, "0x80"),
    }
    series: dict[str, str] = {}
    for what, (name, more, values) in usual.items():
        labels = {"job": job, "instance": instance, **more}
        shown = ", ".join(f'{label}="{value}"' for label, value in labels.items())
        series[f"{name}{{{shown}}}"] = changed.get(what, everything or values)
    return series


ENDS = {"everything": "0x19 stale", **dict.fromkeys(("info", "m1", "m2"), "1x19 stale")}
BEGINS = {"everything": "_x20 0x60", **dict.fromkeys(("info", "m1", "m2"), "_x20 1x60")}
RESTARTS = {
    "everything": "0x19 stale _x3 0x60",
    "created": "0+7x19 stale _x3 0+7x60",
    **dict.fromkeys(("info", "m1", "m2"), "1x19 stale _x3 1x60"),
}
OUTAGE = {"m1": "1x19 0x12 1x48", "m2": "1x19 0x12 1x48", "error": "0x19 1+1x12 13x48"}
UNAVAILABLE, ERRORS = "SharedLockUnavailable", "SharedLockErrors"


@pytest.mark.parametrize(
    ("one", "other", "raised"),
    [
        pytest.param({}, {}, "", id="all is well"),
        pytest.param({"error": "0x19 1x60"}, {}, "", id="one single 500"),
        pytest.param(ENDS, BEGINS, "", id="a rolling deploy"),
        pytest.param(RESTARTS, RESTARTS, "", id="a restart"),
        pytest.param({"error": "0x19 1+1x60"}, {}, ERRORS, id="errors that go on"),
        pytest.param(OUTAGE, OUTAGE, UNAVAILABLE, id="etcd is down for three minutes"),
        pytest.param(ENDS, ENDS, UNAVAILABLE, id="no replica"),
        pytest.param({"m1": "1x19 0x60"}, {}, "SharedLockEtcdMemberDown", id="a member is down"),
        pytest.param({"foreign": "0x19 1x60"}, {}, "SharedLockForeignCluster", id="two clusters"),
        pytest.param({"prolong": "0x19 1x60"}, {}, "SharedLockLost", id="gone at a keepalive"),
        pytest.param({"release": "0x19 1x60"}, {}, "SharedLockLost", id="gone at a release"),
    ],
)
def test_an_alert_is_raised_for_this_installation_and_for_no_other_that_is_well(
    tmp_path: Path, one: dict[str, str], other: dict[str, str], raised: str
) -> None:
    promtool = shell("promtool")
    (tmp_path / "rules.yaml").write_text(blocks("yaml")[0])
    seen = {
        **replica("ours", "a", **one),
        **replica("ours", "b", **other),
        **replica("another", "c"),
    }
    fired = 'group by (alertname, job) (count_over_time(ALERTS{alertstate="firing"}[20m]))'
    labels = f'{{alertname="{raised}", job="ours"}}'

    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": seen[name]} for name in seen],
                "promql_expr_test": [
                    {
                        "expr": fired,
                        "eval_time": "20m",
                        "exp_samples": [{"labels": labels, "value": 1}] if raised else [],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(json.dumps(test))  # which is YAML, too
    command = [promtool, "test", "rules", str(tmp_path / "test.yaml")]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=60)

    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_alert_rules_ask_for_samples_that_are_there_from_the_start(
    start: Start, etcd: Etcd
) -> None:
    [rules] = blocks("yaml")
    page = metrics(start(etcd.url))

    asked = re.findall(r"(shared_lock_\w+)(?:\{(.*?)\})?", rules, re.DOTALL)
    wanted = [
        (name, label, value)
        for name, labels in asked
        for label, values in re.findall(r'(\w+)=~?"([\w|]+)"', labels) or [("", "")]
        for value in values.split("|")
    ]
    assert len(wanted) >= 8
    for name, label, value in wanted:
        assert any(not label or (label, value) in found for found in page[name]), (name, value)


def test_the_readme_lists_every_variable_with_its_default() -> None:
    table = dict(re.findall(r"^\| (SHARED_LOCK_\w+) \| (.*?) ?\| .+ \|$", README, re.MULTILINE))

    assert table == {
        shared_lock.variable(one.name): one.metadata["default"]
        for one in dataclasses.fields(shared_lock.Config)
    }


def test_the_readme_stays_short() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)

    words = [word for word in prose.split() if re.search(r"\w", word)]  # not the bars of tables
    assert len(words) <= 3000


# == Benchmark: how fast, beside one raw gateway call of the same kind ===========================


class Load(NamedTuple):
    """What wrk sends: `script` is its Lua; `server` stands between it and etcd, if one does."""

    url: str
    script: str
    server: Daemon | None = None


class Measured(NamedTuple):
    """Requests a second, latencies in milliseconds, microseconds of CPU a request, and errors."""

    rate: float
    p50: float
    p99: float
    server_cpu: float
    etcd_cpu: float
    errors: int  # answers other than 2xx, connections that failed


# Each operation, and the raw call of the gateway that it needs at least.
RAW = {"refusal": "range", "acquire": "grant", "keepalive": "keepalive"}
# By connections and operation, and by who answers: "ours", "other", "raw"; one a round.
Results = dict[tuple[int, str], dict[str, list[Measured]]]


def lua(path: str, bodies: list[str], headers: str = "") -> str:
    """A script for wrk that sends these bodies by turns; @ in a body is the request's number."""
    listed = ", ".join(f"'{body}'" for body in bodies)
    return f"""
        local bodies, n = {{{listed}}}, 0
        function request()
            n = n + 1
            local body = bodies[n % #bodies + 1]{":gsub('@', n)" if "@" in listed else ""}
            return wrk.format('POST', '{path}', {{{headers}}}, body)
        end"""


def raw_loads(etcd: Etcd) -> dict[str, Load]:
    key = base64.b64encode(b"/shared-lock/held").decode()
    leases = [etcd.call("/lease/grant", {"TTL": 600})["ID"] for _ in range(300)]
    beats = [f'{{"ID": {lease}}}' for lease in leases]
    return {
        "refusal": Load(etcd.url, lua("/v3/kv/range", [f'{{"key": "{key}"}}'])),
        "acquire": Load(etcd.url, lua("/v3/lease/grant", ['{"TTL": 600}'])),
        "keepalive": Load(etcd.url, lua("/v3/lease/keepalive", beats)),
    }


def server_loads(server: Daemon, name: str) -> dict[str, Load]:
    ttl = "['x-lease-ttl']='600s'"
    new = f'{{"key": "new-{name}-@"}}'
    eventually(lambda: server.acquire("held", "600s").status in (201, 202))
    leases = [server.acquire(f"kept-{name}-{n}", "600s").text for n in range(300)]
    return {
        "refusal": Load(server.url, lua("/lease", ['{"key": "held"}'], ttl), server),
        "acquire": Load(server.url, lua("/lease", [new], ttl), server),
        "keepalive": Load(server.url, lua("/keepalive", leases), server),
    }


def cpu_seconds(process: subprocess.Popen[bytes] | None) -> float:
    """What all threads of a process have used until now."""
    if not process:
        return 0
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+([0-9]+)", status)[0]) / 1024


def run_wrk(load: Load, connections: int, seconds: int) -> str:
    """What wrk prints after it has sent this load."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(load.script)
        script.flush()
        options = f"-t1 -c{connections} -d{seconds}s --timeout 10s --latency -s {script.name}"
        command = ["wrk", *options.split(), load.url]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(load: Load, connections: int, seconds: int, etcd: Etcd) -> Measured:
    processes = (load.server.process if load.server else None), etcd.process
    before = [cpu_seconds(process) for process in processes]
    out = run_wrk(load, connections, seconds)
    used = [cpu_seconds(process) - was for process, was in zip(processes, before, strict=True)]

    [requests] = re.findall(r"([0-9]+) requests in", out)
    [rate] = re.findall(r"Requests/sec:\s+([0-9.]+)", out)
    units = {"us": 0.001, "ms": 1, "s": 1000}
    percentiles = re.findall(r"\b(?:50|99)%\s+([0-9.]+)(us|ms|s)", out)
    p50, p99 = (float(value) * units[unit] for value, unit in percentiles)
    server_cpu, etcd_cpu = (cpu / int(requests) * 1e6 for cpu in used)
    failed = re.findall(r"(?:Non-2xx or 3xx responses:|connect|read|write|timeout) ([0-9]+)", out)
    return Measured(float(rate), p50, p99, server_cpu, etcd_cpu, sum(map(int, failed)))


def one_round(number: int, seconds: int, results: Results) -> dict[str, float]:
    """Drives etcd and each server by turns, on a fresh etcd; the memory that they have then."""
    commands: dict[str, list[str]] = {"ours": []}
    if other := os.environ.get("SHARED_LOCK_BENCHMARK_OTHER"):
        commands["other"] = shlex.split(other)
    servers: dict[str, Daemon] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        etcd = stack.enter_context(Etcd(Path(name)))
        for who, command in commands.items():
            port = str(free_port())  # others may not tell theirs in a log
            servers[who] = Daemon(Path(name), etcd.url, command=command, SERVER_PORT=port)
            stack.callback(servers[who].stop)
        for connections in (150, 1):
            loads = {who: server_loads(one, f"{who}-{connections}") for who, one in servers.items()}
            loads["raw"] = raw_loads(etcd)
            order = list(loads)[:: -1 if number % 2 else 1]
            for operation, who in itertools.product(RAW, order):
                measured = measure(loads[who][operation], connections, seconds, etcd)
                found = results.setdefault((connections, operation), {})
                found.setdefault(who, []).append(measured)
        return {who: resident_mib(server.process.pid) for who, server in servers.items()}


def ratios(these: list[Measured], those: list[Measured]) -> str:
    """Of requests/s, p50 and p99: the medians of the rounds' ratios."""
    rounds = [
        [one / other for one, other in zip(this[:3], that[:3], strict=True)]
        for this, that in zip(these, those, strict=True)
    ]
    rate, p50, p99 = map(statistics.median, zip(*rounds, strict=True))
    return f"{rate:>12.2f}{p50:>9.2f}{p99:>9.2f}"


def table(results: Results) -> Iterator[str]:
    for (connections, operation), found in results.items():
        yield f"\n{operation}, connections: {connections}".ljust(58) + "CPU µs a request"
        yield f"{'':22}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'server':>9}{'etcd':>9}  errors"
        names = {who: f"raw {RAW[operation]}" if who == "raw" else who for who in found}
        for who, name in names.items():
            *medians, _ = map(statistics.median, zip(*found[who], strict=True))
            errors = sum(one.errors for one in found[who])
            rest = "".join(f"{one:>9.2f}" for one in medians[1:])
            yield f"{name:22}{medians[0]:>12,.0f}{rest}{errors:>8}"
        for this, that in itertools.combinations(names, 2):
            pair = f"{names[this]} / {names[that]}"
            yield f"{pair:22}{ratios(found[this], found[that])}"


def benchmark(rounds: int, seconds: int) -> None:
    """How fast the daemon is beside the raw calls of etcd's gateway and beside another server."""
    if not shutil.which("wrk"):
        sys.exit("benchmark: no wrk on PATH: apt-get install wrk")
    results: Results = {}
    memory: dict[str, float] = {}
    for number in range(rounds):
        for who, mib in one_round(number, seconds, results).items():
            memory[who] = max(mib, memory.get(who, 0))
    print("\n".join(table(results)))
    shown = ", ".join(f"{who} {mib:.0f} MiB" for who, mib in memory.items())
    print(f"\nmemory after all loads: {shown}; {rounds} rounds of {seconds} s a load")
    for command in ([PYTHON, "-V"], [etcd_binary(), "--version"]):
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(told.splitlines()[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures the daemon beside the raw calls of etcd's gateway. The command in"
        " SHARED_LOCK_BENCHMARK_OTHER, if there is one, starts another server to compare with,"
        " on the same etcd and with the same variables."
    )
    parser.add_argument("what", choices=["benchmark"])
    parser.add_argument("--rounds", type=int, default=5, help="each on a fresh etcd [5]")
    parser.add_argument("--seconds", type=int, default=4, help="for one load [4]")
    options = parser.parse_args()
    benchmark(options.rounds, options.seconds)


if __name__ == "__main__":
    main()
