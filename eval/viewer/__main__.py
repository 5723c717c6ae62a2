"""A page that shows how the expected length moves along completions: one file of HTML that needs no network.

    python -m eval.viewer --rollouts rollouts.jsonl --length_value_model outputs/length_value_model --rows 0 5 \
        --output viewer.html

Each token is coloured by its horizon shift (orange: the completion became longer than expected, blue: shorter); a curve
shows the predicted tokens still to come beside the true ones. Two completions stand side by side, of as many as --rows
names. Pointing at a token marks its place on the curve, and the other way round; a click pins it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from eval.datasets import ReadingArguments, find_rollouts
from eval.pages import save_page, six_digits
from eval.runs import STARTS_OVER, check_writable, run_evaluation
from eval.viewer.tokens import TokenValues, token_pieces, token_values, tokenizer_of_rollouts
from lenvm_rl.endings import end_token_ids, own_length
from lenvm_rl.rollouts.record import REQUIRED_COLUMNS

# Further columns of a record are shown if they are no longer than this.
SHORT = 60


@dataclass
class ViewerArguments(ReadingArguments):
    """Which completions are shown, as which model sees them."""

    rows: list[int] = HfArg(
        default_factory=lambda: [0, 1], help="Completions to put on the page, as rows of the file, from 0."
    )
    output: str = HfArg(default="outputs/viewer.html", help="The page to write.")
    tokenizer_name_or_path: str | None = HfArg(
        default=None,
        help="Tokenizer of the rollouts: folder or hub id. Default: what lies with the length value model or --base.",
    )

    def __post_init__(self) -> None:
        if self.rollouts is None:
            raise ValueError("Give --rollouts, the file that holds the completions.")
        if not self.rows or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows must name at least one row, each once, got {self.rows}.")


def completion_entry(
    record: dict[str, Any],
    row: int,
    values: TokenValues,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int] | None = None,
) -> dict[str, Any]:
    """What the page needs of a completion, a record of the file's `row`, and what the model says along it.

    Returns:
        `dict`: `tokens`, L entries `[text, part, parts, special]` as a [`~eval.viewer.tokens.Piece`] has them;
        `remaining`, L + 1 predicted lengths, the last of them after the last token; `shift` and `shift_in_tokens`, L
        each; and what is said about the whole.
    """
    ids, finished = record["completion_ids"], record["finish_reason"] == "stop"
    pieces = token_pieces(tokenizer, ids, record["prompt_ids"])
    after = values.remaining[-1] + values.shift_in_tokens[-1] - 1
    further = {name: value for name, value in record.items() if name not in REQUIRED_COLUMNS and value is not None}
    return {
        "row": row,
        "group": record["group"],
        "finished": finished,
        "length": own_length(ids, end_token_ids(tokenizer) if end_ids is None else end_ids),
        "prompt": tokenizer.decode(record["prompt_ids"]),
        "columns": {name: str(value) for name, value in further.items() if len(str(value)) <= SHORT},
        "tokens": [[piece.text, piece.part, piece.parts, int(piece.special)] for piece in pieces],
        "remaining": six_digits([*values.remaining.tolist(), float(after)]),
        "shift": six_digits(values.horizon_shift.tolist()),
        "shift_in_tokens": six_digits(values.shift_in_tokens.tolist()),
    }


def main(args: ViewerArguments) -> dict[str, Any]:
    """Reads, runs the model along the completions, and writes the page; returns its completions and its path."""
    rollouts, metadata = find_rollouts(args)
    outside = [row for row in args.rows if not 0 <= row < len(rollouts)]
    if outside:
        raise ValueError(f"{args.rollouts} has rows 0 to {len(rollouts) - 1}, so there is no {outside}: change --rows.")
    check_writable(Path(args.output).parent)
    tokenizer = tokenizer_of_rollouts(metadata, args.tokenizer_name_or_path, args.length_value_model, args.base)
    model = args.load_reader()
    records = [rollouts[row] for row in args.rows]
    found = token_values(model, records, args.forward_tokens)
    entries = [
        completion_entry(record, row, values, tokenizer, metadata.end_ids)
        for record, row, values in zip(records, args.rows, found, strict=True)
    ]
    about = (
        f"{Path(args.rollouts).name}, sampled of {metadata.generator}; read by {args.length_value_model} (gamma "
        f"{model.config.gamma:.5f}). Colour: how much longer (orange) or shorter (blue) than expected a token made the "
        "completion. Tokens still to come count the end-of-sequence token."
    )
    page = {"title": "Predicted length along completions", "about": about, "completions": entries}
    save_page(args.output, Path(__file__).parent, page)
    tokens = sum(len(entry["tokens"]) for entry in entries)
    Console(highlight=False).print(f"{len(entries)} completions, {tokens} tokens: open {args.output} in a browser.")
    return {"completions": entries, "output": args.output}


if __name__ == "__main__":
    run_evaluation(ViewerArguments, main, "eval.viewer", __doc__, STARTS_OVER)
