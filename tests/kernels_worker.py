"""Runs the Triton kernels for tests/test_fq_kernels.py, in a process of its own.

``python -m tests.kernels_worker run CASES RESULTS`` interprets the cases of a file on the CPU (Triton reads
TRITON_INTERPRET when it is imported, hence the process). ``... compile RESULTS`` compiles the kernels for a
GPU that need not exist, and writes down what each launch would use of it.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fq import kernels, kernels_search
from fq.kernels_search import error_bound

# Tokens, channels, codes: the shapes of the benchmark, and batches of 64 samples.
SHAPES = {
    "S1": (4096, 128, 1024),
    "S2": (16384, 256, 1024),
    "S3": (65536, 64, 512),
    "S4": (16384, 512, 1024),
    "S5": (65536, 256, 4096),
    "C1": (32768, 256, 1024),
    "C2": (8192, 256, 1024),
}
INTERPRETED = not isinstance(kernels.search_kernel, triton.JITFunction)


def run(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Results of all cases, in memory that starts out poisoned."""
    poison_new_memory()
    if INTERPRETED:
        drop_nan_in_maxima()
    np.seterr(all="ignore")  # the interpreter computes with NumPy, which warns of infinities
    results = {}
    for name, case in cases.items():
        kernels._SORTED_ROWS = case.get("sorted_rows", 128)
        kernels._SCAN_CELLS = case.get("scan_cells", 4096)
        kernels._HISTOGRAM_BYTES = case.get("histogram_bytes", 1 << 25)
        options = dict(case["options"])
        if options.get("config"):
            options["config"] = kernels.Config(*options["config"])
        arguments, options = (on_device(part) for part in (case["arguments"], options))
        if INTERPRETED:
            features = next(part for part in arguments[::-1] if isinstance(part, Tensor) and part.ndim == 3)
            round_like_tensor_cores(16 if features.dtype == torch.bfloat16 else 13)
        kernels.error_bound = partial(scaled_bound, case.get("bound", 1.0))
        call = certify if case["call"] == "certify" else getattr(kernels, case["call"])
        # What an update changes in place counts as its result, too.
        result = (
            (call(*arguments, **options), *arguments)
            if call is kernels.ema_update_
            else call(*arguments, **options)
        )
        result = result if isinstance(result, tuple) else (result,)
        if not INTERPRETED and call is not kernels.ema_update_:
            again = call(*arguments, **options)
            again = again if isinstance(again, tuple) else (again,)
            assert all(map(torch.equal, map(bits, result), map(bits, again))), (
                f"{name}: other bits when run again"
            )
        results[name] = tuple(tensor.cpu() for tensor in result)
    return results


def scaled_bound(factor: float, dim: int) -> tuple[float, ...]:
    """The error bound of a certified search times a factor, for a test that the bound is needed."""
    return tuple(factor * part for part in error_bound(dim))


def certify(features: Tensor, codebook: Tensor, config: kernels.Config) -> tuple[Tensor, ...]:
    """The first pass of a certified search: two codes, int64 [B, S], and its verdicts, bool [B, S]."""
    batch, dim, space = features.shape
    index, rival = (torch.empty(batch, space, dtype=torch.int64, device=features.device) for _ in range(2))
    certain, paired = (torch.empty(batch, space, dtype=torch.bool, device=features.device) for _ in range(2))
    kernels._launch(
        certify_kernel, (triton.cdiv(batch * space, config.tokens),),
        features, codebook, index, rival, certain, paired, batch * space, space, *features.stride(),
        *error_bound(dim), K=len(codebook), D=dim, BN=config.tokens, BK=config.codes, BD=config.channels,
    )  # fmt: skip
    return index, rival, certain, paired


