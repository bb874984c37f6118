"""What a packed folder holds, from its config and its tensor headers; no model is built."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from subbit.errors import FormatError, ModelError
from subbit.hub.config import QUANT_METHOD, SubbitConfig
from subbit.hub.headers import TensorInfo, read_folder_headers
from subbit.packed.pack import AnyLayout
from subbit.packed.report import bit_report

__all__ = ["inspect_folder", "is_packed", "read_config"]


def _quantization(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a folder, {} if there is none, None without a config.json."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
        return config.get("quantization_config") or {}
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path} is not readable JSON; copy or download it again.") from error


def is_packed(path: str | Path) -> bool:
    """Whether `path` is a local folder whose config.json names subbit's packed format."""
    try:
        found = _quantization(Path(path))
    except FormatError:
        return False
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def read_config(folder: str | Path) -> SubbitConfig:
    """Read the packed format's part of config.json.

    Raises:
        ModelError: the folder is no packed model; the message says what it is.
        FormatError: config.json is damaged, or newer than this program.
    """
    folder = Path(folder)
    found = _quantization(folder)
    if found is None:
        raise ModelError(f"'{folder}' is not a model folder: it has no config.json.")
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        method = found.get("quant_method") if isinstance(found, dict) else None
        what = f"packed with '{method}'" if method else "an ordinary, uncompressed model"
        raise ModelError(
            f"'{folder}' is {what}, not one of subbit's; "
            "make one with: subbit compress MODEL --out DIR."
        )
    return SubbitConfig.from_dict(found)


def inspect_folder(folder: str | Path) -> dict[str, Any]:
    """Describe a packed folder as plain JSON.

    Returns:
        A dict with "format_version", "subbit_version", "base_model", "recipe", "calibration",
        "linears" (one dict each: "name", "shape", "nm", "loss" and "damping", None where not
        recorded, "salient_share", "paper_bits" and "stored_bits" per weight, "bytes" of its packed
        tensors in the file) and "total". In "total", `linear_bytes + other_bytes + header_bytes ==
        file_bytes`, the size of all safetensors files; "paper_bits" and "stored_bits" are per
        weight of the packed linears, the two "file_bits_..." per parameter of the dense model.

    Raises:
        ModelError: not a packed folder.
        FormatError: it is damaged, or newer than this program.
    """
    folder = Path(folder)
    config = read_config(folder)
    headers = read_folder_headers(folder)
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        tensors |= header.tensors
    linears = [
        _linear(name, layout, config.linears.get(name, {}), tensors)
        for name, (layout, _) in config.layouts().items()
    ]
    header_bytes = sum(header.nbytes for header in headers)
    file_bytes = sum(header.path.stat().st_size for header in headers)
    return {
        "format_version": config.format_version,
        "subbit_version": config.subbit_version,
        "base_model": config.base_model,
        "recipe": config.recipe,
        "calibration": config.calibration,
        "linears": linears,
        "total": _total(config, linears, tensors, header_bytes, file_bytes),
    }


def _linear(
    name: str, layout: AnyLayout, record: dict[str, Any], tensors: dict[str, TensorInfo]
) -> dict[str, Any]:
    stored = 0
    for field in layout.fields():
        info = tensors.get(f"{name}.{field}")
        if info is None:
            raise FormatError(f"the tensor '{name}.{field}' is missing; copy the folder again.")
        stored += info.nbytes
    report = bit_report(layout, _salient_columns(f"{name}.salient", tensors))
    return {
        "name": name,
        "shape": [layout.rows, layout.cols],
        "nm": None if layout.nm is None else list(layout.nm),
        "loss": record.get("loss"),
        "damping": record.get("damping"),
        "salient_share": report.salient_share,
        "paper_bits": record.get("paper_bits", report.paper_bits),
        "stored_bits": 8 * stored / (layout.rows * layout.cols),
        "bytes": stored,
    }


def _salient_columns(key: str, tensors: dict[str, TensorInfo]) -> int:
    """Count the salient columns of one linear in its bitmap (a few bytes of the file)."""
    if key not in tensors:
        return 0
    with safe_open(tensors[key].file, framework="pt") as file:
        return sum(byte.bit_count() for byte in file.get_tensor(key).tolist())


def _total(
    config: SubbitConfig,
    linears: list[dict[str, Any]],
    tensors: dict[str, TensorInfo],
    header_bytes: int,
    file_bytes: int,
) -> dict[str, Any]:
    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in linears)
    linear_bytes = sum(linear["bytes"] for linear in linears)
    packed = {f"{name}.{f}" for name, (lay, _) in config.layouts().items() for f in lay.fields()}
    dense = {
        name: info
        for name, info in tensors.items()
        if name not in packed and name != config.guard_key
    }
    embeddings = [dense[name] for name in config.embeddings if name in dense]
    parameters = weights + sum(info.numel for info in dense.values())
    embedding_parameters = sum(info.numel for info in embeddings)
    embedding_bytes = sum(info.nbytes for info in embeddings)
    return {
        "weights": weights,
        "parameters": parameters,
        "embedding_parameters": embedding_parameters,
        "paper_bits": _mean_paper_bits(linears),
        "stored_bits": _bits(linear_bytes, weights),
        "linear_bytes": linear_bytes,
        "other_bytes": sum(info.nbytes for info in tensors.values()) - linear_bytes,
        "embedding_bytes": embedding_bytes,
        "header_bytes": header_bytes,
        "file_bytes": file_bytes,
        "file_bits_per_parameter": _bits(file_bytes, parameters),
        "file_bits_without_embeddings": _bits(
            file_bytes - embedding_bytes, parameters - embedding_parameters
        ),
    }


def _bits(nbytes: int, count: int) -> float | None:
    return 8 * nbytes / count if count else None


def _mean_paper_bits(linears: list[dict[str, Any]]) -> float | None:
    """Mean over all weights; None without any."""
    if not linears:
        return None
    sizes = [linear["shape"][0] * linear["shape"][1] for linear in linears]
    bits = sum(linear["paper_bits"] * size for linear, size in zip(linears, sizes, strict=True))
    return bits / sum(sizes)
