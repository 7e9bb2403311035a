"""Fuzz tests of model folders, options and DeepSpeed files: each is accepted, or refused with an error that names it.

Fuzz tests of rows are in test_fuzz_rows.py.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import EOS, problems_of
from tests.options.test_config import filled
from training import trainer
from training.data.ledger import Ledger
from training.data.rows import Columns
from training.data.tokens import encode_rows
from training.errors import ModelError, OptionsError
from training.model.loading import load_config, load_model, max_positions
from training.model.tokenizer import load_tokenizer
from training.options.trainer_options import TrainingOptions

pytestmark = pytest.mark.timeout(600)  # a hang is a failure as well

CONTROL = ("### End", "### Instruction:", "### Response:\n")


def cases(quick: int, sweep: int) -> pytest.MarkDecorator:
    """Number of generated cases: a few in every run, many in the long sweeps."""
    return pytest.mark.parametrize("count", [quick, pytest.param(sweep, marks=pytest.mark.long)])


def fuzz(count: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Calls the decorated function with `count` generated cases, the same in every run."""

    def run(check: Callable[..., None]) -> None:
        settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(check))()

    return run


# --- model folders -----------------------------------------------------------------------------------


class Bomb:
    """An object whose unpickling creates a file, which shows that code of the pickle ran."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def json_file_changed(path: Path, draw: Any) -> None:
    """Changes, removes or renames one entry somewhere in a JSON file."""
    content = json.loads(path.read_text())
    section = content
    for _ in range(draw(st.integers(0, 3))):
        inner = list(section.values()) if isinstance(section, dict) else section
        deeper = [value for value in inner if isinstance(value, dict | list) and value]
        if not deeper:
            break
        section = draw(st.sampled_from(deeper))
    key = draw(st.sampled_from(list(section) if isinstance(section, dict) else list(range(len(section)))))
    change = draw(st.sampled_from(["value", "value", "remove", "rename"]))
    if change == "value":
        section[key] = draw(wrong_values)
    elif change == "remove":
        del section[key]
    elif isinstance(section, dict):
        section[f"{key}s"] = section.pop(key)
    path.write_text(json.dumps(content))


wrong_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 5, 64, 361, 362, 365, 500, 1.5, float("nan"), float("inf"), 10**30]),
    st.sampled_from(["", "auto", "x", "3", "### End", "</s>", "bert", "gpt2", "t5", "GPT2LMHeadModel", "LlamaForCausalLM"]),
    st.sampled_from([[], {}, [1], ["BertForMaskedLM"], [None], {"a": 1}, {"type": "x"}, {"content": "### End"}]),
)  # fmt: skip
garbage = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"{}", b"[]", b"null", b"{", b'"x"', b"7", b"\xff\xfe{\0}\0", b"[" * 100_000, b'{"a": NaN}',
                     b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"{}", b"\x80\x04."]),
)  # fmt: skip


def spoil_tensors(folder: Path, draw: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    change = draw(st.sampled_from("drop rename shape longer integers scalar half double extra none".split()))
    if change in ("drop", "rename"):
        del tensors[name]
    if change == "none":
        tensors = {}
    changed = {
        "rename": {f"{name}.old": tensor},
        "shape": {name: tensor.flatten()[: tensor.numel() // 2].clone()},
        "longer": {name: torch.cat([tensor, tensor])},
        "integers": {name: tensor.to(torch.int64)},
        "scalar": {name: torch.zeros(())},
        "half": {name: tensor.half()},
        "double": {name: tensor.double()},
        "extra": {"more.weight": torch.zeros(3)},
    }
    save_file(tensors | changed.get(change, {}), path, metadata={"format": "pt"})


def spoil_model(folder: Path, draw: Any) -> None:
    """Damages the folder of a model in one or two ways."""
    trace = folder / "pickle_ran"
    weights = folder / "model.safetensors"
    for _ in range(draw(st.integers(1, 2))):
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        change = draw(st.sampled_from(["json", "json", "json", "tensors", "tensors", "cut", "garbage", "remove", "folder", "index", "pickle"]))  # fmt: skip
        fitting = [name for name in files if change != "json" or name.endswith("json")]
        name = draw(st.sampled_from(fitting or files))
        if change == "json":
            with suppress(ValueError, IndexError):  # an earlier change left no JSON, or an empty one
                json_file_changed(folder / name, draw)
        elif change == "tensors" and weights.is_file():
            with suppress(Exception):  # an earlier change left no valid file
                spoil_tensors(folder, draw)
        elif change == "cut":
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: draw(st.integers(0, len(content)))])
        elif change == "garbage":
            (folder / name).write_bytes(draw(garbage))
        elif change in ("remove", "folder"):
            (folder / name).unlink()
            if change == "folder":
                (folder / name).mkdir()
        elif change == "index" and weights.is_file():
            maps = [{}, {"lm_head.weight": "none.safetensors"}, {"lm_head.weight": 7}, [], None]
            parts, metadata = draw(st.sampled_from(maps)), draw(st.sampled_from([{}, None, []]))
            index = {"metadata": metadata, "weight_map": parts}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            weights.rename(folder / "elsewhere.safetensors")
        elif change == "pickle":
            if weights.is_dir():
                weights.rmdir()
            weights.unlink(missing_ok=True)
            state = draw(st.sampled_from([Bomb(trace), {"lm_head.weight": Bomb(trace)}, {"a": 1}, [1], None]))
            if draw(st.booleans()):
                torch.save(state, folder / "pytorch_model.bin")
            else:
                (folder / "pytorch_model.bin").write_bytes(pickle.dumps(state))


def use_model(name: str) -> None:
    """Loads a folder as training does before its first step, and checks the tokens and weights."""
    assert max_positions(load_config(name)) > 0
    tokenizer = load_tokenizer(name)
    model = load_model(name, tokenizer, torch.float32, seed=42)
    control = [tokenizer.convert_tokens_to_ids(word) for word in CONTROL]
    words = f"a ### End {EOS}\n\n### Response:\nb ### Instruction: "
    [(_, ids, [(start, _)])] = encode_rows(tokenizer, Columns([words], [words], [words]), Ledger("", 10_000))
    assert [i for i in ids[:start] if i in control] == control[1:]
    assert [i for i in ids[start:] if i in control] == [ids[-1]] == control[:1]
    assert tokenizer.eos_token_id not in ids or tokenizer.eos_token_id in control
    assert max(tokenizer.get_vocab().values()) < len(model.get_input_embeddings().weight)
    files = [file for file in Path(name).glob("*.safetensors") if file.is_file()]
    saved = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for key, tensor in model.state_dict().items():
        if saved:
            rows = len(saved[key]) if saved[key].ndim else None
            assert torch.equal(tensor[:rows] if rows else tensor, saved[key].float()), key


@cases(quick=40, sweep=500)
def test_a_damaged_model_folder_is_loaded_correctly_or_refused_by_name(
    count: int, folders: Iterator[Path], base_folder: Path
) -> None:
    @fuzz(count, data=st.data())
    def check(data: st.DataObject) -> None:
        folder = next(folders) / "model"
        shutil.copytree(base_folder, folder)
        spoil_model(folder, data.draw)
        try:
            use_model(str(folder))
        except ModelError as error:
            message = str(error)
        else:
            message = f"{folder}: loaded"
        assert message.startswith(f"{folder}: ")
        assert len(message) < 2000
        assert "above report" not in message
        assert not (folder / "pickle_ran").exists(), "code of a pickle ran"


# --- options -----------------------------------------------------------------------------------------

WHOLE_NUMBERS_BAD = ("x", "", "1.5", "nan", "inf", "1e3", "0x10", "--", "½", "1 2", "-1")
RATES_BAD = ("x", "", "nan", "inf", "-inf", "1e999", "-1", "-1e-9", "1,5", "½", "0x1p3")
HUGE = "9" * 30
# option -> (valid values, invalid values)
VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "--input-model": (("demo", "gpt2", "a/b.c"), ("", " ", "a\udce4", "Ä B", "a:b", "/no/x", "~nobody-here/x", "https://x.y/z", "a\0b")),
    "--training-dataset": (("demo", "tatsu-lab/alpaca", "Ä B.json"), ("", "\n", "a\udce4", "x" * 300, "s3://b/c.json", "none.json", "./none")),
    "--max-length": (("8", "2048", HUGE), (*WHOLE_NUMBERS_BAD, "7", "0")),
    "--max-dropped-fraction": (("0", "1", "0.5", "1e-300"), (*RATES_BAD, "1.0001")),
    "--test-size": (("1", "٣", " 4 ", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--seed": (("0", "4294967295"), (*WHOLE_NUMBERS_BAD, "4294967296", HUGE)),
    "--epochs": (("3", "0.001", "10000"), (*RATES_BAD, "0", "1e-400", "1e300")),
    "--max-steps": (("1", "1000000000"), (*WHOLE_NUMBERS_BAD, "0", HUGE)),
    "--lr": (("1e-5", "5e-324", "1"), (*RATES_BAD, "0", "-0")),
    "--lr-scheduler-type": (
        ("constant", "constant_with_warmup", "linear", "cosine"),
        ("", "CONSTANT", "wavy", "linear "),
    ),
    "--warmup-steps": (("0", "5", HUGE), WHOLE_NUMBERS_BAD),
    "--weight-decay": (("0", "0.1"), RATES_BAD),
    "--per-device-train-batch-size": (("1", "8", "1024"), (*WHOLE_NUMBERS_BAD, "0", "1025", HUGE)),
    "--per-device-eval-batch-size": (("1", "8", "1024"), (*WHOLE_NUMBERS_BAD, "0", "1025", HUGE)),
    "--batching": (("packed", "padded"), ("", "Packed", "both")),
    "--max-tokens-per-device": (("1", "4096", HUGE, "auto"), (*WHOLE_NUMBERS_BAD, "0", "Auto")),
    "--gradient-checkpointing": (("auto", "on", "off"), ("", "yes", "ON")),
    "--rank-timeout": (("10", "1800", HUGE), (*WHOLE_NUMBERS_BAD, "9")),
    "--final-model": (("last", "best"), ("", "first")),
    "--resume": (("never", "auto", "empty"), ("", "none", "a_file", "a\udce4", "~nobody-here/x", "x" * 300)),
    "--gradient-accumulation-steps": (("1", "4", "1024"), (*WHOLE_NUMBERS_BAD, "0", "1025", HUGE)),
    "--logging-steps": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--eval-steps": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--save-steps": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--save-every": (("90s", "10min", "1.5h", "5 min"), ("", "0s", "10", "-1h", "min", "1e3s", "٣h", "9" * 5000 + "s")),
    "--save-total-limit": (("1", HUGE), (*WHOLE_NUMBERS_BAD, "0")),
    "--max-shard-size": (("5GB", "500MB", "1KB"), ("", "5", "0GB", "-1GB", "5 GB", "5gb", "GB", "5.5GB", "9" * 5000 + "GB", "٣GB")),
    "--local_rank": (("-1", "0", "7"), ("x", "", "1.5")),
    "--local-output-dir": (
        ("new", "new folder", "neü/🚀", "a:b", "-x", "{x}", "empty", "new/../other"),
        ("", " ", "full", "a_file", "a_file/x", "/dbfs/x", "/Volumes/x", "dbfs:/x", "~nobody-here/x", "a\0b", "a\udce4",
         "loop/x", "x" * 300),
    ),
    "--dbfs-output-dir": (
        ("pub", "neü/🚀 2", "empty/pub", "full/pub"),
        ("", "full", "a_file", "a_file/x", "dbfs:/x", "~nobody-here/y", "a\0b", "a\udce4", "loop/y", "x" * 300),
    ),
    "--deepspeed": ((), ("", "none.json", "full", "a_file", "a\0b", "x" * 300, "~nobody-here/ds.json", "broken.json")),
}  # fmt: skip
SWITCHES = (
    "--keep-truncated", "--trust-remote-code", "--bf16", "--no-bf16", "--fp16", "--no-fp16", "--force",
)  # fmt: skip
STRANGE = "--bf61 -- extra - --lr= -x --lr==1 --bf16=1 --keep-truncated=no --Lr \udce4".split()


@st.composite
def command_lines(draw: Any) -> tuple[dict[str, str], list[str]]:
    chosen = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=6, unique=True))
    if draw(st.integers(0, 9)):
        chosen = [*chosen, "--local-output-dir"]
    values = {}
    for flag in dict.fromkeys(chosen):
        good, bad = VALUES[flag]
        values[flag] = draw(st.sampled_from(good if good and draw(st.integers(0, 3)) else bad))
    return values, draw(st.lists(st.sampled_from(SWITCHES), max_size=2, unique=True))


def contradictions(values: dict[str, str], switches: list[str]) -> list[str]:
    """Texts that the message must contain for valid values that contradict each other, on one process without a GPU."""

    def value(flag: str, default: str) -> str:
        return values[flag] if flag in values and values[flag] in VALUES[flag][0] else default

    on = dict.fromkeys(("bf16", "fp16"))
    for switch in switches:  # the last one counts
        name = switch.removeprefix("--").removeprefix("no-")
        if name in on:
            on[name] = not switch.startswith("--no-")
    needed = []
    if value("--lr-scheduler-type", "constant") == "constant" and value("--warmup-steps", "0") != "0":
        needed.append("--warmup-steps")
    if value("--batching", "packed") == "padded" and value("--max-tokens-per-device", "auto") != "auto":
        needed.append("--max-tokens-per-device")
    every = value("--save-every", "")
    if every and (value("--save-steps", "") or value("--final-model", "last") == "best"):
        needed.append(f"--save-every {every}")
    if value("--rank-timeout", "1800") != "1800":  # there is no launcher
        needed.append("--rank-timeout")
    if on["fp16"]:
        needed.append("--bf16 and --fp16 exclude each other" if on["bf16"] else "fp16 needs a CUDA GPU")
    return needed


@pytest.fixture
def accepted_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TrainingOptions]:
    """Replaces `train` by its checks, in a folder with some files. Collects the accepted options."""
    accepted: list[TrainingOptions] = []

    def checked(options: TrainingOptions, request: object) -> dict[str, str]:
        if problems := problems_of(options):
            raise OptionsError(*problems)
        accepted.append(options)
        return {"status": "finished"}

    monkeypatch.setattr(trainer, "train", checked)
    monkeypatch.chdir(tmp_path)
    for folder in ("full", "empty"):
        (tmp_path / folder).mkdir()
    for file in ("full/model.safetensors", "a_file", "Ä B.json"):
        (tmp_path / file).touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken.json").write_text("{")
    return accepted


def invoke(arguments: list[str]) -> Result:
    result = CliRunner().invoke(trainer.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


@cases(quick=250, sweep=1500)
def test_options_are_accepted_or_reported_with_their_values_and_write_nothing(
    count: int, tmp_path: Path, accepted_options: list[TrainingOptions]
) -> None:
    before = sorted(tmp_path.rglob("*"))

    @fuzz(count, line=command_lines())
    @example(line=({}, []))
    def check(line: tuple[dict[str, str], list[str]]) -> None:
        values, switches = line
        accepted_options.clear()
        result = invoke([*(f"{flag}={value}" for flag, value in values.items()), *switches])
        wrong = [flag for flag, value in values.items() if value in VALUES[flag][1]]
        needed = wrong + contradictions(values, switches)
        if "--local-output-dir" not in values:
            needed.append("Missing option '--local-output-dir'")
        assert result.exit_code == (2 if needed else 0), result.output
        assert len(accepted_options) == (0 if needed else 1)
        # Unreadable values are reported without importing torch, which the check of the device needs.
        misread = "Invalid value" in result.output or "Missing option" in result.output
        for words in needed:
            assert words in result.output or (misread and "needs a CUDA GPU" in words), result.output
        for flag in wrong:
            shown = {values[flag]}
            with suppress(ValueError):
                shown.add(str(float(values[flag])))  # 1e999 is shown as inf
            if values[flag].isprintable() and values[flag].strip() and len(values[flag]) < 100:
                assert any(value in result.output for value in shown), result.output
        assert sorted(tmp_path.rglob("*")) == before


@cases(quick=50, sweep=200)
def test_a_malformed_command_line_is_refused_with_a_message(
    count: int, tmp_path: Path, accepted_options: list[TrainingOptions]
) -> None:
    words = st.sampled_from([*STRANGE, *VALUES, *SWITCHES, "1", "new"]) | st.text(max_size=8)

    @fuzz(count, line=st.lists(words, max_size=6))
    def check(line: list[str]) -> None:
        if "--help" in line:
            return
        accepted_options.clear()
        result = invoke(line)
        assert result.exit_code == (0 if accepted_options else 2)
        assert result.output.strip() or accepted_options


# --- DeepSpeed files ---------------------------------------------------------------------------------

SETTINGS = (
    "bf16", "fp16", "optimizer", "scheduler", "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "gradient_clipping", "steps_per_print", "wall_clock_breakdown", "checkpoint",
    "activation_checkpointing", "data_types", "comms_logger", "flops_profiler", "communication_data_type",
)  # fmt: skip
INNER = (
    "enabled", "stage", "params", "type", "lr", "betas", "eps", "weight_decay", "offload_optimizer", "offload_param", "device",
    "overlap_comm", "reduce_bucket_size", "stage3_gather_16bit_weights_on_model_save", "loss_scale", "load_universal",
)  # fmt: skip
scraps = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, 4, 8, 64, -1, 1.0, 1e-5, 1e9, 1e-3, "auto", "8", "3", "true", "", "AdamW", "Adam", "x",
     "cpu", "none", float("nan"), float("inf"), [], [1], {}, [0.9, 0.999], {"device": "cpu"}, {"lr": "auto"}, 10**30]
)  # fmt: skip


AUTOMATIC = (
    "train_micro_batch_size_per_gpu train_batch_size gradient_accumulation_steps gradient_clipping".split()
)


@st.composite
def deepspeed_files(draw: Any) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if draw(st.integers(0, 9)):
        config = dict.fromkeys(AUTOMATIC, "auto") | {"bf16": {"enabled": True}}
        config["zero_optimization"] = {"stage": 3}
    if draw(st.booleans()):
        config["optimizer"] = {
            "type": "AdamW",
            "params": dict.fromkeys(["lr", "weight_decay", "betas"], "auto"),
        }
    for _ in range(draw(st.integers(0, 3))):
        sections = [config, *(value for value in config.values() if isinstance(value, dict))]
        sections += [section["params"] for section in sections if isinstance(section.get("params"), dict)]
        section = draw(st.sampled_from(sections))
        key = draw(st.sampled_from(SETTINGS if section is config else INNER))
        if draw(st.integers(0, 3)):
            section[key] = copy.deepcopy(draw(scraps))
        else:
            section.pop(key, None)
    return json.loads(json.dumps(config))


@cases(quick=150, sweep=800)
@pytest.mark.usefixtures("one_rank")
def test_a_deepspeed_file_is_refused_or_agrees_with_the_options(count: int, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"

    @fuzz(count, config=deepspeed_files(), accumulation=st.sampled_from([1, 4]))
    def check(config: dict[str, Any], accumulation: int) -> None:
        path.write_text(json.dumps(config))
        paths = {"local_output_dir": str(tmp_path / "out"), "deepspeed": str(path)}
        options = TrainingOptions(**paths, gradient_accumulation_steps=accumulation)
        problems = problems_of(options)
        assert all(str(path) in problem or "CUDA" in problem for problem in problems), problems
        assert all(len(problem) < 3000 for problem in problems)
        if problems:
            return
        parsed = DeepSpeedConfig(filled(options))
        assert (parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps) == (
            8,
            accumulation,
        )
        assert parsed.train_batch_size == 8 * accumulation
        assert (parsed.scheduler_name, parsed.gradient_clipping) == (None, 1.0)
        if parsed.optimizer_name is not None:
            assert (parsed.optimizer_params["lr"], parsed.optimizer_params.get("weight_decay", 0)) == (
                1e-5,
                0,
            )
        assert not (tmp_path / "out").exists()
