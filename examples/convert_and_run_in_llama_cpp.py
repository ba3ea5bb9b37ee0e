"""Convert a GRIN-MoE to GGUF, run it in llama.cpp, and compare with the model in torch, token by token.

Without a checkpoint a tiny one is trained first, for a minute, on the source code of Python's standard library. Needs
`pip install ".[llama]"`, which compiles llama.cpp for some minutes.

    python examples/convert_and_run_in_llama_cpp.py
    python examples/convert_and_run_in_llama_cpp.py --model my-grin --prompt "def "
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_grin  # noqa: F401, the Auto classes then know GRIN-MoE
from conversion import convert
from recipes import demo

console = Console()


@torch.inference_mode()
def main(
    model: Annotated[
        Path | None, typer.Option(help="folder of a checkpoint; a tiny one is trained by default")
    ] = None,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "    def __init__(self, name",
    output_dir: Annotated[Path, typer.Option(help="folder for the file and the tiny model")] = Path("llama_cpp"),
    max_steps: Annotated[int, typer.Option(min=1, help="optimizer steps of the tiny model")] = 300,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
) -> None:
    """Convert a model and continue a text with it, in torch and in llama.cpp.

    Example: python examples/convert_and_run_in_llama_cpp.py --max-steps 20
    """
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise SystemExit('error: llama-cpp-python is not installed: pip install ".[llama]"') from error

    if model is None:
        with torch.inference_mode(False):
            demo.main(output_dir, max_steps=max_steps, seed=0)
        model = output_dir / "trained"
        (output_dir / "model.gguf").unlink(missing_ok=True)  # of the tiny model before
    path = output_dir / "model.gguf"
    report = convert(model, path, to="gguf", dtype="f32")
    console.rule("In torch and in llama.cpp")
    for note in report.notes:
        console.print(note, markup=False)

    tokenizer = AutoTokenizer.from_pretrained(model)
    # llama.cpp knows no near-ties between experts: without them, both compute one function.
    ours = AutoModelForCausalLM.from_pretrained(model, dtype="float32", router_jitter_noise=0.0)
    llama = Llama(str(path), n_ctx=512, logits_all=True, verbose=False)
    ids = tokenizer(prompt)["input_ids"]
    assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids, "the tokenizers differ"

    generated = ours.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False)[0]
    llama.eval(generated.tolist())
    theirs = torch.tensor(llama.scores[: len(generated)])
    logits = ours(generated[None]).logits[0]
    error = (logits - theirs).abs().max() / logits.abs().max()
    agreement = (logits.argmax(-1) == theirs.argmax(-1)).float().mean()
    console.print(tokenizer.decode(generated), markup=False, highlight=False, style="cyan")
    console.print(
        f"logits differ by {error:.1e} of the largest; the next token is the same at {agreement:.1%} of places"
    )


if __name__ == "__main__":
    typer.run(main)
