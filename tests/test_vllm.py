"""vLLM's plugin on real vLLM (`make test-vllm`): the released layout as it is, against forward passes in float64."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment of its own")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from endpoints import served, streamed
from parity import LONGROPE_SCALING
from reference import reference_logits
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

from modeling_grin import GrinMoeForCausalLM
from modeling_grin.generation_grinmoe import END_OF_TEXT_ID, END_OF_TURN_ID
from modeling_grin.publishing.card import write_card

LIMIT = 1e-4  # of a log-probability
LENGTHS = (40, 2600)  # within the released window, and beyond it
SIZES = {  # vLLM's kernels want multiples of 32
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "torch_dtype": "float32",
}  # fmt: skip
NO_BIASES = {"attention_bias": False, "lm_head_bias": False}
CASES = {
    "released": {},
    "noise 0.1, top-1, no biases": {"router_jitter_noise": 0.1, "num_experts_per_tok": 1, **NO_BIASES},
    "noise 0.1, top-3": {"router_jitter_noise": 0.1, "num_experts_per_tok": 3},
    "top-3, no biases": {"num_experts_per_tok": 3, **NO_BIASES},
    "noise 0.1, top-2, tied, GShard": {
        "router_jitter_noise": 0.1, "tie_word_embeddings": True, "router_estimator": "gshard"
    },
    "top-1, no window": {"num_experts_per_tok": 1, "sliding_window": None, "lm_head_bias": False},
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "import <|end|> sys"}]
VOCABULARY, TOKENS = 32064, 12  # the release's, and an answer's at most
RUNNING: list[LLM] = []
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
SCORE = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)


def write(folder, seed=0, **changes):
    """A checkpoint in the released layout, and its config and tensors."""
    config = released_config(**{**SIZES, **changes})
    tensors = released_tensors(config, seed)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:  # rounding errors do not grow from layer to layer, and logits are a trained model's
            tensor *= 0.2 if name == "model.embed_tokens.weight" else 0.5
    return write_checkpoint(folder, config, tensors, num_shards=2), config, tensors


def start(folder, **options):
    """A model in vLLM, with all defaults of the tests; another one that runs is ended."""
    end()
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 3000, "skip_tokenizer_init": True}
    RUNNING.append(LLM(str(folder), **{**defaults, "enable_prefix_caching": False, **options}))
    return RUNNING[-1]


def end():
    """End what runs, with vLLM's process groups and its tables of RoPE, which are the process's."""
    while RUNNING:
        RUNNING.pop().llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    _ROPE_DICT.clear()


def random_ids(length, seed=2):
    return torch.randint(0, SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(llm, prompts, parameters):
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)


def score(llm, ids):
    """vLLM's log-probability of each token of a prompt but the first."""
    steps = ask(llm, [ids], SCORE)[0].prompt_logprobs[1:]
    return torch.tensor([step[i].logprob for step, i in zip(steps, ids[1:], strict=True)], dtype=torch.float64)


def gather(logits, ids):
    return logits.double().log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def expected(folder, ids, dtype=torch.float64):
    """The same by a forward pass. With other seeds, rounding to float32 may turn a router's choice."""
    model = GrinMoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return gather(model(torch.tensor([ids])).logits[0], ids)


def assert_exact(llm, folder, lengths=LENGTHS):
    """vLLM's log-probabilities are those of float64, as are transformers' in float32."""
    for length in lengths:
        ids = random_ids(length)
        exact = expected(folder, ids)
        error, own = ((found - exact).abs().max() for found in (score(llm, ids), expected(folder, ids, torch.float32)))
        print(f"{length} tokens: {error:.1e}, transformers {own:.1e}")
        assert max(error, own) < LIMIT


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_equal_float64(name, tmp_path):
    folder, config, tensors = write(tmp_path, **CASES[name])
    llm = start(folder)
    assert_exact(llm, folder)
    if config.get("router_estimator") is None:
        ids = random_ids(LENGTHS[0])
        by_loops = gather(reference_logits(config, tensors, ids), ids)
        assert (score(llm, ids) - by_loops).abs().max() < LIMIT


def test_greedy_generation_equals_generate_alone_and_under_load(tmp_path):
    """64 tokens on 8 prompts as `generate`; 32 requests at once, of all lengths, each as it is alone."""
    folder, *_ = write(tmp_path)
    llm = start(folder)
    prompts = [random_ids(5 + 7 * n, seed=n) for n in range(32)]
    alone = [list(ask(llm, [ids], GREEDY)[0].outputs[0].token_ids) for ids in prompts]
    assert [list(result.outputs[0].token_ids) for result in ask(llm, prompts, GREEDY)] == alone
    model = GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, tokens in list(zip(prompts, alone, strict=True))[:8]:
        answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64, eos_token_id=-1)
        assert answer[0, len(ids) :].tolist() == tokens


