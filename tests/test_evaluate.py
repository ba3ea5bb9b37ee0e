"""Evaluation: the harness's scores beside plain forward passes, the paper's suite in its index, what is written."""

import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from checkpoints import released_config, released_tensors, write_checkpoint
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from modeling_grin import GrinMoeForCausalLM
from recipes import data, evaluate

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "recipes" / "configs" / "evaluate_paper.yaml"
MAX_NEW_TOKENS = 12

TABLE_2 = {  # paper, Table 2: shots and score of GRIN MoE, in its order
    "MMLU": (5, 79.4), "HellaSwag": (5, 83.7), "ANLI": (7, 60.6), "GSM8K": (8, 90.4), "MedQA": (2, 70.4),
    "AGIEval": (0, 48.2), "TriviaQA": (5, 73.9), "ARC-C": (10, 92.0), "ARC-E": (10, 98.0), "PIQA": (5, 89.0),
    "SocialIQA": (5, 79.5), "BBH": (3, 81.4), "WinoGrande": (5, 81.4), "OpenBookQA": (10, 89.8), "BoolQ": (2, 83.4),
    "CommonsenseQA": (10, 81.8), "TruthfulQA": (10, 74.5), "HumanEval": (0, 74.4), "MBPP": (3, 80.3),
}  # fmt: skip
AVERAGE = 79.58  # its last line
MATH = (0, 58.9)  # paper, abstract


# ---- The shipped suites ----


HARNESS = Path(lm_eval.tasks.__file__).parent
FOLDERS = ("mmlu/default", "hellaswag", "anli", "gsm8k", "medqa", "agieval", "triviaqa", "arc", "piqa", "siqa", "bbh",
           "winogrande", "openbookqa", "super_glue/boolq", "commonsense_qa", "truthfulqa", "humaneval", "mbpp",
           "minerva_math", "benchmarks")  # fmt: skip


def quick_manager(include_path, metadata=None, include_defaults=False):
    """The harness's TaskManager over the tasks of `include_path` alone: reading all 15,000 files takes 10 seconds."""
    return TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)


@pytest.fixture(scope="module")
def registry():
    return quick_manager([*(HARNESS / folder for folder in FOLDERS), ROOT / "recipes" / "tasks"])


def leaf_configs(registry, name):
    entry = registry.task_index[name]
    if entry.cfg is not None and "group" not in entry.cfg:
        return [entry.cfg]
    children = entry.tags if entry.cfg is None else entry.cfg["task"]  # of a tag, of a group
    return [leaf for child in children for leaf in leaf_configs(registry, child)]


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_suite_is_table_2_and_the_harness_has_it(registry, at_root):
    group = evaluate.parse(["--config", str(PAPER)])[1]
    rows, entries = group["metadata"]["rows"], group["task"]
    figures, rewritten = {}, []
    for (name, row), entry in zip(rows.items(), entries, strict=True):
        assert row["task"] == (entry.get("task") or entry["group"])
        config = registry.task_index[row["task"]].cfg
        assert ("group" in entry) == ("group" in config), "overrides reach a group's tasks only by this key"
        metrics = {metric["metric"] for metric in config.get("metric_list", config.get("aggregate_metric_list"))}
        function = {"HumanEval": ("pass_at_k", "pass@1"), "MBPP": ("pass_at_1", "pass_at_1")}.get(name)
        assert row["metric"] in metrics or any(function[0] in str(m) and function[1] == row["metric"] for m in metrics)
        for leaf in leaf_configs(registry, row["task"]):
            assert row.get("filter", "none") in ([step["name"] for step in leaf.get("filter_list", [])] or ["none"])
            if changed := entry.get("generation_kwargs"):  # they replace the task's own
                assert changed == leaf["generation_kwargs"] | {key: changed[key] for key in ("until", "max_gen_toks")}
                rewritten.append(name)
        if name == "TruthfulQA":
            assert leaf["num_fewshot"] == 0 and "ten shots are not possible" in row["differs"]
        figures[name] = (entry.get("num_fewshot", 10), row["paper"])
    assert figures.pop("MATH") == MATH
    assert figures == TABLE_2
    assert sum(score for _, score in figures.values()) / len(figures) == pytest.approx(AVERAGE, abs=0.005)
    assert set(rewritten) == {"GSM8K", "BBH", "MATH"}
    for name, number in (("mmlu", 57), ("bbh_cot_fewshot", 27), ("agieval_en", 10), ("anli_rounds", 3)):
        assert len({config["task"] for config in leaf_configs(registry, name)}) == number


def test_rows_are_chosen_by_name(at_root):
    config, group = evaluate.parse(["--config", str(PAPER), "--rows", "MATH", "PIQA", "--limit", "0.5"])
    assert list(group["metadata"]["rows"]) == ["PIQA", "MATH"] and len(group["task"]) == 2 and config.limit == 0.5
    with pytest.raises(ValueError, match="--rows must be of MMLU, HellaSwag"):
        evaluate.parse(["--config", str(PAPER), "--rows", "wrod"])


