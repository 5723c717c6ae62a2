"""Makes a rollout file of completions of which only the text is left: ShareGPT conversations, or published answers.

    python recipes/import_rollouts.py --sharegpt train.jsonl --tokenizer_name_or_path Qwen/Qwen2.5-7B-Instruct \
        --assume cut_at_max_tokens --max_tokens 32768 --output rollouts.jsonl
        Conversations as the paper's released code keeps its rollouts.

    python recipes/import_rollouts.py --traces output_queries_QwQ-32b.json --models QwQ-32b \
        --tokenizer_name_or_path Qwen/QwQ-32B --max_tokens 8192 --output rollouts.jsonl
        Answers of reasoning models with what they thought, as the MisguidedAttention evaluation publishes them.

The ids are made from the text again, and which completions ended is assumed (of traces: those with an answer did). Both
is logged and kept in the metadata. What cannot be used is set aside in a `.rejected.jsonl`, beside the conversations or
beside the output.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.programs import AGAIN, ProgramParser, run_program
from lenvm_rl.rollouts.record import RolloutMetadata, check_suffix, described, write_rollouts
from lenvm_rl.rollouts.text import ASSUMPTIONS, read_sharegpt, read_traces

logger = logging.getLogger(__name__)


@dataclass
class ImportArguments:
    """What to read, what to assume, and where to write."""

    tokenizer_name_or_path: str = HfArg(
        help="The policy's tokenizer, with the chat template that its server applied: folder or hub id."
    )
    output: str = HfArg(help="The rollout file to write: a path that ends in .jsonl or .parquet.")
    sharegpt: str | None = HfArg(default=None, help="Conversations: a .jsonl or .json file of the released code.")
    traces: str | None = HfArg(default=None, help="Or answers: a .json file of the MisguidedAttention evaluation.")
    assume: str | None = HfArg(
        default=None,
        help="sharegpt: which completions ended, since the file does not say. all_finished: every one (cut ones then "
        "look short); cut_at_max_tokens: those with fewer than max_tokens tokens.",
        metadata={"choices": list(ASSUMPTIONS)},
    )
    models: list[str] | None = HfArg(
        default=None, help="traces: keep the completions of these; needed where the file has several models."
    )
    max_tokens: int | None = HfArg(
        default=None,
        help="sharegpt: most tokens that the server allowed, where the file does not say. traces: cut completions with "
        "more tokens, end-of-sequence counted, and mark them as cut.",
    )
    generator: str | None = HfArg(
        default=None, help="sharegpt: the policy's name. Default: the model_name that the file gives."
    )
    eos_token_id: int | None = HfArg(
        default=None, help="The end put after a finished completion. Default: the tokenizer's."
    )
    pad_token: str | None = HfArg(
        default=None, help="Pad token, for a tokenizer that has none or pads with its end-of-sequence token."
    )

    def __post_init__(self) -> None:
        if (self.sharegpt is None) == (self.traces is None):
            raise ValueError("Give one of --sharegpt and --traces.")
        if (self.sharegpt is None) != (self.assume is None):
            raise ValueError("--assume belongs to --sharegpt, which needs it: the file does not say what ended.")
        if self.sharegpt is not None and self.models is not None:
            raise ValueError("--models belongs to --traces: leave it out.")
        if self.traces is not None and self.generator is not None:
            raise ValueError("--generator belongs to --sharegpt: leave it out.")


def main(args: ImportArguments) -> RolloutMetadata:
    """Reads the texts and writes the rollouts; what was lost or assumed is logged by the reader."""
    check_suffix(args.output)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path, args.pad_token)
    options = {"max_tokens": args.max_tokens, "eos_token_id": args.eos_token_id}
    if args.sharegpt is not None:
        own = {"assume": args.assume, "generator": args.generator}
        rollouts, metadata = read_sharegpt(args.sharegpt, tokenizer, **own, **options)
    else:
        own = {"models": args.models, "rejected_beside": args.output}
        rollouts, metadata = read_traces(args.traces, tokenizer, **own, **options)
    metadata = write_rollouts(args.output, rollouts, metadata)
    logger.info("%s: %s", args.output, described(rollouts, metadata))
    return metadata


def make_parser() -> ProgramParser:
    """The command line: every field of [`ImportArguments`], also read from YAML with `--config`."""
    return ProgramParser(
        ImportArguments,
        usage="python recipes/import_rollouts.py (--sharegpt | --traces) FILE --tokenizer_name_or_path PATH --output F",
        description=__doc__.partition("\n")[0],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(lambda: main(*make_parser().parse_args_and_config()), AGAIN)
