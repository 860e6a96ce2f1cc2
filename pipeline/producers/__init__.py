"""How a counterpart is made from the base model and a query: one module per producer, `base.py` holds the protocol."""

BUILTIN = {
    "unlearn": "pipeline.producers.unlearn:Unlearn",
    "finetune": "pipeline.producers.finetune:Finetune",
}
"""Word in the spec -> class."""
