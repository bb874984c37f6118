"""Packed linears: the neutral result as compact bytes, the module that holds them, their bits."""

from subbit.packed.layout import FORMAT_VERSION, Field, Layout
from subbit.packed.linear import PackedLinear
from subbit.packed.pack import pack, unpack
from subbit.packed.report import BitReport, ModelBits, bit_report, model_bits

__all__ = [
    "FORMAT_VERSION",
    "BitReport",
    "Field",
    "Layout",
    "ModelBits",
    "PackedLinear",
    "bit_report",
    "model_bits",
    "pack",
    "unpack",
]
