"""Fine-tuning with plain transformers.Trainer and with peft, on real text."""

import inspect
import json.decoder
import json.encoder
import textwrap
import tokenize

import pytest
import runs
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DefaultDataCollator, Trainer, TrainingArguments, set_seed

from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM
from modeling_grin.analysis import expert_load


@pytest.fixture(scope="module")
def dataset(trained_tokenizer):
    """Rows of 48 tokens of standard-library source code."""
    text = "".join(inspect.getsource(module) for module in (json.decoder, json.encoder, textwrap, tokenize))
    ids = trained_tokenizer(text)["input_ids"]
    rows = [ids[i : i + 48] for i in range(0, len(ids) - 48, 48)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).train_test_split(16, seed=0)


@pytest.fixture(scope="module")
def checkpoint(trained_tokenizer, tmp_path_factory):
    """A released-layout checkpoint with small random weights and wide routing noise."""
    config = released_config(
        torch_dtype="float32", vocab_size=len(trained_tokenizer), eos_token_id=3, router_jitter_noise=0.1
    )
    tensors = {name: tensor if "norm" in name else 0.2 * tensor for name, tensor in released_tensors(config).items()}
    return write_checkpoint(tmp_path_factory.mktemp("base"), config, tensors, num_shards=2)


def make_trainer(model, dataset, output_dir, **arguments):
    defaults = {"max_steps": 30, "learning_rate": 5e-3, "logging_steps": 5, "save_strategy": "no"}
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir, per_device_train_batch_size=8, report_to="none", disable_tqdm=True, use_cpu=True,
            **{**defaults, **arguments},
        ),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        data_collator=DefaultDataCollator(),
    )  # fmt: skip


def test_trainer_learns_evaluates_and_saves(checkpoint, dataset, tmp_path):
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, dataset, tmp_path)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.8, (first, last)  # the text is another in each version of Python
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []

    trainer.save_model(tmp_path / "final")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert make_trainer(reloaded, dataset, tmp_path).evaluate()["eval_loss"] == last


def test_an_experts_implementation_without_dropout_is_refused():
    settings = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="'sonicmoe' has no dropout"):
        GrinMoeForCausalLM(GrinMoeConfig(**settings, num_key_value_heads=1, num_local_experts=2, vocab_size=32,
                                         expert_dropout=0.1, experts_implementation="sonicmoe"))  # fmt: skip


def test_lora_on_attention(checkpoint, dataset, tmp_path):
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 4 * 2  # layers x projections x (A, B)
    trainer = make_trainer(model, dataset, tmp_path)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < first - 0.02, (first, last)

    model.save_pretrained(tmp_path / "adapter")
    batches = [{"input_ids": torch.arange(12)[None]}]
    assert torch.equal(expert_load(model, batches), expert_load(model.get_base_model().model, batches))
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # transformers' own way to load an adapter
    assert make_trainer(direct, dataset, tmp_path).evaluate()["eval_loss"] == last
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    assert make_trainer(reloaded, dataset, tmp_path).evaluate()["eval_loss"] == last
    ids = torch.arange(12)[None]
    with torch.no_grad():
        adapted = reloaded.eval()(ids).logits
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("estimator", ["sparsemixer_v2", "dense"])
def test_autocast_computes_experts_in_bfloat16(implementation, estimator):
    """transformers' implementations go by the weights' dtype: with float32 weights nothing would be gained."""
    model = runs.make_model(experts_implementation=implementation, router_estimator=estimator).train()
    ids = torch.randint(5, 131, (2, 12), generator=torch.Generator().manual_seed(0))
    dtypes = set()

    class Matmuls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            sizes = [tuple(arg.shape[-2:]) for arg in args if isinstance(arg, torch.Tensor)]
            if "mm" in str(func) and any(24 in size for size in sizes):  # the experts' intermediate_size
                dtypes.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point())
            return func(*args, **(kwargs or {}))

    model.begin_step(0, seed=0)
    reference = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16), Matmuls():
        model.begin_step(0, seed=0)
        loss = model(ids, labels=ids).loss
    assert dtypes == {torch.bfloat16}
    assert loss.item() == pytest.approx(reference.item(), rel=1e-2)
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.model.layers[0].parameters()} == {torch.float32}
