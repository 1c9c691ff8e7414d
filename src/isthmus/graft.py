"""Additions inside somebody else's model, without forking it: parameters and code around one module's forward.

`graft(llm, "model.layers.3.mlp", "expert", Expert())` swaps the class of that module for a subclass of the same name
whose forward calls the addition with the original forward in hand. The parameters of the base keep their names,
`isinstance` holds, and the addition's parameters live in a child called `grafts`.

An addition may need more than its module is given (which positions are image, what a picture looked like): that is
the `Side`. The model is called with `side=...`, which transformers hands to every layer; the layer lends it to the
additions inside it while it runs, and takes it back. It is never written onto modules from outside: a layer that is
recomputed during backward would then read the side of a later forward. Recomputing a layer repeats its arguments.

A model with grafts is built, not unpickled: pickle finds the class by name, gets the original one and refuses.
Graft before sharding (FSDP2 swaps classes the same way, on top) and before compiling.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from isthmus import sites
from isthmus.config import nearest
from isthmus.types import ConfigError, Side


class Graft(nn.Module):
    """One addition to ONE module inside somebody else's model.

    Several on one module nest like middleware: the last attached is outermost, and its `base` runs the others.
    Parameters have at least one dimension (a gate is a vector of one): FSDP2 refuses scalars.
    """

    innermost: ClassVar[bool] = False
    """Goes below additions that are not innermost, whenever it is attached (a change of the host's own weight)."""
    reads_side: ClassVar[bool] = True
    """False lets it into models that do not hand `side` on."""
    reads_host: ClassVar[bool] = True
    """False if it reaches the host through `base` alone, so that LoRA beneath it may be folded into the weight."""

    def forward(self, host: Any, base: Callable[..., Any], x: Tensor, *args: Any, side: Side | None, **kw: Any) -> Any:
        """What the host returns instead of `base(x, *args, **kw)`.

        Args:
            host: the module that was called.
            base: what it would have done: its original forward, or the next addition inwards.
            x: the first argument of the call, whether it came by position or by name.
            side: what the enclosing layer was called with; None outside of layers and for calls without one.
        """
        raise NotImplementedError


def arithmetic(x: Tensor) -> AbstractContextManager[Any]:
    """Products in the dtype of x: the masters of additions are float32, and a base in bfloat16 keeps its speed.

    On the meta device, where there is no arithmetic, nothing is changed.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32)


def graft(root: nn.Module, path: str | nn.Module, name: str, addition: Graft) -> None:
    """Attach `addition` to the module at `path` (a dotted name in `root`, or the module) under `name`.

    Raises:
        ConfigError: no such module; the name is taken; the module's forward would not be seen to run; or `side`
            would not reach the layer.
    """
    path = path if isinstance(path, str) else _path(root, path)
    host = _host(root, path)
    _check_host(root, path, name)
    layer = _layer(root, path)
    if layer is not None:
        if addition.reads_side:
            _check_reach(root, path)
        _become(layer, carries=True, grafted=isinstance(layer, Grafted))
    if not isinstance(host, Grafted):
        _become(host, carries=isinstance(host, Carrier), grafted=True)
        host.grafts = nn.ModuleDict()
        host._loan = _Loan() if layer is None else layer._loan
    host.grafts = nn.ModuleDict(_nested({**host.grafts, name: addition})).train(host.training)


def ungraft(root: nn.Module, path: str | nn.Module, name: str) -> Graft:
    """Take the addition off again and return it; without additions a module is exactly what it was.

    Raises:
        ConfigError: there is none of that name.
    """
    path = path if isinstance(path, str) else _path(root, path)
    host = _host(root, path)
    if not isinstance(host, Grafted) or name not in host.grafts:
        raise ConfigError(f"{path} has no graft named {name!r}", f"it has {sorted(at(host))}")
    _check_swappable(root, path)
    addition = at(host)[name]
    del host.grafts[name]
    if not len(host.grafts):
        del host.grafts
        if not isinstance(host, Carrier):
            del host._loan
        _become(host, carries=isinstance(host, Carrier), grafted=False)
    layer = _layer(root, path)
    if layer is not None and not any(isinstance(module, Grafted) for module in layer.modules()):
        del layer._loan
        _become(layer, carries=False, grafted=False)
    return addition


def at(host: nn.Module) -> dict[str, Graft]:
    """The additions of a module by name, innermost first."""
    return {name: cast(Graft, each) for name, each in host.grafts.items()} if isinstance(host, Grafted) else {}


# ---------------------------------------------------------------------------------------------- the swapped classes


class _Own(threading.local):
    """One slot per thread."""

    side: Side | None = None


class _Loan:
    """The side that a running layer lends to what is inside it; each thread that runs the layer has its own.

    `torch.compile` cannot trace a slot per thread. A layer that is compiled whole needs none: what it lends becomes
    an input of its graph.
    """

    def __init__(self) -> None:
        self._own = _Own()
        self._traced: Side | None = None

    def look(self) -> Side | None:
        if torch.compiler.is_compiling() or self._own.side is None:
            return self._traced  # also set where a compiled layer has to run a piece of itself uncompiled
        return self._own.side

    def lend(self, side: Side | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = side
        else:
            self._own.side = side

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loan:
        return _Loan()


class Grafted(nn.Module):
    """Mixed into the class of a module that has additions."""

    grafts: nn.ModuleDict
    _loan: _Loan
    _first: ClassVar[str]
    """The name of the first parameter of the original forward: some hosts are called with keywords only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        side = kwargs.pop("side") if "side" in kwargs else self._loan.look()
        if not args:
            args = (kwargs.pop(self._first),)
        call = super().forward
        for addition in self.grafts.values():
            call = functools.partial(addition, self, call, side=side)
        return call(*args, **kwargs)


class Carrier(nn.Module):
    """Mixed into the class of a layer that has additions anywhere inside; always outermost."""

    _loan: _Loan

    def forward(self, *args: Any, side: Side | None = None, **kwargs: Any) -> Any:
        before = self._loan.look()
        self._loan.lend(side)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._loan.lend(before)


def _become(module: Any, carries: bool, grafted: bool) -> None:
    """Give a module the class of its base with the mixins it needs, or its base class where it needs none."""
    base = base_class(module)
    mixins = (Carrier,) * carries + (Grafted,) * grafted
    if carries and not isinstance(module, Carrier):
        module._loan = _Loan()
    module.__class__ = _swapped(base, mixins)


def rebase(module: Any, base: Any) -> None:
    """Give a module another class below all that is added to it."""
    mixins = tuple(cls for cls in (Carrier, Grafted) if isinstance(module, cls))
    module.__class__ = _swapped(base, mixins)


@functools.cache
def _swapped(base: Any, mixins: tuple[type, ...]) -> Any:
    """The one subclass of `base` with these mixins, by the name of its base; without any, the base itself."""
    if not mixins:
        return base
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    first = next(iter(list(inspect.signature(base.forward).parameters)[1:]), "")
    return type(base)(base.__name__, (*mixins, base), {**names, "_first": first})


def base_class(module: nn.Module) -> Any:
    """The class that a module had before any addition."""
    return next(cls for cls in type(module).__mro__ if cls not in (Carrier, Grafted) and not _is_swapped(cls))


def _is_swapped(cls: type) -> bool:
    return cls.__bases__[0] in (Carrier, Grafted)


def _nested(additions: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same additions with the innermost ones first, each kind in order of attachment."""
    return dict(sorted(additions.items(), key=lambda item: not item[1].innermost))


# ---------------------------------------------------------------------------------------------- checks


def _path(root: nn.Module, module: nn.Module) -> str:
    for path, each in root.named_modules():
        if each is module:
            return path
    raise ConfigError(f"this {type(module).__name__} is not inside {type(root).__name__}", "name a module of the model")


def _host(root: nn.Module, path: str) -> Any:
    try:
        return root.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in root.named_modules()]
        raise ConfigError(
            f"no module named {path!r}{nearest(path, names)}", "model.named_modules() lists them all"
        ) from None


def _layer(root: nn.Module, path: str) -> Any:
    layer = sites.enclosing(root, path)
    return None if layer is None else root.get_submodule(layer)


def _check_host(root: nn.Module, path: str, name: str) -> None:
    host, parent = root.get_submodule(path), root.get_submodule(path.rpartition(".")[0])
    if name in at(host):
        raise ConfigError(f"{path} already has a graft named {name!r}", "choose another name")
    if not name.isidentifier():
        raise ConfigError(f"{name!r} cannot name a graft", "use letters, digits and underscores")
    if isinstance(parent, nn.MultiheadAttention):
        raise ConfigError(f"{path} is never called: nn.MultiheadAttention reads its weight", "graft on its parent")
    if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu:  # else it is never fused
        raise ConfigError(
            f"{path} is called in training alone: nn.TransformerEncoderLayer reads its weight otherwise",
            "leave it out, or graft on its parent",
        )
    if isinstance(host, nn.ModuleList | nn.ModuleDict):
        raise ConfigError(f"{path} is a list of modules and is never called", "graft on its items")
    _check_swappable(root, path)


def _check_swappable(root: nn.Module, path: str) -> None:
    if "forward" in vars(root.get_submodule(path)):
        raise ConfigError(f"{path} has a forward of its own, put there by another library", "graft before its hooks")
    steps = path.split(".")
    for above in (root.get_submodule(".".join(steps[:depth])) for depth in range(len(steps) + 1)):
        if any(cls.__name__ == "FSDPModule" for cls in type(above).__mro__):
            raise ConfigError(f"{path} is sharded already", "graft before fully_shard")


def _check_reach(root: nn.Module, path: str) -> None:
    """Whether `side=` in a call of the model arrives at the layer: every forward on the way must hand it on.

    The way begins at the outermost module from the layer's own library; whatever is above is ours and calls with
    `side` where it should.
    """
    layer = sites.enclosing(root, path)
    assert layer is not None
    steps = layer.split(".")
    way = [(root.get_submodule(".".join(steps[:depth])), steps[depth:]) for depth in range(len(steps))]
    for module, below in way:
        callable_ = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if (
            callable_
            and _library(module) == _library(root.get_submodule(layer))
            and not _hands_on(base_class(module), below)
        ):
            raise ConfigError(
                f"{type(module).__name__}.forward does not hand its keyword arguments on, so `side` would not reach "
                f"{layer}",
                "choose another LLM or encoder, or a joint without grafts",
            )


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


@functools.cache
def _source(cls: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def arguments(module: Any) -> set[str]:
    """What the family's own forward of a module asks for by name."""
    return {argument.arg for argument in _source(base_class(module)).args.args}


def steps(module: Any, among: list[ast.stmt] | None = None) -> Iterator[ast.stmt]:
    """What the family's own forward of a module does, in order: of a condition on the module's fields alone the branch
    that it takes, of any other both."""
    for step in _source(base_class(module)).body if among is None else among:
        if not isinstance(step, ast.If):
            yield step
            continue
        try:
            taken = step.body if _answer(step.test, module) else step.orelse
        except LookupError:
            taken = [*step.body, *step.orelse]
        yield from steps(module, taken)


def _answer(asked: ast.expr, module: Any) -> Any:
    """The value of an expression over a module's fields.

    Raises:
        LookupError: it asks for more than those.
    """
    match asked:
        case ast.Name(id="self"):
            return module
        case ast.Constant(value=value):
            return value
        case ast.Attribute(value=of, attr=name):
            return getattr(_answer(of, module), name)
        case ast.UnaryOp(op=ast.Not(), operand=of):
            return not _answer(of, module)
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(_answer(part, module) for part in parts)
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as how], comparators=[right]):
            return (_answer(left, module) is _answer(right, module)) == isinstance(how, ast.Is)
    raise LookupError(ast.unparse(asked))


def _hands_on(cls: Any, below: list[str]) -> bool:
    """Whether forward passes its **kwargs in a call of `self.<below...>`, or of what it loops over."""
    forward = _source(cls)
    if forward.args.kwarg is None:
        return False
    looped = {
        name.id
        for loop in ast.walk(forward)
        if isinstance(loop, ast.For)
        for name in ast.walk(loop.target)
        if isinstance(name, ast.Name)
    }
    for call in ast.walk(forward):
        if isinstance(call, ast.Call) and any(
            word.arg is None and ast.unparse(word.value) == forward.args.kwarg.arg for word in call.keywords
        ):
            called = ast.unparse(call.func).split(".")
            if called[0] in looped or called[:2] == ["self", below[0]]:
                return True
    return False
