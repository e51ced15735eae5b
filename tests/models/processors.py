"""Prints as JSON what models/cpu_linear.py and models/qlinear.py compute on this processor. test_processors.py runs it
in a process whose environment names an older processor, which torch and oneDNN read when they are loaded."""

import json
import sys

import torch

from models import cpu_linear
from models.common import Runtime
from models.decode import load_for_inference
from models.generation import Engine, Request
from models.qlinear import QuantizedLinear, Scheme, dequantize, quantize
from models.sampling import SamplingParams

CPU = torch.device("cpu")
SCHEMES = {"none": None, "int8": Scheme("int8"), "int4": Scheme("int4", 32), "int8 in groups": Scheme("int8", 64)}
SCHEMES["int4 with zero points"] = Scheme("int4", 32, symmetric=False)
ROWS = (1, 2, 5, 40, 130)  # embedding bags, blocks of expanded weights, wide blocks
REQUESTS = [Request(i, 0, [1, *range(3 + i, 12 + 5 * i)], 8) for i in range(4)]


def errors(dtype: torch.dtype) -> dict[str, float]:
    """The largest relative error of a product against float64, by scheme and number of slots."""
    generator = torch.Generator().manual_seed(0)
    weight, worst = torch.randn(250, 192, generator=generator).bfloat16(), {}
    for name, scheme in SCHEMES.items():
        small = None if scheme is None else quantize(weight.float(), scheme._replace(symmetric=True))
        if small is not None and not scheme.symmetric:
            small = small._replace(zero=torch.randint(0, 16, small.scale.shape, dtype=torch.uint8, generator=generator))
        whole = (weight if small is None else dequantize(small)).double()
        for slots in (1, 4):  # of a decode step, which decide the form of the weights
            if small is None:
                product = cpu_linear.pack_weight(weight.to(dtype))
            else:
                product = QuantizedLinear([small], None, scheme, dtype)
                product.for_rows(slots)
            for rows in ROWS:
                x = torch.randn(rows, 192, generator=generator).to(dtype)
                wanted = x.double() @ whole.T
                error = ((product(x).double() - wanted).norm() / wanted.norm()).item()
                worst[f"{name}, {slots}"] = max(worst.get(f"{name}, {slots}", 0.0), error)
    return worst


def greedy_ids(folder: str, dtype: torch.dtype) -> dict[str, list[list[int]]]:
    found = {}
    for name, scheme in list(SCHEMES.items())[:3]:
        for slots in (1, 4):
            model = load_for_inference(folder, Runtime(CPU, dtype, False), scheme=scheme)
            engine = Engine(model, SamplingParams(0.0), num_slots=slots, max_seq_len=64)
            done = sorted(engine.generate(REQUESTS), key=lambda completion: completion.request.idx)
            found[f"{name}, {slots}"] = [completion.token_ids for completion in done]
    return found


def report(folder: str) -> dict:
    with torch.no_grad():
        return {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bf16": cpu_linear.has_bf16_products(),
            "fbgemm": cpu_linear.has_fbgemm(),
            "width": cpu_linear.block_width(10_000),
            "errors": {str(dtype): errors(dtype) for dtype in (torch.float32, torch.bfloat16)},
            "ids": {str(dtype): greedy_ids(folder, dtype) for dtype in (torch.float32, torch.bfloat16)},
        }


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1])))
