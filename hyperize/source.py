"""Finds layers whose forward writes their own weight, by reading their source.

A generated weight is computed at each read, so what a forward writes into it is lost. What is read
is Python: the layer's forward, its hooks, and all that these call with the layer or its weight.
"""

import ast
import builtins
import contextlib
import functools
import inspect
import linecache
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn
from torch.autograd import Function

_views = re.compile(
    "T|H|mT|mH|data|real|imag|detach|view|view_as|reshape|reshape_as|contiguous|to|type|type_as"
    "|float|half|double|bfloat16|cpu|cuda|numpy|squeeze|unsqueeze|t|transpose|adjoint|permute"
    "|swapaxes|swapdims|movedim|moveaxis|expand|expand_as|broadcast_to|narrow|select|flatten"
    "|unflatten|ravel|diagonal|unfold|as_strided|positive|[a-z0-9_]*[a-z0-9]_"
).fullmatch
"""Of a tensor: attributes and methods that may share its memory, and those in place."""
_parts = re.compile("unbind|split|chunk|tensor_split|[hvd]split").fullmatch
"""Of a tensor: those that return several that share its memory."""
_wraps = re.compile("Parameter|as_tensor|asarray|from_numpy|next").fullmatch
_gathers = re.compile("list|tuple|iter|reversed|sorted|dict|zip|enumerate|filter").fullmatch
"""Functions that hand on what they are given: one tensor, and several."""
_mutates = re.compile("pop|popitem|update|clear|setdefault|__(set|del)item__").fullmatch
_sets = re.compile("(set|del)attr|__(set|del)attr__|register_parameter").fullmatch
_resets = re.compile("_?reset_parameters|load_state_dict").fullmatch
"""Methods of torch's modules that write. All others only read."""
_is_in_place = re.compile(".*[^_]_").fullmatch
FUNCTIONS = (FunctionType, MethodType, functools.partial)
SHOWN = 100
"""Characters of the code in a reason."""


class _Held(NamedTuple):
    """What an expression holds of the layer.

    Attributes:
        kind: "layer", "layers" (an iterable with it), "object" (another one), "store" (the dict of
            parameters), "tensor" (a parameter's memory), "items" (several), "names" (strings).
        names: The parameters, or the strings.
        cls: The class of a layer or an object.
        after: The class behind which ``super()`` looks for methods.
        parts: The elements of a tuple that is written out.
    """

    kind: str
    names: frozenset[str] = frozenset()
    cls: type = object
    after: type | None = None
    parts: tuple["_Held | None", ...] = ()


_Args = Sequence[_Held | None]
_Keywords = Mapping[Any, _Held | None]


class _Callee(NamedTuple):
    """A function, the class it was found in, and the arguments that are bound to it."""

    function: Any  # mypy takes a FunctionType for a method of this class
    owner: type | None
    bound: tuple[_Held | None, ...]


class _WrittenError(Exception):
    """Ends the reading: a parameter is written."""


def written_parameter(layer: nn.Module, params: Iterable[str]) -> str | None:
    """Tells whether a forward pass of a layer writes one of the layer's own parameters.

    Reads the source of the layer's ``forward`` and ``__call__``, of its hooks, and of the methods,
    properties and functions that these reach with the layer or a parameter. Torch's own code is
    known to only read. What may share a parameter's memory, as ``.contiguous()``, counts as it.

    What has no source cannot be known and counts as reading: lambdas, C extensions, code from
    ``exec``. So does what writes from elsewhere, as the forward of a parent, and what writes by a
    name or through an object that the source does not tell. Nothing is run, and the layer is not
    changed.

    Args:
        layer: A layer.
        params: Names of its parameters.

    Returns:
        A clause that can stand after "skipped: ", such as "its forward writes weight
        (Masked.forward, line 8: self.weight.data *= self.mask)", or None.
    """
    if _has_own_code(layer):
        return _Reader(type(layer), params, layer).reason()
    cls: Any = type(layer)  # which mypy does not take for hashable
    return None if _is_torchs(cls) else _reason(cls, tuple(params))


@functools.lru_cache(maxsize=4096)
def _reason(cls: type, params: tuple[str, ...]) -> str | None:
    return _Reader(cls, params, None).reason()


@functools.lru_cache(maxsize=4096)
def _is_torchs(cls: type) -> bool:
    """Whether all bases are torch's, too: torch makes parametrized classes of any other."""
    return all(_in_torch(base.__module__) for base in cls.__mro__)


