"""The gates of models, as keywords of the gated ops: `gated_mlp(x, w, v, p, **gates.GPT_OSS)`.

A model's own limits and slopes may differ from layer to layer; `integrations.transformers` reads them from the model.
"""

from typing import Any

GPT_OSS: dict[str, Any] = {"activation": "swish", "beta": 1.702, "limit": 7.0, "offset": 1.0}  # and MiniMax
DEEPSEEK_V4: dict[str, Any] = {"activation": "silu", "limit": 10.0}
STEP: dict[str, Any] = {"activation": "silu_clamped", "limit": 7.0}
KIMI: dict[str, Any] = {"activation": "silu_bounded"}
QUICK_GELU: dict[str, Any] = {"activation": "swish", "beta": 1.702}
RELU2: dict[str, Any] = {"activation": "relu2"}
