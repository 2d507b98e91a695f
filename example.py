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
or bg the runner renews it before the command goes on; if it has ended, the command is killed where it stands.
If the runner itself is killed, a shell that waits for that kills the group. What nobody can promise: that a command
stops in time when SIGSTOP holds its runner, or the whole machine is paused; and what leaves the group is on its own.
Only what the command writes to can be sure, by refusing a fencing token smaller than one it has seen.

With --keep nobody releases the lock; its ttl runs once more from the end of the command. So only one of many machines
runs a job that takes no time, if the ttl is longer than their clocks differ.

The command gets SHARED_LOCK_FENCING_TOKEN (larger for each next holder), SHARED_LOCK_LEASE (its ID), SHARED_LOCK_KEY.
The exit status is its own, or 128 + N where signal N ended it or the wait, and
  2    the command line is wrong
  69   the service cannot be used, and the reason is told; the command was not started
  73   somebody else holds the lock (with -n or --wait; -E chooses another status)
  75   the lock was lost, and the command therefore stopped
  126  the command cannot be started; 127: it is not found
"""

import argparse
import contextlib
import functools
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
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from pathlib import Path

WAIT_SECONDS = 30  # of one request for the lock; well below the 60 s after which many a proxy cuts a silent connection
ANSWER_SECONDS = 10  # a request for the lock may take so much longer: shared-lock's own way to etcd and back
TICK_SECONDS = 0.1  # how late the end of a lease may be noticed when the machine was suspended meanwhile
# All signals but those that nobody can catch, that a fault of our own raises, and that end nothing.
NOT_ENDING = "SIG(KILL|STOP|BUS|FPE|ILL|SEGV|SYS|CHLD|CLD|CONT|TSTP|TTIN|TTOU|URG|WINCH|INFO)"
ENDING = {one for one in signal.valid_signals() if not re.fullmatch(NOT_ENDING, getattr(one, "name", ""))}
# Kills the group whose number it reads, if its standard input ends before the word that all is well.
EXECUTIONER = "exec >/dev/null 2>&1; trap '' HUP INT QUIT TERM; read group && { read well || kill -9 -$group; }"
# Seconds. time.monotonic() stands still while a machine is suspended, and the clock of etcd does not.
now = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
Answer = tuple[int, str, Mapping[str, str]]  # the status, the body, the headers in lower case


def say(text: str) -> None:
    """A line on stderr: at once, whole, and without the lock of sys.stderr that a thread may have when we exit."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:500])
    with contextlib.suppress(OSError):  # nobody reads it any more; the command is to be guarded all the same
        os.write(2, f"example.py: {line}\n".encode(errors="backslashreplace"))


