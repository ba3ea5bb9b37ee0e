"""Cached decoding and `generate`: against full forward passes, and against loops and searches written out here."""

import itertools
import json
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from models import assert_close, random_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    cache_utils,
    pipeline,
)

from modeling_grin import (
    GrinMoeForCausalLM,
    GrinMoeForSequenceClassification,
    GrinMoeModel,
)
from modeling_grin.compat_grinmoe import CACHE

pytestmark = pytest.mark.usefixtures("far_from_ties")
WINDOW, LENGTH = 7, 30
END_OF_TEXT, ASSISTANT, END_OF_TURN, USERS_OWN = 32000, 32001, 32007, 5
build = partial(tiny_model, sliding_window=WINDOW)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex_attention compiles for every mask: 6 s each
        yield


@pytest.fixture
def cpu_streams(monkeypatch):
    """Let offloaded caches run without a GPU: they copy layers on a CUDA stream, where a CPU has nothing to copy."""
    monkeypatch.setattr(torch, "Stream", lambda device=None: MagicMock())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: MagicMock())


CACHES = {
    "made by the model": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic, unaware of the window": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
    "offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "offloaded static": lambda config: StaticCache(
        config=config, max_cache_len=LENGTH, offloading=True, offload_only_non_sliding=False
    ),
}
STEPS = {
    "one by one": [5] + [1] * 25,
    "from just beyond the window's edge": [WINDOW + 1] + [1] * 22,
    "in chunks": [5, 10, 15],
    "in mixed chunks": [1, 6, 2, 1, 9, 1, 1, 9],
}


ATTENTION_AND_CACHE = [
    *itertools.product(("eager", "sdpa"), CACHES),
    *itertools.product(["flex_attention"], ["made by the model", "dynamic, unaware of the window"]),  # static: refused
]


def cached_logits(model, ids, cache, steps, mask=None, position_ids=None):
    logits, end = [], 0
    for step in ids.split(steps, dim=1):
        start, end = end, end + step.shape[1]
        own = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": position_ids[:, start:end]}
        outputs = model(step, past_key_values=cache, use_cache=True, **own)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("window", "padding"), [(WINDOW, None), (None, None), (WINDOW, (0, 3, 12))], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("attention", "cache"), ATTENTION_AND_CACHE)
