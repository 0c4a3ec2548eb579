"""What megatron_ee is measured against: what one would otherwise run, and what the machine can do.

``python -m benchmarks.tune``, ``decode``, ``convert`` and ``pipeline``, from a checkout. Whatever is compared runs in
turns in one run, medians count, and only the ratios mean something on another machine.
"""
