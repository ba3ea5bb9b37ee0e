"""Model cards: what a run records, what its card says, metadata, snippets, cards that people wrote."""

import ast
import json
import math
import re
import shutil
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from checkpoints import released_config, released_tensors, write_checkpoint
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from jinja2 import Environment, meta
from markdown_it import MarkdownIt
from matplotlib.image import imread
from runs import Rows, make_model, make_trainer
from safetensors.torch import load_file
from typer.testing import CliRunner

from grin_moe_cli.card import card as card_command
from grin_moe_cli.checkpoints import convert
from grin_moe_cli.study import plan
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.analysis.figures import draw_loss
from modeling_grin.publishing import card as cards
from modeling_grin.publishing.card import table, write_card
from modeling_grin.publishing.markdown import render
from modeling_grin.publishing.record import record_run
from modeling_grin.training import RoutingCallback, add_lora
from modeling_grin.training.arguments import FineTuningArguments

ROOT = Path(__file__).resolve().parents[1]
RELEASED_CARD = ROOT / "model_cards" / "GRIN-MoE.md"
TOKEN = "hf_NoCardAndNoRecordMayEverShowThis"
EXPERTS, TOP_K = 6, 2

app = typer.Typer()
for command in (card_command, convert, plan):
    app.command()(command)


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


def snippets(path):
    return re.findall(r"```python\n(.*?)```", Path(path).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def special_ids(trained_tokenizer):
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(trained_tokenizer), **{name: getattr(trained_tokenizer, name) for name in names}}


@pytest.fixture(scope="module")
def trained(trained_tokenizer, special_ids, tmp_path_factory):
    """The folder of a run, which no test changes."""
    folder = tmp_path_factory.mktemp("private_place") / "tiny-sft"
    data = folder.parent / "chats.jsonl"
    data.write_text("{}\n")
    arguments = FineTuningArguments(
        train_data=str(data), eval_data="someone/held_out", eval_split="test_sft", dataset_config="en",
        model_name_or_path="microsoft/GRIN-MoE",
    )  # fmt: skip
    model = make_model(**special_ids, router_jitter_noise=0.3, input_jitter_noise=0.01)
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
    """The run's folder, to write a card into: its files by links."""
    copy = tmp_path / trained.name
    copy.mkdir()
    for path in trained.iterdir():
        (copy / path.name).symlink_to(path)
    return copy


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


def test_epochs_and_lora_are_recorded_where_they_decide(special_ids, tmp_path):
    trainer = make_trainer(tmp_path / "out", make_model(**special_ids), max_steps=-1, num_train_epochs=2.5)
    arguments = FineTuningArguments(train_data=str(tmp_path), lora_r=4, lora_alpha=7)
    record_run(trainer, arguments, "DPO")
    record = read_json(tmp_path / "out" / "run.json")
    given = record["hyperparameters"]
    assert given["num_train_epochs"] == 2.5 and "max_steps" not in given
    assert (given["lora_r"], given["lora_alpha"], given["lora_router"]) == (4, 7, False)
    assert record["base_model"] is None and record["eval_data"] is None
    assert record["train_data"]["name"] == tmp_path.name


# ---- The card of a run ----


