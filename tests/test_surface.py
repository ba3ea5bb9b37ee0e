"""What callers see of the models, beside stock Mixtral: signatures, own heads, odd batches, skipped logits."""

import inspect

import pytest
import torch
from checkpoints import fused, released_config, released_tensors, write_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
)
from transformers import initialization as init
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_grin import (
    GrinMoeConfig,
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    GrinMoeModel,
    GrinMoePreTrainedModel,
)

CONFIG = released_config(torch_dtype="float32", bos_token_id=2, eos_token_id=1, pad_token_id=0)
TENSORS = released_tensors(CONFIG)
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG, TENSORS, num_shards=2)


@pytest.fixture
def model(checkpoint):
    return GrinMoeForCausalLM.from_pretrained(checkpoint, router_sampling=False, input_jitter_noise=0.0)


# Signatures


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        (MixtralModel, GrinMoeModel),
        (MixtralForCausalLM, GrinMoeForCausalLM),
        (MixtralForSequenceClassification, GrinMoeForSequenceClassification),
    ],
)
def test_forward_names_what_stock_names_in_its_order(stock, ours):
    """peft and Trainer look for names; callers give the first by position."""
    names = [name for name in inspect.signature(stock.forward).parameters if name != "kwargs"]
    names = ["past_key_values" if name == "cache" else name for name in names]  # as 5.24 names it; ours has both
    assert list(inspect.signature(ours.forward).parameters)[: len(names)] == names


def test_router_logits_of_the_config_can_be_left_out(model):
    model.config.output_router_logits = True
    assert model(IDS).router_logits is not None
    assert model(IDS, output_router_logits=False).router_logits is None


# Heads of one's own


class TokenClassifier(GrinMoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = GrinMoeModel(config)
        self.classifier = nn.Sequential(nn.Linear(config.hidden_size, 8), nn.Tanh(), nn.Linear(8, 5))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return self.classifier(self.model(input_ids, **kwargs).last_hidden_state)


class ValueModel(GrinMoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))
        self.model = GrinMoeModel(config)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:  # transformers loads into empty memory, and a new parameter would stay that
            init.ones_(self.scale)


class Probe(GrinMoeModel):
    """A decoder that has grown: what may be missing is listed, as in transformers."""

    _keys_to_ignore_on_load_missing = [r"^probe\."]

    def __init__(self, config):
        super().__init__(config)
        self.probe = nn.Linear(config.hidden_size, 2)
        self.post_init()


@pytest.mark.parametrize("bare", [False, True], ids=["language model", "decoder alone"])
@pytest.mark.parametrize(
    ("model_class", "prefix", "new"),
    [
        (TokenClassifier, "model.", {f"classifier.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")}),
        (ValueModel, "model.", {"scale"}),
        (Probe, "", set()),
        (GrinMoeForCausalLM, "model.", {"lm_head.weight", "lm_head.bias"}),
        (GrinMoeForSequenceClassification, "model.", {"score.weight"}),
    ],
)
def test_a_head_that_the_file_has_nothing_of_is_new(model_class, prefix, new, bare, checkpoint, tmp_path):
    if bare:
        GrinMoeModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
        checkpoint = tmp_path
        released = {name.removeprefix("model.") for name in TENSORS if name.startswith("model.")}
        assert load_file(tmp_path / "model.safetensors").keys() == released
    elif model_class is GrinMoeForCausalLM:
        new = set()
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as log:
        model, info = model_class.from_pretrained(checkpoint, output_loading_info=True)
    assert info["missing_keys"] == new
    assert all(name.split(".")[0] in log.out for name in new), "told in the report"
    for name, tensor in fused(TENSORS, CONFIG).items():
        if name.startswith("model."):
            assert torch.equal(model.state_dict()[prefix + name.removeprefix("model.")], tensor), name
    model.save_pretrained(tmp_path / "again")
    again, info = model_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model_class", "lost"),
    [
        (TokenClassifier, "model.norm.weight"),
        (TokenClassifier, "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
        (TokenClassifier, "classifier.2.bias"),  # a part of a head
        (ValueModel, "model.layers.0.self_attn.q_proj.weight"),
        (Probe, "embed_tokens.weight"),
        (GrinMoeForCausalLM, "lm_head.bias"),
    ],
)
def test_a_decoder_or_a_head_in_part_is_an_error(model_class, lost, tmp_path):
    made = model_class(GrinMoeConfig.from_dict(dict(CONFIG)))
    made.save_pretrained(tmp_path / "whole")

    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    named = "gate_up_proj: an expert lacks a matrix" if ".experts." in lost else f"{lost} is missing"
    with pytest.raises(ValueError, match=named):
        model_class.from_pretrained(tmp_path / "whole")


