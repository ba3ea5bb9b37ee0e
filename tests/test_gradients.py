"""The gradient laboratory against finite differences and sampling, and the theory of Appendix A with it."""

import csv
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from grin_moe_cli import main
from modeling_grin import ROUTER_ESTIMATORS, Routing, draw_noise
from modeling_grin.analysis.gradients import (
    TEMPERATURES,
    Setting,
    curved_loss,
    direction,
    estimator_moments,
    exact_gradient,
    list_outcomes,
    measure,
    objective,
    polynomial_loss,
    random_layer,
)
from modeling_grin.routing_grinmoe import Mixture, choose, mix_outputs, with_value

ALL_KEPT = 10.0
COEFFICIENTS = [0.7, 0.9, -0.5, 0.3]
FAMILY = ["sparsemixer_v2", "sparsemixer_v2_paper", "sparsemixer_v2_star", "sparsemixer"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("equation", [4, 7])
@pytest.mark.parametrize(("top_k", "jitter_eps"), [(1, ALL_KEPT), (2, ALL_KEPT), (2, 0.6)])
def test_exact_gradient_equals_finite_differences(top_k, jitter_eps, equation):
    """Of L(z) = sum P(choice) f(sum_k p_k Expert_k), by plain loops; Equation 7 holds the p inside f still."""
    layer, loss = random_layer(4, seed=3), curved_loss(0.8)
    outputs, start = layer.linearised()[0], layer.router_logits

    def masked_softmax(z, taken):
        left = [i for i in range(4) if i not in taken]
        top = max(start[i].item() for i in left)  # the keep set of the unperturbed logits: it has no gradient
        kept = [i for i in left if (top - start[i].item()) / max(abs(start[i].item()), top) <= 2 * jitter_eps]
        total = sum(math.exp(z[i].item()) for i in kept)
        return {i: math.exp(z[i].item()) / total for i in kept}

    def expected_loss(z, inside):
        total = 0.0
        for choice in itertools.permutations(range(4), top_k):
            probability, y = 1.0, torch.zeros(4, dtype=torch.float64)
            for k, expert in enumerate(choice):
                probability *= masked_softmax(z, choice[:k]).get(expert, 0.0)
                y = y + masked_softmax(inside, choice[:k]).get(expert, 0.0) * outputs[expert]
            total += probability * loss(y[None]).item()
        return total

    step, numeric = 1e-5, []
    for i in range(4):
        up, down = start.clone(), start.clone()
        up[i] += step
        down[i] -= step
        inside = (start, start) if equation == 7 else (up, down)
        numeric.append((expected_loss(up, inside[0]) - expected_loss(down, inside[1])) / (2 * step))
    exact = exact_gradient(layer, loss, top_k, jitter_eps, equation=equation)
    assert relative(exact.router_logits, torch.tensor(numeric).double()) < 1e-7


@pytest.mark.parametrize("equation", [4, 7])
def test_exact_gradient_of_experts_and_input_equals_autograd_through_the_plain_loop(equation):
    """Parameters and input as leaves of L itself, with z = router x; no Jacobians."""
    layer, loss = random_layer(4, seed=3), curved_loss(0.8)
    parameters, x = layer.expert_parameters.clone().requires_grad_(), layer.x.clone().requires_grad_()
    z, total = layer.router @ x, 0.0
    for first, second in itertools.permutations(range(4), 2):
        p_first = z.softmax(0)[first]
        p_second = z.masked_fill(torch.arange(4) == first, -torch.inf).softmax(0)[second]
        inside = (p_first.detach(), p_second.detach()) if equation == 7 else (p_first, p_second)
        y = sum(p * layer.expert(parameters[i], x) for p, i in zip(inside, (first, second), strict=True))
        total = total + p_first * p_second * loss(y[None])[0]
    by_parameters, by_input = torch.autograd.grad(total, (parameters, x))
    exact = exact_gradient(layer, loss, 2, ALL_KEPT, equation=equation)
    assert relative(exact.experts, by_parameters.flatten()) < 1e-12
    assert relative(exact.input, by_input) < 1e-12


@pytest.mark.parametrize("estimator", ROUTER_ESTIMATORS)
def test_moments_equal_those_of_sampled_training(estimator):
    """The estimator with its own noise, 400000 times: mean within 5 standard errors, variance within 3 %."""
    top_k, jitter_eps, num_draws = 1 if estimator == "sparsemixer" else 2, 0.6, 400_000
    layer, loss = random_layer(5, seed=1), curved_loss(0.5)
    moments = estimator_moments(
        layer, loss, top_k, jitter_eps, ROUTER_ESTIMATORS[estimator], TEMPERATURES.get(estimator, 1.0)
    )
    logits = layer.router_logits.expand(num_draws, -1).clone().requires_grad_()
    noise = draw_noise(logits, top_k, torch.Generator().manual_seed(0))
    routing = ROUTER_ESTIMATORS[estimator](logits, top_k, jitter_eps, noise)
    mixture = routing.mixture or Mixture(routing.weights, routing.experts, routing.weights.detach())
    outputs, by_parameters, by_input = layer.linearised()
    chosen = outputs[mixture.experts].requires_grad_()
    dz, d_chosen = torch.autograd.grad(loss(mix_outputs(chosen, mixture)).sum(), (logits, chosen))
    d_outputs = torch.zeros(num_draws, *outputs.shape, dtype=torch.float64)
    for slot in range(mixture.experts.shape[1]):
        d_outputs[torch.arange(num_draws), mixture.experts[:, slot]] += d_chosen[:, slot]
    sampled = {
        "router_logits": dz,
        "experts": torch.einsum("reh,ehp->rep", d_outputs[:20_000], by_parameters).flatten(1),
        "input": dz @ layer.router + torch.einsum("reh,ehi->ri", d_outputs, by_input),
    }
    for name, draws in sampled.items():
        error = (draws.var(dim=0).sum() / len(draws)).sqrt().item()
        assert (draws.mean(dim=0) - getattr(moments.mean, name)).norm().item() < 5 * error + 1e-10, name
        assert moments.variance[name] == pytest.approx(draws.var(dim=0).sum().item(), rel=0.03, abs=1e-10), name


@pytest.mark.parametrize(("top_k", "jitter_eps"), [(1, 0.2), (2, 0.6), (3, ALL_KEPT)])
def test_outcomes_are_all_there_is(top_k, jitter_eps):
    probabilities, noise = list_outcomes(random_layer(5).router_logits, top_k, jitter_eps, 1.0)
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-14)
    assert noise.gumbel.shape == (top_k, len(probabilities), 5)
    assert noise.uniform.shape == (top_k, len(probabilities))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("estimator", "exact_up_to"), [("sparsemixer_v2_star", 3), ("sparsemixer_v2_paper", 3), ("sparsemixer", 2)]
)
def test_rules_are_exact_up_to_their_degree(estimator, exact_up_to, seed):
    """Heun's third-order rule for polynomials of degree 3, the mid-point rule for degree 2; top-1, no argmax
    exception, all experts kept: v2* and v1 have no bias against Equation 4, v2 none against Equation 7."""
    layer, temperature = random_layer(6, seed=seed), TEMPERATURES.get(estimator, 1.0)
    plain = partial(ROUTER_ESTIMATORS[estimator], argmax_exception=False)
    for degree in (1, 2, 3, 4):
        arguments = (layer, polynomial_loss(COEFFICIENTS[:degree]), 1, ALL_KEPT)
        exact = exact_gradient(*arguments, equation=objective(estimator), temperature=temperature)
        error = relative(estimator_moments(*arguments, plain, temperature).mean.router_logits, exact.router_logits)
        assert error < 1e-10 if degree <= exact_up_to else error > 1e-4, (degree, error)


