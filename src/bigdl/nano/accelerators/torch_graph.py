"""Graphs of torch operators in files: JSON for the graph, safetensors for its constants.

Nothing is pickled and nothing that a file names is imported or evaluated: an operator must be
one of torch's own, by its full name, and what Python itself computes is a short list.
"""

from __future__ import annotations

import json
import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bigdl._base.errors import ConfigError, StoredModelError
from bigdl._base.optional import need

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_graph", "write_graph"]

_GRAPH, _CONSTANTS = "graph.json", "constants.safetensors"
_VERSION = 1

# Namespaces of torch's dispatcher that a stored graph may call into.
_NAMESPACES = ("aten", "prims", "quantized_decomposed", "onednn", "torchao")
# Computations on lengths, which are Python's numbers in a graph.
_PYTHON = {
    f"{home.__name__}.{name}": getattr(home, name)
    for home, names in (
        (operator, "add sub mul floordiv truediv mod neg pow getitem eq ne lt le gt ge and_ or_"),
        (math, "ceil floor trunc"),
    )
    for name in names.split()
} | {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float")}
_NAMES = {function: name for name, function in _PYTHON.items()}

_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)


def write_graph(module: fx.GraphModule, directory: Path) -> None:
    """Write ``module``, whose inputs and outputs are flat.

    Raises:
        ConfigError: It calls something that cannot be stored.
    """
    safetensors = need("safetensors.torch", extra="torch", purpose="Saving a graph")
    constants: dict[str, torch.Tensor] = {}
    nodes = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constants[node.target] = _attribute(module, node.target)
        nodes.append(
            {
                "name": node.name,
                "op": node.op,
                "target": _target_name(node),
                "args": [_written(arg) for arg in node.args],
                "kwargs": {name: _written(arg) for name, arg in node.kwargs.items()},
            }
        )
    text = json.dumps({"version": _VERSION, "nodes": nodes})
    (directory / _GRAPH).write_text(text, encoding="utf-8")
    # copies: views of one memory cannot be written otherwise
    kept = {name: value.detach().contiguous().clone() for name, value in constants.items()}
    safetensors.save_file(kept, directory / _CONSTANTS)


def read_graph(directory: Path) -> fx.GraphModule:
    """What ``write_graph`` wrote.

    Raises:
        StoredModelError: It is damaged, or calls something that a stored graph may not call.
    """
    safetensors = need("safetensors", extra="torch", purpose="Loading a graph")
    need("safetensors.torch", extra="torch", purpose="Loading a graph")
    try:
        with safetensors.safe_open(directory / _CONSTANTS, framework="pt") as file:
            constants = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        written = json.loads((directory / _GRAPH).read_text(encoding="utf-8"))
        if written["version"] != _VERSION:
            raise StoredModelError(f"{_GRAPH} has version {written['version']!r}.")
        return _rebuilt(written["nodes"], constants)
    except StoredModelError:
        raise
    except (
        OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError,
        safetensors.SafetensorError,
    ) as exc:  # fmt: skip
        raise StoredModelError(f"The graph in {directory} cannot be read: {exc}") from exc


def _attribute(module: nn.Module, path: str) -> torch.Tensor:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"Cannot save a graph that holds a {type(value).__name__} ({path}).")
    return value


def _target_name(node: fx.Node) -> str:
    if node.op in ("placeholder", "output", "get_attr"):
        return str(node.target)
    target = node.target
    if node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
            return f"torch.ops.{target}"
        if target in _NAMES:
            return _NAMES[target]
    raise ConfigError(f"Cannot save a graph that calls {target} ({node.op}).")


def _written(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return {"list": [_written(part) for part in value], "tuple": isinstance(value, tuple)}
    if isinstance(value, _TORCH_VALUES):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"Cannot save a graph with a {type(value).__name__} in it: {value!r}.")


def _rebuilt(written: list[dict[str, Any]], constants: dict[str, torch.Tensor]) -> fx.GraphModule:
    root = nn.Module()
    names = {}
    for number, (path, tensor) in enumerate(constants.items()):
        names[path] = f"constant_{number}"
        root.register_buffer(names[path], tensor)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for each in written:
        op, target = each["op"], each["target"]
        args = tuple(_read(arg, nodes) for arg in each["args"])
        kwargs = {str(name): _read(arg, nodes) for name, arg in each["kwargs"].items()}
        if op == "placeholder":
            node = graph.placeholder(f"input_{len(nodes)}")
        elif op == "output":
            node = graph.output(args[0])
        elif op == "get_attr":
            node = graph.get_attr(names[target])
        elif op == "call_function":
            node = graph.call_function(_function(target), args, kwargs)
        else:
            raise StoredModelError(f"A stored graph may not hold {op!r}.")
        nodes[each["name"]] = node
    graph.lint()
    return fx.GraphModule(root, graph)


def _function(name: str) -> Any:
    if name in _PYTHON:
        return _PYTHON[name]
    parts = name.split(".")
    if len(parts) == 5 and parts[:2] == ["torch", "ops"] and parts[2] in _NAMESPACES:
        packet = getattr(getattr(torch.ops, parts[2]), parts[3])
        found = getattr(packet, parts[4])
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise StoredModelError(f"A stored graph may not call {name!r}.")


def _read(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return nodes[value["node"]]
    if "list" in value:
        parts = [_read(part, nodes) for part in value["list"]]
        return tuple(parts) if value["tuple"] else parts
    if "torch" in value:
        found = getattr(torch, value["torch"])
        if not isinstance(found, _TORCH_VALUES):
            raise StoredModelError(f"A stored graph may not use torch.{value['torch']}.")
        return found
    if "device" in value:
        return torch.device(value["device"])
    return float(value["float"])
