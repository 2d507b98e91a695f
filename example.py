"""Runs a command under a lock of shared-lock, so that of many machines only one runs it at a time.

    python3 example.py --key nightly -- ./job.sh --all              waits for the lock, however long that takes
    python3 example.py --key nightly -n -E 0 --keep -- ./job.sh     in the crontab of each machine: one of them runs it

It takes the lock, starts the command in a process group of its own, renews the lease while the command runs, and
releases the lock when the command and all that it started in its group have ended. Signals that would end the runner
are handed on to the group. Needs a Unix, Python 3.11 or newer, and nothing else; copy it.

All times count from the moment when the last request that succeeded was *sent*: the ttl cannot have begun earlier.

    0             1/3 ttl                           0.65 ttl          0.9 ttl         ttl
    |----------------|----------------------------------|----------------|--------------|
    acquired,        renew, and again                   SIGTERM          SIGKILL        the lease may have ended,
    or renewed       until one try succeeds             to the group     to the group   others may hold the lock

The terminal is lent to the command. Ctrl-Z stops the command, then the runner; the lease runs on and may end. After fg
or bg the runner renews it before the command goes on. If it has ended, the command is killed where it stands.

If the runner itself is killed, a shell that waits for that kills the group. What nobody can promise: that a command
stops in time when SIGSTOP holds its runner, or the whole machine is paused; and what leaves the group is on its own.
Only what the command writes to can be sure, by refusing a fencing token smaller than one it has seen.

With --keep the ttl runs once more from the end of the command, and nobody releases the lock: so only one of many
machines runs a job that takes no time, if the ttl is longer than their clocks differ.

The command gets SHARED_LOCK_FENCING_TOKEN (larger for each next holder), SHARED_LOCK_LEASE (its ID), SHARED_LOCK_KEY.
The exit status is its own, or 128 + N where signal N ended it or the wait, and
  2    the command line is wrong
  69   the service cannot be used, and the reason is told; the command was not started
  73   somebody else holds the lock (with -n or --wait; -E chooses another status)
  75   the lock was lost, and the command therefore stopped
  126  the command cannot be started; 127: it is not found
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import os
import queue
import re
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

WAIT_SECONDS = 30  # of one request for the lock; well below the 60 s after which many a proxy cuts a silent connection
ANSWER_SECONDS = 10  # a request for the lock may take so much longer: shared-lock's own way to etcd and back
TICK_SECONDS = 0.1  # how late the end of a lease may be noticed when the machine was suspended meanwhile
# All signals but those that nobody can catch, that a fault of our own raises, and that end nothing.
NOT_ENDING = "SIG(KILL|STOP|BUS|FPE|ILL|SEGV|SYS|CHLD|CLD|CONT|TSTP|TTIN|TTOU|URG|WINCH|INFO)"
ENDING = {one for one in signal.valid_signals() if not re.fullmatch(NOT_ENDING, getattr(one, "name", ""))}
# What the next try will meet as well: a certificate that is not accepted, no HTTP. Not so a cut connection.
HOPELESS = (ssl.SSLError, http.client.HTTPException, ValueError)
CUT = (http.client.RemoteDisconnected, http.client.IncompleteRead, ssl.SSLEOFError, ssl.SSLZeroReturnError)
# Kills the group whose number it reads, if its standard input ends before the word that all is well.
EXECUTIONER = "exec >/dev/null 2>&1; trap '' HUP INT QUIT TERM; read group && { read well || kill -9 -$group; }"

# Seconds. Neither clock is ever set. time.monotonic() would stand still while a laptop or a virtual machine is
# suspended, and etcd's does not; on Linux CLOCK_BOOTTIME goes on, elsewhere CLOCK_MONOTONIC does.
now = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def say(text: str) -> None:
    """A line on stderr: at once, whole, and without the lock of sys.stderr that a thread may have when we exit."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    with contextlib.suppress(OSError):  # nobody reads it any more; the command is to be guarded all the same
        os.write(2, f"example.py: {line}\n".encode(errors="backslashreplace"))


def give_up(reason: str) -> NoReturn:
    say(reason)
    sys.exit(69)  # EX_UNAVAILABLE of sysexits.h


