"""The same calls on a tiny GRIN-MoE and on stock Phimoe with the same weights: both work alike, or ours refuses.

A case is a function of a copy of a model. What it returns for the two must be equal; where stock works and ours
raises, the sentence is listed with the case. What stock refuses, ours may do.
"""

import copy
import pickle
from dataclasses import fields, is_dataclass

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PhimoeForCausalLM,
    PhimoeForSequenceClassification,
    PhimoeModel,
    StaticCache,
    WatermarkingConfig,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from modeling_grin import GrinMoeForCausalLM, GrinMoeForSequenceClassification, GrinMoeModel

CONFIG = released_config(
    model_type="phimoe", architectures=["PhimoeForCausalLM"], auto_map={}, torch_dtype="float32", sliding_window=None,
    head_dim=8, bos_token_id=2, eos_token_id=1, pad_token_id=0, num_labels=3,
)  # fmt: skip
CLASSES = {
    "lm": (GrinMoeForCausalLM, PhimoeForCausalLM),
    "classifier": (GrinMoeForSequenceClassification, PhimoeForSequenceClassification),
    "decoder": (GrinMoeModel, PhimoeModel),
}
IDS = torch.randint(3, 131, (2, 10), generator=torch.Generator().manual_seed(1))
LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0
PADDED = IDS.masked_fill(LEFT == 0, 0)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])  # positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = released_tensors(CONFIG) | {"score.weight": torch.randn(3, 32, generator=torch.manual_seed(5))}
    return write_checkpoint(tmp_path_factory.mktemp("both"), CONFIG, tensors)


@pytest.fixture(scope="module")
def pairs(folder):
    found = {}
    for kind, (ours, stock) in CLASSES.items():
        found[kind] = [model_class.from_pretrained(folder).eval() for model_class in (ours, stock)]
        found[kind][0].config.router_sampling, found[kind][0].config.input_jitter_noise = False, 0.0
    return found


def plain(value):
    """A result as nested dicts, lists and tensors; of a cache its length."""
    if isinstance(value, Cache):
        return {"cache": value.get_seq_length()}
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def assert_alike(ours, stock, where=""):
    """All of `stock` is in `ours`; of dicts, ours may have more."""
    if isinstance(stock, dict):
        assert stock.keys() <= ours.keys(), where
        for key in stock.keys() - {"aux_loss"}:  # stock's is over all layers' tokens together
            assert_alike(ours[key], stock[key], f"{where}.{key}")
    elif isinstance(stock, list):
        assert len(ours) == len(stock), where
        for index, pair in enumerate(zip(ours, stock, strict=True)):
            assert_alike(*pair, f"{where}[{index}]")
    elif isinstance(stock, torch.Tensor):
        assert ours.dtype == stock.dtype, where
        tolerance = 2e-4 if stock.dtype in (torch.float32, torch.float64) else 0.1
        torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == stock, where


def run(case, model):
    torch.manual_seed(0)
    try:
        return plain(case(copy.deepcopy(model)))
    except Exception as error:
        return error


def check(case, pair, refused=None):
    ours, stock = (run(case, model) for model in pair)
    if refused is not None:
        assert isinstance(ours, (ValueError, TypeError)), ours
        assert refused in str(ours)
    elif isinstance(stock, Exception):
        return  # what stock refuses is not this test's subject
    elif isinstance(ours, Exception):
        raise ours
    else:
        assert_alike(ours, stock)


def cases(*listed):
    """`(id, function)` or `(id, function, sentence with which ours refuses)`."""
    return pytest.mark.parametrize(
        ("case", "refused"), [pytest.param(*(*entry[1:], None)[:2], id=entry[0]) for entry in listed]
    )


# Forward passes


def forward(**kwargs):
    def call(model):
        with torch.no_grad():
            return model(**{"input_ids": IDS, **kwargs})

    return call


def continued(model):
    with torch.no_grad():
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        return model(IDS[:, 6:], past_key_values=cache, attention_mask=torch.ones_like(IDS))


def embeddings(model):
    return model.get_input_embeddings()(IDS)


def embedded(model, **kwargs):
    with torch.no_grad():
        return model(inputs_embeds=embeddings(model), **kwargs)


def configured(**settings):
    def call(model):
        for name, value in settings.items():
            setattr(model.config, name, value)
        return forward()(model)

    return call


