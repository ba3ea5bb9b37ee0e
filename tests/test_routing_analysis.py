"""The study of routing, against plain loops, enumeration and closed forms; its files, and the command."""

import itertools
import json
import math
import random
import re
import shlex
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from transformers import PhimoeConfig, PhimoeForCausalLM
from typer.testing import CliRunner

from grin_moe_cli import app
from grin_moe_cli.routing import parse_data
from modeling_grin import GrinMoeForCausalLM, data
from modeling_grin.analysis import (
    RoutingCounts,
    batched,
    collect_routing,
    compare_routing,
    expert_load,
    report,
    routing_similarity,
    specialization,
    token_routing,
    token_rows,
)
from modeling_grin.analysis.specialization import cluster, set_information

EPS = 0.15  # many near-ties
LAYERS, EXPERTS, TOP_K = 2, 6, 2
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def release(trained_tokenizer, tmp_path_factory):
    config = released_config(vocab_size=len(trained_tokenizer), torch_dtype="float32", router_jitter_noise=EPS)
    folder = write_checkpoint(tmp_path_factory.mktemp("release"), config, released_tensors(config))
    trained_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(release):
    return GrinMoeForCausalLM.from_pretrained(release)


@pytest.fixture(scope="module")
def rows(model):
    """Of very different lengths, so that batches have padding."""
    generator = random.Random(0)
    lengths = [1, 40, 3, 17, 29, 2, 8, 23, 5]
    return [[generator.randrange(model.config.vocab_size) for _ in range(length)] for length in lengths]


def route_by_loop(logits):
    """One token by the formula of the release, in float64: its experts, and whether it has a near-tie."""
    left, chosen, near_tie = set(range(len(logits))), [], None
    for _ in range(TOP_K):
        best = max(logits[i] for i in left)
        kept = [i for i in left if (best - logits[i]) / max(abs(logits[i]), best) <= 2 * EPS]
        near_tie = len(kept) > 1 if near_tie is None else near_tie
        chosen.append(max(left, key=lambda i: logits[i]))
        left.remove(chosen[-1])
    return chosen, near_tie


def logits_of(model, rows):
    """[layer][token] -> router logits in float64, one text at a time: no padding."""
    logits = [[] for _ in range(LAYERS)]
    with torch.no_grad():
        for row in rows:
            outputs = model.eval()(torch.tensor([row]), output_router_logits=True)
            for layer, z in zip(logits, outputs.router_logits, strict=True):
                layer += z.double().tolist()
    return logits


@pytest.fixture(scope="module")
def oracle(release, rows, tmp_path_factory):
    """Per layer and token, in float64: stock Phimoe's router logits, and what a plain loop makes of them."""
    folder = tmp_path_factory.mktemp("stock")
    shutil.copy(release / "model.safetensors", folder)
    config = json.loads((release / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "phimoe", "architectures": None}))
    settings = PhimoeConfig.from_pretrained(folder)
    stock = PhimoeForCausalLM.from_pretrained(folder, config=settings, dtype=torch.float32).eval()
    return [[(z, *route_by_loop(z)) for z in layer] for layer in logits_of(stock, rows)]


def batches_of(rows, batch_size):
    """Of rows that are a text each."""
    return batched([(row, True) for row in rows], batch_size)