def _is_own(value: object) -> bool:
    """Whether this is a function of Python that is not torch's."""
    return isinstance(value, FunctionType) and not _in_torch(value.__globals__.get("__name__"))


def _in_torch(module: str | None) -> bool:
    return module in ("torch", "builtins") or (module or "").startswith("torch.")


def _has_own_code(layer: nn.Module) -> bool:
    """Whether a layer runs code that its class does not tell."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return True
    children: Iterable[Any] = map(type, layer._modules.values())
    return any(isinstance(value, FUNCTIONS) for value in vars(layer).values()) or not all(
        map(_is_torchs, children)
    )


@functools.lru_cache(maxsize=4096)
def _parsed(code: CodeType) -> tuple[ast.FunctionDef, int] | None:
    """A function's tree, and what to add to its line numbers; None without source."""
    try:
        lines = inspect.getblock(linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :])
        # A method stands under an "if": dedenting it would change strings of several lines.
        inner = lines[0][0].isspace()
        node = ast.parse("if 1:\n" * inner + "".join(lines)).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    node = node.body[0] if isinstance(node, ast.If) else node
    if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
        return None  # a lambda, or a file that has changed since it was imported
    return node, code.co_firstlineno - 1 - inner


def _found(cls: type, name: str, after: type | None = None) -> tuple[type | None, Any]:
    """The class that has an attribute, and the attribute as it is there."""
    bases = cls.__mro__[cls.__mro__.index(after) + 1 :] if after in cls.__mro__ else cls.__mro__
    return next(((base, vars(base)[name]) for base in bases if name in vars(base)), (None, None))


def _either(helds: Iterable[_Held | None]) -> _Held | None:
    """What may be any of several: a tensor, if one is."""
    some = sorted(filter(None, helds), key=lambda held: held.kind != "tensor")
    same = [held.names for held in some if held.kind == some[0].kind]
    return some[0]._replace(names=frozenset().union(*same)) if some else None


def _items(parts: Iterable[_Held | None]) -> _Held | None:
    parts = tuple(parts)
    return _Held("items", parts=parts) if any(parts) else None


def _named(value: object) -> _Held | None:
    return _Held("names", frozenset([value])) if isinstance(value, str) else None


def _element(held: _Held | None) -> _Held | None:
    """What a loop over something holds."""
    if held is None or held.kind in ("layer", "object"):
        return None
    kinds = {"items": "tensor", "store": "names", "layers": "layer"}
    inner = held._replace(kind=kinds.get(held.kind, held.kind))
    return _either(held.parts) if held.parts else inner


def _narrowed(held: _Held, key: _Held | None) -> _Held | None:
    """The parameters of something under a key; all of them if the key is unknown."""
    names = held.names & key.names if key and key.kind == "names" else held.names
    return held._replace(kind="tensor", names=names) if names else None


def _bound(signature: ast.arguments, args: _Args, keywords: _Keywords) -> dict[str, _Held | None]:
    """What a function's arguments hold when it is called."""
    names = [arg.arg for arg in (*signature.posonlyargs, *signature.args)]
    env = dict.fromkeys((*names, *(arg.arg for arg in signature.kwonlyargs)))
    env |= {name: held for name, held in keywords.items() if name in env}
    env |= dict(zip(names, args, strict=False))
    if signature.vararg:
        env[signature.vararg.arg] = _items(args[len(names) :])
    return env


