"""Finds layers whose forward writes their own weight, by reading their source.

A generated weight is computed at each read, so what a forward writes into it is lost.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterable
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

__all__: list[str] = []

_Held = frozenset[str]  # the parameters whose memory an expression may share
NOTHING: _Held = frozenset()
LAYER: _Held = frozenset([""])  # the layer itself, as no parameter has an empty name

_in_torch = re.compile(r"builtins|torch(\..*)?").fullmatch  # the class object is a builtin
_is_in_place = re.compile(".*[^_]_").fullmatch
# Attributes and methods of a tensor, or of a dict of tensors, that may share its memory.
_shares = re.compile(
    "T|mT|data|detach|(view|reshape|expand|type)(_as)?|contiguous|to|float|half|double|bfloat16|cpu"
    "|cuda|numpy|(un)?squeeze|t|transpose|permute|movedim|narrow|select|(un)?flatten|ravel|diagonal"
    "|unbind|split|chunk|values|items|.*[^_]_"
).fullmatch
_wraps = re.compile("list|tuple|iter|reversed|sorted|dict|enumerate|next|Parameter").fullmatch
_gives_all = re.compile("_parameters|parameters|named_parameters|state_dict").fullmatch
_sets = re.compile("(set|del)attr|__(set|del)attr__|register_parameter").fullmatch


def written_parameter(layer: nn.Module, params: Iterable[str]) -> str | None:
    """Tells whether a forward pass of a layer writes one of the layer's own parameters.

    Reads the source of its forward, its hooks, and what these call with the layer or a parameter.
    What has no source, or does not say it in plain words, counts as reading.

    Args:
        layer: A layer.
        params: Names of its parameters.

    Returns:
        Such as "its forward writes weight (Masked.forward, line 8: self.weight.mul_(2))", or None.
    """
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    own = [value for value in vars(layer).values() if isinstance(value, FunctionType | MethodType)]
    if all(_in_torch(base.__module__) for base in type(layer).__mro__) and not hooks and not own:
        return None
    reader = _Reader(layer, params)
    reader.read(reader.method("forward"), [], {})
    start = "its forward writes" if reader.written else "its forward hook writes"
    for hook in hooks:
        reader.read(hook, [LAYER], {})
    return f"{start} {reader.written[0]}" if reader.written else None


@functools.lru_cache(maxsize=1024)
def _parsed(code: CodeType) -> Any:
    """A function's tree, with the line numbers of its file; None without source."""
    try:
        lines, start = inspect.getsourcelines(code)
        # A method stands under an "if": dedenting it would change strings of several lines.
        deep = lines[0][0].isspace()
        tree = ast.increment_lineno(ast.parse("if 1:\n" * deep + "".join(lines)), start - 1 - deep)
    except (OSError, TypeError, SyntaxError):
        return None
    # There is none of this name if it is a lambda, or if the file has changed since.
    return next((it for it in ast.walk(tree) if getattr(it, "name", "") == code.co_name), None)


