"""The nodes of one run: they meet before they train, start torchrun, and notice within seconds when one of them ends.

Node 0 listens, and each other node keeps a connection to it. Every message is a line of JSON:

    node 1 -> node 0    {"run": "1764/train/2/0", "node": 1, "host": "b"}
    node 0 -> node 1    {"run": "1764/train/2/0"}                             at once
    node 0 -> node 1    {"port": 40123, "hosts": ["a", "b"], "file": "..."}   when all nodes have come
    either             {"node": 1, "ended": "" or the reason}                 at its end

A node that ends without the last message was lost. Ranks cannot tell: NCCL waits for a lost rank until --rank-timeout, and
only a node's own words give the cause. Messages hold no code and no secret.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.errors import NodesError
from training.launch.exits import INTERRUPTED
from training.launch.local import TRAINER, free_port, run_command
from training.launch.supervisor import status_of
from training.options.command_line import option_words
from training.storage.record import read_run_record

# Node 0 takes the first one that is free. Two runs on one machine find each other's, and tell by the run's name.
PORTS = range(29600, 29616)
MEET_SECONDS = 900.0  # a cluster may have to start machines first
# The ranks of the other nodes get this time to end by themselves and to say why.
GRACE_SECONDS = 20.0
_WORDS_SECONDS = 5.0  # after a failed training, until another node's words are no longer awaited
_ANSWER_SECONDS = 5.0
# A node speaks as soon as it is connected. A program that probes ports says nothing, and must not keep the nodes waiting.
_HELLO_SECONDS = 1.0
# A machine that vanishes closes no connection. These make it an error after 10 + 3 x 5 seconds (tcp(7)).
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class _Line:
    """A connection to another node that carries a JSON object a line."""

    def __init__(self, connection: socket.socket):
        self.socket, self.buffer = connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Sends a message; a broken connection is noticed by `receive`."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(_ANSWER_SECONDS)
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """The next message; None if the connection ended or is not one of ours. Raises TimeoutError after `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        try:
            while b"\n" not in self.buffer:
                self.socket.settimeout(None if end is None else max(0.001, end - time.monotonic()))
                block = self.socket.recv(4096)
                if not block or len(self.buffer) > 2**16:
                    return None
                self.buffer += block
            line, _, self.buffer = self.buffer.partition(b"\n")
            message = json.loads(line)
        except TimeoutError:
            raise
        except (OSError, ValueError, RecursionError):  # RecursionError: JSON of many brackets
            return None
        return message if isinstance(message, dict) else None

    def is_closed(self) -> bool:
        """Whether the other side has closed the connection. It has sent nothing that was not received."""
        try:
            self.socket.settimeout(0)
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


@dataclass
class Nodes:
    """This node and the others, from `meet`.

    Attributes:
        index: of this node; rank 0 is on node 0.
        main_address: host name or address of node 0.
        port: of node 0, on which torchrun meets.
        problem: what happened to another node; "" while all is well.
    """

    index: int
    main_address: str
    hosts: list[str]
    port: int
    problem: str = ""
    _lines: dict[int, _Line] = field(default_factory=dict)
    _file: Path | None = None  # that shows whether the folder is shared
    _trouble: threading.Event = field(default_factory=threading.Event)

    def command(self, options: Mapping[str, Any], ranks: int) -> list[str]:
        """The torchrun command of this node for these options (names of TrainingOptions), with `ranks` on each node."""
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(len(self.hosts)), "--nproc-per-node", str(ranks)),
            *("--node-rank", str(self.index)),
            *("--master-addr", self.main_address, "--master-port", str(self.port)),
            *("-m", TRAINER, *option_words(options)),
        ]

    def train(self, command: Sequence[str], output: Path, cpu_ranks: int, typed: str) -> None:
        """Runs the command of this node and shows its output. It is killed if another node ends and it does not.

        Args:
            output: the run's folder, which all nodes share.
            cpu_ranks: ranks that share this machine's cores; 0 on GPUs.
            typed: the command that a person typed, as in `run_command`.

        Raises NodesError if another node was lost or has failed, else TrainingFailedError.
        """
        ending = run_command(command, cpu_ranks, typed, self._watched)
        status = (read_run_record(output) or {}).get("status")
        # The ranks of the other nodes leave before rank 0 has checked and copied the model.
        if not ending.code and (self.index > 0 or status == "finished"):
            return
        if status == "stopped":
            ending = replace(ending, code=INTERRUPTED)  # torchrun has a code of its own
        failure = ending.failure(typed)
        if ending.interrupted:
            raise failure
        self._say(str(failure).splitlines()[0])
        if self._trouble.wait(_WORDS_SECONDS):
            raise NodesError(f"{self.problem}\nOn this node:\n{failure}")
        raise failure

    @contextlib.contextmanager
    def _watched(self, launcher: int) -> Iterator[None]:
        """Kills the launcher and all of its processes if another node has ended and they have not."""
        done = threading.Event()

        def look() -> None:
            self._trouble.wait()
            if not done.wait(GRACE_SECONDS):
                print(
                    f"{self.problem}\nThe ranks of this node are killed, because they still wait", flush=True
                )
                for process in [launcher, *descendants(launcher)]:
                    with contextlib.suppress(OSError):
                        os.kill(process, signal.SIGKILL)

        threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _listen(self, number: int, line: _Line) -> None:
        """In a thread: waits for the end of another node."""
        message = line.receive(None)
        name = f"Node {number} of {len(self.hosts)} ({self.hosts[number]})"
        if message is None:
            problem = (
                f"{name} was lost: its process was killed, or its machine or the network to it has failed"
            )
        elif not message.get("ended"):
            return
        elif message.get("node") == number:
            problem = f"{name} reports: {message['ended']}"
        else:
            problem = str(message["ended"])  # of a third node, from node 0
        if not self._trouble.is_set():
            self.problem = problem
            self._trouble.set()
            if self.index == 0:
                self._say(problem, of=number)

    def _say(self, reason: str, of: int | None = None) -> None:
        """Tells the other nodes why this node ends ("" if all is well), or on node 0 that the node `of` has ended."""
        for number, line in list(self._lines.items()):
            if number != of:
                line.send(node=self.index if of is None else of, ended=reason)

    def _start(self) -> None:
        for number, line in self._lines.items():
            threading.Thread(target=self._listen, args=(number, line), daemon=True).start()


@contextlib.contextmanager
def meet(
    index: int,
    count: int,
    main_address: str,
    run: str,
    folder: Path,
    seconds: float = MEET_SECONDS,
    ports: Sequence[int] = PORTS,
) -> Iterator[Nodes]:
    """Waits until all nodes of a run have come, and keeps them connected as long as the context lasts.

    Args:
        index, count: of this node, and of all nodes.
        main_address: host name or address of node 0.
        run: names the run and its attempt, the same on all nodes.
        folder: an existing folder that all nodes share.

    Raises NodesError if not all nodes come within `seconds`, or if this node does not see the folder of node 0.
    """
    if index == 0:
        nodes = _gather(count, main_address, run, folder, seconds, ports)
    else:
        nodes = _join(index, count, main_address, run, folder, seconds, ports)
    nodes._start()
    try:
        yield nodes
    except BaseException as error:
        nodes._say((str(error).splitlines() or [type(error).__name__])[0])
        raise
    else:
        nodes._say("")
    finally:
        for line in nodes._lines.values():
            line.socket.close()
        if nodes._file:
            nodes._file.unlink(missing_ok=True)


def _gather(count: int, address: str, run: str, folder: Path, seconds: float, ports: Sequence[int]) -> Nodes:
    """Node 0: accepts the other nodes, then tells all of them the port and a new file in the shared folder."""
    end, hosts = time.monotonic() + seconds, {0: socket.gethostname()}
    lines: dict[int, _Line] = {}
    print(f"Node 0 of {count} on {hosts[0]} waits for the others", flush=True)
    with _listening(address, ports) as server:
        while len(lines) < count - 1:
            if time.monotonic() > end:
                missing = ", ".join(str(number) for number in range(1, count) if number not in lines)
                reason = (
                    f"node {missing} of {count} has not come within {seconds / 60:.3g} minutes. Look at the logs of "
                    f"its pod, and whether it can reach {hosts[0]} on port {server.getsockname()[1]}"
                )
                for line in lines.values():
                    line.send(node=0, ended=reason)
                raise NodesError(reason)
            server.settimeout(1)
            with contextlib.suppress(TimeoutError):
                line = _Line(server.accept()[0])
                message = line.receive(_HELLO_SECONDS) or {}
                number: Any = message.get("node")
                known = message.get("run") == run and type(number) is int and 0 < number < count
                # A node that waited too long for an answer has closed its connection, and comes again.
                if known and not line.is_closed():
                    line.send(run=run)
                    lines[number], hosts[number] = line, str(message.get("host"))
                else:  # another run on this machine, or a program that is no node
                    line.socket.close()
    file, port = folder / f".nodes-{uuid.uuid4().hex}", free_port()
    file.touch()
    names = [hosts[number] for number in range(count)]
    for line in lines.values():
        line.send(port=port, hosts=names, file=file.name)
    return Nodes(0, address, names, port, _lines=lines, _file=file)


def _listening(address: str, ports: Sequence[int]) -> socket.socket:
    """A server on the first free port; on this machine only if all nodes are here. Raises NodesError."""
    here = "127.0.0.1" if address in ("127.0.0.1", "localhost") else ""
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server((here, port))
    raise NodesError(
        f"the ports {ports[0]} to {ports[-1]} of {socket.gethostname()} are taken. Free one for the nodes to meet"
    )


def _join(
    index: int, count: int, address: str, run: str, folder: Path, seconds: float, ports: Sequence[int]
) -> Nodes:
    """Another node: finds node 0 and waits until all nodes have come."""
    end, host = time.monotonic() + seconds, socket.gethostname()
    print(f"Node {index} of {count} on {host} waits for node 0 at {address}", flush=True)
    line = _find(index, address, run, end, ports)
    message = None
    with contextlib.suppress(TimeoutError):
        message = line and line.receive(max(1.0, end + 2 * _ANSWER_SECONDS - time.monotonic()))
    if line is None or not message:
        raise NodesError(
            f"node {index} of {count} ({host}) found no node 0 at {address} within {seconds / 60:.3g} minutes. Look at "
            f"the logs of its pod, and whether its ports {ports[0]} to {ports[-1]} can be reached from here"
        )
    if "ended" in message:
        raise NodesError(str(message["ended"]))
    nodes = Nodes(index, address, message["hosts"], message["port"], _lines={0: line})
    if not (folder / message["file"]).exists():
        reason = (
            f"{folder} on {host} is not the folder of node 0 ({nodes.hosts[0]}). Each rank writes its part of a "
            "checkpoint there. Type --local-training-root with a folder on storage that all nodes mount"
        )
        nodes._say(reason)
        raise NodesError(reason)
    return nodes


def _find(index: int, address: str, run: str, end: float, ports: Sequence[int]) -> _Line | None:
    """A connection to node 0 of this run; None if it was not found until `end` (of the monotonic clock)."""
    while True:
        for port in ports:
            with contextlib.suppress(OSError):  # nothing listens there, or it does not answer
                line = _Line(socket.create_connection((address, port), timeout=_ANSWER_SECONDS))
                line.send(run=run, node=index, host=socket.gethostname())
                answer = None
                with contextlib.suppress(TimeoutError):
                    answer = line.receive(_ANSWER_SECONDS)
                if answer and answer.get("run") == run:
                    return line
                line.socket.close()  # or node 0 would take it for this node later
        if time.monotonic() > end:
            return None
        time.sleep(1)


def descendants(process: int) -> list[int]:
    """All processes that a process has started, directly or not. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(status_of(folder).parent, []).append(int(folder.name))
    found = list(children.get(process, []))
    for child in found:  # grows meanwhile
        found += children.get(child, [])
    return found
