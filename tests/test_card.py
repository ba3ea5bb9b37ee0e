"""Model cards: what a run records, what its card says, metadata, snippets, cards that people wrote."""

import ast
import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from runs import Rows, make_model, make_trainer
from safetensors.torch import load_file
from snippets import ROOT, bash_lines, blocks
from typer.testing import CliRunner

from grin_moe_cli import app
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.publishing.card import write_card
from modeling_grin.publishing.record import record_run
from modeling_grin.training import RoutingCallback, add_lora
from modeling_grin.training.arguments import FineTuningArguments

RELEASED_CARD = ROOT / "model_cards" / "GRIN-MoE.md"
TOKEN = "hf_NoCardAndNoRecordMayEverShowThis"
EXPERTS, TOP_K = 6, 2


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_tables(text):
    """The card's tables, one after the other, each as {first cell: the other cells}."""
    blocks = re.findall(r"^\|.*\|\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    found = []
    for block in blocks:
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        found.append({row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows})
    return found


@pytest.fixture(scope="module")
def trained(trained_tokenizer, tmp_path_factory):
    """The folder of a run, which no test changes."""
    folder = tmp_path_factory.mktemp("private_place") / "tiny-sft"
    data = folder.parent / "chats.jsonl"
    data.write_text("{}\n")
    arguments = FineTuningArguments(
        train_data=str(data), eval_data="someone/held_out", eval_split="test_sft", dataset_config="en",
        model_name_or_path="microsoft/GRIN-MoE",
    )  # fmt: skip
    special = {f"{kind}_token_id": getattr(trained_tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model = make_model(vocab_size=len(trained_tokenizer), **special, router_jitter_noise=0.3, input_jitter_noise=0.01)
    trainer = make_trainer(
        folder, model, micro_batch=2, accumulation=3, max_steps=6, logging_steps=2, eval_strategy="steps",
        eval_steps=3, eval_dataset=Rows(5), learning_rate=0.05, weight_decay=0.0125, hub_token=TOKEN,
        push_to_hub=False, hub_model_id="me/private",
    )  # fmt: skip
    trainer.add_callback(RoutingCallback(trainer))
    record_run(trainer, arguments, "SFT")
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trained_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """The run's folder, to write a card into: links to its files, and a copy of run.json."""
    copy = shutil.copytree(trained, tmp_path / trained.name, copy_function=os.symlink)
    (copy / "run.json").unlink()
    shutil.copy(trained / "run.json", copy)
    return copy


def change_run(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps(read_json(path) | changes))


# ---- run.json ----


def test_a_run_is_recorded_without_paths_and_tokens(trained):
    record = read_json(trained / "run.json")
    text = (trained / "run.json").read_text()
    assert TOKEN not in text and "private" not in text and "HUB_TOKEN" not in text
    assert record["method"] == "SFT"
    assert record["base_model"] == {"name": "microsoft/GRIN-MoE", "hub": True}
    assert record["train_data"] == {"name": "chats.jsonl", "hub": False, "rows": 16}
    assert record["eval_data"] == {
        "name": "someone/held_out", "hub": True, "split": "test_sft", "config": "en", "rows": 5,
    }  # fmt: skip
    assert record["global_batch"] == 2 * 3
    given = record["hyperparameters"]
    assert (given["learning_rate"], given["weight_decay"], given["lr_scheduler_type"]) == (0.05, 0.0125, "constant")
    assert (given["max_steps"], given["optim"], given["dtype"]) == (6, "sgd", "float32")
    assert not {"num_train_epochs", "lora_alpha", "output_dir", "hub_token", "train_data"} & set(given)
    assert record["hardware"]["processes"] == 1 and "CPU" in record["hardware"]["device"]
    assert record["parallelism"] == {"pipeline": 1, "tensor": 1, "fully sharded": False}
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["trl"] == version("trl")
    assert record["config"]["num_local_experts"] == EXPERTS


# ---- The card of a run ----


def test_metadata_are_the_hubs_and_survive_a_round_trip(folder):
    write_card(folder, repo_id="me/tiny-sft", language=["en", "code"])
    content = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "language": ["en", "code"], "license": "mit", "library_name": "transformers",
        "pipeline_tag": "text-generation", "base_model": "microsoft/GRIN-MoE", "base_model_relation": "finetune",
        "tags": ["grinmoe", "mixture-of-experts", "sft", "trl"],
    }  # fmt: skip
    assert str(card) == content and ModelCard(content).data.to_dict() == card.data.to_dict()


def test_the_card_says_what_the_run_left(folder, trained):
    written = write_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    held_out, data, training, hyperparameters, config, load = read_tables(text)
    log = read_json(trained / "trainer_state.json")["log_history"]
    eval_losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert held_out["loss"] == [f"{eval_losses[-1]:.4g}"] and len(eval_losses) == 3
    assert data["train"] == ["`chats.jsonl` (local)", "", "16"]
    assert data["eval"] == [
        "[someone/held_out](https://huggingface.co/datasets/someone/held_out)",
        "en, test_sft",
        "5",
    ]
    assert training["optimizer steps"] == ["6"] and training["torch"] == [torch.__version__]
    assert re.fullmatch(r"0:0\d:\d\d", training["wall time since the (last) start"][0])
    assert hyperparameters["sequences of an optimizer step (global batch)"] == ["6"]
    assert hyperparameters["weight_decay"] == ["0.0125"]

    tensors = load_file(trained / "model.safetensors")
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert config["parameters"] == [f"{total:,}"]
    assert config["active parameters"] == [f"{total - experts * (EXPERTS - TOP_K) // EXPERTS:,}"]
    assert config["router_estimator"] == ["sparsemixer_v2"] and config["router_aux_loss_coef"] == ["1"]

    lines = [json.loads(line) for line in (trained / "routing" / "layers.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    first, last = lines[0], lines[-1]
    assert f"| step {first['step']} | step {last['step']} |" in text
    busiest = [[EXPERTS * max(layer) for layer in line["load"]] for line in (first, last)]
    by_label = {
        "load of the busiest expert over a fair share, mean over layers": [sum(values) / 2 for values in busiest],
        "the same, in the layer where it is largest": [max(values) for values in busiest],
        "tokens with a near-tie": [sum(line["near_tie_rate"]) / 2 for line in (first, last)],
        "load-balance loss, mean over layers": [sum(line["balance_loss"]) / 2 for line in (first, last)],
    }
    for label, values in by_label.items():
        assert [float(cell) for cell in load[label][:2]] == pytest.approx(values, rel=1e-3), label
    assert text.count("**TO FILL IN:**") == 3 and any(note.startswith("3 places") for note in written.notes)


# ---- Evaluation ----


def result_row(name, score, shots, paper=None, limit=None, metric="acc", unit="%", **settings):
    """A line of recipes/evaluate.py's results."""
    dataset = {"path": "allenai/ai2_arc", "name": name, "split": "test"}
    given = {"model": "x", "tasks": [name], "num_fewshot": shots, "limit": limit, "metric": metric, **settings}
    return {
        "row": name, "tasks": [name], "shots": [shots], "metric": metric, "filter": "none", "unit": unit,
        "score": score, "stderr": 0.5, "paper": paper, "dataset": dataset, "settings": given, "differs": "",
    }  # fmt: skip


def write_results(path, rows):
    from recipes import evaluate  # here, because lm_eval takes long to import

    path.write_text(json.dumps({"model": "x", "rows": rows, "model-index": evaluate.model_index(rows, "x")}))
    return path


def test_results_stand_beside_those_of_base_model_and_paper(folder, tmp_path):
    rows = [
        result_row("ARC|Challenge", 61.23456, 10, paper=92.0),
        result_row("ARC-Easy", 71.5, 10),
        result_row("text", 0.123456, 0, metric="bits_per_byte", unit="bits"),
    ]
    base = [
        result_row("ARC|Challenge", 50.125, 10, dtype="bfloat16", revision="abc"),
        result_row("ARC-Easy", 99.0, 5),
        result_row("text", 0.654321, 0, metric="bits_per_byte", unit="bits"),
    ]
    write_card(
        folder,
        evaluation=write_results(tmp_path / "results.json", rows),
        base_evaluation=write_results(tmp_path / "base.json", base),
    )
    card = ModelCard.load(folder / "README.md")
    assert "| task | shots | metric | this model | base model | GRIN-MoE, paper |" in card.text
    found = read_tables(card.text)[0]
    assert found["ARC\\|Challenge"] == ["10", "acc", "61.23", "50.12", "92"]
    assert found["ARC-Easy"] == ["10", "acc", "71.5", "", ""], "other shots are not compared"

    assert found["text"] == ["0", "bits_per_byte (bits)", "0.1235", "0.6543", ""], "no percentage"
    assert "In percent where no unit is given" in card.text
    results = card.data.eval_results
    assert [(result.dataset_name, result.metric_value) for result in results] == [
        ("ARC|Challenge", 61.23), ("ARC-Easy", 71.5), ("text", 0.12),
    ]  # fmt: skip
    index = card.data.to_dict()["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index


# ---- Errors ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "a/b/c"}, "Repo id must be in the form .*a/b/c"),
        ({"evaluation": "short.json"}, r"short.json is not as .*KeyError: 'filter'"),
        ({"base_evaluation": "short.json"}, "base_evaluation needs evaluation"),
        ({"run": "nowhere"}, "run must be the folder of a training run; got nowhere"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_written(settings, message, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("short.json").write_text('{"rows": [{"row": "a"}], "model-index": []}')
    with pytest.raises(ValueError, match=message):
        write_card(folder, **settings)
    assert not (folder / "README.md").exists() and not (folder / "figures").exists()


# ---- What others have written ----

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "x `y` ``z``",
    "[click](javascript:alert(1)) ![x](http://evil/x.png)",
    "a\n\n# Heading\n\n```\n---\nlicense: evil\n---",
    'n" + __import__("os").system("id") + "',
    "\u202eturned \x1b[31m around",
    "{{ 7 * 7 }} {% raw %}",
]


def rendered(text):
    """Tags and text of a card as the Hub shows it: CommonMark with tables, and HTML as it is."""
    tokens = (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text.partition("\n---\n")[2])
    )
    inline = [child for token in tokens for child in token.children or []]
    tags = [token.tag for token in [*tokens, *inline] if token.tag not in ("", "th", "td", "tr", "code")]
    html = [token.content for token in [*tokens, *inline] if token.type.startswith("html_")]
    links = [token.attrGet("href") or token.attrGet("src") for token in inline if token.type in ("link_open", "image")]
    return sorted(tags), html, links, [token.content for token in inline if token.type in ("text", "code_inline")]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_others_have_written_is_shown_and_does_nothing(text, folder, tmp_path):
    """It is no tag, no link, no row, no heading, no metadata and no code, wherever it stands."""
    shutil.rmtree(folder / "routing")  # pictures take long to draw
    (folder / "trainer_state.json").unlink()
    cards = []
    for shown in ("harmless", text):
        named = folder.rename(tmp_path / shown.replace("/", "-")[:100])
        source = {"name": shown, "hub": False}
        change_run(
            named, train_data=source, eval_data=source | {"config": shown}, method=shown, base_model=source,
            eval_fraction=None, hyperparameters={shown: shown, "seed": shown}, versions={shown: shown},
            hardware={"device": shown, "processes": 1},
        )  # fmt: skip
        results = write_results(tmp_path / "results.json", [result_row(shown, 1.0, 0, metric=shown, unit=shown)])
        write_card(named, evaluation=results, force=True)
        cards.append((named / "README.md").read_text())
        folder = named
    harmless, card = cards
    expected, found = rendered(harmless), rendered(card)
    assert found[:3] == expected[:3]
    assert " ".join("".join(c if c.isprintable() else " " for c in text).split()) in "".join(found[3])
    metadata, known = (yaml.safe_load(source.split("\n---\n")[0]) for source in (card, harmless))
    assert metadata.keys() == known.keys() and metadata.get("license") == known.get("license")
    calls = [
        [ast.unparse(node.func) for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
        for source in cards
        for snippet in re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    ]
    assert len(calls) == 4 and calls[:2] == calls[2:]


# ---- Snippets ----


@pytest.mark.parametrize("method", ["pretraining", "SFT"])
def test_the_snippet_with_the_library_runs(method, folder, monkeypatch, capsys):
    change_run(folder, method=method)
    write_card(folder)
    monkeypatch.chdir(folder.parent)
    snippet, remote = blocks(folder / "README.md", "python")
    assert ("messages" in snippet) == (method == "SFT") and '"tiny-sft"' in snippet
    assert remote.replace(", trust_remote_code=True", "") == snippet.split("\n", 1)[1], "as test_hub.py loads it"
    exec(snippet.replace("max_new_tokens=100", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.startswith("Once upon a time") == (method == "pretraining")


def test_the_card_of_an_adapter(trained, trained_tokenizer, tmp_path, monkeypatch, capsys):
    base = GrinMoeForCausalLM.from_pretrained(trained, experts_implementation="linear")
    adapter = tmp_path / "tiny-lora"
    add_lora(base, r=2).save_pretrained(adapter)
    trained_tokenizer.save_pretrained(adapter)
    with pytest.raises(ValueError, match="--force"):  # peft writes a card of its own
        write_card(adapter)
    write_card(adapter, run=trained, force=True)
    card = ModelCard.load(adapter / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter") and "lora" in data["tags"]
    assert "LoRA adapter for [microsoft/GRIN-MoE]" in card.text and "sizes are the base model's" in card.text
    assert "trust_remote_code" not in card.text
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(adapter / "README.md", "python")
    assert "linear" in snippet
    exec(snippet.replace("microsoft/GRIN-MoE", str(trained)).replace("max_new_tokens=100", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.strip()


# ---- The card of the released model ----

TABLE_2 = {  # the paper's
    "MMLU": 79.4, "HellaSwag": 83.7, "ANLI": 60.6, "GSM8K": 90.4, "MedQA": 70.4, "AGIEval": 48.2, "TriviaQA": 73.9,
    "ARC-Challenge": 92.0, "ARC-Easy": 98.0, "PIQA": 89.0, "SIQA": 79.5, "BIG-Bench Hard": 81.4, "WinoGrande": 81.4,
    "OpenBookQA": 89.8, "BoolQ": 83.4, "CommonsenseQA": 81.8, "TruthfulQA (MC2)": 74.5, "HumanEval": 74.4,
    "MBPP": 80.3,
}  # fmt: skip


def test_the_released_card_has_valid_metadata_and_the_papers_scores():
    card = ModelCard.load(RELEASED_CARD)
    assert str(card) == RELEASED_CARD.read_text(encoding="utf-8")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert data.base_model == "microsoft/GRIN-MoE"
    measured = {result.dataset_name: result.metric_value for result in data.eval_results}
    assert measured == {name: score for name, score in TABLE_2.items() if name != "AGIEval"}, "no data set of the Hub"
    assert all("/" in result.dataset_type for result in data.eval_results)
    index = data.to_dict()["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    shown = next(rows for rows in read_tables(card.text) if "MMLU" in rows)
    assert {name: float(cells[1]) for name, cells in shown.items() if name != "average"} == TABLE_2
    assert sum(TABLE_2.values()) / len(TABLE_2) == pytest.approx(float(shown["average"][1]), abs=0.01)
    for result in data.eval_results:
        assert f"({shown[result.dataset_name][0].partition(',')[0]}-shot" in result.metric_name


@pytest.mark.parametrize("number", [0, 1])
def test_snippets_of_the_released_card_run(number, tiny_release, capsys):
    found = blocks(RELEASED_CARD, "python")
    assert len(found) == 2
    exec(found[number].replace("microsoft/GRIN-MoE", str(tiny_release)).replace("=100", "=3"), {})
    assert capsys.readouterr().out.strip() or number == 1


# ---- Page ----


def test_commands_of_the_page_run(folder, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    (folder.rename("output/sft_tiny") / "merged").mkdir()
    Path("output/sft_tiny/merged/config.json").write_bytes((trained / "config.json").read_bytes())
    for name in ("evaluation", "base_evaluation"):
        Path("output", name).mkdir()
        write_results(Path("output", name, "results.json"), [result_row("ARC-Easy", 50.0, 10)])
    commands = bash_lines(ROOT / "docs" / "model_cards.md")
    assert len(commands) >= 3
    for command in commands:
        result = CliRunner().invoke(app, command.split()[1:])
        assert result.exit_code == 0, (command, result.output, result.exception)
