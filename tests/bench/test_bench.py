"""The benchmark compares recipes on the same rows and weights, and their gradients agree."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from click.testing import CliRunner

from tests.conftest import jsonl, rows_of
from training.bench.__main__ import main
from training.bench.shares import (
    RECIPES,
    computed_tokens,
    global_shares,
    real_token_shares,
    slowest_share,
    typical_steps,
)

ALPACA_LENGTHS = json.loads((Path(__file__).parents[1] / "alpaca_lengths.json").read_text())


def test_padded_rows_are_counted_up_to_the_next_multiple_of_eight():
    assert computed_tokens([3, 9, 4], packed=False) == 3 * 16
    assert computed_tokens([3, 9, 4], packed=True) == 16


def test_a_step_waits_for_the_share_with_the_most_computed_tokens():
    lengths = [10, 10, 10, 30, 1]
    assert slowest_share([[0, 1, 2], [3, 4]], lengths, packed=False) == [3, 4]  # 2 x 32 against 3 x 16
    assert slowest_share([[0, 1, 2], [3]], [10, 11, 10, 30], packed=True) == [0, 1, 2]


@pytest.mark.parametrize("world_size", [1, 8])
def test_every_recipe_computes_the_same_rows_in_every_step(world_size):
    steps = {
        recipe: [sorted(row for share in shares for row in share) for shares in
                 global_shares(recipe, ALPACA_LENGTHS, 8, world_size)]
        for recipe in RECIPES
    }  # fmt: skip
    assert steps["dolly"] == steps["stock"] == steps["packed"] == steps["packed_checkpointed"]
    assert len(steps["dolly"]) == len(ALPACA_LENGTHS) // (8 * world_size)


def test_a_few_typical_steps_cost_as_much_padding_as_the_epoch():
    shares = global_shares("dolly", ALPACA_LENGTHS, 8, 8)

    def cost(steps):
        computed = [
            computed_tokens(
                [ALPACA_LENGTHS[row] for row in slowest_share(shares[i], ALPACA_LENGTHS, False)], False
            )
            for i in steps
        ]
        return sum(computed) / sum(ALPACA_LENGTHS[row] for i in steps for share in shares[i] for row in share)

    assert cost(typical_steps(shares, ALPACA_LENGTHS, 4)) == pytest.approx(cost(range(len(shares))), rel=0.05)
    assert sorted(typical_steps(shares, ALPACA_LENGTHS, 1000)) == list(range(len(shares)))


def test_a_third_of_dollys_computed_tokens_on_alpaca_are_real_and_over_98_percent_of_ours():
    shares = {recipe: fmean(real_token_shares(recipe, ALPACA_LENGTHS, 8, 8)) for recipe in RECIPES}
    assert 0.30 < shares["dolly"] < 0.38
    assert shares["packed"] > 0.98
    assert shares["dolly"] < shares["stock"] < shares["packed"]


def test_the_command_compares_all_recipes_and_draws_a_picture(tmp_path):
    picture = tmp_path / "shares.png"
    result = CliRunner().invoke(
        main,
        f"--width 32 --layers 2 --heads 2 --batch 4 --world-size 2 --steps 1 --json --device cpu --plot {picture}".split(),
    )
    assert result.exit_code == 0, result.output
    result_json = json.loads(result.stdout[result.stdout.index("{") :])
    assert result_json["max_relative_gradient_difference"] < 1e-5
    for recipe in RECIPES:
        assert result_json[recipe]["loss"] == pytest.approx(result_json["dolly"]["loss"], rel=1e-5)
        assert result_json["one_rank"]["tokens_per_second"][recipe] > 0
    for mode in ("one_rank", "slowest_rank"):
        assert {"ratio", "ratio_to_stock", "ratio_like_for_like"} <= result_json[mode].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            "--width 30 --heads 4 --device tube --vocab 5 --world-size 1000",
            [
                "--width 30: expected --heads 4 times an even head size",
                "--device tube: cannot be used here in fp32",
                "--vocab 5 is less than the tokenizer's",
                "rows are fewer than one global batch of 8 x 1000",
            ],
        ),
        ("--training-dataset nothing.jsonl", ["nothing.jsonl: no such file"]),
        ("--device meta", ["--device meta: cannot be used here in fp32"]),
        ("--layers 99999999999999999999", ["is not in the range 1<=x<=1000"]),
        ("--layers 1000 --width 8192 --heads 64", ["entries need"]),
        ("--device cpu:0 --precision fp16", ["--precision fp16: a CPU computes it too slowly"]),
        ("--device cpu --precision fp16", ["--precision fp16: a CPU computes it too slowly"]),
        ("--plot /no/such/folder/a.png", ["in a folder that exists and can be written"]),
    ],
)
def test_all_problems_of_the_options_are_reported_at_once(options, messages, tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", rows_of(100))
    result = CliRunner().invoke(main, ["--training-dataset", rows, *options.split()])
    assert result.exit_code == 2
    for message in messages:
        assert message in result.output


@pytest.mark.slow
def test_adapters_are_compared_with_pefts_and_have_its_gradients():
    options = (
        "--width 32 --layers 2 --heads 2 --batch 4 --world-size 1 --steps 1 --json --device cpu --lora 4"
    )
    result = CliRunner().invoke(main, options.split())
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout[result.stdout.index("{") :])
    assert measured["lora"]["relative_gradient_difference"] < 1e-5
    assert measured["lora"]["loss"] == pytest.approx(measured["peft"]["loss"], rel=1e-5)
    assert measured["lora"]["real_token_share"] > measured["peft"]["real_token_share"]
    assert {"lora", "peft"} <= measured["one_rank"]["tokens_per_second"].keys()
    assert measured["one_rank"]["ratio_to_peft"] > 0
