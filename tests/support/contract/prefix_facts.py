"""What prefix caching relies on: hooks of the scheduler, the pool and the runners."""

from __future__ import annotations

from .checks import Fact

MANAGER = "vllm/v1/core/single_type_kv_cache_manager.py:SingleTypeKVCacheManager"
CACHE_MANAGER = "vllm/v1/core/kv_cache_manager.py:KVCacheManager"
COORDINATOR = "vllm/v1/core/kv_cache_coordinator.py"
POOL = "vllm/v1/core/block_pool.py:BlockPool"
SCHEDULER = "vllm/v1/core/sched/scheduler.py:Scheduler"

PREFIX_FACTS = (
    Fact(
        MANAGER,
        "cache/prefix.py fills them",
        has=("num_cached_block", "_pending_cow_copies", "kv_cache_group_id"),
    ),
    Fact(
        f"{MANAGER}.add_local_computed_blocks",
        "cache/prefix.py overrides it",
        takes=(
            *("self", "request_id", "new_computed_blocks"),
            *("num_local_computed_tokens", "num_external_computed_tokens"),
        ),
    ),
    Fact(
        f"{MANAGER}.cache_blocks",
        "cache/prefix.py overrides it",
        takes=(
            *("self", "request", "num_tokens", "retention_interval"),
            "replay_boundaries",
        ),
    ),
    Fact(
        f"{MANAGER}.take_pending_cow_copies",
        "cache/prefix.py adds copies before it",
        takes=("self",),
        says=("self._pending_cow_copies = []",),
    ),
    Fact(
        f"{CACHE_MANAGER}.get_computed_blocks",
        "vllm_patches/kv_cache_manager.py introduces the request before the lookup",
        says=("self.coordinator.find_longest_cache_hit(request.block_hashes",),
    ),
    Fact(
        f"{CACHE_MANAGER}.allocate_slots",
        "cache/prefix.py counts on this order",
        says=(
            "self.coordinator.remove_skipped_blocks(",
            "self.coordinator.get_num_blocks_to_allocate(",
            "self.coordinator.allocate_new_computed_blocks(",
            "self.coordinator.allocate_new_blocks(",
            "self.coordinator.cache_blocks(",
        ),
    ),
    Fact(
        f"{CACHE_MANAGER}.take_kv_cache_block_copies",
        "vllm_patches/kv_cache_manager.py does the same with richer copies",
        says=(
            "pending_copies.extend(mgr.take_pending_cow_copies())",
            "[block for pair in pending_copies for block in pair]",
        ),
    ),
    Fact(
        f"{COORDINATOR}:KVCacheCoordinator.allocate_new_computed_blocks",
        "all groups hold their hits before cache/prefix.py takes blocks to copy into",
        says=("manager.add_local_computed_blocks(",),
    ),
    Fact(
        f"{COORDINATOR}:HybridKVCacheCoordinator.find_longest_cache_hit",
        "groups are asked again until their lengths agree",
        says=("if curr_hit_length >= hit_length:", "hit_length = curr_hit_length"),
    ),
    Fact(
        f"{POOL}.move_block_hashes",
        "cache/prefix.py moves a hash as this does, with the same private methods",
        says=(
            "self._remove_cached_block_hashes(src_block)",
            "self._insert_block_hash(",
        ),
    ),
    Fact(
        f"{POOL}._insert_block_hash",
        "cache/prefix.py puts snapshots under hashes of their own",
        takes=("self", "block_hash_with_group_id", "block", "num_tokens"),
    ),
    Fact(
        f"{POOL}._emit_block_removed_events",
        "cache/prefix.py reports a hash that found no room",
        takes=("self", "block_hashes"),
    ),
    Fact(
        POOL,
        "cache/lookup.py and cache/prefix.py use them",
        has=(
            *("cached_block_hash_to_block", "get_cached_block", "touch"),
            *("evict_blocks", "cache_full_blocks", "get_num_free_blocks"),
            "hash_block_size",
        ),
    ),
    Fact(
        f"{SCHEDULER}.schedule",
        "copies are taken after the last allocation of a pass, and freed with it",
        says=(
            "if self.need_mamba_block_aligned_split:",
            "self._mamba_block_aligned_split(request, num_new_tokens)",
            "if self.need_mamba_block_aligned_split:",
            "self.kv_cache_manager.take_kv_cache_block_copies()",
            "self._free_cow_retained_blocks(",
        ),
    ),
    Fact(
        f"{SCHEDULER}._mamba_block_aligned_split",
        "vllm_patches/scheduler.py puts chunk limits in its place",
        takes=(
            *("self", "request", "num_new_tokens", "num_new_local_computed_tokens"),
            "num_external_computed_tokens",
        ),
    ),
    Fact(
        "vllm/v1/request.py:Request",
        "cache/prefix.py reads them",
        has=(
            *("num_prompt_tokens", "max_tokens", "block_hashes", "resumable"),
            "request_id",
        ),
    ),
    Fact(
        "vllm/v1/worker/gpu_model_runner.py:GPUModelRunner._update_states",
        "vllm_patches/block_copies.py copies in its place, before the forward",
        takes=("self", "scheduler_output"),
        says=("if scheduler_output.kv_cache_block_copies:",),
    ),
    Fact(
        "vllm/v1/worker/gpu/model_runner.py:GPUModelRunner.update_requests",
        "vllm_patches/block_copies.py copies in its place, before the forward",
        takes=("self", "scheduler_output"),
        says=("if scheduler_output.kv_cache_block_copies:",),
    ),
)
"""Hooks, by the file that uses them."""
