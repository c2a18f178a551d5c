"""Compile every kernel for an H100, bf16 and heads of 128; prints the names of those that did."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtrim.kernels.programs import append, columns, split

SMALL = ("scale", "cap")
PLACES = ("start", "length")
INDICES = ("tile_row", "tile_first", "flat_positions", "positions")
SUMS = ("parts", "sums", "lse", "weights", "bias")
HALVES = ("queries", "keys", "values", "flat_keys", "flat_values")
FIXED = {"GROUP": 4, "D": 128, "BLOCK_D": 128, "CAPPED": True, "PRECISION": "tf32"}


def kind(name):
    if name in SMALL:
        return "fp32"
    for names, pointer in (
        (PLACES, "*i64"),
        (INDICES, "*i32"),
        (SUMS, "*fp32"),
        (HALVES, "*bf16"),
    ):
        if name in names:
            return pointer
    return "*bf16" if name == "out" else "i32"


def compiled(program, **fixed):
    types = {name: "constexpr" if name in fixed else kind(name) for name in program.arg_names}
    source = ASTSource(fn=program, signature=types, constexprs=fixed)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert found.metadata.shared <= 99 * 1024, "more shared memory than small GPUs have"
    print(program.__name__)  # noqa: T201


tiled = FIXED | {"COUNT": 1, "ROWS": 16, "SIZE": 256, "BLOCK_N": 64}
wide = FIXED | {"D": 256, "BLOCK_D": 256, "COUNT": 16, "ROWS": 32, "SIZE": 256, "BLOCK_N": 32}
summed = FIXED | {"BLOCK_M": 64, "BLOCK_N": 64}
compiled(split.tile, **tiled, E=128, BIASED=True)
compiled(split.tile, **wide, E=256, BIASED=False)
compiled(split.merge, E=128, BLOCK_E=128, BLOCK_T=16)
compiled(columns.normalisers, **summed)
compiled(columns.columns, **summed, OWN=False, ADD=True)
compiled(columns.columns, **summed, OWN=True, ADD=False)
compiled(append.append, D=128, E=128, BLOCK=128)
