"""Makes a rollout file of ShareGPT conversations, the form in which the paper's released code keeps its rollouts.

    python recipes/import_sharegpt.py --sharegpt train.jsonl --tokenizer_name_or_path Qwen/Qwen2.5-7B-Instruct \
        --assume cut_at_max_tokens --max_tokens 32768 --output rollouts.jsonl

Such files hold text: the sampled token ids and whether a completion ended or was cut are lost. The ids are made from
the text again, the ends are assumed as told, and how often the number of tokens differs from what was sampled is logged
and kept in the metadata. Records that cannot be used are set aside in `<name>.rejected.jsonl` beside the input.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.programs import AGAIN, run_program
from lenvm_rl.rollouts.record import RolloutMetadata, check_suffix, write_rollouts
from lenvm_rl.rollouts.sharegpt import ASSUMPTIONS, read_sharegpt
from recipes.command_line import ProgramParser

logger = logging.getLogger(__name__)


@dataclass
class ImportArguments:
    """What to read, what to assume, and where to write."""

    sharegpt: str = field(metadata={"help": "The conversations: a .jsonl or .json file of the released code."})
    tokenizer_name_or_path: str = field(
        metadata={"help": "The policy's tokenizer, with the chat template that its server applied: folder or hub id."}
    )
    output: str = field(metadata={"help": "The rollout file to write: a path that ends in .jsonl or .parquet."})
    assume: str = field(
        metadata={
            "help": "Which completions ended, since the file does not say. all_finished: every one (cut ones then look "
            "short); cut_at_max_tokens: those with fewer than max_tokens tokens.",
            "choices": list(ASSUMPTIONS),
        }
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens that the server allowed, where the file does not say."}
    )
    generator: str | None = field(
        default=None, metadata={"help": "The policy's name. Default: the model_name that the file gives."}
    )
    eos_token_id: int | None = field(
        default=None, metadata={"help": "The end put after a finished completion. Default: the tokenizer's."}
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Pad token, for a tokenizer that has none or pads with its end-of-sequence token."},
    )


def main(args: ImportArguments) -> RolloutMetadata:
    """Reads the conversations and writes the rollouts; what was lost is logged by the reader."""
    check_suffix(args.output)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path, args.pad_token)
    rollouts, metadata = read_sharegpt(
        args.sharegpt,
        tokenizer,
        assume=args.assume,
        max_tokens=args.max_tokens,
        generator=args.generator,
        eos_token_id=args.eos_token_id,
    )
    metadata = write_rollouts(args.output, rollouts, metadata)
    logger.info(
        "%s: %d completions of %d prompts, %.1f%% taken for truncated, %d records set aside",
        args.output,
        metadata.num_completions,
        metadata.num_prompts,
        100 * metadata.truncated_share,
        metadata.sampling["set_aside"],
    )
    return metadata


def make_parser() -> ProgramParser:
    """The command line: every field of [`ImportArguments`], also read from YAML with `--config`."""
    return ProgramParser(
        ImportArguments,
        usage="python recipes/import_sharegpt.py --sharegpt FILE --tokenizer_name_or_path PATH --assume HOW --output F",
        description=__doc__.partition("\n")[0],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(lambda: main(*make_parser().parse_args_and_config()), AGAIN)
