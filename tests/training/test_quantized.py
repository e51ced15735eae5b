"""Quantised references and reward models in train_dpo.py and train_ppo.py, and the refusal to train quantised
folders."""

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.qlinear import Scheme, dequantize, quantize
from tests import tiny
from tests.inference.test_score import write_reward_model
from tests.ranks import launch
from tests.training.test_finetune_sft import weights_of

GROUPS = {"int8": [], "int4": ["--group_size", 32]}
SCHEMES = {"int8": Scheme("int8"), "int4": Scheme("int4", 32)}
INT4 = ["--mode", "int4", *GROUPS["int4"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Writes a policy, a reference and a reward model, each also in int8, in int4 and as plain folders of the
    dequantised weights, and pairs and prompts."""
    root = tmp_path_factory.mktemp("frozen")
    config = {"attention_bias": True, "intermediate_size": 128, "num_hidden_layers": 1}
    tiny.write_model(root / "policy", **config)
    tiny.write_model(root / "ref", seed=3, **config)
    write_reward_model(root / "rm", **config)
    for name in ("ref", "rm", "policy"):
        for mode, flags in (("int8", ["--mode", "int8"]), ("int4", INT4)):
            out = ["--output_dir", root / f"{name}-{mode}"]
            assert tiny.run("scripts/quantize.py", "--checkpoint_path", root / name, *out, *flags).code == 0
            dequantised(root / name, root / f"{name}-{mode}-plain", SCHEMES[mode])
    pairs = [
        {"prompt": f"{i} plus", "chosen": f" {i} is" + " it" * (i % 4), "rejected": " or" * (i * 5 % 7)}
        for i in range(9)
    ]
    tiny.write_records(root / "pairs.jsonl", pairs)
    tiny.write_records(root / "prompts.jsonl", [{"prompt": f"Question {i}:" + " so" * (i % 3)} for i in range(5)])
    return root


def dequantised(source, target, scheme):
    tiny.copy_to_edit(source, target)
    weights = load_file(target / "model.safetensors")
    for name in weights:
        if name.endswith("proj.weight"):
            weights[name] = dequantize(quantize(weights[name], scheme))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def dpo_flags(world, out, *more):
    flags = ["--checkpoint_path", world / "policy", "--train_file", world / "pairs.jsonl", "--output_dir", out]
    flags += [
        "--device",
        "cpu",
        "--batch_size",
        4,
        "--micro_batch_size",
        2,
        "--learning_rate",
        1e-3,
        "--adam_eps",
        1e-3,
    ]
    return [*flags, "--max_steps", 2, *more]


def ppo_flags(world, out, *more):
    flags = ["--checkpoint_path", world / "policy", "--prompt_file", world / "prompts.jsonl", "--output_dir", out]
    flags += ["--device", "cpu", "--max_new_tokens", 6, "--total_steps", 2, "--rollout_batch_size", 4]
    flags += [
        "--ppo_epochs",
        1,
        "--learning_rate",
        1e-3,
        "--adam_eps",
        1e-3,
        "--value_checkpoint_path",
        world / "rm",
        "--kl_coef",
        0.3,
    ]
    return [*flags, *more]


def lines_of(script, flags):
    result = tiny.run(f"training/{script}.py", *flags)
    assert result.code == 0, result.stderr
    return tiny.read_lines(flags[flags.index("--output_dir") + 1] / "metrics.jsonl"), result.stdout


def assert_alike(found, wanted, tolerance=1e-4):
    for line, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            if "second" not in name and not name.startswith("time/"):
                assert line[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("when, mode", [("--precompute_ref", "int8"), ("--no-precompute_ref", "int4")])
def test_dpo_reference(world, tmp_path, when, mode):
    """Catches a reference that is not quantised, or quantised differently from its folder, and the policy used in its
    place: the run must be that with a plain reference of the dequantised weights."""
    plain, _ = lines_of("train_dpo", dpo_flags(world, tmp_path / "none", when))
    for name in ("ref", "policy"):  # another model, or the policy's start
        own = ["--ref_checkpoint_path", world / "ref"] if name == "ref" else []
        by_folder = ["--ref_checkpoint_path", world / f"{name}-{mode}"]
        dequantised = ["--ref_checkpoint_path", world / f"{name}-{mode}-plain"]
        wanted, _ = lines_of("train_dpo", dpo_flags(world, tmp_path / f"{name}-wanted", when, *dequantised))
        found, card = lines_of("train_dpo", dpo_flags(world, tmp_path / f"{name}-folder", when, *by_folder))
        assert_alike(found, wanted)
        assert mode in card and abs(plain[0]["loss"] - found[0]["loss"]) > 1e-4
        by_flag = ["--quantize_ref", mode, *GROUPS[mode]]
        flags = dpo_flags(world, tmp_path / f"{name}-flag", when, *own, *by_flag)
        assert_alike(lines_of("train_dpo", flags)[0], found, tolerance=0)
        if when == "--precompute_ref":
            with safe_open(tmp_path / f"{name}-flag/reference/train.safetensors", framework="pt") as file:
                assert file.metadata()["quantised"] == str(SCHEMES[mode])
        (tmp_path / f"{name}-flag/config.json").unlink()
        flags[flags.index("--quantize_ref") :] = ["--resume"]
        tiny.assert_refused(tiny.run("training/train_dpo.py", *flags), "--quantize_ref")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_ppo_reference_and_reward(world, tmp_path, mode):
    """Catches a reference or a reward model that is not quantised, or is taken for the other or for the critic: the run
    must be that with plain folders of the dequantised weights."""
    paths = lambda suffix: [  # noqa: E731
        *["--ref_checkpoint_path", world / f"ref-{mode}{suffix}"],
        *["--reward_checkpoint_path", world / f"rm-{mode}{suffix}"],
    ]
    wanted, _ = lines_of("train_ppo", ppo_flags(world, tmp_path / "wanted", *paths("-plain")))
    found, card = lines_of("train_ppo", ppo_flags(world, tmp_path / "folder", *paths("")))
    assert_alike(found, wanted)
    assert card.count(mode) >= 2
    given = ["--ref_checkpoint_path", world / "ref", "--reward_checkpoint_path", world / "rm", *GROUPS[mode]]
    plain, _ = lines_of("train_ppo", ppo_flags(world, tmp_path / "plain", *given[:4]))
    flags = ppo_flags(world, tmp_path / "flag", *given, "--quantize_ref", mode, "--quantize_reward", mode)
    assert_alike(lines_of("train_ppo", flags)[0], found, tolerance=0)
    for name in ("objective/scores", "objective/kl"):  # and each of the two matters
        assert any(abs(a[name] - b[name]) > 1e-4 for a, b in zip(plain, found)), name
    resumed = [flag for flag in flags if flag != "--quantize_reward"]
    resumed.remove(mode)
    tiny.assert_refused(tiny.run("training/train_ppo.py", *resumed, "--resume"), "--quantize_reward")


def test_four_ranks(world, tmp_path):
    """Catches quantised models that are not sharded over tp with their scales, or differ over dp: results must be those
    of one process."""
    dpo = ["--ref_checkpoint_path", world / "ref-int4", "--no-precompute_ref"]
    ppo = ["--ref_checkpoint_path", world / "ref", "--quantize_ref", "int8"]
    ppo += ["--reward_checkpoint_path", world / "rm-int4"]
    jobs, wanted = [], {}
    for script, make, more in (("train_dpo", dpo_flags, dpo), ("train_ppo", ppo_flags, ppo)):
        wanted[script], _ = lines_of(script, make(world, tmp_path / f"{script}-one", *more))
        flags = make(world, tmp_path / script, *more, "--tensor_parallel_size", 2)
        jobs.append([f"training.{script}", *map(str, flags)])
    launch(4, jobs)
    for script, lines in wanted.items():
        assert_alike(tiny.read_lines(tmp_path / script / "metrics.jsonl"), lines, tolerance=1e-3)
        one, four = weights_of(tmp_path / f"{script}-one"), weights_of(tmp_path / script)
        for name, weight in one.items():
            assert (weight - four[name]).abs().max() < 1e-3, name


TRAINED = {  # script: its flags without --checkpoint_path
    "finetune_sft": ["--train_file", "{root}/pairs.jsonl"],
    "train_rm": ["--train_file", "{root}/pairs.jsonl"],
    "train_dpo": ["--train_file", "{root}/pairs.jsonl"],
    "train_ppo": [
        "--prompt_file",
        "{root}/prompts.jsonl",
        "--reward_checkpoint_path",
        "{root}/rm",
        "--max_new_tokens",
        "6",
    ],
}


@pytest.mark.parametrize("script", TRAINED)
def test_nothing_trains_quantised_weights(world, tmp_path, script):
    """Catches quantised weights that are trained, and a refusal that lists tensors, is a traceback or leaves output."""

    def refused(*parts, model="policy-int8", more=()):
        flags = [flag.replace("{root}", str(world)) for flag in TRAINED[script]]
        flags += ["--checkpoint_path", world / model, "--output_dir", tmp_path / "out", "--device", "cpu", *more]
        tiny.assert_refused(tiny.run(f"training/{script}.py", *flags), *parts)
        assert not (tmp_path / "out").exists()

    refused(str(world / "policy-int8"), "quantised weights are frozen")
    if script in ("train_dpo", "train_ppo"):
        refused("--group_size", "--quantize_ref", model="policy", more=["--quantize_ref", "int8", "--group_size", 64])
    if script == "train_ppo":
        critic = ["--value_checkpoint_path", world / "rm-int4"]
        refused("rm-int4", "quantised weights are frozen", model="policy", more=critic)
        reward = ["--reward_checkpoint_path", world / "rm-int4"]
        refused("rm-int4", "critic", "--value_checkpoint_path", model="policy", more=reward)
        other = [*reward, "--value_checkpoint_path", world / "rm", "--quantize_reward", "int8"]
        refused("--quantize_reward int8", "rm-int4", "already", model="policy", more=other)
