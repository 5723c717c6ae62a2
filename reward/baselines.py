"""Length penalties ready for `reward_funcs`, as `reward.baselines.gsm8k_gr3`; `reward.rules` explains the rules.

Their knobs are the papers' where there are any, and otherwise fit a `max_completion_length` of 512 tokens for GSM8K and
4096 for mathematics (`reward.mathematics`), with targets of a quarter of that. For the sandbox they fit what its base
policy writes, 12 tokens in the mean and 48 at the 99th percentile; its prices per token are higher than the papers',
for its completions have tens of tokens, not thousands. With other knobs, make one in a module of your own.
"""

from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

from reward.gsm8k import gsm8k_reward
from reward.length_reward import LengthReward
from reward.mathematics import math_reward
from reward.sandbox import sandbox_reward

# TRL's own, in which all answers pay; the first three are to be added to the task reward. The cosine grades mathematics
# itself: it needs conversations, and the gold answers in the column `solution`.
trl_soft_overlong_48 = get_soft_overlong_punishment(48, 36)
trl_soft_overlong_512 = get_soft_overlong_punishment(512, 128)
trl_soft_overlong_4096 = get_soft_overlong_punishment(4096, 1024)
trl_math_cosine_4096 = get_cosine_scaled_reward(4096)

# GSM8K. The linear one pays correct answers 1 down to 0.6, so that the default gate_threshold of 0.5 still tells them
# from wrong ones. The wanted lengths of L1 are the dataset's column `target_length`, which the prompt has to name.
gsm8k_linear = LengthReward("linear", gsm8k_reward, alpha=0.4, max_length=512)
gsm8k_truncation = LengthReward("truncation", gsm8k_reward, limit=128)
gsm8k_l1_exact = LengthReward("l1_exact", gsm8k_reward, target_length="target_length")
gsm8k_l1_max = LengthReward("l1_max", gsm8k_reward, target_length="target_length")
gsm8k_kimi = LengthReward("kimi", gsm8k_reward)
gsm8k_arora = LengthReward("arora", gsm8k_reward)
gsm8k_alp = LengthReward("alp", gsm8k_reward)
gsm8k_shorter_better = LengthReward("shorter_better", gsm8k_reward)
gsm8k_gr3 = LengthReward("gr3", gsm8k_reward)
gsm8k_laser = LengthReward("laser", gsm8k_reward, target_length=128)
gsm8k_laser_d = LengthReward("laser_d", gsm8k_reward, candidates=range(64, 513, 64))
gsm8k_leash = LengthReward("leash", gsm8k_reward, target_length=128)

# Mathematics.
math_linear = LengthReward("linear", math_reward, alpha=0.4, max_length=4096)
math_truncation = LengthReward("truncation", math_reward, limit=1024)
math_l1_exact = LengthReward("l1_exact", math_reward, target_length="target_length")
math_l1_max = LengthReward("l1_max", math_reward, target_length="target_length")
math_kimi = LengthReward("kimi", math_reward)
math_arora = LengthReward("arora", math_reward)
math_alp = LengthReward("alp", math_reward)
math_shorter_better = LengthReward("shorter_better", math_reward)
math_gr3 = LengthReward("gr3", math_reward)
math_laser = LengthReward("laser", math_reward, target_length=1024)
math_laser_d = LengthReward("laser_d", math_reward, candidates=range(512, 4097, 512))
math_leash = LengthReward("leash", math_reward, target_length=1024)

# The sandbox.
sandbox_linear = LengthReward("linear", sandbox_reward, alpha=0.4, max_length=48)
sandbox_truncation = LengthReward("truncation", sandbox_reward, limit=24)
sandbox_l1_exact = LengthReward("l1_exact", sandbox_reward, target_length=12, alpha=1e-2)
sandbox_l1_max = LengthReward("l1_max", sandbox_reward, target_length=12, alpha=1e-2)
sandbox_kimi = LengthReward("kimi", sandbox_reward)
sandbox_arora = LengthReward("arora", sandbox_reward)
sandbox_alp = LengthReward("alp", sandbox_reward, beta=5e-3)
sandbox_shorter_better = LengthReward("shorter_better", sandbox_reward, beta=2e-2)
sandbox_gr3 = LengthReward("gr3", sandbox_reward)
sandbox_laser = LengthReward("laser", sandbox_reward, target_length=12)
sandbox_laser_d = LengthReward("laser_d", sandbox_reward, candidates=range(4, 129, 4))
sandbox_leash = LengthReward("leash", sandbox_reward, target_length=10)
