"""How a counterpart is made from the base model and a query: one module per producer, `base.py` holds the protocol."""

BUILTIN = {
    "unlearn": "pipeline.producers.unlearn:Unlearn",
    "finetune": "pipeline.producers.finetune:Finetune",
    "retain": "pipeline.producers.retain:Retain",
    "natural": "pipeline.producers.natural:Natural",
    "reference": "pipeline.producers.reference:Reference",
    "mask_heads": "pipeline.producers.mask_heads:MaskHeads",
}
"""Word in the spec -> class."""
