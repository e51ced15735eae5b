"""Quantised weights in a folder: the layout "pack-quantized" of the compressed-tensors library, which other tools read.

- a weight NAME of N output and K input features is stored as NAME_packed, int32 [N, ceil(K * bits / 32)], NAME_scale
  [N, G], NAME_shape and, with zero points, NAME_zero_point, int32 [ceil(N * bits / 32), G]
- an integer is stored plus 2^(bits - 1); integer i of a row begins at bit i * bits of the row's words, lowest bits
  first; zero points are packed likewise, down each column
- config.json's quantization_config gives the scheme of each layer; an unsupported setting is an error that names it
- a tensor-parallel rank reads only the words that hold its part of a weight
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import WeightFiles, hf_name
from models.config import QUANT_METHOD
from models.model import FUSIONS
from models.qlinear import MixedScheme, Quantized, Scheme, Schemes

FORMAT = "pack-quantized"
MODES = {4: "int4", 8: "int8"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LINEARS = tuple(name for _, names, _ in FUSIONS for name in names)  # the layers of a block that are quantised


def linear_layers(num_layers: int) -> list[str]:
    """Returns the names of a model's layers that are quantised."""
    return [f"layers.{i}.{part}.{name}" for i in range(num_layers) for part, names, _ in FUSIONS for name in names]


def is_linear_weight(name: str) -> bool:
    """Whether quantisation applies to this parameter of a plain model."""
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and layer.rpartition(".")[2] in LINEARS


# ------------------------------------------------------------------------------------- config.json


def quantization_config(scheme: Schemes, num_layers: int, head: str) -> dict:
    """Returns config.json's quantization_config for a scheme. head: "lm_head" or "score", which is not quantised."""
    layers = linear_layers(num_layers)
    by_scheme: dict[Scheme, list[str]] = {}
    for layer in layers:
        by_scheme.setdefault(scheme.of(layer), []).append(layer)
    *few, most = sorted(by_scheme, key=lambda each: len(by_scheme[each]))
    groups = [*((_targets(by_scheme[each], layers), each) for each in few), (["Linear"], most)]
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(*group) for i, group in enumerate(groups)},
        "ignore": [head],
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], scheme: Scheme) -> dict:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _targets(names: list[str], layers: list[str]) -> list[str]:
    """Returns a pattern for each kind of layer if `names` holds all layers of these kinds, else the names."""
    kinds = Counter(name.rpartition(".")[2] for name in layers)
    meant = Counter(name.rpartition(".")[2] for name in names)
    if all(kinds[kind] == count for kind, count in meant.items()):
        return [rf"re:.*\.{kind}$" for kind in meant]
    return [hf_name(name) for name in names]


def read_scheme(stored: dict, num_layers: int, where: str) -> Schemes:
    """Reads the layers' schemes from config.json's quantization_config. Raises ValueError that begins with `where` and
    names an unsupported setting or a layer without a scheme."""
    where = f"{where}: quantization_config"
    by_target: dict[str, Scheme] = {}
    _require(stored, "format", (FORMAT, "mixed-precision"), where)
    for key in ("kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config"):
        value = stored.get(key) or {}
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):  # dense: no sparsity at all
            raise ValueError(f"{where}.{key} {value!r} is not supported")
    groups = stored.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{where}.config_groups must be an object of objects")
    for name, group in groups.items():
        here = f"{where}.config_groups.{name}"
        by_target |= dict.fromkeys(_strings(group, "targets", here), _read_group(group, here))
    ignored = _strings(stored, "ignore", where)
    by_layer = {layer: _scheme_of(hf_name(layer), by_target, ignored, where) for layer in linear_layers(num_layers)}
    left_out = [hf_name(layer) for layer, scheme in by_layer.items() if scheme is None]
    if left_out:
        raise ValueError(f"{where} leaves {left_out[0]} out; only a head can be left out")
    _check_fused(by_layer, where)
    schemes = set(by_layer.values())
    return schemes.pop() if len(schemes) == 1 else MixedScheme(by_layer)


def _check_fused(by_layer: dict[str, Scheme], where: str) -> None:
    """Raises ValueError if layers with a common input differ in scheme: here and in other engines they are fused."""
    first_of = {name: names[0] for _, names, _ in FUSIONS for name in names}
    for layer, scheme in by_layer.items():
        part, _, name = layer.rpartition(".")
        if scheme != by_layer[f"{part}.{first_of[name]}"]:
            raise ValueError(f"{where}: {hf_name(layer)} is {scheme}, but {first_of[name]} on the same input is not")


def _scheme_of(name: str, by_target: dict[str, Scheme], ignored: list[str], where: str) -> Scheme | None:
    """Finds a layer's scheme in the library's order: its name, then patterns in alphabetical order, then its class."""

    def matches(target: str) -> bool:
        try:
            return re.match(target[3:], name) is not None if target.startswith("re:") else target == name
        except re.error as error:
            raise ValueError(f"{where}: {target!r} is not a regular expression: {error}") from None

    if any(map(matches, ignored)):
        return None
    targets = sorted(by_target, key=lambda target: (target.startswith("re:"), target))
    return by_target.get(next(filter(matches, targets), "Linear"))


