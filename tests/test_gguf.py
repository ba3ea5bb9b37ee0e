"""GGUF files against the model: in torch, from what stands in the file, and in llama.cpp itself where it is installed.

llama.cpp is there by `pip install llama-cpp-python`, which builds it (CMAKE_ARGS=-DGGML_NATIVE=OFF).
"""

import json
import random
import re

import gguf
import numpy as np
import pytest
import torch
from checkpoints import released_config, released_tensors
from test_tokenization import HARD_TEXTS, NAMES, PLAIN_TEXTS, USER
from tokenizers import Tokenizer

from conversion import gguf_export
from conversion.checkpoint import Checkpoint
from conversion.gguf_export import estimate_router_std, export_gguf
from conversion.gguf_simulate import load_gguf
from conversion.tensors import ConversionError, StoredTensor
from conversion.verify import Calibration, calibrate, load_model
from modeling_grin import GrinMoeConfig, GrinMoeTokenizer
from modeling_grin.tokenization_grinmoe import RELEASED_CHAT_TEMPLATE

SIZES = {
    **{"vocab_size": 131, "hidden_size": 128, "intermediate_size": 96, "num_local_experts": 4},
    **{"eos_token_id": 3, "pad_token_id": 3, "torch_dtype": "float32", "router_jitter_noise": 0.0},
}
# k = 31: what is left of the routers' fold is beyond float32.
EXACT_SHIFT = Calibration([2.0**20] * 2, 0.0, torch.ones(2, 1))


def make_checkpoint(folder, seed=0, **overrides):
    """A random model whose layers keep the scale of what they read, so that an error stays in proportion."""
    config = released_config(**{**SIZES, **overrides})
    tensors = released_tensors(config, seed)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "embed" not in name:
            gain = 10 if ".gate." in name else 5  # of a standard deviation of 0.2
            tensors[name] = tensor * gain / tensor.shape[1] ** 0.5
    return open_checkpoint(folder, GrinMoeConfig.from_dict(config), tensors)


def open_checkpoint(folder, config, tensors):
    stored = {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, name, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }
    return Checkpoint(folder, "hub", config, stored)


def read_tensors(checkpoint):
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def reference(checkpoint, dtype=torch.float64):
    model = load_model(checkpoint, dtype)
    model.set_experts_implementation("eager")
    return model


def random_ids(config, rows, length, seed=1):
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative_error(values, expected):
    return ((values.double() - expected.double()).norm() / expected.double().norm()).item()


