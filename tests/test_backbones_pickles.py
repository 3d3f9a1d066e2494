"""Network pickles of the original are read as data, whatever protocol and layout; other files are refused."""

import json
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_pickles import (
    PROTOCOLS,
    SYNTHESIS,
    EasyDict,
    Part,
    Reduced,
    assert_same_state,
    bare,
    discriminator_shapes,
    dump,
    generator_shapes,
    meta,
    network,
    only,
    read,
    rebuilt,
    reconstruct,
    refuses,
    save,
    six,
    small_networks,
    text,
)
from torch import nn

from backbones.pickles import NetworkRecord, read_networks

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "backbones"


# ---- honest files


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_networks_come_back_bit_for_bit_in_module_order(tmp_path, protocol):
    networks = small_networks()
    found = read(save(tmp_path, networks, protocol=protocol))
    assert list(found) == ["G", "D", "G_ema"]
    for name, record in found.items():
        assert isinstance(record, NetworkRecord)
        assert_same_state(record.state, networks[name].state_dict())
    generator, discriminator = found["G_ema"], found["D"]
    assert generator.class_name == "Generator" and discriminator.class_name == "Discriminator"
    assert generator.args == () and discriminator.args == (0, 16, 3)
    assert generator.kwargs == {
        "mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": dict(SYNTHESIS), "z_dim": 5, "w_dim": 7
    }  # fmt: skip
    assert type(generator.kwargs) is dict and type(generator.kwargs["synthesis_kwargs"]) is dict
    assert discriminator.kwargs == {"epilogue_kwargs": {}}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the original's key lists are not here")
