"""Evaluate a GRIN-MoE with lm-evaluation-harness: the paper's Table 2, or a suite of your own, beside given figures.

    accelerate launch recipes/evaluate.py --config recipes/configs/evaluate_paper.yaml --model microsoft/GRIN-MoE

A suite is a mapping in the YAML file: a row's name, the harness's task, its shots and metric. Each row is stored in
output_dir/rows when it is done, with the commands that give it again, and is not run twice. `--help` lists every
argument.
"""

import csv
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import shlex
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import get_max_memory
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoConfig

from modeling_grin.training.recipes import DTYPES, RecipeParser, clear_errors, errors_of

console = Console()

LOGIT_COPIES = 4  # of float32: logits and log-probabilities, and as much again for what led to them

# The harness's own command knows the model only once this package is imported.
HARNESS = "import modeling_grin; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@dataclass(frozen=True)
class Row:
    """A line of the suite: what to run, and what to put beside its score."""

    name: str
    tasks: list[str]  # of the harness; the score of several is their mean, each example counting once
    metric: str
    num_fewshot: int = 0
    filter: str = "none"  # of the harness: how an answer is found in what was generated
    unit: str = "%"  # of the score; the harness's fractions are then percentages
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    paper: float | None = None  # the paper's figure, in `unit`
    differs: str = ""  # from the paper's setting, as far as that is known

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"suite: {self.name!r} names a file, too: use letters, digits, dots, - and _")
        if not isinstance(self.tasks, list) or not self.tasks or not isinstance(self.num_fewshot, int):
            raise ValueError(f"suite: {self.name} needs tasks, a list of the harness's names, and a whole num_fewshot")


@dataclass
class EvaluateArguments:
    """What is evaluated on what, and how."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint to evaluate.", "aliases": ["--model"]})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model of the Hub."})
    suite: dict | None = field(default=None, metadata={"help": "Rows by name; in the YAML file only."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Rows of the suite to run; by default all."})
    include_path: str | None = field(default=None, metadata={"help": "Folder of task files of your own."})
    output_dir: str = field(default="output/evaluate", metadata={"help": "Where rows and tables go."})
    overwrite: bool = field(default=False, metadata={"help": "Run rows again that are done."})
    log_samples: bool = field(default=False, metadata={"help": "Also write each example with prompt and answer."})
    limit: float | None = field(
        default=None, metadata={"help": "Examples per task, or their share below 1: for trying out, not for figures."}
    )
    batch_size: str = field(default="auto", metadata={"help": "Sequences per forward pass; auto finds the largest."})
    max_batch_size: int = field(default=64, metadata={"help": "What auto tries first."})
    apply_chat_template: bool = field(default=True, metadata={"help": "Ask in the model's chat format."})
    fewshot_as_multiturn: bool = field(
        default=True, metadata={"help": "Give each example as a turn of its own, in the chat format."}
    )
    seed: int = field(default=1234, metadata={"help": "Seed of everything, the choice of examples included."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type of the weights."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention, as in `from_pretrained`."})
    experts_implementation: str | None = field(default=None, metadata={"help": "Experts, as in `from_pretrained`."})
    parallelize: bool = field(
        default=False, metadata={"help": "Spread one model over all GPUs; not with several processes."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "Run the code that the model writes, which some tasks are about."}
    )
    rows: list[Row] = field(init=False)  # of `suite`

    def __post_init__(self) -> None:
        if not self.suite:
            raise ValueError("there is no suite: give a YAML file that has one, as --config")
        known = [option.name for option in fields(Row)][1:]
        self.rows = []
        for name, given in self.suite.items():
            if unknown := set(given) - set(known):
                raise ValueError(f"suite: {name} has no setting {', '.join(unknown)}; there are {', '.join(known)}")
            if missing := {"tasks", "metric"} - set(given):
                raise ValueError(f"suite: {name} lacks {', '.join(sorted(missing))}")
            self.rows.append(Row(name, **given))
        if unknown := set(self.tasks or []) - set(self.suite):
            raise ValueError(f"tasks: no row {', '.join(sorted(unknown))}; the suite has {', '.join(self.suite)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is none of {', '.join(DTYPES)}")
        if self.batch_size != "auto" and not (self.batch_size.isdigit() and int(self.batch_size)):
            raise ValueError(f"batch_size={self.batch_size} is neither auto nor a positive number")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit={self.limit} must be above 0")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"include_path={self.include_path}: no such folder")
        self.fewshot_as_multiturn &= self.apply_chat_template

    def is_asked_for(self, row: Row) -> bool:
        """Whether `row` is one of those to run."""
        return self.tasks is None or row.name in self.tasks

    def device(self) -> str:
        """Where the model goes, by torch's name."""
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if accelerator is None else accelerator.type

    def model_args(self) -> dict[str, Any]:
        """The harness's arguments of the model."""
        given = {"pretrained": self.model_name_or_path, "revision": self.revision, "dtype": self.dtype}
        chosen = {name: getattr(self, name) for name in ("attn_implementation", "experts_implementation")}
        chosen |= {"parallelize": self.parallelize or None}
        # The release puts no <s> before a text.
        return {
            **given,
            "add_bos_token": False,
            **{name: value for name, value in chosen.items() if value is not None},
        }