def euler(router_logits, top_k, jitter_eps, noise):
    """Equation 4 by Euler's rule alone: f' at the end of the ray, whatever is drawn."""
    choices = choose(router_logits, top_k, jitter_eps, noise, end_probability=1.0, argmax_exception=False)
    return Routing(with_value(2 * choices.probs, choices.probs), choices.experts)


@pytest.mark.parametrize("estimator", [euler, "sparsemixer_v2_star", "sparsemixer"])
def test_eulers_rule_is_exact_up_to_degree_one(estimator):
    """Alone, and as the argmax exception of others: bias begins at degree 2."""
    layer, temperature = random_layer(6, seed=0), TEMPERATURES.get(estimator, 1.0)
    errors = []
    for degree in (1, 2):
        arguments = (layer, polynomial_loss(COEFFICIENTS[:degree]), 1, ALL_KEPT)
        exact = exact_gradient(*arguments, equation=4, temperature=temperature)
        moments = estimator_moments(*arguments, ROUTER_ESTIMATORS.get(estimator, euler), temperature)
        errors.append(relative(moments.mean.router_logits, exact.router_logits))
    assert errors[0] < 1e-10 < 1e-4 < errors[1]


@pytest.mark.parametrize("estimator", ROUTER_ESTIMATORS)
def test_one_kept_expert_gives_a_zero_router_gradient(estimator):
    loss = curved_loss(0.5)
    moments = estimator_moments(random_layer(1), loss, 1, ALL_KEPT, ROUTER_ESTIMATORS[estimator])
    assert moments.mean.router_logits.abs().max() < 1e-15
    if estimator in FAMILY:
        moments = estimator_moments(random_layer(6), loss, 1, 1e-9, ROUTER_ESTIMATORS[estimator])
        assert moments.mean.router_logits.abs().max() < 1e-15
        assert moments.mean.experts.norm() > 1e-3


