"""How rows lie in files: one module per format, `base.py` holds the protocol."""

BUILTIN = {
    "parquet": "pipeline.formats.parquet:Parquet",
    "jsonl": "pipeline.formats.text:JsonLines",
    "csv": "pipeline.formats.text:Csv",
    "image_folder": "pipeline.formats.image_folder:ImageFolder",
}
"""Word in the spec -> class."""