SHARED = [
    ("ids", forward()),
    ("positional", lambda model: model(IDS, LEFT)),
    ("left padding", forward(input_ids=PADDED, attention_mask=LEFT)),
    ("right padding", forward(input_ids=PADDED.flip(1), attention_mask=LEFT.flip(1))),
    ("position_ids", forward(position_ids=torch.arange(3, 13).expand(2, -1))),
    ("packed", forward(input_ids=IDS[:1], position_ids=PACKED, use_cache=False)),
    ("4-D mask", forward(attention_mask=torch.zeros(2, 1, 10, 10).masked_fill(torch.ones(10, 10).triu(1) > 0, -1e9))),
    ("inputs_embeds", embedded),
    ("both inputs", lambda model: embedded(model, input_ids=IDS)),
    ("use_cache", forward(use_cache=True)),
    ("no cache", forward(use_cache=False)),
    ("continued", continued),
    ("hidden states", forward(output_hidden_states=True)),
    ("attentions", forward(output_attentions=True)),
    ("router logits", forward(output_router_logits=True)),
    ("tuple", forward(return_dict=False, use_cache=False)),
    ("config: hidden states", configured(output_hidden_states=True)),
    ("config: router logits", configured(output_router_logits=True)),
    ("a misspelt keyword", forward(attention_masks=LEFT), "attention_masks"),
    ("an unknown keyword", forward(token_type_ids=LEFT), "token_type_ids"),
]


@pytest.mark.parametrize("kind", ["decoder", "lm", "classifier"])
@cases(*SHARED)
def test_forward(kind, case, refused, pairs):
    check(case, pairs[kind], refused)


LABELS = IDS.masked_fill(LEFT == 0, -100)
SHIFTED = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], dim=1)


@cases(
    ("labels", forward(labels=LABELS)),
    ("labels and mask", forward(input_ids=PADDED, attention_mask=LEFT, labels=LABELS)),
    ("num_items_in_batch", forward(labels=LABELS, num_items_in_batch=torch.tensor(30))),
    ("shift_labels", forward(labels=LABELS, shift_labels=SHIFTED)),
    ("labels and tuple", forward(labels=LABELS, return_dict=False, use_cache=False)),
    ("logits_to_keep", forward(logits_to_keep=3)),
    ("logits of positions", forward(logits_to_keep=torch.tensor([1, 4]))),
    ("all outputs", forward(labels=LABELS, output_hidden_states=True, output_attentions=True)),
    ("no gradient of labels", lambda model: model(IDS, labels=LABELS).loss.requires_grad),
)
def test_language_model(case, refused, pairs):
    check(case, pairs["lm"], refused)


@cases(
    ("classes", forward(labels=torch.tensor([0, 2]))),
    ("left padding", forward(input_ids=PADDED, attention_mask=LEFT, labels=torch.tensor([0, 2]))),
    ("right padding", forward(input_ids=PADDED.flip(1), attention_mask=LEFT.flip(1))),
    ("padding without a mask", forward(input_ids=PADDED.flip(1))),
    ("many labels", forward(labels=torch.tensor([[0.0, 1, 1], [1, 0, 0]]))),
)
def test_classifier(case, refused, pairs):
    for model in pairs["classifier"]:
        model.config.problem_type = None  # the first labels decide it
    check(case, pairs["classifier"], refused)


# Generation


class Forbid(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(60), -torch.inf)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.tokens.append("end")


def generate(ids=IDS, **kwargs):
    def call(model):
        return model.generate(ids, **{"max_new_tokens": 6, "do_sample": False, "disable_compile": True, **kwargs})

    return call


def with_model(**makers):
    """Arguments that are made of the model."""
    return lambda model: generate(**{name: make(model) for name, make in makers.items()})(model)


def streamed(model):
    streamer = Collect()
    generate(IDS[:1], streamer=streamer)(model)
    return streamer.tokens


def turns(model, cache):
    """A conversation over one cache: the second turn goes on from all that was said."""
    said = generate(IDS, past_key_values=cache, return_dict_in_generate=True)(model)
    ids = torch.cat([said.sequences, IDS[:, :3]], dim=1)
    return generate(ids, past_key_values=said.past_key_values)(model)


def transitions(model):
    outputs = generate(num_beams=2, return_dict_in_generate=True, output_scores=True)(model)
    return model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)


ALL_OUTPUTS = dict.fromkeys(
    ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions"), True
)


