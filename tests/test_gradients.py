"""The gradient laboratory against finite differences and sampling, and the theory of Appendix A with it."""

import csv
import inspect
import itertools
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grin_moe_cli import app
from modeling_grin import ROUTER_ESTIMATORS, RouterEstimator, Routing, draw_noise
from modeling_grin.analysis.gradients import (
    Setting,
    curved_loss,
    direction,
    estimator_moments,
    exact_gradient,
    list_outcomes,
    measure,
    polynomial_loss,
    random_layer,
)
from modeling_grin.routing_grinmoe import Mixture, choose, mix_outputs

ALL_KEPT = 10.0
COEFFICIENTS = [0.7, 0.9, -0.5, 0.3]
FAMILY = ["sparsemixer_v2", "sparsemixer_v2_paper", "sparsemixer_v2_star", "sparsemixer"]
LISTED = [name for name in ROUTER_ESTIMATORS if name != "gumbel_straight_through"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def without_exception(estimator):
    """The record of an estimator without the argmax exception, where it has one."""
    record = ROUTER_ESTIMATORS[estimator]
    if "argmax_exception" not in inspect.signature(record.function).parameters:
        return record
    plain = partial(record.function, argmax_exception=False)
    plain.__name__ = estimator
    return replace(record, function=plain)


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


@pytest.mark.parametrize("estimator", LISTED)
def test_moments_equal_those_of_sampled_training(estimator):
    """The estimator with its own noise, 400000 times: mean within 5 standard errors, variance within 3 %."""
    top_k, jitter_eps, num_draws = 1 if estimator == "sparsemixer" else 2, 0.6, 400_000
    layer, loss = random_layer(5, seed=1), curved_loss(0.5)
    moments = estimator_moments(layer, loss, top_k, jitter_eps, ROUTER_ESTIMATORS[estimator])
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
    estimator = ROUTER_ESTIMATORS["sparsemixer_v2"]
    probabilities, noise, forced = list_outcomes(random_layer(5).router_logits, top_k, jitter_eps, estimator)
    assert forced.shape == (len(probabilities), top_k)
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-14)
    assert noise.gumbel.shape == (top_k, len(probabilities), 5)
    assert noise.uniform.shape == (top_k, len(probabilities))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("estimator", "top_k", "exact_up_to"),
    [
        ("euler", 1, 1), ("sparsemixer", 1, 2), ("midpoint", 1, 2), ("reinmax", 1, 2), ("sparsemixer_v2_star", 1, 3),
        ("sparsemixer_v2_paper", 1, 3), ("joint_ray", 1, 3), ("joint_ray", 2, 3), ("joint_ray", 3, 3),
    ],
)  # fmt: skip
def test_rules_are_exact_up_to_their_degree(estimator, top_k, exact_up_to, seed):
    """Euler's rule for polynomials of degree 1, mid-point and Heun's second for 2, Heun's third for 3; all experts
    kept, no argmax exception. Against the objective of each; for several choices the joint ray alone."""
    layer, record = random_layer(6, seed=seed), without_exception(estimator)
    for degree in (1, 2, 3, 4):
        arguments = (layer, polynomial_loss(COEFFICIENTS[:degree]), top_k, ALL_KEPT)
        exact = exact_gradient(*arguments, equation=record.equation, temperature=record.temperature)
        mean = estimator_moments(*arguments, record).mean
        error = relative(mean.router_logits, exact.router_logits)
        assert error < 1e-10 if degree <= exact_up_to else error > 1e-4, (degree, error)
        if estimator == "joint_ray":  # without a bias whatever f is: the experts learn at the end of the ray
            assert relative(mean.experts, exact.experts) < 1e-10


@pytest.mark.parametrize("estimator", ["sparsemixer_v2_star", "sparsemixer"])
def test_the_argmax_exception_is_eulers_rule(estimator):
    """Exact for degree 1 alone: the exception's bias begins at degree 2."""
    layer, record = random_layer(6, seed=0), ROUTER_ESTIMATORS[estimator]
    errors = []
    for degree in (1, 2):
        arguments = (layer, polynomial_loss(COEFFICIENTS[:degree]), 1, ALL_KEPT)
        exact = exact_gradient(*arguments, equation=4, temperature=record.temperature)
        errors.append(relative(estimator_moments(*arguments, record).mean.router_logits, exact.router_logits))
    assert errors[0] < 1e-10 < 1e-4 < errors[1]


