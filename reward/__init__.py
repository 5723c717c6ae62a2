"""Reward functions for TRL: task rewards, and the sequence-level length penalties in use today.

Everything named here can be given to `reward_funcs` by its dotted path, as `reward.gsm8k.gsm8k_reward`.
"""
