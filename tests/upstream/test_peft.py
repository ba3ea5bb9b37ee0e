"""peft's tests of decoders, sequence classifiers and feature extractors."""

import collections
import os
import sys
import types

import peft.utils.constants
from datasets import Dataset, DatasetDict
from models import CAUSAL_LM, CLASSIFIER, FEATURES, FOLDER, KINDS, for_each_kind, hub  # noqa: F401 (hub: a fixture)

# A run that was killed while peft compiled a kernel leaves a lock, on which the next one would wait without an end.
os.environ["TORCH_EXTENSIONS_DIR"] = str(FOLDER / "extensions")

# Methods without target modules take peft's defaults for the architecture; where it has none they are Mixtral's.
for name, table in vars(peft.utils.constants).items():
    if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
        for kind in KINDS:
            table.setdefault(kind, table.get("mixtral", table["llama"]))

# Their common module imports diffusers for tests of image models, which do not run here.
with_images = types.ModuleType("diffusers")
with_images.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules.setdefault("diffusers", with_images)
from peft_tests import (  # noqa: E402
    test_decoder_models,
    test_feature_extraction_models,
    test_seq_classifier,
    testing_utils,
)

if sys.modules["diffusers"] is with_images:
    del sys.modules["diffusers"]

# In place, because the marks of the tests hold these very lists.
test_decoder_models.PEFT_DECODER_MODELS_TO_TEST[:] = test_decoder_models.SMALL_GRID_MODELS[:] = [CAUSAL_LM]
test_seq_classifier.PEFT_SEQ_CLS_MODELS_TO_TEST[:] = [CLASSIFIER]
test_feature_extraction_models.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = [FEATURES]


# A data set of the Hub.
quotes = DatasetDict(train=Dataset.from_dict({"quote": ["Beautiful is better than ugly.", "Now is better."] * 8}))
test_decoder_models.load_dataset_english_quotes = lambda: quotes


class Seen(collections.Counter):
    """Every model counts as downloaded: they go to the Hub for one they have not seen."""

    def __contains__(self, key):
        return True


testing_utils._HUB_MODEL_ACCESSES = Seen()

globals().update(for_each_kind(test_decoder_models.TestDecoderModels))
globals().update(for_each_kind(test_seq_classifier.TestSequenceClassificationModels))
globals().update(for_each_kind(test_feature_extraction_models.TestPeftFeatureExtractionModel))