@pytest.mark.parametrize("estimator", FAMILY)
def test_linear_loss_all_kept_agrees_up_to_the_known_factor(estimator):
    """Equation 4's gradient is twice Equation 7's on a linear loss; v2 estimates the one, v2* and v1 the other."""
    temperature = TEMPERATURES.get(estimator, 1.0)
    arguments = (random_layer(6), polynomial_loss([1.0]), 1, ALL_KEPT)
    exact = {e: exact_gradient(*arguments, equation=e, temperature=temperature).router_logits for e in (4, 7)}
    mean = estimator_moments(*arguments, ROUTER_ESTIMATORS[estimator], temperature).mean.router_logits
    factor = 1 if objective(estimator) == 7 else 2
    assert relative(mean, factor * exact[7]) < 1e-10
    assert relative(mean, factor / 2 * exact[4]) < 1e-10


@pytest.mark.parametrize(("estimator", "top_k"), [("gshard", 4), ("dense", 1), ("dense", 3)])
def test_conventional_estimators_follow_the_soft_mixture_on_a_linear_loss(estimator, top_k):
    """sum_i softmax(z)_i Expert_i has the router gradient that they give, whatever is chosen."""
    layer, loss = random_layer(4), polynomial_loss([1.0])
    z = layer.router_logits.requires_grad_()
    (soft,) = torch.autograd.grad(loss((z.softmax(0) @ layer.linearised()[0])[None]).sum(), z)
    mean = estimator_moments(layer, loss, top_k, ALL_KEPT, ROUTER_ESTIMATORS[estimator]).mean.router_logits
    assert relative(mean, soft) < 1e-10


def test_what_sampling_without_replacement_leaves_out():
    """Top-2, linear loss: v2 lacks exactly what the first choice does to the second one's distribution.

    Algorithm 3 adds the top-1 estimates of the K choices. The first choice also decides what is left for the second;
    that part of Equation 7, sum_D1 dP(D1) E[p_2 f'(Expert_2) | D1], has no counterpart in the sum.
    """
    layer, a = random_layer(5, seed=2), direction(4, seed=1)
    arguments = (layer, polynomial_loss([1.0]), 2, ALL_KEPT)
    exact = exact_gradient(*arguments, equation=7).router_logits
    mean = estimator_moments(*arguments, ROUTER_ESTIMATORS["sparsemixer_v2_paper"]).mean.router_logits

    values = layer.linearised()[0] @ a
    z = layer.router_logits.requires_grad_()
    first = z.softmax(0)
    second_given = torch.zeros(5, dtype=torch.float64)
    for taken in range(5):
        p = z.detach().masked_fill(torch.arange(5) == taken, -torch.inf).softmax(0)
        second_given[taken] = (p * p * values).sum()
    (missing,) = torch.autograd.grad((first * second_given).sum(), z)
    assert relative(mean, exact) > 0.01
    assert relative(mean + missing, exact) < 1e-10


def test_documented_table_is_what_is_measured():
    """The top-1 table of docs/router_gradients.md, to its two digits."""
    text = (Path(__file__).parent.parent / "docs" / "router_gradients.md").read_text(encoding="utf-8")
    table = text[text.index("| top-1 |") :].split("\n\n")[0].splitlines()[2:]
    measured = {
        row["estimator"]: row
        for row in measure(Setting())
        if row["quantity"] == "router_logits" and row["equation"] == objective(row["estimator"])
    }
    documented = set()
    for line in table:
        names, equation, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        for name in names.replace("`", "").split(", "):
            row = measured[name]
            documented.add(name)
            assert int(equation) == row["equation"]
            for figure, column in zip(figures, ("bias", "cosine", "variance", "snr"), strict=True):
                assert float(figure) == pytest.approx(row[column], rel=0.06, abs=0.005), (name, column)
    assert documented == set(ROUTER_ESTIMATORS)


def run_cli(*arguments):
    """Run `grin-moe`; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grin-moe", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    return end.value.code


def test_command_writes_table_csv_and_plots(tmp_path, capsys):
    assert run_cli("gradients", "--over", "top_k", "--layers", "2", "--output-dir", str(tmp_path / "out")) == 0
    assert "sparsemixer_v2_star" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "gradients.csv").open()))
    assert len(rows) == (6 + 5 + 5) * 2 * 3  # estimators at top-1, 2, 3; equations; quantities
    assert all(math.isfinite(float(row["bias"])) for row in rows)
    assert (tmp_path / "out" / "gradients_top_k.png").read_bytes().startswith(b"\x89PNG")
