"""Re-run, check and trust the fine-tuning of TerraMind for flood mapping."""

__version__ = "0.2.0"
