"""Linears small in memory: the resident layouts B3 and B2, CPU kernels, the torch operator."""

from subbit.packed.kernels.layout import fits
from subbit.packed.kernels.native import kernel_name, processor

__all__ = ["fits", "kernel_name", "processor"]
