"""Conversion between the forms that live in safetensors, against files written without the code under test."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import assert_same, fused, released_config, released_tensors, write_checkpoint, write_release
from parity import LONGROPE_SCALING
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PhimoeForCausalLM, PhimoeForSequenceClassification

from conversion import ConversionError, conversion, convert
from conversion.phimoe_config import phimoe_notes
from modeling_grin import GrinMoeConfig, GrinMoeForCausalLM, GrinMoeForSequenceClassification

CONFIGS = {
    "released": {},
    "float32": {"torch_dtype": "float32"},
    "float16, 3 experts": {"torch_dtype": "float16", "num_local_experts": 3},
    "top-1": {"num_experts_per_tok": 1},
    "no biases": {"attention_bias": False, "lm_head_bias": False},
    "tied head": {"tie_word_embeddings": True},
    "head_dim x heads != hidden_size": {"head_dim": 10, "sliding_window": 5},
    "LongRoPE, its original length": {"rope_scaling": {**LONGROPE_SCALING, "original_max_position_embeddings": 64}},
    "one layer, one head, no window": {
        **{"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "sliding_window": None}
    },
}
REFUSED = {
    ("top-1", "phimoe"): "num_experts_per_tok",
    ("head_dim x heads != hidden_size", "gguf"): "head_dim",
    ("LongRoPE, its original length", "gguf"): "rope_parameters",
}
FORMS = ("hub", "fused", "phimoe", "dcp", "pickle")
TARGETS = ("hub", "fused", "phimoe", "gguf")
CASES = [(form, to, "released") for form in FORMS for to in TARGETS]
CASES += [("hub", to, name) for name in CONFIGS if name != "released" for to in ("phimoe", "gguf")]


@pytest.fixture
def source(tmp_path):
    return write_release(tmp_path / "source")[0]


def write_source(folder: Path, form: str, config: dict, tensors: dict) -> Path:
    """A checkpoint in one of the forms, by hand."""
    if form == "pickle":
        folder.mkdir()
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "dcp":
        dcp.save({"model": fused(tensors, config)}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    elif form == "phimoe":
        window = config["sliding_window"]
        config = {k: v for k, v in config.items() if k not in ("auto_map", "_name_or_path")}
        config |= {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]}
        config["sliding_window"] = None if window is None else window + 1  # keys, the query's own included
    if form not in ("dcp", "pickle"):
        return write_checkpoint(folder, config, fused(tensors, config) if form == "fused" else tensors, 3)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, and nothing twice; the index agrees."""
    tensors: dict[str, torch.Tensor] = {}
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
        where |= dict.fromkeys(found, file.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == where
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    else:
        assert set(where.values()) == {"model.safetensors"}
    return tensors


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("form", "to", "name"), CASES)
def test_every_form_to_every_other(tmp_path, form, to, name):
    config = released_config(**CONFIGS[name])
    tensors = released_tensors(config)
    source = write_source(tmp_path / "source", form, config, tensors)
    result = tmp_path / ("result.gguf" if to == "gguf" else "result")
    options = {"to": to, "weights_only": form in ("dcp", "pickle")}
    if reason := REFUSED.get((name, to)):
        with pytest.raises(ConversionError, match=reason):
            convert(source, result, **options)
        assert names_in(tmp_path) == ["source"]
        return
    if to == "gguf":
        report = convert(source, result, **options, dtype="f32")
        assert report.difference < 1e-5  # the folds, computed before and after
        assert re.fullmatch(
            r"near-ties on random tokens, because no text was given: \d+\.\d\d% of .*", report.notes[-1]
        )
        assert names_in(tmp_path) == ["result.Modelfile", "result.gguf", "source"]
        return
    report = convert(source, result, **options, max_shard_size="20KB")
    assert (report.form, report.target) == (form, to)
    assert report.difference < 1e-6  # computed before and after
    assert_same(read_all(result), fused(tensors, config) if to == "fused" else tensors)
    assert len(list(result.glob("*.safetensors"))) > 1
    assert names_in(tmp_path) == ["result", "source"]

    # Loaded as a user would, it computes what the release does.
    ids = torch.randint(config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    released = write_checkpoint(tmp_path / "released", config, tensors)
    ours = GrinMoeForCausalLM.from_pretrained(released, dtype="float32")
    model_class = PhimoeForCausalLM if to == "phimoe" else GrinMoeForCausalLM
    converted = model_class.from_pretrained(result, dtype="float32")
    assert converted.config.router_jitter_noise == config["router_jitter_noise"]
    assert json.loads((result / "config.json").read_text())["router_jitter_noise"] == config["router_jitter_noise"]
    with torch.no_grad():
        expected, found = ours.eval()(ids).logits, converted.eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("to", ["fused", "phimoe"])
def test_there_and_back_is_the_identity(tmp_path, to):
    """Weights, and every field of the config."""
    changes = {"sliding_window": 9, "router_jitter_noise": 0.05, "expert_dropout": 0.1, "router_sampling": False}
    source, _, tensors = write_release(tmp_path / "source", **changes, eos_token_id=2, pad_token_id=5)
    convert(source, tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back", to="hub")
    assert_same(read_all(tmp_path / "back"), tensors)
    first, back = (GrinMoeConfig.from_pretrained(tmp_path / name).to_dict() for name in ("source", "back"))
    assert back | {"architectures": []} == first | {"architectures": []}


@pytest.mark.parametrize("to", ["fused", "phimoe"])
def test_classifiers(tmp_path, to):
    values = released_config(torch_dtype="float32", pad_token_id=0, eos_token_id=3, sliding_window=4)
    torch.manual_seed(0)
    model = GrinMoeForSequenceClassification(GrinMoeConfig(**values, num_labels=3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "result", to=to)
    model_class = PhimoeForSequenceClassification if to == "phimoe" else GrinMoeForSequenceClassification
    converted = model_class.from_pretrained(tmp_path / "result").eval()
    ids = torch.randint(1, 131, (2, 10))
    torch.testing.assert_close(converted(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)
    convert(tmp_path / "result", tmp_path / "back", to="hub")
    assert_same(read_all(tmp_path / "back"), read_all(tmp_path / "source"))


def test_dtype(tmp_path):
    source, config, tensors = write_release(tmp_path / "source")
    convert(source, tmp_path / "result", to="fused", dtype="float16")
    assert_same(
        read_all(tmp_path / "result"), {name: tensor.half() for name, tensor in fused(tensors, config).items()}
    )
    assert GrinMoeConfig.from_pretrained(tmp_path / "result").dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"), "experts.2.w3.weight is missing"),
        (lambda t: t.update({"model.layers.7.norm": torch.ones(3)}), r"model\.layers\.7\.norm in .* not part"),
        (lambda t: t.update({"model.norm.bias": torch.ones(3)}), r"model.norm.bias in .* has shape \[3\].*says \[32"),
        (lambda t: t.update({"model.norm.bias": torch.ones(32, dtype=torch.int8)}), "model.norm.bias .*int8"),
        (lambda t: t["model.norm.bias"].fill_(torch.nan), "model.norm.bias in .*NaN"),
        (lambda t: t["lm_head.weight"][0].fill_(-torch.inf), "lm_head.weight in .* infinite"),
        (lambda t: t["lm_head.weight"][5].fill_(1e6), r"lm_head.weight .*beyond the range of torch.float16"),
    ],
)
def test_tensors_that_are_wrong(tmp_path, change, message):
    config = released_config()
    tensors = released_tensors(config)
    change(tensors)
    source = write_checkpoint(tmp_path / "source", config, tensors, 2)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "result", to="fused", dtype="float16")
    assert names_in(tmp_path) == ["source"]


def test_mixed_dtypes(tmp_path):
    """Norms and biases in float32, in sizes that leave what follows at odd addresses; each keeps its own."""
    config = released_config(hidden_size=33, head_dim=8, intermediate_size=7, vocab_size=37)
    tensors = released_tensors(config)
    for name in tensors:
        if "norm" in name or name.endswith("q_proj.bias"):
            tensors[name] = tensors[name].float() + 1e-4
    source = write_checkpoint(tmp_path / "source", config, tensors)
    convert(source, tmp_path / "fused", to="fused")
    assert_same(read_all(tmp_path / "fused"), fused(tensors, config))
    for path in (source, tmp_path / "fused"):
        GrinMoeForCausalLM.from_pretrained(path, dtype="float32")
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    write_checkpoint(tmp_path / "mixed", config, {**tensors, name: tensors[name].float()})
    with pytest.raises(ConversionError, match=r"experts.down_proj would be made of torch.*choose one with --dtype"):
        convert(tmp_path / "mixed", tmp_path / "result", to="fused")


def test_wrappers_prefixes(tmp_path):
    """DDP's `module.` is taken off; a name that is there with and without it is an error."""
    config = released_config()
    tensors = released_tensors(config)
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    convert(write_checkpoint(tmp_path / "wrapped", config, wrapped), tmp_path / "result", to="hub")
    assert_same(read_all(tmp_path / "result"), tensors)
    wrapped["model.norm.bias"] = tensors["model.norm.bias"].clone()
    source = write_checkpoint(tmp_path / "twice", config, wrapped)
    with pytest.raises(ConversionError, match=r"twice: as model\.norm\.bias and as module\.model\.norm\.bias"):
        convert(source, tmp_path / "other", to="hub")


def test_files_that_transformers_does_not_read(tmp_path):
    """A config that lies elsewhere, a file of another name: converted and checked all the same."""
    source, config, tensors = write_release(tmp_path / "source")
    (tmp_path / "configs").mkdir()
    (source / "config.json").rename(tmp_path / "configs" / "config.json")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    assert convert(source, tmp_path / "result", to="fused", config=tmp_path / "configs").difference == 0
    assert_same(read_all(tmp_path / "result"), fused(tensors, config))


def test_dtypes_are_those_of_the_files(tmp_path):
    """Not the config's: float32 tensors under `torch_dtype: bfloat16` are compared, and written, as float32."""
    config = released_config(torch_dtype="float32")
    tensors = released_tensors(config)
    source = write_checkpoint(tmp_path / "source", {**config, "torch_dtype": "bfloat16"}, tensors)
    assert convert(source, tmp_path / "phimoe", to="phimoe").difference < 1e-6
    assert json.loads((tmp_path / "phimoe" / "config.json").read_text())["dtype"] == "float32"
    assert_same(read_all(tmp_path / "phimoe"), tensors)


HEAD_BIAS = "vLLM and SGLang leave out the head's bias"


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"sliding_window": None}, [HEAD_BIAS]),
        ({}, ["SGLang has no sliding window: right up to 2048 tokens", HEAD_BIAS]),
        ({"sliding_window": None, "attention_bias": False}, [HEAD_BIAS, "vLLM builds biases of the attention"]),
        ({"sliding_window": None, "tie_word_embeddings": True}, [HEAD_BIAS, "vLLM builds a head of its own"]),
    ],
)
def test_what_the_readers_of_phimoe_compute_otherwise_is_said(changes, notes):
    found = phimoe_notes(GrinMoeConfig.from_dict(released_config(**changes)))
    assert len(found) == len(notes) and all(map(str.startswith, found, notes))


