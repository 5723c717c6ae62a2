"""Which words or tokens make a completion longer, and which shorter (arXiv 2604.27039, section 5 and equation 16).

    python -m eval.length_tokens --rollouts rollouts.jsonl --length_value_model outputs/length_value_model
    python -m eval.length_tokens --policy outputs/policy --length_value_model outputs/length_value_model  # the sandbox

The horizon shift of a token is what choosing it added to the expected length, in value and in tokens. A word's is that
of all its tokens: their sum in tokens, and in value their sum discounted to where the word begins. With `--unit word`,
the default, pieces of a word or number are joined and written without blanks around them; `--unit token` keeps pieces
apart. Words are ranked by their mean over all occurrences, in every completion, cut ones included; the end-of-sequence
token counts like any other, and the value after it is exactly 0. Intervals are 95 % bootstraps over prompts, one word
at a time: the ends of a ranking of many words are partly luck, so trust an interval that stays on its side of 0, and
raise --min_count.

Prints a table and writes length_tokens.json (with contexts), length_tokens.csv (every one that occurs) and
length_tokens.png (word clouds: a word is larger for a larger product of count and mean shift; what is blank has no
place there). Without --rollouts, completions of the sandbox's evaluation prompts are sampled.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg
from wordcloud import WordCloud

from eval.datasets import RolloutArguments, find_rollouts
from eval.report import Column, as_entry, print_table, save_figure, save_report
from eval.runs import run_evaluation
from eval.statistics import percentile_interval, resampled_means
from eval.viewer.tokens import (
    BLANK,
    LINE_END,
    TAB,
    Piece,
    TokenValues,
    token_name,
    token_pieces,
    token_values,
    tokenizer_of_rollouts,
    visible,
)

# As in eval.viewer: orange is longer, blue is shorter.
SIDES = {"longer": "#b35806", "shorter": "#2166ac"}
FONT = findfont("DejaVu Sans")
WORD, TOKEN = "word", "token"
# Of a token, in value and in tokens.
SHIFTS = ("shift", "shift_in_tokens")
# Tokens whose resamples are held in memory at once.
HELD_TOKENS = 512


@dataclass
class TokenArguments(RolloutArguments):
    """Which completions are read by which model, and how words or tokens are ranked."""

    unit: str = HfArg(
        default=WORD,
        help="What is ranked: whole words, or the tokenizer's pieces of them.",
        metadata={"choices": [WORD, TOKEN]},
    )
    tokenizer_name_or_path: str | None = HfArg(
        default=None,
        help="Tokenizer of the rollouts: folder or hub id. Default: what lies with the length value model, --policy or "
        "--base.",
    )
    min_count: int = HfArg(default=20, help="Rank what occurs at least this often.")
    min_prompts: int = HfArg(default=1, help="Rank what occurs in the completions of at least so many prompts.")
    top: int = HfArg(default=25, help="Words or tokens shown on either side.")
    contexts: int = HfArg(default=3, help="Occurrences shown of each, drawn at random.")
    context_tokens: int = HfArg(default=12, help="Tokens of text before and after an occurrence.")

    def __post_init__(self) -> None:
        if self.unit not in (WORD, TOKEN):
            raise ValueError(f"unit must be {WORD} or {TOKEN}, got {self.unit!r}.")
        if min(self.min_count, self.min_prompts, self.top, self.forward_tokens) < 1:
            raise ValueError("min_count, min_prompts, top and forward_tokens must be at least 1.")
        if min(self.contexts, self.context_tokens) < 0:
            raise ValueError("contexts and context_tokens must not be negative.")


@dataclass(frozen=True)
class Occurrences:
    """Every token or word of every completion, N of them, in the order of the rollouts.

    Args:
        token, row, place, prompt (`numpy.ndarray` of shape `(N,)`, int): token id or number of the word, its
            completion, the index in it of its first token, and the number of the prompt, from 0.
        shift, shift_in_tokens (`numpy.ndarray` of shape `(N,)`): in value and in tokens; positive is longer.
        width (`numpy.ndarray` of shape `(N,)`, int): its tokens.
    """

    token: np.ndarray
    row: np.ndarray
    place: np.ndarray
    prompt: np.ndarray
    shift: np.ndarray
    shift_in_tokens: np.ndarray
    width: np.ndarray


def find_occurrences(rollouts: Dataset, values: Sequence[TokenValues]) -> Occurrences:
    """Lays the tokens of all completions in one row; `values` has an entry for each rollout."""
    completions = rollouts["completion_ids"][:]
    lengths = [len(completion) for completion in completions]
    prompt = np.unique(np.array(rollouts["group"][:]), return_inverse=True)[1]
    return Occurrences(
        token=np.concatenate([np.array(completion) for completion in completions]),
        row=np.repeat(np.arange(len(lengths)), lengths),
        place=np.concatenate([np.arange(length) for length in lengths]),
        prompt=np.repeat(prompt, lengths),
        shift=np.concatenate([entry.horizon_shift.numpy() for entry in values]),
        shift_in_tokens=np.concatenate([entry.shift_in_tokens.numpy() for entry in values]),
        width=np.ones(sum(lengths), dtype=int),
    )


def word_starts(pieces: Sequence[Piece]) -> np.ndarray:
    """The places at which words begin: letters and digits side by side are of one word, and so are the parts of a
    character. Scripts without blanks between words (wide characters) are not joined."""
    starts = []
    for k, piece in enumerate(pieces):
        before = pieces[k - 1] if k else None
        # A character that is spread over several tokens stands at the last of them.
        text = pieces[k + piece.parts - piece.part].text if k + piece.parts - piece.part < len(pieces) else ""
        if before is None or before.special or piece.special:
            starts.append(k)
        elif piece.part == 1:
            sides = before.text[-1:] + text[:1]
            wide = any(unicodedata.east_asian_width(sign) in "WF" for sign in sides)
            if len(sides) < 2 or not sides.isalnum() or wide:
                starts.append(k)
    return np.array(starts)


def join_words(
    found: Occurrences, rollouts: Dataset, tokenizer: PreTrainedTokenizerBase, gamma: float
) -> tuple[Occurrences, list[str]]:
    """The words of the same completions.

    Args:
        found ([`Occurrences`]): of tokens.
        rollouts (`datasets.Dataset`): where they are from.
        tokenizer (`PreTrainedTokenizerBase`): spells them.
        gamma (`float`): discount of the values.

    Returns:
        `tuple`: occurrences of words, and the words by their numbers, without the blanks around them.
    """
    numbers: dict[str, int] = {}
    first, words, offset = [], [], 0
    for row in rollouts.select_columns(["prompt_ids", "completion_ids"]):
        pieces = token_pieces(tokenizer, row["completion_ids"], row["prompt_ids"])
        starts = word_starts(pieces)
        for own in np.split(np.array([piece.text for piece in pieces], dtype=object), starts[1:]):
            text = "".join(own)
            words.append(numbers.setdefault(visible(text.strip(" ") or text), len(numbers)))
        first.append(starts + offset)
        offset += len(pieces)
    begin = np.concatenate(first)
    width = np.diff(np.append(begin, offset))
    within = np.arange(offset) - np.repeat(begin, width)
    whole = Occurrences(
        token=np.array(words),
        row=found.row[begin],
        place=found.place[begin],
        prompt=found.prompt[begin],
        shift=np.add.reduceat(found.shift * gamma**within, begin),
        shift_in_tokens=np.add.reduceat(found.shift_in_tokens, begin),
        width=width,
    )
    return whole, list(numbers)


def measure_tokens(found: Occurrences, min_count: int, num_resamples: int = 2000, seed: int = 0) -> list[dict]:
    """Mean shift of every token or word that occurs, the most lengthening first.

    Args:
        found ([`Occurrences`]): all of them.
        min_count (`int`): what occurs less often gets no interval.
        num_resamples, seed (`int`, *optional*, defaults to `2000` and `0`): of the bootstrap over prompts.

    Returns:
        `list[dict]`: `token_id`, `count`, `prompts` (in which it occurs), and the intervals `shift` and
        `shift_in_tokens`, whose ends are `None` where it occurs too rarely, or in too few prompts.
    """
    ids, column, counts = np.unique(found.token, return_inverse=True, return_counts=True)
    # One entry for each prompt and token that occurs in it, sums of which are all that a resample of prompts needs.
    pairs, entry = np.unique(found.prompt * len(ids) + column, return_inverse=True)
    prompt, token = np.divmod(pairs, len(ids))
    occurrences = np.bincount(entry)
    rows = [
        {"token_id": int(ids[k]), "count": int(counts[k]), "prompts": int(n)}
        for k, n in enumerate(np.bincount(token, minlength=len(ids)))
    ]
    frequent = np.flatnonzero(counts >= min_count)
    num_prompts = int(found.prompt.max()) + 1
    for name in SHIFTS:
        means = np.bincount(entry, getattr(found, name)) / occurrences
        estimates = np.bincount(token, means * occurrences, minlength=len(ids)) / counts
        for row, estimate in zip(rows, estimates, strict=True):
            row[name] = {"estimate": float(estimate), "low": None, "high": None}
        for start in range(0, len(frequent), HELD_TOKENS):
            chosen = frequent[start : start + HELD_TOKENS]
            inside = np.isin(token, chosen)
            place = prompt[inside], np.searchsorted(chosen, token[inside])
            values, weights = np.zeros((2, num_prompts, len(chosen)))
            values[place], weights[place] = means[inside], occurrences[inside]
            draws = resampled_means(values, None, weights, num_resamples, seed)
            for k, own in zip(chosen, draws.T, strict=True):
                rows[k][name] = as_entry(percentile_interval(float(estimates[k]), own))
    return sorted(rows, key=lambda row: -row["shift"]["estimate"])


def find_contexts(
    found: Occurrences, rollouts: Dataset, tokenizer: PreTrainedTokenizerBase, token: int, args: TokenArguments
) -> list[dict[str, Any]]:
    """Some occurrences of a token or word, drawn at random, with the text before (the prompt included) and after."""
    places = np.flatnonzero(found.token == token)
    generator = np.random.default_rng([args.seed, token])
    contexts = []
    for index in np.sort(generator.permutation(places)[: args.contexts]).tolist():
        row, place = int(found.row[index]), int(found.place[index])
        ids = [*rollouts[row]["prompt_ids"], *rollouts[row]["completion_ids"]]
        middle = len(rollouts[row]["prompt_ids"]) + place
        start = max(0, middle - args.context_tokens)
        end = middle + int(found.width[index])
        shown = ids[start : end + args.context_tokens]
        texts = [piece.text for piece in token_pieces(tokenizer, shown, ids[:start])]
        context = {"row": row, "place": place, "before": "".join(texts[: middle - start])}
        context |= {"token": "".join(texts[middle - start : end - start]), "after": "".join(texts[end - start :])}
        contexts.append(context | {name: float(getattr(found, name)[index]) for name in SHIFTS})
    return contexts


def rank(rows: list[dict], min_count: int, top: int, min_prompts: int = 1) -> dict[str, list[dict]]:
    """The frequent ones with the largest and the smallest mean shift: `longer` above 0, `shorter` below."""
    frequent = [row for row in rows if row["count"] >= min_count and row["prompts"] >= min_prompts]
    return {
        "longer": [row for row in frequent if row["shift"]["estimate"] > 0][:top],
        "shorter": [row for row in reversed(frequent) if row["shift"]["estimate"] < 0][:top],
    }


def example(row: dict[str, Any]) -> str:
    """The first of a token's contexts on one line."""
    if not row["contexts"]:
        return ""
    shown = row["contexts"][0]
    return visible(f"{shown['before'][-24:]}»{shown['token']}«{shown['after'][:20]}")


