"""mirrorscope: which training examples made this model do that, with forward passes only."""

import os

__version__ = "0.1.0"

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Read when torch is loaded, here and in the workers of an embedded Ray: a thread that waits lets others run."""