def test_routers_record_the_experts_that_they_choose(tmp_path):
    """vLLM returns experts from these records, and has no other way on GPUs; its CPU build returns none."""
    folder, *_ = write(tmp_path)
    runner = start(folder).llm_engine.model_executor.driver_worker.worker.model_runner
    router, recorded = runner.model.model.layers[0].block_sparse_moe.experts.router, []
    router.set_capture_fn(recorded.append)
    logits = torch.randn(50, SIZES["num_local_experts"], generator=torch.Generator().manual_seed(0))
    router.select_experts(hidden_states=torch.empty(50, SIZES["hidden_size"]), router_logits=logits)
    assert torch.equal(recorded[0].long(), logits.topk(2).indices)


def test_prefix_cache_chunks_and_compilation_change_nothing(tmp_path):
    """vLLM's defaults: compiled, prompts in chunks, prefixes reused."""
    folder, *_ = write(tmp_path)
    llm = start(folder, enforce_eager=False, enable_prefix_caching=True, max_num_batched_tokens=256)
    ids = [*random_ids(600), 3]
    ask(llm, [ids[:-1]], SCORE)
    assert_exact(llm, folder, [600])
    again = ask(llm, [ids], SamplingParams(logprobs=0, max_tokens=1, temperature=0.0, detokenize=False))[0]
    assert again.num_cached_tokens > 500
    token = again.outputs[0].token_ids[0]
    assert abs(again.outputs[0].logprobs[0][token].logprob - expected(folder, [*ids, token])[-1]) < LIMIT


@pytest.mark.skipif(os.cpu_count() < 2, reason="vLLM binds each rank to a core")
def test_tensor_parallelism_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder, *_ = write(tmp_path, **NO_BIASES)
    assert_exact(start(folder, tensor_parallel_size=2), folder)


def test_longrope_as_far_as_vllm_has_it(tmp_path):
    """Long factors for all, if the longest context is beyond the original length; the release takes them by length."""
    rope = {**LONGROPE_SCALING, "short_factor": [1.0 + n / 9 for n in range(16)]}
    rope |= {"long_factor": [1.5 + n / 2 for n in range(16)], "original_max_position_embeddings": 64}
    folder, *_ = write(tmp_path, rope_scaling=rope, max_position_embeddings=512)
    for longest, length in ((64, 40), (512, 200)):
        assert_exact(start(folder, max_model_len=longest), folder, [length])


@pytest.fixture
def release_that_ends_its_turn(trained_tokenizer, tmp_path):
    """A checkpoint with the release's vocabulary and stop tokens; a prompt; `generate`'s answer, as tokens and text.

    It says <|end|> where it would have said its fourth token. It says no tokens that the small tokenizer lacks.
    """
    folder, config, tensors = write(tmp_path / "release", vocab_size=VOCABULARY, eos_token_id=END_OF_TEXT_ID)
    trained_tokenizer.save_pretrained(folder)
    inputs = trained_tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )

    def answer():
        write_checkpoint(folder, config, tensors, num_shards=2)
        model = GrinMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    tensors["lm_head.bias"][len(trained_tokenizer) :] = -100.0
    fourth = answer()[3]
    for name in ("lm_head.weight", "lm_head.bias"):
        tensors[name][[fourth, END_OF_TURN_ID]] = tensors[name][[END_OF_TURN_ID, fourth]]
    tokens = answer()
    assert tokens.index(END_OF_TURN_ID) == len(tokens) - 1 == 3
    return folder, inputs["input_ids"][0].tolist(), tokens, trained_tokenizer.decode(tokens[:-1])


def test_the_cards_command_serves_chats_as_generate_answers_them(release_that_ends_its_turn):
    """The released template before, <|end|> after; whole or streamed, by OpenAI's API over HTTP."""
    folder, prompt, tokens, text = release_that_ends_its_turn
    card = Path(write_card(folder).path).read_text()
    (command,) = re.findall(r"^vllm (serve .+)$", card, re.MULTILINE)
    as_vllm = folder.parent / "vllm-0+cpu.dist-info"  # the command asks for its version, and vllm-cpu has none
    as_vllm.mkdir()
    (as_vllm / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    paths = os.pathsep.join(filter(None, [str(folder.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    options = shlex.split(f"{command} --dtype float32 --enforce-eager --max-model-len 256")
    body = {"model": folder.name, "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    with served([Path(sys.executable).with_name("vllm"), *options], folder.parent, env=environment) as complete:
        whole = json.loads(complete(**body, return_token_ids=True))
        (choice,) = whole["choices"]
        assert (whole["prompt_token_ids"], choice["token_ids"]) == (prompt, tokens)
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert streamed(complete(**body, stream=True)) == text
        assert json.loads(complete(**{**body, "max_tokens": 2}))["choices"][0]["finish_reason"] == "length"


def test_chats_stop_at_the_end_of_a_turn(tiny_release, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    config = json.loads((tiny_release / "config.json").read_text()) | {"eos_token_id": 32000, "vocab_size": 32064}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for written, stops in ((None, [32000, 32007]), (32000, [32000, 32007]), ([32000, 5], [32000, 5])):
        if written is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True)
        assert arguments.create_model_config().try_get_generation_config()["eos_token_id"] == stops


def test_an_output_scale_is_refused(tmp_path):
    folder, *_ = write(tmp_path, moe_output_scale=True)
    with pytest.raises(Exception, match="moe_output_scale must be false for vLLM"):
        start(folder)
