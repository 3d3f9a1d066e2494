"""Hostile network pickles are refused with a ValueError, and nothing in them runs."""

import copyreg
import io
import os
import pickle
import struct
import subprocess
from collections import OrderedDict

import numpy as np
import pytest
import torch
from network_pickles import (
    PROTOCOLS,
    EasyDict,
    Part,
    Reduced,
    bare,
    dump,
    meta,
    only,
    read,
    rebuilt,
    reconstruct,
    refuses,
    save,
    six,
    small_networks,
    storage_blob,
    text,
)

from backbones import pickles


@pytest.fixture(autouse=True)
def marker(tmp_path):
    """A file that every hostile pickle here tries to create."""
    path = tmp_path / "it_ran"
    yield path
    assert not path.exists()


# ---- hostile files: calls


def hostile_programs(marker):
    command = f"touch {marker}"
    line = f"V{command}\n".encode()
    blob = b"cos\nsystem\n(" + line + b"tR."
    nested = b"ctorch.storage\n_load_from_bytes\n(B" + struct.pack("<I", len(blob)) + blob + b"tR."
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    late = magic + blob
    deep = b"ctorch.storage\n_load_from_bytes\n(B" + struct.pack("<I", len(late)) + late + b"tR."
    popen = b"csubprocess\nPopen\n"
    return {
        "REDUCE": (b"cos\nsystem\n(" + line + b"tR.", r"asks for os\.system"),
        "posix": (b"cposix\nsystem\n(" + line + b"tR.", r"asks for posix\.system"),
        "INST": (b"(" + line + b"ios\nsystem\n.", r"asks for os\.system"),
        "OBJ": (b"(cos\nsystem\n" + line + b"o.", r"asks for os\.system"),
        "OBJ of a known class": (b"(ccollections\nOrderedDict\no.", "opcode OBJ at byte 26 is refused"),
        "INST of a known class": (b"(icollections\nOrderedDict\n.", "opcode INST is refused"),
        "NEWOBJ": (popen + b"(" + line + b"t\x81.", r"asks for subprocess\.Popen"),
        "NEWOBJ_EX": (popen + b"(" + line + b"t}\x92.", r"asks for subprocess\.Popen"),
        "NEWOBJ_EX of a known class": (b"ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX .* refused"),
        "STACK_GLOBAL": (text("os") + text("system") + b"\x93(" + line + b"tR.", r"asks for os\.system"),
        "STACK_GLOBAL of no names": (b"K\x01K\x02\x93.", "global is named by 1 and 2"),
        "builtins": (b"cbuiltins\neval\n(" + line + b"tR.", r"asks for builtins\.eval"),
        "getattr": (b"cbuiltins\ngetattr\n.", r"asks for builtins\.getattr"),
        "EXT1": (b"\x82\x01" + b"(" + line + b"tR.", "opcode EXT1 at byte 0 is refused"),
        "EXT2": (b"\x83\x01\x00" + b"(" + line + b"tR.", "opcode EXT2 at byte 0 is refused"),
        "EXT4": (b"\x84\x01\0\0\0" + b"(" + line + b"tR.", "opcode EXT4 at byte 0 is refused"),
        "PERSID": (b"Pos.system\n.", "opcode PERSID at byte 0 is refused"),
        "BINPERSID": (b"K\x01Q.", "persistent id is refused"),
        "storage": (nested, r"asks for os\.system"),
        "storage after its magic number": (deep, r"asks for os\.system"),
        "memo": (b"cos\nsystem\nq\x00h\x00(" + line + b"tR.", r"asks for os\.system"),
        "source text": (
            b"ctorch_utils.persistence\nimport_hooks\n.",
            r"asks for torch_utils\.persistence\.imp",
        ),
        "empty name": (b"c\n\n.", r"asks for \.,"),
        "name with a space": (
            b"ctorch._utils _rebuild_tensor_v2\n\n.",
            "which no StyleGAN2 network pickle needs",
        ),
        "name with an escape": (b"ctorch._utils\n_rebuild\\x5ftensor_v2\n.", "no StyleGAN2 network pickle"),
    }


@pytest.mark.parametrize("name", hostile_programs("x"))
def test_calls_are_refused_and_do_not_happen(tmp_path, marker, name):
    content, match = hostile_programs(marker)[name]
    copyreg.add_extension("os", "system", 1)
    try:
        message = refuses(content, match, tmp_path)
    finally:
        copyreg.remove_extension("os", "system", 1)
    assert "nothing in it was run" in message