@cases(
    ("greedy", generate()),
    ("without a cache", generate(use_cache=False)),
    ("left padding", generate(PADDED, attention_mask=LEFT)),
    ("no prompt", lambda model: model.generate(max_new_tokens=4, do_sample=False)),
    ("inputs_embeds", with_model(ids=lambda model: None, inputs_embeds=embeddings)),
    ("sampled", generate(do_sample=True)),
    ("sampled with warpers", generate(do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, typical_p=0.9)),
    ("beams", generate(num_beams=3, num_return_sequences=2, length_penalty=0.8, early_stopping=True)),
    ("return sequences", generate(do_sample=True, num_return_sequences=3)),
    ("prompt lookup", generate(IDS[:1].repeat(1, 3), prompt_lookup_num_tokens=3)),
    ("assisted by itself", lambda model: generate(IDS[:1], assistant_model=copy.deepcopy(model))(model)),
    ("allowed tokens", generate(prefix_allowed_tokens_fn=lambda batch, ids: [7, 8, 9 + len(ids) % 3])),
    ("processor", generate(logits_processor=LogitsProcessorList([Forbid()]))),
    ("penalties", generate(repetition_penalty=1.3, no_repeat_ngram_size=2, encoder_repetition_penalty=1.1)),
    ("bad words", generate(bad_words_ids=[[7]], suppress_tokens=[9], begin_suppress_tokens=[8], min_new_tokens=3)),
    ("guidance", generate(guidance_scale=1.5, negative_prompt_ids=IDS[:, :4])),
    ("watermark", generate(watermarking_config=WatermarkingConfig(bias=2.5))),
    ("several ends", generate(eos_token_id=list(range(1, 90)), pad_token_id=0)),
    ("a config", generate(generation_config=GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0))),
    ("prefill in chunks", generate(prefill_chunk_size=4)),
    ("all outputs", generate(**ALL_OUTPUTS)),
    ("transition scores", transitions),
    ("router logits", generate(output_router_logits=True)),
    ("streamer", streamed),
    ("an unknown keyword", generate(nonsense=1)),
    ("static cache", generate(cache_implementation="static")),
    ("offloaded cache", generate(cache_implementation="offloaded")),
    ("own static cache", with_model(past_key_values=lambda model: StaticCache(config=model.config, max_cache_len=32))),
    ("turns", lambda model: turns(model, DynamicCache(config=model.config))),
    ("turns in a static cache", lambda model: turns(model, StaticCache(config=model.config, max_cache_len=40))),
    ("beams in a static cache", generate(num_beams=2, cache_implementation="static")),
)
def test_generate(case, refused, pairs):
    check(case, pairs["lm"], refused)


# The model as an object


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def changed(change):
    """What a change of a copy does to logits and sizes."""

    def case(model):
        result = change(model)
        model = result if isinstance(result, nn.Module) and hasattr(result, "config") else model
        ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        return {
            "logits": logits(model, IDS % 100),
            "vocab_size": model.config.vocab_size,
            "shapes": [list(weight.shape) for weight in ends],
            "tied": ends[0] is ends[1],
            "size": sum(parameter.numel() for parameter in model.parameters()),
        }

    return case


def resized(*args, **kwargs):
    def change(model):
        model.resize_token_embeddings(*args, **kwargs)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):  # new rows are drawn
            layer.weight.data[131:] = 0.1
        if model.lm_head.bias is not None:
            model.lm_head.bias.data[131:] = 0.2

    return changed(change)


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model = type(model)(model.config)  # the keys to tie are decided when a model is built
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.01)
    return model


def new_embeddings(model):
    embeddings, head = nn.Embedding(150, 32), nn.Linear(32, 150)
    for parameter in (*embeddings.parameters(), *head.parameters()):
        nn.init.constant_(parameter, 0.1)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)


def own_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean()
    return model(IDS, labels=IDS).loss


def gradients(prepare):
    """The norm of every gradient, but the routers', which have an estimator."""

    def case(model):
        prepare(model)
        model(IDS, labels=IDS).loss.backward()
        return {
            name: parameter.grad.norm() for name, parameter in model.named_parameters()
            if parameter.grad is not None and "norm" in name
        }  # fmt: skip

    return case


