"""Runs a command under a lock of shared-lock, so that of many machines only one runs it at a time.

    python3 example.py --key nightly -- ./job.sh --all
        waits for the lock, however long that takes
    python3 example.py --key nightly -n -E 0 --keep --ttl 10m -- ./job.sh
        in the crontab of each machine: one of them runs it, the others end well without a word

It takes the lock, starts the command in a process group of its own, renews the lease while the
command runs, and releases the lock when the command and all that it started in its group have
ended. Signals that would end the runner are handed on to the group. Needs a Unix, Python 3.11 or
newer, and nothing else; copy it.

The command may take longer than the ttl, since its lease is renewed. The ttl says how long the lock
outlives a runner that crashes, and with --keep, how long it outlives the command: nobody releases
it then, and the ttl runs once more from the command's end. So a job that takes no time runs on one
machine only, if the ttl is longer than the clocks of the machines differ. Let it be shorter than
the time until the next run, too, which finds the lock held otherwise.

All times count from the moment when the last request that succeeded was *sent*: the ttl cannot have
begun earlier.

    0             1/3 ttl                0.65 ttl          0.9 ttl         ttl
    |----------------|----------------------|-----------------|-------------|
    acquired,        renew, and again       SIGTERM           SIGKILL       the lease may have
    or renewed       until one try          to the group      to the group  ended, others may
                     succeeds                                               hold the lock

A name may have several addresses. The one that answered last is asked first, and alone while it
answers; where it is silent, the others are asked as well, each within the time there is.

The terminal is lent to the command. Ctrl-Z stops the command, then the runner; the lease runs on
and may end. After fg or bg the runner renews it before the command goes on; if it has ended, the
command is killed where it stands. If the runner itself is killed, a shell that waits for that kills
the group. What nobody can promise: that a command stops in time when SIGSTOP holds its runner, or
the whole machine is paused; and what leaves the group is on its own. Only what the command writes
to can be sure, by refusing a fencing token smaller than one it has seen.

The command gets SHARED_LOCK_FENCING_TOKEN (larger for each next holder), SHARED_LOCK_LEASE (its
ID), SHARED_LOCK_KEY. The exit status is its own, or 128 + N where signal N ended it or the wait,
and
  2    the command line is wrong, or Python is older than 3.11
  69   the service cannot be used, and the reason is told; the command was not started
  73   somebody else holds the lock (with -n or --wait), who is told; -E chooses another status,
       and with -E 0, where this is no failure, nothing is told
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
from http.client import HTTPConnection, HTTPException, IncompleteRead
from pathlib import Path
from typing import Any, NamedTuple

if sys.hexversion < 0x030B0000:  # older ones can read this file to its end, but not run it
    python = sys.version.split()[0]
    sys.stderr.write(f"example.py: needs Python 3.11 or newer, and this is {python}\n")
    sys.exit(2)

# Of one request for the lock; well below the 60 s after which many a proxy cuts a silent one.
WAIT_SECONDS = 30
# How much longer a request for the lock may take: shared-lock's own way to etcd and back.
ANSWER_SECONDS = 10
# How late the end of a lease may be noticed when the machine was suspended meanwhile.
TICK_SECONDS = 0.1
# All signals but those that nobody can catch, that a fault of our own raises, and that end nothing.
NOT_ENDING = "SIG(KILL|STOP|BUS|FPE|ILL|SEGV|SYS|CHLD|CLD|CONT|TSTP|TTIN|TTOU|URG|WINCH|INFO)"
ENDING = {n for n in signal.valid_signals() if not re.fullmatch(NOT_ENDING, getattr(n, "name", ""))}
# Kills the group whose number it reads, if its input ends before the word that all is well.
EXECUTIONER = (
    "exec >/dev/null 2>&1; trap '' HUP INT QUIT TERM;"
    " read group && { read well || kill -9 -$group; }"
)
# Faults on the way that a later try may not meet. All others of STRANGE it would meet again.
CUT = (ConnectionError, IncompleteRead, ssl.SSLEOFError, ssl.SSLZeroReturnError)
STRANGE = (ssl.SSLError, HTTPException, ValueError)
# Seconds. time.monotonic() stands still while a machine is suspended; the clock of etcd does not.
now = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

Address = tuple[socket.AddressFamily, Any]  # what socket.socket and its connect() take
Signals = queue.SimpleQueue[int]  # to be handed on to the command; 0 is only to look at once


def say(text: str) -> None:
    """A line on stderr: at once, whole, and without sys.stderr's lock, which a thread may hold."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:500])
    with contextlib.suppress(OSError):  # nobody reads it any more; the command is guarded anyway
        os.write(2, f"example.py: {line}\n".encode(errors="backslashreplace"))