def test_counts_equal_a_plain_loop(model, rows, oracle):
    counts = collect_routing(model.train(), batches_of(rows, 4))
    assert model.training, "left as it was"
    assert counts.num_tokens == len(oracle[0]) == sum(map(len, rows))
    sums = counts.sums
    near_ties = 0
    for layer, tokens in enumerate(oracle):
        choices, pairs = np.zeros(EXPERTS, int), np.zeros((EXPERTS, EXPERTS), int)
        probs, entropy = np.zeros(EXPERTS), 0.0
        for logits, chosen, near_tie in tokens:
            weights = np.exp(np.array(logits) - max(logits))
            prob = weights / weights.sum()
            probs += prob
            entropy -= (prob * np.log(prob)).sum()
            near_ties += near_tie
            for expert in chosen:
                choices[expert] += 1
            for first, second in itertools.product(chosen, chosen):
                pairs[first, second] += 1
        assert sums.choices[layer].tolist() == choices.tolist()
        assert counts.pairs[layer].tolist() == pairs.tolist()
        assert sums.near_ties[layer].item() == sum(near_tie for *_, near_tie in tokens)
        np.testing.assert_allclose(sums.probs[layer], probs, rtol=1e-5)
        num_tokens = len(tokens)
        np.testing.assert_allclose(counts.load()[layer], choices / (TOP_K * num_tokens))
        np.testing.assert_allclose(sums.near_tie_rate()[layer], sum(n for *_, n in tokens) / num_tokens)
        np.testing.assert_allclose(sums.router_entropy()[layer], entropy / num_tokens / math.log(EXPERTS), rtol=1e-5)
        balance = EXPERTS * (choices / (TOP_K * num_tokens) * probs / num_tokens).sum()
        np.testing.assert_allclose(sums.balance_loss()[layer], balance, rtol=1e-5)
        np.testing.assert_allclose(sums.load_max()[layer], EXPERTS * choices.max() / choices.sum())
        share = choices / choices.sum()
        np.testing.assert_allclose(
            sums.load_entropy()[layer], -(share * np.log(share)).sum() / math.log(EXPERTS), 1e-6
        )
    assert 10 < near_ties < 200, "of both kinds"
    assert torch.equal(expert_load(model, batches_of(rows, 4)), counts.load())


def test_batches_and_their_order_make_no_difference(model, rows):
    reference = collect_routing(model, batches_of(rows, 1))
    shuffled = random.Random(1).sample(rows, len(rows))
    assert shuffled != rows
    for other in (collect_routing(model, batches_of(rows, 9)), collect_routing(model, batches_of(shuffled, 3))):
        assert torch.equal(other.pairs, reference.pairs)
        assert torch.equal(other.sums.near_ties, reference.sums.near_ties)
        torch.testing.assert_close(other.sums.probs, reference.sums.probs, rtol=1e-6, atol=1e-6)
    assert torch.equal(collect_routing(model, batches_of(rows, 9)).chunks(), reference.chunks())


def synthetic(choices, lengths, num_experts=EXPERTS, rows_per_text=1):
    """Counts of rows of one layer: `choices` `[T, K]` are the experts of their tokens, one row after the other."""
    counts, start = RoutingCounts(1, num_experts), 0
    for number, length in enumerate(lengths):
        experts = choices[start : start + length]
        logits = torch.zeros(length, num_experts).scatter(1, experts, 1.0)
        starts = None if rows_per_text == 1 else torch.tensor([number % rows_per_text == 0])
        counts.add((logits,), (experts,), torch.ones(1, length, dtype=torch.bool), 0.01, starts)
        start += length
    return counts


@pytest.mark.parametrize("rows_per_text", [1, 7])
def test_chunks_are_neighbouring_texts(rows_per_text):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (700,), generator=generator).tolist()
    choices = torch.rand(sum(lengths), EXPERTS, generator=generator).topk(TOP_K).indices
    counts = synthetic(choices, lengths, rows_per_text=rows_per_text)
    starts = [0, *itertools.accumulate(lengths)][::rows_per_text]
    size = counts.chunk_tokens
    assert size == 2 ** math.ceil(math.log2((starts[-2] + 1) / 128))
    for asked in (size, 8 * size):
        expected = {}
        for start, end in itertools.pairwise(starts):
            expected.setdefault(start // asked, torch.zeros(EXPERTS, dtype=torch.int64)).index_add_(
                0, choices[start:end].flatten(), torch.ones(TOP_K * (end - start), dtype=torch.int64)
            )
        assert torch.equal(counts.chunks(asked), torch.stack(list(expected.values())).unsqueeze(1))
    assert len(counts.chunks(8 * size)) < len(counts.chunks()) <= 128