@pytest.mark.parametrize("name", ["REDUCE", "INST", "OBJ", "EXT1", "storage"])
def test_those_calls_happen_in_the_plain_unpickler(tmp_path, name):
    """The programs above are live ones: what refuses them is the reader."""
    target = tmp_path / "proof"
    content, _ = hostile_programs(target)[name]
    copyreg.add_extension("os", "system", 1)
    try:
        if name == "storage":  # newer releases of torch refuse it by themselves
            content = content[content.index(b"cos\n") :]
        pickle.loads(content)
    finally:
        copyreg.remove_extension("os", "system", 1)
        copyreg.clear_extension_cache()
    assert target.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "call", [os.system, subprocess.getoutput, eval, __import__], ids=lambda call: call.__name__
)
def test_a_call_deep_inside_a_good_network_is_refused(tmp_path, marker, protocol, call):
    networks = small_networks()
    networks["G_ema"].synthesis.b8.conv1.lurking = Reduced(call, f"touch {marker}")
    refuses(dump(networks, protocol), rf"asks for \w+\.{call.__name__}, .*nothing in it was run", tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"),
        ("torch_utils", "persistence._reconstruct_persistent_obj"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "__builtins__"),
        ("torch.storage", "_load_from_bytes.__class__"),
        ("torch.storage", "io.open"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "_sys.modules"),
        ("dnnlib.util", "os.system"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "dtype.__subclasses__"),
        ("builtins", "set.__class__.__base__"),
        ("_codecs", "decode"),
        ("torch", "load"),
        ("torch", "FloatStorage"),
        ("torch_utils.persistence ", "_reconstruct_persistent_obj"),
        ("torch\n._utils", "\ud800"),
    ],
)
def test_names_around_the_known_ones_are_refused(tmp_path, names):
    words = [name.encode("utf-8", "surrogatepass") for name in names]
    content = b"".join(b"X" + struct.pack("<I", len(word)) + word for word in words) + b"\x93."
    message = refuses(content, "it asks for .* which no StyleGAN2 network pickle needs", tmp_path)
    message.encode("ascii" if str(tmp_path).isascii() else "utf-8")


KNOWN = (
    (reconstruct, ({},)), (torch._utils._rebuild_tensor_v2, ()), (torch._utils._rebuild_parameter, ()),
    (torch.storage._load_from_bytes, (b"",)), (set, ([],)), (OrderedDict, ()),
)  # fmt: skip


@pytest.mark.parametrize("attribute", ["__defaults__", "__kwdefaults__", "__dict__", "__class__", "function"])
def test_no_attribute_can_be_set_on_the_known_globals(tmp_path, attribute):
    networks = {"D": Part("Discriminator", width=np.float64(3))}
    for function, _ in KNOWN:
        # BUILD with a pair sets attributes in the plain unpickler; the target here is the global itself.
        content = pickle_of_global(function) + dump((None, {attribute: None}), 2)[2:-1] + b"b."
        refuses(content, "a state is set on something of type Call, which has none", tmp_path)
    assert read(save(tmp_path, networks))["D"].kwargs == {"width": 3.0}


def pickle_of_global(function):
    return dump(function, 2)[:-1]


def test_state_is_refused_on_everything_but_a_scalar_type(tmp_path):
    for part in (
        Reduced(reconstruct, meta({}), state={"class_name": "x"}),
        Reduced(OrderedDict, state={"x": 1}),
        Reduced(set, [], state=(None, {"add": 1})),
    ):
        refuses(dump(only(part)), "a state is set on something of type", tmp_path)
    for state in (
        (3, "=", None, None, None, -1, -1, 0),
        (3,),
        [3, "<"],
        (3, "<", None, ("a",), {"a": 1}, 8, 1, 0),
    ):
        scalar = Reduced(
            np.float64(1).__reduce__()[0], Reduced(np.dtype, "f8", False, True, state=state), b"\0" * 8
        )
        refuses(dump(only(scalar)), "NumPy dtype has (an unknown state|fields or a shape)", tmp_path)


def scalar_maker():
    return np.float64(1).__reduce__()[0]