def _read_group(group: dict, where: str) -> Scheme:
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise ValueError(f"{where}.{key}: quantised activations are not supported")
    _require(group, "format", (None, FORMAT), where)
    weights, where = group.get("weights"), f"{where}.weights"
    if not isinstance(weights, dict):
        raise ValueError(f"{where} must be an object")
    size = weights.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    weights = {"num_bits": 8, "type": "int", "symmetric": True, **weights}
    weights["strategy"] = weights.get("strategy") or inferred
    _require(weights, "num_bits", tuple(MODES), where)
    _require(weights, "type", ("int",), where)
    _require(weights, "symmetric", (True, False), where)
    _require(weights, "strategy", ("group", "channel"), where)
    _require(weights, "dynamic", (None, False), where)
    _require(weights, "block_structure", (None,), where)
    _require(weights, "actorder", (None, False, "weight", "static"), where)  # "group" permutes the inputs
    if weights["strategy"] == "channel":
        size = None
    elif not isinstance(size, int) or size < 1:
        raise ValueError(f"{where}.group_size {size!r} is not a number of weights")
    return Scheme(MODES[weights["num_bits"]], size, weights["symmetric"])


def _require(values: dict, key: str, supported: tuple, where: str) -> None:
    if values.get(key) not in supported:
        names = ", ".join(str(value) for value in supported if value is not None)
        raise ValueError(f"{where}.{key} {values.get(key)!r} is not supported, only {names or 'none'}")


def _strings(values: dict, key: str, where: str) -> list[str]:
    found = values.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{where}.{key} must be a list of strings")
    return found


# ----------------------------------------------------------------------------------------- tensors


def pack_int32(values: Tensor) -> Tensor:
    """uint8 [N, K] in 0..15 or int8 [N, K] -> int32 [N, ceil(K * bits / 32)]; the last word is zero-padded."""
    if values.dtype == torch.uint8:
        values = F.pad(values, (0, -values.shape[1] % 8))
        packed = values[:, ::2] | (values[:, 1::2] << 4)
    else:
        packed = F.pad(values.view(torch.uint8) ^ 128, (0, -values.shape[1] % 4))
    return packed.contiguous().view(torch.int32)


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """int32 [N, words] -> uint8 [N, 8 * words] in 0..15 for 4 bits, int8 [N, 4 * words] for 8."""
    numbers = packed.contiguous().view(torch.uint8)
    if bits == 4:
        return torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)
    return (numbers ^ 128).view(torch.int8)


def stored_shapes(shapes: dict[str, tuple[int, ...]], scheme: Schemes) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the tensors that a folder with quantised weights stores for a model's parameters."""
    stored = {}
    for name, shape in shapes.items():
        if is_linear_weight(name):
            (N, K), each = shape, scheme.of(name.removesuffix(".weight"))
            G = each.num_groups(K)
            stored |= {f"{name}_packed": (N, -(-K * each.bits // 32)), f"{name}_scale": (N, G), f"{name}_shape": (2,)}
            if not each.symmetric:
                stored[f"{name}_zero_point"] = (-(-N * each.bits // 32), G)
        else:
            stored[name] = shape
    return stored


def packed_tensors(name: str, weight: Quantized) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of the tensors that store the weight `name`, int8 or int4."""
    yield f"{name}_packed", pack_int32(weight.values)
    yield f"{name}_scale", weight.scale
    yield f"{name}_shape", torch.tensor(weight.values.shape)
    if weight.zero is not None:
        yield f"{name}_zero_point", pack_int32(weight.zero.T.contiguous()).T.contiguous()


def read_packed(
    files: WeightFiles,
    name: str,
    shape: tuple[int, ...],
    part: tuple[slice, slice],
    scheme: Scheme,
    device: torch.device,
) -> Quantized:
    """Reads the part of a packed weight `name` [N, K] at two slices; a slice of the columns must consist of whole
    groups. Raises ValueError for tensors of a wrong dtype or shape."""
    rows, columns = part

    def read(kind: str, slices: tuple[slice, ...], dtypes: Iterable[torch.dtype]) -> Tensor:
        tensor = files.read(f"{name}_{kind}", slices)
        if tensor.dtype not in dtypes:
            raise ValueError(f"{files.folder}: {hf_name(name)}_{kind} is {tensor.dtype}; it is broken")
        return tensor.to(device)

    said = files.read(f"{name}_shape").tolist()
    if said != list(shape):
        raise ValueError(f"{files.folder}: {hf_name(name)}_shape says {said}, the model's is {list(shape)}")
    words, inside = _words(columns, scheme.bits)
    values = unpack_int32(read("packed", (rows, words), (torch.int32,)), scheme.bits)[:, inside]
    groups = _groups(columns, scheme)
    scale = read("scale", (rows, groups), FLOATS)
    if scheme.symmetric:
        return Quantized(values, scale)
    words, inside = _words(rows, scheme.bits)
    zero = unpack_int32(read("zero_point", (words, groups), (torch.int32,)).T, scheme.bits)[:, inside]
    return Quantized(values, scale, zero.T)


def columns_of(weight: Quantized, columns: slice, scheme: Scheme) -> Quantized:
    """Returns a quantised weight's columns at a slice of whole groups."""
    groups = _groups(columns, scheme)
    numbers = (None if each is None else each[:, groups] for each in weight[1:])
    return Quantized(weight.values[:, columns], *numbers)


def _groups(columns: slice, scheme: Scheme) -> slice:
    size = scheme.group_size
    return slice(0, 1) if size is None else slice(columns.start // size, columns.stop // size)


def _words(part: slice, bits: int) -> tuple[slice, slice]:
    """Returns (the words that hold these numbers, the numbers' slice within the unpacked words)."""
    each = 32 // bits
    first, end = part.start // each, -(-part.stop // each)
    return slice(first, end), slice(part.start - first * each, part.stop - first * each)
