"""Verification: is an engine the model that its checkpoint describes?

`verify` feeds an engine and the PyTorch reference the same tokens and compares logits, greedy tokens and perplexity.
"""

from gatework.runtime.verify.bounds import DEFAULT_BOUNDS, Bounds
from gatework.runtime.verify.checks import verify
from gatework.runtime.verify.report import Check, VerifyReport

__all__ = ["DEFAULT_BOUNDS", "Bounds", "Check", "VerifyReport", "verify"]