def test_expected_pairs():
    """Closed forms: equal loads, weights that are known, and in general the loads that there really are."""
    counts = RoutingCounts(1, EXPERTS)
    counts.pairs = torch.full((1, EXPERTS, EXPERTS), 30)
    equal = counts.expected_pairs()[0]
    assert torch.allclose(equal, 30 * (1 - torch.eye(EXPERTS, dtype=torch.float64)))

    weights = torch.tensor([9, 1, 4, 2, 7, 0])
    counts.pairs = weights[None, :, None] * weights[None, None, :]
    assert torch.allclose(
        counts.expected_pairs()[0], (torch.outer(weights, weights) - weights.square().diag()).double()
    )

    generator = torch.Generator().manual_seed(1)
    choices = torch.randn(500, EXPERTS, generator=generator).add(torch.arange(EXPERTS) / 3).topk(3).indices
    counts = synthetic(choices, [500])
    expected = counts.expected_pairs()[0]
    assert torch.allclose(expected.sum(1), 2 * counts.sums.choices[0]), "each choice of three is in two pairs"
    assert torch.equal(expected, expected.T) and not expected.diagonal().any()
    assert (expected - counts.pairs[0].double()).fill_diagonal_(0).abs().max() > 1, "and it is not what is"


def test_similarity_and_clusters():
    generator = torch.Generator().manual_seed(2)
    sets = {}
    for name, favourites in {"a": [0, 1], "b": [4, 5], "A": [0, 1], "B": [4, 5]}.items():
        logits = torch.randn(200, EXPERTS, generator=generator)
        logits[:, favourites] += 1.5
        sets[name] = synthetic(logits.topk(TOP_K).indices, [200])
    similarity = routing_similarity(sets)
    vectors = [
        counts.pairs.diagonal(dim1=1, dim2=2).flatten().numpy() for counts in sets.values()
    ]  # counts, not loads
    for (i, v), (j, w) in itertools.product(enumerate(vectors), enumerate(vectors)):
        assert similarity[i, j].item() == pytest.approx(v @ w / math.sqrt((v @ v) * (w @ w)))
    tree, order = cluster(similarity)
    names = [list(sets)[i].lower() for i in order]
    assert names in (["a", "a", "b", "b"], ["b", "b", "a", "a"])

    assert tree[0, 2].item() == pytest.approx(1 - max(similarity[0, 2], similarity[1, 3]).item())


def draw(generator, favourite, num_texts, length, strength=0.0, per_text=0.0, rows_per_text=1):
    """Counts of texts whose tokens like a set's favourite expert, and each text one of its own."""
    logits = torch.randn(num_texts, length, EXPERTS, generator=generator)
    logits[:, :, favourite] += strength
    own = torch.randint(EXPERTS, (num_texts,), generator=generator)
    logits += per_text * torch.nn.functional.one_hot(own, EXPERTS).unsqueeze(1)
    rows = [length // rows_per_text] * rows_per_text * num_texts
    return synthetic(logits.flatten(0, 1).topk(TOP_K).indices, rows, rows_per_text=rows_per_text)


def test_specialised_experts_are_found():
    generator = torch.Generator().manual_seed(3)
    sets = {name: draw(generator, expert, 40, 25, strength=2.5) for name, expert in (("x", 1), ("y", 4), ("z", 4))}
    special = specialization(sets, shuffles=199)
    assert special.names == ["x", "y", "z"] and special.num_chunks == [40, 40, 40]
    assert special.false_discovery[0, [1, 4]].max() < 0.05 < 0.2 < special.score[0, 1]
    assert special.deviations[0, 1] > 10
    loads = torch.stack([counts.load()[0] for counts in sets.values()])
    torch.testing.assert_close(special.preference[:, 0], 3 * loads / loads.sum(dim=0))
    assert special.preference[:, 0].argmax(dim=0)[1] == 0

    apart = {
        name: synthetic(torch.tensor(experts).repeat(300, 1), [10] * 30)
        for name, experts in (("x", [0, 1]), ("y", [2, 3]))
    }
    special = specialization(apart, shuffles=199)
    assert special.information[0].tolist() == pytest.approx([1, 1, 1, 1, 0, 0]), (
        "log2 of the sets; 0 where no token is"
    )
    assert special.score[0, :4].min() > 0.95 and special.layer_score.item() > 0.95
    assert special.preference[0, 0].tolist() == pytest.approx([2, 2, 0, 0, 1, 1])


def test_information_has_a_closed_form():
    """Loads of 3/4 and 1/4, from sets of different size."""
    sets = {
        "x": synthetic(torch.tensor([[0]] * 75 + [[1]] * 25), [1] * 100, 2),
        "y": synthetic(torch.tensor([[0]] * 8 + [[1]] * 24), [1] * 32, 2),
    }
    special = specialization(sets, shuffles=9)
    bits = 1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)
    assert special.information[0].tolist() == pytest.approx([bits, bits])
    # A layer's: the sets' Jensen-Shannon divergence.
    loads = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    entropy = -(loads * loads.log2()).sum(dim=1)
    layer = set_information(torch.stack([100 * loads[:1], 32 * loads[1:2], 7 * loads[2:]]))[0, -1].item()
    assert layer == pytest.approx((1 - entropy.mean()).item())


