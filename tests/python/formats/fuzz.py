# SPDX-License-Identifier: Apache-2.0
"""Any bytes as a compressed weight, at every door: refused, or the weight that a slow reader of docs/formats.md reads.

`python fuzz.py --seconds 60 --seed 1`; case i of a seed is always the same, and `--case i` runs it alone. Tensors end
at a page that cannot be read: a kernel that reads beyond them ends the process.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import mmap
import os
import pickle
import re
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lors_cuda import SparseLinear, SparseWeight, merge
from lors_cuda.compressed_tensors.bitmask import BITMASK, SPARSE24_BITMASK, decode_weight

KINDS = ("random bytes", "valid weights", "changed weights")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass
class Stored:
    """A compressed weight as arrays, its values as unsigned integers."""

    N: int
    K: int
    dtype: torch.dtype
    values: np.ndarray  # [N, K/2] or [kept]
    index: np.ndarray  # 2:4: uint8 metadata [N, ceil(K/8)]; bitmap: int64 row offsets [N + 1]
    bits: np.ndarray | None = None  # uint32 [N, ceil(K/32)]; 2:4: None


def draw(random: np.random.Generator, kind: str) -> Stored:
    dtype = DTYPES[random.integers(4)]
    word = WORDS[dtype.itemsize]
    N, K = int(random.integers(1, 9)), int(random.integers(1, 80))
    density = random.choice([0, 0.3, 0.7, 1])
    if random.integers(2):
        K += -K % 4
        stored = Stored(N, K, dtype, np.zeros((N, K // 2), word), np.zeros((N, (K + 7) // 8), np.uint8))
        for n, g in itertools.product(range(N), range(K // 4)):
            at = sorted(random.permutation(4)[:2][random.random(2) < density])
            first, second = (at[0], at[-1]) if at else (1, 0)
            stored.index[n, g // 2] |= (first | second << 2) << 4 * (g % 2)
            for slot in slots(first, second):
                stored.values[n, 2 * g + slot] = random.integers(np.iinfo(word).max, dtype=word)
    else:
        kept = np.zeros((N, K + -K % 32), dtype=bool)
        kept[:, :K] = random.random((N, K)) < density
        offsets = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int64)
        values = random.integers(np.iinfo(word).max, size=int(offsets[-1]), dtype=word)
        stored = Stored(N, K, dtype, values, offsets, np.packbits(kept, axis=1, bitorder="little").view(np.uint32))
    parts = [name for name in ("values", "index", "bits") if getattr(stored, name) is not None]
    if kind == "random bytes":
        for name in parts:
            raw(getattr(stored, name))[:] = random.integers(256, size=getattr(stored, name).nbytes, dtype=np.uint8)
    elif kind == "changed weights":
        for _ in range(random.integers(1, 4)):
            damage(random, stored, random.choice(parts))
    return stored


def slots(first: int, second: int) -> tuple[int, ...]:
    """The slots that a code's kept weights are in."""
    return (0, 1) if first < second else () if first > second else (1,) if first == 3 else (0,)