def run(lock: Lock, command_line: list[str], options: argparse.Namespace) -> int:
    """Runs the command under the lock; returns the exit status, or exits with it. It is -N for signal N."""
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    try:
        on_signals(ENDING, lambda number: sys.exit(-number))  # while it waits there is nothing to hand a signal on to
        if not lock.acquire(options.wait):
            return int(options.conflict_exit_code)
        on_signals({*ENDING, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH}, signals.put)
    except BaseException:
        lock.withdraw()
        raise
    signal.signal(signal.SIGCHLD, lambda number, frame: signals.put(0))  # only to look at once
    try:
        command = Command(command_line, lock)
    except OSError as fault:
        say(f"cannot start {command_line[0]}: {fault.strerror}")
        lock.release()
        return 127 if isinstance(fault, FileNotFoundError) else 126
    kept = False
    try:
        kept = guard(command, lock, signals)
    finally:  # whatever happens, nothing of the command outlives the lock
        command.stop(lock)
        (lock.renew if kept and options.keep else lock.release)()
    if not kept:
        say("command stopped: the lock " + ("is lost" if lock.gone else "could not be kept alive in time"))
    return command.status or 0 if kept else 75  # EX_TEMPFAIL: try again later


def on_signals(numbers: Iterable[int], action: Callable[[int], object]) -> None:
    """Calls action(number) for each of these signals; what nohup made us ignore is left ignored."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: action(number))


def guard(command: Command, lock: Lock, signals: queue.SimpleQueue[int]) -> bool:
    """Renews the lease and hands on signals until the command has ended; False where the lock was lost before."""
    command.lend_terminal()
    while command.reap() is None:
        if suspended := command.suspended():
            lock.renew()  # others may hold the lock by now, unless the answer is 200
        if lock.gone or now() >= lock.term_at:
            return False  # at once and without a word: a stderr that nobody empties would delay the stop
        if suspended:
            command.lend_terminal()
            command.send(signal.SIGCONT)
        if now() >= lock.renew_at:
            lock.renew_at = now() + lock.retry
            # In a thread of its own, so that no frozen service and no slow name server can delay the stop.
            threading.Thread(target=lock.renew, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            command.send(signals.get(timeout=TICK_SECONDS))
    return True


class Command:
    """The command, its process group, and the terminal that it shares with us, if there is one."""

    def __init__(self, command_line: list[str], lock: Lock) -> None:
        """Starts it. Raises OSError."""
        told = {"FENCING_TOKEN": lock.token, "LEASE": lock.id, "KEY": lock.key}
        environment = {**os.environ, **{f"SHARED_LOCK_{name}": value for name, value in told.items()}}
        self.status: int | None = None  # -N where signal N ended it
        self.stopped = 0  # by this signal
        end, self._executioner = os.pipe()
        with contextlib.suppress(OSError):  # no shell, no executioner
            reads = [(os.POSIX_SPAWN_DUP2, end, 0)]
            os.posix_spawnp("sh", ["sh", "-c", EXECUTIONER], os.environ, setpgroup=0, file_actions=reads)
        python_ignores = [signal.SIGPIPE, signal.SIGXFSZ]
        self.pid = os.posix_spawnp(command_line[0], command_line, environment, setpgroup=0, setsigdef=python_ignores)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else it stops us when we write or take the terminal back
        self._terminal = -1
        with contextlib.suppress(OSError):
            os.write(self._executioner, f"{self.pid}\n".encode())
            self._terminal = os.open("/dev/tty", os.O_RDWR)

    def reap(self) -> int | None:
        """The status once it has ended. Waits for orphans, too, which we inherit as PID 1."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED))[0]:
                if found[0] == self.pid:
                    self.stopped = os.WSTOPSIG(found[1]) if os.WIFSTOPPED(found[1]) else 0
                    if os.WIFEXITED(found[1]) or os.WIFSIGNALED(found[1]):
                        self.status = os.waitstatus_to_exitcode(found[1])
        return self.status

    def send(self, number: int) -> bool:
        """A signal to the whole group: a shell does not hand signals on. Says whether anyone is left in it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
            return True
        return False

    def stop(self, lock: Lock) -> None:
        """Ends all of the group: SIGTERM, then SIGKILL before the lease can have ended; SIGKILL at once if stopped."""
        kill_at = now() if self.stopped else min(now() + lock.grace, lock.kill_at)
        self.send(signal.SIGTERM)
        while self.send(signal.SIGKILL if now() >= kill_at else 0):
            self.reap()
            time.sleep(TICK_SECONDS / 10)
        os.write(self._executioner, b"well\n")
        self._move_terminal(self.pid, os.getpgrp())

    def lend_terminal(self, needed: bool = False) -> bool:
        """Says whether it is the command's now. In a pipeline others need it as well, so only if the command does."""
        return (needed or os.isatty(1)) and self._move_terminal(os.getpgrp(), self.pid)

    def _move_terminal(self, giver: int, taker: int) -> bool:
        with contextlib.suppress(OSError):
            if os.tcgetpgrp(self._terminal) == giver:
                os.tcsetpgrp(self._terminal, taker)
            return os.tcgetpgrp(self._terminal) == taker
        return False

    def suspended(self) -> bool:
        """Whether the terminal stopped it, and so us until the shell continued us, or at once where no shell could."""
        if not self.stopped or self._terminal < 0:
            return False
        if self.stopped not in (signal.SIGTTIN, signal.SIGTTOU) or not self.lend_terminal(needed=True):
            self._move_terminal(self.pid, os.getpgrp())
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(0, signal.SIGTSTP)  # our whole group, as Ctrl-Z would: a shell waits for all of a pipeline
            time.sleep(TICK_SECONDS)  # the stop comes within it
            signal.signal(signal.SIGTSTP, handler)
        return True