# ---- The model, as the harness runs it ----


class GrinMoeLM(HFLM):
    """The harness's model, with ranks that are right on CPUs and on several machines, and batch sizes that are kept.

    The harness divides examples over processes only where one machine has several GPUs, by the process's number on
    that machine; here the number is that among all processes.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if hasattr(self, "accelerator"):  # there are several processes
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.found_batch_sizes: list[int] = []

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """The largest batch that fits.

        The harness halves the size until there is no error. On a CPU there is none, the process is killed: there the
        size follows from the free memory.
        """
        if self.device.type != "cpu":
            size = super()._detect_batch_size(requests, pos)
        else:
            _, context, continuation = requests[pos] if requests else (None, [0] * self.max_length, [])
            length = min(len(context) + len(continuation), self.max_length)
            sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * 2  # half is left free
            row = length * self.model.config.vocab_size * 4 * LOGIT_COPIES
            fitting = max(1, min(self.max_batch_size, get_max_memory()["cpu"] // sharing // row))
            size = int(self.all_gather(torch.tensor([2 ** int(math.log2(fitting))])).min())
        self.found_batch_sizes.append(size)
        return size

    def stop_token_ids(self) -> list[int]:
        """Where an answer ends: at what the checkpoint says, and at the tokenizer's ends of turn and text."""
        given = self.model.generation_config.eos_token_id
        given = given if isinstance(given, list) else [given]
        stops = {*given, self.eot_token_id, *getattr(self.tokenizer, "stop_token_ids", [])}
        return sorted(stops - {None})


# ---- What is known before anything runs ----


def leaf_configs(manager: TaskManager, name: str) -> Iterator[dict[str, Any]]:
    """The settings of the tasks that the harness's `name` (task, group or tag) means, read without their data."""
    entry = manager.task_index[name]
    if entry.cfg is None:  # a tag
        children = [other for other, tagged in manager.task_index.items() if name in tagged.tags]
    elif "group" in entry.cfg:
        children = [child for child in entry.cfg["task"] if isinstance(child, str)]
    else:
        yield entry.cfg
        return
    for child in children:
        yield from leaf_configs(manager, child)


def make_task_manager(arguments: EvaluateArguments) -> TaskManager:
    """The harness's tasks: those of `include_path` alone if that suffices, since reading all takes a while."""
    names = {name for row in arguments.rows if arguments.is_asked_for(row) for name in row.tasks}
    if arguments.include_path is not None:
        own = TaskManager(include_path=arguments.include_path, include_defaults=False)
        if names <= set(own.all_tasks):
            return own
    return TaskManager(include_path=arguments.include_path)


