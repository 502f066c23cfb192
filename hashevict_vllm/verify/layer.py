"""One layer of a backend, wrapped as on CUDA, without an engine around it.

On a GPU, or on CPU tensors in Triton's interpreter; there
`hashevict_vllm.verify.interpreter.allow_triton` comes first.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from hashevict_vllm.attention.gpu.forward import DeviceImplMixin
from hashevict_vllm.attention.gpu.metadata import DeviceMetadataBuilderMixin
from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.plan import occupied_slots
from hashevict_vllm.resolved import ResolvedKVPolicy

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
        slots_first: bool,
        scale: float,
        device: str = "cpu",
        inner: type[AttentionBackend] = TritonAttentionBackend,
    ) -> None:
        """Lay out the pages, with room for every request.

        Args:
            policy: The resolved policy.
            prompt_lens: Lengths of the prompts, one per request.
            heads: KV heads.
            group: Query heads per KV head.
            head_dim: D.
            block_size: N.
            dtype: Of q, k, v and the cache.
            slots_first: Order inside a page: slots, then heads (vLLM's LBNHC, the
                default on CUDA), or heads, then slots (LBHNC).
            scale: Of the softmax.
            device: Where it runs.
            inner: The backend that is wrapped.

        """
        self.prompt_lens, self.computed = prompt_lens, [0] * len(prompt_lens)
        self.device, self.dtype = torch.device(device), dtype
        impl_class = type(
            "Impl", (DeviceImplMixin, inner.get_impl_cls()), {"policy": policy}
        )
        builder_class = type(
            "Builder", (DeviceMetadataBuilderMixin, inner.get_builder_cls()), {}
        )
        self.impl: Any = impl_class(
            heads * group, head_dim, scale, heads, None, None, "auto"
        )
        stock = FullAttentionSpec(
            block_size=block_size, num_kv_heads=heads, head_size=head_dim, dtype=dtype
        )
        spec = BudgetedAttentionSpec.from_stock(stock, policy)
        one = torch.ones(1, device=self.device)
        self.layer: Any = SimpleNamespace(
            impl=self.impl, _q_scale=one, _k_scale=one, _v_scale=one
        )
        self.builder: Any = builder_class(
            spec, ["layer"], self._vllm_config(heads, group, head_dim), one.device
        )
        width = -(-MAX_MODEL_LEN // block_size)
        used = -(-self.builder.constants.bound // block_size)
        blocks = used * len(prompt_lens) + 1
        content = 2 * head_dim
        strides = (
            (content, heads * content)
            if slots_first
            else (block_size * content, content)
        )
        page = spec.page_size_bytes
        # Any bytes will do that are finite numbers: liveness comes from counts.
        raw = torch.full((blocks * page,), 0x5A, dtype=torch.uint8)
        self.kv_cache = torch.as_strided(
            raw.to(self.device).view(dtype),
            (blocks, heads, block_size, content),
            (page // dtype.itemsize, *strides, 1),
        )
        order = torch.randperm(blocks - 1).int() + 1
        table = torch.zeros(len(prompt_lens), width, dtype=torch.int32)
        table[:, :used] = order.view(len(prompt_lens), used)
        self.block_table = table.to(self.device)

    def _vllm_config(self, heads: int, group: int, head_dim: int) -> Any:
        """What the builders read of vLLM's configuration."""
        return SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=MAX_MODEL_LEN,
                dtype=self.dtype,
                rswa_window=None,
                get_num_attention_heads=lambda parallel: heads * group,
                get_num_kv_heads=lambda parallel: heads,
                get_head_size=lambda: head_dim,
            ),
            parallel_config=None,
            speculative_config=None,
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=MAX_TOKENS, max_num_seqs=8
            ),
            compilation_config=SimpleNamespace(
                cudagraph_mode=CUDAGraphMode.NONE,
                max_cudagraph_capture_size=0,
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
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lens.to(self.device),
            num_reqs=len(chunks),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=max(self.computed),
            block_table_tensor=self.block_table,
            slot_mapping=torch.zeros(sum(counts), dtype=torch.int64).to(self.device),
            is_prefilling=torch.tensor(before) < prompts,
            seq_lens_cpu_upper_bound=lens,
            rswa_prefix_lens=prompts,
        )
        metadata = self.builder.build(0, common)
        q, k, v = (torch.cat(x).to(self.device) for x in zip(*chunks, strict=True))
        output = torch.full_like(q, float("nan"))
        self.impl.forward(self.layer, q, k, v, self.kv_cache, metadata, output)
        return [part.cpu() for part in output.split(counts)]

    def positions(self, request: int) -> torch.Tensor:
        """Positions of a request's live slots, ascending: int32 [Hkv, n]."""
        policy = self.builder.kv_cache_spec.policy
        count = occupied_slots(
            policy, self.computed[request], self.prompt_lens[request]
        )
        tail = self.impl._pages.tail.cpu()
        slots = torch.arange(count)
        blocks = self.block_table[request].cpu().long()[slots // tail.shape[3]]
        return tail[blocks, :, -1, slots % tail.shape[3]].T.sort(dim=1).values