def test_mismatched_sizes_are_made_anew_where_that_is_asked_for(checkpoint):
    """A larger vocabulary: embedding and head, and nothing else, as stock does."""
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as log:
        model, info = GrinMoeForCausalLM.from_pretrained(
            checkpoint, vocab_size=140, ignore_mismatched_sizes=True, output_loading_info=True
        )
    names = {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    assert {name for name, *_ in info["mismatched_keys"]} == names
    assert log.out.count("MISMATCH") >= 3
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(CONFIG["initializer_range"], rel=0.2)
    for name, tensor in fused(TENSORS, CONFIG).items():
        assert name in names or torch.equal(model.state_dict()[name], tensor), name
    # Experts of another size, all of them.
    _, info = GrinMoeModel.from_pretrained(
        checkpoint, intermediate_size=16, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 4


# Odd batches


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("call", ["forward", "training", "embeddings", "generate", "sample", "classify"])
def test_a_batch_without_rows_or_tokens_is_refused_by_a_sentence(call, shape, checkpoint, model):
    """Stock fails inside: it cannot reshape nothing. Nor can attention here."""
    ids = torch.zeros(shape, dtype=torch.long)
    classifier = GrinMoeForSequenceClassification(model.config) if call == "classify" else None
    calls = {
        "forward": lambda: model(ids, attention_mask=torch.ones_like(ids), output_router_logits=True),
        "training": lambda: model.train()(ids, labels=ids),
        "embeddings": lambda: model(inputs_embeds=torch.zeros(*shape, 32)),
        "generate": lambda: model.generate(ids, max_new_tokens=2, do_sample=False),
        "sample": lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=True),
        "classify": lambda: classifier(ids, attention_mask=torch.ones_like(ids)),
    }
    with pytest.raises(ValueError, match=rf"one row and one token; got a batch of {shape[0]} rows and {shape[1]} tok"):
        calls[call]()


# Quantisers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("experts", [None, "linear"])
def test_a_quantiser_on_a_loaded_model_is_told_what_it_leaves(experts, checkpoint):
    model = GrinMoeForCausalLM.from_pretrained(checkpoint, experts_implementation=experts)
    logger = logging.get_logger("modeling_grin.linear_experts_grinmoe")
    type(logger).warning_once.cache_clear()
    with CaptureLogger(logger) as log:
        model(IDS)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "gate"]))
        adapted(input_ids=IDS)
    assert not log.out
    model = torch.ao.quantization.quantize_dynamic(adapted.unload(), {nn.Linear})
    with CaptureLogger(logger) as log:
        model(IDS)
        model(IDS)
    assert log.out.count('experts_implementation="linear"') == (experts is None)
    assert log.out.count("routers (`block_sparse_moe.gate`) were quantised") == 1


def test_a_decoder_that_the_file_has_under_another_name_is_an_error(checkpoint):
    class Renamed(GrinMoePreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.backbone = GrinMoeModel(config)
            self.post_init()

    with pytest.raises(ValueError, match=r"backbone\.embed_tokens\.weight is missing"):
        Renamed.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"layers\.1\.\S+ is not part of the model"):
        GrinMoeModel.from_pretrained(checkpoint, num_hidden_layers=1)


@torch.no_grad()
def test_exported_programs_compute_the_same(model):
    """For batches and sequences of any size."""
    model.config.use_cache = False
    sizes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (), {"input_ids": IDS}, dynamic_shapes=sizes).module()
    for ids in (IDS, IDS.reshape(3, 8)):
        torch.testing.assert_close(program(input_ids=ids).logits, model(ids).logits)


def test_onnx_computes_the_same(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    shapes = ({0: "batch", 1: "sequence"},)
    torch.onnx.export(Logits(), (IDS,), dynamo=True, dynamic_shapes=shapes).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for ids in (IDS, IDS.reshape(3, 8)):
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(ids).logits.detach(), rtol=1e-5, atol=1e-5)
