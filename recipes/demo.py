"""Train, save, reload and ask a tiny GRIN-MoE, in a few minutes and without a download.

The text is the source code of Python's own standard library. A tokenizer is trained on it, a GRIN-MoE of a few million
parameters is written in the layout of the release, loaded with the Auto classes, trained with transformers' Trainer,
saved, loaded again, and asked to continue some code.

    python recipes/demo.py --output-dir demo_output
"""

import sysconfig
from pathlib import Path
from typing import Annotated

import typer
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DefaultDataCollator, Trainer, TrainingArguments, set_seed

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeTokenizer
from modeling_grin.analysis import expert_load, plot_expert_load
from modeling_grin.analysis.figures import draw_loss

console = Console()

VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 128
# The release's configuration with other sizes, and a load-balance loss.
SIZES = {"hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 2, "num_local_experts": 8, "max_position_embeddings": 1024,
         "router_aux_loss_coef": 0.01}  # fmt: skip
PROMPT = '    def __init__(self, name, value=None):\n        """'


def read_standard_library() -> list[str]:
    """Read the modules of Python's standard library, without its packages and tests: about 5 MB of real code."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]


def tiny_config(tokenizer: GrinMoeTokenizer) -> GrinMoeConfig:
    """The demo's model, for a tokenizer's ids."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GrinMoeConfig(vocab_size=len(tokenizer), **special, **SIZES)


def pack(texts: list[str], tokenizer: GrinMoeTokenizer) -> Dataset:
    """Cut one long stream of tokens, <|endoftext|> after each text, into rows of SEQUENCE_LENGTH."""
    stream = [
        token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in [*ids, tokenizer.eos_token_id]
    ]
    rows = [stream[i : i + SEQUENCE_LENGTH] for i in range(0, len(stream) - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def main(
    output_dir: Annotated[Path, typer.Option(help="folder for checkpoints and pictures")] = Path("demo_output"),
    max_steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 600,
    seed: Annotated[int, typer.Option(help="seed of weights, data order and routing")] = 0,
) -> None:
    """Train, save, reload and ask a tiny GRIN-MoE.

    Example: python recipes/demo.py --max-steps 50 --output-dir short_demo
    """
    set_seed(seed)
    base, trained = output_dir / "base", output_dir / "trained"

    console.rule("1  Tokenizer and model, in the layout of the release")
    texts = read_standard_library()
    tokenizer = GrinMoeTokenizer.train_from_iterator(texts, VOCAB_SIZE)
    model = GrinMoeForCausalLM(tiny_config(tokenizer))
    model.generation_config.eos_token_id = tokenizer.stop_token_ids
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    console.print(f"{model.num_parameters() / 1e6:.1f}M parameters, {len(tokenizer)} tokens, written to {base}")

    console.rule("2  Fine-tune with transformers' Trainer")
    model = AutoModelForCausalLM.from_pretrained(base)
    validation = pack(texts[::20], tokenizer).select(range(64))
    training = pack([text for i, text in enumerate(texts) if i % 20], tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir / "checkpoints", max_steps=max_steps, per_device_train_batch_size=8,
            learning_rate=1.5e-3, warmup_steps=max_steps // 20, lr_scheduler_type="cosine", weight_decay=0.1,
            logging_steps=max(1, max_steps // 30), eval_strategy="steps", eval_steps=max(1, max_steps // 6),
            save_strategy="no", dataloader_pin_memory=False, report_to="none", seed=seed,
        ),
        train_dataset=training,
        eval_dataset=validation,
        data_collator=DefaultDataCollator(),
        processing_class=tokenizer,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    console.print(f"validation loss {before:.2f} -> {after:.2f}")

    console.rule("3  Save, reload, look and ask")
    trainer.save_model(trained)
    model = AutoModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    draw_loss(trainer.state.log_history).savefig(output_dir / "loss.png", dpi=150)
    load = expert_load(model, validation.iter(batch_size=16))
    plot_expert_load(load, output_dir / "expert_load.png", "Expert load on validation text")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.5)
    console.print(tokenizer.decode(output[0]), markup=False, highlight=False, style="cyan")
    console.print(
        f"checkpoint {trained}, loss curve {output_dir / 'loss.png'}, routing {output_dir / 'expert_load.png'}"
    )


if __name__ == "__main__":
    typer.run(main)
