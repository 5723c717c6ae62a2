"""Do two models speak of the same tokens? Fingerprints of tokenizers, and checks that refuse what cannot work.

A value model reads token ids and nothing else: what it says about a policy's completion means something only if both
give every id the same token and stop at the same one.
"""

import hashlib
import json

SHOWN_DIFFERENCES = 5


def tokenizer_fingerprint(tokenizer) -> dict:
    """What has to agree for two tokenizers to be the same vocabulary, small enough to live in a model's config.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Added tokens count as part of the vocabulary.

    Returns:
        `dict`: `vocab_size` (the number of tokens, added ones included), `eos_token_id` and `pad_token_id` (`None`
        where there is none), and `sha256`, the digest of the (token, id) pairs sorted by token.
    """
    pairs = sorted(tokenizer.get_vocab().items())
    return {
        "vocab_size": len(pairs),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # JSON with ASCII escapes is the same text everywhere, whatever stands in a token (lone surrogates too).
        "sha256": hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode("ascii")).hexdigest(),
    }


def check_same_tokenizer(ours, theirs, ours_name="the length value model", theirs_name="the policy") -> None:
    """Raise unless both name the same tokens by the same ids and end at the same one.

    Which token pads may differ, because padding is masked out. A vocabulary with one token more is another vocabulary
    all the same.

    Args:
        ours (`PreTrainedTokenizerBase` or `dict`):
            A tokenizer, or the fingerprint of one ([`tokenizer_fingerprint`]).
        theirs (`PreTrainedTokenizerBase` or `dict`):
            The other one. Where both are tokenizers, the error names the first tokens that differ.
        ours_name (`str`, *optional*, defaults to `"the length value model"`):
            What the error calls the first.
        theirs_name (`str`, *optional*, defaults to `"the policy"`):
            What the error calls the second.

    Raises:
        `ValueError`: the vocabularies or the ends of sequence differ; or one of the two is `None` or lacks what a
            fingerprint holds (a model that was made without a tokenizer carries none).
    """
    mine, other = _fingerprint_of(ours, ours_name), _fingerprint_of(theirs, theirs_name)
    differences = []
    if mine["vocab_size"] != other["vocab_size"]:
        differences.append(
            f"{ours_name} has a vocabulary of {mine['vocab_size']} tokens, {theirs_name} one of {other['vocab_size']}"
        )
    if mine["sha256"] != other["sha256"]:
        differences.append(_vocabulary_difference(ours, theirs, ours_name, theirs_name))
    if mine["eos_token_id"] != other["eos_token_id"]:
        differences.append(
            f"the end of sequence is id {mine['eos_token_id']} for {ours_name}, "
            f"id {other['eos_token_id']} for {theirs_name}"
        )
    if differences:
        raise ValueError(
            f"The tokenizers of {ours_name} and {theirs_name} differ: {'; '.join(differences)}. Values are read per "
            "token id, so both have to use the same tokenizer: pretrain the length value model on rollouts of this "
            "policy, with the policy's own tokenizer, or take the policy that it was made for."
        )


def check_pad_is_not_eos(tokenizer) -> None:
    """Raise unless the tokenizer has a pad token and an end-of-sequence token, and they are two.

    With one token for both, a mask made from the pad token drops the end of every completion, and with it the decision
    to stop.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer that pads and ends completions.

    Raises:
        `ValueError`: there is no pad token or no end-of-sequence token, or they are the same.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    advice = (
        "set `tokenizer.pad_token` to a special token of the vocabulary that never occurs in text (many vocabularies "
        "reserve some), for the policy and the length value model alike."
    )
    if eos is None:
        raise ValueError("The tokenizer has no end-of-sequence token, so nothing ever ends: set `tokenizer.eos_token`.")
    if pad is None:
        raise ValueError(f"The tokenizer has no pad token: {advice}")
    if pad == eos:
        raise ValueError(
            f"The pad token and the end-of-sequence token are the same ({tokenizer.eos_token!r}, id {eos}), so the end "
            f"of a completion would be masked as padding: {advice}"
        )


def _fingerprint_of(side, name) -> dict:
    if side is not None and not isinstance(side, dict):
        return tokenizer_fingerprint(side)
    if side is None or not {"vocab_size", "eos_token_id", "sha256"} <= side.keys():
        raise ValueError(
            f"The tokenizer of {name} is not known, so it cannot be compared. Give it when the model is made "
            "(`LengthValueModel.from_backbone(…, tokenizer=tokenizer)`), or set `model.config.tokenizer_fingerprint` "
            "to `tokenizer_fingerprint(tokenizer)` and save the model again."
        )
    return side


def _vocabulary_difference(ours, theirs, ours_name, theirs_name) -> str:
    if isinstance(ours, dict) or isinstance(theirs, dict):
        return "their (token, id) pairs differ"
    mine, other = ({i: token for token, i in side.get_vocab().items()} for side in (ours, theirs))
    differing = [i for i in sorted(mine.keys() | other.keys()) if mine.get(i) != other.get(i)]
    shown = [
        f"id {i} is {mine.get(i)!r} for {ours_name} and {other.get(i)!r} for {theirs_name}"
        for i in differing[:SHOWN_DIFFERENCES]
    ]
    more = ["…"] if len(differing) > SHOWN_DIFFERENCES else []
    return f"{len(differing)} ids differ ({', '.join(shown + more)})"
