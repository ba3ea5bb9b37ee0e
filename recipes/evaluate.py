"""Evaluate a GRIN-MoE with lm-evaluation-harness: the paper's Table 2, or a suite of your own, beside given figures.

    accelerate launch recipes/evaluate.py --config recipes/configs/evaluate_paper.yaml --model microsoft/GRIN-MoE

A suite is a mapping in the YAML file: a row's name, the harness's task, its shots and metric. Each row is stored in
output_dir/rows when it is done, with the command that gives it again, and is not run twice. `--help` lists every
argument.
"""

import hashlib
import json
import logging
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
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
from rich.markdown import Markdown
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoConfig

from modeling_grin.files import write_whole
from modeling_grin.training.recipes import DTYPES, RecipeParser, clear_errors, errors_of

console = Console()

LOGIT_COPIES = 4  # of float32: logits and log-probabilities, and as much again for what led to them

PACKAGES = ("grin-moe", "torch", "transformers", "tokenizers", "datasets", "accelerate", "lm_eval")

COLUMNS = ("benchmark", "harness task", "shots", "metric", "score", "paper")


@dataclass(frozen=True)
class Row:
    """A line of the suite: what to run, and what to put beside its score."""

    name: str
    task: str  # of the harness, or a group with a mean of its own
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
        if not isinstance(self.task, str) or not isinstance(self.num_fewshot, int):
            raise ValueError(f"suite: {self.name} needs task, a name of the harness's, and a whole num_fewshot")


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
            if not isinstance(given, dict):
                raise ValueError(f"suite: {name} must be a mapping with task and metric, and is {given!r}")
            if unknown := set(given) - set(known):
                raise ValueError(f"suite: {name} has no setting {', '.join(unknown)}; there are {', '.join(known)}")
            if missing := {"task", "metric"} - set(given):
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

    def model_name(self) -> str:
        """The model's name on the Hub, or that of its folder, without where that is."""
        path = Path(self.model_name_or_path)
        return path.resolve().name if path.is_dir() else self.model_name_or_path

    def device(self) -> str:
        """Where the model goes, by torch's name."""
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if accelerator is None else accelerator.type

    def model_args(self) -> dict[str, Any]:
        """The harness's arguments of the model."""
        given = {"pretrained": self.model_name_or_path, "revision": self.revision, "dtype": self.dtype}
        flags = {"parallelize": self.parallelize, "add_bos_token": False}  # the release puts no <s> before a text
        chosen = {name: getattr(self, name) for name in ("attn_implementation", "experts_implementation")}
        return {**given, **flags, **{name: value for name, value in chosen.items() if value is not None}}


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

        The harness lowers the size until there is no error. On a CPU there is none, the process is killed: there the
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
    if arguments.include_path is not None:
        own = TaskManager(include_path=arguments.include_path, include_defaults=False)
        with suppress(KeyError):  # of a task that is the harness's
            for row in filter(arguments.is_asked_for, arguments.rows):
                list(leaf_configs(own, row.task))
            return own
    return TaskManager(include_path=arguments.include_path)


