"""The `quantization_config` of a packed model: everything needed to rebuild its modules."""

import re
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from subbit import __version__
from subbit.errors import FormatError
from subbit.packed.layout import FORMAT_VERSION
from subbit.packed.pack import AnyLayout, read_layout

__all__ = ["QUANT_METHOD", "SubbitConfig"]

QUANT_METHOD = "subbit"


def _natural(entries: dict[str, Any]) -> dict[str, Any]:
    """Order by name, numbers by value: JSON sorts "layers.10" before "layers.2"."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]

    return {name: entries[name] for name in sorted(entries, key=key)}


class SubbitConfig(QuantizationConfigMixin):
    """What `config.json` says about a packed model; plain JSON throughout.

    Attributes:
        quant_method: "subbit".
        format_version: version of the packed format.
        modules: dotted name of each packed linear -> its layout as a dict, plus "bias" (bool). The
            list is explicit and never recomputed from the model.
        recipe: the recipe the model was compressed with.
        calibration: where the calibration tokens came from, and their fingerprint.
        linears: dotted name -> facts about its fit (loss, salient_share, damping, paper_bits, ...).
        embeddings: names of the tensors that are embeddings or the output head.
        base_model: name of the model that was compressed, or None.
        subbit_version: version of the program that wrote it.

    Raises:
        FormatError: the format is newer than this program, or the values are of other types.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        recipe: dict[str, Any] | None = None,
        calibration: dict[str, Any] | None = None,
        linears: dict[str, dict[str, Any]] | None = None,
        embeddings: list[str] | None = None,
        base_model: str | None = None,
        subbit_version: str = __version__,
        **_unknown: Any,
    ) -> None:
        if type(format_version) is not int or format_version > FORMAT_VERSION:
            raise FormatError(
                f"config.json says subbit format version {format_version}, this subbit reads up to "
                f"{FORMAT_VERSION}; upgrade subbit (pip install -U subbit)."
            )
        for value in (modules, recipe, calibration, linears):
            if not isinstance(value, dict | None):
                raise FormatError(
                    f"config.json holds {value!r:.80} where subbit writes an object; "
                    "the file is damaged, copy or download the folder again."
                )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.modules = _natural(modules or {})
        self.recipe = recipe or {}
        self.calibration = calibration or {}
        self.linears = _natural(linears or {})
        self.embeddings = embeddings or []
        self.base_model = base_model
        self.subbit_version = subbit_version

    def layouts(self) -> dict[str, tuple[AnyLayout, bool]]:
        """Return name -> (layout, has a bias) of every packed linear.

        Raises:
            FormatError: an entry is not a layout; the message names it.
        """
        found = {}
        for name, entry in self.modules.items():
            try:
                layout = {key: value for key, value in entry.items() if key != "bias"}
                found[name] = read_layout(layout), bool(entry["bias"])
            except FormatError as error:
                raise FormatError(f"config.json, '{name}': {error}") from error
            except (AttributeError, KeyError, TypeError) as error:
                raise FormatError(
                    f"config.json does not describe '{name}' as a packed linear: {entry!r:.80}; "
                    "the file is damaged, copy or download the folder again."
                ) from error
        return found

    @property
    def guard_key(self) -> str | None:
        """Name of the guard tensor: where a dense weight would be, but of another shape.

        A program that does not know the packed format looks for this weight, finds one that does
        not fit, and stops, instead of filling the model with random numbers.
        """
        return f"{next(iter(self.modules))}.weight" if self.modules else None
