"""The plan chooses how often a run saves, and whether training waits for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.test_plan import dolly_plan
from training.consts import GIB
from training.machine.catalogue import find_machine
from training.options.intervals import steps_between_saves
from training.plan import saves
from training.plan.overhead import checkpoint_seconds

A100 = find_machine("8xA100-40GB")


def test_saves_run_in_the_background_where_host_memory_has_room_for_a_checkpoint():
    plan = dolly_plan("8xA100-40GB")
    copies = plan.settings.checkpoint_bytes * plan.model.parameters / GIB
    assert plan.host_memory_gib["of which copies of a save"] == pytest.approx(copies)
    without = plan.host_memory_gib["training"] - copies
    for room, background in ((without + copies + 0.1, True), (without + copies - 0.1, False)):
        small = dolly_plan("8xA100-40GB", machine_changes={"host_gib": room})
        assert small.settings.background_saves == background
        assert small.fits, "a run without the copies still fits"
        assert ("of which copies of a save" in small.host_memory_gib) == background


def test_a_run_waits_for_the_copies_of_its_saves_or_for_all_of_them():
    plan = dolly_plan("8xA100-40GB", save_steps=100)
    model, settings = plan.model, plan.settings
    shard = 12 * model.parameters / 8
    written = sum(checkpoint_seconds(model, A100, settings).values())
    copied = saves.blocked_seconds(model, A100, settings)
    assert copied == pytest.approx(shard / 20e9 + 2 * model.parameters / 8 / 5.7e9)
    assert plan.run_seconds["checkpoints"] == pytest.approx(7 * copied + written), (
        "the end waits for the last"
    )
    waiting = replace(settings, background_saves=False)
    assert saves.blocked_seconds(model, A100, waiting) == written > 20 * copied


def test_the_default_interval_is_a_quarter_of_the_run_or_ten_minutes_or_what_keeps_saving_at_5_percent():
    plan = dolly_plan("8xA100-40GB")
    assert plan.settings.save_seconds == pytest.approx(plan.run_seconds["steps"] / 4)
    assert dolly_plan("8xA100-40GB", epochs=20.0).settings.save_seconds == 600
    assert plan.settings.options.save_steps is None
    small = dolly_plan("8xA100-40GB", machine_changes={"host_gib": 60.0})
    blocked = saves.blocked_seconds(small.model, A100, small.settings)
    assert small.settings.save_seconds == pytest.approx(20 * blocked)
    assert dolly_plan("8xA100-40GB", save_every="90s").settings.save_seconds == 90


@pytest.mark.parametrize("machine", ["4xA10", "8xA100-40GB", "8xV100-32GB"])
@pytest.mark.parametrize("host_gib", [900.0, 260.0])
def test_saving_takes_at_most_5_percent_of_a_long_run_by_the_plan(machine, host_gib):
    plan = dolly_plan(machine, epochs=100.0, machine_changes={"host_gib": host_gib})
    step = sum(plan.step_seconds.values())
    every = steps_between_saves(plan.settings.save_seconds, step, 100)
    none = dolly_plan(machine, epochs=100.0, machine_changes={"host_gib": host_gib}, save_steps=10**9)
    added = sum(plan.run_seconds[part] - none.run_seconds[part] for part in ("checkpoints", "evaluations"))
    assert 0 < added <= 0.055 * plan.run_seconds["steps"], every


def test_the_plan_says_whether_a_save_after_sigterm_fits_into_30_seconds():
    large, small = dolly_plan("8xA100-40GB"), dolly_plan("8xA100-40GB")
    small = replace(small, settings=replace(small.settings, checkpoint_seconds=29.0))
    assert (large.emergency_save_fits, small.emergency_save_fits) == (False, True)
