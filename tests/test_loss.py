"""The chunked cross-entropy: equal to transformers' loss of whole logits, gradients included."""

import copy
import dataclasses

import pytest
import torch
from accelerate.utils import convert_to_fp32
from models import tiny_model
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.measure import peak_memory
from modeling_grin.kernels import chunked_loss
from modeling_grin.kernels.chunked_loss import SkippedLogits, chunked_causal_lm_loss

V, H = 131, 32


@pytest.fixture(autouse=True, params=[7, 1024], ids=["many chunks", "one chunk"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", request.param)


def make_model(**settings):
    return tiny_model(num_hidden_layers=1, **settings).train()


def make_batch(seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(V, (3, 15))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)}


def make_head(bias):
    torch.manual_seed(2)
    head = nn.Linear(H, V, bias=bias, dtype=torch.float64)
    return head, torch.randn(3, 15, H, dtype=torch.float64, requires_grad=True), make_batch()["labels"]


def losses(head, hidden_states, labels, **kwargs):
    """Both losses with their gradients, of `2.5 * loss`."""
    for loss in (
        chunked_causal_lm_loss(hidden_states, head, labels, **kwargs),
        reference(head(hidden_states), labels, **kwargs),
    ):
        learnt = [p for p in (hidden_states, *head.parameters()) if p.requires_grad]
        yield loss, *torch.autograd.grad(2.5 * loss, learnt)


def reference(logits, labels, num_items_in_batch=None, shift_labels=None):
    """By hand in float64; transformers rounds logits to float32."""
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    log_probs = logits[:, : targets.shape[1]].log_softmax(-1)
    chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    return -chosen.sum() / (len(chosen) if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize(("bias", "frozen"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_items_in_batch": 17},
        {"num_items_in_batch": torch.tensor(17)},
        {"shift_labels": make_batch(2)["labels"]},
    ],
    ids=["mean", "a number", "a tensor", "shifted"],
)
def test_equals_the_closed_form_in_float64(bias, frozen, kwargs):
    head, hidden_states, labels = make_head(bias)
    head.requires_grad_(not frozen)
    for actual, expected in zip(*losses(head, hidden_states, labels, **kwargs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_no_labels_at_all():
    head, hidden_states, labels = make_head(True)
    loss = chunked_causal_lm_loss(hidden_states, head, labels.fill_(-100), num_items_in_batch=5)
    loss.backward()
    assert loss == 0 and (hidden_states.grad == 0).all() and (head.weight.grad == 0).all()
    assert chunked_causal_lm_loss(hidden_states, head, labels).isnan(), "the mean of nothing, as in transformers"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_training_has_the_loss_of_its_logits(tied, autocast):
    model, batch, found = make_model(tie_word_embeddings=tied), make_batch(), []
    for skip_logits in (None, False):
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = model(**batch, skip_logits=skip_logits)
        assert isinstance(outputs.logits, torch.Tensor) == (skip_logits is False)
        outputs.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"loss": outputs.loss.detach()})
    tolerance = 0.03 if autocast else 1e-5
    for name, expected in found[1].items():
        assert found[0][name].dtype == torch.float32
        assert (found[0][name] - expected).norm() <= tolerance * expected.norm() + 1e-7, name


def test_evaluation_has_logits_unless_they_are_skipped():
    model, batch = make_model().eval(), make_batch()
    outputs = model(**batch)
    assert outputs.logits.shape == (3, 15, V)
    skipped = model(**batch, skip_logits=True)
    assert skipped.logits is None and skipped.loss.item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    with torch.no_grad():
        assert model(**batch, skip_logits=True).loss == skipped.loss
        assert isinstance(model.train()(**batch).logits, torch.Tensor), (
            "no gradients are made of a loss that has no backward pass"
        )


@pytest.mark.parametrize(
    "read",
    [
        lambda outputs: outputs.logits[..., :-1, :],
        lambda outputs: torch.nn.functional.cross_entropy(outputs.to_tuple()[1], torch.zeros(3)),
        lambda outputs: copy.deepcopy(outputs[1]) / 2,
        lambda outputs: dataclasses.replace(outputs).logits.view(-1, V),  # FSDP's way with outputs
        lambda outputs: convert_to_fp32(outputs).logits.shape,  # accelerate's
    ],
)
def test_using_skipped_logits_says_how_to_get_them(read):
    outputs = make_model()(**make_batch())
    assert repr(outputs)
    with pytest.raises(AttributeError, match="skip_logits=False"):
        read(outputs)


def test_what_is_not_a_plain_head_keeps_its_logits():
    model, batch = make_model(), make_batch()
    handle = model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, ForCausalLMLoss(outputs.logits, batch["labels"], V))
    handle.remove()
    assert isinstance(model(**batch).logits, SkippedLogits)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    outputs = model(**batch)
    assert outputs.loss == outputs.logits.sum()


def test_a_second_backward_pass_is_refused():
    loss = make_model()(**make_batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_bfloat16_loss_has_the_digits_of_float32():
    torch.manual_seed(4)
    head = nn.Linear(H, V, dtype=torch.bfloat16)
    hidden_states = torch.randn(4, 200, H, dtype=torch.bfloat16)
    labels = torch.randint(V, (4, 200))
    loss = chunked_causal_lm_loss(hidden_states, head, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(head(hidden_states).double(), labels).item(), rel=1e-6)


def test_whole_logits_are_never_in_memory(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 32)
    head = nn.Linear(H, 2000)
    hidden_states = torch.randn(2, 512, H, requires_grad=True)
    labels = torch.randint(2000, (2, 512))
    logits_bytes = 4 * 2 * 512 * 2000
    chunked = peak_memory(lambda: chunked_causal_lm_loss(hidden_states, head, labels).backward())
    whole = peak_memory(lambda: ForCausalLMLoss(head(hidden_states), labels, 2000).backward())
    assert chunked < 0.3 * logits_bytes < 2 * logits_bytes <= whole
