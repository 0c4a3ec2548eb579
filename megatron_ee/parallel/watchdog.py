"""Failure detection: if one rank dies, hangs or raises, all ranks end, and one error line names that rank.

Every rank has a thread with a connection to a monitor on rank 0. Both ends send a heartbeat about every second. The
kernel closes the connections of a process that dies, so a death is noticed at once. A frozen process or a lost machine
stops sending heartbeats. The monitor prints the error line and notifies all ranks. If rank 0 is lost, the last rank
prints it. These threads end the processes, because a main thread may be in a collective that never returns.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

from megatron_ee.errors import UserError

STORE_KEY = "megatron_ee/watchdog"
BEAT_SECONDS = 1.0
BLAME_SECONDS = 15.0
"""Seconds that a rank with a failed collective waits for a report of another lost rank, before it reports itself."""
SILENCE_SECONDS = 60.0
"""Default ``timeout_seconds`` of ``watch_ranks``, for commands without this setting."""
GRACE_SECONDS = 10.0
"""Seconds that a rank may take to end after the run has failed."""


@contextlib.contextmanager
def watch_ranks(
    rank: int,
    world_size: int,
    timeout_seconds: float,
    where: Callable[[], str],
    on_failure: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Watch all ranks while the context is open. Used once per process group; does nothing for a single rank.

    If a rank is lost, or leaves the context by an exception, all others end with status 1. After a ``common`` error
    each rank ends by itself. A rank that leaves the context normally has finished. Rank 0 then waits for the others,
    because they could not distinguish its end from a failure.

    Args:
        rank: of the default process group, which must exist.
        world_size: of the default process group.
        timeout_seconds: seconds without a heartbeat after which a rank counts as lost. A death is noticed at once.
        where: returns this rank's position, such as ``stage 1, step 17``. Called about every second, from another
            thread.
        on_failure: called with the printed line, on the rank that prints it, before that rank ends.

    Raises:
        UserError: rank 0 cannot be reached.
    """
    if world_size == 1:
        yield
        return
    watch = _Watch(rank, world_size, timeout_seconds, where, on_failure)
    monitor = _Monitor(watch) if rank == 0 else None
    member = _Member(watch)
    last = monitor or member
    try:
        yield
    except BaseException as error:
        if _is_communication_error(error):
            # Most likely another rank failed. If the monitor reports this, the process ends during the join.
            last.join(min(BLAME_SECONDS, timeout_seconds))
        _end_within_grace()
        watch.raising = True
        if isinstance(error, UserError) and error.common:
            member.leave("done")  # all ranks raise this error, and one of them prints it
        else:
            said = isinstance(error, (UserError, KeyboardInterrupt)) and str(error)
            member.leave("raised", said or repr(error))
        last.join(GRACE_SECONDS / 2)
        raise
    member.leave("done")
    last.join(None if monitor else GRACE_SECONDS)


@dataclass
class _Watch:
    """State shared by the threads of one rank. ``raising``: the main thread is about to end the process."""

    rank: int
    world_size: int
    timeout: float
    where: Callable[[], str]
    on_failure: Callable[[str], None]
    raising: bool = False

    @property
    def interval(self) -> float:
        return min(BEAT_SECONDS, self.timeout / 4)

    def lost(self, rank: int, where: str, silent: bool) -> str:
        what = f"has not responded for {self.timeout:g} s" if silent else "is gone: it was killed or crashed"
        return f"rank {rank} ({where}) {what}; ending the run"

    def report(self, line: str) -> None:
        # Written directly, not through sys.stderr, whose locks the main thread may hold for ever.
        os.write(2, f"{chr(10) * os.isatty(2)}error: {line}\n".encode())
        self.on_failure(line)


class _Lines:
    """Line protocol over a socket: each message has a kind and a text. ``rank`` is the sender, once known."""

    def __init__(self, endpoint: socket.socket, timeout: float) -> None:
        endpoint.settimeout(timeout)
        endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.rest = endpoint, b""
        self.rank: int | None = None

    def send(self, kind: str, text: str = "") -> None:
        """Send a message. Errors are ignored, because a lost peer is detected by its missing heartbeats."""
        with contextlib.suppress(OSError):
            self.socket.send(" ".join([kind, *text.split()])[:2000].encode() + b"\n")

    def receive(self) -> list[tuple[str, str]] | None:
        """Receive messages within the timeout, as (kind, text); None if the peer is gone or sends no lines."""
        try:
            data = self.socket.recv(65536)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        parts = [line.decode(errors="replace").partition(" ") for line in lines]
        return [(kind, text) for kind, _, text in parts] if data and len(self.rest) < 65536 else None