@triton.jit
def certify_kernel(
    features, codebook, index, rival, certain, paired,
    num_tokens, space, stride_b, stride_d, stride_s, delta, eta,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What the search kernel finds out before it compares two codes or searches exactly."""
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = token < num_tokens
    offset = kernels_search.offsets(token, space, stride_b, stride_s)
    first, second, one_left, two_left = kernels_search.certify(
        features, codebook, offset, inside, stride_d, delta, eta, K, D, BN, BK, BD, False
    )  # fmt: skip
    tl.store(index + token, first.to(tl.int64), inside)
    tl.store(rival + token, second.to(tl.int64), inside)
    tl.store(certain + token, one_left, inside)
    tl.store(paired + token, two_left, inside)


def on_device(value: Any) -> Any:
    """The same on the GPU, unless this process interprets."""
    return value if INTERPRETED else tree_map_only(Tensor, lambda tensor: tensor.cuda(), value)


def bits(tensor: Tensor) -> Tensor:
    """Floating numbers as integers, so that NaN equals itself."""
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def poison_new_memory() -> None:
    """Let new tensors hold what no kernel would write, so that an element left out is seen."""

    def poisoned(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = make(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -(1 << 30))

        return made

    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)


def drop_nan_in_maxima() -> None:
    """Let a maximum with NaN be the other number, as on a GPU; Triton 3.6 interprets it as NaN."""
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)


def round_like_tensor_cores(bits: int) -> None:
    """Drop the low bits of float32 operands of a product, which the interpreter would multiply exactly."""

    def cut(operand: np.ndarray) -> np.ndarray:
        if operand.dtype != np.float32:
            return operand
        return (np.ascontiguousarray(operand).view(np.uint32) & np.uint32(-1 << bits & 0xFFFFFFFF)).view(
            np.float32
        )

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(cut(a.data), cut(b.data), dtype=d.data.dtype) + d.data
        return type(a)(product, d.dtype.scalar)

    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_dot = dot


def compile_all() -> list[dict[str, Any]]:
    """What every launch at every shape takes of an H100 or H200."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class NoGpu:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(NoGpu())
    launch, found = JITFunction.run, []
    current = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        registers, stack = resources(kernel.asm["cubin"])
        found.append({
            "case": current, "kernel": self.__name__, "programs": int(np.prod(grid)),
            "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared, "registers": registers,
            "stack": stack, "tensor_cores": "mma" in kernel.asm["ptx"],
        })  # fmt: skip

    JITFunction.run = compile_only
    plain = [(name, torch.float32, False) for name in SHAPES]
    others = [("S2", torch.float32, True), ("S2", torch.bfloat16, False), ("C2", torch.float16, False)]
    for shape, dtype, channels_last in plain + others:
        current = f"{shape} {str(dtype)[6:]} {'channels-last' if channels_last else 'NCHW'}"
        tokens, dim, size = SHAPES[shape]
        features = torch.empty(64, dim, tokens // 64, dtype=dtype, device="meta")
        if channels_last:
            features = torch.empty(64, tokens // 64, dim, dtype=dtype, device="meta").transpose(1, 2)
        compile_step(features, torch.empty(size, dim, device="meta"), masked=channels_last)
    tokens, dim, size = SHAPES["S2"]
    features = torch.empty(64, dim, tokens // 64, device="meta")
    for config in kernels.CONFIGS:
        if config.certified:
            current = f"S2 {config}"
            compile_step(features, torch.empty(size, dim, device="meta"), masked=False, config=config)
    current = "one token"  # Triton takes arguments that equal 1 for constants, and compiles anew
    compile_step(torch.empty(1, 1, 1, device="meta"), torch.empty(1, 1, device="meta"), masked=True)
    return found


def compile_step(
    features: Tensor, codebook: Tensor, *, masked: bool, config: kernels.Config | None = None
) -> None:
    """All launches of one training step; ``masked`` takes the rarer branches."""
    learn = torch.empty(len(features), dtype=torch.bool, device="meta") if masked else None
    decay = torch.empty((), device="meta") if masked else 0.8
    number = torch.empty((), dtype=torch.int64, device="meta")
    *_, packed = kernels.quantize(features, codebook, learn, statistics=True, loss_scale=0.1,
                                  per_sample=masked, config=config)  # fmt: skip
    kernels.ema_update_(
        codebook, codebook.new_empty(len(codebook)), torch.empty_like(codebook), number, number, packed,
        features, decay=decay, dead_code_threshold=0.03, dead_code_grace=10,
    )  # fmt: skip
    if len(codebook) == 4096:
        kernels.nearest(features, codebook)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of stack, where the compiler puts what registers cannot hold."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return tuple(int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK"))


if __name__ == "__main__":
    if sys.argv[1] == "run":
        torch.save(run(torch.load(sys.argv[2])), sys.argv[3])
    else:
        Path(sys.argv[2]).write_text(json.dumps(compile_all()))
