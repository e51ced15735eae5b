"""The frozen reference's log-probs of pairs, computed once before training and cached in the run directory.

- the file is keyed by the pairs' tokens, the bytes of the reference's weights and the dtypes of the computation; with
  another key all is computed anew; with the same key the file is read, and a random batch is recomputed and compared
- what is computed is written every few minutes and before a signal ends the run, so a resumed run computes the rest
- a bf16 matrix product may give a row other bits in another batch. So pairs are batched as in the first epoch, and a
  policy that starts as its reference has an initial loss of ln 2, on a CPU to the last bit (a GPU's kernels and
  compiler may round otherwise when gradients are needed)
"""

import hashlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.batches import Split
from models.checkpoint import WeightFiles
from models.checksums import digest
from models.common import on_main, say, short_bar
from models.files import write_whole
from models.fingerprint import adapter_files
from models.rows import Rows
from models.script import Stopped
from models.transfer import index_on
from training.stop import any_rank

WRITE_SECONDS = 5 * 60  # a job that is killed loses at most what these computed


def weights_digest(folder: Path, adapter: Path | None) -> str:
    """Returns the SHA-256 of a folder's config.json and weight files, and of an adapter's files, read completely: at
    most a second per GB. The main rank reads them (which warms the page cache for loading) and broadcasts the result. A
    collective."""

    def read() -> str:
        paths = [folder / "config.json", *WeightFiles(folder).paths()]
        paths += [] if adapter is None else adapter_files(adapter)
        with ThreadPoolExecutor(4) as pool:  # hashlib lets other threads run
            return hashlib.sha256(bytes.fromhex("".join(pool.map(digest, paths)))).hexdigest()

    return on_main(read)


def pairs_digest(pairs: Rows) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            digest.update(np.concatenate(([len(side.input_ids)], side.input_ids, side.labels)).astype(np.int64))
    return digest.hexdigest()


class ReferenceCache(NamedTuple):
    """Where a reference's log-probs are cached, and the key of what they depend on: weights and computation."""

    folder: Path
    key: dict[str, str]
    tolerance: float  # how far a recomputed batch may be from the file, relative to 1 + |log-probability|


def precompute(
    logps_of: Callable, name: str, pairs: Rows, batches: list[list[int]], cache: ReferenceCache, split: Split
) -> None:
    """Sets `pairs.reference`, NaN outside `batches`: reads log-probs from the cache file of this name, and computes and
    adds missing ones, every WRITE_SECONDS and before a signal ends the run. A collective.

    logps_of(pairs): returns the reference's log-probs of some pairs, [2, B]; called for micro-batches of the batches,
    which should be those of training. Raises ValueError if a recomputed batch differs from the file, if the file cannot
    be read, or if a value is not finite.
    """
    # not beside the weights: vLLM, for one, takes each .safetensors file of a folder without an index for weights
    path, device = cache.folder / "reference" / f"{name}.safetensors", torch.device(split.dp.device_type)
    key = {**cache.key, "pairs": pairs_digest(pairs)}
    own = torch.zeros(len(pairs), 2, device=device)  # those that this rank computed

    def compute(numbers: list[int]) -> None:
        for rows in split.numbers(pairs, numbers):
            own.index_copy_(0, index_on(rows, device), logps_of([pairs[i] for i in rows]).T)

    def computed(numbers: list[int]) -> Tensor:
        """Returns those of all ranks, [numbers, 2] on the CPU."""
        return split.sum(own.clone()).cpu()[numbers]

    logps = on_main(lambda: _read(path, key, len(pairs)))
    missing = [numbers for numbers in batches if logps[numbers].isnan().any()]
    known = [numbers for numbers in batches if not logps[numbers].isnan().any()]
    if known:
        numbers = on_main(lambda: random.choice(known))
        compute(numbers)
        _check_equal(path, numbers, computed(numbers), logps[numbers], cache.tolerance)
        say(f"{path}: log-probs of the reference read, a batch of {len(numbers)} recomputed and found equal")

    def write(done: list[list[int]]) -> None:
        numbers = [i for batch in done for i in batch]
        if not numbers:
            return
        logps[numbers] = computed(numbers)
        for i, is_finite in zip(numbers, logps[numbers].isfinite().all(dim=1).tolist()):
            if not is_finite:
                raise ValueError(f"the reference gives record {i} (from 0) {_shown(logps[i])}, not finite")
        on_main(lambda: _write(path, logps, key))

    done, written_at = [], time.monotonic()
    try:
        for numbers in short_bar(missing, "reference log-probs", "batch"):
            compute(numbers)
            done.append(numbers)
            if any_rank([time.monotonic() - written_at >= WRITE_SECONDS])[0]:
                write(done)
                done, written_at = [], time.monotonic()
    except Stopped:  # on all ranks, before the same micro-batch
        write(done)
        raise
    write(done)
    pairs.reference = logps.numpy()


def _check_equal(path: Path, numbers: list[int], again: Tensor, stored: Tensor, tolerance: float) -> None:
    gap = ((again - stored).abs() / (1 + again.abs())).amax(dim=1)
    if not (gap <= tolerance).all():
        worst = int(gap.argmax())
        raise ValueError(
            f"{path}: record {numbers[worst]} (from 0) has log-probabilities {_shown(stored[worst])} there, and "
            f"{_shown(again[worst])} when computed again; remove the file to compute all anew"
        )


def _shown(logps: Tensor) -> str:
    return " and ".join(f"{value:.5g}" for value in logps.tolist())


def _write(path: Path, logps: Tensor, key: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({"logps": logps}, metadata=key))  # save_file on a full disk raises no OSError


def _read(path: Path, key: dict[str, str], num_pairs: int) -> Tensor:
    """Reads the log-probs in a file, [pairs, 2], NaN where not computed; all NaN if there is no file with this key."""
    nothing = torch.full((num_pairs, 2), torch.nan)
    if not path.exists():
        return nothing
    try:
        with safe_open(path, framework="pt") as file:
            stored_key, logps = file.metadata(), file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read, remove it to compute it anew: {error}") from None
    if stored_key != key:
        say(f"{path}: is for other pairs, another reference or another dtype; computing anew")
        return nothing
    return logps