def test_known_globals_with_odd_arguments_are_refused(tmp_path):
    dtype = Reduced(np.dtype, "f8", False, True)
    encode = __import__("_codecs").encode
    for call, match in (
        (Reduced(OrderedDict, [("a", 1)]), "dictionary class is called with arguments"),
        (Reduced(EasyDict, {"a": 1}), "dictionary class is called with arguments"),
        (Reduced(set, "abc"), "a set is made from something else than one list"),
        (Reduced(set, [(1, 2)]), "is used as a key"),
        (Reduced(set), "a set is made from"),
        (Reduced(encode, "x", "zip"), "encoded otherwise than as latin1"),
        (Reduced(encode, b"x", "latin1"), "encoded otherwise than as latin1"),
        (Reduced(encode, "x", "latin1", "mixed"), "encoded otherwise than as latin1"),
        (Reduced(encode, "\u0100", "latin1"), "code points beyond 255"),
        (Reduced(np.dtype, "O8", False, True), "NumPy scalar has the type 'O8'"),
        (Reduced(np.dtype, "f8"), "NumPy scalar has the type None"),
        (Reduced(np.dtype, ["f8"], False, True), "NumPy scalar has the type something of type list"),
        (Reduced(scalar_maker(), dtype, b"1234567"), "scalar of 8 bytes comes with 7"),
        (Reduced(scalar_maker(), dtype), "NumPy scalar is made from something of type ScalarType"),
        (Reduced(scalar_maker(), "f8", b"12345678"), "NumPy scalar is made from 'f8'"),
        (Reduced(reconstruct), "rebuilt from something else than one dict"),
        (Reduced(reconstruct, meta({}), meta({})), "rebuilt from something else than one dict"),
        (Reduced(reconstruct, [("type", "class")]), "rebuilt from something else than one dict"),
        (Reduced(torch.storage._load_from_bytes, "text"), "storage is loaded from something else than bytes"),
        (
            Reduced(torch._utils._rebuild_parameter, 1, False, OrderedDict()),
            "parameter is rebuilt from 1, False",
        ),
    ):
        refuses(dump(only(call), protocol=4), match, tmp_path)
    refuses(b"K\x01)R.", r"opcode REDUCE calls 1 with something of type tuple", tmp_path)
    refuses(b"ccollections\nOrderedDict\n]R.", "opcode REDUCE calls something of type Call with", tmp_path)
    refuses(
        b"ccopy_reg\n_reconstructor\n(ccollections\nOrderedDict\nc__builtin__\ndict\n}tR.",
        "reconstr",
        tmp_path,
    )


# ---- hostile files: tensors


@pytest.mark.parametrize(
    ("offset", "size", "stride", "match"),
    [
        (0, (7,), (1,), "7 elements reaches beyond its storage of 6"),
        (1, (6,), (1,), "6 elements reaches beyond its storage of 6"),
        (0, (2,), (6,), "2 elements reaches beyond"),
        (6, (), (), "1 elements reaches beyond"),
        (0, (7,), (0,), "7 elements reaches beyond"),
        (0, (1 << 40,), (0,), "reaches beyond"),
        (0, (2,), (1 << 47,), "reaches beyond"),
        (0, (2,), (1 << 63,), "impossible size, stride or offset"),
        (0, (1 << 64,), (0,), "impossible size, stride or offset"),
        (-1, (2,), (1,), "impossible size, stride or offset"),
        (3, (2,), (-1,), "impossible size, stride or offset"),
        (0, (-1,), (1,), "impossible size, stride or offset"),
        (0, (2,), (1, 1), "impossible size, stride or offset"),
        (0, (True,), (1,), "impossible size, stride or offset"),
        (0, (2.0,), (1,), "impossible size, stride or offset"),
        (0, (1,) * 9, (1,) * 9, "impossible size, stride or offset"),
        (0, (0, 1 << 40, 1 << 40), (1, 1, 1), "empty tensor has an impossible size"),
        (0, [2], (1,), "a tensor is rebuilt from"),
        (0, (2,), [1], "a tensor is rebuilt from"),
        ("0", (2,), (1,), "a tensor is rebuilt from"),
        (True, (2,), (1,), "a tensor is rebuilt from"),
    ],
)
def test_views_outside_their_storage_are_refused(tmp_path, offset, size, stride, match):
    part = bare(buffers={"x": rebuilt(six(), offset, size, stride)})
    refuses(dump(only(part)), match, tmp_path)


