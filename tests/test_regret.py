"""Routing regret: other routes by another mechanism, and models in which the answer is known."""

import csv
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from grin_moe_cli import app
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, modeling_grinmoe
from modeling_grin.analysis.regret import routing_regret
from modeling_grin.routing_grinmoe import route

LENGTH, EXPERTS = 9, 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GrinMoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=EXPERTS, router_jitter_noise=0.2, initializer_range=0.3,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return GrinMoeForCausalLM(config).double().eval()


def batch(rows=3, seed=0):
    ids = torch.randint(40, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_savings_are_those_of_logits_set_by_hand(model, monkeypatch):
    """A token is found by its loss change: for every token and layer, `route` itself is given other logits."""
    rows = batch()
    regret = routing_regret(model, [rows], 3, alternatives=2, seed=1)
    assert regret.saved.shape == (2, 3, 2) and regret.near_ties.shape == (2, 3)

    def loss_of(row, layer, position, number):
        calls = []

        def other_route(logits, top_k, *args, **kwargs):
            if len(calls) == layer and number:
                token = row * LENGTH + position
                order = sorted(range(EXPERTS), key=lambda i: -logits[token, i].item())
                logits = logits.clone()
                logits[token, order[1 : 1 + number]] = -torch.inf
            calls.append(logits)
            return route(logits, top_k, *args, **kwargs)

        monkeypatch.setattr(modeling_grinmoe, "route", other_route)
        with torch.no_grad():
            output = model(rows["input_ids"], rows["attention_mask"]).logits[row].log_softmax(-1)
        monkeypatch.setattr(modeling_grinmoe, "route", route)
        ids, mask = rows["input_ids"][row], rows["attention_mask"][row]
        return -sum(output[t, ids[t + 1]].item() for t in range(LENGTH - 1) if mask[t + 1]), calls

    for layer in range(2):
        for row in range(3):
            candidates = {}
            for position in range(4 if row == 0 else 0, LENGTH - 1):
                before, calls = loss_of(row, layer, position, 0)
                candidates[position] = [before - loss_of(row, layer, position, number)[0] for number in (1, 2)]
            matches = [
                position
                for position, values in candidates.items()
                if values == pytest.approx(regret.saved[layer, row].tolist(), rel=1e-9, abs=1e-11)
            ]
            assert len(matches) == 1
            z = sorted(calls[layer][row * LENGTH + matches[0]].tolist(), reverse=True)[1:]
            tie = (z[0] - z[1]) / max(abs(z[1]), z[0]) <= 0.4
            assert regret.near_ties[layer, row] == tie
    best = regret.saved.amax(-1).clamp(min=0)
    assert torch.equal(regret.regret(), best.mean(1))
    assert torch.equal(regret.better(), (best > 0).double().mean(1))
    assert torch.equal(regret.runner_up(), -regret.saved[..., 0].mean(1))


def test_equal_experts_leave_nothing_to_regret(model):
    model.config.router_jitter_noise = 0.0
    for layer in model.model.layers:
        for weight in layer.block_sparse_moe.experts.parameters():
            weight.data[:] = weight.data[:1]
    regret = routing_regret(model, [batch()], 3)
    assert regret.saved.abs().max() < 1e-12


def test_a_harmful_expert_is_regretted(model):
    """The last layer always takes expert 0 second, which shouts a token that never comes; all others are silent."""
    layer, shouted = model.model.layers[1], 7
    block, norm, direction = (
        layer.block_sparse_moe,
        layer.post_attention_layernorm,
        torch.tensor([1.0, -1.0] + 14 * [0]),
    )
    norm.weight.data.zero_()
    norm.bias.data.copy_(torch.eye(16)[0])  # every token's input, so that the logits are a column of the router
    block.gate.weight.data[:, 0] = torch.tensor([2.0, 9.0, 1.0, 0.5, 0.1])
    block.experts.gate_up_proj.data[0, :, 0] = 1.0
    block.experts.down_proj.data.zero_()[0] = 100.0 * direction[:, None]
    model.lm_head.weight.data[shouted] = 10.0 * direction
    rows = batch(8, seed=3)
    rows["input_ids"].masked_fill_(rows["input_ids"] == shouted, 8)
    regret = routing_regret(model, [rows], 8)
    assert regret.better().tolist()[1] == 1
    assert regret.saved[1].amin() > 20  # nats
    assert regret.saved[0].amax() < 20


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="alternatives must be from 1 to 3"):
        routing_regret(model, [batch()], 3, alternatives=4)
    single = {"input_ids": torch.ones(2, 1, dtype=torch.long)}
    with pytest.raises(ValueError, match="must hold rows of at least two tokens"):
        routing_regret(model, [single], 3)


def test_command_prints_and_writes_the_regret(tiny_release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("import this\n" * 40)
    arguments = ["routing", str(tiny_release), "--data", "code=text.txt", "--regret", "4", "--alternatives", "2"]
    result = CliRunner().invoke(app, [*arguments, "--sequence", "16", "--output-dir", "out"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Regret, in 0.001 nats" in result.output
    rows = list(csv.DictReader((tmp_path / "out" / "regret.csv").open()))
    assert [row["layer"] for row in rows] == [str(number) for number in range(len(rows))]
    assert all(row["tokens"] == "4" and float(row["regret"]) >= 0 for row in rows)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page[page.index("<h2>Routing regret") :])[:7]
    saved, better = ([float(row[name]) for row in rows] for name in ("regret", "better"))
    assert cells[0] == "code" and cells[2] == f"{1e3 * sum(saved) / len(rows):.2f}"
    assert cells[4] == f"{sum(better) / len(rows):.1%}" and all(cell in result.output for cell in cells)
    assert 'href="regret.csv"' in page and (tmp_path / "out" / "regret.png").read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, [*arguments, "--sequence", "16", "--output-dir", "out", "--json"])
    assert json.loads(result.stdout)["regret"]["code"] == pytest.approx([float(row["regret"]) for row in rows])
