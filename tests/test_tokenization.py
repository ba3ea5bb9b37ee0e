"""The tokenizer against `tokenizer.json` read by the `tokenizers` library, and against the released chat template.

Most tests run twice: with the release's own files, and with a tokenizer trained on the spot whose files are given the
release's form (`folder`), so that they run where the release is absent.
"""

import inspect
import itertools
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from modeling_grin import GrinMoeTokenizer
from modeling_grin.tokenization_grinmoe import CHAT_TEMPLATE, RELEASED_CHAT_TEMPLATE, SPECIAL_TOKENS

NAMES = [token.content for token in SPECIAL_TOKENS]

PLAIN_TEXTS = [
    *("", " ", "\n", "\t\t", "Hello, world!", " leading", "trailing  ", "runs   of    spaces     inside"),
    "        eight spaces, then text",
    "tabs\tand\t\tmore\n\n\nblank lines\r\nand\rreturns\v\f",
    "def f(x: int) -> str:\n    if x:\n        return f'{x!r}'  # done\n\treturn ''\n",
    "for(i=0;i<n;++i){a[i]^=b[i]>>3;}",
    '{"key": [1, 2.5e-3, null], "ключ": "值"}',
    "naïve café, Zoë; e\u0301 is not é",
    "日本語と中文，한국어",
    "مرحبا بالعالم שלום",
    "Ελληνικά, кириллица, हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😀",
    "\u00a0no-break\u2003em\u3000ideographic\u200bzero width\ufeffbom",
    "∑ᵢ xᵢ² ≤ ∞ ⟨a|b⟩",
    "\x00\x01\x1c\x7f",
    bytes(range(256)).decode("latin-1"),
    bytes(range(256)).decode("utf-8", errors="replace"),
    "<| not a token |> <|en d|> <|END|> <unk <s",
    "1234567890 3.14159 0xDEADBEEF",
    "https://example.org/a?b=c&d=%20#e",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\U0010ffff\U0001f9ff",
]
SPECIAL_TEXTS = [
    *("<|end|>", "<|end|>text", "<|end|> text", "text<|end|>   text", "text <|end|>\n\n\ttext"),
    *("<|user|><|assistant|><|system|>", "<|user|> <|assistant|>\n<|system|>"),
    "<|user|>\nHello<|end|>\n<|assistant|>\n",
    "<|user|>\n  indented<|end|>\n<|assistant|>\n def f():\n    pass<|end|>\n",
    "<|endoftext|> after <|endoftext|>after",
    "<s> a</s> b<s>c</s>\n\nd<unk> e<unk>f",
    "<|placeholder1|> x<|placeholder6|>x",
    "é<|end|>é 😀<|end|> 😀",
]
HARD_TEXTS = PLAIN_TEXTS + SPECIAL_TEXTS

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWERS = [
    "4",
    "",
    " 4",
    "\n\n  4\n",
    "   ",
    "😀 é",
    "\u00a0\u3000x",
    "def f():\n    return 4\n",
    "a <b> {{ c }} {% d %}",
]
CHATS = [
    [USER],
    [SYSTEM, USER],
    [{"role": "user", "content": "  spaced \n"}],
    *([USER, {"role": "assistant", "content": answer}] for answer in ANSWERS),
    [SYSTEM, *itertools.chain(*([USER, {"role": "assistant", "content": answer}] for answer in ANSWERS)), USER],
    [{"role": "assistant", "content": "I start."}, {"role": "assistant", "content": "And go on."}, SYSTEM],
]