def test_folds_that_are_wrong_are_refused(tmp_path, source, monkeypatch):
    """Whatever the file's type, whose rounding would hide them."""
    from gguf.constants import MODEL_TENSOR

    from conversion import gguf_export

    monkeypatch.delitem(gguf_export.CENTRED, MODEL_TENSOR.FFN_DOWN_EXP)
    for dtype in ("f32", "q8_0"):
        with pytest.raises(ConversionError, match=r"differs first in layers\.0"):
            convert(source, tmp_path / "result.gguf", to="gguf", dtype=dtype)
    assert names_in(tmp_path) == ["source"]
    monkeypatch.undo()
    assert 1e-4 < convert(source, tmp_path / "result.gguf", to="gguf", dtype="q8_0").difference < 1


def test_a_head_that_is_tied_and_there(tmp_path):
    config = released_config(tie_word_embeddings=True)
    tensors = released_tensors(config)
    head = tensors["model.embed_tokens.weight"].clone()
    source = write_checkpoint(tmp_path / "same", config, {**tensors, "lm_head.weight": head})
    convert(source, tmp_path / "result", to="fused")
    assert "lm_head.weight" not in read_all(tmp_path / "result")
    head[3, 5] += 1
    source = write_checkpoint(tmp_path / "other", config, {**tensors, "lm_head.weight": head})
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        convert(source, tmp_path / "result2", to="fused")


