"""Every key of the schema is read by code, and every key that code reads is in the schema.

Python files are parsed, and names are followed to the sections they stand for: `model` in `model = cfg.model` of a
function that takes `cfg: SftConfig` is a ModelConfig, so `model.seed` there reads `model.seed`. Parameters without a
section's type are followed by their names (`ANY`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from her_nemo.config import (
    chat,
    data,
    endpoints,
    evaluation,
    reward_bench,
    rl,
    roleplay_bench,
    schema,
    sections,
    synthesis,
)
from her_nemo.config.compose import known_keys, subsection
from her_nemo.config.schema import ARCHITECTURE_KEYS, STAGES

PACKAGE = Path(schema.__file__).parents[1]
SECTIONS = {
    name: value
    for module in (
        chat, data, endpoints, evaluation, reward_bench, rl, roleplay_bench, schema, sections, synthesis
    )
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, BaseModel)
}
# What the parameters are that are typed Any, or by a name of their own.
ANY = {
    "cfg": tuple(STAGES.values()),
    "config": tuple(STAGES.values()),
    "layout": (schema.PpoModel, schema.ParallelModel),
    "model": (schema.PpoModel, schema.ParallelModel),
}
# Files whose `config` or `cfg` is something else: transformers', megatron-core's, Hydra's.
OTHERS = ("megatron", "rollout/vllm_engine.py", "config/compose.py", "data/tokenizer.py")

Types = tuple[type[BaseModel], ...]
Reads = set[tuple[type[BaseModel], str]]


def fields_of(types: Types, name: str) -> tuple[Types, list[tuple[type[BaseModel], str]]]:
    """(the sections behind attribute `name`, who of `types` declares it)."""
    inner, found = [], []
    for kind in types:
        info = kind.model_fields.get(name)
        if info is not None:
            found.append((kind, name))
            section = subsection(info.annotation)
            if section is not None:
                inner.append(section)
    return tuple(inner), found


class Reader(ast.NodeVisitor):
    """Follows sections through one file."""

    def __init__(self, file: str, reads: Reads, unknown: list[str]) -> None:
        self.file, self.reads, self.unknown = file, reads, unknown
        self.names: dict[str, Types] = {}
        self.mappings: dict[str, Types] = {}  # of parameters such as `roles: Mapping[str, ChatModel]`
        self.section: Types = ()  # the section whose methods are being read
        self.attributes: dict[
            str, Types
        ] = {}  # of this file's own objects: `cfg` in run.cfg, `limits` in self.limits
        self.foreign: set[str] = set()  # imported names that are not sections, as tokenizers' Tokenizer

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not (node.module or "").startswith("her_nemo.config"):
            self.foreign |= {alias.asname or alias.name for alias in node.names}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.section = (
            (SECTIONS[node.name],) if self.file.startswith("config/") and node.name in SECTIONS else ()
        )
        self.generic_visit(node)
        self.section = ()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = dict(self.names)
        arguments = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
        for argument in arguments:
            text = ast.unparse(argument.annotation) if argument.annotation else ""
            held = text.removeprefix("Mapping[str, ").removesuffix("]")
            if text.startswith("Mapping[str, ") and held in SECTIONS:
                self.mappings[argument.arg] = (SECTIONS[held],)
            types = self.declared(argument)
            if types:
                self.names[argument.arg] = types
            else:
                self.names.pop(argument.arg, None)
        self.generic_visit(node)
        self.names = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def declared(self, argument: ast.arg) -> Types:
        if argument.arg == "self":
            return self.section
        text = ast.unparse(argument.annotation) if argument.annotation else "Any"
        words = [word.strip() for word in text.split("|")]
        types = tuple(SECTIONS[word] for word in words if word in SECTIONS and word not in self.foreign)
        if text == "TrainingConfig":
            types = (schema.SftConfig, schema.RewardConfig, schema.PpoConfig)
        guess = text == "Any" and not any(self.file.startswith(place) for place in OTHERS)
        return types or (ANY.get(argument.arg, ()) if guess else ())

    def visit_For(self, node: ast.For) -> None:
        """`for role, chat in roles.items()`."""
        found = ast.unparse(node.iter).removesuffix(".items()")
        if isinstance(node.target, ast.Tuple) and found in self.mappings:
            self.names[ast.unparse(node.target.elts[1])] = self.mappings[found]
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            else:
                pairs = [(target, node.value)]
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self.names[name.id] = self.types(value)
                elif isinstance(name, ast.Attribute) and self.types(value):
                    self.attributes[name.attr] = self.types(value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """A field of a dataclass."""
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and ast.unparse(node.annotation) in SECTIONS:
            self.attributes[node.target.id] = (SECTIONS[ast.unparse(node.annotation)],)

    def visit_If(self, node: ast.If) -> None:
        """`if isinstance(config, SftConfig | PpoConfig)`: inside, it is one of those."""
        before = dict(self.names)
        test = node.test
        if (
            isinstance(test, ast.Call)
            and ast.unparse(test.func) == "isinstance"
            and isinstance(test.args[0], ast.Name)
        ):
            narrow = tuple(
                SECTIONS[word.strip()]
                for word in ast.unparse(test.args[1]).split("|")
                if word.strip() in SECTIONS
            )
            if narrow:
                self.names[test.args[0].id] = narrow
        self.visit(test)
        for statement in node.body:
            self.visit(statement)
        self.names = before
        for statement in node.orelse:
            self.visit(statement)

    def types(self, node: ast.AST) -> Types:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, ())
        if isinstance(node, ast.IfExp):
            return self.types(node.body) + self.types(node.orelse)
        if isinstance(node, ast.Attribute):
            if ast.unparse(node) in ("self.cfg", "self.config") and not any(
                self.file.startswith(p) for p in OTHERS
            ):
                return ANY["cfg"]
            if ast.unparse(node) in ("self.model", "planner.model") and self.file == "planning/stages.py":
                return ANY["model"]
            owner = self.types(node.value)
            return fields_of(owner, node.attr)[0] if owner else self.attributes.get(node.attr, ())
        return ()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        types = self.types(node.value)
        if types:
            _, found = fields_of(types, node.attr)
            self.reads |= set(found)
            if not found and not any(hasattr(kind, node.attr) for kind in types):
                self.unknown.append(f"{self.file}:{node.lineno} {ast.unparse(node)}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "model_dump":
            # A section handed on as a whole; a whole configuration dumped for the record reads nothing.
            for kind in self.types(node.func.value):
                if not issubclass(kind, schema.StageConfig):
                    self.reads |= {(kind, name) for name in kind.model_fields}
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant):
                # It asks because not every kind of section has the key.
                kinds = self.types(node.args[0])
                heirs = tuple(kind for kind in SECTIONS.values() if issubclass(kind, kinds)) if kinds else ()
                self.reads |= set(fields_of(heirs, name.value)[1])
        self.generic_visit(node)


def read() -> tuple[Reads, list[str]]:
    reads: Reads = set()
    unknown: list[str] = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        Reader(name, reads, unknown).visit(ast.parse(file.read_text(encoding="utf-8")))
    # Architecture.architecture() hands these out by name; data and demo lists likewise.
    reads |= {(schema.Architecture, key) for key in ARCHITECTURE_KEYS}
    reads |= {(schema.DemoConfig, stage) for stage in STAGES if stage in schema.DemoConfig.model_fields}
    return reads, unknown


def declaring(kind: type[BaseModel], name: str) -> type[BaseModel]:
    """The class of `kind`'s family that first declares the field."""
    return next(base for base in reversed(kind.__mro__) if name in getattr(base, "model_fields", {}))


def leaves(kind: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str, str]]:
    for key, info in known_keys(kind):
        if subsection(info.annotation) is None:
            *parents, leaf = key.split(".")
            owner = kind
            for part in parents:
                owner = subsection(owner.model_fields[part].annotation)
            yield owner, leaf, key


def test_every_key_is_read_and_every_key_read_exists() -> None:
    reads, unknown = read()
    assert not unknown, f"not in the schema: {unknown}"
    known = {(declaring(kind, name), name) for kind, name in reads}
    unread = {
        f"{stage}: {key}"
        for stage, kind in STAGES.items()
        for owner, leaf, key in leaves(kind)
        if (declaring(owner, leaf), leaf) not in known
    }
    assert not unread, f"no code reads {sorted(unread)}"
