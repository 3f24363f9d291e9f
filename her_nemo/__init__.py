"""her_nemo: SFT, reward model and PPO for dual-layer role-play on Megatron-core, from Hugging Face and back."""

from __future__ import annotations

__version__ = "0.1.0"