@cases(
    ("nothing", changed(lambda model: None)),
    ("more tokens", resized(140)),
    ("more, of a multiple, not of the mean", resized(133, pad_to_multiple_of=8, mean_resizing=False)),
    ("tied", changed(tied)),
    ("new embeddings", changed(new_embeddings)),
    ("deepcopy", changed(copy.deepcopy)),
    ("pickle", changed(lambda model: pickle.loads(pickle.dumps(model)))),
    ("eager attention", changed(lambda model: model.set_attn_implementation("eager"))),
    ("eager experts", changed(lambda model: model.set_experts_implementation("eager"))),
    ("state dict", changed(lambda model: model.load_state_dict(model.state_dict()) and None)),
    ("gradients", gradients(lambda model: None)),
    ("checkpointing", gradients(lambda model: (model.gradient_checkpointing_enable(), model.train(False)))),
    ("reentrant checkpointing", gradients(lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}))),
    ("parameters", lambda model: [model.num_parameters(), model.num_parameters(exclude_embeddings=True)]),
    ("own loss", own_loss),
)
def test_object(case, refused, pairs):
    check(case, pairs["lm"], refused)


# Loading and saving


def saved_with(load_settings=None, **settings):
    def case(model, tmp_path):
        if "state_dict" in settings:
            settings["state_dict"] = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, **settings)
        names = sorted(path.name for path in tmp_path.iterdir() if "-of-" not in path.name)
        if not settings.get("is_main_process", True):
            return names
        return {"names": names, "logits": logits(type(model).from_pretrained(tmp_path, **(load_settings or {})))}

    return case


@cases(
    ("plain", saved_with()),
    ("shards", saved_with(max_shard_size="50KB")),
    ("variant", saved_with({"variant": "fp16"}, variant="fp16")),
    ("sharded variant", saved_with({"variant": "fp16"}, variant="fp16", max_shard_size="50KB")),
    ("state_dict", saved_with(state_dict=None)),
    ("not the main process", saved_with(is_main_process=False)),
    ("as it is in memory", saved_with(save_original_format=False)),
)
def test_save_pretrained(case, refused, pairs, tmp_path):
    number = iter(range(2))
    check(lambda model: case(model, tmp_path / str(next(number))), pairs["lm"], refused)


def loaded_with(**settings):
    def case(model, folder):
        given = {name: value(model) if callable(value) else value for name, value in settings.items()}
        made = type(model).from_pretrained(None if "state_dict" in given else folder, **given)
        made, info = made if isinstance(made, tuple) else (made, None)
        return {
            "logits": logits(made),
            "dtype": made.dtype,
            "info": info and {name: sorted(map(str, keys)) for name, keys in info.items()},
            "training": made.training,
            "settings": [made.config._attn_implementation, made.config.use_cache, made.config.num_experts_per_tok],
            "generation": made.generation_config.to_diff_dict() if "generation_config" in given else None,
            "device_map": getattr(made, "hf_device_map", None),
        }

    return case


@cases(
    ("plain", loaded_with()),
    ("dtype", loaded_with(dtype=torch.bfloat16)),
    ("auto dtype", loaded_with(dtype="auto")),
    ("overrides", loaded_with(use_cache=False, num_experts_per_tok=2)),
    ("config", loaded_with(config=lambda model: copy.deepcopy(model.config))),
    ("an unknown keyword", loaded_with(nonsense=1)),
    ("state_dict", loaded_with(state_dict=lambda model: model.state_dict(), config=lambda model: model.config)),
    ("device_map", loaded_with(device_map="cpu")),
    ("device_map auto", loaded_with(device_map="auto")),
    ("eager", loaded_with(attn_implementation="eager")),
    ("unknown attention", loaded_with(attn_implementation="nonsense")),
    ("eager experts", loaded_with(experts_implementation="eager")),
    ("batched experts", loaded_with(experts_implementation="batched_mm")),
    ("key_mapping", loaded_with(key_mapping={"^lm_head": "lm_head"})),
    ("info", loaded_with(output_loading_info=True)),
    ("pickles", loaded_with(use_safetensors=False), "use_safetensors=False would load a pickle"),
    ("generation_config", loaded_with(generation_config=GenerationConfig(max_new_tokens=3))),
    ("mismatched", loaded_with(ignore_mismatched_sizes=True)),
)
def test_from_pretrained(case, refused, pairs, folder):
    check(lambda model: case(model, folder), pairs["lm"], refused)


def test_the_harness_sees_a_difference(pairs):
    """Another norm, and a key that is not there."""
    ours, stock = pairs["lm"]
    other = copy.deepcopy(ours)
    other.model.norm.weight.data += 0.01
    with pytest.raises(AssertionError):
        check(forward(), [other, stock])
    with pytest.raises(AssertionError):
        assert_alike({"a": torch.ones(2)}, {"a": torch.ones(2), "b": 1})