@pytest.fixture(scope="module", params=["released", "trained"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the release's layout, `LlamaTokenizer` included, as far as a tokenizer is concerned."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "released":
        shutil.copytree(request.getfixturevalue("real_tokenizer_dir"), path, dirs_exist_ok=True)
    else:
        request.getfixturevalue("trained_tokenizer").backend_tokenizer.save(str(path / "tokenizer.json"))
        tokenizer_config = {
            **{"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "padding_side": "left"},
            **{"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"},
            **{"model_max_length": 4096, "chat_template": RELEASED_CHAT_TEMPLATE},
        }
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    auto_map = {"AutoConfig": "configuration_grinmoe.GRINMoEConfig"}  # remote code that this project does without
    config = {"model_type": "grinmoe", "architectures": ["GRIN-MoE"], "auto_map": auto_map}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> GrinMoeTokenizer:
    return GrinMoeTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Plain ASCII, so that every other character is one that training has not seen."""
    return inspect.getsource(textwrap).splitlines(keepends=True)


def raw_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [raw.encode(text, add_special_tokens=False).ids for text in texts]


def added_tokens(tokenizer: GrinMoeTokenizer) -> list[str]:
    """In the order of their ids, with all flags: `AddedToken` objects compare equal by content alone."""
    return [repr(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]


# --- Token ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [GrinMoeTokenizer, AutoTokenizer])
@pytest.mark.parametrize("saves", [0, 2])
def test_ids_are_those_of_tokenizer_json(folder: Path, tmp_path: Path, loader: type, saves: int) -> None:
    source = folder
    for n in range(saves):
        loader.from_pretrained(source).save_pretrained(tmp_path / str(n))
        shutil.copyfile(folder / "config.json", tmp_path / str(n) / "config.json")
        source = tmp_path / str(n)
    loaded = loader.from_pretrained(source)
    assert type(loaded) is GrinMoeTokenizer
    expected = raw_ids(folder, HARD_TEXTS)
    assert loaded(HARD_TEXTS)["input_ids"] == expected
    assert [loaded.encode(text) for text in HARD_TEXTS] == expected
    assert raw_ids(source, HARD_TEXTS) == expected


def test_decoding_is_that_of_tokenizer_json(folder: Path, tokenizer: GrinMoeTokenizer) -> None:
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for ids, skip in itertools.product(raw_ids(folder, HARD_TEXTS), [True, False]):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == raw.decode(ids, skip_special_tokens=skip)


def test_the_class_that_the_release_names_gives_other_ids(folder: Path) -> None:
    """The trap: without it, the tests above could not fail."""
    stock = LlamaTokenizer.from_pretrained(folder)(HARD_TEXTS, add_special_tokens=False)["input_ids"]
    differing = sum(ours != theirs for ours, theirs in zip(stock, raw_ids(folder, HARD_TEXTS), strict=True))
    assert differing >= 10


def test_tokenizer_config_cannot_change_ids(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    end_id = Tokenizer.from_file(str(copy / "tokenizer.json")).token_to_id("<|end|>")
    contradiction = {end_id: {"content": "<|end|>", "rstrip": False, "lstrip": True}, 9: {"content": "world"}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": contradiction}))
    loaded = AutoTokenizer.from_pretrained(copy)
    assert loaded(HARD_TEXTS)["input_ids"] == raw_ids(folder, HARD_TEXTS)


# --- Defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True], ids=["with tokenizer_config.json", "tokenizer.json alone"])
def test_defaults(folder: Path, tmp_path: Path, bare: bool) -> None:
    if bare:
        shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    loaded = GrinMoeTokenizer.from_pretrained(tmp_path if bare else folder)
    assert loaded.special_tokens_map == {
        **{"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    }
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 4096)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded("Hello")["input_ids"] == loaded("Hello", add_special_tokens=False)["input_ids"]  # no bos, no eos
    one, two = loaded("a")["input_ids"], loaded("a b")["input_ids"]
    padding = [loaded.eos_token_id] * (len(two) - len(one))
    assert loaded(["a", "a b"], padding=True)["input_ids"] == [padding + one, two]


def test_released_ids(real_tokenizer_dir: Path) -> None:
    released = GrinMoeTokenizer.from_pretrained(real_tokenizer_dir)
    assert released.convert_tokens_to_ids(NAMES) == [0, 1, 2, *range(32000, 32011)]
    assert added_tokens(released) == list(map(repr, SPECIAL_TOKENS))
    assert released.stop_token_ids == [32000, 32007]


def test_stop_token_ids(tokenizer: GrinMoeTokenizer, folder: Path) -> None:
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert tokenizer.stop_token_ids == ids
    assert GrinMoeTokenizer.from_pretrained(folder, eos_token="<|end|>").stop_token_ids == ids[1:]  # once only
    only_eos = [AddedToken("<|endoftext|>", special=True)]
    assert GrinMoeTokenizer.train_from_iterator(["x"], 300, only_eos).stop_token_ids == [0]


# --- Chat -----------------------------------------------------------------------------------------------------------


def test_the_released_template_is_known(real_tokenizer_dir: Path) -> None:
    config = json.loads((real_tokenizer_dir / "tokenizer_config.json").read_text())
    assert config["chat_template"] == RELEASED_CHAT_TEMPLATE


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_chat_text_is_the_released_one(tokenizer: GrinMoeTokenizer, chat: list, generation_prompt: bool) -> None:
    options = {"tokenize": False, "add_generation_prompt": generation_prompt}
    text = tokenizer.apply_chat_template(chat, **options)
    assert text == tokenizer.apply_chat_template(chat, chat_template=RELEASED_CHAT_TEMPLATE, **options)
    assert text.endswith("<|assistant|>\n" if generation_prompt else "<|endoftext|>")


def expected_mask(tokenizer: GrinMoeTokenizer, ids: list[int]) -> Iterator[int]:
    """1 after `<|assistant|>`, up to and with `<|end|>`."""
    start, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    answering = False
    for token_id in ids:
        yield int(answering)
        answering = token_id == start or (answering and token_id != end)


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_mask_marks_the_answer_and_its_end(tokenizer: GrinMoeTokenizer, chat: list) -> None:
    encoded = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert mask == list(expected_mask(tokenizer, ids))
    assert ids[-1] == tokenizer.eos_token_id  # closes the chat, and is not part of an answer
    # the newline after <|end|> belongs to that token: nothing stands between it and the next turn
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    turns = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"])
    assert {ids[i + 1] for i, token_id in enumerate(ids) if token_id == end} <= set(turns)
    marked = [token_id for token_id, on in zip(ids, mask, strict=True) if on]
    ends = [i + 1 for i, token_id in enumerate(marked) if token_id == end]
    said = [tokenizer.decode(marked[start:stop]) for start, stop in itertools.pairwise([0, *ends])]
    answers = [message["content"].lstrip() for message in chat if message["role"] == "assistant"]
    assert said == [answer + "<|end|>" for answer in answers]


def in_parts(chat: list) -> list:
    """The same chat, each content as a list of text parts: the words, each with the white space behind it."""
    parts = [[{"type": "text", "text": text} for text in re.findall(r"\s*\S+\s*|\s+", m["content"])] for m in chat]
    return [{**message, "content": content} for message, content in zip(chat, parts, strict=True)]


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_text_parts_are_joined(tokenizer: GrinMoeTokenizer, chat: list) -> None:
    text = tokenizer.apply_chat_template(in_parts(chat), tokenize=False)
    assert text == tokenizer.apply_chat_template(chat, chat_template=RELEASED_CHAT_TEMPLATE, tokenize=False)
    masks = [
        tokenizer.apply_chat_template(given, return_assistant_tokens_mask=True)["assistant_masks"]
        for given in (chat, in_parts(chat))
    ]
    assert masks[0] == masks[1]


IMAGE = {"type": "image", "url": "x.png"}


@pytest.mark.parametrize(
    ("message", "options", "error"),
    [
        ({}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "has no tools and no documents"),
        ({}, {"documents": [{"title": "a", "text": "b"}]}, "has no tools and no documents"),
        ({"content": None}, {}, "content of a message must be text"),
        ({"content": {"type": "text", "text": "a"}}, {}, "content of a message must be text"),
        ({"content": [{"type": "text", "text": "a"}, IMAGE]}, {}, "Parts of a message must be"),
        ({"content": [{"type": "text", "text": None}]}, {}, "Parts of a message must be"),
        ({"content": [{"text": "a"}]}, {}, "Parts of a message must be"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, {}, "has no tool calls"),
        ({"role": "tool", "content": ""}, {}, 'Unknown role "tool"'),
        ({"role": "assistant", "content": None}, {}, "content of a message must be text"),
    ],
)
def test_what_the_chat_format_lacks_is_an_error(tokenizer, tmp_path, message: dict, options: dict, error: str) -> None:
    """From a tokenizer that was saved and is loaded without this package's class, too."""
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        with pytest.raises(jinja2.TemplateError, match=error):
            reader.apply_chat_template([USER, {**USER, **message}], tokenize=False, **options)


OWN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, CHAT_TEMPLATE),
        (RELEASED_CHAT_TEMPLATE, CHAT_TEMPLATE),
        (OWN_TEMPLATE, OWN_TEMPLATE),
        ({"default": OWN_TEMPLATE, "other": RELEASED_CHAT_TEMPLATE},) * 2,
    ],
    ids=["none", "released", "own", "several"],
)
def test_only_the_released_template_is_replaced(folder, tmp_path, given: str | dict | None, kept: str | dict) -> None:
    saved = GrinMoeTokenizer.from_pretrained(folder)
    saved.chat_template = given
    for jinja_file in (False, True):
        saved.save_pretrained(tmp_path / str(jinja_file), save_jinja_files=jinja_file)
        assert GrinMoeTokenizer.from_pretrained(tmp_path / str(jinja_file)).chat_template == kept


