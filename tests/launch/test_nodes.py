"""Nodes that meet before a run, and notice when one of them ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from training.errors import NodesError, TrainingFailedError
from training.launch import nodes
from training.launch.local import free_port
from training.launch.nodes import Nodes, descendants, meet

# A rank that waits forever for another node, in a session of its own as torchrun starts it.
WAITS = [
    sys.executable,
    "-c",
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'], start_new_session=True)",
]


@pytest.fixture
def ports() -> list[int]:
    return [free_port(), free_port()]


def together(
    count: int, act: Callable[[Nodes], Any], folder: Path, ports: list[int], **more: Any
) -> list[Any]:
    """Result or error of `act` on each node; the last node comes first."""

    def node(index: int) -> Any:
        try:
            with meet(index, count, "127.0.0.1", "7/train", folder, ports=ports, seconds=20) as met:
                return act(met)
        except (NodesError, TrainingFailedError, ZeroDivisionError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        started = {}
        for index in reversed(range(count)):
            started[index] = pool.submit(node, index)
            time.sleep(0.1)
        return [started[index].result() for index in range(count)]


def test_nodes_meet_in_any_order_beside_another_run_and_a_program_that_is_no_node(
    ports: list[int], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", ports[0])) as stranger, ThreadPoolExecutor(2) as pool:

        def answer() -> None:
            with suppress(OSError):  # closed below
                while True:
                    with stranger.accept()[0] as connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\n")

        threading.Thread(target=answer, daemon=True).start()
        met = together(3, lambda nodes: (nodes.index, nodes.hosts, nodes.port), tmp_path, ports)
        assert [index for index, _, _ in met] == [0, 1, 2]
        assert {tuple(hosts) for _, hosts, _ in met} == {(socket.gethostname(),) * 3}
        assert len({port for *_, port in met}) == 1, "torchrun's port"
        assert not list(tmp_path.iterdir()), "the file that shows a shared folder is removed"

        def other(run: str, index: int, seconds: float) -> str:
            try:
                with meet(index, 2, "127.0.0.1", run, tmp_path, seconds, ports[1:]):
                    return run
            except NodesError as error:
                return str(error)

        waits = pool.submit(other, "8/train", 0, 1.5)
        refused = other("9/train", 1, 1)
        assert "node 1 of 2" in refused
        assert "found no node 0 at 127.0.0.1 within 0.0167 minutes" in refused
        assert "node 1 of 2 has not come within 0.025 minutes. Look at the logs of its pod" in waits.result()


@pytest.mark.parametrize(
    "words",
    [b"", b"x", b"[" * 60_000 + b"\n", b'{"run": "7/train", "node": 1.0}\n', bytes(range(256))],
    ids=["nothing", "half a line", "brackets", "no whole number", "binary"],
)
def test_programs_that_speak_otherwise_neither_end_nor_delay_the_nodes(
    ports: list[int], tmp_path: Path, words: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_HELLO_SECONDS", 0.3)
    monkeypatch.setattr(nodes, "_ANSWER_SECONDS", 0.5)  # a node gives up meanwhile, and comes again
    strangers: list[socket.socket] = []
    both_met = threading.Barrier(2)

    def node(index: int) -> list[str]:
        with meet(index, 2, "127.0.0.1", "7/train", tmp_path, seconds=20, ports=ports[:1]) as met:
            both_met.wait(20)
            return met.hosts

    def connect() -> socket.socket:
        while True:
            with suppress(OSError):
                return socket.create_connection(("127.0.0.1", ports[0]))
            time.sleep(0.05)

    with ThreadPoolExecutor(2) as pool:
        main = pool.submit(node, 0)
        for _ in range(4):
            strangers.append(connect())
            strangers[-1].sendall(words)
        other = pool.submit(node, 1)
        assert main.result() == other.result() == [socket.gethostname()] * 2
    for stranger in strangers:
        stranger.close()


def test_a_folder_that_is_not_shared_is_refused_on_every_node(ports: list[int], tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()

    def node(index: int) -> str:
        try:
            with meet(index, 2, "127.0.0.1", "7/train", folders[index], 20, ports) as met:
                assert met._trouble.wait(10)
                return met.problem
        except NodesError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        main, other = pool.map(node, range(2))
    assert other.startswith(f"{tmp_path}/b on {socket.gethostname()} is not the folder of node 0")
    assert "Type --local-training-root" in other
    assert main == f"Node 1 of 2 ({socket.gethostname()}) reports: {other}"


def test_a_node_that_fails_ends_the_others_with_its_words(
    ports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "GRACE_SECONDS", 0.2)

    def act(met: Nodes) -> Any:
        command = [sys.executable, "-c", "import sys; sys.exit(2)"] if met.index == 2 else WAITS
        return met.train(command, tmp_path, 0, "flow")

    others, begin = set(descendants(os.getpid())), time.monotonic()  # of tests before in this process
    results = together(3, act, tmp_path, ports)
    assert time.monotonic() - begin < 15
    reason = f"Node 2 of 3 ({socket.gethostname()}) reports: Training ended with exit code 2: refused before training"
    for result in results[:2]:
        assert isinstance(result, NodesError)
        assert str(result).startswith(reason)
    assert not set(descendants(os.getpid())) - others, "the waiting ranks are killed"


LOST = """
import sys, time
from pathlib import Path
from training.launch.nodes import meet
with meet(1, 2, "127.0.0.1", "7/train", Path(sys.argv[1]), 20, [int(sys.argv[2])]):
    print("met", flush=True)
    time.sleep(60)
"""


def test_a_killed_node_is_named_and_the_ranks_that_wait_for_it_are_ended(
    ports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nodes, "GRACE_SECONDS", 0.2)
    others = set(descendants(os.getpid()))  # of tests before in this process
    words = [sys.executable, "-c", LOST, str(tmp_path), str(ports[0])]
    other = subprocess.Popen(words, stdout=subprocess.PIPE)
    with meet(0, 2, "127.0.0.1", "7/train", tmp_path, 20, ports[:1]) as met:
        assert other.stdout is not None
        while other.stdout.readline() != b"met\n":
            pass
        threading.Timer(0.3, other.kill).start()
        with pytest.raises(
            NodesError, match=r"Node 1 of 2 \(.*\) was lost: its process was killed, or its machine"
        ):
            met.train(WAITS, tmp_path, 0, "flow")
    other.communicate()
    assert "The ranks of this node are killed, because they still wait" in capfd.readouterr().out
    assert not set(descendants(os.getpid())) - others
