"""@gpu_profile: its card is correct and stays small, and its errors never reach the step.

standin_nvml.c replaces NVIDIA's library; nvidia-ml-py, psutil, Metaflow and Chromium are real.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from metaflow.exception import MetaflowException

from flows import gpu_profile
from flows.gpu_profile import Lines, Profiler, Run, Series
from tests.conftest import python
from training.consts import METRICS_FILE, SAMPLES_FILE
from training.storage.metrics import append, drop_entries_after

ROOT = Path(__file__).parents[2]
MIB = 2**20


class Card:
    """A stand-in for Metaflow's card that keeps its components and renders them."""

    def __init__(self, fails: bool = False):
        self.parts: list[Any] = []
        self.fails = fails
        self.refreshed: list[bool] = []

    def clear(self) -> None:
        self.parts = []

    def extend(self, parts: list[Any]) -> None:
        self.parts = list(parts)

    def refresh(self, force: bool = False) -> None:
        self.refreshed.append(force)
        if self.fails:
            raise OSError("no process can be started")

    def drawn(self) -> list[dict[str, Any]]:
        return [part.render() for part in self.parts]

    def text(self) -> str:
        return json.dumps(self.drawn())


def profiler(card: Card, folder: Path | None = None, interval: float = 0.05) -> Profiler:
    return Profiler(card, "# a step", interval, lambda: folder)


def fake_gpus(read: Callable[[], Any], close: Callable[[], None], devices: Any, topology: Any) -> Any:
    more = {"devices": devices, "topology": topology, "driver": "550.54.15", "cuda": "12.4"}
    return SimpleNamespace(read=read, close=close, **more)