# --- Training a vocabulary ------------------------------------------------------------------------------------------


def assert_is_trained(trained: GrinMoeTokenizer, vocab_size: int) -> None:
    """A lossless vocabulary of this size that begins with the release's special tokens."""
    assert type(trained) is GrinMoeTokenizer
    assert len(trained) == trained.vocab_size == vocab_size
    assert sorted(trained.get_vocab().values()) == list(range(vocab_size))
    assert added_tokens(trained) == list(map(repr, SPECIAL_TOKENS))
    special = list(range(len(NAMES)))
    assert trained.convert_tokens_to_ids(NAMES) == special
    assert [trained(name)["input_ids"] for name in NAMES] == [[token_id] for token_id in special]
    assert [trained(f"x{name} x")["input_ids"][1:2] for name in NAMES] == [[token_id] for token_id in special]
    assert trained.stop_token_ids == trained.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    for text in PLAIN_TEXTS:
        ids = trained(text)["input_ids"]
        assert trained.decode(ids) == text == trained.decode(ids, skip_special_tokens=True)
        assert not set(ids) & set(special)
    ids = trained("a<|user|>b</s>c")["input_ids"]
    assert trained.decode(ids, skip_special_tokens=True) == "ab</s>c"  # as in the release, </s> is not special


@pytest.mark.parametrize("vocab_size", [270, 600])
def test_train_from_iterator(corpus: list[str], vocab_size: int) -> None:
    assert_is_trained(GrinMoeTokenizer.train_from_iterator(corpus, vocab_size), vocab_size)


