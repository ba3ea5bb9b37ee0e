"""The trainer: resuming bit for bit, complete checkpoints, the balance loss under every loss, clear errors."""

import os
import pickle
import random
import re
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import runs
import torch
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import get_context
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerState

from modeling_grin import GrinMoeForSequenceClassification, load_balancing_loss
from modeling_grin.training import GrinMoeTrainer, find_problems, last_complete_checkpoint
from modeling_grin.training.checkpoints import find_non_finite

# ---- Resuming ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulation": 2, "micro_batch": 2, "exact_balance": True},
        {"accumulation": 1, "micro_batch": 4, "gradient_checkpointing": True},
    ],
    ids=["exact_balance", "gradient_checkpointing"],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, arguments):
    """Sampling, jitter and dropout on, in mid-epoch (of 4 steps), from other weights: losses and weights, all bits."""
    result = runs.resume_case(tmp_path, "exact", resumed_at=3, **arguments)
    assert len(result["whole_losses"]) == 9
    assert len(set(result["whole_losses"])) == 9
    assert result["resumed_losses"] == result["whole_losses"]
    for name, expected in result["whole"].items():
        assert torch.equal(result["resumed"][name], expected), name


class Remember(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}


SCORES = {2: 0.3, 4: 0.5, 6: 0.9, 8: 0.1, 9: 0.2}
BEST = {
    "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
    "metric_for_best_model": "score", "greater_is_better": True,
}  # fmt: skip


def test_the_best_step_is_restored_exactly(tmp_path):
    """Step 6 of 9, though only every fourth step is saved otherwise; `save_total_limit` leaves it and the last."""
    remember = Remember()
    trainer = runs.make_killed_trainer(tmp_path, save_steps=4, callbacks=[remember], eval_dataset=runs.Rows(4), **BEST)
    trainer.compute_metrics = lambda prediction: {"score": SCORES[trainer.state.global_step]}
    trainer.train()
    for name, expected in remember.weights[6].items():
        assert torch.equal(trainer.model.state_dict()[name], expected), name
    assert not torch.equal(remember.weights[6]["lm_head.weight"], remember.weights[9]["lm_head.weight"])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert sorted(path.name for path in tmp_path.glob("*")) == ["checkpoint-6", "checkpoint-9"]
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-6" / "trainer_state.json"))
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