class News:
    """Says what is new: a line is not said again while only the digits in it change."""

    def __init__(self) -> None:
        self._told = ""

    def tell(self, text: str, about: str = "") -> None:
        """`about` takes the place of the text where another part of it makes the news."""
        about = about or re.sub("[0-9.]+", "", text)
        if about != self._told:
            say(text)
        self._told = about


class Failure(Exception):
    """The service did not do what it was asked for; the text says where and why."""


class Unavailable(Failure):
    """A later try may go better. What was asked for may have been done, and its answer lost."""


class Refused(Failure):
    """No later try would go better."""


class Answer(NamedTuple):
    """What the service says."""

    status: int
    text: str
    headers: Mapping[str, str]  # names in lower case
    alone: bool  # no other address was asked, which may have done it before


class Service:
    """Where shared-lock is, what lets us in, and which of its addresses answers."""

    def __init__(self, url: str, token_file: str | None = None, ca_file: str | None = None) -> None:
        """Raises OSError, and ValueError whose text never shows a password."""
        if "@" in url:
            raise ValueError("--url: no user and no password belong into it, see --token-file")
        host = r"([\w.-]+|\[[\da-fA-F:.]+\])"
        if not re.fullmatch(rf"https?://{host}(:\d{{1,5}})?(/[^?#\s]*)?", url, re.ASCII):
            raise ValueError(f"--url: not a URL such as http://localhost:8080: {url!r}")
        parts = urllib.parse.urlsplit(url)
        self.url = url
        self.host = str(parts.hostname)
        self.host_header = parts.netloc
        self.path = parts.path.rstrip("/")  # leads those of all requests, for a proxy in front
        self._port = parts.port or parts.scheme
        self.tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            trusted = Path(ca_file).read_text() if ca_file else None
            self.tls = ssl.create_default_context(cadata=trusted)
            # Of Python 3.13; Go and curl accept what it refuses.
            self.tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
        self._token = ""
        self._token_file = Path(token_file or os.devnull)
        self._token_file.read_bytes()  # to see early that it can be read
        self._addresses: list[Address] = []
        self._ranks: dict[Address, float] = {}  # less than 0: it answered; more: it failed

    def token(self) -> str:
        """The first word of the file now, since tokens are renewed; the last one if it has none."""
        with contextlib.suppress(OSError, IndexError):
            self._token = self._token_file.read_bytes().split()[0].decode("latin-1")
        return self._token

    def addresses(self) -> list[Address]:
        """The one that answered last leads, those that failed come last. Raises OSError.

        While one answers, no name server is asked: it may be down, too.
        """
        if min(self._ranks.values(), default=0) >= 0:
            found = socket.getaddrinfo(self.host, self._port, type=socket.SOCK_STREAM)
            self._addresses = [(info[0], info[4]) for info in found]
        return sorted(self._addresses, key=lambda address: self._ranks.get(address, 0))

    def _judge(self, asked: Iterable[Address], good: Address | None) -> None:
        """Remembers who answered well, and who was asked and did not."""
        for address in asked:
            self._ranks[address] = now()
        if good:
            self._ranks[good] = -now()

    def request(
        self,
        what: str,
        body: str,
        expected: Iterable[int],
        *,
        seconds: float = 3,
        patience: float = 0,
        **headers: str,
    ) -> Answer:
        """One of the answers that are expected. Raises Failure.

        It may take so many seconds, and those of `patience` more, for which the service waits.
        """
        request = Request(self, what, body, headers)
        good = None
        try:
            answer, address = request.answer(seconds, patience)
            if answer.status in expected:
                good = address
                return answer
        finally:
            self._judge(request.asked, good)
        text = f"{self.url}: answers {answer.status}: {answer.text}"
        if answer.status >= 500 or answer.status in (408, 429):
            raise Unavailable(text)
        raise Refused(text)


