"""Find by ``torch.fx`` what a module's own ``forward`` does after a norm, and let it do so in one op.

The module keeps its identity, its parameters and its ``forward``: its class becomes a subclass that runs the
rewritten code, as long as the module is as it was when that was traced (its mode, its plain attributes), and
else the original.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from fastpix2pix.kernels.cpu_norm import activate

PLAIN = (bool, int, float, str, type(None))
"""Types of attributes that decide what a ``forward`` does."""

SUMS = {operator.add, torch.add, "add"}
"""Sums that make a new tensor; those in place have nothing to gain."""
RELUS = {F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"}
LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}
NOTHING = "no activation, dropout or sum of its own follows it"


def hooked(layer: nn.Module) -> bool:
    """Whether something watches what goes in or comes out of the layer itself."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def join(y: Tensor, residual: Tensor, slope: float = 1.0) -> Tensor:
    """``activation(y + residual)``, into the memory of ``y``, a norm's result that nothing else reads.

    A view is not written, as autograd would copy its gradient; nor is anything where a compiler looks on.
    """
    if torch.compiler.is_compiling():
        return F.leaky_relu(y + residual, slope) if slope != 1.0 else y + residual
    same = residual.shape == y.shape and residual.dtype == y.dtype and not y._is_view()
    return activate(y.add_(residual) if same else y + residual, slope)


# ------------------------------------------------------------------------------------------------ the class