def test_tensors_rebuilt_from_odd_values_are_refused(tmp_path):
    for tensor, match in (
        (rebuilt(b"123456", 0, (2,), (1,)), "a tensor is rebuilt from something of type bytes, 0"),
        (rebuilt(six(), 0, (2,), (1,), grad=1), "a tensor is rebuilt from"),
        (rebuilt(six(), 0, (2,), (1,), hooks=()), "a tensor is rebuilt from"),
        (rebuilt(six(), 0, (2,), (1,), None, None), "a tensor is rebuilt from"),
        (rebuilt(six(), 0, (2,), (1,), {"conj": True}), "metadata such as a conjugate bit"),
        (Reduced(torch._utils._rebuild_tensor_v2, six(), 0, (2,), (1,)), "a tensor is rebuilt from"),
        (
            Reduced(torch._utils._rebuild_parameter, rebuilt(six(), 0, (), ()), False),
            "parameter is rebuilt from",
        ),
    ):
        refuses(dump(only(bare(buffers={"x": tensor}))), match, tmp_path)


@pytest.mark.parametrize(
    ("lies", "match"),
    [
        ({"numel": 7}, "should hold 7 elements of torch.float32 but has 24 bytes"),
        ({"numel": 1 << 60}, "should hold something of type int elements of torch.float32 but has 24 bytes"),
        ({"numel": -6}, "should hold -6 elements"),
        ({"stored": 5}, "should hold 6 elements"),
        ({"data": b"\0" * 25}, "but has 25 bytes"),
        ({"data": b""}, "but has 0 bytes"),
        ({"kind": "Untyped"}, "asks for torch.UntypedStorage"),
        ({"kind": "Double"}, "should hold 6 elements of torch.float64"),
        ({"magic": 1}, "does not begin with the magic number"),
        ({"magic": "x"}, "does not begin with the magic number"),
        ({"version": 1002}, "does not begin with the magic number"),
        ({"type": "module"}, "refers to something else than itself"),
        ({"keys": ("1",)}, "refers to something else than itself"),
        ({"keys": ("0", "0")}, "refers to something else than itself"),
        ({"keys": ()}, "refers to something else than itself"),
        ({"view": ("0", 0, 6)}, "does not say its type"),
    ],
)
def test_storages_that_contradict_themselves_are_refused(tmp_path, lies, match):
    refuses(dump(only(bare(buffers={"x": rebuilt(six(**lies), 0, (2,), (1,))}))), match, tmp_path)


def test_storages_that_are_none_are_refused(tmp_path):
    archive = io.BytesIO()
    torch.save(torch.zeros(2), archive)
    prefix = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    for blob, match in (
        (b"", "ends at byte 0"),
        (archive.getvalue(), "opcode PERSID at byte 0 is refused"),
        (six().reduction[1][0][:-25], "should hold|cannot be read|without a STOP"),
        (prefix + b"K\x01.", "does not say its type and its number of elements"),
        (prefix + b"ctorch\nFloatStorage\n.", "does not say its type"),
        (prefix + b"ccollections\nOrderedDict\n.", r"asks for collections\.OrderedDict"),
    ):
        refuses(dump(only(Reduced(torch.storage._load_from_bytes, blob))), match, tmp_path)


def test_bytes_that_are_no_truth_value_become_one(tmp_path):
    storage = six(kind="Bool", numel=4, data=b"\x00\x01\x02\xff")
    state = read(save(tmp_path, only(bare(buffers={"x": rebuilt(storage, 0, (4,), (1,))}))))["D"].state
    assert state["x"].view(torch.uint8).tolist() == [0, 1, 1, 1]


# ---- hostile files: more out than in


@pytest.mark.parametrize(
    "content",
    [
        b"\x8e" + struct.pack("<Q", 1 << 60) + b"x",
        b"\x8d" + struct.pack("<Q", 1 << 60) + b"x",
        b"\x8d" + b"\xff" * 8,
        b"\x8e" + b"\xff" * 8,
        b"B" + struct.pack("<I", 0xFFFFFFFF) + b"x",
        b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x",
        b"\x8b" + struct.pack("<i", -1) + b"x",
        b"I" + b"9" * 5000 + b"\n.",
        b"L" + b"9" * 5000 + b"L\n.",
    ],
    ids=lambda content: content[:3].hex(),
)
def test_sizes_beyond_the_file_are_refused(tmp_path, content):
    refuses(content, "argument of .* cannot be read", tmp_path)


