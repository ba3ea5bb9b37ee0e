"""Which estimator finds a router that is there to be found?

A teacher mixture (linear router, tanh experts, top-2) makes targets; a student of the same shape learns from them with
`route` and `mix_outputs` of this library. Routers matter here, and a run takes a second, so that seeds are many: all
seeds and learning rates of an arm are one batch of students. The learning rate of each arm is chosen on seeds that are
not reported. Students of one seed see equal teachers, tokens, and first weights.

Only arms with the same forward pass compare gradients. `gshard` weights experts by shares of a softmax. SparseMixer
weights them by MaskedSoftmax: far from ties both weights are 1. Hence there are two teachers, one for each.

    python -m benchmarks.planted_router --output-dir planted    # what is finished there is not run again

Shapes: B students, T tokens of each, E experts, H hidden size.
"""

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure

from benchmarks.intervals import interval, paired
from benchmarks.measure import console, show
from modeling_grin.routing_grinmoe import (
    ROUTER_ESTIMATORS,
    Mixture,
    Noise,
    Routing,
    TokenKeys,
    apply_bias,
    mix_outputs,
    replay,
)

HIDDEN, TOP_K, TOKENS, TEST_TOKENS = 16, 2, 128, 2048
STEPS, EVALUATIONS, ALPHA = 800, 20, 0.01
ROUTER_STD = 0.25  # of a student's first logits, about as in the small language model
RATES = (0.01, 0.03, 0.1, 0.3)
CHOOSING_SEEDS, REPORTED_SEEDS = range(100, 103), range(16)
BETAS, EPSILON = (0.9, 0.99), 1e-8
BIAS_RATE = 0.003  # u of loss-free balancing, arXiv 2408.15664
DEFAULT_DECAY = 0.9  # of Default MoE's running means, arXiv 2504.12463

TEACHERS = {"ones": "weights 1 and 1", "shares": "shares of the softmax"}
SOFTMAX = (
    "gshard", "dense_shares", "gshard_sampled", "gshard loss-free", "gshard default", "gshard default forward",
)  # fmt: skip
MASKED = (
    "sparsemixer_v2", "sparsemixer_v2_paper", "sparsemixer_v2_star", "sparsemixer_v2 greedy", "sparsemixer_v2 frozen",
    "sparsemixer_v2 no exception", "sparsemixer_v2 loss-free", "euler", "midpoint", "reinmax",
    "gumbel_straight_through", "joint_ray",
)  # fmt: skip
CONTROLS = {**dict.fromkeys(SOFTMAX, "gshard"), **dict.fromkeys(MASKED, "sparsemixer_v2")}
SIZES, SIZE_ARMS = (8, 16, 32, 64), ("gshard", "sparsemixer_v2", "sparsemixer_v2 greedy", "sparsemixer_v2 frozen")
WIDTHS, WIDTH_ARMS = (0.01, 0.03, 0.1, 0.3), ("sparsemixer_v2", "sparsemixer_v2 greedy")


@dataclass(frozen=True)
class Case:
    """One arm on one kind of task."""

    arm: str
    """An estimator, and maybe one way to change it."""
    teacher: str = "ones"
    experts: int = 8
    jitter: float = 0.1

    @property
    def steps(self) -> int:
        """More experts, of which each sees fewer tokens, get more steps."""
        return round(STEPS * math.sqrt(self.experts / 8))

    @property
    def reported_seeds(self) -> range:
        """More experts take longer."""
        return REPORTED_SEEDS if self.experts == 8 else REPORTED_SEEDS[:6]

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES if self.experts == 8 else RATES[1:3]

    def router(self) -> tuple[Callable[..., Routing], str]:
        """The estimator, and how the arm changes it."""
        name, _, change = self.arm.partition(" ")
        estimator: Callable[..., Routing] = ROUTER_ESTIMATORS[name]
        return (partial(estimator, argmax_exception=False) if change == "no exception" else estimator), change


CASES = [
    *(Case(arm, teacher) for teacher in TEACHERS for arm in (*SOFTMAX, *MASKED)),
    *(Case(arm, jitter=jitter) for jitter in WIDTHS if jitter != Case.jitter for arm in WIDTH_ARMS),
    *(Case(arm, "ones", experts) for experts in SIZES[1:] for arm in SIZE_ARMS),
    *(Case("gshard", "shares", experts) for experts in SIZES[1:]),
]


