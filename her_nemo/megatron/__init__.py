"""The only room that knows megatron-core: models, parallel layouts, forward and backward, weights, checkpoints."""

import warnings

# megatron-core says at import that each fused kernel is absent (the demo runs without any), and torch that names
# megatron-core 0.16 calls will be renamed. Neither is anything a user of her_nemo can act on.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|megatron\.core)\.")
