"""What "loss of one example" means: one module per task, `base.py` holds the protocol."""

BUILTIN = {"classification": "pipeline.tasks.classification:Classification"}
"""Word in the spec -> class."""