COLUMNS = [
    Column("word or token", "token"),
    Column("side", "side", left=True),
    Column("count", "count"),
    Column("prompts", "prompts"),
    Column("shift, tokens", "shift_in_tokens", 2, sign="+"),
    Column("shift, value", "shift", 4, sign="+"),
    Column("for example", example, left=True),
]


def cloud_words(rows: list[dict], min_count: int, sign: int) -> tuple[dict[str, float], int]:
    """Words of a cloud with their weights, count times mean shift; and how many frequent tokens are no words.

    Blanks, line ends and tabs alone, and what the font has no signs for, cannot be read in a cloud. Tokens that differ
    in the blanks around them are one word. `sign` is 1 for tokens that make completions longer, -1 for shorter.
    """
    weights: dict[str, float] = {}
    unreadable = 0
    for row in rows:
        weight = sign * row["shift"]["estimate"] * row["count"]
        if row["count"] < min_count or weight <= 0:
            continue
        word = row["token"].strip(BLANK + LINE_END + TAB)
        if word and all(get_font(FONT).get_char_index(ord(letter)) for letter in word):
            weights[word] = weights.get(word, 0.0) + weight
        else:
            unreadable += 1
    return weights, unreadable


def plot_clouds(rows: list[dict], min_count: int, path: Path, seed: int = 0) -> None:
    """A word cloud for either side, of all frequent tokens; sizes go by count times mean shift, as a PNG."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for axis, (side, color), sign in zip(figure.subplots(1, 2), SIDES.items(), (1, -1), strict=True):
        weights, unreadable = cloud_words(rows, min_count, sign)
        axis.set_axis_off()
        title = f"make it {side}: no words"
        if weights:
            look = {"width": 550, "height": 420, "scale": 2, "background_color": "white", "font_path": FONT}
            look["color_func"] = lambda *_, color=color, **__: color
            cloud = WordCloud(prefer_horizontal=1.0, random_state=seed, **look)
            axis.imshow(cloud.generate_from_frequencies(weights).to_array(), interpolation="bilinear")
            # The smallest find no room.
            title = f"make it {side}: {len(cloud.layout_)} of {len(weights)} words"
        if unreadable:
            title += f"\n{unreadable} of blanks, or of signs that cannot be drawn, are in the table alone"
        axis.set_title(title, fontsize=9, color=color)
    figure.suptitle(f"size: count × |mean horizon shift|; what occurs at least {min_count} times", fontsize=10)
    save_figure(path, figure)


def main(args: TokenArguments) -> dict[str, Any]:
    """Samples or reads, runs the model along every completion, ranks, prints and writes."""
    args = args.in_folder("length_tokens", "length_tokens.json")
    rollouts, metadata = find_rollouts(args)
    places = (args.tokenizer_name_or_path, args.length_value_model, args.policy, args.base)
    tokenizer = tokenizer_of_rollouts(metadata, *places)
    model = args.load_reader()
    return report_tokens(args, rollouts, model, tokenizer)


def report_tokens(
    args: TokenArguments, rollouts: Dataset, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """[`main`] with everything loaded; returns what length_tokens.json holds."""
    values = token_values(model, rollouts, args.forward_tokens)
    found = find_occurrences(rollouts, values)
    if args.unit == WORD:
        found, words = join_words(found, rollouts, tokenizer, model.config.gamma)
    rows = measure_tokens(found, args.min_count, seed=args.seed)
    for row in rows:
        row["token"] = words[row["token_id"]] if args.unit == WORD else token_name(tokenizer, row["token_id"])
    ranked = rank(rows, args.min_count, args.top, args.min_prompts)
    for row in (row for side in ranked.values() for row in side):
        row["contexts"] = find_contexts(found, rollouts, tokenizer, row["token_id"], args)
    if args.unit == WORD:
        # A word's number is of this table alone.
        for row in rows:
            del row["token_id"]
    rare = [row["count"] for row in rows if row["count"] < args.min_count]
    report: dict[str, Any] = {
        "arguments": asdict(args),
        "gamma": model.config.gamma,
        "prompts": len(set(rollouts["group"][:])),
        "completions": len(rollouts),
        "cut": sum(reason != "stop" for reason in rollouts["finish_reason"][:]),
        "occurrences": len(found.token),
        "tokens": len(rows),
        "below_min_count": {"tokens": len(rare), "occurrences": sum(rare)},
        **ranked,
    }
    folder = Path(args.output_dir)
    columns = ("token", "count", "prompts", "shift", "shift_in_tokens")
    columns = ("token_id", *columns) if args.unit == TOKEN else columns
    save_report(folder, "length_tokens", report, [{name: row[name] for name in columns} for row in rows])
    plot_clouds(rows, args.min_count, folder / "length_tokens.png", args.seed)
    console = Console(width=150, highlight=False)
    title = f"{report['completions']} completions of {report['prompts']} prompts, {report['cut']} of them cut"
    shown = [{"side": side, **row} for side, chosen in ranked.items() for row in chosen]
    print_table(console, shown, COLUMNS, f"{title}; positive: longer than expected", lambda row: row["side"])
    console.print(
        f"{report['occurrences']} {args.unit}s read, {report['tokens']} different ones, of which {len(rare)} occur "
        f"less than {args.min_count} times ({sum(rare)} in all) and are not ranked. 95 % intervals over prompts"
        f"{', of which there is one, so none' if report['prompts'] == 1 else ''}. Written to "
        f"{folder}/length_tokens.json, .csv and .png"
    )
    return report


if __name__ == "__main__":
    run_evaluation(TokenArguments, main, "eval.length_tokens", __doc__)
