"""Runs a command under a lock of shared-lock, so that of many machines only one runs it at a time.

    python example.py --url http://localhost:8080 --key nightly --ttl 15s -- ./job.sh --all
    python example.py                                      demonstrates itself: three runners and one lock

It waits for the lock, starts the command in a process group of its own, renews the lease while the command runs, and
releases the lock when the command and all that it started in its group have ended. SIGTERM, SIGINT and SIGHUP are
handed on to the group. Needs a Unix, Python 3.11 or newer, and nothing else; copy it.

All times count from the moment when the last request that succeeded was *sent*: the ttl cannot have begun earlier.

    0             1/3 ttl                           0.65 ttl          0.9 ttl         ttl
    |----------------|----------------------------------|----------------|--------------|
    acquired,        renew, and again                   SIGTERM          SIGKILL        the lease may have ended,
    or renewed       until one try succeeds             to the group     to the group   others may hold the lock

What nobody can promise: that a command stops in time when its whole machine is paused. Only what the command writes to
can be sure, by refusing a fencing token smaller than one it has seen; the command's is in SHARED_LOCK_FENCING_TOKEN.

Exit status: the command's own, or 128 + N where signal N ended it; 127 or 126 where it could not be started, as from
a shell; 75 where the lock was lost and the command therefore stopped; 2 where the call was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import NamedTuple

WAIT_SECONDS = 30  # of one request for the lock; well below the 60 s after which many a proxy cuts a silent connection
WAIT_SLACK_SECONDS = 15  # a request for the lock may take so much longer: shared-lock's own way to etcd and back
PAUSE_SECONDS = 1.0  # between requests for the lock where the service is away, or does not wait
TICK_SECONDS = 0.1  # how late the end of a lease may be noticed when the machine was suspended meanwhile

RENEW_AT = 1 / 3  # of the ttl: leaves time for several tries, and is still only 3 requests per ttl
RETRY_AFTER = 1 / 12  # of the ttl, and at most 5 s: 4 tries before SIGTERM
TIMEOUT = 1 / 6  # of the ttl, and at most 10 s: a try that hangs does not use up the time of the next
KILL_AT = 0.9  # of the ttl: the rest is for a scheduler that is late, and for two clocks that do not tick alike
GRACE = 1 / 4  # of the ttl, and at most 10 s: between SIGTERM and SIGKILL

LOST = 75  # EX_TEMPFAIL of sysexits.h: try again later
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Neither clock is ever set. time.monotonic() would stand still while a laptop or a virtual machine is suspended, and
# etcd's does not; on Linux CLOCK_BOOTTIME goes on, elsewhere CLOCK_MONOTONIC does.
CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Seconds, on the clock that all times here are of."""
    return time.clock_gettime(CLOCK)


def say(text: str) -> None:
    """A line on stderr: at once, whole, and without the lock of sys.stderr that a thread may have when we exit."""
    with contextlib.suppress(OSError):  # nobody reads it any more; the command is to be guarded all the same
        os.write(2, f"example.py: {text}\n".encode(errors="backslashreplace"))


def run(service: Service, key: str, ttl: str, command: list[str]) -> int:
    """Acquires the lock, runs the command under it, releases it; returns the exit status. Raises Refused."""
    on_signals(lambda number: sys.exit(128 + number))  # while it waits there is nothing to hand a signal on to
    lease = acquire(service, key, ttl)
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    on_signals(signals.put)
    signal.signal(signal.SIGCHLD, lambda number, frame: signals.put(number))
    signal.signal(signal.SIGTSTP, lambda number, frame: None)  # Ctrl-Z would pause the keepalives, not the command
    environment = {**os.environ, "SHARED_LOCK_FENCING_TOKEN": lease.token}
    try:
        process = subprocess.Popen(command, env=environment, process_group=0)
    except OSError as fault:
        say(f"cannot start {command[0]}: {fault.strerror}")
        lease.release()
        return 127 if isinstance(fault, FileNotFoundError) else 126
    try:
        kept = guard(process, lease, signals)
    finally:  # whatever happens, nothing of the command outlives the lock
        stop(process, lease)
        lease.release()
    if not kept:
        say("command stopped: the lock " + ("is lost" if lease.gone else "could not be kept alive in time"))
        return LOST
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def on_signals(action: Callable[[int], object]) -> None:
    """Calls action(number) for each signal that is to be handed on; what nohup made us ignore is left ignored."""
    for number in HANDED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: action(number))


