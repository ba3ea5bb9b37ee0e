"""RoutingCallback: every number against plain loops over the routing that a real trainer's model did."""

import json
import math
import os
from pathlib import Path

import pytest
import runs
import torch
from datasets import Dataset
from distributed.launch import launch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed
from transformers.trainer_callback import TrainerCallback

from modeling_grin import GrinMoeForCausalLM
from modeling_grin.training import GrinMoeTrainer
from modeling_grin.training import callback as callback_module
from modeling_grin.training.callback import RoutingCallback

NUM_EXPERTS = 6
METRICS = {
    "load_max", "max_vio", "load_entropy", "dead_experts", "router_entropy", "near_tie_rate", "non_argmax_rate",
    "balance_loss",
}  # fmt: skip


def make_model(seed: int = 1, **overrides) -> GrinMoeForCausalLM:
    """Tiny, with routers undecided enough for near-ties, ties and other draws than the best one."""
    settings = {"router_jitter_noise": 0.2, "input_jitter_noise": 0.01, "router_aux_loss_coef": 0.01, **overrides}
    return runs.make_model(seed, **settings)


def make_trainer(folder: Path, model, num_rows: int = 36, layers=(), observed=True, **arguments) -> Trainer:
    """Six steps of three micro-batches, logged after every other one."""
    settings = {"micro_batch": 2, "accumulation": 3, "max_steps": 6, "logging_steps": 2, "learning_rate": 1e-2,
                "optim": "adamw_torch", "train_sampling_strategy": "random", "trainer_class": Trainer}  # fmt: skip
    set_seed(0)
    trainer = runs.make_trainer(folder, model, **{**settings, **arguments})
    trainer.train_dataset = runs.Rows(num_rows)
    if observed:
        trainer.add_callback(RoutingCallback(trainer, layers))
    return trainer


class Witness(TrainerCallback):
    """Keeps the routing that the blocks did in training, by optimizer step and forward pass, with hooks of its own."""

    def __init__(self, model):
        self.steps: list[list[dict]] = []
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(self.on_forward, with_kwargs=True)
        for layer in decoder.layers:
            layer.block_sparse_moe.register_forward_hook(self.on_block)

    def on_step_begin(self, *args, **kwargs):
        self.steps.append([])

    def on_forward(self, decoder, args, kwargs):
        if decoder.training and torch.is_grad_enabled():
            mask = kwargs["attention_mask"]
            self.steps[-1].append({"mask": None if mask is None else mask.flatten().tolist(), "layers": []})

    def on_block(self, block, args, output):
        if block.training and torch.is_grad_enabled():
            _, logits, experts = output
            self.steps[-1][-1]["layers"].append((logits.detach().double().tolist(), experts.tolist()))