def check_tasks(arguments: EvaluateArguments, manager: TaskManager) -> None:
    """Raise ValueError if a task does not exist, or runs code that the model writes without leave."""
    unsafe = []
    for row in filter(arguments.is_asked_for, arguments.rows):
        configs = []
        for name in row.tasks:
            if name not in manager.task_index:
                raise ValueError(f"suite: {row.name}: the harness has no task {name}; `lm-eval ls tasks` lists all")
            own = list(leaf_configs(manager, name))
            if manager.task_index[name].cfg is None:
                names = ", ".join(config["task"] for config in own)
                raise ValueError(f"suite: {row.name}: {name} is a tag of several tasks; name them: {names}")
            configs += own
        if any(config.get("unsafe_code") for config in configs):
            unsafe.append(row.name)
    if unsafe and not arguments.confirm_run_unsafe_code:
        raise ValueError(
            f"{', '.join(unsafe)} would run code that the model writes, on this machine: in a container, say "
            "--confirm_run_unsafe_code true, or name the other rows with --tasks"
        )


def identify(arguments: EvaluateArguments) -> str:
    """The commit of a model of the Hub, or what tells the files of a folder from others: names, sizes and times."""
    name = arguments.model_name_or_path
    with errors_of("model_name_or_path", name):
        config = AutoConfig.from_pretrained(name, revision=arguments.revision)
    if not Path(name).is_dir():
        return str(config._commit_hash or arguments.revision)
    patterns = ("*.safetensors", "*config.json", "tokenizer.json")
    files = sorted(file for pattern in patterns for file in Path(name).glob(pattern))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def settings_of(row: Row, arguments: EvaluateArguments, identity: str) -> dict[str, Any]:
    """What a stored score must have been measured with to stand for one measured now."""
    shared = ("limit", "apply_chat_template", "fewshot_as_multiturn", "seed", "dtype",
              "attn_implementation", "experts_implementation")  # fmt: skip
    own = ("tasks", "metric", "num_fewshot", "filter", "unit", "gen_kwargs")
    return {
        "model": arguments.model_name_or_path,
        "identity": identity,
        **{name: getattr(arguments, name) for name in shared},
        **{name: getattr(row, name) for name in own},
    }


def read_stored(arguments: EvaluateArguments, identity: str) -> dict[str, dict[str, Any]]:
    """The rows in output_dir, by name, without those that are to be run again.

    Raises:
        ValueError: one was measured otherwise, and would stand in a table with others it cannot be compared with.
    """
    stored = {}
    for row in arguments.rows:
        path = Path(arguments.output_dir, "rows", f"{row.name}.json")
        if not path.is_file() or (arguments.overwrite and arguments.is_asked_for(row)):
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings_of(row, arguments, identity).items():
            if result["settings"].get(name) != value:
                raise ValueError(
                    f"{path} was measured with {name}={result['settings'].get(name)}, and this run has {value}: give "
                    "another output_dir, or --overwrite true for that row"
                )
        stored[row.name] = {**result, "paper": row.paper, "differs": row.differs}  # as the suite has them now
    return stored


# ---- A row ----


def launcher() -> list[str]:
    """How this run was launched, up to the script. Other processes would give other few-shot examples: the harness
    draws them on each, in the order of its questions."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]


def own_command(row: Row, arguments: EvaluateArguments, config: str, batch_size: str) -> str:
    """This recipe's command for one row: the config, and what was given otherwise."""
    with open(config, encoding="utf-8") as file:
        in_file = yaml.safe_load(file)
    words = [*launcher(), "recipes/evaluate.py", "--config", config]
    words += ["--model_name_or_path", arguments.model_name_or_path]
    left_out = ("model_name_or_path", "suite", "tasks", "output_dir", "overwrite", "log_samples", "batch_size",
                "max_batch_size", "rows")  # fmt: skip
    for option in fields(arguments):
        value = None if option.name in left_out else getattr(arguments, option.name)
        if value is not None and value != in_file.get(option.name, option.default):
            words += [f"--{option.name}", str(value)]
    return shlex.join([*words, "--tasks", row.name, "--batch_size", batch_size, "--overwrite", "true"])


