"""How the corpus's loss bends, in forms that can be inverted: one module per curvature, `base.py` holds the protocol."""

BUILTIN = {
    "gauss_newton": "pipeline.curvatures.gauss_newton:GaussNewton",
    "ekfac": "pipeline.curvatures.ekfac:EKFAC",
    "gfim": "pipeline.curvatures.gfim:GFIM",
    "diagonal": "pipeline.curvatures.diagonal:Diagonal",
}
"""Word in the spec -> class."""