def test_shuffles_equal_enumeration():
    """Three chunks in each of two sets: all 20 ways to deal them."""
    generator = torch.Generator().manual_seed(4)
    sets = {name: draw(generator, 2, 3, 128, strength) for name, strength in (("x", 0.0), ("y", 0.4))}
    for counts in sets.values():
        assert len(counts.chunks()) == 3
    special = specialization(sets, shuffles=4000)
    chunks = torch.cat([counts.chunks() for counts in sets.values()])[:, 0].double().numpy()

    def information(members):
        one = chunks[list(members)].sum(0)
        other = chunks.sum(0) - one
        first, second = one / one.sum(), other / other.sum()
        q = first / (first + second)
        return 1 + q * np.log2(q) + (1 - q) * np.log2(1 - q)

    every = np.array([information(members) for members in itertools.combinations(range(6), 3)])
    observed = information((0, 1, 2))
    np.testing.assert_allclose(special.information[0], observed)
    spread = every.std(axis=0)
    assert (np.abs(special.shuffled[0].numpy() - every.mean(0)) < 5 * spread / math.sqrt(4000)).all()
    np.testing.assert_allclose(special.deviations[0], (observed - every.mean(0)) / spread, atol=0.2)
    np.testing.assert_allclose(special.p_value[0], (every >= observed - 1e-12).mean(0), atol=0.04)  # 5 deviations


@pytest.mark.parametrize("rows_per_text", [1, 2])
def test_alike_sets_have_no_specialised_experts(rows_per_text):
    """Also where the tokens of a text are alike: sets differ by chance then, and tokens must not be shuffled."""
    generator = torch.Generator().manual_seed(5)
    p_values, scores = [], []
    for _ in range(40):
        sets = {name: draw(generator, 0, 30, 40, per_text=4.0, rows_per_text=rows_per_text) for name in "xyz"}
        special = specialization(sets, shuffles=49, seed=len(scores))
        p_values.append(special.p_value)
        scores.append(special.score)
        assert special.information.min() > 0, "which is not 0, though the sets are alike"
    p_values, scores = torch.stack(p_values), torch.stack(scores)
    standard_error = scores.std() / math.sqrt(40)
    assert scores.mean().abs() < 5 * standard_error
    assert (p_values <= 0.05).double().mean() < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 40)  # experts are not independent
    assert abs(p_values.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / 40)


