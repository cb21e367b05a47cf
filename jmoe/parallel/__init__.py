"""Experts spread over the devices of a mesh: ``from jmoe import parallel``.

sharded = parallel.load_experts("model.gguf", 0, mesh)            # each process reads its own experts' bytes
y = parallel.moe_forward(sharded, x, topk_ids, topk_weights)      # every device has all tokens
y = parallel.moe_forward(..., split_tokens="expert")              # every device has its share of the tokens
"""

from __future__ import annotations

from .forward import moe_forward as moe_forward
from .load import load_experts as load_experts
from .sharded import ShardedStack as ShardedStack
from .sharded import shard_experts as shard_experts
