"""Packed linears: the neutral result as compact bytes, the module that holds them, their bits."""

from subbit.packed.layout import FORMAT_VERSION, Field, Layout
from subbit.packed.linear import PackedLinear
from subbit.packed.pack import AnyLayout, pack, read_layout, unpack
from subbit.packed.report import BitReport, ModelBits, bit_report, model_bits
from subbit.packed.sparse import SparseLayout

__all__ = [
    "FORMAT_VERSION",
    "AnyLayout",
    "BitReport",
    "Field",
    "Layout",
    "ModelBits",
    "PackedLinear",
    "SparseLayout",
    "bit_report",
    "model_bits",
    "pack",
    "read_layout",
    "unpack",
]
