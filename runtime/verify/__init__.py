"""Verification: is an engine the model that its checkpoint describes, and if not, where does it part from it?

`verify` runs an engine, and the PyTorch reference on what the engine computed, step by step; `compare_engines` two engines.
"""

from gatework.runtime.verify.bounds import DEFAULT_BOUNDS, Bounds
from gatework.runtime.verify.checks import compare_engines, verify
from gatework.runtime.verify.report import Check, Divergence, VerifyReport
from gatework.runtime.verify.stages import Stage

__all__ = ["DEFAULT_BOUNDS", "Bounds", "Check", "Divergence", "Stage", "VerifyReport", "compare_engines", "verify"]
