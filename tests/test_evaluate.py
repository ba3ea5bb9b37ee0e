"""Evaluation: the harness's scores beside plain forward passes, the paper's suite in its index, what is written."""

import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from checkpoints import released_config, released_tensors, write_checkpoint
from distributed.launch import run as run_python
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from lm_eval.tasks import TaskManager
from peak_memory import PeakMemory
from transformers import AutoTokenizer

from modeling_grin import GrinMoeForCausalLM
from modeling_grin.publishing.card import RESULT_FIELDS
from recipes import data, evaluate

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("evaluate_*.yaml"))
PAPER = ROOT / "recipes" / "configs" / "evaluate_paper.yaml"
MAX_NEW_TOKENS = 12

TABLE_2 = {  # paper, Table 2: shots and score of GRIN MoE, in its order
    "MMLU": (5, 79.4), "HellaSwag": (5, 83.7), "ANLI": (7, 60.6), "GSM8K": (8, 90.4), "MedQA": (2, 70.4),
    "AGIEval": (0, 48.2), "TriviaQA": (5, 73.9), "ARC-C": (10, 92.0), "ARC-E": (10, 98.0), "PIQA": (5, 89.0),
    "SocialIQA": (5, 79.5), "BBH": (3, 81.4), "WinoGrande": (5, 81.4), "OpenBookQA": (10, 89.8), "BoolQ": (2, 83.4),
    "CommonsenseQA": (10, 81.8), "TruthfulQA": (10, 74.5), "HumanEval": (0, 74.4), "MBPP": (3, 80.3),
}  # fmt: skip
AVERAGE = 79.58  # its last line


# ---- The shipped configs ----


HARNESS = Path(lm_eval.tasks.__file__).parent
FOLDERS = ("mmlu/default", "hellaswag", "anli", "gsm8k", "medqa", "agieval", "triviaqa", "arc", "piqa", "siqa", "bbh",
           "winogrande", "openbookqa", "super_glue/boolq", "commonsense_qa", "truthfulqa", "humaneval", "mbpp",
           "minerva_math", "benchmarks")  # fmt: skip


def quick_manager(include_path=None, include_defaults=True, metadata=None):
    """The harness's own TaskManager, over the tasks of FOLDERS alone: to read all 15,000 files takes 10 seconds."""
    folders = [HARNESS / folder for folder in FOLDERS] if include_defaults else []
    return TaskManager(
        include_path=[*folders, *([include_path] if include_path else [])], include_defaults=False, metadata=metadata
    )


@pytest.fixture(scope="module")
def registry():
    return quick_manager(ROOT / "recipes" / "tasks")


def paper_arguments(*arguments):
    return evaluate.parse(["--config", str(PAPER), *arguments])[0]


def test_the_suite_is_table_2():
    rows = {row.name: (row.num_fewshot, row.paper) for row in paper_arguments().rows}
    assert rows.pop("MATH") == (0, 58.9), "of the abstract"
    assert rows == TABLE_2
    assert sum(score for _, score in rows.values()) / len(rows) == pytest.approx(AVERAGE, abs=0.005)


@pytest.mark.parametrize("row", paper_arguments().rows, ids=lambda row: row.name)
def test_the_harness_has_what_the_suite_names(row, registry):
    config = registry.task_index[row.task].cfg
    leaves = list(evaluate.leaf_configs(registry, row.task))
    assert leaves and all("dataset_path" in leaf for leaf in leaves)
    names = {metric["metric"] for metric in config.get("metric_list", config.get("aggregate_metric_list"))}
    functions = {"HumanEval": ("pass_at_k", "pass@1"), "MBPP": ("pass_at_1", "pass_at_1")}  # name their figure
    if row.name in functions:
        function, figure = functions[row.name]
        names = {figure if function in str(name) else name for name in names}
    assert row.metric in names
    for leaf in leaves:
        assert row.filter in ([step["name"] for step in leaf.get("filter_list", [])] or ["none"])
        if leaf.get("num_fewshot") == 0 and row.num_fewshot:  # the harness then gives none
            assert row.name == "TruthfulQA" and "not possible" in row.differs


def test_groups_have_all_their_tasks(registry):
    for name, number in (("mmlu", 57), ("bbh_cot_fewshot", 27), ("agieval_en", 10), ("anli_rounds", 3)):
        assert len({config["task"] for config in evaluate.leaf_configs(registry, name)}) == number