def test_the_best_adapter_is_restored_exactly(tmp_path):
    """Whatever its name; Trainer itself looks for the default one only."""
    torch.manual_seed(0)
    model = get_peft_model(runs.make_model(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    remember = Remember()
    settings = {**runs.RESUME_ARGUMENTS, **BEST, "save_steps": 2, "eval_dataset": runs.Rows(4)}
    trainer = runs.make_trainer(tmp_path, model, callbacks=[remember], **settings)
    trainer.compute_metrics = lambda prediction: {"score": SCORES[trainer.state.global_step]}
    trainer.train()
    adapters = [name for name in remember.weights[6] if "lora_B" in name]
    assert adapters
    for name in adapters:
        assert torch.equal(trainer.model.state_dict()[name], remember.weights[6][name])
        assert not torch.equal(remember.weights[6][name], remember.weights[9][name])


# ---- Checkpoints ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder with three checkpoints of steps 7, 8 and 9, and the final parameters."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = runs.make_killed_trainer(folder)
    trainer.train()
    return folder, runs.parameters(trainer)


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A copy of the last one."""
    return Path(shutil.copytree(finished[0] / "checkpoint-9", tmp_path / "checkpoint-9"))


NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", NEEDED)
def test_a_file_that_is_missing_or_cut_off_is_named(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    generator = random.Random(name)
    for size in [0, len(content) - 2] + [generator.randrange(len(content)) for _ in range(8)]:
        (checkpoint / name).write_bytes(content[:size])
        assert find_problems(checkpoint) == [f"{name} is cut off or damaged"], size
    (checkpoint / name).unlink()
    (problem,) = find_problems(checkpoint)
    assert problem.startswith(name) and problem.endswith("is missing")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_an_archive_that_would_inflate_is_named(checkpoint, name):
    with zipfile.ZipFile(checkpoint / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 2**20)
    assert find_problems(checkpoint) == [f"{name} has 'archive/data.pkl' compressed, which torch.save never does"]


def test_what_makes_a_checkpoint_complete(checkpoint, tmp_path):
    """Shards, ranks, and a checkpoint of the model alone."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    runs.make_model().save_pretrained(checkpoint, max_shard_size="20KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert find_problems(checkpoint) == []
    shards[1].unlink()
    assert find_problems(checkpoint) == [f"{shards[1].name} is missing"]
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert find_problems(checkpoint) == ["rng_state_1.pth is missing"]
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert find_problems(checkpoint) == []

    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        (checkpoint / name).unlink()
    assert find_problems(checkpoint) == []
    assert find_problems(tmp_path / "nowhere") == ["there is no such folder"]


def test_resume_takes_the_newest_complete_checkpoint_and_names_the_others(finished, tmp_path, caplog):
    folder, expected = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "checkpoint-9" / "trainer_state.json").unlink()
    (run / "checkpoint-8" / "optimizer.pt").write_bytes(b"PK")
    (run / "_incomplete" / "checkpoint-10").mkdir(parents=True)
    trainer = runs.make_killed_trainer(run)
    with pytest.raises(ValueError, match=r"checkpoint-8 is not a complete checkpoint: optimizer.pt is cut off"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-8"))
    with caplog.at_level("WARNING", logger="transformers"):
        trainer.train(resume_from_checkpoint=True)
    warnings = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(warnings) == 3
    for name in ("checkpoint-9", "checkpoint-8", "_incomplete/checkpoint-10"):
        assert any(str(run / name) in warning for warning in warnings), name
    assert trainer.state.global_step == 9
    assert all(torch.equal(value, expected[name]) for name, value in runs.parameters(trainer).items())
    # The next save has replaced the incomplete ones, and cleared what was left over.
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-7", "checkpoint-8", "checkpoint-9"]
    assert last_complete_checkpoint(run)[1] == {}

    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        runs.make_killed_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_tensor_is_refused(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    missing = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    del tensors[missing]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=missing):
        runs.make_killed_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_adapters_resume_and_lack_no_tensor(tmp_path):
    """LoRA on attention and on the experts' fused parameters, whose names in the file are peft's own."""

    def make_trainer(folder):
        torch.manual_seed(0)
        lora = LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        )
        model = get_peft_model(runs.make_model(**runs.RESUME_CONFIG), lora)
        settings = {**runs.RESUME_ARGUMENTS, "save_steps": 3, "max_steps": 6}
        return runs.make_trainer(tmp_path / folder, model, **settings)

    whole, resumed = make_trainer("whole"), make_trainer("resumed")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = runs.parameters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in runs.parameters(resumed).items())

    tensors = load_file(checkpoint / "adapter_model.safetensors")
    name = next(name for name in tensors if "experts" in name)
    del tensors[name]
    save_file(tensors, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"differ in 1 tensor.*{name}"):
        make_trainer("resumed").train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_all_weights_is_no_adapter(finished, tmp_path):
    """Trainer would give it to peft, which ignores the names, and go on with nothing loaded."""
    model = get_peft_model(runs.make_model(**runs.RESUME_CONFIG), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = runs.make_trainer(tmp_path, model, **runs.RESUME_ARGUMENTS)
    with pytest.raises(ValueError, match=r"checkpoint-8 has no adapter_model\.safetensors"):
        trainer.train(resume_from_checkpoint=str(finished[0] / "checkpoint-8"))


# ---- Killed while saving ----


@pytest.mark.parametrize(
    ("trainer_class", "moment", "interrupted"),
    [
        (GrinMoeTrainer, "in the files", True),
        (GrinMoeTrainer, "all written", True),
        (GrinMoeTrainer, "named", False),
        (Trainer, "in the files", True),
    ],
)
def test_killed_run_resumes_from_the_newest_complete_checkpoint(
    finished, tmp_path, trainer_class, moment, interrupted
):
    """SIGKILL at chosen moments of the third save; what the plain Trainer leaves is recognised, too."""
    folder = tmp_path / "run"
    child = get_context().Process(target=runs.save_until_killed, args=(folder, trainer_class, moment))
    child.start()
    child.join(600)
    assert child.exitcode == -signal.SIGKILL
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))
    newest, incomplete = last_complete_checkpoint(folder)
    if trainer_class is GrinMoeTrainer:
        assert newest == str(folder / f"checkpoint-{steps[-1]}")  # what has the name is complete
        rotated = str(folder / f"checkpoint-{steps[0]}")  # the kill may come while an old one is deleted
        assert set(incomplete) <= {rotated, *(str(path) for path in folder.glob("_incomplete/*"))}
    assert bool(incomplete) == interrupted

    trainer = runs.make_killed_trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    if trainer_class is GrinMoeTrainer:  # the plain one draws its noise from torch's generator
        assert all(torch.equal(value, finished[1][name]) for name, value in runs.parameters(trainer).items())
    assert trainer.state.global_step == 9
    last, left = last_complete_checkpoint(folder)
    assert last == str(folder / "checkpoint-9")
    if newest != last:  # else there was nothing to save, and so nothing that cleans up
        assert not left and not (folder / "_incomplete").exists()