def harness_command(row: Row, arguments: EvaluateArguments, batch_size: str, gen_kwargs: dict[str, Any]) -> str:
    """The harness's own command for one row."""
    python = ["python"] if launcher() == ["python"] else [*launcher(), "--no-python", "python"]
    words = [*python, "-c", HARNESS, "run", "--model", "hf", "--model_args", json.dumps(arguments.model_args()),
             "--tasks", ",".join(row.tasks), "--num_fewshot", str(row.num_fewshot), "--gen_kwargs",
             json.dumps(gen_kwargs), "--batch_size", batch_size, "--device", arguments.device(),
             "--seed", str(arguments.seed)]  # fmt: skip
    if arguments.apply_chat_template:
        words += ["--apply_chat_template", "--fewshot_as_multiturn", str(arguments.fewshot_as_multiturn).lower()]
    for name in ("limit", "include_path"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", str(getattr(arguments, name))]
    if arguments.confirm_run_unsafe_code:
        words.append("--confirm_run_unsafe_code")
    return shlex.join(words)


def pool(parts: list[dict[str, Any]], row: Row, num_samples: list[int]) -> tuple[float, float | None]:
    """The score over all examples of the row's tasks, and its standard error if each task has one; in the row's unit.

    Raises:
        ValueError: the harness measured something else.
    """
    key, scale = f"{row.metric},{row.filter}", 100.0 if row.unit == "%" else 1.0
    for part in parts:
        if key not in part:
            measured = [name for name in part if "," in name and "_stderr" not in name]
            raise ValueError(f"suite: {row.name} has no metric,filter {key}; the harness measured {measured}")
    total = sum(num_samples)
    score = sum(part[key] * n for part, n in zip(parts, num_samples, strict=True)) / total
    errors = [part.get(f"{row.metric}_stderr,{row.filter}") for part in parts]
    known = [error * n for error, n in zip(errors, num_samples, strict=True) if isinstance(error, float)]
    stderr = math.hypot(*known) / total * scale if len(known) == len(parts) else None
    return score * scale, stderr


def environment(lm: GrinMoeLM) -> dict[str, Any]:
    """Versions and hardware."""
    packages = ("grin-moe", "torch", "transformers", "tokenizers", "datasets", "accelerate", "lm_eval")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": {
            "device": str(lm.device),
            "processes": lm.world_size,
            "gpus": devices,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
    }


def evaluate_row(
    row: Row, arguments: EvaluateArguments, lm: GrinMoeLM, manager: TaskManager, config: str
) -> tuple[dict[str, Any], dict[str, list]] | None:
    """Run one row: its result, and the examples by task if they are logged. None on ranks but the first.

    Raises:
        ValueError: the harness cannot load a task or its data.
    """
    try:
        loaded = manager.load(list(row.tasks))
    except Exception as error:  # of many types: no connection, a package that is missing, data that moved
        raise ValueError(f"{row.name}: {' '.join(str(error).split()) or type(error).__name__}") from error
    objects = [loaded["groups"].get(name) or loaded["tasks"][name] for name in row.tasks]
    leaves = [item.get_all_tasks() if isinstance(item, Group) else [item] for item in objects]
    gen_kwargs = {**row.gen_kwargs, "eos_token_id": lm.stop_token_ids()}
    lm.found_batch_sizes.clear()
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    start = time.time()
    results = simple_evaluate(
        model=lm,
        tasks=objects,
        task_manager=manager,
        num_fewshot=row.num_fewshot,
        gen_kwargs=dict(gen_kwargs),
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.fewshot_as_multiturn,
        log_samples=arguments.log_samples,
        confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
        **dict.fromkeys(seeds, arguments.seed),
    )
    if results is None:
        return None
    num_samples = [sum(results["n-samples"][task.task_name]["effective"] for task in tasks) for tasks in leaves]
    measured = {**results["results"], **results.get("groups", {})}
    score, stderr = pool([measured[name] for name in row.tasks], row, num_samples)
    batch_size = str(min(lm.found_batch_sizes, default=arguments.batch_size))
    first = leaves[0][0].config
    result = {
        "row": row.name,
        "tasks": row.tasks,
        "task_versions": results["versions"],
        "dataset": {
            # What reads local files has no name of its own.
            "path": row.tasks[0] if "data_files" in (first.dataset_kwargs or {}) else first.dataset_path,
            "name": first.dataset_name if len(leaves) == len(leaves[0]) == 1 else None,
            "split": first.test_split or first.validation_split,
        },
        "shots": sorted({results["n-shot"][task.task_name] for tasks in leaves for task in tasks}),
        "metric": row.metric,
        "filter": row.filter,
        "unit": row.unit,
        "score": score,
        "stderr": stderr,
        "num_samples": sum(num_samples),
        "batch_size": batch_size,
        "seconds": round(time.time() - start, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime(start)),
        "command": own_command(row, arguments, config, batch_size),
        "harness_command": harness_command(row, arguments, batch_size, gen_kwargs),
        "stop_token_ids": gen_kwargs["eos_token_id"],
        **environment(lm),
        "harness_results": measured,
    }
    return result, results.get("samples", {})