def test_train_new_keeps_special_tokens(tokenizer: GrinMoeTokenizer, corpus: list[str]) -> None:
    retrained = tokenizer.train_new_from_iterator(corpus, vocab_size=600)
    assert_is_trained(retrained, 600)
    assert retrained.special_tokens_map == tokenizer.special_tokens_map


def test_train_new_keeps_settings_and_adds_tokens(folder: Path, corpus: list[str], tmp_path: Path) -> None:
    changed = {"padding_side": "right", "truncation_side": "left", "model_max_length": 512, "eos_token": "<|end|>"}
    own = GrinMoeTokenizer.from_pretrained(folder, chat_template=OWN_TEMPLATE, **changed)
    own.add_special_tokens({"extra_special_tokens": ["<|own|>"]})
    new = own.train_new_from_iterator(corpus, 600, new_special_tokens=["<|tool|>", AddedToken("<|fn|>", rstrip=True)])
    new.save_pretrained(tmp_path)
    for trained in (new, GrinMoeTokenizer.from_pretrained(tmp_path)):
        assert {name: getattr(trained, name) for name in changed} == changed
        assert trained.chat_template == OWN_TEMPLATE
        assert trained.extra_special_tokens == ["<|own|>", "<|tool|>", "<|fn|>"]
        assert trained.convert_tokens_to_ids(["<|own|>", "<|tool|>", "<|fn|>"]) == [14, 15, 16]
        assert trained("<|own|><|tool|><|fn|> \n")["input_ids"] == [14, 15, 16]
        assert len(trained) == 600


def test_training_refuses_what_cannot_work(tokenizer: GrinMoeTokenizer) -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 269; .* take 270"):
        tokenizer.train_new_from_iterator(["text"], vocab_size=269)
    with pytest.raises(ValueError, match="special_tokens_map is not supported"):
        tokenizer.train_new_from_iterator(["text"], vocab_size=300, special_tokens_map={"<|end|>": "<|im_end|>"})