def raw(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def damage(random: np.random.Generator, stored: Stored, name: str) -> None:
    array = getattr(stored, name)
    if array.size == 0:
        return
    change = random.integers(4)
    if change == 0:
        raw(array)[random.integers(array.nbytes)] = random.integers(256)
    elif change == 1:
        raw(array)[random.integers(array.nbytes)] ^= 1 << random.integers(8)
    elif change == 2:
        limits = np.iinfo(array.dtype)
        array.reshape(-1)[random.integers(array.size)] = [0, 1, limits.max, limits.min][random.integers(4)]
    else:
        shorter = random.integers(2)
        setattr(stored, name, array[..., :-1].copy() if shorter else np.append(array, array[..., :1], axis=-1))


def read(stored: Stored) -> tuple[np.ndarray, np.ndarray] | None:
    """The dense words and the mask [N, K], one weight at a time; None where the bytes are no weight."""
    N, K = stored.N, stored.K
    dense, mask = np.zeros((N, K), stored.values.dtype), np.zeros((N, K), dtype=bool)
    if stored.bits is None:
        if stored.values.shape != (N, K // 2) or stored.index.shape != (N, (K + 7) // 8):
            return None
        for n, g in itertools.product(range(N), range(2 * stored.index.shape[1])):
            code = int(stored.index[n, g // 2]) >> 4 * (g % 2) & 15
            first, second = code & 3, code >> 2
            if (4 * g >= K and code) or (first > second and code != 1):
                return None
            for slot in range(2 if 4 * g < K else 0):
                value = stored.values[n, 2 * g + slot]
                if slot in slots(first, second):
                    k = 4 * g + (second if slot else first)
                    dense[n, k], mask[n, k] = value, True
                elif value:
                    return None
        return dense, mask
    if stored.bits.shape != (N, (K + 31) // 32) or stored.index.shape != (N + 1,):
        return None
    at = 0
    for n in range(N):
        if stored.index[n] != at:
            return None
        for k in range(32 * stored.bits.shape[1]):
            if int(stored.bits[n, k // 32]) >> k % 32 & 1:
                if k >= K or at >= len(stored.values):
                    return None
                dense[n, k], mask[n, k] = stored.values[at], True
                at += 1
    return (dense, mask) if stored.index[N] == at == len(stored.values) else None


_mprotect = ctypes.CDLL(None, use_errno=True).mprotect


def guarded(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The array as a tensor that ends where readable memory ends."""
    if not array.nbytes:
        return torch.empty(array.shape, dtype=dtype)
    held = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, held + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + held
    if _mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    begin = held - array.nbytes
    memory[begin:held] = array.tobytes()
    return torch.frombuffer(memory, dtype=dtype, count=array.size, offset=begin).view(array.shape)


def as_floats(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(words.view(f"i{dtype.itemsize}")).view(dtype)


def same(actual: Tensor, expected: Tensor) -> bool:
    """The same numbers, and no zero with a sign."""
    nan, zero = expected.isnan(), expected == 0
    return (
        torch.equal(actual.isnan(), nan)
        and torch.equal(actual[~nan], expected[~nan])
        and not bool(actual[zero].signbit().any())
    )


def accepted(door: Callable[[], Any]) -> Any:
    """What comes out of the door; None where it refuses with a sentence."""
    try:
        return door()
    except (ValueError, RuntimeError) as error:  # torch raises the latter for a state
        if not re.search("corrupted|incomplete|must be|an even number|size mismatch", str(error)):
            raise
        return None


def run_case(seed: int, case: int) -> tuple[str, bool]:
    """The kind of the case, and whether its bytes are a weight.

    Raises:
        AssertionError: a door takes what is none or refuses what is one, or the weight is not what was read slowly.
    """
    random = np.random.default_rng([seed, case])
    kind = KINDS[case % len(KINDS)]
    stored = draw(random, kind)
    N, K, dtype = stored.N, stored.K, stored.dtype
    values = guarded(stored.values, dtype)
    index = guarded(stored.index, torch.uint8 if stored.bits is None else torch.int64)
    bits = None if stored.bits is None else guarded(stored.bits, torch.int32)

    def from_parts() -> SparseWeight:
        if bits is None:
            return SparseWeight.from_sparse24(values, index)
        return SparseWeight.from_bitmap(values, bits, index, K)

    def from_state() -> SparseWeight:
        none = SparseWeight.from_dense(torch.zeros(N, K, dtype=dtype), "2:4" if bits is None else "bitmap")
        layer = SparseLinear(none)
        state = {"weight_values": values, "weight_index": index, "weight_mask": bits}
        layer.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
        return layer.sparse_weight

    def from_pickle() -> SparseWeight:
        weight: SparseWeight = pickle.loads(pickle.dumps(SparseWeight(values, bits, index, in_features=K)))
        return weight

    truth = read(stored)
    assert truth is not None or kind != "valid weights"
    for door in (from_parts, from_state, from_pickle):
        weight = accepted(door)
        if weight is not None and weight.shape != (N, K):  # several changes can make a weight of another shape
            weight = None
        assert (weight is None) == (truth is None), f"{door.__name__}: {weight}"
        if truth is not None:
            check_weight(weight, as_floats(truth[0], dtype), torch.from_numpy(truth[1]), random)
    check_foreign(stored, values, random)
    return kind, truth is not None


def check_weight(weight: SparseWeight, dense: Tensor, mask: Tensor, random: np.random.Generator) -> None:
    assert torch.equal(weight.mask(), mask)
    assert same(weight.to_dense(), dense)
    N, K = dense.shape
    lora_A, lora_B = (torch.from_numpy(random.standard_normal(shape, np.float32)) for shape in ((2, K), (N, 2)))
    expected = merge(dense, lora_A, lora_B, 0.5, mask=mask) + 0.0
    assert same(merge(weight, lora_A, lora_B, 0.5) + 0.0, expected)
    if expected.isfinite().all():
        assert same(weight.merge(lora_A, lora_B, 0.5).to_dense(), expected)
    else:
        with pytest.raises(ValueError, match=r"is (nan|inf|-inf)"):
            weight.merge(lora_A, lora_B, 0.5)


def check_foreign(stored: Stored, values: Tensor, random: np.random.Generator) -> None:
    """The same bytes as parts of compressed-tensors' formats, which keep two of every four or have an offset less."""
    N, K = stored.N, stored.K
    if stored.bits is not None:
        if stored.bits.shape != (N, (K + 31) // 32) or stored.index.shape != (N + 1,):
            return
        mask = stored.bits.view(np.uint8)[:, : (K + 7) // 8].copy()
        whole = np.zeros((N, 4 * ((K + 31) // 32)), np.uint8)
        whole[:, : mask.shape[1]] = mask
        offsets = np.append(stored.index[:-1], len(stored.values))
        truth = read(dataclasses.replace(stored, index=offsets, bits=whole.view(np.uint32)))
        parts = {"row_offsets": torch.from_numpy(stored.index[:-1].copy())}
        dense = None if truth is None else truth[0]
    else:
        if stored.values.shape != (N, K // 2):
            return
        two = np.array([3, 5, 9, 6, 10, 12], np.uint8)
        groups = two[random.integers(6, size=(N, 2 * ((K + 7) // 8)))]
        groups[:, K // 4 :] = 0
        mask = groups[:, ::2] | groups[:, 1::2] << 4
        if random.integers(2):
            raw(mask)[random.integers(mask.nbytes)] ^= 1 << random.integers(8)
        kept = np.unpackbits(mask, axis=1, bitorder="little").astype(bool)
        parts, dense = {}, None
        if not kept[:, K:].any() and (kept[:, :K].reshape(-1, 4).sum(1) == 2).all():
            dense = np.zeros((N, K), stored.values.dtype)
            dense[kept[:, :K]] = stored.values.reshape(-1)
    format = BITMASK if parts else SPARSE24_BITMASK
    shape = torch.tensor([N, K]) if parts else torch.tensor([[N], [K]])
    parts |= {"compressed": values, "bitmask": guarded(mask, torch.uint8), "shape": shape}
    weight = accepted(lambda: decode_weight(parts, format))
    assert (weight is None) == (dense is None), f"{format}: {weight}"
    if dense is not None:
        assert same(weight, as_floats(dense, stored.dtype))


def run(seed: int, seconds: float, only: int | None, reached: mmap.mmap) -> None:
    """Cases until the time is over; the number of the one that runs stands in ``reached``."""
    begin, counts = time.monotonic(), Counter[tuple[str, bool]]()
    for case in itertools.count() if only is None else [only]:
        if time.monotonic() - begin >= seconds:
            break
        reached[:8] = struct.pack("q", case)
        counts[run_case(seed, case)] += 1
    for kind in KINDS:
        print(f"{kind:16} {counts[kind, True] + counts[kind, False]:10} cases, {counts[kind, True]:10} accepted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="run this case alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reached = mmap.mmap(-1, 8)
    child = os.fork()  # a read beyond a tensor ends it
    if child == 0:
        failed = 1
        try:
            run(args.seed, args.seconds, args.case, reached)
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(failed)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        (case,) = struct.unpack("q", reached[:8])
        print(
            f"fuzz: failed ({status}) in case {case}; rerun it with --seed {args.seed} --case {case}", file=sys.stderr
        )
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
