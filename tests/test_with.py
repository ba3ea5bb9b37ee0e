"""`grin-moe with`, `serve` and `chat`: tools that never import us, on the released layout, beside `generate`."""

import json
import os
import pty
import re
import select
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx  # huggingface_hub's own client
import pytest
import torch
from endpoints import streamed
from transformers import AutoTokenizer
from typer.testing import CliRunner

from grin_moe_cli import app, serving
from modeling_grin import GrinMoeForCausalLM
from modeling_grin.publishing.card import write_card

ROOT = Path(__file__).parents[1]
GRIN = [sys.executable, "-c", "import grin_moe_cli; grin_moe_cli.main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "1"}
TOKENS = 8
QUESTION = [{"role": "user", "content": "def parse(text):"}]


def grin(*arguments, **options):
    """The standard output of `grin-moe`; options are `subprocess.run`'s."""
    settings = {"capture_output": True, "text": True, "timeout": 600, "env": ENVIRONMENT, **options}
    result = subprocess.run([*GRIN, *map(str, arguments)], **settings)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def answer(tiny_release):
    """`generate`'s answer to `QUESTION`, greedily: token ids and text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_release)
    model = GrinMoeForCausalLM.from_pretrained(tiny_release, dtype="auto").eval()
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, inputs["input_ids"].shape[1] :]
    return tokens.tolist(), tokenizer.decode(tokens, skip_special_tokens=True)


def card_commands(model, tmp_path):
    """The commands of `grin-moe` in a model's card, by their name."""
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "config.json").write_bytes((model / "config.json").read_bytes())
    card = Path(write_card(tmp_path / "card", repo_id=model.name).path).read_text()
    return {command.split()[1]: command for command in re.findall(r"^grin-moe .+$", card, re.MULTILINE)}


# ---- The command itself ----


def test_only_that_command_knows_grin_and_only_when_it_is_asked(tmp_path):
    code = (
        "import os, sys, subprocess, sitecustomize, transformers.models.auto as auto\n"
        "child = [sys.executable, '-c', 'import sys; print(\"sitecustomize\" in sys.modules)']\n"
        "print('modeling_grin' in sys.modules, 'grinmoe' in auto.CONFIG_MAPPING, 'modeling_grin' in sys.modules)\n"
        "print(auto.CONFIG_MAPPING['grinmoe'].__name__, auto.CONFIG_MAPPING['llama'].__name__)\n"
        "print(subprocess.run(child, capture_output=True, text=True).stdout, sitecustomize.mine)\n"
    )
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sitecustomize'].mine = 'theirs, too'\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    output = grin("with", "--", "python", "-c", code, env=environment).split()
    assert output == ["False", "True", "False", "GrinMoeConfig", "LlamaConfig", "True", "theirs,", "too"]


