"""How many pages of a KV cache fit into memory, and how many rows to run with them."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from models.limits import available_memory
from models.model import Transformer
from models.pages import PAGE, pages_for
from models.scheduler import CONTEXTS
from models.tp import size_of
from models.vocab_parallel import most_columns

MOST_SLOTS = {"cuda": 256, "cpu": 16}  # of --batch_size auto
SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the free memory, for the cache and the tensors of the computation


class CachePlan(NamedTuple):
    """max_seq_len: most tokens that a sequence may have. note: a text for progress messages."""

    num_slots: int
    num_pages: int
    max_seq_len: int
    note: str


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: on a GPU, including its allocator's unused memory, or its share of
    the host's, which the ranks there divide."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def page_bytes(model: Transformer, *, compile: bool = False) -> int:
    """Bytes of a page of the cache, over all layers, on this tp rank. A CPU keeps keys in fp32, and a compiled engine
    there values too (CPUCache and PagedCache)."""
    config, size = model.config, model.dtype.itemsize
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    of_key, of_value = 4 if on_cpu else size, 4 if on_cpu and compile else size
    heads = config.num_key_value_heads // size_of(model.parallel.tp)
    return config.num_hidden_layers * PAGE * heads * config.head_dim * (of_key + of_value)


def plan_cache(
    model: Transformer,
    *,
    num_slots: int | None,
    num_requests: int,
    usual_tokens: int,
    known_tokens: int,
    most_tokens: int,
    prefill_tokens: int,
    reserved: int = 0,
    compile: bool = False,
    advice: str = "shorten --max_seq_len, --max_new_tokens or --prefill_tokens",
) -> CachePlan:
    """Plans the rows and pages of an inference copy that is in memory. A collective of the tensor-parallel ranks.

    num_slots: None for as many as memory holds if sequences have usual_tokens; if pages run out all the same, the
    engine preempts samples and prefills them again. known_tokens, most_tokens: the length of the longest known
    sequence, and of the longest possible one. reserved: bytes of the free memory that are for other uses. compile:
    whether the engine is compiled. Raises ValueError, with the advice, if the longest known sequence does not fit.
    """
    device, tp, config = model.embed_tokens.weight.device, model.parallel.tp, model.config
    size = model.dtype.itemsize
    most_slots = max(1, min(num_slots or MOST_SLOTS[device.type], num_requests))
    columns = most_columns(config.vocab_size, tp)
    widths = 8 * config.hidden_size + 4 * config.intermediate_size // size_of(tp)
    longest, of_page = max(known_tokens, most_tokens), page_bytes(model, compile=compile)
    prefill_tokens = min(prefill_tokens, most_slots * longest)  # the rows together hold no more
    beside = size * prefill_tokens * widths + 6 * 4 * most_slots * columns  # a block's tensors, and those of sampling
    contexts = min(max(CONTEXTS * prefill_tokens, known_tokens), most_slots * longest)
    of_context = (1 + config.num_attention_heads // config.num_key_value_heads) * of_page  # repeated for all heads
    of_context /= PAGE * config.num_hidden_layers  # of one layer
    if size_of(tp) > 1:  # the first collective allocates NCCL's buffers
        dist.all_reduce(torch.zeros(1, device=device), group=tp.get_group())
    free = max(0, free_memory(device) - reserved)
    room = SHARE[device.type] * free - beside
    # a longer context also takes more pages: it is at most as long as memory has room for both
    contexts = max(contexts, min(most_tokens, int(room / (of_page / PAGE + of_context))))
    beside += of_context * contexts
    fitting = int((SHARE[device.type] * free - beside) // of_page)
    if size_of(tp) > 1:
        agreed = torch.tensor(fitting, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=tp.get_group())
        fitting = int(agreed)
    if fitting < pages_for(known_tokens):
        raise ValueError(
            f"the KV cache of one sequence of {known_tokens} tokens, {pages_for(known_tokens) * of_page / 1e9:.1f} GB, "
            f"does not fit into the {free / 1e9:.1f} GB of memory that are "
            f"{'left for it beside training' if reserved else 'free'}, beside {beside / 1e9:.1f} GB for the "
            f"computation; {advice}"
        )
    most_tokens = max(known_tokens, min(most_tokens, fitting * PAGE))
    slots = max(1, min(most_slots, fitting // pages_for(usual_tokens)) if num_slots is None else most_slots)
    num_pages = min(fitting, max(slots * pages_for(known_tokens), pages_for(most_tokens)))
    note = f"{slots} slot{'s' * (slots > 1)} over {num_pages:,} page{'s' * (num_pages > 1)} of {PAGE} tokens, "
    note += f"{num_pages * of_page / 1e9:.2f} GB"
    return CachePlan(slots, num_pages, most_tokens, note + f" of {free / 1e9:.1f} that are free" * (num_slots is None))
