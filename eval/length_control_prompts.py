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
class Task:
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
    """The instruction in a task of LIFEBench: its text without the sentence that asks for a length.

    Raises:
        ValueError: if the text does not end with such a sentence, or nothing else stands in it.
    """
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
    """The instruction, then the sentence that asks for `target` tokens.

    Args:
        instruction (`str`): what to do.
        language (`str`): `"en"` or `"zh"`: of the sentence.
        mode (`str`): `"equal_to"`, `"at_most"` or `"at_least"`.
        target (`int`): tokens, at least 1.
    """
    if target < 1:
        raise ValueError(f"target must be at least 1 token, got {target}.")
    return f"{instruction}\n{REQUIREMENTS[language].format(mode=WORDING[language][mode], target=target)}"


def read_tasks(
    path: str, languages: list[str], limit: int | None = None, max_characters: int | None = None
) -> list[Task]:
    """The tasks of a LIFEBench file.

    Args:
        path (`str`): a JSONL file with `id`, `category`, `lang` and `task`.
        languages (list of `str`): `"en"`, `"zh"` or both.
        limit (`int`, *optional*): take so many, by turns from each language and category; all by default.
        max_characters (`int`, *optional*): leave longer tasks out, which is logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: on an unknown language, a row that is no task, or fewer tasks than `limit`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no file {path}: give a LIFEBench file, JSONL with id, category, lang and task."
        )
    unknown = sorted(set(languages) - set(LANGUAGES))
    if unknown or not languages:
        raise ValueError(f"languages must be some of {sorted(LANGUAGES)}, got {languages}.")
    groups: dict[tuple[str, str], list[Task]] = {}
    codes = {code: language for language, code in LANGUAGES.items()}
    too_long = 0
    # By newline only: U+2028 occurs inside strings.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}): a LIFEBench file (JSONL) is needed."
            ) from error
        missing = sorted(FIELDS - row.keys()) if isinstance(row, dict) else sorted(FIELDS)
        if missing:
            raise ValueError(f"{path}, line {number} lacks {missing}: a LIFEBench file is needed.")
        language = codes.get(row["lang"])
        if max_characters is not None and language in languages and len(row["task"]) > max_characters:
            too_long += 1
        elif language in languages:
            task = Task(str(row["id"]), language, row["category"], split_off_length(row["task"]))
            groups.setdefault((language, row["category"]), []).append(task)
    if too_long:
        logger.warning("%s: %d tasks of more than %d characters are left out", path, too_long, max_characters)
    turns = [task for turn in zip_longest_lists(list(groups.values())) for task in turn]
    if limit is not None and len(turns) < limit:
        raise ValueError(f"{path} has {len(turns)} tasks in {languages}, fewer than num_prompts={limit}.")
    if not turns:
        raise ValueError(f"{path} has no tasks in {languages}.")
    return turns[:limit]


def zip_longest_lists(groups: list[list[Task]]) -> list[list[Task]]:
    """The first of each list, the second of each, and so on; lists that are over are passed by."""
    longest = max((len(group) for group in groups), default=0)
    return [[group[turn] for group in groups if turn < len(group)] for turn in range(longest)]