class _Reader:
    """Reads all that one layer runs.

    Args:
        cls: The layer's class.
        params: Names of its parameters.
        layer: The layer, if it runs code that its class does not tell.
    """

    def __init__(self, cls: type, params: Iterable[str], layer: nn.Module | None) -> None:
        self.layer, self.held = layer, _Held("layer", frozenset(params), cls)
        self.attributes = {} if layer is None else {**vars(layer), **layer._modules}
        self.seen: dict[Any, _Held | None] = {}

    def reason(self) -> str | None:
        """The reason, of the first write that is found."""
        for entry, callee, args in self._entries():
            try:
                if callee:
                    self.read(callee, args, {})
            except _WrittenError as written:
                return f"its {entry} writes {written}"
        return None

    def _entries(self) -> Iterator[tuple[str, _Callee | None, _Args]]:
        """What torch runs when the layer is called."""
        for name in ("forward", "__call__"):
            yield name, self.method(self.held, name), ()
        if self.layer is not None:
            for hook in self.layer._forward_pre_hooks.values():
                yield "forward pre-hook", self.callee(hook), [self.held]
            for hook in self.layer._forward_hooks.values():
                yield "forward hook", self.callee(hook), [self.held]

    def hold(self, value: object) -> _Held | None:
        """What an object is: the layer, or another one whose class has methods to read."""
        if value is self.layer and value is not None:
            return self.held
        return None if _in_torch(type(value).__module__) else _Held("object", cls=type(value))

    def callee(self, value: Any, owner: type | None = None) -> _Callee | None:
        """The function behind what is called, if it is one of Python."""
        if isinstance(value, FunctionType):
            return _Callee(value, owner, ())
        bound: tuple[object, ...]
        if isinstance(value, MethodType):
            inner, bound = self.callee(value.__func__), (value.__self__,)
        elif isinstance(value, functools.partial):
            inner, bound = self.callee(value.func), value.args
        else:
            return self.method(self.hold(value), "__call__")
        return inner and inner._replace(bound=(*inner.bound, *map(self.hold, bound)))

    def method(self, held: _Held | None, name: str) -> _Callee | None:
        """The function behind a method of the layer or of another object."""
        if held is None or held.kind not in ("layer", "object"):
            return None
        if held.kind == "layer" and not held.after and name in self.attributes:
            value = self.attributes[name]
            return None if isinstance(value, nn.Module) else self.callee(value)
        owner, raw = _found(held.cls, name, held.after)
        bound = () if isinstance(raw, staticmethod) else (held._replace(after=None),)
        raw = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        return _Callee(raw, owner, bound) if isinstance(raw, FunctionType) else None

    def read(self, callee: _Callee, args: _Args, keywords: _Keywords) -> _Held | None:
        """Reads a function, and the one that it wraps, as called with some arguments.

        Returns:
            What it returns.

        Raises:
            _WrittenError: It writes a parameter.
        """
        function: Any = callee.function
        returned = []
        while isinstance(function, FunctionType | MethodType):
            function = getattr(function, "__func__", function)
            returned += [self._read(callee._replace(function=function), args, keywords)]
            function = getattr(function, "__wrapped__", None)
        return _either(returned)

    def _read(self, callee: _Callee, args: _Args, keywords: _Keywords) -> _Held | None:
        args = (*callee.bound, *args)
        if _in_torch(callee.function.__globals__.get("__name__")):
            if self.held in args[:1]:
                self._read_overridden(callee.function)
            return None
        parsed = _parsed(callee.function.__code__)
        env = _bound(parsed[0].args, args, keywords) if parsed else {}
        key = (callee.function, callee.owner, *env.items())
        if parsed and any(env.values()) and key not in self.seen:
            self.seen[key] = None  # while it is read, for it may call itself
            scope = _Scope(self, callee, env, parsed[1])
            scope.visit_all(parsed[0].body)
            self.seen[key] = scope.returned
        return self.seen.get(key)

    def _read_overridden(self, function: FunctionType) -> None:
        """Reads what a method of torch calls of the layer's class, such as ``_conv_forward``."""
        if function in self.seen:
            return
        self.seen[function] = None
        weights = {name: _narrowed(self.held, _named(name)) for name in self.held.names}
        for name in function.__code__.co_names:
            if callee := self.method(self.held, name):
                self.read(callee, (), weights)


