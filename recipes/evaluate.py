"""Evaluate a GRIN-MoE with lm-evaluation-harness and set the scores beside the paper's Table 2.

    accelerate launch recipes/evaluate.py --config recipes/configs/evaluate_paper.yaml --pretrained microsoft/GRIN-MoE

The YAML file holds options of `lm-eval run`. Its `tasks` names a group of the harness with the shots of each task; the
group's metadata name the rows of the table. Answers are cached, so the same command resumes an interrupted run.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from accelerate import PartialState
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from lm_eval import simple_evaluate
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoConfig

from modeling_grin.files import write_whole
from modeling_grin.training.run import exit_on_error

MODEL_OPTIONS = ("batch_size", "max_batch_size", "device")
RUN_OPTIONS = ("limit", "log_samples", "apply_chat_template", "fewshot_as_multiturn", "confirm_run_unsafe_code")
OPTIONS = ("model_args", *MODEL_OPTIONS, *RUN_OPTIONS, "tasks", "include_path", "output_path", "seed")
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
ASKED = ("tasks", "shots", "metric", "filter", "unit")
COLUMNS = ["benchmark", "harness task", "shots", "metric", "score", "paper"]


class GrinMoeLM(HFLM):
    """The harness's model, which also divides examples over processes on CPUs and on several machines."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if hasattr(self, "accelerator"):  # the harness numbers processes within one machine, and only where GPUs are
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        stops = self.model.generation_config.eos_token_id
        stops = {*(stops if isinstance(stops, list) else [stops]), *getattr(self.tokenizer, "stop_token_ids", [])}
        self.model.generation_config.eos_token_id = sorted(stops - {None})  # the ends of turn and text


def parse(argv: list[str] | None = None) -> tuple[EvaluatorConfig, dict[str, Any]]:
    """Read the options, and the group of tasks with the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with any of the options below")
    parser.add_argument("--pretrained", help="checkpoint: a folder or a name on the Hub; overrides model_args")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows of the table to run; default: all")
    for option in fields(EvaluatorConfig):
        if option.name in OPTIONS:
            parser.add_argument(f"--{option.name}", type=yaml.safe_load, help=option.metadata["help"])
    given = vars(parser.parse_args(argv))
    pretrained, rows = given.pop("pretrained"), given.pop("rows")
    if unknown := EvaluatorConfig.load_yaml_config(given["config"]).keys() - set(OPTIONS):
        raise ValueError(f"{given['config']} must only have options of --help; got {', '.join(sorted(unknown))}")
    config = EvaluatorConfig.from_cli(argparse.Namespace(**given))
    config.model_args |= {"pretrained": pretrained} if pretrained else {}
    group = EvaluatorConfig.load_yaml_config(Path(config.include_path or ".", f"{config.tasks}.yaml"))
    known = group["metadata"]["rows"]
    if unknown := set(rows or ()) - set(known):
        raise ValueError(f"--rows must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    chosen = {name: row for name, row in known.items() if name in (rows or known)}
    wanted = {row["task"] for row in chosen.values()}
    group["metadata"]["rows"] = chosen
    group["task"] = [entry for entry in group["task"] if (entry.get("task") or entry["group"]) in wanted]
    return config, group


def identify(model_args: dict[str, Any]) -> str:
    """Hash what a cached answer depends on beside its prompt: the weights, and how they are loaded."""
    name = model_args["pretrained"]
    files = sorted(file for file in Path(name).glob("*") if file.suffix in (".safetensors", ".json", ".jinja"))
    state: Any = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if not files:
        state = AutoConfig.from_pretrained(name, revision=model_args.get("revision"))._commit_hash
    return hashlib.sha256(json.dumps([model_args, state]).encode()).hexdigest()[:16]


def run(config: EvaluatorConfig, group: dict[str, Any]) -> dict[str, Any] | None:
    """Return the harness's results; None on every rank but the first."""
    if config.device == "cpu":
        PartialState(cpu=True)  # without it, accelerate starts no process group on CPUs
    lm = GrinMoeLM(**config.model_args, **{name: getattr(config, name) for name in MODEL_OPTIONS})
    with TemporaryDirectory() as folder:
        Path(folder, "group.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")
        results = simple_evaluate(
            model=lm,
            tasks=[group["group"]],
            task_manager=TaskManager(include_path=[config.include_path, folder]),
            use_cache=str(Path(config.output_path, f"cache_{identify(config.model_args)}")),
            **{name: getattr(config, name) for name in RUN_OPTIONS},
            **dict(zip(SEEDS, config.seed, strict=True)),
        )
    if lm.world_size > 1:
        lm.accelerator.end_training()  # all ranks leave the process group before they exit
    return results


