"""vLLM's TRITON_ATTN on CPU tensors, wrapped by the GPU mixins, in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends import Backend, backends

# vLLM leaves Triton out on CPUs unless Triton has a backend for them
# (vllm/triton_utils/importing.py); the interpreter needs none. Before vLLM is imported.
backends.setdefault("cpu", Backend(compiler=None, driver=SimpleNamespace()))

from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.triton_attn import (  # noqa: E402
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from hashevict_vllm.attention.gpu_forward import DeviceImplMixin  # noqa: E402
from hashevict_vllm.attention.gpu_metadata import (  # noqa: E402
    DeviceMetadataBuilderMixin,
)
from hashevict_vllm.cache.spec import BudgetedAttentionSpec  # noqa: E402
from hashevict_vllm.config import ResolvedKVPolicy  # noqa: E402
from support.paged_triton import make_pages  # noqa: E402

MAX_TOKENS, MAX_MODEL_LEN = 96, 512


class WrappedLayer:
    """One layer of several requests through the builder and the implementation."""

    def __init__(
        self,
        policy: ResolvedKVPolicy,
        prompt_lens: list[int],
        heads: int,
        group: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        layout: str,
        scale: float,
    ) -> None:
        self.prompt_lens, self.computed = prompt_lens, [0] * len(prompt_lens)
        impl_class = type(
            "Impl", (DeviceImplMixin, TritonAttentionImpl), {"policy": policy}
        )
        builder_class = type(
            "Builder", (DeviceMetadataBuilderMixin, TritonAttentionMetadataBuilder), {}
        )
        self.impl: Any = impl_class(
            heads * group, head_dim, scale, heads, None, None, "auto"
        )
        stock = FullAttentionSpec(
            block_size=block_size, num_kv_heads=heads, head_size=head_dim, dtype=dtype
        )
        spec = BudgetedAttentionSpec.from_stock(stock, policy)
        one = torch.ones(1)
        self.layer: Any = SimpleNamespace(
            impl=self.impl, _q_scale=one, _k_scale=one, _v_scale=one
        )
        self.builder: Any = builder_class(
            spec, ["layer"], self._vllm_config(heads, group, head_dim), one.device
        )
        width = -(-MAX_MODEL_LEN // block_size)
        used = -(-self.builder.constants.bound // block_size)
        blocks = used * len(prompt_lens) + 1
        words = self.builder.constants.rule.words
        self.buffer, pages = make_pages(
            layout, blocks, heads, block_size, head_dim, words, dtype
        )
        self.kv_cache = torch.as_strided(
            pages.k,
            (*pages.k.shape[:3], 2 * head_dim),
            pages.k.stride(),
        )
        order = torch.randperm(blocks - 1).int() + 1
        self.block_table = torch.zeros(len(prompt_lens), width, dtype=torch.int32)
        self.block_table[:, :used] = order.view(len(prompt_lens), used)

    def _vllm_config(self, heads: int, group: int, head_dim: int) -> Any:
        """What the builders read of vLLM's configuration."""
        return SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=MAX_MODEL_LEN,
                rswa_window=None,
                get_num_attention_heads=lambda parallel: heads * group,
                get_num_kv_heads=lambda parallel: heads,
                get_head_size=lambda: head_dim,
            ),
            parallel_config=None,
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=MAX_TOKENS, max_num_seqs=8
            ),
            compilation_config=SimpleNamespace(
                cudagraph_mode=CUDAGraphMode.NONE,
                static_forward_context={"layer": self.layer},
            ),
        )

    def step(
        self, chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The outputs [T, Hq, D] of every request's next tokens."""
        counts = [len(k) for _, k, _ in chunks]
        before = list(self.computed)
        self.computed = [x + n for x, n in zip(before, counts, strict=True)]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        lens = torch.tensor(self.computed, dtype=torch.int32)
        prompts = torch.tensor(self.prompt_lens, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            num_reqs=len(chunks),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=max(self.computed),
            block_table_tensor=self.block_table,
            slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
            is_prefilling=torch.tensor(before) < prompts,
            seq_lens_cpu_upper_bound=lens,
            rswa_prefix_lens=prompts,
        )
        metadata = self.builder.build(0, common)
        q, k, v = (torch.cat(x) for x in zip(*chunks, strict=True))
        output = torch.full_like(q, float("nan"))
        self.impl.forward(self.layer, q, k, v, self.kv_cache, metadata, output)
        return list(output.split(counts))