class Lock:
    """A lock that is wanted or held: the requests to the service, and the times that follow from its answers."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises OSError, and ValueError whose text never shows a password."""
        self.url, self.key, self._ttl = options.url, options.key, str(options.ttl).removesuffix(".0") + "s"
        if "@" in self.url:
            raise ValueError("--url: no user and no password belong into it, see --token-file")
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^?#\s]*)?", self.url, re.ASCII):
            raise ValueError(f"--url: not a URL such as http://localhost:8080: {self.url!r}")
        url = urllib.parse.urlsplit(self.url)
        self._path = url.path.rstrip("/")  # leads the paths of all requests, for a proxy in front
        self._connect: Callable[..., HTTPConnection] = functools.partial(HTTPConnection, url.hostname, url.port)
        if url.scheme == "https":
            tls = ssl.create_default_context(cadata=Path(options.ca_file).read_text() if options.ca_file else None)
            tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # of Python 3.13; Go and curl accept what it refuses
            self._connect = functools.partial(HTTPSConnection, url.hostname, url.port, context=tls)
        self._token_file, self._token = Path(options.token_file or os.devnull), ""
        self._token_file.read_bytes()  # to see early that it can be read
        self.id = str(secrets.randbits(63) or 1)  # for all tries: one whose answer was lost is found by the next
        self._told = ""

    def acquire(self, seconds: float) -> bool:
        """Waits so long for the lock; False where somebody else holds it. Exits where the service is of no use."""
        give_up_at, patience, failures = now() + seconds, 0.0, 0
        while True:  # the first try does not wait, so that we can tell early whom we wait for
            sent_at = now()
            status, text, headers = self._ask(patience)
            if status == 201 and self._granted(text, headers, sent_at):
                return True
            held, left = status in (202, 412), give_up_at - now()
            failures = 0 if held else failures + 1
            if status == -1 or (failures > 1 and left < TICK_SECONDS):  # after one it may be ours, its answer lost
                say(f"no lock, giving up: {self.url}: {text}")
                sys.exit(69)  # EX_UNAVAILABLE
            if held:
                self._tell_holder()
            else:
                self._tell(f"no lock yet, trying again: {self.url}: {'it came late' if status == 201 else text}")
            if held and left < TICK_SECONDS:
                return False
            if failures or now() - sent_at < patience - 1:  # a service that is stopping lets nobody wait
                time.sleep(min(2 ** min(failures, 9) / 2, 10, max(left, 1)))
            patience = max(0, min(WAIT_SECONDS, give_up_at - now()))

    def _ask(self, patience: float) -> Answer:
        """One try. The status is -1, too, for an answer that no further try would change."""
        body = json.dumps({"key": self.key, "value": f"{socket.gethostname()} {os.getpid()}"})  # GET tells the value
        asked = {"x-lease-ttl": self._ttl, "x-lease-id": self.id}
        asked |= {"x-lease-wait": f"{patience:.1f}s"} if patience >= TICK_SECONDS else {}
        status, text, headers = self.request("POST", "/lease", body, patience + ANSWER_SECONDS, **asked)
        if status == 409:  # somebody else's
            self.id = str(secrets.randbits(63) or 1)
        strange = (status == 201 and "x-fencing-token" not in headers) or (status == 202 and not text.isdigit())
        if strange or (status < 500 and status not in (0, 201, 202, 408, 409, 412, 429)):
            return -1, f"not a shared-lock, or one that is too old: {text}" if status // 100 == 2 else text, {}
        return status, text, headers

    def _granted(self, text: str, headers: Mapping[str, str], sent_at: float) -> bool:
        """Whether a 201 gives us the lock; one that came late may not, and is asked for again."""
        self.id, self.token = text, headers["x-fencing-token"]
        self.ttl = float(headers["x-lease-ttl"].removesuffix("s"))
        self.timeout = min(self.ttl / 6, 10)  # a try that hangs does not use up the time of the next
        self.grace = min(self.ttl / 4, 10)  # between SIGTERM and SIGKILL
        self.gone = False  # for certain: the service said so
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
        status, text, _ = self.request("POST", "/keepalive", self.id, self.timeout)
        if status == 200:
            self._succeeded(sent_at)
            self._told = ""
        elif status == 204:
            self.gone = True
        else:
            left = max(0, self.term_at - now())
            self._tell(f"keepalive failed, {left:.1f} s left: {self.url}: {text}")

    def release(self) -> None:
        """Frees the lock for the next one; where that fails it ends with its ttl."""
        status, text, _ = self.request("DELETE", "/lease", self.id, self.timeout)
        if status == 204 and not self.gone:
            say("the lock had been lost before it was released")
        elif status not in (200, 204):
            say(f"not released, ends within {self.ttl:g} s: {self.url}: {text}")

    def _tell_holder(self) -> None:
        _, text, _ = self.request("GET", "/lease?key=" + urllib.parse.quote(self.key, "", errors="replace"))
        with contextlib.suppress(ValueError, TypeError, KeyError):  # it is free meanwhile, or cannot be asked for
            holder = json.loads(text)
            self._tell(f"held by {holder['value']!r}, {holder['ttl']} s left", str(holder["fencing_token"]))

    def _tell(self, text: str, about: str = "") -> None:
        """Says it when it changes; that the digits in it do is no change."""
        about = about or re.sub("[0-9.]+", "", text)
        if about != self._told:
            say(text)
        self._told = about

    def _read_token(self) -> str:
        """The first word of the file now, since tokens are renewed; while it has none, the last one serves."""
        with contextlib.suppress(OSError, IndexError):
            self._token = self._token_file.read_bytes().split()[0].decode("latin-1")
        return self._token

    def request(self, method: str, path: str, body: str = "", seconds: float = 3, **headers: str) -> Answer:
        """The status is 0 where no answer came, -1 where none ever will; the body then says why.
        In a thread: neither a slow name server nor an answer that trickles in for ever holds us longer than `seconds`.
        """
        connection = self._connect(timeout=2 * seconds)  # its own: the next may reach a healthier replica
        answers, sockets = list[Answer](), list[socket.socket]()

        def converse() -> Answer:
            token = self._read_token()
            bearer = {"Authorization": f"Bearer {token}"} if token else {}
            try:
                with contextlib.closing(connection):
                    connection.connect()
                    sockets.append(connection.sock)  # an answer without a length takes it out of the connection
                    connection.request(method, self._path + path, body or None, headers | bearer)
                    answer = connection.getresponse()
                    text = answer.read(1 << 16).decode("utf-8", "replace").strip()
            except (OSError, HTTPException, ValueError) as fault:
                cut = isinstance(fault, (ConnectionError, IncompleteRead, ssl.SSLEOFError, ssl.SSLZeroReturnError))
                final = isinstance(fault, (ssl.SSLError, HTTPException, ValueError)) and not cut
                return -1 if final else 0, f"{type(fault).__name__}: {fault}", {}
            if answer.status == 401 and self._read_token() != token:  # it was renewed meanwhile
                return converse()
            if answer.status not in (200, 201, 202):
                text = f"answers {answer.status}: {text}"
            return answer.status, text, {name.lower(): value for name, value in answer.getheaders()}

        thread = threading.Thread(target=lambda: answers.append(converse()), daemon=True)
        thread.start()
        try:
            thread.join(seconds)
            return answers[0] if answers else (0, "no answer in time", {})
        finally:
            with contextlib.suppress(OSError, IndexError):  # the thread ends, and the service sees that nobody waits
                socket.socket.shutdown(sockets[-1], socket.SHUT_RDWR)