def test_metadata_are_the_hubs_and_survive_a_round_trip(folder):
    write_card(folder, repo_id="me/tiny-sft", language=["en", "code"])
    content = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "language": ["en", "code"],
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "microsoft/GRIN-MoE",
        "base_model_relation": "finetune",
        "tags": ["grinmoe", "mixture-of-experts", "sft", "trl"],
    }
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
    assert "Router gradient `sparsemixer_v2`, load-balance coefficient 1.0." in text

    lines = [json.loads(line) for line in (trained / "routing" / "layers.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    first, last = lines[0], lines[-1]
    assert f"| step {first['step']} | step {last['step']} |" in text
    busiest = [[EXPERTS * max(layer) for layer in line["load"]] for line in (first, last)]
    by_label = {
        "load of the busiest expert over a fair share, mean over layers": [sum(values) / 2 for values in busiest],
        "the same, in the layer where it is largest": [max(values) for values in busiest],
        "dead experts, in all layers together": [
            sum(share == 0 for layer in line["load"] for share in layer) for line in (first, last)
        ],
        "entropy of the load over log E": [
            sum(-share * math.log(share) for layer in line["load"] for share in layer if share) / 2 / math.log(EXPERTS)
            for line in (first, last)
        ],
        "tokens with a near-tie": [sum(line["near_tie_rate"]) / 2 for line in (first, last)],
        "load-balance loss, mean over layers": [sum(line["balance_loss"]) / 2 for line in (first, last)],
    }
    assert set(load) == set(by_label)
    for label, values in by_label.items():
        assert [float(cell) for cell in load[label][:2]] == pytest.approx(values, rel=1e-3), label
    near_ties = 100 * by_label["tokens with a near-tie"][1]
    assert near_ties > 0 and f"- {near_ties:.2g} % of the tokens" in text
    assert "1 is a fair share, and 3 the most" in text, "E / K"
    assert "16.9 on LiveBench" in text, "a weakness of the base model"
    assert written.path == str(folder / "README.md")
    assert text.count("**TO FILL IN:**") == 3 and any(note.startswith("3 places") for note in written.notes)
    assert any("--repo-id" in note for note in written.notes)
    assert not list(folder.glob("**/*tmp*"))


def test_steps_are_those_of_the_end_and_not_of_the_last_log(folder):
    state = read_json(folder / "trainer_state.json")
    (folder / "trainer_state.json").unlink()
    end = max(entry["step"] for entry in state["log_history"]) + 3
    losses = [entry for entry in state["log_history"] if "loss" in entry]
    losses[-1]["num_tokens"] = 1234567.0
    state |= {"global_step": end, "epoch": 2.75}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_card(folder)
    training = next(rows for rows in read_tables((folder / "README.md").read_text()) if "optimizer steps" in rows)
    assert (training["optimizer steps"], training["epochs"]) == ([f"{end}"], ["2.75"])
    assert training[f"tokens (at step {losses[-1]['step']})"] == ["1,234,567"]


def test_half_a_line_of_a_killed_runs_routing_is_not_read(folder, trained):
    (folder / "routing").unlink()
    (folder / "routing").mkdir()
    whole = (trained / "routing" / "layers.jsonl").read_text()
    (folder / "routing" / "layers.jsonl").write_text(whole + '{"step": 9, "lo')
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert f"| step {json.loads(whole.splitlines()[-1])['step']} |" in text and "figures/expert_load.png" in text


def test_a_classifier_is_refused(folder):
    config = read_json(folder / "config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GrinMoeForSequenceClassification"]}))
    with pytest.raises(ValueError, match=r"tiny-sft is a sequence classifier; .*language models only: write .*README"):
        write_card(folder)
    assert not (folder / "README.md").exists()


def test_pictures_lie_beside_the_card(folder):
    written = write_card(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r'src="([^"]+)"', text)
    assert shown == written.figures == ["figures/loss.png", "figures/expert_load.png"]
    for name in shown:
        picture = imread(folder / name)
        assert picture.shape[1] > 500 and picture.std() > 0.05, f"{name} is blank or tiny"


def test_loss_curves_are_the_logs():
    generator = np.random.default_rng(0)
    losses = generator.normal(size=250)
    log = [{"step": 4 * i, "loss": loss} for i, loss in enumerate(losses, 1)]
    log += [{"step": 500, "eval_loss": 1.5}, {"step": 1000, "eval_loss": 0.5}, {"step": 1000, "train_loss": 9.0}]
    axes = draw_loss(log, "DPO loss").axes[0]
    raw, mean, validation = axes.get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    expected = [(4 * (i + 3), sum(losses[i : i + 5]) / 5) for i in range(246)]
    np.testing.assert_allclose(mean.get_xydata(), expected, rtol=1e-12)
    np.testing.assert_array_equal(validation.get_xydata(), [(500, 1.5), (1000, 0.5)])
    labels = [label.get_text() for label in axes.get_legend().get_texts()]
    assert labels == ["training, mean of 5 logs", "validation"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "DPO loss")
    (line,) = draw_loss(log[:9]).axes[0].get_lines()
    np.testing.assert_array_equal(line.get_ydata(), losses[:9])


def test_what_is_missing_is_left_out_and_named(folder):
    for name in ("run.json", "trainer_state.json", "routing"):
        (folder / name).unlink()
    notes = " ".join(write_card(folder, base_model="owner/base").notes)
    text = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("run.json", "trainer_state.json", "routing/layers.jsonl", "--license"):
        assert name in notes
    assert "## Training" not in text and "figures/" not in text and "None" not in text and "\n\n\n" not in text
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.datasets) == (None, "owner/base", None)
    assert len(read_tables(text)) == 1, "the configuration"


