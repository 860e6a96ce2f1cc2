"""Entry points: the command, `ray job submit`, orchestrators, the demo."""
