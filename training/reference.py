"""What the frozen reference thinks of pairs, computed once before training and kept beside the run.

- the file is keyed by the pairs' tokens, the bytes of the reference's weights and the dtypes of the computation; one of
  another key is computed anew, one of the same key is read, and a random batch of it is computed again and compared
- a matrix product in bf16 may give a row other bits in another batch. So pairs are grouped as the first epoch groups
  them, and a policy that begins as the reference begins with a loss of ln 2, on a CPU to the last bit (a GPU's kernels
  and its compiler may round otherwise where gradients are wanted)
"""

import hashlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.checkpoint import WeightFiles
from models.checksums import digest
from models.common import on_main, progress_bar, say
from models.files import write_whole
from models.fingerprint import adapter_files
from models.records import Split
from models.rows import Rows
from models.transfer import index_on


def weights_digest(folder: Path, adapter: Path | None) -> str:
    """SHA-256 of a folder's config.json and weight files, and of an adapter's files, whole: a second or less for each
    GB. The main rank reads them (they are about to be loaded, so this warms the page cache) and tells the others: a
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
    """Where log-probs of a reference are kept, and what they depend on: the weights and the computation."""

    folder: Path
    key: dict[str, str]
    tolerance: float  # how far a batch computed again may be from the file, relative to 1 + |log-probability|


def precompute(
    logps_of: Callable, name: str, pairs: Rows, batches: list[list[int]], cache: ReferenceCache, split: Split
) -> None:
    """Sets `reference` of the pairs, NaN outside `batches`, from the file of that name or computed and added to it: a
    collective.

    logps_of(pairs): what the reference gives for some of them, [2, B]; called for micro-batches of the batches, which
    should be those of training. Raises ValueError if a batch computed again is not near the file's, if the file cannot
    be read, or for a value that is not finite.
    """
    path, device = cache.folder / f"ref_logps_{name}.safetensors", torch.device(split.dp.device_type)
    key = {**cache.key, "pairs": pairs_digest(pairs)}

    def compute(batches: list[list[int]]) -> Tensor:
        """[pairs, 2] on the CPU, 0 outside the batches."""
        logps = torch.zeros(len(pairs), 2, device=device)
        for numbers in progress_bar(iterable=batches, desc="reference log-probs", unit="batch", delay=1, leave=False):
            for rows in split.numbers(pairs, numbers):
                logps.index_copy_(0, index_on(rows, device), logps_of([pairs[i] for i in rows]).T)
        return split.sum(logps).cpu()

    logps = on_main(lambda: _read(path, key, len(pairs)))
    missing = [numbers for numbers in batches if logps[numbers].isnan().any()]
    known = [numbers for numbers in batches if not logps[numbers].isnan().any()]
    if known:
        draw = torch.tensor(random.randrange(2**31), device=device)
        if dist.get_world_size() > 1:
            dist.broadcast(draw, src=0)
        numbers = known[int(draw) % len(known)]
        again = compute([numbers])[numbers]
        gap = ((again - logps[numbers]).abs() / (1 + again.abs())).amax(dim=1)
        if not (gap <= cache.tolerance).all():
            worst = numbers[int(gap.argmax())]
            raise ValueError(
                f"{path}: record {worst} (from 0) has log-probabilities {_shown(logps[worst])} there, and "
                f"{_shown(again[numbers.index(worst)])} when computed again; remove the file to compute all anew"
            )
        say(f"{path}: log-probs of the reference read, a batch of {len(numbers)} computed again and found equal")
    if missing:
        numbers = [i for batch in missing for i in batch]
        logps[numbers] = compute(missing)[numbers]
        for i, is_finite in zip(numbers, logps[numbers].isfinite().all(dim=1).tolist()):
            if not is_finite:
                raise ValueError(f"the reference gives record {i} (from 0) {_shown(logps[i])}, not finite")
        on_main(lambda: _write(path, logps, key))
    pairs.reference = logps.numpy()


def _shown(logps: Tensor) -> str:
    return " and ".join(f"{value:.5g}" for value in logps.tolist())


def _write(path: Path, logps: Tensor, key: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({"logps": logps}, metadata=key))  # save_file's errors of a full disk are no OSError


def _read(path: Path, key: dict[str, str], num_pairs: int) -> Tensor:
    """The log-probs in a file, [pairs, 2], NaN where not computed: all, if there is none of this key."""
    nothing = torch.full((num_pairs, 2), torch.nan)
    if not path.exists():
        return nothing
    try:
        with safe_open(path, framework="pt") as file:
            stored_key, logps = file.metadata(), file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read, remove it to compute it anew: {error}") from None
    if stored_key != key:
        say(f"{path}: of other pairs, another reference or another dtype; computing anew")
        return nothing
    return logps
