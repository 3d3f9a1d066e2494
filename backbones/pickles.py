"""NVIDIA's StyleGAN2 network pickles, read as data: nothing in them is imported, compiled or called.

Such a file rebuilds its networks by running source text that it carries along. Here a small stack machine
reads the opcodes that these files need and puts plain values or inert stand-ins on its stack. The standard
unpickler with a narrow ``find_class`` would not do: it sizes its memo and buffers by numbers in the file,
hashes whatever the file makes a key, and lets it set attributes on every object that it can reach.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_NAMES = ("G", "D", "G_ema")

# Honest files stay far below each of these; they bound what a hostile one can make the reader do.
_MAX_OPCODES = 2_000_000
_MAX_DEPTH = 32
_MAX_COUNT = 1 << 48
_MAX_AXES = 8
# Bytes made per byte of the file: an honest one needs about three (decode, load, copy out). A key or an entry
# counts as some more bytes than those of its text.
_MAX_EXPANSION = 8
_OBJECT_SIZE = 32


class NetworkRecord(NamedTuple):
    """One network of a pickle: what its constructor got, and its tensors."""

    class_name: str
    """Name of its class in the original: ``"Generator"``, ``"Discriminator"``."""
    args: tuple[Any, ...]
    """Positional constructor arguments, plain data."""
    kwargs: dict[str, Any]
    """Keyword constructor arguments, plain data."""
    state: dict[str, Tensor]
    """Tensors by key in the order of ``nn.Module.state_dict()``, contiguous, on the CPU, not views."""


def read_networks(path: str | Path) -> dict[str, NetworkRecord]:
    """Networks of a StyleGAN2 ``.pkl`` (PyTorch version, meta version 6) without running anything in it.

    Pickle protocols 0 to 5 are read and the source text in the file is ignored. A tensor that several modules
    share has one key per module and one memory, as in a state dict.

    Args:
        path: the file; it is read into memory whole.

    Returns:
        Records by name, in the order of the file, those of ``"G"``, ``"D"`` and ``"G_ema"`` that it holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file asks for a global or opcode that such pickles do not need; it is truncated,
            inconsistent, would unfold to more than it holds, or is no pickle; it holds none of the three
            networks, StyleGAN3 ones, those of the TensorFlow version, or another meta version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist or is not a file: give the path of a StyleGAN2 network .pkl"
        )
    content = path.read_bytes()
    budget = _Budget(_MAX_EXPANSION * len(content))
    try:
        root = _Machine(io.BytesIO(content), _NETWORK_GLOBALS, budget).load()
        return {name: _record(name, module, budget) for name, module in _networks(root).items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---- stand-ins: what the machine's stack may hold besides plain Python data


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """An allow-listed global: a function of ours that makes a plain value from checked arguments."""

    function: Callable[[tuple[Any, ...], _Budget], Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Module:
    """A network or a part of one, as its file describes it."""

    class_name: str
    state: dict[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Elements of one dtype, still in the bytes of the file."""

    data: memoryview
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """A strided view of a storage, known to lie inside it."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _ScalarType:
    """A NumPy dtype of one number; its byte order arrives after the object itself."""

    code: str
    order: str = "<"


@dataclass(frozen=True, slots=True, eq=False)
class _PersistentId:
    """A reference out of the pickle, allowed in the header of a storage alone."""

    value: Any


class _Budget:
    """What is left of the work that a file of this size may cause."""

    def __init__(self, size: int):
        self._size = size
        self._opcodes = _MAX_OPCODES

    def step(self) -> None:
        self._opcodes -= 1
        if self._opcodes < 0:
            raise ValueError(
                f"more than {_MAX_OPCODES} opcodes, some tens of thousands are usual: the file is hostile or "
                "no network pickle, reading stopped and nothing in it was run"
            )

    def charge(self, amount: int) -> None:
        self._size -= amount
        if self._size < 0:
            raise ValueError(
                f"its content would unfold to more than {_MAX_EXPANSION} times the size of the file: it is "
                "hostile or damaged, reading stopped and nothing in it was run"
            )


def _malformed(what: str) -> ValueError:
    return ValueError(
        f"{what}: the file is damaged, hostile or no StyleGAN2 network pickle; nothing in it was run, get it "
        "again from its source"
    )


def _describe(value: Any) -> str:
    """Short text for a message; never the repr of a structure, which a file can make endless."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"a text of {len(value)} characters"
    if value is None or isinstance(value, bool | float) or (type(value) is int and abs(value) < _MAX_COUNT):
        return repr(value)
    return f"something of type {type(value).__name__.strip('_')}"


# ---- the stack machine

_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE "
    "BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_OPCODES = _LITERALS.union(
    _CONSTANTS,
    "PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split(),
    "TUPLE TUPLE1 TUPLE2 TUPLE3 LIST DICT APPEND APPENDS SETITEM SETITEMS ADDITEMS".split(),
    "GLOBAL STACK_GLOBAL INST REDUCE NEWOBJ BUILD BINPERSID".split(),
)
_OPCODE_BY_BYTE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class _Machine:
    """Reads one pickle from a stream; a global is looked up in a table and is never imported."""

    def __init__(
        self,
        stream: io.BytesIO,
        known: Mapping[tuple[str, str], Any],
        budget: _Budget,
        *,
        persistent_ids: bool = False,
    ):
        self._stream, self._known, self._budget = stream, known, budget
        self._persistent_ids = persistent_ids
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        while True:
            self._budget.step()
            name, argument = self._next_opcode()
            if name == "STOP":
                return self._pop()
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name.endswith(("PUT", "GET", "MEMOIZE")):
                self._use_memo(name, argument)
            elif name.startswith(("APPEND", "SETITEM", "ADDITEMS")):
                self._fill(name)
            else:
                self._apply(name, argument)

    def _next_opcode(self) -> tuple[str, Any]:
        position = self._stream.tell()
        code = self._stream.read(1)
        if not code:
            raise _malformed(f"it ends at byte {position} without a STOP opcode")
        opcode = _OPCODE_BY_BYTE.get(code)
        if opcode is None:
            raise _malformed(f"byte {position} is {code!r}, which no pickle opcode has")
        if opcode.name not in _OPCODES:
            raise _malformed(
                f"opcode {opcode.name} at byte {position} is refused, network pickles do not use it"
            )
        if opcode.arg is None:
            return opcode.name, None
        try:
            if opcode.name in (
                "GLOBAL",
                "INST",
            ):  # the stock reader expands escapes here, which pickle does not
                return opcode.name, (self._line(), self._line())
            return opcode.name, opcode.arg.reader(cast(Any, self._stream))
        except (ValueError, OverflowError) as error:  # shorter than it claims, or no number where one is due
            raise _malformed(f"the argument of {opcode.name} at byte {position} cannot be read") from error

    def _line(self) -> str:
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise ValueError("no end of line")
        return line[:-1].decode("utf-8")

    def _apply(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO":
                if argument > 5:
                    raise _malformed(f"pickle protocol {argument} where 0 to 5 are known")
            case "FRAME":
                pass  # a hint for buffering
            case "MARK":
                self._below_marks.append(self._stack)
                self._stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self._pop() for _ in range(int(name[-1]))]
                self._stack.append(tuple(reversed(items)))
            case "TUPLE" | "LIST":
                items = self._pop_mark()  # changes the stack that the next line adds to
                self._stack.append(items if name == "LIST" else tuple(items))
            case "DICT":
                items = self._pop_mark()
                self._stack.append({})
                self._set_items(items)
            case "GLOBAL" | "INST":
                self._stack.append(self._find(*argument))
                if name == "INST":
                    raise _malformed("opcode INST is refused, network pickles do not use it")
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                self._stack.append(self._find(module, attribute))
            case "REDUCE" | "NEWOBJ":
                self._call(name)
            case "BUILD":
                state = self._pop()
                _set_scalar_order(self._top(), state)
            case "BINPERSID":
                if not self._persistent_ids:
                    raise _malformed("a persistent id is refused, network pickles have none")
                self._stack.append(_PersistentId(self._pop()))

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise _malformed(f"the stack is empty before byte {self._stream.tell()}")
        return self._stack[-1]

    def _pop_mark(self) -> list[Any]:
        if not self._below_marks:
            raise _malformed(f"no MARK lies on the stack before byte {self._stream.tell()}")
        items, self._stack = self._stack, self._below_marks.pop()
        return items

    def _use_memo(self, name: str, argument: Any) -> None:
        if name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name.endswith("PUT"):
            self._memo[_checked_key(argument)] = self._top()
        elif argument in self._memo:
            self._stack.append(self._memo[argument])
        else:
            raise _malformed(f"memo entry {_describe(argument)} is used before it is set")

    def _fill(self, name: str) -> None:
        """Add the items on the stack to the container below them, which must be a builtin one."""
        if name.endswith("S"):
            items = self._pop_mark()
        else:
            items = [self._pop() for _ in range(2 if name == "SETITEM" else 1)][::-1]
        container = self._top()
        if name.startswith("SETITEM"):
            self._set_items(items)
        elif name == "ADDITEMS" and type(container) is set:
            container.update(map(_checked_key, items))
        elif name.startswith("APPEND") and type(container) is list:
            container.extend(items)
        else:
            raise _malformed(f"opcode {name} is applied to {_describe(container)}")

    def _set_items(self, items: list[Any]) -> None:
        container = self._top()
        if type(container) is not dict or len(items) % 2:
            raise _malformed(f"{len(items)} keys and values are put into {_describe(container)}")
        container.update(zip(map(_checked_key, items[::2]), items[1::2], strict=True))

    def _find(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise _malformed(f"a global is named by {_describe(module)} and {_describe(name)}")
        if module.split(".")[:2] == ["dnnlib", "tflib"]:
            raise ValueError(
                f"this is a network of the TensorFlow version (it asks for {_printable(module, name)}): only "
                "pickles of the PyTorch version are read, convert it to one first; nothing in it was run"
            )
        if (module, name) not in self._known:
            raise ValueError(
                f"it asks for {_printable(module, name)}, which no StyleGAN2 network pickle needs: the file "
                "is refused and nothing in it was run; plain pickle would run it, so trust its author first"
            )
        return self._known[module, name]

    def _call(self, opcode: str) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not _Call or type(arguments) is not tuple:
            raise _malformed(f"opcode {opcode} calls {_describe(function)} with {_describe(arguments)}")
        self._stack.append(function.function(arguments, self._budget))


def _printable(module: str, name: str) -> str:
    return ascii(f"{module}.{name}"[:200])[1:-1]


def _checked_key(key: Any) -> Any:
    """Refuse keys whose hash a file can make slow (nested tuples) or equal for all (large integers)."""
    if type(key) is str or (type(key) is int and abs(key) < 1 << 32):
        return key
    raise _malformed(f"{_describe(key)} is used as a key, only names and small integers are expected")


# ---- what the allow-listed globals stand for


def _types(arguments: tuple[Any, ...]) -> tuple[type, ...]:
    return tuple(map(type, arguments))


def _rebuild_module(arguments: tuple[Any, ...], budget: _Budget) -> _Module:
    """Record of a persistent object; its source text is not looked at."""
    if _types(arguments) != (dict,):
        raise _malformed("a persistent object is rebuilt from something else than one dict")
    meta = arguments[0]
    kind, version = meta.get("type"), meta.get("version")
    if type(version) is not int or version != 6:
        raise ValueError(
            f"a persistent object has meta version {_describe(version)} but only version 6 is known: the "
            "file comes from another release of the original, save it again with one that writes version 6"
        )
    if type(kind) is not str or kind != "class":
        raise ValueError(f"a persistent object has meta type {_describe(kind)} where 'class' was expected")
    class_name, state = meta.get("class_name"), meta.get("state")
    if type(class_name) is not str or type(state) is not dict:
        raise _malformed("a persistent object lacks its class name or its state")
    return _Module(class_name, state)


def _rebuild_tensor(arguments: tuple[Any, ...], budget: _Budget) -> _View:
    """Arguments: storage, offset, size, stride, requires_grad, hooks and, in newer files, metadata."""
    if _types(arguments[:6]) != (_Storage, int, tuple, tuple, bool, dict) or len(arguments) > 7:
        raise _malformed(f"a tensor is rebuilt from {', '.join(map(_describe, arguments[:8]))}")
    storage, offset, size, stride = arguments[:4]
    numbers = (offset, *size[: _MAX_AXES + 1], *stride[: _MAX_AXES + 1])
    if len(size) > _MAX_AXES or len(size) != len(stride) or not all(map(_is_count, numbers)):
        raise _malformed("a tensor has an impossible size, stride or offset")
    if arguments[6:] not in ((), (None,), ({},)):
        raise _malformed("a tensor has metadata such as a conjugate bit")
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # The first bound keeps strides of 0 from making much out of little; an empty tensor touches no element.
    if numel > storage.numel or (numel and last >= storage.numel):
        raise _malformed(
            f"a tensor of {numel} elements reaches beyond its storage of {storage.numel} elements"
        )
    if math.prod(max(length, 1) for length in size) >= _MAX_COUNT:
        raise _malformed("an empty tensor has an impossible size")
    return _View(storage, offset, size, stride)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _rebuild_parameter(arguments: tuple[Any, ...], budget: _Budget) -> _View:
    if _types(arguments) != (_View, bool, dict):
        raise _malformed(f"a parameter is rebuilt from {', '.join(map(_describe, arguments[:8]))}")
    return cast(_View, arguments[0])


def _load_storage(arguments: tuple[Any, ...], budget: _Budget) -> _Storage:
    """A storage in the stream format of `torch.save` before its zip archives.

    Five pickles (magic number, format version, machine, reference to the storage, list of references) come
    before the element count in eight bytes and the elements, all little-endian.
    """
    if _types(arguments) != (bytes,):
        raise _malformed("a storage is loaded from something else than bytes")
    blob: bytes = arguments[0]
    budget.charge(len(blob))
    stream = io.BytesIO(blob)
    magic, version, _ = (_Machine(stream, {}, budget).load() for _ in range(3))
    if _types((magic, version)) != (int, int) or (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
        raise _malformed("a storage does not begin with the magic number and version of its format")
    reference = _Machine(stream, _STORAGE_GLOBALS, budget, persistent_ids=True).load()
    fields = reference.value if type(reference) is _PersistentId else None
    if type(fields) is not tuple or _types(fields) != (str, torch.dtype, str, str, int, type(None)):
        raise _malformed("a storage does not say its type and its number of elements")
    kind, dtype, key, _, numel, _ = fields
    keys = _Machine(stream, {}, budget).load()
    if kind != "storage" or type(keys) is not list or _types(tuple(keys[:2])) != (str,) or keys[0] != key:
        raise _malformed("a storage refers to something else than itself")
    stored = int.from_bytes(stream.read(8), "little")
    data = memoryview(blob)[stream.tell() :]
    if stored != numel or len(data) != numel * dtype.itemsize:
        raise _malformed(
            f"a storage should hold {_describe(numel)} elements of {dtype} but has {len(data)} bytes"
        )
    return _Storage(data, dtype, numel)


def _empty_dict(arguments: tuple[Any, ...], budget: _Budget) -> dict[Any, Any]:
    if arguments != ():
        raise _malformed("a dictionary class is called with arguments")
    return {}


def _make_set(arguments: tuple[Any, ...], budget: _Budget) -> set[Any]:
    if _types(arguments) != (list,):
        raise _malformed("a set is made from something else than one list")
    budget.charge(_OBJECT_SIZE * len(arguments[0]))
    return set(map(_checked_key, arguments[0]))


def _encode(arguments: tuple[Any, ...], budget: _Budget) -> bytes:
    """Bytes as protocols 0 to 2 spell them: a text of their code points."""
    if _types(arguments) != (str, str) or arguments[1] != "latin1":
        raise _malformed("a text is encoded otherwise than as latin1")
    text: str = arguments[0]
    budget.charge(len(text))
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise _malformed("a text that stands for bytes has code points beyond 255") from error


def _reconstruct_dict(arguments: tuple[Any, ...], budget: _Budget) -> dict[Any, Any]:
    """A subclass of dict as protocols 0 and 1 spell it: the class, its base and the content."""
    if len(arguments) != 3 or arguments[:2] != (_EASY_DICT, _DICT) or type(arguments[2]) is not dict:
        raise _malformed("an object other than a dictionary is reconstructed")
    budget.charge(_OBJECT_SIZE * len(arguments[2]))
    return dict(arguments[2])


_SCALAR_FORMATS = dict(zip("b1 i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8".split(), "?bBhHiIqQefd", strict=True))


def _scalar_type(arguments: tuple[Any, ...], budget: _Budget) -> _ScalarType:
    code = arguments[0] if len(arguments) == 3 else None
    if type(code) is not str or code not in _SCALAR_FORMATS:
        raise _malformed(f"a NumPy scalar has the type {_describe(code)}, only single numbers are expected")
    return _ScalarType(code)


def _set_scalar_order(target: Any, state: Any) -> None:
    """The BUILD opcode, which network pickles need for the byte order of a NumPy dtype alone."""
    if type(target) is not _ScalarType:
        raise _malformed(f"a state is set on {_describe(target)}, which has none")
    if type(state) is not tuple or _types(state[:2]) != (int, str) or state[1] not in ("<", ">", "|"):
        raise _malformed("a NumPy dtype has an unknown state")
    if _types(state[2:5]) != (type(None),) * 3:
        raise _malformed("a NumPy dtype has fields or a shape where a single number is expected")
    target.order = state[1].replace("|", "<")


def _make_scalar(arguments: tuple[Any, ...], budget: _Budget) -> bool | int | float:
    if _types(arguments) != (_ScalarType, bytes):
        raise _malformed(f"a NumPy scalar is made from {', '.join(map(_describe, arguments[:3]))}")
    layout = struct.Struct(arguments[0].order + _SCALAR_FORMATS[arguments[0].code])
    if len(arguments[1]) != layout.size:
        raise _malformed(f"a NumPy scalar of {layout.size} bytes comes with {len(arguments[1])}")
    return cast("bool | int | float", layout.unpack(arguments[1])[0])


_EASY_DICT, _DICT = _Call(_empty_dict), _Call(_empty_dict)

_NETWORK_GLOBALS: dict[tuple[str, str], _Call] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Call(_rebuild_module),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Call(_load_storage),
    ("collections", "OrderedDict"): _Call(_empty_dict),
    ("dnnlib", "EasyDict"): _EASY_DICT,
    ("dnnlib.util", "EasyDict"): _EASY_DICT,
    ("numpy", "dtype"): _Call(_scalar_type),
    ("numpy.core.multiarray", "scalar"): _Call(_make_scalar),
    ("numpy._core.multiarray", "scalar"): _Call(_make_scalar),
    # Protocols below 4 have no opcode for a set, below 3 none for bytes, below 2 none for dict's subclasses.
    ("builtins", "set"): _Call(_make_set),
    ("__builtin__", "set"): _Call(_make_set),
    ("_codecs", "encode"): _Call(_encode),
    ("__builtin__", "dict"): _DICT,
    ("copy_reg", "_reconstructor"): _Call(_reconstruct_dict),
}

_STORAGE_GLOBALS: dict[tuple[str, str], torch.dtype] = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}


# ---- from the tree of records to state dicts


def _networks(root: Any) -> dict[str, _Module]:
    if type(root) is not dict:
        raise ValueError(
            f"the file holds {_describe(root)} but a dict with G, D or G_ema was expected: pass a network "
            "pickle"
        )
    found = {name: value for name, value in root.items() if name in _NAMES and value is not None}
    if not found:
        keys = ", ".join(map(_describe, list(root)[:5])) or "no key"
        raise ValueError(f"the file has {keys} but none of G, D and G_ema: pass a network pickle")
    for name, value in found.items():
        if type(value) is not _Module:
            raise ValueError(f"{name} is {_describe(value)} where a network was expected")
    return found


def _record(name: str, module: _Module, budget: _Budget) -> NetworkRecord:
    args, kwargs = module.state.get("_init_args"), module.state.get("_init_kwargs")
    if type(args) is not tuple or type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
        raise _malformed(f"{name} does not say the arguments of its constructor")
    copies: dict[_View, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, view in _leaves(module, budget):
        if key in state:
            raise _malformed(f"{name} has {_describe(key)} twice")
        budget.charge(_OBJECT_SIZE + len(key))
        if view not in copies:
            copies[view] = _copy_out(view, budget)
        state[key] = copies[view]
    if name != "D":
        _check_generator(name, state)
    return NetworkRecord(module.class_name, _plain(args, budget), _plain(kwargs, budget), state)


def _leaves(
    module: _Module, budget: _Budget, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, _View]]:
    """Keys and tensors in the order of ``nn.Module.state_dict()``: parameters, buffers, then children."""
    if depth > _MAX_DEPTH:
        raise _malformed(f"its modules are nested more than {_MAX_DEPTH} deep")
    passing = module.state.get("_non_persistent_buffers_set", set())
    if type(passing) is not set:
        raise _malformed("a module has no set of passing buffers")
    for name, view in _members(module, "_parameters", _View, budget):
        yield prefix + name, view
    for name, view in _members(module, "_buffers", _View, budget):
        if name not in passing:
            yield prefix + name, view
    for name, child in _members(module, "_modules", _Module, budget):
        yield from _leaves(child, budget, f"{prefix}{name}.", depth + 1)


def _members(module: _Module, field: str, kind: type, budget: _Budget) -> Iterator[tuple[str, Any]]:
    members = module.state.get(field)
    if type(members) is not dict:
        raise _malformed(f"a module of class {_describe(module.class_name)} has no {field}")
    for name, value in members.items():
        if type(name) is not str or not re.fullmatch(r"\w{1,100}", name):
            raise _malformed(f"{_describe(name)} in {field} is no name of a module or tensor")
        budget.charge(len(name))
        if value is None:
            continue
        if type(value) is not kind:
            raise _malformed(f"{name!r} in {field} is {_describe(value)}")
        yield name, value


def _copy_out(view: _View, budget: _Budget) -> Tensor:
    storage = view.storage
    if not math.prod(view.size):
        return torch.empty(view.size, dtype=storage.dtype)
    steps = zip(view.size, view.stride, strict=True)
    first, width = view.offset, storage.dtype.itemsize
    stop = first + sum((length - 1) * step for length, step in steps) + 1
    budget.charge((stop - first) * width)
    elements = bytearray(storage.data[first * width : stop * width])
    if storage.dtype == torch.bool:  # any other byte than 0 and 1 would be undefined behaviour
        flat = torch.frombuffer(elements, dtype=torch.uint8) != 0
    else:
        flat = torch.frombuffer(elements, dtype=storage.dtype)
    return flat.as_strided(view.size, view.stride).clone(memory_format=torch.contiguous_format)


def _check_generator(name: str, state: Mapping[str, Tensor]) -> None:
    if "synthesis.b4.const" in state:
        return
    alias_free = next((key for key in state if re.match(r"synthesis\.(input\.|L\d+_)", key)), None)
    if alias_free:
        raise ValueError(
            f"{name} is a StyleGAN3 generator (it has {alias_free}): only StyleGAN2 networks can be read"
        )
    raise ValueError(f"{name} has no synthesis.b4.const, so it is no StyleGAN2 generator: pass one")


def _plain(value: Any, budget: _Budget, depth: int = 0) -> Any:
    """Copy of a constructor argument, refused if it holds anything but plain data."""
    budget.charge(_OBJECT_SIZE)
    if depth > _MAX_DEPTH:
        raise _malformed(f"a constructor argument is nested more than {_MAX_DEPTH} deep")
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if type(value) is dict:
        return {key: _plain(entry, budget, depth + 1) for key, entry in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_plain(entry, budget, depth + 1) for entry in value)
    raise _malformed(f"a constructor argument holds {_describe(value)}")