def tables(drawn: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """The tables whose first header is `first`."""
    return [part for part in drawn if part["type"] == "table" and part["columns"][:1] == [first]]


def words(row: list[Any]) -> list[str]:
    return [cell if isinstance(cell, str) else cell["source"].strip() for cell in row]


def charts(drawn: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    return {
        part["spec"]["title"]: part["spec"]["data"]["values"] for part in drawn if part["type"] == "vegaChart"
    }


# --- curves that stay small ---


def test_merging_keeps_mean_and_peak_and_non_finite_values_are_ignored() -> None:
    series = Series(width=1, points=3)
    for x, value in enumerate([1, 1, 9, 1, 5]):
        series.add(x, {"GPU 0": value})
    assert series.rows() == [
        {"x": 0.5, "GPU 0": 1},
        {"x": 2.5, "GPU 0": 5, "max GPU 0": 9},
        {"x": 4, "GPU 0": 5},
    ]
    assert (series.mean("GPU 0"), series.peak("GPU 0")) == (3.4, 9)
    series = Series(width=1)
    series.add(0, {"a": None, "b": float("nan"), "c": "12", "d": True, "e": float("inf")})
    assert series.rows() == []
    series.add(1, {"a": None, "b": 2})
    assert series.rows() == [{"x": 1, "b": 2}]
    assert series.peak("a") is series.mean("a") is None


def test_ten_hours_of_eight_gpus_stay_small_and_keep_every_peak(tmp_path: Path) -> None:
    names = [f"GPU {n}" for n in range(8)]
    now = 0

    def read() -> tuple[dict[str, float], dict[str, float]]:
        busy = 100.0 if now == 12_345 else 50 + 37.123 * ((now * 7919) % 101) / 101
        return {name: busy - n for n, name in enumerate(names)}, dict.fromkeys(names, 20 + busy / 7)

    topology = {one: dict.fromkeys(names, "NV12") for one in names}
    card = Card()
    profile = profiler(card, tmp_path, interval=1.0)
    profile.gpus = fake_gpus(read, lambda: None, list(map(device_named, names)), topology)
    profile.host = SimpleNamespace(
        cores=96, read=lambda folder: dict.fromkeys(["CPU", "memory", "disk", "memory GiB"], 33.3 + now % 7)
    )
    sizes = {}
    for now in range(36_000):
        profile.sample(float(now))
        if now + 1 in (600, 3_600, 36_000):
            profile.draw()
            sizes[now + 1] = (len(card.text()), len(pickle.dumps(profile._record())))
    assert all(max(drawn, artifact) < 150_000 for drawn, artifact in sizes.values()), sizes
    assert sizes[36_000][0] < 1.5 * sizes[3_600][0]
    kept = profile._record()["peaks"]["gpu_utilisation_percent"]
    assert kept == {name: 100.0 - n for n, name in enumerate(names)}
    curve = charts(card.drawn())["GPU utilisation"]
    assert 80 <= len(curve) <= gpu_profile.POINTS
    assert max(row["max GPU 0"] for row in curve) == 100
    unit, scale = gpu_profile.time_unit(36_000)
    assert unit.startswith("hours")
    assert profile.use.rows(scale)[-1]["x"] == pytest.approx(10, abs=0.1)


def test_a_chart_draws_maxima_only_if_there_are_any() -> None:
    row = {"x": 1, "GPU 0": 5, "GPU 1": 7, "another": 3}
    spec = gpu_profile.chart_spec("use", [row], ["GPU 0", "GPU 1"], "seconds", "%", top=100)
    assert [layer["transform"][0]["fold"] for layer in spec["layer"]] == [["GPU 0", "GPU 1"]]
    assert spec["data"]["values"] == [{"x": 1, "GPU 0": 5, "GPU 1": 7}]
    spec = gpu_profile.chart_spec(
        "use", [row | {"max GPU 1": 9}], ["GPU 0", "GPU 1"], "seconds", "%", top=100
    )
    assert [layer["transform"][0]["fold"] for layer in spec["layer"]] == [["max GPU 1"], ["GPU 0", "GPU 1"]]


# --- devices ---


READ_ALL = """
import json, os, sys
from flows.gpu_profile import Gpus
readings = {}
for name in sys.argv[1:]:
    scene, _, lost = name.partition("-")
    os.environ["NVML_SCENE"] = scene
    os.environ["NVML_LOST"] = lost or "-1"
    try:
        gpus = Gpus()
        use, memory = gpus.read()
        readings[name] = vars(gpus) | {"use": use, "memory": memory}
        for inner in ("nvml", "handles"):
            del readings[name][inner]
        gpus.nvml.nvmlShutdown()
    except Exception as error:
        readings[name] = repr(error)
print(json.dumps(readings))
"""


@pytest.fixture(scope="session")
def readings(nvml_folder: Path) -> dict[str, Any]:
    """What Gpus reads in each scene of the stand-in, and in one with a lost GPU."""
    scenes = ["nvswitch", "bridges", "mig", "old", "none", "bridges-1"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_folder)}
    result = python("-c", READ_ALL, *scenes, env=environment, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_every_nvml_call_exists_in_nvidias_package() -> None:
    source = (ROOT / "flows" / "gpu_profile.py").read_text()
    names = set(re.findall(r"\b(?:pynvml|nvml)\.(\w+)", source))
    assert len(names) > 15
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []


def device_named(
    name: str, bus: str | None = "00000000:10:00.0", kind: str = "", gib: float = 40.0
) -> dict[str, Any]:
    return {"device": name, "type": f"NVIDIA A100-SXM4-40GB{kind}", "memory_gib": gib, "bus": bus}


def test_driver_and_devices_are_reported_with_type_memory_and_bus(readings: dict[str, Any]) -> None:
    assert (readings["nvswitch"]["driver"], readings["nvswitch"]["cuda"]) == ("550.54.15", "12.4")
    assert len(readings["nvswitch"]["devices"]) == 8
    assert readings["nvswitch"]["devices"][7] == device_named("GPU 7", "00000000:17:00.0")
    assert readings["nvswitch"]["use"] == {f"GPU {n}": 10.0 * n + 5 for n in range(8)}
    assert readings["nvswitch"]["memory"] == {f"GPU {n}": n + 1.0 for n in range(8)}


def test_topology_shows_nvswitch_between_all_gpus_and_bridges_between_pairs(
    readings: dict[str, Any],
) -> None:
    topology = readings["nvswitch"]["topology"]
    assert list(topology["GPU 0"].values()) == ["X", *["NV12"] * 7]
    assert list(topology["GPU 7"].values()) == [*["NV12"] * 7, "X"]
    assert [list(row.values()) for row in readings["bridges"]["topology"].values()] == [
        ["X", "NV2", "NV1", "SYS"],
        ["NV2", "X", "SYS", "SYS"],
        ["NV1", "SYS", "X", "PIX"],
        ["SYS", "SYS", "PIX", "X"],
    ]


def test_a_lost_gpu_or_an_old_driver_leaves_all_other_values_readable(
    readings: dict[str, Any],
) -> None:
    lost = readings["bridges-1"]
    assert [device["device"] for device in lost["devices"]] == ["GPU 0", "GPU 2", "GPU 3"]
    assert lost["topology"]["GPU 0"] == {"GPU 0": "X", "GPU 2": "NV1", "GPU 3": "SYS"}
    zero, one = {"GPU 0": "X", "GPU 1": "PIX"}, {"GPU 0": "PIX", "GPU 1": "X"}
    assert readings["old"]["topology"] == {"GPU 0": zero, "GPU 1": one}
    assert readings["old"]["use"] == {"GPU 0": 5, "GPU 1": 15}


def test_mig_devices_are_reported_and_a_driver_without_gpus_raises(
    readings: dict[str, Any],
) -> None:
    assert readings["mig"]["use"] == {"GPU 0": None, "GPU 0 MIG 0": None, "GPU 0 MIG 1": None}
    assert readings["mig"]["memory"] == {"GPU 0": None, "GPU 0 MIG 0": 1, "GPU 0 MIG 1": 2}
    assert readings["mig"]["devices"][2] == device_named("GPU 0 MIG 1", None, " MIG 3g.20gb", 20.0)

    assert "NVML finds no GPU" in readings["none"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_without_a_gpu_the_card_says_why_and_shows_the_host(tmp_path: Path) -> None:
    card = Card()
    profile = profiler(card, tmp_path)
    profile.start()
    time.sleep(0.5)
    record = profile.stop(None)
    drawn = card.drawn()
    assert "No NVIDIA GPU" in card.text()
    assert "NVMLError" in card.text()
    (devices,) = tables(drawn, "device")
    assert [row[0] for row in map(words, devices["data"])] == ["CPU", "memory", "disk"]
    assert re.fullmatch(r"\d+\.\d of \d+\.\d GiB", words(devices["data"][1])[-1])
    assert list(charts(drawn)) == ["host"]
    assert 0 < record["peaks"]["host"]["memory"] <= 100
    assert record["peaks"]["host"]["memory GiB"] < psutil.virtual_memory().total / 2**30
    assert record["devices"] == []
    assert 5 <= record["samples"] <= 11


def test_without_any_device_the_card_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    card = Card()
    profile = profiler(card, tmp_path)
    profile.start()
    time.sleep(0.2)
    profile.stop(None)
    assert "**No device can be read**" in card.text()
    assert "import of pynvml" in card.text()
    assert "import of psutil" in card.text()
    assert charts(card.drawn()) == {}


def test_in_a_container_its_own_memory_limit_is_used(tmp_path: Path) -> None:
    def measure(root: str, used: str, limit: str, stat: str, free: int, unlimited: object) -> list[Any]:
        folder = (tmp_path / root / used).parent
        folder.mkdir(parents=True)
        (tmp_path / root / used).write_text(f"{900 * MIB}\n")
        (folder / "memory.stat").write_text(f"{stat} {free * MIB}\n")
        memory = []
        for most in (unlimited, 1000 * MIB):
            (folder / limit).write_text(f"{most}\n")
            memory.append(gpu_profile.container_memory(tmp_path / root))
        return memory

    version_2 = measure("v2", "memory.current", "memory.max", f"anon {1}\ninactive_file", 200, "max")
    assert version_2 == [None, (700 * MIB, 1000 * MIB)]
    used, limit = "memory/memory.usage_in_bytes", "memory.limit_in_bytes"
    version_1 = measure("v1", used, limit, "total_inactive_file", 100, 9223372036854771712)
    assert version_1 == [None, (800 * MIB, 1000 * MIB)]
    assert gpu_profile.container_memory(tmp_path / "nowhere") is None


# --- the run's files ---


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "max_steps": 200, "epoch": step / 100, "seconds": 10.0 + 0.5 * step} | more


def read_run(folder: Path) -> Run:
    """A run whose files have been read."""
    run = Run(folder)
    run.read()
    return run


def test_lines_are_read_once_and_an_incomplete_one_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    lines = Lines(file)
    assert lines.new() == (False, [])
    append(file, {"step": 1})
    with open(file, "a") as stream:
        stream.write('nonsense\n[1]\n{"no": "step"}\n{"step": 2, "lo')
    assert lines.new() == (True, [{"step": 1}])
    assert lines.new() == (False, [])
    with open(file, "a") as stream:
        stream.write('ss": 3}\n')
    assert lines.new() == (False, [{"step": 2, "loss": 3}])


def test_a_resumed_run_is_drawn_without_the_dropped_entries(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        append(tmp_path / METRICS_FILE, line(step, loss=float(step)))
        append(tmp_path / SAMPLES_FILE, {"step": step, "instruction": "Why?", "response": f"{step}"})
    run = read_run(tmp_path)
    assert [row["x"] for row in run.loss.rows()] == [10, 20, 30]
    for name in (METRICS_FILE, SAMPLES_FILE):
        drop_entries_after(tmp_path / name, 10)
    append(tmp_path / METRICS_FILE, line(20, loss=1.5))
    run.read()
    assert run.loss.rows() == [{"x": 10, "loss": 10}, {"x": 20, "loss": 1.5}]
    assert run.stages() == [10]


def test_progress_shows_figures_and_the_time_left(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.progress() == (0, "step 0", "time left not known yet")
    append(tmp_path / METRICS_FILE, line(40, loss=1.234, tokens_per_second=9012.3))
    run.read()
    words = "step 40 of 200, epoch 0.40, loss 1.23, 9,012 tokens/s"
    assert run.progress() == (20, words, "2 min left")  # 160 steps as the first 40: 30 s
    append(tmp_path / METRICS_FILE, line(100, eval_loss=1.5))
    run.read()  # 100 steps as the latest 60: 30 s
    words = "step 100 of 200, epoch 1.00, loss 1.23, held-out loss 1.5, 9,012 tokens/s"
    assert run.progress() == (50, words, "50 s left")
    append(tmp_path / METRICS_FILE, line(200, loss=1.0))
    run.read()
    assert (run.progress()[0], run.progress()[2]) == (100, "finished")


def test_durations_are_formatted_in_seconds_minutes_and_hours() -> None:
    assert [gpu_profile.duration(s) for s in (0, 59.6, 100, 3599, 12_000)] == [
        "0 s", "60 s", "2 min", "1 h 0 min", "3 h 20 min",
    ]  # fmt: skip


def test_answers_have_one_column_per_stage(tmp_path: Path) -> None:
    for step in (0, 100):
        for question, context in (("Name a river.", ""), ("Shorten.", "Long text")):
            entry = {"step": step, "epoch": step / 80, "instruction": question, "input": context}
            append(tmp_path / SAMPLES_FILE, entry | {"response": f"{question} {step}"})
    assert read_run(tmp_path).answer_table() == (
        ["instruction", "epoch 0.00", "epoch 1.25"],
        [
            ["Name a river.", "Name a river. 0", "Name a river. 100"],
            ["Shorten.\nLong text", "Shorten. 0", "Shorten. 100"],
        ],
    )


def test_prompts_with_the_same_question_are_told_apart_by_the_turns_before_it(tmp_path: Path) -> None:
    asked = [(name, [{"role": "user", "content": text}, {"role": "assistant", "content": name}])
             for name, text in (("a", "Hi."), ("b", "Hi."), ("c", "Long text " * 100))]  # fmt: skip
    for response, history in [("none", []), *asked]:
        entry = {"step": 0, "instruction": "Why?", "input": "", "history": history}
        append(tmp_path / SAMPLES_FILE, entry | {"response": response})
    _, rows = read_run(tmp_path).answer_table()
    assert rows[:3] == [
        ["Why?", "none"],
        ["user: Hi.\nassistant: a\nuser: Why?", "a"],
        ["user: Hi.\nassistant: b\nuser: Why?", "b"],
    ]
    prompt, answer = rows[3]
    assert (len(prompt), answer) == (gpu_profile.ANSWER_CHARACTERS, "c")
    assert prompt.endswith("Long text \nassistant: c\nuser: Why?"), "the question is seen"


def test_of_many_stages_first_last_and_some_between_are_shown(tmp_path: Path) -> None:
    for step in range(0, 5000, 10):
        for prompt in range(30):
            entry = {"step": step, "instruction": f"Say {prompt}.", "response": f"{step} " * 10_000}
            append(tmp_path / SAMPLES_FILE, entry) if step < 100 or prompt == 0 else None
    run = read_run(tmp_path)
    headers, rows = run.answer_table()
    assert (headers[1], headers[-1], len(headers)) == ("step 0", "step 4,990", 1 + gpu_profile.STAGES_SHOWN)
    assert len(rows) == gpu_profile.PROMPTS
    assert max(len(cell) for row in rows for cell in row) == gpu_profile.ANSWER_CHARACTERS
    assert len(json.dumps([headers, rows])) < 60_000


def test_the_evaluation_of_the_finished_model_is_a_table(tmp_path: Path) -> None:
    card = Card()
    profile = profiler(card, tmp_path)
    profile.draw()
    assert not tables(card.drawn(), "held-out rows")
    base, tuned = {"value": 0.0, "low": 0.0, "high": 0.0}, {"value": 0.5, "low": 0.25, "high": 0.75}
    exact = {"base": base, "tuned": tuned, "difference": tuned}
    metrics = {"exact_match": exact, "loss": exact | {"difference": None}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"held_out": {"metrics": metrics}}))
    assert profile.draw()
    [table] = tables(card.drawn(), "held-out rows")
    half = "0.500 [0.250, 0.750]"
    assert table["data"] == [
        ["exact match", "0.000 [0.000, 0.000]", half, half],
        ["loss", "0.000 [0.000, 0.000]", half, ""],
    ]
    for broken in ("", "[]", '{"tasks": {}}', '{"held_out": {"metrics": 3}}'):
        (tmp_path / "evaluation.json").write_text(broken)
        profile.draw()
    assert profile.errors == {} or "card" not in profile.errors


def test_the_card_is_updated_with_the_runs_files(tmp_path: Path) -> None:
    card = Card()
    profile = profiler(card, tmp_path)
    profile.draw()
    assert "No metrics yet" in card.text()
    append(tmp_path / METRICS_FILE, line(10, loss=2.0, tokens_per_second=9000.0))
    assert profile.draw()
    before = charts(card.drawn())
    assert before == {"loss": [{"x": 10, "loss": 2.0}], "speed": [{"x": 10, "tokens/s": 9000.0}]}
    append(tmp_path / METRICS_FILE, line(20, eval_loss=1.75))
    assert not profile.draw(), "the same components, so no complete drawing is needed"
    assert charts(card.drawn())["loss"] == [{"x": 10, "loss": 2.0}, {"x": 20, "held-out loss": 1.75}]
    append(tmp_path / SAMPLES_FILE, {"step": 20, "instruction": "Why?", "response": "So."})
    assert profile.draw()
    assert tables(card.drawn(), "instruction")[0]["data"] == [["Why?", "So."]]
    assert [part["value"] for part in card.drawn() if part["type"] == "progressBar"] == [10]


# --- errors of the profile ---


def wait_until(done: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def raising(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("planted")


def plant(part: str, profile: Profiler, folder: Path) -> None:
    if part == "GPUs":
        profile.gpus = fake_gpus(raising, raising, [device_named("GPU 0")], {})
    elif part == "host":
        profile.host.psutil = SimpleNamespace(cpu_percent=raising, virtual_memory=raising)
    elif part == "run":
        (folder / METRICS_FILE).unlink()
        (folder / METRICS_FILE).mkdir()
    elif part == "run folder":
        profile.folder = raising
    else:
        profile.card.fails = True


@pytest.mark.parametrize("part", ["GPUs", "host", "run", "run folder", "card"])
def test_an_error_of_the_profile_is_shown_and_the_rest_still_works(part: str, tmp_path: Path) -> None:
    append(tmp_path / METRICS_FILE, line(10, loss=2.0))
    card = Card()
    profile = profiler(card, tmp_path)
    profile.start()
    wait_until(lambda: card.refreshed)
    plant(part, profile, tmp_path)
    wait_until(lambda: part in profile.errors)
    before = profile.count
    wait_until(lambda: profile.count > before + 1)  # one sample has begun since then
    record = profile.stop(ValueError("the step's own"))
    assert "planted" in record["faults"][part] or part in ("run", "card")
    errors = [words(row) for row in tables(card.drawn(), "part")[0]["data"]]
    assert part in {name for name, _ in errors}
    assert "ValueError: the step's own" in card.text()
    assert charts(card.drawn())["loss"] == [{"x": 10, "loss": 2.0}], "figures read earlier stay"
    assert "host" in charts(card.drawn())


def test_a_section_that_fails_to_draw_leaves_the_others(tmp_path: Path) -> None:
    append(tmp_path / METRICS_FILE, line(10, loss=2.0))
    card = Card()
    profile = profiler(card, tmp_path)
    profile.host = gpu_profile.Host()
    profile.sample(0.0)
    profile.draw()
    assert profile.run
    profile.run.progress = raising
    profile.draw()
    profile.draw()
    assert list(charts(card.drawn())) == ["host"]
    assert tables(card.drawn(), "part")[0]["data"] == [["card", "RuntimeError: planted"]]


def test_invalid_arguments_are_refused_with_what_to_type() -> None:
    with pytest.raises(MetaflowException, match=r"interval is 0; expected seconds, 0\.1 or more"):
        gpu_profile.gpu_profile(interval=0).external_init()
    with pytest.raises(MetaflowException, match=r"run_folder is '/tmp/x'.*for self\.output"):
        gpu_profile.gpu_profile(run_folder="/tmp/x").external_init()


def test_the_file_alone_imports_neither_torch_nor_the_project(tmp_path: Path) -> None:
    shutil.copy(ROOT / "flows" / "gpu_profile.py", tmp_path)
    code = "import sys, gpu_profile; print([m for m in ('torch', 'training', 'psutil', 'pynvml') if m in sys.modules])"
    assert python("-c", code, cwd=tmp_path, check=True).stdout.strip() == "[]"


def test_without_metaflow_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "flows" / "gpu_profile.py").read_text()
    monkeypatch.setitem(sys.modules, "metaflow", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[metaflow\]'"):
        exec(compile(source, "gpu_profile.py", "exec"), {"__name__": "gpu_profile"})