def acquire(service: Service, key: str, ttl: str) -> Lease:
    """Waits for the lock, however long that takes. Raises Refused.

    The service answers as soon as the lock is free, and takes it back if we have gone meanwhile. Only where a signal
    ends us while the answer is on its way is the lock left to its ttl.
    """
    body = json.dumps({"key": key, "value": f"{socket.gethostname()} {os.getpid()}"})  # GET /lease tells the value
    headers = {"x-lease-ttl": ttl, "x-lease-wait": f"{WAIT_SECONDS}s"}
    while True:
        sent = now()
        answer = service.request("POST", "/lease", body, WAIT_SECONDS + WAIT_SLACK_SECONDS, **headers)
        if answer.status == 201 and "x-fencing-token" not in answer.headers:
            raise Refused(f"{service.url} grants without x-fencing-token: not shared-lock, or the Go service before it")
        if answer.status == 201:
            lease = Lease(service, answer, sent)
            if now() >= lease.renew_at:  # it was waited for, and only a keepalive tells from when on its ttl runs
                lease.renew()
            if now() < lease.renew_at:
                return lease
            lease.release()
        elif 300 <= answer.status < 500 and answer.status not in (408, 429):  # those two ask to try again
            raise Refused(f"{service.url} answers {answer.status}: {answer.text}")
        elif answer.status != 202:
            say(f"no lock yet, trying again: {answer.text}")
        if now() - sent < WAIT_SECONDS:  # it failed, or the service is stopping and lets nobody wait
            time.sleep(PAUSE_SECONDS)


def guard(process: subprocess.Popen[bytes], lease: Lease, signals: queue.SimpleQueue[int]) -> bool:
    """Renews the lease and hands on signals until the command has ended; False where the lock was lost before."""
    while process.poll() is None:
        if lease.gone or now() >= lease.term_at:
            return False  # at once and without a word: a stderr that nobody empties would delay the stop
        if now() >= lease.renew_at:
            lease.renew_at = now() + lease.retry
            # In a thread of its own, so that no frozen service and no slow name server can delay the stop.
            threading.Thread(target=lease.renew, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            number = signals.get(timeout=TICK_SECONDS)
            if number != signal.SIGCHLD:  # which is only there to look at once
                send(process, number)
    return True


def stop(process: subprocess.Popen[bytes], lease: Lease) -> None:
    """Ends what is left of the command's group: SIGTERM, then SIGKILL before the lease can have ended."""
    kill_at = min(now() + lease.grace, lease.kill_at)
    send(process, signal.SIGTERM)
    while alive(process) and (left := kill_at - now()) > 0:
        time.sleep(min(left, TICK_SECONDS))
    send(process, signal.SIGKILL)
    process.wait()


def send(process: subprocess.Popen[bytes], number: int) -> None:
    """A signal to the whole group: a shell does not hand signals on to what it runs."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(process.pid, number)


def alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anyone is left in the group. The command itself may have ended before what it started."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class Lease:
    """A lock that is held, and the times that follow from when it was last known to be."""

    def __init__(self, service: Service, answer: Answer, sent_at: float) -> None:
        """`answer` is the 201; the ttl in it is the one that was granted, which may differ from what was asked for."""
        self.service = service
        self.id = answer.text
        self.token = answer.headers["x-fencing-token"]
        self.ttl = float(answer.headers["x-lease-ttl"].removesuffix("s"))
        self.retry = min(self.ttl * RETRY_AFTER, 5)
        self.timeout = min(self.ttl * TIMEOUT, 10)
        self.grace = min(self.ttl * GRACE, 10)
        self.gone = False  # for certain: the service said so
        self.succeeded(sent_at)

    def succeeded(self, sent_at: float) -> None:
        """The ttl began when this request was sent, or later. Of two that overlap either may be the last: both hold."""
        self.renew_at = sent_at + self.ttl * RENEW_AT
        self.kill_at = sent_at + self.ttl * KILL_AT
        self.term_at = self.kill_at - self.grace

    def renew(self) -> None:
        """One try to start the ttl again. A failure is only told: the next try may succeed."""
        sent_at = now()
        answer = self.service.request("POST", "/keepalive", self.id, self.timeout)
        if answer.status == 200:
            self.succeeded(sent_at)
        elif answer.status == 204:
            self.gone = True
        else:
            say(f"keepalive failed, {self.term_at - now():.1f} s left: {answer.text}")

    def release(self) -> None:
        """Frees the lock for the next one; where that fails it ends with its ttl."""
        answer = self.service.request("DELETE", "/lease", self.id, self.timeout)
        if answer.status == 204 and not self.gone:
            say("the lock had been lost before it was released")
        elif answer.status not in (200, 204):
            say(f"not released, ends within {self.ttl:g} s: {answer.text}")


class Refused(Exception):
    """The service understood the request and will never grant it."""


class Answer(NamedTuple):
    """`status` is 0 where there was no answer, and `text` then says why."""

    status: int
    text: str
    headers: Mapping[str, str]


class Service:
    """shared-lock at a URL. Each request has a connection of its own: the next one may reach a healthier replica."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not a URL such as http://localhost:8080")
        self.url = url
        self._tls = parts.scheme == "https"
        self._address = (parts.hostname, parts.port)
        self._root = parts.path.rstrip("/")

    def request(self, method: str, path: str, body: str, timeout: float, **headers: str) -> Answer:
        """One request, and its answer in any case. `timeout`, in seconds, is for each wait on the network."""
        connect = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        try:
            with contextlib.closing(connect(*self._address, timeout=timeout)) as connection:
                connection.request(method, self._root + path, body, headers)
                answer = connection.getresponse()
                text = answer.read(1 << 16).decode("utf-8", "replace").strip()
        except (OSError, http.client.HTTPException) as fault:
            return Answer(0, f"{self.url}: {fault or type(fault).__name__}", {})
        return Answer(answer.status, text, {name.lower(): value for name, value in answer.getheaders()})


