"""The Modelfile beside a GGUF file. Ollama itself cannot run here: the format is held against the tokenizer's."""

import re

import pytest
from checkpoints import write_release
from transformers import AutoTokenizer

from conversion import convert

CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "Why so?"},
]


def render(template: str, messages: list[dict[str, str]]) -> str:
    """Render as Go's text/template does, for the two constructs that are used: `range .Messages` and its fields."""
    start, body, rest = re.fullmatch(
        r"(.*?)\{\{- range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template, re.S
    ).groups()
    filled = [body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return start.rstrip() + "".join(filled) + rest


def test_the_modelfile_has_context_stops_and_the_chat_format(tiny_release, tmp_path):
    report = convert(tiny_release, tmp_path / "grin.gguf", to="gguf")
    text = (tmp_path / "grin.Modelfile").read_text()
    assert text.startswith("FROM ./grin.gguf\nPARAMETER num_ctx 2048\n")
    assert re.findall(r'PARAMETER stop "(.*)"', text) == ["<|endoftext|>", "<|end|>"]
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
    tokenizer = AutoTokenizer.from_pretrained(tiny_release)
    assert render(template, CHAT) == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert any("ollama create" in note for note in report.notes)


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_another_chat_template_is_left_to_the_gguf_file(has_tokenizer, trained_tokenizer, tmp_path):
    folder, _, _ = write_release(tmp_path / "source", vocab_size=len(trained_tokenizer), sliding_window=None)
    if has_tokenizer:
        trained_tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "old.Modelfile").write_text("mine")
    for name in ("new", "old"):
        convert(folder, tmp_path / f"{name}.gguf", to="gguf")
    text = (tmp_path / "new.Modelfile").read_text()
    assert "TEMPLATE" not in text and ("stop" in text) == has_tokenizer and "num_ctx 4096" in text
    assert (tmp_path / "old.Modelfile").read_text() == "mine"