@pytest.mark.parametrize(
    ("command", "said"), [([], "must be given a command"), (["no-such-tool"], "must be installed; got no-such-tool")]
)
def test_commands_that_are_not_there_are_refused(command, said):
    result = subprocess.run([*GRIN, "with", "--", *command], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1 and said in " ".join(result.stderr.split())


def test_a_tool_of_this_environment_goes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = tmp_path / "lm_eval"
    tool.write_text("#!/usr/bin/env python3\n")
    tool.chmod(0o755)
    assert Path(serving.find_tool("lm_eval")).parent == Path(sys.executable).parent


# ---- Five tools ----


@pytest.mark.slow
def test_lm_eval(tiny_release, tmp_path):
    """The log-likelihoods of the harness are those of a forward pass."""
    rows = [{"question": "import", "choices": [" sys", " os"], "label": 0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\ntarget_delimiter: ''\n"
    )
    grin(
        *("with", "--", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tiny_release},dtype=float32"),
        *("--tasks", "mine", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"),
        *("--device", "cpu", "--batch_size", "1"),
        env={**ENVIRONMENT, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    sample = json.loads(next((tmp_path / "out").rglob("samples_mine*.jsonl")).read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(tiny_release)
    model = GrinMoeForCausalLM.from_pretrained(tiny_release, dtype=torch.float64).eval()
    prompt = tokenizer("import")["input_ids"]
    for choice, response in zip(rows[0]["choices"], sample["resps"], strict=True):
        ids = tokenizer(f"import{choice}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logits[n - 1, ids[n]].item() for n in range(len(prompt), len(ids)))
        assert float(response[0][0]) == pytest.approx(expected, abs=1e-4)


class Terminal:
    """A command in a terminal of its own, which a script types into."""

    def __init__(self, command, **settings):
        self.screen, theirs = pty.openpty()
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **settings)
        os.close(theirs)
        self.shown = ""

    def type(self, line):
        self.shown = ""
        os.write(self.screen, f"{line}\n".encode())

    def wait_for(self, text):
        """Read on until `text` was shown since the last line typed, whatever is between its letters."""
        while letters(text) not in letters(self.shown):
            assert select.select([self.screen], [], [], 120)[0], self.shown
            self.shown += os.read(self.screen, 4096).decode(errors="replace")

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


def letters(text):
    return re.sub(r"\W", "", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))


@pytest.mark.slow
def test_chat_in_a_terminal_serves_the_model_meanwhile(tiny_release, answer, tmp_path):
    """The card's `grin-moe chat` shows the text of `generate`; its server gives it over HTTP, streamed or not, and
    to a `transformers chat` of its own. When the chat ends, so does the server."""
    (tmp_path / "tiny").symlink_to(tiny_release)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"http://localhost:{free.getsockname()[1]}"
    command = shlex.split(card_commands(tmp_path / "tiny", tmp_path)["chat"])
    options = ["--port", address.rpartition(":")[2], f"max_new_tokens={TOKENS}", "do_sample=False"]
    # transformers' client counts this machine's server as the Hub
    settings = {"cwd": tmp_path, "env": {**ENVIRONMENT, "HF_HUB_OFFLINE": "0", "TERM": "xterm", "COLUMNS": "200"}}
    terminal = Terminal([*GRIN, *command[1:], *options], **settings)
    try:
        terminal.wait_for("!help")  # of its greeting
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0.0}
        post = {"url": f"{address}/v1/chat/completions", "timeout": 300}
        whole = httpx.post(**post, json=body).json()
        assert whole["choices"][0]["message"]["content"] == answer[1]
        assert streamed(httpx.post(**post, json={**body, "stream": True}).text) == answer[1]
        question = QUESTION[0]["content"]
        typed = {"input": f"{question}\nn\n!exit\n"}  # n: it need not go on
        shown = grin("with", "--", "transformers", "chat", "tiny", address, *options[2:], **settings, **typed)
        assert letters(answer[1]) in letters(shown)
        terminal.type(question)
        terminal.wait_for(answer[1])
        terminal.wait_for("Continue generating")
        terminal.type("n")
        terminal.type("!exit")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.end()
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_serve_becomes_transformers_own(tiny_release, tmp_path, monkeypatch):
    """The card's `grin-moe serve`, and options that are transformers'."""
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append((Path(path).name, arguments[1:])))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = shlex.split(card_commands(tiny_release, tmp_path)["serve"])
    result = CliRunner().invoke(app, [*command[1:], "--port", "1"])
    assert result.exit_code == 0, result.output
    assert started == [("transformers", ["serve", command[2], "--port", "1"])]
    assert os.environ["PYTHONPATH"] == f"{serving.SITE}{os.pathsep}{ROOT}"


@pytest.mark.slow
def test_trl_sft(tiny_release, tmp_path):
    """Its first loss in evaluation is a forward pass's, and what it saves has the released layout."""
    text = "import sys\nimport os\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"text": text}) + "\n")
    grin(
        *("with", "--", "trl", "sft", "--model_name_or_path", tiny_release, "--dataset_name", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", "--max_steps", "1", "--eval_strategy", "steps", "--eval_on_start", "true"),
        *("--report_to", "none", "--dtype", "float32", "--bf16", "false", "--learning_rate", "0", "--use_cpu", "true"),
        env={**ENVIRONMENT, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    state = next((tmp_path / "out").rglob("trainer_state.json"))
    losses = [entry["eval_loss"] for entry in json.loads(state.read_text())["log_history"] if "eval_loss" in entry]
    tokenizer = AutoTokenizer.from_pretrained(tiny_release)
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    model = GrinMoeForCausalLM.from_pretrained(tiny_release, dtype=torch.float64).eval()
    with torch.no_grad():
        assert losses[0] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)


@pytest.mark.slow
def test_accelerate_launch(tiny_release, answer, tmp_path):
    """In the processes that it starts, and in those that they spawn."""
    (tmp_path / "script.py").write_text(
        "import json, multiprocessing, sys\n"
        "def ask(path):\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "    tokenizer = AutoTokenizer.from_pretrained(path)\n"
        "    model = AutoModelForCausalLM.from_pretrained(path, dtype='auto').eval()\n"
        f"    inputs = tokenizer.apply_chat_template({QUESTION!r}, add_generation_prompt=True, return_dict=True, "
        "return_tensors='pt')\n"
        f"    tokens = model.generate(**inputs, do_sample=False, max_new_tokens={TOKENS})\n"
        "    return tokens[0, inputs['input_ids'].shape[1]:].tolist()\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print('ANSWER', json.dumps([ask(sys.argv[1]), pool.apply(ask, [sys.argv[1]])]))\n"
    )
    launch = "accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    output = grin("with", "--", *launch.split(), tmp_path / "script.py", tiny_release)
    line = next(line for line in output.splitlines() if line.startswith("ANSWER"))
    assert json.loads(line.removeprefix("ANSWER")) == [answer[0], answer[0]]