def by_plain_loops(estimator, outputs, z, a, curvature, top_k, jitter_eps):
    """Mean and total variance of an estimator's dL/dz, L = (exp(c a y) - 1) / c, from its formula: closed forms in z,
    no autograd, nothing of the library."""
    temperature, end, inner, own = {
        "sparsemixer_v2": (1, 1 / 4, 0.3333, 1), "sparsemixer_v2_paper": (1, 1 / 4, 1 / 3, 1),
        "sparsemixer_v2_star": (2, 5 / 8, 1 / 3, 2), "sparsemixer": (1, 1 / 2, 1 / 2, 2), "euler": (1, 1, 1, 1),
        "midpoint": (1, 0, 1 / 2, 1), "joint_ray": (1, 5 / 8, 1 / 3, None), "reinmax": (1, 1, 1, None),
    }[estimator]  # fmt: skip
    z = (z / temperature).tolist()
    pulls = (outputs @ a).tolist()  # a Expert_i
    mean, square = [0.0] * len(z), 0.0

    def masked_softmax(taken):
        left = [i for i in range(len(z)) if i not in taken]
        best = max(left, key=lambda i: z[i])
        kept = [i for i in left if (z[best] - z[i]) / max(abs(z[i]), z[best]) <= 2 * jitter_eps]
        total = sum(math.exp(z[i]) for i in kept)
        return best, [math.exp(z[i]) / total if i in kept else 0.0 for i in range(len(z))]

    for drawn in itertools.permutations(range(len(z)), top_k):
        steps = [masked_softmax(drawn[:k]) for k in range(top_k)]
        p = [probs[expert] for expert, (_, probs) in zip(drawn, steps, strict=True)]
        if math.prod(p) == 0:
            continue
        for points in itertools.product((True, False), repeat=1 if estimator == "joint_ray" else top_k):
            chance = math.prod(p) * math.prod(end if is_end else 1 - end for is_end in points)
            if chance == 0:
                continue
            scale, gradient = [], [0.0] * len(z)
            for k in range(top_k):
                is_end = points[0] if estimator == "joint_ray" else points[k]
                has_exception = estimator.startswith("sparsemixer") or estimator == "midpoint"
                scale.append(1.0 if is_end or (has_exception and drawn[k] == steps[k][0]) else inner)
            slope = math.exp(curvature * sum(c * p[k] * pulls[drawn[k]] for k, c in enumerate(scale)))  # f' = slope a
            for k, (_, probs) in enumerate(steps):
                for i in range(len(z)):
                    d_log = [(drawn[j] == i) - steps[j][1][i] for j in range(top_k)]  # d log p_j / d z_i
                    if estimator == "joint_ray":
                        whole = sum(d_log)
                        part = 1.6 * d_log[k] + 0.4 * whole if points[0] else 2 * whole
                        gradient[i] += slope * pulls[drawn[k]] * p[k] * part
                    elif estimator == "reinmax":  # sum_j of (g_j - its mean) under (onehot + p) / 2, and under p
                        values = [slope * probs[j] * pulls[j] for j in range(len(z))]
                        middle = [((drawn[k] == j) + probs[j]) / 2 for j in range(len(z))]
                        for weights, factor in ((middle, 2), (probs, -0.5)):
                            average = sum(w * v for w, v in zip(weights, values, strict=True))
                            gradient[i] += factor * weights[i] * (values[i] - average)
                    else:
                        gradient[i] += slope * pulls[drawn[k]] * own * p[k] * d_log[k] / temperature
            mean = [m + chance * g for m, g in zip(mean, gradient, strict=True)]
            square += chance * sum(g * g for g in gradient)
    return torch.tensor(mean, dtype=torch.float64), square - sum(m * m for m in mean)


@pytest.mark.parametrize(
    ("estimator", "top_k", "jitter_eps"),
    [
        (estimator, top_k, jitter_eps)
        for estimator in (*FAMILY, "euler", "midpoint", "joint_ray", "reinmax")
        for top_k, jitter_eps in ((1, ALL_KEPT), (1, 0.4), (2, ALL_KEPT), (2, 0.5), (3, 0.6))
        if top_k <= (ROUTER_ESTIMATORS[estimator].max_top_k or top_k)
    ],
)
def test_laboratory_equals_an_independent_enumeration(estimator, top_k, jitter_eps):
    """Expected gradient and variance of every sampled estimator, to rounding."""
    record, curvature = ROUTER_ESTIMATORS[estimator], 0.7
    layer = random_layer(5, seed=11)
    moments = estimator_moments(layer, curved_loss(curvature), top_k, jitter_eps, record)
    mean, variance = by_plain_loops(
        estimator, layer.linearised()[0], layer.router_logits, direction(4, seed=1), curvature, top_k, jitter_eps
    )
    assert mean.norm() > 1e-3
    assert relative(moments.mean.router_logits, mean) < 1e-12
    assert moments.variance["router_logits"] == pytest.approx(variance, rel=1e-10)


