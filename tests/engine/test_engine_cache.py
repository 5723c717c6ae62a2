"""A cache of the length value model that is too small for all rows: they are read again, and nothing else changes."""

from engine_parts import ASKED, an_engine, as_prompts, guide_of, parameters, random_prompts, references, tokens


def test_a_bounded_cache_changes_nothing(models):
    prompts = random_prompts(len(ASKED), seed=3, longest=20)
    config = {"length_value_model": models[1], "length_value_cache_tokens": 120}
    with an_engine(*models, additional_config=config) as llm:
        outputs = llm.generate(as_prompts(prompts), [parameters(each) for each in ASKED], use_tqdm=False)
        assert guide_of(llm).scorer.max_cached_tokens == 120
    assert [tokens(each) for each in outputs] == references(models, prompts, ASKED)
