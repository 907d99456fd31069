"""How far an engine may be from its reference, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Largest deviations that pass; None: the deviation is reported and not judged.

    relative: max |difference| / max |logit| of each row of logits.
    greedy_margin: where the engine's best token is not the reference's, how much the reference prefers its own, as a share
        of its largest |logit|.
    mean_kl: mean KL(reference || engine) per position, in nats; prefill and decode are judged apart.
    perplexity: |engine's / reference's - 1| on a text.
    """

    relative: float | None = None
    greedy_margin: float | None = None
    mean_kl: float | None = None
    perplexity: float | None = None


DEFAULT_BOUNDS: dict[str, Bounds] = {
    # The same float32 products summed in another order: unit roundoff 6e-8, a few hundred terms a sum and a few dozen sums
    # in a row leave about 1e-6; a wrong operator shows at 1e-3. The same error may flip the best token only where two are
    # equal within it. An error of 1e-5 in every logit moves a token's loss by some 1e-4, with either sign: the mean by less.
    "fp32": Bounds(relative=1e-5, greedy_margin=1e-5, perplexity=1e-4),
    # 127 steps to a group's largest weight: each weight is off by up to 0.4 % of it, and activations, which these kernels
    # round to 8 bits as well, by as much. 0.01 nats is one part in a hundred of a token's probability.
    "int8": Bounds(mean_kl=0.01, perplexity=0.005),
    # 8 steps instead of 127: sixteen times the error in a weight; KL grows with its square, but starts from far below the
    # int8 bound.
    "int4": Bounds(mean_kl=0.05, perplexity=0.03),
}