@pytest.mark.parametrize("name", ["uncond", "cond_cifar"])
def test_networks_with_the_keys_of_the_original_come_back(tmp_path, name):
    with np.load(GOLDEN / f"stylegan2_32_{name}.npz") as golden:
        facts = json.loads(str(golden["meta_json"]))
    widths, labels = {4: 48, 8: 48, 16: 32, 32: 16}, facts["c_dim"]
    shapes = generator_shapes(widths, z=facts["z_dim"], width=facts["w_dim"], labels=labels)
    critic_shapes = discriminator_shapes(widths, labels=labels, skip=name == "uncond")
    networks = {
        "G_ema": network("Generator", shapes, facts["z_dim"], labels, **facts["G_kwargs"]),
        "D": network("Discriminator", critic_shapes, labels, 32, **facts["D_kwargs"]),
    }
    found = read(save(tmp_path, networks, protocol=3))
    for key, record, kwargs in (("G_ema", found["G_ema"], "G_kwargs"), ("D", found["D"], "D_kwargs")):
        state = record.state
        listed = facts["G_keys" if key == "G_ema" else "D_keys"]
        assert [[name, list(tensor.shape)] for name, tensor in state.items()] == listed
        assert record.kwargs == facts[kwargs]
        assert_same_state(state, networks[key].state_dict())


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_dtype_and_layout_keeps_its_values(tmp_path, protocol):
    part = Part()
    base = torch.arange(24).reshape(2, 3, 4)
    for dtype in DTYPES:
        part.register_buffer(str(dtype).replace(".", "_"), (base - 7).to(dtype))
    part.transposed = nn.Parameter(torch.randn(3, 5, 2).permute(2, 0, 1))
    part.register_buffer("sliced", base[1:, ::2, 1::2])
    part.register_buffer("row_and_its_last", base[0, 0])
    part.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float16))
    part.register_buffer("empty", torch.zeros(4, 0, 3))
    part.register_buffer("channels_last", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    found = read(save(tmp_path, only(part), protocol=protocol))
    assert_same_state(found["D"].state, part.state_dict())


def test_missing_and_passing_tensors_have_no_key(tmp_path):
    part = Part()
    part.register_parameter("bias", None)
    part.register_buffer("absent", None)
    part.register_buffer("passing", torch.ones(2), persistent=False)
    part.register_buffer("kept", torch.ones(2))
    part.add_module("child", None)
    for protocol in (3, 4):  # a set has an opcode of its own from 4 onward
        assert list(read(save(tmp_path, only(part), protocol=protocol))["D"].state) == ["kept"]


def test_a_tensor_of_two_modules_has_two_keys_and_one_memory(tmp_path):
    part = Part()
    part.put("a.weight", nn.Parameter(torch.randn(3, 2)))
    part.put("b.weight", part.a.weight)
    part.add_module("c", part.a)
    state = read(save(tmp_path, only(part)))["D"].state
    assert_same_state(state, part.state_dict())
    assert len({tensor.data_ptr() for tensor in state.values()}) == 1


def test_tensors_of_one_storage_are_told_apart(tmp_path):
    storage = six(location="cuda:0")  # where a tensor lived when it was saved is of no account
    views = {
        "whole": rebuilt(storage, 0, (6,), (1,)),
        "turned": rebuilt(storage, 0, (3, 2), (1, 3)),
        "last": rebuilt(storage, 5, (), ()),
    }
    state = read(save(tmp_path, only(bare(buffers=views))))["D"].state
    base = torch.arange(6.0)
    assert_same_state(state, {"whole": base, "turned": base.reshape(2, 3).t(), "last": base[5]})
    assert len({tensor.data_ptr() for tensor in state.values()}) == 3


def test_numpy_scalars_become_numbers_under_both_module_paths(tmp_path):
    numbers = {
        "gain": np.float64(2**0.5), "half": np.float16(0.1), "single": np.float32(0.1), "size": np.int64(-3),
        "byte": np.uint8(200), "flag": np.bool_(True), "limit": np.float64(np.inf),
    }  # fmt: skip
    swapped = Reduced(np.float64(1).__reduce__()[0], np.dtype(">f8"), struct.pack(">d", 1.5))
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    content = dump(only(Part("Discriminator", swapped, **numbers)), protocol=3)
    for path in (old, new):
        record = read(save(tmp_path, content.replace(new, old).replace(old, path)))["D"]
        assert record.args == (1.5,)
        assert record.kwargs == {name: value.item() for name, value in numbers.items()}
        assert {type(value) for value in record.kwargs.values()} == {float, int, bool}


def test_dictionaries_of_either_module_path_and_plain_containers_are_data(tmp_path):
    kwargs = {
        "a": EasyDict(b=[1, (2.5, None)], c={"x", 3}),
        "d": b"\x00\xff",
        "e": 2**70,
        "f": OrderedDict(g=-1),
    }
    for protocol in PROTOCOLS:
        for module in ("dnnlib", "dnnlib.util"):
            content = dump(only(Part("Discriminator", **kwargs)), protocol, easy_dict_module=module)
            assert module.encode() + (b" " if protocol > 3 else b"\n") in content or protocol > 3
            assert read(save(tmp_path, content))["D"].kwargs == {
                "a": {"b": [1, (2.5, None)], "c": {"x", 3}}, "d": b"\x00\xff", "e": 2**70, "f": {"g": -1}
            }  # fmt: skip


def test_networks_stored_as_none_are_left_out(tmp_path):
    assert list(read(save(tmp_path, {"G": None, "D": Part()}))) == ["D"]


# ---- files of the wrong kind


def test_missing_file_is_named(tmp_path):
    for path in (tmp_path / "absent.pkl", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
            read_networks(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "ends at byte 0 without a STOP"),
        (b"\x93NUMPY\x01\x00v", "global is named|stack is empty"),
        (b"PK\x03\x04" + b"\0" * 30, "opcode PERSID at byte 0 is refused"),
        (b"<html>", "which no pickle opcode has"),
        (b"\x80\x06N.", "protocol 6 where 0 to 5 are known"),
        (b"\x80\xffN.", "protocol 255 where 0 to 5 are known"),
        (b".", "stack is empty"),
    ],
)
def test_what_is_no_pickle_is_refused(tmp_path, content, match):
    refuses(content, match, tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds something of type list but a dict with G, D or G_ema"),
        (None, "holds None but a dict"),
        ({}, "has no key but none of G, D and G_ema"),
        ({"model": 1, 2: 3}, "has 'model', 2 but none of G, D and G_ema"),
        ({"G": None}, "has 'G' but none of"),
        ({"G": {"weight": 1}}, "G is something of type dict where a network was expected"),
    ],
)
def test_pickles_without_networks_are_refused(tmp_path, content, match):
    refuses(dump(content), match, tmp_path)