def test_a_half_deleted_checkpoint_is_the_first_to_go(tmp_path):
    """Rotation goes by date, and a deletion that a kill interrupted has made the oldest checkpoint the newest."""
    runs.make_killed_trainer(tmp_path, max_steps=5).train()
    for step in (4, 5):  # transformers goes by the number where dates are within a second
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
    runs.make_killed_trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 5, 6)}


# ---- Values that are not finite ----


class Spoil:
    """A loss that is NaN in one step."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        loss = outputs["logits"].float().logsumexp(dim=-1).mean()
        return loss * float("nan") if self.calls == self.step else loss


def test_one_loss_that_is_nan_costs_no_checkpoint(tmp_path):
    """Two checkpoints are kept, and the run goes on from the last one."""
    settings = {"save_total_limit": 2, "max_grad_norm": 0.0}
    trainer = runs.make_killed_trainer(tmp_path, **settings)
    trainer.compute_loss_func = Spoil(step=5)
    with pytest.raises(ValueError, match=r"step 5: the norm of the gradients is nan"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in runs.parameters(trainer).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    trainer = runs.make_killed_trainer(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9


def test_float16s_loss_scale_leaves_the_step_out(tmp_path):
    trainer = runs.make_killed_trainer(tmp_path, save_strategy="no", max_steps=3)
    trainer.compute_loss_func = Spoil(step=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.accelerator.scaler.get_scale() == 32
    assert all(torch.isfinite(value).all() for value in runs.parameters(trainer).values())


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_weights_that_overflow_are_neither_saved_nor_returned(tmp_path, save_strategy):
    """The gradient that made them so was finite."""
    trainer = runs.make_killed_trainer(
        tmp_path, save_strategy=save_strategy, max_steps=1, optim="sgd", learning_rate=1e38, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 1e4 * mean_of_logits(outputs, labels)
    with pytest.raises(ValueError, match="after step 1 weights are not finite"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, caplog, lora):
    """And is the first to be rotated away."""

    def make_trainer():
        if not lora:
            return runs.make_killed_trainer(tmp_path, max_steps=4)
        model = get_peft_model(runs.make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
        return runs.make_trainer(tmp_path, model, **runs.RESUME_ARGUMENTS | {"max_steps": 4, "save_steps": 1})

    make_trainer().train()
    (path,) = (tmp_path / "checkpoint-4").glob("*model.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    message = f"{re.escape(name)} has values that are not finite"
    with pytest.raises(ValueError, match=f"checkpoint-4 is not a complete checkpoint: {message}"):
        make_trainer().train(resume_from_checkpoint=str(path.parent))
    trainer = make_trainer()
    with caplog.at_level("WARNING", logger="transformers"):
        trainer.train(resume_from_checkpoint=True)
    assert any(re.search(f"checkpoint-4 .*passed over: {message}", record.getMessage()) for record in caplog.records)
    assert find_non_finite(path.parent) is None  # saved again


# ---- Files of another run ----


def test_files_of_another_run_are_refused_before_training(checkpoint, tmp_path):
    """torch's fused AdamW would write beyond moments that are too small; a pickle would run its code."""
    trainer = runs.make_killed_trainer(tmp_path)
    steps = []
    trainer.model.register_forward_pre_hook(lambda *args: steps.append(1))
    state = torch.load(checkpoint / "optimizer.pt")
    state["state"][0]["exp_avg"] = torch.zeros(3)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    for name, of_another_run, message in (
        ("optimizer.pt", state, "optimizer.pt: exp_avg of parameter 0 must have shape"),
        ("optimizer.pt", optimizer.state_dict(), "parameter group"),
        ("scheduler.pt", plateau.state_dict(), "scheduler.pt is not the state of a LambdaLR; it lacks base_lrs"),
    ):
        right = (checkpoint / name).read_bytes()
        torch.save(of_another_run, checkpoint / name)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(right)
    for name in ("rng_state.pth", "scheduler.pt", "optimizer.pt"):
        (checkpoint / name).unlink()
        with zipfile.ZipFile(checkpoint / name, "w") as archive:
            archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert steps == []


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_other_optimizers_resume(tmp_path, optim):
    """What each keeps of a parameter is found out, or not looked at."""
    settings = {"optim": optim, "max_steps": 3, "save_steps": 2}
    whole = runs.make_killed_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = runs.make_killed_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = runs.parameters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in runs.parameters(resumed).items())


