"""NEFTune: uniform noise on the embeddings, so that a small data set is not learned by heart (Jain et al. 2023).

A document's noise depends on the step and on its tokens alone. So it is the same however the batch is cut, packed or
spread over workers, and a run that resumes draws it again.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def noise(
    input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *, width: int, alpha: float, seed: int
) -> Tensor:
    """Noise for a micro-batch: uniform in +-alpha / sqrt(document's tokens x width), zero on filling.

    Args:
        input_ids: shape (rows, tokens).
        position_ids: they restart at 0 with each document.
        attention_mask: 1 up to the end of the row's document; None where a row has no filling.
        width: of an embedding.
        alpha: strength.
        seed: of the step.

    Returns:
        float32, shape (rows, tokens, width), on the device of the ids.
    """
    made = torch.zeros((*input_ids.shape, width), device=input_ids.device)
    generator = torch.Generator(device=input_ids.device)
    ids, positions = input_ids.cpu(), position_ids.expand(input_ids.shape).cpu()
    ends = [ids.shape[1]] * len(ids) if attention_mask is None else attention_mask.sum(dim=1).tolist()
    for row, end in enumerate(ends):
        starts = [start for start in (positions[row] == 0).nonzero().flatten().tolist() if start < end]
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            generator.manual_seed(zlib.crc32(ids[row, start:stop].numpy().tobytes(), seed % (1 << 32)))
            bound = alpha / ((stop - start) * width) ** 0.5
            made[row, start:stop].uniform_(-bound, bound, generator=generator)
    return made