def test_byte_arrays_and_buffers_are_refused(tmp_path):
    refuses(b"\x96" + struct.pack("<Q", 1 << 40), "opcode BYTEARRAY8 at byte 0 is refused", tmp_path)
    refuses(b"\x97.", "opcode NEXT_BUFFER at byte 0 is refused", tmp_path)


def test_a_memo_index_reserves_nothing(tmp_path):
    """The plain unpickler makes room for every index up to the one named."""
    content = b"Nr" + struct.pack("<I", 0xFFFFFFFF) + b"j" + struct.pack("<I", 0xFFFFFFFF) + b"."
    refuses(content, "the file holds None", tmp_path)
    refuses(b"Np" + str(1 << 61).encode() + b"\n.", "is used as a key", tmp_path)
    refuses(b"h\x00.", "memo entry 0 is used before it is set", tmp_path)


def test_keys_whose_hash_takes_for_ever_are_refused(tmp_path):
    pair = b"N" + b"q\x00h\x00\x86" * 60  # a tuple of two of the tuple before
    for content in (
        b"}" + pair + b"Ns.",
        b"\x8f(" + pair + b"\x90.",
        b"}(" + pair + b"Nu.",
        b"(" + pair + b"Nd.",
    ):
        refuses(content, "something of type tuple is used as a key", tmp_path)
    refuses(b"}L" + str((1 << 61) - 1).encode() + b"L\nNs.", "is used as a key", tmp_path)


def test_arguments_that_unfold_for_ever_are_refused(tmp_path):
    doubled: list = []
    for _ in range(25):
        doubled = [doubled, doubled]
    part = Part("Discriminator", doubled)
    refuses(dump(only(part)), "unfold to more than 8 times the size of the file", tmp_path)


def test_deep_and_endless_nesting_is_refused(tmp_path):
    deep: list = []
    for _ in range(40):
        deep = [deep]
    endless: list = []
    endless.append(endless)
    for value in (deep, endless):
        refuses(dump(only(Part("Discriminator", a=value))), "nested more than 32 deep", tmp_path)
    deepest = b"]" * 200_000 + b"a" * 199_999 + b"."
    refuses(deepest, "holds something of type list", tmp_path)
    chain = bare()
    for _ in range(40):
        chain = bare(modules={"m": chain})
    refuses(dump(only(chain)), "modules are nested more than 32 deep", tmp_path)


def test_a_module_inside_itself_is_refused(tmp_path):
    """Pickle itself cannot write one: the children's dictionary gets the module after the module is made."""
    fields = [text(key) + b"}" for key in ("_parameters", "_buffers", "_init_kwargs")]
    state = b"}(" + b"".join(fields) + text("_init_args") + b")" + text("_modules") + b"}q\x01u"
    items = text("type") + text("class") + text("version") + b"K\x06" + text("class_name") + text("Layer")
    module = (
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}(" + items + text("state") + state + b"utR"
    )
    program = b"}(" + text("D") + module + b"q\x02" + text("rest") + b"h\x01" + text("m") + b"h\x02su."
    refuses(program, "modules are nested more than 32 deep", tmp_path)


def test_modules_that_unfold_for_ever_are_refused(tmp_path):
    tree = bare()
    for _ in range(28):
        tree = bare(modules={"a": tree, "b": tree})
    refuses(dump(only(tree)), "unfold to more than 8 times", tmp_path)


def test_one_storage_does_not_become_many_tensors(tmp_path):
    storage = six(numel=4000, data=torch.zeros(4000))
    views = {f"x{index}": rebuilt(storage, 0, (4000,), (1,)) for index in range(200)}
    refuses(dump(only(bare(buffers=views))), "unfold to more than 8 times", tmp_path)
    strided = {f"x{index}": rebuilt(storage, 0, (2,), (3999,)) for index in range(200)}
    refuses(dump(only(bare(buffers=strided))), "unfold to more than 8 times", tmp_path)


def test_long_prefixes_do_not_become_many_keys(tmp_path):
    view = rebuilt(six(), 0, (), ())
    chain = bare(parameters={f"p{index}": view for index in range(2000)})
    for _ in range(30):
        chain = bare(modules={"m" * 100: chain})
    refuses(dump(only(chain)), "unfold to more than 8 times", tmp_path)