# ---- The balance loss under every way to compute the loss ----


def make_balanced(tmp_path, coefficient, callback, *, scaler=None, compute_loss_func=None, **arguments):
    """A trainer of one step of two micro-batches, on eight rows."""
    model = runs.make_model(router_aux_loss_coef=coefficient)
    trainer = runs.make_trainer(tmp_path, model, accumulation=2, micro_batch=4, callbacks=[callback], max_steps=1,
                                exact_balance=True, **arguments)  # fmt: skip
    trainer.compute_loss_func = compute_loss_func
    trainer.accelerator.scaler = scaler
    return trainer


def assert_same_gradients(actual, expected):
    scale = max(tensor.norm() for tensor in expected.values())
    assert scale > 1e-2
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5 * float(scale), msg=name)


def mean_of_logits(outputs, labels, num_items_in_batch=None):
    return outputs["logits"].square().mean()


def definition(batch, **config):
    """The gradient of the balance loss of a whole batch, by the function that computes it."""
    model = runs.make_model(router_aux_loss_coef=0.0, **config).train()
    outputs = model.model(**batch, output_router_logits=True, output_selected_experts=True)
    loss = load_balancing_loss(outputs.router_logits, outputs.selected_experts, batch["attention_mask"])
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="module")
def first_batch():
    """Eight rows."""
    rows = runs.Rows().rows[:8]
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": mean_of_logits}],
    ids=["plain", "label smoothing", "compute_loss_func"],
)
def test_the_coefficient_acts_whatever_the_loss(tmp_path, first_batch, arguments):
    actual = runs.balance_gradients(lambda *given: make_balanced(tmp_path, *given, **arguments))
    assert_same_gradients(actual, definition(first_batch))


def test_the_balance_loss_is_scaled_as_float16_losses_are(tmp_path):
    found = [runs.Gradients(), runs.Gradients()]
    for callback, scaler in zip(found, (None, torch.amp.GradScaler("cpu", init_scale=64.0)), strict=True):
        make_balanced(tmp_path, 1.0, callback, scaler=scaler).train()
    expected, scaled = (callback.gradients for callback in found)
    assert_same_gradients({name: tensor / 64 for name, tensor in scaled.items()}, expected)


def record_steps(trainer, monkeypatch):
    """A list to which the trainer's calls of `begin_step` will be added."""
    announced = []
    begin_step = trainer.model.begin_step

    def record(step, **more):
        announced.append((step, more))
        begin_step(step, **more)

    monkeypatch.setattr(trainer.model, "begin_step", record)
    return announced


