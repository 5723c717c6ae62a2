"""Every program reads length value models that share their decoder, given the base that they were fitted on."""

import json

import pytest
import torch
from ragged import EOS, random_rollouts
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from eval import length_tokens
from eval.gradient import __main__ as gradient
from eval.length_control import __main__ as length_control
from eval.length_prediction import __main__ as length_prediction
from eval.speed import __main__ as speed
from eval.speed import batching
from eval.tradeoff import __main__ as tradeoff
from eval.tradeoff.sampler import value_scale
from eval.viewer import __main__ as viewer
from eval.viewer.tokens import token_values
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.prediction import length_aware_batches, padding_steps, predict_length
from lenvm_rl.rollouts.record import RolloutMetadata, read_rollouts, write_rollouts
from lenvm_rl.tokenization import tokenizer_fingerprint

SHARED = ["adapter", "head"]


def always_right(completion_ids, **columns):
    return [1.0] * len(completion_ids)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, another policy of its shape, both forms, rollouts and prompts."""
    root, tokenizer = tmp_path_factory.mktemp("forms"), tiny_tokenizer(chat=True)
    for name, seed in (("base", 0), ("trained", 5)):
        tiny_llama(seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for form in SHARED:
        model = LengthValueModel.from_backbone(tiny_llama(), gamma=0.9, tokenizer=tokenizer, form=form)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.4)
        model.save_pretrained(root / form)
    metadata = RolloutMetadata("base", tokenizer_fingerprint(tokenizer), {}, 0, [EOS])
    write_rollouts(root / "rollouts.jsonl", random_rollouts(24, cut_share=0.0), metadata)
    rows = [{"prompt": f"w{6 + n} w{20 + n}"} for n in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "id": "1",
        "category": "qa",
        "lang": "en",
        "task": "w6 w7. It must be {word_count_type} {word_count} words.",
    }
    (root / "lifebench.jsonl").write_text(json.dumps(task) + "\n")
    run = {"policy": "base", "trained": {"ours": "trained"}, "data": {"dataset_name": "x"}, "max_new_tokens": 6}
    for form in SHARED:
        (root / f"run_{form}").mkdir()
        paths = {"policy": str(root / "base"), "trained": {"ours": str(root / "trained")}}
        record = {**run, **paths, "length_value_model": str(root / form), "reward": "test_eval_forms.always_right"}
        (root / f"run_{form}" / "run.json").write_text(json.dumps(record))
    return root


def by_hand(place, form):
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    return LengthValueModel.from_pretrained(place / form, base=base).freeze()


def columns_of(place):
    rollouts, _ = read_rollouts(place / "rollouts.jsonl")
    return rollouts["prompt_ids"][:], rollouts["completion_ids"][:]


def refused(call, arguments):
    with pytest.raises(ValueError, match="--base"):
        call(arguments)


@pytest.mark.parametrize("form", SHARED)
def test_the_viewer_and_length_tokens_show_its_values(place, form, tmp_path):
    files = {"rollouts": str(place / "rollouts.jsonl"), "length_value_model": str(place / form)}
    completions = columns_of(place)[1]
    expected = token_values(by_hand(place, form), read_rollouts(place / "rollouts.jsonl")[0])
    args = viewer.ViewerArguments(**files, rows=[3], output=str(tmp_path / "v.html"), base=str(place / "base"))
    (shown,) = viewer.main(args)["completions"]
    assert shown["remaining"][:-1] == pytest.approx(expected[3].remaining.tolist(), rel=1e-4)
    settings = {
        "unit": "token",
        "min_count": 1,
        "contexts": 0,
        "output_dir": str(tmp_path / "t"),
        "base": str(place / "base"),
    }
    found = length_tokens.main(length_tokens.TokenArguments(**files, **settings))
    total = sum(float(values.horizon_shift.sum()) for values in expected)
    rows = (tmp_path / "t" / "length_tokens.csv").read_text().splitlines()[1:]
    # token_id, token, count, prompts, shift
    cells = [row.split(",") for row in rows]
    assert sum(float(cell[2]) * float(cell[4]) for cell in cells) == pytest.approx(total, rel=1e-4)
    assert found["occurrences"] == sum(map(len, completions))
    # Without the base there is neither a decoder nor, here, a tokenizer.
    named = {"tokenizer_name_or_path": str(place / "base")}
    refused(viewer.main, viewer.ViewerArguments(**files, **named, output=str(tmp_path / "v.html")))
    refused(length_tokens.main, length_tokens.TokenArguments(**files, **named, output_dir=str(tmp_path / "o")))


@pytest.mark.parametrize("form", SHARED)
def test_length_prediction_measures_it(place, form, tmp_path):
    files = {"rollouts": str(place / "rollouts.jsonl"), "length_value_model": str(place / form)}
    settings = {"output_dir": str(tmp_path), "base": str(place / "base")}
    report = length_prediction.main(length_prediction.PredictionArguments(**files, **settings, num_resamples=20))
    completions = columns_of(place)[1]
    values = token_values(by_hand(place, form), read_rollouts(place / "rollouts.jsonl")[0])
    errors = [abs(float(one.remaining[0]) - len(ids)) for one, ids in zip(values, completions, strict=True)]
    found = report["domains"]["all"]["length_mae_at_0"]["estimate"]
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    refused(length_prediction.main, length_prediction.PredictionArguments(**files, output_dir=str(tmp_path)))


@pytest.mark.parametrize("form", SHARED)
def test_speed_batching_orders_by_its_predictions(place, form, capsys):
    files = str(place / "rollouts.jsonl"), str(place / form)
    costs = batching.measure_batching(batching.BatchingArguments(*files, str(place / "base"), batch_size=5, shuffles=3))
    prompts, completions = columns_of(place)
    # Two completions of a prompt follow each other; it is the first one's that counts.
    texts = [" ".join(f"w{token}" for token in prompts[row - row % 2]) for row in range(len(prompts))]
    predicted = predict_length(by_hand(place, form), tiny_tokenizer(), texts)
    batches = length_aware_batches(predicted.tolist(), 5)
    lengths = torch.tensor([len(ids) for ids in completions])
    assert costs["predicted length"]["padding"] == padding_steps(lengths, batches)
    options = ["--rollouts", files[0], "--length_value_model", files[1], "--batch_size", "5", "--shuffles", "3"]
    speed.main(["batching", *options, "--base", str(place / "base")])
    assert "padding steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--base"):
        speed.main(["batching", *options])


@pytest.mark.parametrize("form", SHARED)
def test_length_control_guides_by_it_with_the_policy_as_its_base(place, form, tmp_path):
    args = length_control.LengthControlArguments(
        policy=str(place / "base"), length_value_model=str(place / form), dataset_name=str(place / "lifebench.jsonl"),
        targets=[4], modes=["equal_to"], arms=["base", "guided"], cap_extra=4, output_dir=str(tmp_path),
    )  # fmt: skip
    assert {row["arm"] for row in length_control.main(args)["cells"]} == {"base", "guided"}
    completed, source = length_control.with_models(args)
    sampler, _ = length_control.load_sampler(completed, None)
    prompt, completion = [6, 7], [8, 9, EOS]
    assert value_scale(sampler.length_value_model, [prompt], [completion]) == pytest.approx(
        value_scale(by_hand(place, form), [prompt], [completion]), rel=1e-4
    )
    assert source.folder is None


@pytest.mark.parametrize("form", SHARED)
def test_tradeoff_and_gradient_take_the_base_policy_for_it_not_the_trained_one(place, form, tmp_path):
    args = tradeoff.TradeoffArguments(
        run_dir=str(place / f"run_{form}"), dataset_name=str(place / "data.jsonl"), num_prompts=2, num_samples=2,
        strengths=[1.0], budget_quantiles=[0.5], output_dir=str(tmp_path / "t"),
    )  # fmt: skip
    rows = tradeoff.main(args)
    assert [row["name"] for row in rows] == ["base", "cut at q0.5", "tilt +1", "ours"]
    settings = {"num_batches": 2, "batch_size": 4, "group_size": 2, "output_dir": str(tmp_path / "g")}
    settings |= {"run_dir": str(place / f"run_{form}"), "dataset_name": str(place / "data.jsonl")}
    args, data, pad = gradient.complete(gradient.GradientArguments(**settings, policy="ours"))
    assert args.policy == str(place / "trained") and args.base == str(place / "base")
    loaded = []
    original = gradient.load_length_value_model

    def load(*arguments, **options):
        loaded.append(original(*arguments, **options))
        return loaded[-1]

    gradient.load_length_value_model = load
    try:
        assert gradient.main(gradient.GradientArguments(**settings, policy="ours"))["measured_on"]["gamma"] == 0.9
    finally:
        gradient.load_length_value_model = original
    ids = torch.tensor([[6, 7, 8]])
    torch.testing.assert_close(loaded[0](ids).values, by_hand(place, form)(ids).values)
    assert gradient.complete(gradient.GradientArguments(**settings, base="x"))[0].base == "x"
