"""transformers' tokenizer tests on GrinMoeTokenizer, and on transformers' plain class with the same vocabulary."""

import unittest

import tests.test_tokenization_common as common
import tokenizers
from models import OURS, checkpoint, for_each_kind
from sources import STAND_INS
from tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin
from transformers import TokenizersBackend

from modeling_grin import GrinMoeTokenizer

common.get_tests_dir = lambda: STAND_INS  # of `fixtures/sample_text.txt`, which the sdist lacks


class LocalVocabulary:
    from_pretrained_vocab_key = "tokenizer_file"

    @classmethod
    def setUpClass(cls):
        cls.tokenizer_class = cls.rust_tokenizer_class = GrinMoeTokenizer if cls.kind == OURS else TokenizersBackend
        cls.from_pretrained_id = str(checkpoint(cls.kind))
        super().setUpClass()


class Tokenizer(LocalVocabulary, common.TokenizerTesterMixin):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # The integration tests expect what the tokenizers library itself makes of the vocabulary.
        plain = tokenizers.Tokenizer.from_file(str(checkpoint(cls.kind) / "tokenizer.json"))
        encoding = plain.encode(cls.integration_test_input_string)
        cls.integration_expected_tokens = cls.expected_tokens_from_ids = encoding.tokens
        cls.integration_expected_token_ids = encoding.ids
        cls.integration_expected_decoded_text = plain.decode(encoding.ids, skip_special_tokens=False)


class TokenizerBackend(LocalVocabulary, TokenizersBackendTesterMixin):
    pass


globals().update(for_each_kind(Tokenizer, unittest.TestCase))
globals().update(for_each_kind(TokenizerBackend, unittest.TestCase))
del TokenizersBackendTesterMixin
