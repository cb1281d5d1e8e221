"""rlhf: a thin trainer layer that runs SFT, reward model and PPO with the losses of rlhf_kernels.

Each stage is one module with one entry point: `rlhf.sft.train_sft`, `rlhf.reward.train_reward`, `rlhf.ppo.train_ppo`
and `rlhf.preference.train_dpo`. The command line is `rlhf.cli`. Importing `rlhf` alone does not load torch.
"""