def test_code_of_the_model_runs_with_leave_only(registry):
    with pytest.raises(ValueError, match=r"^HumanEval, MBPP would run code that the model"):
        evaluate.check_tasks(paper_arguments(), registry)
    evaluate.check_tasks(paper_arguments("--tasks", "MMLU", "MATH"), registry)
    evaluate.check_tasks(paper_arguments("--confirm_run_unsafe_code"), registry)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_says_what_launch_override_limits_and_each_source(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = evaluate.parse(["--config", str(path)])[0]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == ["# What", "# Launch", "# Override", "# Limits"]
    assert f"recipes/evaluate.py --config recipes/configs/{path.name}" in lines[1]
    for option in re.findall(r"--(\w+)", lines[2]):
        assert hasattr(arguments, option) or option == "model"
    settings = lines[4 : lines.index(next(line for line in lines if line.startswith("suite:")))]
    assert all(re.search(r"  # .*\b(paper|ours)\b", line) for line in settings)


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
WORD = """
task: word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/word.jsonl}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXT = """
task: text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITE = """
task: {name}
{unsafe}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: [], do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: {name}
task: {tasks}
aggregate_metric_list: [{{metric: acc_norm, weight_by_size: true}}]
"""
SUITE = {
    "choice": {"task": "group", "metric": "acc_norm", "num_fewshot": 2, "paper": 40.0,
               "differs": "these are | random"},
    "word": {"task": "word", "metric": "acc"},
    "text": {"task": "text", "metric": "bits_per_byte", "unit": "bits per byte"},
    "write": {"task": "write", "metric": "exact_match", "gen_kwargs": {"max_gen_toks": MAX_NEW_TOKENS}},
}  # fmt: skip


class Reference:
    """The model by plain forward passes, one text at a time."""

    def __init__(self, folder):
        self.model = GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def score(self, context, whole):
        """Log-likelihood of what follows `context` in `whole`, both ids, and whether each token is the likeliest."""
        logits = self.model(torch.tensor([whole])).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        targets = torch.tensor(whole[len(context) :])
        return logits.gather(1, targets[:, None]).sum().item(), bool((logits.argmax(1) == targets).all())

    def answer_score(self, prompt, answer):
        return self.score(self.ids(prompt), self.ids(prompt + answer))

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
    """The current folder: a model GRIN-MoE, tasks/ and their data, suite.yaml."""
    folder = tmp_path_factory.mktemp("evaluate")
    special = {name: getattr(trained_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = released_config(vocab_size=len(trained_tokenizer), **special)
    tensors = released_tensors(config, seed=5)
    tensors["lm_head.bias"][trained_tokenizer.convert_tokens_to_ids("<|end|>")] += 2.0  # some answers are short
    trained_tokenizer.save_pretrained(write_checkpoint(folder / "GRIN-MoE", config, tensors, num_shards=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("recipes.evaluate.TaskManager", quick_manager)
        patch.setattr("lm_eval.tasks.TaskManager", quick_manager)
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
        write_lines(tasks / "text.jsonl", [{"text": say(4, 30)} for _ in range(5)])
        likeliest = [reference.tokenizer.decode(int(reference.model(torch.tensor([reference.ids(chat(question))]))
                     .logits[0, -1].argmax())) for question in questions]  # fmt: skip
        write_lines(tasks / "word.jsonl", [
            {"question": question, "target": word if i % 2 else say(2, 3)}
            for i, (question, word) in enumerate(zip(questions, likeliest, strict=True))])  # fmt: skip
        answers = [reference.write(chat(question)) for question in questions]
        assert {stopped for _, stopped in answers} == {True, False}
        write_lines(tasks / "write.jsonl", [
            {"question": question, "target": answer if i % 3 else "no"}
            for i, (question, (answer, _)) in enumerate(zip(questions, answers, strict=True))])  # fmt: skip
        for name, text in (("word", WORD), ("text", TEXT), ("write", WRITE)):
            (tasks / f"{name}.yaml").write_text(text.format(name=name, folder="tasks", unsafe=""))
        # One group in the other, as MMLU's.
        (tasks / "group.yaml").write_text(GROUP.format(name="group", tasks="[choice_a, inner]"))
        (tasks / "inner.yaml").write_text(GROUP.format(name="inner", tasks="[choice_b]"))
        (tasks / "unsafe.yaml").write_text(WRITE.format(name="unsafe", folder="tasks", unsafe="unsafe_code: true"))
        settings = {"model_name_or_path": "GRIN-MoE", "include_path": "tasks", "dtype": "float32", "use_cpu": True}
        Path("suite.yaml").write_text(yaml.safe_dump({**settings, "suite": SUITE}, sort_keys=False))
        yield folder


def run(*arguments, config="suite.yaml"):
    evaluate.main(["--config", config, *map(str, arguments)])


def read_rows(folder):
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path(folder, "rows").glob("*.json")}


@pytest.fixture(scope="module")
def evaluated(workdir):
    """Where the suite was run."""
    run("--output_dir", "out", "--log_samples", "true")
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
        samples = {sample["doc_id"]: sample for sample in read_lines(evaluated / f"rows/choice.{name}.jsonl")}
        for number, row in enumerate(rows):
            prompt = chat(*shots, row["question"])
            scores = [reference.answer_score(prompt, choice)[0] for choice in row["choices"]]
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
    assert (result["num_samples"], result["shots"], result["paper"]) == (16, [2], 40.0)


def test_a_target_is_the_greedy_answer_or_not(evaluated, reference, workdir):
    rows = read_lines(workdir / "tasks/word.jsonl")
    own = [reference.answer_score(chat(row["question"]), row["target"]) for row in rows]
    samples = sorted(read_lines(evaluated / "rows/word.word.jsonl"), key=lambda sample: sample["doc_id"])
    assert [float(sample["resps"][0][0][0]) for sample in samples] == pytest.approx([x for x, _ in own], abs=1e-3)
    assert read_rows(evaluated)["word"]["score"] == pytest.approx(100 * sum(greedy for _, greedy in own) / len(own))
    assert 0 < sum(greedy for _, greedy in own) < len(own)


def test_bits_per_byte_of_plain_text(evaluated, reference, workdir):
    texts = [row["text"] for row in read_lines(workdir / "tasks/text.jsonl")]
    start = [reference.tokenizer.bos_token_id]  # which the first token is predicted from
    nats = -sum(reference.score(start, start + reference.ids(text))[0] for text in texts)
    result = read_rows(evaluated)["text"]
    assert result["score"] == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5)
    assert result["stderr"] is None


def test_answers_are_greedy_and_end_at_the_end_of_turn(evaluated, reference, workdir):
    rows = read_lines(workdir / "tasks/write.jsonl")
    own = [reference.write(chat(row["question"]))[0] for row in rows]
    samples = sorted(read_lines(evaluated / "rows/write.write.jsonl"), key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == own
    expected = 100 * sum(answer == row["target"] for answer, row in zip(own, rows, strict=True)) / len(rows)
    assert 0 < expected < 100 and read_rows(evaluated)["write"]["score"] == pytest.approx(expected)


def test_tables_say_the_same(evaluated):
    rows = read_rows(evaluated)
    document = json.loads((evaluated / "results.json").read_text(encoding="utf-8"))
    assert [row["row"] for row in document["rows"]] == list(SUITE)
    assert {row["row"]: row["score"] for row in document["rows"]} == {name: rows[name]["score"] for name in SUITE}
    assert set(RESULT_FIELDS) <= document["rows"][0].keys() and document["model"] == "GRIN-MoE"
    text = (evaluated / "results.md").read_text(encoding="utf-8")
    choice = rows["choice"]
    assert f"| choice | group | 2 | acc_norm | {choice['score']:.1f} ± {choice['stderr']:.1f} | 40.0 |" in text
    assert f"| text | text | 0 | bits_per_byte | {rows['text']['score']:.3f} bits per byte |  |" in text
    assert "- choice: these are | random" in text and "float32, prompts in the chat format" in text
    assert "Not for comparison" not in text
    results = model_index_to_eval_results(document["model-index"])[1]
    card = ModelCard.from_template(
        ModelCardData(model_name="GRIN-MoE", eval_results=results), template_str="---\n{{card_data}}\n---\n" + text
    )
    read_back = {result.dataset_name: result.metric_value for result in ModelCard(str(card)).data.eval_results}
    assert read_back == {name: round(row["score"], 2) for name, row in rows.items()}


def test_a_row_says_what_it_was_measured_with(evaluated):
    row = read_rows(evaluated)["write"]
    assert row["versions"]["lm_eval"] and row["versions"]["torch"] == torch.__version__
    assert (row["hardware"]["device"], row["hardware"]["processes"]) == ("cpu", 1)
    assert row["settings"]["seed"] == 1234 and row["settings"]["dtype"] == "float32"
    assert row["batch_size"] == "64" and row["dataset"] == {"path": "write", "name": None, "split": "test"}


@pytest.mark.parametrize("name", ["choice", "write"])
def test_its_command_gives_a_row_the_same_number(name, evaluated, tmp_path):
    row = read_rows(evaluated)[name]
    python, script, *arguments = shlex.split(row["command"])
    assert (python, script) == ("python", "recipes/evaluate.py")
    evaluate.main([*arguments, "--output_dir", str(tmp_path / "own")])
    assert read_rows(tmp_path / "own")[name]["score"] == row["score"]


# ---- Rows that are done ----


def test_a_row_that_is_done_is_not_run_again(workdir):
    run("--output_dir", "again", "--tasks", "word", "text", "--limit", 3)
    text = Path("again/results.md").read_text(encoding="utf-8")
    assert "limited to 3 examples" in text and "| write |" not in text
    rows = Path("again/rows")
    assert sorted(path.name for path in rows.iterdir()) == ["text.json", "word.json"], "and nothing half-written"
    before = {path.name: path.stat().st_mtime_ns for path in rows.iterdir()}
    rows.joinpath("text.json").unlink()
    run("--output_dir", "again", "--tasks", "word", "text", "--limit", 3)
    after = {path.name: path.stat().st_mtime_ns for path in rows.iterdir()}
    assert after["word.json"] == before["word.json"] and after["text.json"] != before["text.json"]
    run("--output_dir", "again", "--tasks", "word", "--limit", 3, "--overwrite", "true")
    assert rows.joinpath("word.json").stat().st_mtime_ns != before["word.json"]
    assert "| text |" in Path("again/results.md").read_text(encoding="utf-8"), "which is still there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "2"], r"out/rows/choice\.json was measured with limit=None, and this run has 2\.0"),
        (["--seed", "2", "--tasks", "word"], r"with seed=1234, and this run has 2"),
        (["--apply_chat_template", "false"], r"with apply_chat_template=True"),
        (["--dtype", "bfloat16"], r"with dtype=float32"),
    ],
)
def test_rows_measured_otherwise_are_not_mixed(arguments, message, evaluated):
    with pytest.raises(SystemExit, match=message):
        run("--output_dir", "out", *arguments)


def test_other_weights_prompts_and_tasks_are_noticed(workdir, monkeypatch):
    shutil.copytree("GRIN-MoE", "older-model")
    shutil.copytree("tasks", "older-tasks")
    command = ["--output_dir", "older", "--model", "older-model", "--include_path", "older-tasks", "--tasks", "text",
               "--limit", 1]  # fmt: skip
    run(*command)
    before = Path("older/rows/text.json").stat().st_mtime_ns
    run(*command)
    assert Path("older/rows/text.json").stat().st_mtime_ns == before, "nothing has changed"
    for path, setting in (
        (next(Path("older-model").glob("*.safetensors")), "identity"),
        (Path("older-model/chat_template.jinja"), "identity"),
        (Path("older-tasks/text.yaml"), "own_tasks"),
    ):
        content, times = path.read_bytes(), path.stat()
        if setting == "identity":
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
        else:
            path.write_bytes(content + b"\n# other")
        with pytest.raises(SystemExit, match=rf"older/rows/text\.json was measured with {setting}="):
            run(*command)
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(evaluate, "version", lambda name: "0.0")
    with pytest.raises(SystemExit, match=r"was measured with lm_eval="):
        run(*command)


# ---- What is wrong is said in one sentence ----


@pytest.mark.parametrize(
    ("suite", "arguments", "message"),
    [
        ({}, [], "there is no suite"),
        ({"a b": {"task": "word", "metric": "acc"}}, [], "suite: 'a b' names a file"),
        ({"a": {"task": ["word"], "metric": "acc"}}, [], "suite: a needs task, a name"),
        ({"a": {"task": "word"}}, [], "suite: a lacks metric"),
        ({"a": "word"}, [], "suite: a must be a mapping with task and metric, and is 'word'"),
        ({"a": {"task": "word", "metric": "acc", "shots": 1}}, [], "suite: a has no setting shots; there are"),
        ({"a": {"task": "wrod", "metric": "acc"}}, [], "suite: a: the harness has no task wrod"),
        ({"a": {"task": "anli", "metric": "acc"}}, [], "anli is a tag of several tasks; name one, or write a group"),
        ({"a": {"task": "unsafe", "metric": "exact_match"}}, [], "^error: a would run code that the model writes"),
        (SUITE, ["--tasks", "wrod"], "tasks: no row wrod; the suite has choice, word, text"),
        (SUITE, ["--dtype", "float8"], "dtype=float8 is none of"),
        (SUITE, ["--batch_size", "many"], "batch_size=many is neither"),
        (SUITE, ["--batch_size", "0"], "batch_size=0 is neither"),
        (SUITE, ["--limit", "0"], r"limit=0\.0 must be above 0"),
        (SUITE, ["--include_path", "nowhere"], "include_path=nowhere: no such folder"),
        (SUITE, ["--model", "no/such/model"], "model_name_or_path=no/such/model: no such folder"),
        (SUITE, ["--taks", "word"], "--taks"),
    ],
)
def test_an_error_comes_first_and_is_one_sentence(suite, arguments, message, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = yaml.safe_load(Path("suite.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**settings, "suite": suite}, sort_keys=False))
    with pytest.raises(SystemExit, match=message) as raised:
        run(*arguments, "--output_dir", tmp_path / "out", config=str(tmp_path / "mine.yaml"))
    assert str(raised.value).startswith("error: ") and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_row_that_fails_leaves_the_others(workdir, tmp_path):
    Path("tasks/gone.yaml").write_text(TEXT.format(folder="gone").replace("task: text", "task: gone"))
    broken = TEXT.format(folder="tasks").replace("task: text", "task: broken").replace("{{text}}", "{{1 / 0}}")
    Path("tasks/broken.yaml").write_text(broken)
    suite = {
        "gone": {"task": "gone", "metric": "bits_per_byte"},
        "other": {"task": "text", "metric": "byte_perplexity"},
        "broken": {"task": "broken", "metric": "bits_per_byte"},  # a ZeroDivisionError
        "code": {"task": "unsafe", "metric": "exact_match", "gen_kwargs": {"max_gen_toks": 2}},
    }
    settings = yaml.safe_load(Path("suite.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**settings, "suite": suite}, sort_keys=False))
    message = r"^error: 3 of 4 rows failed: gone: .*; other: the suite's metric,filter byte_.*; broken: .*by zero"
    with pytest.raises(SystemExit, match=message):
        run("--output_dir", tmp_path, "--limit", 2, "--confirm_run_unsafe_code", config=str(tmp_path / "mine.yaml"))
    assert list(read_rows(tmp_path)) == ["code"] and "| code |" in (tmp_path / "results.md").read_text()
    assert "--confirm_run_unsafe_code" in read_rows(tmp_path)["code"]["command"]


def test_tables_have_every_row_that_is_done_and_no_paths(workdir, tmp_path, monkeypatch):
    """They are there when the run is interrupted, and can be published."""
    evaluate_row, done = evaluate.evaluate_row, []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments[0].name)
        return evaluate_row(*arguments)

    monkeypatch.setattr(evaluate, "evaluate_row", interrupted)
    out, model = tmp_path / "out", workdir / "GRIN-MoE"
    with pytest.raises(KeyboardInterrupt):
        run("--output_dir", out, "--model", model, "--tasks", "word", "text", "--limit", 1)
    assert done == ["word"]
    for name in ("results.md", "results.json"):
        text = (out / name).read_text(encoding="utf-8")
        assert "word" in text and str(tmp_path) not in text and str(workdir) not in text
    assert str(model) in read_rows(out)["word"]["command"]


def write_suite(path, rows, **settings):
    """suite.yaml with those rows alone, and paths that are right from everywhere."""
    given = yaml.safe_load(Path("suite.yaml").read_text())
    given |= {name: str(Path(given[name]).resolve()) for name in ("model_name_or_path", "include_path")} | settings
    path.write_text(yaml.safe_dump({**given, "suite": rows}, sort_keys=False))
    return path


@pytest.mark.slow
def test_two_processes_measure_what_one_does(evaluated, workdir, tmp_path):
    """As a script: Python then looks in recipes/ first, and a task may still import the package `evaluate`, as the
    harness's HumanEval and MBPP do."""
    shutil.copytree(workdir / "tasks", tmp_path / "tasks")
    text = TEXT.format(folder=workdir / "tasks").replace('"{{text}}"', "!function u.f")
    (tmp_path / "tasks" / "text.yaml").write_text(text)
    (tmp_path / "tasks" / "u.py").write_text(
        "import evaluate\n\nassert hasattr(evaluate, 'combine')\n\n\ndef f(doc):\n    return doc['text']\n"
    )
    given = yaml.safe_load(Path("suite.yaml").read_text())
    given |= {"model_name_or_path": str(workdir / "GRIN-MoE"), "include_path": str(tmp_path / "tasks")}
    suite = {name: SUITE[name] for name in ("text", "write")}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**given, "suite": suite}, sort_keys=False))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "recipes/evaluate.py"]
    run_python([*command, "--config", tmp_path / "suite.yaml", "--output_dir", tmp_path / "out"])
    one, two = read_rows(evaluated), read_rows(tmp_path / "out")
    for name in suite:
        assert two[name]["score"] == pytest.approx(one[name]["score"], rel=1e-6)
        assert (two[name]["num_samples"], two[name]["hardware"]["processes"]) == (one[name]["num_samples"], 2)
        assert two[name]["command"].startswith("torchrun --nproc_per_node 2 recipes/evaluate.py ")


@pytest.mark.parametrize("length", [100, 400])
def test_batches_on_a_cpu_fit_its_memory(length, workdir, monkeypatch):
    free = 200_000_000
    monkeypatch.setattr(evaluate, "get_max_memory", lambda: {"cpu": free})
    lm = evaluate.load(evaluate.parse(["--config", "suite.yaml", "--max_batch_size", str(2**50)])[0])
    request = (None, [1] * (length - 10), [1] * 10)
    size = lm._detect_batch_size([request])
    contexts = torch.randint(1000, (size, length - 10), generator=torch.Generator().manual_seed(1)).tolist()
    memory = PeakMemory()
    memory.track_external(lm.model)
    with memory:
        requests = [(("", ""), context, [1] * 10) for context in contexts]
        lm._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=size)
    assert free / 10 < memory.peak()["ACT"] < free / 2, "half is left free"
    assert size & (size - 1) == 0 and lm.found_batch_sizes == [size]
    assert lm._detect_batch_size() < size, "whole contexts are longer"
    lm.max_batch_size = 6
    assert lm._detect_batch_size([request]) == 4


# ---- The page ----


def test_the_commands_of_the_page_run(workdir, tmp_path, monkeypatch):
    """In this process, with a tiny model; of the released model's command, the arguments are read."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    Path("GRIN-MoE").symlink_to(workdir / "GRIN-MoE")
    data.main(Path("data"), max_rows=16, max_characters=400, seed=0)
    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^(?:accelerate launch|python) .*", text, re.MULTILINE)]
    ran = []
    for words in commands:
        if words[1] == "-c":
            monkeypatch.setattr(sys, "argv", words[1:2] + words[3:])
            exec(words[2], {})
        elif "recipes/evaluate.py" in words:
            arguments = words[words.index("recipes/evaluate.py") + 1 :]
            (evaluate.main if "GRIN-MoE" in arguments else evaluate.parse)(arguments)
        ran.append(words[1])
    assert ran == ["recipes/data.py", "recipes/evaluate.py", "recipes/evaluate.py", "launch", "-c"]
    scores = {name: row["score"] for name, row in read_rows("output/evaluate_debug").items()}
    assert scores.keys() == {"order", "write", "text"} and 0 <= scores["order"] <= 100 and scores["text"] > 0
    Path("mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    run("--model", "GRIN-MoE", "--limit", 2, "--use_cpu", "true", "--output_dir", "mine", config="mine.yaml")
    assert read_rows("mine")["order"]["differs"] == "chance"