def test_steps_are_those_of_the_run(finished, tmp_path, monkeypatch):
    """Also where a run resumes in mid-epoch; and training over, no step is known."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    trainer = runs.make_killed_trainer(run, accumulation=2, max_steps=10)
    announced = record_steps(trainer, monkeypatch)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-7"))
    assert [step for step, _ in announced] == [7, 8, 9, None]
    assert trainer.model.model.optimizer_step is None
    assert {more["seed"] for _, more in announced[:-1]} == {trainer.args.seed}

    trainer = runs.make_trainer(tmp_path, runs.make_model(), accumulation=2, micro_batch=4)
    announced = record_steps(trainer, monkeypatch)
    trainer.train()
    sizes = [int(row["attention_mask"].sum()) for row in trainer.train_dataset.rows]
    assert [more["num_tokens"] for _, more in announced[:-1]] == [sum(sizes[:8]), sum(sizes[8:])]


# ---- trl ----


def trl_arguments(tmp_path, **more):
    return dict(
        output_dir=tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, use_cpu=True,
        report_to="none", optim="sgd", max_grad_norm=0.0, train_sampling_strategy="sequential", disable_tqdm=True,
        save_strategy="no", bf16=False, logging_steps=1, **more,
    )  # fmt: skip


def make_sft(trainer_class, tmp_path, tokenizer, rows, model, callback, *, settings=None, **arguments):
    from trl import SFTConfig

    given = {**trl_arguments(tmp_path), "dataset_kwargs": {"skip_prepare_dataset": True}, **(settings or {})}
    return trainer_class(
        model=model, args=SFTConfig(**given, gradient_checkpointing=False), train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer, callbacks=[callback], **arguments,
    )  # fmt: skip


@pytest.mark.parametrize(("source", "arguments"), [("config", {"label_smoothing_factor": 0.1}), ("argument", {})])
def test_sft_has_the_same_balance_gradient(tmp_path, trained_tokenizer, first_batch, arguments, source):
    from modeling_grin.training.trl_trainers import GrinMoeSFTTrainer

    size = {"vocab_size": len(trained_tokenizer)}
    real = [(row, row["attention_mask"].bool()) for row in runs.Rows().rows]
    rows = {key: [row[key][mask].tolist() for row, mask in real] for key in ("input_ids", "labels")}

    def make(coefficient, callback):
        in_config, argument = (coefficient, None) if source == "config" else (7.0, coefficient)
        model = runs.make_model(router_aux_loss_coef=in_config, **size)
        settings = {"router_aux_loss_coef": argument, **arguments}
        trainer = make_sft(GrinMoeSFTTrainer, tmp_path, trained_tokenizer, rows, model, callback, settings=settings,
                           exact_balance=True)  # fmt: skip
        assert trainer.model.config.router_aux_loss_coef == coefficient
        return trainer

    assert_same_gradients(runs.balance_gradients(make), definition(first_batch, **size))


def test_plain_trl_does_not_add_a_second_balance_loss(tmp_path, trained_tokenizer, first_batch):
    """TRL computes Mixtral's of the router logits that it is given; they carry no gradient while ours acts."""
    from trl import SFTTrainer

    rows = {key: [row[key].tolist() for row in runs.Rows().rows] for key in ("input_ids", "labels")}
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}

    def make(coefficient, callback):
        model = runs.make_model(router_aux_loss_coef=coefficient)
        return make_sft(SFTTrainer, tmp_path, trained_tokenizer, rows, model, callback, settings=settings)

    whole = {**first_batch, "attention_mask": torch.ones_like(first_batch["attention_mask"])}  # with their padding
    assert_same_gradients(runs.balance_gradients(make), definition(whole))


def test_dpo_has_the_balance_gradient_and_no_noise(tmp_path, trained_tokenizer):
    """The tokens are those that are passed forward with a gradient: both answers, and not the reference's."""
    from trl import DPOConfig

    from modeling_grin.training.trl_trainers import GrinMoeDPOTrainer

    config = {"vocab_size": len(trained_tokenizer), "router_sampling": False, "router_jitter_noise": 0.1}
    generator = random.Random(0)
    words = ["def", "return", "import", "class", "self", "value", "index", "range", "list", "yield"]
    lengths = {"prompt": 3, "chosen": 4, "rejected": 7}
    columns = {key: [" ".join(generator.choices(words, k=n)) for _ in range(8)] for key, n in lengths.items()}
    trainers = []

    def make(coefficient, callback):
        trainers.append(GrinMoeDPOTrainer(
            model=runs.make_model(router_aux_loss_coef=coefficient, **config), ref_model=runs.make_model(**config),
            args=DPOConfig(**trl_arguments(tmp_path), gradient_checkpointing=False),
            train_dataset=Dataset.from_dict(columns), processing_class=trained_tokenizer, callbacks=[callback],
            exact_balance=True,
        ))  # fmt: skip
        return trainers[-1]

    actual = runs.balance_gradients(make)
    assert [trainer.state.log_history[0]["rewards/margins"] for trainer in trainers] == [0, 0]
    rows = list(trainers[0].train_dataset)
    batches = [trainers[0].data_collator(part) for part in (rows[:4], rows[4:])]
    length = max(batch["input_ids"].shape[1] for batch in batches)
    whole = {
        key: torch.cat([torch.nn.functional.pad(batch[key], (0, length - batch[key].shape[1])) for batch in batches])
        for key in ("input_ids", "attention_mask")
    }
    assert_same_gradients(actual, definition(whole, **config))


# ---- Errors ----