def test_files_that_a_checkpoint_lacks_are_the_runs(trained, tmp_path):
    checkpoint = tmp_path / "merged"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_bytes((trained / "config.json").read_bytes())
    write_card(checkpoint, run=trained)
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert len(read_tables(text)) == 6 and text.count("chats.jsonl") == 1
    assert (checkpoint / "figures" / "loss.png").is_file() and not (trained / "README.md").exists()


def test_a_local_base_is_not_one_of_the_hub(folder):
    record = read_json(folder / "run.json")
    (folder / "run.json").unlink()
    record["base_model"] = {"name": "org|base", "hub": False}
    record["train_data"] = {"name": "a|b.jsonl", "hub": False, "rows": 3}
    (folder / "run.json").write_text(json.dumps(record))
    notes = " ".join(write_card(folder).notes)
    card = ModelCard.load(folder / "README.md")
    assert "org|base, was a local folder" in notes and "no license" in notes
    assert not {"base_model", "base_model_relation", "license"} & set(card.data.to_dict())
    assert "made from `org|base` (local) by SFT" in card.text
    assert [row["train"] for row in read_tables(card.text) if "train" in row] == [["`a\\|b.jsonl` (local)", "", "3"]]


def test_quantised_models_and_data_of_the_hub_are_named(folder):
    config, record = read_json(folder / "config.json"), read_json(folder / "run.json")
    for name in ("config.json", "run.json"):
        (folder / name).unlink()
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    record["train_data"] = {"name": "someone/chats", "hub": True, "rows": 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(record))
    write_card(folder, license="apache-2.0")
    data = ModelCard.load(folder / "README.md").data
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert (data.datasets, data.license) == (["someone/chats"], "apache-2.0")


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
        result_row("other", 33.0, 0),
        result_row("text", 0.123456, 0, metric="bits_per_byte", unit="bits"),
    ]
    base = [
        result_row("ARC|Challenge", 50.125, 10, dtype="bfloat16", revision="abc"),
        result_row("ARC-Easy", 99.0, 5),
        result_row("other", 98.0, 0, apply_chat_template=True),
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
    assert found["other"] == ["0", "acc", "33", "", ""], "other prompts are not compared"
    assert found["text"] == ["0", "bits_per_byte (bits)", "0.1235", "0.6543", ""], "no percentage"
    assert "In percent where no unit is given" in card.text
    assert "Not for comparison" not in card.text and "internal pipeline" in card.text
    results = card.data.eval_results
    assert [(result.dataset_name, result.metric_value) for result in results] == [
        ("ARC|Challenge", 61.23), ("ARC-Easy", 71.5), ("other", 33.0), ("text", 0.12),
    ]  # fmt: skip
    assert {result.dataset_type for result in results} == {"allenai/ai2_arc"}
    index = card.data.to_dict()["model-index"]
    assert index[0]["name"] == "tiny-sft"
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index


def test_limited_results_are_shown_as_such_and_left_out_of_the_metadata(folder, tmp_path):
    results = write_results(tmp_path / "results.json", [result_row("ARC-Easy", 71.5, 10, limit=20)])
    notes = " ".join(write_card(folder, evaluation=results).notes)
    card = ModelCard.load(folder / "README.md")
    assert "Not for comparison: limited to 20 examples" in card.text and "limited" in notes
    assert "| task | shots | metric | this model |" in card.text and "internal pipeline" not in card.text
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()


# ---- Cards that people wrote ----


def test_a_card_that_exists_is_left_alone(folder):
    write_card(folder)
    before = (folder / "README.md").read_bytes()
    pictures = {path: path.read_bytes() for path in (folder / "figures").iterdir()}
    for path in (folder / "README.md", *pictures):
        path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"README\.md exists: .* --force"):
        write_card(folder)
    assert all(path.read_bytes() == b"mine" for path in (folder / "README.md", *pictures))
    write_card(folder, force=True)
    assert (folder / "README.md").read_bytes() == before
    assert {path: path.read_bytes() for path in pictures} == pictures


