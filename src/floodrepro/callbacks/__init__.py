"""Callbacks for any TerraTorch recipe, with or without the rest of floodrepro."""

from floodrepro.callbacks.exact_resume import AtomicCheckpointIO, ExactResume
from floodrepro.callbacks.nan_guard import NaNGuard
from floodrepro.callbacks.run_record import RunRecord

__all__ = ["AtomicCheckpointIO", "ExactResume", "NaNGuard", "RunRecord"]