@pytest.mark.parametrize(
    ("destination", "arguments", "message"),
    [
        ("source/result", {}, "lies in the source"),
        ("full", {}, "full exists"),
        ("result", {"to": "onnx"}, "to must be one of hub, fused, phimoe, gguf; got 'onnx'"),
        ("result", {"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ("result", {"num_experts": 3}, "the 3 most used of 6 experts need --calibration"),
        ("result", {"config": "nowhere"}, "nowhere"),
        ("result", {"to": "gguf"}, "ends with .gguf"),
        ("empty.gguf", {"to": "gguf"}, "ends with .gguf"),
        ("x.gguf", {"to": "gguf", "calibration": "nowhere"}, "nowhere is not a text file"),
        ("result", {"max_shard_size": "5 apples"}, "max_shard_size must be a size such as"),
        ("x.gguf", {"to": "gguf", "max_shard_size": "1GB"}, "max_shard_size=1GB would have no effect"),
        ("result", {"base": "."}, "base=. would have no effect: the source is not an adapter"),
        ("result", {"calibration": __file__, "num_experts": 3, "top_k": 1}, "no --top-k"),
    ],
)
def test_arguments_that_are_wrong(tmp_path, source, destination, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    (tmp_path / "empty.gguf").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / destination, **{"to": "hub", **arguments})
    assert sorted(tmp_path.rglob("*")) == before


def test_what_lies_beside_the_weights(tmp_path, source, trained_tokenizer):
    trained_tokenizer.save_pretrained(source)
    for name in ("generation_config.json", "README.md", "LICENSE", "modeling_grinmoe.py", "training_args.bin"):
        (source / name).write_text("{}")
    (source / "logs").mkdir()
    save_file({"x": torch.ones(2)}, source / "other.safetensors")
    report = convert(source, tmp_path / "result", to="phimoe")
    assert set(report.copied) >= {"tokenizer.json", "generation_config.json", "README.md", "LICENSE"}
    assert report.skipped == ["logs", "modeling_grinmoe.py", "other.safetensors", "training_args.bin"]
    for name in {*report.copied} - {"tokenizer_config.json"}:
        assert (tmp_path / "result" / name).read_bytes() == (source / name).read_bytes()


LINKS_OUT = {
    "LICENSE": "secret",
    "README.md": "../secret",  # as it lies beside the folder
    "config.json": "config.json",
    "model.safetensors": "model.safetensors",
    "additional_chat_templates/tools.jinja": "secret",
    "additional_chat_templates": "folder",
    "pytorch_model_fsdp_0": "folder",
}


@pytest.mark.parametrize("name", LINKS_OUT)
def test_links_out_of_the_folder_are_refused(tmp_path, source, name):
    """Converted or uploaded, what they point to would be given away. The folder itself may be a link."""
    (tmp_path / "folder").mkdir()
    for file in ("secret", "folder/.metadata"):
        (tmp_path / file).write_text("of the user")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(source / file, tmp_path / file)
    target = Path(LINKS_OUT[name])
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(target if ".." in target.parts else tmp_path / target)
    (tmp_path / "linked").symlink_to(source)
    for folder in (source, tmp_path / "linked"):
        with pytest.raises(ConversionError, match=rf"links out of it: {name}\S* \(to /.*delete the links"):
            convert(folder, tmp_path / "result", to="hub")
    other, _, _ = write_release(tmp_path / "other")
    with pytest.raises(ConversionError, match=r"links out of it"):  # a folder that only the config is taken from, too
        convert(other, tmp_path / "result", to="hub", config=source)
    assert not (tmp_path / "result").exists()


def test_links_within_the_folder_and_to_the_hubs_blobs_are_followed(tmp_path, source):
    """As the Hub's cache has them; but no `blobs` that is a link itself."""
    repository = tmp_path / "models--me--tiny"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (source / "LICENSE").write_text("MIT")
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    (snapshot / "runs").symlink_to(tmp_path)  # no part of the model, and left
    report = convert(snapshot, tmp_path / "result", to="hub")
    assert report.copied == ["LICENSE", "NOTICE"]
    assert not any(path.is_symlink() for path in (tmp_path / "result").iterdir())
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match=r"4 file\(s\) that are links out"):
        convert(snapshot, tmp_path / "again", to="hub")


def test_stock_transformers_reads_the_tokenizer(tmp_path, source, trained_tokenizer, real_tokenizer_dir):
    """In a process that has never heard of this package."""
    trained_tokenizer.save_pretrained(tmp_path / "trained")
    text, expected = "Hello,   world!<|end|>\n<|assistant|>\nfoo\tbar  \u2028é漢🙂", []
    for name, tokenizer in (("result1", tmp_path / "trained"), ("result2", real_tokenizer_dir)):
        for path in tokenizer.iterdir():
            shutil.copy(path, source)
        convert(source, tmp_path / name, to="phimoe", check=False)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in settings
        expected.append(AutoTokenizer.from_pretrained(source)(text).input_ids)
    code = (
        "import sys; from transformers import AutoTokenizer as auto; "
        "print([auto.from_pretrained(path)(sys.argv[1]).input_ids for path in sys.argv[2:]])"
    )
    command = [sys.executable, "-c", code, text, str(tmp_path / "result1"), str(tmp_path / "result2")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_the_first_layer_that_differs_is_named(tmp_path, source, monkeypatch):
    """A conversion that is wrong is not written: the experts' w1 and w3 of one layer exchanged."""
    original = conversion.outputs

    def exchange(groups, tensors, dtype):
        other = {"w1": "w3", "w3": "w1"}
        names = {name: re.sub(r"(layers\.1\..*)(w[13])", lambda m: m[1] + other[m[2]], name) for name in tensors}
        return original(groups, {name: tensors[other] for name, other in names.items()}, dtype)

    monkeypatch.setattr(conversion, "outputs", exchange)
    with pytest.raises(ConversionError, match=r"differs first in layers\.1 or norm "):
        convert(source, tmp_path / "result", to="hub")
    assert names_in(tmp_path) == ["source"]


def test_big_models_are_not_checked_unless_asked(tmp_path, source, monkeypatch):
    monkeypatch.setattr("conversion.verify.SMALL", 1000)
    assert convert(source, tmp_path / "a", to="fused").difference is None
    assert convert(source, tmp_path / "b", to="fused", check=True).difference == 0
