"""The tuning step and the inference passes as if on CUDA, on a machine without a GPU.

Every tensor is a fake one on ``cuda``: it has a shape, a dtype and a device, and no values. The process group is
torch's fake one, of any size, so that one process is any rank of a run of hundreds. Nothing is computed, so a model of
70 billion parameters takes seconds. What the runs show: tensors on a wrong device, waits of the host for the device,
launches, and the memory that is held. What they cannot show: stream order, NCCL, values, and compiled code.

``shim`` lets a CPU build of torch believe in CUDA devices, ``cluster`` makes this process a rank, ``watch`` records
what is done, ``tune`` and ``infer`` run the package, ``host_syncs`` judges the waits. ``python -m tests.fake_cuda``
prints a table.
"""
