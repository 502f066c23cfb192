"""Triton kernels: the rules of `hashevict_vllm.policies` on a GPU.

The semantics are those of `kernels.cpu.launch`; how work is cut differs. One
launch signs queries and keys (`sign`), one finds victims and writes (`write`); a
prompt's segment is reduced by marking its losers (`mark`, `votes`) and moving survivors
into the holes (`compact`). What a step does with each request is a small table on the
device (`pieces`, made by `plan`), so that nothing in decode waits for the host.

Import from `hashevict_vllm.kernels.triton.ops`. With ``TRITON_INTERPRET=1`` in the
environment before Triton is first imported, the kernels run on CPU tensors.
"""
