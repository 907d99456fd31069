"""How far an engine may be from its reference, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Largest deviations that pass; None: the deviation is reported and not judged.

    relative: max |difference| / max |logit| of each row of logits.
    amplified: where that is more, so many times the largest error of a row whose every step was compared, if rounding explains
        all of them; for the steps of a model, not for engines against each other.
    greedy_margin: where the engine's best token is not the reference's, how much the reference prefers its own, as a share
        of its largest |logit|.
    mean_kl: mean KL(reference || engine) per position, in nats; prefill and decode are judged apart.
    top1: share of positions whose most likely token is another.
    perplexity: |engine's / reference's - 1| on a text.

    The first two judge the sums, the others what quantisation costs the model.
    """

    relative: float | None = None
    amplified: float | None = None
    greedy_margin: float | None = None
    mean_kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None


DEFAULT_BOUNDS: dict[str, Bounds] = {
    # The same float32 products summed in another order: unit roundoff 6e-8, a few hundred terms a sum and a few dozen sums
    # in a row leave about 1e-6; a wrong operator shows at 1e-3. The same error may flip the best token only where two are
    # equal within it. An error of 1e-5 in every logit moves a token's loss by some 1e-4, with either sign: the mean by less.
    # A model whose attention is sharp amplifies rounding more than that, and some rows more than others.
    "fp32": Bounds(relative=1e-5, amplified=4.0, greedy_margin=1e-5, perplexity=1e-4),
    # Rounding every product to 8 bits of mantissa: KL 0.0003 and no change of perplexity on the bundled model, simulated in
    # float32 (benchmarks/README.md). float16 keeps 3 bits more. On an H100 cuda engines
    # of both stayed within these.
    "bf16": Bounds(mean_kl=0.003, perplexity=0.002),
    "fp16": Bounds(mean_kl=0.003, perplexity=0.002),
    # 4 bits of mantissa in weights and activations: KL 0.0014 and perplexity +0.2 % in the same simulation, 0.006 and +0.5 %
    # with attention and head in fp8, as a dense model's attention is.
    "fp8": Bounds(mean_kl=0.02, perplexity=0.015),
    # 127 steps to a group's largest weight, and activations rounded to 8 bits as well: products are off by some 0.5 %.
    # A trained model's logits hardly move (KL 0.0006 on the bundled one); 0.01 nats is where a token's probability is
    # off by a few per cent. A random model is no fair subject: its router follows any error. Pass bounds of your own for it.
    "int8": Bounds(mean_kl=0.003, perplexity=0.005),
    # 8 steps instead of 127, softened by scales of least squared error and groups of 32 weights: KL grows with the square
    # of the error (0.007 on the bundled model, whose attention has 8 bits; 0.02 where it has 4), and perplexity with KL.
    "int4": Bounds(mean_kl=0.03, perplexity=0.03),
}
