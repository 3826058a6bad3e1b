"""Configurations of OLMoE and OLMo2 with connections in place of residuals.

`connection` holds the options of every site:

* `kind`: `per_slot` (Frac- and Hyper-Connections) or `manifold` (mHC, mFC);
* `slots` n and `fractions` m: the stream has n slots of width hidden_size / m;
* per slot: `dynamic_beta`, `dynamic_alpha`, `norm` (rmsnorm, layernorm, none), `norm_affine`, `norm_eps`, `tanh`,
  `scale`, `initial_scale`;
* on a manifold: `sinkhorn_iterations`, `sinkhorn_eps`, `norm_eps`, `leave` (mean or learned).
"""

from typing import Any

from transformers import Olmo2Config, OlmoeConfig


class ConnectedOlmoeConfig(OlmoeConfig):
    """OLMoE, with `connection`."""

    model_type = "connected_olmoe"
    connection: dict[str, Any] | None = None


class ConnectedOlmo2Config(Olmo2Config):
    """OLMo2, with `connection`."""

    model_type = "connected_olmo2"
    connection: dict[str, Any] | None = None
