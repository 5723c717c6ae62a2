"""Length penalties ready for `reward_funcs`, as `reward.baselines.gsm8k_gr3`; `reward.rules` explains the rules.

Their knobs are the papers' where there are any, and otherwise fit a `max_completion_length` of 512 tokens for GSM8K and
4096 for mathematics (`reward.mathematics`), with targets of a quarter of that. ALP's is its form at the scale of each
task: an answer of the target's length to a prompt that is always solved pays 0.06. For the sandbox they fit what its
base policy writes; its prices per token are higher than the papers', for its completions are short. With other knobs,
make one in a module of your own.
"""

from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

from reward.gsm8k import gsm8k_reward
from reward.length_reward import LengthReward
from reward.mathematics import math_reward
from reward.sandbox import sandbox_reward

# TRL's own, in which all answers pay; the first two (and the sandbox's, below) are to be added to the task reward. The
# cosine grades mathematics itself: it needs conversations, and the gold answers in the column `solution`.
trl_soft_overlong_512 = get_soft_overlong_punishment(512, 128)
trl_soft_overlong_4096 = get_soft_overlong_punishment(4096, 1024)
trl_math_cosine_4096 = get_cosine_scaled_reward(4096)

# GSM8K. The linear one pays correct answers 1 down to 0.6, so that the default gate_threshold of 0.5 still tells them
# from wrong ones. The wanted lengths of L1 are the dataset's column `target_length`, which the prompt has to name.
gsm8k_linear = LengthReward("linear", gsm8k_reward, alpha=0.4, max_length=512)
gsm8k_truncation = LengthReward("truncation", gsm8k_reward, limit=128)
gsm8k_cosine = LengthReward("cosine", gsm8k_reward, max_length=512)
gsm8k_l1_exact = LengthReward("l1_exact", gsm8k_reward, target_length="target_length")
gsm8k_l1_max = LengthReward("l1_max", gsm8k_reward, target_length="target_length")
gsm8k_kimi = LengthReward("kimi", gsm8k_reward)
gsm8k_arora = LengthReward("arora", gsm8k_reward)
gsm8k_alp = LengthReward("alp", gsm8k_reward, beta=5e-4)
gsm8k_pass_rate = LengthReward("pass_rate", gsm8k_reward)
gsm8k_shorter_better = LengthReward("shorter_better", gsm8k_reward)
gsm8k_gr3 = LengthReward("gr3", gsm8k_reward)
gsm8k_laser = LengthReward("laser", gsm8k_reward, target_length=128)
gsm8k_laser_d = LengthReward("laser_d", gsm8k_reward, candidates=range(64, 513, 64))
gsm8k_leash = LengthReward("leash", gsm8k_reward, target_length=128)

# Mathematics.
math_linear = LengthReward("linear", math_reward, alpha=0.4, max_length=4096)
math_truncation = LengthReward("truncation", math_reward, limit=1024)
math_cosine = LengthReward("cosine", math_reward, max_length=4096)
math_l1_exact = LengthReward("l1_exact", math_reward, target_length="target_length")
math_l1_max = LengthReward("l1_max", math_reward, target_length="target_length")
math_kimi = LengthReward("kimi", math_reward)
math_arora = LengthReward("arora", math_reward)
math_alp = LengthReward("alp", math_reward, beta=6e-5)
math_pass_rate = LengthReward("pass_rate", math_reward)
math_shorter_better = LengthReward("shorter_better", math_reward)
math_gr3 = LengthReward("gr3", math_reward)
math_laser = LengthReward("laser", math_reward, target_length=1024)
math_laser_d = LengthReward("laser_d", math_reward, candidates=range(512, 4097, 512))
math_leash = LengthReward("leash", math_reward, target_length=1024)

# The sandbox, in tokens, the end counted: what its base policy writes (the mean and the 99th percentile), the longest
# that is sampled, and what penalties with a target aim at. Prices per token go by what the mean length costs.
SANDBOX_MEAN_LENGTH, SANDBOX_P99_LENGTH, SANDBOX_MAX_LENGTH = 30, 80, 96
SANDBOX_TARGET_LENGTH = 15

trl_soft_overlong_sandbox = get_soft_overlong_punishment(SANDBOX_P99_LENGTH, 3 * SANDBOX_P99_LENGTH // 4)
sandbox_linear = LengthReward("linear", sandbox_reward, alpha=0.4, max_length=SANDBOX_P99_LENGTH)
sandbox_truncation = LengthReward("truncation", sandbox_reward, limit=SANDBOX_P99_LENGTH // 2)
# Lengths are exact, and what the cap cuts has its full length: no margin is needed.
sandbox_cosine = LengthReward("cosine", sandbox_reward, max_length=SANDBOX_MAX_LENGTH, margin=0)
sandbox_l1_exact = LengthReward(
    "l1_exact", sandbox_reward, target_length=SANDBOX_TARGET_LENGTH, alpha=0.12 / SANDBOX_MEAN_LENGTH
)
sandbox_l1_max = LengthReward(
    "l1_max", sandbox_reward, target_length=SANDBOX_TARGET_LENGTH, alpha=0.12 / SANDBOX_MEAN_LENGTH
)
sandbox_kimi = LengthReward("kimi", sandbox_reward)
sandbox_arora = LengthReward("arora", sandbox_reward)
sandbox_alp = LengthReward("alp", sandbox_reward, beta=0.06 / SANDBOX_MEAN_LENGTH)
sandbox_pass_rate = LengthReward("pass_rate", sandbox_reward)
sandbox_shorter_better = LengthReward("shorter_better", sandbox_reward, beta=0.24 / SANDBOX_MEAN_LENGTH)
sandbox_gr3 = LengthReward("gr3", sandbox_reward)
sandbox_laser = LengthReward("laser", sandbox_reward, target_length=SANDBOX_TARGET_LENGTH)
sandbox_laser_d = LengthReward(
    "laser_d",
    sandbox_reward,
    candidates=range(SANDBOX_MAX_LENGTH // 32, SANDBOX_MAX_LENGTH + 1, SANDBOX_MAX_LENGTH // 32),
)
sandbox_leash = LengthReward("leash", sandbox_reward, target_length=SANDBOX_TARGET_LENGTH)