def test_gumbel_straight_through_is_biased_as_quadrature_says():
    """Two experts: the gradient depends on the difference of two Gumbels alone, which is logistic. Its mean over a
    grid is the sampled one's, to 5 standard errors, and not Equation 7's; the laboratory refuses to list it."""
    record = ROUTER_ESTIMATORS["gumbel_straight_through"]
    layer, a, num_draws = random_layer(2, seed=4), direction(4, seed=1), 400_000
    z, (one, two) = layer.router_logits, (layer.linearised()[0] @ a).tolist()
    with pytest.raises(ValueError, match="gumbel_straight_through is sampled and its record has no end_probability"):
        estimator_moments(layer, polynomial_loss([1.0]), 1, ALL_KEPT, record)

    p = z.softmax(0)
    gap = (z[0] - z[1]) + torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    density = torch.sigmoid(gap - (z[0] - z[1])) * torch.sigmoid((z[0] - z[1]) - gap)
    soft = torch.sigmoid(gap)  # of the perturbed logits; the loss is linear, f' = a
    expected = torch.trapezoid(density * soft * (1 - soft) * (p[0] * one - p[1] * two), gap)

    logits = z.expand(num_draws, -1).clone().requires_grad_()
    noise = draw_noise(logits, 1, torch.Generator().manual_seed(0))
    mixture = record(logits, 1, ALL_KEPT, noise).mixture
    (dz,) = torch.autograd.grad((mixture.weights * (layer.linearised()[0] @ a)[mixture.experts]).sum(), logits)
    error = dz[:, 0].std() / math.sqrt(num_draws)
    assert abs(dz[:, 0].mean() - expected) < 5 * error
    exact = exact_gradient(layer, polynomial_loss([1.0]), 1, ALL_KEPT, equation=7).router_logits[0]
    assert abs(expected - exact) > 50 * error


def test_laboratory_refuses_records_that_do_not_say_what_is_done():
    """Another P(B = 1), another temperature, and draws that do not follow the noise were silently wrong."""
    layer, loss = random_layer(5), curved_loss(0.5)

    def off_the_tables(router_logits, top_k, jitter_eps, noise):
        choices = choose(router_logits, top_k, jitter_eps, noise, 0.4, argmax_exception=False)
        return Routing(torch.where(choices.at_end, 1.0, 0.5) * choices.probs, choices.experts)

    def greedy(router_logits, top_k, jitter_eps, noise):
        return Routing(*router_logits.softmax(-1).topk(top_k))

    star = ROUTER_ESTIMATORS["sparsemixer_v2_star"]
    for record, message in (
        (RouterEstimator(off_the_tables), "record has no end_probability"),
        (RouterEstimator(off_the_tables, end_probability=0.3), "elsewhere than at its record's end_probability=0.3"),
        (replace(star, temperature=1.0), r"does not sample from softmax\(z / 1\)"),
        (RouterEstimator(greedy, end_probability=1.0), "greedy does not draw"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator_moments(layer, loss, 2, ALL_KEPT, record)
    right = RouterEstimator(off_the_tables, end_probability=0.4)
    probabilities, _, _ = list_outcomes(layer.router_logits, 1, ALL_KEPT, right)
    estimator_moments(layer, loss, 2, ALL_KEPT, right)
    assert probabilities.reshape(-1, 2).sum(0).tolist() == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize("estimator", LISTED)
def test_one_kept_expert_gives_a_zero_router_gradient(estimator):
    loss = curved_loss(0.5)
    moments = estimator_moments(random_layer(1), loss, 1, ALL_KEPT, ROUTER_ESTIMATORS[estimator])
    assert moments.mean.router_logits.abs().max() < 1e-15
    if estimator in FAMILY:
        moments = estimator_moments(random_layer(6), loss, 1, 1e-9, ROUTER_ESTIMATORS[estimator])
        assert moments.mean.router_logits.abs().max() < 1e-15
        assert moments.mean.experts.norm() > 1e-3


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
    """The top-1 table of docs/router_gradients.md, to its two digits: medians and quartiles."""
    text = (Path(__file__).parent.parent / "docs" / "router_gradients.md").read_text(encoding="utf-8")
    table = text[text.index("| top-1 | Eq.") :].split("\n\n")[0].splitlines()[2:]
    measured = {
        row["estimator"]: row
        for row in measure(Setting(), num_layers=200)
        if row["quantity"] == "router_logits" and row["equation"] == ROUTER_ESTIMATORS[row["estimator"]].equation
    }
    documented = set()
    for line in table:
        names, equation, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        for name in names.replace("`", "").split(", "):
            row = measured[name]
            documented.add(name)
            assert int(equation) == row["equation"]
            for figure, column in zip(figures, ("bias", "cosine", "length", "variance", "scaled_snr"), strict=True):
                values = [row[column], row[f"{column}_low"], row[f"{column}_high"]]
                written = [float(number) for number in re.findall(r"[\d.e-]+", figure)]
                assert written == pytest.approx(values, rel=0.06, abs=5e-6), (name, column)
    assert documented == set(LISTED)


def test_command_writes_table_csv_and_plots(tmp_path):
    arguments = ["gradients", "--over", "top_k", "--layers", "2", "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "sparsemixer_v2_star" in result.output, (result.output, result.exception)
    rows = list(csv.DictReader((tmp_path / "out" / "gradients.csv").open()))
    assert len(rows) == (12 + 11 + 11) * 2 * 3  # estimators at top-1, 2, 3; equations; quantities
    assert all(math.isfinite(float(row["bias"])) for row in rows)
    assert (tmp_path / "out" / "gradients_top_k.png").read_bytes().startswith(b"\x89PNG")
