"""What a layer computes beside its projections; static, and shared by all kernels. Imports no kernel.

    h = g * sigmoid(slope * g * (1 + cubic * g^2)) * (u + shift),  g at most limit, u within +-limit
    h = relu(u)^2                                                   without a gate

    g = gate_e x + gate_bias_e,  u = up_e x + up_bias_e,  y = (down_e h + down_bias_e) * down_scale_e

The router's weight multiplies y, or with ``weight_on="input"`` x: as the projections are linear, what they make of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LOG2_E = 1.4426950408889634


class Semantics(NamedTuple):
    """silu is the default; of an activation without a gate the first four say nothing."""

    slope: float = 1.0
    cubic: float = 0.0
    shift: float = 0.0
    limit: float | None = None
    weight_on: str = "output"


class Leaves(NamedTuple):
    """Floats by expert, behind the layer axis that the planes have; None where a layer has none."""

    gate_bias: Any = None  # [E, I]
    up_bias: Any = None  # [E, I]
    down_bias: Any = None  # [E, H]
    down_scale: Any = None  # [E]

    @property
    def present(self) -> dict[str, Any]:
        return {name: leaf for name, leaf in self._asdict().items() if leaf is not None}


def activate(gate: Any, up: Any, semantics: Semantics, ops: Any) -> Any:
    """h of f32 ``gate`` (None without one) and ``up``. ``ops`` has minimum, maximum and exp2 for them: ``jax.numpy``,
    or ``simt`` for a thread's own numbers."""
    if gate is None:
        up = ops.maximum(up, 0.0)
        return up * up
    if semantics.limit is not None:
        gate = ops.minimum(gate, semantics.limit)
        up = ops.maximum(ops.minimum(up, semantics.limit), -semantics.limit)
    steep = gate * (-LOG2_E * semantics.slope)
    if semantics.cubic:
        steep = steep * (gate * gate * semantics.cubic + 1.0)
    if semantics.shift:
        up = up + semantics.shift
    return gate / (ops.exp2(steep) + 1.0) * up