class _Member(threading.Thread):
    """The thread on every rank (rank 0 too) that reports to the monitor and ends the process on its command."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.watch, self.leaving = watch, False
        port, token = _store().get(STORE_KEY).decode().split()
        host = os.environ["MASTER_ADDR"]
        try:
            self.lines = _Lines(socket.create_connection((host, int(port)), timeout=watch.timeout), watch.interval)
        except OSError as error:
            raise UserError(
                f"rank {watch.rank} cannot reach rank 0 at {host}, port {port} ({error}); the machines of a run must "
                "reach each other on any port"
            ) from error
        self.lines.send("hello", f"{token} {watch.rank}")
        self.start()

    def leave(self, kind: str, text: str = "") -> None:
        """Report how this rank leaves; called by the main thread. The thread ends when the monitor has confirmed."""
        self.leaving = True
        self.lines.send("at", self.watch.where())
        self.lines.send(kind, text)

    def run(self) -> None:
        """Send heartbeats until the run fails or this rank has left."""
        silence, monitor_at = 0.0, "starting"
        while True:
            messages = self.lines.receive()
            if messages is None:
                return self._end(self.watch.lost(0, monitor_at, silent=False))
            for kind, text in messages:
                if kind == "failed":
                    return self._end(None)
                monitor_at = text
            # Counted instead of timed: while this process is stopped (SIGSTOP), the peer must not count as silent.
            silence = 0.0 if messages else silence + self.watch.interval
            if silence > self.watch.timeout:
                return self._end(self.watch.lost(0, monitor_at, silent=True))
            self.lines.send("at", self.watch.where())

    def _end(self, line: str | None) -> None:
        """End this process, unless it is already ending. Prints ``line`` if the monitor cannot."""
        if self.leaving or self.watch.rank == 0:  # the monitor ends rank 0
            return
        _end_within_grace()
        if line and self.watch.rank == self.watch.world_size - 1:
            self.watch.report(line)
        os._exit(1)


@dataclass
class _Peer:
    """The monitor's record of a rank; ``silence`` in seconds."""

    lines: _Lines | None = None
    where: str = "not started"
    silence: float = 0.0
    done: bool = False


class _Monitor(threading.Thread):
    """The thread on rank 0 that finds the rank that failed first, reports it, and notifies all ranks."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__(name="watchdog monitor", daemon=True)
        self.watch, self.failure = watch, ""
        self.peers = [_Peer() for _ in range(watch.world_size)]
        self.token = secrets.token_hex(16)  # rejects other programs that find the port
        family = socket.getaddrinfo(os.environ["MASTER_ADDR"], None)[0][0]
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        self.listener = socket.create_server(("", 0), family=family, backlog=watch.world_size, dualstack_ipv6=dual)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        _store().set(STORE_KEY, f"{self.listener.getsockname()[1]} {self.token}")
        self.start()

    def run(self) -> None:
        """Watch until all ranks are done or one has failed."""
        due = time.monotonic()
        while not self.failure and not all(peer.done for peer in self.peers):
            for key, _ in self.selector.select(max(0.0, due - time.monotonic())):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            if (
                time.monotonic() >= due
            ):  # after reading, so that messages that arrived while this process was stopped count
                self._beat()
                due = time.monotonic() + self.watch.interval
        if self.failure:
            self._announce()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            lines = _Lines(self.listener.accept()[0], timeout=0)
            self.selector.register(lines.socket, selectors.EVENT_READ, lines)

    def _receive(self, lines: _Lines) -> None:
        messages = lines.receive()
        for kind, text in messages or []:
            if lines.rank is not None:
                self._take(self.peers[lines.rank], lines.rank, kind, text)
            elif (kind, text.partition(" ")[0]) == ("hello", self.token):
                lines.rank = int(text.partition(" ")[2])
                self.peers[lines.rank].lines = lines
            else:
                messages = None
                break
        if messages is None:
            self.selector.unregister(lines.socket)
            lines.socket.close()
            if lines.rank is not None and not self.peers[lines.rank].done:
                self._fail(self.watch.lost(lines.rank, self.peers[lines.rank].where, silent=False))

    def _take(self, peer: _Peer, rank: int, kind: str, text: str) -> None:
        peer.silence = 0.0
        if kind == "at":
            peer.where = text
        elif kind == "raised":
            self._fail(f"rank {rank} ({peer.where}): {text}")
        elif kind == "done" and peer.lines:
            peer.done = True
            peer.lines.socket.shutdown(socket.SHUT_WR)  # the confirmation that the leaving rank waits for

    def _beat(self) -> None:
        here = self.watch.where()
        for rank, peer in enumerate(self.peers):
            if peer.done:
                continue
            if peer.lines:
                peer.lines.send("at", here)
            peer.silence += self.watch.interval
            if peer.silence > self.watch.timeout:
                self._fail(self.watch.lost(rank, peer.where, silent=True))

    def _fail(self, line: str) -> None:
        self.failure = self.failure or line  # later failures follow from the first

    def _announce(self) -> None:
        """Notify all ranks, then end this process, unless its main thread is about to end it."""
        _end_within_grace()
        for peer in self.peers:
            if peer.lines:
                peer.lines.send("failed")
        self.watch.report(self.failure)
        if not self.watch.raising:
            time.sleep(
                self.watch.interval
            )  # ending this process resets the connections, and drops messages that have not arrived
            os._exit(1)


def _store() -> dist.Store:
    """The default process group's store, through which rank 0 gives its address."""
    world = dist.group.WORLD
    assert world is not None
    return world.get_group_store()


def _end_within_grace() -> None:
    timer = threading.Timer(GRACE_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()


def _is_communication_error(error: BaseException | None) -> bool:
    """Whether ``error`` is a failed collective, whose cause is usually another rank."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