# ---- Errors ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"license": "MIT"}, "license must be a name as on the Hub.*; got MIT"),
        ({"license": "mit\nextra: 1"}, "; got mit\nextra: 1"),
        ({"language": ["en", "English"]}, "language must be an ISO 639 code, such as en; got English"),
        ({"repo_id": "a/b/c"}, "repo_id must be a name on the Hub, .* got a/b/c"),
        ({"base_model": "./local folder"}, "base_model must be a name on the Hub, .* got ./local folder"),
        ({"evaluation": "none.json"}, "none.json does not exist"),
        ({"evaluation": "broken.json"}, "broken.json is not as a run or an evaluation writes it .JSONDecodeError"),
        ({"evaluation": "list.json"}, r"list\.json is not as"),
        ({"evaluation": "short.json"}, r"short.json is not as .*KeyError: 'shots'"),
        ({"base_evaluation": "short.json"}, "base_evaluation needs evaluation"),
        ({"run": "nowhere"}, "run must be the folder of a training run; got nowhere"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_written(settings, message, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[1]")
    Path("short.json").write_text('{"rows": [{"row": "a"}], "model-index": []}')
    with pytest.raises(ValueError, match=message):
        write_card(folder, **settings)
    assert not (folder / "README.md").exists() and not (folder / "figures").exists()


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must be a model's folder, with config\.json or adapter_config\.json"):
        write_card(tmp_path)


def test_licenses_are_spelt_as_on_the_hub():
    names = ("mit", "apache-2.0", "cc-by-nc-sa-4.0", "openrail++", "llama3.1")
    assert all(cards.LICENSE.fullmatch(name) for name in names)


# ---- Template ----


def test_the_template_asks_for_nothing_that_is_not_given(folder, monkeypatch):
    asked = meta.find_undeclared_variables(Environment().parse(cards.TEMPLATE.read_text(encoding="utf-8")))
    given = {}
    monkeypatch.setattr(cards, "render", lambda path, **values: given.update(values) or render(path, **values))
    write_card(folder)
    assert asked == given.keys()


def test_a_table_has_no_cell_that_breaks_it():
    text = table(("a", "b", "c"), [("x|y\nz", 0.123456, ""), ("q", 2.0, True)])
    assert text == "| a | b | c |\n| --- | ---: | --- |\n| x\\|y z | 0.1235 |  |\n| q | 2 | True |"
    assert table(("a",), []) == ""


# ---- What others have written ----

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "x `y` ``z``",
    "[click](javascript:alert(1)) ![x](http://evil/x.png)",
    "a\n\n# Heading\n\n```\n---\nlicense: evil\n---",
    "**bold** __bold__ ~~gone~~ \\\\",
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

    def card_with(text, name):
        copy = shutil.copytree(folder, tmp_path / name / text.replace("/", "-")[:100], symlinks=True)
        (copy / "routing").unlink()  # pictures take long to draw
        (copy / "trainer_state.json").unlink()
        run = json.loads((copy / "run.json").read_text())
        source = {"name": text, "hub": False}
        run |= {"train_data": source, "eval_data": source | {"config": text}, "method": text, "base_model": source}
        run["eval_fraction"] = None
        run["hyperparameters"] = {text: text, "seed": text}
        run["hardware"]["device"], run["versions"] = text, {text: text}
        (copy / "run.json").unlink()
        (copy / "run.json").write_text(json.dumps(run))
        results = write_results(tmp_path / "results.json", [result_row(text, 1.0, 0, metric=text, unit=text)])
        write_card(copy, evaluation=results)
        return (copy / "README.md").read_text()

    harmless, card = card_with("harmless", "a"), card_with(text, "b")
    expected, found = rendered(harmless), rendered(card)
    assert found[:3] == expected[:3]
    assert " ".join("".join(c if c.isprintable() else " " for c in text).split()) in "".join(found[3])
    metadata, known = (yaml.safe_load(source.split("\n---\n")[0]) for source in (card, harmless))
    assert metadata.keys() == known.keys() and metadata.get("license") == known.get("license")
    for snippet, known in zip(re.findall(r"```python\n(.*?)```", card, re.DOTALL), snippets_of(harmless), strict=True):
        calls = [[ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
                 for source in (snippet, known)]  # fmt: skip
        assert calls[0] == calls[1]


def snippets_of(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# ---- Snippets ----


@pytest.mark.parametrize("method", ["pretraining", "SFT"])
def test_the_snippet_with_the_library_runs(method, folder, monkeypatch, capsys):
    record = {**read_json(folder / "run.json"), "method": method}
    (folder / "run.json").unlink()
    (folder / "run.json").write_text(json.dumps(record))
    write_card(folder)
    monkeypatch.chdir(folder.parent)
    snippet, remote = snippets(folder / "README.md")
    assert ("messages" in snippet) == (method == "SFT") and '"tiny-sft"' in snippet
    assert remote.replace(", trust_remote_code=True", "") == snippet.split("\n", 1)[1], "as test_push.py loads it"
    exec(snippet.replace("max_new_tokens=100", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.startswith("Once upon a time") == (method == "pretraining")


@pytest.mark.parametrize("experts", ["grinmoe", "linear"])
def test_the_card_of_an_adapter(experts, trained, trained_tokenizer, tmp_path, monkeypatch, capsys):
    base = GrinMoeForCausalLM.from_pretrained(trained, experts_implementation=experts)
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
    (snippet,) = snippets(adapter / "README.md")
    assert ("linear" in snippet) == (experts == "linear")
    exec(snippet.replace("microsoft/GRIN-MoE", str(trained)).replace("max_new_tokens=100", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.strip()


def test_an_adapter_without_a_record_names_no_base(trained, tmp_path):
    add_lora(GrinMoeForCausalLM.from_pretrained(trained), r=2).save_pretrained(tmp_path)
    notes = " ".join(write_card(tmp_path, force=True).notes)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and "name it with --base-model" in notes
    assert str(trained.parent) not in card.text and 'from_pretrained("BASE_MODEL", **settings)' in card.text


# ---- The card of the released model ----

TABLE_2 = {  # the paper's
    "MMLU": 79.4, "HellaSwag": 83.7, "ANLI": 60.6, "GSM8K": 90.4, "MedQA": 70.4, "AGIEval": 48.2, "TriviaQA": 73.9,
    "ARC-Challenge": 92.0, "ARC-Easy": 98.0, "PIQA": 89.0, "SIQA": 79.5, "BIG-Bench Hard": 81.4, "WinoGrande": 81.4,
    "OpenBookQA": 89.8, "BoolQ": 83.4, "CommonsenseQA": 81.8, "TruthfulQA (MC2)": 74.5, "HumanEval": 74.4,
    "MBPP": 80.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_release(trained_tokenizer, tmp_path_factory):
    config = released_config(vocab_size=len(trained_tokenizer))
    folder = write_checkpoint(tmp_path_factory.mktemp("release"), config, released_tensors(config), num_shards=2)
    trained_tokenizer.save_pretrained(folder)
    return folder


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
    found = snippets(RELEASED_CARD)
    assert len(found) == 2
    exec(found[number].replace("microsoft/GRIN-MoE", str(tiny_release)).replace("=100", "=3"), {})
    assert capsys.readouterr().out.strip() or number == 1


def test_commands_of_the_released_card_run(tiny_release, tmp_path, monkeypatch):
    text = RELEASED_CARD.read_text(encoding="utf-8")
    for name in re.findall(r"recipes/[\w/]+\.(?:py|yaml)", text):
        assert (ROOT / name).is_file() or name == "recipes/evaluate.py", name
    monkeypatch.chdir(tmp_path)
    Path("GRIN-MoE").symlink_to(tiny_release)
    commands = re.findall(r"^grin-moe (.*?)(?:  +#.*)?$|`grin-moe (plan .*?)`", text, re.MULTILINE)
    assert len(commands) == 3
    for command in map("".join, commands):
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, (command, result.output, result.exception)


# ---- Command and page ----


def test_commands_of_the_page_run(folder, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    (folder.rename("output/sft_tiny") / "merged").mkdir()
    Path("output/sft_tiny/merged/config.json").write_bytes((trained / "config.json").read_bytes())
    for name in ("evaluation", "base_evaluation"):
        Path("output", name).mkdir()
        write_results(Path("output", name, "results.json"), [result_row("ARC-Easy", 50.0, 10)])
    page = (ROOT / "docs" / "model_cards.md").read_text(encoding="utf-8")
    commands = re.findall(r"^grin-moe (card .*?)(?:  +#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, (command, result.output, result.exception)
    written = json.loads(CliRunner().invoke(app, ["card", "output/sft_tiny", "--force", "--json"]).stdout)
    assert set(written) == {field.name for field in fields(cards.Card)}
    assert written["path"] == "output/sft_tiny/README.md"


def test_snippets_of_the_page_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    folder.rename("output/sft_tiny")
    for snippet in snippets(ROOT / "docs" / "model_cards.md"):
        exec(snippet, {})
    assert Path("output/sft_tiny/README.md").is_file()
