"""What is asked of the policy: LIFEBench's tasks with their length requirement taken out and put back in tokens.

A task of LIFEBench holds its requirement as a sentence, or a clause, with two blanks, ``The article must be
{word_count_type} {word_count} words long.`` Here lengths are tokens, so that sentence goes: what is left is the
instruction, and a sentence about tokens follows it where the length is to be asked for.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lenvm_rl.decoding.guidance import AT_LEAST, AT_MOST, EQUAL_TO

logger = logging.getLogger(__name__)

# The languages as people name them, and as the files do.
LANGUAGES = {"en": "en", "zh": "cn"}
REQUIREMENTS = {"en": "Your answer must be {mode} {target} tokens.", "zh": "你的回答必须{mode} {target} 个 token。"}
WORDING = {
    "en": {EQUAL_TO: "equal to", AT_MOST: "at most", AT_LEAST: "at least"},
    "zh": {EQUAL_TO: "等于", AT_MOST: "至多有", AT_LEAST: "至少有"},
}
FIELDS = {"id", "category", "lang", "task"}
BLANKS = ("{word_count_type}", "{word_count}")
# The last sentence or clause, with what separates it from the text before; a header in brackets ends at "]".
LENGTH_SENTENCE = re.compile(r"(?<=[.,;:?!。，；：？！\n\]])[^.,;:?!。，；：？！\n\]]*\{word_count_type\}[^\n]*\s*\Z")
EMPTY_HEADER = re.compile(r"\[(Requirement|要求)\]\s*\Z")


@dataclass(frozen=True)
class WritingTask:
    """One prompt of the comparison.

    Args:
        name (`str`): what the dataset calls it.
        language (`str`): `"en"` or `"zh"`.
        category (`str`): such as `"create"` or `"qa"`.
        instruction (`str`): what to do, without a word on length.
    """

    name: str
    language: str
    category: str
    instruction: str


def split_off_length(template: str) -> str:
    """The instruction in a task of LIFEBench: its text without the sentence at its end that asks for a length."""
    rest, found = LENGTH_SENTENCE.subn("", template)
    if not found or any(blank in rest for blank in BLANKS):
        raise ValueError(
            f"the task does not end with a sentence that holds {' and '.join(BLANKS)}: {template[-80:]!r}. Use a file "
            "of LIFEBench whose lengths are blanks, not data_refactor."
        )
    instruction = EMPTY_HEADER.sub("", rest.rstrip()).rstrip()
    if not instruction:
        raise ValueError(f"nothing is left of the task without its length: {template[-80:]!r}.")
    # The requirement was a clause of the sentence that stays.
    clause = instruction[-1] in ",，;；"
    return instruction[:-1] + ("。" if instruction[-1] in "，；" else ".") if clause else instruction


def with_length(instruction: str, language: str, mode: str, target: int) -> str:
    """The instruction, then the sentence, in its language, that asks for `target` tokens; modes as in guidance."""
    return f"{instruction}\n{REQUIREMENTS[language].format(mode=WORDING[language][mode], target=target)}"


def read_tasks(
    path: str, languages: list[str], limit: int | None = None, max_characters: int | None = None
) -> list[WritingTask]:
    """The tasks of a LIFEBench file.

    Args:
        path (`str`): a JSONL file with `id`, `category`, `lang` and `task`.
        languages (list of `str`): `"en"`, `"zh"` or both.
        limit (`int`, *optional*): take so many, by turns from each language and category; all by default.
        max_characters (`int`, *optional*): leave longer tasks out, which is logged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no file {path}: give a LIFEBench file, JSONL with id, category, lang and task."
        )
    if not languages or set(languages) - set(LANGUAGES):
        raise ValueError(f"languages must be some of {sorted(LANGUAGES)}, got {languages}.")
    groups: dict[tuple[str, str], list[WritingTask]] = {}
    codes = {code: language for language, code in LANGUAGES.items()}
    too_long = 0
    # By newline only: U+2028 occurs inside strings.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        row = _read_row(line, f"{path}, line {number}")
        language = codes.get(row["lang"])
        if language not in languages:
            continue
        if max_characters is not None and len(row["task"]) > max_characters:
            too_long += 1
            continue
        task = WritingTask(str(row["id"]), language, row["category"], split_off_length(row["task"]))
        groups.setdefault((language, row["category"]), []).append(task)
    if too_long:
        logger.warning("%s: %d tasks of more than %d characters are left out", path, too_long, max_characters)
    turns = [task for task in chain.from_iterable(zip_longest(*groups.values())) if task is not None]
    if limit is not None and len(turns) < limit:
        raise ValueError(f"{path} has {len(turns)} tasks in {languages}, fewer than num_prompts={limit}.")
    if not turns:
        raise ValueError(f"{path} has no tasks in {languages}.")
    return turns[:limit]


def _read_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON ({error}): a LIFEBench file (JSONL) is needed.") from error
    missing = sorted(FIELDS - row.keys()) if isinstance(row, dict) else sorted(FIELDS)
    if missing:
        raise ValueError(f"{place} lacks {missing}: a LIFEBench file is needed.")
    return row