class Rewritten:
    """What the subclasses of rewritten modules add. ``_traced`` is (function, what it was traced with)."""

    _traced: tuple[Callable[..., Any], dict[str, Any]] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        traced = self.__dict__.get("_traced")
        if traced is not None:
            function, found = traced
            own = self.__dict__
            if all(name in own and own[name] == value for name, value in found.items()):
                return function(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Code is not copied or pickled; a copy traces its own."""
        state = {name: value for name, value in self.__dict__.items() if name != "_traced"}
        return _blank, (_own_class(self),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _trace_again(self)  # type: ignore[arg-type]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_for(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` that runs rewritten code, under its name."""
    if base not in _classes:
        body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _classes[base] = type(base.__name__, (Rewritten, base), body)
    return _classes[base]


def _own_class(module: Any) -> type[nn.Module]:
    """That of the module before it was rewritten."""
    return type(module).__mro__[2] if isinstance(module, Rewritten) else type(module)


def _blank(base: type[nn.Module]) -> nn.Module:
    kind = _class_for(base)
    return kind.__new__(kind)


def _trace_again(module: nn.Module) -> None:
    names = [name for name, layer in module.named_modules() if name and "slope" in layer.__dict__]
    try:
        graph, found = _trace(module)
    except Exception:  # whatever an unusual forward raises: the original runs
        return
    taken = [_fuse_after(module, graph, name) for name in names]
    if any(taken):
        module.__dict__["_traced"] = _compiled(graph), found


# ------------------------------------------------------------------------------------------------- tracing


class _Tracer(fx.Tracer):
    """Goes into plain sequences only: what another module does is for that module's own trace."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_plain_sequential(m) or hooked(m)


def _trace(module: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of the module's forward, and the plain attributes of its own that were read on the way.

    Raises whatever the forward raises when it meets something else than tensors.
    """
    kind, before, found = type(module), dict(module.__dict__), {}
    own = _own_class(module)
    if own.forward is nn.Module.forward:
        raise ValueError("it has none")

    class Watching(own):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            value = (
                object.__getattribute__(self, name) if name == "__dict__" else super().__getattribute__(name)
            )
            if name != "__dict__" and isinstance(value, PLAIN) and name in before:
                found[name] = value
            return value

    traced = module.__dict__.pop("_traced", None)
    module.__class__ = Watching
    try:
        graph = _Tracer().trace(module)
    finally:
        module.__class__ = kind
        if traced is not None:
            module.__dict__["_traced"] = traced
        changed = {name for name in before if module.__dict__.get(name) is not before[name]} - {"_traced"}
        changed |= module.__dict__.keys() - before.keys()
        for name in changed:
            module.__dict__.pop(name, None)
            if name in before:
                module.__dict__[name] = before[name]
    if changed:
        raise ValueError(f"its forward sets {', '.join(sorted(changed))}")
    return graph, found


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    graph.lint()
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<fastpix2pix.rewriting>", "exec"), scope)
    return scope["forward"]


# ------------------------------------------------------------------------------------------------- fusing


def _kind(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _slope_of(module: nn.Module, node: fx.Node, value: fx.Node) -> float | None:
    """The slope of the activation of ``value`` that ``node`` is, or None."""
    if node.op == "call_module" and node.args == (value,) and not node.kwargs:
        layer = module.get_submodule(node.target)  # type: ignore[arg-type]
        if hooked(layer):
            return None
        if type(layer) is nn.ReLU:
            return 0.0
        leaky = type(layer) is nn.LeakyReLU and 0 <= layer.negative_slope <= 1
        return layer.negative_slope if leaky else None  # type: ignore[return-value]
    if not node.args or node.args[0] is not value:
        return None
    if _kind(node) in RELUS and len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}:
        return 0.0
    if _kind(node) in LEAKY_RELUS and not node.kwargs.keys() - {"inplace", "negative_slope"}:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return slope if isinstance(slope, float | int) and 0 <= slope <= 1 else None
    return None


def _residual_of(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``value``, or None."""
    if _kind(node) not in SUMS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is value else first
    return other if isinstance(other, fx.Node) and other is not value else None


def _fuse_after(module: nn.Module, graph: fx.Graph, name: str) -> list[str]:
    """Let the norm called ``name`` do in ``graph`` what follows it; the kinds of what it took over.

    The norm stays where it is called, for its input may be written afterwards; a sum stays where it was, for
    the same reason.
    """
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    norm = module.get_submodule(name)
    if not isinstance(norm, _NormBase) or norm.slope != 1.0 or norm.dropout:
        return []
    if len(calls) != 1 or calls[0].kwargs:
        return []
    call = calls[0]
    after = _only_user(call)
    if after is None:
        return []
    slope = _slope_of(module, after, call)
    if slope is not None:
        call.kwargs = {"slope": slope}
        after.replace_all_uses_with(call)
        graph.erase_node(after)
        return [_word(module, after)]
    residual = _residual_of(after, call)
    if residual is None:
        return []
    last, taken, arguments = after, ["sum"], [call, residual]
    activation = _only_user(after)
    slope = None if activation is None else _slope_of(module, activation, after)
    if activation is not None and slope is not None:
        last, taken, arguments = activation, [*taken, _word(module, activation)], [*arguments, slope]
    with graph.inserting_before(last):
        joined = graph.call_function(join, tuple(arguments))
    last.replace_all_uses_with(joined)
    graph.erase_node(last)
    if last is not after:
        graph.erase_node(after)
    return taken


def _word(module: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(node.target)).__name__  # type: ignore[arg-type]
    return str(getattr(node.target, "__name__", node.target))


def _runs_it(module: nn.Module, name: str) -> str:
    """The name of the innermost module around ``name`` whose forward is its own; the whole one's is ""."""
    holder = name.rpartition(".")[0]
    while holder and _is_run_by_its_parent(module.get_submodule(holder)):
        holder = holder.rpartition(".")[0]
    return holder


def _is_run_by_its_parent(module: nn.Module) -> bool:
    """Whether it is a sequence, or a list without a forward."""
    return is_plain_sequential(module) or type(module).forward is nn.Module.forward


class Rewriting(NamedTuple):
    """By the name of a norm. taken: the kinds of what it does now too. why_not: why nothing was found."""

    taken: dict[str, list[str]]
    why_not: dict[str, str]


def rewrite(module: nn.Module, norms: Iterable[str]) -> Rewriting:
    """Rewrite the forwards that run ``norms``, fused norms of ``module`` that do nothing else yet."""
    by_runner: dict[str, list[str]] = {}
    for name in norms:
        by_runner.setdefault(_runs_it(module, name), []).append(name)
    done = Rewriting({}, {})
    for runner_name, names in by_runner.items():
        runner = module.get_submodule(runner_name)
        prefix = f"{runner_name}." if runner_name else ""
        try:
            if "forward" in runner.__dict__:
                raise ValueError("its forward was replaced")
            graph, found = _trace(runner)
        except Exception as error:  # fx raises many kinds for what it can't trace: the original forward stays
            message = f"{type(runner).__name__}.forward cannot be traced ({str(error).splitlines()[0]})"
            done.why_not.update(dict.fromkeys(names, message))
            continue
        here = {name: _fuse_after(runner, graph, name.removeprefix(prefix)) for name in names}
        done.taken.update({name: parts for name, parts in here.items() if parts})
        done.why_not.update({name: NOTHING for name, parts in here.items() if not parts})
        if any(here.values()):
            if not isinstance(runner, Rewritten):
                runner.__class__ = _class_for(type(runner))
            runner.__dict__["_traced"] = _compiled(graph), found
    return done
