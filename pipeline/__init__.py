"""mirrorscope: which training examples made this model do that, with forward passes only."""

__version__ = "0.1.0"