# ---- Tables ----


def write_text(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f".{path.name}.incomplete")
    incomplete.write_text(text, encoding="utf-8")
    incomplete.replace(path)


def to_json(value: Any, indent: int | None = None) -> str:
    """A line of JSON, or indented lines."""
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False) + "\n"


def shots_of(result: dict[str, Any]) -> str:
    """The number of examples given, and the suite's in brackets where the harness's task has a fixed number."""
    asked = result["settings"]["num_fewshot"]
    used = "/".join(map(str, result["shots"]))
    return used if used == str(asked) else f"{used} ({asked})"


def cells_of(result: dict[str, Any]) -> list[str]:
    """A line of the table: row, tasks, shots, metric, score, paper."""
    error = "" if result["stderr"] is None else f" ± {result['stderr']:.1f}"
    metric = result["metric"] if result["filter"] == "none" else f"{result['metric']}, {result['filter']}"
    unit = "" if result["unit"] == "%" else f" {result['unit']}"
    paper = "" if result["paper"] is None else f"{result['paper']:.1f}"
    return [result["row"], ", ".join(result["tasks"]), shots_of(result), metric,
            f"{result['score']:.1f}{error}{unit}", paper]  # fmt: skip


COLUMNS = ("benchmark", "harness task", "shots", "metric", "score", "paper")


def model_index(results: list[dict[str, Any]], model_name: str) -> list[dict[str, Any]]:
    """The scores as the `model-index` of a model card."""
    return eval_results_to_model_index(
        model_name,
        [
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_name=result["row"],
                dataset_type=result["dataset"]["path"],
                dataset_config=result["dataset"]["name"],
                dataset_split=result["dataset"]["split"],
                metric_type=result["metric"],
                metric_name=f"{result['metric']} ({shots_of(result)}-shot)",
                metric_value=round(result["score"], 2),
                source_name="lm-evaluation-harness",
                source_url="https://github.com/EleutherAI/lm-evaluation-harness",
            )
            for result in results
        ],
    )


def markdown(results: list[dict[str, Any]], arguments: EvaluateArguments) -> str:
    """The table for a model card: what was run, what differs from the paper, how to run it again."""

    def line(cells: Any) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    prompts = "in the chat format" if arguments.apply_chat_template else "as plain text"
    said = f"lm-evaluation-harness {version('lm_eval')}, {arguments.dtype}, prompts {prompts}."
    if arguments.limit is not None:
        said += f" **Not for comparison: limited to {arguments.limit:g} examples (below 1: that share) of each task.**"
    lines = [said, "", line(COLUMNS), line(["---"] * len(COLUMNS)), *(line(cells_of(result)) for result in results)]
    if notes := [f"- {result['row']}: {result['differs']}" for result in results if result["differs"]]:
        lines += ["", "What differs from the paper, whose pipeline and prompts are not public:", "", *notes]
    lines += ["", "To run one again:", "", "```bash", *(result["command"] for result in results), "```"]
    return "\n".join(lines) + "\n"


def write_tables(results: list[dict[str, Any]], arguments: EvaluateArguments) -> None:
    """results.json, results.csv and results.md in output_dir, of all rows that are done."""
    folder = Path(arguments.output_dir)
    name = arguments.model_name_or_path
    name = Path(name).resolve().name if Path(name).is_dir() else name
    short = [{key: value for key, value in result.items() if key != "harness_results"} for result in results]
    document = {"model": name, "rows": short, "model-index": model_index(results, name)}
    write_text(folder / "results.json", to_json(document, indent=2))
    columns = (
        "row",
        "tasks",
        "shots",
        "metric",
        "filter",
        "score",
        "stderr",
        "unit",
        "paper",
        "num_samples",
        "differs",
    )
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for result in results:
        flat = {**result, "tasks": " ".join(result["tasks"]), "shots": shots_of(result)}
        writer.writerow([flat[column] for column in columns])
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "results.md", markdown(results, arguments))