class _Scope(ast.NodeVisitor):
    """Reads one function, in the order of its statements.

    Args:
        reader: Reads what it calls.
        callee: The function.
        env: What its arguments hold; later also other names and, with a dot, the layer's fields.
        offset: What to add to the line numbers.
    """

    def __init__(
        self, reader: _Reader, callee: _Callee, env: dict[str, _Held | None], offset: int
    ) -> None:
        self.reader, self.callee, self.env, self.offset = reader, callee, env, offset
        self.this = next(iter(env.values()))
        self.returned: _Held | None = None
        self.inner: dict[str, ast.FunctionDef] = {}
        code = callee.function.__code__
        self.outer: dict[str, Any] = dict.fromkeys((*code.co_varnames, *code.co_cellvars))
        for name, cell in zip(code.co_freevars, callee.function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a name that is not yet bound
                self.outer[name] = cell.cell_contents

    def visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        """Reads several nodes."""
        for node in filter(None, nodes):
            self.visit(node)

    def held(self, node: ast.AST | None) -> _Held | None:
        """What an expression holds of the layer."""
        match node:
            case ast.Name():
                return self.env[node.id] if node.id in self.env else _named(self.outside(node))
            case ast.Constant():
                return _named(node.value)
            case ast.JoinedStr():
                parts = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
                known = "".join(".*" if part is None else re.escape(str(part)) for part in parts)
                names = [name for name in self.reader.held.names if re.fullmatch(known, name)]
                return _Held("names", frozenset(names))
            case ast.Attribute():
                return self._attribute(self.held(node.value), node.attr)
            case ast.Subscript():
                return self._subscript(self.held(node.value), node.slice)
            case ast.Call():
                return self._result(node)
            case ast.IfExp():
                return _either([self.held(node.body), self.held(node.orelse)])
            case ast.BoolOp(values=values):
                return _either(map(self.held, values))
            case ast.NamedExpr(value=value) | ast.Starred(value=value):
                return self.held(value)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Dict(values=parts):
                return _items(map(self.held, parts))
            case ast.ListComp() | ast.GeneratorExp():
                with self._inside():
                    for loop in node.generators:
                        self._bind_loop(loop.target, loop.iter)
                    return _items([self.held(node.elt)])
        return None

    def outside(self, node: ast.AST) -> Any:
        """What an expression is outside of the function: a module, a class, another function."""
        if isinstance(node, ast.Attribute):
            value = self.outside(node.value)
            if isinstance(value, type):
                return _found(value, node.attr)[1]
            return vars(value).get(node.attr) if isinstance(value, ModuleType) else None
        if isinstance(node, ast.Call) and node.args and self.outside(node.func) is type:
            held = self.held(node.args[0])
            return held and held.cls
        if not isinstance(node, ast.Name):
            return None
        unbound = self.callee.function.__globals__.get(node.id, vars(builtins).get(node.id))
        return self.outer.get(node.id, unbound)

    def _attribute(self, held: _Held | None, name: str) -> _Held | None:
        if held is None or held.kind not in ("layer", "object"):
            return held if held and held.kind == "tensor" and _views(name) else None
        if name in held.names:
            return _Held("tensor", frozenset([name]))
        if held.kind == "layer":
            if name in ("_parameters", "_flat_weights", "all_weights"):
                return _Held("store" if name == "_parameters" else "items", held.names)
            if "." + name in self.env:
                return self.env["." + name]
            if isinstance(value := self.reader.attributes.get(name), nn.Module):
                return self.reader.hold(value)
        owner, raw = _found(held.cls, name, held.after)
        getter: Any = getattr(raw, "fget", getattr(raw, "func", None))
        callee = _Callee(getter, owner, (held._replace(after=None),))
        return self.reader.read(callee, (), {}) if isinstance(getter, FunctionType) else None

    def _subscript(self, held: _Held | None, key: ast.AST) -> _Held | None:
        index = key.value if isinstance(key, ast.Constant) else None
        if held and isinstance(index, int) and index < len(held.parts):
            return held.parts[index]
        if held and held.kind in ("items", "store") and not held.parts:
            return _narrowed(held, self.held(key))
        return _element(held)

    def _result(self, node: ast.Call) -> _Held | None:
        """What a call returns."""
        args = self._arguments(node)
        base, name = self._called(node.func)
        if _is_own(self.outside(node.func)) and not base:
            return self._read_call(node, args)
        first = base or (args[0] if args else None)
        kind = first.kind if first else ""
        if not base and name == "super":
            after = self.outside(node.args[0]) if node.args else self.callee.owner
            return self.this and self.this._replace(after=after)
        if first and kind == "layer" and name == ("get_parameter" if base else "getattr"):
            key = args[-1] if base else args[1]
            names = key.names if key and key.kind == "names" else first.names
            return _either(self._attribute(first, name) for name in names)
        if base and kind == "layer" and name in ("parameters", "named_parameters", "state_dict"):
            return _Held("items", base.names)
        if base and kind == "layer" and name in ("modules", "named_modules"):
            return base._replace(kind="layers", after=None)
        if base and kind in ("store", "items") and name in ("get", "pop"):
            return self._subscript(base, node.args[0]) if node.args else _element(base)
        if base and kind in ("store", "items") and name in ("values", "items", "copy"):
            return base._replace(kind="items")
        if first and kind == "tensor" and _parts(name):
            return first._replace(kind="items")
        if first and kind == "tensor" and (_views(name) or (not base and _wraps(name))):
            return first
        if not base and (_gathers(name) or name == "next"):
            return _items(map(_element, args)) if _gathers(name) else _element(first)
        return self._read_call(node, args)

    def _arguments(self, node: ast.Call) -> list[_Held | None]:
        helds: list[_Held | None] = []
        for arg in node.args:
            held = self.held(arg)
            helds += held.parts if isinstance(arg, ast.Starred) and held and held.parts else [held]
        return helds

    def _called(self, func: ast.AST) -> tuple[_Held | None, str]:
        """What a method is called on, and its name; or None and the name of a function.

        The name is empty for a method of something else: ``x.add_(self.bias)`` only reads.
        """
        if isinstance(func, ast.Attribute):
            base, scope = self.held(func.value), self.outside(func.value)
            return base, func.attr if base or isinstance(scope, type | ModuleType) else ""
        return None, str(getattr(self.outside(func), "__name__", ""))

    def _read_call(self, node: ast.Call, args: _Args) -> _Held | None:
        """Reads the function that is called, and returns what it returns."""
        func, value = node.func, self.outside(node.func)
        keywords = {word.arg: self.held(word.value) for word in node.keywords}
        if isinstance(func, ast.Name) and func.id in self.inner:
            inner = self.inner.pop(func.id)  # while it is read, for it may call itself
            self._visit_inner(inner.body, _bound(inner.args, args, keywords))
            self.inner[func.id] = inner
            return None
        callee = self.reader.method(self.held(func), "forward")
        if isinstance(func, ast.Attribute) and not callee:
            callee = self.reader.method(self.held(func.value), func.attr)
        scope = self.outside(func.value) if isinstance(func, ast.Attribute) else None
        owner: type | None = None
        bound: tuple[None, ...] = ()
        if isinstance(scope, type) and isinstance(func, ast.Attribute):
            # An autograd function's apply calls its forward, with a context in front.
            apply = func.attr == "apply" and issubclass(scope, Function)
            owner, value = _found(scope, "forward" if apply else func.attr)
            bound = (None,) * apply
        value = getattr(value, "__func__", value)
        if not callee and isinstance(value, FunctionType):
            callee = _Callee(value, owner, bound)
        return self.reader.read(callee, args, keywords) if callee else None

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        args = self._arguments(node)
        base, name = self._called(node.func)
        words = {word.arg: word.value for word in node.keywords}
        out = self.held(words.get("out"))
        if out and out.kind in ("tensor", "items"):
            self._write(out, node)
        args = [base, *args] if base else args or [self.held(words.get("tensor"))]
        first = args[0] if args else None
        key = args[1] if len(args) > 1 else None
        inplace = words.get("inplace")
        # torch.nn.init has functions by their old names, without the underscore.
        old = getattr(self.outside(node.func), "__module__", "") == nn.init.__name__
        in_place = _is_in_place(name) or (old and hasattr(nn.init, name + "_"))
        in_place = in_place or (isinstance(inplace, ast.Constant) and inplace.value and name)
        if first and first.kind in ("tensor", "items") and (in_place or _sets(name)):
            self._write(first, node)
        if first and first.kind == ("store" if _mutates(name) else "layer" if _sets(name) else ""):
            self._write(_narrowed(first, key), node)
        method = self.reader.method(base, name) if _resets(name) else None
        if method and _in_torch(method.function.__globals__.get("__name__")):
            self._write(base, node)
        self._result(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        # A property is read here. So is a method that is only named, for what is called later.
        self.generic_visit(node)
        self.held(node)
        if callee := self.reader.method(self.held(node.value), node.attr):
            self.reader.read(callee, (), {})

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign | ast.NamedExpr) -> None:
        self.visit_all([node.value])
        held = self.held(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            self._assign(target, node)
            self._bind(target, held)

    visit_AnnAssign = visit_NamedExpr = visit_Assign

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        held = self.held(node.target)
        if held and held.kind in ("tensor", "store"):
            self._write(held, node)
        self._assign(node.target, node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._assign(target, node)
            self._bind(target, None)

    def visit_Return(self, node: ast.Return) -> None:
        self.visit_all([node.value])
        self.returned = _either([self.returned, self.held(node.value)])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            root = alias.name.partition(".")[0]
            name = alias.name if alias.asname else root
            self.outer[alias.asname or root] = sys.modules.get(name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = sys.modules.get(node.module or "")
        for alias in node.names:
            self.outer[alias.asname or alias.name] = getattr(module, alias.name, None)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._branch(node.body, node.orelse)

    def visit_While(self, node: ast.While | ast.For) -> None:
        if isinstance(node, ast.For):
            self.visit(node.iter)
            self._assign(node.target, node)
            self._bind_loop(node.target, node.iter)
        else:
            self.visit(node.test)
        self._branch([*node.body, *node.body], [])  # twice: what a round does to the next
        self.visit_all(node.orelse)

    visit_For = visit_While

    def visit_Try(self, node: ast.Try) -> None:
        self._branch([*node.body, *node.orelse], [])
        self._branch([], *(handler.body for handler in node.handlers))
        self.visit_all(node.finalbody)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # Read here, as it may be called from elsewhere, and at each call from here.
        self.inner[node.name] = node
        self._visit_inner(node.body, _bound(node.args, (), {}))

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_inner([node.body], _bound(node.args, (), {}))

    def visit_ListComp(
        self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    ) -> None:
        with self._inside():
            for loop in node.generators:
                self.visit(loop.iter)
                self._bind_loop(loop.target, loop.iter)
                self.visit_all(loop.ifs)
            self.visit_all(getattr(node, field, None) for field in ("elt", "key", "value"))

    visit_DictComp = visit_SetComp = visit_GeneratorExp = visit_ListComp

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Afterwards, names and what is returned are as before."""
        env, returned = self.env, self.returned
        self.env = dict(env)
        yield
        self.env, self.returned = env, returned

    def _visit_inner(self, body: Iterable[ast.AST], env: Mapping[str, _Held | None]) -> None:
        with self._inside():
            self.env.update(env)
            self.visit_all(body)

    def _branch(self, *bodies: Sequence[ast.stmt]) -> None:
        """Reads alternatives. Then, a name holds what it may hold after any that goes on."""
        start = self.env
        ends = []
        for body in bodies:
            self.env = dict(start)
            self.visit_all(body)
            if not body or not isinstance(body[-1], ast.Return | ast.Raise):
                ends.append(self.env)
        names = {name for env in ends for name in env}
        self.env = {name: _either(env.get(name) for env in ends) for name in names}

    def _bind(self, target: ast.AST, held: _Held | None) -> None:
        """Lets a name, a field of the layer or each of several names hold something."""
        if isinstance(target, ast.Tuple | ast.List):
            parts = held.parts if held else ()
            if len(parts) != len(target.elts):
                parts = (_element(held),) * len(target.elts)
            for part, value in zip(target.elts, parts, strict=True):
                self._bind(part, value)
        elif isinstance(target, ast.Name):
            self.env[target.id] = held
        elif isinstance(target, ast.Attribute) and (base := self.held(target.value)):
            self.env["." * (base.kind == "layer") + target.attr] = held

    def _bind_loop(self, target: ast.AST, iterated: ast.AST) -> None:
        """Binds a loop's target: what comes in pairs, each to its own."""
        held = self.held(iterated)
        name = self._called(iterated.func)[1] if isinstance(iterated, ast.Call) else ""
        if name == "enumerate" and held:
            held = _items([None, *held.parts])
        elif name != "zip":
            inner = _element(held)
            pairs = isinstance(target, ast.Tuple) and name in ("items", "named_parameters")
            held = _items([inner._replace(kind="names"), inner]) if pairs and inner else inner
        self._bind(target, held)

    def _assign(self, target: ast.AST, node: ast.AST) -> None:
        """Finds a write in what is assigned or deleted."""
        self.generic_visit(target)
        if isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._assign(part, node)
        if not isinstance(target, ast.Subscript | ast.Attribute):
            return
        base = self.held(target.value)
        if base and base.kind == "tensor":
            self._write(base, node)
        if isinstance(target, ast.Subscript):
            self._write(
                self._subscript(base, target.slice) if base and base.kind == "store" else None, node
            )
        elif base and base.kind == "layer":
            self._write(_narrowed(base, _named(target.attr)), node)
            owner, raw = _found(base.cls, target.attr)
            if isinstance(setter := getattr(raw, "fset", None), FunctionType):
                value = self.held(getattr(node, "value", None))
                self.reader.read(_Callee(setter, owner, (base,)), [value], {})

    def _write(self, held: _Held | None, node: ast.AST) -> None:
        """Ends the reading, if anything is written."""
        if held is None:
            return
        names = sorted((_element(held) or held).names)
        written = " and ".join(names) if len(names) < 3 else "its parameters"
        place = self.callee.function.__qualname__.rpartition("<locals>.")[2]
        code = " ".join(ast.unparse(node).split())
        code = code if len(code) <= SHOWN else code[: SHOWN - 3] + "..."
        line = self.offset + getattr(node, "lineno", 0)
        raise _WrittenError(f"{written} ({place}, line {line}: {code})")