class Lock:
    """A lock that is wanted or held, and the times that follow from when it was last known to be held."""

    def __init__(self, service: Service, key: str, ttl: float) -> None:
        self.key = key
        self.id = str(secrets.randbits(63) or 1)  # the same with each try: one whose answer was lost is found by a next
        self.gone = False  # for certain: the service said so
        self._service = service
        self._ttl = str(ttl).removesuffix(".0") + "s"
        self._unsure = False  # whether it may be ours without our knowledge
        self._told = ""

    def acquire(self, seconds: float) -> bool:
        """Waits so long for the lock; False where somebody else holds it."""
        give_up_at, patience, failures = now() + seconds, 0.0, 0
        while True:  # the first try does not wait, so that we can tell early whom we wait for
            sent_at = now()
            answer = self._ask(patience)
            if answer.status == 201 and self._granted(answer, sent_at):
                return True
            if held := answer.status in (202, 412):
                self._tell_holder()
            else:
                self._tell(f"no lock yet, trying again: {answer.why}")
            failures = 0 if held else failures + 1
            left = give_up_at - now()
            if left <= 0 and held:
                return False
            if left <= 0 and failures > 1:  # after one it may be ours, and only the answer lost
                give_up(f"no lock, giving up: {answer.why}")
            if failures or now() - sent_at < patience - 1:  # a service that is stopping lets nobody wait
                time.sleep(min(2 ** min(failures, 9) / 2, 10, max(left, 1)))
            patience = max(0, min(WAIT_SECONDS, give_up_at - now()))

    def _ask(self, patience: float) -> Answer:
        """One try. Gives up at an answer that no further try will change."""
        body = json.dumps({"key": self.key, "value": f"{socket.gethostname()} {os.getpid()}"})  # GET tells the value
        headers = {"x-lease-ttl": self._ttl, "x-lease-id": self.id}
        if patience >= TICK_SECONDS:
            headers["x-lease-wait"] = f"{patience:.1f}s"
        self._unsure = True
        answer = self._service.request("POST", "/lease", body, patience + ANSWER_SECONDS, headers)
        self._unsure = answer.status in (0, 201, 408) or answer.status >= 500
        if answer.status == 409:  # somebody else's
            self.id = str(secrets.randbits(63) or 1)
        elif not self._unsure and answer.status not in (202, 412, 429):
            give_up(answer.why)
        return answer

    def _granted(self, answer: Answer, sent_at: float) -> bool:
        """Whether a 201 gives us the lock; one that came late may not, and is asked for again."""
        try:
            self.id, self.token = str(int(answer.text)), str(int(answer.headers["x-fencing-token"]))
            self.ttl = float(answer.headers["x-lease-ttl"].removesuffix("s"))
        except (KeyError, ValueError):
            give_up(f"not shared-lock, or the Go service before it: {answer.why}")
        self.retry = min(self.ttl / 12, 5)  # after a keepalive that failed: 4 tries before SIGTERM
        self.timeout = min(self.ttl / 6, 10)  # a try that hangs does not use up the time of the next
        self.grace = min(self.ttl / 4, 10)  # between SIGTERM and SIGKILL
        self.gone = False
        self._succeeded(sent_at)
        if now() >= self.renew_at:  # it was waited for, and only a keepalive tells from when on its ttl runs
            self.renew()
        return not self.gone and now() < self.renew_at

    def _succeeded(self, sent_at: float) -> None:
        """The ttl began when this request was sent, or later. Of two that overlap either may be the last: both hold."""
        self.renew_at = sent_at + self.ttl / 3  # leaves time for several tries, and is still only 3 requests per ttl
        self.kill_at = sent_at + self.ttl * 0.9  # the rest is for a late scheduler, and clocks that do not tick alike
        self.term_at = self.kill_at - self.grace

    def renew(self) -> None:
        """One try to start the ttl again. A failure is only told: the next try may succeed."""
        sent_at = now()
        answer = self._service.request("POST", "/keepalive", self.id, self.timeout)
        if answer.status == 200:
            self._succeeded(sent_at)
            self._told = ""
        elif answer.status == 204:
            self.gone = True
        else:
            self._tell(f"keepalive failed, {max(0, self.term_at - now()):.1f} s left: {answer.why}")

    def release(self) -> None:
        """Frees the lock for the next one; where that fails it ends with its ttl."""
        answer = self._service.request("DELETE", "/lease", self.id, self.timeout)
        if answer.status == 204 and not self.gone:
            say("the lock had been lost before it was released")
        elif answer.status not in (200, 204):
            say(f"not released, ends within {self.ttl:g} s: {answer.why}")

    def withdraw(self) -> None:
        """Frees the lock where it may be ours without our knowledge. If that fails, too, it ends with its ttl."""
        if self._unsure:
            self._service.request("DELETE", "/lease", self.id)

    def _tell_holder(self) -> None:
        answer = self._service.request("GET", "/lease?key=" + urllib.parse.quote(self.key, "", errors="replace"))
        with contextlib.suppress(ValueError, TypeError, KeyError):  # it is free meanwhile, or cannot be asked for
            holder = json.loads(answer.text)
            self._tell(f"held by {holder['value']!r}, {holder['ttl']} s left", str(holder["fencing_token"]))

    def _tell(self, text: str, about: str = "") -> None:
        """Says it when it changes; that the digits in it do is no change."""
        about = about or re.sub("[0-9.]+", "", text)
        if about != self._told:
            say(text)
        self._told = about


