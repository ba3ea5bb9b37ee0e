"""Label smoothing under Trainer, which shifts labels for the classes that it finds by name.

Expected values: stock Phimoe's logits in float64, and the smoothed cross-entropy written out.
"""

import pytest
import torch
from checkpoints import released_config, released_tensors, write_checkpoint
from peft import PromptTuningConfig, get_peft_model
from runs import Rows, make_model, make_trainer
from transformers import PhimoeConfig, PhimoeForCausalLM, Trainer

from modeling_grin import GrinMoeForCausalLM, GrinMoeForSequenceClassification
from modeling_grin.training import GrinMoeTrainer, add_lora

EPSILON = 0.1
ROUTED_ALIKE = {"torch_dtype": "float32", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}


class Storyteller(GrinMoeForCausalLM):
    """A subclass whose name says nothing of what it is."""


def batch():
    rows = Rows().rows[:8]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def smoothed_loss(logits, labels):
    """The mean over tokens that have a label after them of (1 - e) (-log p_label) + e mean_v(-log p_v), float64."""
    losses = [
        (1 - EPSILON) * -log_probs[label] + EPSILON * -log_probs.mean()
        for row, row_labels in zip(logits.double().log_softmax(-1), labels, strict=True)
        for log_probs, label in zip(row[:-1], row_labels[1:], strict=True)
        if label != -100
    ]
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Stock Phimoe with `make_model`'s weights."""
    config = released_config(**ROUTED_ALIKE, eos_token_id=2, model_type="phimoe")
    config["sliding_window"] += 1
    folder = write_checkpoint(tmp_path_factory.mktemp("stock"), config, released_tensors(config, 3))
    config = PhimoeConfig.from_pretrained(folder)
    return PhimoeForCausalLM.from_pretrained(folder, config=config, experts_implementation="eager")


@pytest.fixture(scope="module")
def expected(stock):
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = stock.eval().double()(**inputs).logits
    stock.float()
    return smoothed_loss(logits, labels)


def losses(tmp_path, model, trainer_class=Trainer, **arguments):
    """The loss of a step of two micro-batches, and of an evaluation on one batch, with nothing learnt in between."""
    trainer = make_trainer(
        tmp_path, model, trainer_class=trainer_class, accumulation=2, micro_batch=4, max_steps=1, learning_rate=0.0,
        label_smoothing_factor=EPSILON, logging_steps=1, eval_dataset=Rows(8), **arguments,
    )  # fmt: skip
    trainer.train()
    (training,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return training, trainer.evaluate()["eval_loss"]


def subclassed():
    model = Storyteller(make_model().config)
    model.load_state_dict(make_model().state_dict())
    return model


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (None, {}),
        (make_model, {}),
        (make_model, {"trainer_class": GrinMoeTrainer}),
        (lambda: add_lora(make_model(), r=2), {}),
        (lambda: add_lora(make_model(), r=2), {"trainer_class": GrinMoeTrainer}),
        (subclassed, {}),
        (subclassed, {"trainer_class": GrinMoeTrainer}),
    ],
    ids=["stock", "Trainer", "GrinMoeTrainer", "LoRA", "LoRA, GrinMoeTrainer", "subclass", "subclass, GrinMoeTrainer"],
)  # fmt: skip
def test_the_smoothed_loss_is_of_the_next_token(tmp_path, stock, expected, build, arguments):
    """Of a step and of an evaluation. Not shifted, it would be that of copying the input."""
    found = losses(tmp_path, stock if build is None else build(), **arguments)
    assert found == pytest.approx((expected, expected), rel=2e-5)


def test_virtual_tokens_have_no_labels(tmp_path):
    """peft's prompts lengthen the logits; labels are those of the tokens that were given."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[:, 3:]
    _, found = losses(tmp_path, model, GrinMoeTrainer)
    assert found == pytest.approx(smoothed_loss(logits, labels), rel=2e-5)


def test_a_subclass_by_any_name_has_its_loss(tmp_path, stock):
    """Without smoothing, too: transformers takes the loss, and Trainer the number of labels, from the class's name."""
    losses = []
    for model in (stock, subclassed()):
        trainer = make_trainer(tmp_path, model, trainer_class=Trainer, accumulation=2, micro_batch=4, max_steps=1,
                               learning_rate=0.0, logging_steps=1)  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    class Judge(GrinMoeForSequenceClassification):
        pass

    judge = Judge(make_model(num_labels=3).config)
    inputs, classes = batch(), torch.arange(8) % 3
    output = judge(inputs["input_ids"], inputs["attention_mask"], labels=classes)
    expected = -output.logits.double().log_softmax(-1)[torch.arange(8), classes].mean()
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
