"""Sampling settings of a folder's generation_config.json: the flags apply instead, and differences are named."""

from pathlib import Path

from models.files import read_json_object
from models.sampling import SamplingArgs

FLAGS = ("temperature", "top_k", "top_p", "repetition_penalty")
# Settings of transformers (5.23) that have no flag here, with the values at which they have no effect.
OTHERS = {
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": ([], ""),
    "token_healing": (False,),
    "watermarking_config": (),
    "dola_layers": ([],),
}


def settings_not_taken(folder: Path, args: SamplingArgs) -> str:
    """Returns a text that lists the settings of a folder's generation_config.json that differ from the flags; "" if
    there are none. Lengths are left out, since every caller chooses them, and so are stop tokens, which are applied."""
    asked = read_json_object(folder / "generation_config.json", missing_ok=True)
    differs = {name: asked[name] for name in FLAGS if asked.get(name) not in (None, getattr(args, name))}
    if asked.get("do_sample") is False:  # greedy, so temperature, top_k and top_p have no effect
        differs = {name: differs[name] for name in differs if name == "repetition_penalty"}
        differs = ({"do_sample": False} if args.temperature else {}) | differs
    differs |= {name: asked[name] for name, same in OTHERS.items() if asked.get(name) not in (None, *same)}
    return ", ".join(f"{name} {value}"[:80] for name, value in differs.items())
