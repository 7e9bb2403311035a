"""Draws the memory of a device by part, as one stacked bar against the device's size."""

from __future__ import annotations

# What stays is blue, what ZeRO moves green, what comes and goes with the rows orange, the rest grey.
COLOURS = {
    "weights": "#1f4e8c",
    "gradients": "#3f7fbf",
    "optimizer": "#8db8de",
    "gathered layers": "#2e8b57",
    "activations": "#e0701a",
    "logits and loss": "#f5b067",
    "communication": "#8fd0a8",
    "optimizer step": "#c6dbef",
    "context and fragmentation": "#b5b5b5",
}


def draw_memory(parts_gib: dict[str, float], room_gib: float, device: str, title: str, file: str) -> None:
    """Writes the picture into `file`, whose ending is the format. `room_gib` 0: the device has no memory of its own."""
    from matplotlib.figure import Figure

    shown = {name: value for name, value in parts_gib.items() if value >= 0.005}
    total = sum(shown.values())
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for name, value in shown.items():
        label = f"{name}  {value:.2f}"
        axes.barh(0, value, left=left, color=COLOURS[name], label=label, height=0.5, edgecolor="white")
        left += value
    if room_gib:
        axes.axvline(room_gib, color="black", linewidth=1.5)
        side = "right" if room_gib > 0.5 * max(total, room_gib) else "left"
        axes.annotate(f" {device}: {room_gib:.1f} GiB ", (room_gib, 0.42), ha=side, va="center", fontsize=9)
    axes.set_xlim(0, 1.04 * max(total, room_gib))
    axes.set_ylim(-0.3, 0.5)
    axes.set_yticks([])
    axes.set_xlabel(f"GiB of each {device}")
    axes.set_title(title, fontsize=11, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(file, dpi=150)