def print_table(results: list[dict[str, Any]], arguments: EvaluateArguments) -> None:
    """What results.md has, for a terminal."""
    table = Table(title=f"{escape(arguments.model_name_or_path)}", title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[4:] else "left", no_wrap=column in COLUMNS[4:])
    for result in results:
        table.add_row(*map(escape, cells_of(result)))
    console.print(table)
    console.print(f"{escape(str(Path(arguments.output_dir, 'results.md')))} says what differs from the paper; "
                  "results.csv and results.json are beside it")  # fmt: skip


# ---- The run ----


def parse(argv: list[str] | None = None) -> tuple[EvaluateArguments]:
    """The arguments of the command line, and of the YAML file that `--config` names."""
    return RecipeParser([EvaluateArguments], description=__doc__).parse_args_and_config(argv)


def config_of(argv: list[str] | None) -> str:
    """The path that `--config` names."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser.parse_known_args(argv)[0].config


def is_main() -> bool:
    """Whether this process is the first of a launch, which prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def load(arguments: EvaluateArguments) -> GrinMoeLM:
    """The model, or this rank's copy of it."""
    if arguments.device() == "cpu":
        PartialState(cpu=True)  # else accelerate leaves the processes of a launch to themselves
    with errors_of("model_name_or_path", arguments.model_name_or_path):
        size = {"batch_size": arguments.batch_size, "max_batch_size": arguments.max_batch_size}
        return GrinMoeLM(**arguments.model_args(), **size, device=arguments.device())


def run(
    rows: list[Row], arguments: EvaluateArguments, manager: TaskManager, identity: str, config: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Run `rows`, store each when it is done. Returns results by name, on the first rank, and what failed."""
    lm = load(arguments)
    results: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for number, row in enumerate(rows, 1):
        if is_main():
            console.rule(f"{row.name} ({number} of {len(rows)})", align="left")
        try:
            measured = evaluate_row(row, arguments, lm, manager, config)
        except ValueError as error:  # the others do not depend on it
            failures.append(str(error))
            continue
        if measured is None:
            continue
        result, samples = measured
        result |= {"settings": settings_of(row, arguments, identity), "paper": row.paper, "differs": row.differs}
        path = Path(arguments.output_dir, "rows", f"{row.name}.json")
        for name, examples in samples.items():
            write_text(path.with_name(f"{row.name}.{name}.jsonl"), "".join(map(to_json, examples)))
        write_text(path, to_json(result, indent=2))
        results[row.name] = result
    if lm.world_size > 1:
        lm.accelerator.end_training()  # all ranks leave the process group before they exit
    return results, failures


def main(argv: list[str] | None = None) -> None:
    """Check, load, run the rows that are not done yet, and leave rows and tables in output_dir."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of shots that are set as they are meant to be
    with clear_errors():
        (arguments,) = parse(argv)
        manager = make_task_manager(arguments)
        check_tasks(arguments, manager)
        identity = identify(arguments)
        if not Path(arguments.model_name_or_path).is_dir():
            arguments.revision = identity  # so that what is loaded, and named in the commands, stays the same
        done = read_stored(arguments, identity)
        todo = [row for row in arguments.rows if arguments.is_asked_for(row) and row.name not in done]
        failures: list[str] = []
        if todo:
            measured, failures = run(todo, arguments, manager, identity, config_of(argv))
            done |= measured
        if is_main() and done:
            results = [done[row.name] for row in arguments.rows if row.name in done]
            write_tables(results, arguments)
            print_table(results, arguments)
        if failures:
            raise ValueError(f"{len(failures)} of {len(todo)} rows failed: {'; '.join(failures)}")


if __name__ == "__main__":
    record(main)()  # a launcher then reports the error of the rank that failed
