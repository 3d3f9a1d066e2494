"""Writes network pickles as the original does, honest or hostile, and watches how they are read."""

import codecs
import pickle
import struct
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import nn

from backbones.pickles import read_networks

PACKAGES = ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")
PROTOCOLS = range(6)


# ---- nothing runs: every read below is watched by an audit hook

watched: list[str] | None = None


def note(event, arguments):
    if watched is not None:
        watched.append(event)


sys.addaudithook(note)
for codec in ("latin-1", "raw-unicode-escape", "utf-8"):
    codecs.lookup(codec)  # Python imports a codec at its first use, which is none of the file's doing


def read(path):
    """`read_networks`, with a failure if it does more than open the file."""
    global watched
    modules = set(sys.modules)
    watched = []
    try:
        return read_networks(path)
    finally:
        events, watched = watched, None
        assert set(events) <= {"open"} and len(events) <= 1, events
        assert set(sys.modules) == modules


def refuses(content, match, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as raised:
        read(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


# ---- writing what the original writes


def reconstruct(meta):
    raise AssertionError("the reader rebuilt a network by itself")


reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"


class EasyDict(dict):
    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class Reduced:
    """Pickled as a call of ``function`` with ``arguments``, whatever they are."""

    def __init__(self, function, *arguments, state=None):
        self.reduction = (function, arguments, state)

    def __reduce__(self):
        return self.reduction


@contextmanager
def original_packages(easy_dict_module="dnnlib.util"):
    """The original's packages, for as long as something is pickled."""
    sys.modules.update({name: types.ModuleType(name) for name in PACKAGES})
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    EasyDict.__module__ = easy_dict_module
    EasyDict.__qualname__ = "EasyDict"
    sys.modules[easy_dict_module].EasyDict = EasyDict
    try:
        yield
    finally:
        for name in PACKAGES:
            del sys.modules[name]


def dump(content, protocol=4, **options):
    with original_packages(**options):
        return pickle.dumps(content, protocol=protocol)


SOURCE = "raise AssertionError('the embedded source text was run')\n"


def meta(state, /, **changes):
    return {
        "type": "class", "version": 6, "module_src": SOURCE, "class_name": "Layer", "state": state
    } | changes  # fmt: skip


class Part(nn.Module):
    """A module that pickles as the original's do, its class named by ``class_name``."""

    def __init__(self, class_name="Layer", *args, **kwargs):
        super().__init__()
        self.class_name = class_name
        self._init_args, self._init_kwargs = args, EasyDict(kwargs)

    def __reduce__(self):
        return reconstruct, (meta(dict(self.__dict__), class_name=self.class_name),), None

    def put(self, key, tensor):
        head, _, rest = key.partition(".")
        if rest:
            if head not in self._modules:
                self.add_module(head, Part(res=len(head)))
            self._modules[head].put(rest, tensor)
        elif isinstance(tensor, nn.Parameter):
            self.register_parameter(head, tensor)
        else:
            self.register_buffer(head, tensor)


def network(class_name, shapes, *args, **kwargs):
    """A nested module with seeded numbers under the given keys; buffers are told by their names."""
    part = Part(class_name, *args, **kwargs)
    random = torch.Generator().manual_seed(len(shapes))
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=random)
        is_buffer = key.endswith(("resample_filter", "noise_const", "w_avg"))
        part.put(key, values if is_buffer else nn.Parameter(values, requires_grad=False))
    return part


def layer(prefix, inputs, outputs, size, *, width=None, resolution=None):
    """Keys of one convolution: of the discriminator, or modulated by latents of that width."""
    shapes = {f"{prefix}.weight": (outputs, inputs, size, size)}
    if resolution:
        shapes[f"{prefix}.noise_strength"] = ()
    shapes[f"{prefix}.bias"] = (outputs,)
    if resolution or not width:
        shapes[f"{prefix}.resample_filter"] = (4, 4)
    if resolution:
        shapes[f"{prefix}.noise_const"] = (resolution, resolution)
    if width:
        shapes |= {f"{prefix}.affine.weight": (inputs, width), f"{prefix}.affine.bias": (inputs,)}
    return shapes


def mapping(z, labels, width, depth):
    shapes = {"mapping.embed.weight": (width, labels), "mapping.embed.bias": (width,)} if labels else {}
    for index in range(depth):
        inputs = z + (width if labels else 0) if index == 0 else width
        shapes |= {f"mapping.fc{index}.weight": (width, inputs), f"mapping.fc{index}.bias": (width,)}
    return shapes


def generator_shapes(widths, *, z, width, labels):
    """Keys and shapes of a skip generator with a mapping of two layers, in the original's order."""
    shapes, inputs = {}, None
    for resolution, channels in widths.items():
        block = f"synthesis.b{resolution}"
        if resolution == 4:
            shapes[f"{block}.const"] = (channels, 4, 4)
        shapes[f"{block}.resample_filter"] = (4, 4)
        sizes = {"width": width, "resolution": resolution}
        if inputs:
            shapes |= layer(f"{block}.conv0", inputs, channels, 3, **sizes)
        shapes |= layer(f"{block}.conv1", channels, channels, 3, **sizes)
        shapes |= layer(f"{block}.torgb", channels, 3, 1, width=width)
        inputs = channels
    return shapes | {"mapping.w_avg": (width,)} | mapping(z, labels, width, 2)


def discriminator_shapes(widths, *, labels, skip):
    """Keys and shapes of a residual (``skip``) or plain discriminator, in the original's order."""
    shapes, order = {}, sorted(widths, reverse=True)
    last = widths[4]
    for resolution, following in pairwise(order):
        block, channels, outputs = f"b{resolution}", widths[resolution], widths[following]
        shapes[f"{block}.resample_filter"] = (4, 4)
        if resolution == order[0]:
            shapes |= layer(f"{block}.fromrgb", 3, channels, 1)
        shapes |= layer(f"{block}.conv0", channels, channels, 3)
        shapes |= layer(f"{block}.conv1", channels, outputs, 3)
        if skip:
            shapes |= {
                f"{block}.skip.weight": (outputs, channels, 1, 1),
                f"{block}.skip.resample_filter": (4, 4),
            }
    shapes |= mapping(0, labels, last, 2) if labels else {}
    shapes |= layer("b4.conv", last + 1, last, 3)
    shapes |= {"b4.fc.weight": (last, last * 16), "b4.fc.bias": (last,)}
    head = last if labels else 1
    return shapes | {"b4.out.weight": (head, last), "b4.out.bias": (head,)}


WIDTHS = {4: 6, 8: 5, 16: 4}
SYNTHESIS = EasyDict(channel_base=64, channel_max=6, num_fp16_res=0, conv_clamp=None)


def small_networks():
    shapes = generator_shapes(WIDTHS, z=5, width=7, labels=3)
    kwargs = {
        "mapping_kwargs": EasyDict(num_layers=2), "synthesis_kwargs": SYNTHESIS, "z_dim": 5, "w_dim": 7,
    }  # fmt: skip
    discriminator = network(
        "Discriminator",
        discriminator_shapes(WIDTHS, labels=0, skip=True),
        0,
        16,
        3,
        epilogue_kwargs=EasyDict(),
    )
    return {
        "G": network("Generator", shapes, **kwargs),
        "D": discriminator,
        "G_ema": network("Generator", dict(shapes), **kwargs),
        "augment_pipe": network("AugmentPipe", {"p": (), "Hz_geom": (12,)}),
        "training_set_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", xflip=False),
    }