class Answer(NamedTuple):
    """`status` is 0 where none came, and -1 where none will, whatever is tried; `why` says it all in one line."""

    status: int
    text: str
    headers: Mapping[str, str]
    why: str


class Service:
    """shared-lock at a URL, whose path leads those of all requests; http_proxy and the like are not read.

    Each request has a connection of its own: the next one may reach a healthier replica.
    """

    def __init__(self, url: str, token_file: str | None, ca_file: str | None) -> None:
        """Raises ValueError, whose text never shows a password, and OSError."""
        if "@" in url:
            raise ValueError("--url: no user and no password belong into it, see --token-file")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch("[!->A-~]+", url):
            raise ValueError(f"--url: not a URL such as http://localhost:8080: {url!r}")
        self._url, self._root = url, parts.path.rstrip("/")
        connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            tls = ssl.create_default_context(cadata=Path(ca_file).read_text() if ca_file else None)
            tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # of Python 3.13; Go and curl accept what it refuses
            connect = functools.partial(http.client.HTTPSConnection, context=tls)
        self._connect = functools.partial(connect, parts.hostname, parts.port)
        self._token_file, self._token = token_file, ""
        if token_file and not self._fresh_token():
            raise ValueError(f"--token-file: no token in {token_file}")

    def _fresh_token(self) -> str:
        """The file is read again each time, since tokens are renewed; while it has none, the last one serves."""
        with contextlib.suppress(OSError, IndexError):
            self._token = Path(self._token_file or os.devnull).read_bytes().split()[0].decode("latin-1")
        return self._token

    def request(
        self, method: str, path: str, body: str = "", seconds: float = 3, headers: Mapping[str, str] = {}
    ) -> Answer:
        """One request, and its answer in any case, no later than so many seconds later."""
        end, token = now() + seconds, self._fresh_token()
        answer = self._try(method, path, body, seconds, headers)
        if answer.status == 401 and self._fresh_token() != token:  # it was renewed meanwhile
            answer = self._try(method, path, body, end - now(), headers)
        return answer

    def _try(self, method: str, path: str, body: str, seconds: float, headers: Mapping[str, str]) -> Answer:
        """In a thread of its own: neither a slow name server nor an answer that trickles in for ever can hold us."""
        connection = self._connect(timeout=max(seconds, TICK_SECONDS))
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        bearer = {"Authorization": f"Bearer {self._token}"} if self._token else {}

        def converse() -> None:
            try:
                with contextlib.closing(connection):
                    connection.request(method, self._root + path, body or None, {**headers, **bearer})
                    answer = connection.getresponse()
                    text = answer.read(1 << 16).decode("utf-8", "replace").strip()
                why = f"{self._url} answers {answer.status}: {text.partition(chr(10))[0][:200]}"
                named = {name.lower(): value for name, value in answer.getheaders()}
                answers.put(Answer(answer.status, text, named, why))
            except (OSError, http.client.HTTPException, ValueError) as fault:
                status = -1 if isinstance(fault, HOPELESS) and not isinstance(fault, CUT) else 0
                answers.put(Answer(status, "", {}, f"{self._url}: {fault or type(fault).__name__}"))

        threading.Thread(target=converse, daemon=True).start()
        try:
            return answers.get(timeout=max(seconds, TICK_SECONDS))
        except queue.Empty:
            return Answer(0, "", {}, f"{self._url}: no answer in time")
        finally:
            with contextlib.suppress(OSError, TypeError):  # the thread ends, and the service sees that nobody waits
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


