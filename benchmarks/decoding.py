"""Compare decoding with the memory's speed, stock Phimoe and a dense model, in tokens per second.

A checkpoint of random weights in the released layout (the sizes of Phi-tiny-MoE, 7.5 GB) is loaded once; stock Phimoe
has the same parameters, the dense model as many active ones. The models take turns: a few decoding steps after a
prompt, for a batch of one and of eight, and the prompt itself (prefill). The bound divides the bytes that a step must
read (weights outside the experts, the chosen experts, keys and values) by the speed at which this machine reads
memory, measured in the same rounds.

    python -m benchmarks.decoding
"""

from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

from benchmarks.conversion import PHI_TINY, write_checkpoint
from benchmarks.measure import ALLOCATORS, interleave, run_with, show, spread
from benchmarks.peers import STOCK_EXPERTS, build_dense, build_stock
from modeling_grin import GrinMoeForCausalLM

BATCHES = (1, 8)
STEPS = 4  # decoding steps in a turn
READ_BYTES = 2**30  # far beyond any cache
COLUMNS = ["", "ours", "dense", "stock", "speed / dense", "/ stock", "of the bound: ours", "dense", "stock"]


class Decoder:
    """One model with the cache of a prompt, from which each turn continues."""

    def __init__(self, model: Any, prompt: torch.Tensor):
        self.model, self.prompt = model, prompt
        self.cache = DynamicCache(config=model.config)
        self.next_token = self.forward(prompt)

    def forward(self, ids: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        cache = self.cache if cache is None else cache
        logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1:].argmax(dim=-1)

    def prefill(self) -> None:
        self.forward(self.prompt, DynamicCache(config=self.model.config))

    def decode(self) -> None:
        token = self.next_token
        for _ in range(STEPS):
            token = self.forward(token)
        self.cache.crop(-STEPS)

    def bytes_per_step(self) -> float:
        """Return the bytes that a decoding step reads, the mean over a turn."""
        weights = list(self.model.parameters())
        experts = [p for name, p in self.model.named_parameters() if ".experts." in name]
        embeddings = self.model.get_input_embeddings().weight
        nbytes = sum(p.nbytes for p in weights) - sum(p.nbytes for p in experts) - embeddings.nbytes
        nbytes += sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        if experts:  # ours: as many as the tokens of a step chose
            token, chosen = self.next_token, 0
            for _ in range(STEPS):
                outputs = self.model(input_ids=token, past_key_values=self.cache, output_selected_experts=True)
                chosen += sum(len(layer.unique()) for layer in outputs.selected_experts)
                token = outputs.logits.argmax(dim=-1)
            self.cache.crop(-STEPS)
            config = self.model.config
            of_expert = sum(p.nbytes for p in experts) / config.num_hidden_layers / config.num_local_experts
            nbytes += chosen / STEPS * of_expert
        return nbytes


@torch.inference_mode()
def measure(folder: str, prompt_length: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of every turn, and the bytes, by task."""
    torch.manual_seed(0)
    ours = GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    dense = build_dense(ours.config, torch.bfloat16)
    stock = build_stock(ours, STOCK_EXPERTS)
    memory = torch.ones(READ_BYTES // 4)
    tasks: dict[str, Callable[[], Any]] = {"read": memory.sum}
    nbytes: dict[str, float] = {"read": READ_BYTES}
    for batch in BATCHES:
        prompt = torch.randint(ours.config.vocab_size, (batch, prompt_length))
        for name, model in {"ours": ours, "dense": dense, "stock": stock}.items():
            decoder = Decoder(model.eval(), prompt)
            tasks[f"{name}, {batch}"] = decoder.decode
            nbytes[f"{name}, {batch}"] = nbytes[f"ours, {batch}"] if name == "stock" else decoder.bytes_per_step()
            if batch == 1:
                tasks[f"{name}, prefill"] = decoder.prefill
    return interleave(tasks, rounds, "decoding"), nbytes


def table(seconds: dict[str, list[float]], nbytes: dict[str, float], prompt_length: int) -> list[list[str]]:
    bandwidth = nbytes["read"] / median(seconds["read"])
    rows = []
    for batch in BATCHES:
        names = [f"{name}, {batch}" for name in ("ours", "dense", "stock")]
        rates = [batch * STEPS / median(seconds[name]) for name in names]
        bounds = [batch * bandwidth / nbytes[name] for name in names]
        row = [f"decoding, batch {batch}: tokens / s", *(f"{rate:.2f}" for rate in rates)]
        row += [spread(seconds[name], seconds[names[0]]) for name in names[1:]]
        rows.append(row + [f"{rate / bound:.2f}" for rate, bound in zip(rates, bounds, strict=True)])
    names = [f"{name}, prefill" for name in ("ours", "dense", "stock")]
    row = [
        f"prefill, {prompt_length} tokens: tokens / s",
        *(f"{prompt_length / median(seconds[n]):.0f}" for n in names),
    ]
    rows.append([*row, *(spread(seconds[name], seconds[names[0]]) for name in names[1:]), "", "", ""])
    return rows


def main(
    layers: Annotated[int, typer.Option(min=1)] = 32,
    vocab_size: Annotated[int, typer.Option(min=8)] = 32064,
    hidden_size: Annotated[int, typer.Option(min=64)] = 4096,
    prompt_length: Annotated[int, typer.Option(min=1, help="tokens of the prompt")] = 256,
    repeats: Annotated[int, typer.Option(min=2, help="rounds after one warm-up")] = 7,
    record: Annotated[bool, typer.Option(help="append the table to benchmarks/RESULTS.md")] = False,
) -> None:
    """Time decoding and prefill of ours, dense and stock Phimoe, beside the bandwidth bound.

    Example: python -m benchmarks.decoding --layers 4
    """
    sizes = PHI_TINY | {"num_hidden_layers": layers, "vocab_size": vocab_size, "hidden_size": hidden_size}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with TemporaryDirectory() as folder:
        run_with({}, write_checkpoint, folder, sizes)
        seconds, nbytes = run_with(ALLOCATORS["keep"], measure, folder, prompt_length, repeats)
    bandwidth = nbytes["read"] / median(seconds["read"]) / 1e9
    read = ", ".join(f"{nbytes[f'ours, {batch}'] / 1e9:.2f} GB at batch {batch}" for batch in BATCHES)
    notes = (
        f"Medians of {repeats} turns of {STEPS} steps after {prompt_length} tokens. Memory is read at {bandwidth:.1f} "
        f"GB/s (the sum of {READ_BYTES / 1e9:.1f} GB). A step of ours and of stock's reads {read}; tokens with the "
        "same expert read it once."
    )
    title = f"Decoding with Phi-tiny-MoE's sizes, {layers} layers, bfloat16"
    show(title, COLUMNS, table(seconds, nbytes, prompt_length), record, notes)


if __name__ == "__main__":
    typer.run(main)