def test_a_single_chunk_proves_nothing():
    generator = torch.Generator().manual_seed(6)
    special = specialization({"x": draw(generator, 0, 1, 50, 3.0), "y": draw(generator, 1, 1, 50, 3.0)}, shuffles=49)
    assert special.p_value.min() == 1 and special.score.abs().max() < 1e-9 and not special.deviations.any()
    with pytest.raises(ValueError, match="at least two"):
        specialization({"x": draw(generator, 0, 1, 50)})
    first, second = draw(generator, 0, 5, 50), draw(generator, 1, 5, 50)
    with pytest.raises(ValueError, match="a sum of counts has no chunks"):
        specialization({"x": first + second, "y": second})


@pytest.fixture(scope="module")
def changed(release, tmp_path_factory):
    """The release with another router in its second layer."""
    folder = tmp_path_factory.mktemp("changed") / "fine-tuned"
    shutil.copytree(release, folder)
    model = GrinMoeForCausalLM.from_pretrained(release)
    generator = torch.Generator().manual_seed(7)
    gate = model.model.layers[1].block_sparse_moe.gate.weight.data
    gate += 0.2 * torch.randn(gate.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def test_comparison(model, changed, rows):
    other = GrinMoeForCausalLM.from_pretrained(changed)
    comparison = compare_routing(model, other, batches_of(rows, 4))
    before, after = (
        [[set(route_by_loop(z)[0]) for z in layer] for layer in logits_of(one, rows)] for one in (model, other)
    )
    for layer in range(LAYERS):
        pairs = list(zip(before[layer], after[layer], strict=True))
        assert comparison.agreement()[layer].item() == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
        overlap = sum(len(a & b) for a, b in pairs) / len(pairs) / TOP_K
        assert comparison.overlap()[layer].item() == pytest.approx(overlap)
        chance = [len(a & b) / TOP_K for a, b in itertools.product(before[layer], after[layer])]
        assert comparison.overlap_by_chance()[layer].item() == pytest.approx(sum(chance) / len(chance))
    assert comparison.agreement()[0] == 1 and 0.2 < comparison.agreement()[1] < 0.9
    torch.testing.assert_close(
        comparison.load_difference(), expert_load(other, batches_of(rows, 4)) - expert_load(model, batches_of(rows, 4))
    )
    assert comparison.load_similarity()[0].item() == pytest.approx(1) and comparison.load_similarity()[1] < 0.9999
    twice = comparison + comparison
    assert torch.equal(twice.agreement(), comparison.agreement()) and twice.before.num_tokens == 2 * len(before[0])
    torch.testing.assert_close(twice.load_difference(), comparison.load_difference())


def test_models_that_cannot_be_compared(model, tmp_path):
    config = released_config(vocab_size=model.config.vocab_size, num_local_experts=4)
    other = GrinMoeForCausalLM.from_pretrained(write_checkpoint(tmp_path, config, released_tensors(config)))
    with pytest.raises(ValueError, match="num_local_experts must be equal in both models; got 6 and 4"):
        compare_routing(model, other, [])
    with pytest.raises(ValueError, match="must hold tokens"):
        compare_routing(model, model, [])


TEXT = "def f(x):\n    return x + 1\n"
MESSAGES = [{"role": "user", "content": "Hi <b>you</b>"}, {"role": "assistant", "content": "Hello!"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_of_texts(trained_tokenizer, tmp_path, monkeypatch):
    tokenizer = trained_tokenizer
    ids = tokenizer(TEXT)["input_ids"]
    chat = tokenizer.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]

    def rows_of(name, *sizes):
        return [row for row, _ in token_rows(name, tokenizer, *sizes)]

    text = write_jsonl(tmp_path / "text.jsonl", [{"text": TEXT * 3}, {"text": ""}, {"text": TEXT}])
    long = tokenizer(TEXT * 3)["input_ids"]
    later = [False] * (math.ceil(len(long) / 7) - 1)
    assert [starts for _, starts in token_rows(text, tokenizer, 7)][: len(later) + 2] == [True, *later, True]
    assert rows_of(text, 7) == [long[i : i + 7] for i in range(0, len(long), 7)] + [
        ids[i : i + 7] for i in range(0, len(ids), 7)
    ]
    assert rows_of(text, 1000) == [long, ids]
    assert rows_of(text, 1000, len(long) + 2) == [long, ids[:2]]
    assert rows_of(text, 1000, len(long)) == [long]
    assert rows_of(write_jsonl(tmp_path / "chat.jsonl", [{"messages": MESSAGES}]), 1000) == [chat]
    pq.write_table(pa.table({"text": [TEXT, TEXT * 3]}), tmp_path / "rows.parquet")
    assert rows_of(str(tmp_path / "rows.parquet"), 1000) == [ids, long]
    (tmp_path / "code").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "code" / name).write_text(TEXT)
    for name in ("code", "code/*.py"):
        assert rows_of(str(tmp_path / name), 1000) == [ids, ids]
    # A text of any length is tokenized in pieces, of whole lines where that is possible.
    monkeypatch.setattr(data, "MAX_PIECE", 20)
    assert list(data.split_text("ab\n" + "c" * 30)) == ["ab\n", "c" * 20, "c" * 10]
    (row,) = rows_of(write_jsonl(tmp_path / "long.jsonl", [{"text": TEXT * 3}]), 1000)
    assert tokenizer.decode(row) == TEXT * 3


def test_unusable_texts(trained_tokenizer, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "?"}])
    empty = write_jsonl(tmp_path / "empty_rows.jsonl", [{"text": ""}])
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"text": "a"}\n{"text": ')
    for name, message in (
        (other, r"other.jsonl has a row with neither messages nor text; its columns are \['question'\]"),
        (empty, "empty_rows.jsonl: there is no text in it"),
        (str(damaged), "damaged.jsonl cannot be read"),
        (f"{tmp_path}/missing.jsonl", "missing.jsonl: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            list(token_rows(name, trained_tokenizer, 10))
    with pytest.raises(ValueError, match=r"names that differ .* got a=y"):
        parse_data(["a=x", "a=y"])
    assert parse_data(["a=x=1.txt"]) == {"a": "x=1.txt"}


def test_pieces_of_tokens(model, trained_tokenizer):
    """Each token's part of the text, also of a character that takes several of them; and its routing."""
    tokenizer = trained_tokenizer
    text = "  if x:\n\tprint('日本 🙂')<|end|>"
    rows = [tokenizer(text)["input_ids"], tokenizer("x = 1")["input_ids"]]
    view = report.view_tokens("t", model, tokenizer, rows)
    assert "".join(view.pieces) == text + "x = 1"
    assert view.pieces.count("") > 4, "bytes"
    assert [token for token, special in zip(view.tokens, view.special, strict=True) if special] == ["<|end|>"]
    assert [i for i, start in enumerate(view.starts) if start] == [len(rows[0])]
    routings = [token_routing(model, torch.tensor(row)) for row in rows]
    logits = logits_of(model, rows[:1])
    for layer in range(LAYERS):
        chosen = [route_by_loop(z)[0] for z in logits[layer]]
        assert routings[0][layer].experts.tolist() == chosen
        assert view.experts[layer] == chosen + routings[1][layer].experts.tolist()
        # The weight of the first choice: softmax over the keep set, by hand.
        for z, weights in zip(logits[layer], view.weights[layer], strict=False):
            kept = [value for value in z if (max(z) - value) / max(abs(value), max(z)) <= 2 * EPS]
            assert weights[0] == pytest.approx(1 / sum(math.exp(value - max(z)) for value in kept), abs=6e-4)


@pytest.fixture(scope="module")
def reported(release, changed, trained_tokenizer, tmp_path_factory):
    """The commands of docs/study_routing.md, run on tiny data: their folder, and what the last one printed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "GRIN-MoE").symlink_to(release)
    (folder / "my-finetune").symlink_to(changed)
    (folder / "src").mkdir()
    for number in range(12):
        (folder / "src" / f"{number}.py").write_text(f"def f{number}(x):\n    return [x * {number}] * {number}\n" * 3)
    (folder / "docs").mkdir()
    for number in range(12):
        (folder / "docs" / f"{number}.md").write_text(
            f"# Page {number}\n\n<script>alert({number})</script> & prose.\n"
        )
    write_jsonl(folder / "chats.jsonl", [{"messages": MESSAGES}] * 5)
    text = (ROOT / "docs" / "study_routing.md").read_text(encoding="utf-8")
    commands = re.findall(r"^grin-moe (.*?)(?:  +#.*)?$", text.replace("\\\n", ""), re.MULTILINE)
    assert len(commands) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            result = CliRunner().invoke(app, shlex.split(command))
            assert result.exit_code == 0, (command, result.output, result.exception)
    return folder, result.stdout


def test_commands_write_what_they_promise(reported, model, trained_tokenizer):
    folder, stdout = reported
    assert (folder / "regret" / "regret.csv").is_file()
    names = {path.name for path in (folder / "before-and-after").iterdir()}
    tables = {"load", "layers", "pairs", "similarity", "specialization", "comparison", "load_difference"}
    pictures = {"expert_load", "expert_load_by_set", "similarity", "specialization", "layers", "pairs",
                "load_difference", "agreement"}  # fmt: skip
    files = {f"{name}.csv" for name in tables} | {f"{name}.png" for name in pictures}
    assert names == files | {"report.html"}, "and no temporary files"
    for name in pictures:
        assert (folder / "before-and-after" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(stdout)
    assert set(summary["sets"]) == {"code", "prose"} and len(summary["agreement"]["code"]) == LAYERS


def test_report_is_one_file(reported):
    folder = reported[0]
    page = (folder / "before-and-after" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page, "texts are escaped"
    assert "&lt;" in page and page.count("data:image/png;base64,") == 8
    assert not re.findall(r'(?:src|href)="(?!data:|[\w-]+\.(?:png|svg|csv)")[^"]*"', page), "nothing from elsewhere"
    views = json.loads(re.search(r'id="routing">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(views) == 4, "both sets in both models"
    shown = re.findall(r'<pre class="text"(?: hidden)?>(.*?)</pre>', page, re.DOTALL)
    for view, text in zip(views, shown, strict=True):
        assert len(view["experts"]) == LAYERS
        assert text.count("<span") == len(view["tokens"]) == len(view["experts"][0]) == len(view["weights"][1])


def test_single_set_of_a_phimoe_checkpoint(reported, release, tmp_path, monkeypatch):
    """Nothing to compare with: no similarity and no specialisation, and no error."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(release, "phimoe")
    config = json.loads((release / "config.json").read_text())
    Path("phimoe/config.json").write_text(json.dumps({**config, "model_type": "phimoe"}))
    write_jsonl(Path("chats.jsonl"), [{"messages": MESSAGES}] * 3)
    result = CliRunner().invoke(app, ["routing", "phimoe", "--data", "chats=chats.jsonl", "--dtype", "float32"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "routing/report.html" in result.stdout and "chats" in result.stdout
    assert str(tmp_path) not in Path("routing/report.html").read_text(encoding="utf-8")
    assert not Path("routing/similarity.csv").exists() and Path("routing/pairs.png").is_file()
    result = CliRunner().invoke(app, ["routing", "phimoe", "--data", "chats=chats.jsonl", "--sequence", "5000"])
    assert isinstance(result.exception, ValueError)
    assert "--sequence must be at most 4096, the model's context; got 5000" in str(result.exception)


def test_memory_does_not_grow_with_the_tokens():
    choices = torch.arange(TOP_K).repeat(50, 1)

    def memory(num_rows):
        tracemalloc.start()
        counts = synthetic(choices[:1].expand(num_rows, -1), [1] * num_rows)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size, sum(value.nbytes for value in vars(counts).values() if isinstance(value, torch.Tensor))

    (few, few_bytes), (many, many_bytes) = memory(200), memory(1000)
    assert many_bytes == few_bytes and many < few + 20_000