def test_tokens_without_an_embedding_are_refused(tmp_path, trained_tokenizer):
    """Before training where a tokenizer or a dataset says so, and else before the step."""
    model, rows = runs.make_model(), Dataset.from_dict({"input_ids": [[0, 130], [131]]})
    for dataset in (rows, rows.select([1])):
        with pytest.raises(
            ValueError, match=r"input_ids of train_dataset must be ids from 0 to 130 .*; got .* to 131"
        ):
            GrinMoeTrainer(model, train_dataset=dataset)
        with pytest.raises(ValueError, match="input_ids of eval_dataset a must be"):
            GrinMoeTrainer(model, eval_dataset={"a": dataset})
    GrinMoeTrainer(model, train_dataset=rows.select([0]))
    with pytest.raises(ValueError, match=r"ids up to 1023, the model's vocab_size is 131: .*resize_token_embeddings"):
        GrinMoeTrainer(model, processing_class=trained_tokenizer)
    trainer = runs.make_trainer(tmp_path, model)
    trainer.train_dataset.rows[9]["input_ids"][0] = 131
    with pytest.raises(ValueError, match=r"input_ids of step 2 must be ids from 0 to 130 .*; got .* to 131"):
        trainer.train()


def test_masked_labels_are_refused(tmp_path):
    trainer = runs.make_trainer(tmp_path, runs.make_model(), micro_batch=4)
    for row in trainer.train_dataset.rows[4:8]:  # the second step
        row["labels"] = row["labels"].masked_fill(torch.tensor(True), -100)
    with pytest.raises(ValueError, match=r"step 2: all labels of the batch are masked \(-100\)"):
        trainer.train()


def test_a_sequence_beyond_the_context_is_refused(tmp_path):
    """Packed rows may be longer: what counts are the positions."""
    trainer = runs.make_trainer(tmp_path, runs.make_model(max_position_embeddings=runs.LENGTH - 1))
    with pytest.raises(ValueError, match=r"=12 is longer than .*max_position_embeddings=11"):
        trainer.train()
    for row in trainer.train_dataset.rows:
        row["position_ids"] = torch.arange(runs.LENGTH) % 6
        row.pop("attention_mask")
    trainer.train()
    assert trainer.state.global_step == 2


def test_what_cannot_be_right_is_refused(tmp_path, monkeypatch):
    classifier = GrinMoeForSequenceClassification(runs.make_model().config)
    with pytest.raises(ValueError, match="exact_balance with GrinMoeForSequenceClassification, no language"):
        runs.make_trainer(tmp_path, classifier, exact_balance=True)
    trainer = runs.make_trainer(tmp_path, runs.make_model(expert_dropout=0.1))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed"):
        trainer._check_support()
    trainer.is_deepspeed_enabled = False
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
    with pytest.raises(ValueError, match="dropout with FSDP's activation_checkpointing"):
        trainer._check_support()


def test_counting_beforehand_draws_nothing(tmp_path):
    """Dropout is drawn as without `exact_balance`: the first step's loss is the same to the last bit."""
    arguments = {**runs.RESUME_ARGUMENTS, "save_strategy": "no", "accumulation": 2, "max_steps": 1}
    losses = []
    for exact_balance in (False, True):
        trainer = runs.make_killed_trainer(tmp_path, exact_balance=exact_balance, **arguments)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_only_the_model_may_be_saved(tmp_path):
    trainer = runs.make_killed_trainer(tmp_path, save_only_model=True, save_total_limit=1)
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]
    assert find_problems(tmp_path / "checkpoint-9") == []
    assert not (tmp_path / "checkpoint-9" / "optimizer.pt").exists()


def test_a_failed_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    trainer = runs.make_killed_trainer(tmp_path)

    def fail(output_dir):
        raise OSError("disk full")

    monkeypatch.setattr(trainer, "_save_scaler", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["_incomplete"]
    assert trainer._get_output_dir(None) == str(tmp_path)


def test_a_metric_that_is_nan_is_never_the_best(tmp_path):
    trainer = runs.make_killed_trainer(tmp_path, eval_dataset=runs.Rows(4), save_steps=2, **BEST)
    scores = {**SCORES, 2: float("nan"), 8: float("nan")}
    trainer.compute_metrics = lambda prediction: {"score": scores[trainer.state.global_step]}
    trainer.train()
    assert trainer.state.best_global_step == 6


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 10, 10).tril(), torch.ones(2, 10).long()])
def test_tokens_are_counted_as_the_model_counts_them(tmp_path, mask):
    trainer = runs.make_trainer(tmp_path, runs.make_model())
    batch = {"input_ids": torch.arange(20).reshape(2, 10)} | ({} if mask is None else {"attention_mask": mask})
    trainer.state.max_steps, trainer._initial_global_step = 1, 0
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert trainer._announced["num_tokens"] == 20
    for unusable in ({"inputs_embeds": torch.zeros(2, 10, 32)}, [1, 2]):
        with pytest.raises(ValueError, match="batches must be mappings with input_ids"):
            trainer.get_batch_samples(iter([unusable]), 1, torch.device("cpu"))