def expected_layer(steps: list[list[dict]], layer: int, eps: float) -> dict:
    """All metrics of a layer over `steps`, in plain Python."""
    total_counts = [0] * NUM_EXPERTS
    entropies, near_ties, others, balance = [], [], [], []
    for forwards in steps:
        counts, probabilities, tokens = [0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS, 0
        for forward in forwards:
            logits, experts = forward["layers"][layer]
            mask = forward["mask"] or [1] * len(logits)
            for z, chosen, real in zip(logits, experts, mask, strict=True):
                if not real:
                    continue
                tokens += 1
                weights = [math.exp(value - max(z)) for value in z]
                p = [weight / sum(weights) for weight in weights]
                entropies.append(-sum(value * math.log(value) for value in p))
                best = max(z)
                near_ties.append(sum((best - v) / max(abs(v), best) <= 2 * eps for v in z) > 1)
                left = set(range(NUM_EXPERTS))
                for expert in chosen:
                    counts[expert] += 1
                    others.append(z[expert] < max(z[i] for i in left))
                    left.remove(expert)
                for i in range(NUM_EXPERTS):
                    probabilities[i] += p[i]
        balance.append(
            NUM_EXPERTS * sum(c / sum(counts) * p / tokens for c, p in zip(counts, probabilities, strict=True))
        )
        total_counts = [a + b for a, b in zip(total_counts, counts, strict=True)]
    load = [count / sum(total_counts) for count in total_counts]
    return {
        "load_max": NUM_EXPERTS * max(load),
        "max_vio": NUM_EXPERTS * max(load) - 1,
        "load_entropy": -sum(share * math.log(share) for share in load if share) / math.log(NUM_EXPERTS),
        "dead_experts": sum(count == 0 for count in total_counts),
        "router_entropy": sum(entropies) / len(entropies) / math.log(NUM_EXPERTS),
        "near_tie_rate": sum(near_ties) / len(near_ties),
        "non_argmax_rate": sum(others) / len(others),
        "balance_loss": sum(balance) / len(balance),
        "load": load,
    }


def expected(steps: list[list[dict]], eps: float, layers: tuple[int, ...] = ()) -> dict[str, float]:
    by_layer = [expected_layer(steps, layer, eps) for layer in range(2)]
    scalars = {f"routing/{name}": sum(values[name] for values in by_layer) / 2 for name in METRICS}
    scalars["routing/dead_experts"] = sum(values["dead_experts"] for values in by_layer)
    for name in ("load_max", "balance_loss"):
        scalars[f"routing/{name}_worst"] = max(values[name] for values in by_layer)
    for layer in layers:
        scalars.update({f"routing/layer_{layer}/{name}": by_layer[layer][name] for name in METRICS})
    return scalars


def logged(trainer: Trainer) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if key.startswith("routing/") and "to_task" not in key}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Evaluated after each step."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model()
    witness = Witness(model)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": runs.Rows(4)}
    trainer = make_trainer(folder, model, layers=[1], callbacks=[witness], **evaluation)
    trainer.train()
    return trainer, witness, folder


def test_every_metric_is_that_of_plain_loops_over_the_routing(run):
    """Over both steps of a log, all three micro-batches of a step; neither padding nor evaluation counts."""
    trainer, witness, _ = run
    assert [len(forwards) for forwards in witness.steps] == [3] * 6
    entries = logged(trainer)
    assert len(entries) == 3
    for index, entry in enumerate(entries):
        wanted = expected(witness.steps[2 * index : 2 * index + 2], eps=0.2, layers=(1,))
        assert entry == pytest.approx(wanted, rel=1e-5)
        # Nothing is compared that is not there.
        assert 0.05 < entry["routing/non_argmax_rate"] < entry["routing/near_tie_rate"] < 1
        assert entry["routing/load_max_worst"] > entry["routing/load_max"] > 1


