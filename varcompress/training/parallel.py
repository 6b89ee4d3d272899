"""Ways for several processes to train one transformer, applied to it from outside by PyTorch's FSDP2.

`ddp` keeps all weights, gradients and moments on every device, `fsdp` a part of each: of every tensor the rows that are
this process's share, gathered layer by layer while the layer runs. Either way gradients are averaged in float32, layer
by layer, while the backward pass goes on. On several nodes `fsdp` shards within a node and averages between them
(hybrid sharding), so that weights cross no network. Of a single process the transformer stays as it is.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from varcompress.distributed import Ranks
from varcompress.models.transformer import VAR

# of logits, which nothing changes in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def parallelize(var: VAR, how: str, ranks: Ranks) -> None:
    """Distribute a transformer that is whole on the device of every process, in place. how: "ddp" or "fsdp".

    Weights become DTensors, and gradients of a backward pass are averages over the processes, which must all run the
    same passes. Arithmetic stays what it was: weights are gathered in the dtype that they have.
    """
    if ranks.count == 1:
        return
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # of sums over both dimensions
    mesh = _mesh(how, ranks.count, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)), var.device.type)
    for module in (*var.blocks, var):  # whose weights are let go after every pass, also one without a backward pass
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def average_gradients(var: VAR, now: bool) -> None:
    """Whether backward passes from here on average gradients between copies of the weights, or leave it to a later one.

    A later one averages what has come together of the layers that it runs itself.
    """
    if isinstance(var, FSDPModule):
        var.set_requires_all_reduce(now)


def _mesh(how: str, count: int, per_node: int, device: str) -> DeviceMesh:
    """The processes as FSDP2 takes them: those that share weights along the last dimension."""
    shape = mesh_shape(how, count, per_node)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def mesh_shape(how: str, count: int, per_node: int) -> tuple[int, ...]:
    """Copies of the weights x processes that share one; of a single copy the latter alone."""
    if how == "ddp":
        return count, 1
    return (count // per_node, per_node) if count > per_node and count % per_node == 0 else (count,)


@torch.no_grad()
def gathered(var: VAR) -> VAR:
    """A transformer with whole weights, on the same device, of one that may be distributed. All processes call it."""
    if not any(isinstance(parameter, DTensor) for parameter in var.parameters()):
        return var
    with torch.device("meta"):
        whole = VAR(var.config)
    state = {name: full(parameter) for name, parameter in var.named_parameters()}
    whole.load_state_dict(state, assign=True)
    return whole


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be distributed; of a distributed one all processes must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
