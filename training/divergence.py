"""Detects a policy that diverges, or that learns nothing: warns once of each, and ends the run at --stop_kl."""

import math
from dataclasses import dataclass

from models.common import flag, positive, say
from training.stop import Stop


@dataclass(frozen=True, kw_only=True)
class DivergenceArgs:
    """Divergence of the policy."""

    stop_kl: float | None = flag(
        None,
        bounds=positive,
        help="end the run, exit code 2, when an update's KL to the reference exceeds this: train_ppo's objective/kl, "
        "nats per answer; train_grpo's kl, nats per token; default: off",
        may_change=True,
    )


class Divergence:
    """vocab_size: of the policy. flags: those with which the script keeps the policy near its reference."""

    def __init__(self, args: DivergenceArgs, vocab_size: int, flags: str, stop: Stop):
        self.stop_kl, self.flags, self.stop = args.stop_kl, flags, stop
        self.most_entropy, self.said = 0.8 * math.log(vocab_size), set()

    def look(
        self,
        step: int,
        *,
        kl: float,
        tokens: float = 1.0,
        entropy: float,
        approx_kl: float = 0.0,
        all_alike: bool = False,
    ) -> None:
        """Warns of values far above the usual, once per quantity. If kl exceeds --stop_kl, saves the state and raises
        ValueError. A collective; the values must be the same on all ranks.

        kl: to the reference, as logged, a sum over `tokens` tokens; 0 without a reference. entropy: per token.
        approx_kl: per token, between the policy that sampled and the one that trains. all_alike: whether the rewards
        of each group of GRPO are equal."""
        slower = "a lower --learning_rate"
        self._warn(step, "KL of a token", kl / tokens, 1.0, f"{slower}, {self.flags}, --stop_kl")
        self._warn(step, "approxkl of a token", approx_kl, 0.3, f"{slower}, fewer --ppo_epochs, --cliprange")
        advice = f"{slower}, {self.flags}, --temperature: near log V the policy samples at random"
        self._warn(step, "entropy of a token", entropy, self.most_entropy, advice)
        if all_alike:
            equal = "the rewards of each group are equal, so they teach nothing; if this goes on, check how answers are"
            advice = "rewarded, or try a higher --temperature, more --num_generations, --max_resamples"
            self._say_once(step, "rewards", f"{equal} {advice}")
        if self.ends(kl):
            self.stop.fail(
                f"--stop_kl {self.stop_kl}: the KL of update {step} is {kl:.4g}; take an earlier model of "
                f"--export_steps, or start a new run with {slower}, or {self.flags}"
            )

    def ends(self, kl: float) -> bool:
        """Whether --stop_kl ends the run after an update with this KL, as look() does."""
        return self.stop_kl is not None and kl > self.stop_kl

    def _warn(self, step: int, what: str, value: float, most: float, advice: str) -> None:
        if value > most:
            usual = f"far above what is usual ({most:.3g})"
            self._say_once(step, what, f"the {what} is {value:.4g} nats, {usual}; try {advice}")

    def _say_once(self, step: int, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            say(f"update {step}: {text}")