def duration(text: str) -> float:
    """Seconds of "15s", "1m30s", "1500ms" or "15"."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
    if not re.fullmatch(r"(\d+(\.\d+)?(h|ms|m|s))+|\d+(\.\d+)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"not a duration such as 15s or 1m30s: {text!r}")
    return sum(float(count) * units[unit] for count, unit in re.findall("([0-9.]+)([a-z]*)", text))


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status, -N for signal N."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s [OPTION ...] --key KEY -- COMMAND [ARGUMENT ...]"
    parser.epilog = "".join((__doc__ or "").partition("The command gets")[1:])
    add, environ = parser.add_argument, os.environ.get
    url, token_file = environ("SHARED_LOCK_URL") or "http://localhost:8080", environ("SHARED_LOCK_TOKEN_FILE") or None
    add("--url", default=url, help="of shared-lock [SHARED_LOCK_URL, else http://localhost:8080]")
    add("--key", help="what to lock: runners with the same key run one at a time")
    add("--ttl", type=duration, default=15.0, help="how long the lock outlives a runner that crashes [15s]")
    add("-n", "--nonblock", dest="wait", action="store_const", const=0.0, help="do not wait for the lock")
    add("--wait", type=duration, default=float("inf"), help="how long to wait for the lock, such as 30s [for ever]")
    add("-E", "--conflict-exit-code", metavar="N", type=int, default=73, help="instead of 73, see below; 0 to 255")
    add("--keep", action="store_true", help="at the end leave the lock to its ttl instead of releasing it")
    add("--token-file", default=token_file, help="whose first word is a bearer token [SHARED_LOCK_TOKEN_FILE]")
    add("--ca-file", help="certificates to trust instead of the system's")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command_line = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    try:
        if not command_line or not options.key:
            raise ValueError("--key: missing or empty" if command_line else "no command after --")
        if options.ttl <= 0 or not 0 <= options.conflict_exit_code <= 255:
            raise ValueError("--ttl: not more than 0, or -E: not 0 to 255")
        service = Service(options.url, options.token_file, options.ca_file)
    except (ValueError, OSError) as fault:
        parser.error(str(fault))
    return run(Lock(service, options.key, options.ttl), command_line, options)


if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) < 3:  # one of these was closed: no socket is to take its place
        pass
    try:
        status = main(sys.argv[1:])
    except SystemExit as fault:
        status = int(fault.code or 0)
    if status == -signal.SIGINT and os.isatty(2):  # so that Ctrl-C ends the script or the loop around us, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(0, signal.SIGINT)
    sys.exit(status if status >= 0 else 128 - status)