def only(part, name="D"):
    return {name: part, "augment_pipe": None}


def save(tmp_path, content, **options):
    path = tmp_path / "network.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dump(content, **options))
    return path


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for key, tensor in state.items():
        wanted = expected[key].detach()
        assert type(tensor) is torch.Tensor and tensor.dtype == wanted.dtype, key
        assert tensor.shape == wanted.shape and torch.equal(tensor, wanted), key
        assert tensor.is_contiguous() and not tensor.requires_grad and tensor.device.type == "cpu"
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage_blob(
    kind, numel, data, *, magic=0x1950A86A20F9469CFC6C, version=1001, stored=None, keys=("0",), **reference
):
    """A storage in the stream format of `torch.save`, with whatever lies the arguments tell."""
    if isinstance(data, torch.Tensor):
        data = data.numpy().tobytes()
    fields = {"type": "storage", "key": "0", "location": "cpu", "view": None} | reference
    header = b"".join(pickle.dumps(value, 2) for value in (magic, version, {"little_endian": True}))
    name = f"ctorch\n{kind}Storage\n".encode()
    header += b"\x80\x02(" + text(fields["type"]) + name + text(fields["key"]) + text(fields["location"])
    header += pickle.dumps(numel, 2)[2:-1] + pickle.dumps(fields["view"], 2)[2:-1] + b"tQ."
    stored = numel if stored is None else stored
    return header + pickle.dumps(list(keys), 2) + struct.pack("<q", stored) + data


def rebuilt(storage, offset, size, stride, *more, grad=False, hooks=None):
    hooks = OrderedDict() if hooks is None else hooks
    return Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, grad, hooks, *more)


def bare(parameters=(), buffers=(), modules=(), **state):
    """A module written by hand, so that its dictionaries may hold anything."""
    fields = {"_parameters": dict(parameters), "_buffers": dict(buffers), "_modules": dict(modules)}
    return Reduced(reconstruct, meta({"_init_args": (), "_init_kwargs": {}} | fields | state))


def six(**lies):
    return Reduced(
        torch.storage._load_from_bytes,
        storage_blob(**{"kind": "Float", "numel": 6, "data": torch.arange(6.0)} | lies),
    )
