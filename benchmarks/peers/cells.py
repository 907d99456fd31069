"""What is measured: the rows of the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. tokens: of the prompt, or decoded steps; batch, context: sequences, and positions before them."""

    phase: Literal["prefill", "decode"]
    tokens: int
    batch: int = 1
    context: int = 0

    def request(self) -> dict[str, Any]:
        return asdict(self)

    def speed(self, seconds: float) -> float:
        """Tokens per second, of all sequences together."""
        return self.tokens * self.batch / seconds


CELLS = {f"prefill-{tokens}": Cell("prefill", tokens) for tokens in (128, 512, 2048)}
CELLS |= {f"decode-b{batch}": Cell("decode", 24, batch, 128) for batch in (1, 4, 8)}
CELLS |= {f"decode-{thousands}k": Cell("decode", 24, 1, 1024 * thousands) for thousands in (1, 4, 16)}

OURS = {"int8": "gatework-int8", "int4": "gatework-int4", "int4 pure": "gatework-int4-pure"}
SETTINGS = {
    "int8": ("--precision", "int8"),
    "int4": ("--precision", "int4"),
    "int4 pure": ("--precision", "int4", "--pure", "--group-size", "128"),
}
# The peer that stores weights in as many bits.
SAME = {"int8": "llama.cpp-q8_0", "int4": "llama.cpp-q4_0", "int4 pure": "llama.cpp-q4_0"}
PEERS = tuple(dict.fromkeys((*OURS.values(), *SAME.values(), "transformers-bf16")))
LONGEST = 16 * 1024 + 256  # positions that engines are built for
# Logits of the int8 engine and of llama.cpp's Q8_0 correlate, in the median over PROMPTS, by AGREE at least. Not by more: where
# two experts of a random router nearly tie, rounding swaps them; transformers in bfloat16 and Q8_0 are as far apart.
PROMPTS = (1, 2, 3, 5, 8, 16, 33, 64, 100)
AGREE = 0.97
