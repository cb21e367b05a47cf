"""What an expert does between its projections, by name: f32 arrays in, f32 out. The formulas of every backend.

| name             | h                                                                   | models                  |
|------------------|---------------------------------------------------------------------|-------------------------|
| "silu"           | silu(g) * u                                                         | most                    |
| "gelu_tanh"      | gelu(g) * u, gelu by its tanh formula                               | Gemma-4                 |
| "swiglu_oai"     | g * sigmoid(1.702 g) * (u + 1), g = min(g, 7), u = clip(u, -7, 7)   | gpt-oss                 |
| "swiglu_clamped" | silu(min(g, limit)) * clip(u, -limit, limit)                        | DeepSeek-V4             |
| "relu2"          | relu(u)^2, without a gate                                           | Nemotron 3              |

Source: llama.cpp, build_moe_ffn, and ggml's operations of these names. ggml looks gelu up in a table of f16, and so
lies up to 5e-4 from the formula.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

OAI_ALPHA = 1.702
OAI_LIMIT = 7.0

GATED = ("silu", "gelu_tanh", "swiglu_oai", "swiglu_clamped")
NAMES = (*GATED, "relu2")


class Activation(NamedTuple):
    """An activation and its limit: ``Activation("swiglu_clamped", 10.0)``. Static and hashable.

    Those without a limit may be given by their name alone.
    """

    name: str
    limit: float | None = None

    @property
    def gated(self) -> bool:
        return self.name in GATED

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name} with limit {self.limit:g}"


def as_activation(given: str | Activation) -> Activation:
    """``given`` with its limit; ValueError for a name that is not known, and a limit that is missing or too many."""
    activation = given if isinstance(given, Activation) else Activation(given)
    name, limit = activation
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"activation must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name != "swiglu_clamped":
        if limit is not None:
            raise ValueError(f"activation {name!r} takes no limit, got {limit!r}")
    elif isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise ValueError(
            f'activation "swiglu_clamped" needs a limit above 0, got {limit!r}. Give'
            ' jmoe.Activation("swiglu_clamped", limit).'
        )
    return activation


class SigmoidGate(NamedTuple):
    """``h = g * sigmoid(slope * g * (1 + cubic * g^2)) * (u + shift)``, g at most ``limit``, u within +-``limit``: what
    all gated activations are, for kernels."""

    slope: float = 1.0
    cubic: float = 0.0
    shift: float = 0.0
    limit: float | None = None


def sigmoid_gate(activation: Activation) -> SigmoidGate:
    """The numbers of a gated activation; for one without a gate they say nothing."""
    match activation.name:
        case "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
            return SigmoidGate(slope=2 * math.sqrt(2 / math.pi), cubic=0.044715)
        case "swiglu_oai":
            return SigmoidGate(slope=OAI_ALPHA, shift=1.0, limit=OAI_LIMIT)
    return SigmoidGate(limit=activation.limit)


def activate(gate: jax.Array | None, up: jax.Array, activation: Activation) -> jax.Array:
    """h of the table above, elementwise; ``gate`` is None where the activation has none."""
    match gate, activation:
        case None, _:
            return jnp.square(jax.nn.relu(up))
        case _, ("gelu_tanh", _):
            return jax.nn.gelu(gate, approximate=True) * up
        case _, ("swiglu_oai", _):
            gate, up = jnp.minimum(gate, OAI_LIMIT), jnp.clip(up, -OAI_LIMIT, OAI_LIMIT)
            return gate * jax.nn.sigmoid(OAI_ALPHA * gate) * (up + 1)
        case _, ("swiglu_clamped", float() | int() as limit):
            return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up
