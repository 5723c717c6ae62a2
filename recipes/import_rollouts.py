"""Makes a rollout file of another tool's completions, of which mostly the text is left.

    python recipes/import_rollouts.py --input answers.csv --format text --completion_column response --chat \
        --generator Qwen2.5-7B-Instruct --tokenizer_name_or_path Qwen/Qwen2.5-7B-Instruct \
        --assume cut_at_max_tokens --max_tokens 1024 --output rollouts.jsonl
        Rows with a prompt and a completion: .jsonl, .json, .parquet or .csv.

    python recipes/import_rollouts.py --input rollout_data_dir/10.jsonl --format verl --prompts train.parquet …
        verl's dump of rollouts, with the prompts' messages from the data it trained on; or the .parquet that its
        generation writes.

    python recipes/import_rollouts.py --input train.jsonl --format sharegpt --assume cut_at_max_tokens …
        Conversations as the paper's released code keeps its rollouts.

    python recipes/import_rollouts.py --input output_queries_QwQ-32b.json --format traces --models QwQ-32b …
        Answers of reasoning models with what they thought, as the MisguidedAttention evaluation publishes them.

What had to be assumed (which completions ended, tokens made from the text again, how prompts became tokens) is logged
once, with counts, and kept in the metadata. What cannot be used is set aside in a `.rejected.jsonl` beside the output.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.programs import AGAIN, ProgramParser, run_program
from lenvm_rl.rollouts.formats import SOURCE_FORMATS
from lenvm_rl.rollouts.record import RolloutMetadata, check_suffix, described, write_rollouts
from lenvm_rl.rollouts.text import ASSUMPTIONS, import_completions
from recipes.stage_records import PRETRAIN, say_next

logger = logging.getLogger(__name__)

# Options that one format has, by their names in its function.
FORMAT_OPTIONS = {
    "text": ("prompt_column", "completion_column", "chat"),
    "verl": ("prompts",),
    "sharegpt": (),
    "traces": ("models",),
}


@dataclass
class ImportArguments:
    """What to read, what to assume, and where to write."""

    input: str = HfArg(help="The file to read.")
    format: str = HfArg(
        help="What it is. text: rows with a prompt and a completion; verl: a dump of its rollouts or what its "
        "generation wrote; sharegpt: conversations of the paper's released code; traces: answers of the "
        "MisguidedAttention evaluation.",
        metadata={"choices": list(SOURCE_FORMATS)},
    )
    tokenizer_name_or_path: str = HfArg(
        help="The policy's tokenizer, with the chat template that its server applied: folder or hub id."
    )
    output: str = HfArg(help="The rollout file to write: a path that ends in .jsonl or .parquet.")
    assume: str | None = HfArg(
        default=None,
        help="Which completions ended, where the file does not say. all_finished: every one (cut ones then look "
        "short); cut_at_max_tokens: those with fewer than max_tokens tokens. (traces: those with an answer.)",
        metadata={"choices": list(ASSUMPTIONS)},
    )
    max_tokens: int | None = HfArg(
        default=None,
        help="With --assume cut_at_max_tokens: most tokens that the server allowed, where the file does not say. "
        "Without: cut completions with more tokens, end-of-sequence counted, and mark them as cut.",
    )
    generator: str | None = HfArg(default=None, help="The policy's name. Default: the one that the file gives.")
    prompt_column: str | None = HfArg(
        default=None, help="text: the column with the prompt, text or a list of messages. Default: prompt."
    )
    completion_column: str | None = HfArg(
        default=None, help="text: the column with the completion, text or one assistant message. Default: completion."
    )
    chat: bool = HfArg(
        default=False, help="text: put the prompt, which is text, as a user's message into the chat template."
    )
    prompts: str | None = HfArg(
        default=None,
        help="verl, a dump: the .parquet that was trained on. It gives the prompts as messages, since the dump has "
        "their text without special tokens.",
    )
    models: list[str] | None = HfArg(
        default=None, help="traces: keep the completions of these; needed where the file has several models."
    )
    eos_token_id: int | None = HfArg(
        default=None, help="The end put after a finished completion. Default: the tokenizer's."
    )
    pad_token: str | None = HfArg(
        default=None, help="Pad token, for a tokenizer that has none or pads with its end-of-sequence token."
    )

    def __post_init__(self) -> None:
        for name, options in FORMAT_OPTIONS.items():
            wrong = [f"--{option}" for option in options if getattr(self, option) not in (None, False)]
            if wrong and name != self.format:
                raise ValueError(f"{', '.join(wrong)} belongs to --format {name}: leave it out.")

    def format_options(self) -> dict[str, object]:
        """What was given of the format's own options."""
        given = {name: getattr(self, name) for name in FORMAT_OPTIONS[self.format]}
        return {name: value for name, value in given.items() if value is not None}


def main(args: ImportArguments) -> RolloutMetadata:
    """Reads the completions and writes the rollouts; what was lost or assumed is logged by the reader."""
    check_suffix(args.output)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path, args.pad_token)
    rollouts, metadata = import_completions(
        args.input,
        args.format,
        tokenizer,
        assume=args.assume,
        max_tokens=args.max_tokens,
        generator=args.generator,
        eos_token_id=args.eos_token_id,
        rejected_beside=args.output,
        **args.format_options(),
    )
    metadata = write_rollouts(args.output, rollouts, metadata)
    logger.info("%s: %s", args.output, described(rollouts, metadata))
    say_next(
        *PRETRAIN,
        "--rollouts",
        args.output,
        "--model_name_or_path",
        args.tokenizer_name_or_path,
        "--output_dir",
        "lenvm",
    )
    return metadata


def make_parser() -> ProgramParser:
    """The command line: every field of [`ImportArguments`], also read from YAML with `--config`."""
    return ProgramParser(
        ImportArguments,
        usage="python recipes/import_rollouts.py --input FILE --format FORMAT --tokenizer_name_or_path PATH --output F",
        description=__doc__.partition("\n")[0],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(lambda: main(*make_parser().parse_args_and_config()), AGAIN)