# ---- A tiny model on tasks of our own ----

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, dev: {folder}/dev.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {new}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: {name}
task: {tasks}
aggregate_metric_list: [{{metric: acc_norm, weight_by_size: true}}]
"""
SUITE = {
    "group": "suite",
    "task": [{"group": "group", "num_fewshot": 2}, {"task": "write"}],
    "metadata": {"version": 1.0, "rows": {
        "choice": {"task": "group", "metric": "acc_norm", "paper": 40.0, "differs": "these are | random"},

        "write": {"task": "write", "metric": "exact_match"},
    }},
}  # fmt: skip


CONFIG = """
model_args: {pretrained: GRIN-MoE, dtype: float32, add_bos_token: false}
tasks: suite
include_path: tasks
output_path: out
apply_chat_template: true
device: cpu
batch_size: 8
seed: 1234
"""


class Reference:
    """The model by plain forward passes, one text at a time."""

    def __init__(self, folder):
        self.model = GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def answer_score(self, prompt, answer):
        """Log-likelihood of the answer."""
        context, whole = self.ids(prompt), self.ids(prompt + answer)
        logits = self.model(torch.tensor([whole])).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        return logits.gather(1, torch.tensor(whole[len(context) :])[:, None]).sum().item()

    @torch.no_grad()
    def write(self, prompt):
        """Greedy text up to <|end|> or <|endoftext|>, and whether it came to one."""
        ids, stops = self.ids(prompt), self.tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
        new = []
        while len(new) < MAX_NEW_TOKENS:
            new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in stops:
                break
        return self.tokenizer.decode(new, skip_special_tokens=True), new[-1] in stops


def chat(*turns):
    """The release's chat format: questions and answers in turn, and the head of the next answer."""
    roles = ["user", "assistant"] * len(turns)
    said = "".join(f"<|{role}|>\n{text}<|end|>\n" for role, text in zip(roles, turns, strict=False))
    return said + "<|assistant|>\n"


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def workdir(trained_tokenizer, tmp_path_factory):
    """The current folder: a model GRIN-MoE, tasks/ and their data, config.yaml."""
    folder = tmp_path_factory.mktemp("evaluate")
    special = {name: getattr(trained_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = released_config(vocab_size=len(trained_tokenizer), **special)
    tensors = released_tensors(config, seed=5)
    tensors["lm_head.bias"][trained_tokenizer.convert_tokens_to_ids("<|end|>")] += 2.0  # some answers are short
    trained_tokenizer.save_pretrained(write_checkpoint(folder / "GRIN-MoE", config, tensors, num_shards=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("lm_eval.tasks.TaskManager", quick_manager)
        patch.setattr(evaluate, "TaskManager", quick_manager)
        generator = torch.Generator().manual_seed(7)
        words = sorted(word for word in trained_tokenizer.get_vocab() if word.isalpha())

        def say(low, high):
            count = int(torch.randint(low, high, (), generator=generator))
            return " ".join(words[int(i)] for i in torch.randint(len(words), (count,), generator=generator))

        def ask(number):
            choices = [say(1, 5) for _ in range(2 + number % 3)]
            return {"question": say(3, 20), "choices": choices, "answer": number % len(choices)}

        tasks = Path("tasks")
        tasks.mkdir()
        for name, number in (("choice_a", 5), ("choice_b", 11), ("dev", 3)):
            write_lines(tasks / f"{name}.jsonl", [ask(i) for i in range(number)])
            if name != "dev":
                (tasks / f"{name}.yaml").write_text(CHOICE.format(name=name, folder="tasks"))
        reference = Reference("GRIN-MoE")
        questions = [say(3, 12) for _ in range(10)]
        answers = [reference.write(chat(question)) for question in questions]
        assert {stopped for _, stopped in answers} == {True, False}
        write_lines(tasks / "write.jsonl", [
            {"question": question, "target": answer if i % 3 else "no"}
            for i, (question, (answer, _)) in enumerate(zip(questions, answers, strict=True))])  # fmt: skip
        (tasks / "write.yaml").write_text(WRITE.format(name="write", folder="tasks", new=MAX_NEW_TOKENS))
        # One group in the other, as MMLU's.
        (tasks / "group.yaml").write_text(GROUP.format(name="group", tasks="[choice_a, inner]"))
        (tasks / "inner.yaml").write_text(GROUP.format(name="inner", tasks="[choice_b]"))
        (tasks / "suite.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
        Path("config.yaml").write_text(CONFIG)
        yield folder


def run(*arguments, config="config.yaml"):
    evaluate.main(["--config", config, *map(str, arguments)])


def read_rows(folder):
    return {row["row"]: row for row in json.loads(Path(folder, "results.json").read_text())["rows"]}


def read_samples(folder, task):
    samples = json.loads(Path(folder, "harness.json").read_text(encoding="utf-8"))["samples"][task]
    return sorted(samples, key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def evaluated(workdir):
    """Where the suite was run."""
    run("--log_samples", "true")
    return workdir / "out"


@pytest.fixture(scope="module")
def reference(workdir):
    return Reference(workdir / "GRIN-MoE")


def test_choices_are_ranked_as_by_plain_forward_passes(evaluated, reference, workdir):
    shots = [part for row in read_lines(workdir / "tasks/dev.jsonl")[:2]
             for part in (row["question"], row["choices"][row["answer"]])]  # fmt: skip
    right, correct_by_sum, squares, total = [], [], 0.0, 0
    for name in ("choice_a", "choice_b"):
        rows, own = read_lines(workdir / f"tasks/{name}.jsonl"), []
        samples = read_samples(evaluated, name)
        for number, row in enumerate(rows):
            prompt = chat(*shots, row["question"])
            scores = [reference.answer_score(prompt, choice) for choice in row["choices"]]
            measured = [float(response[0][0]) for response in samples[number]["resps"]]
            assert measured == pytest.approx(scores, abs=1e-3)
            per_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
            own.append(float(per_character.index(max(per_character)) == row["answer"]))
            correct_by_sum.append(float(scores.index(max(scores)) == row["answer"]))
        squares += torch.tensor(own).var().item() * (len(own) - 1)
        total += len(own)
        right += own
    result = read_rows(evaluated)["choice"]
    assert result["score"] == pytest.approx(100 * sum(right) / 16)
    assert right != correct_by_sum, "lengths matter"
    assert result["stderr"] == pytest.approx(100 * math.sqrt(squares / (total - 2) / total)), "of the pooled variance"
    assert (result["shots"], result["paper"]) == ([2], 40.0)


def test_answers_are_greedy_and_end_at_the_end_of_turn(evaluated, reference, workdir):
    rows = read_lines(workdir / "tasks/write.jsonl")
    own = [reference.write(chat(row["question"]))[0] for row in rows]
    samples = read_samples(evaluated, "write")
    assert [sample["resps"][0][0] for sample in samples] == own
    expected = 100 * sum(answer == row["target"] for answer, row in zip(own, rows, strict=True)) / len(rows)
    assert 0 < expected < 100 and read_rows(evaluated)["write"]["score"] == pytest.approx(expected)


def test_the_same_command_resumes(evaluated, workdir, monkeypatch):
    """Answers are computed again only for another model or another prompt."""
    forward, calls = GrinMoeForCausalLM.forward, []
    monkeypatch.setattr(GrinMoeForCausalLM, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    before = read_rows(evaluated)
    run("--log_samples", "true")
    assert calls == [] and read_rows(evaluated) == before
    run("--rows", "write", "--limit", 3, "--apply_chat_template", "false", "--output_path", "out/plain")
    assert calls
    assert "limited to 3 examples" in Path("out/plain/results.md").read_text()
    first, config = next(Path("GRIN-MoE").glob("*.safetensors")), evaluate.parse(["--config", "config.yaml"])[0]
    identity, times = evaluate.identify(config.model_args), first.stat()
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
    assert evaluate.identify(config.model_args) != identity
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert evaluate.identify(config.model_args | {"dtype": "bfloat16"}) != identity


# ---- The page ----


def test_the_commands_of_the_page_run(workdir, tmp_path, monkeypatch):
    """In this process, with a tiny model; the arguments of the released model's command are read."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("output").mkdir()
    for name in ("GRIN-MoE", "output/sft_debug"):
        Path(name).symlink_to(workdir / "GRIN-MoE")
    data.main(Path("data"), max_rows=16, max_characters=400, seed=0)
    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8").replace("\\\n", " ")
    ran = []
    for line in re.findall(r"^(?:accelerate launch|python) .*", text, re.MULTILINE):
        words = shlex.split(line)
        if words[1] == "-c":
            monkeypatch.setattr(sys, "argv", words[1:2] + words[3:])
            exec(words[2], {})
        elif "recipes/evaluate.py" in words:
            arguments = words[words.index("recipes/evaluate.py") + 1 :]
            (evaluate.main if "GRIN-MoE" in arguments else evaluate.parse)(arguments)
        ran.append(words[1])
    assert ran == ["recipes/data.py", "recipes/evaluate.py", "recipes/evaluate.py", "launch", "-c"]
    scores = read_rows("output/evaluate_debug")
    own = json.loads(next(Path("output/harness").rglob("results_*.json")).read_text())["results"]
    assert scores.keys() == {"order"} and scores["order"]["score"] == 100 * own["python_order"]["acc,none"]
