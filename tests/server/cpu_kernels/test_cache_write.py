from __future__ import annotations

import pytest
import torch
from text_generation_server.cpu_kernels import cache_write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_tokens_go_to_their_slots_and_nowhere_else(num_heads: int, num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(num_heads, 200, 32, generator=generator).to(dtype)
    # As a projection leaves them: token by token, between other heads, and with padding behind.
    packed = torch.randn(num_tokens + 3, num_heads + 2, 32, generator=generator).to(dtype)
    heads = packed[:, 1 : 1 + num_heads].transpose(0, 1)
    slots = torch.randperm(200, generator=generator)[:num_tokens]
    expected = cache.clone()
    expected[:, slots] = heads[:, :num_tokens]
    cache_write.write(heads, cache, slots)
    assert torch.equal(cache, expected)