def test_cached_decoding_equals_full_passes(cpu_streams, attention, cache, steps, window, padding):
    """Of each row by itself, if rows are padded on the left."""
    model, ids = build(attention, sliding_window=window), random_ids(3, LENGTH)
    cache = CACHES[cache](model.config)
    if padding is None:
        assert_close(cached_logits(model, ids, cache, STEPS[steps]), model(ids, use_cache=False).logits)
        return
    mask = torch.stack([torch.arange(LENGTH) >= start for start in padding]).long()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` makes them
    logits = cached_logits(model, ids, cache, STEPS[steps], mask, position_ids)
    for row, row_mask in enumerate(mask.bool()):
        assert_close(logits[row, row_mask], model(ids[row : row + 1, row_mask], use_cache=False).logits[0])


@pytest.mark.parametrize("cache", ["made by the model", "dynamic", "static"])
def test_caches_keep_the_keys_that_the_next_query_sees_and_no_more(cache):
    """The released W = 7 keys beside the query's own; a static cache holds that one, too."""
    model = build()
    outputs = model(random_ids(1, LENGTH), past_key_values=CACHES[cache](model.config), use_cache=True)
    expected = WINDOW + 1 if cache == "static" else WINDOW
    assert [layer.keys.shape[2] for layer in outputs.past_key_values.layers] == [expected] * 2


def test_quantised_caches_are_transformers_own_and_know_no_window(monkeypatch):
    """Refused with a window. Without one they change what their 8 bits do, and nothing where they keep all bits."""
    ids = random_ids(2, LENGTH)
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "max_new_tokens": 9}
    with pytest.raises(ValueError, match="only supported for models with only full attention"):
        build().generate(ids, **settings)
    model = build(sliding_window=None)
    cache, expected = cache_utils.QuantizedCache("fp8", model.config), model(ids).logits
    logits = cached_logits(model, ids, cache, [20] + [1] * 10)
    assert 1e-3 < (logits - expected).norm() / expected.norm() < 0.1
    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, max_new_tokens=9))


@pytest.mark.parametrize("window", [WINDOW, None])
def test_flex_attention_with_a_static_cache_is_refused(window):
    """`check_flex_attention` says why."""
    model, ids = build("flex_attention", sliding_window=window), random_ids(1, 5)
    with pytest.raises(ValueError, match="flex_attention cannot use a static cache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=LENGTH))
    with pytest.raises(ValueError, match="flex_attention cannot use a static cache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_keywords_of_trainers_attention_and_transformers_are_known(attention):
    """Of all that transformers' own types list; of an attention implementation only what it takes."""
    ids, lengths = random_ids(1, 3), torch.tensor([0, 3])
    known = dict.fromkeys(("output_hidden_states", "output_attentions", "is_causal", "return_dict"), True)
    known.update(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=3, max_length_k=3, seq_idx=ids * 0)
    known.update(num_items_in_batch=torch.tensor(2), shift_labels=ids)
    if attention != "eager":
        del known["output_attentions"]
    model = build(attention)
    model(ids, labels=ids, **known, token_type_ids=None)  # asks for nothing
    options = {"kernel_options": {"BLOCK_M": 16}, "softcap": None}
    if attention == "flex_attention":
        model(ids, **options)
    else:
        with pytest.raises(TypeError, match="keywords that it does not know: kernel_options"):
            model(ids, **options)


@pytest.mark.parametrize("model_class", [GrinMoeModel, GrinMoeForCausalLM, GrinMoeForSequenceClassification])
def test_cache_goes_by_either_name(model_class):
    """`past_key_values`, and `cache` since transformers 5.24."""
    torch.manual_seed(0)
    model, ids = model_class(build(num_hidden_layers=1).config).eval(), random_ids(2, 9)
    result = "last_hidden_state" if model_class is GrinMoeModel else "logits"
    whole = model(ids)[result]
    whole = whole if model_class is GrinMoeForSequenceClassification else whole[:, 5:]
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        outputs = model(ids[:, :5], use_cache=True, **{name: cache})
        assert outputs[CACHE] is cache
        mask = torch.ones_like(ids)
        assert_close(model(ids[:, 5:], attention_mask=mask, use_cache=True, **{name: cache})[result], whole)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, past_key_values=cache, cache=cache)


# --- generate --------------------------------------------------------------------------------------------------------

PROMPT, NEW_TOKENS = 5, 20  # the window ends within the new tokens


@pytest.fixture
def prompts():
    """A left-padded batch: ids and mask."""
    ids, mask = random_ids(3, PROMPT + 6), torch.ones(3, PROMPT + 6, dtype=torch.long)
    mask[1, :3] = mask[2, :6] = 0
    return ids * mask, mask


def continue_by_hand(model, ids, mask):
    """The greedy continuations of full forward passes without padding or cache."""
    rows = [row[row_mask.bool()][None] for row, row_mask in zip(ids, mask, strict=True)]
    for _ in range(NEW_TOKENS):
        rows = [torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], dim=1) for row in rows]
    return torch.stack([row[0, -NEW_TOKENS:] for row in rows])


def generate(model, ids, mask, **settings):
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **settings)
    assert torch.equal(output[:, : ids.shape[1]], ids)
    return output[:, ids.shape[1] :]


@pytest.mark.parametrize(
    ("attention", "settings"),
    [
        *itertools.product(
            ["eager", "sdpa", "flex_attention"],
            [{}, {"use_cache": False}, {"cache_implementation": "offloaded"}, {"prefill_chunk_size": 4}],
        ),
        *itertools.product(
            ["eager", "sdpa"], [{"cache_implementation": "static"}, {"cache_implementation": "offloaded_static"}]
        ),
    ],
    ids=str,
)
def test_greedy_generation_equals_a_loop_of_full_forwards(cpu_streams, prompts, attention, settings):
    model = build(attention)
    by_hand = continue_by_hand(model, *prompts)
    assert len(by_hand.unique()) > 5
    assert torch.equal(generate(model, *prompts, do_sample=False, **settings), by_hand)


@pytest.mark.parametrize("with_ids", [False, True], ids=["embeddings", "ids and embeddings"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prefill_chunk_size": 4}],
    ids=str,
)
def test_generation_from_embeddings_equals_generation_from_ids(prompts, settings, with_ids):
    model, (ids, mask) = build(), prompts
    expected = generate(model, ids, mask, do_sample=False, **settings)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    if with_ids:  # what they are does not matter: the embeddings stand for them
        inputs["input_ids"] = ids.flip(1)
    elif "prefill_chunk_size" in settings:
        with pytest.raises(ValueError, match="prefill_chunk_size divides input_ids"):
            model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
        return
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
    assert output.shape[1] == NEW_TOKENS + with_ids * ids.shape[1]
    assert torch.equal(output[:, -NEW_TOKENS:], expected)


@pytest.mark.parametrize("helper", ["assistant", "prompt lookup"])
def test_speculative_generation_gives_greedy_output(helper):
    model, ids = build(), random_ids(1, PROMPT).repeat(1, 3)
    settings = {"assistant_model": build(seed=1)} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    mask = torch.ones_like(ids)
    greedy = generate(model, ids, mask, do_sample=False)
    assert torch.equal(generate(model, ids, mask, do_sample=False, **settings), greedy)


# --- where generation stops ------------------------------------------------------------------------------------------


GENERATION_CONFIGS = {  # generation_config.json -> the tokens that generation stops at
    "none": (None, [END_OF_TEXT, END_OF_TURN]),
    "<|endoftext|>": ({"eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}, [END_OF_TEXT, END_OF_TURN]),
    "list of <|endoftext|>": ({"eos_token_id": [END_OF_TEXT]}, [END_OF_TEXT, END_OF_TURN]),
    "the Phi-3 list": ({"eos_token_id": [END_OF_TEXT, ASSISTANT, END_OF_TURN]}, [END_OF_TEXT, ASSISTANT, END_OF_TURN]),
    "the user's own": ({"eos_token_id": [USERS_OWN, END_OF_TURN]}, [USERS_OWN, END_OF_TURN]),
    "the user's own one": ({"eos_token_id": USERS_OWN}, USERS_OWN),
}


@pytest.mark.parametrize("case", GENERATION_CONFIGS)
def test_generation_of_a_loaded_checkpoint_stops_at_these_tokens_only(tmp_path, case):
    """With the released vocabulary; the head's bias makes the model say one token for ever."""
    generation_config, stops = GENERATION_CONFIGS[case]
    config = released_config(torch_dtype="float32", vocab_size=32064, hidden_size=16, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "released", config, released_tensors(config))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    model, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), random_ids(1, 4)
    assert model.generation_config.eos_token_id == stops
    for token in (END_OF_TEXT, END_OF_TURN, ASSISTANT, USERS_OWN):
        model.lm_head.bias.zero_()[token] = 1000
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, pad_token_id=0)
        length = 1 if token in (stops if isinstance(stops, list) else [stops]) else 3
        assert output[0, 4:].tolist() == [token] * length


# --- pipeline --------------------------------------------------------------------------------------------------------


def test_text_generation_pipeline_on_chat_messages(trained_tokenizer):
    stops = trained_tokenizer.stop_token_ids
    model = build(vocab_size=len(trained_tokenizer), pad_token_id=trained_tokenizer.pad_token_id, seed=2)
    model.generation_config.eos_token_id = stops
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}],
        [{"role": "user", "content": "def f(x):"}],
    ]
    answers = pipeline("text-generation", model=model, tokenizer=trained_tokenizer)(
        chats, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    for chat, answer in zip(chats, answers, strict=True):
        prompt = trained_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"]
        by_hand = continue_by_hand(model, ids, torch.ones_like(ids))[0].tolist()
        end = next((i for i, token in enumerate(by_hand) if token in stops), NEW_TOKENS)
        text = trained_tokenizer.decode(by_hand[:end], skip_special_tokens=True)
        assert answer[0]["generated_text"] == [*chat, {"role": "assistant", "content": text}]
        assert text


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_continuous_batching_equals_generate(attention, window):
    """Requests of several lengths, more than a forward pass holds, within the released window and beyond."""
    model = build(attention, sliding_window=window)
    requests = [random_ids(1, length)[0].tolist() for length in (3, 9, 5, 20)]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    blocks = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, max_memory_percent=0.01)
    generation_config = GenerationConfig(**settings)
    answers = model.generate_batch(requests, generation_config, continuous_batching_config=blocks)
    answers = sorted(answers.values(), key=lambda answer: requests.index(answer.prompt_ids))
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([request])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **{**settings, "eos_token_id": None})
        assert answer.generated_tokens == expected[0, len(request) :].tolist()