def demonstrate(service: Service, key: str, ttl: str) -> int:
    """Three of these runners at once, of which one at a time holds the lock; each next fencing token is larger."""
    job = 'echo "$0 holds the lock, fencing token $SHARED_LOCK_FENCING_TOKEN"; sleep 1; echo "$0 has done its job"'
    runner = [sys.executable, __file__, "--url", service.url, "--key", key, "--ttl", ttl, "--", "sh", "-c", job]
    runners = [subprocess.Popen([*runner, f"runner {name}"]) for name in ("A", "B", "C")]

    def hand_on(number: int) -> None:
        for one in runners:
            one.send_signal(number)

    on_signals(hand_on)
    return max(one.wait() for one in runners)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status, which is the command's own where one was run to its end."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--url URL] --key KEY [--ttl TTL] -- COMMAND [ARGUMENT ...]",
        description="Runs a command under a lock of shared-lock, one at a time. Without a command: a demonstration.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", default="http://localhost:8080", help="where shared-lock listens [%(default)s]")
    parser.add_argument("--key", help="what to lock: runners with the same key run one at a time")
    parser.add_argument("--ttl", default="15s", help="how long the lock outlives a runner that crashes [%(default)s]")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if arguments[split:] == ["--"]:
        parser.error("no command after --")
    if command and not options.key:
        parser.error("--key: missing or empty")
    if not re.fullmatch("[0-9.]+([a-z]+[0-9.]+)*[a-z]*", options.ttl):  # the service knows best, and judges the rest
        parser.error(f"--ttl: not a duration such as 15s or 1m30s: {options.ttl!r}")
    try:
        service = Service(options.url)
    except ValueError as fault:
        parser.error(f"--url: {fault}: {options.url!r}")
    try:
        if command:
            return run(service, options.key, options.ttl, command)
        return demonstrate(service, options.key or f"demonstration-{secrets.token_hex(4)}", options.ttl)
    except Refused as fault:
        parser.error(str(fault))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
