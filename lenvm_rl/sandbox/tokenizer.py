"""The sandbox's word-level tokenizer, made in the process: no hub, no files, padding distinct from end-of-sequence."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lenvm_rl.sandbox.task import ANSWER, EOS, LABELS, OPERATIONS, PAD, QUESTION, REDO, VALUES, WAIT

TOKENS = (PAD, EOS, QUESTION, ANSWER, WAIT, REDO, *VALUES, *OPERATIONS, *LABELS)


def sandbox_tokenizer() -> PreTrainedTokenizerFast:
    """A `PreTrainedTokenizerFast` over [`TOKENS`], words split at spaces; pads on the left, as generation needs it."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, padding_side="left", clean_up_tokenization_spaces=False
    )