def leaves(results: dict[str, Any], task: str) -> Iterator[str]:
    """The tasks of a group, or the task itself."""
    children = results["group_subtasks"].get(task)
    for child in children or [task]:
        yield from leaves(results, child) if children else [child]


def make_rows(config: EvaluatorConfig, group: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table, in the group's order, with the settings that a score depends on."""
    shared = {name: getattr(config, name) for name in ("limit", "apply_chat_template", "fewshot_as_multiturn", "seed")}
    shared["lm_eval"] = version("lm_eval")
    figures = {**results["results"], **results.get("groups", {})}
    rows = []
    for name, given in group["metadata"]["rows"].items():
        row = {"row": name, "filter": "none", "unit": "%", "paper": None, "differs": "", **given}
        task = row.pop("task")
        measured, key = figures[task], f"{row['metric']},{row['filter']}"
        if key not in measured:
            known = [name for name in measured if "," in name and "_stderr" not in name]
            raise ValueError(f"metric,filter of row {name} must be one of {', '.join(known)}; got {key}")
        scale = 100.0 if row["unit"] == "%" else 1.0  # of the harness's fractions
        stderr = measured.get(f"{row['metric']}_stderr,{row['filter']}")
        tasks = list(leaves(results, task))
        dataset = results["configs"][tasks[0]]
        is_local = "data_files" in (dataset.get("dataset_kwargs") or {})
        row |= {
            "tasks": [task],
            "shots": sorted({results["n-shot"][task] for task in tasks}),
            "score": measured[key] * scale,
            "stderr": stderr * scale if isinstance(stderr, float) else None,
            "dataset": {
                "path": task if is_local else dataset["dataset_path"],
                "name": dataset.get("dataset_name") if len(tasks) == 1 else None,
                "split": dataset.get("test_split") or dataset.get("validation_split"),
            },
        }
        rows.append({**row, "settings": shared | {key: row[key] for key in ASKED}})
    return rows


def model_index(rows: list[dict[str, Any]], model_name: str) -> list[dict[str, Any]]:
    """The scores as the `model-index` of a model card."""
    return eval_results_to_model_index(model_name, [
        EvalResult(
            task_type="text-generation", task_name="Text Generation", dataset_name=row["row"],
            dataset_type=row["dataset"]["path"], dataset_config=row["dataset"]["name"],
            dataset_split=row["dataset"]["split"], metric_type=row["metric"],
            metric_name=f"{row['metric']} ({'/'.join(map(str, row['shots']))}-shot)",
            metric_value=round(row["score"], 2), source_name="lm-evaluation-harness",
            source_url="https://github.com/EleutherAI/lm-evaluation-harness",
        )
        for row in rows
    ])  # fmt: skip


def table(config: EvaluatorConfig, rows: list[dict[str, Any]]) -> str:
    """The scores beside the paper's, in Markdown, and what differs from the paper."""
    prompts = "in the chat format" if config.apply_chat_template else "as plain text"
    lines = [f"lm-evaluation-harness {version('lm_eval')}, {config.model_args.get('dtype')}, prompts {prompts}.", ""]
    if config.limit is not None:
        lines[0] += (
            f" **Not for comparison: limited to {config.limit:g} examples (below 1: that share) of each task.**"
        )
    cells = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        digits, unit = (1, "") if row["unit"] == "%" else (3, f" {row['unit']}")
        figures = ["" if row[name] is None else f"{row[name]:.{digits}f}" for name in ("score", "stderr", "paper")]
        metric = row["metric"] + f", {row['filter']}" * (row["filter"] != "none")
        score = " ± ".join(filter(None, figures[:2])) + unit
        cells.append([row["row"], row["tasks"][0], "/".join(map(str, row["shots"])), metric, score, figures[2]])
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in cells]
    if notes := [f"- {row['row']}: {row['differs']}" for row in rows if row["differs"]]:
        lines += ["", "Differences from the paper, whose pipeline and prompts are not public:", "", *notes]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the group; leave results.md, results.json and the harness's own figures in output_path."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of shots that are set as they are meant to be
    with exit_on_error():
        config, group = parse(argv)
    results = run(config, group)
    if results is None:
        return
    folder, name = Path(config.output_path), Path(config.model_args["pretrained"])
    rows, model = make_rows(config, group, results), name.resolve().name if name.is_dir() else str(name)
    document = {"model": model, "rows": rows, "model-index": model_index(rows, model)}
    # `harness.json` has paths of this machine; the other two can be published.
    for file, content in (("results.json", document), ("harness.json", results)):
        write_whole(folder / file, json.dumps(content, indent=2, default=handle_non_serializable) + "\n")
    write_whole(folder / "results.md", table(config, rows))
    print(table(config, rows))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, where this file would pass for the package `evaluate` that tasks import
    record(main)()  # a launcher then reports the error of the rank that failed
