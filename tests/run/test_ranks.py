"""Communication of real ranks: long work of rank 0, lost ranks, timeouts of every process group."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.starts import ROOT, free_port, without_a_launcher

# Rank 0 works longer than the timeout of the group.
LONG_WORK = """
import json, os, signal, sys, time
from datetime import timedelta
import torch
from training import ranks
from training.run.failures import lost_peer, timed_out

ranks.SIGN_OF_LIFE_SECONDS = 0.5
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=4))

def work():
    end, number = sys.argv[1:]
    if int(number):
        os.kill(os.getpid(), int(number))
    time.sleep(float(end))
    return os.getpid()

try:
    report = {"result": ranks.on_rank_0(work)}
except RuntimeError as error:
    report = {"lost": lost_peer(error), "timed out": timed_out(error)}
print(json.dumps(report), flush=True)
os._exit(0)
"""


def start_ranks(code: str, count: int, *words: object) -> list[subprocess.Popen[str]]:
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    command = [sys.executable, "-c", code, *map(str, words)]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=without_a_launcher() | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "number", "report"),
    [
        (10, 0, None),
        (60, signal.SIGKILL, {"lost": True, "timed out": False}),
        (60, signal.SIGSTOP, {"lost": True, "timed out": True}),
    ],
    ids=["longer than the timeout", "killed", "stopped"],
)
def test_ranks_wait_for_rank_0_without_a_limit_and_notice_if_it_ends_or_hangs(
    seconds: int, number: int, report: dict[str, bool] | None
) -> None:
    first, second = start_ranks(LONG_WORK, 2, seconds, int(number))
    try:
        output, _ = second.communicate(timeout=60)
        assert json.loads(output) == (report or {"result": first.pid})
    finally:
        first.kill()
        first.communicate()


GROUPS = """
import json
from datetime import timedelta
import torch
from torch.testing._internal.distributed import fake_pg
from training.run import prepare

# As on a GPU. This torch may have no NCCL: the fake backend takes its place.
torch.cuda.is_available = lambda: True
prepare.GPU_BACKENDS = prepare.GPU_BACKENDS.replace("nccl", "fake")
prepare.connect_ranks(timedelta(seconds=77))
from deepspeed.utils import groups
report = []
for group in (torch.distributed.group.WORLD, groups._clone_world_group()):
    of_objects = torch.device(torch.distributed.distributed_c10d._get_object_coll_device(group))
    backends = [group._get_backend(torch.device(name)) for name in (of_objects, "cuda")]
    report.append([*(backend.name() for backend in backends), backends[0].options._timeout.seconds])
values = [{"kept": True}]
torch.distributed.broadcast_object_list(values)
print(json.dumps([report, torch.distributed.distributed_c10d.default_pg_nccl_timeout.seconds]))
"""


@pytest.mark.slow
def test_objects_go_over_gloo_and_every_group_has_the_rank_timeout() -> None:
    """Also the groups that DeepSpeed forms itself, for which it names no timeout."""
    [rank] = start_ranks(GROUPS, 1)
    output, _ = rank.communicate(timeout=300)
    assert json.loads(output.splitlines()[-1]) == [[["gloo", "fake", 77]] * 2, 77]
