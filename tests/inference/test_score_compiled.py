"""inference/score.py --compile: the graphs of a reward model that torch.compile gets."""

import json

import pytest
import torch

from inference import score
from models.common import parse_args
from tests.inference.test_score import write_reward_model


@pytest.fixture
def graphs(monkeypatch):
    """The number of nodes of each graph that the compiler gets; it runs the graphs as they are."""
    found, compile_ = [], torch.compile

    def take(graph, inputs):
        found.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=take, **options))
    yield found
    torch.distributed.destroy_process_group()


def test_what_is_compiled_does_not_grow_with_layers(graphs, tmp_path):
    """Catches a model that is compiled as a whole, which takes minutes with 32 layers; a recompilation for each length
    or number of rows; and compiled scores that differ from uncompiled ones."""
    records = [{"prompt": "a " * (1 + i), "completion": "b " * (1 + 3 * i)} for i in range(9)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sizes, rewards = {}, {}
    for num_layers in (1, 5):
        write_reward_model(tmp_path / f"{num_layers}", num_hidden_layers=num_layers)
        for compile in (False, True):
            torch._dynamo.reset()
            graphs.clear()
            output = tmp_path / f"{num_layers}-{compile}.jsonl"
            flags = ["--checkpoint_path", tmp_path / f"{num_layers}", "--data_file", tmp_path / "records.jsonl"]
            flags += ["--output_file", output, "--batch_size", 2, "--device", "cpu"]
            flags += ["--compile"] if compile else ["--no-compile"]
            score.main(parse_args(score.ScoreArgs, [*map(str, flags)]))
            rewards[compile] = [json.loads(line)["reward"] for line in output.read_text().splitlines()]
        assert rewards[True] == pytest.approx(rewards[False], abs=1e-5)
        sizes[num_layers] = [*graphs]
    assert len(sizes[1]) == 2 and sizes[5] == sizes[1]  # one for several rows, one for the last alone