class Request:
    """One request, which each address of the service gets in its turn until one of them answers.

    An address that is silent is not given up, since it may only be slow: the next one is asked as
    well, and the first answer counts. All that we ask for may be asked twice. It is done in
    threads, so that neither a slow name server nor an answer that trickles in for ever holds us
    longer than the time there is.
    """

    def __init__(self, service: Service, what: str, body: str, headers: Mapping[str, str]) -> None:
        self._service = service
        self._method, _, self._path = what.partition(" ")
        self._body = body or None
        self._headers = headers
        self._over = threading.Event()  # somebody answered, all have failed, or the time is up
        self.asked: list[Address] = []
        self._sockets: list[socket.socket] = []
        self._answers: list[tuple[Answer, Address]] = []
        self._failures: list[Failure] = []

    def answer(self, seconds: float, patience: float) -> tuple[Answer, Address]:
        """The first answer, whatever it says, and whose it is. Raises Failure."""
        in_turn = functools.partial(self._ask_all, now() + seconds, patience)
        threading.Thread(target=in_turn, daemon=True).start()
        try:
            in_time = self._over.wait(seconds + patience)
        finally:
            self._cut()
        if self._answers:
            return self._answers[0]
        refusals = [failure for failure in self._failures if isinstance(failure, Refused)]
        if not in_time and not refusals:
            raise Unavailable(f"{self._service.url}: no answer in time")
        raise (refusals or self._failures)[-1]

    def _cut(self) -> None:
        """Ends what is left of it: the threads end, and the service sees that nobody waits."""
        self._over.set()
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TCP, which no TLS delays

    def _ask_all(self, ends_at: float, patience: float) -> None:
        threads = []
        try:
            addresses = self._service.addresses()
            share = (ends_at - now()) / len(addresses)
            for address in addresses:
                if self._over.is_set():
                    return
                self.asked.append(address)
                threads.append(threading.Thread(target=self._ask, args=[address], daemon=True))
                threads[-1].start()
                threads[-1].join(patience + share)
        except (OSError, ValueError) as fault:
            self._fail(fault)
        for thread in threads:
            thread.join()
        self._over.set()

    def _ask(self, address: Address) -> None:
        token = self._service.token()
        try:
            answer = self._exchange(address, token)
            newer = self._service.token()
            if answer.status == 401 and newer != token:  # it was renewed meanwhile
                answer = self._exchange(address, newer)
        except (OSError, HTTPException, ValueError) as fault:
            self._fail(fault)
        else:
            if not self._over.is_set():  # else what we cut may look like an answer without a length
                self._answers.append((answer, address))
            self._over.set()

    def _exchange(self, address: Address, token: str) -> Answer:
        """On a connection of its own: the next may reach a healthier replica."""
        family, place = address
        sock = socket.socket(family, socket.SOCK_STREAM)
        if self._service.tls:
            sock = self._service.tls.wrap_socket(sock, server_hostname=self._service.host)
        with sock:
            self._sockets.append(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(place)
            if self._over.is_set():  # which came before there was anything to cut
                raise ConnectionAbortedError
            connection = HTTPConnection(self._service.host)
            connection.sock = sock
            headers = {"Host": self._service.host_header, **self._headers}
            if token:
                headers["Authorization"] = f"Bearer {token}"
            path = self._service.path + self._path
            connection.request(self._method, path, self._body, headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace").strip()
        told = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, text, told, alone=len(self.asked) == 1)

    def _fail(self, fault: Exception) -> None:
        if self._over.is_set():  # our own end of it, maybe
            return
        text = f"{self._service.url}: {type(fault).__name__}: {fault}"
        final = isinstance(fault, STRANGE) and not isinstance(fault, CUT)
        self._failures.append(Refused(text) if final else Unavailable(text))


class Lease:
    """A lock that is held, and the times that follow from when it was last renewed."""

    def __init__(
        self, service: Service, number: str, token: str, ttl: float, sent_at: float
    ) -> None:
        self.id = number
        self.token = token  # the fencing token
        self.ttl = ttl  # seconds, as granted
        self.grace = min(ttl / 4, 10)  # between SIGTERM and SIGKILL
        self.gone = False  # for certain: the service said so
        self._timeout = min(ttl / 6, 10)  # a try that hangs does not use up the time of the next
        self._service = service
        self._news = News()
        self._runs_from(sent_at)

    def _runs_from(self, sent_at: float) -> None:
        """The ttl began when this request was sent, or later. Of two that overlap, both hold."""
        self._sent_at = sent_at
        self.renew_at = sent_at + self.ttl / 3  # leaves time for several tries

    @property
    def kill_at(self) -> float:
        """The rest of the ttl is for a late scheduler, and clocks that do not tick alike."""
        return self._sent_at + self.ttl * 0.9

    @property
    def term_at(self) -> float:
        """When to begin to stop the command, if no try has succeeded until then."""
        return self.kill_at - self.grace

    def renew(self) -> None:
        """One try to start the ttl again. A failure is only told: the next try may succeed."""
        sent_at = now()
        try:
            answer = self._request("POST /keepalive")
        except Failure as failure:
            left = max(0, self.term_at - now())
            self._news.tell(f"keepalive failed, {left:.1f} s left: {failure}")
            return
        if answer.status == 204:
            self.gone = True
            return
        self._runs_from(sent_at)
        self._news = News()

    def keep(self) -> None:
        """Leaves the lock to its ttl, which begins now."""
        self.renew()
        if self.gone:
            say("the lock had been lost before the command ended")

    def release(self) -> None:
        """Frees the lock for the next one; where that fails it ends with its ttl."""
        try:
            answer = self._request("DELETE /lease")
        except Failure as failure:
            say(f"not released, ends within {self.ttl:g} s: {failure}")
            return
        if answer.status == 204 and answer.alone and not self.gone:
            say("the lock had been lost before it was released")

    def _request(self, what: str) -> Answer:
        return self._service.request(what, self.id, (200, 204), seconds=self._timeout)


class Lock:
    """A lock that is wanted."""

    def __init__(self, service: Service, key: str, ttl: float, tell_holder: bool = True) -> None:
        self._service = service
        self._key = key
        self._tells_holder = tell_holder
        who = f"{socket.gethostname()} {os.getpid()}"  # which GET /lease tells
        self._body = json.dumps({"key": key, "value": who})
        self._ttl = str(ttl).removesuffix(".0") + "s"
        self._id = lease_id()
        self._news = News()

    def acquire(self, seconds: float) -> Lease | None:
        """Waits so long for the lock; None where somebody else holds it. Raises Failure."""
        give_up_at = now() + seconds
        patience = 0.0  # the first try does not wait, so that we can tell early whom we wait for
        failures = 0
        while True:
            asked_at = now()
            try:
                lease = self._ask(patience)
            except Unavailable as failure:
                failures += 1
                if failures > 1 and give_up_at - now() < TICK_SECONDS:
                    raise  # not after one, since the lock may be ours, and only the answer lost
                if seconds:  # else there is one more try, at once, and its end is told
                    self._news.tell(f"no lock yet, trying again: {failure}")
            else:
                failures = 0
                if lease:
                    return lease
                self._tell_holder()
                if give_up_at - now() < TICK_SECONDS:
                    return None
            left = give_up_at - now()
            if failures or now() - asked_at < patience - 1:  # who is stopping lets nobody wait
                time.sleep(min(2 ** min(failures, 9) / 2, 10, max(left, 1)))
            patience = 0 if failures else min(WAIT_SECONDS, max(0, give_up_at - now()))

    def _ask(self, patience: float) -> Lease | None:
        """One try; None where somebody else holds the lock. Raises Failure."""
        sent_at = now()
        headers = {"x-lease-ttl": self._ttl, "x-lease-id": self._id}
        if patience >= TICK_SECONDS:
            headers["x-lease-wait"] = f"{patience:.1f}s"
        answer = self._service.request(
            "POST /lease",
            self._body,
            (201, 202, 409),
            seconds=ANSWER_SECONDS,
            patience=patience,
            **headers,
        )
        if answer.status == 409:
            self._id = lease_id()
            raise Unavailable(f"{self._service.url}: the lease ID was somebody else's")
        if answer.status == 202 and answer.text.isdigit():
            return None
        return self._granted(answer, sent_at)

    def _granted(self, answer: Answer, sent_at: float) -> Lease:
        """Raises Failure, also where a 201 came so late that it may be worth nothing by now."""
        url = self._service.url
        token = answer.headers.get("x-fencing-token", "")
        ttl = re.fullmatch(r"(\d+)s", answer.headers.get("x-lease-ttl", ""))
        if answer.status != 201 or answer.text != self._id or not token or not ttl:
            raise Refused(f"{url}: not a shared-lock, or one that is too old: {answer.text}")
        lease = Lease(self._service, self._id, token, float(ttl[1]), sent_at)
        if now() >= lease.renew_at:  # we waited, and only a keepalive tells from when its ttl runs
            lease.renew()
        if lease.gone or now() >= lease.renew_at:
            raise Unavailable(f"{url}: the lock came too late")
        return lease

    def withdraw(self) -> None:
        """Releases what a request whose answer is not known may have taken."""
        with contextlib.suppress(Failure):
            self._service.request("DELETE /lease", self._id, (200, 204))

    def _tell_holder(self) -> None:
        if not self._tells_holder:
            return
        question = "GET /lease?key=" + urllib.parse.quote(self._key, "")
        # It may be free meanwhile, or cannot be asked for.
        with contextlib.suppress(Failure, ValueError, TypeError, KeyError):
            holder = json.loads(self._service.request(question, "", (200,)).text)
            by = f" by {holder['value']!r}" if holder["value"] else ""
            text = f"held{by}, {holder['ttl']} s left"
            self._news.tell(text, about=str(holder["fencing_token"]))


def lease_id() -> str:
    """The same for all tries, so that one whose answer was lost is found by the next.

    Below 2^53, since the command may read it in JavaScript or with jq.
    """
    return str(secrets.randbelow(2**53 - 1) + 1)


class Command:
    """The command, its process group, and the terminal that it shares with us, if there is one."""

    def __init__(self, argv: list[str], told: Mapping[str, str]) -> None:
        """Starts it, and tells it this in its environment. Raises OSError."""
        self.status: int | None = None
        self.stopped = 0  # the signal that stopped it
        self._sent = 0  # the last signal that was sent to it
        end, self._executioner = os.pipe()
        with contextlib.suppress(OSError):  # no shell, no executioner
            reads = [(os.POSIX_SPAWN_DUP2, end, 0)]
            shell = ["sh", "-c", EXECUTIONER]
            os.posix_spawnp("sh", shell, {}, setpgroup=0, file_actions=reads)
        env = {**os.environ, **told}
        ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python
        self.pid = os.posix_spawnp(argv[0], argv, env, setpgroup=0, setsigdef=ignored)
        # Else it stops us when we write or take the terminal back.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        self._terminal = -1
        with contextlib.suppress(OSError):
            os.write(self._executioner, f"{self.pid}\n".encode())
            self._terminal = os.open("/dev/tty", os.O_RDWR)

    def reap(self) -> int | None:
        """The status once it has ended. Waits for orphans, too, which we inherit as PID 1."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, how = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
                if not pid:
                    break
                if pid == self.pid:
                    self._learn(how)
        return self.status

    def _learn(self, how: int) -> None:
        self.stopped = os.WSTOPSIG(how) if os.WIFSTOPPED(how) else 0
        if os.WIFEXITED(how):
            self.status = os.WEXITSTATUS(how)
        elif os.WIFSIGNALED(how):
            self.status = 128 + os.WTERMSIG(how)

    def send(self, number: int) -> bool:
        """A signal to the whole group: a shell hands none on. Says whether anyone is left in it."""
        self._sent = number or self._sent
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
            return True
        return False

    def stop(self, lease: Lease) -> None:
        """Ends all of the group: SIGTERM, then SIGKILL before the lease can have ended."""
        kill_at = min(now() + lease.grace, lease.kill_at)
        if self.stopped:  # it would not hear SIGTERM
            kill_at = now()
        self.send(signal.SIGTERM)
        while self.send(signal.SIGKILL if now() >= kill_at else 0) or self.reap() is None:
            self.reap()
            time.sleep(TICK_SECONDS / 10)
        os.write(self._executioner, b"well\n")
        self._move_terminal(self.pid, os.getpgrp())

    def lend_terminal(self, needed: bool = False) -> bool:
        """Says whether it is the command's now.

        In a pipeline others need it as well, so it is only lent there if the command needs it.
        """
        return (needed or os.isatty(1)) and self._move_terminal(os.getpgrp(), self.pid)

    def _move_terminal(self, giver: int, taker: int) -> bool:
        with contextlib.suppress(OSError):
            if os.tcgetpgrp(self._terminal) == giver:
                os.tcsetpgrp(self._terminal, taker)
            return os.tcgetpgrp(self._terminal) == taker
        return False

    def suspended(self) -> bool:
        """Whether the terminal stopped it, and so us, until the shell continued us.

        That is at once where no shell could.
        """
        if not self.stopped or self._terminal < 0:
            return False
        needs = self.stopped in (signal.SIGTTIN, signal.SIGTTOU) and self._sent != signal.SIGTSTP
        if needs and self.lend_terminal(needed=True):
            self.send(signal.SIGCONT)
            return False
        self._move_terminal(self.pid, os.getpgrp())
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(
            0, signal.SIGTSTP
        )  # our whole group, as Ctrl-Z: a shell waits for all of a pipeline
        time.sleep(TICK_SECONDS)  # the stop comes within it
        signal.signal(signal.SIGTSTP, handler)
        return True


def guard(command: Command, lease: Lease, signals: Signals) -> bool:
    """Renews the lease and hands on signals until the command has ended.

    False where the lock was lost before.
    """
    command.lend_terminal()
    while command.reap() is None:
        suspended = command.suspended()
        if suspended:
            lease.renew()  # others may hold the lock by now, unless the answer is 200
        if lease.gone or now() >= lease.term_at:
            return False  # at once, without a word: a stderr that nobody empties delays no stop
        if suspended:
            command.lend_terminal()
            command.send(signal.SIGCONT)
        if now() >= lease.renew_at:
            lease.renew_at = now() + min(lease.ttl / 12, 5)  # if it fails: 4 tries before SIGTERM
            # In a thread, so that no frozen service and no slow name server can delay the stop.
            threading.Thread(target=lease.renew, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            command.send(signals.get(timeout=TICK_SECONDS))
    return True


def acquire(lock: Lock, seconds: float, signals: Signals) -> Lease | None:
    """The lock, None where somebody else holds it. From now on signals are handed on."""
    try:
        on_signals(ENDING, lambda number: sys.exit(128 + number))  # nothing to hand it on to, yet
        lease = lock.acquire(seconds)
        on_signals({*ENDING, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH}, signals.put)
        signal.signal(signal.SIGCHLD, lambda number, frame: signals.put(0))
    except BaseException as end:
        if isinstance(end, Failure):
            say(f"no lock, giving up: {end}")
        lock.withdraw()  # one whose answer was lost would stay for its ttl
        raise
    return lease


def run(
    lease: Lease, command_line: list[str], told: dict[str, str], keep: bool, signals: Signals
) -> int:
    """Runs the command under the lock; returns the exit status."""
    try:
        command = Command(command_line, told)
    except OSError as fault:
        say(f"cannot start {command_line[0]}: {fault.strerror}")
        lease.release()
        return 127 if isinstance(fault, FileNotFoundError) else 126
    try:
        kept = guard(command, lease, signals)
    finally:  # whatever happens, nothing of the command outlives the lock
        command.stop(lease)
    if kept and keep:
        lease.keep()
    else:
        lease.release()
    if kept:
        return command.status or 0
    how = "is lost" if lease.gone else "could not be kept alive in time"
    say(f"command stopped: the lock {how}")
    return 75  # EX_TEMPFAIL


def on_signals(numbers: Iterable[int], action: Callable[[int], object]) -> None:
    """Calls the action with the number of each signal that is not ignored, as SIGHUP by nohup."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: action(number))


def duration(text: str) -> float:
    """Seconds, of what shared-lock takes as a duration."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
    if not re.fullmatch(r"(\d+(\.\d+)?(h|ms|m|s))+|\d+(\.\d+)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"not a duration such as 15s or 1m30s: {text!r}")
    parts = re.findall("([0-9.]+)([a-z]*)", text)
    return sum(float(count) * units[unit] for count, unit in parts)


def utf8(text: str) -> str:
    """An argument by its bytes: every locale reads them in its own way, and a key is to be one."""
    given = os.fsencode(text)
    try:
        return given.decode()
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"not UTF-8: {given!r}") from None


def options_parser() -> argparse.ArgumentParser:
    """The options; the command and what they say of its end is in the opening text."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="%(prog)s [OPTION ...] --key KEY -- COMMAND [ARGUMENT ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="".join((__doc__ or "").partition("The command gets")[1:]),
    )
    url = os.environ.get("SHARED_LOCK_URL") or "http://localhost:8080"
    url_help = "of shared-lock; http_proxy is not read [SHARED_LOCK_URL, http://localhost:8080]"
    token_file = os.environ.get("SHARED_LOCK_TOKEN_FILE")
    ttl_help = "how long the lock outlives a runner that crashes, or with --keep its command [15s]"
    wait_help = "how long to wait for the lock, such as 30s [for ever]"
    exit_help = "instead of 73, see below; 0 to 255"
    keep_help = (
        "leave the lock to its ttl, which begins once more at the end of the command, however long"
        " that took; so let --ttl be longer than the clocks of the machines differ, and shorter"
        " than the time until the next run, such as 10m"
    )
    add = parser.add_argument
    add("--url", default=url, help=url_help)
    add("--key", type=utf8, help="what to lock: runners with the same key run one at a time")
    add("--ttl", type=duration, default=15.0, help=ttl_help)
    add("--wait", type=duration, default=float("inf"), help=wait_help)
    add("-n", "--nonblock", dest="wait", action="store_const", const=0.0, help="do not wait")
    add("-E", "--conflict-exit-code", metavar="N", type=int, default=73, help=exit_help)
    add("--keep", action="store_true", help=keep_help)
    add("--token-file", default=token_file, help="bearer token [SHARED_LOCK_TOKEN_FILE]")
    add("--ca-file", help="certificates to trust instead of the system's")
    return parser


def main(arguments: list[str]) -> int:
    """Runs what the command line asks for; returns the exit status, or exits with it."""
    parser = options_parser()
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    command_line = arguments[split + 1 :]
    try:
        if not command_line or not options.key:
            raise ValueError("--key: missing or empty" if command_line else "no command after --")
        if options.ttl <= 0 or not 0 <= options.conflict_exit_code <= 255:
            raise ValueError("--ttl: not more than 0, or -E: not 0 to 255")
        service = Service(options.url, options.token_file, options.ca_file)
    except (ValueError, OSError) as fault:
        parser.error(str(fault))
    lock = Lock(service, options.key, options.ttl, tell_holder=options.conflict_exit_code != 0)
    signals = Signals()
    try:
        lease = acquire(lock, options.wait, signals)
    except Failure:
        return 69  # EX_UNAVAILABLE
    if lease is None:
        return int(options.conflict_exit_code)
    told = {
        "SHARED_LOCK_FENCING_TOKEN": lease.token,
        "SHARED_LOCK_LEASE": lease.id,
        "SHARED_LOCK_KEY": os.fsdecode(options.key.encode()),
    }
    return run(lease, command_line, told, options.keep, signals)


if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) < 3:  # one was closed: no socket is to take its place
        pass
    try:
        sys.exit(main(sys.argv[1:]))
    except SystemExit as end:
        # Ctrl-C is to end the script or the loop around us, too.
        if end.code == 128 + signal.SIGINT and os.isatty(2):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(0, signal.SIGINT)
        raise