def check_tasks(arguments: EvaluateArguments, manager: TaskManager) -> None:
    """Raise ValueError if a task does not exist, or runs code that the model writes without leave."""
    unsafe = []
    for row in filter(arguments.is_asked_for, arguments.rows):
        if row.task not in manager.task_index:
            raise ValueError(f"suite: {row.name}: the harness has no task {row.task}; `lm-eval ls tasks` lists all")
        if manager.task_index[row.task].cfg is None:
            raise ValueError(f"suite: {row.name}: {row.task} is a tag of several tasks; name one, or write a group")
        if any(config.get("unsafe_code") for config in leaf_configs(manager, row.task)):
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
    patterns = ("*.safetensors", "*config.json", "tokenizer.json", "*.jinja")  # which makes the prompts
    files = sorted(file for pattern in patterns for file in Path(name).glob(pattern))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def hash_of_tasks(folder: str | None) -> str | None:
    """What tells the task files of `include_path` from others: their contents, but not the data that they name."""
    if folder is None:
        return None
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in (".yaml", ".yml", ".py"))
    contents = [(str(file.relative_to(folder)), file.read_text(encoding="utf-8")) for file in files]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def settings_of(row: Row, arguments: EvaluateArguments, identity: str) -> dict[str, Any]:
    """What a stored score must have been measured with to stand for one measured now."""
    shared = ("limit", "apply_chat_template", "fewshot_as_multiturn", "seed", "dtype",
              "attn_implementation", "experts_implementation")  # fmt: skip
    own = ("task", "metric", "num_fewshot", "filter", "unit", "gen_kwargs")
    return {
        "model": arguments.model_name(),
        "identity": identity,
        "lm_eval": version("lm_eval"),
        "own_tasks": hash_of_tasks(arguments.include_path),
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


def own_command(row: Row, arguments: EvaluateArguments, argv: list[str], batch_size: str) -> str:
    """This recipe's command for one row: what was given, and then, since the last one counts, what was found."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # others would give other few-shot examples
    launcher = ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]
    found = ["--revision", arguments.revision, "--tasks", row.name, "--batch_size", batch_size, "--overwrite", "true"]
    return shlex.join([*launcher, "recipes/evaluate.py", *argv, *found])


def evaluate_row(
    row: Row, arguments: EvaluateArguments, lm: GrinMoeLM, manager: TaskManager, argv: list[str]
) -> tuple[dict[str, Any], dict[str, list]] | None:
    """Run one row: its result, and the examples by task if they are logged. None on ranks but the first.

    Raises:
        ValueError: the harness measured something else.
    """
    loaded = manager.load([row.task])
    task = loaded["groups"].get(row.task) or loaded["tasks"][row.task]
    leaves = task.get_all_tasks() if isinstance(task, Group) else [task]
    gen_kwargs = {**row.gen_kwargs, "eos_token_id": lm.stop_token_ids()}
    lm.found_batch_sizes.clear()
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    start = time.time()
    results = simple_evaluate(
        model=lm,
        tasks=[task],
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
    figures = {**results["results"], **results.get("groups", {})}
    measured, key = figures[row.task], f"{row.metric},{row.filter}"
    if key not in measured:
        known = [name for name in measured if "," in name and "_stderr" not in name]
        raise ValueError(f"the suite's metric,filter {key} is not among what the harness measured, {known}")
    scale = 100.0 if row.unit == "%" else 1.0
    stderr = measured.get(f"{row.metric}_stderr,{row.filter}")
    batch_size = str(min(lm.found_batch_sizes, default=arguments.batch_size))
    first = leaves[0].config
    result = {
        "row": row.name,
        "tasks": [row.task],
        "task_versions": results["versions"],
        "dataset": {
            # What reads local files has no name of its own.
            "path": row.task if "data_files" in (first.dataset_kwargs or {}) else first.dataset_path,
            "name": first.dataset_name if len(leaves) == 1 else None,
            "split": first.test_split or first.validation_split,
        },
        "shots": sorted({results["n-shot"][leaf.task_name] for leaf in leaves}),
        "metric": row.metric,
        "filter": row.filter,
        "unit": row.unit,
        "score": measured[key] * scale,
        "stderr": stderr * scale if isinstance(stderr, float) else None,
        "num_samples": sum(results["n-samples"][leaf.task_name]["effective"] for leaf in leaves),
        "batch_size": batch_size,
        "seconds": round(time.time() - start, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime(start)),
        "command": own_command(row, arguments, argv, batch_size),
        "stop_token_ids": gen_kwargs["eos_token_id"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": {"device": str(lm.device), "gpus": torch.cuda.device_count(), "processes": lm.world_size},
        "harness_results": figures,
    }
    return result, results.get("samples", {})


# ---- Tables ----


def to_json(value: Any, indent: int | None = None) -> str:
    """A line of JSON, or indented lines."""
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False) + "\n"


def shots_of(result: dict[str, Any]) -> str:
    """The number of examples given, and the suite's in brackets where the harness's task has a fixed number."""
    asked = result["settings"]["num_fewshot"]
    used = "/".join(map(str, result["shots"]))
    return used if used == str(asked) else f"{used} ({asked})"


def cells_of(result: dict[str, Any]) -> list[str]:
    """A line of the table, by COLUMNS."""
    digits, unit = (1, "") if result["unit"] == "%" else (3, f" {result['unit']}")
    error = "" if result["stderr"] is None else f" ± {result['stderr']:.{digits}f}"
    metric = result["metric"] if result["filter"] == "none" else f"{result['metric']}, {result['filter']}"
    paper = "" if result["paper"] is None else f"{result['paper']:.{digits}f}"
    return [result["row"], ", ".join(result["tasks"]), shots_of(result), metric,
            f"{result['score']:.{digits}f}{error}{unit}", paper]  # fmt: skip


def table_of(results: list[dict[str, Any]]) -> str:
    """The scores beside the paper's, in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells_of, results)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


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
    """The table for a model card: what was run, and what differs from the paper."""
    prompts = "in the chat format" if arguments.apply_chat_template else "as plain text"
    said = f"lm-evaluation-harness {version('lm_eval')}, {arguments.dtype}, prompts {prompts}."
    if arguments.limit is not None:
        said += f" **Not for comparison: limited to {arguments.limit:g} examples (below 1: that share) of each task.**"
    lines = [said, "", table_of(results)]
    if notes := [f"- {result['row']}: {result['differs']}" for result in results if result["differs"]]:
        lines += ["", "What differs from the paper, whose pipeline and prompts are not public:", "", *notes]
    return "\n".join(lines) + "\n"


def write_tables(done: dict[str, dict[str, Any]], arguments: EvaluateArguments) -> str:
    """results.json and results.md in output_dir, to be published, so that they have no paths. Returns the table."""
    results = [done[row.name] for row in arguments.rows if row.name in done]
    folder, name, kept_apart = Path(arguments.output_dir), arguments.model_name(), ("harness_results", "command")
    short = [{key: value for key, value in result.items() if key not in kept_apart} for result in results]
    document = {"model": name, "rows": short, "model-index": model_index(results, name)}
    write_whole(folder / "results.json", to_json(document, indent=2))
    write_whole(folder / "results.md", markdown(results, arguments))
    return table_of(results)


# ---- The run ----


def parse(argv: list[str] | None = None) -> tuple[EvaluateArguments]:
    """The arguments of the command line, and of the YAML file that `--config` names."""
    return RecipeParser([EvaluateArguments], description=__doc__).parse_args_and_config(argv)


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
    rows: list[Row],
    done: dict[str, dict[str, Any]],
    arguments: EvaluateArguments,
    manager: TaskManager,
    identity: str,
    argv: list[str],
) -> list[str]:
    """Run `rows`; the first rank adds each to `done`, and writes it and the tables. Returns what failed."""
    lm = load(arguments)
    failures: list[str] = []
    for number, row in enumerate(rows, 1):
        if is_main():
            console.rule(f"{row.name} ({number} of {len(rows)})", align="left")
        try:
            measured = evaluate_row(row, arguments, lm, manager, argv)
        except Exception as error:  # of many types: no connection, a package that is missing, a metric that fails
            if lm.world_size > 1:
                raise  # other ranks may be waiting for this one
            failures.append(f"{row.name}: {' '.join(str(error).split()) or type(error).__name__}")
            continue  # the others do not depend on it
        if measured is None:
            continue
        result, samples = measured
        result |= {"settings": settings_of(row, arguments, identity), "paper": row.paper, "differs": row.differs}
        folder = Path(arguments.output_dir, "rows")
        folder.mkdir(parents=True, exist_ok=True)
        for name, examples in samples.items():
            write_whole(folder / f"{row.name}.{name}.jsonl", "".join(map(to_json, examples)))
        write_whole(folder / f"{row.name}.json", to_json(result, indent=2))
        done[row.name] = result
        write_tables(done, arguments)
    if lm.world_size > 1:
        lm.accelerator.end_training()  # all ranks leave the process group before they exit
    return failures


def main(argv: list[str] | None = None) -> None:
    """Check, load, run the rows that are not done yet, and leave rows and tables in output_dir."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of shots that are set as they are meant to be
    argv = sys.argv[1:] if argv is None else argv
    with clear_errors():
        (arguments,) = parse(argv)
        manager = make_task_manager(arguments)
        check_tasks(arguments, manager)
        identity = identify(arguments)
        if not Path(arguments.model_name_or_path).is_dir():
            arguments.revision = identity  # so that what is loaded, and named in the commands, stays the same
        done = read_stored(arguments, identity)
        todo = [row for row in arguments.rows if arguments.is_asked_for(row) and row.name not in done]
        failures = run(todo, done, arguments, manager, identity, argv) if todo else []
        if is_main() and done:
            console.print(Markdown(write_tables(done, arguments)))
            console.print(Path(arguments.output_dir, "results.md"), "says what differs from the paper", markup=False)
        if failures:
            raise ValueError(f"{len(failures)} of {len(todo)} rows failed: {'; '.join(failures)}")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, in which this file would pass for the package `evaluate` that tasks import
    record(main)()  # a launcher then reports the error of the rank that failed
