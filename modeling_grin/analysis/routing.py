"""Where the tokens go: expert load per layer, as in the paper's Figure 5. L layers, E experts."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from transformers import PreTrainedModel


@torch.no_grad()
def expert_load(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """The share of each layer's routing decisions that each expert gets, in inference routing.

    Args:
        model: a GRIN-MoE model, with or without a head; it is evaluated in eval mode and left as it was.
        batches: model inputs, `input_ids` and, if there is padding, `attention_mask` `[batch, sequence]`.

    Returns:
        `[L, E]`, float64 on the CPU, rows sum to 1; 1 / E everywhere is perfect balance.

    Raises:
        ValueError: there is not a single token in `batches`.
    """
    decoder, config = model.get_decoder(), model.config  # also that of a PEFT model
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask") if key in batch}
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).reshape(-1).bool()
            outputs = decoder(**inputs, use_cache=False, output_selected_experts=True)
            for layer, experts in enumerate(outputs.selected_experts):
                chosen = experts[real.to(experts.device)].reshape(-1).cpu()
                counts[layer] += torch.bincount(chosen, minlength=config.num_local_experts)
    finally:
        model.train(was_training)
    if counts.sum() == 0:
        raise ValueError("no tokens: `batches` is empty or all padding")
    return counts / counts.sum(dim=1, keepdim=True)


def draw_expert_load(load: torch.Tensor, title: str = "Expert load") -> Figure:
    """Draw `expert_load`'s `[L, E]` as a heatmap, white at 1 / E, red above, blue below."""
    num_layers, num_experts = load.shape
    balanced = 1 / num_experts
    norm = TwoSlopeNorm(balanced, vmin=0, vmax=max(2 * balanced, load.max().item()))
    figure = Figure(figsize=(2.5 + 0.55 * num_experts, 2 + 0.4 * num_layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load.numpy(), cmap="RdBu_r", norm=norm, aspect="auto")
    axes.set(
        title=f"{title} (balanced: {100 * balanced:.3g} %)",
        xlabel="expert",
        ylabel="layer",
        xticks=range(num_experts),
        yticks=range(num_layers),
    )
    if load.numel() <= 256:
        for layer, row in enumerate(load.tolist()):
            for expert, share in enumerate(row):
                color = "white" if abs(norm(share) - 0.5) > 0.35 else "black"
                axes.text(expert, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(image, format=lambda share, _: f"{100 * share:.0f} %")
    bar.set_label("share of the layer's choices")
    return figure


def plot_expert_load(load: torch.Tensor, path: str | Path, title: str = "Expert load") -> None:
    """Write `draw_expert_load`'s heatmap of `[L, E]` to `path`."""
    draw_expert_load(load, title).savefig(path, dpi=150)
