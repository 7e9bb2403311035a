"""Times steps of small GPT-Js on one CPU thread beside the plan's own prediction: what its CPU constants come from.

python -m tests.measure_cpu [ROUNDS]
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from tests.conftest import settings_of_a_run
from tests.test_memory import small_batch, small_gptj
from training.machine.catalogue import Machine
from training.options.deepspeed import Zero
from training.plan.epoch import Load
from training.plan.model_shape import gptj_shape
from training.plan.timing import cpu_rates, step_seconds

# width, layers, heads, vocabulary, rows, mean length
SHAPES = [(128, 3, 4, 1283, 32, 50), (512, 4, 8, 8000, 8, 107), (768, 4, 12, 50403, 4, 107)]


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, packed: bool, checkpointing: bool
) -> tuple[float, float]:
    """(predicted, measured) CPU seconds of one forward, backward and AdamW step, the rates measured just before."""
    width, layers, heads, vocabulary, count, mean = shape
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(mean), 0.35, count).astype(int), 8, 400)
    model = small_gptj(width, layers, heads, vocabulary, dtype)
    batch = small_batch(model, packed, lengths.tolist())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    precision = "fp32" if dtype == torch.float32 else "bf16"
    rates = cpu_rates(width, precision)
    seconds = []
    for _ in range(4):
        start = time.process_time()
        model(**batch, num_items_in_batch=torch.tensor(100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)

    tokens, longest = batch["input_ids"].numel(), -(-int(lengths.max()) // 8) * 8
    scores = (lengths**2).sum() / 2 if packed else count * longest**2
    share = batch["shift_labels"].numel() / tokens if packed else 1.0
    load = Load(1, tokens, tokens, tokens, tokens, float(scores), tokens, longest)
    zero = Zero(stage=1 if precision == "bf16" else 0)  # 16-bit weights, and no ZeRO-3 between
    settings = settings_of_a_run(
        1,
        per_device_train_batch_size=count,
        batching="packed" if packed else "padded",
        checkpointing=checkpointing,
        precision=precision,
        zero=zero,
    )
    facts = gptj_shape("small", layers, width, heads, vocabulary)
    machine = Machine("this machine", "cpu", "CPU", 1, 0.0, 0.0, "none", 16.0, 100.0)
    predicted = step_seconds(facts, machine, settings, load, share, rates)
    return sum(predicted.values()), float(np.median(seconds[1:]))


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # the rates in CPU seconds as well, whatever else the machine does
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for packed, checkpointing in ((True, False), (True, True), (False, False), (False, True)):
                found = [measure(shape, dtype, packed, checkpointing) for _ in range(rounds)]
                predicted, measured = np.median(found, axis=0)
                print(
                    f"width {shape[0]:>4} {str(dtype)[6:]:<9}{'packed' if packed else 'padded'}"
                    f"{' checkpointing' if checkpointing else '':<14}  predicted {predicted * 1e3:7.1f} ms  "
                    f"measured {measured * 1e3:7.1f} ms  {predicted / measured:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