class Command:
    """The command, its process group, and the terminal that it shares with us, if there is one."""

    def __init__(self, argv: list[str], lock: Lock) -> None:
        """Starts it, without the two signals ignored that Python ignores. Raises OSError."""
        os.environ.update(SHARED_LOCK_FENCING_TOKEN=lock.token, SHARED_LOCK_LEASE=lock.id, SHARED_LOCK_KEY=lock.key)
        self.status: int | None = None
        self.stopped = self._sent = 0  # the signal that stopped it, and the last that was sent to it
        end, self._executioner = os.pipe()
        with contextlib.suppress(OSError):  # no shell, no executioner
            reads = [(os.POSIX_SPAWN_DUP2, end, 0)]
            os.posix_spawnp("sh", ["sh", "-c", EXECUTIONER], {}, setpgroup=0, file_actions=reads)
        self.pid = os.posix_spawnp(argv[0], argv, os.environ, setpgroup=0, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else it stops us when we write or take the terminal back
        self._terminal = -1
        with contextlib.suppress(OSError):
            os.write(self._executioner, f"{self.pid}\n".encode())
            self._terminal = os.open("/dev/tty", os.O_RDWR)

    def reap(self) -> int | None:
        """The status once it has ended. Waits for orphans, too, which we inherit as PID 1."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED))[0]:
                pid, how = found
                if pid == self.pid:
                    self.stopped = os.WSTOPSIG(how) if os.WIFSTOPPED(how) else 0
                    if os.WIFEXITED(how) or os.WIFSIGNALED(how):
                        self.status = os.WEXITSTATUS(how) if os.WIFEXITED(how) else 128 + os.WTERMSIG(how)
        return self.status

    def send(self, number: int) -> bool:
        """A signal to the whole group: a shell does not hand signals on. Says whether anyone is left in it."""
        self._sent = number or self._sent
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
            return True
        return False

    def stop(self, lock: Lock) -> None:
        """Ends all of the group: SIGTERM, then SIGKILL before the lease can have ended; SIGKILL at once if stopped."""
        kill_at = now() if self.stopped else min(now() + lock.grace, lock.kill_at)
        self.send(signal.SIGTERM)
        while self.send(signal.SIGKILL if now() >= kill_at else 0) or self.reap() is None:
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
        needs = self.stopped in (signal.SIGTTIN, signal.SIGTTOU) and self._sent != signal.SIGTSTP
        if needs and self.lend_terminal(needed=True):
            return not self.send(signal.SIGCONT)
        self._move_terminal(self.pid, os.getpgrp())
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(0, signal.SIGTSTP)  # our whole group, as Ctrl-Z would: a shell waits for all of a pipeline
        time.sleep(TICK_SECONDS)  # the stop comes within it
        signal.signal(signal.SIGTSTP, handler)
        return True


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
            lock.renew_at = now() + min(lock.ttl / 12, 5)  # if it fails: 4 tries before SIGTERM
            # In a thread of its own, so that no frozen service and no slow name server can delay the stop.
            threading.Thread(target=lock.renew, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            command.send(signals.get(timeout=TICK_SECONDS))
    return True


def run(lock: Lock, command_line: list[str], options: argparse.Namespace) -> int:
    """Runs the command under the lock; returns the exit status, or exits with it."""
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    try:
        on_signals(ENDING, lambda number: sys.exit(128 + number))  # nothing to hand it on to, yet
        acquired = lock.acquire(options.wait)
        on_signals({*ENDING, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH}, signals.put)
    except BaseException:  # a lock whose answer was lost would stay for its ttl
        lock.request("DELETE", "/lease", lock.id)
        raise
    if not acquired:
        return int(options.conflict_exit_code)
    signal.signal(signal.SIGCHLD, lambda number, frame: signals.put(0))  # only to look at once
    try:
        command = Command(command_line, lock)
    except OSError as fault:
        say(f"cannot start {command_line[0]}: {fault.strerror}")
        lock.release()
        return 127 if isinstance(fault, FileNotFoundError) else 126
    try:
        kept = guard(command, lock, signals)
    finally:  # whatever happens, nothing of the command outlives the lock
        command.stop(lock)
    (lock.renew if kept and options.keep else lock.release)()
    if not kept:
        say("command stopped: the lock " + ("is lost" if lock.gone else "could not be kept alive in time"))
        return 75  # EX_TEMPFAIL
    return command.status or 0


def on_signals(numbers: Iterable[int], action: Callable[[int], object]) -> None:
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, lambda number, frame: action(number))


def duration(text: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
    if not re.fullmatch(r"(\d+(\.\d+)?(h|ms|m|s))+|\d+(\.\d+)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"not a duration such as 15s or 1m30s: {text!r}")
    return sum(float(count) * units[unit] for count, unit in re.findall("([0-9.]+)([a-z]*)", text))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s [OPTION ...] --key KEY -- COMMAND [ARGUMENT ...]"
    parser.epilog = "".join((__doc__ or "").partition("The command gets")[1:])
    add, url = parser.add_argument, os.environ.get("SHARED_LOCK_URL") or "http://localhost:8080"
    add("--url", default=url, help="of shared-lock; http_proxy is not read [SHARED_LOCK_URL, http://localhost:8080]")
    add("--key", help="what to lock: runners with the same key run one at a time")
    add("--ttl", type=duration, default=15.0, help="how long the lock outlives a runner that crashes [15s]")
    add("--wait", type=duration, default=float("inf"), help="how long to wait for the lock, such as 30s [for ever]")
    add("-n", "--nonblock", dest="wait", action="store_const", const=0.0, help="do not wait for the lock")
    add("-E", "--conflict-exit-code", metavar="N", type=int, default=73, help="instead of 73, see below; 0 to 255")
    add("--keep", action="store_true", help="at the end leave the lock to its ttl instead of releasing it")
    add("--token-file", default=os.environ.get("SHARED_LOCK_TOKEN_FILE"), help="bearer token [SHARED_LOCK_TOKEN_FILE]")
    add("--ca-file", help="certificates to trust instead of the system's")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command_line = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    try:
        if not command_line or not options.key:
            raise ValueError("--key: missing or empty" if command_line else "no command after --")
        if options.ttl <= 0 or not 0 <= options.conflict_exit_code <= 255:
            raise ValueError("--ttl: not more than 0, or -E: not 0 to 255")
        lock = Lock(options)
    except (ValueError, OSError) as fault:
        parser.error(str(fault))
    return run(lock, command_line, options)


if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) < 3:  # one of these was closed: no socket is to take its place
        pass
    try:
        sys.exit(main(sys.argv[1:]))
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT and os.isatty(2):  # Ctrl-C is to end the script or the loop around us, too
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(0, signal.SIGINT)
        raise