def test_file_holds_every_layer(run):
    _, witness, folder = run
    lines = [json.loads(line) for line in (folder / "routing" / "layers.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in lines] == [2, 4, 6]
    for index, line in enumerate(lines):
        for layer in range(2):
            wanted = expected_layer(witness.steps[2 * index : 2 * index + 2], layer, eps=0.2)
            assert line.keys() == wanted.keys() | {"balance_to_task"}
            assert line["load"][layer] == pytest.approx(wanted.pop("load"), rel=1e-6)
            assert {name: line[name][layer] for name in METRICS} == pytest.approx(wanted, rel=1e-5)


def test_balance_to_task_is_the_ratio_of_two_backward_passes(tmp_path):
    """Of a step without padding: by the losses alone, without a trainer."""
    ids = torch.randint(5, 131, (2, 10), generator=torch.Generator().manual_seed(0))
    settings = {"router_estimator": "gshard", "input_jitter_noise": 0.0, "router_aux_loss_coef": 0.3}  # no noise
    model = make_model(0, **settings)
    lengths = {}
    for coefficient in (0.3, 0.0):
        model.config.router_aux_loss_coef = coefficient
        model.begin_step(0, num_tokens=20)
        gates = [layer.block_sparse_moe.gate.weight for layer in model.train().model.layers]
        model(input_ids=ids, labels=ids).loss.backward()
        lengths[coefficient] = [gate.grad.clone() for gate in gates]
        model.zero_grad()
    model.begin_step(None)
    model.config.router_aux_loss_coef = 0.3
    balance = [whole - task for whole, task in zip(lengths[0.3], lengths[0.0], strict=True)]

    trainer = make_trainer(tmp_path, model, max_steps=1, logging_steps=1, accumulation=1, trainer_class=GrinMoeTrainer)
    trainer.train_dataset.rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer.train()
    (line,) = map(json.loads, (tmp_path / "routing" / "layers.jsonl").read_text().splitlines())
    # An earlier layer's router also gets the later layers' balance losses, which count as the task.
    last = balance[-1].norm() / lengths[0.0][-1].norm()
    assert line["balance_to_task"][-1] == pytest.approx(last.item(), rel=1e-4)
    norm = [torch.stack(list(grads)).norm().item() for grads in (balance, lengths[0.0])]
    assert trainer.state.log_history[0]["routing/balance_to_task"] == pytest.approx(norm[0] / norm[1], rel=0.03)
    assert model.model.router_gradients is None


def test_a_resumed_run_has_a_line_for_each_step(tmp_path):
    """The lines after the checkpoint give way to those of the steps that are taken again; a torn line, too."""
    path = tmp_path / "routing" / "layers.jsonl"
    written = []
    for resume_from in (None, str(tmp_path / "checkpoint-3")):
        saving = {"save_strategy": "steps", "save_steps": 3}
        make_trainer(tmp_path, make_model(), max_steps=5, logging_steps=1, **saving).train(resume_from)
        written.append(path.read_text())
        with path.open("a") as file:
            file.write('{"step": 6, "load_')
    assert [json.loads(line)["step"] for line in written[0].splitlines()] == [1, 2, 3, 4, 5]
    assert written[0] == written[1]
    assert [file.name for file in path.parent.iterdir() if "jsonl" in file.name] == ["layers.jsonl"]


def test_training_after_one_that_raised_counts_its_own_steps(tmp_path):
    class Raises(TrainerCallback):
        raises = True

        def on_step_end(self, *args, **kwargs):
            if self.raises:
                raise RuntimeError("out of memory")

    histories = []
    for first_raises in (False, True):
        raises, model = Raises(), make_model()
        trainer = make_trainer(tmp_path / f"{first_raises}", model, learning_rate=0.0, callbacks=[raises])
        if first_raises:
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train()
        raises.raises = False
        set_seed(0)
        trainer.train()
        histories.append(logged(trainer))
        assert model.get_decoder().routing_observer is None
        lines = Path(trainer.args.output_dir, "routing", "layers.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    assert histories[0] == histories[1]


def set_router_logits(model, *values: float) -> None:
    """Make every layer's router see the same for every token, and answer `values`."""
    for layer in model.get_decoder().layers:
        norm, gate = layer.post_attention_layernorm, layer.block_sparse_moe.gate
        with torch.no_grad():
            norm.weight.zero_()
            gate.weight.copy_(torch.tensor(values).unsqueeze(-1) * norm.bias / norm.bias.square().sum())


def test_collapsed_router(tmp_path):
    """All tokens to the same two of six experts, in both layers: four dead experts in each."""
    model = make_model(input_jitter_noise=0.0, router_jitter_noise=0.01)
    values = [3.0, -1.0, 0.5, 2.0, 0.0, 1.0]
    set_router_logits(model, *values)
    trainer = make_trainer(tmp_path, model, num_rows=6, max_steps=1, logging_steps=1)
    trainer.train()
    p = torch.tensor(values, dtype=torch.float64).softmax(-1).tolist()
    wanted = {
        "load_max": 3, "load_max_worst": 3, "max_vio": 2, "load_entropy": math.log(2) / math.log(6), "dead_experts": 8,
        "router_entropy": -sum(x * math.log(x) for x in p) / math.log(6), "near_tie_rate": 0, "non_argmax_rate": 0,
        "balance_loss": 3 * (p[0] + p[3]), "balance_loss_worst": 3 * (p[0] + p[3]),
    }  # fmt: skip
    assert logged(trainer) == [pytest.approx({f"routing/{name}": value for name, value in wanted.items()}, rel=1e-5)]


def test_observation_breaks_no_graph():
    """Nor does it in a compiled forward pass, which has the same sums."""
    model = make_model(router_aux_loss_coef=0.0, router_jitter_noise=0.0, input_jitter_noise=0.0)
    sums = []

    def observe(*routing):
        sums.append(callback_module.routing_sums(*routing, 0.2))

    model.train().get_decoder().routing_observer = observe
    rows = runs.Rows(2)
    inputs = {key: torch.stack([row[key] for row in rows.rows]) for key in rows[0]}
    for forward in (model, torch.compile(model, backend="eager", fullgraph=True)):
        forward(**inputs, use_cache=False)
    assert sums[0].shape == (2, 2 * NUM_EXPERTS + 4) and sums[0][0, -1] == inputs["attention_mask"].sum()
    torch.testing.assert_close(sums[0], sums[1])


def test_observation_changes_nothing_and_counts_recomputed_passes_once(tmp_path):
    histories, logs = [], []
    for observed, use_reentrant in ((False, None), (True, None), (True, False), (True, True)):
        kwargs = {"activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        recomputed = {} if use_reentrant is None else {"activation_checkpointing": True, **kwargs}
        trainer = make_trainer(tmp_path, make_model(), observed=observed, **recomputed)
        trainer.train()
        histories.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history[:-1]])
        logs.append(logged(trainer))
    assert histories[0] == histories[1] == histories[2] == histories[3]
    assert logs[1] == logs[2] == logs[3]


@pytest.mark.parametrize(
    ("model", "layers", "arguments", "message"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=131, hidden_size=16, intermediate_size=16,
                                              num_hidden_layers=1, num_attention_heads=2)), [], {}, "LlamaModel"),
        (make_model, [0, 2], {}, r"layers \[2\] are not among the model's layers 0 to 1"),
        (make_model, [], {"logging_strategy": "no"}, "logging_strategy='no'"),
    ],
)  # fmt: skip
def test_what_cannot_be_observed_is_refused(tmp_path, model, layers, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model(), layers=layers, **arguments).train()