class _Reader(ast.NodeVisitor):
    """Reads all that one layer runs, each function in the order of its statements."""

    def __init__(self, layer: nn.Module, params: Iterable[str]) -> None:
        self.layer, self.params = layer, frozenset(params)
        self.written: list[str] = []
        self.seen: set[object] = set()
        self.function: Any = None  # the one that is being read
        self.env: dict[Any, _Held] = {}  # what its names hold

    def method(self, name: str, base: Any = None) -> Any:
        """An attribute of the layer, or of a call of super()."""
        mro: Any = type(self.layer).__mro__
        if isinstance(base, ast.Call):  # it looks behind the class that it names, or stands in
            after = self.outside([*base.args, ast.Name("__class__")][0])
            mro = mro[mro.index(after) + 1 :] if after in mro else mro
        elif name in vars(self.layer):
            return vars(self.layer)[name]
        raw = next((vars(cls)[name] for cls in mro if name in vars(cls)), None)
        return raw.__get__(self.layer) if isinstance(raw, FunctionType | staticmethod) else raw

    def read(self, called: Any, args: list[_Held], words: dict[Any, _Held]) -> None:
        """Reads a function, as called with some arguments."""
        if isinstance(called, MethodType):
            args = [LAYER if called.__self__ is self.layer else NOTHING, *args]
            called = called.__func__
        function = inspect.unwrap(called) if isinstance(called, FunctionType) else None
        # Functions of torch only read, but the layer's methods there may call its own again.
        if function is None or (_in_torch(str(function.__module__)) and LAYER not in args[:1]):
            return
        if node := _parsed(function.__code__):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
            env = {**words, **dict(zip(names, args, strict=False))}
            if any(env.values()) and (key := (function, *env.items())) not in self.seen:
                self.seen.add(key)
                outer = self.function, self.env
                self.function, self.env = function, env
                self.generic_visit(ast.Module(node.body, []))
                self.function, self.env = outer

    def outside(self, node: ast.AST) -> Any:
        """What a name, or a dotted one, stands for outside the function."""
        if isinstance(node, ast.Attribute):
            if self.held(node.value) == LAYER:
                return self.method(node.attr, node.value)
            return inspect.getattr_static(self.outside(node.value), node.attr, None)
        if not isinstance(node, ast.Name) or node.id in self.env:
            return None
        names, cells = self.function.__code__.co_freevars, self.function.__closure__ or ()
        try:
            return dict(zip(names, cells, strict=True))[node.id].cell_contents
        except (KeyError, ValueError):  # there is no such cell, or it is still empty
            return self.function.__globals__.get(node.id)

    def held(self, node: ast.AST | None) -> _Held:
        """The parameters whose memory an expression may share, LAYER, or a string."""
        match node:
            case ast.Name():
                return self.env.get(node.id, NOTHING)
            case ast.Constant(value=str(text)):
                return frozenset([text])
            case ast.IfExp():
                return self.held(node.body) | self.held(node.orelse)
            case ast.Subscript():
                return self.held(node.value) & (self.held(node.slice) or self.params)
            case ast.Attribute():
                if (base := self.held(node.value)) == LAYER:
                    return self.params & (self.params if _gives_all(node.attr) else {node.attr})
                return base if _shares(node.attr) else NOTHING
            case ast.Call(func=ast.Name(id="super")):
                return LAYER
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, key, *_]):
                return self.params & self.held(key) if self.held(owner) == LAYER else NOTHING
            case ast.Call():
                name, args = self.call(node)
                if args[:1] == [LAYER]:
                    return self.held(node.func)
                is_view = isinstance(node.func, ast.Attribute) and _shares(name)
                return args[0] if args and (is_view or _wraps(name)) else NOTHING
        return NOTHING

    def call(self, node: ast.Call) -> tuple[str, list[_Held]]:
        """The name of what is called, and what its arguments hold, a method's own first."""
        # Only here does a list that is written out hold something: its items may be replaced.
        args = [NOTHING.union(*map(self.held, getattr(arg, "elts", [arg]))) for arg in node.args]
        if not isinstance(node.func, ast.Attribute):
            return getattr(node.func, "id", ""), args
        is_function = isinstance(self.outside(node.func.value), type | ModuleType)
        return node.func.attr, args if is_function else [self.held(node.func.value), *args]

    def write(self, held: _Held, node: ast.AST) -> None:
        """Notes that a statement or an expression writes parameters."""
        if names := sorted(held & self.params):
            written = " and ".join(names) if len(names) < 3 else "its parameters"
            place = self.function.__qualname__.rpartition("<locals>.")[2]
            code = textwrap.shorten(ast.unparse(node), 100, placeholder="...")
            self.written += [f"{written} ({place}, line {getattr(node, 'lineno', 0)}: {code})"]

    def bind(self, target: ast.AST, value: Any, node: ast.AST) -> None:
        """Lets names hold what they are assigned, and notes what is written by that."""
        if isinstance(node, ast.AugAssign) or isinstance(target, ast.Attribute | ast.Subscript):
            self.write(self.held(target), node)
        elif isinstance(target, ast.Name):
            self.env[target.id] = self.held(value)
        elif isinstance(target, ast.Tuple | ast.List):
            # Each has its own value, or, as with enumerate() and items(), the last has it.
            values = getattr(value, "elts", [None] * (len(target.elts) - 1) + [value])
            values = value.args if getattr(getattr(value, "func", 0), "id", 0) == "zip" else values
            for part, own in zip(target.elts, values, strict=False):
                self.bind(part, own, node)

    def visit_Call(self, node: ast.Call) -> None:
        """Finds what a call writes, and reads what it runs."""
        self.generic_visit(node)
        name, args = self.call(node)
        words = {word.arg: self.held(word.value) for word in node.keywords}
        self.write(words.get("out", NOTHING), node)
        if _is_in_place(name):
            self.write(args[0] if args else words.get("tensor", NOTHING), node)
        if args[:1] == [LAYER] and _sets(name):
            self.write(NOTHING.union(*args[1:2]), node)
        else:
            own = self.held(getattr(node.func, "value", None)) == LAYER
            self.read(self.outside(node.func), args[own:], words)

    def visit_Assign(self, node: Any) -> None:
        """Reads what binds names or deletes them, or writes in place."""
        self.generic_visit(node)
        for target in getattr(node, "targets", None) or [node.target]:
            self.bind(target, getattr(node, "value", None), node)

    def visit_For(self, node: Any) -> None:
        """Reads a loop, once for each element if these are written out."""
        for loop in getattr(node, "generators", [node]):
            for value in getattr(loop.iter, "elts", [loop.iter]):
                self.bind(loop.target, value, node)
                self.generic_visit(node)

    def visit_Lambda(self, node: ast.Lambda | ast.FunctionDef) -> None:
        """Reads a function inside another, whose arguments hold nothing."""
        outer, own = self.env, [arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
        self.env = {**outer, **dict.fromkeys(own, NOTHING)}
        self.generic_visit(node)
        self.env = outer

    visit_AnnAssign = visit_AugAssign = visit_NamedExpr = visit_Delete = visit_Assign
    visit_ListComp = visit_GeneratorExp = visit_For
    visit_FunctionDef = visit_Lambda
