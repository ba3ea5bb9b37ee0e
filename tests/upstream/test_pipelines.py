"""transformers' pipeline tests on tiny local models, by the two methods that its common tests call."""

import importlib

import pytest
import torch
from models import checkpoint, for_each_kind
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("tests.pipelines", reason="pipeline tests need TRANSFORMERS_CHECKOUT")

TASKS = {
    "TextGeneration": ("text_generation", AutoModelForCausalLM),
    "TextClassification": ("text_classification", AutoModelForSequenceClassification),
    "ZeroShotClassification": ("zero_shot", AutoModelForSequenceClassification),
    "FeatureExtraction": ("feature_extraction", AutoModel),
}


class TestPipeline:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("task", TASKS)
    def test_pipeline(self, task, dtype):
        module, head = TASKS[task]
        module = importlib.import_module(f"tests.pipelines.test_pipelines_{module}")
        theirs = getattr(module, f"{task}PipelineTests")()
        folder = checkpoint(self.kind, head)
        model = head.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=20_000)  # they expect longer input to fail
        pipeline, examples = theirs.get_test_pipeline(model, tokenizer=tokenizer, dtype=dtype)
        theirs.run_pipeline_test(pipeline, examples)


globals().update(for_each_kind(TestPipeline))
del TestPipeline