def test_one_text_does_not_become_many_copies(tmp_path):
    word, numbers, encode = "x" * 10_000, list(range(5000)), __import__("_codecs").encode
    blob = storage_blob("Float", 2500, torch.zeros(2500))
    for calls in (
        [Reduced(encode, word, "latin1") for _ in range(500)],
        [Reduced(set, numbers) for _ in range(500)],
        [Reduced(torch.storage._load_from_bytes, blob) for _ in range(500)],
    ):
        refuses(dump({"D": calls}), "unfold to more than 8 times", tmp_path)
    entries = b"(d" + b"".join(b"Vk%d\nNs" % index for index in range(1000)) + b"q\x00"
    copy = b"ccopy_reg\n_reconstructor\n(cdnnlib\nEasyDict\nc__builtin__\ndict\nh\x00tR"
    refuses(b"(" + entries + copy * 500 + b"t.", "unfold to more than 8 times", tmp_path)


def test_endless_programs_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MAX_OPCODES", 1000)
    refuses(b"}" * 2000, "more than 1000 opcodes, .* reading stopped and nothing in it was run", tmp_path)
    blob = b"}" * 2000
    refuses(dump(Reduced(torch.storage._load_from_bytes, blob)), "more than 1000 opcodes", tmp_path)


# ---- hostile files: the tree of modules


def test_networks_of_an_odd_build_are_refused(tmp_path):
    part = rebuilt(six(), 0, (2,), (1,))
    for network_, match in (
        (bare(_parameters=[]), "module of class 'Layer' has no _parameters"),
        (bare(_modules=None), "has no _modules"),
        (bare(_non_persistent_buffers_set=["x"]), "no set of passing buffers"),
        (bare(parameters={"x": 3}), "'x' in _parameters is 3"),
        (bare(parameters={"x": bare()}), "'x' in _parameters is something of type Module"),
        (bare(modules={"x": part}), "'x' in _modules is something of type View"),
        (bare(parameters={"a.b": part}), "'a.b' in _parameters is no name"),
        (bare(parameters={"": part}), "'' in _parameters is no name"),
        (bare(parameters={"x" * 101: part}), "a text of 101 characters in _parameters is no name"),
        (bare(parameters={7: part}), "7 in _parameters is no name"),
        (bare(parameters={"x": part}, buffers={"x": part}), "D has 'x' twice"),
        (bare(_init_args=[1]), "D does not say the arguments of its constructor"),
        (bare(_init_kwargs=None), "D does not say the arguments"),
        (bare(_init_kwargs={1: 2}), "D does not say the arguments"),
        (bare(_init_kwargs={"a": [part]}), "a constructor argument holds something of type View"),
        (bare(_init_args=(OrderedDict,)), "a constructor argument holds something of type Call"),
    ):
        refuses(dump(only(network_)), match, tmp_path)


def test_opcodes_on_the_wrong_objects_are_refused(tmp_path):
    for content, match in (
        (b"NNa.", "opcode APPEND is applied to None"),
        (b"N(Ne.", "opcode APPENDS is applied to None"),
        (b"](N\x90.", "opcode ADDITEMS is applied to something of type list"),
        (b"]NNs.", "2 keys and values are put into something of type list"),
        (b"}(Nu.", "1 keys and values are put into something of type dict"),
        (b"}q\x00(Nt.e", "the file holds something of type tuple"),
        (b"Nt.", "no MARK lies on the stack"),
        (b"(N(a.", "stack is empty"),
        (b"q\x00.", "stack is empty"),
        (b"N\x94a.", "stack is empty"),
        (b"b.", "stack is empty"),
        (b"(ccollections\nOrderedDict\n)}b.", "a state is set on something of type tuple"),
        (b"N0.", "opcode POP at byte 1 is refused"),
        (b"N2.", "opcode DUP at byte 1 is refused"),
        (b"S'\\d'\n.", "opcode STRING at byte 0 is refused"),
        (b"V\\uZZZZ\n.", "argument of UNICODE at byte 0 cannot be read"),
        (b"X\x01\0\0\0\xff.", "argument of BINUNICODE at byte 0 cannot be read"),
        (b"cos\xff\nx\n.", "argument of GLOBAL at byte 0 cannot be read"),
        (b"ccollections\nOrderedDict", "argument of GLOBAL at byte 0 cannot be read"),
        (b"Fx\n.", "argument of FLOAT at byte 0 cannot be read"),
    ):
        refuses(content, match, tmp_path)
