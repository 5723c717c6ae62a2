"""The programs that measure speed: that every case is what it says, what it counts, and how cases are compared."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ragged import make_rollout
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer

from eval.speed import __main__ as speed
from eval.speed import batching, queue, trainers
from eval.speed.decoding import DECODING
from eval.speed.harness import MARK, Measurement, Program, Sizes, measure_in_process, median_ratio, peak_memory
from eval.speed.memory import QWEN, count_parameters, qwen_config, training_memory
from eval.speed.pretraining import PRETRAINING, make_rollouts
from eval.speed.rollouts import ROLLOUTS, make_job
from eval.speed.serving import SERVING, answer_all
from eval.speed.trainers import CRITIC, CRITIC_CASES, held_numbers, make_critic_run
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.prediction import padding_steps, predict_length
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import RolloutMetadata, write_rollouts
from lenvm_rl.tokenization import tokenizer_fingerprint

SIZES = {"hidden": 32, "layers": 1, "vocab": 64, "threads": torch.get_num_threads()}
TRAINING = trainers.TrainingSizes(**SIZES, prompt_tokens=4, completion_tokens=4, batch=4, updates=2)


@pytest.mark.parametrize("case", PRETRAINING.cases)
def test_every_case_of_pretraining_counts_its_tokens(case):
    counts = {"prompts": 4, "samples": 4, "prompt_tokens": 8, "median_tokens": 6, "batch": 16, "updates": 2}
    sizes = PRETRAINING.sizes(**SIZES, **counts)
    result, rollouts = PRETRAINING.measure(case, sizes), make_rollouts(sizes)
    assert len(rollouts) == 16 and result.seconds > 0
    # A batch is the whole data set, so that both steps have the same tokens.
    tokens = sum(len(each["prompt_ids"]) + len(each["completion_ids"]) - 1 for each in rollouts)
    if case in ("trainer", "padded"):
        assert result.tokens == 2 * tokens and result.count == pytest.approx(32 / result.seconds)
    elif case == "shared":
        once = sum(len(rollouts[index]["prompt_ids"]) - 1 for index in range(0, 16, 4))
        each = sum(len(rollout["completion_ids"]) for rollout in rollouts)
        # Once per row: prompts are repeated where their completions do not fit in one.
        assert 2 * (once + each) <= result.tokens < 2 * tokens
    else:
        assert result.tokens % 2 == 0 and result.count == 0


@pytest.mark.parametrize("case", DECODING.cases)
def test_every_case_of_decoding_is_timed(case):
    result = DECODING.measure(case, DECODING.sizes(**SIZES, candidates=3, prefix=12, tokens=4, rows=2))
    # A step gives every row a token. Differences of two short times may have any sign.
    assert result.tokens == 2 and (result.seconds > 0 or case != "floor")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder of a policy with a tokenizer and a chat template, prompts beside it."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    prompts = [json.dumps({"prompt": f"w{number} w7"}) for number in range(8, 14)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", SERVING.cases)
def test_every_case_of_serving_is_timed(case, served):
    sizes = SERVING.sizes(model=str(served), threads=SIZES["threads"], vocab=64, candidates=3, tokens=4, rows=3)
    result = SERVING.measure(case, sizes)
    # All requests' tokens but their first, or those of a step.
    assert result.tokens == {"alone": 12, "together": 12, "floor_alone": 1, "floor_together": 3}[case]
    assert result.seconds > 0 or "floor" not in case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_requests_come_together_or_one_after_the_other(served, dtype, monkeypatch):
    sizes = SERVING.sizes(model=str(served), candidates=3, tokens=4, rows=3, dtype=dtype, min_p=0.01)
    told = {}

    def spied(engine, bodies, together):
        steps, step = [], engine._step
        engine._step = lambda jobs: steps.append(len(jobs)) or step(jobs)
        found = answer_all(engine, bodies, together)
        del engine._step
        told[together, len(bodies), json.loads(bodies[0])["max_tokens"]] = steps, found
        return found

    monkeypatch.setattr("eval.speed.serving.answer_all", spied)
    for case in ("alone", "together"):
        SERVING.measure(case, sizes)
    (alone, answers), (beside, others) = told[False, 3, 5], told[True, 3, 5]
    assert alone == [1] * 15 and max(beside) == 3 and 5 <= len(beside) < 15
    for one, other in zip(answers, others, strict=True):
        # Nothing ends them, and all that is asked for is in the guidance.
        assert [len(job.choices[0].token_ids) for job in (one, other)] == [5, 5] and one.guidance == other.guidance
        assert (one.guidance.strength, one.guidance.top_k, one.guidance.min_p) == (1.0, 3, 0.01)
        assert one.guidance.temperature == 0.7
    with pytest.raises(ValueError, match="--model"):
        SERVING.sizes()


@pytest.mark.parametrize("case", ROLLOUTS.cases)
def test_rollouts_are_sampled_by_the_job_that_the_case_says(case, served, monkeypatch):
    class Engine:
        def __init__(self, **arguments):
            self.arguments = arguments
            dtype = getattr(torch, arguments["dtype"])
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=96, dtype=dtype))

        def generate(self, prompts, params, use_tqdm):
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[9, 8, EOS])]) for _ in prompts]

    vllm = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    sizes = ROLLOUTS.sizes(
        model=str(served),
        dataset_name=str(served / "prompts.jsonl"),
        prompts=5,
        batch=2,
        tokens=4,
        context=96,
        chat=True,
    )
    job, result = make_job(case, sizes), ROLLOUTS.measure(case, sizes)
    assert (job.engine, len(job), job.settings.batch_size) == (case.partition("_")[0], 5, 2)
    assert job.prompts[0] == [{"role": "user", "content": "w8 w7"}] and EOS in job.eos_token_ids
    dtype = "bfloat16" if "half" in case else "float32"
    if job.engine == "vllm":
        assert job.engine_arguments == {"dtype": dtype, "max_model_len": 96, "max_num_seqs": 2}
        # Three tokens of each, the end among them.
        assert result.tokens == 15
    else:
        assert job.model.dtype == getattr(torch, dtype) and 5 <= result.tokens <= 20
    assert result.count > 0
    with pytest.raises(ValueError, match="--dataset_name"):
        ROLLOUTS.sizes(model="policy")


@pytest.mark.parametrize("case", CRITIC.cases)
def test_every_case_of_the_critic_is_the_run_that_it_says(case, tmp_path):
    one, trainer = CRITIC_CASES[case], make_critic_run(case, TRAINING, tmp_path)
    lenvm, critic = trainer.length_value_model, getattr(trainer, "critic", None)
    assert (lenvm and lenvm.config.form) == one.form and hasattr(trainer.model, "peft_config") == one.adapters
    assert (trainer.beta > 0) == one.reference and (critic and critic.config.form) == one.critic_form
    if one.form is not None:
        # Only a head on a reference's forward makes none of its own.
        assert (trainer._frozen._reference is not None) == (one.form == "head")


@pytest.mark.parametrize("case", trainers.PPO_FORMS)
def test_every_case_of_ppo_has_the_critic_that_it_says(case, tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "legacy_ppo", lambda: None)
    trainer = trainers.make_ppo_run(case, trainers.PPOSizes(**vars(TRAINING)), tmp_path)
    found = [each and each.config.form for each in (trainer.critic, trainer.length_value_model)]
    assert tuple(found) == trainers.PPO_FORMS[case] and trainer.beta > 0


def test_updates_are_timed_and_weights_that_are_shared_count_once(tmp_path):
    found = CRITIC.measure("head_adapters", TRAINING)
    plain, head, adapter = (
        held_numbers(make_critic_run(case, TRAINING, tmp_path / case))
        for case in ("plain_both", "head_adapters", "adapter")
    )
    assert found.tokens == 16 and found.seconds > 0 and found.count == head
    # All linear layers of the decoder get a pair of rank 16.
    assert head - plain == 32 * 32 + 32 + 32 + 1 < adapter - plain
    # A critic of form head is a second such head and no decoder.
    assert held_numbers(make_critic_run("ppo_adapters", TRAINING, tmp_path / "ppo")) - plain == 2 * (head - plain)


def test_a_ratio_of_medians_by_hand():
    assert median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).estimate == 2.0
    found = median_ratio([3.0] * 5, [2.0] * 5)
    assert (found.estimate, found.low, found.high) == (1.5, 1.5, 1.5)
    assert np.isnan(median_ratio([3.0], [2.0]).low)


def test_cases_are_compared_by_the_time_of_a_token_with_their_own_baseline():
    measured = {
        "plain": [Measurement(100, 1.0, 7, 3 * 2**20), Measurement(100, 2.0, 7, 5 * 2**20)],
        "full": [Measurement(200, 3.0, 0, 6 * 2**20), Measurement(200, 6.0, 0, 10 * 2**20)],
    }
    baselines = {"limit": "plain", "own": {"full": "plain"}}
    program = Program("", "", Sizes, {"plain": "a", "full": "b"}, None, baselines, (), {"memory": "plain"})
    plain, full = program.compare(measured)
    assert (plain["title"], plain["count"], plain["peak_bytes"], plain["own"]) == ("a", 7, 4 * 2**20, None)
    assert plain["speed"] == pytest.approx(1 / 0.015) and plain["limit"] is None
    # 0.0225 over 0.015 seconds a token, in both turns.
    assert full["own"].estimate == pytest.approx(1.5) == full["own"].low == full["limit"].high
    assert full["memory"].estimate == 2.0 and plain["memory"] is None


def test_cases_take_turns_in_processes_of_their_own(monkeypatch, capsys):
    asked = []

    def fake(command, **options):
        asked.append(command[command.index("--case") + 1])
        found = {"tokens": 4, "seconds": 2.0, "count": 1_500_000, "peak_bytes": 5 * 2**20}
        return subprocess.CompletedProcess(command, 0, f"said\n{MARK}" + json.dumps(found), "")

    monkeypatch.setattr(subprocess, "run", fake)
    speed.main(["pretraining", "--repetitions", "3"])
    names = list(PRETRAINING.cases)
    assert asked == names + names[::-1] + names
    asked.clear()
    speed.main(["critic", "--repetitions", "2", "--cases", "ppo_adapters", "plain_adapters"])
    assert asked == ["plain_adapters", "ppo_adapters", "ppo_adapters", "plain_adapters"]
    with pytest.raises(ValueError, match="cases"):
        speed.main(["critic", "--cases", "nonsense"])
    capsys.readouterr()
    speed.main(["critic", "--repetitions", "2"])
    told = capsys.readouterr().out
    assert all(title in told for title in CRITIC.cases.values()) and "1.000 [1.000, 1.000]" in told
    # In mebibytes and millions.
    assert " 5 " in told and " 1.50 " in told


def test_a_case_is_measured_where_it_is_asked_for_with_its_peak(monkeypatch, capsys):
    peaks = iter([100, 350])
    monkeypatch.setattr("eval.speed.harness.peak_memory", lambda: next(peaks))
    program = Program("", "", Sizes, {"floor": ""}, lambda case, sizes: Measurement(1, 2.0), {})
    program.measure_here("floor", Sizes(threads=torch.get_num_threads()))
    found = json.loads(capsys.readouterr().out.removeprefix(MARK))
    assert found["seconds"] == 2.0 and found["peak_bytes"] == 250
    with pytest.raises(SystemExit):
        speed.main(["decoding", "--case", "nonsense"])


def test_memory_that_is_held_shows():
    before, held = peak_memory(), bytearray(10**9)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() > before or before > 10**9


def test_a_case_that_fails_in_its_own_process_says_its_sentence(monkeypatch):
    ends = iter(["Traceback: deep\n\nerror: There is no model at 'x'.\n(how to see more)", "Traceback: a defect"])
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 1, "", next(ends))
    )
    with pytest.raises(RuntimeError, match="There is no model at 'x'") as caught:
        measure_in_process("decoding", "plain", Sizes())
    assert "Traceback" not in str(caught.value)
    with pytest.raises(RuntimeError, match="Traceback: a defect"):
        measure_in_process("decoding", "plain", Sizes())


def test_steps_of_every_order_by_hand():
    # Prompts of 5, 3, 4 tokens, two completions each, batches of 2.
    lengths, groups = np.array([2, 4, 9, 7, 3, 5]), np.array([0, 0, 1, 1, 2, 2])
    costs = batching.replay(lengths, groups, np.array([5, 5, 3, 3, 4, 4]), np.array([6, 6, 2, 2, 4, 4.0]), 2, 2000)
    # By prompt length and by prediction, a prompt's completions share a batch: 9 + 5 + 4 steps, 2 + 2 + 2 wasted.
    for name in ("prompt length", "predicted length", "random prompts"):
        assert (costs[name]["steps"], costs[name]["padding"]) == (18, 6)
    # 9, 7 | 5, 4 | 3, 2.
    assert (costs["realised length"]["steps"], costs["realised length"]["padding"]) == (17, 4)
    assert costs["predicted length"]["prompt length"] == 1.0 and costs["predicted length"]["realised length"] == 1.5
    # The mean over all pairings of six: 15 pairs, each in one batch out of five: |differences| sum to 50, times 1/5.
    differences = sum(abs(int(a) - int(b)) for i, a in enumerate(lengths) for b in lengths[:i])
    assert costs["random"]["padding"] == pytest.approx(differences / 5, rel=0.05)
    assert costs["predicted length"]["random"] == 6 / costs["random"]["padding"]
    # Nothing to waste: no ratio to that.
    assert np.isnan(batching.replay(lengths * 0 + 3, groups, lengths, lengths, 2, 3)["random"]["random"])


def write_batching(folder):
    """Rollouts of 12 prompts, and a model of random weights."""
    draw = torch.Generator().manual_seed(0)
    tokenizer, model = tiny_tokenizer(), tiny_length_value_model(tokenizer=tiny_tokenizer())
    prompts = [torch.randint(6, 64, (1 + index % 5,), generator=draw).tolist() for index in range(12)]
    lengths = torch.randint(1, 40, (12, 3), generator=draw).tolist()
    rollouts = [
        make_rollout(prompts[group], [7] * length + [EOS], group=group)
        for group in range(12)
        for length in lengths[group]
    ]
    write_rollouts(folder / "r.jsonl", rollouts, RolloutMetadata("p", tokenizer_fingerprint(tokenizer), {}, 0, [EOS]))
    model.save_pretrained(folder / "lenvm")
    return [" ".join(f"w{i}" for i in prompt) for prompt in prompts], tokenizer, model, rollouts


def test_the_orders_are_those_of_the_sampler(tmp_path):
    prompts, tokenizer, model, rollouts = write_batching(tmp_path)
    args = batching.BatchingArguments(str(tmp_path / "r.jsonl"), str(tmp_path / "lenvm"), batch_size=7, shuffles=5)
    costs = batching.measure_batching(args)
    lengths = np.array([len(each["completion_ids"]) for each in rollouts])
    for name, option in (("prompt length", None), ("predicted length", model)):
        sampler = TransformersJob(
            tiny_llama(), tokenizer, prompts, SamplingSettings(3, 50, 7), 0, length_value_model=option
        )
        batches = sampler.plan()
        assert costs[name]["steps"] == batching.decode_steps(lengths, batches)
        assert costs[name]["padding"] == padding_steps(lengths, batches)
    assert costs["predicted length"]["padding"] != costs["prompt length"]["padding"]
    assert len(set(predict_length(model, tokenizer, prompts).tolist())) == 12


def test_batching_is_a_subcommand(tmp_path, capsys):
    write_batching(tmp_path)
    options = ["--rollouts", str(tmp_path / "r.jsonl"), "--length_value_model", str(tmp_path / "lenvm")]
    speed.main(["batching", *options, "--batch_size", "6", "--shuffles", "8"])
    shown = capsys.readouterr().out
    for name in ("random prompts", "prompt length", "predicted length", "realised length"):
        assert name in shown
    assert "over random" in shown and "nan" not in shown
    with pytest.raises(SystemExit):
        speed.main(["batching", "--rollouts", "r.jsonl"])
    assert "--length_value_model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="batch_size"):
        speed.main(["batching", *options, "--batch_size", "0"])


def test_parameters_and_bytes_are_those_of_a_model_that_is_there():
    """A Llama of width 16 with 2 layers: counted by hand, and beside the model and LoRA themselves."""
    policy = tiny_llama(layers=2)
    decoder = policy.base_model
    n = count_parameters(policy.config)
    assert n.policy == sum(each.numel() for each in policy.parameters())
    assert n.decoder == sum(each.numel() for each in decoder.parameters())
    width = policy.config.hidden_size
    assert n.head == (width * width + width) + (width + 1)
    model = LengthValueModel.from_backbone(decoder, gamma=0.9, form="adapter", tokenizer=tiny_tokenizer())
    assert n.adapters + n.head == sum(each.numel() for each in model.parameters() if each.requires_grad)
    memory = training_memory(n)
    plain = memory["adapters, without a length value model"]
    assert plain == 2 * n.policy + 16 * n.adapters
    assert memory["adapters, length value model of form head"] - plain == 4 * n.head
    assert memory["adapters, length value model of form full"] - plain == 4 * (n.decoder + n.head)
    critic = memory["the same, and a learned critic of its size"] - memory["whole policy and a reference, form full"]
    assert critic == 16 * (n.decoder + n.head)


def test_sizes_of_qwen_are_those_that_its_names_say():
    counts = {name: count_parameters(qwen_config(name)).policy / 1e9 for name in QWEN}
    # Parameters in 10^9 as the models' cards give them.
    assert [round(count, 2) for count in counts.values()] == [0.49, 7.62, 32.76]


def test_each_prompt_waits_once_whatever_was_sampled_of_it(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {n // 3}"}) + "\n" for n in range(30)))
    args = queue.QueueArguments("policy", "lenvm", str(path), requests=20)
    found = queue.read_requests(args)
    assert sorted(found) == [f"question {n}" for n in range(10)] != found
    assert found == queue.read_requests(args)
    args.requests, args.chat = 4, True
    assert queue.read_requests(args) == [[{"role": "user", "content": text}] for text in found[:4]]


def test_a_queue_is_served_in_the_order_of_its_priorities_and_compared():
    """An engine with one place that serves one token a second: four requests of 3, 1, 4 and 1 tokens."""
    tokens = [3, 1, 4, 1]

    class Engine:
        def __init__(self):
            self.waiting, self.clock = [], 0

        def add_request(self, name, prompt, params, priority):
            self.waiting.append((priority, len(self.waiting), int(name)))

        def has_unfinished_requests(self):
            return bool(self.waiting)

        def step(self):
            self.waiting.sort()
            _, _, number = self.waiting.pop(0)
            self.clock += tokens[number]
            output = SimpleNamespace(token_ids=[0] * tokens[number])
            return [SimpleNamespace(finished=True, request_id=f"{number}-x", outputs=[output])]

    def latency(priorities):
        engine = Engine()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: options))
            patch.setattr(queue, "now", lambda: engine.clock)
            args = queue.QueueArguments("policy", "lenvm", "prompts.jsonl")
            return queue.serve_all(SimpleNamespace(llm_engine=engine), [[1]] * 4, priorities, args)

    first, oracle = latency([0] * 4), latency(tokens)
    assert first[:, 0].tolist() == [3, 4, 8, 9] and oracle[:, 0].tolist() == [5, 1, 9, 2]
    assert first[:, 1].tolist() == oracle[:, 1].tolist() == tokens
    rows = queue.make_rows({queue.FIRST_COME: first[:, 0], queue.ORACLE: oracle[:, 0]}, seed=0)
    assert [row["mean"] for row in rows] == [6.0, 4.25] and rows[0]["ratio"] is None
    assert rows[1]["ratio"].estimate == pytest.approx(4.25 / 6) and rows[1]["ratio"].low <= 4.25 / 6
