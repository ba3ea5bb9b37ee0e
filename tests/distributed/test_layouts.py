"""One global batch, however it is split: processes, gradient accumulation, micro-batches. Real gloo processes."""

import pytest
import runs
import torch
from cases import run_cases, update_difference

from modeling_grin.compat_grinmoe import TRANSFORMERS

LAYOUTS = [(1, 1, 8), (1, 4, 2), (1, 8, 1), (2, 1, 4), (2, 4, 1), (4, 2, 1)]  # processes, accumulation, micro-batch
TOLERANCE = 1e-5
NOISE = {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1}


def settings(accumulation, micro_batch, average, **more):
    return {"accumulation": accumulation, "micro_batch": micro_batch, "average_tokens_across_devices": average, **more}


def cases():
    """(processes, name, arguments), few: on two cores a run of 4 processes takes a second."""
    for processes, accumulation, micro_batch in LAYOUTS:
        layout = f"{processes}-{accumulation}-{micro_batch}"
        yield processes, f"various-{layout}-True", settings(accumulation, micro_batch, True)
        yield processes, f"exact-{layout}", settings(accumulation, micro_batch, True, exact_balance=True, config=NOISE)
        if processes > 1:
            yield processes, f"various-{layout}-False", settings(accumulation, micro_batch, False)
    for processes in (1, 2, 4):
        yield processes, f"noise-{processes}", settings(1, 8 // processes, True, config=NOISE)
    yield 1, "various-no_balance", settings(1, 8, True, config={"router_aux_loss_coef": 0.0})
    if TRANSFORMERS >= (5, 18):  # before, Trainer reads the optimizer of several ranks for a device "cpu:0"
        yield 2, "resume", {"run": "resume_case", "resumed_at": 3, "accumulation": 2, "micro_batch": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> results of every rank, all runs of one number of processes in one launch."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {}
    for processes in (1, 2, 4):
        mine = {name: arguments for n, name, arguments in cases() if n == processes}
        results |= run_cases("runs", folder, processes, mine, run="train_case")
    return results


def difference(actual, expected):
    return update_difference(actual, expected, dict(runs.make_model().named_parameters()))


def reference(processes, accumulation, micro_batch, average):
    """The parameters after training, in float64, by the definition of each loss: cross-entropy and, per layer,
    `alpha E / N sum_t sum_i f_i p_ti` with f of the micro-batches so far, over all ranks. Deterministic routing."""
    model = runs.make_model(router_aux_loss_coef=0.0, experts_implementation="eager").double().train()
    rows = runs.Rows()
    logits_of = []  # of the routers, per layer
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.register_forward_hook(lambda module, args, output: logits_of.append(output))
    num_experts, top_k, num_layers = 6, 2, len(model.model.layers)
    for step in range(runs.STEPS):
        batch = [rows[step * runs.GLOBAL_BATCH + i] for i in range(runs.GLOBAL_BATCH)]
        rank_of = [i // micro_batch % processes for i in range(runs.GLOBAL_BATCH)]
        labels_of_rank = [0] * processes
        for row, rank in zip(batch, rank_of, strict=True):
            labels_of_rank[rank] += int((row["labels"][1:] != -100).sum())
        num_tokens = sum(int(row["attention_mask"].sum()) for row in batch)
        counts = [[0] * num_experts for _ in range(num_layers)]
        for micro in range(accumulation):
            first = micro * processes * micro_batch
            forwards = []
            for i in range(first, first + processes * micro_batch):
                logits_of.clear()
                ids, mask, labels = (batch[i][key] for key in ("input_ids", "attention_mask", "labels"))
                logits = model(ids[None], attention_mask=mask[None]).logits[0]
                forwards.append((rank_of[i], logits, labels, [z[mask.bool()] for z in logits_of]))
            for _, _, _, layers in forwards:
                for layer, z in enumerate(layers):
                    for expert in z.topk(top_k).indices.flatten().tolist():
                        counts[layer][expert] += 1
            loss = torch.zeros((), dtype=torch.float64)
            for rank, logits, labels, layers in forwards:
                weight = 1 / sum(labels_of_rank) if average else 1 / (processes * labels_of_rank[rank])
                for position in range(1, len(labels)):
                    if labels[position] != -100:
                        loss = loss - weight * logits[position - 1].log_softmax(-1)[labels[position]]
                for layer, z in enumerate(layers):
                    fractions = torch.tensor(counts[layer], dtype=torch.float64) / sum(counts[layer])
                    balance = num_experts / (num_layers * num_tokens) * (z.softmax(-1) @ fractions).sum()
                    loss = loss + runs.COEFFICIENT * balance
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= runs.LEARNING_RATE * parameter.grad
                parameter.grad = None
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def label(layout):
    return "-".join(map(str, layout))


@pytest.mark.parametrize(
    ("layout", "average"), [(layout, average) for layout in LAYOUTS for average in (True, False)[: layout[0]]]
)
def test_any_data_follow_the_definition(trained, layout, average):
    """Against float64 loops: f of all ranks and of the micro-batches so far; without accumulation, the global one."""
    actual = trained[f"various-{label(layout)}-{average}"]
    expected = reference(*layout, average)
    assert difference(actual[0], expected) < 3 * TOLERANCE  # float32 and float64
    for rank, other in enumerate(actual):
        assert all(torch.equal(other[name], actual[0][name]) for name in other), f"rank {rank}"


def test_any_data_without_accumulation_give_the_same_update(trained):
    base = trained["various-1-1-8-True"][0]
    assert difference(trained["various-no_balance"][0], base) > 0.1
    assert difference(trained["various-1-4-2-True"][0], base) > 100 * TOLERANCE  # the running f is not exact here
    assert difference(trained["various-2-1-4-True"][0], base) < TOLERANCE


def test_sampled_routing_does_not_depend_on_the_layout(trained):
    """Noise is a function of the token; and with all micro-batches counted beforehand any layout is exact."""
    base = trained["noise-1"][0]
    assert difference(base, trained["various-1-1-8-True"][0]) > 0.1  # noise does something
    for processes in (2, 4):
        assert difference(trained[f"noise-{processes}"][0], base) < TOLERANCE, processes
    for layout in LAYOUTS:
        assert difference(trained[f"exact-{label(layout)}"][0], base) < TOLERANCE, layout


@pytest.mark.skipif(TRANSFORMERS < (5, 18), reason="transformers 5.17 cannot resume on several CPU ranks")
def test_two_processes_resume_bit_for_bit(trained):
    for rank, result in enumerate(trained["resume"]):
        assert result["resumed_losses"] == result["whole_losses"], f"rank {rank}"
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(result["files"])
        assert set(result["folders"]) == {f"checkpoint-{step}" for step in (3, 6, 9)}
        for name, expected in result["whole"].items():
            assert torch.equal(result["resumed"][name], expected), f"rank {rank}: {name}"
