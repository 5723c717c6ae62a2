"""Which published prompts are drawn, and how many of each set."""

import json

import pytest

from recipes.instruction_prompts import SOURCES, PromptArguments, draw_prompts, wanted_sets


@pytest.fixture
def data_dir(tmp_path):
    rows = {
        "ifeval": [{"prompt": f"i{n}"} for n in range(3)],
        "mt_bench": [{"turns": [f"m{n}", "and then?"]} for n in range(3)],
        "self_instruct": [{"instruction": f"s{n}", "instances": [{"input": "with"}]} for n in range(3)],
        "seed_tasks": [{"instruction": f"t{n}", "instances": [{"input": ""}]} for n in range(3)],
        "gsm8k": [{"question": "q" * (n + 1)} for n in range(3)],
    }
    for domain, (name, _) in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows[domain]))
    return tmp_path


def test_each_set_gives_its_own_number(data_dir):
    args = PromptArguments(str(data_dir), "", domains=["gsm8k=2", "seed_tasks", "self_instruct=9"], per_domain=1)
    drawn = draw_prompts(args)
    counts = {domain: sum(row["domain"] == domain for row in drawn) for domain in SOURCES}
    assert counts == {"gsm8k": 2, "seed_tasks": 1, "self_instruct": 3, "ifeval": 0, "mt_bench": 0}
    assert {row["prompt"] for row in drawn if row["domain"] == "self_instruct"} == {f"s{n}\n\nwith" for n in range(3)}
    assert draw_prompts(args) == drawn


def test_longer_prompts_are_left_out(data_dir):
    drawn = draw_prompts(PromptArguments(str(data_dir), "", domains=["gsm8k"], max_characters=2))
    assert sorted(row["prompt"] for row in drawn) == ["q", "qq"]


@pytest.mark.parametrize("domains", [["gsm9k"], ["gsm8k", "gsm8k=3"], ["gsm8k=0"], ["gsm8k=x"]])
def test_sets_that_are_none_are_refused(domains):
    with pytest.raises(ValueError, match="domains"):
        wanted_sets(domains, 5)
