"""What "loss of one example" means: one module per task, `base.py` holds the protocol."""

BUILTIN = {
    "classification": "pipeline.tasks.classification:Classification",
    "causal_lm": "pipeline.tasks.language:CausalLM",
    "seq2seq": "pipeline.tasks.language:Seq2Seq",
}
"""Word in the spec -> class."""