def agreement(logits, expected):
    """Of the best tokens."""
    return (logits.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean().item()


@pytest.fixture
def naive(monkeypatch):
    """Called, it turns the folds off."""

    def turn_off():
        monkeypatch.setattr(gguf_export, "choose_factor", lambda *_: 1.0)
        monkeypatch.setattr(gguf_export, "CENTRED", {})

    return turn_off


# --- The weights, in torch ------------------------------------------------------------------------------------------

# Besides those of test_conversion.py, which compares each file's weights with the model.
FORMS = {
    "released": {},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "top-3 of 5": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "heads of 10": {"hidden_size": 40, "intermediate_size": 7, "num_key_value_heads": 1},
    "v2 star": {"router_estimator": "sparsemixer_v2_star"},
    "mid-point": {"router_estimator": "sparsemixer", "num_experts_per_tok": 1},
    "GShard": {"router_estimator": "gshard"},
    "other theta and eps": {"rope_theta": 500.0, "rms_norm_eps": 0.01},
}


@pytest.mark.parametrize("overrides", FORMS.values(), ids=FORMS)
@torch.inference_mode()
def test_folds_are_exact(tmp_path, overrides):
    """llama.cpp's graph in float64 on the file's F32 tensors, with routers scaled further than float32 allows."""
    checkpoint = make_checkpoint(tmp_path, **overrides)
    report = export_gguf(checkpoint, tmp_path / "model", file_type="f32", calibration=EXACT_SHIFT)
    needs_shift = overrides.get("num_experts_per_tok") != 1 and overrides.get("router_estimator") != "gshard"
    assert report.router_shifts == ([31, 31] if needs_shift else [0, 0])
    ids = random_ids(checkpoint.config, 4, 32)
    expected = reference(checkpoint)(ids, output_hidden_states=True)
    outputs = load_gguf(tmp_path / "model", torch.float64)(ids, output_hidden_states=True)
    for states, original in zip(outputs.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        assert relative_error(states, original - original.mean(dim=-1, keepdim=True)) < 1e-6
    assert relative_error(outputs.logits, expected.logits) < 1e-6


@pytest.mark.parametrize("scale", [2.0**-9, 1.0, 37.0])
@torch.inference_mode()
def test_router_shift_follows_the_weights(tmp_path, scale):
    """Whatever the routers' scale, the file's routers have the same: float32 has room for their softmax."""
    checkpoint = make_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint)
    tensors |= {name: tensor * scale for name, tensor in tensors.items() if ".gate." in name}
    checkpoint = open_checkpoint(tmp_path, checkpoint.config, tensors)
    report = export_gguf(checkpoint, tmp_path / "model", file_type="f32")
    ids = random_ids(checkpoint.config, 4, 32)
    exact = load_gguf(tmp_path / "model", torch.float64, router_shift=20)
    assert relative_error(exact(ids).logits, reference(checkpoint)(ids).logits) < 1e-6
    model = load_gguf(tmp_path / "model")
    for logits in model(ids, output_router_logits=True).router_logits:
        assert 2**-12.6 < (logits - logits.mean(dim=-1, keepdim=True)).std() < 2**-10.4
    assert relative_error(model(ids).logits, reference(checkpoint)(ids).logits) < 1e-3
    assert report.near_tie_rate is None

    calibrated = export_gguf(
        checkpoint, tmp_path / "calibrated", file_type="f32", calibration=calibrate(reference(checkpoint), list(ids))
    )
    assert max(abs(a - b) for a, b in zip(report.router_shifts, calibrated.router_shifts, strict=True)) <= 1
    assert calibrated.near_tie_rate == 0


def test_router_std_is_that_of_a_large_sample():
    generator = torch.Generator().manual_seed(0)
    gate, weight = torch.randn(7, 64, generator=generator) + 3, 1 + 0.3 * torch.randn(64, generator=generator)
    bias = 0.5 * torch.randn(64, generator=generator)
    logits = (torch.randn(20000, 64, generator=generator) * weight + bias) @ gate.T
    spread = (logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
    assert estimate_router_std(gate, weight, bias) == pytest.approx(spread, rel=0.02)


def test_near_ties_are_those_of_the_keep_set(tmp_path):
    """The rule of the release written out: the second choice looks at what the first has left."""
    checkpoint = make_checkpoint(tmp_path, num_local_experts=6, router_jitter_noise=0.1)
    model = reference(checkpoint)
    ids = random_ids(checkpoint.config, 3, 40)
    near_ties = 0
    router_logits = model(ids, output_router_logits=True).router_logits
    for logits in torch.cat(router_logits).tolist():
        left = sorted(logits, reverse=True)
        first, second = left[0], left[1]
        near_ties += any(
            any((best - other) / max(abs(other), best) <= 0.2 for other in others)
            for best, others in ((first, left[1:]), (second, left[2:]))
        )
    calibration = calibrate(model, list(ids))
    assert calibration.near_tie_rate == near_ties / (2 * ids.numel())
    assert 0.1 < calibration.near_tie_rate < 0.9
    std = [(logits - logits.mean(dim=-1, keepdim=True)).square().mean().sqrt().item() for logits in router_logits]
    assert calibration.router_std == pytest.approx(std)


# --- The file -------------------------------------------------------------------------------------------------------


def stored_tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def metadata(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_metadata(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    report = export_gguf(checkpoint, tmp_path / "model", file_type="bf16")
    expected = {
        **{"general.architecture": "phimoe", "general.file_type": 32, "general.name": "GRIN-MoE"},
        **{"phimoe.vocab_size": 131, "phimoe.context_length": 2048, "phimoe.embedding_length": 128},
        **{"phimoe.block_count": 2, "phimoe.feed_forward_length": 96, "phimoe.rope.dimension_count": 32},
        **{"phimoe.attention.head_count": 4, "phimoe.attention.head_count_kv": 2, "phimoe.rope.freq_base": 10000.0},
        **{"phimoe.expert_count": 4, "phimoe.expert_used_count": 2, "tokenizer.ggml.model": "no_vocab"},
    }
    written = metadata(tmp_path / "model")
    assert written | expected == written
    assert written["phimoe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert report.context_length == 2048
    assert report.notes == [f"no tokenizer.json in {tmp_path}: the file has no vocabulary"]


@pytest.mark.parametrize(
    ("window", "positions", "limit"), [(2047, 4096, 2048), (None, 4096, 4096), (5000, 4096, 4096), (7, 9, 8)]
)
def test_context_ends_with_the_window(tmp_path, window, positions, limit):
    checkpoint = make_checkpoint(tmp_path, sliding_window=window, max_position_embeddings=positions)
    report = export_gguf(checkpoint, tmp_path / "model", file_type="f32")
    assert report.context_length == metadata(tmp_path / "model")["phimoe.context_length"] == limit
    assert f"context: {limit} tokens" in "\n".join(report.lines())


@pytest.mark.parametrize("file_type", gguf_export.FILE_TYPES)
def test_types(tmp_path, file_type):
    """Matrices have the type, or F16 where rows of 40 are no blocks; the report has the errors of what is stored."""
    checkpoint = make_checkpoint(tmp_path, intermediate_size=40)
    report = export_gguf(checkpoint, tmp_path / "model", file_type=file_type)
    export_gguf(checkpoint, tmp_path / "exact", file_type="f32")
    exact = stored_tensors(tmp_path / "exact")
    squares: dict[str, list[float]] = {}
    for name, tensor in stored_tensors(tmp_path / "model").items():
        values, kind = exact[name].data.astype(np.float64), name.split(".")[-2]
        expected = file_type.upper()
        if tensor.data.ndim == 1 or kind == "ffn_gate_inp":
            expected = "F32"
        elif kind == "ffn_down_exps" and file_type[0] == "q":
            expected = "F16"
        assert tensor.tensor_type.name == expected
        error = gguf.dequantize(tensor.data, tensor.tensor_type) - values
        sums = squares.setdefault(kind, [0.0, 0.0])
        sums[0] += np.square(error).sum()
        sums[1] += np.square(values).sum()
    errors = {kind: (error / whole) ** 0.5 for kind, (error, whole) in squares.items()}
    assert report.quantization_error == pytest.approx(errors, rel=1e-4)
    noted = "stored as F16, because rows are not a multiple of" in "\n".join(report.lines())
    assert noted == (file_type[0] == "q")


def test_chunks_do_not_show(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path)
    export_gguf(checkpoint, tmp_path / "whole", file_type="q8_0")
    monkeypatch.setattr(gguf_export, "CHUNK_ELEMENTS", 300)
    calls: list[tuple[int, int]] = []
    export_gguf(checkpoint, tmp_path / "chunks", file_type="q8_0", progress=lambda *call: calls.append(call))
    nbytes = sum(tensor.n_bytes for tensor in stored_tensors(tmp_path / "chunks").values())
    assert sum(done for done, _ in calls) == nbytes and {total for _, total in calls} == {nbytes}
    assert max(done for done, _ in calls) <= 300 * 4
    whole, chunks = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "chunks")
    assert list(whole) == list(chunks)
    for name, tensor in whole.items():  # a mean that is summed in other parts differs in float64's last bits
        dequantised = [gguf.dequantize(t.data, t.tensor_type) for t in (tensor, chunks[name])]
        np.testing.assert_allclose(*dequantised, rtol=1e-6, atol=1e-9)


def test_an_interrupted_file_does_not_load_and_is_begun_anew(tmp_path):
    checkpoint, left = make_checkpoint(tmp_path), iter(range(20))
    report = export_gguf(checkpoint, tmp_path / "whole", file_type="q8_0")
    with pytest.raises(StopIteration):
        export_gguf(checkpoint, tmp_path / "model", file_type="q8_0", progress=lambda *_: next(left))
    with pytest.raises(ValueError, match=r"mmap|buffer|size|reshape"):
        stored_tensors(tmp_path / "model")
    assert export_gguf(checkpoint, tmp_path / "model", file_type="q8_0") == report
    assert (tmp_path / "model").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole"]


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_dim": 16}, "head_dim=16 .* hidden_size / num_attention_heads = 128 / 4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .* silu"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters=.*'linear'"),
        ({"moe_output_scale": True}, "moe_output_scale=True"),
        ({"router_bias_update_rate": 0.1}, "router_bias_update_rate=0.1"),
        ({"router_estimator": "dense"}, "router_estimator='dense'"),
        ({"router_estimator": "gshard", "num_experts_per_tok": 1}, "router_estimator='gshard'"),
        ({"num_local_experts": 1025}, "num_local_experts=1025 .* at most 1024"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, overrides, message):
    config = GrinMoeConfig.from_dict(released_config(**{**SIZES, **overrides}))
    with pytest.raises(ConversionError, match=message):
        export_gguf(open_checkpoint(tmp_path, config, {}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_other_models_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint)
    decoder = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if "lm_head" not in name}
    for other in (decoder, tensors | {"score.weight": torch.zeros(2, 128)}):
        with pytest.raises(ConversionError, match=r"holds a GrinMoe\w+: llama.cpp has GrinMoeForCausalLM alone"):
            export_gguf(open_checkpoint(tmp_path, checkpoint.config, other), tmp_path / "model")
    more = tensors | {"model.layers.0.more.weight": torch.zeros(2)}
    with pytest.raises(ConversionError, match=r"more\.weight has no place"):
        export_gguf(open_checkpoint(tmp_path, checkpoint.config, more), tmp_path / "model")


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
NORM = "model.layers.0.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("file_type", "name", "value"),
    [
        ("f16", "lm_head.weight", 1e6),
        ("bf16", "lm_head.weight", 3.4e38),
        ("f32", EXPERT, float("nan")),
        ("q4_0", EXPERT, float("-inf")),
        ("f16", NORM, float("inf")),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, file_type, name, value):
    checkpoint = make_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint)
    tensors[name].view(-1)[7] = value
    stored_as = "F32" if name == NORM else file_type.upper()
    with pytest.raises(ConversionError, match=f"^{name} cannot be stored as {stored_as}: "):
        export_gguf(open_checkpoint(tmp_path, checkpoint.config, tensors), tmp_path / "model", file_type=file_type)


# --- Vocabularies ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["released", "trained"])
def tokenizer_folder(request, tmp_path):
    if request.param == "released":
        return request.getfixturevalue("real_tokenizer_dir")
    request.getfixturevalue("trained_tokenizer").save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def small_checkpoint(folder, **overrides):
    """With as many embeddings as the folder's tokenizer has tokens, and some more."""
    tokens = max(GrinMoeTokenizer.from_pretrained(folder).get_vocab().values()) + 1
    return make_checkpoint(folder, **{"vocab_size": tokens + 5, "hidden_size": 32, **overrides})


def test_vocabulary(tokenizer_folder, tmp_path):
    report = export_gguf(small_checkpoint(tokenizer_folder), tmp_path / "model")
    tokenizer = GrinMoeTokenizer.from_pretrained(tokenizer_folder)
    written = metadata(tmp_path / "model")
    tokens, types = written["tokenizer.ggml.tokens"], written["tokenizer.ggml.token_type"]
    vocabulary = tokenizer.get_vocab()
    assert all(tokens[token_id] == token for token, token_id in vocabulary.items())
    assert len(tokens) == len(types) == len(set(tokens)) == written["phimoe.vocab_size"]
    assert types[-5:] == [gguf.TokenType.UNUSED] * 5
    ids = tokenizer.convert_tokens_to_ids(["<unk>", "</s>", "<|end|>", "<s>", "a"])
    names = ["UNKNOWN", "USER_DEFINED", "CONTROL", "CONTROL", "NORMAL"]
    assert [gguf.TokenType(types[token_id]).name for token_id in ids] == names
    expected = {
        **{"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "eot": ids[2]},
        **{"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id},
    }
    assert {name: written[f"tokenizer.ggml.{name}_token_id"] for name in expected} == expected
    assert written["tokenizer.ggml.add_bos_token"] is False
    assert written["tokenizer.chat_template"] == RELEASED_CHAT_TEMPLATE  # ours has a tag that only transformers knows
    assert report.notes == []


def edit_tokenizer(folder, tokenizer, edit):
    tokenizer.save_pretrained(folder)
    parts = json.loads((folder / "tokenizer.json").read_text())
    edit(parts)
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    return folder


def add_llama_parts(parts, merges):
    """Make it Llama's, of the pieces a, b, ab, aa, aab, and with these merges."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["a", "b", "ab", "aa", "aab"]
    special = len(parts["added_tokens"])
    replace_space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    parts["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace_space]}
    parts["pre_tokenizer"] = None
    vocabulary = {piece: special + i for i, piece in enumerate(pieces)}
    vocabulary |= {token["content"]: token["id"] for token in parts["added_tokens"]}
    parts["model"] |= {"vocab": vocabulary, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}


MERGES = [["a", "b"], ["a", "ab"], ["aa", "b"], ["a", "a"]]
BEGIN_WITH_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda parts: parts["pre_tokenizer"].update(use_regex=False), "no tokenizer like this BPE"),
        (lambda parts: parts.update(normalizer={"type": "NFC"}), "no tokenizer like this BPE"),
        (lambda parts: add_llama_parts(parts, [["a", "b"], ["a", "a"]]), r"'aab' but no merge of \('a', 'ab'\)"),
        (lambda parts: add_llama_parts(parts, MERGES[:2] + MERGES[:1:-1]), "come back to 'aab'"),
        (lambda parts: parts.update(post_processor=BEGIN_WITH_BOS), "adds tokens to every text"),
        (lambda parts: parts.update(model={"type": "Nonsense"}), r"tokenizer.json cannot be read"),
    ],
)
def test_other_tokenizers_are_refused(trained_tokenizer, tmp_path, edit, message):
    checkpoint = make_checkpoint(edit_tokenizer(tmp_path, trained_tokenizer, edit), vocab_size=1024)
    with pytest.raises(ConversionError, match=message):
        export_gguf(checkpoint, tmp_path / "model")


def test_llama_merges_become_scores(trained_tokenizer, tmp_path):
    folder = edit_tokenizer(tmp_path, trained_tokenizer, lambda parts: add_llama_parts(parts, MERGES))
    export_gguf(make_checkpoint(folder, vocab_size=300), tmp_path / "model")
    written = metadata(tmp_path / "model")
    scores = dict(zip(written["tokenizer.ggml.tokens"], written["tokenizer.ggml.scores"], strict=True))
    assert (scores["ab"], scores["aab"], scores["aa"]) == (0, -1, -3)
    assert scores["a"] == scores["<0x00>"] == scores["<|end|>"] < -1000


def test_more_tokens_than_embeddings_are_refused(trained_tokenizer, tmp_path):
    trained_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ConversionError, match=r"token '.*' has the id \d+, and the model only vocab_size=131 embeddings"
    ):
        export_gguf(make_checkpoint(tmp_path), tmp_path / "model")


# --- llama.cpp ------------------------------------------------------------------------------------------------------


class Llama:
    """llama.cpp's model of a file, with a cache in float32, so that it does not hide errors behind its own."""

    def __init__(self, path):
        llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
        types = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        settings = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
        self.llama = llama_cpp.Llama(str(path), **settings, **types, verbose=False)

    def logits(self, input_ids):
        """`[batch, sequence]` -> `[batch, sequence, vocab_size]`."""
        rows = []
        for row in input_ids.tolist():
            self.llama.reset()
            self.llama.eval(row)
            rows.append(torch.tensor(self.llama.scores[: len(row)]))
        return torch.stack(rows)

    def tokenize(self, text, add_special=True):
        return self.llama.tokenize(text.encode(), add_bos=add_special, special=True)


def margins(model, input_ids):
    """`[batch]`: by how much a router logit would have to change, at the least, for a row to get another expert."""
    router_logits = torch.stack(model(input_ids, output_router_logits=True).router_logits)
    top_k = model.config.num_experts_per_tok
    best = router_logits.topk(top_k + 1, dim=-1).values
    return (best[..., -2] - best[..., -1]).reshape(-1, *input_ids.shape).amin(dim=(0, 2))


@torch.inference_mode()
@pytest.mark.slow
def test_llama_cpp_computes_the_model(tmp_path, naive):
    """Rows in which a choice of experts hangs by less than float32's softmax can tell are compared by themselves."""
    checkpoint = make_checkpoint(tmp_path)
    model = reference(checkpoint, torch.float32)
    ids = random_ids(checkpoint.config, 80, 20)
    expected, clear = model(ids).logits, margins(model, ids) > 1e-3
    export_gguf(checkpoint, tmp_path / "model", file_type="f32")
    logits = Llama(tmp_path / "model").logits(ids)
    naive()
    export_gguf(checkpoint, tmp_path / "naive", file_type="f32")
    naive_logits = Llama(tmp_path / "naive").logits(ids)

    assert ids[clear].numel() >= 1000 and clear.double().mean() > 0.8
    assert relative_error(logits[clear], expected[clear]) <= 1e-3
    assert agreement(logits[clear], expected[clear]) >= 0.999
    assert agreement(logits, expected) >= 0.99
    assert relative_error(naive_logits, expected) > 0.3
    assert agreement(naive_logits, expected) < 0.7


@pytest.mark.parametrize("name", ["one expert", "top-3 of 5", "heads of 10", "GShard", "other theta and eps"])
@torch.inference_mode()
@pytest.mark.slow
def test_llama_cpp_computes_every_form(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, **FORMS[name])
    export_gguf(checkpoint, tmp_path / "model", file_type="f32")
    ids = random_ids(checkpoint.config, 2, 24)
    assert relative_error(Llama(tmp_path / "model").logits(ids), reference(checkpoint)(ids).logits) <= 1e-3


@torch.inference_mode()
@pytest.mark.slow
def test_llama_cpp_up_to_the_window(tmp_path):
    checkpoint = make_checkpoint(tmp_path, sliding_window=15)
    limit = export_gguf(checkpoint, tmp_path / "model", file_type="f32").context_length
    ids = random_ids(checkpoint.config, 4, 20)
    logits, expected = Llama(tmp_path / "model").logits(ids), reference(checkpoint)(ids).logits
    assert relative_error(logits[:, :limit], expected[:, :limit]) <= 1e-3
    assert all(relative_error(logits[:, i], expected[:, i]) > 1e-2 for i in range(limit, 20))


@pytest.mark.parametrize(
    ("file_type", "bound"),
    [("f16", 2e-3), ("bf16", 0.015), ("q8_0", 0.05), ("q5_1", 0.25), ("q5_0", 0.25), ("q4_1", 0.4), ("q4_0", 0.4)],
)
@torch.inference_mode()
@pytest.mark.slow
def test_llama_cpp_reads_every_type(tmp_path, file_type, bound):
    """A random model is hard on types, because a choice of experts that turns is a large error: the median counts."""
    checkpoint = make_checkpoint(tmp_path)
    export_gguf(checkpoint, tmp_path / "model", file_type=file_type)
    ids = random_ids(checkpoint.config, 10, 50)
    expected, ours = reference(checkpoint)(ids).logits, load_gguf(tmp_path / "model")(ids).logits
    errors = []
    for logits in (Llama(tmp_path / "model").logits(ids), ours):
        errors.append(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item())
    assert errors[0] < bound
    assert errors[0] < 2 * errors[1]


def hard_texts(seed, count):
    """Pieces of hard texts beside each other, without what llama.cpp does not know: that an added token takes in white
    space beyond ASCII, too."""
    rng = random.Random(seed)
    pieces = [*NAMES, *NAMES, *PLAIN_TEXTS, " ", "  ", "\n", "\n\n", "\t", "'s", "'LL", "don't", "12", "...", "ü"]
    texts = (
        "".join(rng.choice(pieces)[:16] if rng.random() < 0.8 else chr(rng.randint(1, 0x2FF)) for _ in range(6))
        for _ in range(count)
    )
    unknown = re.compile(f"({'|'.join(map(re.escape, NAMES))})[ \\t\\n\\r\\v\\f]*[^\\S\\x00-\\x7f]")
    return [text for text in texts if not unknown.search(text)]


@pytest.mark.slow
def test_llama_cpp_tokenizes_alike(tokenizer_folder, tmp_path):
    export_gguf(small_checkpoint(tokenizer_folder), tmp_path / "model", file_type="f32")
    llama = Llama(tmp_path / "model")
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    texts = HARD_TEXTS + hard_texts(seed=0, count=1000)
    wrong = [text for text in texts if llama.tokenize(text) != raw.encode(text).ids]
    assert not wrong
    chat = GrinMoeTokenizer.from_pretrained(tokenizer_folder).apply_chat_template([USER], tokenize=False)
    assert llama.tokenize(chat, add_special=False) == raw.encode(chat).ids