def test_truncated_files_are_refused(tmp_path):
    content = dump(small_networks(), protocol=4)
    for end in [*range(1, 100), *range(100, len(content) - 1, len(content) // 100)]:
        refuses(content[:end], "without a STOP|cannot be read", tmp_path)


@pytest.mark.parametrize("name", ["Network", "network.Network"])
def test_networks_of_the_tensorflow_version_are_named(tmp_path, name):
    refuses(
        f"\x80\x03cdnnlib.tflib.network\n{name}\n)\x81.".encode("latin-1"),
        r"network of the TensorFlow version \(it asks for dnnlib\.tflib\.network\..*nothing in it was run",
        tmp_path,
    )


@pytest.mark.parametrize("key", ["synthesis.input.weight", "synthesis.L0_36_512.weight"])
def test_alias_free_generators_are_named(tmp_path, key):
    part = network("Generator", {"mapping.w_avg": (4,), key: (2, 2)})
    refuses(dump({"D": Part(), "G_ema": part}), f"G_ema is a StyleGAN3 generator .it has {key}", tmp_path)


def test_other_generators_are_refused(tmp_path):
    refuses(dump({"G": Part()}), "G has no synthesis.b4.const, so it is no StyleGAN2 generator", tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 5}, "meta version 5 but only version 6"),
        ({"version": "6"}, "meta version '6' but only"),
        ({"version": True}, "meta version True but only"),
        ({"version": 10**5000}, "meta version something of type int but only"),
        ({"type": "function"}, "meta type 'function' where 'class' was expected"),
        ({"type": None}, "meta type None where 'class'"),
        ({"class_name": 3}, "lacks its class name or its state"),
        ({"state": [1]}, "lacks its class name or its state"),
    ],
)
def test_other_meta_versions_and_types_are_refused(tmp_path, changes, match):
    refuses(dump(only(Reduced(reconstruct, meta({}, **changes)))), match, tmp_path)


# ---- random damage


def outcome(path):
    """Read whatever lies there: well-formed records, or a ValueError and nothing else."""
    try:
        found = read(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None
    for name, record in found.items():
        assert name in ("G", "D", "G_ema") and type(record.class_name) is str
        assert type(record.args) is tuple and type(record.kwargs) is dict
        assert all(type(key) is str and type(value) is torch.Tensor for key, value in record.state.items())
        assert sum(value.numel() for value in record.state.values()) < 100_000
    return found


def good_file():
    part = network(
        "Generator", {"synthesis.b4.const": (2, 4, 4), "mapping.w_avg": (3,)}, np.float64(2), z_dim=3
    )
    part.register_buffer("count", torch.tensor(3))
    return {protocol: dump({"G": part, "D": None}, protocol) for protocol in PROTOCOLS}


GOOD = good_file()


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(PROTOCOLS), st.data())
def test_damaged_files_give_records_or_a_value_error(tmp_path_factory, protocol, data):
    content = bytearray(GOOD[protocol])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "flip", "cut", "insert", "copy"]))
        if kind == "set":
            content[start] = data.draw(st.integers(0, 255))
        elif kind == "flip":
            content[start] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[start : start + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            content[start:start] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            end = start + data.draw(st.integers(1, 40))
            content[start:start] = content[start:end]
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(content)
    outcome(path)


WORDS = [
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.storage\n_load_from_bytes\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n",
    b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n",
    b"ccopy_reg\n_reconstructor\n", b"c__builtin__\ndict\n", text("G"), text("f8"), text("state"),
    b"C\x02ab", b"K\x01", b"J\xff\xff\xff\xff", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"\x94", b"R", b"R",
    b"\x81", b"b", b"(", b"(", b"t", b"\x85", b"\x86", b"\x87", b"]", b"}", b")", b"\x8f", b"a", b"e", b"s",
    b"u", b"\x90", b"N", b"\x88", b"l", b"d",
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_random_programs_give_records_or_a_value_error(tmp_path_factory, words):
    path = tmp_path_factory.getbasetemp() / "program.pkl"
    path.write_bytes(b"".join(words) + b".")
    outcome(path)


def test_every_opcode_is_read_or_refused(tmp_path):
    """No opcode, met on a stack of anything, does more than raise ValueError."""
    for opcode in pickletools.opcodes:
        for before in (b"N", b"}(NN", b"](", b"ccollections\nOrderedDict\n)", b"NNN"):
            for argument in (b"", b"1\n", b"a\nb\n", b"\x00" * 8):
                path = tmp_path / "one.pkl"
                path.write_bytes(before + opcode.code.encode("latin-1") + argument + b".")
                assert outcome(path) is None
