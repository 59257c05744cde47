"""How a worker joins the others."""

from __future__ import annotations


def join_workers(device: str) -> None:
    """Starts DeepSpeed's communication, over NCCL on a GPU and Gloo on CPU.

    On CPU, DeepSpeed would first compile an operation that only its inference uses. That takes a minute and a C++
    compiler, and a start that is killed meanwhile leaves a lock on which every later start waits for ever. So DeepSpeed
    is told that the operation does not fit here.

    Args:
        device: cpu or cuda.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False)