class Students:
    """A batch of mixtures and their Adam."""

    def __init__(self, router: torch.Tensor, experts: torch.Tensor, rates: torch.Tensor, learns: bool = True):
        """Routers `[B, H, E]`, experts `[B, H, E H]`, learning rates `[B]`; without `learns`, routers stay."""
        self.parameters = [router.requires_grad_(learns), experts.requires_grad_()]
        self.rates = rates.reshape(-1, 1, 1)
        self.moments = [[torch.zeros_like(p) for _ in BETAS] for p in self.parameters]

    def logits_and_outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, T, H]` -> logits `[B T, E]`, all experts' outputs `[B T, E, H]`."""
        router, experts = self.parameters
        outputs = torch.tanh(x @ experts).reshape(-1, router.shape[-1], x.shape[-1])
        return (x @ router).flatten(0, 1), outputs

    @torch.no_grad()
    def update(self, step: int, factor: float) -> None:
        """Take Adam's step number `step`, from 1, with the learning rates times `factor`."""
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            if parameter.grad is None:
                continue
            first.lerp_(parameter.grad, 1 - BETAS[0])
            second.lerp_(parameter.grad.square(), 1 - BETAS[1])
            size = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            parameter -= factor * self.rates * first / (1 - BETAS[0] ** step) / size
            parameter.grad = None


class Defaults:
    """Default MoE (arXiv 2504.12463): the running mean of an expert's outputs stands in where it was not chosen.

    The router learns as if every expert had been mixed in, `dense`'s gradient at the cost of the chosen ones. With
    `forward`, which is how the paper has it, the means are in the layer's output, weighted by softmax(z); otherwise
    in the router's gradient alone, and the output is GShard's.
    """

    def __init__(self, students: int, experts: int, forward: bool):
        self.means, self.forward = torch.zeros(students, experts, HIDDEN), forward

    def mix(self, logits: torch.Tensor, outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The layer's output `[B T, H]`, from logits `[B T, E]` and outputs `[B T, E, H]`."""
        probs, is_chosen = logits.softmax(-1), chosen_by(routing, logits).unsqueeze(-1)
        means = self.means.repeat_interleave(len(logits) // len(self.means), dim=0)
        filled = torch.where(is_chosen, outputs, means)
        if self.forward:
            return (probs.unsqueeze(-1) * filled).sum(1)
        total = probs.gather(-1, routing.experts).detach().sum(-1, keepdim=True)
        dense = ((probs / total).unsqueeze(-1) * filled.detach()).sum(1)
        return mix(outputs, routing._replace(weights=routing.weights.detach())) + (dense - dense.detach())

    @torch.no_grad()
    def update(self, outputs: torch.Tensor, routing: Routing) -> None:
        """Move the means of the chosen experts."""
        students = len(self.means)
        is_chosen = chosen_by(routing, outputs[..., 0]).unflatten(0, (students, -1)).to(outputs)
        counts = is_chosen.sum(1).unsqueeze(-1)
        means = torch.einsum("bte,bteh->beh", is_chosen, outputs.unflatten(0, (students, -1))) / counts.clamp(min=1)
        self.means = torch.where(counts > 0, self.means.lerp(means, 1 - DEFAULT_DECAY), self.means)


def chosen_by(routing: Routing, like: torch.Tensor) -> torch.Tensor:
    """Whether a token chose an expert, bool `[B T, E]`, the shape of `like`."""
    return torch.zeros(like.shape, dtype=torch.bool).scatter(1, routing.experts, True)


def mix(outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The layer's output `[B T, H]` from all experts' `[B T, E, H]`."""
    mixture = routing.mixture or Mixture(routing.weights, routing.experts, routing.weights.detach())
    slots = mixture.experts.unsqueeze(-1).expand(-1, -1, outputs.shape[-1])
    return mix_outputs(outputs.gather(1, slots), mixture)


def mutual_information(one: torch.Tensor, other: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Normalised mutual information of two labelings `[B, T]`, over the mean of their entropies, `[B]`."""
    cells = torch.zeros(len(one), num_experts**2).scatter_add_(
        1, one * num_experts + other, torch.ones(one.shape)
    ) / one.shape[1]  # fmt: skip
    joint = cells.unflatten(1, (num_experts, num_experts))
    entropy = torch.special.entr
    first, second = entropy(joint.sum(2)).sum(1), entropy(joint.sum(1)).sum(1)
    return 2 * (first + second - entropy(cells).sum(1)) / (first + second)


def normal(seeds: Sequence[int], number: int, *shape: int) -> torch.Tensor:
    """Normal draws `[B, *shape]` that depend on each student's seed and on `number`."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(1_000_003 * seed + number)) for seed in seeds]
    )


def teach(case: Case, x: torch.Tensor, router: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Targets `[B T, H]` and the teacher's first expert `[B, T]`."""
    logits, outputs = Students(router, experts, torch.zeros(len(x))).logits_and_outputs(x)
    top = logits.detach().topk(TOP_K)
    weights = top.values.softmax(dim=-1) if case.teacher == "shares" else torch.ones_like(top.values)
    slots = top.indices.unsqueeze(-1).expand(-1, -1, HIDDEN)
    return (weights.unsqueeze(-1) * outputs.detach().gather(1, slots)).sum(1), top.indices[:, 0].reshape(x.shape[:2])


def train(case: Case, seeds: Sequence[int], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Train a student for each seed and rate; by student, its error and NMI along the training, in inference."""
    route, change = case.router()
    size, experts = case.experts, case.experts * HIDDEN
    scale = 1 / math.sqrt(HIDDEN)

    def repeat(values: torch.Tensor) -> torch.Tensor:
        return values.repeat(len(rates), *[1] * (values.dim() - 1))

    taught = normal(seeds, 1, HIDDEN, size), scale * 2 * normal(seeds, 2, HIDDEN, experts)
    students = Students(
        repeat(ROUTER_STD * scale * normal(seeds, 3, HIDDEN, size)),
        repeat(scale * normal(seeds, 4, HIDDEN, experts)),
        torch.tensor(rates).repeat_interleave(len(seeds)),
        change != "frozen",
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.Generator().manual_seed(0)
    defaults = Defaults(len(students.rates), size, "forward" in change) if "default" in change else None
    biases = torch.zeros(len(students.rates), size) if change == "loss-free" else None

    def draw(tokens: int) -> torch.Tensor:
        return torch.stack([torch.randn(tokens, HIDDEN, generator=generator) for generator in generators])

    def forward(x: torch.Tensor, keys: Noise) -> tuple[torch.Tensor, torch.Tensor, Routing, torch.Tensor]:
        """`[B, T, H]` -> logits `[B T, E]`, the experts' outputs, routing, and the layer's output `[B T, H]`."""
        logits, outputs = students.logits_and_outputs(x)
        if biases is not None:
            config = SimpleNamespace(router_estimator=case.arm.split()[0], num_experts_per_tok=TOP_K)
            logits, experts = apply_bias(logits, biases.repeat_interleave(x.shape[1], dim=0), config, None)
            keys = keys if experts is None else replay(logits, TOP_K, keys, experts)
        routing = route(logits, TOP_K, case.jitter, keys)
        mixed = mix(outputs, routing) if defaults is None else defaults.mix(logits, outputs, routing)
        return logits, outputs, routing, mixed

    test = draw(TEST_TOKENS)
    test_targets, planted = map(
        repeat, (lambda y, e: (y.unflatten(0, test.shape[:2]), e))(*teach(case, test, *taught))
    )
    test = repeat(test)
    curve: list[dict[str, Any]] = []

    @torch.no_grad()
    def evaluate(step: int) -> None:
        _, _, routing, mixed = forward(test, None)
        error = (mixed.unflatten(0, test.shape[:2]) - test_targets).square().sum((1, 2))
        error = error / test_targets.square().sum((1, 2))
        found = mutual_information(routing.experts[:, 0].reshape(planted.shape), planted, size)
        curve.append({"step": step, "error": error.tolist(), "nmi": found.tolist()})

    evaluate(0)
    marks = {round(case.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    for step in range(1, case.steps + 1):
        x = draw(TOKENS)
        targets, _ = teach(case, x, *taught)
        targets, x = repeat(targets.unflatten(0, x.shape[:2])).flatten(0, 1), repeat(x)
        keys: Noise = TokenKeys(
            None if change == "greedy" else torch.randint(-(2**62), 2**62, (len(targets),), generator=noise)
        )
        logits, outputs, routing, mixed = forward(x, keys)
        error = (mixed - targets).square().sum() / TOKENS / HIDDEN
        shares = chosen_by(routing, logits).float().unflatten(0, x.shape[:2]).mean(1) / TOP_K  # f, [B, E]
        balance = size * (shares * logits.softmax(-1).unflatten(0, x.shape[:2]).mean(1)).sum()
        (error + (ALPHA if biases is None else 0.0) * balance).backward()
        students.update(step, 0.5 + 0.5 * math.cos(math.pi * step / case.steps))
        if biases is not None:
            biases += BIAS_RATE * (1 / size - shares).sign()
        if defaults is not None:
            defaults.update(outputs, routing)
        if step in marks:
            evaluate(step)
    return [
        {
            "rate": rate,
            "seed": seed,
            **{key: [point[key][i * len(seeds) + j] for point in curve] for key in ("error", "nmi")},
        }
        for i, rate in enumerate(rates)
        for j, seed in enumerate(seeds)
    ]


def run(case: Case) -> dict[str, Any]:
    """Choose the rate, then train with the reported seeds."""
    torch.set_num_threads(1)
    start = time.process_time()
    choosing = train(case, CHOOSING_SEEDS[: len(case.rates)], case.rates)
    finals = {rate: [s["error"][-1] for s in choosing if s["rate"] == rate] for rate in case.rates}
    means = {rate: sum(errors) / len(errors) for rate, errors in finals.items()}
    best = min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
    students = train(case, case.reported_seeds, [best])
    return {
        **asdict(case),
        "choosing": means,
        "rate": best,
        "students": students,
        "seconds": time.process_time() - start,
    }


Runs = dict[Case, dict[str, Any]]


def read_runs(path: Path) -> Runs:
    """The finished cases of a file."""
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Case(**{name: entry.pop(name) for name in Case.__dataclass_fields__}): entry for entry in entries}


def finals(runs: Runs, case: Case, key: str = "error") -> list[float]:
    """The last values of `key`, by seed."""
    return [student[key][-1] for student in runs[case]["students"]]


def table_row(runs: Runs, case: Case, label: str, control: Case | None = None) -> list[str]:
    """Error, NMI and the paired difference to the control's error, with 95 % intervals over the seeds."""
    cells = [label, f"{runs[case]['rate']:g}"]
    cells += [interval(finals(runs, case, key)).unsigned() for key in ("error", "nmi")]
    if control in (None, case) or control not in runs:
        return [*cells, "", ""]
    difference = paired(finals(runs, case), finals(runs, control))
    return [*cells, str(difference), f"{difference.detectable:.3f}"]


COLUMNS = ["arm", "rate", "error", "NMI", "error minus control's", "detectable"]


def report(runs: Runs, output_dir: Path, record: bool) -> None:
    """Show the tables and draw the figures."""
    notes = (
        "Relative squared error and normalised mutual information (NMI) of first experts, in inference routing at the "
        "end; mean and 95 % interval over the seeds. The control has the same forward pass, teacher and seeds; "
        "detectable: the smallest true difference to it found with 80 % power at the level of 5 %."
    )
    missing = [case for case in CASES if case not in runs]
    if missing:
        console.print(f"{len(missing)} cases are not trained yet, and left out")
    for teacher, weights in TEACHERS.items():
        cases = [Case(arm, teacher) for arm in (*SOFTMAX, *MASKED) if Case(arm, teacher) in runs]
        rows = [table_row(runs, case, case.arm, replace(case, arm=CONTROLS[case.arm])) for case in cases]
        title = f"Planted router: teacher with {weights}, 8 experts, keep set 0.1, {len(REPORTED_SEEDS)} seeds"
        show(title, COLUMNS, rows, record, notes)
    sizes = [case for case in CASES if case.experts > 8 and case in runs]
    rows = [
        table_row(runs, case, f"{case.experts} experts, {case.arm}, {TEACHERS[case.teacher]}",
                  replace(case, arm=CONTROLS[case.arm]))
        for case in sizes
    ]  # fmt: skip
    show("Planted router: more experts", COLUMNS, rows, record, notes)
    rows = [
        table_row(runs, Case(arm, jitter=r), f"r = {r:g}, {arm}", Case("sparsemixer_v2", jitter=r))
        for r in WIDTHS
        for arm in WIDTH_ARMS
        if Case(arm, jitter=r) in runs
    ]
    show("Planted router: width of the keep set", COLUMNS, rows, record, notes)
    if not missing:
        draw_curves(runs, output_dir / "planted_curves.png")
        draw_sizes(runs, output_dir / "planted_sizes.png")


def draw_curves(runs: Runs, path: Path) -> None:
    """Error against step for each teacher: mean and 95 % band (the form of the paper's Figure 2)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(TEACHERS), sharey=True)
    arms = ("gshard", "dense_shares", "sparsemixer_v2", "sparsemixer_v2 greedy", "sparsemixer_v2_star", "joint_ray",
            "sparsemixer_v2 frozen")  # fmt: skip
    for axes, (teacher, weights) in zip(panels, TEACHERS.items(), strict=True):
        for arm in arms:
            case = Case(arm, teacher)
            curves = zip(*(student["error"] for student in runs[case]["students"]), strict=True)
            points = [interval(values) for values in curves]
            steps = [case.steps * i / EVALUATIONS for i in range(len(points))]
            (line,) = axes.plot(steps, [p.mean for p in points], "--" if arm in SOFTMAX else "-", label=arm)
            axes.fill_between(
                steps, [p.low for p in points], [p.high for p in points], color=line.get_color(), alpha=0.2
            )
        axes.set(title=f"teacher with {weights}", xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="relative error, inference routing")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_sizes(runs: Runs, path: Path) -> None:
    """Error and NMI against the number of experts, and against r."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    series = [*((arm, "ones") for arm in SIZE_ARMS), ("gshard", "shares")]
    for axes, key in zip(panels, ("error", "nmi"), strict=False):
        for arm, teacher in series:
            points = [interval(finals(runs, Case(arm, teacher, size), key)) for size in SIZES]
            bars = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
            label = arm if teacher == "ones" else f"{arm}, teacher with shares"
            axes.errorbar(SIZES, [p.mean for p in points], bars, fmt="o-" if teacher == "ones" else "s--", label=label)
        axes.set(xlabel="experts", title=key.upper() if key == "nmi" else key, xscale="log")
        axes.set_xticks(SIZES, labels=[str(size) for size in SIZES])
    for arm in WIDTH_ARMS:
        points = [interval(finals(runs, Case(arm, jitter=r))) for r in WIDTHS]
        bars = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        panels[2].errorbar(WIDTHS, [p.mean for p in points], bars, fmt="o-", label=arm)
    panels[2].set(xlabel="r, width of the keep set", title="error, 8 experts", xscale="log")
    panels[2].legend(fontsize=8)
    for axes in panels:
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


def main(
    output_dir: Annotated[Path, typer.Option(help="folder of runs.jsonl and the figures")] = Path("planted"),
    workers: Annotated[int, typer.Option(min=1, help="cases at a time, one thread each")] = 2,
    record: Annotated[bool, typer.Option(help="append the tables to benchmarks/RESULTS.md")] = False,
) -> None:
    """Train what is missing in OUTPUT_DIR/runs.jsonl, then report.

    Example: python -m benchmarks.planted_router --output-dir planted
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "runs.jsonl"
    done = read_runs(path)
    todo = [case for case in CASES if case not in done]
    console.print(f"{len(todo)} cases to train, {len(done)} done before")
    start, spawn = time.monotonic(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) as pool, path.open("a") as file:
        for count, future in enumerate(as_completed([pool.submit(run, case) for case in todo]), start=1):
            entry = future.result()
            print(json.dumps(entry), file=file, flush=True)
            left = (time.monotonic() - start) / count * (len(todo) - count) / 60
            error = interval([student["error"][-1] for student in entry["students"]]).unsigned()
            name = f"{entry['arm']}, {entry['teacher']}, {entry['experts']} experts, r = {entry['jitter']:g}"
            console.print(f"{count}/{len(todo)}  {name}: error {error}; {left:.0f} min left")
    runs = read_runs(path)
    console.print(f"{sum(entry['seconds'] for entry in runs.values()) / 60:.0f} core-minutes in all")
    report(runs, output_dir, record)


if __name__ == "__main__":
    typer.run(main)
