"""Patches `KVCacheManager`: its managers meet a request before they count its blocks.

Where: ``get_computed_blocks`` and ``allocate_slots`` of
``vllm/v1/core/kv_cache_manager.py``, the two methods that take a ``Request`` and hand
its id on; managers are called by id only, and the first of these calls asks for blocks.
Why there: a bounded request's blocks depend on where its prompt ends, also when it
comes back after a preemption, and so does what it may share.
``take_kv_cache_block_copies`` lets a manager say what is copied: pages of its group
alone, with or without votes.

Upstream fix: patches/*/kv_cache_manager.patch, ``meet_request`` and ``make_block_copy``
of ``SingleTypeKVCacheManager``.
"""

from __future__ import annotations

from typing import Any


def in_vllm() -> bool:
    """Whether vLLM introduces requests to its managers."""
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    return hasattr(SingleTypeKVCacheManager, "meet_request")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    if in_vllm() or hasattr(KVCacheManager.allocate_slots, "hashevict_stock"):
        return
    for name in ("get_computed_blocks", "allocate_slots"):
        setattr(KVCacheManager, name, _meeting(getattr(KVCacheManager, name)))
    KVCacheManager.take_kv_cache_block_copies = _describing(
        KVCacheManager.take_kv_cache_block_copies
    )


def budgeted_managers(kv_cache_manager: Any) -> list[Any]:
    """Its managers of budgeted groups."""
    managers = kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in managers if hasattr(manager, "meet_request")]


def _meeting(stock: Any) -> Any:
    def method(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        for manager in self.coordinator.single_type_managers:
            meet_request = getattr(manager, "meet_request", None)
            if meet_request is not None:
                meet_request(request)
        return stock(self, request, *args, **kwargs)

    method.hashevict_stock = stock  # type: ignore[attr-defined]
    return method


def _describing(stock: Any) -> Any:
    def take_kv_cache_block_copies(self: Any) -> Any:
        if not budgeted_managers(self):
            return stock(self)
        copies, retained = [], []
        for manager in self.coordinator.single_type_managers:
            pairs = manager.take_pending_cow_copies()
            describe = getattr(manager, "make_block_copy", _stock_copy)
            copies += [describe(*pair) for pair in pairs]
            retained += [block for pair in pairs for block in pair]
        return copies, retained

    take_kv_cache_block_copies.hashevict_stock = stock  # type: ignore[attr-defined]
    return take_kv_cache_block_copies


def _stock_copy(source: Any, copy: Any) -> Any:
    from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

    return KVCacheBlockCopy(source.block_id, copy.block_id)
