"""Where a base model comes from: one module per kind of checkpoint, `base.py` holds the protocol."""

BUILTIN = {
    "torch_module": "pipeline.loaders.torch_module:TorchModule",
    "hf_transformers": "pipeline.loaders.hf_transformers:HfTransformers",
}
"""Word in the spec -> class."""
