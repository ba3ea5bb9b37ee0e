"""The deployed loss's gradient: closed form, a smooth case by autograd, and a boundary by hand."""

import csv

import pytest
import torch
from typer.testing import CliRunner

from grin_moe_cli import app
from modeling_grin import ROUTER_ESTIMATORS
from modeling_grin.analysis.deployed import (
    Population,
    deployed_gradient,
    deployed_share,
    make_population,
    mean_estimate,
    measured_share,
)


@pytest.mark.parametrize("logit", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("jitter_eps", [0.01, 0.1, 0.3])
def test_the_share_of_the_deployed_gradient_is_a_tanh(jitter_eps, logit):
    """v2's expected gradient, summed over the differences of two logits, is tanh(r z / (1 - r)) / 2."""
    measured = measured_share(ROUTER_ESTIMATORS["sparsemixer_v2"], jitter_eps, logit)
    assert measured == pytest.approx(deployed_share(jitter_eps, logit), rel=1e-3)


@pytest.mark.parametrize("estimator", ["gshard", "dense"])
def test_where_every_expert_is_taken_differences_equal_the_estimate(estimator):
    """No boundary is left, so that autograd through the gates is exact."""
    population = make_population(num_experts=3, top_k=1, num_tokens=200, hidden=8, seed=0)
    halves = deployed_gradient(population, ROUTER_ESTIMATORS[estimator], 3, 0.1)
    estimate = mean_estimate(population, ROUTER_ESTIMATORS[estimator], 3, 0.1)
    assert (halves.mean(0) - estimate).norm() / estimate.norm() < 2e-3  # the error of the step


def test_on_a_line_the_deployed_gradient_is_the_jump_at_the_boundary():
    """Two experts, tokens (1, u, 0, ...) with u even on [-1, 1]; expert 0 wins where w0 + u > 0. Moving w0 by e sends
    e / 2 of the tokens to expert 0, whose loss is 1/2 less: -1/4, while no gate has a gradient far from ties."""
    num_tokens = 40_000
    tokens = torch.zeros(num_tokens, 8, dtype=torch.float64)
    tokens[:, 0] = 1.0
    tokens[:, 1] = torch.linspace(-1, 1, num_tokens, dtype=torch.float64)[torch.randperm(num_tokens)]
    outputs = torch.zeros(num_tokens, 2, 8, dtype=torch.float64)
    outputs[:, 1, 0] = 1.0  # off the target 0
    router = torch.zeros(2, 8, dtype=torch.float64)
    router[0, 1] = 1.0
    population = Population(tokens, outputs, torch.zeros(num_tokens, 8, dtype=torch.float64), router)
    gradient = deployed_gradient(population, ROUTER_ESTIMATORS["sparsemixer_v2"], 1, 1e-6).mean(0)
    assert gradient[0, 0].item() == pytest.approx(-0.25, rel=0.02)
    assert gradient[1, 0].item() == pytest.approx(0.25, rel=0.02)


def test_command_holds_every_estimator_to_its_inference(tmp_path):
    arguments = ["gradients", "--target", "deployed", "--tokens", "200", "--populations", "3", "--output-dir"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = list(csv.DictReader((tmp_path / "deployed.csv").open()))
    assert len(rows) == 13 + 12 + 12
    for row in rows:
        for figure in ("cosine", "length", "ceiling"):
            low, median, high = (float(row[figure + end]) for end in ("_low", "", "_high"))
            assert low <= median <= high and low < high
    assert {row["inference"] for row in rows} == {"sparsemixer_v2", "sparsemixer_v2_star", "gshard", "dense"}
    assert (tmp_path / "gradients_share.png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, [*arguments, str(tmp_path), "--over", "top_k"]).exit_code != 0
