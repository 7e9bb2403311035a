"""Real runs of the trainer: ranks, ZeRO-3, bf16, and the folder they write."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    OPTConfig,
    TrainerCallback,
)

from tests.starts import ALONE, BF16, DEMO, FLOAT32, ROOT, changed_start, deepspeed, record, run, torchrun
from tests.storage.test_checkpoint import flip
from training.bench.waits import Wait, WaitsPerStep
from training.data.collator import DataCollatorForCompletionOnlyLM
from training.data.held_out import split_held_out
from training.data.prompt import CONTROL_TOKENS
from training.data.tokens import prepare_dataset
from training.errors import ModelError, OptionsError, TrainingError
from training.files import file_digest
from training.machine import local
from training.model import loading
from training.model.demo_model import model_folder
from training.model.tokenizer import load_tokenizer
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.run import exporting, final_model, preflight, prepare, steps
from training.storage import checkpoint
from training.trainer import train

SHARED = ROOT.parent / "shared"
ALPACA = SHARED / "data" / "alpaca_1500.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on two ranks."""
    folder = tmp_path_factory.mktemp("run") / "out"
    published = folder.parent / "published"
    launcher = deepspeed(2)
    result = run(
        launcher, *DEMO, "--deepspeed", BF16, "--max-steps", 6, "--logging-steps", 2,
        "--local-output-dir", folder, "--dbfs-output-dir", published,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    port = launcher[launcher.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "no shared memory is left behind"
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def test_two_zero3_ranks_in_bf16_write_a_folder_that_stock_transformers_loads(finished):
    model, loaded = AutoModelForCausalLM.from_pretrained(finished, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert type(model) is GPTJForCausalLM
    assert not any(loaded[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.config.use_cache
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [len(tokenizer) - 3 + i for i in range(3)]
    assert all(torch.isfinite(p).all() and p.numel() for p in model.parameters())
    assert record(finished)["precision"] == "bf16"
    weights = load_file(finished / "model.safetensors")
    assert weights["transformer.h.0.attn.q_proj.weight"].dtype == torch.bfloat16


def test_log_record_ledger_and_card_describe_the_run(finished):
    run_record, printed = record(finished), (finished / "stdout.txt").read_text()
    assert run_record["status"] == "finished"
    assert (run_record["world_size"], run_record["steps"]) == (2, 6)
    assert run_record["held_out_loss"]["after"] < run_record["held_out_loss"]["before"]
    assert run_record["versions"]["deepspeed"]
    assert printed.count("step 0/6  held-out loss") == printed.count("step 2/6  loss") == 1, (
        "only one rank logs"
    )
    assert "rate 1.00e-05" in printed
    assert printed.count("rows read") == 1
    assert "«" in printed
    assert "left" in printed
    saved = r"saved: training waited [\d.]+ s; [\d.]+ MiB in [\d.]+ s"
    assert re.search(rf"^{finished}/checkpoint-6 {saved}$", printed, re.MULTILINE)
    assert json.loads((finished / "ledger.json").read_text())["rows_kept"] > 4000
    card = (finished / "README.md").read_text()
    assert f"{run_record['held_out_loss']['after']:.4f}" in card
    assert "rows read" in card


def test_libraries_print_no_notices(finished):
    printed = (finished / "stdout.txt").read_text()
    assert printed.count("Setting accelerator to CPU") <= 2, (
        "by DeepSpeed's two processes that start the ranks"
    )
    assert not any(notice in printed for notice in ("gcc", "built successfully", "-laio"))


def test_tensorboard_holds_losses_and_learning_rate(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "runs"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss"} <= set(events.Tags()["scalars"])
    assert {event.step for event in events.Scalars("eval/loss")} == {0, 6}


def test_a_checkpoint_holds_no_model_and_the_exported_one_is_the_finished_one(finished, tmp_path):
    last = finished / "checkpoint-6"
    assert not list(last.rglob("*.safetensors"))
    parameters = sum(tensor.numel() for tensor in load_file(finished / "model.safetensors").values())
    files = checkpoint.read_manifest(last)["files"]
    written = sum(file["size"] for name, file in files.items() if name.startswith("global_step"))
    assert written == pytest.approx(12 * parameters, rel=0.02)
    exporting.export(last, tmp_path / "model")
    names = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "ledger.json"]
    for name in (*names, "trainer_state.json"):
        assert (tmp_path / "model" / name).read_bytes() == (finished / name).read_bytes(), name
    assert record(tmp_path / "model")["weights"] == record(finished)["weights"]
    assert record(finished)["weights"] == {names[0]: file_digest(finished / names[0])}


@pytest.mark.parametrize("moment", ["copy_files", "write_files", "place_files"])
def test_a_kill_while_the_model_is_written_leaves_nothing_that_looks_finished(
    finished, tmp_path, monkeypatch, moment
):
    """The last part of the run above, on one rank."""
    output, last = tmp_path / "out", tmp_path / "out" / "checkpoint-6"
    shutil.copytree(finished / last.name, last)
    settings = resolve(TrainingOptions(local_output_dir=str(output)), 1, "bf16")
    after = getattr(final_model, moment)

    def killed(*arguments: object) -> None:
        after(*arguments) if moment != "place_files" else None
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(final_model, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            final_model.write_final_model(settings, last)
    assert {file.name for file in output.iterdir()} == {last.name, final_model.UNFINISHED}
    chosen, weights = final_model.write_final_model(settings, last)
    assert (chosen, weights) == (last, record(finished)["weights"])
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert not (output / final_model.UNFINISHED).exists()


@pytest.mark.parametrize(
    "name", ["config.json", "global_step6/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
)
def test_a_damaged_best_checkpoint_does_not_become_the_model(finished, tmp_path, name):
    output = tmp_path / "out"
    shutil.copytree(finished / "checkpoint-6", output / "checkpoint-6")
    flip(output / "checkpoint-6" / name)
    settings = resolve(TrainingOptions(local_output_dir=str(output), final_model="best"), 1, "bf16")
    with pytest.raises(TrainingError, match=rf"checkpoint-6 cannot be used, because {name} has changed"):
        final_model.write_final_model(settings, output / "checkpoint-9")
    assert [folder.name for folder in output.iterdir()] == ["checkpoint-6"]


def test_the_published_copy_is_the_model_without_checkpoints(finished):
    published = finished.parent / "published"
    model = ("model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja")
    for name in (*model, "README.md"):
        assert (published / name).read_bytes() == (finished / name).read_bytes(), name
    assert not list(published.glob("checkpoint-*"))


def test_a_second_run_into_the_same_folder_is_refused_and_changes_no_file(finished):
    """Only rank 0 checks the output folder; the other rank waits for it and must end with it."""
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    result = run(deepspeed(2), *DEMO, "--deepspeed", BF16, "--max-steps", 1, "--local-output-dir", finished)
    assert result.returncode != 0
    assert result.stdout.count("is not empty") == 1
    for words in ("Traceback (most recent call last)", "still running", "TCPStore"):
        assert words not in result.stdout
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_torchrun_with_deepspeed_config_and_a_model_folder_trains_the_same_model(finished, tmp_path):
    folder = tmp_path / "out"
    demo_as_a_folder = ["--input-model", model_folder("demo"), *DEMO[2:]]
    result = run(
        torchrun(2), *demo_as_a_folder, "--max-steps", 6, "--logging-steps", 2, "--local-output-dir", folder,
        "--deepspeed", "--deepspeed_config", BF16, "--max-shard-size", "1MB",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert record(folder)["held_out_loss"] == record(finished)["held_out_loss"]
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2, "each rank writes one"
    assert record(folder)["weights"] == {file.name: file_digest(file) for file in files}
    ours = load_file(files[0]) | load_file(files[1])
    theirs = load_file(finished / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_bad_data_ends_the_run_before_a_model_is_loaded(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", \n')
    result = run(ALONE, *DEMO[:2], "--training-dataset", file, "--local-output-dir", tmp_path / "out")
    assert result.returncode == 2
    assert f"{file}, line 2: broken JSON" in result.stdout
    assert "Traceback (most recent call last)" not in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_error_during_pythons_shutdown_does_not_fail_a_finished_run(tmp_path, monkeypatch):
    code = (
        "import atexit, os\n"
        "if 'DOLLY_SUPERVISED' in os.environ and 'training.trainer' in sys.orig_argv: atexit.register(os.abort)\n"
    )
    monkeypatch.setenv("PYTHONPATH", changed_start(tmp_path, code)["PYTHONPATH"])
    result = run(ALONE, *DEMO, "--max-steps", 1, "--local-output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stdout
    assert record(tmp_path / "out")["status"] == "finished"


@pytest.mark.slow
def test_a_port_in_use_is_reported_with_what_to_type(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        variables = os.environ | alone | {"MASTER_PORT": str(port)}
        options = [*DEMO, "--deepspeed", BF16, "--local-output-dir", str(tmp_path / "out")]
        command = [*ALONE, *options]
        result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert f"port {port} (MASTER_PORT) is in use" in result.stderr
    assert "Traceback" not in result.stderr


def train_demo(folder: Path, **changes: object) -> dict:
    """A short run on the demo in this process; `changes` are options."""
    options = {"input_model": "demo", "training_dataset": "demo", "test_size": 50, "logging_steps": 1}
    return train(TrainingOptions(**options | {"local_output_dir": str(folder)} | changes))


def logged(folder: Path, name: str) -> list[float]:
    """All logged values of one figure, in order."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.mark.slow
def test_thirty_packed_and_thirty_padded_steps_have_the_same_losses(tmp_path):
    losses = {}
    for batching in ("packed", "padded"):
        folder = tmp_path / batching
        train_demo(
            folder, max_steps=30, save_steps=30, lr=1e-3, gradient_accumulation_steps=2, batching=batching
        )
        losses[batching] = logged(folder, "loss") + logged(folder, "eval_loss")
        assert logged(folder, "real_token_share")[0] == 1.0 or batching == "padded"
    assert len(losses["packed"]) == 32
    assert losses["packed"] == pytest.approx(losses["padded"], abs=1e-4)
    assert losses["packed"][-1] < losses["packed"][-2] - 1, "the model learns"


@pytest.fixture(scope="module")
def watched_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[object, tuple[Path, list[list[Wait]]]]:
    """By token budget: the folder of a run of 4 steps, and the waits of each but the last. Each step logs."""
    runs = {}
    build = steps.build_trainer
    for budget in ("auto", 150):
        folder = tmp_path_factory.mktemp(str(budget))
        watch = WaitsPerStep(torch.device("cpu"))

        def build_watched(*args, watch=watch, **kwargs):
            trainer = build(*args, **kwargs)
            trainer.add_callback(watch)
            return trainer

        with pytest.MonkeyPatch.context() as patch, closing(watch):
            patch.setattr(steps, "build_trainer", build_watched)
            train_demo(
                folder / "out", max_steps=4, lr=1e-3, gradient_accumulation_steps=2, eval_steps=100,
                max_tokens_per_device=budget, gradient_checkpointing="on",
            )  # fmt: skip
        runs[budget] = folder / "out", watch.steps()
    return runs


def test_a_token_budget_does_not_change_the_training(watched_runs):
    losses = {
        budget: logged(folder, "loss") + logged(folder, "grad_norm")
        for budget, (folder, _) in watched_runs.items()
    }
    assert losses[150] == pytest.approx(losses["auto"], rel=1e-4)


def test_our_code_waits_for_the_device_at_most_twice_in_a_step_that_logs(watched_runs):
    """Once for the guard against NaN and signals, once for the speed figures; also with accumulation and splits."""
    for _, per_step in watched_runs.values():
        assert len(per_step) == 3
        for waits in per_step:
            places = [wait.place for wait in waits if wait.owner == "training"]
            # The loss compares its factor with 1 on a CPU only.
            on_gpu = [place for place in places if not re.match(r"training\.model\.loss:\d+ backward", place)]
            assert [place.split()[-1] for place in on_gpu] == ["on_step_end", "log"]


def test_a_token_budget_below_the_longest_row_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="--max-tokens-per-device 20 is less than the length"):
        train_demo(tmp_path / "out", max_tokens_per_device=20)


def small_host(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Makes this machine report `gib` of free host memory."""
    found = local.this_machine
    monkeypatch.setattr(
        local, "this_machine", lambda *args, **more: replace(found(*args, **more), host_gib=gib)
    )


def test_a_run_that_does_not_fit_is_refused_before_weights_load_unless_forced(tmp_path, monkeypatch, caplog):
    small_host(monkeypatch, 0.3)
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(OptionsError, match=r"host memory: .* more than the 0\.3 of this machine"):
        train_demo(tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out" / "run.json").exists()
    monkeypatch.undo()
    small_host(monkeypatch, 0.3)
    with caplog.at_level("WARNING", logger="training"):
        record = train_demo(tmp_path / "out", max_steps=1, force=True)
    assert record["status"] == "finished"
    assert "--force: training although the plan says host memory" in caplog.text


def test_ranks_on_one_host_share_its_memory_even_with_separate_launchers(tmp_path, monkeypatch):
    small_host(monkeypatch, 4)
    options = TrainingOptions(
        input_model="demo", training_dataset="demo", test_size=50, local_output_dir=str(tmp_path / "out")
    )
    _, prepared = prepare.prepare(resolve(options, 1, "fp32"))
    run = resolve(options, 8, "fp32")
    monkeypatch.setattr(preflight, "ranks_on_this_host", lambda: 2)
    assert preflight.check_plan(run, prepared, None, [])
    monkeypatch.setattr(preflight, "ranks_on_this_host", lambda: 8)
    with pytest.raises(OptionsError, match=r"host memory: .* more than the 4\.0 of this machine"):
        preflight.check_plan(run, prepared, None, [])


def test_too_little_memory_while_loading_is_not_reported_as_a_model_error(tmp_path, monkeypatch):
    def load(*args: object, **kwargs: object) -> None:
        raise ModelError("demo: no weights could be loaded") from torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "load_model", load)
    with pytest.raises(torch.OutOfMemoryError):
        train_demo(tmp_path / "out", max_steps=1)


def memory_choices(record: dict) -> dict:
    """The plan's choices for a step's memory."""
    names = ("gradient_checkpointing", "max_tokens_per_device", "batching", "whole_blocks")
    return {name: record["decided"][name] for name in names}


def test_auto_checkpointing_is_on_only_if_memory_is_short_and_a_resume_keeps_it(tmp_path, monkeypatch):
    roomy = train_demo(tmp_path / "roomy", max_steps=1)
    assert memory_choices(roomy) == {
        "gradient_checkpointing": False,
        "max_tokens_per_device": None,
        "batching": "packed",
        "whole_blocks": False,
    }
    assert roomy["decided"]["background_saves"] is True
    small_host(monkeypatch, 1.1)
    train_tight = partial(train_demo, tmp_path / "tight", per_device_train_batch_size=512)
    tight = train_tight(max_steps=1)
    assert tight["decided"]["gradient_checkpointing"] is True
    monkeypatch.undo()
    assert memory_choices(train_tight(max_steps=2, resume="auto")) == memory_choices(tight)
    typed = {"gradient_checkpointing": "off", "max_tokens_per_device": 4096}
    choices = memory_choices(train_tight(max_steps=3, resume="auto", **typed))
    assert choices == typed | {"gradient_checkpointing": False, "batching": "packed", "whole_blocks": False}


def test_each_disk_is_checked_for_the_files_that_it_will_hold(tmp_path, monkeypatch):
    needed = {}
    monkeypatch.setattr(
        preflight, "disk_problems", lambda needs, labels, *_: needed.update(needs) or ["full"]
    )
    with pytest.raises(OptionsError, match="full"):
        train_demo(tmp_path / "out", max_steps=1, dbfs_output_dir=str(tmp_path / "copy"))
    checkpoints, model = needed[tmp_path / "out" / "checkpoints"], needed[tmp_path / "out" / "model"]
    assert checkpoints == pytest.approx(3 * model, rel=0.01), "float32 weights and two moments of AdamW"
    assert needed[tmp_path / "copy"] == model
    assert len(needed) == 4, "the fourth is the cache"


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("config", "batching"),
    [
        (GPTNeoXConfig(**SMALL, intermediate_size=64), "packed"),
        (OPTConfig(**SMALL, word_embed_proj_dim=32, ffn_dim=64), "length"),
    ],
    ids=["pythia keeps documents apart", "opt does not"],
)
def test_another_architecture_is_packed_only_if_it_keeps_documents_apart(
    config, batching, tmp_path, caplog, monkeypatch
):
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(model_folder("demo"))
    config.vocab_size = len(tokenizer)
    tokenizer.save_pretrained(base)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    with caplog.at_level("INFO", logger="training"):
        run_record = train_demo(tmp_path / "out", input_model=str(base), max_steps=2)
    assert run_record["decided"]["batching"] == batching
    warnings = [entry.message for entry in caplog.records if entry.levelname == "WARNING"]
    if batching == "packed":
        assert not warnings
        return
    (warning,) = warnings
    assert re.fullmatch(
        rf"rows of {base} are padded, not packed: its attention crosses documents: .* The devices compute "
        r"\d\.\d times as many tokens",
        warning,
    )
    loaded = []
    monkeypatch.setattr(steps, "load_model", lambda *args: loaded.append(args))
    with pytest.raises(
        OptionsError, match=r"rows of .* cannot be packed: .* Lower --per-device-train-batch-size"
    ):
        train_demo(tmp_path / "split", input_model=str(base), max_steps=2, max_tokens_per_device=4096)
    assert not loaded, "refused before a weight is loaded"


def gradients(folder: Path, rows_at_once: int, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The gradients before the first optimizer step of a real run, by parameter."""
    found: dict[str, torch.Tensor] = {}

    def grab(self, args, state, control, model=None, **kwargs):
        if not found:
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    monkeypatch.setattr(TrainerCallback, "on_pre_optimizer_step", grab)
    sizes = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": accumulation}
    train_demo(folder, test_size=20, max_steps=1, **sizes)
    return found


def test_eight_rows_in_one_batch_and_eight_accumulated_give_equal_gradients(tmp_path, monkeypatch):
    at_once = gradients(tmp_path / "a", 8, 1, monkeypatch)
    accumulated = gradients(tmp_path / "b", 1, 8, monkeypatch)
    assert at_once.keys() == accumulated.keys()
    assert at_once
    for name, gradient in at_once.items():
        difference = (gradient - accumulated[name]).norm() / gradient.norm()
        assert difference < 1e-5, f"{name}: {difference}"


def held_out_loss(folder: Path, rows, tokenizer) -> float:
    """Stock transformers' loss per response token on the held-out rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    collator = DataCollatorForCompletionOnlyLM(pad_token_id=tokenizer.pad_token_id)
    total = tokens = 0.0
    with torch.inference_mode():
        for begin in range(0, len(rows), 8):
            batch = collator([rows[i] for i in range(begin, min(begin + 8, len(rows)))])
            count = (batch["labels"][:, 1:] != -100).sum().item()
            total += model(**batch).loss.item() * count
            tokens += count
    return total / tokens


@pytest.mark.slow
@pytest.mark.skipif(not ALPACA.exists(), reason="needs the Alpaca sample")
def test_a_gptj_learns_alpaca_on_two_ranks_and_reloads_to_the_same_held_out_loss(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "out"
    tokenizer = load_tokenizer(str(SHARED / "gpt2-bpe"))
    torch.manual_seed(0)
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": 2048}
    config = GPTJConfig(vocab_size=50400, bos_token_id=50256, eos_token_id=50256, **sizes)
    GPTJForCausalLM(config).save_pretrained(base)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SHARED / "gpt2-bpe" / name, base)
    result = run(
        torchrun(2), "--input-model", base, "--training-dataset", ALPACA, "--test-size", 40, "--deepspeed", FLOAT32,
        "--max-steps", 20, "--lr", 3e-3, "--local-output-dir", folder, timeout=1500,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    losses = record(folder)["held_out_loss"]
    assert losses["after"] < 0.8 * losses["before"]
    rows, _ = prepare_dataset(str(ALPACA), AutoTokenizer.from_pretrained(folder), 2048)
    _, held_out = split_held_out(rows, 40, 42)
    assert held_out_loss(folder, held_out, tokenizer) == pytest.approx(losses["after"], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_while_loading_a_rank_holds_its_shard_and_a_layer_but_not_the_model(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder("demo"))
    config = GPTJConfig(
        n_embd=2048, n_layer=6, n_head=16, rotary_dim=64, n_positions=256, vocab_size=len(tokenizer),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = GPTJForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole = sum(p.numel() for p in model.parameters()) * 2 / 2**30
    layer = sum(p.numel() for p in model.transformer.h[0].parameters()) * 2 / 2**30
    del model
    result = run(torchrun(2, "tests.run.zero3_loading"), tmp_path)
    assert result.returncode == 0, result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("rank ")]
    ranks = [json.loads(line.split(maxsplit=2)[2]) for line in lines]
    assert len(ranks) == 2
    for figures in ranks:
        assert figures["shard"] == pytest.approx(whole / 2, rel=0.05)
        assert figures["peak"] < figures["shard"] + 2 * layer, f"{figures}, the model is {whole:.2f} GiB"
        assert figures["after"] < figures["shard"] + layer
