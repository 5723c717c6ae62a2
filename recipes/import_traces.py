"""Makes a rollout file of published answers of reasoning models, what they thought included.

    python recipes/import_traces.py --traces output_queries_QwQ-32b.json --models QwQ-32b \
        --tokenizer_name_or_path Qwen/QwQ-32B --max_tokens 8192 --output rollouts.jsonl

The files (those of the MisguidedAttention evaluation) hold text: the ids are made from it again, and which completions
ended is assumed: those with an answer. Both is logged and kept in the metadata. With another tokenizer than the
model's, lengths are those of that tokenizer. Samples that cannot be used are set aside in `<output>.rejected.jsonl`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from lenvm_rl.modeling.loading import load_tokenizer
from lenvm_rl.programs import AGAIN, run_program
from lenvm_rl.rollouts.record import RolloutMetadata, check_suffix, write_rollouts
from lenvm_rl.rollouts.traces import read_traces
from recipes.command_line import ProgramParser

logger = logging.getLogger(__name__)


@dataclass
class ImportArguments:
    """What to read, with which tokenizer, and where to write."""

    traces: str = field(metadata={"help": "The answers: a .json file of the MisguidedAttention evaluation."})
    tokenizer_name_or_path: str = field(
        metadata={"help": "The tokenizer that makes the ids, with a chat template: folder or hub id."}
    )
    output: str = field(metadata={"help": "The rollout file to write: a path that ends in .jsonl or .parquet."})
    models: list[str] | None = field(
        default=None, metadata={"help": "Keep the completions of these; needed where the file has several models."}
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Cut completions with more tokens, end-of-sequence counted, and mark them as cut."},
    )
    eos_token_id: int | None = field(
        default=None, metadata={"help": "The end put after a finished completion. Default: the tokenizer's."}
    )


def main(args: ImportArguments) -> RolloutMetadata:
    """Reads the answers and writes the rollouts; what was lost or assumed is logged by the reader."""
    check_suffix(args.output)
    rollouts, metadata = read_traces(
        args.traces,
        load_tokenizer(args.tokenizer_name_or_path),
        models=args.models,
        max_tokens=args.max_tokens,
        eos_token_id=args.eos_token_id,
        rejected_beside=args.output,
    )
    metadata = write_rollouts(args.output, rollouts, metadata)
    lengths = sorted(len(ids) for ids in rollouts["completion_ids"][:])
    logger.info(
        "%s: %d completions of %d prompts, %d to %d tokens (median %d), %.1f%% taken for truncated, %d set aside",
        args.output,
        metadata.num_completions,
        metadata.num_prompts,
        lengths[0],
        lengths[-1],
        lengths[len(lengths) // 2],
        100 * metadata.truncated_share,
        metadata.sampling["set_aside"],
    )
    return metadata


def make_parser() -> ProgramParser:
    """The command line: every field of [`ImportArguments`], also read from YAML with `--config`."""
    return ProgramParser(
        ImportArguments,
        usage="python recipes/import_traces.py --traces FILE --tokenizer_name_or_path PATH --output FILE",
        description=__doc__.partition("\n")[0],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_program(lambda: main(*make_parser().parse_args_and_config()), AGAIN)
