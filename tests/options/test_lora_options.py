"""--lora and --quantize: the method's defaults, and every problem of them in one message."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from tests.conftest import problems_of, resolved
from training.errors import install_extra
from training.options.trainer_options import TrainingOptions


def options_of(**options: Any) -> TrainingOptions:
    return TrainingOptions(**{"local_output_dir": "OUTPUT"} | options)


@pytest.mark.parametrize(
    ("options", "rate", "alpha"),
    [
        ({}, 1e-5, None),
        ({"lora": 16}, 2e-4, 32.0),
        ({"lora": 8, "lora_alpha": 8.0, "lr": 3e-3}, 3e-3, 8.0),
        ({"lr": 2e-4}, 2e-4, None),
    ],
)
def test_learning_rate_and_alpha_follow_the_method_unless_they_are_typed(
    options: dict[str, Any], rate: float, alpha: float | None
) -> None:
    settings = resolved(options_of(**options))
    assert (settings.options.lr, settings.options.lora_alpha) == (rate, alpha)
    assert settings.lora == ("lora" in options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora": 10_000}, "--lora 10000: expected 0 to 1024"),
        ({"lora": 8, "lora_alpha": 1e300}, "--lora-alpha 1e+300: expected at most 10000; most adapters have"),
        ({"lora_alpha": 32.0}, "--lora-alpha 32.0: has no effect without --lora. Add --lora 16"),
        ({"lora_dropout": 0.1}, "--lora-dropout 0.1: has no effect without --lora"),
        ({"lora_targets": "q_proj"}, "--lora-targets q_proj: has no effect without --lora"),
        ({"lora": 8, "lora_targets": "q_proj,,v_proj"}, "--lora-targets q_proj,,v_proj: expected all, or names"),
        ({"quantize": "nf4"}, "--quantize nf4: weights in 4 bits cannot be trained, only adapters on them. Add --lora 16"),
        ({"lora": 8, "quantize": "nf4", "deepspeed": "config/ds_z3_bf16_config.json"},
         "--quantize nf4: DeepSpeed cannot train on weights in 4 bits. Leave out --deepspeed"),
    ],
)  # fmt: skip
def test_each_unusable_value_is_refused_with_what_to_type(options: dict[str, Any], words: str) -> None:
    [problem] = [text for text in problems_of(options_of(**options)) if words.split()[0] in text]
    assert words in problem


def test_several_problems_of_adapters_are_reported_together() -> None:
    problems = problems_of(options_of(lora_alpha=1.0, lora_dropout=0.5, quantize="nf4"))
    assert sum(text.startswith(("--lora", "--quantize")) for text in problems) == 3


def test_several_ranks_on_weights_in_4_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    [problem] = [text for text in problems_of(options_of(lora=8, quantize="nf4")) if "4 bits" in text]
    assert problem.endswith(
        "Type CUDA_VISIBLE_DEVICES=0 python -m training.trainer ..., or leave out --quantize"
    )


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    [problem] = [text for text in problems_of(options_of(lora=8, quantize="nf4")) if package in text]
    assert problem.endswith(
        f"needs the package {package}, which is not installed. Type {install_extra('lora')}"
    )
    assert not [text for text in problems_of(options_of()) if package in text]
