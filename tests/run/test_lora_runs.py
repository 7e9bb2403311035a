"""A LoRA run on one device: what it saves, resumes from and leaves; and an adapter folder in the place of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.run.test_kills import history
from training.data.prompt import CONTROL_TOKENS
from training.errors import ModelError, OptionsError, TrainingError
from training.model.generation import load_model_tokenizer_for_generate
from training.model.loading import load_model
from training.model.tokenizer import load_tokenizer
from training.options.trainer_options import TrainingOptions
from training.plan.request import model_of
from training.run import final_model
from training.run.exporting import export
from training.storage import checkpoint
from training.storage.copy import publish
from training.storage.record import finished_run
from training.tracking.mlflow_model import log_finished
from training.trainer import train

peft = pytest.importorskip("peft")

COMMON: dict[str, Any] = {
    "training_dataset": "demo",
    "test_size": 8,
    "per_device_train_batch_size": 2,
    "lr": 1e-2,
    "lora": 4,
    "lora_dropout": 0.1,
    "bf16": True,
    "logging_steps": 1,
    "save_total_limit": 100,
}


def lora_run(output: Path, base: Path, **options: Any) -> dict[str, Any]:
    chosen = {"max_steps": 4, "save_steps": 2, "input_model": str(base)} | options
    return train(TrainingOptions(**COMMON | chosen | {"local_output_dir": str(output)}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J, which has a head with a bias, in a folder of its own."""
    from training.model.demo_model import model_folder

    return Path(shutil.copytree(model_folder("demo"), tmp_path_factory.mktemp("base") / "gptj"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("lora") / "out"
    lora_run(output, base)
    return output


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The folder of that run, as if it had been stopped after step 2."""
    output = tmp_path / "stopped"
    output.mkdir()
    shutil.copytree(finished / "checkpoint-2", output / "checkpoint-2")
    for name in ("ledger.json", "metrics.jsonl"):
        shutil.copy(finished / name, output)
    record = json.loads((finished / "run.json").read_text()) | {"status": "stopped"}
    (output / "run.json").write_text(json.dumps(record))
    return output


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_checkpoint_holds_what_is_trained_and_the_record_names_the_base(finished: Path, base: Path) -> None:
    place = finished / "checkpoint-4"
    assert checkpoint.problems_of(place) == []
    assert not {"model.safetensors", "adapter_config.json"} & files(place)
    trained = load_file(place / "trained.safetensors")
    assert {"transformer.wte.new_rows", "lm_head.new_rows", "lm_head.new_bias"} < trained.keys()
    assert all("lora_" in name or ".new_" in name for name in trained)
    numbers = sum(tensor.numel() for tensor in trained.values())
    size = sum((place / name).stat().st_size for name in ("trained.safetensors", "optimizer.pt"))
    assert 12 * numbers < size < 12 * numbers + 50_000, "two moments and the weights, and the files' headers"
    recorded = json.loads((finished / "run.json").read_text())["base"]
    assert (recorded["model"], recorded["revision"]) == (str(base), None)
    assert len(recorded["sha256"]) == 64


def test_a_resumed_run_continues_bit_for_bit_in_bf16(stopped: Path, finished: Path, base: Path) -> None:
    lora_run(stopped, base, resume="auto")
    assert history(stopped) == history(finished)
    compared = ("trained.safetensors", "optimizer.pt", "scheduler.pt")
    for name in (*(f"checkpoint-4/{name}" for name in compared), "model.safetensors"):
        assert (stopped / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_resume_on_another_base_is_refused_with_both_checksums(
    stopped: Path, base: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "same name" / base.name))
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.h.0.mlp.fc_in.weight"][3, 5] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    before = files(stopped)
    with pytest.raises(OptionsError) as refused:
        lora_run(stopped, other, resume="auto")
    former = json.loads((stopped / "run.json").read_text())["base"]["sha256"]
    assert f"the base model was {base} with weights of SHA-256 {former}, but is now {other} with" in str(
        refused.value
    )
    assert files(stopped) == before


@pytest.mark.slow
def test_a_base_that_was_moved_is_found_by_a_resume_and_afterwards_by_an_export(
    stopped: Path, finished: Path, base: Path, tmp_path: Path
) -> None:
    moved, gone = tmp_path / "moved", str(tmp_path / "gone")
    shutil.copytree(base, moved)
    lora, record = stopped / "checkpoint-2" / "lora.json", stopped / "run.json"
    facts, run = json.loads(lora.read_text()), json.loads(record.read_text())
    lora.write_text(json.dumps(facts | {"base": facts["base"] | {"model": gone}}))
    run["base"]["model"] = run["options"]["input_model"] = gone
    record.write_text(json.dumps(run))
    manifest = checkpoint.read_manifest(stopped / "checkpoint-2")
    manifest["files"] |= checkpoint.digests(stopped / "checkpoint-2", ["lora.json"])
    checkpoint.write_manifest(
        stopped / "checkpoint-2", manifest["eval_loss"], manifest["model"], manifest["files"]
    )
    lora_run(stopped, moved, resume="auto")
    assert (stopped / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    config = json.loads((stopped / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)
    export(
        stopped / "checkpoint-2", tmp_path / "model"
    )  # run.json names the folder to which the base was moved
    export(finished / "checkpoint-2", tmp_path / "expected")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("rank", [0, 8])
def test_force_does_not_load_an_adapter_into_a_run_of_another_kind_or_rank(
    stopped: Path, base: Path, rank: int
) -> None:
    dropout = {} if rank else {"lora_dropout": 0.0}
    with pytest.raises(OptionsError, match=r"checkpoint-2 was written with --lora 4, .* Type --lora 4"):
        lora_run(stopped, base, resume="auto", force=True, lora=rank, **dropout)


def test_force_with_other_targets_is_refused_and_the_record_unchanged(stopped: Path, base: Path) -> None:
    before = (stopped / "run.json").read_bytes()
    with pytest.raises(
        OptionsError, match=r"was written with --lora-targets all, .* Type --lora-targets all"
    ):
        lora_run(stopped, base, resume="auto", force=True, lora_targets="q_proj")
    assert (stopped / "run.json").read_bytes() == before


def test_the_finished_folder_is_a_stock_model_and_its_adapter_has_the_same_logits_in_peft(
    finished: Path, base: Path
) -> None:
    merged, loaded = AutoModelForCausalLM.from_pretrained(finished, output_loading_info=True, dtype="auto")
    assert not any(loaded[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert merged.dtype == torch.bfloat16
    folder = finished / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    grown = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    grown.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ours = peft.PeftModel.from_pretrained(grown, folder).eval()
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = tokenizer("Say blue, then name a river.", return_tensors="pt")["input_ids"]
    control = torch.tensor([tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))])
    ids = torch.cat([words, control], dim=1)
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(words).logits
        expected = merged.float()(ids).logits
        logits = ours(ids).logits
        assert torch.equal(logits, auto(ids).logits)
    rounding = (logits - expected).abs().max()  # the merged weights are rounded to bf16
    change = (expected[:, : words.shape[1], : before.shape[-1]] - before).abs().max()
    print(f"merged against peft: {rounding:.1e}; the adapter changes logits by {change:.1e}")
    assert rounding < 0.03 < 0.3 < change


def test_an_export_is_the_finished_model_and_needs_the_base_of_the_run(
    finished: Path, stopped: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(finished / "checkpoint-4", tmp_path / "model")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                 "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):  # fmt: skip
        assert (tmp_path / "model" / name).read_bytes() == (finished / name).read_bytes(), name
    lora = json.loads((stopped / "checkpoint-2" / "lora.json").read_text())
    assert lora["base"]["model"] == str(base)
    monkeypatch.setattr("training.run.merging.identify", lambda name: lora["base"] | {"sha256": "0" * 64})
    with pytest.raises(ModelError, match=f"the base model was {base} with weights of SHA-256 .* is now"):
        export(stopped / "checkpoint-2", tmp_path / "other base")
    assert not (tmp_path / "other base").exists()


def test_a_published_copy_has_the_adapter_and_a_changed_one_is_written_again(
    finished: Path, tmp_path: Path
) -> None:
    target = tmp_path / "published"
    written = publish(finished, str(target))
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "run.json"} < set(written)
    for name in files(target) - {"manifest.json"}:
        assert (target / name).read_bytes() == (finished / name).read_bytes(), name
    assert publish(finished, str(target)) == []
    (target / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    assert publish(finished, str(target)) == ["adapter/adapter_model.safetensors", "run.json"]
    assert finished_run(target)["weights"].keys() == {
        "adapter/adapter_model.safetensors",
        "model.safetensors",
    }


def test_an_adapter_folder_answers_as_the_merged_model(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    merged, _ = load_model_tokenizer_for_generate(str(finished), torch.bfloat16, "cpu")
    model, tokenizer = load_model_tokenizer_for_generate(str(copy), torch.bfloat16, "cpu")
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_adapters_on_an_adapter_are_refused_before_training_with_the_model_to_name(
    finished: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionsError, match=f"Type --input-model {finished}, the merged model of its run"):
        lora_run(tmp_path / "out", finished / "adapter", max_steps=1)
    foreign = shutil.copytree(finished / "adapter", tmp_path / "foreign")
    with pytest.raises(OptionsError, match=r"foreign: it is a LoRA adapter, .* Merge it into its base"):
        lora_run(tmp_path / "out", foreign, max_steps=1)
    assert not (tmp_path / "out" / "run.json").exists()
    planned = TrainingOptions(
        input_model=str(foreign), training_dataset="demo", lora=4, local_output_dir=str(tmp_path / "out")
    )
    with pytest.raises(OptionsError, match=r"foreign: it is a LoRA adapter"):
        model_of(planned)


@pytest.mark.slow
def test_a_foreign_adapter_without_a_tokenizer_is_trained_further_with_every_weight(
    base: Path, tmp_path: Path
) -> None:
    foreign = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(
        foreign, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    folder = tmp_path / "foreign"
    model.save_pretrained(folder)
    full = {"lora": 0, "lora_dropout": 0.0, "lr": 1e-4, "max_steps": 1, "save_steps": 1}
    lora_run(tmp_path / "out", folder, **full)
    expected = load_model(str(folder), load_tokenizer(str(base)), torch.float32, 0)
    trained = load_file(tmp_path / "out" / "model.safetensors")
    name = "transformer.h.0.attn.q_proj.weight"
    distance = (trained[name].float() - expected.state_dict()[name]).abs().max()
    first = (expected.state_dict()[name] - load_file(base / "model.safetensors")[name]).abs().max()
    assert 0 < distance < 0.1 * first, "a step changes it less than the foreign adapter did"


def hub_base(cache: Path, base: Path, commit: str) -> Path:
    """`base` as the Hub's cache has it after the download of the model some/base at this commit."""
    model = cache / "hub" / "models--some--base"
    shutil.copytree(base, model / "snapshots" / commit)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    return model


@pytest.mark.slow
def test_a_base_on_the_hub_is_recorded_and_merged_at_its_commit_and_a_newer_one_is_refused(
    base: Path, tmp_path: Path
) -> None:
    first, second = "a" * 40, "b" * 40
    model = hub_base(Path(HF_HOME), base, first)
    try:
        output = tmp_path / "out"
        record = lora_run(output, Path("some/base"), max_steps=1, save_steps=1)
        assert record["base"] == {"model": "some/base", "revision": first, "sha256": None}
        config = json.loads((output / "adapter" / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", first)
        assert f"(revision {first})" in (output / "README.md").read_text()
        hub_base(Path(HF_HOME), base, second)
        tensors = load_file(model / "snapshots" / second / "model.safetensors")
        save_file({name: 2 * tensor for name, tensor in tensors.items()},
                  model / "snapshots" / second / "model.safetensors", {"format": "pt"})  # fmt: skip
        export(output / "checkpoint-1", tmp_path / "model")
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
            output / "model.safetensors"
        ).read_bytes()
        answering, _ = load_model_tokenizer_for_generate(str(output / "adapter"), torch.bfloat16, "cpu")
        merged = load_file(output / "model.safetensors")
        assert all(torch.equal(tensor, merged[name]) for name, tensor in answering.state_dict().items())
        words = (
            f"the base model was some/base at revision {first}, but is now some/base at revision {second}. To get it again, "
            f"type hf download some/base --revision {first} --local-dir FOLDER"
        )
        with pytest.raises(OptionsError, match=words):
            lora_run(output, Path("some/base"), max_steps=2, save_steps=1, resume="auto")
    finally:
        shutil.rmtree(model)


def test_an_adapter_on_the_hub_answers_on_its_base_and_needs_no_tokenizer_of_its_own(
    finished: Path, base: Path
) -> None:
    models = [hub_base(Path(HF_HOME), base, "a" * 40)]
    adapter = Path(HF_HOME) / "hub" / "models--some--adapter"
    models.append(adapter)
    try:
        snapshot = adapter / "snapshots" / ("c" * 40)
        shutil.copytree(finished / "adapter", snapshot)
        edited = json.loads((snapshot / "adapter_config.json").read_text())
        edited |= {"base_model_name_or_path": "some/base", "revision": None}
        (snapshot / "adapter_config.json").write_text(json.dumps(edited))
        (adapter / "refs").mkdir()
        (adapter / "refs" / "main").write_text("c" * 40)
        merged = load_file(finished / "model.safetensors")
        model, tokenizer = load_model_tokenizer_for_generate("some/adapter", torch.bfloat16, "cpu")
        assert all(torch.equal(tensor, merged[name]) for name, tensor in model.state_dict().items())
        for file in snapshot.glob("*token*"):
            file.unlink()
        _, other = load_model_tokenizer_for_generate("some/adapter", torch.bfloat16, "cpu")
        assert other.get_vocab() == tokenizer.get_vocab()
    finally:
        for folder in models:
            shutil.rmtree(folder)


@pytest.mark.slow
def test_a_base_that_is_gone_at_the_end_is_reported_and_the_run_ends_once_it_is_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, away = (Path(tmp_path / name) for name in ("own", "away"))
    shutil.copytree(base, own)
    write = final_model.write_final_model

    def without_base(*arguments: Any) -> Any:
        own.rename(away)
        return write(*arguments)

    with monkeypatch.context() as moved:
        moved.setattr(final_model, "write_final_model", without_base)
        with pytest.raises(
            TrainingError, match=f"its last step, 1: .*: its base model is gone: there is no folder {own}"
        ):
            lora_run(tmp_path / "out", own, max_steps=1, save_steps=1)
    assert not (tmp_path / "out" / "config.json").exists()
    away.rename(own)
    assert lora_run(tmp_path / "out", own, max_steps=1, save_steps=1, resume="auto")["status"] == "finished"


@pytest.mark.slow
def test_the_best_checkpoint_becomes_the_model(finished: Path, stopped: Path, base: Path) -> None:
    manifest = checkpoint.read_manifest(stopped / "checkpoint-2")
    checkpoint.write_manifest(stopped / "checkpoint-2", 0.1, manifest["model"], manifest["files"])
    record = lora_run(stopped, base, resume="auto", final_model="best")
    assert (record["steps"], record["model_of_step"]) == (4, 2)
    trained = load_file(stopped / "checkpoint-2" / "trained.safetensors")
    rows = load_file(stopped / "model.safetensors")["transformer.wte.weight"][1024:]
    assert torch.equal(rows, trained["transformer.wte.new_rows"].to(rows.dtype))
    assert not torch.equal(rows, load_file(finished / "model.safetensors")["transformer.wte.weight"][1024:])


def test_a_checkpoint_is_not_taken_for_a_model(finished: Path) -> None:
    place = finished / "checkpoint-2"
    with pytest.raises(
        ModelError, match=f"those of an adapter, without the base. Type .* --checkpoint {place}"
    ):
        load_model_tokenizer_for_generate(str(place))


@pytest.mark.slow
def test_a_run_on_4_bits_merges_into_a_fresh_base_and_answers_samples(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "prompts.txt").write_text("Say red.\n")
    output = tmp_path / "out"
    record = lora_run(
        output, base, quantize="nf4", max_steps=2, save_steps=1, sample_prompts=str(tmp_path / "prompts.txt")
    )  # fmt: skip
    assert record["status"] == "finished"
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert "in 4 bits during training" in (output / "README.md").read_text()
    assert [json.loads(line)["step"] for line in (output / "samples.jsonl").read_text().splitlines()] == [
        0,
        2,
    ]
    tensors, trained = load_file(output / "model.safetensors"), load_file(
        output / "checkpoint-2" / "trained.safetensors"
    )  # fmt: skip
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "transformer.h.1.mlp.fc_out"
    a, b = (trained[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
    whole = load_file(base / "model.safetensors")[f"{name}.weight"].to(torch.bfloat16).float()
    assert torch.equal(tensors[f"{name}.weight"], (whole + 2.0 * (b @ a)).to(torch.bfloat16))


@pytest.mark.slow
def test_mlflow_gets_the_merged_model_without_its_adapter(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    uri = log_finished(finished)
    model = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "downloaded")))
    [weights] = model.rglob("model.safetensors")
    assert weights.read_bytes() == (finished / "model.safetensors").read_bytes()
    assert not [*model.rglob("adapter_config.json"), *model.rglob("adapter_model.safetensors")]
