"""Remote code: what `save_pretrained` (and so `push_to_hub`) writes runs where `modeling_grin` is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import released_config, released_tensors, write_checkpoint

import modeling_grin
from modeling_grin import (
    GrinMoeConfig,
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    GrinMoeModel,
    GrinMoeTokenizer,
)

PACKAGE = Path(modeling_grin.__file__).parent
TRAVELLING = sorted(PACKAGE.glob("*_grinmoe.py"))
# transformers itself cannot be imported without these, so that they are wherever it is.
ALLOWED_PACKAGES = {"torch", "transformers", "safetensors", "huggingface_hub", "tokenizers"}

AUTO_CLASSES = {
    GrinMoeConfig: "AutoConfig",
    GrinMoeModel: "AutoModel",
    GrinMoeForCausalLM: "AutoModelForCausalLM",
    GrinMoeForSequenceClassification: "AutoModelForSequenceClassification",
    GrinMoeTokenizer: "AutoTokenizer",
}
MODELS = {AUTO_CLASSES[cls]: cls for cls in (GrinMoeForCausalLM, GrinMoeForSequenceClassification)}
TEXT = "def f(x):\n    return x  # <|end|> done"

# Loads a folder, says what it got, writes the logits, and saves everything once more.
CLEAN_PROCESS = """
import json, sys
sys.modules["modeling_grin"] = None  # `import modeling_grin` raises ImportError, installed or not
import torch, transformers

auto_class, source, target, logits, text = sys.argv[1:]
auto_class = getattr(transformers, auto_class)
try:
    auto_class.from_pretrained(source, trust_remote_code=False)
    sys.exit("loaded without its code")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model = auto_class.from_pretrained(source, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, logits)
model.save_pretrained(target)
tokenizer.save_pretrained(target)
objects = [model, model.config, tokenizer]
facts = {
    "classes": [type(item).__name__ for item in objects],
    "files": [sys.modules[type(item).__module__].__file__ for item in objects],
    "ours": [name for name, module in sys.modules.items() if name.startswith("modeling_grin.") and module],
    "ids": ids[0].tolist(),
}
if "CausalLM" in auto_class.__name__:  # Trainer knows it as one, too
    settings = {"label_smoothing_factor": 0.1, "report_to": "none", "use_cpu": True}
    trainer = transformers.Trainer(model, transformers.TrainingArguments(target + "-run", **settings))
    facts["smoothed"] = float(trainer.compute_loss(model, {"input_ids": ids, "labels": ids}))
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def registered():
    """The classes as after `register_for_auto_class`; undone for the other test modules."""
    with pytest.MonkeyPatch.context() as patch:
        for cls, auto_class in AUTO_CLASSES.items():
            patch.setattr(cls, "_auto_class", None)
            cls.register_for_auto_class(auto_class)
        yield


@pytest.fixture(scope="module", params=MODELS)
def saved(request, registered, trained_tokenizer, tmp_path_factory):
    """Auto class, model, folder: loaded from a checkpoint in the released layout, saved with code and tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    config = released_config(vocab_size=len(trained_tokenizer), num_labels=3, torch_dtype="float32", pad_token_id=3)
    tensors = {**released_tensors(config), "score.weight": torch.randn(3, config["hidden_size"])}
    released = write_checkpoint(folder / "released", config, tensors, num_shards=2)
    model = MODELS[request.param].from_pretrained(released)
    model.save_pretrained(folder / "first")
    trained_tokenizer.save_pretrained(folder / "first")
    return request.param, model, folder


def logits(model, tokenizer):
    with torch.no_grad():
        return model(input_ids=tokenizer(TEXT, return_tensors="pt").input_ids).logits


def test_the_code_travels(saved):
    auto_class, _, folder = saved
    written = sorted((folder / "first").glob("*.py"))
    assert [file.name for file in written] == [file.name for file in TRAVELLING]
    for file in written:
        assert file.read_bytes() == (PACKAGE / file.name).read_bytes(), file.name
    config = json.loads((folder / "first" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_grinmoe.GrinMoeConfig",
        auto_class: f"modeling_grinmoe.{MODELS[auto_class].__name__}",
    }, "with nothing left of the release's own"
    assert config["router_jitter_noise"] == 0.01
    tokenizer_config = json.loads((folder / "first" / "tokenizer_config.json").read_text())
    assert tokenizer_config["auto_map"]["AutoTokenizer"][0] == "tokenization_grinmoe.GrinMoeTokenizer"


def load_in_a_clean_process(tmp_path, auto_class, source, target):
    """What `CLEAN_PROCESS` finds; its logits are in `tmp_path`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [auto_class, source, target, tmp_path / "logits.pt", TEXT]
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_loads_in_a_clean_process(saved, trained_tokenizer, tmp_path):
    """And what the clean process saves is the same folder: code, weights, settings."""
    auto_class, model, folder = saved
    expected = logits(model, trained_tokenizer)
    facts = load_in_a_clean_process(tmp_path, auto_class, folder / "first", folder / "second")
    assert facts["classes"] == [MODELS[auto_class].__name__, "GrinMoeConfig", "GrinMoeTokenizer"]
    assert all(Path(file).is_relative_to(tmp_path / "modules") for file in facts["files"]), facts["files"]
    assert not facts["ours"]
    assert facts["ids"] == trained_tokenizer(TEXT)["input_ids"]
    # A checkpoint's code leaves the package's kernels at home: the same function, summed in another order.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
    if auto_class == "AutoModelForCausalLM":
        log_probs, targets = expected[0, :-1].double().log_softmax(-1), torch.tensor(facts["ids"][1:])
        smoothed = -0.9 * log_probs.gather(-1, targets[:, None]).mean() - 0.1 * log_probs.mean()
        assert facts["smoothed"] == pytest.approx(float(smoothed), rel=1e-5)
    for name in [file.name for file in TRAVELLING] + ["model.safetensors", "tokenizer.json"]:
        assert (folder / "second" / name).read_bytes() == (folder / "first" / name).read_bytes(), name
    before, after = (json.loads((folder / name / "config.json").read_text()) for name in ("first", "second"))
    assert after == before


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_installed_package_comes_first(saved, trained_tokenizer, trust):
    """No question either; models that are installed are never replaced by what a folder brings."""
    auto_class, model, folder = saved
    loaded = getattr(transformers, auto_class).from_pretrained(folder / "first", trust_remote_code=trust)
    assert type(loaded) is MODELS[auto_class]
    assert type(loaded.config) is GrinMoeConfig
    assert torch.equal(logits(loaded, trained_tokenizer), logits(model, trained_tokenizer))
    if not trust:  # where it is trusted, transformers takes a folder's tokenizer, which the clean process tests
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "first", trust_remote_code=trust)
        assert type(tokenizer) is GrinMoeTokenizer


def test_a_config_saved_alone_names_no_code(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(GrinMoeConfig, "_auto_class", None)
    GrinMoeConfig.from_pretrained(saved[2] / "first").save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("file", TRAVELLING, ids=lambda file: file.name)
def test_imports(file):
    """The standard library, and what transformers needs anyway. The clean process imports the siblings."""
    tree = ast.parse(file.read_text())
    tried = {node for attempt in ast.walk(tree) if isinstance(attempt, ast.Try) for node in ast.walk(attempt)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        optional = {"triton"} if node in tried else set()  # transformers does not ask for what is tried
        packages = {name.split(".")[0] for name in names}
        assert packages <= ALLOWED_PACKAGES | optional | sys.stdlib_module_names, ast.unparse(node)