def test_dpo(tmp_path, trained_tokenizer):
    """TRL's trainer, with LoRA: the reference passes, without the adapter and without gradient, do not count."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    model = make_model(vocab_size=len(trained_tokenizer), eos_token_id=3, router_sampling=True)
    witness = Witness(model)
    texts = [f"def f{n}(x):" + " return x" * n for n in range(1, 9)]
    dataset = Dataset.from_dict({"prompt": texts, "chosen": [" return 1"] * 8, "rejected": [" return None or 2"] * 8})
    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"), save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        bf16=False, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, logging_steps=1,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=dataset, processing_class=trained_tokenizer, callbacks=[witness],
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
    )  # fmt: skip
    trainer.add_callback(RoutingCallback(trainer))
    trainer.train()
    entries = logged(trainer)
    assert len(entries) == 2
    for step, entry in enumerate(entries):
        assert len(witness.steps[step]) == 2
        assert entry == pytest.approx(expected(witness.steps[step : step + 1], eps=0.2), rel=1e-5)


def test_two_processes_count_together(tmp_path):
    """Both ranks log the same, the loops' results over the routing of both; one of them writes files."""
    launch(__file__, 2, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["logged"] == ranks[1]["logged"]
    assert ranks[0]["steps"] != ranks[1]["steps"]
    steps = [first + second for first, second in zip(ranks[0]["steps"], ranks[1]["steps"], strict=True)]
    for index, entry in enumerate(ranks[0]["logged"]):
        assert entry == pytest.approx(expected(steps[2 * index : 2 * index + 2], eps=0.2), rel=1e-5)
    assert len((tmp_path / "routing" / "layers.jsonl").read_text().splitlines()) == 2


def main(folder: str) -> None:
    """One of two processes."""
    model = make_model()
    witness = Witness(model)
    trainer = make_trainer(Path(folder), model, num_rows=48, ddp_backend="gloo", max_steps=4, callbacks=[witness])
    trainer.train()
    found = {"logged": logged(trainer), "steps": witness.steps}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
