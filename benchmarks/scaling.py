"""Estimate how memory and time grow with experts, devices and context: `python -m benchmarks.scaling [FOLDER]`.

Simulated with `modeling_grin.planning`; prints the planner's tables of RESULTS.md and draws the images of
docs/scaling.md. Also here: the paper's Figure 3 and Table 3, as far as the paper states them and as assumed.
"""

import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from modeling_grin import GrinMoeConfig
from modeling_grin.planning.memory import stage_memory, stages
from modeling_grin.planning.plan import Estimate, estimate, plan
from modeling_grin.planning.setting import FLOAT32, GB, Assumptions, Layout, Training

IMAGES = Path(__file__).parents[1] / "docs" / "images"
ASSUMPTIONS = Assumptions()
BATCH_TOKENS = 4 * 2**20  # of an optimizer step

# The micro-batch, and `Assumptions.reserve`, are fitted to the limits of Figure 3.
FIGURE_3 = Training(micro_batch=16, global_batch=1024, precision="bfloat16")
# Largest numbers of experts of the text: 64 devices, pipeline only; with tensor parallelism; 272 devices ("200+").
LIMITS = {Layout(dp_replicate=2, pp=32): 32, Layout(tp=2, pp=32): 52, Layout(tp=8, pp=34): 200}

TABLE_3 = replace(FIGURE_3, micro_batch=1)
TABLE_3_LAYOUT = Layout(dp_replicate=8, pp=8)
# 16 experts of both sizes. The paper gives 10B / 1.6B and no sizes: these have 10.05B / 1.59B.
SMALL = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "num_key_value_heads": 4}  # fmt: skip
RELATIVE_THROUGHPUTS = {"10B": (SMALL, 0.8171), "42B": ({}, 0.8656)}
TOKENS_PER_DEVICE = {"10B": (34222, 27962), "42B": (8176, 7077)}  # dense, mixture


def needed_by_deepspeed(config: GrinMoeConfig, layout: Layout) -> float:
    """Bytes of the fullest device under DeepSpeed's bfloat16 optimizer with ZeRO-1, in layouts without FSDP2.

    It keeps 2 + 4 bytes of gradients per parameter, and 12 of optimizer state, which the replicas share out; and the
    noise of the router's input. What it keeps for communication is not known; the fitted micro-batch stands for it.
    """
    parts = [stage_memory(config, layout, FIGURE_3, stage) for stage in stages(config, layout, FIGURE_3)]
    noise = FIGURE_3.tokens * config.hidden_size * FLOAT32
    return noise + max(
        part.weights + 3 * part.gradients + 3 * part.optimizer / layout.dp_replicate + part.activations + part.buffers
        for part in parts
    )


def largest_num_experts(layout: Layout, assumptions: Assumptions = ASSUMPTIONS) -> int:
    """The most experts of 3.8B that fit."""
    num_experts = 8
    while needed_by_deepspeed(GrinMoeConfig(num_local_experts=num_experts + 1), layout) <= (
        assumptions.memory - assumptions.reserve
    ):
        num_experts += 1
    return num_experts


def dense_and_mixture(sizes: dict[str, int], assumptions: Assumptions = ASSUMPTIONS) -> tuple[float, float]:
    """Tokens/s per device of a dense model and of a mixture with as many active parameters: Table 3."""
    mixture = GrinMoeConfig(**sizes)
    width = mixture.num_experts_per_tok * mixture.intermediate_size
    dense = GrinMoeConfig(**{**sizes, "intermediate_size": width, "num_local_experts": 1, "num_experts_per_tok": 1})
    estimates = [estimate(config, TABLE_3_LAYOUT, TABLE_3, assumptions) for config in (dense, mixture)]
    first, second = (found.tokens_per_second / TABLE_3_LAYOUT.devices for found in estimates)
    return first, second


def best(num_devices: int = 64, sequence: int = 4096, **sizes: int | None) -> Estimate:
    """The fastest layout that fits, or the smallest; without expert parallelism."""
    config = GrinMoeConfig(router_aux_loss_coef=1.0, **sizes)
    # 4M tokens, or a sequence for each device if that is more.
    training = Training(sequence=sequence, global_batch=max(BATCH_TOKENS // sequence, num_devices))
    return next(found for found in plan(config, num_devices, training, ASSUMPTIONS).estimates if found.layout.ep == 1)


def row(value: object, found: Estimate) -> str:
    total = found.memory.total() / GB
    parts = [found.memory.weights + found.memory.gradients + found.memory.optimizer, found.memory.activations,
             found.memory.communication + found.memory.buffers]  # fmt: skip
    figures = " | ".join(f"{part / GB:.1f}" for part in parts)
    if not found.fits:
        return f"| {value} | {found.layout} | {figures} | {total:.0f} | does not fit | | |"
    speed = found.tokens_per_second / found.layout.devices
    share = found.seconds["balance loss"] / found.step_time
    return (
        f"| {value} | {found.layout} | {figures} | {total:.0f} | {found.step_time:.2f} | {speed:,.0f} | {share:.3%} |"
    )


SWEEPS = {
    "experts": ("experts, 64 devices", [8, 16, 32, 64, 128, 256], lambda n: best(num_local_experts=n)),
    "devices": ("devices", [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096], best),
    "context": (
        "context in tokens, 64 devices, full attention",
        [4096, 8192, 16384, 32768, 65536, 131072],
        lambda n: best(sequence=n, sliding_window=None),
    ),
}


def draw(label: str, values: list[int], found: list[Estimate], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places, bottom = range(len(values)), [0.0] * len(values)
    for part in ("weights", "gradients", "optimizer", "activations", "communication", "buffers"):
        heights = [getattr(one.memory, part) / GB for one in found]
        left.bar(places, heights, bottom=bottom, label=part)
        bottom = [sum(pair) for pair in zip(bottom, heights, strict=True)]
    left.axhline((ASSUMPTIONS.memory - ASSUMPTIONS.reserve) / GB, color="black", linestyle="--", linewidth=1)
    left.set(title="GB per device", xlabel=label)
    left.legend(fontsize=7)
    speeds = [one.tokens_per_second / one.layout.devices if one.fits else float("nan") for one in found]
    right.plot(places, speeds, "o-")
    right.set(title="tokens/s per device", xlabel=label, ylim=(0, None), xlim=(-0.5, len(values) - 0.5))
    right.grid(alpha=0.3)
    for axes in (left, right):
        axes.set_xticks(places, labels=[f"{value:,}" for value in values], fontsize=7)
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    print("| layout | limit of the paper | planner |\n| --- | --- | --- |")
    for layout, limit in LIMITS.items():
        print(f"| {layout} ({layout.devices}) | {limit} | {largest_num_experts(layout)} |")
    print("\n| | dense | mixture | relative | paper: dense | mixture | relative |\n|" + " --- |" * 7)
    for name, (sizes, relative) in RELATIVE_THROUGHPUTS.items():
        dense, mixture = dense_and_mixture(sizes)
        measured = " | ".join(map(str, TOKENS_PER_DEVICE[name]))
        print(f"| {name} | {dense:.0f} | {mixture:.0f} | {mixture / dense:.1%} | {measured} | {relative:.1%} |")
    for name, (label, values, find) in SWEEPS.items():
        found = [find(value) for value in values]
        print(f"\n| {label} | layout | state | activations | comm. | total GB | step s | tokens/s/device | balance |")
        print("|" + " --- |" * 9)
        print("\n".join(map(row, values, found)))
        draw(label, values, found, folder / f"scaling_{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
