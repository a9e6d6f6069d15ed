"""The steps of a forward: followed on stand-ins for tensors, and sorted into ahead and rest.

Knows torch; runs nothing of the user's but ``forward`` itself.
"""

from __future__ import annotations

import copy
import operator
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bigdl._base.errors import ConfigError
from bigdl.nano.pytorch.frozen.call import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bigdl.nano.pytorch.export.structure import Structure

__all__ = [
    "CallTracer",
    "ahead_of",
    "border_of",
    "follow",
    "holders_of",
    "live_nodes",
    "reads_own",
    "rest_of",
    "traces",
    "twin",
]

# Functions that draw random numbers unless their "training" or "p" says otherwise.
_RANDOM = {
    nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d,
    nn.functional.dropout3d, nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout,
    nn.functional.rrelu, torch.dropout, torch.rand, torch.randn, torch.rand_like,
    torch.randn_like, torch.randint, torch.bernoulli, torch.normal,
}  # fmt: skip
# What may be done again in the second part: shapes and arithmetic with them.
_CHEAP_METHODS = {"size", "dim", "numel"}
_CHEAP_FUNCTIONS = {
    getattr, operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
    operator.mod, operator.neg, int,
}  # fmt: skip


def twin(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that shares its parameters and nothing else.

    Raises:
        ConfigError: It holds something that cannot be copied.
    """
    shared: dict[int, Any] = {id(p): p for p in module.parameters()}
    try:
        return copy.deepcopy(module, shared)
    except Exception as exc:  # whatever a user's __deepcopy__ may raise
        raise ConfigError(f"{type(module).__name__} cannot be copied: {exc}") from exc


class CallTracer(fx.Tracer):
    """Follows one call: its tensors are stand-ins, its other arguments are what they are.

    Args:
        arguments: How tensors are nested in (args, kwargs).
    """

    def __init__(self, arguments: Structure) -> None:
        super().__init__()
        self._arguments = arguments

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        tensors = [
            self.create_proxy("placeholder", f"tensor_{at}", (), {})
            for at, _ in enumerate(self._arguments.paths(""))
        ]
        args, kwargs = self._arguments.build(tensors)

        def forward(root: nn.Module) -> Any:
            return root_fn(root, *args, **kwargs)

        return forward, [self.root]


class _Tracer(CallTracer):
    """Follows only modules that are partly live; others are steps of their own."""

    def __init__(
        self,
        arguments: Structure,
        lives: Callable[[nn.Module], bool],
        originals: dict[str, nn.Module],
    ) -> None:
        super().__init__(arguments)
        self._lives, self._originals = lives, originals

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        original = self._originals[module_qualified_name]
        parts = list(original.children())
        lives = self._lives
        followed = bool(parts) and lives(original) and not all(map(lives, parts))
        if followed and (m._forward_hooks or m._forward_pre_hooks):
            raise ConfigError(f"{module_qualified_name!r} has forward hooks")
        return not followed


def follow(
    module: nn.Module, arguments: Structure, lives: Callable[[nn.Module], bool]
) -> tuple[fx.Graph, nn.Module]:
    """The steps of ``module.forward``, and the copy of the module that they were read from."""
    copied = twin(module)
    for original, copy_ in zip(module.parameters(), copied.parameters(), strict=True):
        if original is not copy_:
            raise ConfigError(f"{type(module).__name__} does not copy as it is")
    tracer = _Tracer(arguments, lives, dict(module.named_modules()))
    streams, before = Streams(torch.device("cpu")), traces(copied)
    try:
        # a warning tells of something that is not as in a true call: log() without a trainer
        with warnings.catch_warnings(action="error"):
            graph = tracer.trace(copied)
    except ConfigError:
        raise
    except Exception as exc:  # the user's forward, run on stand-ins
        text = str(exc).partition("\n")[0]
        raise ConfigError(
            f"forward of {type(module).__name__} cannot be followed ({text})"
        ) from exc
    finally:
        drew = streams.moved()
        streams.restore()
    if drew:
        raise ConfigError("its forward draws random numbers")
    if before != traces(copied, but=_CONSTANT):
        raise ConfigError("its forward keeps state from call to call")
    return graph, copied


# Names that fx gives to tensors which forward made by itself.
_CONSTANT = "_tensor_constant"


def traces(module: nn.Module, but: str | None = None) -> list[Any]:
    """What a forward may have changed: buffers, and attributes of every submodule.

    Args:
        module: Which.
        but: Attributes whose names begin so do not count.
    """
    found: list[Any] = [(id(b), b._version) for b in module.buffers()]
    for part in module.modules():
        for name, value in vars(part).items():
            if but is not None and name.startswith(but):
                continue
            found.append((name, value if isinstance(value, _PLAIN) else id(value)))
            if isinstance(value, (list, dict, set)):
                found.append(len(value))
    return found


_PLAIN = (type(None), bool, int, float, str)


def live_nodes(
    graph: fx.Graph, module: nn.Module, copied: nn.Module, lives: Callable[[nn.Module], bool]
) -> set[fx.Node]:
    """Steps that depend on what trains or is random, and all that follow from them."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            starts = _attribute(module, copied, str(node.target)).requires_grad
        else:
            starts = _starts_live(node, module, lives)
        starts = starts or (_writes(node, module) and _read_before(node, live))
        if starts or any(source in live for source in node.all_input_nodes):
            live.add(node)
    return live


def _starts_live(node: fx.Node, module: nn.Module, lives: Callable[[nn.Module], bool]) -> bool:
    if node.op == "call_module":
        return lives(module.get_submodule(str(node.target)))
    if node.op == "call_method":  # in-place draws such as x.normal_()
        return str(node.target).rstrip("_") in {
            "normal", "uniform", "bernoulli", "random", "exponential", "requires_grad",
        }  # fmt: skip
    return node.target in _RANDOM and node.kwargs.get("training", True) is not False


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a step may write to its inputs."""
    if node.op == "call_module":
        step = module.get_submodule(str(node.target))
        return any(getattr(part, "inplace", False) for part in step.modules())
    name = getattr(node.target, "__name__", str(node.target))
    return name.endswith("_") or bool(node.kwargs.get("inplace")) or name == "setitem"


def _read_before(node: fx.Node, live: set[fx.Node]) -> bool:
    """Whether a live step has read an input of ``node`` (they come in order) by now."""
    return any(user in live for source in node.all_input_nodes for user in source.users)


def _attribute(module: nn.Module, copied: nn.Module, target: str) -> torch.Tensor:
    """The user's own tensor, or one that forward made while it was followed.

    Raises:
        ConfigError: It is not a tensor.
    """
    holder, _, name = target.rpartition(".")
    owner = copied if name.startswith(_CONSTANT) else module
    value = getattr(owner.get_submodule(holder), name)
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"its forward reads {target!r}, a {type(value).__name__}")
    return value


def border_of(graph: fx.Graph, live: set[fx.Node]) -> list[fx.Node]:
    """Steps ahead whose results the rest needs, cheap ones traced back to their sources."""
    needed: dict[fx.Node, None] = {}

    def need(node: fx.Node) -> None:
        if node in live or node.op in ("placeholder", "get_attr"):
            return
        if _is_cheap(node):
            for source in node.all_input_nodes:
                need(source)
        else:
            needed[node] = None

    for node in graph.nodes:
        if node in live or node.op == "output":
            for source in node.all_input_nodes:
                need(source)
    return list(needed)


def _is_cheap(node: fx.Node) -> bool:
    """Gives no tensor but a number or a shape: done again rather than handed over."""
    if node.op == "call_method":
        return node.target in _CHEAP_METHODS
    if node.op != "call_function" or node.target not in _CHEAP_FUNCTIONS:
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "device", "dtype", "ndim")
    sources = node.all_input_nodes
    return bool(sources) and all(_is_cheap(source) for source in sources)


def ahead_of(
    copied: nn.Module, graph: fx.Graph, live: set[fx.Node], border: list[fx.Node]
) -> fx.GraphModule:
    """The steps ahead as a module over the copy."""
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output" and node not in live:
            made[node] = new.node_copy(node, lambda n: made[n])
    new.output(tuple(made[node] for node in border))
    return fx.GraphModule(copied, new, class_name=f"{type(copied).__name__}Trunk")


def rest_of(
    module: nn.Module,
    copied: nn.Module,
    graph: fx.Graph,
    live: set[fx.Node],
    border: list[fx.Node],
) -> Callable[..., Any]:
    """The steps after the border, over the user's own submodules."""
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {
        node: new.placeholder(f"ahead_{at}") for at, node in enumerate(border)
    }

    def take(node: fx.Node) -> fx.Node:
        if node not in made:  # a cheap step or a constant, done again
            made[node] = new.node_copy(node, take)
        return made[node]

    for node in graph.nodes:
        if node.op == "placeholder" or node in live or node.op == "output":
            take(node)
    parts: dict[str, Any] = {}
    for node in new.nodes:
        if node.op == "call_module":
            parts[str(node.target)] = module.get_submodule(str(node.target))
        elif node.op == "get_attr":
            parts[str(node.target)] = _attribute(module, copied, str(node.target))
    rest = fx.GraphModule(parts, new, class_name=f"{type(module).__name__}Rest")
    forward: Callable[..., Any] = rest.forward
    return forward


def reads_own(holder: nn.Module, root: nn.Module, nodes: Iterable[fx.Node]) -> bool:
    """Whether a step ahead reads a tensor that ``holder`` itself owns."""
    return any(
        root.get_submodule(str(node.target).rpartition(".")[0]) is holder
        for node in nodes
        if node.op == "get_attr"
    )


def holders_of(
    module: nn.Module, frozen: tuple[nn.Module, ...], lives: Callable[[nn.Module], bool]
) -> tuple[nn.Module, ...]:
    """Modules whose forward was followed: those around the frozen ones that are live."""
    within = {id(part) for part in frozen}
    return tuple(
        part
        for part in module.modules()
        if id(part) not in within
        and any(True for _ in part.children())
        and (lives(part) or part is module)
    )
